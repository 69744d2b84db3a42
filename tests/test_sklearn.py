"""The scikit-learn estimators: scikit-learn's own checks, and what groups add to them."""

from __future__ import annotations

import copy
import doctest
import itertools
import pickle
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.impute import SimpleImputer
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import pymeta
from pymeta import AdaptedArrays, QuantileLoss, StudentTNLLLoss
from pymeta.sklearn import METHODS, MetaClassifier, MetaRegressor
from pymeta.sklearn.episodes import Draw, Rows

# ---- scikit-learn's checks ----------------------------------------------------------------------

# The check compares two ways to the same mathematics (weights against repeated rows) to seven
# digits. In float64 it passes.
ROUNDING = {
    "check_sample_weight_equivalence_on_dense_data": (
        "the same up to the rounding of float32, the default dtype"
    )
}


class ThreeGroups(MetaClassifier):
    """A classifier that finds groups in the rows, so that the checks come to meta-training."""

    def fit(self, X, y, sample_weight=None):
        groups = np.arange(len(y)) % 3 if hasattr(y, "__len__") else None
        return super().fit(X, y, groups=groups, sample_weight=sample_weight)


ESTIMATORS = [
    MetaClassifier(),
    MetaRegressor(),
    MetaClassifier(dtype="float64"),
    MetaRegressor(dtype="float64"),
]
GROUPED = [
    ThreeGroups(method, hidden=(16,), iterations=100, inner_lr=0.01, meta_lr=0.02, dtype="float64")
    for method in ("maml", "reptile")
]


def expected_failures(estimator):
    if isinstance(estimator, ThreeGroups):
        reason = "which rows are in a group, and support there, depends on the number of rows"
        return {"check_sample_weight_equivalence_on_dense_data": reason}
    return {}


@parametrize_with_checks(ESTIMATORS + GROUPED, expected_failed_checks=expected_failures)
def test_scikit_learns_checks(estimator, check):
    reason = ROUNDING.get(check.func.__name__) if estimator.dtype == "float32" else None
    if reason:
        pytest.skip(reason)  # whether it passes is the processor's affair
    with warnings.catch_warnings():
        # The checks feed all kinds of data on purpose; those on warnings look at them themselves.
        warnings.simplefilter("ignore", category=ConvergenceWarning)
        check(estimator)


# ---- problems -----------------------------------------------------------------------------------


def opposites(groups=20, rows=30, seed=0):
    """Even groups mean one thing, odd ones the opposite: X [n, 2], y [n] of strings, g [n]."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(groups), rows)
    X = rng.normal(size=(len(g), 2))
    y = np.where((X[:, 0] > 0) == (g % 2 == 0), "yes", "no")
    return X, y, g


def levels(groups=20, rows=15, seed=0):
    """Every group has its own slope and level: X [n, 1], y [n], g [n] of strings."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(groups), rows)
    slope, level = rng.normal(size=(2, groups))
    X = rng.uniform(-1, 1, (len(codes), 1))
    return X, slope[codes] * X[:, 0] + 3 * level[codes], np.array([f"g{c}" for c in codes])


@pytest.fixture(scope="module")
def fitted():
    """A classifier meta-trained on `opposites`, not adapted."""
    X, y, g = opposites()
    return MetaClassifier(iterations=200, random_state=0).fit(X, y, groups=g)


def quick(**parameters):
    """A classifier that is trained for a moment."""
    return MetaClassifier(
        **{"hidden": (8,), "iterations": 5, "epochs": 3, "random_state": 0, **parameters}
    )


def same_models(a, b):
    """Whether all models are the same bits."""
    return a.models_.parameters.keys() == b.models_.parameters.keys() and all(
        np.array_equal(p, b.models_.parameters[n]) for n, p in a.models_.parameters.items()
    )


# ---- groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_adapting_solves_what_one_model_cannot(method):
    X, y, g = opposites()
    model = MetaClassifier(method, iterations=200, adapt_epochs=30, adapt_lr=0.2, random_state=0)
    model.fit(X, y, groups=g)
    assert len(model.loss_curve_) == model.n_iter_ == (100 if method == "pooled" else 200)
    assert len(model.adapted_groups_) == 0
    later, truth, groups = opposites(seed=1)
    assert model.score(later, truth) < 0.7
    assert model.adapt(X, y, groups=g) is model
    assert model.score(later, truth, groups=groups) > 0.9
    assert model.score(later, truth) < 0.7


def test_groups_that_fit_never_saw(fitted):
    model = pickle.loads(pickle.dumps(fitted))
    X, y, g = opposites(groups=6, rows=40, seed=2)
    names = np.array([f"new {i}" for i in g])
    support, query = np.arange(len(g)) % 2 == 0, np.arange(len(g)) % 2 == 1
    model.adapt(X[support], y[support], groups=names[support])
    assert model.adapted_groups_.tolist() == [f"new {i}" for i in range(6)]
    assert model.score(X[query], y[query], groups=names[query]) > 0.9


