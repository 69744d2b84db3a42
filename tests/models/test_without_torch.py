"""What is deployed: numpy in and out, against numpy written out, in a process that has no torch.

The modules below pymeta that need torch say so. This file itself imports no torch, so that it also
runs where there is none (tests/installed.py).
"""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import pymeta
from pymeta.spec.architecture import Architecture
from pymeta.spec.losses import Loss

LINEAR = (("linear", 3, 2, True),)
DEEP = (("linear", 3, 5, True), ("tanh",), ("linear", 5, 2, True))
NO_TORCH = "import sys; sys.modules['torch'] = None\n"  # what import then meets: no such module


def chain(layers) -> Architecture:
    places = [i for i, layer in enumerate(layers) if layer[0] == "linear"]
    names = tuple(f"{i}.{kind}" for i in places for kind in ("weight", "bias"))
    return Architecture(layers, names, names, False)


def make(layers, dtype=np.float64, **options) -> pymeta.Adapter:
    """An adapter with random weights; three steps of SGD with MSE unless told otherwise."""
    random, architecture = np.random.default_rng(0), chain(layers)
    parameters = {n: random.normal(size=s).astype(dtype) for n, s in architecture.shapes().items()}
    recipe = {
        "loss": Loss("mse"),
        "optimizer": pymeta.SGD(0.1),
        "schedule": pymeta.Schedule(steps=3),
        **options,
    }
    return pymeta.Adapter(architecture, parameters, adapted=architecture.names, **recipe)


def tasks(number: int = 5, dtype=np.float64, rows: int = 7):
    random = np.random.default_rng(1)
    return (random.normal(size=(number, rows, columns)).astype(dtype) for columns in (3, 2, 3))


def run(code: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", NO_TORCH + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYMETA_NUM_THREADS": "1"},
    )


# ---- what is computed ---------------------------------------------------------------------------


def by_hand(start: dict, x: np.ndarray, y: np.ndarray, steps: int, lr: float) -> dict:
    """Gradient descent on the mean squared error through tanh, written out in float64."""
    theta = {name: value.astype(np.float64) for name, value in start.items()}
    x, y = x.astype(np.float64), y.astype(np.float64)
    names = [name.removesuffix(".weight") for name in theta if name.endswith("weight")]
    for _ in range(steps):
        inputs = [x]
        for i, name in enumerate(names):
            z = inputs[-1] @ theta[f"{name}.weight"].T + theta[f"{name}.bias"]
            inputs.append(np.tanh(z) if i + 1 < len(names) else z)
        delta = 2 * (inputs[-1] - y) / y.size
        for i in reversed(range(len(names))):
            weight, bias = f"{names[i]}.weight", f"{names[i]}.bias"
            back = (delta @ theta[weight]) * (1 - inputs[i] ** 2)
            theta[weight] = theta[weight] - lr * delta.T @ inputs[i]
            theta[bias] = theta[bias] - lr * delta.sum(0)
            delta = back
    return theta


