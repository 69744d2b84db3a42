"""The methods that fit a head to each group: closed forms and class means on learned features."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn_help import HEADS, levels, opposites, same_models

import pymeta.sklearn
from pymeta.sklearn import METHODS, MetaClassifier, MetaRegressor

CLASSIFIERS = [m for m in HEADS if METHODS[m].kinds != ("mse",)]
REGRESSORS = [m for m in HEADS if "mse" in METHODS[m].kinds]
QUICK = {"hidden": (16,), "iterations": 100, "meta_lr": 1e-2, "random_state": 0, "gate": False}
QUICK["anchor_rows"] = None
FEW = QUICK | {"iterations": 3, "dtype": "float64"}


def test_there_are_some():
    assert {"ridge", "protonet"} <= set(CLASSIFIERS) and {"ridge", "bayesian"} <= set(REGRESSORS)


@pytest.mark.parametrize("method", CLASSIFIERS)
@pytest.mark.parametrize("classes", [2, 3])
def test_a_classifier_fits_heads_to_groups(method, classes):
    X, y, g = opposites()
    if classes == 3:
        y = np.array(["low", "middle", "top"])[(np.digitize(X[:, 0], [-0.5, 0.5]) + g) % 3]
    model = MetaClassifier(method, **QUICK).fit(X, y, groups=g)
    assert len(model.loss_curve_) == model.n_iter_ == 100
    shared = model.predict_proba(X)
    assert model.adapt(X, y, groups=g).score(X, y, groups=g) > model.score(X, y) + 0.25
    assert np.array_equal(model.predict_proba(X), shared)
    p = model.predict_proba(X, groups=g)
    assert p.shape == (len(X), classes) and np.allclose(p.sum(axis=1), 1)
    assert np.array_equal(model.classes_[p.argmax(axis=1)], model.predict(X, groups=g))
    values = model.decision_function(X, groups=g)
    assert values.shape == ((len(X),) if classes == 2 else (len(X), 3))
    if classes == 2:
        assert np.array_equal(model.classes_[(values > 0).astype(int)], model.predict(X, groups=g))


@pytest.mark.parametrize("method", REGRESSORS)
def test_a_regressor_fits_heads_to_groups(method):
    X, y, g = levels()
    model = MetaRegressor(method, **QUICK).fit(X, y, groups=g).adapt(X, y, groups=g)
    later, truth, groups = levels(rows=40)
    assert model.score(later, truth) < 0.3 and model.score(later, truth, groups=groups) > 0.9


@pytest.mark.parametrize("method", HEADS)
def test_groups_are_replaced_and_do_not_disturb_each_other(method):
    X, y, g = opposites(groups=8, rows=20)
    if method in CLASSIFIERS:
        model = MetaClassifier(method, **FEW).fit(X, y, groups=g)
    else:
        X, y, g = levels(groups=8, rows=20)
        model = MetaRegressor(method, **FEW).fit(X, y, groups=g)
    one, parts = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    one.adapt(X, y, groups=g)
    early = g < np.unique(g)[5]
    parts.adapt(X[early], y[early], groups=g[early])
    parts.adapt(X[~early], y[~early], groups=g[~early])
    # torch's sums depend on what is computed together; heads are solved in float64
    for name, value in one.models_.parameters.items():
        other = parts.models_.parameters[name]
        np.testing.assert_allclose(value.astype(float), other.astype(float), rtol=0, atol=1e-9)
    parts.adapt(X[early], y[early], groups=g[early])
    assert len(parts.models_) == 9 and len(parts.adapted_groups_) == 8
    again = clone(model).fit(X, y, groups=g)
    assert same_models(again, model)


def test_a_classifier_of_class_means_takes_groups_of_one_class_and_of_one_row():
    X, y, g = opposites()
    y[g == 3] = "no"
    g = np.where(np.arange(len(g)) == 0, -1, g)
    model = MetaClassifier("protonet", **QUICK).fit(X, y, groups=g).adapt(X, y, groups=g)
    assert (model.predict(X[g == 3], groups=g[g == 3]) == "no").all()
    assert model.predict_proba(X[g == 3], groups=g[g == 3]).max() == 1.0


def test_linear_ridge_is_the_closed_form():
    X, y, g = levels(groups=5)
    model = MetaRegressor("ridge", hidden=(), dtype="float64", iterations=20, random_state=0)
    model.fit(X, y, groups=g).adapt(X, y, groups=g)
    head = model.models_.learner
    prior = head.prior_mean.numpy()
    precision = np.diag(head.log_precision.exp().numpy())
    for name in model.adapted_groups_:
        f = np.column_stack([X[g == name], np.ones((g == name).sum())])
        t = ((y[g == name] - model.y_mean_) / model.y_scale_)[:, None]
        w = prior + np.linalg.solve(f.T @ f + precision, f.T @ (t - f @ prior))
        wanted = (f @ w)[:, 0] * model.y_scale_ + model.y_mean_
        got = model.predict(X[g == name], groups=g[g == name])
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10 * np.abs(y).max())


def test_bayesian_predicts_its_scale():
    X, y, g = levels()
    y = y + np.random.default_rng(1).normal(size=len(y)) * 0.5
    model = MetaRegressor("bayesian", **QUICK | {"iterations": 200})
    model.fit(X, y, groups=g).adapt(X, y, groups=g)
    shared, own = model.predict_scale(X), model.predict_scale(X, groups=g)
    assert (own < shared).all()  # who has seen rows knows more
    assert 0.3 < np.median(own) < 1.0
    with pytest.raises(AttributeError, match=r"^predict_scale: "):
        MetaRegressor("ridge", **QUICK).fit(X, y, groups=g).predict_scale(X)


def test_a_loss_that_a_method_does_not_take():
    X, y, g = levels(groups=3)
    with pytest.raises(ValueError, match=r"^method: 'bayesian' takes the loss mse, got huber"):
        MetaRegressor("bayesian", loss="huber").fit(X, y, groups=g)
    labels = np.where(y > 0, "a", "b")
    with pytest.raises(ValueError, match=r"^method: 'bayesian' takes the loss mse, got bce"):
        MetaClassifier("bayesian").fit(X, labels, groups=g)


def test_another_method_is_another_entry(monkeypatch):
    X, y, g = levels()
    monkeypatch.setitem(pymeta.sklearn.METHODS, "mine", METHODS["ridge"])
    mine = MetaRegressor("mine", **QUICK).fit(X, y, groups=g)
    assert same_models(mine, MetaRegressor("ridge", **QUICK).fit(X, y, groups=g))
