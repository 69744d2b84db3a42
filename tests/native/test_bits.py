"""A task's bits are its own: whatever tasks come along, in any order, on any number of threads, on
either executor, beside other callers.
"""

import math
import threading

import pytest
import torch
from cases import (
    FACTORED,
    LIN,
    SMOOTH,
    Case,
    Problem,
    cases,
    factored_cases,
    is_factored,
    meta_gradient,
    of_tasks,
)
from helpers import batch, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import (
    DTYPES,
    EXECUTORS,
    ISAS,
    PROFILE,
    same_bits,
    using,
)
from native_help import check_bits
from torch import nn

import pymeta


@settings(PROFILE)
@given(cases(tasks=(1, 3, 8, 17, 33, 70)), st.sampled_from(DTYPES), ISAS)
def test_a_tasks_bits_are_its_own(case, dtype, isa):
    """Alone, permuted, among others, on either executor, on any number of threads."""
    alone = {0, case.tasks // 2, case.tasks - 1}
    check_bits(case, dtype, isa, alone, threads=(2, 3, 5))


@settings(PROFILE, max_examples=15)
@given(factored_cases(), st.sampled_from(DTYPES), ISAS)
def test_a_factored_tasks_bits_are_its_own(case, dtype, isa):
    """As above, on the one executor that factors the first layer."""
    problem = Problem(case)
    module = problem.module(dtype)
    every = list(range(case.tasks))
    shuffled = torch.randperm(case.tasks).tolist()
    with using(isa, "rows", 1):
        wanted = problem.results(module)
        permuted = problem.results(module, shuffled)
        assert same_bits(of_tasks(permuted, every), of_tasks(wanted, shuffled))
        for t in {0, case.tasks - 1}:
            assert same_bits(of_tasks(problem.results(module, [t]), [0]), of_tasks(wanted, [t]))
    for executor, threads in (("rows", 2), ("rows", 3), ("auto", 2)):
        with using(isa, executor, threads):
            got = problem.results(module)
        assert same_bits(of_tasks(got, every), of_tasks(wanted, every))
        # the sum over tasks is the executor's, and an unfactored case may go to the other one
        if executor == "rows" or is_factored(problem, case.support):
            assert same_bits(meta_gradient(got), meta_gradient(wanted))


@settings(PROFILE, max_examples=40)
@given(cases(tasks=(2, 5, 17, 33)), st.sampled_from(DTYPES), ISAS)
def test_an_adapted_models_predictions_are_the_calls_own(case, dtype, isa):
    """predict() on what adapt() returned is the query pass of a call, in bits."""
    problem = Problem(case).judged_whole()
    module = problem.module(dtype)
    support, query = problem.support.to(dtype), problem.query.to(dtype)
    arguments, options = problem.arguments(support, query)
    kept = {k: v for k, v in options.items() if not k.startswith("query")}
    with using(isa, "rows"):
        wanted = problem.results(module)["predictions"]
    for executor in EXECUTORS:
        with using(isa, executor):
            models = module.adapt(*arguments[:2], **kept)
            sizes = query.sizes if case.form == "padded" else None
            got = models(arguments[2], query_sizes=sizes)
        got = [p[:n] for p, n in zip(got, query.sizes, strict=True)]
        assert same_bits(got, wanted), executor


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_earlier_calls_left_in_memory_does_not_matter(executor):
    """Working memory is handed from call to call; here full of NaN."""
    problem = Problem(Case(((LIN, 3, 5, True), ("tanh",), (LIN, 5, 2, True))))
    module = problem.module(torch.float32)
    spoilt = [torch.full_like(v, math.nan) for v in batch(inputs=3, dtype=torch.float32)]
    support, query = problem.support, problem.query
    with using(executor=executor, threads=1):
        wanted = problem.results(module)
        models = module.adapt(support.x, support.y)
        for width in range(60, 220, 20):  # more sizes than the core keeps blocks
            wide = mlp(3, width, 2, act=nn.Softplus, dtype=torch.float32)
            pymeta.MAML(wide, loss="mse", lr=0.1, steps=3, backend="native")(*spoilt)
        assert same_bits(list(models(query.x)), wanted["predictions"])
        got = problem.results(module)
        assert same_bits(of_tasks(got, range(3)), of_tasks(wanted, range(3)))
        assert same_bits(meta_gradient(got), meta_gradient(wanted))


@pytest.mark.parametrize("executor", ["rows", "lanes", "mixed", "stacked", "auto"])
def test_concurrent_callers_get_the_result_of_a_lone_one(executor):
    """More callers than cores, each wanting the pool; every call has the bits of the first."""
    sizes = (40, 3, 64, 17, 130, 1)
    many = [
        Problem(Case(FACTORED if i == 2 else SMOOTH["mlp"], tasks=tasks, seed=i, lr="network",
                     form="list" if i % 2 else "uniform", loss="cross_entropy"))
        for i, tasks in enumerate(sizes)
    ]  # fmt: skip
    modules = [p.module(DTYPES[i % 2]) for i, p in enumerate(many)]
    wrong, start = [], threading.Barrier(len(many))
    with using(executor=executor, threads=3):
        wanted = [p.results(m) for p, m in zip(many, modules, strict=True)]

        def work(i):
            try:
                start.wait()
                for _ in range(15):
                    got = many[i].results(modules[i])
                    same = same_bits(meta_gradient(got), meta_gradient(wanted[i]))
                    tasks = range(sizes[i])
                    if not same or not same_bits(of_tasks(got, tasks), of_tasks(wanted[i], tasks)):
                        wrong.append(i)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(many))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
