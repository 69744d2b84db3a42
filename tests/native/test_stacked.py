"""The `stacked` executor: one inner step of groups of tasks from the start that they share.

Its passes differ from those of the other executors (csrc/core/algorithms/stacked.h), so all that
they may be asked for is drawn here: plain calls of linear layers, and what flows into their losses
and predictions. Other calls are left to `rows`.
"""

import collections
import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import Case, Problem, Wanted, meta_gradient, of_tasks
from flows import Flows, OperatorProblem
from helpers import LOSSES, MORE_LOSSES, batch, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import ACTIVATIONS, DTYPES, EPS, PROFILE, same_bits, using
from kinks import is_kinked, walk

import pymeta
from pymeta import native

WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 40)
TASKS = (2, 3, 4, 5, 6, 8, 9, 13, 16, 17, 20, 33)


@st.composite
def plain_chains(draw) -> tuple[tuple, ...]:
    """Linear layers with none, one or two activations behind each; perhaps one in front."""
    activation = st.sampled_from(sorted(ACTIVATIONS)).map(lambda name: (name,))
    width = draw(st.sampled_from(WIDTHS))
    chain = []
    for _ in range(draw(st.integers(1, 3))):
        following = draw(st.sampled_from(WIDTHS))
        chain.append(("linear", width, following, draw(st.booleans())))
        chain += [draw(activation) for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2))))]
        width = following
    return tuple(chain)


@st.composite
def plain_cases(draw) -> Case:
    chain = draw(plain_chains())
    loss = draw(st.sampled_from([*LOSSES, *MORE_LOSSES]))
    if loss in MORE_LOSSES and Case(chain).out % 2:  # some have two outputs for each target
        chain = (*chain, ("linear", Case(chain).out, Case(chain).out + 1, True))
    return Case(
        chain=chain,
        loss=loss,
        loss_options=draw(st.booleans()),
        tasks=draw(st.sampled_from(TASKS)),
        support=draw(st.integers(1, 12)),
        query=draw(st.integers(1, 12)),
        weights=draw(st.sampled_from((False, False, True))),
        steps=1,
        first_order=draw(st.sampled_from((False, False, True))),
        mask=draw(st.sampled_from((0, 0, 1, 2, 3))),
        input_gradients=False,
        seed=draw(st.integers(0, 2**31)),
    )


FLOWS = (
    Flows(("predictions",), of_parameters=True),
    Flows(("predictions",), of_parameters=True, targets=True),
    Flows(("task_losses",), of_parameters=True, targets=True),
    Flows(("loss", "task_losses", "predictions"), of_parameters=True, targets=True),
)


def make_problem(case: Case, flows: Flows | None) -> Problem:
    """Of the gradient of the loss, or of what is done with the losses and predictions."""
    return Problem(case) if flows is None else OperatorProblem(case, flows)


@pytest.mark.parametrize(("flows", "examples"), [(None, 50), *((flows, 15) for flows in FLOWS)])
def test_random_cases_against_the_reference(flows, examples):
    counts = collections.Counter()

    @settings(PROFILE, max_examples=examples)
    @given(plain_cases())
    def check(case):
        problem, dtypes, steepest = make_problem(case, flows), DTYPES, 1.0
        if is_kinked(case):
            nearest, steepest = walk(problem)
            if nearest < 64 * EPS[torch.float32]:
                dtypes = (torch.float64,)
        paths = [(isa, "stacked") for isa in native.isas()]
        Wanted(problem, steepest).check(dtypes, paths)
        counts.update(dtypes)

    check()
    assert counts[torch.float64] >= examples
    assert counts[torch.float32] >= 0.7 * examples


def test_a_tasks_bits_are_those_of_the_other_executors():
    """Alone, permuted, on any threads. Sums over tasks have an order of their own."""
    other_sums = collections.Counter()

    @settings(PROFILE, max_examples=40)
    @given(plain_cases(), st.sampled_from((None, *FLOWS)), st.sampled_from(DTYPES))
    def check(case, flows, dtype):
        problem = make_problem(case, flows)
        module = problem.module(dtype)
        every = list(range(case.tasks))
        shuffled = torch.randperm(case.tasks).tolist()
        for isa in native.isas():
            with using(isa, "rows", 1):
                wanted = problem.results(module)
            with using(isa, "stacked", 1):
                one_thread = problem.results(module)
                permuted = problem.results(module, shuffled)
                pair = problem.results(module, shuffled[:2])
            assert same_bits(of_tasks(one_thread, every), of_tasks(wanted, every))
            assert same_bits(of_tasks(permuted, every), of_tasks(wanted, shuffled))
            assert same_bits(of_tasks(pair, [0, 1]), of_tasks(wanted, shuffled[:2]))
            for threads in (2, 3):
                with using(isa, "stacked", threads):
                    got = problem.results(module)
                assert same_bits(of_tasks(got, every), of_tasks(wanted, every)), threads
                assert same_bits(meta_gradient(got), meta_gradient(one_thread)), threads
            same = same_bits(meta_gradient(one_thread), meta_gradient(wanted))
            other_sums[same] += 1

    check()
    assert other_sums[False] > other_sums[True]  # so most of them were not left to `rows`


