"""Weights of classes, worked into the weights of rows; in numpy, for tensors and arrays alike.

A row's weight is multiplied by that of its class: a number given for each class, or "balanced",
n / (k * count) in a task of n rows with k classes in it, of which the row's one has `count` rows.
Rows that are left out (of weight 0, of the ignored label) are not among them.
This module does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pymeta.spec.losses import Loss
from pymeta.spec.optimizers import check_number
from pymeta.spec.show import counted

if TYPE_CHECKING:
    from pymeta.spec.fields import Fields

ClassWeights: TypeAlias = str | tuple[float, ...] | None


def check_class_weights(value: Any, loss: Loss) -> ClassWeights:
    """`class_weights` as it is kept; TypeError or ValueError where it cannot be meant."""
    if value is None:
        return None
    if loss.kind not in ("cross_entropy", "bce_with_logits"):
        raise ValueError(f"class_weights: expected None for the loss {loss.kind}, got {value!r}")
    if isinstance(value, str):
        if value != "balanced":
            raise ValueError(
                f'class_weights: expected "balanced" or a weight for each class, got {value[:60]!r}'
            )
        return value
    try:
        weights = tuple(value.tolist() if hasattr(value, "tolist") else value)
    except TypeError:
        raise TypeError(
            f'class_weights: expected "balanced" or a weight for each class, '
            f"got {type(value).__name__}"
        ) from None
    for weight in weights:
        check_number("class_weights", weight)
    return tuple(map(float, weights))


def check_class_count(weights: ClassWeights, loss: Loss, out: int | None) -> None:
    """ValueError where class weights do not fit a model with `out` outputs (None: unknown)."""
    if weights is None or out is None:
        return
    if not loss.takes_classes and out != 1:
        raise ValueError(
            f"class_weights: expected None for bce_with_logits with {counted(out, 'output')}, of "
            "which "
            f"none is the class"
        )
    classes = out if loss.takes_classes else 2
    if not isinstance(weights, str) and len(weights) != classes:
        raise ValueError(
            f"class_weights: expected {counted(classes, 'number')}, got {len(weights)}"
        )


def classes_of(
    name: str,
    y: np.ndarray,
    task: np.ndarray,
    number: np.ndarray,
    loss: Loss,
    out: int | None,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Each row's class, int64 [n]; -1 where it is left out of its set, or there is no such class.

    Args:
        name: of y, for messages.
        y: [n] targets: labels, or the 0s and 1s of bce_with_logits.
        task: [n], whose row it is.
        number: [n], which of its task's rows it is.
        loss: the loss.
        out: how many outputs the model has; None where that is not known.
        weights: [n], of the rows; those of weight 0 are left out, whatever they hold.

    Raises:
        ValueError: a target of bce_with_logits is neither 0 nor 1.
    """
    count = np.ones(y.shape, np.bool_) if weights is None else weights != 0
    if loss.takes_classes:
        known = (y >= 0) & (y != loss.ignore_index) & count
        return np.where(known if out is None else known & (y < out), y, -1).astype(np.int64)
    wrong = np.flatnonzero((y != 0) & (y != 1) & count)
    if wrong.size:
        at = wrong[0]
        raise ValueError(
            f"{name}: task {task[at]}, row {number[at]}: expected 0 or 1 with class_weights, "
            f"got {float(y[at])}"
        )
    return np.where(count, y, -1).astype(np.int64)


def class_table(
    classes: np.ndarray, task: np.ndarray, tasks: int, weights: str | tuple[float, ...], count: int
) -> np.ndarray:
    """The weight of each of `count` classes in each task, [tasks, count] float64.

    A class that a task has no row of has weight 1 in it where the weights are "balanced".
    """
    if not isinstance(weights, str):
        return np.broadcast_to(np.array(weights, dtype=np.float64), (tasks, len(weights)))
    cells = (task * count + classes)[classes >= 0]
    counts = np.bincount(cells, minlength=tasks * count).reshape(tasks, count).astype(np.float64)
    present = (counts > 0).sum(1, keepdims=True)
    balanced = counts.sum(1, keepdims=True) / np.maximum(present * counts, 1)
    return np.where(counts > 0, balanced, 1.0)


def row_factors(classes: np.ndarray, task: np.ndarray, table: np.ndarray) -> np.ndarray:
    """What each row's weight is multiplied by, [n] float64: 1 for rows without a class."""
    known = table[task, np.clip(classes, 0, table.shape[1] - 1)]
    return np.where(classes < 0, 1.0, known)


def read_class_weights(recipe: Fields) -> ClassWeights:
    """The entry `class_weights` of a JSON object; ValueError where it is none."""
    if recipe.is_null("class_weights"):
        return None
    if recipe.is_a("class_weights", list):
        return recipe.numbers("class_weights")
    return recipe.text("class_weights")
