"""Portfolios of groups of assets: bounded weights, rivals, returns net of costs, and a report.

Time goes in periods: weights are chosen at the beginning of one and drift within it.

    growth [periods, days, assets]   value at each day's end of 1 at the period's beginning
    weights [periods, assets]        chosen; what is not invested is cash at rate 0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymeta.metrics import Interval, Line, Pair, Report, Score, drawdown, sharpe
from pymeta.tasks.groups import Array

_YEAR = 252


@dataclass(frozen=True)
class Bounds:
    """What a portfolio may be.

    Attributes:
        long_only: whether no weight is below 0.
        leverage: the sum of the weights' sizes.
        turnover: the most that is traded at once, as a share of wealth: half the sum of the
            weights' changes; None for any.
        cost: of a trade, as a share of what is traded (0.001 are ten basis points).
    """

    long_only: bool = True
    leverage: float = 1.0
    turnover: float | None = None
    cost: float = 0.001

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.leverage > 0:
            raise ValueError(f"leverage: expected a number > 0, got {self.leverage!r}")
        if self.turnover is not None and not self.turnover > 0:
            raise ValueError(f"turnover: expected a number > 0 or None, got {self.turnover!r}")
        if not 0 <= self.cost < 1:
            raise ValueError(f"cost: expected a number from 0 up to 1, got {self.cost!r}")

    def weights(self, scores: Tensor, base: Tensor) -> Tensor:
        """Weights [..., assets] of scores; scores of 0 give those of `base`, scaled to leverage.

        Args:
            scores: [..., assets].
            base: [..., assets], > 0, of sum 1.
        """
        if self.long_only:
            return self.leverage * (base.log() + scores).softmax(-1)
        raw = base + (scores - scores.mean(-1, keepdim=True)) * base
        return self.leverage * raw / raw.abs().sum(-1, keepdim=True).clamp_min(1e-9)

    def within(self, wanted: Tensor, held: Tensor) -> Tensor:
        """As near to the wanted weights [..., assets] as turnover allows, from those held."""
        if self.turnover is None:
            return wanted
        traded = (wanted - held).abs().sum(-1, keepdim=True) / 2
        return held + (wanted - held) * (self.turnover / traded.clamp_min(1e-9)).clamp_max(1.0)


def drifted(weights: Tensor, growth: Tensor) -> Tensor:
    """Weights [..., assets] at the end of a period in which assets grew so much [..., assets]."""
    value = 1 + (weights * (growth - 1)).sum(-1, keepdim=True)
    return weights * growth / value


def inverse_volatility(returns: Array) -> Array:
    """Weights of past daily returns [days, assets]."""
    spread = np.maximum(np.nanstd(returns, axis=0), 1e-6)
    return np.asarray((1 / spread) / (1 / spread).sum())


def minimum_variance(returns: Array, shrink: float = 0.3) -> Array:
    """Long-only weights of least variance of past daily returns [days, assets].

    The covariance is drawn towards its diagonal; weights below 0 are dropped until none is left.
    """
    clean = np.nan_to_num(returns - np.nanmean(returns, axis=0))
    covariance = clean.T @ clean / len(clean)
    covariance = (1 - shrink) * covariance + shrink * np.diag(np.diag(covariance))
    covariance += 1e-9 * np.eye(len(covariance))
    kept = np.arange(len(covariance))
    while True:
        raw = np.linalg.solve(covariance[np.ix_(kept, kept)], np.ones(len(kept)))
        if (raw > 0).all():
            break
        kept = kept[raw > 0]
    out = np.zeros(len(covariance))
    out[kept] = raw / raw.sum()
    return out


def simulate(
    choose: Callable[[int, Tensor], Tensor], growth: Array, bounds: Bounds
) -> tuple[Array, float]:
    """Daily returns net of costs, and the mean turnover of a period.

    Args:
        choose: of the period and the weights held [assets], the weights wanted.
        growth: [periods, days, assets].
        bounds: of turnover and costs.
    """
    periods, days, assets = growth.shape
    held, returns, traded = torch.zeros(assets), np.empty((periods, days)), np.empty(periods)
    for k in range(periods):
        wanted = choose(k, held)
        weights = wanted if k == 0 else bounds.within(wanted, held)  # the first is bought whole
        traded[k] = float((weights - held).abs().sum() / 2)
        grown = torch.as_tensor(growth[k], dtype=torch.float32)
        value = 1 + ((grown - 1) * weights).sum(-1).numpy().astype(np.float64)
        value = np.maximum(value - 2 * traded[k] * bounds.cost, 1e-6)
        returns[k] = value / np.concatenate([[1.0], value[:-1]]) - 1
        held = drifted(weights, grown[-1])
    return returns.reshape(-1), float(traded[1:].mean()) if periods > 1 else 0.0


# ---- the report ---------------------------------------------------------------------------------


def _growth(returns: Array) -> float:
    return float(np.log1p(returns).mean() * _YEAR)


STATISTICS: dict[str, Callable[[Array], float]] = {
    "log wealth a year": _growth,
    "Sharpe": sharpe,
}


def _draws(returns: Array, statistic: Callable[[Array], float], by: str, block: int) -> Array:
    """A statistic of the mean over groups [groups, days], of 500 draws of groups or of blocks."""
    rng, (groups, days) = np.random.default_rng(0), returns.shape
    found = []
    for _ in range(500):
        if by == "groups":
            found.append(statistic(returns[rng.integers(0, groups, groups)].mean(axis=0)))
        else:
            first = rng.integers(0, days // block, days // block) * block
            rows = (first[:, None] + np.arange(block)).reshape(-1)
            found.append(statistic(returns[:, rows].mean(axis=0)))
    return np.array(found)


def portfolio_report(
    runs: Mapping[str, tuple[Array, float, float, float]], block: int, facts: dict[str, str]
) -> Report:
    """A report of returns, ours first.

    Args:
        runs: {name: (daily returns [groups, days], turnover, seconds to fit, seconds to choose)}.
        block: days of a block of the bootstrap.
        facts: what was compared.
    """
    draws = {
        (name, metric, by): _draws(run[0], statistic, by, block)
        for name, run in runs.items()
        for metric, statistic in STATISTICS.items()
        for by in ("groups", "blocks of time")
    }
    values = {
        (n, m): f(run[0].mean(axis=0)) for n, run in runs.items() for m, f in STATISTICS.items()
    }
    ours, *rivals = runs
    sizes = {"groups": len(runs[ours][0]), "blocks of time": runs[ours][0].shape[1] // block}
    lines = []
    for name, (returns, turnover, fit, predict) in runs.items():
        found = [(m, values[name, m], _mean_of_groups(returns, f)) for m, f in STATISTICS.items()]
        found.append(("turnover", turnover, turnover))
        falls = [drawdown(r) for r in returns]
        found.append(("drawdown", drawdown(returns.mean(axis=0)), float(np.mean(falls))))
        scores = [Score(m, v, macro, len(returns), {}, {}) for m, v, macro in found]
        ends = [_interval(values[name, m], draws[name, m, "blocks of time"]) for m in STATISTICS]
        lines.append(Line(name, name == ours, scores, [*ends, None, None], fit, predict))
    pairs = [
        Pair(
            ours, theirs, m, True, (values[ours, m], values[theirs, m]),
            {
                by: _interval(values[ours, m] - values[theirs, m],
                              draws[ours, m, by] - draws[theirs, m, by])
                for by in sizes if sizes[by] > 1
            },
            sizes,
        )
        for m in STATISTICS
        for theirs in rivals
    ]  # fmt: skip
    return Report(lines, pairs, [], [], [*STATISTICS, "turnover", "drawdown"], facts)


def _mean_of_groups(returns: Array, statistic: Callable[[Array], float]) -> float:
    return float(np.mean([statistic(r) for r in returns]))


def _interval(value: float, draws: Array) -> Interval:
    known: Any = draws[np.isfinite(draws)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return Interval(value, float(low), float(high))
