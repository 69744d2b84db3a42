"""Groups of assets, period by period: what is known when weights are chosen, and what came."""

from __future__ import annotations

import numpy as np

from pymeta.finance.portfolio import inverse_volatility
from pymeta.finance.prices import Prices
from pymeta.tasks.groups import Array

WARM = 252  # days before the first period
FEATURES = 6
_MOMENTUM = ((None, -21), (-63, None), (-21, None), (-5, None))  # days of the year before


class Periods:
    """A group of assets, period by period.

    Args:
        close: [assets, days], without gaps.
        days: of a period.

    Attributes:
        x: [periods, assets, features], known when the period begins.
        y: [periods, assets], returns of the period, centred and scaled across assets.
        base: [periods, assets], weights of inverse volatility.
        past: the daily returns [252, assets] before each period.
        growth: [periods, days, assets].
    """

    def __init__(self, close: Array, days: int) -> None:
        """Make the features."""
        log = np.log(close).T  # [days, assets]
        begins = np.arange(WARM, len(log) - days, days)
        daily = np.diff(log, axis=0)
        self.past = [daily[b - WARM : b] for b in begins]
        self.growth = np.stack([np.exp(log[b + 1 : b + days + 1] - log[b]) for b in begins])
        total = np.log(self.growth[:, -1])
        self.y = _standard(total).astype(np.float32)
        self.base = np.stack([inverse_volatility(p[-60:]) for p in self.past]).astype(np.float32)
        self.x = np.stack([_features(p) for p in self.past]).astype(np.float32)


def _standard(values: Array) -> Array:
    """Centred and scaled across the last axis, clipped."""
    centred = values - values.mean(axis=-1, keepdims=True)
    return np.asarray(np.clip(centred / (centred.std(axis=-1, keepdims=True) + 1e-9), -3, 3))


def _features(past: Array) -> Array:
    """Momentum, reversal, volatility and its change, of daily returns [252, assets]."""
    spread = past[-60:].std(axis=0)
    calm, recent = np.log(spread + 1e-6), np.log(past[-10:].std(axis=0) + 1e-6)
    sums = [past[first:last].sum(axis=0) for first, last in _MOMENTUM]
    raw = [*sums, calm, recent - calm]
    return np.stack([_standard(v) for v in raw], axis=1)


def groups_of(prices: Prices, size: int, days: int, seed: int = 0) -> dict[str, Periods]:
    """The groups: sectors where they are known, otherwise random ones, of stocks without gaps."""
    close = prices.close
    whole = np.isfinite(close).all(axis=1)
    names = prices.groups
    if names is None:
        count = max(int(whole.sum()) // size, 1)
        names = np.random.default_rng(seed).permutation(len(close)) % count
    found = {}
    for name in np.unique(names[whole]):
        mine = np.flatnonzero(whole & (names == name))
        if len(mine) >= 4:
            found[str(name)] = Periods(close[mine[:size]], days)
    if len(found) < 2:
        raise ValueError(f"data: expected two groups of four stocks without gaps, got {len(found)}")
    return found


def until(group: Periods, period: int) -> Periods:
    """The periods before one."""
    twin = object.__new__(Periods)
    twin.x, twin.y, twin.base = group.x[:period], group.y[:period], group.base[:period]
    twin.past, twin.growth = group.past[:period], group.growth[:period]
    return twin
