"""Betas: how much of the market every stock carries, from few days, as a hedge needs it.

`BayesianHead` with an identity for an encoder: a stock's beta (and alpha) have a prior that was
learned over other stocks, which is Vasicek's estimate (1973) with the prior chosen by the hedge
error of later days. Stocks differ in noise as well: rows are divided by the stock's own residual
volatility, itself drawn towards that of all (Smyth 2004), so that a quiet stock's days say more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pymeta import Adapter
from pymeta.data import Panel, Ragged
from pymeta.finance.deploy import adapter_of
from pymeta.finance.hedge import (
    Estimate,
    in_units_of_noise,
    market_and_one,
    noise_of,
    residual_variance,
    variance_prior,
)
from pymeta.finance.prices import Prices, read_prices
from pymeta.finance.result import Result, Say, compared, result, silent
from pymeta.finance.walk import Walking
from pymeta.learners import BayesianHead
from pymeta.tasks.groups import Array


def betas_panel(prices: Prices, market: str | None = None) -> Panel:
    """Rows of returns in per cent: the stock's, as the target, and the market's.

    Args:
        prices: of `read_prices`.
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
    table = {
        "stock": np.broadcast_to(prices.names[kept][:, None], shape)[ok],
        "day": np.broadcast_to(prices.days, shape)[ok],
        "market": np.broadcast_to(index, shape)[ok],
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
        plain = train.with_features(market_and_one(train["market"]))
        episodes = plain.episodes(
            tasks=64, support=self.days, query=self.query, batches=self.steps, seed=self.seed
        )
        batches = list(episodes)
        found = [residual_variance(b.xs, b.ys) for b in batches]
        self.prior = variance_prior(*(np.concatenate(v) for v in zip(*found, strict=True)))
        self.head = BayesianHead(nn.Identity(), features=2, outputs=1, precision=10, bias=False)
        with torch.no_grad():
            self.head.prior_mean[0] = 1.0
        adam = torch.optim.Adam(self.head.parameters(), 0.05)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, len(batches), 0.005)
        for b in batches:
            noise = noise_of(b.xs, b.ys, *self.prior)[:, None]
            adam.zero_grad()
            s, q = (b.xs / noise[..., None], b.ys / noise), (b.xq / noise[..., None], b.yq / noise)
            self.head(*s, *q).loss.backward()
            adam.step()
            rate.step()
        return self

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """The posterior mean of alpha and beta, times 1 and the market's return."""
        weights = np.tile(self.head.prior_mean.detach().numpy().T, (len(query.entities), 1))
        if history is not None:
            known = history.of(np.intersect1d(history.entities, query.entities))
            models = self.head.adapt(*in_units_of_noise(known, *self.prior))
            own = models.state["weights"][..., 0].numpy()
            weights[np.searchsorted(query.entities, known.entities)] = own
        each = np.repeat(weights, query.sizes, axis=0)
        return np.asarray((market_and_one(query["market"]) * each).sum(axis=1))


@dataclass
class HedgeRatios:
    """What is deployed: betas of stocks from their last days. numpy alone.

    Attributes:
        adapter: of rows in units of the stock's noise.
        days: that a beta is estimated from, at most.
        prior: degrees of freedom and variance of the noise's prior.
    """

    adapter: Adapter
    days: int
    prior: tuple[float, float]

    def betas(self, history: Panel) -> dict[Any, float]:
        """{stock: beta}, of the last days of a panel of `betas_panel`."""
        known = history.last(self.days)
        models = self.adapter.adapt(*in_units_of_noise(known, *self.prior))
        ask = np.tile(np.array([1, 0], np.float32), (len(known.entities), 1, 1))
        found = np.asarray(models(ask)).reshape(-1)
        labels: list[Any] = known.entities.tolist()
        return dict(zip(labels, found.tolist(), strict=True))

    def save(self, folder: Any) -> list[Path]:
        """Write adapter.safetensors and model.json; their paths."""
        paths = [Path(folder) / "adapter.safetensors", Path(folder) / "model.json"]
        self.adapter.save(paths[0])
        text = json.dumps({"days": self.days, "prior": self.prior})
        paths[1].write_text(text, encoding="utf-8")
        return paths

    @classmethod
    def load(cls, folder: Any) -> HedgeRatios:
        """What `save` wrote."""
        described = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))
        adapter = Adapter.load(Path(folder) / "adapter.safetensors")
        return cls(adapter, described["days"], tuple(described["prior"]))


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
        columns: what a table's columns are called, as there.
        market: the name of the index among the stocks; None for the mean of all stocks.
        days: that a beta is estimated from.
        every: days after which it is estimated again.
        at: the day from which hedges are judged; None for after seven tenths of the time.
        share: of the stocks, which are tested and not trained on.
        seeds: how many times, with other tested stocks.
        quick: one seed and fewer training steps: to see it run.
        say: is told of progress.

    Returns:
        The `Result`. Its metric is the mean squared return, in per cent, that is left of a stock
        when the market's part is taken off.

    Raises:
        ImportError: a package of the extra `finance` is missing.
        TypeError, ValueError: an argument is not as described.
    """
    panel = betas_panel(read_prices(data, columns), market)
    steps = 40 if quick else 120

    def walking(model: Any) -> Walking:
        return Walking(model, every=every, history=days)

    def models(seed: int) -> dict[str, Any]:
        own = LearnedPrior(days, every, steps=steps, seed=seed)
        rivals = {"Vasicek": "vasicek", "OLS": "ols", "mean beta": "pooled"}
        return {"learned prior": own} | {k: Estimate(v) for k, v in rivals.items()}

    found, _ = compared(
        lambda seed: panel,
        lambda seed: {k: walking(m) for k, m in models(seed).items()},
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
        x, y = market_and_one(panel["market"]), panel.need_y()
        noise = noise_of(Ragged(x, panel.sizes), Ragged(y, panel.sizes), *own.prior)
        scaled = panel.with_features(x / np.repeat(noise, panel.sizes)[:, None])
        return HedgeRatios(adapter_of(own.head, scaled.last(days)), days, own.prior)

    settings = {"days": days, "every": every, "market": market, "seeds": len(found)}
    return result("betas", found, deploy, say, settings)
