"""What keeps adaptation from doing harm: pooled models and remainders, the choice, the gate."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn_help import PLAIN, levels, opposites, same_models

import pymeta
from pymeta import LearnableAnchor, QuantileLoss
from pymeta.sklearn import MetaClassifier, MetaRegressor
from pymeta.sklearn.choosing import Choice, Way, folds, halves, judged_over_time, sides_of
from pymeta.sklearn.episodes import cut_of
from pymeta.sklearn.gate import Gains, Prior, gains, keeps, prior_of
from pymeta.sklearn.offsets import cross_fitted, numbers
from pymeta.sklearn.starts import How

QUICK = {"hidden": (16,), "iterations": 100, "epochs": 20, "meta_lr": 1e-2, "random_state": 0}


def alike(groups=24, rows=20, seed=0, own=0.0):
    """Groups that are all the same, but for slopes of `own` size: X, y of numbers, g."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(groups), rows)
    X = rng.normal(size=(len(g), 3))
    slopes = np.random.default_rng(9).normal(size=groups) * own
    return X, 2 * X[:, 0] + slopes[g] * X[:, 1] + rng.normal(size=len(g)), g


# ---- the pooled model and its remainder ---------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "maml", "reptile", "ridge"])
def test_a_remainder_is_adapted_and_is_zero_elsewhere(method):
    X, y, g = alike(own=2.0)
    model = MetaRegressor(method, base=LinearRegression(), **QUICK).fit(X, y, groups=g)
    pooled = LinearRegression().fit(X, y)
    np.testing.assert_allclose(model.base_.predict(X), pooled.predict(X), rtol=1e-6, atol=1e-6)
    if method != "ridge":  # whose prior is learned
        np.testing.assert_allclose(model.predict(X), pooled.predict(X), rtol=0, atol=1e-4)
    model.adapt(X, y, groups=g)
    later, truth, groups = alike(own=2.0, seed=1)
    assert model.score(later, truth, groups=groups) > pooled.score(later, truth) + 0.1


def test_a_classifiers_remainder():
    X, y, g = opposites(rows=40)
    model = MetaClassifier(base=LogisticRegression(), **QUICK).fit(X, y, groups=g)
    pooled = LogisticRegression().fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), pooled.predict_proba(X), rtol=0, atol=1e-4)
    model.set_params(adapt_epochs=60, adapt_lr=0.3).adapt(X, y, groups=g)
    assert model.score(X, y, groups=g) > 0.9
    three = np.array(["a", "b", "c"])[np.digitize(X[:, 0], [-0.5, 0.5])]
    still = QUICK | {"iterations": 1, "meta_lr": 0.0}
    model = MetaClassifier("maml", base=LogisticRegression(), **still).fit(X, three, groups=g)
    expected = LogisticRegression().fit(X, three).predict_proba(X)
    np.testing.assert_allclose(model.predict_proba(X), expected, rtol=0, atol=1e-4)


def test_offsets_of_the_callers_own_are_those_of_a_base():
    X, y, g = alike(own=2.0)
    known = LinearRegression().fit(X, y).predict(X)
    model = MetaRegressor("maml", **QUICK).fit(X, y, groups=g, offset=known)
    np.testing.assert_allclose(model.predict(X, offset=known), known, rtol=0, atol=1e-4)
    model.adapt(X, y, groups=g, offset=known)
    assert model.score(X, y, groups=g, offset=known) > model.score(X, y, offset=known) + 0.1
    with pytest.raises(ValueError, match=r"^offset: expected one for each row, as fit had"):
        model.predict(X)
    with pytest.raises(ValueError, match=r"^offset: expected one for each row, as fit had"):
        model.adapt(X, y, groups=g)
    for wrong, words in ((known[:3], r"shape \[480\]"), (known + np.nan, "finite")):
        with pytest.raises(ValueError, match=f"^offset: expected {words}"):
            model.predict(X, offset=wrong)
    with pytest.raises(ValueError, match=r"^offset: expected 1 for each row, got 2"):
        model.predict(X, offset=np.stack([known, known], axis=1))
    with pytest.raises(ValueError, match=r"^offset: expected None, because fit had none"):
        MetaRegressor("pooled", **QUICK).fit(X, y).predict(X, offset=known)
    with pytest.raises(ValueError, match=r"^offset: expected None, because base predicts it"):
        MetaRegressor(base=LinearRegression()).fit(X, y, groups=g, offset=known)
    with pytest.raises(
        TypeError,
        match=r"^base: expected 'auto', an estimator of scikit-learn or None, got 'linear'",
    ):
        MetaRegressor(base="linear").fit(X, y, groups=g)


