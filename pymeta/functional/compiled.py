"""What torch.compile traces of learners and operators: calls of the operators of `ops.py`.

Eager calls never come here (they go straight to the binding). What the native core cannot run
there is left to eager mode, at the price of a graph break (an error under fullgraph=True).

It is imported while torch.compile traces: for functions that are marked for it, torch loads its
whole compiler, which takes as long as all the rest of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from pymeta.backend.gradients import Extras
from pymeta.functional import implicit_calls, minimum_ops, ops  # registers them
from pymeta.functional.evaluation import Results
from pymeta.functional.handles import owner_of
from pymeta.functional.ops import Inputs

if TYPE_CHECKING:
    from pymeta.functional.calls import Flows, Request
    from pymeta.functional.operator import Operator

__all__ = ["minimum_ops", "ops"]

# One side's x, y, sizes, weights and offset; as tensors, packed where they came as lists.
Side: TypeAlias = tuple[Any, Any, Any, Any, Any]
Function = TypeVar("Function", bound=Callable[..., Any])
# implicit gradients, with which older ones end in an error of their own
_TRACES_MINIMA = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)


def _typed(mark: Any) -> Callable[[Function], Function]:
    """One of torch's decorators, which have no types."""
    decorator: Callable[[Function], Function] = mark
    return decorator


_untraced = _typed(torch.compiler.disable)
_constant = _typed(torch.compiler.assume_constant_result)  # called while it traces


