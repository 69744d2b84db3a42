"""Rows held out of fine-tuning: the loss on them after each epoch, and the best weights so far."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pymeta.reference.modules import Parameters
from pymeta.reference.task import Set
from pymeta.spec.losses import Loss


def weighs(loss: Loss, task: Set) -> bool:
    """Whether rows that count weigh anything, so that there is a loss to judge by.

    They do not where all of them are of classes of weight 0.
    """
    _, y, weights, _ = task
    counts = torch.ones(len(y), device=y.device) if weights is None else weights
    if loss.takes_classes and loss.weight and not y.is_floating_point():
        counts = counts * counts.new_tensor(loss.weight)[y]
    return bool(counts.sum() > 0)


class Validation:
    """Looks at a validation set after each epoch, keeps the best weights, and says when to stop.

    Attributes:
        best: the weights of the lowest loss so far; those of the start until an epoch is better.
        best_epoch: when that was; 0 is the start.
        curve: the loss at the start and after each epoch.
    """

    def __init__(
        self, loss: Callable[[Parameters], Tensor], start: Parameters, patience: int | None
    ) -> None:
        self.loss, self.patience = loss, patience
        self.best, self.best_epoch = start, 0
        self.curve = [loss(start)]

    def __call__(self, theta: Parameters) -> bool:
        """Record an epoch; returns whether it is the last one."""
        lowest = self.curve[self.best_epoch]
        self.curve.append(self.loss(theta))
        epoch = len(self.curve) - 1
        if bool(self.curve[epoch] < lowest):  # NaN never is
            self.best, self.best_epoch = theta, epoch
        return self.patience is not None and epoch - self.best_epoch >= self.patience
