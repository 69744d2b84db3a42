"""Volatility: the next days' variance of every stock, by HAR and what a stock adds to it.

The pooled model is HAR (Corsi 2009) in logarithms with long lags (to 250 days), the market's own
and two terms of leverage; the remainder is adapted to the last `days` days of each stock, to what
it has beside all stocks of the same day, and walked through the query, `every` days at a time.
Judged by QLIKE (Patton 2011), by which a forecast of variances is ranked as it would be by the true
ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pymeta.data import Panel
from pymeta.finance.prices import Prices, ahead, read_prices, trailing
from pymeta.finance.remainder import ECHO, FORMS, Remainder
from pymeta.finance.result import Result, Say, compared, deployed, result, silent
from pymeta.finance.walk import Walking
from pymeta.finance.wild import wild_split
from pymeta.metrics.baselines import PerEntity, Pooled
from pymeta.tasks.groups import Array

LAGS = (1, 5, 22, 66, 250)
MARKET = (1, 5, 22)


def volatility_panel(prices: Prices, horizon: int = 1, *, target: bool = True) -> Panel:
    """The rows of every stock and day that has all features.

    Args:
        prices: of `read_prices`.
        horizon: days ahead whose mean variance is the target.
        target: whether rows need one; False for the last days as well, without targets.
    """
    variance = prices.variance()
    with np.errstate(all="ignore"):
        here = np.isfinite(variance)
        market = np.where(here, variance, 0).sum(0) / here.sum(0)
        wide = np.broadcast_to(market, variance.shape)
        columns = {f"own {n}": np.log(trailing(variance, n)) for n in LAGS}
        columns |= {f"market {n}": np.log(trailing(wide, n)) for n in MARKET}
        returns, scale = 100 * prices.returns, np.sqrt(trailing(variance, 22))
        columns["fall 1"] = np.minimum(returns, 0) / scale
        columns["fall 5"] = np.minimum(trailing(returns, 5), 0) / scale
    y = ahead(variance, horizon)
    kept = np.isfinite(np.sum(list(columns.values()), axis=0))
    if target:
        kept &= np.isfinite(y)
    if not kept.any():
        raise ValueError(
            f"data: expected more than {LAGS[-1] // 2} days of prices, got {len(prices.days)}"
        )

    def rows(values: Array) -> Array:
        return np.asarray(np.broadcast_to(values, kept.shape)[kept])

    table = {"stock": rows(prices.names[:, None]), "day": rows(prices.days)}
    table |= {name: rows(values) for name, values in columns.items()}
    if target:
        table["variance"] = rows(y)
    return Panel(
        table,
        entity="stock",
        time="day",
        target="variance" if target else None,
        numeric=list(columns),
    )


def volatility(
    data: Any,
    *,
    columns: Mapping[str, str] | None = None,
    days: int = 60,
    horizon: int = 1,
    form: str | None = None,
    every: int = 21,
    at: str | None = None,
    wild: bool = False,
    share: float = 0.3,
    seeds: int = 3,
    quick: bool = False,
    stress: bool = True,
    lightgbm: bool = True,
    say: Say = silent,
) -> Result:
    """Compare, walking through time, and train a model for deployment.

    Args:
        data: prices, as `pymeta.finance.read_prices` takes them: with open, high and low the
            variance is Garman and Klass's, without them the squared return.
        columns: what a table's columns are called, {"entity": ..., "time": ..., "close": ...,
            "open": ..., "high": ..., "low": ...}, as there.
        days: how many days a stock is adapted to.
        horizon: how many days ahead.
        form: what is adapted: "level", "score", "linear", "echo" or "network"; by default one of
            the first four is chosen on training stocks, or nothing.
        every: days until models are adapted and rivals fitted again.
        at: the first day that is predicted; by default after seven tenths of the time.
        wild: whether to train on the calmest half of the months and predict the wildest quarter,
            wherever they lie, in place of `at`.
        share: the share of stocks that is tested and (unless `wild`) not trained on.
        seeds: how many runs, each with other tested stocks and other starts.
        quick: use fewer seeds and training steps, to see it run.
        stress: whether to run stress tests.
        lightgbm: whether LightGBM is among the rivals; on 500 stocks it takes longer than all else.
        say: is told of progress.

    Returns:
        The `Result`; its rivals are pooled HAR, HAR of each stock (of all its past, and of its
        last 250 days fitted anew), pooled HAR fitted again every `every` days, and LightGBM.

    Raises:
        ImportError: a package of the extra `finance` is missing.
        TypeError, ValueError: an argument is not as described.
    """
    if wild and at is not None:
        raise ValueError("at: expected None, because wild chooses the months")
    panel = volatility_panel(read_prices(data, columns), horizon)
    late = np.timedelta64(horizon - 1, "D") * 2  # weekends are days, too

    def ours(seed: int) -> Remainder:
        return Remainder(
            link="log",
            forms=(form,) if form else (*FORMS[:4], ECHO),
            support=days,
            query=every,
            gap=horizon - 1,
            steps=40 if quick else 150,
            history=(days, days // 4) if days >= 120 and not quick else days,
            relative=True,
            refit=not wild,
            seed=seed,
        )

    def models(seed: int) -> dict[str, Any]:
        walk: dict[str, Any] = {"every": every, "gap": late}
        return {
            "adapted HAR": Walking(ours(seed), **walk),  # which takes the last days itself
            "HAR by stock, last 250 days": Walking(PerEntity("log", None), history=250, **walk),
            "pooled HAR, fitted again": Walking(Pooled("log", None), refit=True, **walk),
        }

    options: dict[str, Any] = {"at": at, "gap": late, "share": share, "link": "log", "block": 21}
    found, last = compared(
        lambda seed: wild_split(panel, share, seed) if wild else panel,
        models,
        seeds=1 if quick else seeds,
        say=say,
        metrics=["qlike"],
        stress=stress and not quick,
        lightgbm=None if lightgbm else False,
        draws=200 if quick else 1000,
        **options,
    )
    chosen = last["adapted HAR"].model
    settings = {
        "days": days,
        "horizon": horizon,
        "every": every,
        "wild": wild,
        "history": chosen.history,
        "seeds": len(found),
        "form": chosen.form,
        "losses": chosen.losses,
    }
    return result("volatility", found, lambda: deployed(ours(0), panel), say, settings)
