"""What the tests of the kernels share."""

import pytest
import torch
from cases import Problem
from helpers import gradients
from kernels import EPS, using


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
