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
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for word in ("pymeta", "python", "torch", "native", "isa", "executor", "threads", "runs"):
        assert any(line.split()[0] == word for line in lines), word
    assert any(line.startswith("threads     1 of") for line in lines)
    assert "PYMETA_NUM_THREADS=1" in lines
    assert lines[-1].startswith("self-test   passed")


def test_the_self_test_can_fail(monkeypatch, capsys):
    monkeypatch.setattr(info, "self_test", lambda: ("native-cpu", 1e-3))
    assert info.main() == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_missing_extension_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(native, "_missing", "it was never built")
    assert info.main() == 1
    out = capsys.readouterr().out
    assert "missing: it was never built" in out
    assert 'self-test   failed: backend="native": it was never built' in out


def test_a_missing_extension_makes_auto_fall_back(monkeypatch):
    import torch

    import pymeta

    monkeypatch.setattr(native, "_missing", "it was never built")
    module = pymeta.MAML(torch.nn.Linear(2, 1), loss="mse", lr=0.1, steps=1)
    x, y = torch.randn(2, 3, 2), torch.randn(2, 3, 1)
    with pytest.warns(UserWarning, match="it was never built"):
        assert module(x, y, x, y).loss.requires_grad
    with pytest.raises(ValueError, match='backend="native": it was never built'):
        pymeta.MAML(torch.nn.Linear(2, 1), loss="mse", lr=0.1, steps=1, backend="native")
