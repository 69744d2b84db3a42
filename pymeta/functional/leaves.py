"""What gradients without a graph are taken by, and what flows into the results on the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pymeta.functional.evaluation import Results
from pymeta.spec.show import counted
from pymeta.tasks.checks import Expected, Names, of_table
from pymeta.tasks.task_set import QUERY, SUPPORT, TaskSet, tensor_of

if TYPE_CHECKING:
    from pymeta.functional.calls import Flows, Request, Side
    from pymeta.functional.operator import Operator, Shapes


def tensors_of(parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters, which are tensors of one dtype and on one device."""
    found: dict[str, Tensor] = {}
    for name, value in parameters.items():
        value = tensor_of(f"parameters[{name!r}]", value)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"parameters[{name!r}]: expected a tensor of real numbers, got {what}")
        found[name] = value
    first = next(iter(found.values()), None)
    for name, value in found.items():
        if first is not None and (value.dtype, value.device) != (first.dtype, first.device):
            raise TypeError(
                f"parameters[{name!r}]: expected {first.dtype} on {first.device} as the first is, "
                f"got {value.dtype} on {value.device}"
            )
    return found


def key_of(name: str) -> str:
    """What a parameter is called among the leaves, where inputs have names, too."""
    return f"parameters.{name}"


def listed(value: Any) -> list[Any]:
    """A list's entries, or what is no list as the only one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def as_given(grad: Tensor, given: Any) -> Any:
    """A gradient in the form that the input came in."""
    if isinstance(given, list):
        flat = grad.reshape(-1, *given[0].shape[1:])
        return list(flat.split_with_sizes([len(v) for v in given]))
    if grad.numel() != given.numel():  # one rate of each task, which all layers had
        return grad.reshape(given.shape[0], -1).sum(-1)
    return grad.reshape(given.shape)


def without_graph(results: Results) -> Results:
    """The results without graphs."""
    predictions = [p.detach() for p in listed(results.predictions)]
    whole = predictions if isinstance(results.predictions, list) else predictions[0]
    loss, losses, _, steps = (
        None if v is None or isinstance(v, list) else v.detach() for v in results
    )
    return Results(loss, losses, whole, steps)


def with_leaves(
    request: Request, wrt: tuple[str, ...], operator: Operator
) -> tuple[Request, dict[str, Any]]:
    """The request with nothing of a graph, and what of it requires grad now, by name."""
    leaves: dict[str, Any] = {}

    def leaf(key: str, name: str, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, (list, tuple)) and name not in ("lr", "rates", "anchor"):
            mine = [leaf("", name, v) for v in value]
            if key in wrt:
                leaves[key] = mine
            return mine
        if isinstance(value, (list, tuple)):
            value = np.asarray(value)
        value = tensor_of(name, of_table(name, value))
        if not isinstance(value, Tensor):
            return value  # the checks will say what it is
        value = value.detach()
        if name in wrt or key.startswith("parameters."):
            if not value.is_floating_point():
                raise ValueError(f"wrt: {name} are {value.dtype}, which have no gradient")
            value = value.requires_grad_()
            if key:
                leaves[key] = value
        return value

    parameters = request.parameters
    if "parameters" in wrt:
        parameters = {
            n: leaf(key_of(n), f"parameters[{n!r}]", v) for n, v in request.parameters.items()
        }
    else:
        parameters = {n: v.detach() if isinstance(v, Tensor) else v for n, v in parameters.items()}
    rates = request.rates
    if "rates" in wrt and rates is None:
        first = next(iter(tensors_of(parameters).values()))
        rates = first.new_full(operator.rate_shape, operator.first_rate)

    def side(given: Side, names: Names) -> Side:
        return given._replace(
            x=leaf(names.x, names.x, given.x),
            y=leaf(names.y, names.y, given.y),
            weights=leaf(names.weights, names.weights, given.weights),
            offset=leaf(names.offset, names.offset, given.offset),
        )

    support = side(request.support, SUPPORT)
    query = None if request.query is None else side(request.query, QUERY)
    lr, rates = leaf("lr", "lr", request.lr), leaf("rates", "rates", rates)
    anchor = leaf("anchor", "anchor", request.anchor)
    return request._replace(
        parameters=parameters, support=support, query=query, lr=lr, rates=rates, anchor=anchor
    ), leaves


def checked_flows(
    flows: Flows, query: TaskSet | None, expected: Expected, tasks: int, steps: int, shapes: Shapes
) -> Flows:
    """What flows, as tensors of the shapes of the results."""

    def one(name: str, value: Any, shape: Sequence[int] | None) -> Tensor:
        value = tensor_of(name, value)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a tensor of real numbers, got {what}")
        if shape is not None and tuple(value.shape) != tuple(shape):
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
        return value.detach().to(expected.device, expected.dtype)

    losses, predictions, adapted, step_losses = flows
    if losses is not None:
        losses = one("task_losses", losses, (tasks,))
    if predictions is not None:
        assert query is not None
        q, out = query, expected.out_features
        if q.lengths is not None:
            wanted = [None if out is None else (n, out) for n in q.lengths]
            if not isinstance(predictions, (list, tuple)) or len(predictions) != len(wanted):
                raise ValueError(
                    f"predictions: expected a list of {counted(tasks, 'tensor')}, as xq is one"
                )
            pairs = zip(predictions, wanted, strict=True)
            predictions = [one(f"predictions[{t}]", p, s) for t, (p, s) in enumerate(pairs)]
        else:
            shape = None if out is None else (tasks, q.rows, out)
            predictions = one("predictions", predictions, shape)
    if adapted is not None:
        adapted = {n: one(f"adapted[{n!r}]", v, (tasks, *shapes[n])) for n, v in adapted.items()}
    if step_losses is not None:
        step_losses = one("step_losses", step_losses, (steps, tasks))
    return type(flows)(losses, predictions, adapted, step_losses)