def test_other_groups_get_the_start(fitted):
    model = pickle.loads(pickle.dumps(fitted))
    X, y, g = opposites()
    some = g < 4
    model.adapt(X[some], y[some], groups=g[some])
    start, own = model.predict_proba(X), model.predict_proba(X, groups=g)
    assert np.array_equal(start, fitted.predict_proba(X))
    assert np.array_equal(own[~some], start[~some])
    assert not np.isclose(own[some], start[some]).any(axis=1).all()
    with_strangers = np.where(some, g, -1)
    assert np.array_equal(model.predict_proba(X, groups=with_strangers), own)


def test_adapting_again_adds_and_replaces(fitted):
    X, y, g = opposites()
    one, parts = (pickle.loads(pickle.dumps(fitted)) for _ in range(2))
    one.adapt(X, y, groups=g)
    first, second = g < 12, g >= 12
    parts.adapt(X[first], y[first], groups=g[first])
    parts.adapt(X[second], y[second], groups=g[second])
    assert same_models(one, parts)  # a group's model depends on its own rows alone
    assert parts.adapted_groups_.tolist() == one.adapted_groups_.tolist() == list(range(20))
    before = parts.decision_function(X, groups=g)
    turned = np.where(y == "yes", "no", "yes")
    five = g == 5
    parts.adapt(X[five], turned[five], groups=g[five])
    after = parts.decision_function(X, groups=g)
    assert sorted(parts.adapted_groups_) == list(range(20)) and len(parts.models_) == 21
    assert np.array_equal(after[~five], before[~five])
    assert parts.score(X[five], turned[five], groups=g[five]) > 0.9


def test_models_are_those_of_the_groups(fitted):
    X, y, g = opposites(groups=5, seed=3)
    model = pickle.loads(pickle.dumps(fitted)).adapt(X, y, groups=g)
    assert isinstance(model.models_, AdaptedArrays)
    alone = model.models_[1:].predict_proba([X[g == i].astype("f4") for i in range(5)])
    together = model.predict_proba(X, groups=g)
    for i in range(5):
        np.testing.assert_allclose(together[g == i, 1], alone[i][:, 0], rtol=1e-5)


def test_ragged_groups_of_one_row_and_of_one_class():
    X, y, _ = opposites()
    sizes = [1, 1, 2, 3, 57, 200, 336]
    g = np.repeat([f"{n} rows, {i}" for i, n in enumerate(sizes)], sizes)
    y[g == "57 rows, 4"] = "no"
    for method in METHODS:
        model = quick(method=method, iterations=20).fit(X, y, groups=g).adapt(X, y, groups=g)
        assert len(model.adapted_groups_) == len(sizes)
        p = model.predict_proba(X, groups=g)
        assert np.isfinite(p).all() and np.allclose(p.sum(axis=1), 1)
        order = np.random.default_rng(0).permutation(len(X))
        mixed = model.predict_proba(X[order], groups=g[order])
        np.testing.assert_allclose(mixed, p[order], rtol=1e-5)


def test_all_groups_of_one_row():
    X, y, _ = opposites(groups=4, rows=10)
    model = quick().fit(X, y, groups=np.arange(40)).adapt(X, y, groups=np.arange(40))
    assert len(model.adapted_groups_) == 40


@pytest.mark.parametrize("shuffle", [True, False])
def test_episodes_split_groups(fitted, shuffle):
    members = [np.arange(10), np.arange(10, 11), np.arange(11, 100)]
    rows = Rows(np.zeros((100, 2)), np.zeros(100), None)
    estimator = quick(shuffle=shuffle, task_rows=20, support=0.3, tasks_per_batch=3)
    draw = Draw(estimator, rows, members, np.random.RandomState(0))
    seen = set()
    for _ in range(200):
        support, query = draw.episode()
        for s, q in zip(support, query, strict=True):
            group = next(m for m in members if q[0] in m)
            n = min(len(group), 20)
            assert (len(s), len(q)) == {1: (0, 1), 10: (3, 7), 20: (6, 14)}[n]
            used = np.concatenate([s, q])
            assert len(set(used)) == n and set(used) <= set(group)
            assert shuffle or (np.diff(used) > 0).all()
            seen |= set(used)
    assert seen == set(range(100))


def test_draws_in_proportion_to_rows():
    members = [np.arange(90), np.arange(90, 100)]
    rows = Rows(np.zeros((100, 2)), np.zeros(100), None)
    for kind, share in (("rows", 0.9), ("groups", 0.5)):
        estimator = quick(draw=kind, tasks_per_batch=1)
        draw = Draw(estimator, rows, members, np.random.RandomState(0))
        first = np.mean([draw.groups()[0][0] < 90 for _ in range(2000)])
        assert abs(first - share) < 5 * np.sqrt(share * (1 - share) / 2000)


