"""Step sizes that need no hand: by curvature, learned for each layer; and groups that get worse."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn_help import PLAIN, levels, opposites

import pymeta
from pymeta.sklearn import MetaClassifier, MetaRegressor
from pymeta.sklearn.episodes import Rows, sample

QUICK = {"hidden": (8,), "iterations": 5, "epochs": 3, "random_state": 0}
OPEN = PLAIN | {"inner_lr": "auto"}


def rows_of(model, X, y):
    return Rows(X.astype("f4"), model._target(y.astype(float), "f4"), None)


def test_the_first_step_size_is_one_over_the_largest_curvature():
    X, y, g = levels()
    model = MetaRegressor(**QUICK | OPEN | {"method": "reptile"}).fit(X, y, groups=g)
    members = [np.flatnonzero(g == name) for name in np.unique(g)]
    support = sample(model, rows_of(model, X, y), members)
    network = model._form.network(model._form.initial(check_random_state(0)))
    rates = pymeta.step_size(network, support.xs, support.ys, loss="mse")
    assert model._start.lr == float(rates.min())
    assert [len(x) for x in support.xs] == [8] * 20  # half of each
    momentum = clone(model).set_params(inner_optimizer="momentum").fit(X, y, groups=g)
    assert momentum._start.lr == pytest.approx(0.1 * model._start.lr)
    adam = clone(model).set_params(inner_optimizer="adam").fit(X, y, groups=g)
    assert adam._start.lr == 0.01
    assert clone(model).set_params(inner_lr=0.3).fit(X, y, groups=g)._start.lr == 0.3


def test_samples_of_support_sets():
    rows = Rows(np.arange(1000.0)[:, None], np.zeros(1000), None)
    members = list(np.split(np.arange(1000), 100))
    for support, size in ((0.5, 5), (0.01, 1), (3, 3), (50, 9)):
        model = MetaRegressor(support=support)
        some = sample(model, rows, members)
        assert len(some.xs) == 32 and {len(x) for x in some.xs} == {size}
    limited = sample(MetaRegressor(task_rows=4), rows, members)
    assert {len(x) for x in limited.xs} == {2}
    assert [len(x) for x in sample(MetaRegressor(), rows, []).xs] == [128]  # task_rows, of all


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_linear_models_of_any_scale_adapt(scale):
    """A step of 0.1 diverges for the largest of them, and is nothing for the smallest."""
    X, y, g = levels(rows=40)
    X = X * scale
    quick = QUICK | {"hidden": (), "iterations": 50}
    model = MetaRegressor(**quick, **OPEN, adapt_epochs=200)
    model.fit(X, y, groups=g).adapt(X, y, groups=g)
    assert len(model.adapted_groups_) == 20
    # at a scale of 30 the intercept, of far less curvature, is slow, as gradient descent is
    assert model.score(X, y, groups=g) > (0.9 if scale < 30 else model.score(X, y) + 0.2)


def test_each_layer_learns_its_own_step_size_and_adapt_uses_it():
    X, y, g = levels(groups=6)
    model = MetaRegressor(
        **QUICK | {"iterations": 60, "dtype": "float64"}, **OPEN | {"learn_lr": True}
    )
    model.fit(X, y, groups=g)
    rates = model._start.rates
    assert rates.shape == (2,) and (rates > 0).all() and rates[0] != rates[1]
    start = model.models_.state_dict(0)
    model.adapt(X, y, groups=g)
    for place, name in enumerate(model.adapted_groups_, start=1):
        net = model._form.network(start)
        layers = [{"params": net[2 * i].parameters(), "lr": lr} for i, lr in enumerate(rates)]
        optimizer = torch.optim.SGD(layers)
        x = torch.tensor(X[g == name])
        t = torch.tensor((y[g == name] - model.y_mean_) / model.y_scale_)
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(x)[:, 0], t).backward()
            optimizer.step()
        for n, p in model.models_.state_dict(place).items():
            np.testing.assert_allclose(p, net.state_dict()[n].numpy(), rtol=0, atol=1e-11)
    one = copy.deepcopy(model).set_params(adapt_lr=0.1).adapt(X, y, groups=g)
    plain = pymeta.FineTune(model._form.network(start), loss="mse", lr=0.1, epochs=5)
    own = plain(
        torch.tensor(X[:15])[None], torch.tensor((y[:15] - model.y_mean_) / model.y_scale_)[None]
    )
    for n, p in own.parameters.items():  # a number given for adapt is that of all layers
        np.testing.assert_allclose(one.models_.parameters[n][1], p[0].numpy(), atol=1e-12)


def test_gradients_are_clipped():
    X, y, g = levels(groups=4)
    model = MetaRegressor(**QUICK, **PLAIN | {"clip_norm": 1e-3}).fit(X, y, groups=g)
    model.set_params(adapt_epochs=3, adapt_lr=0.5).adapt(X, y, groups=g)
    parts = model.models_.parameters.values()
    moved = np.sqrt(sum(np.square(p[1:] - p[:1]).reshape(4, -1).sum(1) for p in parts))
    assert (moved <= 3 * 0.5 * 1e-3 * 1.001).all() and (moved > 1e-4).all()


@pytest.mark.parametrize("reaction", ["start", "keep", "raise"])
def test_groups_that_get_worse(reaction):
    X, y, g = levels(groups=4)
    model = MetaRegressor(**QUICK | {"hidden": ()} | PLAIN, on_divergence=reaction, inner_steps=3)
    shared = model.fit(X, y, groups=g).predict(X)
    X = np.where((g == "g2")[:, None], 60 * X, X)
    if reaction == "raise":
        with pytest.raises(ArithmeticError, match=r"^task 2: adaptation diverged"):
            model.adapt(X, y, groups=g)
        return
    if reaction == "start":
        with pytest.warns(ConvergenceWarning, match=r"diverged for 1 of 4 groups.*: 'g2'"):
            model.adapt(X, y, groups=g)
        assert model.adapted_groups_.tolist() == ["g0", "g1", "g3"]
        own = model.predict(X, groups=g)
        assert np.array_equal(own[g == "g2"], model.predict(X)[g == "g2"])
        assert not np.array_equal(own[g == "g1"], shared[g == "g1"])
    else:
        model.adapt(X, y, groups=g)
        assert model.adapted_groups_.tolist() == ["g0", "g1", "g2", "g3"]


@pytest.mark.parametrize(
    ("parameter", "value", "error"),
    [
        ("inner_lr", "best", TypeError),
        ("clip_norm", 0, ValueError),
        ("clip_norm", "1", TypeError),
        ("learn_lr", 1, TypeError),
        ("on_divergence", "stop", ValueError),
        ("unknown", "ask", ValueError),
        ("gate", "yes", TypeError),
        ("clip_inputs", None, TypeError),
        ("anchor_rows", "some", TypeError),
    ],
)
def test_bad_parameters_are_named(parameter, value, error):
    X, y, g = opposites(groups=2)
    with pytest.raises(error, match=f"^{parameter}: "):
        MetaClassifier(**{parameter: value}).fit(X, y, groups=g)
