"""Is a contestant's answer right? The float64 reference of a case, and how far off one may be.

The reference is `pymeta.MAML(backend="torch")` in float64, which tests/ holds against finite
differences and closed forms; for the other jobs `pymeta.Reptile` and `pymeta.FineTune`, which
tests/ holds against torch.optim.

The tolerance of a meta-gradient. Rounding to nearest errs by at most u = 2^-24 of each
intermediate, and a product of depth n accumulates at most n of these. A gradient's longest chain of
products passes the network forward and backward once for each step, twice more in each Hessian-
vector product (tangents forward and backward, each made of two products), and forward and backward
once on the query set: 6 K + 2 passes (2 K + 2 in first order), each of depth sum(max(in, out)), and
sums over rows at the end. So for each parameter tensor

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

The other jobs' tolerance. Adapted parameters after 20 or 32 steps cannot be bounded so: a product
of worst cases over so many steps says nothing, Adam makes a whole step of a gradient that should be
0 and is a rounding error, and gradient descent from a random start is chaotic in some tasks.
Most tasks are harmless all the same, and `bench/rounding.py` tells which: it follows drawn errors
of worst-case size through the loop. A task is kept if in `DRAWS` runs, in pairs of opposite errors
(where a sign hangs on an error, one of the two shows it), every parameter tensor stays within

    | theta' - theta64' |_2 <= margin * | theta64' - theta |_2    of all tensors of its layer

and the same is asked of a contestant for every task and tensor (rivals: four times that). For
theta - mean theta' the mean over tasks stands on both sides; its loss may be off by margin, too. A
learning rate that is wrong by a hundredth is 100 tolerances off where the margin is 1e-4.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

import pymeta
from bench import rounding
from bench.cases import Case, Data, draw
from bench.torch_rivals import LOSSES, inner_optimizer, make_model, tensors

SINGLES = 32  # tasks whose own gradient norms give the scale
CHUNK = 256  # tasks that the reference takes at once, a matter of memory
DRAWS = ((1.0, 0), (-1.0, 0), (1.0, 1), (-1.0, 1))  # signs and seeds of the errors drawn
RIVAL_FACTOR = 4.0
LOOPS = ("torch loop", "scikit-learn")  # they may take some first tasks only, and say so
# scikit-learn's Adam has its epsilon elsewhere: in every third task a few weights, whose gradients
# are near epsilon, step otherwise. It must come within a hundredth of the way.
FACTORS = {"scikit-learn": 100.0}


@dataclass(frozen=True)
class Reference:
    """The right answer in float64, and the scale that errors are measured by.

    Attributes:
        loss: None where the job has none (fine-tuning).
        gradients: in the order of `Data.parameters`; of fine-tuning the adapted parameters.
        scales: of each tensor: mean over tasks of its layer's gradient norm, or of the distance
            its layer's parameters move; of fine-tuning this distance in each task, [T].
    """

    loss: float | None
    gradients: list[np.ndarray]
    scales: list[float] | list[np.ndarray]


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


def _task_norms(a: np.ndarray) -> np.ndarray:
    """[T, ...] -> [T]."""
    return np.sqrt(np.square(a).reshape(len(a), -1).sum(1))


def _distances(case: Case, data: Data, ends: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of each tensor how far its layer's parameters move in each task, [T]."""
    squares = [_task_norms(e - p) ** 2 for p, e in zip(data.parameters, ends, strict=True)]
    whole = [np.sqrt(sum(squares[i : i + 2])) for i in range(0, len(squares), 2)]
    return [whole[i // 2] for i in range(len(squares))]


def _moved(case: Case, data: Data, exact: list[np.ndarray], sign: float, seed: int) -> np.ndarray:
    """How far drawn rounding errors move each task's adapted parameters, [T].

    The largest over tensors, relative to how far the tensor's layer moves in all.
    """
    distances = _distances(case, data, exact)
    _, ends = rounding.adapted(case, data, sign, seed)
    pairs = zip(ends, exact, distances, strict=True)
    return np.max([_task_norms(e.numpy() - x) / d for e, x, d in pairs], axis=0)


def _exact(case: Case, data: Data) -> list[np.ndarray]:
    return [e.numpy() for e in rounding.adapted(case, data, size=0.0)[1]]


def sensitivity(case: Case, data: Data) -> np.ndarray:
    """The largest of `_moved` over all draws, [T]."""
    exact = _exact(case, data)
    return np.max([_moved(case, data, exact, *run) for run in DRAWS], axis=0)


def _calm(case: Case, data: Data) -> np.ndarray:
    """The tasks that no draw moves by `case.margin`, as indices."""
    exact, left = _exact(case, data), np.arange(len(data.xs))
    for run in DRAWS:
        moved = _moved(case, data.of(left), [e[left] for e in exact], *run)
        left = left[moved < case.margin]
    return left


def _calm_data(case: Case) -> Data:
    many, step = draw(replace(case, tasks=4 * case.tasks)), 250
    kept: list[int] = []
    for start in range(0, 4 * case.tasks, step):
        kept += [start + int(t) for t in _calm(case, many.of(slice(start, start + step)))]
        if len(kept) >= case.tasks:
            return many.of(kept[: case.tasks])
    raise RuntimeError(f"{case.name}: only {len(kept)} tasks keep the margin {case.margin}")


def make_data(case: Case) -> Data:
    """The case's data, its tasks chosen away from kinks where the case asks for that."""
    if not case.margin:
        return draw(case)
    if case.job != "maml":
        return _calm_data(case)
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
    if case.job != "maml":
        return _adapted_reference(case, data)
    singles = [_part(case, data, slice(t, t + 1)) for t in range(min(SINGLES, case.tasks))]
    starts = range(len(singles), case.tasks, CHUNK)
    parts = singles + [_part(case, data, slice(t, t + CHUNK)) for t in starts]
    squares = np.array([[np.sum(g**2) for g in gradients] for _, gradients in singles])
    return Reference(
        sum(loss for loss, _ in parts) / case.tasks,
        [sum(g) / case.tasks for g in zip(*(gradients for _, gradients in parts), strict=True)],
        _scales(case, squares),
    )


def _adapted_reference(case: Case, data: Data) -> Reference:
    model, (xs, ys, *_) = make_model(case, data), tensors(data)
    tune = pymeta.FineTune(
        model,
        loss=case.loss,
        optimizer=inner_optimizer(case),
        epochs=case.steps,
        backend="torch",
    )
    ends = [p.numpy() for p in tune(xs, ys).parameters.values()]
    distances = _distances(case, data, ends)
    if case.job == "finetune":
        return Reference(None, ends, distances)
    reptile = pymeta.Reptile(
        model, loss=case.loss, optimizer=inner_optimizer(case), steps=case.steps, backend="torch"
    )
    out = reptile(xs, ys)
    out.loss.backward()
    gradients = [p.grad.numpy() for p in model.parameters()]
    return Reference(out.loss.item(), gradients, [float(d.mean()) for d in distances])


def predictions(case: Case, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """The outputs z of every task's adapted model in float64, [T, Q, out]; the scales of errors.

    Parameters may be off by margin * | theta64' - theta |_2, layer by layer, so in first order z
    may be by margin * sum over tensors of | dz / dtheta' |_2 | theta64' - theta |_2, which is the
    scale returned (times margin). It is of the size of the way that z has moved.
    """
    data = data.astype(np.float64)
    model, (xs, ys, xq, _) = make_model(case, data), tensors(data)
    maml = pymeta.MAML(
        model, loss=case.loss, optimizer=inner_optimizer(case), steps=case.steps, backend="torch"
    )
    ends = maml.adapt(xs, ys).parameters
    distances = _distances(case, data, [p.numpy() for p in ends.values()])
    scales = torch.zeros(case.tasks, case.query, case.sizes[-1], dtype=torch.float64)
    right = torch.empty_like(scales)
    for t in range(case.tasks):
        own = {name: p[t] for name, p in ends.items()}

        def outputs(parameters: dict, t: int = t) -> torch.Tensor:
            return torch.func.functional_call(model, parameters, (xq[t],))

        right[t] = outputs(own).detach()
        for slope, way in zip(torch.func.jacrev(outputs)(own).values(), distances, strict=True):
            scales[t] += slope.detach().flatten(2).norm(dim=2) * way[t]
    return right.numpy(), scales.numpy()


def _scales(case: Case, squares: np.ndarray) -> list[float]:
    """From squared norms [task, tensor]: of each tensor the mean norm of its layer's gradient."""
    per_layer = 4 if case.batch_norm else 2
    layer = np.arange(squares.shape[1]) // per_layer
    return [float(np.sqrt(squares[:, layer == i].sum(1)).mean()) for i in layer]


def tolerance(case: Case) -> float:
    """The relative tolerance for float32, see above."""
    if case.job != "maml":
        return case.margin
    depth = sum(max(pair) for pair in case.layers)
    passes = (2 if case.first_order else 6) * case.steps + 2
    return 2.0**-24 * (passes * depth + case.support + case.query)


def error(
    reference: Reference, loss: float | None, gradients: Sequence[np.ndarray], part: bool = False
) -> float:
    """The largest relative error of the loss and of each gradient tensor (NaN if any is).

    `part` allows the answer of a contestant that takes some first tasks of fine-tuning only.
    """
    if len(gradients) != len(reference.gradients):
        raise AssertionError(f"{len(gradients)} gradients, not {len(reference.gradients)}")
    if (loss is None) != (reference.loss is None):
        raise AssertionError(f"the loss is {loss}, not {reference.loss}")
    errors = [] if loss is None else [abs(loss - reference.loss) / abs(reference.loss)]
    for got, right, scale in zip(gradients, reference.gradients, reference.scales, strict=True):
        if loss is None and part:
            right, scale = right[: len(got)], scale[: len(got)]
        if got.shape != right.shape or not got.size:
            raise AssertionError(f"gradient of shape {got.shape}, not {right.shape}")
        if loss is None:
            errors.append(float(np.max(_task_norms(got - right) / scale)))
        else:
            errors.append(float(np.linalg.norm(got - right)) / scale)
    return float(np.max(errors))


def check(
    case: Case,
    reference: Reference,
    name: str,
    loss: float | None,
    gradients: Sequence[np.ndarray],
) -> float:
    """The error in units of the tolerance; AssertionError where it is above 1 (rivals: more)."""
    found = error(reference, loss, gradients, part=name in LOOPS) / tolerance(case)
    limit = 1.0 if name.startswith("pymeta") else FACTORS.get(name, RIVAL_FACTOR)
    if not found <= limit:
        raise AssertionError(
            f"{case.name}, {name}: the error is {found:.3g} tolerances, {limit:g} allowed"
        )
    if found == 0:
        warnings.warn(f"{case.name}, {name}: no rounding error at all?", stacklevel=2)
    return found
