"""Step sizes that need no hand: from the largest curvature of the tasks' support losses.

Gradient descent on a loss of curvature c (the largest eigenvalue of its Hessian, by absolute value)
goes down while its step size is below 2 / c, and 1 / c is the classical choice. The curvature is
found by power iteration (von Mises, Pollaczek-Geiringer 1929), all tasks at once:

    u <- H u / |H u|,      |H u| -> c

H u needs no kernel of its own: a step of plain SGD of size 1 maps theta to theta - g(theta), whose
vector-Jacobian product is u - H u.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pymeta.algorithms.learner import Weights
from pymeta.algorithms.maml import MAML
from pymeta.spec.optimizers import check_number
from pymeta.spec.schedule import check_count
from pymeta.tasks.task_set import Rows, Sizes


def step_size(
    model: nn.Module,
    xs: Rows,
    ys: Rows,
    *,
    loss: Any,
    sizes: Sizes = None,
    weights: Weights = None,
    offset: Rows | None = None,
    adapt: Any = None,
    largest: float = 1.0,
    iterations: int = 20,
    backend: str = "auto",
) -> Tensor:
    """One over the largest curvature of each task's loss, where the model stands now: [T].

    A step size for SGD with which the inner loop goes down, `min()` over the tasks of a sample for
    all of them; with momentum m, (1 - m) times that. Where curvature grows along the way, a part of
    it is safer.

    Args:
        model: as for `pymeta.MAML`.
        xs: support inputs, as there; their number of rows is that of the tasks in use.
        ys: support targets, as there.
        loss: as there.
        sizes: as `support_sizes` there.
        weights: as `support_weights` there.
        offset: as `support_offset` there.
        adapt: as there, which parameters the inner loop changes.
        largest: what a rate is at most, as where a loss is flat or of no curvature (L1).
        iterations: of the power method; one costs about as much as two inner steps.
        backend: as there.

    Returns:
        [T], of the parameters' dtype; NaN where a curvature is not finite.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import torch, pymeta
        >>> x = torch.tensor([[[3.0], [4.0]]])     # mean (w x - y)^2 curves by 2 mean(x^2)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> pymeta.step_size(model, x, 2 * x, loss="mse")
        tensor([0.0400])
    """
    check_number("largest", largest, above=True)
    check_count("iterations", iterations, 1)
    maml = MAML(model, loss=loss, lr=1.0, steps=1, adapt=adapt, backend=backend)
    plan, parameters = maml._current(xs)
    named = dict(zip(plan.names, parameters, strict=True))
    tasks = len(xs)
    with torch.enable_grad():
        start = {
            n: named[n].detach().expand(tasks, *named[n].shape).clone().requires_grad_()
            for n in plan.adapted
        }
        sides: dict[str, Any] = {
            "support_sizes": sizes,
            "support_weights": weights,
            "support_offset": offset,
        }
        adapted = maml.adapt(xs, ys, start=start, create_graph=True, **sides)
    if not start or tasks == 0:
        return plan.scalar.new_full((tasks,), largest)
    ends, begins = [adapted[n] for n in start], list(start.values())
    u = _directions(begins)
    curvature = u[0].new_zeros(tasks)
    for _ in range(iterations):
        kept = torch.autograd.grad(ends, begins, u, retain_graph=True)
        hu = [a - b for a, b in zip(u, kept, strict=True)]
        curvature = _norms(hu)
        # a task whose product is 0 has found the bottom: it stays where it is
        u = [torch.where(_like(curvature > 0, a), b / _like(curvature, b), a)
             for a, b in zip(u, hu, strict=True)]  # fmt: skip
    return torch.where(curvature == 0, largest, 1 / curvature).clamp(max=largest)


def _directions(like: list[Tensor]) -> list[Tensor]:
    """A unit vector for each task, all of them alike: drawn once, so that results are the same."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(t.shape[1:], generator=generator, dtype=torch.float64) for t in like]
    u = [d.to(t.device, t.dtype).expand_as(t) for d, t in zip(drawn, like, strict=True)]
    norms = _norms(u)
    return [a / _like(norms, a) for a in u]


def _norms(parts: list[Tensor]) -> Tensor:
    """The norm of each task's vector: parts [T, ...] -> [T]."""
    return torch.stack([p.flatten(1).square().sum(1) for p in parts]).sum(0).sqrt()


def _like(values: Tensor, part: Tensor) -> Tensor:
    """[T] as [T, 1, ...]."""
    return values.view(-1, *[1] * (part.ndim - 1))
