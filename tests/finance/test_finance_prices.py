"""The jobs on prices: volatility and betas, on made stocks."""

from __future__ import annotations

import finance_help
import numpy as np
import pytest

pytest.importorskip("sklearn")

from pymeta.data import Panel
from pymeta.finance import Deployed, HedgeRatios, betas, betas_panel, volatility, volatility_panel
from pymeta.finance.hedge import Estimate, long_betas
from pymeta.finance.jobs.betas import LearnedPrior


def test_features_of_volatility_do_not_see_the_future():
    p = finance_help.prices(stocks=6, days=320)
    whole = volatility_panel(p)
    assert len(whole.numeric) == 10 and len(whole.entities) == 6

    def build(part: Panel):
        days = int((part.times.max() - p.days[0]).astype(int)) + 1
        cut = type(p)(p.names, p.days[:days], p.close[:, :days], {
            k: v[:, :days] for k, v in p.others.items()
        })  # fmt: skip
        again = volatility_panel(cut, target=False)
        kept = again.where(np.isin(again.times, part.times))
        return np.column_stack([kept[n] for n in kept.numeric])

    whole.check_leakage(build=build)
    # the target is the next day's variance
    v = p.variance()
    row = {(s, d): i for i, (s, d) in enumerate(zip(whole.labels, whole.times, strict=True))}
    i = row["S02", p.days[300]]
    assert whole.y[i] == pytest.approx(v[2, 301], rel=1e-6)
    assert whole["own 1"][i] == pytest.approx(np.log(v[2, 300]))
    assert len(volatility_panel(p, target=False)) == len(whole) + 6


def test_too_few_days_are_refused():
    with pytest.raises(ValueError, match="expected more than 125 days of prices, got 90"):
        volatility_panel(finance_help.prices(stocks=3, days=90))


def test_volatility_runs_and_is_deployed(tmp_path):
    p = finance_help.prices(stocks=24, days=400)
    found = volatility(p, days=40, quick=True, share=0.5)
    names = [line.name for line in found.report.lines]
    assert names[0] == "adapted HAR" and "pooled HAR, fitted again" in names
    assert "pooled linear" in names and found.settings["form"] in found.settings["losses"]
    q = {line.name: line.scores[0].pooled for line in found.report.lines}
    assert q["adapted HAR"] < q["HAR by stock, last 250 days"]
    paths = found.save(tmp_path)
    assert {"report.md", "report.html", "adapter.safetensors"} <= {path.name for path in paths}
    panel = volatility_panel(p)
    history, query = panel.split_time(p.days[-30])
    predicted = Deployed.load(tmp_path).predict(history.to_dict(), query.to_dict())
    assert (predicted > 0).all() and np.corrcoef(np.log(predicted), np.log(query.y))[0, 1] > 0.15


def betas_of(model, history: Panel):
    """The betas that a model has for a history: its prediction for a market return of 1, less 0."""
    table = {"stock": history.entities, "day": np.full(len(history.entities), history.times.max())}
    long = history["long beta"][history.offsets[1:] - 1]
    ask = [
        Panel(
            {**table, "market": np.full(len(history.entities), m), "long beta": long},
            entity="stock",
            time="day",
        )
        for m in (0.0, 1.0)
    ]
    return model.predict(history, ask[1]) - model.predict(history, ask[0])


def test_the_learned_prior_is_nearer_to_true_betas():
    rng = np.random.default_rng(0)
    stocks, days = 120, 160
    beta, noise = 1 + 0.4 * rng.normal(size=stocks), np.exp(0.5 * rng.normal(size=stocks))
    market = rng.normal(size=days)
    y = beta[:, None] * market + noise[:, None] * rng.normal(size=(stocks, days))
    table = {
        "stock": np.repeat(np.arange(stocks), days),
        "day": np.tile(np.arange(days), stocks),
        "market": np.tile(market, stocks),
        "long beta": np.ones(stocks * days),  # nothing known from before
        "return": y.reshape(-1),
    }
    panel = Panel(table, entity="stock", time="day", target="return", numeric=["market"])
    train, test = panel.of(np.arange(60)), panel.of(np.arange(60, 120))
    history = test.last(20)
    error = {}
    models = {"ours": LearnedPrior(20, 20)}
    models |= {kind: Estimate(kind) for kind in ("ols", "pooled", "vasicek")}
    for name, model in models.items():
        error[name] = np.mean((betas_of(model.fit(train), history) - beta[60:]) ** 2)
    assert error["ours"] < min(error["vasicek"], error["pooled"], error["ols"])
    # without history, and for a stock without rows, the prior's mean
    assert models["ours"].predict(None, test)[:days] == pytest.approx(
        models["ours"].head.prior_mean[0].item() * market
        + models["ours"].head.prior_mean[1].item(),
        abs=1e-5,
    )


