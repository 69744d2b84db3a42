"""Calls that are made again: whether one is of the same form as the one that was prepared.

The core needs a few microseconds for a small meta-batch, less than Python needs to check its
tensors. So what follows from a model, from settings and from shapes is computed once, and a
`Repeat` tells for the next call, in two native passes, whether all of that would come out the same:
the objects at the places that a `Watch` knows, and the form of all tensors. Where anything differs
it says no, and the checks decide. Values (labels, weights, sizes) are not its business: the core
checks them itself. On a device they go unchecked; with PYMETA_CHECK_VALUES=1 no call is repeated.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pymeta import native
from pymeta.backend.device import Device
from pymeta.spec.transforms import innermost_transform
from pymeta.spec.watch import Form, Watch


def as_it_came(given: Any, used: Tensor | None) -> bool:
    """Whether the core can read the tensor `given`, as it did when that had become `used`."""
    if type(given) is not Tensor or not given.is_contiguous() or used is None or given.is_neg():
        return False
    if given._is_zerotensor():
        return False
    if used is given:
        return True
    # a view in another shape, as where the model begins with Flatten
    return used.data_ptr() == given.data_ptr() and not given.requires_grad


def _shapes(data: Sequence[Tensor]) -> tuple[torch.Size, ...]:
    return tuple(v.shape for v in data)


class Repeat:
    """What a call was made of, besides values."""

    __slots__ = ("_alike", "_device", "_form", "_is_there", "_shapes", "_stream", "_tensors")

    def __init__(self, watch: Watch, data: Sequence[Tensor], device: Device | None) -> None:
        """Note it.

        Args:
            watch: of the model, and of learned values.
            data: the call's tensors.
            device: what it ran on; None for the CPU's own executors.
        """
        self._device = device
        self._stream = None if device is None else device.stream()
        self._is_there = watch.is_there
        self._tensors = tuple(watch.tensors)
        self._form = Form([*self._tensors, *data], device is not None)
        self._alike = self._form.alike
        self._shapes = _shapes(data)

    def holds(self, *data: Any) -> bool:
        """Whether a call with these arguments would be like it."""
        if (
            self._is_there()
            and forward_ad._current_level < 0
            and innermost_transform() is None
            and (self._device is None or self._may_be_made_there(self._device))
        ):
            return self._alike(*self._tensors, *data) or self._fits(data)
        return False

    def _fits(self, data: Sequence[Any]) -> bool:
        if not all(type(v) is Tensor for v in data) or _shapes(data) != self._shapes:
            return False
        try:
            if not self._form.fits([*self._tensors, *data]):
                return False
            for tensor in data:
                tensor.data_ptr()
        except RuntimeError:  # a layout without strides or without a pointer
            return False
        return True

    def _may_be_made_there(self, device: Device) -> bool:
        """Whether values go unchecked, and what is kept is of this stream and no CUDA graph."""
        return not (native.checking_values or device.stream() != self._stream or device.capturing())


class Prepared(Protocol):
    """What `Repeats` asks of a prepared call."""

    def holds(self, *data: Any) -> bool:
        """Whether a call with these arguments would be like it."""


_KEPT = 8  # prepared calls of a kind, of as many shapes


class Repeats:
    """Prepared calls: the latest of each kind, and some of other shapes."""

    __slots__ = ("_latest", "_others")

    def __init__(self) -> None:
        self._latest: dict[Hashable, Any] = {}
        self._others: dict[Hashable, dict[Hashable, Any]] = {}

    def clear(self) -> None:
        """Drop all."""
        self._latest, self._others = {}, {}

    def keep(self, kind: Hashable, data: Sequence[Any], call: Prepared) -> None:
        """Keep a call of these tensors, the latest of its kind."""
        self._latest[kind] = call
        of_kind = self._others.get(kind, {})
        if len(of_kind) >= _KEPT:
            of_kind = {}
        self._others[kind] = {**of_kind, _shapes(data): call}

    def of_shape(self, kind: Hashable, data: Sequence[Any]) -> Any:
        """The call of tensors of these shapes, if there is one."""
        if not all(type(v) is Tensor for v in data):
            return None
        return self._others.get(kind, {}).get(_shapes(data))

    def find(self, kind: Hashable, data: tuple[Any, ...]) -> Any:
        """The call to make again for these arguments; None where there is none."""
        latest = self._latest.get(kind)
        if latest is None or latest.holds(*data):
            return latest
        call = self.of_shape(kind, data)
        if call is None or call is latest or not call.holds(*data):
            return None
        self._latest[kind] = call
        return call
