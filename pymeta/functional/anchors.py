"""The strength of each task's pull towards its start, as an argument of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pymeta import native
from pymeta.backend.plan import Plan
from pymeta.tasks.task_set import dense

Anchors: TypeAlias = Tensor | np.ndarray | Sequence[float] | None


def anchors_of(anchor: Any, tasks: int, plan: Plan) -> Tensor | None:
    """`anchor` as a dense tensor [T] of the parameters' dtype and device; None where it is None.

    Values are left to `check_values_of` and to the native core on the CPU. On a device they are
    not looked at, but with PYMETA_CHECK_VALUES=1.

    Raises:
        TypeError: it is no tensor, array or list of real numbers.
        ValueError: its shape is not [T].
    """
    if anchor is None:
        return None
    if isinstance(anchor, (np.ndarray, list, tuple)):
        values = np.asarray(anchor)
        if values.dtype.kind not in "fiu":
            raise TypeError(f"anchor: expected real numbers [T], got items of type {values.dtype}")
        anchor = torch.from_numpy(values.astype(np.float64))
    if not isinstance(anchor, Tensor):
        raise TypeError(
            f"anchor: expected a strength for each task, [T], got {type(anchor).__name__}; one "
            f"number for all tasks is an argument of the constructor"
        )
    if anchor.dtype == torch.bool or anchor.is_complex():
        raise TypeError(f"anchor: expected real numbers [T], got {anchor.dtype}")
    if anchor.shape != (tasks,):
        raise ValueError(f"anchor: expected shape [{tasks}], got {list(anchor.shape)}")
    anchors = dense(anchor.to(plan.expected.device, plan.expected.dtype))
    if plan.device is not None and native.checking_values and not plan.device.capturing():
        check_values_of(anchors)
    return anchors


def check_values_of(anchors: Tensor | None) -> None:
    """ValueError unless all are finite and >= 0; reads values, as the native core does itself."""
    if anchors is None:
        return
    wrong = ~((anchors >= 0) & anchors.isfinite())
    if bool(wrong.any()):
        task = int(wrong.nonzero()[0])
        raise ValueError(
            f"anchor: task {task}: expected a finite number >= 0, got {float(anchors[task]):.9g}"
        )