@pytest.mark.parametrize(
    "loss", ["huber", "qlike", "poisson_nll", "gaussian_nll", QuantileLoss([0.2, 0.8])]
)
def test_an_offset_is_in_the_units_of_the_loss(loss):
    X, y, g = alike(own=1.0)
    counts = isinstance(loss, str) and loss in ("qlike", "poisson_nll")
    y = np.exp(y / 3) if counts else y
    known = y.mean() * np.exp(X[:, 0] / 9) if counts else 5 * X[:, 0]
    offset = np.log(known) if counts else known
    model = MetaRegressor("maml", loss=loss, **QUICK | {"iterations": 1, "meta_lr": 0.0})
    predicted = model.fit(X, y, groups=g, offset=offset).predict(X, offset=offset)
    for column in predicted.T if predicted.ndim == 2 else [predicted]:
        np.testing.assert_allclose(column, known, rtol=2e-6, atol=2e-6)


def test_rows_are_not_predicted_by_who_has_seen_their_group():
    X, y, g = levels(groups=10)
    forest = RandomForestRegressor(20, random_state=0)
    predict = lambda model, X: numbers(model, X, None)  # noqa: E731
    crossed = cross_fitted(forest, X, y, None, g, predict)
    seen = clone(forest).fit(X, y).predict(X)
    assert np.square(crossed - y).mean() > 3 * np.square(seen - y).mean()
    for name in np.unique(g)[:3]:  # nothing of a group's own targets is in its offsets
        other = np.where(g == name, y + 100, y)
        again = cross_fitted(forest, X, other, None, g, predict)
        assert np.array_equal(again[g == name], crossed[g == name])


# ---- the choice on groups held out --------------------------------------------------------------


@pytest.mark.parametrize("base", [None, LinearRegression()])
def test_nothing_is_adapted_where_groups_are_alike(base):
    X, y, g = alike(groups=30)
    model = MetaRegressor(base=base, **QUICK).fit(X, y, groups=g)
    shared = model.predict(X)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.adapt(X, y, groups=g).adapt(X, y, groups=g)
    way = model.choice_.way
    if way.how is None:
        assert [str(w.message)[:6] for w in said] == ["adapt:"]  # once
        assert np.array_equal(model.predict(X, groups=g), shared)
    later, truth, groups = alike(groups=30, seed=1)
    adapted = np.square(model.predict(later, groups=groups) - truth).mean()
    assert adapted < 1.02 * np.square(model.predict(later) - truth).mean()
    best = min(model.choice_.ways, key=lambda w: w.loss)
    assert way.loss - best.loss <= 2 * way.error and way.moved <= best.moved
    free = model.set_params(anchor_rows=None, gate=False).adapt(X, y, groups=g)
    assert len(free.adapted_groups_) == 30


def test_a_choice_is_shown_in_a_line():
    held = Way("pooled", How(20, anchor_rows=80.0), 0.43779, 0.002, 0.1)
    free, none = Way("maml", How(1), 0.5), Way("zero", None, 0.44)
    assert repr(held) == "<pooled, 20 epochs, anchor_rows=80: loss 0.4378>"
    assert repr(free) == "<maml, 1 epoch: loss 0.5>"
    assert repr(Way("maml", How(2, 0.5), 0.5)) == "<maml, 2 epochs, anchor=0.5: loss 0.5>"
    chosen = Choice(held, "zero", None, (held, free, none))
    assert repr(chosen) == f"Choice({held} of 3 ways; without a model of its own: zero)"
    assert repr(Choice(none, "zero")) == (
        "Choice(<zero, not adapted: loss 0.44>; without a model of its own: zero)"
    )


