"""The memory of gradients that the core computes, one flat buffer for all that are wanted.

They lie one after another: the gradients of the parameters (or of the tasks' own starts), of lr, of
the inputs, targets and weights of both sets, of the anchors, and of both offsets.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pymeta import native
from pymeta.backend.plan import Plan

# Of the parameters, then of the operands that `Extras` names.
Wanted: TypeAlias = tuple[bool, bool, bool, bool, bool, bool, bool, bool, bool, bool, bool]
NOTHING: Wanted = (False,) * 11

# From this size on torch spreads a product over its OpenMP threads, and their barrier takes
# milliseconds where the other cores are busy: many times the product.
_LARGE = 32768


_HOOKS = "_backward_hooks", "_post_accumulate_grad_hooks"


def has_hooks(tensors: Sequence[Tensor]) -> bool:
    """Whether something is to be called with the gradient of one of these leaves."""
    found: bool = native.extension().any_true(tensors, _HOOKS)
    return found


class Extras(NamedTuple):
    """What the native call reads besides the parameters."""

    lr: Tensor
    xs: Tensor
    xq: Tensor | None
    ys: Tensor | None
    yq: Tensor | None
    support_weights: Tensor | None
    query_weights: Tensor | None
    anchor: Tensor | None = None
    support_offset: Tensor | None = None
    query_offset: Tensor | None = None


class Gradients:
    """Memory for the wanted gradients: flat, as tensors of their shapes, and as the core takes it.

    It may be used again on the `stream` it was made on, which is 0 on the CPU; where that is None,
    it may not.
    """

    __slots__ = ("address", "flat", "native", "small", "stream", "tensors")

    def __init__(self, layout: Layout, stream: int | None = 0) -> None:
        """Allocate it, without values."""
        self.stream = stream
        with torch.inference_mode(False):  # it may outlive that
            flat = layout.scalar.new_empty(layout.total)
        self.flat, self.address = flat, flat.data_ptr()
        parts = flat.split_with_sizes([math.prod(shape) for shape in layout.shapes])
        self.tensors = [part.view(shape) for part, shape in zip(parts, layout.shapes, strict=True)]
        parameters, extras = (
            [self.address + at if at >= 0 else 0 for at in offsets]
            for offsets in (layout.offsets, layout.extra_offsets)
        )
        self.native = native.extension().Gradients(parameters, *extras)
        self.small = not flat.is_cpu or all(part.numel() < _LARGE for part in parts)

    def times(self, factor: Tensor) -> Sequence[Tensor]:
        """New tensors: the gradients times a scalar, on this thread alone."""
        try:
            if self.small:
                return torch._foreach_mul(self.tensors, factor)
            number = factor.detach().numpy()
            return [torch.from_numpy(np.multiply(t.numpy(), number)) for t in self.tensors]
        except RuntimeError:  # is_grads_batched=True: vmap has no rule for it
            return [tensor * factor for tensor in self.tensors]


class Layout:
    """The layout of the wanted gradients in one flat buffer, and the buffers that are free.

    Attributes:
        wanted: which are.
        trains: of which parameters.
        shapes: of the gradients, in the order of the buffer.
        offsets: where each parameter of the chain has its own, in bytes; -1 where it has none.
        extra_offsets: likewise for the `Extras`.
        parameter_total: how many elements belong to parameters, out of `total`.
        one: [], the number.
    """

    def __init__(
        self,
        plan: Plan,
        wanted: Wanted,
        parameters: Sequence[Tensor] | None,
        extras: Extras,
        trains: Sequence[bool] = (),
    ) -> None:
        """Lay out what is wanted; `parameters` and `trains` where these are not the plan's."""
        self.wanted = wanted
        self.scalar = plan.scalar
        self.device = plan.device
        if parameters is None:
            self.trains, shapes, total = plan.trains, list(plan.shapes), plan.total
            offsets = plan.offsets
        else:
            self.trains = list(trains)
            shapes, offsets, total = _laid_out(plan, parameters, self.trains)
        self.parameters_only = wanted == (True, *NOTHING[1:]) and all(self.trains)
        self.shapes = shapes if wanted[0] else []
        self.offsets = offsets if wanted[0] else [-1] * len(plan.chain)
        self.parameter_total = end = total if wanted[0] else 0
        self.extra_offsets: list[int] = []
        for tensor, is_wanted in zip(extras, wanted[1:], strict=True):
            written = is_wanted and tensor is not None and tensor.numel() > 0
            self.extra_offsets.append(end * plan.itemsize if written else -1)
            if is_wanted and tensor is not None:
                self.shapes.append(tuple(tensor.shape))
                end += tensor.numel()
        self.total = end
        with torch.inference_mode(False):  # it may outlive that
            self.one = self.scalar.new_ones(())
        # Two, because a training loop holds one step's graph until the next one's is made.
        self.idle: deque[Gradients] = deque(maxlen=2)

    @staticmethod
    def of(
        plan: Plan,
        wanted: Wanted,
        parameters: Sequence[Tensor] | None,
        extras: Extras,
        trains: Sequence[bool] = (),
    ) -> Layout | None:
        """The plan's layout for what is wanted; None where nothing is.

        `parameters`, and which of them are trained, where these are not the plan's own.
        """
        if True not in wanted:
            return None
        key: tuple[Any, ...] = wanted
        if True in wanted[1:]:
            shapes = (
                t.shape for t, w in zip(extras, wanted[1:], strict=True) if w and t is not None
            )
            key = wanted, *shapes
        if parameters is not None:
            key = key, *((p.shape, t) for p, t in zip(parameters, trains, strict=True))
        layout: Layout | None = plan.layouts.get(key)
        if layout is None:
            if len(plan.layouts) >= _LAYOUTS_KEPT:
                plan.layouts.clear()
            layout = plan.layouts[key] = Layout(plan, wanted, parameters, extras, trains)
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

    def inputs(self, parameters: list[Tensor], extras: Extras) -> list[Tensor]:
        """The tensors whose gradients are wanted, in the order of the buffer."""
        if self.parameters_only:
            return parameters
        inputs: list[Tensor] = []
        if self.wanted[0]:
            inputs = [p for p, t in zip(parameters, self.trains, strict=True) if t]
        wanted = zip(extras, self.wanted[1:], strict=True)
        return inputs + [tensor for tensor, is_wanted in wanted if is_wanted and tensor is not None]


def _laid_out(
    plan: Plan, parameters: Sequence[Tensor], trains: Sequence[bool]
) -> tuple[list[tuple[int, ...]], list[int], int]:
    """Shapes in order, byte offsets in the chain's order, and elements of what trains."""
    shapes, offsets, end = [], [], 0
    for tensor, is_trained in zip(parameters, trains, strict=True):
        offsets.append(end * plan.itemsize if is_trained else -1)
        if is_trained:
            shapes.append(tuple(tensor.shape))
            end += tensor.numel()
    return shapes, [offsets[i] for i in plan.chain], end


_LAYOUTS_KEPT = 8  # those that depend on the shapes of xs and xq may be many
