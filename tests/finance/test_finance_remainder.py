"""`Remainder`: what is common to all entities, and how forms and histories are checked."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")

from pymeta.data import Panel
from pymeta.data.encoders import credibility
from pymeta.finance import Deployed, Remainder
from pymeta.finance.checks import Found, check_of, tasks_of
from pymeta.finance.common import Common
from pymeta.finance.fading import faded, reach
from pymeta.finance.offsets import Offsets
from pymeta.metrics.baselines import Pooled


def fitted(p, **options) -> Remainder:
    return Remainder(**{"steps": 40, "tasks": 16, **options}).fit(p)


def anew(p: Panel) -> Panel:
    """The same rows, of no training panel that a model could know."""
    return Panel(p.to_dict(), entity="e", time="t", target="y")


def moved(stocks=30, days=120, seed=0, turn=1.5) -> Panel:
    """Numbers with a level of each entity's own, and what is common, which turns with 20 days."""
    rng = np.random.default_rng(seed)
    day, e = np.tile(np.arange(days), stocks), np.repeat(np.arange(stocks), days)
    x = rng.normal(size=len(e))
    level, common = rng.normal(size=stocks), turn * (-1.0) ** (np.arange(days) // 20)
    y = x + level[e] + common[day] + 0.5 * rng.normal(size=len(e))
    return Panel({"e": e, "t": day, "x": x, "y": y}, entity="e", time="t", target="y")


def test_what_is_common_is_the_mean_of_a_time_drawn_to_0():
    times = np.array([1, 1, 1, 2, 2, 2])
    residual = np.array([1.0, 1.2, 0.8, -1.0, -1.2, -0.8])
    common = Common(times, residual)
    k = credibility(residual, times)
    assert common.worth == pytest.approx(k) and 0 < k < 0.1
    np.testing.assert_allclose(common.effects, [3 / (3 + k), -3 / (3 + k)])
    # a time that it knows, whatever the rows say; one that it does not, by the rows
    asked = common.of(np.array([2, 7]), np.array([50.0, 2.0]))
    np.testing.assert_allclose(asked, [common.effects[1], 2 / (1 + k)])


def test_entities_are_adapted_to_what_is_their_own():
    """Where all turn at once, levels are found only when what is common is taken out."""
    past, future = moved().split_time(100)  # where they turn
    spread = {}
    for relative in (False, True):
        options = {"support": 20, "query": 20, "precision": 4.0, "relative": relative}
        model = fitted(past, forms=("level",), **options)
        p = model.predict(anew(past).last(20), future)
        spread[relative] = float((np.bincount(future.codes, p - future.y) / future.sizes).std())
    assert spread[True] < 0.4 < 0.7 < spread[False]


def test_relative_needs_numbers_and_times():
    with pytest.raises(ValueError, match="relative: expected False for a target of two classes"):
        p = moved(stocks=8)
        odd = Panel({**p.to_dict(), "y": (p.y > 0).astype(int)}, entity="e", time="t", target="y")
        fitted(odd, relative=True)
    table = p.to_dict()
    table.pop("t")
    still = Panel(table, entity="e", target="y")
    with pytest.raises(ValueError, match="time"):
        fitted(still, relative=True)


def test_a_relative_model_is_deployed(tmp_path):
    past, future = moved().split_time(100)
    model = fitted(past, forms=("level",), support=20, query=20, relative=True)
    model.history = 20
    deployed = Deployed.of(model, past)
    deployed.save(tmp_path)
    again = Deployed.load(tmp_path)
    history = anew(past)
    some = future.of(np.arange(5))  # the others tell what was common, too
    wanted = model.predict(history, future)[np.isin(future.labels, np.arange(5))]
    # in deployment the times are new: they are known by these rows alone
    np.testing.assert_allclose(again.predict(history, some), wanted, rtol=0, atol=0.02)


def test_a_history_is_chosen_among_several():
    """Levels that turn every 20 days: the last 10 rows tell more than the last 80."""
    rng = np.random.default_rng(0)
    stocks, days = 30, 400
    level = np.repeat(2 * rng.normal(size=(stocks, days // 20)), 20, axis=1)
    e, day = np.repeat(np.arange(stocks), days), np.tile(np.arange(days), stocks)
    y = level.reshape(-1) + 0.5 * rng.normal(size=len(e))
    table = {"e": e, "t": day, "x": rng.normal(size=len(e)), "y": y}
    p = Panel(table, entity="e", time="t", target="y")
    model = fitted(p, forms=("pooled", "level"), history=(80, 5), support=80, query=5)
    assert model.form == "level" and model.history == 5
    with pytest.raises(ValueError, match="history: expected a number of rows, or some"):
        Remainder(history=())


def test_checks_go_through_all_later_rows_once():
    p = moved(stocks=6, days=50)
    zeros = Offsets(np.zeros((len(p), 1), np.float32), np.zeros((len(p), 1), np.float32))
    options = {"tasks": 4, "support": 10, "query": 5, "gap": 0, "split": None, "seed": 0}
    for last in (10, 4):
        tasks = list(
            tasks_of(p.with_features(p.y[:, None], ["x"]), zeros, options | {"support": last}, 10)
        )
        rows = np.concatenate([t.rows for t in tasks])
        assert np.array_equal(np.sort(rows), np.flatnonzero(p.times >= 10))
        assert all(np.asarray(t.xs).shape[1] == last for t in tasks)


def test_a_gain_in_calm_times_does_not_pay_for_a_loss_in_stress():
    times, labels = np.tile(np.arange(120), 10), np.repeat(np.arange(10), 120)
    y = np.where(times >= 90, 9.0, 1.0)
    ours = np.where(times >= 90, 1.1, 0.5)
    check = check_of([Found(ours, np.ones(1200), y, times, labels)])
    assert check.gap == pytest.approx(0.75 * -0.5 + 0.25 * 0.1)
    assert check.stressed == pytest.approx(0.1) and check.error == pytest.approx(0)
    assert check_of([Found(ours, np.ones(1200), y, None, labels)]).stressed == 0


def test_a_remainder_fades_as_its_rows_grow_old():
    p = moved(stocks=4, days=60)
    history, later = p.split_time(30)
    query = later.where(later.labels != 3)
    far = reach(p.times, 10)
    assert far == 10
    left = faded(history.where(history.labels != 1), query, far).reshape(3, 30)
    ages = np.arange(1, 31)
    np.testing.assert_allclose(left[0], 0.5 ** np.maximum(ages / 10 - 1, 0), rtol=1e-6)
    assert (left[1] == 1).all() and np.array_equal(left[2], left[0])  # 1 has no rows
    days = np.datetime64("2024-01-01") + np.arange(61)
    assert reach(days, 10) == 10 * 86400
    model = fitted(history, forms=("level",), support=10, query=10)
    known = anew(history)
    full = model.predict(known, later) - model.predict(None, later)
    model._far = None
    without = model.predict(known, later) - model.predict(None, later)
    wanted = without * np.tile(0.5 ** np.maximum(ages / 10 - 1, 0), 4)
    np.testing.assert_allclose(full, wanted, rtol=0, atol=1e-5)


def test_without_a_remainder_ours_is_the_pooled_rival():
    """Predictions of the form "pooled" are those of `compare`'s pooled linear model."""
    table = moved(stocks=10).to_dict()
    table["y"] = np.exp(table["y"])
    p = Panel(table, entity="e", time="t", target="y")
    ours = fitted(p, forms=("pooled",), link="log").predict(None, anew(p))
    rival = Pooled("log", None).fit(p).predict(None, p)
    np.testing.assert_allclose(ours, rival, rtol=1e-5)
