"""The native core called with torch tensors: allocation, pointers, and one autograd node.

The whole meta-gradient is computed in the forward of `_MetaGradient`, into one flat buffer (the
gradients of the parameters, of lr, of xs and of xq, one behind the other); its backward is one
product with the incoming scalar, cut into views. Where nothing requires grad there is neither a
node nor a buffer, and the core does not run its reverse sweep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pymeta import native
from pymeta.plan import Plan, View, views_of
from pymeta.tasks import TaskSet, dense


class Call:
    """One call of the native core: its tensors (kept alive here) and its arguments.

    `inputs` are the tensors whose gradients are wanted, in the order of the flat buffer:
    parameters, then what `extras` wants of lr, xs and xq.
    """

    __slots__ = (
        "extras", "first_order", "inputs", "losses", "lr", "parameters", "parameters_too", "plan",
        "predictions", "query", "steps", "support",
    )  # fmt: skip

    def __init__(
        self,
        plan: Plan,
        parameters: list[Tensor],
        lr: Tensor,
        steps: int,
        first_order: bool,
        support: TaskSet,
        query: TaskSet,
    ) -> None:
        """Make everything contiguous; lr is [columns] or [rows, columns]."""
        self.plan = plan
        self.steps = steps
        self.first_order = first_order
        self.lr = _native_lr(plan, lr)
        self.parameters = _chained(plan, parameters)
        self.support = _contiguous(support)
        self.query = _contiguous(query)
        self.losses = torch.empty(support.tasks, dtype=plan.expected.dtype)
        self.predictions = _predictions(plan, query)

    def want(
        self, parameters: list[Tensor], parameters_too: bool, extras: tuple[bool, bool, bool]
    ) -> bool:
        """Note whose gradients are wanted (extras: of lr, xs, xq); whether any are."""
        plan = self.plan
        inputs: list[Tensor] = []
        if parameters_too:
            inputs = parameters
            if len(plan.trainable) != len(parameters):
                inputs = [p for p, trains in zip(parameters, plan.trains, strict=True) if trains]
        self.parameters_too = parameters_too
        self.extras = extras
        if True in extras:
            others = (self.lr, self.support.x, self.query.x)
            inputs = inputs + [t for t, w in zip(others, extras, strict=True) if w]
        self.inputs = inputs
        return bool(inputs)

    @property
    def parameter_total(self) -> int:
        """How many elements of the flat buffer belong to parameters."""
        return self.plan.total if self.parameters_too else 0

    def buffer(self) -> Tensor:
        """An empty flat gradient buffer for what is wanted."""
        total, padded = self.parameter_total, False
        if True in self.extras:
            others = (self.lr, self.support.x, self.query.x)
            total += sum(t.numel() for t, w in zip(others, self.extras, strict=True) if w)
            # Rows that only pad belong to no task; the core leaves their gradients untouched.
            padded = self.support.padded or self.query.padded
        make = torch.zeros if padded else torch.empty
        return make(total, dtype=self.plan.expected.dtype)

    def views(self) -> list[View]:
        """How the flat buffer is cut into the gradients of `inputs`."""
        if self.parameters_too and True not in self.extras:
            return self.plan.views
        return views_of(t.shape for t in self.inputs)

    def run(self, flat: Tensor | None) -> Tensor:
        """Call the core; gradients go to `flat`. Returns the mean loss over tasks."""
        plan, lr, support = self.plan, self.lr, self.support
        if support.tasks == 0:
            if flat is not None:
                flat.zero_()
            return torch.zeros((), dtype=plan.expected.dtype)
        gradients: list[int] | None = None
        extras = (0, 0, 0)
        if flat is not None:
            base = flat.data_ptr()
            offsets = plan.offsets if self.parameters_too else plan.no_offsets
            gradients = [base + offset if offset >= 0 else 0 for offset in offsets]
            if True in self.extras:
                extras = self._extra_pointers(base)
        plan.problem.meta_gradient(
            plan.dtype_code,
            [p.data_ptr() for p in self.parameters],
            lr.data_ptr(),
            1 if lr.ndim == 1 else lr.shape[0],
            lr.shape[-1],
            self.steps,
            self.first_order,
            support.tasks,
            native.rows(support),
            native.rows(self.query),
            self.losses.data_ptr(),
            self.predictions.data_ptr(),
            gradients,
            *extras,
        )
        # of one task the sum is the mean, in half the time
        return self.losses.sum() if support.tasks == 1 else self.losses.mean()

    def _extra_pointers(self, base: int) -> tuple[int, int, int]:
        """Where the gradients of lr, xs and xq begin in the flat buffer; 0 for those unwanted."""
        itemsize = self.plan.itemsize
        end = base + self.parameter_total * itemsize
        pointers = []
        for tensor, wanted in zip(
            (self.lr, self.support.x, self.query.x), self.extras, strict=True
        ):
            pointers.append(end if wanted else 0)
            end += tensor.numel() * itemsize if wanted else 0
        return pointers[0], pointers[1], pointers[2]


class _MetaGradient(torch.autograd.Function):
    """The mean query loss as a function of parameters, lr, xs and xq."""

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor) -> Tensor:
        """Compute the loss and, already here, its gradients."""
        ctx.flat = flat = call.buffer()
        ctx.views = call.views()
        return call.run(flat)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Scale the gradients by the incoming one (a scalar), and cut them apart."""
        flat = ctx.flat * gradient
        parts = [flat.as_strided(*view) for view in ctx.views]
        if torch.is_grad_enabled():  # create_graph=True: somebody may differentiate these
            parts = [_Once.apply(part.detach().requires_grad_()) for part in parts]
        return None, *parts


