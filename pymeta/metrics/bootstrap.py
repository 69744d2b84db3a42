"""Intervals by the bootstrap: whole entities, or whole blocks of time, are drawn with replacement.

Rows of an entity, and rows of neighbouring days, are not independent; intervals over rows would be
too narrow. Two models are compared on the same draws (paired), so that what makes a draw hard for
both does not count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pymeta.metrics.base import Metric
from pymeta.metrics.scores import metric_of
from pymeta.tasks.groups import Array, labels_of


class Interval(NamedTuple):
    """A figure with its interval.

    Attributes:
        value: of the rows as they are.
        low: the lower end.
        high: the upper end.
    """

    value: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """Whether 0 is outside."""
        return self.low > 0 or self.high < 0


class Resampled(NamedTuple):
    """A metric of the rows as they are, and of every draw of a bootstrap.

    Attributes:
        value: of the rows as they are.
        draws: [draws].
    """

    value: float
    draws: Array


def time_blocks(times: Any, length: int) -> Array:
    """The block of each row: [rows], so many distinct times after one another in each.

    Args:
        times: [rows].
        length: how many distinct times a block has; the last one may have fewer.
    """
    if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
        raise ValueError(f"length: expected a whole number >= 1, got {length!r}")
    _, rank = np.unique(np.asarray(times), return_inverse=True)
    return np.asarray(rank // length)


class Bootstrap:
    """Draws of groups of rows, for as many metrics and models as there are.

    Args:
        over: [rows], labels of the groups (entities, or `time_blocks`).
        draws: how many.
        seed: of the draws.
        level: of the intervals.

    Attributes:
        groups: how many there are.

    Raises:
        ValueError: there are fewer than two groups.

    Example:
        >>> import numpy as np
        >>> from pymeta.metrics import Bootstrap
        >>> rng = np.random.default_rng(0)
        >>> y, shop = rng.normal(size=1000), np.repeat(np.arange(50), 20)
        >>> close, far = y + 0.1 * rng.normal(size=1000), y + rng.normal(size=1000)
        >>> Bootstrap(shop).difference("mse", y, close, far).high < 0    # smaller errors
        True
    """

    def __init__(self, over: Any, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> None:
        """Draw the groups."""
        over = np.asarray(over)
        labels, self._codes = np.unique(labels_of(over, over, "over"), return_inverse=True)
        self.groups = len(labels)
        if self.groups < 2:
            raise ValueError(f"over: expected two groups or more, got {self.groups}")
        if not 0 < level < 1:
            raise ValueError(f"level: expected a number between 0 and 1, got {level}")
        self._ends = (0.5 - level / 2, 0.5 + level / 2)
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, self.groups, (draws, self.groups))
        drawn += self.groups * np.arange(draws)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=draws * self.groups)
        self._counts = counts.reshape(draws, self.groups).astype(np.float64)

    def _interval(self, value: float, draws: Array) -> Interval:
        known = draws[np.isfinite(draws)]
        if not len(known):
            return Interval(value, float("nan"), float("nan"))
        low, high = np.quantile(known, self._ends)
        return Interval(value, float(low), float(high))

    def resampled(self, metric: str | Metric, y: Any, p: Any) -> Resampled:
        """A pooled metric of predictions, of the rows as they are and of every draw.

        Where several models are compared, this is what to keep of each: `of` makes intervals of
        it, and differences of two of them are paired.

        Args:
            metric: a name in `METRICS`, or a metric.
            y: [rows], the targets.
            p: [rows], the predictions.
        """
        metric, y, p = metric_of(metric), np.asarray(y), np.asarray(p)
        return Resampled(metric(y, p), metric.resampled(y, p, self._codes, self._counts))

    def of(self, ours: Resampled, theirs: Resampled | None = None) -> Interval:
        """The interval of a metric, or of the difference of two on the same draws."""
        if theirs is None:
            return self._interval(*ours)
        return self._interval(ours.value - theirs.value, ours.draws - theirs.draws)

    def _macro(self, metric: Metric, y: Array, p: Array) -> Array:
        return metric.by_group(y, p, self._codes, self.groups)

    def _means(self, own: Array) -> tuple[float, Array]:
        """The mean of groups' values, of those that have one, and of each draw."""
        known = np.isfinite(own)
        total = self._counts @ np.where(known, own, 0.0)
        with np.errstate(invalid="ignore"):
            draws = total / (self._counts @ known)
        return float(own[known].mean()) if known.any() else float("nan"), draws

    def interval(self, metric: str | Metric, y: Any, p: Any, *, macro: bool = False) -> Interval:
        """A metric of predictions.

        Args:
            metric: a name in `METRICS`, or a metric.
            y: [rows], the targets.
            p: [rows], the predictions.
            macro: the mean of the groups' own, instead of that of all rows together.
        """
        metric, y, p = metric_of(metric), np.asarray(y), np.asarray(p)
        if macro:
            return self._interval(*self._means(self._macro(metric, y, p)))
        return self.of(self.resampled(metric, y, p))

    def difference(
        self, metric: str | Metric, y: Any, ours: Any, theirs: Any, *, macro: bool = False
    ) -> Interval:
        """The metric of our predictions less that of theirs, on the same draws.

        Args:
            metric: a name in `METRICS`, or a metric.
            y: [rows], the targets.
            ours: [rows], predictions.
            theirs: [rows], predictions.
            macro: the mean of the groups' own, instead of that of all rows together.
        """
        metric, y = metric_of(metric), np.asarray(y)
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if macro:
            own = self._macro(metric, y, ours) - self._macro(metric, y, theirs)
            return self._interval(*self._means(own))
        return self.of(*(self.resampled(metric, y, p) for p in (ours, theirs)))
