"""Query sets that batch normalisation normalises by the statistics of their support sets.

A query set is evaluated behind its support rows, which weigh nothing and by which alone both are
normalised; so the gradient goes through the statistics. Adapted models keep the statistics that
their support sets have with the adapted weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pymeta import reference
from pymeta.backend import adapt as native_adapt
from pymeta.backend.plan import Plan
from pymeta.backend.prepared import Results, prepare
from pymeta.backend.recipe import Recipe
from pymeta.functional.evaluation import QUERIES
from pymeta.spec import running
from pymeta.spec.inner import Adaptation, InnerLoop
from pymeta.tasks.task_set import QUERY, TaskSet, task_set, with_context


def queries(
    sides: tuple[Any, Any, Any, Any], offset: Any, step_weights: Any, plan: Plan, apart: bool
) -> TaskSet:
    """The query sets, with targets or for predictions alone.

    `apart` is whether support rows normalise them, so that a single row is a set.
    """
    xq, yq, sizes, weights = sides
    expected = plan.query_expected
    if apart:
        expected = replace(expected, batch_norm=False)
    if yq is not None:
        return replace(task_set(QUERY, *sides, expected, offset), by_support=apart)
    for name, value in (("query_weights", weights), ("step_weights", step_weights)):
        if value is not None:
            raise ValueError(f"{name}: expected None where yq is, for there is no query loss")
    found = task_set(QUERIES, xq, None, sizes, None, expected, offset)
    return replace(found, by_support=apart)


def lacking(support: TaskSet, query: TaskSet) -> str | None:
    """Why the native core cannot put support rows before query rows, if it cannot."""
    what = 'query_statistics="support"'
    if not (support.uniform and query.uniform):
        return f"{what} with tasks of different sizes"
    if query.weights is not None or query.offset is not None:
        return f"{what} with weights or offsets of query rows"
    return None


def results(
    plan: Plan,
    recipe: Recipe,
    operands: list[Tensor],
    rates: Tensor,
    support: TaskSet,
    query: TaskSet,
) -> Results:
    """A native call; arguments as for `prepare`."""
    joint = with_context(query, support, plan.query_expected.loss.takes_classes)
    call, extras = prepare(plan, recipe, operands, rates, support, joint)
    found = call(operands, extras)
    return found._replace(predictions=found.predictions[:, support.rows :])


def kept(
    model: nn.Module,
    plan: Plan,
    parameters: list[Tensor],
    inner: InnerLoop,
    done: Adaptation,
    support: TaskSet,
    in_torch: bool,
) -> tuple[Plan, Adaptation]:
    """A plan of models that go by the statistics of their support sets, and these with the rest."""
    if in_torch:
        named = {n: p.detach() for n, p in zip(plan.names, parameters, strict=True)}
        shared = {n: p for n, p in named.items() if n not in done.parameters}
        found = reference.set_statistics(
            model, done.parameters, shared, inner, support, plan.set_norms
        )
    else:
        found = native_adapt.set_statistics(plan, parameters, done.parameters, support)
    fixed, constants = running.kept_by(model, plan.set_norms, found)
    own = Plan(
        model, plan.expected.loss, None, "network", row_shape=plan.row_shape,
        fixed=fixed | plan.fixed,
    )  # fmt: skip
    return own, replace(done, parameters={**done.parameters, **constants})
