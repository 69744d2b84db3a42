"""Reason codes: the few columns that moved a decision most, by the names that its owner knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pymeta.explain.attributions import Attributions
from pymeta.explain.rows import Packed
from pymeta.spec.show import counted

_SIGNS = ("both", "up", "down")


class ReasonCodes(NamedTuple):
    """The columns that moved each row's prediction most, the strongest first.

    A row has fewer reasons than `most` where fewer columns moved it that way; the places left over
    hold column -1 and amount 0.

    Attributes:
        names: what the columns are called.
        columns: int64 [T, rows, most] (or ragged), positions in `names`.
        amounts: [T, rows, most] (or ragged), by how much each moved the output.
    """

    names: tuple[str, ...]
    columns: Any
    amounts: Any

    def of(self, task: int, row: int) -> list[tuple[str, float]]:
        """One row's reasons: (name, amount)."""
        pairs = zip(self.columns[task][row], self.amounts[task][row], strict=True)
        return [(self.names[c], float(a)) for c, a in pairs if c >= 0]

    def texts(self, task: int, row: int) -> list[str]:
        """One row's reasons as lines: "income: -0.42"."""
        return [f"{name}: {amount:+.3g}" for name, amount in self.of(task, row)]


def reason_codes(
    attributions: Attributions,
    names: Any = None,
    *,
    most: int = 4,
    sign: str = "both",
) -> ReasonCodes:
    """The columns that moved each decision most.

    Args:
        attributions: of rows with one axis of features, as `integrated_gradients` returns; with
            `population=` they say what sets a row apart from those rows.
        names: a fitted `pymeta.data.Preprocessor`, whose features are added up by the column that
            they were made of (all one-hot columns of a category, a number and whether it was
            missing); or a name for each feature, equal ones being added up; None for x0, x1, ...
        most: how many reasons a row has at most.
        sign: "up" for what made the output larger alone (the reasons of a declined credit, where
            the output is the risk), "down" for what made it smaller, or "both".

    Raises:
        TypeError: `attributions` or `names` are something else.
        ValueError: an option is out of range, or names and features differ in number.

    Example:
        >>> import numpy as np
        >>> from pymeta.explain import Attributions, reason_codes
        >>> values = np.array([[[0.5, -0.2, 0.1, -0.4]]])
        >>> found = Attributions(values, np.zeros((1, 1), int), values.sum(2))
        >>> reason_codes(found, ["income", "region", "age", "region"], most=2).texts(0, 0)
        ['region: -0.6', 'income: +0.5']
        >>> reason_codes(found, ["income", "region", "age", "region"], sign="up").texts(0, 0)
        ['income: +0.5', 'age: +0.1']
    """
    if not isinstance(attributions, Attributions):
        raise TypeError(
            f"attributions: expected Attributions, as integrated_gradients returns, got "
            f"{type(attributions).__name__}"
        )
    if isinstance(most, bool) or not isinstance(most, (int, np.integer)) or most < 1:
        raise ValueError(f"most: expected an integer >= 1, got {most!r}")
    if sign not in _SIGNS:
        raise ValueError(f"sign: expected one of {', '.join(_SIGNS)}, got {sign!r}")
    rows = Packed.of("attributions", attributions.values)
    if len(rows.row) != 1:
        raise ValueError(
            f"attributions: expected rows with one axis of features, got rows of shape "
            f"{list(rows.row)}"
        )
    known, groups = _grouped(names, rows.row[0])
    moved = np.zeros((len(rows.values), len(known)), rows.values.dtype)
    np.add.at(moved.T, groups, rows.values.T)
    columns, amounts = _strongest(moved, int(most), sign)
    return ReasonCodes(known, rows.shaped(columns), rows.shaped(amounts))


def _grouped(names: Any, features: int) -> tuple[tuple[str, ...], np.ndarray]:
    """The columns' names, and which of them each feature belongs to."""
    if names is None:
        names = [f"x{f}" for f in range(features)]
    elif hasattr(names, "sources"):
        names = names.sources
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"names: expected a fitted Preprocessor or a list of {counted(features, 'name')}, got "
            f"{type(names).__name__}"
        )
    if len(names) != features:
        raise ValueError(f"names: expected {features}, one for each feature, got {len(names)}")
    known = tuple(dict.fromkeys(map(str, names)))
    place = {name: i for i, name in enumerate(known)}
    return known, np.array([place[str(name)] for name in names], np.int64)


def _strongest(moved: np.ndarray, most: int, sign: str) -> tuple[np.ndarray, np.ndarray]:
    """[N, most] columns and amounts; what is 0, not finite or of the wrong sign is none."""
    key = np.abs(moved) if sign == "both" else moved if sign == "up" else -moved
    key = np.where(np.isfinite(key) & (key > 0), key, 0)
    order = np.argsort(-key, axis=1, kind="stable")[:, :most]
    each = np.arange(len(moved))[:, None]
    there = key[each, order] > 0
    columns = np.full((len(moved), most), -1, np.int64)
    amounts = np.zeros((len(moved), most), moved.dtype)
    columns[:, : order.shape[1]] = np.where(there, order, -1)
    amounts[:, : order.shape[1]] = np.where(there, moved[each, order], 0)
    return columns, amounts
