"""What the entities' residuals of one time have in common.

A pooled model errs at times for all entities alike: the market turns, a month is bad everywhere.
An entity adapted to that takes for its own what is everybody's, and is late when it turns. So what
is common is taken out first:

    common(t) = sum of the residuals of time t / (their number + k)

with k the ratio of the variance within a time to that between times: one entity alone says little
of what is common, hundreds say it all.
"""

from __future__ import annotations

import numpy as np

from pymeta.data.encoders import credibility
from pymeta.tasks.groups import Array


class Common:
    """The common part of residuals, by time.

    Attributes:
        worth: k, how many entities' residuals the mean of 0 is worth.
        times: [times], those that it was learned from, sorted.
        effects: [times], what was common to them.
    """

    def __init__(self, times: Array, residual: Array, worth: float | None = None) -> None:
        """Learn from rows.

        Args:
            times: [rows].
            residual: [rows], targets less the pooled model's output.
            worth: k; None to learn it.
        """
        residual = residual.astype(np.float64)
        self.times, codes = np.unique(times, return_inverse=True)
        self.worth = float(credibility(residual, codes)) if worth is None else worth
        counts = np.bincount(codes, minlength=len(self.times))
        self.effects = np.bincount(codes, residual, len(self.times)) / (counts + self.worth)

    def of(self, times: Array, residual: Array) -> Array:
        """[rows], what was common at their times: as learned, or of these rows themselves.

        Args:
            times: [rows].
            residual: [rows].
        """
        own = Common(times, residual, self.worth)
        at = np.minimum(np.searchsorted(self.times, own.times), len(self.times) - 1)
        known = self.times[at] == own.times
        effects = np.where(known, self.effects[at], own.effects)
        return np.asarray(effects[np.searchsorted(own.times, times)])