def test_a_linear_model_is_what_the_default_begins_with_and_falls_back_to():
    """Of a linear truth with features of all scales and a constant one, the default is linear."""
    X, y, g = alike(groups=12, rows=30)
    X = np.column_stack([1000 * X, np.full(len(X), 7.0)])
    weights = np.where(np.arange(len(y)) % 5 == 0, 0.0, 1.0)
    wrong = np.where(weights == 0, 1e3, y)  # rows of weight 0 count for nothing
    model = MetaRegressor(**QUICK).fit(X, wrong, groups=g, sample_weight=weights)
    ols = LinearRegression().fit(X[weights > 0], y[weights > 0])
    assert type(model.base_.model).__name__ == "Ridge"
    assert {w.start for w in model.choice_.ways} == {"zero", "pooled", "maml"}
    assert model.choice_.rest == "zero"
    np.testing.assert_allclose(model.predict(X), model.base_.predict(X), rtol=1e-5, atol=1e-4)
    # ridge's penalty of at most 1e4 rows was chosen on rows of noise 1: it is near least squares
    assert np.abs(model.predict(X) - ols.predict(X)).max() < 0.5
    alone = clone(model).set_params(base=None).fit(X, y, groups=g)
    assert not hasattr(alone, "base_") and {w.start for w in alone.choice_.ways} == {
        "pooled",
        "maml",
    }
    for other in (clone(model).set_params(method="maml"), clone(model)):
        few = slice(
            0, 150 if other.method == "auto" else None
        )  # five groups are too few to choose by
        assert not hasattr(other.fit(X[few], y[few], groups=g[few]), "base_")


@pytest.mark.parametrize("loss", ["poisson_nll", "bce"])
def test_a_linear_model_of_every_kind(loss):
    rng = np.random.default_rng(0)
    g, X = np.repeat(np.arange(12), 40), rng.normal(size=(480, 2))
    if loss == "bce":
        y = rng.random(480) < 1 / (1 + np.exp(-2 * X[:, 0]))
        model = MetaClassifier(**QUICK | {"iterations": 5, "epochs": 2})
        model.fit(X, y, groups=g)
        rival = LogisticRegression().fit(X, y).predict_proba(X)[:, 1]
        np.testing.assert_allclose(model.predict_proba(X)[:, 1], rival, rtol=0, atol=0.15)
    else:
        y = rng.poisson(np.exp(1 + 0.7 * X[:, 0])).astype(float)
        model = MetaRegressor(loss=loss, **QUICK | {"iterations": 5, "epochs": 2})
        model.fit(X, y, groups=g)
        rates = model.predict(X)
        assert (rates > 0).all()
        assert abs(np.polyfit(X[:, 0], np.log(rates), 1)[0] - 0.7) < 0.15
    assert model.base_.predict(X).shape == (480,)


@pytest.mark.parametrize("initial", [1.0, 100.0])
def test_how_many_rows_the_start_is_worth_is_learned(initial):
    """Groups alike in truth, of rows that are noise: the start is worth more than it began with."""
    X, y, g = alike(groups=16, rows=12)
    quick = QUICK | {"iterations": 60, "hidden": ()}
    model = MetaRegressor("maml", anchor_rows=LearnableAnchor(initial), **quick)
    model.fit(X, y, groups=g)
    assert model.anchor_rows_ > initial and model._how().anchor_rows == model.anchor_rows_
    model.adapt(X, y, groups=g)
    fixed = copy.deepcopy(model).set_params(anchor_rows=model.anchor_rows_).adapt(X, y, groups=g)
    assert np.array_equal(fixed.predict(X, groups=g), model.predict(X, groups=g))
    again = clone(model)
    assert again.anchor_rows.initial == initial
    with pytest.raises(ValueError, match=r"^anchor_rows: expected method='maml', which alone"):
        again.set_params(method="reptile").fit(X, y, groups=g)


