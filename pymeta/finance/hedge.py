"""Regressions of many stocks on the market, and the noise of each: of 20 days or 200.

A stock's residual variance is drawn towards that of all by as much as such variances differ beyond
what so few days explain (Smyth 2004, "Linear models and empirical Bayes methods for assessing
differential expression", limma's squeezed variances).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pymeta.data import Panel, Ragged
from pymeta.data.optional import need
from pymeta.tasks.groups import Array


def ols(x: Array, y: Array, codes: Array, groups: int) -> tuple[Array, Array, Array, Array]:
    """Each group's regression with an intercept: slope, residual variance, sum of squares, rows.

    A group of fewer than three rows, or whose x does not move, has NaN for a slope.
    """
    n = np.bincount(codes, minlength=groups).astype(np.float64)
    with np.errstate(all="ignore"):
        xc = x - (np.bincount(codes, x, groups) / n)[codes]
        yc = y - (np.bincount(codes, y, groups) / n)[codes]
        square = np.bincount(codes, xc * xc, groups)
        slope = np.where(
            (n > 2) & (square > 0), np.bincount(codes, xc * yc, groups) / square, np.nan
        )
        variance = np.bincount(codes, (yc - slope[codes] * xc) ** 2, groups) / (n - 2)
    return slope, variance, square, n


def variance_prior(variance: Array, freedom: Array) -> tuple[float, float]:
    """The degrees of freedom and the variance that a group's own is drawn to (Smyth 2004)."""
    special = need("scipy.special", "pymeta.finance.betas", "finance")
    digamma, polygamma = special.digamma, special.polygamma
    kept = np.isfinite(variance) & (variance > 0) & (freedom > 0)
    z, d = np.log(variance[kept]), freedom[kept] / 2
    if len(z) < 3:
        return 4.0, float(np.exp(z.mean())) if len(z) else 1.0
    e = z - digamma(d) + np.log(d)
    rest = float(e.var(ddof=1) - polygamma(1, d).mean())
    if rest <= 1e-6:
        return 1e3, float(np.exp(e.mean()))
    grid = np.geomspace(0.1, 500, 4000)
    half = float(grid[np.argmin(np.abs(polygamma(1, grid) - rest))])
    return 2 * half, float(np.exp(e.mean() + digamma(half) - np.log(half)))


def long_betas(returns: Array, market: Array, days: int, lag: int, worth: int = 60) -> Array:
    """Each stock's beta of the `days` days that ended `lag` days before: [stocks, days of data].

    Drawn towards 1, which counts as `worth` days, so that every day of every stock has one.

    Args:
        returns: [stocks, days of data], NaN where there is none.
        market: [days of data], likewise.
        days: that are looked at.
        lag: how old they are.
        worth: of the 1.
    """
    product = np.nan_to_num(returns * market)
    square = np.where(np.isfinite(returns), np.nan_to_num(market**2), 0.0)
    sums: list[Array] = []
    for values in (product, square):
        total = np.cumsum(values, axis=1)
        total[:, days:] -= total[:, :-days].copy()
        sums.append(total)
    known = worth * float(np.nanmean(market**2))
    beta = np.ones(returns.shape)
    beta[:, lag:] = (sums[0][:, : -lag or None] + known) / (sums[1][:, : -lag or None] + known)
    return beta


def features(panel: Panel) -> Array:
    """The market, 1 for alpha, and the market times what the long beta is above 1: [rows, 3]."""
    market = panel["market"]
    columns = [market, np.ones(len(market)), market * (panel["long beta"] - 1)]
    return np.stack(columns, axis=1).astype(np.float32)


def residual_variance(xs: Any, ys: Any) -> tuple[Array, Array]:
    """Each task's residual variance around its own regression, and its degrees of freedom."""
    sizes = np.array([len(y) for y in ys])
    codes = np.repeat(np.arange(len(sizes)), sizes)
    x = np.concatenate([np.asarray(v)[:, 0] for v in xs]).astype(np.float64)
    y = np.concatenate([np.asarray(v).reshape(-1) for v in ys]).astype(np.float64)
    _, variance, _, n = ols(x, y, codes, len(sizes))
    return variance, n - 2


def noise_of(xs: Any, ys: Any, freedom: float, usual: float) -> Array:
    """Each task's residual volatility, drawn to that of all: float32 [T]."""
    variance, own = residual_variance(xs, ys)
    own = np.where(np.isfinite(variance), np.maximum(own, 0), 0)
    sums = freedom * usual + own * np.where(own > 0, variance, 0)
    return np.asarray(np.sqrt(sums / (freedom + own)), dtype=np.float32)


def in_units_of_noise(panel: Panel, freedom: float, usual: float) -> tuple[Ragged, Ragged]:
    """All entities' rows as support, divided by their noise."""
    x, y = features(panel), panel.need_y()
    noise = noise_of(Ragged(x, panel.sizes), Ragged(y, panel.sizes), freedom, usual)
    each = np.repeat(noise, panel.sizes)
    return Ragged(x / each[:, None], panel.sizes), Ragged(y / each, panel.sizes)


class Estimate:
    """A rival for `compare`: betas by a formula, of the last days of each stock.

    Args:
        kind: "ols"; "pooled", the mean beta; or "vasicek", OLS drawn towards that mean by its own
            standard error and the betas' variance.
    """

    def __init__(self, kind: str) -> None:
        """Keep the kind."""
        self.kind = kind

    def fit(self, train: Panel) -> Estimate:
        """The mean and the variance of betas are of the cross-section at each time."""
        x, y = train["market"], train.need_y()
        self.mean = float(x @ y / (x @ x))
        return self

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """Beta times the market's return."""
        out = np.full(len(query), self.mean)
        if history is not None:
            beta = self._betas(history)
            at = np.searchsorted(history.entities, query.entities)
            at = np.minimum(at, len(beta) - 1)
            known = history.entities[at] == query.entities
            out = np.repeat(np.where(known, beta[at], self.mean), query.sizes)
        return np.asarray(out * query["market"])

    def _betas(self, history: Panel) -> Array:
        args = (history["market"], history.need_y().astype(np.float64), history.codes)
        beta, variance, square, _ = ols(*args, len(history.entities))
        if self.kind == "ols":
            return np.where(np.isfinite(beta), beta, self.mean)
        mean = float(np.nanmean(beta)) if np.isfinite(beta).any() else self.mean
        if self.kind == "pooled":
            return np.full(len(beta), mean)
        error = variance / square
        between = max(float(np.nanvar(beta) - np.nanmean(error)), 1e-6)
        shrunk = (beta / error + mean / between) / (1 / error + 1 / between)
        return np.where(np.isfinite(shrunk), shrunk, mean)
