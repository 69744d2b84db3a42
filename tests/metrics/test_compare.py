"""`compare`: one split for all, rivals that are what they say, verdicts that follow intervals."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

import pymeta
from pymeta.data import Panel
from pymeta.metrics import FromEstimator, FromLearner, Interval, Pair, compare, split
from pymeta.metrics import stress as stress_tests
from pymeta.metrics.baselines import Boosted, Intercepts, PerEntity, Pooled, logit_shifts
from pymeta.metrics.models import Target
from pymeta.metrics.report import Line, Part, Report
from pymeta.metrics.tables import Score

sklearn = pytest.importorskip("sklearn")


def panel(kind="numbers", entities=30, rows=60, seed=0, slopes=1.0, time=True) -> Panel:
    """Entities with intercepts and slopes of their own; the first feature is all there is."""
    rng = np.random.default_rng(seed)
    e = np.repeat(np.arange(entities), rows)
    x = rng.normal(size=(len(e), 2))
    slope, shift = rng.normal(size=entities) * slopes, rng.normal(size=entities) * 0.5
    signal = slope[e] * x[:, 0] + shift[e] + 0.3 * x[:, 1]
    y = {
        "numbers": signal + 0.3 * rng.normal(size=len(e)),
        "binary": (rng.random(len(e)) < 1 / (1 + np.exp(-2 * signal))).astype(int),
        "positive": np.exp(0.3 * signal + 0.2 * rng.normal(size=len(e))),
    }[kind]
    day = np.datetime64("2020-01-01") + np.tile(np.arange(rows), entities)
    data = {"e": e, "day": day, "a": x[:, 0], "b": x[:, 1], "y": y}
    return Panel(data, entity="e", time="day" if time else None, target="y", numeric=["a", "b"])


class Oracle:
    """Knows what it is told, and remembers what it was given."""

    adapts = True

    def __init__(self, error: float, seed: int = 0) -> None:
        self.error, self.seed, self.given = error, seed, []

    def fit(self, train: Panel) -> None:
        self.given.append(train)

    def predict(self, history, query: Panel):
        self.given.append(history)
        noise = np.random.default_rng(self.seed).normal(size=len(query))
        return query.y + self.error * noise * (1 if history is not None else 3)


# ---- the split ----------------------------------------------------------------------------------


def test_the_split_in_time_and_over_entities():
    p = panel()
    parts = split(p, at="2020-02-10", share=0.2, gap=np.timedelta64(3, "D"), seed=0)
    assert len(parts.history.entities) == 6 == len(parts.query.entities)
    assert not set(parts.train.entities) & set(parts.query.entities)
    assert parts.past.times.max() == np.datetime64("2020-02-06")
    assert parts.query.times.min() == np.datetime64("2020-02-10")
    assert len(parts.past) == len(parts.train) + len(parts.history)
    everyone = split(p, at="2020-02-10", share=0, gap=None, seed=0)
    assert len(everyone.train) == len(everyone.history) == len(everyone.past)
    assert len(everyone.query.entities) == 30
    assert len(split(p, at=None, share=0.2, gap=None, seed=0).query) == 6 * 18


def test_the_split_without_times():
    p = panel(time=False)
    parts = split(p, at=None, share=0.2, gap=None, seed=0)
    rows = [set(part.rows.tolist()) for part in (parts.train, parts.history, parts.query)]
    assert set.union(*rows) == set(range(1800)) and sum(map(len, rows)) == 1800
    assert set(parts.past.rows.tolist()) == rows[0] | rows[1]
    with pytest.raises(ValueError, match="at, gap: expected None for a panel without times"):
        split(p, at=1, share=0.2, gap=None, seed=0)
    with pytest.raises(ValueError, match="they leave no rows for query"):
        split(panel(), at="2030-01-01", share=0.2, gap=None, seed=0)


# ---- rivals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numbers", "binary"])
def test_linear_rivals_are_scikit_learns(kind):
    from sklearn.linear_model import LogisticRegression, Ridge

    parts = split(panel(kind), at=None, share=0.2, gap=None, seed=0)
    prep = parts.past.preprocessor().fit(parts.past)
    x, xq = prep(parts.past).x, prep(parts.query).x
    target = Target(parts.past.y, "identity")

    def fitted(x, y):
        if kind == "binary":
            return LogisticRegression(max_iter=1000).fit(x, y).predict_proba
        model = Ridge(alpha=1.0).fit(x, target.to(y))
        return lambda q: np.stack([target.back(model.predict(q))] * 2, axis=1)

    got = Pooled("identity", None).fit(parts.past).predict(parts.history, parts.query)
    assert np.allclose(got, fitted(x, parts.past.y)(xq)[:, 1], atol=1e-6)
    got = PerEntity("identity", None).fit(parts.past).predict(parts.history, parts.query)
    for label in parts.query.entities:
        own, asked = parts.history.labels == label, parts.query.labels == label
        wanted = fitted(prep(parts.history).x[own], parts.history.y[own])(xq[asked])[:, 1]
        assert np.allclose(got[asked], wanted, atol=1e-6)


def test_an_entity_of_one_class_or_row_gets_the_pooled_model():
    parts = split(panel("binary"), at=None, share=0.2, gap=None, seed=0)
    first, second, third = parts.history.entities[:3]
    labels = parts.history.labels
    kept = (labels != first) & ~((labels == second) & (parts.history.y == 1))
    kept &= (labels != third) | (np.cumsum(labels == third) == 1)
    history = parts.history.where(kept)
    rival = PerEntity("identity", None).fit(parts.past)
    got, pooled = rival.predict(history, parts.query), rival.predict(None, parts.query)
    same = np.isin(parts.query.labels, [first, second, third])
    assert np.array_equal(got[same], pooled[same]) and (got[~same] != pooled[~same]).any()


def test_intercepts_of_numbers_are_buehlmanns():
    """Residual means times n / (n + k)."""
    p = panel(slopes=0.0)
    parts = split(p, at=None, share=0.3, gap=None, seed=0)
    rival = Intercepts("identity", None).fit(parts.past)
    base = rival.predict(None, parts.history)
    shift = rival.predict(parts.history, parts.query) - rival.predict(None, parts.query)
    residual = parts.history.y - base
    for label in parts.query.entities:
        own = shift[parts.query.labels == label]
        mean = residual[parts.history.labels == label].mean()
        assert np.allclose(own, own[0], atol=1e-6) and 0.9 < own[0] / mean < 1  # k is about 0.4
    assert np.abs(shift).max() > 0.3


def test_shifts_of_logits_are_the_modes_of_their_posteriors():
    from scipy.optimize import minimize_scalar

    rng = np.random.default_rng(0)
    groups, rows, tau = 300, 25, 0.8
    true = tau * rng.normal(size=groups)
    codes = np.repeat(np.arange(groups), rows)
    logits = rng.normal(size=len(codes)) - 0.5
    y = (rng.random(len(codes)) < 1 / (1 + np.exp(-logits - true[codes]))).astype(float)
    found = logit_shifts(y, logits, codes, groups)
    tau2 = _moment_estimate(y, logits, codes, groups)
    assert 0.4 < tau2 < 0.9  # of 0.64
    for g in (0, 7):
        own = codes == g

        def cost(b, own=own):
            z = logits[own] + b
            return np.log1p(np.exp(z)).sum() - (y[own] * z).sum() + b * b / tau2 / 2

        assert np.isclose(found[g], minimize_scalar(cost).x, atol=1e-5)
    none = logit_shifts(np.tile([0.0, 1.0], 200), np.zeros(400), np.repeat(np.arange(20), 20), 20)
    assert np.array_equal(none, np.zeros(20))  # more alike than chance has it


def _moment_estimate(y, logits, codes, groups):
    p = 1 / (1 + np.exp(-logits))
    score = np.array([(y - p)[codes == g].sum() for g in range(groups)])
    info = np.array([(p * (1 - p))[codes == g].sum() for g in range(groups)])
    return ((score**2 / info).sum() - groups) / info.sum()


@pytest.mark.parametrize("kind", ["numbers", "binary"])
def test_boosted_trees_with_the_entity_know_it(kind):
    pytest.importorskip("lightgbm")
    parts = split(panel(kind, slopes=0.0, entities=8, rows=200), at=None, share=0, gap=None, seed=0)
    errors = {}
    for entity in (False, True):
        rival = Boosted("identity", None, entity=entity).fit(parts.past)
        p = rival.predict(None, parts.query)
        errors[entity] = ((p - parts.query.y) ** 2).mean()
        again = Boosted("identity", None, entity=entity).fit(parts.past)
        assert np.allclose(p, again.predict(None, parts.query))
    assert errors[True] < 0.97 * errors[False]
    new = panel(kind, entities=9, rows=5)
    assert np.isfinite(rival.predict(None, new)).all()  # entities that it has not seen


def test_logarithms_make_predictions_positive_and_unbiased():
    parts = split(panel("positive"), at=None, share=0.3, gap=None, seed=0)
    got = Pooled("log", None).fit(parts.past).predict(None, parts.past)
    assert got.min() > 0 and np.isclose(got.mean(), parts.past.y.mean(), rtol=0.05)
    with pytest.raises(ValueError, match="link: 'log' expects targets > 0"):
        Pooled("log", None).fit(panel())
    with pytest.raises(ValueError, match="link: expected 'identity' or 'log'"):
        Pooled("probit", None).fit(panel())


# ---- models -------------------------------------------------------------------------------------


def make_maml(loss):
    def make(features):
        network = torch.nn.Sequential(torch.nn.Linear(features, 1))
        return pymeta.MAML(network, loss=loss, lr=0.1, steps=10)

    return make


@pytest.mark.parametrize("kind", ["numbers", "binary"])
def test_a_learner_adapts_to_each_entity(kind):
    parts = split(panel(kind), at=None, share=0.2, gap=None, seed=0)
    loss = "bce_with_logits" if kind == "binary" else "mse"
    episodes = {"tasks": 8, "support": 20, "query": 10, "batches": 30}
    ours = FromLearner(make_maml(loss), episodes=episodes, lr=0.01)
    ours.fit(parts.train)
    some = parts.history.where(parts.history.labels != parts.history.entities[0])
    adapted, start = ours.predict(some, parts.query), ours.predict(None, parts.query)
    unknown = parts.query.labels == parts.history.entities[0]
    assert np.allclose(adapted[unknown], start[unknown], atol=1e-5)
    errors = [((p - parts.query.y)[~unknown] ** 2).mean() for p in (adapted, start)]
    assert errors[0] < (0.95 if kind == "binary" else 0.8) * errors[1]


@pytest.mark.parametrize("kind", ["numbers", "binary", "positive"])
@pytest.mark.parametrize("base", ["linear", "forest"])
def test_a_remainder_of_nothing_is_the_pooled_model(kind, base):
    """A learner that starts at 0 and learns nothing predicts what its base does."""
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    parts = split(panel(kind), at=None, share=0.2, gap=None, seed=0)
    forest = RandomForestClassifier if kind == "binary" else RandomForestRegressor
    chosen = base if base == "linear" else forest(n_estimators=5, max_depth=3, random_state=0)
    link = "log" if kind == "positive" else "identity"

    def make(features):
        network = torch.nn.Sequential(torch.nn.Linear(features, 1))
        torch.nn.init.zeros_(network[0].weight), torch.nn.init.zeros_(network[0].bias)
        loss = "bce_with_logits" if kind == "binary" else "mse"
        return pymeta.MAML(network, loss=loss, lr=0.1, steps=10)

    episodes = {"tasks": 4, "support": 20, "query": 10, "batches": 0}
    ours = FromLearner(make, episodes=episodes, base=chosen, link=link).fit(parts.train)
    if base == "linear":
        pooled = Pooled(link, None).fit(parts.train)
    else:
        pooled = FromEstimator(chosen, link=link).fit(parts.train)
    start, wanted = ours.predict(None, parts.query), pooled.predict(None, parts.query)
    # where a training row adapts, the smear of logarithms is of what is left
    factor = wanted / start if kind == "positive" else np.ones(1)
    assert np.allclose(start * factor.mean(), wanted, atol=1e-5)
    adapted = ours.predict(parts.history, parts.query)
    errors = [((p - parts.query.y) ** 2).mean() for p in (adapted, start)]
    assert errors[0] < errors[1]


def test_a_learner_adapts_to_the_last_rows():
    parts = split(panel(), at=None, share=0.2, gap=None, seed=0)
    episodes = {"tasks": 4, "support": 5, "query": 5, "batches": 1}
    short = FromLearner(make_maml("mse"), episodes=episodes, history=7).fit(parts.train)
    whole = FromLearner(make_maml("mse"), episodes=episodes).fit(parts.train)
    got = short.predict(parts.history, parts.query)
    assert np.allclose(got, whole.predict(parts.history.last(7), parts.query), atol=1e-5)
    assert not np.allclose(got, whole.predict(parts.history, parts.query), atol=1e-3)
    with pytest.raises(ValueError, match="history: expected a whole number >= 1"):
        FromLearner(make_maml("mse"), episodes=episodes, history=0)


def test_an_estimator_that_adapts_gets_groups():
    from pymeta.sklearn import MetaRegressor

    parts = split(panel(), at=None, share=0.2, gap=None, seed=0)
    model = FromEstimator(MetaRegressor(hidden=(), iterations=30, adapt_lr=0.1, random_state=0))
    model.fit(parts.train)
    adapted = model.predict(parts.history, parts.query)
    start = model.predict(None, parts.query)
    assert ((adapted - parts.query.y) ** 2).mean() < 0.8 * ((start - parts.query.y) ** 2).mean()


@pytest.mark.parametrize("takes_times", [True, False])
def test_an_estimator_that_takes_times_gets_them(takes_times):
    from sklearn.linear_model import LinearRegression

    given = []

    class Plain(LinearRegression):
        def fit(self, X, y, groups=None, **more):
            given.append((groups, more))
            return super().fit(X, y)

        def adapt(self, X, y, groups=None):
            given.append((groups, {}))

        def predict(self, X, groups=None):
            return super().predict(X)

    class Timed(Plain):
        def adapt(self, X, y, groups=None, times=None):
            given.append((groups, {"times": times}))

    parts = split(panel(), at=None, share=0.2, gap=None, seed=0)
    model = FromEstimator(Timed() if takes_times else Plain()).fit(parts.train)
    model.predict(parts.history, parts.query)
    for (groups, more), wanted in zip(given, (parts.train, parts.history), strict=True):
        assert np.array_equal(groups, wanted.labels)
        times = {"times": wanted.times.tolist()} if takes_times else {}
        assert {n: v.tolist() for n, v in more.items()} == times


# ---- verdicts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    from sklearn.linear_model import LinearRegression

    models = {"oracle": Oracle(0.05), "plain": LinearRegression()}
    return compare(panel(rows=120), models, share=0.5, draws=200, block=4, lightgbm=False)


def test_what_each_model_is_given():
    from sklearn.linear_model import LinearRegression

    p = panel()
    ours, other = Oracle(0.1), Oracle(0.1)
    models = {"a": ours, "b": other, "c": LinearRegression()}
    compare(p, models, share=0.5, draws=50, lightgbm=False,
            stress={"late": stress_tests.delay_labels(5)})  # fmt: skip
    train, history, nothing, late, nothing_either = ours.given
    assert not set(train.entities) & set(history.entities)
    assert nothing is None and nothing_either is None  # the start is asked for without a history
    assert late.times.max() == history.times.max() - 5 and len(late.entities) == 15
    assert [g if g is None else g.rows.tolist() for g in other.given] == [
        g if g is None else g.rows.tolist() for g in ours.given
    ]


def test_the_report(report, tmp_path):
    names = [line.name for line in report.lines]
    assert names == ["oracle", "oracle, unadapted", "plain", "pooled linear", "linear by entity",
                     "empirical Bayes"]  # fmt: skip
    assert report.metrics == ["MSE", "R2"]
    assert report.verdicts["pooled linear", "MSE"] == "win"
    assert report.verdicts["oracle, unadapted", "R2"] == "win"
    assert {p.name for p in report.periods} == {"calm", "stressed"}
    assert sum(p.rows for p in report.periods) == 15 * 36
    assert [p.name for p in report.stress] == ["levels x 2", "levels x 4", "volatility x 2",
        "volatility x 4", "without b", "labels 40 periods late"]  # fmt: skip
    frame = report.frame()
    assert frame.loc["oracle", "MSE"] < 0.01 and (frame["fit_s"] >= 0).all()
    text = report.markdown()
    assert "- oracle beats pooled linear in MSE: 0.00" in text and "over 15 entities" in text
    assert "over 9 blocks of time" in text and "| oracle, unadapted |" in text
    for ending in ("md", "html"):
        report.save(tmp_path / f"r.{ending}")
    page = (tmp_path / "r.html").read_text()
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert "<table>" in page and "http" not in page
    assert ("data:image/png;base64," in page) == drawn
    shown = report._repr_html_()
    assert shown.startswith("<div><h2>") and shown.removeprefix("<div>")[:-6] in page
    assert repr(report).startswith("Report(oracle, ") and len(repr(report)) < 300
    assert f"{list(report.verdicts.values()).count('win')} win)" in repr(report)
    with pytest.raises(ValueError, match=r"ends in \.html or \.md"):
        report.save("r.pdf")


@pytest.mark.parametrize("kind", ["numbers", "binary"])
def test_labels_that_are_later_than_the_history_leave_the_start(kind):
    """40 periods late, where there are 21 of history: everyone predicts without one."""
    ours = FromLearner(
        make_maml("mse" if kind == "numbers" else "bce_with_logits"),
        episodes={"tasks": 4, "support": 5, "query": 5, "batches": 1},
    )
    report = compare(panel(kind, rows=30), {"ours": ours}, draws=50, block=3, lightgbm=False)
    (late,) = (p for p in report.stress if "late" in p.name)
    assert late.values["ours"] == late.values["ours, unadapted"]
    pooled = pytest.approx(late.values["pooled linear"], rel=1e-5)  # one is summed in float32
    assert late.values["empirical Bayes"] == pooled


def test_a_worse_model_is_told_so():
    found = compare(
        panel(), {"noise": Oracle(5.0)}, share=0.5, draws=100, lightgbm=False, stress=False
    )
    assert found.verdicts["linear by entity", "MSE"] == "lose" and found.stress == []
    assert found.words[0].startswith("noise loses to ")


def pair(larger, *gaps):
    intervals = {str(i): Interval(sum(g) / 2, *g) for i, g in enumerate(gaps)}
    return Pair("a", "b", "m", larger, (1.0, 2.0), intervals, dict.fromkeys(intervals, 9))


@pytest.mark.parametrize(
    ("larger", "gaps", "verdict"),
    [
        (True, [(0.1, 0.2)], "win"),
        (True, [(0.1, 0.2), (-0.1, 0.2)], "tie"),
        (True, [(0.1, 0.2), (-0.2, -0.1)], "lose"),
        (False, [(0.1, 0.2), (-0.1, 0.2)], "lose"),
        (False, [(-0.2, -0.1), (-0.3, -0.1)], "win"),
        (False, [], "tie"),
    ],
)
def test_verdicts_need_every_interval_to_win_and_one_to_lose(larger, gaps, verdict):
    assert pair(larger, *gaps).verdict == verdict


def test_differences_by_rounding_are_none():
    """However sure: the intervals of 1 part in 10^8 are all on one side."""
    gaps = {"entities": Interval(-2e-8, -3e-8, -1e-8)}
    tie = Pair("a", "b", "m", False, (2.0, 2.0 + 2e-8), gaps, {"entities": 9})
    assert tie.verdict == "tie" and "is not told apart from" in tie.words
    close = {"entities": Interval(-2e-5, -3e-5, -1e-5)}
    assert Pair("a", "b", "m", False, (2.0, 2.0 + 2e-5), close, {"entities": 9}).verdict == "win"
    parts = [
        Part("calm", 9, {"a": 2.0, "b": 2.0 - gap.value}, {"b": gap})
        for gap in (gaps["entities"], close["entities"])
    ]
    score = Score("m", 2.0, 2.0, 9, {}, {})
    lines = [Line(n, n == "a", [score], [None], 0.0, 0.0) for n in "ab"]
    table = Report(lines, [tie], parts, [], ["m"], {})._parts_table(parts)[1]
    assert table[1][1] == "2" and table[1][2].endswith("(worse than ours)")


@pytest.mark.parametrize(
    ("models", "changes", "error", "says"),
    [
        ({}, {}, ValueError, "models: expected one model or more"),
        ({"a": 3}, {}, TypeError, "models: a: expected an estimator, or a model with fit"),
        ({"a": Oracle(0.1)}, {"metrics": ["auc"]}, ValueError, "AUC expects targets of 0 and 1"),
        ({"a": Oracle(np.inf)}, {}, ValueError, "models: a: 270 of 270 predictions are not finite"),
        ({"a": Oracle(0.1)}, {"metrics": ["nothing"]}, ValueError, "metric: expected one of"),
    ],
)
def test_what_is_refused(models, changes, error, says):
    with pytest.raises(error, match=says):
        compare(panel(), models, share=0.5, draws=20, lightgbm=False, stress=False, **changes)


def test_tables_and_models_without_names_are_refused():
    p = panel()
    with pytest.raises(TypeError, match=r"panel: expected a Panel or a Split, got dict; make one"):
        compare(p.to_dict(), {"a": Oracle(0.1)})
    with pytest.raises(TypeError, match=r"models: expected models by name, .*, got Oracle"):
        compare(p, Oracle(0.1))


def test_few_times_are_said_to_have_no_interval():
    p = panel()
    options = {"share": 0.5, "at": "2020-02-10", "draws": 20, "lightgbm": False, "stress": False}
    few = compare(p, {"a": Oracle(0.1)}, block=21, **options)
    assert few.facts["intervals"].startswith("none over time: query has 1 block of 21 distinct")
    assert few.periods == []  # of one block there is no calmer one
    assert few.facts["intervals"] in few.markdown()
    some = compare(p, {"a": Oracle(0.1)}, block=10, **options)
    assert {part.name for part in some.periods} == {"calm", "stressed"}
    assert "query has 2 blocks of 10" in some.facts["intervals"]
    enough = compare(p, {"a": Oracle(0.1)}, block=4, **options)
    assert "intervals" not in enough.facts
    assert all("blocks of time" in pair.gaps for pair in enough.pairs)


def test_a_learner_has_to_be_wrapped():
    maml = make_maml("mse")(2)
    with pytest.raises(TypeError, match=r"wrap a learner as FromLearner"):
        compare(panel(), {"maml": maml}, lightgbm=False)
    with pytest.raises(TypeError, match=r"make: expected a function .*, got MAML"):
        FromLearner(maml, episodes={"batches": 3})
    with pytest.raises(ValueError, match=r"expected batches="):
        FromLearner(make_maml("mse"), episodes={"tasks": 3})
    with pytest.raises(
        TypeError, match="base: expected 'linear', an estimator or None, got 'tree'"
    ):
        FromLearner(make_maml("mse"), episodes={"batches": 3}, base="tree")


# ---- stress -------------------------------------------------------------------------------------


def test_stress_tests_touch_what_they_say():
    p = panel()
    history, query = p.split_time("2020-02-10")
    _, scaled, touched = stress_tests.scale_levels(4, 5, target=True)(history, query)
    assert touched.sum() == 5 * 30 and (query.times[touched] >= query.times.max() - 4).all()
    assert np.allclose(scaled["a"][touched], 4 * query["a"][touched])
    assert np.allclose(scaled.y[touched], 4 * query.y[touched])
    assert np.array_equal(scaled["a"][~touched], query["a"][~touched])
    _, wild, touched = stress_tests.scale_volatility(2, 5)(history, query)
    middle = np.median(query["b"])
    assert np.allclose(wild["b"][touched] - middle, 2 * (query["b"][touched] - middle))
    assert np.array_equal(wild.y, query.y)
    _, without, _ = stress_tests.without("a")(history, query)
    assert np.isnan(without["a"]).all() and np.array_equal(without["b"], query["b"])
    late, same, _ = stress_tests.delay_labels(10)(history, query)
    assert late.times.max() == history.times.max() - 10 and same is query
    assert stress_tests.strongest(panel(slopes=0.0)) == "b"


def test_stressed_periods_are_the_worst_blocks():
    times = np.arange(12)
    y = np.array([0, 0, 0, 5, -5, 5, 0, 0, 1, 1, 1, 1.0])
    rows = stress_tests.stressed_rows(y, times, 0.0, 3)
    assert rows.tolist() == [False] * 3 + [True] * 3 + [False] * 6
    defaults = stress_tests.stressed_rows((times > 8).astype(float), times, 0.0, 3)
    assert defaults.tolist() == [False] * 9 + [True] * 3


def test_a_split_of_ones_own_is_taken_as_it_is():
    p = panel()
    parts = split(p, at="2020-02-10", share=0.2, gap=None, seed=0)
    model = Oracle(0.1)
    options = {"lightgbm": False, "stress": False, "draws": 50}
    own = compare(parts, {"ours": model}, **options)
    same = compare(p, {"ours": Oracle(0.1)}, at="2020-02-10", share=0.2, **options)
    assert model.given[0] is parts.train and model.given[1] is parts.history
    assert own.frame()["MSE"].tolist() == same.frame()["MSE"].tolist()