def test_groups_go_far_where_that_helps():
    X, y, g = levels(groups=24, rows=30)
    model = MetaRegressor(**QUICK).fit(X, y, groups=g).adapt(X, y, groups=g)
    assert model.choice_.way.how is not None and len(model.adapted_groups_) == 24
    later, truth, groups = levels(groups=24, rows=30)
    assert model.score(later, truth, groups=groups) > 0.9
    assert model.choice_.prior.mean > 0


def test_what_is_set_is_not_chosen():
    X, y, g = levels(groups=9)
    model = MetaRegressor("maml", **QUICK | {"iterations": 5}, adapt_epochs=7, anchor_rows=3.0)
    model.fit(X, y, groups=g)
    assert model.choice_ is None and model._how().epochs == 7 and model._how().anchor_rows == 3.0
    open_ = clone(model).set_params(anchor_rows="auto").fit(X, y, groups=g)
    assert {w.how.epochs for w in open_.choice_.ways if w.how} == {7}
    assert len({w.how.anchor_rows for w in open_.choice_.ways if w.how}) == 5
    few = clone(open_).fit(X[g < "g3"], y[g < "g3"], groups=g[g < "g3"])
    assert few.choice_ is None and len(few.adapt(X, y, groups=g).models_) > 1


def test_where_times_are_known_later_times_judge():
    """What is common to a time is learned from other groups, and is no use at times to come."""
    members = [np.array([0, 2, 5, 9, 11, 12]), np.array([1, 3]), np.array([4, 6, 7, 8, 10, 13])] * 5
    some = judged_over_time(members, 9)
    assert [len(m) for m in some[:3]] == [6, 0, 6]  # the second has no row behind the cut
    assert judged_over_time(members, None) is None and judged_over_time(members, 2) is None
    early, later = sides_of(members[:1], 9)
    assert early[0].tolist() == [0, 2, 5] and later[0].tolist() == [9, 11, 12]
    assert cut_of(np.array([3, 1, 1, 2, 2, 2])) == 2 and cut_of(np.ones(4)) is None
    rng = np.random.default_rng(0)
    days, groups = 60, 24
    day, g = np.tile(np.arange(days), groups), np.repeat(np.arange(groups), days)
    shock = rng.normal(size=days)  # known by a feature of the day, of which the day is a function
    X = np.column_stack([np.sin(day), np.cos(3.0 * day), rng.normal(size=len(g))])
    y = X[:, 2] + 2 * shock[day] + 0.3 * rng.normal(size=len(g))
    options = QUICK | {"epochs": 60, "hidden": (64,)}
    aware = MetaRegressor(**options).fit(X, y, groups=g, times=day)
    blind = MetaRegressor(**options, shuffle=False).fit(
        X[g_order(day, g)], y[g_order(day, g)], groups=g[g_order(day, g)]
    )
    assert aware.choice_.rest == "zero" and blind.choice_.rest != "zero"


def g_order(day, g):
    """Group after group, each in the order of its days."""
    return np.lexsort((day, g))


def test_folds_hold_each_group_out_once_or_a_third():
    rng = np.random.RandomState(0)
    members = [np.arange(4)] * 10 + [np.arange(3)]  # the last is too small to judge by
    found = folds(members, rng)
    assert len(found) == 3 and sorted(g for _, judges in found for g in judges) == list(range(10))
    assert all(sorted(train + judges) == list(range(11)) for train, judges in found)
    ((train, judges),) = folds([np.arange(4)] * 100, rng)
    assert len(judges) == 33 and not set(train) & set(judges)
    assert folds(members[:5], rng) == []
    assert len(folds([np.arange(4)] * 2000, rng)[0][1]) == 200
    early, later = halves([np.arange(10, 17)], False, rng)
    assert early[0].tolist() == [10, 11, 12, 13] and later[0].tolist() == [14, 15, 16]


