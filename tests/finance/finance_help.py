"""Made data for the jobs: prices with clustered volatility and betas, and loans by region."""

from __future__ import annotations

import numpy as np

from pymeta.finance.prices import Prices


def prices(stocks=24, days=420, seed=0, spread=0.4, ranges=True) -> Prices:
    """Stocks with a beta each, whose variance clusters in a way of each stock's own."""
    rng = np.random.default_rng(seed)
    beta = 1 + spread * rng.normal(size=stocks)
    speed = rng.uniform(0.02, 0.3, stocks)  # what differs between stocks
    market = np.zeros(days)
    level, log_var = 0.0, np.zeros((stocks, days))
    own = np.zeros(stocks)
    for t in range(days):
        level = 0.97 * level + 0.15 * rng.normal()
        own = (1 - speed) * own + 0.4 * speed * rng.normal(size=stocks)
        log_var[:, t] = level + own
        market[t] = 0.008 * np.exp(level / 2) * rng.normal()
    noise = 0.012 * np.exp(log_var / 2) * rng.normal(size=(stocks, days))
    returns = beta[:, None] * market + noise
    close = 50 * np.exp(np.cumsum(returns, axis=1))
    day = np.datetime64("2020-01-01") + np.arange(days)
    names = np.array([f"S{i:02d}" for i in range(stocks)])
    others = {}
    if ranges:
        before = np.concatenate([np.full((stocks, 1), 50.0), close[:, :-1]], axis=1)
        up, down = np.maximum(before, close), np.minimum(before, close)
        wide = 0.006 * np.exp(log_var / 2) * rng.uniform(0.5, 1.5, (stocks, days))
        others = {"open": before, "high": up * (1 + wide), "low": down * (1 - wide)}
    return Prices(names, day, close, others)


def as_table(p: Prices) -> dict:
    """The prices as a table of rows, in another order, with names of another kind."""
    n, d = p.close.shape
    table = {
        "symbol": np.repeat(p.names, d),
        "day": np.tile(p.days, n),
        "px": p.close.reshape(-1),
        **{k: v.reshape(-1) for k, v in p.others.items()},
    }
    order = np.random.default_rng(0).permutation(n * d)
    return {k: v[order] for k, v in table.items()}


def loans(regions=30, rows=120, seed=0) -> dict:
    """Loans whose risk has a level and a slope of each region's own."""
    rng = np.random.default_rng(seed)
    n = regions * rows
    region = np.repeat(np.arange(regions), rows)
    income, amount = rng.normal(size=(2, n))
    level, slope = 0.9 * rng.normal(size=regions), 0.8 * rng.normal(size=regions)
    logit = -0.5 + level[region] + (slope[region] - 1) * income + 0.4 * amount
    return {
        "region": np.array([f"R{r:02d}" for r in region]),
        "issued": np.datetime64("2020-01-01") + rng.integers(0, 730, n),
        "income": income,
        "amount": amount,
        "kind": rng.choice(["a", "b"], n),
        "bad": (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int),
    }
