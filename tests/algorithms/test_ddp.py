"""DistributedDataParallel: two processes with half of the tasks each give the gradients of one."""

import os
import subprocess
import sys
from pathlib import Path

import ddp_worker
import pytest
import torch
from helpers import assert_close

import pymeta

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Where the two processes left their gradients, with both backends."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(HERE / "ddp_worker.py"), str(folder),
    ]  # fmt: skip
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("backend", ddp_worker.BACKENDS)
def test_two_processes_give_the_gradients_of_one(saved, backend):
    net, tasks = ddp_worker.problem()
    maml = pymeta.MAML(
        net, loss="mse", lr=pymeta.LearnableLR(0.1, "layer"), steps=2, backend=backend
    )
    wanted = ddp_worker.gradients(maml, tasks)
    for rank in range(2):
        got = torch.load(saved / f"{backend}.{rank}")
        assert got.keys() == wanted.keys() and len(got) == 5
        assert_close(list(got.values()), list(wanted.values()))
