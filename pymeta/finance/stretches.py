"""Cross-sections: ranks across stocks, and a panel as a grid of days and stocks."""

from __future__ import annotations

import numpy as np
import torch

from pymeta.data import Panel
from pymeta.tasks.groups import Array


def ranks(values: Array) -> Array:
    """Ranks across stocks of each day, -0.5 to 0.5; NaN where there is none: [stocks, days]."""
    here = np.isfinite(values)
    order = np.where(here, values, np.inf).argsort(axis=0, kind="stable").argsort(axis=0)
    count = np.maximum(here.sum(axis=0), 2)
    return np.where(here, order / (count - 1) - 0.5, np.nan)


class Stretches:
    """A panel as a grid: x [days, stocks, features], y and whether there is a row [days, stocks].

    Args:
        panel: prepared, with targets.
        residual: [rows], what the pooled model leaves of them.
    """

    def __init__(self, panel: Panel, residual: Array) -> None:
        """Fill the grid; empty places are 0."""
        _, day = np.unique(panel.need_times("trend"), return_inverse=True)
        shape = (int(day.max()) + 1, len(panel.entities))
        self.x = np.zeros((*shape, panel.x.shape[1]), np.float32)
        self.y, self.here = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        at = (day, panel.codes)
        self.x[at], self.y[at], self.here[at] = panel.x, residual, 1.0

    def part(self, first: Array, days: int, stocks: Array) -> tuple[torch.Tensor, ...]:
        """Tasks of so many days: x [T, rows, features], y and weights [T, rows].

        Args:
            first: [T], the first day of each.
            days: how many.
            stocks: [T, n], which ones.
        """
        day = (first[:, None] + np.arange(days))[:, :, None]
        found = []
        for values in (self.x, self.y, self.here):
            taken = values[day, stocks[:, None]]
            found.append(torch.as_tensor(taken.reshape(len(first), -1, *values.shape[2:])))
        return tuple(found)