def test_times_order_the_rows():
    X, y, g = levels(groups=9)
    order = np.random.default_rng(0).permutation(len(y))
    days = np.datetime64("2020-01-01") + np.arange(len(y))
    one = MetaRegressor(**QUICK | {"iterations": 5}, shuffle=False).fit(X, y, groups=g)
    one.adapt(X, y, groups=g)
    two = MetaRegressor(**QUICK | {"iterations": 5})
    mixed = (X[order], y[order], g[order])
    two.fit(*mixed, times=days[order]).adapt(*mixed, times=days[order])
    assert same_models(one, two)
    with pytest.raises(ValueError, match=r"^times: expected one for each row"):
        two.fit(X, y, groups=g, times=days[:3])
    with pytest.raises(ValueError, match=r"^times: 1 row has none"):
        two.adapt(X, y, groups=g, times=np.where(np.arange(len(y)) == 4, np.nan, 1.0))


@pytest.mark.parametrize("ordered", [True, False])
def test_pooled_training_stops_by_the_last_rows_where_they_are_in_order(ordered, monkeypatch):
    made = []

    class Spy(pymeta.FineTune):
        def forward(self, xs, ys, **options):
            if self.validation:
                made.append((self.validation_rows, xs[0]))
            return super().forward(xs, ys, **options)

    monkeypatch.setattr(pymeta, "FineTune", Spy)
    X, y, g = levels(groups=9, rows=20)
    days = np.tile(np.arange(20), 9)
    X = days[:, None] / 20.0
    MetaRegressor(**QUICK | {"iterations": 2, "epochs": 2}).fit(
        X, y, groups=g, times=days if ordered else None
    )
    assert len(made) == 4  # three folds, and all groups
    for how, x in made:
        assert how == ("last" if ordered else "random")
        assert bool((np.diff(x[:, 0].numpy()) >= 0).all()) == ordered


# ---- the gate -----------------------------------------------------------------------------------


def test_gains_are_means_of_groups():
    found = gains(np.array([3.0, 2, 5, 5]), np.array([1.0, 1, 5, 6]), np.array([0, 0, 2, 2]), 3)
    np.testing.assert_allclose(found.mean, [1.5, 0, -0.5])
    np.testing.assert_allclose(found.squares, [0.5, 0, 0.5])
    assert found.rows.tolist() == [2, 0, 2]


def test_the_prior_is_that_of_the_groups():
    """Gains N(0.3, 0.2^2) of groups, seen through rows of variance 1: both are found again."""
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(400), 50)
    gain = 0.3 + 0.2 * rng.normal(size=400)
    rows = gain[codes] + rng.normal(size=len(codes))
    prior = prior_of(gains(rows, np.zeros(len(rows)), codes, 400))
    assert abs(prior.mean - 0.3) < 4 * np.sqrt((0.04 + 1 / 50) / 400)
    assert abs(prior.variance - 0.04) < 4 * (0.04 + 1 / 50) * np.sqrt(2 / 400)
    assert abs(prior.of_rows - 1) < 4 * np.sqrt(2 / len(rows))
    assert prior_of(gains(rows[:100], np.zeros(100), codes[:100], 2)) is None


def test_the_gate_hears_other_groups_and_the_groups_own_rows():
    def asked(mean, rows, prior):
        one = Gains(np.array([mean]), np.array([1.0 * (rows - 1)]), np.array([rows]))
        return bool(keeps(one, prior)[0])

    good, bad = Prior(0.1, 0.01, 1.0), Prior(-0.1, 0.01, 1.0)
    assert asked(-0.2, 4, good) and not asked(0.2, 4, bad)  # few rows: what others gained
    assert not asked(-0.2, 4000, good) and asked(0.2, 4000, bad)  # many rows: their own
    assert asked(-0.4, 4, None) and not asked(-0.6, 4, None)  # one standard error is 0.5
    assert asked(0.0, 0, bad) and not asked(np.nan, 4, good) and not asked(-np.inf, 4, good)


