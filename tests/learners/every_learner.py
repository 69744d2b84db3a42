"""One of every learner, small, with tasks for it; and one process of test_every_learner.py."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pymeta import learners

INPUTS, OUTPUTS = 3, 2


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 6), nn.Tanh(), nn.Linear(6, 4))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 6), nn.Tanh(), nn.Linear(6, OUTPUTS))


def judge() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))


SIZE = {"features": 4, "outputs": OUTPUTS}
INNER = {"lr": 0.1, "steps": 2}
MAKERS = {
    "protonet": lambda: learners.ProtoNet(encoder()),
    "matching": lambda: learners.MatchingNet(encoder(), learn_temperature=True),
    "context": lambda: learners.MatchingNet(encoder(), context=4, reads=2, learn_temperature=True),
    "relation": lambda: learners.RelationNet(encoder(), judge()),
    "ridge": lambda: learners.RidgeHead(encoder(), loss="mse", **SIZE),
    "newton": lambda: learners.RidgeHead(encoder(), loss="cross_entropy", **SIZE),
    "bayesian": lambda: learners.BayesianHead(encoder(), **SIZE),
    "meta_lstm": lambda: learners.MetaLSTM(network(), loss="mse", hidden=3, **INNER),
    "relational": lambda: learners.RelationalMAML(
        network(), loss="cross_entropy", features=INPUTS, targets=OUTPUTS, prototypes=3, width=4,
        **INNER,
    ),
    "encoded": lambda: learners.EncodedMAML(
        encoder(), nn.Linear(4, OUTPUTS), loss="cross_entropy", **INNER
    ),
}  # fmt: skip
VALUES = {"ridge", "bayesian", "meta_lstm"}  # whose targets are numbers; all others' are classes


def make(kind: str) -> nn.Module:
    """A learner in float64, with nothing in it that is zero at first."""
    torch.manual_seed(0)
    learner = MAKERS[kind]().double()
    if kind == "relational":
        with torch.no_grad():
            for p in learner.modulation[-1].parameters():
                p.uniform_(-0.5, 0.5)
    return learner


def tasks(kind: str, count: int = 4, support: int = 6, query: int = 3) -> list[torch.Tensor]:
    """[xs, ys, xq, yq]; every class is in every support set."""
    torch.manual_seed(1)
    sides = []
    for rows in (support, query):
        x = torch.randn(count, rows, INPUTS, dtype=torch.float64)
        y = torch.arange(rows).remainder(OUTPUTS).repeat(count, 1)
        values = torch.randn(count, rows, OUTPUTS, dtype=torch.float64)
        sides += [x, values if kind in VALUES else y]
    return sides


def gradients(module: nn.Module, data: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of every parameter, by name."""
    module(*data).loss.backward()
    return {n.removeprefix("module."): p.grad for n, p in module.named_parameters()}


def main(path: str) -> None:
    """Save this process's gradients of all learners as {path}.{rank}."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for kind in MAKERS:
        mine = [v.chunk(world)[rank] for v in tasks(kind)]
        found[kind] = gradients(DistributedDataParallel(make(kind)), mine)
    torch.save(found, f"{path}.{rank}")
    dist.barrier()  # nobody leaves while the other still talks to him
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # gloo's threads, where they end together with Python, may abort a process that is done.
    os._exit(0)
