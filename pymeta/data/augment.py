"""Augmentations of a batch: noise, mixtures of rows, rows drawn with replacement.

An augmentation is called with a `Batch` and a generator and returns another batch of the same
sizes. It changes support alone, or support and query with `query=True`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from pymeta.data.batch import Batch
from pymeta.data.draw import between
from pymeta.tasks.groups import Array
from pymeta.tasks.ragged import Ragged, in_tasks

Augmentation: TypeAlias = Callable[[Batch, np.random.Generator], Batch]


def _flat(tasks: Any) -> Array:
    """The tasks' rows one after another: [sum of rows, ...]."""
    if isinstance(tasks, Ragged):
        return np.asarray(tasks.values)
    return np.asarray(tasks).reshape(-1, *tasks.shape[2:])


@dataclass(frozen=True)
class _Augmentation:
    """The sides are changed one by one."""

    def __call__(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """The batch, changed."""
        xs, ys = self._side(batch.xs, batch.ys, batch.support_sizes, rng)
        xq, yq = batch.xq, batch.yq
        if getattr(self, "query", False):
            xq, yq = self._side(xq, yq, batch.query_sizes, rng)
        return batch.with_values(xs, ys, xq, yq)

    def _side(self, x: Any, y: Any, sizes: Array, rng: np.random.Generator) -> tuple[Any, Any]:
        flat_x, flat_y = self._rows(_flat(x), _flat(y), sizes, rng)
        return in_tasks(flat_x, sizes), in_tasks(flat_y, sizes)

    def _rows(
        self, x: Array, y: Array, sizes: Array, rng: np.random.Generator
    ) -> tuple[Array, Array]:
        raise NotImplementedError


@dataclass(frozen=True)
class Jitter(_Augmentation):
    """Adds Gaussian noise to the features.

    Args:
        scale: its standard deviation, in the units of x.
        query: whether query rows get it too.
    """

    scale: float
    query: bool = False

    def __post_init__(self) -> None:
        _check_positive("scale", self.scale)

    def _rows(
        self, x: Array, y: Array, sizes: Array, rng: np.random.Generator
    ) -> tuple[Array, Array]:
        noise = rng.standard_normal(x.shape, dtype=x.dtype.type)
        return x + noise * x.dtype.type(self.scale), y


@dataclass(frozen=True)
class MixUp(_Augmentation):
    """Mixes each row with another of its task (Zhang et al. 2018), and of its class.

    x becomes w x + (1 - w) x', with w of Beta(alpha, alpha), and at least a half. Rows of classes
    are mixed with rows of the same class, so targets stay as they are; targets that are numbers
    are mixed as x is.

    Args:
        alpha: the parameter of the Beta distribution.
        query: whether query rows are mixed too.
    """

    alpha: float = 0.2
    query: bool = False

    def __post_init__(self) -> None:
        _check_positive("alpha", self.alpha)

    def _rows(
        self, x: Array, y: Array, sizes: Array, rng: np.random.Generator
    ) -> tuple[Array, Array]:
        of_classes = y.dtype.kind in "iu" or bool(np.isin(y, (0, 1)).all())
        group = np.repeat(np.arange(len(sizes)), sizes)
        if of_classes:
            _, label = np.unique(y, return_inverse=True)
            group = group * (int(label.max(initial=0)) + 1) + label
        order = np.argsort(group, kind="stable")
        _, first, member, count = np.unique(
            group[order], return_index=True, return_inverse=True, return_counts=True
        )
        partner = np.empty(len(group), np.int64)
        draw = first[member] + (rng.random(len(group)) * count[member]).astype(np.int64)
        partner[order] = order[draw]
        w = rng.beta(self.alpha, self.alpha, len(group))
        w = np.maximum(w, 1 - w).astype(x.dtype)
        mixed = w[:, None] * x + (1 - w)[:, None] * x[partner]
        return mixed, y if of_classes else (w * y + (1 - w) * y[partner]).astype(y.dtype)


@dataclass(frozen=True)
class Bootstrap:
    """Draws each task's support rows anew, with replacement."""

    def __call__(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """The batch, changed; its `support_rows` as well."""
        sizes = batch.support_sizes
        first = np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = first + between(rng, 0, np.repeat(sizes, sizes) - 1, len(first))
        xs, ys = (in_tasks(_flat(v)[rows], sizes) for v in (batch.xs, batch.ys))
        twin = batch.with_values(xs, ys, batch.xq, batch.yq)
        twin.support_rows = batch.support_rows[rows]
        return twin


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < np.inf:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
