"""Operators on numpy arrays by the native core, without torch.

The twin of `tensors.py` for networks that the core knows: it makes the same native calls, so that
the results are the same to the last bit. Nothing is cast, and what is contiguous is not copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pymeta import native
from pymeta.functional.operator import split
from pymeta.spec.anchors import Anchor
from pymeta.spec.architecture import Architecture
from pymeta.spec.losses import native_loss
from pymeta.spec.optimizers import native_optimizer
from pymeta.spec.schedule import Schedule, check_count
from pymeta.spec.settings import check_precision_of
from pymeta.spec.show import counted
from pymeta.tasks.arrays import (
    DTYPE_CODES,
    Gathered,
    address,
    dense,
    expected_of,
    gather,
    need_array,
)
from pymeta.tasks.checks import Expected, Names, cure

if TYPE_CHECKING:
    from pymeta.functional.calls import Flows, Request, Side
    from pymeta.functional.operator import Operator

_SUPPORT = Names("xs", "ys", "support_sizes", "support_weights", "support_offset")
_QUERY = Names("xq", "yq", "query_sizes", "query_weights", "query_offset")
_QUERIES = _QUERY._replace(y="", weights="")


class _Ready(NamedTuple):
    """A call whose arguments are checked; all arrays contiguous."""

    parameters: dict[str, np.ndarray]
    own: tuple[str, ...]  # the names of those that are [T, ...]
    dtype: np.dtype
    support: Gathered
    query: Gathered | None
    steps: int
    anchors: np.ndarray | None  # [T]
    rates: np.ndarray  # in the core's order: [rows, columns], or [T, 1, columns]
    per_task: bool
    step_weights: np.ndarray | None  # [steps]


class Arrays:
    """What runs an operator's calls on arrays."""

    def __init__(self, operator: Operator, architecture: Architecture) -> None:
        """Make the native Problem."""
        self._operator, self._architecture = operator, architecture
        chain = architecture.chain
        layout = operator.rates
        groups = None
        self._order: np.ndarray | None = None  # of lr columns, as the core has them
        if layout.groups is not None:
            groups = [layout.groups.get(name, 0) for name in chain]
        else:
            spans = [layout.spans[name] for name in chain if name in layout.spans]
            self._order = np.array([c for first, end in spans for c in range(first, end)], np.int64)
        pull: Anchor = operator.pull
        self._problem = native.extension().Problem(
            architecture.network(),
            native_loss(operator.loss),
            [name in operator.adapted for name in chain],
            groups,
            native_optimizer(operator.optimizer, pull),
            native_loss(operator.judge),
        )

    # ---- arguments ----------------------------------------------------------------------------

    def _ready(self, request: Request) -> _Ready:
        o = self._operator
        parameters, dtype = _parameters_of(request.parameters)
        check_precision_of(o.precision, str(dtype))
        steps = o.steps if request.steps is None else check_count("steps", request.steps)
        support = _side(_SUPPORT, request.support, self._expected(o.loss, dtype))
        query = None
        if request.query is not None:
            names = _QUERIES if request.query.y is None else _QUERY
            query = _side(names, request.query, self._expected(o.judge, dtype))
            if query.tasks != support.tasks:
                raise ValueError(
                    f"xq: expected {counted(support.tasks, 'task')} as xs has, got {query.tasks}"
                )
        own = split(parameters, o.shapes, support.tasks)
        per_task = request.lr is not None
        rates = (
            self._own_rates(request.lr, support.tasks, dtype)
            if per_task
            else self._rates(request.rates, dtype)
        )
        anchors = step_weights = None
        if request.anchor is not None:
            anchors = _numbers("anchor", request.anchor, dtype, [(support.tasks,)])
        if request.step_weights is not None:
            if steps == 0:
                raise ValueError("step_weights: expected at least one inner step, got steps=0")
            step_weights = _numbers("step_weights", request.step_weights, dtype, [(steps,)])
            if not np.isfinite(step_weights).all():
                raise ValueError(f"step_weights: expected finite numbers, got {step_weights}")
        return _Ready(
            parameters, own, dtype, support, query, steps, anchors, rates, per_task, step_weights
        )

    def _expected(self, loss: Any, dtype: np.dtype) -> Expected:
        return expected_of(self._architecture, loss, dtype)

    def _rates(self, rates: Any, dtype: np.dtype) -> np.ndarray:
        shape = self._operator.rate_shape
        if rates is None:
            values = np.full(shape, self._operator.first_rate, dtype)
        else:
            values = _numbers("rates", rates, dtype, [shape])
        values = np.atleast_2d(values)
        return values if self._order is None else dense(values[:, self._order])

    def _own_rates(self, lr: Any, tasks: int, dtype: np.dtype) -> np.ndarray:
        """[T] or [T, columns] as [T, 1, columns]."""
        columns = self._operator.rates.columns
        if self._order is not None:
            raise ValueError(
                "lr: the learnable rates are of each element, and a task's own are of each layer "
                "or of the network; use LearnableLR(per='layer') or a plain lr"
            )
        values = _numbers("lr", lr, dtype, [(tasks,), (tasks, columns)])
        values = (values if values.ndim == 2 else values[:, None])[:, None]
        return dense(np.broadcast_to(values, (tasks, 1, columns)))

    # ---- calls --------------------------------------------------------------------------------

    def _call(self, job: str, ready: _Ready) -> Any:
        """A native call, but for what it is to return."""
        chain = self._architecture.chain
        call = native.extension().Call(self._problem, DTYPE_CODES[ready.dtype], job)
        call.tasks = ready.support.tasks
        call.start = [address(ready.parameters[name]) for name in chain]
        call.own_starts = [name in ready.own for name in chain]
        rows, columns = ready.rates.shape[-2:]
        call.rates = native.extension().Rates(address(ready.rates), rows, columns, ready.per_task)
        call.schedule = native.schedule(Schedule(ready.steps))
        call.first_order = self._operator.first_order
        call.anchors = address(ready.anchors)
        call.step_weights = address(ready.step_weights)
        call.support = ready.support.native_rows()
        if ready.query is not None:
            call.query = ready.query.native_rows()
        return call

    def adapt(self, request: Request) -> dict[str, np.ndarray]:
        """The adapted parameters."""
        ready = self._ready(request)
        o, tasks = self._operator, ready.support.tasks
        made = {n: np.empty((tasks, *o.shapes[n]), ready.dtype) for n in o.adapted}
        if tasks:
            status = np.zeros(tasks, np.int8)
            call = self._call("adapt", ready)
            chain = self._architecture.chain
            call.results.adapted = [address(made.get(name)) for name in chain]
            call.results.status = address(status)
            call.run()
        return made

    def adapt_predict(self, request: Request) -> Any:
        """The predictions."""
        return self._evaluated(self._ready(request), None, False)[2]

    def predict(self, parameters: Mapping[str, Any], query: Side) -> Any:
        """The predictions of networks as they are."""
        values, dtype = _parameters_of(parameters)
        o, chain = self._operator, self._architecture.chain
        queries = _side(_QUERIES, query, self._expected(o.judge, dtype))
        own = split(values, o.shapes, queries.tasks)
        out = _room(queries, self._architecture.out_features)
        if queries.tasks:
            call = native.extension().Call(self._problem, DTYPE_CODES[dtype], "predict")
            call.tasks = queries.tasks
            call.start = [address(values[name]) for name in chain]
            call.own_starts = [name in own for name in chain]
            call.query = queries.native_rows()
            call.results.predictions = address(out)
            call.run()
        return queries.shaped(out)

    def _evaluated(self, ready: _Ready, gradients: Any, clips: bool) -> tuple[Any, ...]:
        """Loss, losses, predictions, losses of the steps; gradients go where they are wanted."""
        query, tasks = ready.query, ready.support.tasks
        assert query is not None
        out = _room(query, self._architecture.out_features)
        loss = losses = steps = None
        if query.y is not None:
            loss, losses = np.zeros((), ready.dtype), np.zeros(tasks, ready.dtype)
            if ready.step_weights is not None:
                steps = np.zeros((ready.steps, tasks), ready.dtype)
        if tasks:
            call = self._call("meta", ready)
            if clips:
                call.task_clip = self._operator.task_clip or 0.0
            call.results.predictions = address(out)
            call.results.mean_loss, call.results.losses = address(loss), address(losses)
            call.results.step_losses = address(steps)
            call.gradients = gradients
            call.run()
        return loss, losses, query.shaped(out), steps

    # ---- gradients ----------------------------------------------------------------------------

    def gradients(self, request: Request, wrt: tuple[str, ...], flows: Flows | None) -> Any:
        """(results, (gradients, input gradients)): of the mean loss, or of what flows."""
        ready = self._ready(request)
        if "support_weights" in wrt or "query_weights" in wrt:
            ready = _keeping_weightless(ready, wrt)
        made, gradients = self._memory(ready, wrt)
        results = None
        if flows is None:
            results = self._evaluated(ready, gradients, True)
        elif ready.support.tasks:
            call = self._call("meta", ready)
            held = self._put_flows(call, flows, ready)
            call.gradients = gradients
            call.run()
            del held
        inputs = {n: self._as_given(n, made[n], request) for n in wrt if n != "parameters"}
        of_parameters = self._operator.shapes if "parameters" in wrt else ()
        return results, ({n: made[f"parameters.{n}"] for n in of_parameters}, inputs)

    def _memory(self, ready: _Ready, wrt: tuple[str, ...]) -> tuple[dict[str, np.ndarray], Any]:
        """Zeros for the wanted gradients by name, and as the core takes them."""
        chain, made = self._architecture.chain, {}
        if "parameters" in wrt:
            made = {f"parameters.{n}": np.zeros_like(p) for n, p in ready.parameters.items()}
        support, query = ready.support, ready.query
        places = {
            "xs": support.x, "ys": support.y, "support_weights": support.weights,
            "lr": ready.rates, "rates": ready.rates, "support_offset": support.offset,
            "anchor": ready.anchors,
        }  # fmt: skip
        if query is not None:
            places |= {"xq": query.x, "yq": query.y, "query_weights": query.weights}
            places |= {"query_offset": query.offset}
        for name in wrt:
            if name == "parameters":
                continue
            like = places[name]
            assert like is not None
            if like.dtype.kind != "f":
                raise ValueError(f"wrt: {name} are {like.dtype}, which have no gradient")
            made[name] = np.zeros_like(like)
        lr = address(made.get("rates", made.get("lr")))
        sides = (n for n in places if n not in ("lr", "rates", "anchor"))
        parts = {name: address(made.get(name)) for name in sides}
        of_parameters = [address(made.get(f"parameters.{n}")) for n in chain]
        anchors = address(made.get("anchor"))
        return made, native.extension().Gradients(of_parameters, lr, anchors=anchors, **parts)

    def _put_flows(self, call: Any, flows: Flows, ready: _Ready) -> list[Any]:
        """Let a call have what flows into its results; the arrays to be held meanwhile."""
        o, tasks, dtype = self._operator, ready.support.tasks, ready.dtype
        losses, predictions, adapted, step_losses = flows
        if losses is not None:
            losses = _numbers("task_losses", losses, dtype, [(tasks,)])
        if step_losses is not None:
            step_losses = _numbers("step_losses", step_losses, dtype, [(ready.steps, tasks)])
        if predictions is not None and ready.query is not None:
            q, out = ready.query, self._architecture.out_features
            if q.lengths is None:
                shape = (*q.x.shape[:2], out)
                predictions = _numbers("predictions", predictions, dtype, [shape])
            else:
                if not isinstance(predictions, (list, tuple)) or len(predictions) != tasks:
                    raise ValueError(
                        f"predictions: expected a list of {counted(tasks, 'array')}, as xq is"
                    )
                pairs = zip(predictions, q.lengths, strict=True)
                predictions = np.concatenate([
                    _numbers(f"predictions[{t}]", p, dtype, [(n, out)])
                    for t, (p, n) in enumerate(pairs)
                ])  # fmt: skip
        adapted = {
            n: _numbers(f"adapted[{n!r}]", v, dtype, [(tasks, *o.shapes[n])])
            for n, v in (adapted or {}).items()
        }
        into = [address(adapted.get(name)) for name in self._architecture.chain]
        call.cotangents = native.extension().Cotangents(
            address(losses), address(predictions), into if any(into) else [], address(step_losses)
        )
        return [losses, predictions, adapted, step_losses]

    def _as_given(self, name: str, grad: np.ndarray, request: Request) -> Any:
        """A gradient in the order and form that the input came in."""
        if name == "rates":
            if self._order is not None:
                ordered = np.empty_like(grad)
                ordered[:, self._order] = grad
                grad = ordered
            return grad.reshape(self._operator.rate_shape)
        if name == "lr":
            given = np.shape(request.lr)
            return grad.sum((1, 2)) if len(given) == 1 else grad[:, 0]
        if name == "anchor":
            return grad
        side = request.support if name in _SUPPORT else request.query
        assert side is not None
        given = side[_SUPPORT.index(name) if side is request.support else _QUERY.index(name)]
        if isinstance(given, (list, tuple)):
            ends = np.cumsum([len(v) for v in given])[:-1]
            flat = grad.reshape(-1, *given[0].shape[1:])
            return np.split(flat, ends)
        return grad.reshape(np.shape(given))


