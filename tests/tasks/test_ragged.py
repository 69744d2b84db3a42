"""Tasks of different sizes in one array are what a list of them is, to the last bit."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers import assert_promised, mlp

import pymeta
from pymeta.tasks.checks import Kind
from pymeta.tasks.ragged import Ragged, in_tasks

SIZES = [3, 0, 5, 1]


def tasks(sizes=SIZES, inputs=2, dtype=np.float64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(sizes), inputs)).astype(dtype)
    y = rng.normal(size=(sum(sizes), 1)).astype(dtype)
    return Ragged(x, sizes), Ragged(y, sizes)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("sizes", [SIZES, [4, 4, 4, 4]])
@pytest.mark.parametrize("tensors", [False, True])
def test_a_call_takes_them_as_a_list(backend, sizes, tensors):
    maml = pymeta.MAML(mlp(2, 4, 1), loss="mse", lr=0.1, steps=2, backend=backend)
    xs, ys = tasks(sizes)
    xq, yq = tasks([2, 3, 1, 4])
    if tensors:
        xs, ys, xq, yq = (Ragged(torch.from_numpy(v.values), v.sizes) for v in (xs, ys, xq, yq))
    weights = Ragged(np.linspace(0.5, 1, sum(sizes)), sizes)
    got = maml(xs, ys, xq, yq, support_weights=weights)
    wanted = maml(*(list(v) for v in (xs, ys, xq, yq)), support_weights=list(weights))
    assert_promised(got.task_losses, wanted.task_losses, backend)
    assert_promised(got.predictions, wanted.predictions, backend)
    mixed = maml(list(xs), ys, xq, list(yq), support_weights=weights)
    assert_promised(got.loss, mixed.loss, backend)


def test_an_adapter_takes_them_as_a_list():
    maml = pymeta.MAML(mlp(2, 4, 1), loss="mse", lr=0.1, steps=2)
    xs, ys = tasks()
    adapter = maml.adapter()
    got, wanted = adapter.adapt(xs, ys)(xs), adapter.adapt(list(xs), list(ys))(list(xs))
    assert len(got) == 4 and all(map(np.array_equal, got, wanted))


def test_no_task_is_looked_at_by_itself(monkeypatch):
    """The price of a call's checks does not grow with the number of tasks."""
    looked = []
    for kind in Kind.__subclasses__():
        one = kind.one
        monkeypatch.setattr(
            kind, "one", lambda self, *a, one=one: looked.append(a[0]) or one(self, *a)
        )
    maml = pymeta.MAML(mlp(2, 4, 1), loss="mse", lr=0.1, steps=1)
    xs, ys = tasks([1, 2] * 500)
    maml(xs, ys, xs, ys)
    assert 0 < len(looked) <= 8
    few, looked[:] = len(looked), []
    maml(list(xs), list(ys), list(xs), list(ys))
    assert len(looked) == 4000 > few


@pytest.mark.parametrize(
    ("sizes", "error", "says"),
    [
        ([3, 3], ValueError, "sum of 5"),
        ([6, -1], ValueError, ">= 0"),
        ([[5]], ValueError, r"shape \[1, 1\]"),
        ([2.5, 2.5], TypeError, "integers"),
    ],
)
def test_sizes_are_checked(sizes, error, says):
    with pytest.raises(error, match=f"sizes: .*{says}"):
        Ragged(np.zeros((5, 1)), sizes)


def test_targets_of_other_sizes_are_refused():
    maml = pymeta.MAML(mlp(2, 4, 1), loss="mse", lr=0.1, steps=1)
    xs, ys = tasks()
    other = Ragged(ys.values, [3, 1, 4, 1])
    with pytest.raises(ValueError, match=r"ys\[1\]: expected 0 rows as xs\[1\], got 1"):
        maml(xs, other, xs, ys)
    with pytest.raises(TypeError, match=r"xs: expected torch\.float64"):
        maml(Ragged(xs.values.astype(np.float32), xs.sizes), ys, xs, ys)
    with pytest.raises(ValueError, match="empty list"):
        maml(Ragged(xs.values[:0], []), ys, xs, ys)


def test_equal_sizes_are_an_array():
    values = np.arange(12.0).reshape(6, 2)
    assert in_tasks(values, np.array([2, 2, 2])).shape == (3, 2, 2)
    ragged = in_tasks(values, np.array([1, 5]))
    assert isinstance(ragged, Ragged) and ragged[1].base is not None


def test_copies_and_pickles():
    xs, _ = tasks()
    for twin in (copy.copy(xs), copy.deepcopy(xs), pickle.loads(pickle.dumps(xs))):
        assert isinstance(twin, Ragged) and twin.sizes.tolist() == SIZES
        assert np.array_equal(twin.values, xs.values)
