"""From a head to an adapter: gradient steps that end where the formula does.

The posterior of a head's last layer is the minimum of a quadratic (of a convex function, for two
classes): the support loss and a pull towards the prior mean. In the coordinates where the prior has
unit precision, v = C' w with L0 = C C', that pull is `anchor_rows`, so that plain gradient steps
with momentum from v0, with a step size from the largest curvature, find what the formula finds. A
frozen linear layer makes z = C^-1 [f, 1] of the features; the adapted one has the weights v.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from pymeta import MAML, SGD, Adapter
from pymeta.data import Panel
from pymeta.learners import BayesianHead, RidgeHead

_CLOSE = 1e-5  # of the distance from the start that may be left
_MOST_STEPS = 400


def _root(head: BayesianHead | RidgeHead) -> torch.Tensor:
    """C, lower triangular, of the prior's precision."""
    if isinstance(head, BayesianHead):
        return head.prior_root.tril(-1) + torch.diag(head.prior_root.diagonal().exp())
    return torch.diag((head.log_precision / 2).exp())


@torch.no_grad()
def adapter_of(head: BayesianHead | RidgeHead, panel: Panel) -> Adapter:
    """The adapter whose steps lead to the head's adapted weights.

    Args:
        head: trained; its encoder is an identity or a chain that the native core knows.
        panel: training rows, with the head's features: step size and number of steps are for
            entities like these.
    """
    root = _root(head)
    inverse = torch.linalg.inv(root)
    width = head.features
    whiten = nn.Linear(width, len(root), bias=head.bias)
    whiten.weight.copy_(inverse[:, :width])
    if head.bias:
        whiten.bias.copy_(inverse[:, width])
    last = nn.Linear(len(root), head.outputs, bias=False)
    last.weight.copy_((root.T @ head.prior_mean).T)
    before = list(head.encoder) if isinstance(head.encoder, nn.Sequential) else []
    network = nn.Sequential(*before, whiten, last)
    steepest = {"mse": 2.0, "cross_entropy": 0.5}.get(head.loss.kind, 0.25)  # of a row's loss
    largest, rows = _curvature(network[:-1], panel, steepest)
    pull = 2.0 if head.loss.kind == "mse" else 1.0  # mse lacks the half that the formula has
    low, high = pull / rows, largest + pull
    root_kappa = math.sqrt(high / low)
    momentum = ((root_kappa - 1) / (root_kappa + 1)) ** 2
    rate = 4 / (math.sqrt(high) + math.sqrt(low)) ** 2
    steps = math.ceil(-math.log(_CLOSE) / max(-math.log(momentum) / 2, 1e-3)) if momentum else 1
    learner = MAML(
        network,
        loss=head.loss.kind,
        optimizer=SGD(lr=rate, momentum=momentum),
        steps=min(max(steps, 5), _MOST_STEPS),
        adapt=[f"{len(network) - 1}.weight"],
        anchor_rows=pull,
    )
    return learner.adapter()


def _curvature(features: nn.Module, panel: Panel, factor: float) -> tuple[float, int]:
    """The largest curvature of a task's mean loss, and the rows of the largest task."""
    z = torch.cat([features(part) for part in torch.split(torch.as_tensor(panel.x), 4096)])
    tasks = len(panel.entities)
    code = torch.as_tensor(panel.codes)
    squares = z.new_zeros(tasks, z.shape[1], z.shape[1])
    for first in range(0, len(z), 4096):
        part = z[first : first + 4096]
        squares.index_add_(0, code[first : first + 4096], part.unsqueeze(2) * part.unsqueeze(1))
    squares /= torch.as_tensor(panel.sizes).to(z.dtype)[:, None, None]
    # a task of few rows may be steeper than the mean of many: as steep as the longest of its rows
    longest = float(z.square().sum(1).quantile(0.99)) if len(z) < 10**6 else float("inf")
    largest = float(torch.linalg.eigvalsh(squares)[:, -1].max())
    return factor * min(max(largest, longest), 50 * largest), int(panel.sizes.max())