# ---- what is computed ---------------------------------------------------------------------------


def test_adapt_takes_the_steps_it_says():
    """Against plain torch in float64: SGD on each group's own rows, from the start."""
    torch = pytest.importorskip("torch")
    X, y, g = opposites(groups=3)
    model = quick(dtype="float64", inner_lr=0.3, inner_steps=4, activation="tanh")
    model.fit(X, y, groups=g).adapt(X, y, groups=g)
    start = model.models_.state_dict(0)
    for place, name in enumerate(model.adapted_groups_, start=1):
        net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        net = net.double()
        net.load_state_dict({n: torch.tensor(p) for n, p in start.items()})
        x, t = torch.tensor(X[g == name]), torch.tensor((y[g == name] == "yes").astype(float))
        optimizer = torch.optim.SGD(net.parameters(), 0.3)
        for _ in range(4):
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(net(x)[:, 0], t).backward()
            optimizer.step()
        for n, p in model.models_.state_dict(place).items():
            np.testing.assert_allclose(p, net.state_dict()[n].numpy(), rtol=0, atol=1e-12)
        logits = net(x)[:, 0].detach().numpy()
        np.testing.assert_allclose(
            model.decision_function(X[g == name], groups=g[g == name]), logits, atol=1e-12
        )


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method):
    X, y, g = opposites()
    makes = [quick(method=method, batch_size=50, pretrain_epochs=1) for _ in range(3)]
    threads = pymeta.num_threads()
    for model, n in zip(makes, (1, 2, 1), strict=True):
        try:
            pymeta.set_num_threads(n)
            np.random.seed(n)  # of no consequence
            model.fit(X, y, groups=g).adapt(X, y, groups=g)
        finally:
            pymeta.set_num_threads(threads)
    assert same_models(makes[0], makes[1]) and same_models(makes[0], makes[2])
    assert makes[0].loss_curve_ == makes[1].loss_curve_
    other = clone(makes[0]).set_params(random_state=1).fit(X, y, groups=g).adapt(X, y, groups=g)
    assert not same_models(makes[0], other)


def test_adapt_on_fit():
    X, y, g = opposites()
    both = quick(adapt_on_fit=True).fit(X, y, groups=g)
    assert same_models(both, quick().fit(X, y, groups=g).adapt(X, y, groups=g))
    assert len(quick(adapt_on_fit=True).fit(X, y).adapted_groups_) == 0


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_weight_zero_are_absent(method):
    X, y, g = opposites()
    kept = np.random.default_rng(0).random(len(X)) < 0.7
    kept[g == 3] = False
    weights = kept * 1.0
    one = quick(method=method).fit(X, y, groups=g, sample_weight=weights)
    two = quick(method=method).fit(X[kept], y[kept], groups=g[kept], sample_weight=weights[kept])
    assert same_models(one, two)
    one.adapt(X, y, groups=g, sample_weight=weights)
    two.adapt(X[kept], y[kept], groups=g[kept], sample_weight=weights[kept])
    assert set(one.adapted_groups_) == {*two.adapted_groups_, 3}
    others = g != 3
    assert np.array_equal(
        one.decision_function(X[others], g[others]), two.decision_function(X[others], g[others])
    )
    # A group without rows takes no step: its model is the start.
    assert np.array_equal(
        one.decision_function(X[~others], g[~others]), one.decision_function(X[~others])
    )


def test_weights_count_in_adapt(fitted):
    X, y, g = opposites(groups=2)
    weights = np.where(y == "yes", 50.0, 1.0)
    plain, weighted = (pickle.loads(pickle.dumps(fitted)) for _ in range(2))
    plain.adapt(X, y, groups=g)
    weighted.adapt(X, y, groups=g, sample_weight=weights)
    yes = [m.predict_proba(X, groups=g)[:, 1].mean() for m in (plain, weighted)]
    assert yes[1] > yes[0] + 0.1


def test_class_weight():
    X, y, g = opposites()
    rare = (y == "no") | (np.arange(len(y)) % 10 == 0)
    X, y, g = X[rare], y[rare], g[rare]
    parameters = {"iterations": 100, "hidden": (16,), "meta_lr": 1e-2}
    plain = quick(**parameters).fit(X, y, groups=g).adapt(X, y, groups=g)
    for class_weight in ("balanced", {"yes": 10.0, "no": 1.0}):
        model = quick(**parameters, class_weight=class_weight)
        model.fit(X, y, groups=g).adapt(X, y, groups=g)
        for groups in (None, g):
            yes = [m.predict_proba(X, groups=groups)[:, 1].mean() for m in (plain, model)]
            assert yes[1] > yes[0] + 0.1


