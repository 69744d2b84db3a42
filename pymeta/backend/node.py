"""The autograd node over a native call.

The gradient of the loss is computed with it, so its backward only multiplies by the incoming
scalar. Whatever else flows in (into the tasks' losses, the predictions, the adapted parameters)
costs one more native call, which makes the inner steps anew: nothing of them is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pymeta.backend.gradients import Gradients
from pymeta.spec.once import once


class Leased:
    """What a graph holds of its gradients' memory, which goes back when the graph is gone."""

    __slots__ = ("gradients", "idle")
    gradients: Gradients | None  # None where there are none yet
    idle: deque[Gradients]

    def __del__(self) -> None:
        """Let the memory be used again."""
        gradients = self.gradients
        if gradients is not None and gradients.stream is not None:
            self.idle.append(gradients)


class Differentiable(Protocol):
    """What the node asks of a native call that was made."""

    why_once: str

    @property
    def inputs(self) -> Sequence[Tensor]:
        """Those whose gradients are wanted."""

    def backward(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor] | None:
        """The gradients of the inputs, from those of the outputs; None where these all are."""


class OfLoss(Leased):
    """A loss whose gradients are known."""

    __slots__ = ("inputs", "why_once")

    def __init__(
        self,
        gradients: Gradients,
        idle: deque[Gradients],
        inputs: Sequence[Tensor],
        why_once: str,
    ) -> None:
        """`why_once` says why they have no derivative."""
        self.gradients, self.idle = gradients, idle
        self.inputs, self.why_once = inputs, why_once

    def backward(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor] | None:
        """The known gradients, scaled."""
        (gradient,) = gradients
        assert self.gradients is not None
        return None if gradient is None else self.gradients.times(gradient)


class _Node(torch.autograd.Function):
    """The outputs of a native call as a function of its inputs."""

    @staticmethod
    def forward(
        ctx: Any, call: Differentiable, outputs: tuple[Tensor, ...], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Keep the call."""
        ctx.call = call
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """The gradients of the inputs."""
        call = ctx.call
        parts = call.backward(gradients)
        if parts is None:
            return (None,) * (2 + len(call.inputs))
        if not torch.is_grad_enabled():
            return None, None, *parts
        # create_graph=True: somebody may differentiate these
        given = [g for g in gradients if g is not None]
        return None, None, *once(call.why_once, parts, (*given, *call.inputs))


# The engine calls this; torch's own looks for other ways to define a backward each time.
_Node._backward_cls.apply = _Node.backward  # type: ignore[attr-defined]
# Function.apply without its preparations for torch.func, which take as long as all the rest of it.
_apply: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Node).apply
_apply_prepared: Callable[..., tuple[Tensor, ...]] = _Node.apply


def with_graph(call: Differentiable, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs with the call's node."""
    try:
        return _apply(call, outputs, *call.inputs)
    except RuntimeError:  # under a transform of torch.func: have it say what it lacks
        return _apply_prepared(call, outputs, *call.inputs)
