"""The methods whose learner adapts the network itself: MetaLSTM, RelationalMAML."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn_help import LEARNERS, levels, opposites

from pymeta.sklearn import MetaClassifier, MetaRegressor

QUICK = {"hidden": (8,), "iterations": 150, "meta_lr": 1e-2, "inner_lr": 0.1, "random_state": 0}
QUICK |= {"anchor_rows": None, "gate": False}
FEW = QUICK | {"iterations": 3, "epochs": 3, "dtype": "float64"}


def test_there_are_some():
    assert {"meta_lstm", "relational"} <= set(LEARNERS)


@pytest.mark.parametrize("method", LEARNERS)
def test_a_regressor_adapts_to_groups(method):
    X, y, g = levels()
    model = MetaRegressor(method, **QUICK).fit(X, y, groups=g)
    assert len(model.loss_curve_) == model.n_iter_ == 150
    alone = model.score(X, y)
    later, truth, groups = levels(rows=40)
    model.adapt(X, y, groups=g)
    assert model.score(X, y) == alone  # without groups it is the start's
    assert model.score(later, truth, groups=groups) > max(alone, 0) + 0.4


@pytest.mark.parametrize("method", LEARNERS)
@pytest.mark.parametrize("classes", [2, 3])
def test_a_classifier_adapts_to_groups(method, classes):
    X, y, g = opposites()
    if classes == 3:
        y = np.array(["low", "middle", "top"])[(np.digitize(X[:, 0], [-0.5, 0.5]) + g) % 3]
    model = MetaClassifier(method, **QUICK).fit(X, y, groups=g)
    assert model.adapt(X, y, groups=g).score(X, y, groups=g) > model.score(X, y) + 0.15
    p = model.predict_proba(X, groups=g)
    assert p.shape == (len(X), classes) and np.allclose(p.sum(axis=1), 1)


@pytest.mark.parametrize("method", LEARNERS)
@pytest.mark.parametrize("head_only", [False, True])
def test_the_same_seed_is_the_same_and_groups_are_by_themselves(method, head_only):
    X, y, g = levels(groups=8, rows=20)
    settings = FEW | {"head_only": head_only}
    model = MetaRegressor(method, **settings).fit(X, y, groups=g)
    again = clone(model).fit(X, y, groups=g)
    other = MetaRegressor(method, **settings | {"random_state": 1}).fit(X, y, groups=g)
    for name, value in model.models_.parameters.items():
        np.testing.assert_allclose(again.models_.parameters[name], value, rtol=0, atol=1e-9)
        assert np.abs(other.models_.parameters[name] - value).max() > 1e-3
    one, parts = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    weights = np.random.default_rng(0).uniform(0.5, 2, len(y))
    one.adapt(X, y, groups=g, sample_weight=weights)
    early = g < np.unique(g)[5]
    for some in (early, ~early):
        parts.adapt(X[some], y[some], groups=g[some], sample_weight=weights[some])
    # torch's sums depend on what is computed together
    for name, value in one.models_.parameters.items():
        np.testing.assert_allclose(value, parts.models_.parameters[name], rtol=0, atol=1e-9)
    start = model.models_.parameters["0.weight"][0]
    assert head_only == np.array_equal(one.models_.parameters["0.weight"][1], start)


@pytest.mark.parametrize("method", LEARNERS)
def test_groups_of_one_row_and_pooled_training(method):
    X, y, g = levels(groups=4, rows=6)
    g = np.where(np.arange(len(g)) == 0, "alone", g)
    model = MetaRegressor(method, **FEW).fit(X, y, groups=g).adapt(X, y, groups=g)
    assert np.isfinite(model.predict(X, groups=g)).all()
    with pytest.warns(UserWarning, match="groups"):
        pooled = MetaRegressor(method, **FEW).fit(X, y)
    assert len(pooled.loss_curve_) == 3
