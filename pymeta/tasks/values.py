"""The checks that read values: which rows count; labels, probabilities, weights and sizes.

The native core makes them as it reads the data; these are for torch, for devices, and for what is
decided before a call.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pymeta.spec.losses import Loss
from pymeta.tasks.checks import Expected
from pymeta.tasks.task_set import TaskSet


def counting(loss: Loss, y: Tensor, weights: Tensor | None, lead: int = 1) -> Tensor:
    """Which rows count: those of a weight that is not 0 and a label that is not ignored.

    All others are left out of their set, whatever they hold, and whatever requires grad.

    Args:
        loss: the loss.
        y: targets [*lead, ...].
        weights: [*lead], [*lead, columns], or None.
        lead: how many axes come before the outputs.

    Returns:
        bool [*lead].
    """
    count = torch.ones(y.shape[:lead], dtype=torch.bool, device=y.device)
    if loss.takes_classes and not y.is_floating_point():
        count &= y != loss.ignore_index
    if weights is not None:
        count &= (weights != 0).flatten(lead).any(-1) if weights.ndim > lead else weights != 0
    return count


def wants_gradient(weights: Tensor | None) -> bool:
    """Whether the gradient by these weights is wanted, theirs at 0 among it."""
    return weights is not None and weights.requires_grad and torch.is_grad_enabled()


def _finite(rows: Tensor, lead: int) -> Tensor:
    return rows.detach().isfinite().flatten(lead).all(-1) if rows.ndim > lead else rows.isfinite()


def beside(
    loss: Loss, x: Tensor, y: Tensor, weights: Tensor | None, offset: Tensor | None, lead: int = 1
) -> Tensor:
    """Which rows stand beside those that count: they weigh nothing, but what they would is wanted.

    The gradient by their weight is that of their own loss, normalised by the rows that count. A
    row whose inputs, offset or target are not finite has none. Where weights are of single
    targets, it is each target that has none.

    Args:
        loss: as for `counting`, like all that is not named here.
        x: inputs [*lead, ...].
        y: targets.
        weights: of rows or targets.
        offset: [*lead, ...], or None.
        lead: how many axes come before a row's own.

    Returns:
        bool [*lead].
    """
    count = counting(loss, y, weights, lead)
    if weights is None or not wants_gradient(weights):
        return torch.zeros_like(count)
    found = counting(loss, y, None, lead) & ~count & _finite(x, lead)
    if weights.ndim == lead:
        found &= _finite(y, lead)
        if offset is not None:
            found &= _finite(offset, lead)
    return found


def _valid(s: TaskSet, rows: Tensor) -> Tensor:
    """Of these rows of a set, those that do not only pad."""
    valid = s.valid()
    return rows if valid is None else rows & valid


def _counting(s: TaskSet, loss: Loss) -> Tensor:
    """Which rows of a set count; those that only pad do not."""
    assert s.y is not None
    return _valid(s, counting(loss, s.y, s.weights, s.lead))


def _used(s: TaskSet, loss: Loss) -> Tensor:
    """Which rows of a set are looked at: those that count, and those beside them."""
    assert s.y is not None
    others = beside(loss, s.x, s.y, s.weights, s.offset, s.lead)
    return _counting(s, loss) | _valid(s, others)


def leaves_out(s: TaskSet, loss: Loss) -> bool:
    """Whether any of the tasks' rows does not count; reads values."""
    if s.y is None or (s.weights is None and (not loss.takes_classes or s.y.is_floating_point())):
        return False
    return int(_counting(s, loss).sum()) < sum(s.counts)


def _check_categories(s: TaskSet, expected: Expected) -> None:
    """What embeddings look up, in rows that are looked at."""
    x = s.x.detach()
    count = s.valid() if s.y is None else _used(s, expected.loss)
    for column, categories in expected.categories:
        value = x[..., column]
        wrong = ~((value >= 0) & (value < categories) & (value == value.floor()))
        if count is not None:
            wrong = wrong & count
        if bool(wrong.any()):
            index = int(wrong.flatten().nonzero()[0])
            raise ValueError(
                f"{s.names.x}: {s.place(index)}, column {column}: "
                f"{float(value.flatten()[index]):.9g} is not a category, an integer in "
                f"0..{categories - 1}"
            )


def _first_wrong(wrong: Tensor, s: TaskSet, loss: Loss) -> int | None:
    """The first row that is looked at of those that are `wrong` [...], if there is one."""
    wrong = wrong & _used(s, loss)
    return int(wrong.flatten().nonzero()[0]) if bool(wrong.any()) else None


def _check_labels(s: TaskSet, loss: Loss, classes: int) -> None:
    assert s.y is not None
    index = _first_wrong((s.y < 0) | (s.y >= classes), s, loss)
    if index is not None:
        label = int(s.y.flatten()[index])
        raise ValueError(f"{s.names.y}: {s.place(index)}: label {label} is not in 0..{classes - 1}")


