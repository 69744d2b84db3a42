"""The public functions: each brings its arguments into one form and has them run.

What runs them is `tensors.py` for torch's tensors and for networks that the native core lacks, and
`arrays.py` for numpy arrays, which imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from pymeta.functional.operator import Operator

Parameters: TypeAlias = Mapping[str, Any]


class Side(NamedTuple):
    """One side of all tasks as it was given."""

    x: Any
    y: Any = None
    sizes: Any = None
    weights: Any = None
    offset: Any = None


class Request(NamedTuple):
    """A call as it was given; the functions below say what is what."""

    parameters: Parameters
    support: Side
    query: Side | None = None
    steps: int | None = None
    anchor: Any = None
    lr: Any = None
    rates: Any = None
    step_weights: Any = None


class Flows(NamedTuple):
    """What flows into the results on the way back."""

    task_losses: Any = None
    predictions: Any = None
    adapted: Parameters | None = None
    step_losses: Any = None


class Gradients(NamedTuple):
    """Gradients, without a graph.

    Attributes:
        gradients: {name: array} by the parameters, of their shapes: the sum over the tasks that
            share one, or [T, ...] of those that each task has of its own.
        input_gradients: {name: array} by the inputs that `wrt` names, of their shapes.
    """

    gradients: dict[str, Any]
    input_gradients: dict[str, Any]


class MetaGradient(NamedTuple):
    """A meta-gradient and what it is of; nothing has a graph.

    Attributes:
        loss: [], the mean over tasks of `task_losses`.
        task_losses: [T].
        predictions: [T, rows, out]; a list of [rows_t, out] where xq is a list.
        step_losses: [steps, T] with `step_weights`, otherwise None.
        gradients: {name: array} of `loss` by the parameters, as in `Gradients`.
        input_gradients: {name: array} by the inputs that `wrt` names.
    """

    loss: Any
    task_losses: Any
    predictions: Any
    step_losses: Any
    gradients: dict[str, Any]
    input_gradients: dict[str, Any]


def adapt(
    operator: Operator,
    parameters: Parameters,
    xs: Any,
    ys: Any,
    *,
    steps: int | None = None,
    support_sizes: Any = None,
    support_weights: Any = None,
    support_offset: Any = None,
    anchor: Any = None,
    lr: Any = None,
    rates: Any = None,
) -> dict[str, Any]:
    """The adapted parameters of T tasks.

    Args:
        operator: what is done.
        parameters: {name: [...]} of all tasks, or {name: [T, ...]} of each task, for each of
            `operator.shapes`; float32 or float64, of one dtype. The start.
        xs: support inputs, as for `pymeta.MAML`; tensors or arrays, as the parameters are.
        ys: support targets, likewise.
        steps: in place of the operator's.
        support_sizes: as for `pymeta.MAML`, like the others below.
        support_weights: of rows or single targets.
        support_offset: added to outputs.
        anchor: [T], the strength of each task's pull to its start.
        lr: [T] or [T, layers], each task's step sizes.
        rates: `operator.rate_shape`, all tasks' step sizes, in place of the operator's.

    Returns:
        {name: [T, ...]} of `operator.adapted`. With tensors, differentiable by all that requires
        grad; natively, that costs one more native call, and once only.

    Raises:
        TypeError, ValueError: an argument is not as described, or does not fit the network.
    """
    support = Side(xs, ys, support_sizes, support_weights, support_offset)
    request = Request(parameters, support, None, steps, anchor, lr, rates)
    found: dict[str, Any] = _runner(operator, parameters, request).adapt(request)
    return found


def adapt_predict(
    operator: Operator,
    parameters: Parameters,
    xs: Any,
    ys: Any,
    xq: Any,
    *,
    steps: int | None = None,
    support_sizes: Any = None,
    query_sizes: Any = None,
    support_weights: Any = None,
    support_offset: Any = None,
    query_offset: Any = None,
    anchor: Any = None,
    lr: Any = None,
    rates: Any = None,
) -> Any:
    """Adapt to T tasks, and predict with what was adapted, in one call.

    Args:
        operator: as for `adapt`, like all that is not named here.
        parameters: the start.
        xs: support inputs.
        ys: support targets.
        xq: query inputs [T, rows, ...], or a list of [rows_t, ...].
        steps: in place of the operator's.
        support_sizes: how many of its rows each task uses.
        query_sizes: likewise of xq.
        support_weights: of rows or single targets.
        support_offset: added to the outputs on xs.
        query_offset: added to the outputs on xq, and part of the predictions.
        anchor: each task's strength.
        lr: each task's step sizes.
        rates: all tasks' step sizes.

    Returns:
        [T, rows, out], a list of [rows_t, out] where xq is one; with a graph as in `adapt`.

    Raises:
        TypeError, ValueError: as `adapt`.
    """
    support = Side(xs, ys, support_sizes, support_weights, support_offset)
    query = Side(xq, None, query_sizes, None, query_offset)
    request = Request(parameters, support, query, steps, anchor, lr, rates)
    return _runner(operator, parameters, request).adapt_predict(request)


def predict(
    operator: Operator,
    parameters: Parameters,
    xq: Any,
    *,
    query_sizes: Any = None,
    query_offset: Any = None,
) -> Any:
    """The networks' outputs on each task's rows, without a step.

    Args:
        operator: as for `adapt`.
        parameters: as for `adapt`; {**parameters, **adapt(...)} for adapted ones.
        xq: [T, rows, ...], or a list of [rows_t, ...].
        query_sizes: how many of its rows each task uses.
        query_offset: added to the outputs.

    Returns:
        As `adapt_predict`.

    Raises:
        TypeError, ValueError: as `adapt`.
    """
    query = Side(xq, None, query_sizes, None, query_offset)
    return _runner(operator, parameters).predict(parameters, query)


def meta_gradient(
    operator: Operator,
    parameters: Parameters,
    xs: Any,
    ys: Any,
    xq: Any,
    yq: Any,
    *,
    wrt: Sequence[str] = ("parameters",),
    steps: int | None = None,
    support_sizes: Any = None,
    query_sizes: Any = None,
    support_weights: Any = None,
    query_weights: Any = None,
    support_offset: Any = None,
    query_offset: Any = None,
    anchor: Any = None,
    lr: Any = None,
    rates: Any = None,
    step_weights: Any = None,
) -> MetaGradient:
    """The gradient of the mean query loss after adaptation, without autograd.

    Args:
        operator: as for `adapt`, like all that is not named here.
        parameters: the start.
        xs: support inputs.
        ys: support targets.
        xq: query inputs.
        yq: query targets.
        wrt: what it is taken by: "parameters", "rates" or "lr" (of each task), "xs", "ys", "xq",
            "yq", "support_weights", "query_weights", "support_offset", "query_offset", "anchor".
        steps: in place of the operator's.
        support_sizes: how many of its rows each task uses.
        query_sizes: likewise of xq.
        support_weights: of rows or single targets.
        query_weights: likewise.
        support_offset: added to the outputs on xs.
        query_offset: added to the outputs on xq.
        anchor: each task's strength.
        lr: each task's step sizes.
        rates: all tasks' step sizes.
        step_weights: [steps] of the query losses after each step.

    Returns:
        Losses, predictions and gradients.

    Raises:
        TypeError, ValueError: as `adapt`; `wrt` names what is not there.
    """
    support = Side(xs, ys, support_sizes, support_weights, support_offset)
    query = Side(xq, yq, query_sizes, query_weights, query_offset)
    request = Request(parameters, support, query, steps, anchor, lr, rates, step_weights)
    if yq is None:
        raise ValueError("yq: expected query targets, got None: there is no loss without them")
    runner = _runner(operator, parameters, request)
    results, found = runner.gradients(request, _checked(wrt, request), None)
    return MetaGradient(*results, *found)


def vjp(
    operator: Operator,
    parameters: Parameters,
    xs: Any,
    ys: Any,
    xq: Any = None,
    yq: Any = None,
    *,
    task_losses: Any = None,
    predictions: Any = None,
    adapted: Parameters | None = None,
    step_losses: Any = None,
    wrt: Sequence[str] = ("parameters",),
    steps: int | None = None,
    support_sizes: Any = None,
    query_sizes: Any = None,
    support_weights: Any = None,
    query_weights: Any = None,
    support_offset: Any = None,
    query_offset: Any = None,
    anchor: Any = None,
    lr: Any = None,
    rates: Any = None,
    step_weights: Any = None,
) -> Gradients:
    """The vector-Jacobian product of the operator, without autograd.

    That is the gradient of `sum(task_losses * L) + sum(predictions * P) + sum(adapted[n] * A[n]) +
    sum(step_losses * S)`, where L [T], P [T, rows, out], A {name: [T, ...]} and S [steps, T] are
    what the operator makes.

    Args:
        operator: as for `meta_gradient`, like all that is not named here.
        parameters: the start.
        xs: support inputs.
        ys: support targets.
        xq: query inputs; None where only adapted parameters matter.
        yq: query targets; None where no losses matter.
        task_losses: [T], what flows into the losses.
        predictions: what flows into the predictions, in their form.
        adapted: {name: [T, ...]}, what flows into some of the adapted parameters.
        step_losses: [steps, T], what flows into the losses after each step; with `step_weights`.
        wrt: what the product is taken by.
        steps: in place of the operator's.
        support_sizes: how many of its rows each task uses.
        query_sizes: likewise of xq.
        support_weights: of rows or single targets.
        query_weights: likewise.
        support_offset: added to the outputs on xs.
        query_offset: added to the outputs on xq.
        anchor: each task's strength.
        lr: each task's step sizes.
        rates: all tasks' step sizes.
        step_weights: [steps] of the query losses after each step.

    Raises:
        TypeError, ValueError: as `meta_gradient`; nothing flows, or into what is not there.
    """
    support = Side(xs, ys, support_sizes, support_weights, support_offset)
    query = None if xq is None else Side(xq, yq, query_sizes, query_weights, query_offset)
    request = Request(parameters, support, query, steps, anchor, lr, rates, step_weights)
    flows = Flows(task_losses, predictions, adapted or None, step_losses)
    if all(flow is None for flow in flows):
        raise ValueError(f"{', '.join(Flows._fields)}: expected at least one of them")
    for name, flow, needs, there in (
        ("task_losses", task_losses, "yq", yq is not None and xq is not None),
        ("predictions", predictions, "xq", xq is not None),
        ("step_losses", step_losses, "yq", yq is not None and xq is not None),
        ("step_losses", step_losses, "step_weights", step_weights is not None),
    ):
        if flow is not None and not there:
            raise ValueError(f"{name}: expected None, for the call has no {needs}")
    unknown = [n for n in adapted or {} if n not in operator.adapted]
    if unknown:
        names = ", ".join(operator.adapted) or "nothing"
        raise ValueError(f"adapted: {unknown[0]!r} is not adapted; {names} is")
    runner = _runner(operator, parameters, request)
    _, found = runner.gradients(request, _checked(wrt, request), flows)
    return Gradients(*found)


def _checked(wrt: Any, request: Request) -> tuple[str, ...]:
    """`wrt` as names of what there is."""
    if isinstance(wrt, str) or not isinstance(wrt, Sequence):
        raise TypeError(f"wrt: expected a list of names, got {type(wrt).__name__}")
    support, query = request.support, request.query or Side(None)
    there = {
        "parameters": True,
        "rates": request.lr is None,
        "lr": request.lr is not None,
        "xs": True,
        "ys": True,
        "xq": query.x is not None,
        "yq": query.y is not None,
        "support_weights": support.weights is not None,
        "query_weights": query.weights is not None,
        "support_offset": support.offset is not None,
        "query_offset": query.offset is not None,
        "anchor": request.anchor is not None,
    }
    for name in wrt:
        if name not in there:
            raise ValueError(f"wrt: expected some of {', '.join(there)}, got {name!r}")
        if not there[name]:
            why = "tasks have an lr of their own" if name == "rates" else "the call has none"
            raise ValueError(f"wrt: {name}: {why}")
    return tuple(wrt)


def _runner(operator: Operator, parameters: Any, request: Request | None = None) -> Any:
    """What runs a call with these parameters."""
    if request is not None and request.lr is not None and request.rates is not None:
        raise ValueError("lr, rates: expected one of them: tasks' own step sizes, or all tasks'")
    if not isinstance(operator, Operator):
        raise TypeError(
            f"operator: expected a pymeta.functional.Operator, got {type(operator).__name__}"
        )
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters: expected {{name: array}}, got {type(parameters).__name__}")
    arrays = all(isinstance(value, np.ndarray) for value in parameters.values())
    if not arrays:
        if operator.tensors is None:
            raise TypeError(
                "parameters: expected numpy arrays; make the operator of a torch.nn.Module to call "
                "it with tensors"
            )
        return operator.tensors
    native = operator.arrays()
    if native is not None:
        return native
    assert operator.tensors is not None
    return operator.tensors.for_arrays()
