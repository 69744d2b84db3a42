"""The native core called with torch tensors: allocation, pointers, and one autograd node.

The core computes the loss and, together with it, the whole meta-gradient, into one flat buffer
(the gradients of the parameters, of lr, of xs and of xq, one behind the other). The backward of the
autograd node only multiplies them by the incoming scalar. Where nothing requires grad there is
neither a node nor a buffer, and the core does not run its reverse sweep.

A small meta-batch takes the core a few microseconds, less than it takes to look its tensors over.
So what follows from shapes is worked out once, in a `Call`, which `repeat.py` uses again.

The same code serves CUDA tensors. What differs for them is in `device.py`; here it shows in
`Plan.core`, which calls the core there, in `_ready`, and in whose memory may be used again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pymeta import native, reference
from pymeta.backend.plan import Plan
from pymeta.models.stacked import History
from pymeta.reference.once import NATIVE, REPTILE, once
from pymeta.tasks.task_set import TaskSet, check_sizes, check_values, dense

if TYPE_CHECKING:
    from pymeta.reference import Adaptation, InnerLoop
    from pymeta.spec.schedule import Schedule

Wanted: TypeAlias = tuple[bool, bool, bool, bool]
Pointers: TypeAlias = tuple[int, int, int, int, int, int]  # what native.rows gives
Results: TypeAlias = tuple[Tensor, Tensor, Tensor]  # loss [], losses [T], predictions


class Gradients:
    """Memory for the wanted gradients: flat, as tensors of their shapes, and as pointers.

    It may be used again on the `stream` it was made on, which is 0 on the CPU; where that is None,
    it may not.
    """

    __slots__ = ("flat", "of_inputs", "of_parameters", "stream", "tensors")

    def __init__(self, layout: Layout, stream: int | None = 0) -> None:
        """Allocate it, without values."""
        self.stream = stream
        with torch.inference_mode(False):  # it may outlive that
            flat = layout.scalar.new_empty(layout.total)
        base = flat.data_ptr()
        self.flat = flat
        parts = flat.split_with_sizes([math.prod(shape) for shape in layout.shapes])
        self.tensors = [part.view(shape) for part, shape in zip(parts, layout.shapes, strict=True)]
        self.of_parameters = [base + at if at >= 0 else 0 for at in layout.offsets]
        self.of_inputs = [base + at if at >= 0 else 0 for at in layout.extra_offsets]


class Layout:
    """Where in one flat buffer the wanted gradients lie, and the buffers that no graph uses.

    Attributes:
        wanted: whether the gradients of the parameters, of lr, of xs and of xq are wanted.
        shapes: of the gradients, in the order of the buffer.
        offsets: where each parameter of the chain has its own, in bytes; -1 where it has none.
        extra_offsets: likewise for lr, xs and xq.
        parameter_total: how many elements belong to parameters, out of `total`.
    """

    def __init__(self, plan: Plan, wanted: Wanted, extras: tuple[Tensor, Tensor, Tensor]) -> None:
        """Lay out what is wanted; `extras` are lr, xs and xq."""
        self.wanted = wanted
        self.trains = plan.trains
        self.parameters_only = wanted == (True, False, False, False) and all(plan.trains)
        self.scalar = plan.scalar
        self.device = plan.device
        self.shapes = list(plan.shapes) if wanted[0] else []
        self.offsets = plan.offsets if wanted[0] else [-1] * len(plan.chain)
        self.parameter_total = end = plan.total if wanted[0] else 0
        self.extra_offsets: list[int] = []
        for tensor, is_wanted in zip(extras, wanted[1:], strict=True):
            self.extra_offsets.append(end * plan.itemsize if is_wanted else -1)
            if is_wanted:
                self.shapes.append(tuple(tensor.shape))
                end += tensor.numel()
        self.total = end
        # Two, because a training loop holds one step's graph until the next one's is made.
        self.idle: deque[Gradients] = deque(maxlen=2)

    @staticmethod
    def of(plan: Plan, wanted: Wanted, extras: tuple[Tensor, Tensor, Tensor]) -> Layout | None:
        """The plan's layout for what is wanted; None where nothing is."""
        if True not in wanted:
            return None
        key: tuple[Any, ...] = wanted
        if True in wanted[1:]:
            key = wanted, *(t.shape for t, w in zip(extras, wanted[1:], strict=True) if w)
        layout: Layout | None = plan.layouts.get(key)
        if layout is None:
            if len(plan.layouts) >= _LAYOUTS_KEPT:
                plan.layouts.clear()
            layout = plan.layouts[key] = Layout(plan, wanted, extras)
        return layout

    def memory(self) -> Gradients:
        """Memory that no graph uses, to write to on the current stream."""
        stream = 0
        if self.device is not None:
            if self.device.capturing():
                return Gradients(self, None)
            stream = self.device.stream()
        try:
            gradients = self.idle.pop()
        except IndexError:
            return Gradients(self, stream)
        return gradients if gradients.stream == stream else Gradients(self, stream)

    def inputs(self, parameters: list[Tensor], lr: Tensor, xs: Tensor, xq: Tensor) -> list[Tensor]:
        """The tensors whose gradients are wanted, in the order of the buffer."""
        if self.parameters_only:
            return parameters
        inputs: list[Tensor] = []
        if self.wanted[0]:
            inputs = [p for p, t in zip(parameters, self.trains, strict=True) if t]
        extras = zip((lr, xs, xq), self.wanted[1:], strict=True)
        return inputs + [tensor for tensor, wanted in extras if wanted]


