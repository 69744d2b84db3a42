"""Where fine-tuning begins: the model's parameters, or some of each task's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor

from pymeta.backend.plan import Plan
from pymeta.models.adapted import Adapted
from pymeta.tasks.task_set import tensor_of

Start: TypeAlias = Adapted | Mapping[str, Tensor]


def own_start(
    start: Any, plan: Plan, parameters: list[Tensor], tasks: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What each task has of its own from the start, and what all have in common.

    A parameter that is one tensor expanded along the task axis, as those are that models have in
    common, counts as common to all.
    """
    if start is None:
        return {}, parameters
    given = start.parameters if isinstance(start, Adapted) else start
    if not isinstance(given, Mapping):
        raise TypeError(
            f"start: expected a pymeta.Adapted or a dictionary of tensors, "
            f"got {type(start).__name__}"
        )
    common = dict(zip(plan.names, parameters, strict=True))
    own: dict[str, Tensor] = {}
    for name, value in given.items():
        if name not in common and isinstance(start, Adapted) and name in start.constants:
            continue  # which this model's mode has no use for
        if name not in common:
            raise ValueError(
                f"start: the model has no parameter {name!r}; there are {', '.join(plan.names)}"
            )
        value, like = tensor_of(f"start[{name!r}]", value), common[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"start[{name!r}]: expected a tensor, got {type(value).__name__}")
        if value.shape != (tasks, *like.shape):
            raise ValueError(
                f"start[{name!r}]: expected shape {[tasks, *like.shape]}, got {list(value.shape)}"
            )
        if value.dtype != like.dtype or value.device != like.device:
            raise TypeError(
                f"start[{name!r}]: expected {like.dtype} on {like.device} as the model's, "
                f"got {value.dtype} on {value.device}"
            )
        if tasks > 1 and value.stride(0) == 0:
            common[name] = value[0].detach()
        else:
            own[name] = value.detach()
    return own, list(common.values())
