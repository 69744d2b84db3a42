"""What the jobs share: pooled model, remainder, walk through time, adapters, prices, command."""

from __future__ import annotations

import json
import re
from importlib import import_module

import finance_help
import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

import pymeta
from pymeta.commands import finance as command
from pymeta.data import Panel, Ragged
from pymeta.finance import Deployed, Remainder, Walking, read_prices
from pymeta.finance.deploy import adapter_of
from pymeta.finance.hedge import ols, variance_prior
from pymeta.finance.pooled import Pooled
from pymeta.finance.prices import ahead, trailing
from pymeta.finance.result import Result, compared, silent
from pymeta.finance.walk import stacked
from pymeta.learners import BayesianHead, RidgeHead


def panel(kind="numbers", entities=40, rows=60, seed=0, tilt=1.0) -> Panel:
    rng = np.random.default_rng(seed)
    e = np.repeat(np.arange(entities), rows)
    x = rng.normal(size=(len(e), 3))
    slope, shift = tilt * rng.normal(size=entities), tilt * rng.normal(size=entities)
    signal = (1 + slope[e]) * x[:, 0] + 0.5 * x[:, 1] + shift[e]
    y = {
        "numbers": signal + 0.5 * rng.normal(size=len(e)),
        "positive": np.exp(0.4 * signal + 0.4 * rng.normal(size=len(e))),
        "binary": (rng.random(len(e)) < 1 / (1 + np.exp(-signal))).astype(int),
    }[kind]
    table = {"e": e, "t": np.tile(np.arange(rows), entities), "y": y}
    table |= {f"x{i}": x[:, i] for i in range(3)}
    return Panel(table, entity="e", time="t", target="y")


def anew(p: Panel) -> Panel:
    """The same rows, of no training panel that a model could know."""
    return Panel(p.to_dict(), entity="e", time="t", target="y")


LINK = {"numbers": "identity", "positive": "log", "binary": "identity"}


def fitted(kind, p, **options) -> Remainder:
    options = {"support": (5, 40), "query": 15, "steps": 40, "tasks": 16, **options}
    return Remainder(link=LINK[kind], **options).fit(p)


# ---- the pooled model ---------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["linear", "lightgbm"])
def test_training_rows_have_the_output_of_a_model_without_their_entity(base):
    if base == "lightgbm":
        pytest.importorskip("lightgbm")
    p = panel("binary", entities=10)
    pooled = Pooled(base).fit(p)
    inside = pooled.offset(p, pooled.prep(p).x)
    outside = pooled.offset(anew(p), pooled.prep(p).x)
    assert not np.allclose(inside, outside, atol=1e-3)
    some = p.where(np.arange(len(p)) % 3 == 0)  # a part of the training rows
    np.testing.assert_array_equal(pooled.offset(some, pooled.prep(some).x), inside[::3])
    # the fold of entity 0 was fitted without it: its targets do not matter there
    y = p["y"].copy()
    y[:60] = 1 - y[:60]
    other = Pooled(base).fit(Panel({**p.to_dict(), "y": y}, entity="e", time="t", target="y"))
    np.testing.assert_array_equal(other._own[:60], pooled._own[:60])
    assert not np.array_equal(other._own[60:], pooled._own[60:])


def test_pooled_refuses_one_class_and_unknown_names():
    p = panel("binary", entities=4)
    with pytest.raises(ValueError, match="target: expected 0 and 1 in training, got 1 alone"):
        Pooled().fit(p.where(p.y == 1))
    with pytest.raises(TypeError, match="base: expected one of"):
        Pooled("forest").fit(p)


# ---- the remainder ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numbers", "positive", "binary"])
def test_where_entities_differ_the_remainder_is_better_and_where_not_it_is_left_out(kind):
    past, future = panel(kind).split_time(40)
    model = fitted(kind, past, forms=("pooled", "score", "linear"))
    assert model.form in ("score", "linear")
    y = future.y.astype(float)

    def loss(p):
        return np.mean(np.log(p) + y / p) if kind == "positive" else np.mean((p - y) ** 2)

    alone, adapted = model.predict(None, future), model.predict(anew(past), future)
    assert loss(adapted) < loss(alone) - (0.005 if kind == "binary" else 0.02)
    same = fitted(kind, panel(kind, tilt=0.0, seed=2), forms=("pooled", "linear"))
    assert same.form == "pooled"
    other = panel(kind, tilt=0.0, seed=1)
    np.testing.assert_array_equal(same.predict(other, other), same.predict(None, other))


