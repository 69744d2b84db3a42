"""The rows of all tasks in one array, and sums over each task's rows: no loop over tasks.

flat     [N, ...], the rows of all tasks one after another, `task` [N] says whose each is
padded   [T, R, ...], task t's rows in its first places, zeros behind them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymeta.tasks.task_set import TaskSet


@dataclass
class Flat:
    """One side of all tasks, its rows one after another.

    Attributes:
        x: [N, ...].
        y: [N, ...], or None.
        weights: [N], or None for 1 each.
        offset: [N, out], what is added to outputs, or None.
        task: [N], whose each row is.
        place: [N], where it stands among the task's rows.
        tasks: T.
        rows: R, the most rows that a task has.
    """

    x: Tensor
    y: Tensor | None
    weights: Tensor | None
    offset: Tensor | None
    task: Tensor
    place: Tensor
    tasks: int
    rows: int

    def where(self, chosen: Tensor) -> Flat:
        """The rows that are chosen, bool [N]; they keep their places."""
        return Flat(
            self.x[chosen],
            None if self.y is None else self.y[chosen],
            None if self.weights is None else self.weights[chosen],
            None if self.offset is None else self.offset[chosen],
            self.task[chosen],
            self.place[chosen],
            self.tasks,
            self.rows,
        )

    def that_count(self) -> Flat:
        """Without the rows of weight 0, whatever they hold."""
        return self if self.weights is None else self.where(self.weights != 0)

    def padded(self, values: Tensor) -> Tensor:
        """Values of the rows [N, ...] as [T, R, ...]."""
        if self.is_full:
            return values.reshape(self.tasks, self.rows, *values.shape[1:])
        out = values.new_zeros(self.tasks * self.rows, *values.shape[1:])
        out = out.index_copy(0, self.task * self.rows + self.place, values)
        return out.view(self.tasks, self.rows, *values.shape[1:])

    def own(self, padded: Tensor) -> Tensor:
        """Of what is padded, [T, R, ...], that of the rows: [N, ...]."""
        return padded.flatten(0, 1) if self.is_full else padded[self.task, self.place]

    @property
    def is_full(self) -> bool:
        """Whether all tasks have equally many rows."""
        return len(self.task) == self.tasks * self.rows

    def sums(self, values: Tensor) -> Tensor:
        """The sums over each task's rows: [N, ...] to [T, ...]."""
        out = values.new_zeros(self.tasks, *values.shape[1:])
        return out.index_add(0, self.task, values)

    def row_weights(self, like: Tensor) -> Tensor:
        """The weights [N], ones where there are none."""
        return like.new_ones(len(self.task)) if self.weights is None else self.weights


_NOT_OF_ROWS: Any = (  # RuntimeErrors that tell nothing of the rows' form
    torch.cuda.OutOfMemoryError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
)


def encoded(encoder: nn.Module, x: Tensor) -> Any:
    """What an encoder makes of rows [N, ...].

    Raises:
        ValueError: it fails, as on rows of another width or dtype.
    """
    try:
        return encoder(x)
    except _NOT_OF_ROWS:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"xs, xq: expected rows that the encoder takes, got {list(x.shape[1:])} of {x.dtype}; "
            f"it failed with: {error}"
        ) from error


def columns(y: Tensor) -> Tensor:
    """Targets [N] or [N, out] as [N, out]."""
    return y.unsqueeze(-1) if y.ndim == 1 else y


def flat(s: TaskSet) -> Flat:
    """The rows of a task set, without those that only fill it up."""
    device = s.x.device
    if s.starts is not None and s.sizes is not None:  # packed
        sizes = s.sizes.to(device)
        task = torch.repeat_interleave(torch.arange(s.tasks, device=device), sizes)
        place = torch.arange(len(task), device=device) - s.starts.to(device)[task]
        offset = None if s.offset is None else columns(s.offset)
        return Flat(s.x, s.y, s.weights, offset, task, place, s.tasks, s.rows)
    lead = s.tasks, s.rows
    task = torch.arange(s.tasks, device=device).repeat_interleave(s.rows)
    place = torch.arange(s.rows, device=device).repeat(s.tasks)

    def joined(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(lead[0] * lead[1], *values.shape[2:])

    x = joined(s.x)
    assert x is not None
    offset = joined(s.offset)
    offset = None if offset is None else columns(offset)
    found = Flat(x, joined(s.y), joined(s.weights), offset, task, place, *lead)
    valid = s.valid()
    return found if valid is None else found.where(valid.reshape(-1))


def grouped(task: Tensor, tasks: int) -> Flat:
    """Rows of which only the tasks [N] are known, in ascending order, numbered without gaps."""
    sizes = torch.bincount(task, minlength=tasks)
    place = torch.arange(len(task), device=task.device) - (sizes.cumsum(0) - sizes)[task]
    most = int(sizes.max()) if tasks else 0
    return Flat(task, None, None, None, task, place, tasks, most)


def times_own(values: Tensor, matrices: Tensor, task: Tensor) -> Tensor:
    """Each row times its task's matrix: values [N, d], matrices [T, d, out], task [N]."""
    if len(matrices) == 1:
        return values @ matrices[0]
    rows = grouped(task, len(matrices))
    return rows.own(rows.padded(values) @ matrices)


def shaped(values: Tensor, rows: Flat, s: TaskSet) -> Tensor | list[Tensor]:
    """Values of a set's rows [N, ...] in the form in which its x came."""
    if s.lengths is not None:
        return list(torch.split(values, s.lengths))
    return rows.padded(values)


def merged(chosen: Tensor, values: Tensor, others: Tensor) -> Tensor:
    """The values [N, ...] of all rows, of those that are chosen, bool [N], and of the others."""
    order = torch.cat([chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]]).argsort()
    return torch.cat([values, others])[order]