def test_groups_that_lose_fall_back():
    """In use, some groups' past is the opposite of what they do later on."""
    X, y, g = levels(groups=24, rows=30)
    model = MetaRegressor(**QUICK, shuffle=False).fit(X, y, groups=g)
    turned = y.copy()
    place = np.arange(len(y)) % 30
    broken = (np.isin(g, ["g0", "g1"])) & (place < 20)
    turned[broken] = -y[broken] + 20
    shared = model.predict(X)
    model.adapt(X, turned, groups=g)
    assert {"g0", "g1"} <= set(model.gated_groups_)
    assert len(model.adapted_groups_) + len(model.gated_groups_) == 24
    gated = np.isin(g, model.gated_groups_.tolist())
    assert np.array_equal(model.predict(X, groups=g)[gated], shared[gated])
    model.adapt(X, y, groups=g)
    assert {"g0", "g1"} <= set(model.adapted_groups_) - set(model.gated_groups_)
    loose = copy.deepcopy(model).set_params(gate=False).adapt(X, turned, groups=g)
    assert len(loose.gated_groups_) == 0 and len(loose.adapted_groups_) == 24


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_groups_model_depends_on_its_own_rows_alone(shuffle):
    X, y, g = levels(groups=12)
    model = MetaRegressor(**QUICK | {"iterations": 10}, shuffle=shuffle).fit(X, y, groups=g)
    one, parts = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    one.adapt(X, y, groups=g)
    for some in (g < "g3", g >= "g3"):
        parts.adapt(X[some], y[some], groups=g[some])
    assert np.array_equal(one.predict(X, groups=g), parts.predict(X, groups=g))
    assert set(one.gated_groups_) == set(parts.gated_groups_)


# ---- the rest -----------------------------------------------------------------------------------


def test_inputs_stay_within_what_fit_saw():
    X, y, g = levels(groups=4)
    model = MetaRegressor(**QUICK | {"iterations": 5}).fit(X, y, groups=g)
    ends = np.array([[-50.0], [X.min()], [X.max()], [50.0]])
    low, least, most, high = model.predict(ends)
    assert (low, high) == (least, most)
    free = clone(model).set_params(clip_inputs=False).fit(X, y, groups=g).predict(ends)
    assert free[0] != free[1] and free[2] != free[3]


@pytest.mark.parametrize("unknown", ["start", "warn", "error"])
def test_groups_nobody_knows(unknown):
    X, y, g = levels(groups=6)
    model = MetaRegressor(**QUICK | {"iterations": 2}, unknown=unknown, **PLAIN)
    some = g < "g4"
    model.fit(X, y, groups=g).adapt(X[some], y[some], groups=g[some])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if unknown == "error":
            with pytest.raises(ValueError, match=r"^groups: 2 were never adapted to: 'g4', 'g5'"):
                model.predict(X, groups=g)
        else:
            assert np.array_equal(model.predict(X, groups=g)[~some], model.predict(X)[~some])
    assert [str(w.message)[:8] for w in said] == (["groups: "] if unknown == "warn" else [])
    numbers_now = np.array([int(name[1:]) for name in g])
    if unknown != "start":
        with pytest.raises(TypeError, match=r"^groups: expected labels of type str, .* got int"):
            model.predict(X, groups=numbers_now)


def test_without_groups_there_is_a_warning():
    X, y, g = levels(groups=4)
    quick = QUICK | {"iterations": 2, "epochs": 1}
    for method in ("auto", "maml", "ridge"):
        with pytest.warns(UserWarning, match=r"^groups: got none, .*set_fit_request"):
            MetaRegressor(method, **quick).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MetaRegressor("pooled", **quick).fit(X, y)
        MetaRegressor("maml", **quick).fit(X, y, groups=g)


# ---- going on -----------------------------------------------------------------------------------


def test_partial_fit_goes_on_from_a_groups_own_model():
    X, y, g = levels(groups=6, rows=20)
    quick = QUICK | {"iterations": 20, "dtype": "float64"}
    once = MetaRegressor(**quick, **PLAIN).fit(X, y, groups=g)
    start = once.predict(X)
    twice = copy.deepcopy(once).set_params(adapt_epochs=3)
    once.set_params(adapt_epochs=6).adapt(X, y, groups=g)
    twice.partial_fit(X, y, groups=g)
    halfway = twice.predict(X, groups=g)
    twice.partial_fit(X, y, groups=g)
    np.testing.assert_allclose(
        twice.predict(X, groups=g), once.predict(X, groups=g), rtol=0, atol=1e-12
    )
    assert not np.allclose(halfway, once.predict(X, groups=g), rtol=0, atol=1e-3)
    assert np.array_equal(twice.predict(X), start)
    one = g == "g2"
    twice.partial_fit(X[one], y[one], groups=g[one])  # the others stay
    np.testing.assert_allclose(
        twice.predict(X, groups=g)[~one], once.predict(X, groups=g)[~one], rtol=0, atol=1e-12
    )
    assert len(twice.models_) == 7