_LAYOUTS_KEPT = 8  # those that depend on the shapes of xs and xq may be many


class _Lease:
    """What a graph holds of its gradients' memory, which goes back when the graph is gone."""

    __slots__ = ("gradients", "idle")

    def __init__(self, gradients: Gradients, idle: deque[Gradients]) -> None:
        self.gradients = gradients
        self.idle = idle

    def __del__(self) -> None:
        if self.gradients.stream is not None:
            self.idle.append(self.gradients)


class Call:
    """The native core for all task sets of one form: what follows from their shapes.

    Attributes:
        layout: of the gradients; None where none are wanted.
        last: what `Plan.last` is to say of such a call.
    """

    def __init__(
        self,
        plan: Plan,
        lr: Tensor,
        steps: int,
        first_order: bool,
        support: TaskSet,
        query: TaskSet,
        wanted: Wanted,
    ) -> None:
        """Work it out; lr is [columns] or [rows, columns], in the order the core wants."""
        self.plan = plan
        self.dtype_code = plan.dtype_code
        self.steps = steps
        self.first_order = first_order
        self.tasks = support.tasks
        self.lr_rows = 1 if lr.ndim == 1 else lr.shape[0]
        self.lr_columns = lr.shape[-1]
        self.predicted = _predicted(plan, query)
        # The core leaves what only pads untouched: rows of predictions, of gradients of inputs.
        self.pads = query.padded
        self.pads_gradients = (wanted[2] or wanted[3]) and (support.padded or query.padded)
        self.layout = Layout.of(plan, wanted, (lr, support.x, query.x))
        second_order = self.layout is not None and not first_order
        self.last = (support.tasks, support.rows, query.rows, steps, second_order)
        self.core = plan.core("meta_gradient", self.last, wanted, self.lr_rows)

    def memory(self) -> Gradients | None:
        """Where `run` may put the gradients; None where none are wanted."""
        if self.layout is None:
            return None
        gradients = self.layout.memory()
        if self.pads_gradients or self.tasks == 0:
            gradients.flat.zero_()
        return gradients

    def run(
        self,
        parameters: Sequence[Tensor],
        lr: Tensor,
        support: Pointers,
        query: Pointers,
        gradients: Gradients | None,
    ) -> Results:
        """Call the core.

        Args:
            parameters: in the chain's order; they and all others contiguous.
            lr: as its shape was said to be.
            support: its `native.rows`.
            query: its `native.rows`.
            gradients: where they go, if any are wanted.

        Returns:
            loss [], task losses [T], predictions.
        """
        loss = torch.empty_like(self.plan.scalar)
        losses = lr.new_empty(self.tasks)
        make = lr.new_zeros if self.pads else lr.new_empty
        predictions = make(*self.predicted)
        if self.tasks == 0:
            return loss.zero_(), losses, predictions
        self.core(
            self.dtype_code,
            [p.data_ptr() for p in parameters],
            lr.data_ptr(),
            self.lr_rows,
            self.lr_columns,
            self.steps,
            self.first_order,
            self.tasks,
            support,
            query,
            losses.data_ptr(),
            predictions.data_ptr(),
            None if gradients is None else gradients.of_parameters,
            *((0, 0, 0) if gradients is None else gradients.of_inputs),
            loss.data_ptr(),
        )
        return loss, losses, predictions

    def __call__(
        self,
        parameters: list[Tensor],
        lr: Tensor,
        xs: Tensor,
        xq: Tensor,
        support: Pointers,
        query: Pointers,
    ) -> Results:
        """`run`, and where gradients are wanted an autograd node that holds them."""
        plan, layout = self.plan, self.layout
        plan.last = self.last
        gradients = self.memory()
        loss, losses, predictions = self.run(
            chained(plan, parameters), lr, support, query, gradients
        )
        if layout is not None and gradients is not None:
            inputs = layout.inputs(parameters, lr, xs, xq)
            loss = _with_graph(_Lease(gradients, layout.idle), loss, inputs, NATIVE)
        return loss, losses, predictions


