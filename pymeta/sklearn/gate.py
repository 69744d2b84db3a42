"""The gate: a group keeps its own model only where its own later rows do not speak against it.

A group's rows say little: the mean gain d of some held-out rows (the loss of the model it would
fall back to, less that of its own) has a standard error s. What other groups gained says more. With

    gain of a group ~ N(m, v),    d ~ N(gain, s^2)

m and v estimated on groups held out of training, the expected gain is

    (v d + s^2 m) / (v + s^2)

and a group whose expected gain is below 0 falls back (empirical Bayes, as in James and Stein 1961).
Where nothing is known of other groups, it falls back where d < -s: its rows have to say so.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pymeta.tasks.groups import Array

_BORROWED = 5  # rows whose variance is that of all groups' rows


class Prior(NamedTuple):
    """What groups gain by models of their own.

    Attributes:
        mean: m.
        variance: v, between groups.
        of_rows: the variance of a row's gain within a group.
    """

    mean: float
    variance: float
    of_rows: float


class Gains(NamedTuple):
    """The gain of each group.

    Attributes:
        mean: [groups], d.
        squares: [groups], the sum of squares around it.
        rows: [groups], of how many rows.
    """

    mean: Array
    squares: Array
    rows: Array


def gains(losses: Array, own: Array, codes: Array, groups: int) -> Gains:
    """The gains of groups from rows' losses without and with models of their own.

    Args:
        losses: [rows], those of the model to fall back to.
        own: [rows], those of the groups' own.
        codes: [rows], whose each row is, below `groups`; a group may have none.
        groups: how many there are.
    """
    rows = np.bincount(codes, minlength=groups)
    gain = losses - own
    mean = np.bincount(codes, gain, groups) / np.maximum(rows, 1)
    squares = np.bincount(codes, np.square(gain - mean[codes]), groups)
    return Gains(mean, squares, rows)


def prior_of(found: Gains) -> Prior | None:
    """What the gains of held-out groups say; None of fewer than three groups with two rows."""
    counted = (found.rows >= 2) & np.isfinite(found.mean)
    if counted.sum() < 3:
        return None
    d, squares, rows = (v[counted] for v in found)
    of_rows = float(squares.sum() / (rows - 1).sum())
    errors = of_rows / rows
    variance = float(max(d.var(ddof=1) - errors.mean(), 0.0))
    shares = 1 / (variance + errors) if variance + of_rows > 0 else np.ones_like(d)
    return Prior(float((shares * d).sum() / shares.sum()), variance, of_rows)


def keeps(found: Gains, prior: Prior | None) -> Array:
    """Which groups keep models of their own, bool [groups]; those without rows do."""
    d, squares, rows = found
    # A few rows do not know their own variance: some of all groups' is lent to them.
    lent = 0 if prior is None else _BORROWED
    of_rows = 0.0 if prior is None else prior.of_rows
    variance = (squares + lent * of_rows) / np.maximum(rows - 1 + lent, 1)
    errors = variance / np.maximum(rows, 1)
    if prior is None:
        expected = d + np.sqrt(errors)
    else:
        total = np.maximum(prior.variance + errors, np.finfo(float).tiny)
        expected = (prior.variance * d + errors * prior.mean) / total
    # what is not finite is no gain
    return np.asarray((rows == 0) | (expected >= 0))
