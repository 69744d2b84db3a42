"""Targets of the losses that want columns or a range of their own."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")

from torch import nn

import pymeta
from pymeta.serve.model import Model
from pymeta.serve.problem import Problem


def model(loss, out: int) -> Model:
    learner = pymeta.MAML(nn.Sequential(nn.Linear(2, out)), loss=loss, lr=0.1, steps=1)
    return Model("1", learner.adapter())


def test_targets_have_as_many_columns_as_the_loss_says():
    scale = model("gaussian_nll", 4)
    assert scale.targets("ys", [[1, 2], [3, 4]], 2).shape == (2, 2)
    with pytest.raises(Problem, match=r"expected 2 values for each row, got shape \[1, 4"):
        scale.targets("ys", [[1, 2, 3, 4]], 1)
    levels = model(pymeta.QuantileLoss([0.1, 0.9]), 2)
    assert levels.targets("ys", [1, 2, 3], 3).shape == (3, 1)


def test_amounts_are_not_negative():
    for loss in ("poisson_nll", "qlike"):
        amounts = model(loss, 1)
        assert np.array_equal(amounts.targets("ys", [0, 2.5], 2), [[0], [2.5]])
        with pytest.raises(Problem, match=f"a number of at least 0, as {loss} takes"):
            amounts.targets("ys", [1, -2], 2)
