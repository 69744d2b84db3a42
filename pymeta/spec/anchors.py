"""The pull of adaptation towards its start: L2-SP (Li, Grandvalet, Davoine 2018, 1802.01483)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pymeta.spec.optimizers import check_number


@dataclass(frozen=True)
class Anchor:
    """The penalty s/2 |theta - start|^2 on what is adapted.

    Attributes:
        strength: s, of every task.
        rows: in its place: s is this over the number of the task's rows that count, so that the
            start is worth as much as so many rows.
    """

    strength: float = 0.0
    rows: float = 0.0

    def of(self, rows: int) -> float:
        """The strength s for a task of so many rows."""
        return self.rows / max(rows, 1) if self.rows else self.strength


NO_ANCHOR = Anchor()


def check_anchor(anchor: Any, anchor_rows: Any) -> Anchor:
    """The anchor that these options of a learner describe.

    Raises:
        TypeError, ValueError: one of them is out of its range, or both are given.
    """
    if np.ndim(anchor):
        raise TypeError(
            f"anchor: expected a number, got {type(anchor).__name__}; a strength for each task "
            f"goes into the call, as anchor=[T]"
        )
    strength = check_number("anchor", anchor)
    if anchor_rows is None:
        return Anchor(strength)
    rows = check_number("anchor_rows", anchor_rows, above=True)
    if strength:
        raise ValueError(f"anchor, anchor_rows: expected one of them, got {anchor} and {rows}")
    return Anchor(0.0, rows)
