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


@dataclass(frozen=True)
class LearnableAnchor:
    """A strength of the pull that is meta-learned with the parameters, by its logarithm.

    So it is positive whatever the outer optimiser does, and a step of that optimiser is a factor.
    As `MAML(anchor=LearnableAnchor(0.1))` it is the strength of every task, as
    `MAML(anchor_rows=LearnableAnchor(20))` it is divided by the rows of each task that count:
    what is learned is how many rows the start is worth.

    Args:
        initial: the value it begins with.

    Raises:
        TypeError, ValueError: `initial` is no finite number > 0.
    """

    initial: float

    def __post_init__(self) -> None:
        """Check the value."""
        value = check_number("LearnableAnchor.initial", self.initial, above=True)
        object.__setattr__(self, "initial", value)


def check_anchor(anchor: Any, anchor_rows: Any) -> Anchor:
    """The anchor that these options of a learner describe.

    Raises:
        TypeError, ValueError: one of them is out of its range, or both are given.
    """
    for name, value in (("anchor", anchor), ("anchor_rows", anchor_rows)):
        if isinstance(value, LearnableAnchor):
            raise TypeError(
                f"{name}: expected a number, got a LearnableAnchor, which only MAML can learn"
            )
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
