"""Operators on torch's tensors: natively where the core can, otherwise by the reference.

A module's structure is copied once; for each dtype, device and shape of rows that parameters come
in there is one copy of it, and one `Plan`. Their values are those of the call.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pymeta import reference
from pymeta.backend import adapt as native_adapt
from pymeta.backend.gradients import Extras, Wanted
from pymeta.backend.plan import Plan
from pymeta.backend.prepared import PreparedCall, prepare
from pymeta.functional import implicit_calls
from pymeta.functional.anchors import anchors_of, check_values_of
from pymeta.functional.evaluation import (
    QUERIES,
    Results,
    in_torch,
    lacks_forward_mode,
)
from pymeta.functional.implicit_calls import ImplicitCall
from pymeta.functional.leaves import (
    as_given,
    checked_flows,
    key_of,
    listed,
    tensors_of,
    with_leaves,
    without_graph,
)
from pymeta.functional.operator import split
from pymeta.functional.own import Own, rates_of, step_weights_of
from pymeta.spec.architecture import Architecture
from pymeta.spec.inner import InnerLoop
from pymeta.spec.network import Description
from pymeta.spec.schedule import Schedule, check_count
from pymeta.spec.transforms import LACKS, in_transform
from pymeta.tasks.task_set import (
    QUERY,
    SUPPORT,
    TaskSet,
    check_same_tasks,
    dense,
    shaped,
    task_set,
    tensor_of,
)
from pymeta.tasks.values import check_values

if TYPE_CHECKING:
    from pymeta.functional.calls import Flows, Request, Side
    from pymeta.functional.operator import Operator
    from pymeta.functional.through_tensors import ThroughTensors

EXTRAS = Extras._fields  # what `wrt` names, in their order; "rates" stand where "lr" does


class _Ready(NamedTuple):
    """A call whose arguments are checked."""

    module: nn.Module
    plan: Plan
    parameters: list[Tensor]  # those that tasks share, in order; any where they do not
    support: TaskSet
    query: TaskSet | None
    own: Own
    rates: Tensor  # of `Operator.rate_shape`
    steps: int
    reason: str | None  # why torch runs it

    @property
    def operands(self) -> list[Tensor]:
        return self.own.operands(self.plan, self.parameters)

    @property
    def sets(self) -> tuple[TaskSet, ...]:
        return (self.support,) if self.query is None else (self.support, self.query)


class Tensors:
    """What runs an operator's calls on tensors."""

    def __init__(self, operator: Operator, module: nn.Module) -> None:
        """Keep a copy of the module; ValueError where it cannot run as requested."""
        self._operator = operator
        self._module = copy.deepcopy(module)
        self._module.requires_grad_(False)
        for name in operator.adapted:
            self._module.get_parameter(name).requires_grad_(True)
        self._plans: dict[Any, tuple[nn.Module, Plan]] = {}
        first = next(self._module.parameters(), None)
        dtype = torch.get_default_dtype() if first is None else first.dtype
        self._first = dtype, torch.device("cpu") if first is None else first.device
        plan = self._plan(*self._first, None)[1]
        if operator.backend == "native" and plan.reason is not None and not plan.unshaped:
            raise ValueError(f'backend="native": {plan.reason}')

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle: everything but what is derived."""
        return {**self.__dict__, "_plans": {}}

    def _plan(self, dtype: torch.dtype, device: torch.device, x: Any) -> tuple[nn.Module, Plan]:
        """The copy of the module for such parameters, and the plan made of it."""
        module, plan = self._planned(dtype, device, None)
        shape = None if x is None else plan.shape_for(x)
        return (module, plan) if shape is None else self._planned(dtype, device, shape)

    def _planned(
        self, dtype: torch.dtype, device: torch.device, row_shape: tuple[int, ...] | None
    ) -> tuple[nn.Module, Plan]:
        key = dtype, device, row_shape
        found = self._plans.get(key)
        if found is None:
            o = self._operator
            with torch.inference_mode(False):  # it outlives that
                module = copy.deepcopy(self._module).to(device, dtype)
            plan = Plan(
                module, o.loss, o.adapted, o.per, o.optimizer, o.pull,
                query_loss=o.query_loss, row_shape=row_shape, tracks=False, precision=o.precision,
            )  # fmt: skip
            found = module, plan
            if not plan.refuses:
                self._plans[key] = found
        return found

    def architecture(self) -> Architecture | None:
        """The chain of layers, where the native core knows one on the CPU."""
        plan = self._planned(self._first[0], torch.device("cpu"), None)[1]
        d = plan.description
        if not isinstance(d, Description) or plan.core_reason is not None or plan.constants:
            return None  # running statistics are the module's, and no arguments
        return Architecture(d.layers, plan.names, d.names, d.flattens)

    def for_arrays(self) -> ThroughTensors:
        """The same for numpy arrays."""
        from pymeta.functional.through_tensors import ThroughTensors

        return ThroughTensors(self)

    # ---- arguments ----------------------------------------------------------------------------

    def _ready(self, request: Request) -> _Ready:
        o = self._operator
        tensors = tensors_of(request.parameters)
        first = next(iter(tensors.values()), None)
        dtype, device = self._first if first is None else (first.dtype, first.device)
        module, plan = self._plan(dtype, device, request.support.x)
        steps = o.steps if request.steps is None else check_count("steps", request.steps)
        support = task_set(SUPPORT, *request.support[:4], plan.expected, request.support.offset)
        query = None if request.query is None else _queries(request.query, plan)
        if query is not None:
            check_same_tasks(support, query)
        own_names = split(tensors, o.shapes, support.tasks)
        own = Own(
            anchors_of(request.anchor, support.tasks, plan),
            {name: dense(tensors[name]) for name in own_names},
            rates_of(request.lr, support.tasks, plan),
            step_weights_of(request.step_weights, steps, plan),
        )
        parameters = [
            p if name in own_names or name in plan.constants else dense(tensors[name])
            for name, p in zip(plan.names, plan.parameters, strict=True)
        ]
        rates = self._rates(request.rates, plan)
        ready = _Ready(module, plan, parameters, support, query, own, rates, steps, None)
        return ready._replace(reason=self._reason(ready))

    def _rates(self, rates: Any, plan: Plan) -> Tensor:
        """Step sizes of `Operator.rate_shape`."""
        o = self._operator
        if rates is None:
            return plan.lr_tensor(o.first_rate).expand(o.rate_shape)
        rates = tensor_of("rates", rates)
        if not isinstance(rates, Tensor) or not rates.is_floating_point():
            what = rates.dtype if isinstance(rates, Tensor) else type(rates).__name__
            raise TypeError(f"rates: expected a tensor of real numbers, got {what}")
        if tuple(rates.shape) != o.rate_shape:
            raise ValueError(f"rates: expected shape {list(o.rate_shape)}, got {list(rates.shape)}")
        return rates.to(plan.expected.device, plan.expected.dtype)

    def _reason(self, ready: _Ready) -> str | None:
        """Why torch runs the call; None where the native core does."""
        if self._operator.backend == "torch":
            return 'backend="torch" was asked for'
        if in_transform():
            return LACKS
        plan, sets = ready.plan, ready.sets
        tensors = [*ready.operands, ready.rates, ready.own.rates]
        return (
            plan.reason
            or next((s.reason for s in sets if s.reason is not None), None)
            or lacks_forward_mode(tensors, sets)
        )

    def _to_torch(self, ready: _Ready, *sets: TaskSet) -> tuple[int, ...]:
        """Get ready for the reference; the shape of a row of outputs, where it matters."""
        assert ready.reason is not None
        self._operator.fall_back(ready.reason)
        expected, shape = ready.plan.expected, None
        classes = any(s.loss is not None and s.loss.takes_classes for s in sets)
        if expected.out_features is None and (classes or ready.support.tasks == 0):
            x = ready.support.x
            features = tuple(x.shape[ready.support.lead :])
            shape = reference.output_shape(ready.module, features, x.dtype)
            if shape is not None and len(shape) == 1:
                expected = replace(expected, in_features=None, out_features=shape[0])
        for s in sets:
            check_values(s, expected)
        return shape or (() if expected.out_features is None else (expected.out_features,))

    def _inner(self, ready: _Ready) -> InnerLoop:
        o = self._operator
        return InnerLoop(
            o.loss, ready.rates, ready.plan.rates, Schedule(ready.steps), o.first_order,
            o.optimizer, o.pull, o.query_loss,
        )  # fmt: skip

    # ---- calls --------------------------------------------------------------------------------

    def adapt(self, request: Request) -> dict[str, Tensor]:
        """The adapted parameters, with a graph where grad is enabled."""
        if torch.compiler.is_compiling():
            from pymeta.functional import compiled

            found: dict[str, Tensor] = compiled.operator_adapt(self._operator, request)
            return found
        return self._adapted(self._ready(request))

    def _adapted(self, ready: _Ready) -> dict[str, Tensor]:
        if self._operator.implicit is not None:
            return implicit_calls.adapted(self._implicit_call(ready, ready.support)[0])
        if ready.reason is not None:
            return self._adapt_in_torch(ready)
        plan, own, recipe = ready.plan, ready.own, self._recipe(ready)
        rates = ready.rates if own.rates is None else own.rates
        return native_adapt.adapt_with_graph(
            plan, recipe, ready.parameters, rates, self._inner(ready), ready.support, own.start,
            trains=[t.requires_grad for t in ready.operands],
        )  # fmt: skip

    def _implicit_call(self, ready: _Ready, *sets: TaskSet) -> tuple[ImplicitCall, tuple[int, ...]]:
        """The call, and what `_to_torch` returns where torch runs it."""
        implicit, plan, own = self._operator.implicit, ready.plan, ready.own
        assert implicit is not None
        implicit_calls.check(plan, own, ready.rates)
        plan.check_steps(Schedule(ready.steps))
        torch_runs = ready.reason is not None
        out = self._to_torch(ready, *sets) if torch_runs else ()
        how = ready.parameters, self._inner(ready), ready.support, own
        return ImplicitCall(ready.module, plan, *how, implicit, torch_runs), out

    def _adapt_in_torch(self, ready: _Ready) -> dict[str, Tensor]:
        self._to_torch(ready, ready.support)
        plan, own = ready.plan, ready.own
        plan.check_steps(Schedule(ready.steps))
        check_values_of(own.anchors)
        named = dict(zip(plan.names, ready.parameters, strict=True))
        done = reference.adapt(
            ready.module, named, plan.adapted, self._inner(ready), ready.support,
            start=own.start, anchors=own.anchors, rates=own.rates,
        )  # fmt: skip
        return {name: done.parameters[name] for name in plan.adapted}

    def adapt_predict(self, request: Request) -> Any:
        """The predictions, with a graph where grad is enabled."""
        if torch.compiler.is_compiling():
            from pymeta.functional import compiled

            return compiled.operator_predictions(self._operator, request)
        return self._evaluated(self._ready(request)).predictions

    def predict(self, parameters: Mapping[str, Any], query: Side) -> Any:
        """The predictions of networks as they are: no steps, on no rows."""
        from pymeta.functional.calls import Request, Side

        tensors = tensors_of(parameters)
        first = next(iter(tensors.values()), None)
        plan = self._plan(*(self._first if first is None else (first.dtype, first.device)), query.x)
        queries = _queries(query, plan[1])
        x = queries.x
        empty = x.new_zeros(queries.tasks, 0, *x.shape[queries.lead :])
        targets = empty.new_zeros(queries.tasks, 0, *_target_shape(plan[1], self._operator))
        if self._operator.loss.takes_classes:
            targets = targets[..., 0].long()
        request = Request(parameters, Side(empty, targets), query, steps=0)
        return self.adapt_predict(request)

    def _recipe(self, ready: _Ready, clips: bool = False) -> Any:
        o = self._operator
        recipe = ready.own.recipe(o, ready.steps)
        return recipe if clips else recipe._replace(task_clip=0.0)

    def _prepared(
        self, ready: _Ready, clips: bool, wanted: Wanted | None, trains: Sequence[bool]
    ) -> tuple[PreparedCall, Any]:
        rates = ready.rates if ready.own.rates is None else ready.own.rates
        recipe = self._recipe(ready, clips)
        sets = ready.support, ready.query
        return prepare(ready.plan, recipe, ready.operands, rates, *sets, wanted, trains)

    def _evaluated(self, ready: _Ready, clips: bool = False) -> Results:
        """Losses and predictions, with a graph where grad is enabled."""
        query = ready.query
        assert query is not None
        if self._operator.implicit is not None and ready.steps:  # else nothing is minimised
            made, out = self._implicit_call(ready, *ready.sets)
            return implicit_calls.evaluated(made, implicit_calls.adapted(made), query, out)
        if ready.reason is not None:
            out = self._to_torch(ready, ready.support, query)
            clip = self._operator.task_clip if clips else None
            sets = ready.support, query
            return in_torch(
                ready.module, ready.plan, ready.parameters, self._inner(ready), *sets, ready.own,
                clip, out,
            )  # fmt: skip
        trains = [t.requires_grad for t in ready.operands]
        call, extras = self._prepared(ready, clips, None, trains)
        results = Results(*call(ready.operands, extras))
        return results._replace(predictions=shaped(results.predictions, query))

    # ---- gradients without a graph ------------------------------------------------------------

    def gradients(self, request: Request, wrt: tuple[str, ...], flows: Flows | None) -> Any:
        """(results, (gradients, input gradients)): of the mean loss, or of what flows."""
        if torch.compiler.is_compiling():
            from pymeta.functional import compiled

            return compiled.operator_gradients(self._operator, request, wrt, flows)
        request, leaves = with_leaves(request, wrt, self._operator)
        with torch.enable_grad():  # rows whose weights' gradients are wanted count
            ready = self._ready(request)
            flows = (
                None
                if flows is None
                else checked_flows(
                    flows,
                    ready.query,
                    ready.plan.expected,
                    ready.support.tasks,
                    ready.steps,
                    self._operator.shapes,
                )
            )
            if ready.reason is not None or self._operator.implicit is not None:
                results, found = self._by_autograd(ready, leaves, flows)
            else:
                results, found = self._natively(ready, wrt, leaves, flows)
        inputs = {name: found[name] for name in wrt if name != "parameters"}
        parameters = (
            {n: found[key_of(n)] for n in request.parameters} if "parameters" in wrt else {}
        )
        return results, (parameters, inputs)

    def _by_autograd(
        self, ready: _Ready, leaves: dict[str, Any], flows: Flows | None
    ) -> tuple[Results | None, dict[str, Any]]:
        results, parts = None, []
        if ready.query is not None:
            results = self._evaluated(ready, clips=flows is None)
        if flows is None:
            assert results is not None
            parts = [results.loss]
        else:
            if flows.task_losses is not None and results is not None:
                assert results.task_losses is not None
                parts.append((results.task_losses * flows.task_losses).sum())
            if flows.step_losses is not None and results is not None:
                assert results.step_losses is not None
                parts.append((results.step_losses * flows.step_losses).sum())
            if flows.predictions is not None and results is not None:
                pairs = zip(listed(results.predictions), listed(flows.predictions), strict=True)
                parts += [(p * f).sum() for p, f in pairs]
            if flows.adapted is not None:
                adapted = self._adapted(ready)
                parts += [(adapted[n] * f).sum() for n, f in flows.adapted.items()]
        every = [leaf for value in leaves.values() for leaf in listed(value)]
        total = torch.stack([p for p in parts if p is not None]).sum()
        grads = [torch.zeros_like(leaf) for leaf in every]
        if total.requires_grad and every:
            grads = list(
                torch.autograd.grad(total, every, allow_unused=True, materialize_grads=True)
            )
        found, rest = {}, iter(grads)
        for name, value in leaves.items():
            mine = [next(rest) for _ in listed(value)]
            found[name] = mine if isinstance(value, list) else mine[0]
        return None if results is None else without_graph(results), found

    def _natively(
        self, ready: _Ready, wrt: tuple[str, ...], leaves: dict[str, Any], flows: Flows | None
    ) -> tuple[Results | None, dict[str, Any]]:
        named = {"lr" if name == "rates" else name for name in wrt}
        wanted = cast(Wanted, ("parameters" in wrt, *(name in named for name in EXTRAS)))
        trains = [wanted[0] and n not in ready.plan.constants for n in ready.plan.names]
        call, extras = self._prepared(ready, flows is None, wanted, trains)
        operands, results = ready.operands, None
        extras = type(extras)(*(None if e is None else e.detach() for e in extras))
        if flows is None:
            memory = call.memory()  # which nothing gives back: it is the caller's now
            results = Results(*call.run(operands, extras, memory))
            tensors = [] if memory is None else memory.tensors
            assert ready.query is not None
            results = results._replace(predictions=shaped(results.predictions, ready.query))
        elif call.layout is None:
            tensors = []
        else:
            predictions = flows.predictions
            if predictions is not None:
                assert call.predicted is not None
                predictions = torch.cat([p.flatten(0, -2) for p in listed(predictions)])
                predictions = predictions.reshape(call.predicted)
            adapted = flows.adapted or {}
            into = [adapted.get(name) for name in ready.plan.adapted]
            tensors = call.vjp(
                operands, extras, flows.task_losses, predictions, into, flows.step_losses
            )
        rest, found = iter(tensors), {}
        if wanted[0]:
            found = {key_of(name): next(rest) for name in self._operator.shapes}
        for name, is_wanted in zip(EXTRAS, wanted[1:], strict=True):
            if is_wanted:
                given = "rates" if name == "lr" and "rates" in wrt else name
                grad = next(rest)
                grad = call.in_given_order(grad) if name == "lr" else grad
                found[given] = as_given(grad, leaves[given])
        return results, found


def _queries(query: Side, plan: Plan) -> TaskSet:
    expected = plan.query_expected
    if query.y is not None:
        return task_set(QUERY, *query[:4], expected, query.offset)
    return task_set(QUERIES, query.x, None, query.sizes, None, expected, query.offset)


def _target_shape(plan: Plan, operator: Operator) -> tuple[int, ...]:
    """The shape of a row of targets; any will do where the width is not known."""
    out = plan.expected.out_features
    return (1 if out is None else operator.loss.target_columns(out),)
