"""Rows ready for training, and the meta-batches that are drawn of them."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from pymeta.sklearn.parameters import Parameters
from pymeta.tasks.groups import Array

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "list[torch.Tensor]"


class Rows(NamedTuple):
    """Rows ready for training: x [n, features], y [n], weights [n] or None."""

    x: Array
    y: Array
    weights: Array | None

    def take(self, index: Array) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Some of the rows, as tensors of their own memory."""
        import torch

        w = None if self.weights is None else torch.from_numpy(self.weights[index])
        return torch.from_numpy(self.x[index]), torch.from_numpy(self.y[index]), w

    def lists(self, members: Sequence[Array]) -> tuple[Tensors, Tensors, Tensors | None]:
        """One tensor for each set of rows: xs, ys and (where there are any) weights."""
        xs, ys, ws = zip(*map(self.take, members), strict=True)
        return list(xs), list(ys), None if self.weights is None else list(ws)


class Draw:
    """Draws meta-batches: some groups, of each some rows, split in support and query."""

    def __init__(self, settings: Parameters, rows: Rows, members: list[Array], rng: Any):
        """Draw from `rows`, of which `members` are those of each group."""
        self.rows, self.members, self.rng = rows, members, rng
        self.each = min(settings.tasks_per_batch, len(members))
        self.limit, self.support = settings.task_rows, settings.support
        self.shuffle = settings.shuffle
        sizes = np.array([len(m) for m in members], dtype=float)
        self.chances = sizes / sizes.sum() if settings.draw == "rows" else None

    def groups(self) -> list[Array]:
        """The rows of the groups of a meta-batch, in the order in which they are to be used."""
        drawn = []
        for g in self.rng.choice(len(self.members), self.each, replace=False, p=self.chances):
            index = self.members[g]
            keep = len(index) if self.limit is None else min(len(index), self.limit)
            if self.shuffle:
                index = index[self.rng.permutation(len(index))[:keep]]
            elif keep < len(index):
                index = index[np.sort(self.rng.choice(len(index), keep, replace=False))]
            drawn.append(index)
        return drawn

    def _support_rows(self, n: int) -> int:
        """How many of n rows are support; at least one row is left for the query set."""
        rows = self.support
        if not isinstance(rows, numbers.Integral):
            rows = max(round(rows * n), 1)
        return min(int(rows), n - 1)

    def episode(self) -> tuple[list[Array], list[Array]]:
        """The support rows and the query rows of each task of a meta-batch."""
        groups = self.groups()
        ends = [self._support_rows(len(g)) for g in groups]
        support = [g[:end] for g, end in zip(groups, ends, strict=True)]
        return support, [g[end:] for g, end in zip(groups, ends, strict=True)]
