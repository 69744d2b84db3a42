"""Gradients that cannot be differentiated again, and say so.

A gradient that was computed outside of autograd is a constant to it, so that differentiating it
once more would leave out terms, silently. `once` ties such gradients to everything they depend on
by a node whose backward raises. Whichever of these is differentiated by, and however autograd is
asked, the node is on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

NATIVE = (
    'the native meta-gradient cannot be differentiated again; pymeta.MAML(..., backend="torch") can'
)
REPTILE = "Reptile's direction cannot be differentiated: it is not the derivative of a loss"


class _Once(torch.autograd.Function):
    """The identity on the first `count` tensors, as a function of all; its derivative raises."""

    @staticmethod
    def forward(ctx: Any, why: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Pass the gradients through."""
        ctx.why = why
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        """Refuse."""
        raise RuntimeError(ctx.why)


_apply = cast(Callable[..., tuple[Tensor, ...]], _Once.apply)


def once(why: str, gradients: Sequence[Tensor], origins: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients; where grad is enabled, differentiating them again raises RuntimeError(why).

    Args:
        why: the error's message.
        gradients: any tensors, taken as constants.
        origins: what they depend on; nothing else may be differentiated by.
    """
    if not torch.is_grad_enabled():
        return gradients
    return _apply(why, len(gradients), *(g.detach() for g in gradients), *origins)
