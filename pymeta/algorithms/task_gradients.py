"""The gradient of each task's support loss at its own parameters, in one native call.

What flows into each loss is a 1 of its own, not a share of a mean: a task's gradient does not
depend on how many there are, in its last bit either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pymeta.algorithms.maml import MAML
from pymeta.backend.gradients import NOTHING
from pymeta.backend.prepared import prepare
from pymeta.functional.own import own_of
from pymeta.tasks.task_set import SUPPORT, task_set

_OF_PARAMETERS = (True, *NOTHING[1:])


def task_gradients(
    maml: MAML, xs: Any, ys: Any, at: Mapping[str, Tensor], sizes: Any, weights: Any, offset: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients {name: [T, ...]} at the parameters `at` {name: [T, ...]}, and the losses [T].

    Args:
        maml: whose model and loss they are of, without a `task_clip`.
        xs: inputs, as for a call of it.
        ys: targets, likewise.
        at: tasks' own parameters, which need no grad.
        sizes: `support_sizes`.
        weights: `support_weights`.
        offset: `support_offset`.

    Raises:
        TypeError, ValueError: as a call.
    """
    plan, parameters = maml._current(xs)
    rows = task_set(SUPPORT, xs, ys, sizes, weights, plan.expected, offset)
    if torch.compiler.is_compiling() or maml._reason(plan, rows) is not None:
        return _by_autograd(maml, xs, ys, at, sizes, weights, offset)
    how = own_of(plan, rows.tasks, 0, None, at, None)
    operands, trains = how.operands(plan, parameters), [name in at for name in plan.names]
    recipe = how.recipe(maml, 0)
    call, extras = prepare(
        plan, recipe, operands, maml._lr(plan), rows, rows, _OF_PARAMETERS, trains
    )
    losses = extras.lr.new_zeros(rows.tasks)
    found = call.vjp(operands, extras, torch.ones_like(losses), None, to_losses=losses)
    by_name = dict(zip((name for name in plan.names if name in at), found, strict=True))
    return {name: by_name[name] for name in at}, losses


def _by_autograd(
    maml: MAML, xs: Any, ys: Any, at: Mapping[str, Tensor], sizes: Any, weights: Any, offset: Any
) -> tuple[dict[str, Tensor], Tensor]:
    start = {name: value.detach().requires_grad_() for name, value in at.items()}
    with torch.enable_grad():
        losses = maml(
            xs, ys, xs, ys, steps=0, support_sizes=sizes, query_sizes=sizes, query_weights=weights,
            query_offset=offset, start=start,
        ).task_losses  # fmt: skip
        found = torch.autograd.grad(losses.sum(), list(start.values()))
    return dict(zip(start, found, strict=True)), losses.detach()
