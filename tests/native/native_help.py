"""What the tests of the kernels share."""

import math
from collections.abc import Collection

import pytest
import torch
from cases import Case, Problem, meta_gradient, of_tasks
from helpers import gradients
from kernels import EPS, EXECUTORS, same_bits, using

POISONS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 3e38}


def check_bits(
    case: Case,
    dtype: torch.dtype,
    isa: str,
    alone: Collection[int] = (0,),
    threads: Collection[int] = (3,),
) -> None:
    """A task's bits are its own: `alone`, permuted, on either executor, on so many `threads`."""
    problem = Problem(case)
    module = problem.module(dtype)
    every = list(range(case.tasks))
    shuffled = torch.randperm(case.tasks).tolist()
    with using(isa, "rows", 1):
        wanted = problem.results(module)
    of_lanes = None
    for executor in EXECUTORS:
        with using(isa, executor, 1):
            one_thread = problem.results(module)
            permuted = problem.results(module, shuffled)
            single = {t: problem.results(module, [t]) for t in alone}
        assert same_bits(of_tasks(one_thread, every), of_tasks(wanted, every)), executor
        assert same_bits(of_tasks(permuted, every), of_tasks(wanted, shuffled)), executor
        for t, result in single.items():
            assert same_bits(of_tasks(result, [0]), of_tasks(wanted, [t])), executor
        for count in threads:
            with using(isa, executor, count):
                got = problem.results(module)
            assert same_bits(of_tasks(got, every), of_tasks(wanted, every)), (executor, count)
            assert same_bits(meta_gradient(got), meta_gradient(one_thread)), (executor, count)
        if case.tasks == 1 and case.lr is None:  # nothing is summed over tasks
            assert same_bits(meta_gradient(one_thread), meta_gradient(wanted)), executor
        if executor == "lanes":
            of_lanes = one_thread
    assert of_lanes is not None
    for count in (1, *threads):
        with using(isa, "mixed", count):
            got = problem.results(module)
        assert same_bits(of_tasks(got, every), of_tasks(wanted, every)), ("mixed", count)
        assert same_bits(meta_gradient(got), meta_gradient(of_lanes)), ("mixed", count)


def check_isolation(
    case: Case, poison: str, where: str, dtype: torch.dtype, isa: str, threads=(1, 2)
) -> None:
    """What one task holds changes no bit of another's results: `where` is xs, ys or xq."""
    problem = Problem(case)
    side = problem.query if where == "xq" else problem.support
    spoiled = int(torch.randint(case.tasks, ()))
    others = [t for t in range(case.tasks) if t != spoiled]
    module = problem.module(dtype)
    paths = [(e, n) for e in EXECUTORS for n in threads]
    wanted = {}
    for path in paths:
        with using(isa, *path):
            wanted[path] = problem.results(module)
    values = side.y if where == "ys" and side.y.is_floating_point() else side.x
    no_probability = values is side.y and case.loss == "bce_with_logits"  # but for NaN, an error
    number = math.nan if no_probability else POISONS[poison]
    numbers = values.shape[-1]
    if values is side.x and case.chain[0][0] == "tabular":
        numbers = case.chain[0][3]  # a category that is none is an error
    values[spoiled, ..., :numbers] = number
    for path in paths:
        with using(isa, *path):
            got = problem.results(module)
        assert same_bits(of_tasks(got, others), of_tasks(wanted[path], others)), path
        for name in ("xs", "xq"):
            if case.input_gradients:
                assert same_bits(got[name][others], wanted[path][name][others]), path


def check_slope(problem: Problem, isa: str, executor: str) -> None:
    """The native gradient along a random line is the loss's own central difference.

    One with step h errs by h^2 times a third derivative, which the difference at 2h shows (theirs
    is four times as large), and by the rounding of the loss over h.
    """
    module = problem.module(torch.float64)
    support, query = problem.support.to(torch.float64), problem.query.to(torch.float64)
    inputs = [*module.parameters(), support.x.requires_grad_(), query.x.requires_grad_()]
    directions = [torch.randn_like(v) for v in inputs]
    start = [v.detach().clone() for v in inputs]

    def loss_at(step):
        with torch.no_grad():
            for v, s, d in zip(inputs, start, directions, strict=True):
                v.copy_(s + step * d)
        arguments, options = problem.arguments(support, query)
        return module(*arguments, **options).loss

    with using(isa, executor):
        value = loss_at(0.0)
        slope = sum(
            float((g * d).sum()) for g, d in zip(gradients(value, *inputs), directions, strict=True)
        )
        with torch.no_grad():
            near, far = (float(loss_at(h) - loss_at(-h)) / (2 * h) for h in (1e-5, 2e-5))
    rounding = 64 * EPS[torch.float64] * (1 + abs(float(value.detach()))) / 1e-5
    assert abs(slope) > 1e3 * rounding
    assert abs(slope - near) <= abs(near - far) + rounding


def check_slope_of_each_parameter(maml, data, *, rel: float, abs: float) -> None:
    """The gradient of `maml(*data).loss` along a random line of each parameter, likewise."""
    maml(*data).loss.backward()
    for p in maml.model.parameters():
        direction = torch.randn_like(p)
        slope = float((p.grad * direction).sum())
        ends = []
        for sign in (1e-5, -1e-5):
            with torch.no_grad():
                p.add_(direction, alpha=sign)
                ends.append(float(maml(*data).loss))
                p.add_(direction, alpha=-sign)
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=rel, abs=abs)
