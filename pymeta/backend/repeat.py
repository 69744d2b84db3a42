"""The short way through a call like the one before: what was checked then is compared at once.

Everything that the checks of a call ask of its tensors and of the model, other than values, shows
in a few attributes. A `Repeat` holds those of a native call that passed the checks. Where all are
the same it makes the call again; where any differs it does nothing, and the checks have to say what
to make of it. Values (labels, weights, sizes) are not its business: the core checks them itself,
or, on a device, nobody does (where somebody is to, there are no repeats).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pymeta import native
from pymeta.backend.device import Device
from pymeta.backend.fused import Call, Results
from pymeta.tasks.task_set import TaskSet


def _settings(owner: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a call depends on besides its arguments and the model, from a MAML's attributes."""
    emulating = native.emulating
    return owner["steps"], owner["first_order"], owner["backend"], owner.get("lr"), emulating


def _forms(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """All about some tensors but their values; of their devices, whether it is the CPU."""
    return [
        (t.shape, t.dtype, t.is_cpu, t.requires_grad, t.is_contiguous(), t.is_neg())
        for t in tensors
    ]


def _forms_there(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """As `_forms`, with the devices themselves, which takes longer."""
    return [
        (t.shape, t.dtype, t.device, t.requires_grad, t.is_contiguous(), t.is_neg())
        for t in tensors
    ]


def _as_it_came(given: Any, used: Tensor | None) -> bool:
    """Whether the core can read the tensor `given`, as it did when that had become `used`."""
    if type(given) is not Tensor or not given.is_contiguous():
        return False
    if used is None or given.is_neg():
        return False
    if used is given:
        return True
    # a view in another shape, as where the model begins with Flatten
    return used.data_ptr() == given.data_ptr() and not given.requires_grad


class Repeat:
    """A native call, to be made again with tensors that differ in nothing but their values."""

    def __init__(
        self, call: Call, data: Sequence[Tensor], lr: Tensor, owner: Mapping[str, Any]
    ) -> None:
        """Remember a call.

        Args:
            call: the call.
            data: xs, ys, xq, yq as they were given.
            lr: the step size as the core took it.
            owner: the attributes of the MAML module.
        """
        self.call = call
        self.lr = lr
        self.learnable = owner["_parameters"].get("lr")
        self.settings = _settings(owner)
        self.is_current = call.plan.description.is_current
        self.fixed = list(call.plan.parameters)
        if self.learnable is not None:
            self.fixed.append(lr)
        self.device = call.plan.device
        self.stream = None if self.device is None else self.device.stream()
        self.forms_of = _forms if self.device is None else _forms_there
        self.forms = self.forms_of([*self.fixed, *data])
        self.rows = call.last[1:3]

    @classmethod
    def of(
        cls,
        call: Call,
        support: TaskSet,
        query: TaskSet,
        data: Sequence[Any],
        lr: Tensor,
        owner: Mapping[str, Any],
    ) -> Repeat | None:
        """One for a call that was made, if its tensors went to the core as they came.

        None in the capture of a CUDA graph, where all memory is the graph's.
        """
        device = call.plan.device
        if device is not None and device.capturing():
            return None
        used = (support.x, support.y, query.x, query.y)
        if not all(map(_as_it_came, data, used)) or call.plan.lr_order is not None:
            return None
        return cls(call, data, lr, owner)

    def _may_be_made_there(self, device: Device) -> bool:
        """Whether nobody is to check values, and `lr` is one of the stream and no graph's."""
        return not (native.checking_values or device.stream() != self.stream or device.capturing())

    def __call__(
        self, owner: Mapping[str, Any], xs: Any, ys: Any, xq: Any, yq: Any
    ) -> Results | None:
        """The results; None where the call would not be the same.

        Whether grad is enabled must be as it was.
        """
        if not (
            type(xs) is type(ys) is type(xq) is type(yq) is Tensor
            and _settings(owner) == self.settings
            and owner["_parameters"].get("lr") is self.learnable
            and self.is_current()
            and (self.device is None or self._may_be_made_there(self.device))
        ):
            return None
        try:
            if self.forms_of([*self.fixed, xs, ys, xq, yq]) != self.forms:
                return None
            support_rows, query_rows = self.rows
            support = (xs.data_ptr(), ys.data_ptr(), 0, support_rows, 0, 0)
            query = (xq.data_ptr(), yq.data_ptr(), 0, query_rows, 0, 0)
        except RuntimeError:  # a layout without strides or without a pointer
            return None
        return self.call(self.call.plan.parameters, self.lr, xs, xq, support, query)