REGRESSION = Case(
    (("linear", 1, 40, True), ("relu",), ("linear", 40, 40, True), ("relu",),
     ("linear", 40, 1, True)),
    tasks=25, support=10, query=10, steps=1, input_gradients=False, seed=1,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["support", "query"])
@pytest.mark.parametrize("tasks", [25, 27])  # the last group lacks three tasks, or one
@pytest.mark.parametrize("poison", [math.nan, math.inf, 3e38])
def test_what_one_task_holds_is_nothing_to_the_others(dtype, where, tasks, poison):
    case = replace(REGRESSION, tasks=tasks)
    problem = Problem(case)
    module = problem.module(dtype)
    for isa, spoiled in itertools.product(native.isas(), (0, 7, tasks - 1)):
        others = [t for t in range(tasks) if t != spoiled]
        with using(isa, "stacked", 1):
            wanted = problem.results(module)
            spoilt = Problem(case)
            getattr(spoilt, where).x[spoiled, 3] = poison
            got = spoilt.results(module)
        assert same_bits(of_tasks(got, others), of_tasks(wanted, others))


@pytest.mark.parametrize("rate", [1e12, 1e-12])
def test_rates_far_from_one(rate):
    """They are multiplied by where the products stay in range, as on the other executors."""
    problem = Problem(replace(REGRESSION, tasks=8, loss="l1", chain=(("linear", 3, 2, True),)))
    problem.rate = rate
    found = {}
    for executor in ("rows", "stacked"):
        with using(executor=executor):
            found[executor] = problem.results(problem.module(torch.float64))
    for a, b in zip(*map(meta_gradient, found.values()), strict=True):
        assert a.isfinite().all()
        assert (a - b).abs().max() <= 1e-12 * a.abs().max()


@pytest.mark.parametrize("flows", FLOWS)
@pytest.mark.parametrize("tasks", [4, 24, 25])  # of which `rows` has one that is left over
def test_what_flows_back_keeps_to_it(flows, tasks):
    """A gradient of losses or predictions has its sums: the call was not left to `rows`."""
    problem = OperatorProblem(replace(REGRESSION, tasks=tasks), flows)
    module = problem.module(torch.float64)
    found = {}
    for executor in ("rows", "lanes", "stacked", "auto"):
        with using(native.isas()[-1], executor, 1):
            found[executor] = meta_gradient(problem.results(module))
    assert same_bits(found["auto"], found["stacked"])
    assert not same_bits(found["rows"], found["stacked"])
    assert not same_bits(found["lanes"], found["stacked"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ones_into_the_losses_are_the_gradient_of_their_sum(dtype):
    """And what the loss would have let flow into the predictions is its gradient."""
    case = replace(REGRESSION, tasks=13)
    problem = Problem(case)
    module = problem.module(dtype)
    support, query = problem.support.to(dtype), problem.query.to(dtype)
    parameters = list(module.parameters())
    for isa in native.isas():
        with using(isa, "stacked", 1):
            out = module(support.x, support.y, query.x, query.y)
            slope = 2 * (out.predictions - query.y).detach() / query.y[0].numel() / case.tasks
            alone = module(support.x, support.y, query.x).predictions
            wanted = torch.autograd.grad(out.loss, parameters, retain_graph=True)
            by_losses = torch.autograd.grad(out.task_losses.mean(), parameters)
            by_predictions = torch.autograd.grad(alone, parameters, slope)
        assert same_bits(alone, out.predictions)
        for exact, *others in zip(wanted, by_losses, by_predictions, strict=True):
            for other in others:
                assert (other - exact).abs().max() <= 64 * EPS[dtype] * exact.abs().max()


def test_the_planner_takes_it_for_one_step_of_small_layers():
    data = batch(tasks=25, support=10, query=10, inputs=1, out=1, dtype=torch.float32)

    def ran(tasks=25, **options):
        net = mlp(1, 40, 40, 1, dtype=torch.float32)
        options = {"lr": 0.01, "steps": 1, **options}
        maml = pymeta.MAML(net, loss="mse", backend="native", **options)
        with using(native.isas()[-1], "auto", 1):
            maml(*(v[:tasks] for v in data)).loss.backward()
            return maml.explain()

    assert " stacked: " in ran()
    if native.isas()[-1] == "avx512":  # with vectors of eight `mixed` is as quick, to 2 %
        assert " stacked: " in ran(first_order=True)
    assert " stacked: " not in ran(steps=2)
    assert " stacked: " not in ran(lr=pymeta.LearnableLR(0.01))
    assert " stacked: " not in ran(tasks=1)
