"""What fine-tuning does to the rows of all tasks at once: class weights, and rows held out.

`_Rows` numbers the rows of the tasks, task after task, in uniform, padded and packed sets alike.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pymeta import native
from pymeta.algorithms.chunks import check_task
from pymeta.backend import adapt as native_adapt
from pymeta.spec.class_weights import class_table, classes_of, row_factors
from pymeta.spec.losses import Loss
from pymeta.spec.schedule import SPLIT, permutation
from pymeta.tasks.checks import Expected, Names
from pymeta.tasks.task_set import TaskSet, check_same_tasks, task_set


class _Rows(NamedTuple):
    """The rows of a set's tasks, [n] of them, task after task.

    Attributes:
        sizes: [T] int64, rows of each task.
        task: [n], whose it is.
        number: [n], which of its task's rows it is.
        place: [n], where it lies in the flattened rows of the set's tensors.
    """

    sizes: Tensor
    task: Tensor
    number: Tensor
    place: Tensor

    @staticmethod
    def of(s: TaskSet) -> _Rows:
        sizes = torch.tensor(s.counts, dtype=torch.int64, device="cpu")
        tasks = torch.arange(s.tasks, device="cpu")
        starts = tasks * s.rows if s.starts is None else s.starts
        task = torch.repeat_interleave(tasks, sizes)
        number = torch.arange(len(task), device="cpu") - (sizes.cumsum(0) - sizes)[task]
        return _Rows(sizes, task, number, starts[task] + number)


# ---- class weights ----------------------------------------------------------------------------


def _classes(s: TaskSet, rows: _Rows, loss: Loss, out: int | None = None) -> np.ndarray:
    """Each row's class, as `classes_of` has it."""
    assert s.y is not None
    if s.distributions:
        raise ValueError(
            f"class_weights: expected None where {s.names.y} are distributions over the classes; "
            f"give the loss's module its weight"
        )
    y = s.y.detach().reshape(-1).cpu()[rows.place]
    y = y if loss.takes_classes else y.double()
    weights = None if s.weights is None else s.weights.detach().reshape(-1).cpu()[rows.place]
    where = rows.task.numpy(), rows.number.numpy()
    return classes_of(
        s.names.y,
        y.numpy(),
        *where,
        loss,
        out,
        None if weights is None else weights.double().numpy(),
    )


def check_classes(s: TaskSet, loss: Loss) -> None:
    """ValueError where a target is not a class."""
    if not loss.takes_classes or s.distributions:
        _classes(s, _Rows.of(s), loss)


def table_of(
    s: TaskSet, weights: str | tuple[float, ...], loss: Loss, out: int | None
) -> np.ndarray:
    """The weight of each class in each task, [T, classes]."""
    rows = _Rows.of(s)
    found = _classes(s, rows, loss, out)
    classes = 2 if not loss.takes_classes else out
    if classes is None:
        classes = int(found.max(initial=0)) + 1
    return class_table(found, rows.task.numpy(), s.tasks, weights, classes)


def weighted(s: TaskSet, table: np.ndarray, expected: Expected) -> TaskSet:
    """The set with each row's weight multiplied by that of its class; `table` is [T, classes]."""
    rows = _Rows.of(s)
    found = _classes(s, rows, expected.loss, expected.out_features)
    lead = s.x.shape[: 1 if s.starts is not None else 2]
    values = torch.ones(math.prod(lead), dtype=torch.float64, device="cpu")
    values[rows.place] = torch.from_numpy(row_factors(found, rows.task.numpy(), table))
    values = values.view(lead).to(expected.device, expected.dtype)
    return replace(s, weights=values if s.weights is None else s.weights * values)


# ---- rows given ----------------------------------------------------------------------------

_VALIDATION = Names(
    *("validation_data[0]", "validation_data[1]", "validation_data's sizes"),
    *("validation_data[2]", "validation_data[3]"),
)