# From this size on torch spreads a product over its OpenMP threads, and their barrier takes
# milliseconds where the other cores are busy: many times the product.
_LARGE = 32768


def _scaled(tensors: list[Tensor], factor: Tensor) -> Sequence[Tensor]:
    """The tensors times a scalar, on this thread alone."""
    if not factor.is_cpu or all(tensor.numel() < _LARGE for tensor in tensors):
        return torch._foreach_mul(tensors, factor)
    number = factor.detach().numpy()
    return [torch.from_numpy(np.multiply(tensor.numpy(), number)) for tensor in tensors]


class _MetaGradient(torch.autograd.Function):
    """The mean query loss as a function of parameters, lr, xs and xq."""

    @staticmethod
    def forward(ctx: Any, computed: tuple[_Lease, Tensor, str], *inputs: Tensor) -> Tensor:
        """Keep the gradients that were computed with the loss."""
        ctx.lease, loss, ctx.why_once = computed
        ctx.inputs = inputs
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Scale the gradients by the incoming one, a scalar."""
        tensors = ctx.lease.gradients.tensors
        try:
            parts = _scaled(tensors, gradient)
        except RuntimeError:  # is_grads_batched=True: vmap has no rule for it
            parts = [tensor * gradient for tensor in tensors]
        # create_graph=True: somebody may differentiate these
        return None, *once(ctx.why_once, parts, (gradient, *ctx.inputs))


# Function.apply without its preparations for torch.func, which take as long as all the rest of it.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _MetaGradient).apply
_apply_prepared: Callable[..., Tensor] = _MetaGradient.apply


def _with_graph(lease: _Lease, loss: Tensor, inputs: Sequence[Tensor], why_once: str) -> Tensor:
    """The loss with its node; `why_once` says why the gradients have no derivative."""
    computed = lease, loss, why_once
    try:
        return _apply(computed, *inputs)
    except RuntimeError:  # under a transform of torch.func: have it say what it lacks
        return _apply_prepared(computed, *inputs)


def _native_lr(plan: Plan, lr: Tensor) -> Tensor:
    if lr.dtype is not plan.expected.dtype:
        lr = lr.to(plan.expected.dtype)
    if plan.lr_order is not None:
        lr = lr.index_select(-1, plan.lr_order)
    return dense(lr)


def chained(plan: Plan, parameters: list[Tensor]) -> list[Tensor]:
    """The parameters in the chain's order, contiguous."""
    if not plan.in_order:
        parameters = [parameters[i] for i in plan.chain]
    return parameters if plan.dense else [dense(p) for p in parameters]


