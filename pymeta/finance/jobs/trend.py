"""Trend: which stocks do better than others in the next days, by DoubleAdapt.

Features are ranks across stocks of a day (momentum of 5 to 250 days, the last day's return, three
volatilities), the target is the rank of the next `horizon` days' return. The pooled linear model is
the offset; the remainder is adapted to the cross-sections of the last `days` whose outcome is known
and walked through the query. With `incremental`, the maps and the start themselves first
take a few steps on the last stretch of days that has become known.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pymeta.data import Panel
from pymeta.finance.double_adapt import DoubleAdapt
from pymeta.finance.pooled import Pooled
from pymeta.finance.prices import Prices, read_prices
from pymeta.finance.result import Result, Say, compared, result, silent
from pymeta.finance.stretches import Stretches, ranks
from pymeta.finance.walk import Walking
from pymeta.metrics.baselines import Pooled as PooledRival
from pymeta.tasks.groups import Array

LAGS = (1, 5, 21, 63, 126, 250)
VOLATILITIES = (5, 21, 63)
_STOCKS = 64  # of a training task


def trend_panel(prices: Prices, horizon: int = 5, *, target: bool = True) -> Panel:
    """Rows of ranks, for every stock and day with a price and one `horizon` days later.

    Args:
        prices: of `read_prices`.
        horizon: days ahead.
        target: whether rows need a target.
    """
    log = np.log(prices.close)
    columns = {}
    for lag in LAGS:
        moved = np.full(log.shape, np.nan)
        moved[:, lag:] = log[:, lag:] - log[:, :-lag]
        columns[f"return {lag}"] = ranks(moved)
    daily = prices.returns
    for days in VOLATILITIES:
        sums = np.cumsum(np.nan_to_num(daily**2), axis=1)
        sums[:, days:] -= sums[:, :-days].copy()
        columns[f"volatility {days}"] = ranks(np.where(np.isfinite(daily), sums, np.nan))
    ahead = np.full(log.shape, np.nan)
    ahead[:, :-horizon] = log[:, horizon:] - log[:, :-horizon]
    y, warm = ranks(ahead), np.arange(log.shape[1]) >= LAGS[-1]
    kept = np.isfinite(log) & warm & (np.isfinite(y) if target else True)
    if not kept.any():
        raise ValueError(f"data: expected more than {LAGS[-1] + horizon} days of prices, got "
                         f"{len(prices.days)}")  # fmt: skip
    table = {
        "stock": np.broadcast_to(prices.names[:, None], kept.shape)[kept],
        "day": np.broadcast_to(prices.days, kept.shape)[kept],
    }
    table |= {name: np.nan_to_num(values[kept]) for name, values in columns.items()}
    if target:
        table["rank"] = y[kept]
    return Panel(
        table, entity="stock", time="day", target="rank" if target else None, numeric=list(columns)
    )


class Trend:
    """A model for `compare`: the pooled linear model, and DoubleAdapt on what it leaves.

    Args:
        days: of a stretch.
        horizon: days until a target is known.
        maps: whether there are maps of features and targets.
        incremental: whether maps and start first take steps on the last stretch that is known.
        steps: of training.
        seed: of everything random.
    """

    adapts = True

    def __init__(
        self,
        days: int,
        horizon: int,
        *,
        maps: bool = True,
        incremental: bool = True,
        steps: int = 150,
        seed: int = 0,
    ) -> None:
        """Keep the settings."""
        self.days, self.horizon, self.maps, self.incremental = days, horizon, maps, incremental
        self.steps, self.seed = steps, seed

    def fit(self, train: Panel) -> Trend:
        """Fit the pooled model and train the maps, the start and the step sizes."""
        self.pooled = Pooled("linear", prep={"scale": None, "clip": None}, seed=self.seed)
        self.pooled.fit(train)
        torch.manual_seed(self.seed)
        self.learner = DoubleAdapt(train.x.shape[1], maps=self.maps)
        self.rng, grid = np.random.default_rng(self.seed), self._grid(train)
        adam = torch.optim.Adam(self.learner.parameters(), 3e-3)
        last = len(grid.y) - 2 * self.days - self.horizon
        if last < 1:
            raise ValueError(f"days: expected training of {2 * self.days + self.horizon} days or "
                             f"more, got {len(grid.y)}")  # fmt: skip
        for _ in range(self.steps):
            self._step(grid, self.rng.integers(0, last, 8), adam)
        return self

    def _grid(self, panel: Panel) -> Stretches:
        prepared = self.pooled.prep(panel)
        residual = self.pooled.targets(panel) - self.pooled.offset(panel, prepared.x)[:, 0]
        return Stretches(prepared, residual)

    def _step(self, grid: Stretches, first: Array, adam: Any) -> None:
        """One step on tasks that begin at these days, of some stocks each."""
        count = min(_STOCKS, grid.y.shape[1])
        stocks = np.stack([self.rng.permutation(grid.y.shape[1])[:count] for _ in first])
        xs, ys, ws = grid.part(first, self.days, stocks)
        xq, yq, wq = grid.part(first + self.days + self.horizon, self.days, stocks)
        adam.zero_grad()
        loss = (wq * (self.learner(xs, ys, xq, ws) - yq) ** 2).sum() / wq.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        adam.step()

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """[rows of query]; the history's last `days` are adapted to."""
        prepared = self.pooled.prep(query)
        base = self.pooled.offset(query, prepared.x)[:, 0].astype(np.float64)
        learner, xs, ys, ws = self.learner, None, None, None
        width = prepared.x.shape[1]
        if history is None:
            xs, ys, ws = torch.zeros(1, 1, width), torch.zeros(1, 1), torch.zeros(1, 1)
        else:
            grid = self._grid(history)
            stocks, days = np.arange(grid.y.shape[1])[None], min(self.days, len(grid.y))
            if self.incremental and len(grid.y) >= 2 * self.days + self.horizon:
                learner = self._caught_up(grid)
            xs, ys, ws = grid.part(np.array([len(grid.y) - days]), days, stocks)
        with torch.no_grad():
            found = learner(xs, ys, torch.as_tensor(prepared.x)[None], ws)[0].numpy()
        return self.pooled.back((base + found).astype(np.float64))

    def _caught_up(self, grid: Stretches) -> DoubleAdapt:
        """The learner after steps on the stretch before last, predicted from the one before it."""
        own = copy.deepcopy(self)
        adam = torch.optim.Adam(own.learner.parameters(), 1e-3)
        first = np.full(4, len(grid.y) - 2 * self.days - self.horizon)
        for _ in range(3):
            own._step(grid, first, adam)
        return own.learner

    def save(self, folder: Any) -> list[Path]:
        """Write adapter.safetensors, of mapped rows, and maps.npz; their paths."""
        paths = [Path(folder) / "adapter.safetensors", Path(folder) / "maps.npz"]
        self.learner.maml.adapter().save(paths[0])
        maps = {k: v.numpy() for k, v in self.learner.state_dict().items() if "." not in k}
        fitted = self.pooled.fitted
        np.savez(paths[1], **maps, coef=fitted.coef_, intercept=np.asarray(fitted.intercept_))
        return paths

    @property
    def adapter(self) -> Any:
        """The `pymeta.Adapter` of mapped rows."""
        return self.learner.maml.adapter()


