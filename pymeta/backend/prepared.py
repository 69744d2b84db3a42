"""A native MAML call, prepared once for all task sets of the same shapes, and quick to repeat.

What follows from shapes is computed once, in a `PreparedCall`. A call with tensors of the same form
as the one before skips the checks (`repeat.py` says when); `again` gives what it reads.

The same code serves CUDA tensors. What differs for them is in `device.py`; here it shows in
`Plan.runner`, which calls the core there, in `inputs.ready`, and in which memory is reused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pymeta import native
from pymeta.backend.gradients import NOTHING, Extras, Gradients, Layout, Wanted
from pymeta.backend.inputs import (
    address,
    chained,
    native_lr,
    native_rates,
    predicted_shape,
    ready,
)
from pymeta.backend.into_grad import IntoGrad
from pymeta.backend.node import Leased, with_graph
from pymeta.backend.plan import Plan
from pymeta.backend.recipe import Recipe
from pymeta.backend.repeat import Repeat, as_it_came
from pymeta.spec import running
from pymeta.spec.once import NATIVE
from pymeta.spec.schedule import Schedule
from pymeta.spec.settings import CLIPS_THE_LOSS
from pymeta.spec.transforms import LACKS, in_transform
from pymeta.tasks.task_set import TaskSet, dense


class Results(NamedTuple):
    """What a native call returns; the losses are None where there are no query targets."""

    loss: Tensor  # []
    losses: Tensor  # [T]
    predictions: Tensor
    step_losses: Tensor | None = None  # [steps, T]


_new: Callable[..., Any] = tuple.__new__  # a named tuple of all its values, without a Python call
_NO_MORE = (None,) * 5  # the extras behind yq
_pointer = Tensor.data_ptr
_NO_ROWS = torch.zeros(1)  # where targets of no rows lie: 0 would mean no targets; never read


class PreparedCall:
    """The native core for all task sets of one form: what follows from their shapes.

    Attributes:
        layout: of the gradients; None where none are wanted.
        of_data: whether gradients of others than the parameters and lr are wanted.
        holds: after `remember`: whether a call with other xs, ys, xq, yq would be like it.
        leaves: after `remember`: those of which gradients are wanted.
        last: what `Plan.last` is to say of such a call.
    """

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        parameters: list[Tensor],
        extras: Extras,
        support: TaskSet,
        query: TaskSet | None,
        wanted: Wanted,
        trains: Sequence[bool] | None = None,
    ) -> None:
        """Prepare it.

        Args:
            plan: of the model.
            recipe: how it adapts.
            parameters: in the plan's order, [T, ...] of those that tasks have of their own.
            extras: what is read besides; lr in the order that the core expects.
            support: T tasks.
            query: T tasks; None for a call of which only adapted parameters are wanted.
            wanted: of which of these the gradients are.
            trains: of which parameters, where these are not the plan's own.
        """
        self.plan, self.recipe = plan, recipe
        self.tasks = support.tasks
        self.predicted = None if query is None else predicted_shape(plan, query)
        # The core leaves what only pads untouched: rows of predictions, of gradients of rows.
        self.pads = query is not None and query.padded
        if trains is None:
            self.layout = Layout.of(plan, wanted, None, extras)
        else:
            self.layout = Layout.of(plan, wanted, parameters, extras, trains)
        self.of_data = True in wanted[2:]
        self.pads_gradients = self.of_data and (support.padded or self.pads)
        self._tracks = bool(plan.norms and plan.trainable) and self.layout is not None
        lr = extras.lr
        second_order = self.layout is not None and not recipe.first_order
        lr_rows = 1 if lr.ndim == 1 else lr.shape[-2]
        sizes = (support.tasks, support.rows, 0 if query is None else query.rows)
        anchored = recipe.anchors is not None
        sides = (support,) if query is None else (support, query)
        plain = recipe.plain and all(s.plain for s in sides)
        self.last = (*sizes, recipe.steps, second_order, lr_rows, wanted, anchored, plain)
        names = [plan.names[i] for i in plan.chain]
        call = plan.call("meta")
        call.tasks = self.tasks
        call.start = [0] * len(plan.chain)  # they come with each call
        if recipe.own:
            call.own_starts = [name in recipe.own for name in names]
        call.rates = native_rates(lr, recipe.per_task_lr)
        call.schedule = native.extension().Schedule(steps=recipe.steps)
        call.first_order = recipe.first_order
        call.anchors = address(recipe.anchors)
        call.step_weights = address(recipe.step_weights)
        call.task_clip = recipe.task_clip
        call.by_support = query is not None and query.context > 0
        call.support = native.rows(support)
        if query is not None:
            call.query = native.rows(query)
        # what it points to, besides what comes with each call
        self._kept = [(s.weights, s.offset, s.starts, s.sizes, s.there) for s in sides]
        self._in_chain = [names.index(n) for n in plan.adapted]
        self.holds: Callable[..., bool]
        self.leaves: Sequence[Tensor] = ()
        self._into_grad: IntoGrad | None = None
        # those of the extras that there are: at least lr and xs
        self.given = itemgetter(*(i for i, e in enumerate(extras) if e is not None))
        # Of the weights of steps it counts only that there are some.
        how = (recipe.step_weights is not None, *recipe[4:])
        run = native.extension().RepeatedCall(call).run
        self.repeat = plan.runner(run, "meta", self.last, how, lr.shape)

    def memory(self) -> Gradients | None:
        """Where `run` may put the gradients; None where none are wanted."""
        return None if self.layout is None else self._cleared(self.layout.memory())

    def _cleared(self, gradients: Gradients) -> Gradients:
        if self.pads_gradients or self.tasks == 0:
            gradients.flat.zero_()
        return gradients

    def in_given_order(self, lr_gradient: Tensor) -> Tensor:
        """A gradient by lr as the core has it, in the order in which `prepare` got lr."""
        order = self.plan.lr_order
        if order is None or self.recipe.per_task_lr:
            return lr_gradient
        return torch.empty_like(lr_gradient).index_copy_(-1, order, lr_gradient)

    def run(self, parameters: list[Tensor], extras: Extras, gradients: Gradients | None) -> Results:
        """Call the core.

        Args:
            parameters: as the call was prepared for, likewise `extras`.
            extras: those that the core reads are contiguous.
            gradients: where they go, if any are wanted.

        Returns:
            The results, without a graph.
        """
        lr, xs, xq, ys, yq = extras[:5]
        plan, predicted = self.plan, self.predicted
        assert predicted is not None and xq is not None
        predictions = lr.new_zeros(predicted) if self.pads else lr.new_empty(*predicted)
        loss: Any = None
        losses: Any = None
        step_losses = None
        to_steps = 0
        statistics = running.memory(plan.norms, lr, self.tasks) if self._tracks else None
        if yq is not None:
            loss = torch.empty_like(plan.scalar)
            losses = lr.new_empty(self.tasks)
            if self.recipe.step_weights is not None:
                step_losses = lr.new_zeros(self.recipe.steps, self.tasks)
                to_steps = step_losses.data_ptr()
        if self.tasks == 0:
            loss = None if loss is None else loss.zero_()
            return Results(loss, losses, predictions, step_losses)
        if not (plan.in_order and plan.dense):
            parameters = chained(plan, parameters)  # held while the core reads them
        self.repeat(
            [*map(_pointer, parameters)],
            lr.data_ptr(),
            xs.data_ptr(),
            0 if ys is None else ys.data_ptr(),
            xq.data_ptr(),
            0 if yq is None else yq.data_ptr() or _NO_ROWS.data_ptr(),
            0 if loss is None else loss.data_ptr(),
            0 if losses is None else losses.data_ptr(),
            predictions.data_ptr(),
            None if gradients is None else gradients.native,
            to_steps,
            0 if statistics is None else statistics.data_ptr(),
        )
        if statistics is not None:
            running.update(plan.norms, statistics)
        made: Results = _new(Results, (loss, losses, predictions, step_losses))
        return made

    def vjp(
        self,
        parameters: list[Tensor],
        extras: Extras,
        losses: Tensor | None,
        predictions: Tensor | None,
        adapted: Sequence[Tensor | None] = (),
        step_losses: Tensor | None = None,
        to_losses: Tensor | None = None,
    ) -> list[Tensor]:
        """The wanted gradients of any scalar of the results, from those of the results.

        Args:
            parameters: as for `run`, likewise `extras`.
            extras: with the values of then.
            losses: [T], or None.
            predictions: of their shape, or None.
            adapted: [T, ...] of each of `plan.adapted`, or None; may be left out.
            step_losses: [steps, T], or None.
            to_losses: [T], dense, where the losses themselves go; None for nowhere.

        Raises:
            ValueError: the call has a task_clip.
        """
        assert self.layout is not None
        if self.recipe.task_clip:
            raise ValueError(CLIPS_THE_LOSS)
        gradients = self._cleared(Gradients(self.layout, None))
        if self.tasks == 0:
            return gradients.tensors
        losses = None if losses is None else dense(losses)
        predictions = None if predictions is None else dense(predictions)
        step_losses = None if step_losses is None else dense(step_losses)
        into = [0] * len(self.plan.chain)
        held = [None if a is None else dense(a) for a in adapted]
        for at, tensor in zip(self._in_chain, held, strict=False):
            into[at] = address(tensor)
        into = into if any(into) else []
        flows = address(losses), address(predictions), into, address(step_losses)
        ordered = chained(self.plan, parameters)  # held while the core reads them
        self.repeat(
            [p.data_ptr() for p in ordered],
            extras.lr.data_ptr(),
            extras.xs.data_ptr(),
            address(extras.ys),
            address(extras.xq),
            0 if extras.yq is None else extras.yq.data_ptr() or _NO_ROWS.data_ptr(),
            0,
            address(to_losses),
            0,
            gradients.native,
            cotangents=native.extension().Cotangents(*flows),
        )
        return gradients.tensors

    def __call__(self, parameters: list[Tensor], extras: Extras) -> Results:
        """`run`, and where gradients are wanted the results' graph."""
        self.plan.last = self.last
        layout = self.layout
        if layout is None:
            return self.run(parameters, extras, None)
        if extras.yq is None:  # no gradient before one of the predictions comes
            results = self.run(parameters, extras, None)
            made = Made(self, parameters, extras, layout, None)
            (predictions,) = with_graph(made, (results.predictions,))
            return results._replace(predictions=predictions)
        gradients = self._cleared(layout.memory())
        results = self.run(parameters, extras, gradients)
        made = Made(self, parameters, extras, layout, gradients)
        if results.step_losses is not None:
            return Results(*with_graph(made, cast(tuple[Tensor, ...], results)))
        # each output of a node takes its time
        graphed: Results = _new(Results, (*with_graph(made, results[:3]), None))
        return graphed

    def accumulate(self, extras: Extras) -> Results:
        """A call like the one before, and its gradients added to the `.grad` of the `leaves`."""
        plan, layout = self.plan, self.layout
        plan.last = self.last
        if layout is None:
            return self.run(plan.parameters, extras, None)
        gradients = self._cleared(layout.memory())
        results = self.run(plan.parameters, extras, gradients)
        if self._into_grad is None:
            self._into_grad = IntoGrad(gradients, layout.one)
        self._into_grad(self.leaves, gradients)
        if gradients.stream is not None:
            layout.idle.append(gradients)
        return results

    # ---- once more ----------------------------------------------------------------------------

    def remember(
        self,
        learned: dict[str, Any],
        data: Sequence[Any],
        support: TaskSet,
        query: TaskSet,
        lr: Tensor,
    ) -> bool:
        """Note what the call was made of, if it can be made again: if all went in as it came.

        It cannot in the capture of a CUDA graph, where all memory is the graph's.

        Args:
            learned: the parameters of the MAML module itself: lr, where that is learnable.
            data: xs, ys, xq, yq as they were given; without yq where there is none.
            support: what became of them.
            query: likewise.
            lr: the step size as the core took it.
        """
        device = self.plan.device
        if device is not None and device.capturing():
            return False
        used = (support.x, support.y, query.x, query.y)[: len(data)]
        if not all(map(as_it_came, data, used)) or self.plan.lr_order is not None:
            return False
        places = [(learned, name) for name in learned]
        watch = self.plan.watch.and_also(places, [lr] if learned else [], device is not None)
        self.holds = Repeat(watch, data, device).holds
        self._lr = lr
        if self.layout is not None:
            self.leaves = self.layout.inputs(self.plan.parameters, self.again(*data))
        return True

    def again(self, xs: Any, ys: Any, xq: Any, yq: Any = None) -> Extras:
        """What a call of these reads, where `holds` says that it is like the one before.

        Whether grad is enabled must be as it was.
        """
        extras: Extras = _new(Extras, (self._lr, xs, xq, ys, yq, *_NO_MORE))
        return extras


