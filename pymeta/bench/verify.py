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

Where there is no torch, fine-tuning and Reptile are compared with the numpy loop of `rounding.py`;
meta-gradients cannot be checked then, and so are not timed.

Kinks. ReLU has no derivative at 0: where a ReLU's input lies within rounding of it, two right
answers differ by a row's share of a task's gradient. Among 1024 tasks that drowns; W2 has 32 tasks
with 15,360 ReLUs each, and batch normalisation over 5 rows magnifies rounding. So W2's tasks are
drawn, in float64, among those without such an input (`Case.margin`).

The other jobs' tolerance. Adapted parameters after 20 or 32 steps cannot be bounded so: a product
of worst cases over so many steps says nothing, Adam makes a whole step of a gradient that should be
0 and is a rounding error, and gradient descent from a random start is chaotic in some tasks.
Most tasks are harmless all the same, and `rounding.py` tells which: it follows drawn errors
of worst-case size through the loop. A task is kept if in `DRAWS` runs, in pairs of opposite errors
(where a sign hangs on an error, one of the two shows it), every parameter tensor stays within

    | theta' - theta64' |_2 <= margin * | theta64' - theta |_2    of all tensors of its layer

and the same is asked of a contestant for every task and tensor (rivals: four times that). For
theta - mean theta' the mean over tasks stands on both sides; its loss may be off by margin, too. A
learning rate that is wrong by a hundredth is 100 tolerances off where the margin is 1e-4.

Many tasks. A GPU's cases draw some hundred tasks and repeat them in a drawn order
(`Case.distinct`), so that float64 can follow: a mean over tasks is the mean over the distinct ones;
of fine-tuned networks a `sample` is compared, each with its own task's answer.

`python -m pymeta.bench.verify` works out anew which tasks the cases take (chosen.json).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pymeta.bench import rounding
from pymeta.bench.cases import (
    CASES,
    LATENCY,
    QUICK_CASES,
    Array,
    Case,
    Data,
    chosen,
    draw,
    fingerprint,
    pool,
)

if TYPE_CHECKING:
    import torch

SINGLES = 32  # tasks whose own gradient norms give the scale
CHUNK = 256  # tasks that the reference takes at once, a matter of memory
DRAWS = ((1.0, 0), (-1.0, 0), (1.0, 1), (-1.0, 1))  # signs and seeds of the errors drawn
SAMPLE = 2048  # networks that are compared, of many fine-tuned ones
RIVAL_FACTOR = 4.0
LOOPS = ("torch loop", "scikit-learn")  # they may take some first tasks only, and say so
# scikit-learn's Adam has its epsilon elsewhere: in every third task a few weights, whose gradients
# are near epsilon, step otherwise. It must come within a hundredth of the way.
FACTORS = {"scikit-learn": 100.0}


class WrongAnswer(Exception):
    """A contestant's numbers are not the case's."""


def has_torch() -> bool:
    """Whether torch is installed."""
    return importlib.util.find_spec("torch") is not None


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
    gradients: list[Array]
    scales: list[Any]

    def of(self, tasks: NDArray[np.int64]) -> Reference:
        """Of fine-tuning: the answers for some of the tasks."""
        return Reference(
            None, [g[tasks] for g in self.gradients], [scale[tasks] for scale in self.scales]
        )


def sample(case: Case) -> NDArray[np.int64]:
    """The tasks whose adapted networks are compared: all, or the first, the last and drawn ones."""
    if case.tasks <= SAMPLE:
        return np.arange(case.tasks)
    rng = np.random.default_rng(case.tasks)
    inner = rng.choice(case.tasks - 2, SAMPLE - 2, replace=False) + 1
    found: NDArray[np.int64] = np.concatenate([[0], np.sort(inner), [case.tasks - 1]])
    return found


def _part(case: Case, data: Data, tasks: slice) -> tuple[float, list[Array]]:
    """Loss and gradients of some of the tasks, summed."""
    from pymeta.bench.ours import learner
    from pymeta.bench.torch_rivals import make_model, tensors

    maml = learner(case, make_model(case, data), "torch")
    part = data.of(tasks)
    out = maml(*tensors(part))
    out.loss.backward()
    count = len(part.xs)
    found = [p.grad.numpy() for p in maml.parameters() if p.grad is not None]
    return count * out.loss.item(), [count * gradient for gradient in found]


def kink_distance(case: Case, data: Data) -> float:
    """How near 0 a ReLU's input comes in the one task of `data`, float64, at any of its steps.

    Relative to the root mean square of that layer's inputs.
    """
    import torch
    from torch import nn

    from pymeta.bench.torch_rivals import LOSSES, make_model, tensors

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
                p.sub_(case.lr * g)
    run(xq)
    return nearest


def _task_norms(a: Array) -> Array:
    """[T, ...] -> [T]."""
    norms: Array = np.sqrt(np.square(a).reshape(len(a), -1).sum(1))
    return norms