def test_an_entity_without_rows_is_the_pooled_model():
    p = panel()
    model = fitted("numbers", p.of(np.arange(30)), forms=("linear",))
    query = anew(p.of(np.arange(28, 40)))
    history = anew(p.of([28, 29]))
    alone, adapted = model.predict(None, query), model.predict(history, query)
    mine = query.labels < 30
    np.testing.assert_allclose(adapted[~mine], alone[~mine], rtol=1e-5, atol=1e-5)
    assert np.abs(adapted[mine] - alone[mine]).max() > 0.1


def test_forms_are_known_by_name():
    with pytest.raises(ValueError, match="forms: expected some of"):
        Remainder(forms=("tree",))
    with pytest.raises(ValueError, match="forms: expected some of"):
        Remainder(forms=())


# ---- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["bayesian", "logistic"])
def test_the_adapters_steps_end_where_the_formula_does(kind, bias):
    p = panel("numbers" if kind == "bayesian" else "binary", entities=30)
    torch.manual_seed(1)
    if kind == "bayesian":
        head = BayesianHead(torch.nn.Identity(), features=3, outputs=1, bias=bias)
        torch.nn.init.normal_(head.prior_root, std=0.3)
    else:
        options = {"loss": "bce_with_logits", "precision": 4.0, "bias": bias}
        head = RidgeHead(torch.nn.Identity(), features=3, outputs=1, **options)
    torch.nn.init.normal_(head.prior_mean)
    adapter = adapter_of(head, p)
    for sizes in (60, 7, 1):
        part = p.last(sizes)
        xs, ys = Ragged(part.x, part.sizes), Ragged(part.y, part.sizes)
        exact = head.adapt(xs, ys)(Ragged(p.x, p.sizes))
        found = adapter.adapt(xs, ys)(Ragged(p.x, p.sizes))
        exact = np.concatenate([np.asarray(v) for v in exact])
        start = p.x @ head.prior_mean.detach().numpy()[:3]
        moved = np.abs(exact - start).max()
        assert moved > 0.05
        assert np.abs(np.concatenate(found) - exact).max() < 1e-3 * moved + 1e-4


@pytest.mark.parametrize("form", ["score", "linear", "network"])
@pytest.mark.parametrize("kind", ["positive", "binary"])
def test_what_is_deployed_predicts_what_the_model_does(kind, form, tmp_path):
    past, future = panel(kind).split_time(45)
    model = fitted(kind, past, forms=(form,))
    made = Deployed.of(model, past)
    paths = made.save(tmp_path)
    assert all(path.exists() for path in paths)
    loaded = Deployed.load(tmp_path)
    table, query = past.to_dict(), future.to_dict()
    order = np.random.default_rng(0).permutation(len(future))
    shuffled = {k: v[order] for k, v in query.items() if k != "y"}
    found, alone = loaded.predict(table, shuffled), loaded.predict(None, shuffled)
    np.testing.assert_allclose(alone, model.predict(None, anew(future))[order], rtol=1e-5)
    exact = model.predict(anew(past), anew(future))[order]
    moved = np.abs(exact - alone).max()
    assert moved > 0.01
    assert np.abs(found - exact).max() < 0.02 * moved
    assert pymeta.Adapter.load(tmp_path / "adapter.safetensors").in_features == (
        1 if form == "score" else 3
    )


def test_lightgbm_is_deployed_with_its_trees(tmp_path):
    pytest.importorskip("lightgbm")
    past, future = panel("binary").split_time(45)
    model = fitted("binary", past, base="lightgbm", forms=("score",))
    Deployed.of(model, past).save(tmp_path)
    loaded = Deployed.load(tmp_path)
    np.testing.assert_allclose(
        loaded.predict(None, future), model.predict(None, anew(future)), rtol=1e-5
    )


def test_a_folder_of_another_format_is_refused(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match=r"folder: expected model\.json of format 1, got 99"):
        Deployed.load(tmp_path)


# ---- the walk -----------------------------------------------------------------------------------


class Remembers:
    """Notes the times that it was given."""

    adapts = True

    def __init__(self):
        self.calls, self.fits = [], []

    def fit(self, train):
        self.fits.append((train.times.min(), train.times.max(), len(train.entities)))
        return self

    def predict(self, history, query):
        last = None if history is None else history.times.max()
        self.calls.append((last, query.times.min(), query.times.max()))
        return query.times.astype(float)


