"""Tasks that adaptation makes worse: found by their loss before and after; what becomes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pymeta import reference
from pymeta.backend import adapt as native_adapt
from pymeta.backend.plan import Plan
from pymeta.spec.inner import Adaptation, InnerLoop
from pymeta.spec.optimizers import check_number
from pymeta.spec.schedule import Schedule
from pymeta.tasks.task_set import TaskSet

if TYPE_CHECKING:
    from pymeta.algorithms.learner import Learner

REACTIONS = ("start", "keep", "raise")


def check_reaction(value: Any) -> str | None:
    """ValueError unless it is one of `REACTIONS` or None."""
    if value is not None and value not in REACTIONS:
        raise ValueError(
            f"on_divergence: expected one of {', '.join(map(repr, REACTIONS))}, or None, "
            f"got {value!r}"
        )
    return None if value is None else str(value)


def layer_rates(value: Any) -> Tensor:
    """Step sizes of layers [layers], float64 on the CPU; they are checked for their values."""
    values = value.detach().cpu() if isinstance(value, Tensor) else np.asarray(value)
    if len(values.shape) != 1:
        raise ValueError(f"layer_lr: expected numbers [layers], got shape {list(values.shape)}")
    numbers = values.tolist()
    return torch.tensor([check_number("layer_lr", v) for v in numbers], dtype=torch.float64)


@torch.no_grad()
def support_losses(
    learner: Learner,
    plan: Plan,
    parameters: list[Tensor],
    own: dict[str, Tensor],
    support: TaskSet,
    in_torch: bool,
) -> Tensor:
    """The loss of each task's support rows [T], with its own parameters in place of the shared."""
    if not in_torch:
        return native_adapt.losses(plan, parameters, own, support)
    inner: InnerLoop = learner._inner(plan, Schedule(0))
    named = dict(zip(plan.names, parameters, strict=True))
    with torch.enable_grad():  # which the oracle needs
        found = reference.evaluate(
            learner.model, named, plan.adapted, inner, support, support, reference.Own(start=own)
        )[0]
    return found.detach()


def reacted(
    learner: Learner,
    plan: Plan,
    parameters: list[Tensor],
    start: dict[str, Tensor],
    support: TaskSet,
    done: Adaptation,
    reaction: str,
    in_torch: bool,
    first: int = 0,
) -> None:
    """Look for tasks that got worse; note them in `done.status`, and react.

    Args:
        learner: whose call it was.
        plan: of its model.
        parameters: the shared ones, in the plan's order.
        start: {name: [T, ...]} of what each task began with of its own.
        support: the rows that were adapted to.
        done: what became of the tasks, changed in place.
        reaction: one of `REACTIONS`.
        in_torch: whether it ran in torch.
        first: the number of the first task, for messages.

    Raises:
        ArithmeticError: a task got worse, and that is to raise.
    """
    before = support_losses(learner, plan, parameters, start, support, in_torch)
    after = support_losses(
        learner, plan, parameters, {**start, **done.parameters}, support, in_torch
    )
    # what is not finite is no better; a task without rows has 0 twice
    worse = ~(after <= before) & before.isfinite()
    done.status.copy_(torch.where((done.status == 0) & worse, 2, done.status))
    lost = done.status != 0
    if not bool(lost.any()):
        return
    if reaction == "raise":
        task = int(lost.nonzero()[0])
        raise ArithmeticError(
            f"task {first + task}: adaptation diverged: its loss went from "
            f"{float(before[task]):.6g} to {float(after[task]):.6g}; a smaller lr, or clip_norm, "
            f"may help"
        )
    if reaction == "start":
        named = dict(zip(plan.names, parameters, strict=True))
        for name, value in done.parameters.items():
            begin = start[name] if name in start else named[name].expand_as(value)
            value[lost] = begin[lost]