@pytest.mark.parametrize("layers", [LINEAR, DEEP], ids=["linear", "deep"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_descends_as_written_out_in_numpy(layers, dtype):
    adapter, steps = make(layers, dtype), 3
    xs, ys, _ = tasks(dtype=dtype)
    models = adapter.adapt(xs, ys)
    for t in range(len(xs)):
        wanted = by_hand(adapter.parameters, xs[t], ys[t], steps, 0.1)
        for name, value in models.state_dict(t).items():
            moved = np.abs(wanted[name] - adapter.parameters[name]).max()
            # a step is a sum over rows of sums over features, each rounded; 16 for what follows
            bound = 16 * steps * (xs.shape[1] + 5) * np.finfo(dtype).eps
            assert np.abs(value - wanted[name]).max() < bound < 0.1 * moved


def test_every_way_gives_the_same_bits(tmp_path):
    adapter = make(DEEP)
    xs, ys, xq = tasks()
    wanted = adapter.adapt(xs, ys)(xq)
    adapter.save(tmp_path / "a.safetensors")
    again = pymeta.Adapter.load(tmp_path / "a.safetensors")
    models = adapter.adapt(list(xs), list(ys))
    models.save(tmp_path / "m.safetensors")
    assert np.array_equal(again.adapt_predict(xs, ys, xq), wanted)
    assert np.array_equal(models(xq), wanted)
    assert np.array_equal(pymeta.AdaptedArrays.load(tmp_path / "m.safetensors")(xq), wanted)
    for t in range(len(xs)):
        assert np.array_equal(again.adapt_predict(xs[t], ys[t], xq[t]), wanted[t])


def test_many_threads_give_what_one_gives():
    adapter = make(DEEP)
    xs, ys, xq = tasks(8)
    wanted = adapter.adapt_predict(xs, ys, xq)
    wrong = []

    def work(t: int) -> None:
        for _ in range(200):
            if not np.array_equal(adapter.adapt_predict(xs[t], ys[t], xq[t]), wanted[t]):
                wrong.append(t)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_classes_weights_and_other_optimisers():
    xs, _, xq = tasks(rows=12)
    ys = np.random.default_rng(2).integers(0, 2, (5, 12))
    for optimizer in (pymeta.SGD(0.1, momentum=0.9), pymeta.Adam(0.05), pymeta.RMSprop(0.05)):
        adapter = make(
            DEEP, loss=Loss("cross_entropy"), optimizer=optimizer, class_weights="balanced"
        )
        probabilities = adapter.adapt(xs, ys, weights=np.ones((5, 12))).predict_proba(xq)
        assert probabilities.shape == (5, 12, 2)
        assert np.allclose(probabilities.sum(-1), 1) and probabilities.min() > 0


def test_bad_input_is_refused_by_name():
    adapter = make(DEEP)
    xs, ys, xq = tasks()
    with pytest.raises(TypeError, match="xs: expected float64"):
        adapter.adapt(xs.astype(np.float32), ys)
    with pytest.raises(ValueError, match="ys: "):
        adapter.adapt_predict(xs[0], ys[0][:-1], xq[0])


# ---- a process without torch --------------------------------------------------------------------

DEPLOYED = """
import numpy as np, pymeta
adapter = pymeta.Adapter.load(sys.argv[1])
with np.load(sys.argv[2]) as data:
    xs, ys, xq = data["xs"], data["ys"], data["xq"]
models = adapter.adapt(xs, ys)
np.save(sys.argv[3], models(xq))
adapter.adapt_predict(xs[0], ys[0], xq[0]), models[1:3].state_dict(0), repr(adapter)
pymeta.num_threads(), pymeta.__version__, dir(pymeta)
assert not [name for name in sys.modules if name.startswith("torch.")]
"""


def test_a_process_without_torch(tmp_path):
    adapter = make(DEEP)
    xs, ys, xq = tasks()
    adapter.save(tmp_path / "a.safetensors")
    np.savez(tmp_path / "data.npz", xs=xs, ys=ys, xq=xq)
    out = tmp_path / "out.npy"
    done = run(DEPLOYED, tmp_path / "a.safetensors", tmp_path / "data.npz", out)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(out), adapter.adapt(xs, ys)(xq))


NEEDS_TORCH = ["Adapted", "FineTune", "MAML", "Outcome", "Reptile", "ReptileOutcome", "step_size"]
ASK = """
import pymeta
for name in {names}:
    try:
        exec("from pymeta import " + name)
        print("loaded")
    except ImportError as error:
        print(error)
"""


def test_what_needs_torch_says_so_and_the_rest_is_there():
    done = run(ASK.format(names=pymeta.__all__))
    assert done.returncode == 0, done.stderr
    said = dict(zip(pymeta.__all__, done.stdout.splitlines(), strict=True))
    assert {name for name in said if said[name] != "loaded"} == set(NEEDS_TORCH)
    for name in NEEDS_TORCH:
        install = "which is not installed: pip install 'pymeta-kernels[torch]'"
        assert said[name] == f"pymeta.{name} needs torch, {install}"


def test_a_torch_that_is_too_old_is_named():
    fake = "import types; sys.modules['torch'] = types.SimpleNamespace(__version__='2.3.1+cpu')\n"
    done = run(f"{fake}import pymeta\npymeta.MAML")
    assert "ImportError: pymeta.MAML needs torch >= 2." in done.stderr
    assert "found 2.3.1+cpu: pip install --upgrade torch" in done.stderr


@pytest.mark.parametrize("name", ["learners", "privacy"])
def test_a_package_that_needs_torch_says_so(name):
    done = run(f"import pymeta.{name}")
    assert done.stderr.strip().splitlines()[-1] == (
        f"ImportError: pymeta.{name} needs torch, which is not installed: "
        "pip install 'pymeta-kernels[torch]'"
    )


def test_the_estimators_without_scikit_learn_say_so():
    done = run("sys.modules['sklearn'] = None\nimport pymeta.sklearn")
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: pymeta.sklearn needs sklearn, which is not installed: "
        "pip install 'pymeta-kernels[sklearn]'"
    )
