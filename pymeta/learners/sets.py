"""The sets of a call for learners that look at rows themselves, before MAML or without it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pymeta.learners.rows import Flat
from pymeta.tasks.checks import Expected
from pymeta.tasks.task_set import TaskSet, task_set
from pymeta.tasks.values import check_values


def row_set(
    names: Any, x: Any, y: Any, sizes: Any, weights: Any, offset: Any, expected: Expected
) -> TaskSet:
    """One side of all tasks, checked, with weights of rows alone.

    Raises:
        TypeError, ValueError: as `task_set` and `check_values`; there are weights of single
            targets; the inputs are not of the expected dtype.
    """
    found = task_set(names, x, y, sizes, weights, expected, offset)
    if found.weight_columns > 1 or (found.weights is not None and found.weights.ndim > found.lead):
        raise ValueError(f"{names.weights}: expected a weight for each row, not for each target")
    check_values(found, expected)
    if found.x.dtype != expected.dtype:
        raise TypeError(
            f"{names.x}: expected {expected.dtype} as the learner's parameters have, got "
            f"{found.x.dtype}"
        )
    return found


def targets_as_columns(rows: Flat, classes: int | None, like: Tensor) -> Tensor:
    """The targets of rows as numbers [N, columns]; labels as indicators of `classes` classes."""
    y = rows.y
    assert y is not None
    if classes is not None and not y.is_floating_point():
        return torch.nn.functional.one_hot(y, classes).to(like.dtype)
    return (y.flatten(1) if y.ndim > 1 else y.unsqueeze(1)).to(like.dtype)
