"""The inner optimisers of the reference against torch.optim, and their exact second order."""

import copy
import math

import pytest
import torch
from helpers import assert_close, batch, gradients, mlp, targets
from torch import nn

import pymeta
from pymeta import Adam, SGD, reference
from pymeta.losses import Loss
from pymeta.optimizers import rates
from pymeta.schedule import Schedule, permutation
from pymeta.tasks import SUPPORT, Expected, task_set

LR = 0.05

# name -> (description, the torch optimiser over some parameters)
RULES = {
    "sgd": (SGD(LR), lambda p: torch.optim.SGD(p, LR)),
    "decay": (SGD(LR, weight_decay=0.1), lambda p: torch.optim.SGD(p, LR, weight_decay=0.1)),
    "momentum": (SGD(LR, momentum=0.9), lambda p: torch.optim.SGD(p, LR, momentum=0.9)),
    "nesterov": (
        SGD(LR, momentum=0.8, nesterov=True, weight_decay=0.2),
        lambda p: torch.optim.SGD(p, LR, momentum=0.8, nesterov=True, weight_decay=0.2),
    ),
    "clip": (SGD(LR, momentum=0.5, clip_norm=0.3), lambda p: torch.optim.SGD(p, LR, momentum=0.5)),
    "adam": (Adam(LR), lambda p: torch.optim.Adam(p, LR)),
    "reptile": (Adam(LR, betas=(0.0, 0.999)), lambda p: torch.optim.Adam(p, LR, (0.0, 0.999))),
    "adam decay": (
        Adam(LR, weight_decay=0.1, eps=1e-3, clip_norm=0.2),
        lambda p: torch.optim.Adam(p, LR, weight_decay=0.1, eps=1e-3),
    ),
    "adamw": (
        Adam(LR, weight_decay=0.1, decoupled=True),
        lambda p: torch.optim.AdamW(p, LR, weight_decay=0.1),
    ),
}


def supports(x, y, weights=None, loss="mse"):
    return task_set(SUPPORT, x, y, None, weights, Expected(Loss(loss), torch.float64, x.device))


def inner_loop(net, rule, schedule, loss="mse", names=None, **options):
    sizes = {n: p.numel() for n, p in net.named_parameters() if names is None or n in names}
    lr = torch.tensor([rule.lr], dtype=torch.float64)
    return reference.InnerLoop(
        Loss(loss), lr, rates("network", sizes), schedule, optimizer=rule, **options
    )


def by_hand(net, make, clip, x, y, schedule, task_id=0, loss=nn.functional.mse_loss):
    """The same by torch.optim on a copy of the model."""
    net = copy.deepcopy(net)
    optimizer = make(net.parameters())
    rows, size = len(x), schedule.batch_size or len(x)
    count = math.ceil(rows / size)
    steps = schedule.steps if schedule.epochs is None else schedule.epochs * count
    for step in range(steps):
        epoch, b = divmod(step, count)
        order = permutation(schedule.seed, schedule.stream, task_id, epoch, rows)
        chosen = order[b * size : (b + 1) * size] if count > 1 else slice(None)
        optimizer.zero_grad()
        loss(net(x[chosen]), y[chosen]).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return dict(net.named_parameters())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "schedule",
    [Schedule(steps=5), Schedule(steps=4, batch_size=3, seed=1), Schedule(epochs=3, batch_size=2)],
    ids=["steps", "minibatches", "epochs"],
)
def test_trajectories_are_those_of_torch_optim(name, schedule):
    rule, make = RULES[name]
    net, (xs, ys, *_) = mlp(2, 6, 2), batch(tasks=3, support=7)
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    inner = inner_loop(net, rule, schedule)
    ids = [0, 5, 2]
    for task_ids in (None, ids):
        done = reference.adapt(
            net, parameters, list(parameters), inner, supports(xs, ys), task_ids=task_ids
        )
        for t in range(3):
            task_id = 0 if task_ids is None else task_ids[t]
            wanted = by_hand(net, make, rule.clip_norm, xs[t], ys[t], schedule, task_id)
            got = [done.parameters[n][t] for n in wanted]
            assert_close(got, list(wanted.values()))
    assert not done.status.any()


