"""The benchmark as a program, and with its workers in this process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from bench_help import RESULTS, LocalWorker

import pymeta
from pymeta.bench import (
    contestants,
    devices,
)
from pymeta.bench import session as sessions


@pytest.fixture(autouse=True)
def _threads_as_before():
    """The contestants set torch's and pymeta's threads."""
    before = torch.get_num_threads(), pymeta.num_threads()
    yield
    torch.set_num_threads(before[0])
    pymeta.set_num_threads(before[1])


@pytest.fixture(scope="session")
def results() -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of the program on the smallest case: pymeta alone."""
    done = RESULTS.result()
    assert done.returncode == 0, done.stdout + done.stderr
    return RESULTS.folder, done


@pytest.fixture
def local(monkeypatch) -> None:
    """Sessions whose workers live in this process, on as few threads as tests may use."""
    monkeypatch.setattr(sessions, "Worker", LocalWorker)
    monkeypatch.setattr(contestants, "cores", lambda: 1)
    monkeypatch.setattr(devices, "measured_peaks", lambda device: {
        "matmul_flops": 5e10, "copy_bytes": 1e10, "matmul_size": 8.0})  # fmt: skip
