"""Betas: how much of the market every stock carries, from few days, as a hedge needs it.

`BayesianHead` with an identity for an encoder: a stock's beta (and alpha) have a prior that was
learned over other stocks by the hedge error of later days. Its mean is a line in the stock's beta
of the year before; without that it is Vasicek's estimate (1973). How firmly the prior holds is
chosen by the quarters that went worst, so that a rotation of the market does no harm. Stocks
differ in noise as well: rows are divided by the stock's own residual volatility, itself drawn
towards that of all (Smyth 2004), so that a quiet stock's days say more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from pymeta.data import Panel, Ragged
from pymeta.finance.deploy import adapter_of
from pymeta.finance.hedge import (
    Estimate,
    features,
    in_units_of_noise,
    long_betas,
    noise_of,
    residual_variance,
    variance_prior,
)
from pymeta.finance.hedge_ratios import HedgeRatios
from pymeta.finance.prices import Prices, read_prices
from pymeta.finance.result import Result, Say, compared, result, silent
from pymeta.finance.walk import Walking
from pymeta.learners import BayesianHead
from pymeta.tasks.groups import Array

_LONG = 250  # days of the long beta
_FIRMER = (1.0, 2.0, 4.0, 8.0, 16.0, 1e6)  # what the learned precision is multiplied by
_QUARTER = 63


def betas_panel(prices: Prices, market: str | None = None, *, lag: int = 21) -> Panel:
    """Rows of returns in per cent: the stock's, as the target, and the market's.

    Args:
        prices: of `read_prices`.
        lag: days before a row that the stock's long beta ends: as long as betas are kept.
        market: the name of the index among the stocks, which is then none of them; None for the
            mean of all stocks.
    """
    returns = 100 * prices.returns
    kept = np.ones(len(returns), bool)
    if market is None:
        with np.errstate(all="ignore"):
            here = np.isfinite(returns)
            index = np.where(here, returns, 0).sum(0) / here.sum(0)
    else:
        if market not in prices.names:
            raise ValueError(f"market: no stock is called {market!r}")
        kept = prices.names != market
        index = returns[~kept][0]
    own = returns[kept]
    ok = np.isfinite(own) & np.isfinite(index)
    shape = ok.shape
    long = long_betas(own, index, _LONG, lag)
    table = {
        "stock": np.broadcast_to(prices.names[kept][:, None], shape)[ok],
        "day": np.broadcast_to(prices.days, shape)[ok],
        "market": np.broadcast_to(index, shape)[ok],
        "long beta": long[ok],
        "return": own[ok],
    }
    return Panel(table, entity="stock", time="day", target="return", numeric=["market"])


class LearnedPrior:
    """A model for `compare`: `BayesianHead` on rows in units of the stock's own noise.

    Args:
        days: of support.
        query: days that the prior is judged by in training.
        steps: of training.
        seed: of episodes.
    """

    adapts = True

    def __init__(self, days: int, query: int, *, steps: int = 120, seed: int = 0) -> None:
        """Keep the settings."""
        self.days, self.query, self.steps, self.seed = days, query, steps, seed

    def fit(self, train: Panel) -> LearnedPrior:
        """Learn the noise's prior from windows of training, then the betas' prior."""
        plain = train.with_features(features(train))
        options = {"tasks": 64, "support": self.days, "query": self.query, "seed": self.seed}
        batches = list(plain.episodes(batches=self.steps, **options))
        found = [residual_variance(b.xs, b.ys) for b in batches]
        self.prior = variance_prior(*(np.concatenate(v) for v in zip(*found, strict=True)))
        self.head = BayesianHead(nn.Identity(), features=3, outputs=1, precision=20, bias=False)
        scaled = [self._scaled(b) for b in batches]
        with torch.no_grad():
            self.head.prior_mean[:, 0] = torch.as_tensor(_pooled(scaled), dtype=torch.float32)
        adam = torch.optim.Adam(self.head.parameters(), 0.05)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, len(batches), 0.005)
        for batch in scaled:
            adam.zero_grad()
            self.head(*batch).loss.backward()
            adam.step()
            rate.step()
        self._firm(plain)
        return self

    def _scaled(self, batch: Any) -> tuple[Array, Array, Array, Array]:
        """A batch of equal tasks in units of the noise of each task's support."""
        noise = noise_of(batch.xs, batch.ys, *self.prior)[:, None]
        xs, xq = batch.xs / noise[..., None], batch.xq / noise[..., None]
        return xs, batch.ys / noise, xq, batch.yq / noise

    @torch.no_grad()
    def _firm(self, plain: Panel) -> None:
        """Multiply the prior's precision by what is best in the quarters where adapting harms."""
        windows = plain.windows(support=self.days, query=self.query, step=self.query)
        _, rank = np.unique(windows.times, return_inverse=True)
        quarter = rank * self.query // _QUARTER
        root = self.head.prior_root.clone()
        losses = []
        for firmer in _FIRMER:
            self._set_root(root, firmer)
            each = []
            for batch in windows:
                *data, yq = self._scaled(batch)
                each.append((np.asarray(self.head(*data).predictions)[..., 0] - yq) ** 2)
            mean = np.bincount(quarter, np.concatenate(each).mean(axis=1)) / np.bincount(quarter)
            losses.append(mean)
        gaps = [loss - losses[-1] for loss in losses]  # to no adaptation
        few = max(round(len(gaps[0]) / 4), 1)
        worth = [np.sort(g)[-few:].mean() for g in gaps]  # of the quarters that go worst
        self.firmer = _FIRMER[int(np.argmin(worth))]
        self._set_root(root, self.firmer)

    def _set_root(self, root: torch.Tensor, firmer: float) -> None:
        scaled = root.tril(-1) * firmer**0.5 + torch.diag(root.diagonal() + np.log(firmer) / 2)
        self.head.prior_root.copy_(scaled)

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """The posterior mean of alpha and beta, times 1 and the market's return."""
        weights = np.tile(self.head.prior_mean.detach().numpy().T, (len(query.entities), 1))
        if history is not None:
            known = history.of(np.intersect1d(history.entities, query.entities))
            models = self.head.adapt(*in_units_of_noise(known, *self.prior))
            own = models.state["weights"][..., 0].numpy()
            weights[np.searchsorted(query.entities, known.entities)] = own
        each = np.repeat(weights, query.sizes, axis=0)
        return np.asarray((features(query) * each).sum(axis=1))


