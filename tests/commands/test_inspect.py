"""`pymeta inspect`: what a file holds, and files that it refuses."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import pymeta
from pymeta import cli
from pymeta.commands.inspect import facts
from pymeta.spec.architecture import Architecture
from pymeta.spec.losses import Loss

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
CHAIN = Architecture(
    (("linear", 3, 5, True), ("tanh",), ("linear", 5, 2, True)), NAMES, NAMES, False
)


@pytest.fixture
def adapter() -> pymeta.Adapter:
    random = np.random.default_rng(0)
    weights = {n: random.normal(size=s) for n, s in CHAIN.shapes().items()}
    return pymeta.Adapter(
        CHAIN,
        weights,
        adapted=NAMES[2:],
        loss=Loss("mse"),
        optimizer=pymeta.SGD(0.25),
        schedule=pymeta.Schedule(steps=3),
        anchor=0.5,
    )


def test_an_adapter(adapter, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    adapter.save(path)
    found = facts(path)
    wanted = {"kind": "adapter", "parameters": 32, "inputs": 3, "outputs": 2, "steps": 3}
    wanted |= {"dtype": "float64", "loss": "mse", "anchor": 0.5, "adapted": list(NAMES[2:])}
    assert wanted.items() <= found.items()
    assert found["lr"] == {"smallest": 0.25, "largest": 0.25, "count": 1}
    assert found["tensors"]["0.weight"] == {"dtype": "F64", "shape": [5, 3]}
    assert cli.main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "model         linear 3 5, tanh, linear 5 2\n" in said
    assert "  0.weight  F64 [5, 3]\n" in said
    assert cli.main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_models(adapter, tmp_path):
    random = np.random.default_rng(1)
    models = adapter.adapt(random.normal(size=(4, 6, 3)), random.normal(size=(4, 6, 2)))
    models.parameters["2.weight"][1] = np.nan
    models._status = None  # to be looked at again
    models.save(tmp_path / "m.safetensors")
    found = facts(tmp_path / "m.safetensors")
    wanted = {"kind": "models", "models": 4, "not_finite": 1, "parameters": 32}
    assert wanted.items() <= found.items()
    assert found["own"] == list(NAMES[2:]) and found["shared"] == list(NAMES[:2])
    assert found["tensors"]["2.bias"]["shape"] == [4, 2]


def test_a_preprocessor(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("sklearn")
    from pymeta.data import Panel

    table = pandas.DataFrame({"who": list("aabb"), "x": [1.0, 2, 3, 4], "y": [0.0, 1, 0, 1]})
    panel = Panel(table, entity="who", target="y")
    panel.preprocessor().fit(panel).save(tmp_path / "p.safetensors")
    assert facts(tmp_path / "p.safetensors")["features"] == ["x"]


def test_files_that_are_refused(adapter, tmp_path, capsys):
    save_file({"w": np.zeros(3)}, tmp_path / "other.safetensors")
    adapter.save(tmp_path / "damaged.safetensors")
    data = bytearray((tmp_path / "damaged.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(data)
    cases = {
        "none.safetensors": "No such file",
        "other.safetensors": "pymeta did not write it",
        "damaged.safetensors": "the file is damaged",
    }
    for name, why in cases.items():
        assert cli.main(["inspect", str(tmp_path / name)]) == 1
        said = capsys.readouterr().err
        assert said.startswith("pymeta inspect: ") and name in said and why in said
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err