@pytest.mark.parametrize(("gap", "late"), [(None, 1), (3, 4)])
def test_a_block_sees_what_was_known_when_it_began(gap, late):
    past, future = panel(entities=6).split_time(30)
    model = Remembers()
    walk = Walking(model, every=10, gap=gap, history=8).fit(past)
    np.testing.assert_array_equal(walk.predict(past, future), future.times)
    assert model.calls == [(30 - late, 30, 39), (40 - late, 40, 49), (50 - late, 50, 59)]
    walk.predict(None, future)
    assert model.calls[-1] == (None, 30, 59)


def test_late_labels_stay_late_during_the_walk():
    past, future = panel(entities=6).split_time(30)
    model = Remembers()
    Walking(model, every=14).fit(past).predict(past.where(past.times < 18), future)
    assert model.calls == [(17, 30, 43), (31, 44, 57), (45, 58, 59)]


def test_a_model_that_is_fitted_again_gets_all_rows_known_and_is_fitted_once():
    class Copied(Remembers):
        def __deepcopy__(self, memo):
            return self

    p = panel(entities=6)
    past, future = p.split_time(40)
    model = Copied()
    walk = Walking(model, every=10, refit=True)
    assert not walk.adapts
    walk.fit(past.of([0, 1, 2, 3]))
    for _ in range(2):
        walk.predict(past.of([4, 5]), future.of([4, 5]))
    assert model.fits == [(0, 39, 4), (0, 39, 6), (0, 49, 6)]


def test_stacked_panels_are_the_panel():
    p = panel()
    both = stacked(*p.split_time(30))
    np.testing.assert_array_equal(both.y, p.y)
    np.testing.assert_array_equal(both.x, p.x)


# ---- prices -------------------------------------------------------------------------------------


def test_prices_of_a_table_are_those_of_the_arrays(tmp_path):
    p = finance_help.prices(stocks=5, days=40)
    named = {"entity": "symbol", "time": "day", "close": "px"}
    q = read_prices(finance_help.as_table(p), named)
    arrays = {"close": p.close, "dates": p.days.astype(str), "tickers": p.names, **p.others}
    np.savez(tmp_path / "p.npz", **arrays)
    for other in (q, read_prices(tmp_path / "p.npz")):
        assert other.names.tolist() == p.names.tolist() and (other.days == p.days).all()
        np.testing.assert_array_equal(other.close, p.close)
        np.testing.assert_array_equal(other.variance(), p.variance())
    assert read_prices(q) is q


def test_prices_that_cannot_be_read_are_refused(tmp_path):
    table = finance_help.as_table(finance_help.prices(stocks=2, days=10))
    with pytest.raises(ValueError, match="no column is called 'ticker', for the entity"):
        read_prices(table)
    named = {"entity": "symbol", "time": "day", "close": "px"}
    twice = {k: np.concatenate([v, v[:1]]) for k, v in table.items()}
    with pytest.raises(ValueError, match="one row of each symbol and day, got 1 more"):
        read_prices(twice, named)
    np.savez(tmp_path / "p.npz", close=np.ones((2, 3)))
    with pytest.raises(ValueError, match="has no array 'dates'"):
        read_prices(tmp_path / "p.npz")


def test_variance_is_that_of_the_returns():
    rng = np.random.default_rng(0)
    steps = rng.normal(size=400 * 1000) / 1000**0.5
    path = 100 * np.exp(np.cumsum(0.01 * steps)).reshape(1, 400, 1000)
    others = {"open": path[..., 0], "high": path.max(2), "low": path.min(2)}
    days = np.datetime64("2020-01-01") + np.arange(400)
    p = finance_help.Prices(np.array(["A"]), days, path[..., -1], others)
    # 1 % a day is a variance of 1 in squared per cent; a range of 1000 steps is a bit too small
    assert 0.85 < np.nanmean(p.variance()) < 1.05
    alone = finance_help.Prices(p.names, p.days, p.close, {})
    assert 0.8 < np.nanmean(alone.variance()) < 1.2
    assert (alone.variance()[:, 1:] > 0).all()


def test_trailing_and_ahead():
    v = np.array([[1.0, 2.0, np.nan, 4.0, 5.0]])
    np.testing.assert_array_equal(trailing(v, 2), [[1.0, 1.5, 2.0, 4.0, 4.5]])
    np.testing.assert_array_equal(trailing(v, 2, least=1.0)[0, [0, 2]], [np.nan, np.nan])
    np.testing.assert_array_equal(ahead(v, 1), [[2.0, np.nan, 4.0, 5.0, np.nan]])
    np.testing.assert_array_equal(ahead(v, 2), [[np.nan, np.nan, 4.5, np.nan, np.nan]])


# ---- regressions --------------------------------------------------------------------------------


