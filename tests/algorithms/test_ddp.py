"""DistributedDataParallel: two processes with half of the tasks each give the gradients of one."""

import os
import sys
from pathlib import Path

import ddp_worker
import pytest
import torch
from background import Program
from helpers import assert_close

import pymeta

HERE = Path(__file__).resolve().parent


TWO = Program(  # which leave their gradients, with both backends, in its folder
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *(str(HERE / "ddp_worker.py"), "{folder}"),
    OMP_NUM_THREADS="1",
    PYTHONPATH=os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
)


@pytest.mark.background(TWO)
@pytest.mark.parametrize("backend", ddp_worker.BACKENDS)
def test_two_processes_give_the_gradients_of_one(backend):
    done = TWO.result()
    assert done.returncode == 0, done.stderr
    net, tasks = ddp_worker.problem()
    maml = pymeta.MAML(
        net, loss="mse", lr=pymeta.LearnableLR(0.1, "layer"), steps=2, backend=backend
    )
    wanted = ddp_worker.gradients(maml, tasks)
    for rank in range(2):
        got = torch.load(TWO.folder / f"{backend}.{rank}")
        assert got.keys() == wanted.keys() and len(got) == 5
        assert_close(list(got.values()), list(wanted.values()))
