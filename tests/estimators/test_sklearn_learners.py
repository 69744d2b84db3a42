"""The methods whose learner adapts the network itself: MetaLSTM, RelationalMAML."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn_help import LEARNERS, NETWORKS, levels, opposites, quick

from pymeta.sklearn import MetaClassifier, MetaRegressor

# A relational learner that is trained for half as long, or at twice this step size, ends well or
# badly by the rounding of torch's sums.
QUICK = {"hidden": (8,), "iterations": 300, "meta_lr": 5e-3, "inner_lr": 0.1, "random_state": 0}
QUICK |= {"anchor_rows": None, "gate": False}
FEW = QUICK | {"iterations": 3, "epochs": 3, "dtype": "float64"}


def test_there_are_some():
    assert {"meta_lstm", "relational"} <= set(LEARNERS)
    assert {"maml", "implicit", "encoded", "reptile"} <= set(NETWORKS)


@pytest.mark.parametrize("method", LEARNERS)
def test_a_regressor_adapts_to_groups(method):
    X, y, g = levels()
    model = MetaRegressor(method, **QUICK).fit(X, y, groups=g)
    assert len(model.loss_curve_) == model.n_iter_ == QUICK["iterations"]
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


def test_a_step_size_from_curvature_is_a_gate_even_where_it_is_large(monkeypatch):
    """Two classes may curve a loss so little that gradient descent would take steps above 1."""
    monkeypatch.setattr("pymeta.sklearn.base.start_lr", lambda *_: 2.5)
    X, y, g = opposites()
    model = MetaClassifier("meta_lstm", **FEW | {"inner_lr": "auto"}).fit(X, y, groups=g)
    assert np.isfinite(model.adapt(X, y, groups=g).predict_proba(X, groups=g)).all()
    with pytest.raises(ValueError, match=r"inner_lr: 'meta_lstm' .* between 0 and 1, got 2\.5"):
        MetaClassifier("meta_lstm", **FEW | {"inner_lr": 2.5}).fit(X, y, groups=g)


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


# ---- entries of pymeta's learners that fine-tune the network ------------------------------------


def test_encoded_adapts_the_last_layer_alone():
    """As MAML does with head_only: the same meta-gradient, by way of the features."""
    X, y, g = levels(groups=8, rows=20)
    settings = FEW | {"hidden": (8, 4)}
    encoded = MetaRegressor("encoded", **settings).fit(X, y, groups=g)
    maml = MetaRegressor("maml", head_only=True, **settings).fit(X, y, groups=g)
    for name, value in maml.models_.parameters.items():
        np.testing.assert_allclose(encoded.models_.parameters[name], value, rtol=0, atol=1e-9)
    encoded.adapt(X, y, groups=g)
    own = encoded.models_.parameters
    for name in ("0.weight", "2.bias"):
        assert np.array_equal(own[name][1], own[name][0])
    assert not np.array_equal(own["4.weight"][1], own["4.weight"][0])
    maml.adapt(X, y, groups=g)
    np.testing.assert_allclose(
        encoded.predict(X, groups=g), maml.predict(X, groups=g), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("hidden", [(), (6,)])
def test_encoded_with_features_of_its_own_or_none(hidden):
    X, y, g = levels()
    model = MetaRegressor("encoded", **QUICK | {"hidden": hidden}).fit(X, y, groups=g)
    later, truth, groups = levels(rows=40)
    assert model.adapt(X, y, groups=g).score(later, truth, groups=groups) > 0.6


def test_implicit_is_pulled_as_it_was_trained():
    """By `anchor`, by 2 where that is 0, by `anchor_rows` over a group's rows."""
    X, y, g = levels(groups=6, rows=20)

    def moved(**settings):
        settings = FEW | {"iterations": 1, "meta_lr": 0.0, "inner_steps": 200} | settings
        model = MetaRegressor("implicit", **settings).fit(X, y, groups=g)
        model.adapt(X, y, groups=g)
        return model.predict(X, groups=g)

    plain = moved()
    np.testing.assert_array_equal(plain, moved(anchor=2.0))
    # 40 of the 20 rows' worth: a strength of 2 in `adapt`
    np.testing.assert_allclose(plain, moved(anchor_rows=40.0), rtol=0, atol=1e-8)
    assert np.abs(plain - moved(anchor=0.1)).max() > 0.1
    by_hand = MetaRegressor("maml", anchor=2.0, **FEW | {"iterations": 1, "meta_lr": 0.0,
                            "inner_steps": 200, "learn_lr": False})  # fmt: skip
    by_hand.fit(X, y, groups=g).adapt(X, y, groups=g)
    np.testing.assert_allclose(plain, by_hand.predict(X, groups=g), rtol=0, atol=1e-8)


@pytest.mark.filterwarnings("ignore:implicit:UserWarning")  # a small strength is no minimum's
@pytest.mark.parametrize("anchor_rows", [None, 10.0, "auto"])
def test_implicit_learns(anchor_rows):
    X, y, g = levels(groups=30)
    settings = QUICK | {"iterations": 100, "inner_steps": 20, "anchor_rows": anchor_rows}
    model = MetaRegressor("implicit", anchor=0.1 if anchor_rows is None else 0.0, **settings)
    model.fit(X, y, groups=g).adapt(X, y, groups=g)
    assert np.mean(model.loss_curve_[-20:]) < 0.8 * np.mean(model.loss_curve_[:5])
    assert model.score(X, y, groups=g) > model.score(X, y) + 0.2


def test_implicit_is_of_second_order():
    X, y, g = opposites(groups=4)
    with pytest.raises(ValueError, match="first_order: expected none with implicit"):
        quick(method="implicit", first_order=True).fit(X, y, groups=g)


def test_progress_says_how_long_it_takes(capsys):
    X, y, g = levels(groups=4)
    MetaRegressor("meta_lstm", **FEW | {"iterations": 20, "verbose": True}).fit(X, y, groups=g)
    lines = [line for line in capsys.readouterr().out.splitlines() if "meta_lstm" in line]
    assert len(lines) == 10
    assert "iteration 2 of 20, loss " in lines[0] and lines[0].endswith(" s to go")
    assert lines[-1].endswith(", 0 s to go")