def test_the_long_beta_is_of_days_before():
    rng = np.random.default_rng(0)
    returns, market = rng.normal(size=(3, 400)), rng.normal(size=400)
    returns[0] += 2 * market
    found = long_betas(returns, market, 100, 21, worth=0)
    days = slice(400 - 21 - 100, 400 - 21)  # of the last row
    wanted = returns[:, days] @ market[days] / (market[days] ** 2).sum()
    np.testing.assert_allclose(found[:, -1], wanted)
    assert (found[:, :21] == 1).all()
    drawn = long_betas(returns, market, 100, 0, worth=100)
    assert abs(drawn[0, -1] - 1.5) < 0.2 and drawn[0, 0] != 1


def test_a_rotation_makes_the_prior_firm():
    """Betas hold within a window and not from one to the next in some quarters: no adaptation."""
    rng = np.random.default_rng(0)
    stocks, days = 40, 400
    market = rng.normal(size=days)
    for shift, firm in ((0.0, False), (1.0, True)):
        beta = 1 + 0.4 * rng.normal(size=(stocks, 1)) * np.ones(days)
        turn = shift * rng.normal(size=(stocks, 40)) * (np.arange(40) > 20)  # by ten days
        y = (beta + np.repeat(turn, 10, axis=1)) * market + rng.normal(size=(stocks, days))
        table = {
            "stock": np.repeat(np.arange(stocks), days),
            "day": np.tile(np.arange(days), stocks),
            "market": np.tile(market, stocks),
            "long beta": np.ones(stocks * days),
            "return": y.reshape(-1),
        }
        panel = Panel(table, entity="stock", time="day", target="return", numeric=["market"])
        model = LearnedPrior(10, 10, steps=40).fit(panel)
        precision = model.head.prior_precision()[0, 0].item()
        assert (precision > 12) == firm, precision


def test_a_rival_is_its_formula():
    p = betas_panel(finance_help.prices(stocks=5, days=60))
    history, _ = p.split_time(p.times.max())
    found = betas_of(Estimate("ols").fit(history), history)
    for e in range(5):
        rows = slice(*history.offsets[e : e + 2])
        line = np.polyfit(history["market"][rows], history["return"][rows], 1)
        assert found[e] == pytest.approx(line[0], rel=1e-4)
    pooled = betas_of(Estimate("pooled").fit(history), history)
    assert pooled == pytest.approx(np.full(5, found.mean()), rel=1e-4)
    shrunk = betas_of(Estimate("vasicek").fit(history), history)
    assert np.abs(shrunk - found.mean()).max() < np.abs(found - found.mean()).max()


def test_the_market_may_be_one_of_the_stocks():
    p = finance_help.prices(stocks=5, days=60)
    panel = betas_panel(p, "S01")
    assert "S01" not in panel.entities
    assert panel["market"][0] == pytest.approx(100 * p.returns[1, 1])
    with pytest.raises(ValueError, match="market: no stock is called 'SPY'"):
        betas_panel(p, "SPY")


def test_betas_run_and_are_deployed(tmp_path):
    p = finance_help.prices(stocks=24, days=260, ranges=False)
    named = {"entity": "symbol", "time": "day", "close": "px"}
    found = betas(finance_help.as_table(p), columns=named, days=30, quick=True, share=0.4)
    names = [line.name for line in found.report.lines]
    assert names[0] == "learned prior" and {"Vasicek", "OLS", "mean beta"} <= set(names)
    found.save(tmp_path)
    ratios = HedgeRatios.load(tmp_path).betas(betas_panel(p))
    assert len(ratios) == 24 and 0.2 < min(ratios.values()) < max(ratios.values()) < 2.5
    # as the model itself has them
    panel = betas_panel(p)
    own = LearnedPrior(30, 21, steps=40).fit(panel)
    assert found.settings["firmer"] >= 1
    exact = betas_of(own, panel.last(30))
    assert list(ratios.values()) == pytest.approx(exact.tolist(), abs=2e-3)