def test_regressions_are_numpys():
    rng = np.random.default_rng(0)
    x, codes = rng.normal(size=50), np.repeat([0, 1], 25)
    y = 2 * x + 1 + rng.normal(size=50)
    slope, variance, square, n = ols(x, y, codes, 2)
    for g in range(2):
        line, rest, *_ = np.polyfit(x[codes == g], y[codes == g], 1, full=True)
        np.testing.assert_allclose([slope[g], variance[g]], [line[0], rest[0] / 23])
        np.testing.assert_allclose(square[g], ((x[codes == g] - x[codes == g].mean()) ** 2).sum())
    assert n.tolist() == [25, 25]
    assert np.isnan(ols(x[:2], y[:2], codes[:2], 2)[0]).all()


def test_the_prior_of_variances_is_found():
    rng = np.random.default_rng(0)
    true = 2.0 * 10 / rng.chisquare(10, 20_000)  # 10 degrees of freedom, scale 2
    seen = true * rng.chisquare(18, len(true)) / 18
    freedom, usual = variance_prior(seen, np.full(len(true), 18.0))
    assert abs(freedom - 10) < 0.7 and abs(usual - 2) < 0.05
    same = 2.0 * rng.chisquare(18, 5000) / 18  # all alike: drawn together
    assert variance_prior(same, np.full(5000, 18.0))[0] > 100


# ---- command, seeds -----------------------------------------------------------------------------


def test_a_jobs_options_are_its_arguments():
    def job(
        data, *, days: int = 60, fast: bool = False, stress: bool = True, at: str | None = None
    ):
        """A job.

        Args:
            data: a path.
            days: how many, in
                two lines of 100 %.
            fast: whether.

        Returns:
            Nothing.
        """

    parser = command.parser("job", job)
    words = ["--data", "f", "--days", "7", "--no-stress"]
    found = vars(parser.parse_args(words))
    assert found["days"] == 7 and found["stress"] is False and found["fast"] is False
    assert found["at"] is None and found["data"] == "f"
    assert "how many, in two lines of 100 % --fast" in " ".join(parser.format_help().split())


def test_every_job_has_a_home_and_help(capsys):
    for name, job in command.JOBS.items():
        assert command.finance([name, "--column", "nonsense", "--data", "x"]) == 2
        assert job.help in command.usage()
        assert "expected ROLE=NAME" in capsys.readouterr().err
    assert command.finance([]) == 2 and command.finance(["--help"]) == 0
    assert command.finance(["nothing"]) == 2
    assert command.finance(["volatility", "--data", "/nowhere.npz"]) == 1
    assert "pymeta finance volatility: " in capsys.readouterr().err


def test_seeds_are_averaged():
    past = panel(entities=20)
    options = {"forms": ("linear",), "support": (5, 20), "query": 10, "steps": 5, "tasks": 8}
    reports, models = compared(
        lambda seed: past,
        lambda seed: {"ours": Remainder(seed=seed, **options)},
        seeds=2,
        say=silent,
        lightgbm=False,
        stress=False,
        draws=50,
    )
    from pymeta.metrics import mean_report

    mean = mean_report(reports)
    for i, line in enumerate(mean.lines):
        both = [r.lines[i].scores[0].pooled for r in reports]
        assert line.scores[0].pooled == pytest.approx(np.mean(both))
    pair = mean.pairs[0]
    ends = [r.pairs[0].gaps["entities"].low for r in reports]
    assert pair.gaps["entities"].low == pytest.approx(np.mean(ends))
    assert "seeds" in mean.facts and models["ours"].seed == 1
    assert mean_report(reports[:1]) is reports[0]
    with pytest.raises(ValueError, match="seeds: expected a whole number >= 1, got 0"):
        compared(lambda s: past, lambda s: {}, seeds=0, say=silent)
    with pytest.raises(ValueError, match="reports: expected one or more"):
        mean_report([])
    result = Result("job", mean, reports, None)
    assert "Who wins" in str(result) and result.adapter is None


@pytest.mark.parametrize("name", command.JOBS)
def test_the_help_of_a_job_says_what_each_option_is(name):
    module, _, function = command.JOBS[name].home.partition(":")
    made = command.parser(name, getattr(import_module(module), function))
    helps = {a.dest: a.help for a in made._actions}
    assert all(helps.values()) and not [h for h in helps.values() if h.endswith(".")]
    assert not [h for h in helps.values() if "`" in h or h.startswith(("of ", "that "))]
    assert re.search(r"roles: \w+, \w+", helps["column"])
    assert made.format_help()  # a stray % would raise