def test_partial_fit_falls_back_to_the_model_it_went_on_from():
    X, y, g = levels(groups=8, rows=30)
    model = MetaRegressor(**QUICK, **PLAIN | {"gate": True}, shuffle=False)
    model.fit(X, y, groups=g).adapt(X, y, groups=g)
    model.set_params(adapt_epochs=20)
    before = model.predict(X, groups=g)
    turned = np.where(np.arange(len(y)) % 30 < 20, -y + 20, y)
    one = g == model.adapted_groups_[0]
    model.partial_fit(X[one], turned[one], groups=g[one])
    assert np.array_equal(model.predict(X, groups=g), before)


def test_partial_fit_without_a_fit_before_and_without_groups():
    X, y, g = opposites(groups=4)
    quick = QUICK | {"iterations": 5, "epochs": 2} | PLAIN
    first = MetaClassifier(**quick)
    some = y == "yes"
    first.partial_fit(X[some], y[some], groups=g[some], classes=["no", "yes"])
    assert first.classes_.tolist() == ["no", "yes"] and len(first.models_) == 5
    shared, own = first.predict_proba(X), first.predict_proba(X, groups=g)
    first.partial_fit(X, y)
    assert not np.array_equal(first.predict_proba(X), shared)
    assert np.array_equal(first.predict_proba(X, groups=g), own)
    Xr, yr, gr = levels(groups=3)
    head = MetaRegressor("ridge", **QUICK | {"iterations": 2}).fit(Xr, yr, groups=gr)
    for groups, words in ((gr, "^partial_fit: a head is fitted"), (None, "^groups: expected")):
        with pytest.raises(ValueError, match=words):
            head.partial_fit(Xr, yr, groups=groups)


def test_several_targets_are_fitted_together():
    X, y, g = levels(groups=8, rows=30)
    table = np.column_stack([y, 1000 - 50 * X[:, 0]])
    model = MetaRegressor(**QUICK).fit(X, table, groups=g).adapt(X, table, groups=g)
    predicted = model.predict(X, groups=g)
    assert predicted.shape == table.shape and model.y_scale_.shape == (2,)
    assert model.score(X, table, groups=g) > 0.8
    for column in range(2):
        error = np.square(predicted[:, column] - table[:, column]).mean()
        assert error < 0.3 * table[:, column].var()
    with pytest.raises(ValueError, match=r"^y: expected shape \[rows, 2\], as fit had, got \[240"):
        model.adapt(X, y, groups=g)
    with pytest.raises(ValueError, match=r"^y: expected shape \[rows\], as fit had"):
        MetaRegressor(**QUICK).fit(X, y, groups=g).adapt(X, table, groups=g)


def test_quantiles_and_scales_of_several_targets():
    X, y, g = levels(groups=8, rows=30)
    table = np.column_stack([y, 100 + 10 * X[:, 0]])
    quick = QUICK | {"iterations": 2, "meta_lr": 0.0}
    bands = MetaRegressor("maml", loss=QuantileLoss([0.1, 0.5, 0.9]), **quick)
    assert bands.fit(X, table, groups=g).predict(X).shape == (240, 2, 3)
    assert np.isfinite(bands.score(X, table))
    known = np.column_stack([X[:, 0], 7 * X[:, 0]])
    with_offset = clone(bands).fit(X, table, groups=g, offset=known).predict(X, offset=known)
    np.testing.assert_allclose(with_offset, np.repeat(known[:, :, None], 3, 2), atol=1e-5)
    normal = MetaRegressor("maml", loss="gaussian_nll", **quick).fit(X, table, groups=g)
    assert normal.predict(X).shape == normal.predict_scale(X).shape == (240, 2)
