"""Rows ready for training, and the meta-batches that are drawn of them."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from pymeta.sklearn.parameters import Parameters
from pymeta.spec.show import counted
from pymeta.tasks.groups import Array

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "list[torch.Tensor]"


class Lists(NamedTuple):
    """Sets of rows as the learners take them; None where rows have no weights or offsets."""

    xs: Tensors
    ys: Tensors
    weights: Tensors | None
    offsets: Tensors | None

    def some(self, part: slice) -> Lists:
        """Some of the sets."""
        return Lists(*(None if c is None else c[part] for c in self))  # type: ignore[arg-type]

    @property
    def as_support(self) -> dict[str, Any]:
        """The options of a learner's call, where these are the support sets."""
        return {"support_weights": self.weights, "support_offset": self.offsets}

    @property
    def as_query(self) -> dict[str, Any]:
        """Likewise, where they are the query sets."""
        return {"query_weights": self.weights, "query_offset": self.offsets}


class Rows(NamedTuple):
    """Ready rows: x [n, features], y [n, ...], weights [n] and offset [n, out] or None."""

    x: Array
    y: Array
    weights: Array | None
    offset: Array | None = None

    def at(self, index: Array) -> Rows:
        """Some of the rows."""
        return Rows(*(None if c is None else c[index] for c in self))  # type: ignore[arg-type]

    def lists(self, members: Sequence[Array]) -> Lists:
        """One tensor for each set of rows, in memory of its own."""
        import torch

        def of(column: Array | None) -> Any:
            if column is None:
                return None
            return [torch.from_numpy(column[index]) for index in members]

        return Lists(of(self.x), of(self.y), of(self.weights), of(self.offset))


def in_order(times: Any, *columns: Any) -> list[Any]:
    """The columns in the order of time, rows of the same time as they came; None stays."""
    if times is None:
        return list(columns)
    at = np.asarray(times)
    if at.shape != (len(columns[0]),):
        raise ValueError(
            f"times: expected one for each row of X, shape [{len(columns[0])}], "
            f"got {list(at.shape)}"
        )
    missing = np.isnat(at) if at.dtype.kind in "mM" else at != at
    if np.any(missing):
        raise ValueError(f"times: {counted(int(np.sum(missing)), 'row has', 'rows have')} none")
    order = np.argsort(at, kind="stable")
    return [None if c is None else np.asarray(c)[order] for c in columns]


_EARLY = 2 / 3  # of the rows, before the times that judge


def cut_of(times: Any) -> int | None:
    """In the order of time, the first row of the last third of the times; None without any."""
    if times is None:
        return None
    at = np.sort(np.asarray(times))
    cut = int(np.searchsorted(at, at[int(_EARLY * len(at))]))
    return cut or None


_SAMPLED = 32  # groups


def sample(settings: Parameters, rows: Rows, members: list[Array]) -> Lists:
    """Support sets of some groups, spread over all of them; without groups, of all rows."""
    members = members or [np.arange(len(rows.x))]
    some = members[:: max(len(members) // _SAMPLED, 1)][:_SAMPLED]
    limit = settings.task_rows
    share = 0.5 if isinstance(settings.support, numbers.Integral) else float(settings.support)
    sizes = [max(round(share * min(len(m), limit or len(m))), 1) for m in some]
    if isinstance(settings.support, numbers.Integral):
        sizes = [max(min(int(settings.support), len(m) - 1), 1) for m in some]
    steps = [max(len(m) // n, 1) for m, n in zip(some, sizes, strict=True)]
    return rows.lists([m[::k][:n] for m, k, n in zip(some, steps, sizes, strict=True)])


class Draw:
    """Draws meta-batches: some groups, of each some rows, split in support and query."""

    def __init__(self, settings: Parameters, rows: Rows, members: list[Array], rng: Any):
        """Draw from `rows`, of which `members` are those of each group."""
        self.rows, self.members, self.rng = rows, members, rng
        self.each = min(settings.tasks_per_batch, len(members))
        self.limit, self.support = settings.task_rows, settings.support
        self.shuffle = settings.is_shuffled
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
