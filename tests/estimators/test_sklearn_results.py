"""What the estimators compute, held against pymeta's learners and against closed forms."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn_help import NETWORKS, levels, opposites, quick, same_models

import pymeta
from pymeta import QuantileLoss, StudentTNLLLoss
from pymeta.sklearn import MetaClassifier, MetaRegressor


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


@pytest.mark.parametrize("method", NETWORKS)
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


@pytest.mark.parametrize("method", NETWORKS)
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
    model = MetaClassifier(iterations=100, adapt_epochs=20, inner_lr=0.1, random_state=0)
    model.fit(X, y, groups=g).adapt(X, y, groups=g)
    assert model.score(X, y) < 0.6
    assert model.score(X, y, groups=g) > 0.8
    assert model.decision_function(X, groups=g).shape == (len(X), 3)
    p = model.predict_proba(X, groups=g)
    assert np.array_equal(model.classes_[p.argmax(axis=1)], model.predict(X, groups=g))


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_regression(loss):
    X, y, g = levels()
    model = MetaRegressor(loss=loss, iterations=100, inner_lr=0.1, random_state=0)
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
    constant = MetaRegressor(base=None, **parameters).fit(X, np.full(len(y), 3.0), groups=g)
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
