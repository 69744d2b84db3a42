"""A native MAML call, prepared once for all task sets of the same shapes, and quick to repeat.

The core needs a few microseconds for a small meta-batch, less than Python needs to check its
tensors. So what follows from shapes is computed once, in a `PreparedCall`. A call with tensors of
the same form as the one before skips the checks: `again` compares a few attributes instead, and
does nothing where one differs, so that the checks decide. Values (labels, weights, sizes) are not
compared: the core checks them itself. On a device they go unchecked; with PYMETA_CHECK_VALUES=1 no
call is repeated this way.

The same code serves CUDA tensors. What differs for them is in `device.py`; here it shows in
`Plan.core`, which calls the core there, in `inputs.ready`, and in which memory is reused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pymeta import native
from pymeta.backend.device import Device
from pymeta.backend.gradients import Gradients, Layout, Lease, Wanted, with_graph
from pymeta.backend.inputs import (
    address,
    chained,
    native_lr,
    native_rates,
    predicted_shape,
    ready,
)
from pymeta.backend.plan import Plan
from pymeta.spec.once import NATIVE
from pymeta.spec.transforms import in_transform
from pymeta.spec.watch import forms, forms_there
from pymeta.tasks.task_set import TaskSet

Addresses: TypeAlias = tuple[int, int, int, int]  # of xs, ys, xq, yq
Results: TypeAlias = tuple[Tensor, Tensor, Tensor]  # loss [], losses [T], predictions


def _settings(owner: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a call depends on besides its arguments and the model, from a MAML's attributes."""
    return owner["steps"], owner["first_order"], owner["backend"], owner.get("lr")


def addresses(support: TaskSet, query: TaskSet) -> Addresses:
    """Where the sets' inputs and targets lie."""
    return address(support.x), address(support.y), address(query.x), address(query.y)


def _as_it_came(given: Any, used: Tensor | None) -> bool:
    """Whether the core can read the tensor `given`, as it did when that had become `used`."""
    if type(given) is not Tensor or not given.is_contiguous() or used is None or given.is_neg():
        return False
    if given._is_zerotensor():
        return False
    if used is given:
        return True
    # a view in another shape, as where the model begins with Flatten
    return used.data_ptr() == given.data_ptr() and not given.requires_grad


