"""What paths begin at: a row, one for each task, or a population of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pymeta.explain.rows import Packed, as_array


@dataclass(frozen=True)
class Baselines:
    """What paths begin at: `values` [B, *row] of all rows, or [N, 1, *row] of each row its own."""

    values: np.ndarray
    of_rows: bool

    @property
    def each(self) -> int:
        """How many each row has."""
        return 1 if self.of_rows else len(self.values)

    def at(self, which: np.ndarray) -> np.ndarray:
        """[N or 1, points, *row] the baselines of some points."""
        return self.values if self.of_rows else self.values[which][None]


def baselines_of(baseline: Any, population: Any, rows: Packed) -> Baselines:
    """The baselines of `integrated_gradients`; ValueError where they do not fit the rows."""
    kind, row = rows.values.dtype, rows.row
    if population is not None:
        if baseline is not None:
            raise ValueError("population: expected None, because there is a baseline")
        given = as_array("population", population).astype(kind)
        if given.shape[1:] != row or not len(given):
            wanted = "[" + ", ".join(map(str, ("rows", *row))) + "]"
            raise ValueError(
                f"population: expected {wanted}, one or more for all tasks together, "
                f"got shape {list(given.shape)}"
            )
        return Baselines(given, False)
    if baseline is None:
        return Baselines(np.zeros((1, *row), kind), False)
    given, tasks = as_array("baseline", baseline).astype(kind), len(rows.sizes)
    if given.shape == row:
        return Baselines(given[None], False)
    if given.shape != (tasks, *row):
        raise ValueError(
            f"baseline: expected a row {list(row)}, or one for each task {[tasks, *row]}, "
            f"got shape {list(given.shape)}"
        )
    return Baselines(np.repeat(given, rows.sizes, 0)[:, None], True)