def _ready(plan: Plan, s: TaskSet) -> TaskSet:
    """The set as the core reads it: contiguous; for a device also checked, with its sizes there."""
    s.x = dense(s.x)
    if s.y is not None:
        s.y = dense(s.y)
    if s.weights is not None:
        s.weights = dense(s.weights)
    device = plan.device
    if device is None:
        return s
    if native.checking_values and not device.capturing():
        check_values(s, plan.expected)
    else:
        check_sizes(s, plan.expected)
    if s.sizes is not None:
        parts = [s.sizes] if s.starts is None else [s.sizes, s.starts]
        sizes, *starts = device.upload(f"sizes of the tasks of {s.names.x}", torch.stack(parts))
        s.there = (starts[0] if starts else None), sizes
    return s


def _predicted(plan: Plan, query: TaskSet) -> tuple[int, ...]:
    """The shape of the predictions: [T, rows, out], or [sum of rows, out] of a packed set."""
    out = plan.expected.out_features
    assert out is not None
    return (query.x.shape[0], out) if query.starts is not None else (query.tasks, query.rows, out)


def prepared(
    plan: Plan,
    lr: Tensor,
    steps: int,
    first_order: bool,
    support: TaskSet,
    query: TaskSet,
    wanted: Wanted | None = None,
) -> tuple[Call, Tensor]:
    """A `Call`, and lr as it takes it; the sets are made ready for it.

    `wanted` left out means all that require grad, if grad is enabled.
    """
    lr, support, query = _native_lr(plan, lr), _ready(plan, support), _ready(plan, query)
    if wanted is None:
        requires = support.x.requires_grad, query.x.requires_grad
        wanted = (bool(plan.trainable), lr.requires_grad, *requires)
        if not torch.is_grad_enabled():
            wanted = (False, False, False, False)
    return Call(plan, lr, steps, first_order, support, query, wanted), lr


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _ids_there(plan: Plan, task_ids: Tensor | None) -> Tensor | None:
    """The tasks' ids where the core reads them."""
    if task_ids is None or plan.device is None:
        return task_ids
    return plan.device.upload("task_ids", task_ids)


def _lr_arguments(lr: Tensor) -> tuple[int, int, int]:
    return lr.data_ptr(), 1 if lr.ndim == 1 else lr.shape[0], lr.shape[-1]


def memory(
    plan: Plan,
    parameters: list[Tensor],
    tasks: int,
    schedule: Schedule,
    curves: bool,
    validated: bool,
) -> Adaptation:
    """Memory for what becomes of T tasks, on the parameters' device; the curves of it are NaN."""
    named = dict(zip(plan.names, parameters, strict=True))
    device = plan.expected.device
    history = None
    if curves and schedule.epochs is not None:
        ran, best = torch.zeros(2, tasks, dtype=torch.int64, device=device)
        history = History(
            train=plan.scalar.new_full((tasks, schedule.epochs), math.nan),
            validation=(
                plan.scalar.new_full((tasks, schedule.epochs + 1), math.nan) if validated else None
            ),
            best_epochs=best if validated else None,
            epochs=ran,
        )
    return reference.Adaptation(
        {n: named[n].new_empty(tasks, *named[n].shape) for n in plan.adapted},
        torch.zeros(tasks, dtype=torch.int8, device=device),
        history,
    )


