"""Of each task's support set at its own parameters: gradient and loss, in one native call; and what
batch normalisations measure.

What flows into each loss is a 1 of its own, not a share of a mean: a task's gradient does not
depend on how many there are, in its last bit either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pymeta import reference
from pymeta.algorithms.maml import MAML
from pymeta.backend import adapt as native_adapt
from pymeta.backend.gradients import NOTHING
from pymeta.backend.prepared import prepare
from pymeta.functional.own import own_of
from pymeta.spec.running import Norms
from pymeta.spec.schedule import Schedule
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


def tracked(maml: MAML, xs: Any) -> Norms:
    """The batch normalisations whose running statistics a call moves, as one of `maml` would."""
    plan = maml._current(xs)[0]
    return plan.norms if torch.is_grad_enabled() and plan.trainable else ()


def statistics(
    maml: MAML, xs: Any, ys: Any, at: Mapping[str, Tensor], sizes: Any, weights: Any
) -> Tensor:
    """What `tracked` measure of the support sets, as `running.update` takes it.

    Arguments are those of `task_gradients`.
    """
    plan, parameters = maml._current(xs)
    rows = task_set(SUPPORT, xs, ys, sizes, weights, plan.expected)
    own = {name: value.detach() for name, value in at.items()}
    if maml._reason(plan, rows) is None:
        return native_adapt.set_statistics(plan, parameters, own, rows)
    shared = {n: p.detach() for n, p in zip(plan.names, parameters, strict=True) if n not in own}
    inner = maml._inner(plan, Schedule(0))
    return reference.set_statistics(maml.model, own, shared, inner, rows, plan.set_norms)


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