def trend(
    data: Any,
    *,
    columns: Mapping[str, str] | None = None,
    days: int = 20,
    horizon: int = 5,
    at: str | None = None,
    share: float = 0.3,
    incremental: bool = True,
    seeds: int = 3,
    quick: bool = False,
    say: Say = silent,
) -> Result:
    """Compare the correlation of predictions with later ranks, walking through time.

    Args:
        data: prices, as `pymeta.finance.read_prices` takes them; closes are enough.
        columns: what a table's columns are called, {"entity": ..., "time": ..., "close": ...,
            "open": ..., "high": ..., "low": ...}, as there.
        days: the days in a stretch that is adapted to, and in one that is predicted.
        horizon: how many days ahead.
        at: the first day that is predicted; by default after seven tenths of the time.
        share: the share of stocks that is tested and not trained on.
        incremental: whether the maps and the start first take steps on the last known stretch.
        seeds: how many runs, each with other tested stocks and other starts.
        quick: use one seed and fewer training steps, to see it run.
        say: is told of progress.

    Returns:
        The `Result`. IC is the correlation of predicted and later ranks.

    Raises:
        ImportError: a package of the extra `finance` is missing.
        TypeError, ValueError: an argument is not as described.
    """
    panel = trend_panel(read_prices(data, columns), horizon)
    late = np.timedelta64(7 * (horizon // 5) + 2 * (horizon % 5), "D")  # weekends are days, too
    steps = 20 if quick else 150

    def models(seed: int) -> dict[str, Any]:
        kept: dict[str, Any] = {"every": days, "gap": late, "history": 3 * days + horizon}
        made: dict[str, Any] = {"incremental": incremental, "steps": steps, "seed": seed}
        refit = Walking(PooledRival("identity", None), every=days, gap=late, refit=True)
        return {
            "DoubleAdapt": Walking(Trend(days, horizon, **made), **kept),
            "MAML, without maps": Walking(Trend(days, horizon, maps=False, **made), **kept),
            "pooled linear, fitted again": refit,
        }

    found, _ = compared(
        lambda seed: panel,
        models,
        seeds=1 if quick else seeds,
        say=say,
        metrics=["ic", "mse"],
        at=at,
        gap=late,
        share=share,
        block=days,
        stress=False,
        draws=200 if quick else 1000,
    )
    settings = {"days": days, "horizon": horizon, "incremental": incremental, "seeds": len(found)}
    final = Trend(days, horizon, incremental=incremental, steps=steps)
    return result("trend", found, lambda: final.fit(panel), say, settings)
