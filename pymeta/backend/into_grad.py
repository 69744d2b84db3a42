"""Gradients into the `.grad` of leaves: what autograd does last, of all tensors in one native pass.

The core adds where nobody could tell that it was not torch: small ordinary tensors on the CPU, as a
backward leaves them. All other cases are torch's. Sums are the same to the last bit in either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pymeta import native
from pymeta.backend.gradients import Gradients
from pymeta.spec.watch import exactly_like

_grad, _requires_grad = attrgetter("grad"), attrgetter("requires_grad")
_pointer, _new_like = Tensor.data_ptr, torch.empty_like


def _counter() -> Callable[[Sequence[Tensor]], None]:
    """What tells autograd that tensors were changed in place."""
    try:
        increment_version([])
    except (TypeError, RuntimeError):  # this torch takes one at a time
        return _count_one_by_one
    return increment_version


def _count_one_by_one(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        increment_version(tensor)


_count_changes = _counter()


class IntoGrad:
    """What adds gradients of one layout to the `.grad` of leaves."""

    __slots__ = ("_alike", "_one", "_split")

    def __init__(self, gradients: Gradients, one: Tensor) -> None:
        """Make it for gradients like these; `one` is [], the number."""
        self._one = one
        self._split: Any = None
        self._alike: Callable[..., bool] | None = None
        if one.is_cpu and gradients.small:
            sizes = [tensor.numel() for tensor in gradients.tensors]
            self._split = native.extension().Split(one.itemsize, sizes)
            self._alike = exactly_like(gradients.tensors)

    def __call__(self, leaves: Sequence[Tensor], gradients: Gradients) -> None:
        """Add them: one for each of the leaves, in their order."""
        if self._alike is not None:
            added = self._split.add_to_grads(leaves, self._alike, gradients.address)
            if added is not None:
                _count_changes(added)
                return
        grads = [*map(_grad, leaves)]
        there = [grad for grad in grads if grad is not None]
        if any(map(_requires_grad, there)):
            with torch.no_grad():  # whose sums, as autograd's, have no graph
                self._by_torch(leaves, grads, there, gradients)
        else:
            self._by_torch(leaves, grads, there, gradients)

    def _by_torch(
        self,
        leaves: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        there: list[Tensor],
        gradients: Gradients,
    ) -> None:
        if len(there) == len(grads):
            torch._foreach_add_(there, gradients.tensors)
            return
        copies = self._copies(gradients) if not there else gradients.times(self._one)
        for leaf, grad, own in zip(leaves, grads, copies, strict=True):
            if grad is None:
                leaf.grad = own
            else:
                grad.add_(own)

    def _copies(self, gradients: Gradients) -> Sequence[Tensor]:
        if self._split is None:
            return gradients.times(self._one)
        copies = [*map(_new_like, gradients.tensors)]
        self._split.copy_to([*map(_pointer, copies)], gradients.address)
        return copies
