"""Is a contestant's answer right? The float64 reference of a case, and how far off one may be.

The reference is `pymeta.MAML(backend="torch")` in float64, which tests/ holds against finite
differences and closed forms.

The tolerance. Rounding to nearest errs by at most u = 2^-24 of each intermediate, and a product of
depth n accumulates at most n of these. A gradient's longest chain of products passes the network
forward and backward once for each step, twice more in each Hessian-vector product (tangents
forward and backward, each made of two products), and forward and backward once on the query set:
6 K + 2 passes (2 K + 2 in first order), each of depth sum(max(in, out)), and sums over rows at the
end. So for each parameter tensor

    | g - g64 |_2 <= u * ((6 K + 2) * sum max(in, out) + S + Q) * mean over tasks of | G64_t |_2

where G64_t is the task's own gradient of all parameters of that layer: rounding in a sum that
cancels is of the size of what was summed, and a bias under batch normalisation, whose gradient is
0, cancels entirely. Rivals sum in other orders and have other exponentials; they get four times
that. It is a worst case: right answers lie far below it (the table shows where), and a first-order
gradient in place of the exact one lies far above (bench/test_verify.py).

Kinks. ReLU has no derivative at 0: where a ReLU's input lies within rounding of it, two right
answers differ by a row's share of a task's gradient. Among 1024 tasks that drowns; W2 has 32 tasks
with 15,360 ReLUs each, and batch normalisation over 5 rows magnifies rounding. So W2's tasks are
drawn, in float64, among those without such an input (`Case.margin`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

import pymeta
from bench.cases import Case, Data, draw
from bench.torch_rivals import LOSSES, make_model, tensors

SINGLES = 32  # tasks whose own gradient norms give the scale
CHUNK = 256  # tasks that the reference takes at once, a matter of memory
RIVAL_FACTOR = 4.0


@dataclass(frozen=True)
class Reference:
    """The right answer in float64, and the scale that errors are measured by."""

    loss: float
    gradients: list[np.ndarray]
    scales: list[float]  # of each tensor: mean over tasks of its layer's gradient norm


def _part(case: Case, data: Data, tasks: slice) -> tuple[float, list[np.ndarray]]:
    """Loss and gradients of some of the tasks, summed."""
    maml = pymeta.MAML(
        make_model(case, data),
        loss=case.loss,
        lr=case.lr,
        steps=case.steps,
        first_order=case.first_order,
        backend="torch",
    )
    part = data.of(tasks)
    out = maml(*tensors(part))
    out.loss.backward()
    count = len(part.xs)
    return count * out.loss.item(), [count * p.grad.numpy() for p in maml.parameters()]


def kink_distance(case: Case, data: Data) -> float:
    """How near 0 a ReLU's input comes in the one task of `data`, float64, at any of its steps.

    Relative to the root mean square of that layer's inputs.
    """
    xs, ys, xq, _ = (t[0] for t in tensors(data))
    model = make_model(case, data)
    nearest = float("inf")

    def run(x: torch.Tensor) -> torch.Tensor:
        nonlocal nearest
        for layer in model:
            if isinstance(layer, nn.ReLU):
                nearest = min(nearest, (x.abs().min() / x.square().mean().sqrt()).item())
            x = layer(x)
        return x

    for _ in range(case.steps):
        gradients = torch.autograd.grad(LOSSES[case.loss](run(xs), ys), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= case.lr * g
    run(xq)
    return nearest


def make_data(case: Case) -> Data:
    """The case's data, its tasks chosen away from kinks where the case asks for that."""
    if not case.margin:
        return draw(case)
    many = draw(replace(case, tasks=16 * case.tasks))
    exact = many.astype(np.float64)
    kept: list[int] = []
    for t in range(16 * case.tasks):
        if kink_distance(case, exact.of([t])) > case.margin:
            kept.append(t)
        if len(kept) == case.tasks:
            return many.of(kept)
    raise RuntimeError(f"{case.name}: only {len(kept)} tasks keep the margin {case.margin}")


def make_reference(case: Case, data: Data) -> Reference:
    """Compute the case in float64."""
    data = data.astype(np.float64)
    singles = [_part(case, data, slice(t, t + 1)) for t in range(min(SINGLES, case.tasks))]
    starts = range(len(singles), case.tasks, CHUNK)
    parts = singles + [_part(case, data, slice(t, t + CHUNK)) for t in starts]
    squares = np.array([[np.sum(g**2) for g in gradients] for _, gradients in singles])
    return Reference(
        sum(loss for loss, _ in parts) / case.tasks,
        [sum(g) / case.tasks for g in zip(*(gradients for _, gradients in parts), strict=True)],
        _scales(case, squares),
    )


def _scales(case: Case, squares: np.ndarray) -> list[float]:
    """From squared norms [task, tensor]: of each tensor the mean norm of its layer's gradient."""
    per_layer = 4 if case.batch_norm else 2
    layer = np.arange(squares.shape[1]) // per_layer
    return [float(np.sqrt(squares[:, layer == i].sum(1)).mean()) for i in layer]


def tolerance(case: Case) -> float:
    """The relative tolerance for float32, see above."""
    depth = sum(max(pair) for pair in case.layers)
    passes = (2 if case.first_order else 6) * case.steps + 2
    return 2.0**-24 * (passes * depth + case.support + case.query)


def error(reference: Reference, loss: float, gradients: Sequence[np.ndarray]) -> float:
    """The largest relative error of the loss and of each gradient tensor (NaN if any is)."""
    if len(gradients) != len(reference.gradients):
        raise AssertionError(f"{len(gradients)} gradients, not {len(reference.gradients)}")
    errors = [abs(loss - reference.loss) / abs(reference.loss)]
    for got, right, scale in zip(gradients, reference.gradients, reference.scales, strict=True):
        if got.shape != right.shape:
            raise AssertionError(f"gradient of shape {got.shape}, not {right.shape}")
        errors.append(float(np.linalg.norm(got - right)) / scale)
    return float(np.max(errors))


def check(
    case: Case, reference: Reference, name: str, loss: float, gradients: Sequence[np.ndarray]
) -> float:
    """The error in units of the tolerance; AssertionError where it is above 1 (rivals: 4)."""
    found = error(reference, loss, gradients) / tolerance(case)
    limit = 1.0 if name.startswith("pymeta") else RIVAL_FACTOR
    if not found <= limit:
        raise AssertionError(
            f"{case.name}, {name}: the error is {found:.3g} tolerances, {limit:g} allowed"
        )
    if found == 0:
        warnings.warn(f"{case.name}, {name}: no rounding error at all?", stacklevel=2)
    return found