def test_balanced_classes_are_those_of_the_rows_that_count():
    X, y, g = opposites()
    weights = np.where((y == "no") & (np.arange(len(y)) % 4 > 0), 0.0, 1.0)
    model = quick(class_weight="balanced", iterations=1)
    counted = model.fit(X, y, groups=g, sample_weight=weights)._class_weights
    kept = weights > 0
    assert np.array_equal(counted, model.fit(X[kept], y[kept], groups=g[kept])._class_weights)
    assert counted[0] > 1.5 * counted[1]  # "no" is rare among them
    none_of_no = np.where(y == "no", 0.0, 1.0)
    assert np.isfinite(model.fit(X, y, groups=g, sample_weight=none_of_no)._class_weights).all()


def test_three_classes():
    X, _, g = opposites(groups=9, rows=60)
    y = np.array(["low", "middle", "top"])[(np.digitize(X[:, 0], [-0.5, 0.5]) + g) % 3]
    model = MetaClassifier(iterations=300, adapt_epochs=20, inner_lr=0.1, random_state=0)
    model.fit(X, y, groups=g).adapt(X, y, groups=g)
    assert model.score(X, y) < 0.6
    assert model.score(X, y, groups=g) > 0.8
    assert model.decision_function(X, groups=g).shape == (len(X), 3)
    p = model.predict_proba(X, groups=g)
    assert np.array_equal(model.classes_[p.argmax(axis=1)], model.predict(X, groups=g))


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_regression(loss):
    X, y, g = levels()
    model = MetaRegressor(loss=loss, iterations=300, inner_lr=0.1, random_state=0)
    model.fit(X, y, groups=g).adapt(X, y, groups=g)
    later, truth, groups = levels(rows=40)
    assert model.score(later, truth) < 0.3
    assert model.score(later, truth, groups=groups) > 0.8