class PreparedCall:
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
        anchors: Tensor | None = None,
    ) -> None:
        """Prepare it; lr is [columns] or [rows, columns], in the order that the core expects."""
        self.plan = plan
        self.tasks = support.tasks
        self.predicted = predicted_shape(plan, query)
        # The core leaves what only pads untouched: rows of predictions, of gradients of inputs.
        self.pads = query.padded
        self.pads_gradients = (wanted[2] or wanted[3]) and (support.padded or query.padded)
        self.layout = Layout.of(plan, wanted, (lr, support.x, query.x))
        second_order = self.layout is not None and not first_order
        lr_rows = 1 if lr.ndim == 1 else lr.shape[0]
        anchored = anchors is not None
        sizes = (support.tasks, support.rows, query.rows)
        self.last = (*sizes, steps, second_order, lr_rows, wanted, anchored)
        self.anchors = anchors  # kept, for the core reads them
        self.native = plan.call("meta")
        self.native.tasks = self.tasks
        self.native.start = [0] * len(plan.chain)  # they come with each call
        self.native.rates = native_rates(lr)
        self.native.schedule = native.extension().Schedule(steps=steps)
        self.native.first_order = first_order
        self.native.anchors = address(anchors)
        self.native.support, self.native.query = native.rows(support), native.rows(query)
        self.repeat = plan.runner(self.native.repeat, "meta", self.last, wanted, lr.shape)

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
        data: Addresses,
        gradients: Gradients | None,
    ) -> Results:
        """Call the core.

        Args:
            parameters: in the chain's order; they and all others contiguous.
            lr: [columns] or [rows, columns], as the call was prepared for.
            data: the addresses of xs, ys, xq and yq.
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
        self.repeat(
            [p.data_ptr() for p in parameters],
            lr.data_ptr(),
            *data,
            loss.data_ptr(),
            losses.data_ptr(),
            predictions.data_ptr(),
            None if gradients is None else gradients.native,
        )
        return loss, losses, predictions

    def __call__(
        self, parameters: list[Tensor], lr: Tensor, xs: Tensor, xq: Tensor, data: Addresses
    ) -> Results:
        """`run`, and where gradients are wanted an autograd node that holds them."""
        plan, layout = self.plan, self.layout
        plan.last = self.last
        gradients = self.memory()
        loss, losses, predictions = self.run(chained(plan, parameters), lr, data, gradients)
        if layout is not None and gradients is not None:
            inputs = layout.inputs(parameters, lr, xs, xq)
            loss = with_graph(Lease(gradients, layout.idle), loss, inputs, NATIVE)
        return loss, losses, predictions

    # ---- once more ----------------------------------------------------------------------------

    def remember(
        self,
        owner: Mapping[str, Any],
        data: Sequence[Any],
        support: TaskSet,
        query: TaskSet,
        lr: Tensor,
    ) -> bool:
        """Note what the call was made of, if it can be made again: if all went in as it came.

        It cannot in the capture of a CUDA graph, where all memory is the graph's.

        Args:
            owner: the attributes of the MAML module.
            data: xs, ys, xq, yq as they were given.
            support: what became of them.
            query: likewise.
            lr: the step size as the core took it.
        """
        device = self.plan.device
        if device is not None and device.capturing():
            return False
        used = (support.x, support.y, query.x, query.y)
        if not all(map(_as_it_came, data, used)) or self.plan.lr_order is not None:
            return False
        own = owner["_parameters"]
        places = [(own, name) for name in own]  # of lr, where it is learnable
        self._watch = self.plan.watch.and_also(places, [lr] if own else [], device is not None)
        self._is_there = self._watch.is_there
        self._settings = _settings(owner)  # not the owner, which holds this call
        self._lr, self._stream = lr, None if device is None else device.stream()
        self._forms_of = forms if device is None else forms_there
        self._forms = self._forms_of([*self._watch.tensors, *data])
        return True

    def _may_be_made_there(self, device: Device) -> bool:
        """Whether values go unchecked, and `lr` belongs to this stream and to no CUDA graph."""
        return not (native.checking_values or device.stream() != self._stream or device.capturing())

    def again(self, owner: Mapping[str, Any], xs: Any, ys: Any, xq: Any, yq: Any) -> Results | None:
        """The results, after `remember`; None where the call would not be the same.

        Whether grad is enabled must be as it was. `owner` is as for `remember`.
        """
        device = self.plan.device
        if not (
            type(xs) is type(ys) is type(xq) is type(yq) is Tensor
            and _settings(owner) == self._settings
            and self._is_there()
            and forward_ad._current_level < 0
            and not in_transform()
            and (device is None or self._may_be_made_there(device))
        ):
            return None
        try:
            if self._forms_of([*self._watch.tensors, xs, ys, xq, yq]) != self._forms:
                return None
            data = xs.data_ptr(), ys.data_ptr(), xq.data_ptr(), yq.data_ptr()
        except RuntimeError:  # a layout without strides or without a pointer
            return None
        return self(self.plan.parameters, self._lr, xs, xq, data)


def prepare(
    plan: Plan,
    lr: Tensor,
    steps: int,
    first_order: bool,
    support: TaskSet,
    query: TaskSet,
    wanted: Wanted | None = None,
    anchors: Tensor | None = None,
) -> tuple[PreparedCall, Tensor]:
    """The prepared call, and lr in the form it takes; the sets are brought into theirs.

    `wanted` left out means all that require grad, if grad is enabled.
    """
    lr, support, query = native_lr(plan, lr), ready(plan, support), ready(plan, query)
    if wanted is None:
        requires = support.x.requires_grad, query.x.requires_grad
        wanted = (bool(plan.trainable), lr.requires_grad, *requires)
        if not torch.is_grad_enabled():
            wanted = (False, False, False, False)
    call = PreparedCall(plan, lr, steps, first_order, support, query, wanted, anchors)
    return call, lr
