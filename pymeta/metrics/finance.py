"""Figures of a time series of returns, of cross-sections, and of a population that shifts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pymeta.metrics.base import _checked
from pymeta.metrics.scores import ic
from pymeta.tasks.groups import Array

_LEAST_SHARE = 1e-4  # of an empty bin, for a finite index


def r2_out_of_sample(y: Any, p: Any, baseline: Any) -> float:
    """1 - sum (y - p)^2 / sum (y - baseline)^2 (Campbell and Thompson 2008).

    Args:
        y: [rows], the targets.
        p: [rows], the predictions.
        baseline: [rows], or one number: what is predicted without a model, such as the mean of
            what was known before.
    """
    y, p = _checked("y", y, None), _checked("p", p, len(y))
    base = np.broadcast_to(np.asarray(baseline, dtype=np.float64), y.shape)
    return float(1 - ((y - p) ** 2).sum() / ((y - base) ** 2).sum())


def psi(expected: Any, actual: Any, *, bins: int = 10) -> float:
    """The population stability index of two samples of a number (a score, a feature).

    sum (a - e) log(a / e) over the shares of both samples in bins that are quantiles of the first.
    By custom, less than 0.1 is stable and more than 0.25 has shifted.

    Args:
        expected: [rows], what was when the model was made.
        actual: [rows], what is now.
        bins: how many there are.
    """
    expected, actual = _checked("expected", expected, None), _checked("actual", actual, None)
    if not len(expected) or not len(actual):
        raise ValueError("expected, actual: expected rows in both, got none in one of them")
    edges = np.unique(np.quantile(expected, np.linspace(0, 1, bins + 1)[1:-1]))
    shares = []
    for values in (expected, actual):
        counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
        shares.append(np.maximum(counts / len(values), _LEAST_SHARE))
    e, a = shares
    return float(((a - e) * np.log(a / e)).sum())


class Cross(NamedTuple):
    """Information coefficients, period by period.

    Attributes:
        values: [periods], the correlation of each cross-section; NaN where it is not defined.
        mean: of them.
        ir: mean / standard deviation (ICIR).
    """

    values: Array
    mean: float
    ir: float


def _ranks(values: Array, codes: Array) -> Array:
    """Ranks within groups, the mean of tied ones."""
    order = np.lexsort((values, codes))
    v, c = values[order], codes[order]
    begins = np.flatnonzero(np.r_[True, (v[1:] != v[:-1]) | (c[1:] != c[:-1])])
    sizes = np.diff(np.r_[begins, len(v)])
    ranks = np.empty(len(v))
    ranks[order] = np.repeat(begins + (sizes - 1) / 2, sizes)
    return ranks


def information_coefficient(y: Any, p: Any, period: Any, *, ranks: bool = False) -> Cross:
    """The correlation of predictions with outcomes across entities, period by period.

    Args:
        y: [rows], what came.
        p: [rows], what was predicted.
        period: [rows], labels of the periods (days).
        ranks: Spearman's (rank IC) instead of Pearson's.

    Example:
        >>> from pymeta.metrics import information_coefficient
        >>> day = [1, 1, 1, 2, 2, 2]
        >>> information_coefficient([1, 2, 3, 1, 2, 3], [1, 2, 4, 3, 2, 1], day, ranks=True).mean
        0.0
    """
    y, p = ic.check(y, p)
    periods, codes = np.unique(np.asarray(period), return_inverse=True)
    if codes.shape != y.shape:
        raise ValueError(f"period: expected shape [{len(y)}], as y has, got {list(codes.shape)}")
    if ranks:
        y, p = _ranks(y, codes), _ranks(p, codes)
    centred = []
    for values in (y, p):  # or moments of large numbers cancel
        n = np.bincount(codes)
        centred.append(values - (np.bincount(codes, values) / n)[codes])
    values = ic.by_group(centred[0], centred[1], codes, len(periods))
    known = values[np.isfinite(values)]
    spread = float(known.std(ddof=1)) if len(known) > 1 else float("nan")
    mean = float(known.mean()) if len(known) else float("nan")
    return Cross(values, mean, mean / spread if spread > 0 else float("nan"))


def sharpe(returns: Any, *, periods: int = 252) -> float:
    """Mean over standard deviation of returns in excess of cash, for a year of `periods`.

    Args:
        returns: [periods], simple returns.
        periods: how many a year has.
    """
    returns = _checked("returns", returns, None)
    spread = returns.std(ddof=1) if len(returns) > 1 else 0.0
    return float(returns.mean() / spread * np.sqrt(periods)) if spread > 0 else float("nan")


def drawdown(returns: Any) -> float:
    """The largest fall of wealth from a peak, as a share of the peak: 0 to 1.

    Args:
        returns: [periods], simple returns, > -1.
    """
    returns = _checked("returns", returns, None)
    wealth = np.concatenate([[1.0], np.cumprod(1 + returns)])
    return float((1 - wealth / np.maximum.accumulate(wealth)).max())


def turnover(weights: Any, returns: Any = None) -> float:
    """The mean share of wealth that is traded in a period: half the sum of absolute changes.

    Args:
        weights: [periods, assets], chosen at the beginning of each period.
        returns: [periods, assets], by which weights drift until the next choice; None for none.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 2:
        raise ValueError(f"weights: expected shape [periods, assets], got {list(weights.shape)}")
    held = weights[:-1]
    if returns is not None:
        returns = np.asarray(returns, dtype=np.float64)
        if returns.shape != weights.shape:
            raise ValueError(
                f"returns: expected shape {list(weights.shape)}, got {list(returns.shape)}"
            )
        growth = 1 + (weights[:-1] * returns[:-1]).sum(axis=1, keepdims=True)
        held = weights[:-1] * (1 + returns[:-1]) / growth
    return float(np.abs(weights[1:] - held).sum(axis=1).mean() / 2) if len(held) else 0.0
