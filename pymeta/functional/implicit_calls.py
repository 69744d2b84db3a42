"""Calls with implicit gradients: what MAML and `Operator` do with an `Implicit`.

The tasks are adapted without a graph; `implicit.py` ties the adapted parameters to what they are
the minimum of; and query sets are evaluated by a call of no steps that starts there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pymeta import reference
from pymeta.backend import adapt as native_adapt
from pymeta.backend.plan import Plan
from pymeta.backend.prepared import prepare
from pymeta.backend.recipe import Recipe
from pymeta.functional.anchors import check_values_of
from pymeta.functional.evaluation import Results, in_torch
from pymeta.functional.implicit import Minimum, with_implicit_graph
from pymeta.functional.own import Own
from pymeta.spec.implicit import Implicit
from pymeta.spec.inner import InnerLoop
from pymeta.spec.optimizers import SGD
from pymeta.spec.schedule import Schedule
from pymeta.tasks.task_set import TaskSet, shaped


class ImplicitCall(NamedTuple):
    """A call whose arguments are checked but for what `check` says.

    Attributes:
        model: the module.
        plan: of it.
        parameters: those that tasks share, in order.
        inner: how a task is adapted.
        support: T tasks.
        own: what the tasks have of their own.
        implicit: how gradients are found.
        in_torch: whether the reference computes.
    """

    model: nn.Module
    plan: Plan
    parameters: list[Tensor]
    inner: InnerLoop
    support: TaskSet
    own: Own
    implicit: Implicit
    in_torch: bool


def is_minimised(plan: Plan) -> bool:
    """Whether the model has one loss that tasks are adapted to the minimum of."""
    return not plan.least_steps and not plan.norms


def check(plan: Plan, own: Own, rates: Tensor | None = None) -> None:
    """ValueError where the model or an argument has no meaning for implicit gradients.

    `rates` are the step sizes of all tasks, where they are an argument.
    """
    if plan.least_steps:
        raise ValueError(
            "model: expected no PerStepBatchNorm with implicit: its loss differs from step to "
            "step, so that it has no one minimum"
        )
    if plan.norms:
        raise ValueError(
            "model: expected no batch normalisation that tracks running statistics with implicit, "
            "whose calls do not move them: make it with track_running_stats=False, or .eval()"
        )
    if own.step_weights is not None:
        raise ValueError("step_weights: expected none with implicit, which keeps no steps")
    for name, value in (("lr", own.rates), ("rates", rates)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected constants with implicit, got a tensor that requires grad: the "
                f"minimum does not depend on the step size"
            )
    if own.anchors is not None and own.anchors.is_cpu:
        check_values_of(own.anchors)
        if bool((own.anchors == 0).any()):
            task = int((own.anchors == 0).nonzero()[0])
            raise ValueError(f"anchor: task {task}: expected a number > 0 with implicit, got 0")


def _of_one_step(model: nn.Module, plan: Plan) -> Plan:
    """The model's plan for plain SGD of one step size, without a pull."""
    if plan.of_one_step is None:
        judge, loss = plan.query_expected.loss, plan.expected.loss
        plan.of_one_step = Plan(
            model, loss, plan.adapted, "network", SGD(1.0),
            query_loss=None if judge is loss else judge, row_shape=plan.row_shape, tracks=False,
            precision=plan.precision,
        )  # fmt: skip
    return plan.of_one_step


def minimum_of(call: ImplicitCall, phi: Sequence[Tensor] | None = None) -> Minimum:
    """What the tasks are adapted to, without a graph; `phi` where that is known, in order."""
    model, plan, parameters, _, support, own, implicit, torch_runs = call
    if phi is None:
        phi = _adapted_to(call)
    strengths = own.anchors
    if strengths is None:
        strengths = plan.scalar.new_full((), implicit.strength)
    found = dict(zip(plan.adapted, phi, strict=True))
    step = _of_one_step(model, plan)
    return Minimum(model, step, parameters, own.start, found, support, strengths, torch_runs)


@torch.no_grad()
def _adapted_to(call: ImplicitCall) -> list[Tensor]:
    model, plan, parameters, inner, support, own, _, torch_runs = call
    anchors = None if own.anchors is None else own.anchors.detach()
    options: dict[str, Any] = {"start": own.start, "anchors": anchors, "rates": own.rates}
    if torch_runs:
        named = dict(zip(plan.names, parameters, strict=True))
        done = reference.adapt(model, named, plan.adapted, inner, support, **options)
    else:
        done = native_adapt.adapt(plan, parameters, inner.lr, inner, support, **options)
    return [done.parameters[name] for name in plan.adapted]


def adapted(call: ImplicitCall) -> dict[str, Tensor]:
    """The adapted parameters {name: [T, ...]}, with the graph of implicit gradients."""
    return with_implicit_graph(minimum_of(call), call.implicit)


def _constant(support: TaskSet) -> TaskSet:
    """The set without graphs: a call of no steps does not look at it."""
    x, y, weights, offset = (
        None if v is None else v.detach()
        for v in (support.x, support.y, support.weights, support.offset)
    )
    assert x is not None
    return replace(support, x=x, y=y, weights=weights, offset=offset)


def evaluated(
    call: ImplicitCall, phi: dict[str, Tensor], query: TaskSet, out: tuple[int, ...] = ()
) -> Results:
    """The query sets' losses and predictions with the adapted parameters `phi`, with their graph.

    `out` is the shape of a row of outputs, for no tasks where torch computes.
    """
    plan, parameters, inner = call.plan, call.parameters, call.inner
    there = Own(None, {**call.own.start, **phi}, None, None)
    nothing = _constant(call.support)
    if call.in_torch:
        inner = replace(inner, schedule=Schedule(0))
        return in_torch(call.model, plan, parameters, inner, nothing, query, there, None, out)
    operands = there.operands(plan, parameters)
    recipe = Recipe(0, False, own=tuple(there.start))
    made, extras = prepare(plan, recipe, operands, inner.lr, nothing, query)
    results = Results(*made(operands, extras))
    return results._replace(predictions=shaped(results.predictions, query))