def validation_set(
    data: Any, fraction: float, patience: int | None, support: TaskSet, expected: Expected
) -> TaskSet | None:
    """The validation data of FineTune as a task set, if there are any.

    Args:
        data: (x, y), (x, y, weights) or (x, y, weights, offset), or None.
        fraction: of the rows that is held out instead.
        patience: FineTune's, which needs one of the two.
        support: the tasks.
        expected: what the model and the loss ask for.

    Raises:
        TypeError: `data` is none of these.
        ValueError: there are both, or patience without either.
    """
    if data is None:
        if patience is not None and not fraction:
            raise ValueError(
                "patience: expected validation > 0 or validation_data with it, got neither"
            )
        return None
    if fraction:
        raise ValueError(
            f"validation_data: expected None where a fraction of the rows is held out "
            f"(validation={fraction}), got {type(data).__name__}"
        )
    check_task("validation_data", data)
    x, y, weights, offset = (*data, None, None)[:4]
    held = task_set(_VALIDATION, x, y, None, weights, expected, offset)
    check_same_tasks(support, held)
    return held


# ---- rows held out ----------------------------------------------------------------------------


def held_out_counts(sizes: Tensor, fraction: float) -> Tensor:
    """How many of `sizes` [T] rows are held out: floor(fraction * rows) of each task."""
    # 0.29 * 100 is 28.999999999999996, and 29 rows are meant
    return (sizes.double() * fraction + 1e-9).floor().long()


def _orders(sizes: Tensor, seed: int, task_ids: Tensor | None) -> Tensor:
    """A permutation of each task's rows, one after another: int64 [sum of sizes]."""
    if native.missing() is None:
        return native_adapt.permutations(sizes, seed, task_ids, SPLIT)
    ids = [0] * len(sizes) if task_ids is None else task_ids.tolist()
    each = [
        permutation(seed, 0, task, 0, rows, SPLIT)
        for task, rows in zip(ids, sizes.tolist(), strict=True)
    ]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *each]))


def _chosen(s: TaskSet, sizes: Tensor, index: Tensor) -> TaskSet:
    """The rows of a set at `index`, `sizes` [T] of them for each task; copies."""
    lead = 1 if s.starts is not None else 2
    index = index.to(s.x.device)
    equal = bool((sizes == sizes[0]).all())

    def take(whole: Tensor | None) -> Tensor | None:
        if whole is None:
            return None
        rows = whole if lead == 1 else whole.flatten(0, 1)
        rows = rows.index_select(0, index)
        return rows.view(s.tasks, int(sizes[0]), *rows.shape[1:]) if equal else rows

    x = take(s.x)
    assert x is not None
    out = TaskSet(
        x,
        take(s.y),
        take(s.weights),
        s.tasks,
        int(sizes.max()),
        s.names,
        offset=take(s.offset),
        distributions=s.distributions,
    )
    if not equal:
        out.sizes, out.starts = sizes, sizes.cumsum(0) - sizes
    return out


def hold_out(
    s: TaskSet, fraction: float, last: bool, seed: int, task_ids: Tensor | None
) -> tuple[TaskSet, TaskSet]:
    """Split each task into rows to train on and rows to validate on, both in their own order.

    Args:
        s: T >= 1 tasks.
        fraction: of the rows of each that are held out, rounded down.
        last: hold out the last ones; otherwise the first of `permutation(purpose=SPLIT)`.
        seed: of that permutation.
        task_ids: [T], likewise.
    """
    rows = _Rows.of(s)
    held = held_out_counts(rows.sizes, fraction)
    if last:
        is_held = rows.number >= (rows.sizes - held)[rows.task]
    else:
        is_held = torch.zeros(len(rows.place), dtype=torch.bool, device="cpu")
        order = _orders(rows.sizes, seed, task_ids)
        first = (rows.sizes.cumsum(0) - rows.sizes)[rows.task]
        is_held[(first + order)[rows.number < held[rows.task]]] = True
    train = _chosen(s, rows.sizes - held, rows.place[~is_held])
    return train, _chosen(s, held, rows.place[is_held])
