"""One call on tensors whose arguments are checked: why it runs in torch, and how it does there.

The native way is `backend/prepared.py`; MAML and the functions of this package share both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pymeta import reference
from pymeta.backend.inputs import has_tangents, in_forward_mode
from pymeta.backend.plan import Plan
from pymeta.functional.anchors import check_values_of
from pymeta.functional.own import Own
from pymeta.spec import running
from pymeta.spec.inner import InnerLoop
from pymeta.spec.settings import CLIPS_THE_LOSS
from pymeta.spec.transforms import in_transform
from pymeta.tasks.checks import Names
from pymeta.tasks.task_set import QUERY, TaskSet, shaped

QUERIES = Names("xq", "", QUERY.sizes, "", QUERY.offset)  # without targets


class Results(NamedTuple):
    """What a call makes; losses are None without query targets."""

    loss: Tensor | None  # []
    task_losses: Tensor | None  # [T]
    predictions: Tensor | list[Tensor]  # in the form of xq
    step_losses: Tensor | None  # [steps, T]


def lacks_forward_mode(tensors: Iterable[Tensor | None], sets: Iterable[TaskSet]) -> str | None:
    """Why forward-mode derivatives keep a call from the native core, if they do."""
    if not in_forward_mode():
        return None
    inputs = [v for s in sets for v in (s.x, s.y, s.weights, s.offset)]
    if has_tangents([*tensors, *inputs]):
        return "forward-mode derivatives are asked for, which the native core lacks"
    return None


def in_torch(
    model: nn.Module,
    plan: Plan,
    parameters: list[Tensor],
    inner: InnerLoop,
    support: TaskSet,
    query: TaskSet,
    own: Own,
    task_clip: float | None,
    out: tuple[int, ...],
    by_support: bool = False,
) -> Results:
    """The call by `pymeta/reference`.

    Args:
        model: the module.
        plan: of it.
        parameters: those that tasks share, in the plan's order.
        inner: how a task is adapted.
        support: T tasks.
        query: T tasks, with targets or without.
        own: what the tasks have of their own, and the weights of the steps.
        task_clip: as for `pymeta.MAML`.
        out: the shape of a row of outputs, for no tasks.
        by_support: whether query sets are normalised by the support sets' statistics.
    """
    plan.check_steps(inner.schedule)
    check_values_of(own.anchors)
    named = dict(zip(plan.names, parameters, strict=True))
    theirs = reference.Own(own.anchors, own.rates, own.start)
    trains = torch.is_grad_enabled() and bool(plan.trainable) and not in_transform()
    norms = plan.norms if trains else ()
    losses, predictions, steps, statistics = reference.evaluate(
        model, named, plan.adapted, inner, support, query, theirs, own.step_weights, norms,
        by_support,
    )  # fmt: skip
    if statistics is not None:
        running.update(norms, statistics)
    if query.tasks == 0:
        predictions = query.x.new_zeros(0, query.rows, *out, dtype=plan.expected.dtype)
    if task_clip is not None:
        predictions = (
            undifferentiated(predictions)
            if isinstance(predictions, Tensor)
            else [undifferentiated(p) for p in predictions]
        )
    outputs = shaped(predictions, query)
    if query.y is None:
        return Results(None, None, outputs, None)
    loss = reference.mean_loss(losses)
    if task_clip is not None:
        shared = [p for n, p in named.items() if n not in own.start]
        by = [*shared, *([inner.lr] if own.rates is None else [])]
        sides = [v for s in (support, query) for v in (s.x, s.y, s.weights, s.offset)]
        others = [*own.start.values(), own.rates, own.anchors, *sides]
        loss = reference.clipped(losses, by, task_clip, [v for v in others if v is not None])
        losses = undifferentiated(losses)
        steps = None if steps is None else undifferentiated(steps)
    return Results(loss, losses, outputs, steps)


def undifferentiated(result: Tensor) -> Tensor:
    """`result`, whose gradient is refused: there is a task_clip, which is the loss's."""
    apply = cast(Callable[[Tensor], Tensor], _Undifferentiated.apply)  # torch has no annotation
    return apply(result) if result.requires_grad else result


class _Undifferentiated(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(result: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError(CLIPS_THE_LOSS)