def noisy(loss, rows=60, seed=0):
    """Groups of another noise each: X, y, g, and each row's true scale."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(12), rows)
    X, scale = rng.uniform(-1, 1, (len(g), 1)), 0.5 + 0.25 * g
    noise = rng.normal(size=len(g))
    if loss == "poisson_nll":
        return X, rng.poisson(4 * scale).astype(float), g, 4 * scale
    if loss == "qlike":
        return X, (100 * scale * noise) ** 2, g, (100 * scale) ** 2
    return X, 50 + 10 * X[:, 0] + scale * noise, g, scale


ADAPTS = {"hidden": (8,), "inner_lr": 0.02, "inner_optimizer": "adam", "adapt_epochs": 200}


@pytest.mark.parametrize("loss", ["poisson_nll", "qlike"])
def test_a_log_link_predicts_rates_and_variances(loss):
    X, y, g, mean = noisy(loss)
    model = MetaRegressor("pooled", loss=loss, epochs=20, random_state=0, **ADAPTS)
    model.fit(X, y, groups=g).adapt(X, y, groups=g)
    assert model.y_mean_ == 0 and model.y_scale_ == pytest.approx(y.mean())
    predicted = model.predict(X, groups=g)
    assert (predicted > 0).all()
    of_groups = [(predicted[g == k].mean(), mean[g == k][0]) for k in range(12)]
    assert all(0.5 < got / wanted < 2 for got, wanted in of_groups)
    with pytest.raises(ValueError, match=f"^y: row 3: expected numbers of at least 0 for {loss}"):
        model.adapt(X[:5], np.array([1, 2, 0, -1.0, 1]), groups=g[:5])
    model.adapt(X[:5], np.array([1, 2, 0, -1.0, 1]), g[:5], sample_weight=[1, 1, 1, 0, 1])
    with pytest.raises(ValueError, match=r"^y: row 0: "):
        MetaRegressor(loss=loss).fit(X, y - y.max(), groups=g)


def test_quantiles():
    X, y, g, _ = noisy("mse")
    bands = QuantileLoss([0.1, 0.5, 0.9])
    model = clone(MetaRegressor("pooled", loss=bands, epochs=20, random_state=0, **ADAPTS))
    model.fit(X, y, groups=g).adapt(X, y, groups=g)
    low, middle, high = model.predict(X, groups=g).T
    assert 0.7 < ((low <= y) & (y <= high)).mean() < 0.9 and (y <= middle).mean() < 0.6
    assert 0 < model.score(X, y, groups=g) < 1
    assert model.score(X, y, groups=g) > model.score(X, y)
    one = MetaRegressor("pooled", loss=QuantileLoss(0.9), epochs=2).fit(X, y)
    assert one.predict(X).shape == (len(X),)
    with pytest.raises(AttributeError, match=r"^predict_scale: .* got quantile"):
        one.predict_scale(X)


@pytest.mark.parametrize("loss", ["gaussian_nll", StudentTNLLLoss(30)])
def test_a_likelihood_predicts_a_scale(loss):
    X, y, g, scale = noisy(loss)
    model = MetaRegressor("pooled", loss=loss, epochs=20, random_state=0, **ADAPTS)
    model.fit(X, y, groups=g).adapt(X, y, groups=g)
    assert model.score(X, y, groups=g) > 0.8
    got = model.predict_scale(X, groups=g)
    assert np.corrcoef(got, scale)[0, 1] > 0.8
    assert 0.5 < np.median(got / scale) < 1.5
    copied = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copied.predict_scale(X, groups=g), got)


def test_regression_has_its_own_units():
    X, y, g = levels(groups=6)
    parameters = {"hidden": (8,), "iterations": 20, "dtype": "float64", "random_state": 0}
    plain = MetaRegressor(**parameters).fit(X, y, groups=g).adapt(X, y, groups=g)
    scaled = MetaRegressor(**parameters).fit(X, 1e4 * y + 7, groups=g)
    scaled.adapt(X, 1e4 * y + 7, groups=g)
    expected = 1e4 * plain.predict(X, groups=g) + 7
    np.testing.assert_allclose(scaled.predict(X, groups=g), expected, rtol=1e-7)
    constant = MetaRegressor(**parameters).fit(X, np.full(len(y), 3.0), groups=g)
    assert constant.y_scale_ == 1.0 and constant.y_mean_ == 3.0


def test_head_only():
    X, y, g = opposites()
    model = quick(head_only=True, hidden=(8, 4)).fit(X, y, groups=g).adapt(X, y, groups=g)
    for name, p in model.models_.parameters.items():
        own = name.startswith("4.")
        assert (p == p[:1]).all() != own, name


def test_parameters_set_after_fit_hold_for_adapt_alone():
    X, y, g = opposites()
    model = quick(head_only=True, dtype="float64").fit(X, y, groups=g)
    start = model.predict_proba(X)
    model.set_params(hidden=(3, 3), activation="tanh", dtype="float32", head_only=False)
    assert np.array_equal(model.predict_proba(X), start)
    model.set_params(adapt_lr=0.5).adapt(X, y, groups=g)
    assert model.models_.dtype == np.float64
    expected = quick(head_only=True, dtype="float64", adapt_lr=0.5).fit(X, y, groups=g)
    assert same_models(model, expected.adapt(X, y, groups=g))


def test_a_linear_model():
    X, y, g = opposites()
    model = quick(hidden=(), iterations=100, inner_lr=0.5).fit(X, y, groups=g)
    assert set(model.models_.parameters) == {"0.weight", "0.bias"}
    assert model.adapt(X, y, groups=g).score(X, y, groups=g) > 0.9


def test_anchor_holds_models_near_the_start():
    X, y, g = opposites()
    model = quick(inner_steps=20).fit(X, y, groups=g)
    free = copy.deepcopy(model).adapt(X, y, groups=g)
    rows = np.bincount(np.unique(g, return_inverse=True)[1])
    assert (rows == rows[0]).all()
    strength = copy.deepcopy(model).set_params(anchor=10.0).adapt(X, y, groups=g)
    worth = copy.deepcopy(model).set_params(anchor_rows=10.0 * rows[0]).adapt(X, y, groups=g)
    for name, p in free.models_.parameters.items():
        q = strength.models_.parameters[name]
        assert np.array_equal(p[0], q[0])
        assert np.abs(q[1:] - q[0]).max() < 0.5 * np.abs(p[1:] - p[0]).max()
        assert np.array_equal(q, worth.models_.parameters[name])


@pytest.mark.parametrize("method", ["maml", "reptile"])
def test_the_start_is_learned_under_the_pull(method):
    X, y, g = opposites(groups=6, rows=20)
    starts = [
        quick(method=method, iterations=3, **pull).fit(X, y, groups=g).models_.state_dict(0)
        for pull in ({}, {"anchor": 10.0}, {"anchor_rows": 60.0})
    ]
    for one, other in itertools.combinations(starts, 2):
        assert not np.array_equal(one["0.weight"], other["0.weight"])


def test_validation_keeps_the_better_epoch():
    """Without anything to learn, an adaptation that is validated stays nearer to the start."""
    X, y, g = opposites(groups=6, rows=20)
    y = np.random.default_rng(1).choice(["yes", "no"], len(y))
    recipe = {"adapt_epochs": 200, "adapt_lr": 0.5}
    loose = quick(**recipe).fit(X, y, groups=g).adapt(X, y, groups=g)
    checked = quick(**recipe, adapt_validation=0.3, adapt_patience=5).fit(X, y, groups=g)
    checked.adapt(X, y, groups=g)
    moved = [
        np.mean([np.abs(p[1:] - p[0]).mean() for p in m.models_.parameters.values()])
        for m in (loose, checked)
    ]
    assert moved[1] < 0.5 * moved[0]


# ---- trouble ------------------------------------------------------------------------------------


def test_diverged_groups_keep_the_start():
    X, y, g = levels(groups=4)
    model = MetaRegressor(hidden=(8,), iterations=5, adapt_lr=1e6, adapt_epochs=40, random_state=0)
    model.fit(X, y, groups=g)
    with pytest.warns(ConvergenceWarning, match=r"adapt_lr: .* 3 of 4 groups.* 'g0', 'g1', 'g3'"):
        model.adapt(X, y, groups=g, sample_weight=(g == "g2") * 0.0 + (g != "g2"))
    assert model.adapted_groups_.tolist() == ["g2"]  # it had no rows to diverge on
    assert np.array_equal(model.predict(X, groups=g), model.predict(X))


@pytest.mark.parametrize("method", METHODS)
def test_diverged_training_is_an_error(method):
    X, y, g = levels(groups=4)
    model = MetaRegressor(method, inner_lr=1e6, meta_lr=1e30, iterations=50, inner_steps=20)
    with pytest.raises(ValueError, match="meta_lr"):
        model.fit(X, y, groups=g)


@pytest.mark.parametrize(
    ("parameter", "value", "error"),
    [
        ("method", "fomaml", ValueError),
        ("activation", "softmax", ValueError),
        ("inner_optimizer", "lbfgs", ValueError),
        ("dtype", "float16", ValueError),
        ("draw", "all", ValueError),
        ("hidden", 64, TypeError),
        ("hidden", (64, 0), ValueError),
        ("hidden", (64.0,), TypeError),
        ("support", 0.0, ValueError),
        ("support", 1.0, ValueError),
        ("support", 0, ValueError),
        ("support", "half", TypeError),
        ("inner_lr", -0.1, ValueError),
        ("inner_lr", float("nan"), ValueError),
        ("inner_lr", "0.1", TypeError),
        ("meta_lr", float("inf"), ValueError),
        ("meta_lr", None, TypeError),
        ("weight_decay", -1, ValueError),
        ("anchor", -1.0, ValueError),
        ("anchor_rows", 0, ValueError),
        ("anchor_rows", "20", TypeError),
        ("inner_steps", 0, ValueError),
        ("inner_steps", 2.0, TypeError),
        ("iterations", 0, ValueError),
        ("epochs", 0, ValueError),
        ("pretrain_epochs", -1, ValueError),
        ("tasks_per_batch", 0, ValueError),
        ("task_rows", 0, ValueError),
        ("batch_size", 0, ValueError),
        ("inner_batch_size", 0, ValueError),
        ("adapt_lr", -1.0, ValueError),
        ("adapt_epochs", 0, ValueError),
        ("adapt_validation", 1.0, ValueError),
        ("adapt_patience", 0, ValueError),
        ("adapt_patience", 3, ValueError),  # without rows held out
        ("first_order", 1, TypeError),
        ("head_only", "yes", TypeError),
        ("shuffle", None, TypeError),
        ("adapt_on_fit", 0, TypeError),
    ],
)
def test_bad_parameters_are_named(parameter, value, error):
    X, y, g = opposites(groups=2)
    model = MetaClassifier(**{parameter: value})  # says nothing yet, as scikit-learn asks
    with pytest.raises(error, match=f"^{parameter}: "):
        model.fit(X, y, groups=g)
    with pytest.raises(NotFittedError):
        model.predict(X)


def test_bad_loss_of_the_regressor():
    X, y, g = levels(groups=2)
    with pytest.raises(ValueError, match=r"^loss: "):
        MetaRegressor(loss="cross_entropy").fit(X, y, groups=g)


def pandas_labels(g):
    pd = pytest.importorskip("pandas")
    return pd.Series(g).astype("Int64").mask(g == 3)


BAD_GROUPS = {
    "too few": (lambda g: g[:-1], r"expected a label for each row of X, shape \[600\], got .*599"),
    "two columns": (lambda g: np.stack([g, g], axis=1), r"got shape \[600, 2\]"),
    "a table": (lambda g: [[i, i] for i in g], r"got shape \[600, 2\]"),
    "one string": (lambda g: "a", "got the str 'a'"),
    "one number": (lambda g: 3, "got the int '3'"),
    "NaN": (lambda g: np.where(np.arange(len(g)) == 7, np.nan, g), r"1 rows have no group \(nan\)"),
    "NaN in a list": (lambda g: [float("nan") if i == 3 else f"g{i}" for i in g], r"30 .*\(nan\)"),
    "NaN in a tuple": (lambda g: tuple(np.nan if i == 3 else f"g{i}" for i in g), r"30 .*\(nan\)"),
    "None": (lambda g: [None if i == 3 else str(i) for i in g], r"30 rows have no group \(None\)"),
    "None in an array": (
        lambda g: np.array([None if i == 3 else str(i) for i in g], dtype=object),
        r"30 rows have no group \(None\)",
    ),
    "a complex NaN": (lambda g: np.where(g == 3, complex(np.nan), g), "30 rows have no group"),
    "masked": (lambda g: np.ma.array(g, mask=g == 3), r"30 rows have no group \(masked\)"),
    "columns": (
        lambda g: np.stack([g, g], 1),
        r"one label .* shape \[\d+, 2\]; to group by several",
    ),
    "tuples": (lambda g: [(i, "a") for i in g], r"shape \[\d+, 2\]; .*join them into one label"),
    "tuples in an array": (
        lambda g: np.array([*((i, "a") for i in g), None], dtype=object)[:-1],
        r"got the tuple \(.*, 'a'\); .*join them into one label",
    ),
    "a structured array": (
        lambda g: np.array([(i, 2.0) for i in g], dtype=[("a", int), ("b", float)]),
        r"got the tuple \(.*, 2.0\); .*join them into one label",
    ),
    "a set": (lambda g: set(range(len(g))), "got the set"),
    "a dictionary": (lambda g: dict.fromkeys(range(len(g))), "got the dict"),
    "NaT": (
        lambda g: np.where(g == 3, np.datetime64("NaT"), np.datetime64("2020-01-01")),
        "30 rows have no group",
    ),
    "pandas": (pandas_labels, "30 rows have no group"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_bad_groups(case, fitted):
    X, y, g = opposites()
    make, message = BAD_GROUPS[case]
    groups = make(g)
    calls = [lambda c=call: c(X, y, groups=groups) for call in (fitted.adapt, quick().fit)]
    predicting = (fitted.predict, fitted.predict_proba, fitted.decision_function)
    calls += [lambda c=call: c(X, groups=groups) for call in predicting]
    for call in calls:
        with pytest.raises(ValueError, match=f"^groups: .*{message}"):
            call()
    assert len(fitted.adapted_groups_) == 0


def test_groups_of_several_kinds(fitted):
    X, y, g = opposites()
    mixed = [i if i == 3 else str(i) for i in g]
    for groups in (mixed, np.array(mixed, dtype=object)):
        for call in (fitted.adapt, quick().fit, lambda X, y, groups: fitted.predict(X, groups)):
            with pytest.raises(
                TypeError, match=r"groups: expected labels of one kind, got .*and str"
            ):
                call(X, y, groups=groups)
    with pytest.raises(TypeError, match="groups"):
        fitted.adapt(X, y)


def test_strangers_are_named_once(fitted):
    model = pickle.loads(pickle.dumps(fitted))
    X, y, g = opposites()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(X)
        model.adapt(X[g < 4], y[g < 4], groups=g[g < 4]).predict(X[g < 4], groups=g[g < 4])
    with pytest.warns(
        UserWarning, match=r"groups: 16 were never adapted to .* 10, 11, 12, 13, 14, \.\.\."
    ):
        model.predict(X, groups=g)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(X, groups=g)


@pytest.mark.parametrize("step", [1, 2])
def test_predicting_copies_no_more_than_some_models(step):
    """600 models of 17 kB: all of them, one after another, and every other one."""
    X, y, g = opposites(groups=600, rows=2)
    model = quick(hidden=(64, 64), iterations=1).fit(X, y, groups=g).adapt(X, y, groups=g)
    some = g % step == 0
    X, g = X[some], g[some]
    wanted = np.concatenate([model.predict_proba(X[g == i], groups=g[g == i]) for i in g[::2]])
    tracemalloc.start()
    got = model.predict_proba(X, groups=g)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(got, wanted)
    size = sum(v.nbytes for v in model.models_.parameters.values())
    assert peak < size * (0.1 if step == 1 else 0.48)  # 256 of 601 models, and what the rows take


def test_bad_rows(fitted):
    X, y, g = opposites()
    broken = np.where(np.arange(X.size).reshape(X.shape) == 5, np.nan, X)
    for call in (fitted.adapt, quick().fit):
        with pytest.raises(ValueError, match="NaN"):
            call(broken, y, groups=g)
        for wrong in (-1.0, np.nan, np.inf):
            with pytest.raises(ValueError, match="sample_weight: expected finite weights >= 0"):
                call(X, y, groups=g, sample_weight=np.where(g == 0, wrong, 1.0))
        with pytest.raises(ValueError, match="inconsistent numbers of samples"):
            call(X, y, groups=g, sample_weight=np.ones(3))
    with pytest.raises(ValueError, match="sample_weight: all weights are zero"):
        quick().fit(X, y, groups=g, sample_weight=np.zeros(len(g)))
    with pytest.raises(ValueError, match=r"y: \['maybe'\] are not classes"):
        fitted.adapt(X, np.where(g == 0, "maybe", y), groups=g)
    with pytest.raises(ValueError, match="features"):
        fitted.adapt(X[:, :1], y, groups=g)
    with pytest.raises(NotFittedError):
        quick().adapt(X, y, groups=g)
    with pytest.raises(ValueError, match="one class"):
        quick().fit(X, np.full(len(y), "yes"), groups=g)


# ---- as part of scikit-learn --------------------------------------------------------------------


def test_parameters_go_round():
    for model in (MetaClassifier("reptile", hidden=(3,)), MetaRegressor("pooled", loss="huber")):
        parameters = model.get_params()
        assert parameters["method"] == model.method
        again = type(model)(**parameters)
        assert again.get_params() == parameters == clone(model).get_params()
        assert again.set_params(anchor=0.5).anchor == 0.5


def test_pipeline_with_missing_values_and_categories():
    pd = pytest.importorskip("pandas")
    X, y, g = opposites()
    rng = np.random.default_rng(0)
    table = pd.DataFrame(X, columns=["signal", "noise"])
    table["kind"] = rng.choice(["a", "b"], len(g))
    table.loc[rng.random(len(g)) < 0.1, "noise"] = np.nan
    columns = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), ["signal", "noise"]),
            ("kinds", OneHotEncoder(), ["kind"]),
        ]
    )
    groups = pd.Series(g, name="customer").astype("category")
    pipe = make_pipeline(columns, MetaClassifier(iterations=200, random_state=0))
    pipe.fit(table, pd.Series(y), metaclassifier__groups=groups)
    assert pipe.score(table, y) < 0.7
    pipe[-1].adapt(pipe[:-1].transform(table), y, groups=groups)
    assert (pipe.predict(table, groups=groups) == y).mean() > 0.9
    assert pipe.predict_proba(table, groups=groups).shape == (len(g), 2)


def test_names_of_columns():
    pd = pytest.importorskip("pandas")
    X, y, g = opposites()
    table = pd.DataFrame(X, columns=["signal", "noise"])
    model = quick().fit(table, y, groups=g)
    assert model.feature_names_in_.tolist() == ["signal", "noise"] and model.n_features_in_ == 2
    with pytest.raises(ValueError, match="feature names"):
        model.adapt(table[["noise", "signal"]], y, groups=g)


def test_cross_validation_passes_groups_on():
    X, y, g = opposites()
    done = cross_validate(quick(), X, y, params={"groups": g}, cv=2, return_estimator=True)
    assert all(e.n_iter_ == 5 for e in done["estimator"])  # iterations, not epochs


def test_grid_search_with_metadata_routing():
    X, y, g = opposites()
    estimator = quick(adapt_on_fit=True, inner_steps=20)
    with config_context(enable_metadata_routing=True):
        estimator.set_fit_request(groups=True).set_score_request(groups=True)
        search = GridSearchCV(
            make_pipeline(StandardScaler(), estimator),
            {"metaclassifier__inner_lr": np.array([0.001, 0.5])},
            cv=StratifiedKFold(2, shuffle=True, random_state=0),
        ).fit(X, y, groups=g)
        assert search.best_params_ == {"metaclassifier__inner_lr": 0.5}
        assert search.score(X, y, groups=g) > 0.9


def test_pickled_estimator_predicts_without_torch(tmp_path, fitted):
    X, y, g = opposites(seed=4)
    model = pickle.loads(pickle.dumps(fitted)).adapt(X, y, groups=g)
    np.save(tmp_path / "expected.npy", model.predict_proba(X, groups=g))
    np.savez(tmp_path / "data.npz", X=X, g=g)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = f"""
import pickle, sys
import numpy as np

class WithoutPandas:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "pandas":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutPandas())
import pymeta.sklearn
data = np.load(r"{tmp_path / "data.npz"}")
model = pickle.loads(open(r"{tmp_path / "model.pickle"}", "rb").read())
p = model.predict_proba(data["X"], groups=data["g"])
assert np.array_equal(p, np.load(r"{tmp_path / "expected.npy"}"))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_the_example_of_the_docstring():
    done = doctest.testmod(sys.modules[MetaClassifier.__module__])
    assert done.attempted > 5 and done.failed == 0


def test_verbose(capsys):
    X, y, g = opposites(groups=4)
    quick(verbose=True, iterations=20, pretrain_epochs=2).fit(X, y, groups=g)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[MetaClassifier] pooled: 2 epochs, loss ")
    assert [line for line in lines if "maml: iteration 20, loss" in line] == lines[-1:]
    quick(iterations=20).fit(X, y, groups=g)
    assert capsys.readouterr().out == ""