def _distances(data: Data, ends: Sequence[Array]) -> list[Array]:
    """Of each tensor how far its layer's parameters move in each task, [T]."""
    squares = [_task_norms(e - p) ** 2 for p, e in zip(data.parameters, ends, strict=True)]
    whole: list[Array] = [np.sqrt(sum(squares[i : i + 2])) for i in range(0, len(squares), 2)]
    return [whole[i // 2] for i in range(len(squares))]


# ---- which tasks a case takes --------------------------------------------------------------------


def _moved(case: Case, data: Data, exact: list[Array], sign: float, seed: int) -> Array:
    """How far drawn rounding errors move each task's adapted parameters, [T].

    The largest over tensors, relative to how far the tensor's layer moves in all.
    """
    distances = _distances(data, exact)
    _, ends = rounding.adapted(case, data, sign, seed)
    pairs = zip(ends, exact, distances, strict=True)
    largest: Array = np.max([_task_norms(e - x) / d for e, x, d in pairs], axis=0)
    return largest


def sensitivity(case: Case, data: Data) -> Array:
    """The largest of `_moved` over all draws, [T]."""
    _, exact = rounding.adapted(case, data, size=0.0)
    largest: Array = np.max([_moved(case, data, list(exact), *run) for run in DRAWS], axis=0)
    return largest


def _calm(case: Case, data: Data) -> NDArray[np.int64]:
    """The tasks that no draw moves by `case.margin`, as indices."""
    _, exact = rounding.adapted(case, data, size=0.0)
    left = np.arange(len(data.xs))
    for run in DRAWS:
        moved = _moved(case, data.of(left), [e[left] for e in exact], *run)
        left = left[moved < case.margin]
    return left


def select(case: Case, many: Data) -> list[int]:
    """The first tasks of its pool that keep the case's margin; RuntimeError if too few do."""
    kept: list[int] = []
    step = 1 if case.job == "maml" else 250
    exact = many.astype(np.float64) if case.job == "maml" else many
    for start in range(0, len(many.xs), step):
        part = exact.of(slice(start, start + step))
        if case.job != "maml":
            kept += [start + int(t) for t in _calm(case, part)]
        elif kink_distance(case, part) > case.margin:
            kept.append(start)
        if len(kept) >= case.tasks:
            return kept[: case.tasks]
    raise RuntimeError(f"{case.name}: only {len(kept)} tasks keep the margin {case.margin}")


def make_data(case: Case) -> Data:
    """The data of the case's distinct tasks, away from kinks where the case asks for that."""
    case = case.base
    if not case.margin:
        return draw(case)
    many = pool(case)
    tasks = chosen(case, many)
    return many.of(select(case, many) if tasks is None else tasks)


# ---- the right answers ---------------------------------------------------------------------------


def make_reference(case: Case, data: Data) -> Reference:
    """Compute the distinct tasks of the case in float64; RuntimeError where that needs torch."""
    case, data = case.base, data.astype(np.float64)
    if case.job != "maml":
        return (_adapted_reference if has_torch() else _numpy_reference)(case, data)
    if not has_torch():
        raise RuntimeError("a meta-gradient is checked by torch in float64, and there is no torch")
    singles = [_part(case, data, slice(t, t + 1)) for t in range(min(SINGLES, case.tasks))]
    starts = range(len(singles), case.tasks, CHUNK)
    parts = singles + [_part(case, data, slice(t, t + CHUNK)) for t in starts]
    squares = np.array([[np.sum(g**2) for g in gradients] for _, gradients in singles])
    sums: list[Array] = [np.sum(g, axis=0) for g in zip(*(g for _, g in parts), strict=True)]
    return Reference(
        sum(loss for loss, _ in parts) / case.tasks,
        [g / case.tasks for g in sums],
        _scales(case, squares),
    )


def _adapted_reference(case: Case, data: Data) -> Reference:
    from pymeta.bench.ours import learner
    from pymeta.bench.torch_rivals import make_model, tensors

    model, (xs, ys, *_) = make_model(case, data), tensors(data)
    tune = learner(replace(case, job="finetune"), model, "torch")
    ends = [p.numpy() for p in tune(xs, ys).parameters.values()]
    distances = _distances(data, ends)
    if case.job == "finetune":
        return Reference(None, ends, distances)
    out = learner(case, model, "torch")(xs, ys)
    out.loss.backward()
    gradients = [p.grad.numpy() for p in model.parameters() if p.grad is not None]
    return Reference(out.loss.item(), gradients, [float(d.mean()) for d in distances])


def _numpy_reference(case: Case, data: Data) -> Reference:
    losses, ends = rounding.adapted(case, data, size=0.0)
    distances = _distances(data, ends)
    if case.job == "finetune":
        return Reference(None, list(ends), distances)
    moved = [p - e.mean(0) for p, e in zip(data.parameters, ends, strict=True)]
    return Reference(float(losses.mean()), moved, [float(d.mean()) for d in distances])


def predictions(case: Case, data: Data) -> tuple[Array, Array]:
    """The outputs z of every task's adapted model in float64, [T, Q, 1]; the scales of errors.

    Parameters may be off by margin * | theta64' - theta |_2, layer by layer, so in first order z
    may be by margin * sum over tensors of | dz / dtheta' |_2 | theta64' - theta |_2, which is the
    scale returned (times margin). It is of the size of the way that z has moved. The network has
    plain layers, ReLU and one output; numpy does it all.
    """
    data = data.astype(np.float64)
    _, ends = rounding.adapted(case, data, size=0.0)
    weights = [e.reshape(len(e), -1, e.shape[-1]) for e in ends]
    distances = _distances(data, ends)
    none = rounding.Errors(0.0, 0)
    inputs = rounding.forward(case, weights, data.xq, none)
    right = inputs.pop()
    scales = np.zeros_like(right)
    delta = np.ones_like(right)  # dz / d the outputs of a layer, for each row: [T, Q, out]
    for i in reversed(range(len(inputs))):
        size = np.sqrt(np.square(delta).sum(-1, keepdims=True))
        length = np.sqrt(np.square(inputs[i]).sum(-1, keepdims=True))
        # of the weight the slope is the outer product of delta and input, of the bias delta
        scales += size * length * distances[2 * i][:, None, None]
        scales += size * distances[2 * i + 1][:, None, None]
        if i:
            delta = (delta @ weights[2 * i]) * (inputs[i] > 0)
    return right, scales


def _scales(case: Case, squares: Array) -> list[float]:
    """From squared norms [task, tensor]: of each tensor the mean norm of its layer's gradient."""
    per_layer = 4 if case.batch_norm else 2
    layer = np.arange(squares.shape[1]) // per_layer
    return [float(np.sqrt(squares[:, layer == i].sum(1)).mean()) for i in layer]


def tolerance(case: Case) -> float:
    """The relative tolerance for float32, see above."""
    if case.job != "maml":
        return case.margin
    depth = sum(max(pair) for pair in case.products)
    rows = (case.support + case.query) * case.positions(0)  # which gradients are sums over
    passes = (2 if case.first_order else 6) * case.steps + 2
    return 2.0**-24 * (passes * depth + rows)


def error(
    reference: Reference, loss: float | None, gradients: Sequence[Array], part: bool = False
) -> float:
    """The largest relative error of the loss and of each gradient tensor (NaN if any is).

    `part` allows the answer of a contestant that takes some first tasks of fine-tuning only.

    Raises:
        WrongAnswer: a number of tensors, or a shape, is not the reference's.
    """
    if len(gradients) != len(reference.gradients):
        raise WrongAnswer(f"{len(gradients)} gradients, not {len(reference.gradients)}")
    errors = []
    if loss is not None and reference.loss is not None:
        errors.append(abs(loss - reference.loss) / abs(reference.loss))
    elif loss is not reference.loss:
        raise WrongAnswer(f"the loss is {loss}, not {reference.loss}")
    for got, right, scale in zip(gradients, reference.gradients, reference.scales, strict=True):
        if loss is None and part:
            right, scale = right[: len(got)], scale[: len(got)]
        if got.shape != right.shape or not got.size:
            raise WrongAnswer(f"gradient of shape {got.shape}, not {right.shape}")
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
    gradients: Sequence[Array],
) -> float:
    """The error in units of the tolerance.

    Raises:
        WrongAnswer: it is above 1 (of rivals: above `RIVAL_FACTOR`), or no number, or the shapes
            are wrong.
    """
    part = name.startswith(LOOPS)
    try:
        found = error(reference, loss, gradients, part) / tolerance(case)
    except WrongAnswer as wrong:
        raise WrongAnswer(f"{case.name}, {name}: {wrong}") from None
    limit = 1.0 if name.startswith("pymeta") else FACTORS.get(name, RIVAL_FACTOR)
    if not found <= limit:
        raise WrongAnswer(
            f"{case.name}, {name}: the error is {found:.3g} tolerances, {limit:g} allowed"
        )
    if found == 0:
        warnings.warn(f"{case.name}, {name}: no rounding error at all?", stacklevel=2)
    return found


def main() -> None:
    """Write chosen.json beside this file: which tasks the cases with a margin take."""
    entries: dict[str, Any] = {}
    for case in {**CASES, **QUICK_CASES, LATENCY.name: LATENCY}.values():
        if case.margin:
            many = pool(case)
            what, checksum = fingerprint(case, many)
            tasks = select(case, many)
            entries[what] = {"case": case.name, "checksum": checksum, "tasks": tasks}
            print(f"{case.name}: {len(tasks)} of the first {tasks[-1] + 1}", file=sys.stderr)
    lines = (f"{json.dumps(what)}: {json.dumps(entry)}" for what, entry in entries.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (Path(__file__).parent / "chosen.json").write_text(text)


if __name__ == "__main__":
    main()
