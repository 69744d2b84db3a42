"""The autograd node over a native call.

The gradient of the loss is computed with it, so its backward only multiplies by the incoming
scalar. Whatever else flows in (into the tasks' losses, the predictions, the adapted parameters)
costs one more native call, which makes the inner steps anew: nothing of them is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pymeta.backend.gradients import Lease
from pymeta.spec.once import once


class Differentiable(Protocol):
    """What the node asks of a native call that was made."""

    why_once: str

    def backward(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """The gradients of the inputs, from those of the outputs; not all are None."""


class OfLoss:
    """A loss whose gradients are known."""

    def __init__(self, lease: Lease, why_once: str) -> None:
        """`why_once` says why they have no derivative."""
        self.lease, self.why_once = lease, why_once

    def backward(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """The known gradients, scaled."""
        (gradient,) = gradients
        assert gradient is not None
        return self.lease.gradients.times(gradient)


class _Node(torch.autograd.Function):
    """The outputs of a native call as a function of its inputs."""

    @staticmethod
    def forward(
        ctx: Any, call: Differentiable, outputs: tuple[Tensor, ...], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Keep the call."""
        ctx.call, ctx.inputs = call, inputs
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """The gradients of the inputs."""
        given = [g for g in gradients if g is not None]
        if not given:
            return (None,) * (2 + len(ctx.inputs))
        parts = ctx.call.backward(gradients)
        if not torch.is_grad_enabled():
            return None, None, *parts
        # create_graph=True: somebody may differentiate these
        return None, None, *once(ctx.call.why_once, parts, (*given, *ctx.inputs))


# Function.apply without its preparations for torch.func, which take as long as all the rest of it.
_apply: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Node).apply
_apply_prepared: Callable[..., tuple[Tensor, ...]] = _Node.apply


def with_graph(
    call: Differentiable, outputs: tuple[Tensor, ...], inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The outputs with the call's node."""
    try:
        return _apply(call, outputs, *inputs)
    except RuntimeError:  # under a transform of torch.func: have it say what it lacks
        return _apply_prepared(call, outputs, *inputs)