@_untraced
def outside_graphs(
    owner: Any, method: str, arguments: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Any:
    """What the owner's method returns in eager mode."""
    return getattr(owner, method)(*arguments, **(options or {}))


@_constant
def _width(
    handle: str, dtype: torch.dtype, device: torch.device, shape: Any, by_targets: Sequence[bool]
) -> int:
    """How many outputs the network has; -1 where the native core does not run it there.

    `by_targets`: whether gradients by support and by query targets are wanted.
    """
    owner = owner_of(handle)
    if owner.backend == "torch":
        return -1
    plan = owner._plan_for(dtype, device, None if shape is None else torch.empty(shape))
    if plan.reason is not None or plan.expected.out_features is None:
        return -1
    if owner.implicit is not None and (
        owner.first_order or owner.task_clip or not implicit_calls.is_minimised(plan)
    ):
        return -1  # where it is an error
    sides = zip((plan.expected, plan.query_expected), by_targets, strict=True)
    if any(by and expected.loss.takes_classes for expected, by in sides):
        return -1  # it has no gradients by distributions over classes
    return int(plan.expected.out_features)


def _rows(values: Any, lengths: list[int]) -> Tensor | None:
    """A list's tensors one after another; they must have the given numbers of rows."""
    if values is None:
        return None
    if len(values) != len(lengths) or [v.shape[0] for v in values] != lengths:
        raise ValueError(f"expected {len(lengths)} tensors of {lengths} rows, as the inputs are")
    return torch.cat(list(values))


def _traced(side: Side) -> tuple[Side, list[int] | None]:
    """One side's arguments as tensors, and the lengths of lists."""
    x, y, sizes, weights, offset = side
    if isinstance(x, (list, tuple)):
        lengths = [v.shape[0] for v in x]
        packed = [_rows(v, lengths) for v in (x, y, weights, offset)]
        sizes = torch.tensor(lengths, device="cpu")
        return (packed[0], packed[1], sizes, packed[2], packed[3]), lengths
    if isinstance(sizes, (list, tuple)):
        sizes = torch.tensor(sizes, device="cpu")
    return (x, y, sizes, weights, offset), None


class Call(NamedTuple):
    """A call as it was given, of a learner or an operator.

    Attributes:
        handle: of either.
        parameters: in order; [T, ...] of those in `own`.
        own: the names of those that tasks have of their own.
        support: one side.
        query: the other; None where adapted parameters alone are wanted.
        lr: all tasks' step sizes, or None for a number.
        own_lr: each task's.
        anchor: each task's, or None.
        step_weights: [steps], or None.
        steps: how many.
        clips: whether `task_clip` counts.
        names: of `parameters`.
        stays: whether there are no steps, even where there is a minimum to go to.
        wanted: of what gradients are wanted, as `Inputs` have it; None for what requires grad.
    """

    handle: str
    parameters: list[Tensor]
    own: list[str]
    support: Side
    query: Side | None
    lr: Any
    own_lr: Any
    anchor: Any
    step_weights: Any
    steps: int
    clips: bool
    names: list[str]
    stays: bool = False
    wanted: list[bool] | None = None


def _tensor(value: Any, like: Tensor) -> Any:
    if isinstance(value, (list, tuple)):
        return torch.tensor(value, dtype=like.dtype, device=like.device)
    return value


def _inputs(call: Call, out: int) -> tuple[Inputs, list[int] | None]:
    """What the operators take, and the lengths of a list of queries."""
    (xs, ys, ss, ws, so), support_lengths = _traced(call.support)
    xq = yq = sq = wq = qo = query_lengths = None
    if call.query is not None:
        (xq, yq, sq, wq, qo), query_lengths = _traced(call.query)
    lr = call.lr if call.own_lr is None else _tensor(call.own_lr, xs)
    wanted = call.wanted
    if wanted is None:
        grad = torch.is_grad_enabled()
        every = (*call.parameters, lr, xs, xq, ys, yq, ws, wq, call.anchor, so, qo)
        wanted = [grad and isinstance(v, Tensor) and v.requires_grad for v in every]
    how = [
        support_lengths is not None, query_lengths is not None, call.own_lr is not None, call.clips
    ]  # fmt: skip
    return Inputs(
        call.handle, call.parameters, lr, xs, ys, ws, ss, so, xq, yq, wq, sq, qo,
        _tensor(call.anchor, xs), _tensor(call.step_weights, xs), call.own, how, call.steps, out,
        wanted,
    ), query_lengths  # fmt: skip


def _requires_grad(values: Any) -> bool:
    if isinstance(values, (list, tuple)):
        return any(isinstance(v, Tensor) and v.requires_grad for v in values)
    return isinstance(values, Tensor) and values.requires_grad


def width_of(call: Call, wrt: Sequence[str] | None = None) -> int:
    """How many outputs there are; -1 where the call is left to eager mode.

    `wrt` names what gradients are wanted by; None for all that requires grad.
    """
    rates = (call.lr, call.own_lr)
    if _minimised(call.handle) is not None and (
        call.step_weights is not None
        or (torch.is_grad_enabled() and any(_requires_grad(r) for r in rates))
    ):
        return -1  # where it is an error
    first = call.parameters[0] if call.parameters else call.support[0]
    x = call.support[0]
    entry = x[0] if isinstance(x, (list, tuple)) else x
    # one task of one row, whose axes tell which plan is wanted
    shape = (1, 1, *(entry.shape[1:] if isinstance(x, (list, tuple)) else entry.shape[2:]))
    shape_of_rows = shape if len(shape) > 3 else None
    if wrt is None:
        targets = (call.support[1], None if call.query is None else call.query[1])
        grad = torch.is_grad_enabled()
        by_targets = [grad and _requires_grad(y) for y in targets]
    else:
        by_targets = ["ys" in wrt, "yq" in wrt]
    return _width(call.handle, first.dtype, first.device, shape_of_rows, by_targets)


@_constant
def _minimised(handle: str) -> list[str] | None:
    """The names of what is adapted to a minimum; None where gradients are not implicit."""
    owner = owner_of(handle)
    return None if owner.implicit is None else list(owner._adapted_shapes())


def _constant_rows(side: Side) -> Side:
    """One side without graphs: a call of no steps does not look at it."""

    def constant(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return [v.detach() for v in value]
        return value.detach() if isinstance(value, Tensor) else value

    x, y, sizes, weights, offset = map(constant, side)
    return x, y, sizes, weights, offset


def _at_minimum(call: Call, names: list[str], out: int) -> Call:
    """The call of no steps from what the tasks are adapted to."""
    inputs, _ = _inputs(call._replace(query=None, step_weights=None), out)
    phi = dict(zip(names, torch.ops.pymeta.minimum(*inputs), strict=True))
    named = dict(zip(call.names, call.parameters, strict=True))
    return call._replace(
        parameters=list({**named, **phi}.values()),
        own=[name for name in call.names if name in phi or name in call.own],
        support=_constant_rows(call.support), lr=None, own_lr=None, anchor=None, steps=0,
    )  # fmt: skip


def evaluate(call: Call, out: int) -> tuple[Results, Tensor]:
    """Losses and predictions with their graphs, and the loss's flat gradient."""
    minimised = _minimised(call.handle)
    if minimised is not None and not call.stays:
        call = _at_minimum(call, minimised, out)
    inputs, lengths = _inputs(call, out)
    loss, losses, predictions, steps, flat = torch.ops.pymeta.evaluate(*inputs)
    outputs = list(predictions.split(lengths)) if lengths is not None else predictions
    weighed = None if call.step_weights is None else steps
    if inputs.yq is None:
        return Results(None, None, outputs, None), flat
    return Results(loss, losses, outputs, weighed), flat


def adapt(call: Call, names: Sequence[str], out: int) -> dict[str, Tensor]:
    """The adapted parameters with their graph."""
    inputs, _ = _inputs(call, out)
    how = torch.ops.pymeta.adapt if _minimised(call.handle) is None else torch.ops.pymeta.minimum
    return dict(zip(names, how(*inputs), strict=True))


# ---- MAML -------------------------------------------------------------------------------------


def forward(maml: Any, data: tuple[Any, Any, Any, Any], options: dict[str, Any]) -> Any:
    """`MAML.forward` while torch.compile traces; what goes into an `Outcome`."""
    xs, ys, xq, yq = data
    own: Any = options["start"] or {}
    named = dict(maml.model.named_parameters())
    known = isinstance(own, Mapping) and all(name in named for name in own)
    traced = maml.implicit is None or _TRACES_MINIMA
    if known and traced and maml.query_statistics == "own" and maml.learned_anchor is None:
        support = (xs, ys, *(options[f"support_{n}"] for n in ("sizes", "weights", "offset")))
        query = (xq, yq, *(options[f"query_{n}"] for n in ("sizes", "weights", "offset")))
        steps = options["steps"]
        call = Call(
            maml._handle, [own.get(n, p) for n, p in named.items()], list(own), support, query,
            maml.lr if isinstance(maml.lr, Tensor) else None, options["lr"], options["anchor"],
            options["step_weights"], maml.steps if steps is None else steps, True, list(named),
        )  # fmt: skip
        out = width_of(call)
        if out >= 0:
            return evaluate(call, out)[0]
    return outside_graphs(maml, "forward", data, options)


# ---- operators --------------------------------------------------------------------------------


def _call(operator: Operator, request: Request, clips: bool = False) -> Call:
    names = list(operator.shapes)
    parameters = [request.parameters[name] for name in names]
    own = [n for n, p in zip(names, parameters, strict=True) if p.ndim > len(operator.shapes[n])]
    query = None if request.query is None else tuple(request.query)
    rates = request.rates
    steps = operator.steps if request.steps is None else request.steps
    return Call(
        operator.handle, parameters, own, tuple(request.support), query,
        rates, request.lr, request.anchor, request.step_weights, steps, clips, names,
    )  # fmt: skip


def operator_adapt(operator: Operator, request: Request) -> Any:
    """`Tensors.adapt` while torch.compile traces."""
    call = _call(operator, request)
    out = width_of(call)
    if out < 0:
        return outside_graphs(operator.tensors, "adapt", (request,))
    return adapt(call, operator.adapted, out)


def operator_predictions(operator: Operator, request: Request) -> Any:
    """`Tensors.adapt_predict` while torch.compile traces."""
    call = _call(operator, request)
    out = width_of(call)
    if out < 0:
        return outside_graphs(operator.tensors, "adapt_predict", (request,))
    call = call._replace(stays=call.steps == 0)
    return evaluate(call, out)[0].predictions


def operator_gradients(
    operator: Operator, request: Request, wrt: tuple[str, ...], flows: Flows | None
) -> Any:
    """`Tensors.gradients` while torch.compile traces: natively the mean loss's, without graphs."""
    rates = request.rates
    if "rates" in wrt and rates is None:
        first = next(iter(request.parameters.values()))
        rates = first.new_full(operator.rate_shape, operator.first_rate)
    call = _call(operator, request._replace(rates=rates), clips=True)
    out = width_of(call, wrt)
    lists = isinstance(call.support[0], (list, tuple))
    if out < 0 or flows is not None or lists or operator.implicit is not None:
        return outside_graphs(operator.tensors, "gradients", (request, wrt, flows))
    named = ["lr" if name == "rates" else name for name in wrt]
    parameters = ["parameters" in wrt] * len(call.parameters)
    with torch.no_grad():
        call = call._replace(wanted=[*parameters, *(name in named for name in Extras._fields)])
        inputs, _ = _inputs(call, out)
        results, flat = evaluate(call, out)
    views = ops.views_of(flat, inputs)
    count = len(call.parameters) if "parameters" in wrt else 0
    by_name = dict(zip([n for n in Extras._fields if n in named], views[count:], strict=True))
    found = {
        name: by_name["lr" if name == "rates" else name] for name in wrt if name != "parameters"
    }
    return results, (dict(zip(operator.shapes, views[:count], strict=True)) if count else {}, found)
