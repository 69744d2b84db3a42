"""One process of tests/algorithms/test_ddp.py: its half of the tasks, gradients averaged by DDP."""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import pymeta

BACKENDS = "native", "torch"


def problem():
    """The net and the tasks, the same in every process."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    tasks = [torch.randn(4, 5, 2, dtype=torch.float64) for _ in range(4)]
    return net.double(), tasks


def gradients(module, tasks):
    """Gradients of one call, accumulated over two calls."""
    for _ in range(2):
        module(*tasks).loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in module.named_parameters()}


def main(folder):
    """Save this process's gradients as {folder}/{backend}.{rank}."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    for backend in BACKENDS:
        net, tasks = problem()
        lr = pymeta.LearnableLR(0.1, "layer")
        maml = pymeta.MAML(net, loss="mse", lr=lr, steps=2, backend=backend)
        mine = [v.chunk(world)[rank] for v in tasks]
        torch.save(gradients(DistributedDataParallel(maml), mine), f"{folder}/{backend}.{rank}")
    dist.barrier()  # nobody leaves while the other still talks to him
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # gloo's threads, where they end together with Python, may abort a process that is done.
    os._exit(0)