CHANGED = (
    "a parameter or an input was changed in place after the call whose predictions, losses or "
    "adapted parameters are differentiated now; the inner steps have to be made again with what it "
    "was. Go backward first, then change it"
)
_version = attrgetter("_version")


def versions_of(tensors: Iterable[Tensor]) -> list[int] | None:
    """By which a later change in place is found out; None where a tensor has none."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:  # a tensor of inference mode
        return None


class Made(Leased):
    """A native call that was made: what its node needs to go back through it."""

    __slots__ = ("call", "extras", "inputs", "parameters", "versions", "why_once")

    def __init__(
        self,
        call: PreparedCall,
        parameters: list[Tensor],
        extras: Extras,
        layout: Layout,
        gradients: Gradients | None,
    ) -> None:
        """Note what it was made of; `gradients` are those of its loss, where these are known."""
        self.call, self.parameters, self.extras = call, parameters, extras
        self.gradients, self.idle = gradients, layout.idle
        self.inputs = layout.inputs(parameters, extras)
        self.why_once = NATIVE
        self.versions = versions_of((*parameters, *call.given(extras)))

    def backward(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor] | None:
        """From the gradients of the results, in their order, or of the predictions alone."""
        known = self.gradients
        if known is None:
            return None if gradients[0] is None else self._again(None, gradients[0])
        loss, losses, predictions = gradients[:3]
        steps = gradients[3] if len(gradients) > 3 else None
        if losses is None and predictions is None and steps is None:
            return None if loss is None else known.times(loss)
        if loss is not None:
            mean = (loss / max(self.call.tasks, 1)).expand(self.call.tasks)
            losses = mean if losses is None else losses + mean
        return self._again(losses, predictions, step_losses=steps)

    def _again(
        self,
        losses: Tensor | None,
        predictions: Tensor | None,
        adapted: Sequence[Tensor | None] = (),
        step_losses: Tensor | None = None,
    ) -> Sequence[Tensor]:
        if in_transform():
            raise RuntimeError(LACKS)
        try:
            for flow in (losses, predictions, *adapted, step_losses):
                address(flow)
        except RuntimeError:
            raise RuntimeError(
                "the native core takes one gradient of the results at a time, and "
                "is_grads_batched=True gives many at once: call torch.autograd.grad for each, or "
                'use backend="torch"'
            ) from None
        if self.versions != versions_of((*self.parameters, *self.call.given(self.extras))):
            raise RuntimeError(CHANGED)
        flows = losses, predictions, adapted, step_losses
        return self.call.vjp(self.parameters, self.extras, *flows)


class MadeAdapted(Made):
    """One whose results are the adapted parameters."""

    __slots__ = ()

    def backward(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor] | None:
        """From their gradients."""
        if all(g is None for g in gradients):
            return None
        return self._again(None, None, gradients)


def prepare(
    plan: Plan,
    recipe: Recipe,
    parameters: list[Tensor],
    lr: Tensor,
    support: TaskSet,
    query: TaskSet | None,
    wanted: Wanted | None = None,
    trains: Sequence[bool] | None = None,
) -> tuple[PreparedCall, Extras]:
    """The prepared call, and what it reads; the sets are brought into the core's form.

    `wanted` left out means all that require grad, if grad is enabled. `trains` says which of the
    parameters do, where these are not the plan's own; tasks' own starts say it themselves.
    """
    plan.check_steps(Schedule(recipe.steps))
    lr, support = native_lr(plan, lr), ready(plan, support)
    xq = yq = query_weights = query_offset = None
    if query is not None:
        query = ready(plan, query)
        xq, yq, query_weights, query_offset = query.x, query.y, query.weights, query.offset
    weights, offsets = (support.weights, query_weights), (support.offset, query_offset)
    extras = Extras(lr, support.x, xq, support.y, yq, *weights, recipe.anchors, *offsets)
    if recipe.own and trains is None:
        trains = [p.requires_grad for p in parameters]
    if wanted is None:
        wanted = NOTHING
        if torch.is_grad_enabled():
            of_parameters = bool(plan.trainable) if trains is None else any(trains)
            of_extras = (t is not None and t.requires_grad for t in extras)
            wanted = cast(Wanted, (of_parameters, *of_extras))
    call = PreparedCall(plan, recipe, parameters, extras, support, query, wanted, trains)
    return call, extras
