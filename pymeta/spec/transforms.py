"""Transforms of torch.func (grad, vmap, hessian, ...), in which tensors have no data to point at.

That is so of the tensors that are transformed and of all that are made meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

from torch._C import _functorch

LACKS = (
    "a transform of torch.func (grad, vmap, ...) is at work, which the native core lacks; "
    "out.loss.backward() gives its gradients"
)

innermost_transform: Callable[[], object | None] = _functorch.peek_interpreter_stack


def in_transform() -> bool:
    """Whether a transform of torch.func is at work."""
    return innermost_transform() is not None