def _check_range_of_targets(s: TaskSet, loss: Loss) -> None:
    """Probabilities are in 0..1, amounts at least 0; a NaN is as in all losses: the loss is NaN."""
    assert s.y is not None
    lead = s.lead
    y = s.y.detach().flatten(lead) if s.y.ndim > lead else s.y.detach().unsqueeze(-1)
    if s.weight_columns > 1 and s.weights is not None:  # what weighs nothing holds anything
        y = torch.where(s.weights == 0, 0.0, y)
    most = 1.0 if loss.targets == "probabilities" else math.inf
    index = _first_wrong(((y < 0) | (y > most)).any(-1), s, loss)
    if index is not None:
        row = y.flatten(0, lead - 1)[index]
        value = float(row[(row < 0) | (row > most)][0])
        wrong = (
            "is not in 0..1; bce_with_logits takes probabilities (labels of -1 and +1: use "
            "(y + 1) / 2)"
            if loss.targets == "probabilities"
            else f"is below 0; {loss.kind} takes numbers of at least 0"
        )
        raise ValueError(f"{s.names.y}: {s.place(index)}: target {value:.9g} {wrong}")


def weighing_rows(s: TaskSet, loss: Loss) -> list[int]:
    """How many rows of each task count; reads values."""
    if not leaves_out(s, loss):
        return s.counts
    count = _counting(s, loss)
    parts = count.split_with_sizes(s.counts) if s.starts is not None else count.unbind(0)
    return [int(part.sum()) for part in parts]


def _check_single_rows(s: TaskSet, loss: Loss, of_single_rows: bool = False) -> None:
    """Raise where one row alone would be normalised; perhaps only of the tasks with one row."""
    if s.by_support:
        return
    counts = weighing_rows(s, loss)
    if of_single_rows:
        counts = [count if rows == 1 else 0 for count, rows in zip(counts, s.counts, strict=True)]
    if 1 in counts:
        task = counts.index(1)
        that_counts = " that counts" if s.counts[task] > 1 else ""
        raise ValueError(
            f"{s.names.x}: task {task} has one row{that_counts}, which batch normalisation "
            f"cannot normalise: expected none or at least two"
        )


def _check_weight_values(s: TaskSet) -> None:
    assert s.weights is not None
    wrong = ~(s.weights >= 0) | s.weights.isinf()
    valid = s.valid()
    if valid is not None:
        wrong = wrong & (valid.unsqueeze(-1) if s.weight_columns > 1 else valid)
    if bool(wrong.any()):
        index = int(wrong.flatten().nonzero()[0])
        value = float(s.weights.flatten()[index])
        index //= s.weight_columns
        raise ValueError(
            f"{s.names.weights}: {s.place(index)}: weight {value} is not a finite number >= 0"
        )


def _check_range(s: TaskSet) -> None:
    if s.sizes is not None and s.starts is None:
        wrong = (s.sizes < 0) | (s.sizes > s.rows)
        if bool(wrong.any()):
            task = int(wrong.nonzero()[0])
            raise ValueError(
                f"{s.names.sizes}: task {task}: size {int(s.sizes[task])} is not in 0..{s.rows}"
            )


def _of_set(s: TaskSet, expected: Expected) -> Expected:
    """What is expected, with the loss of the set."""
    return expected if s.loss in (None, expected.loss) else replace(expected, loss=s.loss)


def check_sizes(s: TaskSet, expected: Expected, waits: bool = True) -> None:
    """The checks that read sizes, which are on the CPU wherever the data are.

    Values are read only where a task has a single row under BatchNorm which perhaps does not
    count; not without `waits`, where nobody may wait for the data.

    Raises:
        ValueError: a size is out of range, or there is one row that counts under BatchNorm.
    """
    expected = _of_set(s, expected)
    _check_range(s)
    single = 1 in s.counts if s.sizes is not None else s.rows == 1 and s.tasks
    if not expected.batch_norm or not single:
        return
    if s.y is None or waits or (s.weights is None and not expected.loss.takes_classes):
        _check_single_rows(s, expected.loss, of_single_rows=True)


def check_values(s: TaskSet, expected: Expected) -> None:
    """The checks that read the data, for what does not do so itself; they wait for the data.

    Raises:
        ValueError: sizes, labels, probabilities, weights or categories out of range, or one row
            that counts under BatchNorm.
    """
    expected = _of_set(s, expected)
    if s.y is None:
        check_sizes(s, expected)
    else:  # whose values say how many rows count
        _check_range(s)
    if s.weights is not None:
        _check_weight_values(s)
    if expected.categories:
        _check_categories(s, expected)
    if s.y is None:
        return
    labels = expected.loss.takes_classes and not s.y.is_floating_point()
    if labels and expected.out_features is not None:
        _check_labels(s, expected.loss, expected.out_features)
    if expected.loss.targets in ("probabilities", "amounts"):
        _check_range_of_targets(s, expected.loss)
    if expected.batch_norm:
        _check_single_rows(s, expected.loss)
