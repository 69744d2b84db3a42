"""What a metric is: a number for each group of rows, for many weightings of the rows at once.

Intervals come from thousands of resamples, and tables from thousands of entities; a metric is
therefore an object that computes all of them in array operations:

    metric(y, p)                       one number, all rows alike
    metric(y, p, weights)              rows weighted
    metric.by_group(y, p, codes, G)    [G], one for each group of rows, NaN where there is none
    metric.resampled(y, p, codes, C)   [draws], pooled, where group g counts C[d, g] times

There are two kinds. An `Additive` one is a function of sums over rows (a log loss, a correlation):
a resample is one product of matrices. A `Ranked` one needs the rows in the order of the prediction
(an AUC): they are sorted once, and every resample is cumulative sums over that order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymeta.tasks.groups import Array

_CHUNK = 1 << 17  # weights that are looked at together, of resamples and rows: they stay in cache


def is_binary(y: Array) -> bool:
    """Whether targets are 0 and 1."""
    return bool(np.isin(y, (0, 1)).all())


def _checked(name: str, values: Any, rows: int | None) -> Array:
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected numbers, got dtype {array.dtype}")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or (rows is not None and len(array) != rows):
        wanted = "[rows]" if rows is None else f"[{rows}], as y has"
        raise ValueError(f"{name}: expected shape {wanted}, got {list(array.shape)}")
    return array.astype(np.float64)


@dataclass(frozen=True)
class Metric(ABC):
    """A figure of merit of predictions p for targets y.

    Attributes:
        name: as in tables.
        larger_is_better: which of two models is the better one.
        targets: "binary" (y is 0 or 1, p a probability or score), "positive" or "numbers".
    """

    name: str
    larger_is_better: bool
    targets: str

    def __call__(self, y: Any, p: Any, weights: Any = None) -> float:
        """The metric of all rows together.

        Args:
            y: [rows], the targets.
            p: [rows], the predictions.
            weights: [rows] numbers >= 0, or None.

        Returns:
            The number; NaN where it is not defined (an AUC of one class).

        Raises:
            TypeError: an argument does not hold numbers.
            ValueError: of another shape, not finite, or out of the metric's range.
        """
        y, p = self.check(y, p)
        w = np.ones(len(y)) if weights is None else _checked("weights", weights, len(y))
        if not (np.isfinite(w).all() and (w >= 0).all()):
            raise ValueError("weights: expected finite numbers >= 0")
        codes = np.zeros(len(y), np.int64)
        return float(self._groups(y, p, w, codes, 1)[0]) if len(y) else float("nan")

    def check(self, y: Any, p: Any) -> tuple[Array, Array]:
        """Targets and predictions as float64 [rows]; errors as `__call__`."""
        y = _checked("y", y, None)
        p = _checked("p", p, len(y))
        for name, values in (("y", y), ("p", p)):
            bad = int((~np.isfinite(values)).sum())
            if bad:
                raise ValueError(f"{name}: {bad} of {len(y)} are not finite")
        if self.targets == "binary" and not is_binary(y):
            raise ValueError(
                f"y: {self.name} expects targets of 0 and 1, got {y.min()} to {y.max()}"
            )
        if self.targets == "positive" and len(y) and (y.min() <= 0 or p.min() <= 0):
            low = min((y.min(), "y"), (p.min(), "p"))
            raise ValueError(f"{low[1]}: {self.name} expects numbers > 0, got {low[0]}")
        return y, p

    def by_group(self, y: Array, p: Array, codes: Array, groups: int) -> Array:
        """The metric of each group's rows: [groups], NaN where it is not defined.

        Args:
            y: [rows].
            p: [rows].
            codes: [rows], each row's group, 0..groups-1.
            groups: how many there are.
        """
        y, p = self.check(y, p)
        return self._groups(y, p, np.ones(len(y)), np.asarray(codes), groups)

    @abstractmethod
    def _groups(self, y: Array, p: Array, w: Array, codes: Array, groups: int) -> Array:
        """[groups], of weighted rows."""

    @abstractmethod
    def resampled(self, y: Array, p: Array, codes: Array, counts: Array) -> Array:
        """The metric of all rows together, where groups count so many times: [draws].

        Args:
            y: [rows].
            p: [rows].
            codes: [rows], each row's group.
            counts: [draws, groups] of float64, how often each is there.
        """


@dataclass(frozen=True)
class Additive(Metric):
    """A metric that is a function of sums over rows.

    Attributes:
        columns: (y, p) -> [rows, s], what is summed.
        finish: sums [..., s + 1] -> [...], the last of them the sum of the weights.
        limits: (low, high) that predictions are to be in, ends included; None for any.
    """

    columns: Callable[[Array, Array], Array]
    finish: Callable[[Array], Array]
    limits: tuple[float, float] | None = None

    def check(self, y: Any, p: Any) -> tuple[Array, Array]:
        """As the base class has it, and the limits."""
        y, p = super().check(y, p)
        if self.limits is not None and len(p):
            low, high = self.limits
            if p.min() < low or p.max() > high:
                raise ValueError(
                    f"p: {self.name} expects {low:g} to {high:g}, got {p.min():g} to {p.max():g}"
                )
        return y, p

    def _sums(self, y: Array, p: Array, w: Array, codes: Array, groups: int) -> Array:
        """[groups, s + 1]."""
        columns = np.column_stack([self.columns(y, p), np.ones(len(y))]) * w[:, None]
        sums = np.zeros((groups, columns.shape[1]))
        for i, column in enumerate(columns.T):
            sums[:, i] = np.bincount(codes, column, minlength=groups)
        return sums

    def _finished(self, sums: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Array = np.where(sums[..., -1] > 0, self.finish(sums), np.nan)
        return found

    def _groups(self, y: Array, p: Array, w: Array, codes: Array, groups: int) -> Array:
        return self._finished(self._sums(y, p, w, codes, groups))

    def resampled(self, y: Array, p: Array, codes: Array, counts: Array) -> Array:
        """As the base class has it."""
        y, p = self.check(y, p)
        return self._finished(counts @ self._sums(y, p, np.ones(len(y)), codes, counts.shape[1]))


@dataclass(frozen=True)
class Ranked(Metric):
    """A metric of the order of the predictions, for two classes.

    Rows with one prediction are a run: they stand for one threshold.

    Attributes:
        finish: (positive, negative, above) -> [draws, groups]: the weights of both classes in each
            run [draws, runs], runs in ascending order of the prediction within their group, and
            where each group begins [groups].
    """

    finish: Callable[[Array, Array, Array], Array]

    def _runs(self, p: Array, codes: Array) -> tuple[Array, Array, Array]:
        """The order of rows, where runs begin in it, and each run's group."""
        order = np.lexsort((p, codes))
        p, codes = p[order], codes[order]
        begins = np.flatnonzero(np.r_[True, (p[1:] != p[:-1]) | (codes[1:] != codes[:-1])])
        return order, begins, codes[begins]

    def _of_runs(self, y: Array, w: Array, begins: Array, group: Array) -> Array:
        """[draws, groups that are there], of weights [draws, rows] and y in the order of runs."""
        positive, negative = w * y, w * (1 - y)
        if len(begins) < len(y):
            positive, negative = (np.add.reduceat(v, begins, axis=1) for v in (positive, negative))
        first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
        with np.errstate(divide="ignore", invalid="ignore"):
            found = self.finish(positive, negative, first)
        both = group_sums(positive, first) * group_sums(negative, first)
        return np.where(both > 0, found, np.nan)

    def _groups(self, y: Array, p: Array, w: Array, codes: Array, groups: int) -> Array:
        out = np.full(groups, np.nan)
        kept = w > 0
        y, p, w, codes = y[kept], p[kept], w[kept], codes[kept]
        if len(y):
            order, begins, group = self._runs(p, codes)
            out[np.unique(group)] = self._of_runs(y[order], w[None, order], begins, group)[0]
        return out

    def resampled(self, y: Array, p: Array, codes: Array, counts: Array) -> Array:
        """As the base class has it."""
        y, p = self.check(y, p)
        order, begins, group = self._runs(p, np.zeros(len(y), np.int64))
        y, codes = y[order], codes[order]
        step = max(_CHUNK // max(len(y), 1), 1)
        parts = [
            self._of_runs(y, counts[i : i + step].take(codes, axis=1), begins, group)
            for i in range(0, len(counts), step)
        ]
        return np.concatenate(parts)[:, 0]


def group_sums(values: Array, first: Array) -> Array:
    """The sum of each group's runs: [draws, groups]."""
    if len(first) == 1:
        return np.asarray(values.sum(axis=1, keepdims=True))
    return np.asarray(np.add.reduceat(values, first, axis=1))


def below(values: Array, first: Array) -> Array:
    """What there is in the runs before each run of its group: [draws, runs], exclusive.

    Args:
        values: [draws, runs].
        first: [groups], where each group begins.
    """
    total = np.cumsum(values, axis=1)
    if len(first) == 1:
        return np.asarray(np.subtract(total, values, out=total))
    sizes = np.diff(np.r_[first, values.shape[1]])
    start = total[:, first] - values[:, first]
    out: Array = total - values - np.repeat(start, sizes, axis=1)
    return out


def per_group(values: Array, first: Array) -> Array:
    """The sum of each group, for each of its runs: [draws, runs], or [draws, 1] of one group."""
    sums = group_sums(values, first)
    if len(first) == 1:
        return sums  # which broadcasts
    return np.repeat(sums, np.diff(np.r_[first, values.shape[1]]), axis=1)