def _pooled(batches: list[tuple[Array, Array, Array, Array]]) -> Array:
    """The regression of all query rows together."""
    x = np.concatenate([b[2].reshape(-1, b[2].shape[-1]) for b in batches]).astype(np.float64)
    y = np.concatenate([b[3].reshape(-1) for b in batches])
    found: Array = np.linalg.lstsq(x, y, rcond=None)[0]
    return found


def betas(
    data: Any,
    *,
    columns: Mapping[str, str] | None = None,
    market: str | None = None,
    days: int = 60,
    every: int = 21,
    at: Any = None,
    share: float = 0.3,
    seeds: int = 3,
    quick: bool = False,
    say: Say = silent,
) -> Result:
    """Compare hedges of later days, walking through time, and train a model for deployment.

    Args:
        data: prices, as `pymeta.finance.read_prices` takes them; closes are enough.
        columns: what a table's columns are called, {"entity": ..., "time": ..., "close": ...,
            "open": ..., "high": ..., "low": ...}, as there.
        market: the name of the index among the stocks; None for the mean of all stocks.
        days: how many days a beta is estimated from.
        every: days until it is estimated again.
        at: the first day that hedges are judged on; by default after seven tenths of the time.
        share: the share of stocks that is tested and not trained on.
        seeds: how many runs, each with other tested stocks.
        quick: use one seed and fewer training steps, to see it run.
        say: is told of progress.

    Returns:
        The `Result`. Its metric is the mean squared return, in per cent, that is left of a stock
        when the market's part is taken off.

    Raises:
        ImportError: a package of the extra `finance` is missing.
        TypeError, ValueError: an argument is not as described.
    """
    panel = betas_panel(read_prices(data, columns), market, lag=every)
    steps = 40 if quick else 120

    def walking(model: Any) -> Walking:
        return Walking(model, every=every, history=days)

    def models(seed: int) -> dict[str, Any]:
        own = LearnedPrior(days, every, steps=steps, seed=seed)
        rivals = {"Vasicek": "vasicek", "OLS": "ols", "mean beta": "pooled"}
        found = {"learned prior": own} | {k: Estimate(v) for k, v in rivals.items()}
        return {k: walking(m) for k, m in found.items()} | {
            "Vasicek, 250 days": Walking(Estimate("vasicek"), every=every, history=_LONG)
        }

    found, last = compared(
        lambda seed: panel,
        models,
        seeds=1 if quick else seeds,
        say=say,
        metrics=["mse"],
        at=at,
        share=share,
        lightgbm=False,
        stress=False,
        draws=200 if quick else 1000,
    )

    def deploy() -> HedgeRatios:
        own = LearnedPrior(days, every, steps=steps).fit(panel)
        x, y = features(panel), panel.need_y()
        noise = noise_of(Ragged(x, panel.sizes), Ragged(y, panel.sizes), *own.prior)
        scaled = panel.with_features(x / np.repeat(noise, panel.sizes)[:, None])
        return HedgeRatios(adapter_of(own.head, scaled.last(days)), days, own.prior)

    settings = {"days": days, "every": every, "market": market, "seeds": len(found)}
    settings["firmer"] = last["learned prior"].model.firmer
    return result("betas", found, deploy, say, settings)
