"""AdaptedArrays: models in numpy; adapters in many threads and processes."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_help import XQ, XS, YS, arrays, make
from helpers import batch, mlp
from torch import nn

import pymeta
from pymeta.models.arrays import sigmoid, softmax

WORKER = Path(__file__).with_name("adapter_worker.py")


# ---- models in numpy ----------------------------------------------------------------------------


@pytest.fixture
def both():
    """The same models as torch and as numpy have them, and queries."""
    xs, ys, xq, _ = batch("cross_entropy", tasks=5, out=3)
    maml = make(mlp(2, 5, 3), loss="cross_entropy", adapt=["2.*"])
    return maml.adapt(xs, ys), maml.adapter().adapt(*arrays(xs, ys)), xq


@pytest.mark.parametrize(
    "index",
    [slice(1, 3), slice(None, None, -2), [4, 0, -1], [], [True, False, False, True, False],
     np.array([1, 1]), np.arange(5) > 3],
)  # fmt: skip
def test_some_of_the_tasks(both, index):
    models, numpy_models, xq = both
    some, wanted = numpy_models[index], models[index]
    assert type(some) is pymeta.AdaptedArrays and len(some) == len(wanted)
    queries = xq.numpy()[index]
    assert np.array_equal(some(queries), wanted(torch.from_numpy(queries.copy())).numpy())
    assert some.parameters["0.weight"].strides[0] == 0


def test_slices_are_views(both):
    _, models, _ = both
    models[1:3].parameters["2.bias"][:] = 0
    assert not models.parameters["2.bias"][1:3].any() and models.parameters["2.bias"][0].all()


def test_what_is_no_index(both):
    _, models, _ = both
    with pytest.raises(TypeError, match=r"one model is models\[i : i \+ 1\]"):
        models[0]
    with pytest.raises(IndexError, match="5 is not one of 5"):
        models[[5]]
    with pytest.raises(TypeError, match="task: expected an integer, a slice"):
        models["0"]


def test_state_dicts(both):
    models, numpy_models, _ = both
    wanted, got = models.state_dict(2), numpy_models.state_dict(2)
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert np.array_equal(got[name], value.numpy())
    got["2.bias"][:] = 0
    assert numpy_models.parameters["2.bias"][2].all()
    with pytest.raises(TypeError, match="task: expected an integer, got list"):
        numpy_models.state_dict([0])


def test_concatenation(both):
    _, models, xq = both
    joined = pymeta.AdaptedArrays.concatenate([models[:2], models[2:2], models[2:]])
    assert np.array_equal(joined(xq.numpy()), models(xq.numpy()))
    assert joined.parameters["0.weight"].strides[0] == 0
    other = make(mlp(2, 5, 3, act=nn.ReLU), loss="cross_entropy").adapter()
    with pytest.raises(ValueError, match=r"models\[1\]: its model is linear 2 5, relu"):
        pymeta.AdaptedArrays.concatenate([models, other.adapt(XS, np.zeros((3, 5), int))])
    with pytest.raises(TypeError, match=r"models\[0\]: expected a pymeta.AdaptedArrays"):
        pymeta.AdaptedArrays.concatenate([both[0]])


def test_histories_are_joined():
    models = make(mlp(2, 5, 2)).adapter().adapt(XS, YS)
    a, b = models[:1], models[1:]
    a.history = pymeta.History(np.ones((1, 2)), None, None, np.array([2]))
    b.history = pymeta.History(np.ones((2, 4)), None, None, np.array([4, 3]))
    joined = pymeta.AdaptedArrays.concatenate([a, b]).history
    assert np.isnan(joined.train[0, 2:]).all() and np.nansum(joined.train) == 10
    assert joined.epochs.tolist() == [2, 4, 3] and joined.best_epochs is None


def test_probabilities(both):
    models, numpy_models, xq = both
    p = numpy_models.predict_proba(xq.numpy())
    assert np.allclose(p, models.predict_proba(xq).numpy(), rtol=1e-14, atol=0)
    assert np.allclose(p.sum(-1), 1)
    listed = numpy_models.predict_proba(
        [x[:n] for x, n in zip(xq.numpy(), (4, 0, 1, 2, 3), strict=True)]
    )
    assert [len(v) for v in listed] == [4, 0, 1, 2, 3]
    assert np.array_equal(listed[3], p[3, :2])
    with pytest.raises(TypeError, match="these are of mse"):
        make(mlp(2, 5, 2)).adapter().adapt(XS, YS).predict_proba(XQ)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_probabilities_of_any_outputs(dtype):
    values = [-np.inf, -1e30, -800, -1.0, -0.0, 0.5, 80, 1e30, np.inf, np.nan]
    z = np.array([[a, b] for a in values for b in values], dtype)
    t = torch.from_numpy(z).double()
    for ours, wanted in ((sigmoid, t.sigmoid()), (softmax, t.softmax(-1))):
        got = ours(z)
        assert got.dtype == dtype
        # one rounding for each of exp, sum and quotient, and that of the exponent's own error
        assert np.allclose(
            got, wanted.numpy(), rtol=200 * np.finfo(dtype).eps, atol=1e-38, equal_nan=True
        )


def test_torch_and_numpy_read_each_others_files(both, tmp_path):
    models, numpy_models, xq = both
    models.save(tmp_path / "torch")
    numpy_models.save(tmp_path / "numpy")
    assert (tmp_path / "torch").read_bytes() == (tmp_path / "numpy").read_bytes()
    assert np.array_equal(
        pymeta.AdaptedArrays.load(tmp_path / "torch")(xq.numpy()), models(xq).numpy()
    )
    net = mlp(2, 5, 3)
    assert torch.equal(pymeta.Adapted.load(tmp_path / "numpy", net)(xq), models(xq))


# ---- threads, processes -------------------------------------------------------------------------


def test_many_threads_get_bitwise_what_one_gets():
    random = np.random.default_rng(0)
    adapter = make(mlp(2, 16, 16, 2), optimizer=pymeta.Adam(0.05), steps=5).adapter()
    tasks = []
    for _ in range(24):
        rows, queries = random.integers(0, 30, 2)
        x, y, q = (random.normal(size=(n, 2)) for n in (rows, rows, queries))
        tasks.append((x, y, q, adapter.adapt_predict(x, y, q)))
    listed = [[task[i] for task in tasks] for i in range(3)]
    failures, start = [], threading.Barrier(8)

    def work(seed):
        order = np.random.default_rng(seed)
        start.wait()
        try:
            for turn in range(100):
                x, y, q, wanted = tasks[order.integers(len(tasks))]
                if not np.array_equal(adapter.adapt_predict(x, y, q), wanted):
                    failures.append("one task")
                if turn % 20 == seed:
                    for got, task in zip(adapter.adapt_predict(*listed), tasks, strict=True):
                        if not np.array_equal(got, task[3]):
                            failures.append("many tasks")
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_others_run_while_it_computes():
    """No call holds the GIL: this thread gets on with its work all the while."""
    adapter = make(mlp(2, 64, 64, 2), steps=20_000).adapter()
    running, done = threading.Event(), threading.Event()
    x, y, q = (np.random.default_rng(0).normal(size=(20, 2)) for _ in range(3))

    def work():
        running.set()
        adapter.adapt_predict(x, y, q)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    running.wait()
    turns = 0
    while not done.is_set():
        time.sleep(0.001)
        turns += 1
    thread.join()
    assert turns > 10


def test_without_torch(tmp_path):
    """A process that loads, adapts, predicts and saves never imports torch; same results."""
    xs, ys, xq, _ = batch("cross_entropy", out=3, dtype=torch.float32)
    adapter = make(mlp(2, 5, 3, dtype=torch.float32), loss="cross_entropy").adapter()
    adapter.save(tmp_path / "a.safetensors")
    np.savez(
        tmp_path / "data.npz", **dict(zip(("xs", "ys", "xq"), arrays(xs, ys, xq), strict=True))
    )
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    models = pymeta.AdaptedArrays.load(tmp_path / "models.safetensors")
    wanted = adapter.adapt(*arrays(xs, ys))
    for name, value in wanted.parameters.items():
        assert np.array_equal(models.parameters[name], value)
    with np.load(tmp_path / "results.npz") as results:
        assert np.array_equal(results["one"], wanted(xq.numpy())[0])
        assert np.array_equal(results["many"], wanted(xq.numpy()))
        assert np.array_equal(results["forked"], wanted(xq.numpy())[0])
