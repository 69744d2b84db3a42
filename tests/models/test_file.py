"""Files: any safetensors reader reads what pymeta writes."""

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import pymeta
from pymeta.models import file
from pymeta.models.arrays import raw_of
from pymeta.spec.losses import Loss

try:
    import torch
except ImportError:  # the file format is torch's as little as the Adapter is
    torch = None
from file_help import LAYERS, load, random_adapter, random_models, same


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": pymeta.SGD(0.5, 0.9, True, 0.01, 1.0), "lr": None},
        {"schedule": pymeta.Schedule(epochs=3, batch_size=None, seed=2**63 - 1, stream=2**62)},
        {"loss": Loss("bce_with_logits", pos_weight=(3.0,)), "anchor": 0.0},
        {"optimizer": pymeta.RMSprop(0.5, 0.9, 1e-3, 0.1, 0.5, True, 2.0), "lr": None},
        {"class_weights": "balanced"},
        {"loss": Loss("huber", delta=0.5)},
        {"class_weights": (1.0, 0.5)},
        {
            "optimizer": pymeta.SGD(pymeta.LearnableLR(0.1, "parameter")),
            "lr": np.linspace(-1, 1, 12),
        },
    ],
)
def test_adapters_come_back(dtype, options, tmp_path):
    if options.get("lr") is not None:
        options = {**options, "lr": options["lr"].astype(dtype)}
    adapter = random_adapter(dtype, **options)
    adapter.save(tmp_path / "a.safetensors")
    assert same(pymeta.Adapter.load(tmp_path / "a.safetensors"), adapter)
    assert same(pymeta.Adapter.load(str(tmp_path / "a.safetensors")), adapter)


def test_models_come_back(tmp_path):
    models = random_models()
    models.save(tmp_path / "m.safetensors")
    for verify in (False, True):
        again = pymeta.AdaptedArrays.load(tmp_path / "m.safetensors", verify=verify)
        assert same(again, models)
        xq = np.random.default_rng(2).normal(size=(4, 3, 2))
        assert np.array_equal(again(xq), models(xq))


def test_other_readers_read_it(path, kind):
    saved = random_adapter() if kind == "adapter" else random_models()
    own = saved.parameters if kind == "adapter" else {**saved._stacked, **saved._shared}
    readers = [safetensors.numpy.load_file]
    if torch is not None:
        from safetensors.torch import load_file

        readers.append(load_file)
    for found in (read(path) for read in readers):
        for name, value in own.items():
            assert np.array_equal(np.asarray(found[name]), value)
    with safetensors.safe_open(path, "numpy") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pymeta" and metadata["kind"] == kind
    assert metadata["version"] == "1"
    assert json.loads(metadata["architecture"])["layers"] == [list(layer) for layer in LAYERS]


def test_the_same_is_written_to_the_same_bytes(path, kind, tmp_path):
    load(kind, path).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_file_is_as_readable_as_others(path, tmp_path):
    (tmp_path / "other").write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        random_adapter(np.float64).save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


KILLED = """
import os, sys, pymeta
adapter = pymeta.Adapter.load(sys.argv[1])
os.fsync = lambda descriptor: os._exit(9)
adapter.save(sys.argv[1])
"""


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    random_adapter().save(path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=600)
    assert done.returncode == 9
    assert same(pymeta.Adapter.load(path), random_adapter())


def test_names_that_no_file_can_hold(tmp_path):
    with pytest.raises(ValueError, match="a parameter is called __metadata__"):
        file.write(tmp_path / "x", "models", {}, {"__metadata__": raw_of(np.zeros(1))})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch is None, reason="needs torch")
def test_dtypes_that_no_file_can_hold(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 1)).double()
    models = pymeta.Adapted.from_stacked(
        net,
        {"0.weight": torch.zeros(2, 1, 2).double(), "0.bias": torch.zeros(2, 1).double()},
        loss="mse",
    )
    models._stacked["0.bias"] = torch.zeros(2, 1, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"a parameter is torch\.complex64"):
        models.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())
