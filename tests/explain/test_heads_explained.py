"""Attributions and influence of the models of pymeta.learners."""

import numpy as np
import pytest
import torch
from explain_help import ragged, tensors
from helpers import batch, mlp
from torch import nn

from pymeta.explain import influence, input_gradients, integrated_gradients
from pymeta.learners import BayesianHead, EncodedMAML, MatchingNet, ProtoNet, RidgeHead

HEADS = {
    "ridge": lambda: RidgeHead(mlp(5, 6), features=6, outputs=2, loss="mse"),
    "bayesian": lambda: BayesianHead(mlp(5, 6), features=6, outputs=2),
    "newton": lambda: RidgeHead(mlp(5, 6), features=6, outputs=2, loss="cross_entropy"),
    "protonet": lambda: ProtoNet(mlp(5, 6)),
    "matching": lambda: MatchingNet(mlp(5, 6)),
    "encoded": lambda: EncodedMAML(mlp(5, 6), mlp(6, 2), loss="mse", lr=0.1, steps=2),
}


def made(name):
    learner = HEADS[name]().double()
    loss = "mse" if name in ("ridge", "bayesian", "encoded") else "cross_entropy"
    data = batch(loss, tasks=4, support=8, query=6, inputs=5)
    if loss == "cross_entropy":
        data[1][:, :2] = torch.tensor([0, 1])
    return learner, data


@pytest.mark.parametrize("name", HEADS)
def test_attributions(name):
    learner, (xs, ys, xq, _) = made(name)
    models = learner.adapt(xs, ys)
    for rows in (xq, ragged(xq)):
        found = input_gradients(models, rows, output=1)
        step = 1e-6
        for feature in range(5):
            bump = torch.zeros(5).double()
            bump[feature] = step
            up, down = (
                models([r + s for r in rows] if isinstance(rows, list) else rows + s)
                for s in (bump, -bump)
            )
            for g, u, d in zip(tensors(found.values), up, down, strict=True):
                slope = (u[:, 1] - d[:, 1]) / (2 * step)
                # errors of order step^2, and of rounding over the step
                assert float((g[:, feature] - slope).abs().max()) < 1e-7
    whole = integrated_gradients(models, xq, steps=48)
    assert np.abs(whole.gap).max() < 1e-6 * np.abs(whole.values).max()


@pytest.mark.parametrize("name", ["ridge", "bayesian", "encoded"])
def test_influence_is_the_slope_by_weights(name):
    learner, (xs, ys, xq, _) = made(name)
    weights = torch.rand(4, 8).double() + 0.5
    found = influence(learner, xs, ys, xq, weights=weights, output=0)
    step = 1e-5
    for s in range(8):
        bump = torch.zeros_like(weights)
        bump[:, s] = step
        up, down = (
            learner.adapt(xs, ys, support_weights=w)(xq)[..., 0]
            for w in (weights + bump, weights - bump)
        )
        slope = ((up - down) / (2 * step)).numpy()
        assert np.abs(found[:, :, s] - slope).max() < 1e-7
    assert np.abs(found).max() > 1e-3


def test_what_cannot_be_explained_is_refused():
    learner, (xs, ys, xq, _) = made("ridge")
    models = learner.adapt(xs, ys)
    with pytest.raises(ValueError, match="4 tasks"):
        models.input_gradients(xq[:2], torch.ones(2, 6, 2).double())
    with pytest.raises(TypeError, match="cotangents"):
        models.input_gradients(xq, None)
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).double()
    mixed = RidgeHead(net, features=6, outputs=2, loss="mse").double()
    with pytest.raises(ValueError, match="batch normalisation"):
        input_gradients(mixed.adapt(xs, ys), xq)
    words = EncodedMAML(nn.EmbeddingBag(9, 6), nn.Linear(6, 2), loss="mse", lr=0.1, steps=1)
    tokens = torch.randint(0, 9, (2, 3, 4))
    with pytest.raises(TypeError, match="xq: expected numbers"):
        words.adapt(tokens, torch.randn(2, 3, 2)).input_gradients(tokens, torch.ones(2, 3, 2))
