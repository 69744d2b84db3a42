"""Tensors as the native core reads them: dense, in the chain's order, on the device of the call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pymeta import native
from pymeta.backend.plan import Plan
from pymeta.tasks.task_set import TaskSet, dense
from pymeta.tasks.values import check_sizes, check_values


def in_forward_mode() -> bool:
    """Whether a level of torch.autograd.forward_ad is open."""
    return forward_ad._current_level >= 0


def has_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward-mode derivatives are to go through any of the tensors."""
    unpack: Callable[..., Any] = forward_ad.unpack_dual
    return any(t is not None and unpack(t).tangent is not None for t in tensors)


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def native_rates(lr: Tensor, per_task: bool = False) -> Any:
    """The native `Rates` of [columns], [rows, columns] or each task's [T, rows, columns]."""
    rows = 1 if lr.ndim == 1 else lr.shape[-2]
    return native.extension().Rates(lr.data_ptr(), rows, lr.shape[-1], per_task)


def native_lr(plan: Plan, lr: Tensor) -> Tensor:
    """The step sizes in the parameters' dtype and the chain's order."""
    if lr.dtype is not plan.expected.dtype:
        lr = lr.to(plan.expected.dtype)
    if plan.lr_order is not None:
        lr = lr.index_select(-1, plan.lr_order)
    return dense(lr)


def chained(plan: Plan, parameters: list[Tensor]) -> list[Tensor]:
    """The parameters in the chain's order, contiguous."""
    if not plan.in_order:
        parameters = [parameters[i] for i in plan.chain]
    return parameters if plan.dense else [dense(p) for p in parameters]


def ready(plan: Plan, s: TaskSet) -> TaskSet:
    """The set as the core reads it: contiguous; for a device also checked, with its sizes there."""
    s.x = dense(s.x)
    if s.y is not None:
        s.y = dense(s.y)
    if s.weights is not None:
        s.weights = dense(s.weights)
    if s.offset is not None:
        s.offset = dense(s.offset)
    device = plan.device
    if device is None:
        return s
    if native.checking_values and not device.capturing():
        check_values(s, plan.expected)
    else:
        check_sizes(s, plan.expected, waits=not device.capturing())
    if s.sizes is not None:
        parts = [s.sizes] if s.starts is None else [s.sizes, s.starts]
        sizes, *starts = device.upload(f"sizes of the tasks of {s.names.x}", torch.stack(parts))
        s.there = (starts[0] if starts else None), sizes
    return s


def predicted_shape(plan: Plan, query: TaskSet) -> tuple[int, ...]:
    """The shape of the predictions: [T, rows, out], or [sum of rows, out] of a packed set."""
    out = plan.expected.out_features
    assert out is not None
    return (query.x.shape[0], out) if query.starts is not None else (query.tasks, query.rows, out)
