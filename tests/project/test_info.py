"""python -m pymeta.info."""

import os
import subprocess
import sys

import pytest

from pymeta import info, native


def test_it_prints_the_facts_and_passes_its_self_test():
    done = subprocess.run(
        [sys.executable, "-m", "pymeta.info"],
        env={**os.environ, "PYMETA_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    words = ("pymeta", "python", "torch", "native", "isa", "executor", "threads", "cuda", "runs")
    for word in words:
        assert any(line.split()[0] == word for line in lines), word
    assert any(line.startswith("threads     1 of") for line in lines)
    assert "PYMETA_NUM_THREADS=1" in lines
    tests = [line for line in lines if line.startswith("self-test   passed")]
    assert len(tests) == len(info.places())
    assert lines[-1] == tests[-1]


def test_it_says_what_there_is_of_cuda(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(native, "emulates", lambda: True)
    monkeypatch.setattr(native, "cuda_reason", lambda: "the driver is too old")
    monkeypatch.setattr(native, "devices", list)
    assert "cuda        none: the driver is too old" in info.report()
    assert "emulated    yes: a build for development" in info.report()
    assert info.places() == ["cpu", "emulated"]
    device = {"ordinal": 0, "name": "G", "capability": "9.0", "multiprocessors": 3}
    monkeypatch.setattr(native, "cuda_reason", lambda: None)
    monkeypatch.setattr(native, "devices", lambda: [device])
    monkeypatch.setattr(info, "_torch_has_cuda", lambda: False)
    lines = info.report()
    assert "cuda        0: G, compute capability 9.0, 3 multiprocessors" in lines
    assert any(line.startswith("cuda        torch has none") for line in lines)
    assert info.places() == ["cpu", "emulated"]
    monkeypatch.setattr(info, "_torch_has_cuda", lambda: True)
    assert info.places() == ["cpu", "cuda:0", "emulated"]


def test_it_runs_without_torch():
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        "runpy.run_module('pymeta.info', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("torch       not installed") for line in lines)
    assert any(line.startswith("cuda        ") for line in lines)
    assert "an adapter, in numpy" in lines[-2] and lines[-1].startswith("self-test   passed")


def test_the_self_test_can_fail(monkeypatch, capsys):
    monkeypatch.setattr(info, "places", lambda: ["cpu", "there", "cpu"])
    monkeypatch.setattr(info, "self_test", lambda place: (place, 1e-3 if place == "there" else 0.0))
    assert info.main() == 1
    out = capsys.readouterr().out
    assert out.count("passed") == 2 and out.count("FAILED") == 1


def test_a_device_that_does_not_work_is_reported(monkeypatch, capsys):
    def broken(place):
        raise RuntimeError("cuda:0: meta_gradient: out of memory")

    monkeypatch.setattr(info, "self_test", broken)
    assert info.main() == 1
    assert "self-test   failed: cuda:0: meta_gradient: out of memory" in capsys.readouterr().out


def test_a_missing_extension_is_reported(monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setattr(native, "_missing", "it was never built")
    assert info.main() == 1
    out = capsys.readouterr().out
    assert "missing: it was never built" in out
    assert 'self-test   failed: backend="native": it was never built' in out


def test_a_missing_extension_makes_auto_fall_back(monkeypatch):
    torch = pytest.importorskip("torch")

    import pymeta

    monkeypatch.setattr(native, "_missing", "it was never built")
    module = pymeta.MAML(torch.nn.Linear(2, 1), loss="mse", lr=0.1, steps=1)
    x, y = torch.randn(2, 3, 2), torch.randn(2, 3, 1)
    with pytest.warns(UserWarning, match="it was never built"):
        assert module(x, y, x, y).loss.requires_grad
    with pytest.raises(ValueError, match='backend="native": it was never built'):
        pymeta.MAML(torch.nn.Linear(2, 1), loss="mse", lr=0.1, steps=1, backend="native")