def _keeping_weightless(ready: _Ready, wrt: tuple[str, ...]) -> _Ready:
    """Rows of weight 0 count where the gradient by that weight is wanted."""
    for name in ("support", "query"):
        side = getattr(ready, name)
        if f"{name}_weights" in wrt:
            ready = ready._replace(**{name: side._replace(keeps_weightless=True)})
    return ready


def _parameters_of(parameters: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], np.dtype]:
    """The parameters, contiguous, and their dtype."""
    found = {n: dense(need_array(f"parameters[{n!r}]", v)) for n, v in parameters.items()}
    dtype = next((value.dtype for value in found.values()), np.dtype(np.float32))
    for name, value in found.items():
        if value.dtype not in DTYPE_CODES or value.dtype != dtype:
            raise TypeError(
                f"parameters[{name!r}]: expected float32 or float64 as the first is, "
                f"got {value.dtype}"
            )
    return found, dtype


def _side(names: Names, side: Side, expected: Expected) -> Gathered:
    """One side, checked; with sizes where it is padded."""
    found = gather(names, side.x, side.y, side.weights, expected, side.offset)
    if side.sizes is None:
        return found
    if found.lengths is not None:
        raise ValueError(
            f"{names.sizes}: expected None where {names.x} is a list, whose entries have their own "
            f"sizes"
        )
    sizes = np.asarray(side.sizes)
    if sizes.dtype.kind not in "iu" or sizes.shape != (found.tasks,):
        raise ValueError(
            f"{names.sizes}: expected {counted(found.tasks, 'integer')}, got {sizes.dtype} of "
            "shape "
            f"{list(sizes.shape)}"
        )
    return found._replace(sizes=sizes.astype(np.int64))


def _room(query: Gathered, columns: int) -> np.ndarray:
    """Memory for the predictions; what only pads stays 0."""
    return np.zeros((*query.x.shape[:-1], columns), query.x.dtype)


def _numbers(
    name: str, value: Any, dtype: np.dtype, shapes: Sequence[tuple[int, ...]]
) -> np.ndarray:
    """`value` as a contiguous array of one of the shapes."""
    array = np.asarray(value)
    if isinstance(value, (list, tuple)) and array.dtype.kind in "fiu":
        array = array.astype(dtype)
    if array.dtype != dtype:
        fix = f"; {cure(array, dtype)}" if array.dtype.kind in "fiu" else ""
        raise TypeError(f"{name}: expected {dtype}, got {array.dtype}{fix}")
    if array.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected shape {wanted}, got {list(array.shape)}")
    return dense(array)