def adapt(
    plan: Plan,
    parameters: list[Tensor],
    lr: Tensor,
    inner: InnerLoop,
    support: TaskSet,
    *,
    start: dict[str, Tensor] | None = None,
    validation: TaskSet | None = None,
    patience: int | None = None,
    curves: bool = False,
    task_ids: Tensor | None = None,
    out: Adaptation | None = None,
) -> Adaptation:
    """The native twin of `reference.adapt`.

    Args:
        plan: of the model.
        parameters: in the order of `plan.names`.
        lr: as `Learner._lr` gives it.
        inner: the schedule is taken from here; loss and optimiser are the plan's.
        support: T tasks.
        start: {name: [T, ...]} of parameters that each task has of its own.
        validation: T tasks; their best weights are kept.
        patience: epochs without a better validation loss after which a task stops.
        curves: whether to keep the losses of the epochs.
        task_ids: [T] int64.
        out: contiguous memory for the result; made where left out.
    """
    lr, s = _native_lr(plan, lr), _ready(plan, support)
    watched = None if validation is None else _ready(plan, validation)
    ids = _ids_there(plan, task_ids)
    start = {} if start is None else {n: dense(p) for n, p in start.items()}
    shared = chained(plan, parameters)
    names = [plan.names[i] for i in plan.chain]
    if out is None:
        validated = validation is not None
        out = memory(plan, parameters, s.tasks, inner.schedule, curves, validated)
    history = out.history

    if s.tasks > 0:
        schedule = inner.schedule
        shapes = s.tasks, s.rows, None if watched is None else watched.rows, lr.shape
        call = plan.core("adapt", shapes, schedule.for_native()[:3], *start)
        call(
            plan.dtype_code,
            [start.get(n, p).data_ptr() for n, p in zip(names, shared, strict=True)],
            [n in start for n in names],
            *_lr_arguments(lr),
            schedule.for_native(_address(ids)),
            s.tasks,
            native.rows(s),
            [_address(out.parameters.get(n) if n in plan.adapted else None) for n in names],
            validation=None if watched is None else native.rows(watched),
            patience=-1 if patience is None else patience,
            status=out.status.data_ptr(),
            train_curves=0 if history is None else _address(history.train),
            validation_curves=0 if history is None else _address(history.validation),
            best_epochs=0 if history is None else _address(history.best_epochs),
            epochs_run=0 if history is None else _address(history.epochs),
        )
    kept = {n: p for n, p in start.items() if n not in plan.adapted}
    return reference.Adaptation({**out.parameters, **kept}, out.status, history)


def reptile(
    plan: Plan,
    parameters: list[Tensor],
    lr: Tensor,
    inner: InnerLoop,
    support: TaskSet,
    task_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The native twin of `reference.reptile`: (loss [], task losses [T])."""
    lr, s = _native_lr(plan, lr), _ready(plan, support)
    ids = _ids_there(plan, task_ids)
    wanted = torch.is_grad_enabled() and bool(plan.trainable)
    layout = Layout.of(plan, (wanted, False, False, False), (lr, s.x, s.x))
    gradients = None if layout is None else layout.memory()
    loss = torch.empty_like(plan.scalar)
    losses = lr.new_empty(s.tasks)
    if s.tasks == 0:
        loss.zero_()
        if gradients is not None:
            gradients.flat.zero_()
    else:
        schedule = inner.schedule
        call = plan.core("reptile", s.tasks, s.rows, schedule.for_native()[:3], wanted)
        call(
            plan.dtype_code,
            [p.data_ptr() for p in chained(plan, parameters)],
            *_lr_arguments(lr),
            schedule.for_native(_address(ids)),
            s.tasks,
            native.rows(s),
            losses.data_ptr(),
            loss.data_ptr(),
            None if gradients is None else gradients.of_parameters,
        )
    if layout is not None and gradients is not None:
        inputs = layout.inputs(parameters, lr, s.x, s.x)
        loss = _with_graph(_Lease(gradients, layout.idle), loss, inputs, REPTILE)
    return loss, losses


def predict(
    plan: Plan, stacked: dict[str, Tensor], shared: dict[str, Tensor], query: TaskSet
) -> Tensor:
    """The native twin of `reference.predict`; [sum of rows, out] where the query is packed."""
    names = [plan.names[i] for i in plan.chain]
    q = _ready(plan, query)
    tensors = [dense(stacked[n] if n in stacked else shared[n]) for n in names]
    # the core leaves rows that only pad untouched
    make = q.x.new_zeros if q.padded else q.x.new_empty
    predictions = make(_predicted(plan, q))
    plan.core("predict", q.tasks, q.rows, *stacked)(
        plan.dtype_code,
        [t.data_ptr() for t in tensors],
        [n in stacked for n in names],
        q.tasks,
        native.rows(q),
        predictions.data_ptr(),
    )
    return predictions
