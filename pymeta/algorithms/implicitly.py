"""MAML by implicit gradients (`MAML(..., implicit=...)`): what its calls do.

The tasks are adapted without a graph; `functional/implicit.py` ties the adapted parameters to what
they are the minimum of; and the query sets are evaluated by a call of no steps that starts there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymeta import reference
from pymeta.algorithms.outcome import Outcome
from pymeta.backend import adapt as native_adapt
from pymeta.backend.plan import Plan
from pymeta.backend.prepared import Recipe, prepare
from pymeta.functional.anchors import check_values_of
from pymeta.functional.evaluation import in_torch
from pymeta.functional.implicit import Minimum, with_implicit_graph
from pymeta.functional.own import Own
from pymeta.spec.implicit import check_implicit
from pymeta.spec.optimizers import SGD
from pymeta.spec.schedule import Schedule
from pymeta.tasks.task_set import TaskSet, shaped

if TYPE_CHECKING:
    from pymeta.algorithms.maml import MAML


def _check(maml: MAML, plan: Plan, own: Own) -> None:
    """ValueError where a setting or an argument has no meaning for implicit gradients."""
    if plan.least_steps:
        raise ValueError(
            "model: expected no PerStepBatchNorm with implicit: its loss is another one at each "
            "step, so that there is no one minimum"
        )
    if maml.query_statistics != "own":
        raise ValueError('query_statistics: expected "own" with implicit')
    if plan.norms:
        raise ValueError(
            "model: expected no batch normalisation that tracks running statistics with implicit, "
            "whose calls do not move them: make it with track_running_stats=False, or .eval()"
        )
    alone = {"first_order": maml.first_order, "task_clip": maml.task_clip}
    check_implicit(maml.implicit, maml.optimizer, **alone)
    if own.step_weights is not None:
        raise ValueError("step_weights: expected none with implicit, which keeps no steps")
    if own.rates is not None and own.rates.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "lr: expected constants with implicit, got a tensor that requires grad: the minimum "
            "does not depend on the step size"
        )
    if own.anchors is not None and own.anchors.is_cpu:
        check_values_of(own.anchors)
        if bool((own.anchors == 0).any()):
            task = int((own.anchors == 0).nonzero()[0])
            raise ValueError(f"anchor: task {task}: expected a number > 0 with implicit, got 0")


def _plan_of_step(maml: MAML, plan: Plan) -> Plan:
    """The model's plan for plain SGD of one step size, without a pull."""
    found = maml._plan_of_step
    if found is None:
        found = Plan(
            maml.model, maml.loss, plan.adapted, "network", SGD(1.0),
            query_loss=maml.query_loss, row_shape=plan.row_shape, tracks=False,
        )  # fmt: skip
        maml._plan_of_step = found
    return found


def adapted(
    maml: MAML,
    plan: Plan,
    parameters: list[Tensor],
    steps: int,
    support: TaskSet,
    own: Own,
    reason: str | None,
    frames: int,
) -> dict[str, Tensor]:
    """The adapted parameters {name: [T, ...]}, with the graph of implicit gradients.

    `reason` says why torch runs the call; a warning of that is for `frames` calls up from here.
    """
    _check(maml, plan, own)
    if reason is not None:
        maml._to_torch(plan, reason, frames, support)
    anchors = None if own.anchors is None else own.anchors.detach()
    options: dict[str, Any] = {"start": own.start, "anchors": anchors, "rates": own.rates}
    inner = maml._inner(plan, Schedule(steps))
    with torch.no_grad():
        if reason is None:
            done = native_adapt.adapt(plan, parameters, inner.lr, inner, support, **options)
        else:
            named = dict(zip(plan.names, parameters, strict=True))
            done = reference.adapt(maml.model, named, plan.adapted, inner, support, **options)
    implicit = maml.implicit
    assert implicit is not None
    strengths = own.anchors
    if strengths is None:
        strengths = plan.scalar.new_full((), implicit.strength)
    found = {name: done.parameters[name] for name in plan.adapted}
    step = _plan_of_step(maml, plan)
    minimum = Minimum(
        maml.model, step, parameters, own.start, found, support, strengths, reason is not None
    )
    return with_implicit_graph(minimum, implicit)


def _constant(support: TaskSet) -> TaskSet:
    """The set without graphs: a call of no steps does not look at it."""
    x, y, weights, offset = (
        None if v is None else v.detach()
        for v in (support.x, support.y, support.weights, support.offset)
    )
    assert x is not None
    return replace(support, x=x, y=y, weights=weights, offset=offset)


def outcome(
    maml: MAML,
    plan: Plan,
    parameters: list[Tensor],
    steps: int,
    support: TaskSet,
    query: TaskSet,
    own: Own,
    reason: str | None,
) -> Outcome:
    """The call of a MAML with implicit gradients; `reason` says why torch runs it."""
    phi = adapted(maml, plan, parameters, steps, support, own, reason, 7)
    there = Own(None, {**own.start, **phi}, None, None)
    nothing = _constant(support)
    if reason is not None:
        expected = maml._expected(plan, support, query)
        maml._to_torch(plan, reason, 6, query)
        inner = maml._inner(plan, Schedule(0))
        out = () if query.tasks or expected is None else maml._output_shape(plan, query)
        found = in_torch(maml.model, plan, parameters, inner, nothing, query, there, None, out)
        return Outcome(*found)  # type: ignore[arg-type]  # None without query targets
    operands = there.operands(plan, parameters)
    recipe = Recipe(0, False, own=tuple(there.start))
    call, extras = prepare(plan, recipe, operands, maml._lr(plan), nothing, query)
    results = call(operands, extras)
    return Outcome(*results)._replace(predictions=shaped(results.predictions, query))