class _Once(torch.autograd.Function):
    """The identity, whose derivative is an error: a constant would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        """Pass the gradient through."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        """Refuse."""
        raise RuntimeError(
            "the native meta-gradient cannot be differentiated again; "
            'pymeta.MAML(..., backend="torch") can'
        )


def _native_lr(plan: Plan, lr: Tensor) -> Tensor:
    if lr.dtype is not plan.expected.dtype:
        lr = lr.to(plan.expected.dtype)
    if plan.lr_order is not None:
        lr = lr[..., plan.lr_order]
    return lr if lr.is_contiguous() else lr.contiguous()


def _chained(plan: Plan, parameters: list[Tensor]) -> list[Tensor]:
    """The parameters in the chain's order, contiguous."""
    if not plan.in_order:
        parameters = [parameters[i] for i in plan.chain]
    return parameters if plan.dense else [dense(p) for p in parameters]


def _contiguous(s: TaskSet) -> TaskSet:
    s.x = dense(s.x)
    if s.y is not None:
        s.y = dense(s.y)
    if s.weights is not None:
        s.weights = dense(s.weights)
    return s


def _predictions(plan: Plan, query: TaskSet) -> Tensor:
    out = plan.expected.out_features
    assert out is not None
    dtype = plan.expected.dtype
    if query.starts is not None:
        return torch.empty(query.x.shape[0], out, dtype=dtype)
    # the core leaves rows that only pad untouched
    make = torch.zeros if query.padded else torch.empty
    return make(query.tasks, query.rows, out, dtype=dtype)


def meta_loss(
    plan: Plan,
    parameters: list[Tensor],
    lr: Tensor,
    steps: int,
    first_order: bool,
    support: TaskSet,
    query: TaskSet,
) -> tuple[Tensor, Tensor, Tensor]:
    """The native twin of `reference.meta_loss`.

    Returns:
        The loss [] (with a graph where something requires grad), task losses [T], and
        predictions: [T, rows, out], or [sum of rows, out] where the query set is packed.
    """
    call = Call(plan, parameters, lr, steps, first_order, support, query)
    graph = torch.is_grad_enabled() and call.want(
        parameters,
        True,
        (call.lr.requires_grad, call.support.x.requires_grad, call.query.x.requires_grad),
    )
    plan.last = (support.tasks, support.rows, query.rows, steps, graph and not first_order)
    loss = _MetaGradient.apply(call, *call.inputs) if graph else call.run(None)
    return loss, call.losses, call.predictions


def adapt(
    plan: Plan, parameters: list[Tensor], lr: Tensor, steps: int, support: TaskSet
) -> dict[str, Tensor]:
    """The native twin of `reference.adapt`: {name: [T, ...]} for the adapted names."""
    lr = _native_lr(plan, lr)
    chained = _chained(plan, parameters)
    s = _contiguous(support)
    dtype = plan.expected.dtype
    stacked = {
        name: torch.empty((s.tasks, *parameters[plan.names.index(name)].shape), dtype=dtype)
        for name in plan.adapted
    }
    targets = [stacked.get(plan.names[i]) for i in plan.chain]
    plan.problem.adapt(
        plan.dtype_code,
        [p.data_ptr() for p in chained],
        lr.data_ptr(),
        1 if lr.ndim == 1 else lr.shape[0],
        lr.shape[-1],
        steps,
        s.tasks,
        native.rows(s),
        [0 if t is None else t.data_ptr() for t in targets],
    )
    return stacked


def predict(
    plan: Plan, stacked: dict[str, Tensor], shared: dict[str, Tensor], query: TaskSet
) -> Tensor:
    """The native twin of `reference.predict`; [sum of rows, out] where the query is packed."""
    names = [plan.names[i] for i in plan.chain]
    q = _contiguous(query)
    tensors = [dense(stacked[n] if n in stacked else shared[n]) for n in names]
    predictions = _predictions(plan, q)
    plan.problem.predict(
        plan.dtype_code,
        [t.data_ptr() for t in tensors],
        [n in stacked for n in names],
        q.tasks,
        native.rows(q),
        predictions.data_ptr(),
    )
    return predictions
