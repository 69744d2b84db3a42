"""MAML by implicit gradients (`MAML(..., implicit=...)`): what is the learner's own of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pymeta.algorithms.outcome import Outcome
from pymeta.backend.plan import Plan
from pymeta.functional import implicit_calls
from pymeta.functional.implicit_calls import ImplicitCall
from pymeta.functional.own import Own
from pymeta.spec.implicit import check_implicit
from pymeta.spec.schedule import Schedule
from pymeta.tasks.task_set import TaskSet

if TYPE_CHECKING:
    from pymeta.algorithms.maml import MAML


def _call(
    maml: MAML,
    plan: Plan,
    parameters: list[Tensor],
    steps: int,
    support: TaskSet,
    own: Own,
    in_torch: bool,
) -> ImplicitCall:
    """The call; ValueError where a setting or an argument has no meaning for implicit gradients."""
    if maml.query_statistics != "own":
        raise ValueError('query_statistics: expected "own" with implicit')
    alone = {"first_order": maml.first_order, "task_clip": maml.task_clip}
    implicit = check_implicit(maml.implicit, maml.optimizer, **alone)
    assert implicit is not None
    implicit_calls.check(plan, own)
    inner = maml._inner(plan, Schedule(steps))
    return ImplicitCall(maml.model, plan, parameters, inner, support, own, implicit, in_torch)


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
    call = _call(maml, plan, parameters, steps, support, own, reason is not None)
    if reason is not None:
        maml._to_torch(plan, reason, frames, support)
    return implicit_calls.adapted(call)


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
    call = _call(maml, plan, parameters, steps, support, own, reason is not None)
    out: tuple[int, ...] = ()
    if reason is not None:
        maml._to_torch(plan, reason, 6, support, query)
        out = () if query.tasks else maml._output_shape(plan, query)
    results = implicit_calls.evaluated(call, implicit_calls.adapted(call), query, out)
    return Outcome(*results)  # type: ignore[arg-type]  # None without query targets
