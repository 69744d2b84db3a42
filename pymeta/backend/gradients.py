"""The memory of gradients that the core computes with the loss, and the autograd node over it.

The core writes the whole meta-gradient into one flat buffer: the gradients of the parameters, of
lr, of xs and of xq, one after another. The backward of the node only multiplies them by the
incoming scalar.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pymeta import native
from pymeta.backend.plan import Plan
from pymeta.spec.once import once

Wanted: TypeAlias = tuple[bool, bool, bool, bool]


class Gradients:
    """Memory for the wanted gradients: flat, as tensors of their shapes, and as the core takes it.

    It may be used again on the `stream` it was made on, which is 0 on the CPU; where that is None,
    it may not.
    """

    __slots__ = ("flat", "native", "stream", "tensors")

    def __init__(self, layout: Layout, stream: int | None = 0) -> None:
        """Allocate it, without values."""
        self.stream = stream
        with torch.inference_mode(False):  # it may outlive that
            flat = layout.scalar.new_empty(layout.total)
        base = flat.data_ptr()
        self.flat = flat
        parts = flat.split_with_sizes([math.prod(shape) for shape in layout.shapes])
        self.tensors = [part.view(shape) for part, shape in zip(parts, layout.shapes, strict=True)]
        parameters, extras = (
            [base + at if at >= 0 else 0 for at in offsets]
            for offsets in (layout.offsets, layout.extra_offsets)
        )
        self.native = native.extension().Gradients(parameters, *extras)


class Layout:
    """The layout of the wanted gradients in one flat buffer, and the buffers that are free.

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


class Lease:
    """What a graph holds of its gradients' memory, which goes back when the graph is gone."""

    __slots__ = ("gradients", "idle")

    def __init__(self, gradients: Gradients, idle: deque[Gradients]) -> None:
        self.gradients = gradients
        self.idle = idle

    def __del__(self) -> None:
        if self.gradients.stream is not None:
            self.idle.append(self.gradients)


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
    def forward(ctx: Any, computed: tuple[Lease, Tensor, str], *inputs: Tensor) -> Tensor:
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


def with_graph(lease: Lease, loss: Tensor, inputs: Sequence[Tensor], why_once: str) -> Tensor:
    """The loss with its node; `why_once` says why the gradients have no derivative."""
    computed = lease, loss, why_once
    try:
        return _apply(computed, *inputs)
    except RuntimeError:  # under a transform of torch.func: have it say what it lacks
        return _apply_prepared(computed, *inputs)
