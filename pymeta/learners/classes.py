"""What learners that compare rows with the classes of the support set have in common.

A task's classes are those of its support set, labelled 0..C-1; tasks may have fewer than others.
A class without support rows has the logit -inf, and a query row of such a class is an error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pymeta.learners.base import EncodedLearner, State
from pymeta.learners.rows import Flat
from pymeta.spec.losses import Loss


class ClassLearner(EncodedLearner):
    """The base of ProtoNet, MatchingNet and RelationNet; not for use by itself.

    Args:
        encoder: maps rows [N, ...] to features.
        ways: how many classes there are; None for one more than the largest label of a call.
    """

    def __init__(self, encoder: nn.Module, ways: int | None) -> None:
        """Check the number of classes."""
        super().__init__(encoder, Loss("cross_entropy"))
        if ways is not None and (isinstance(ways, bool) or not isinstance(ways, int) or ways < 1):
            raise ValueError(f"ways: expected a whole number >= 1 or None, got {ways!r}")
        self.ways = ways

    def _out_features(self) -> int | None:
        return self.ways

    def _classes(self, support: Flat) -> int:
        """How many there are; ValueError where a task has no rows."""
        y = support.y
        assert y is not None
        if y.is_floating_point():
            raise ValueError("ys: expected class indices, got shares of classes")
        rows = torch.bincount(support.task, minlength=support.tasks)
        if support.tasks and int(rows.min()) == 0:
            task = int((rows == 0).nonzero()[0])
            raise ValueError(f"xs: task {task} has no rows that count, so it has no classes")
        if len(y) and int(y.min()) < 0:  # without `ways` nobody has looked
            raise ValueError(f"ys: expected class indices >= 0, got {int(y.min())}")
        return self.ways or (int(y.max()) + 1 if len(y) else 1)

    def _check_query(self, state: State, rows: Flat) -> None:
        """ValueError where a query row is of a class without support."""
        y, present = rows.y, state["present"]
        assert y is not None
        if y.is_floating_point():
            raise ValueError("yq: expected class indices, got shares of classes")
        inside = (y >= 0) & (y < present.shape[1])
        known = inside & present[rows.task, y.clamp(0, present.shape[1] - 1)]
        if not bool(known.all()):
            n = int((~known).nonzero()[0])
            raise ValueError(
                f"yq: task {int(rows.task[n])}: label {int(y[n])} has no support rows there"
            )

    def _row_losses(self, outputs: Tensor, variances: Tensor | None, targets: Tensor) -> Tensor:
        losses: Tensor = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return losses


def class_sums(values: Tensor, support: Flat, classes: int) -> tuple[Tensor, Tensor]:
    """Weighted sums of the classes' rows, values [N, ...] -> [T, C, ...]; their weights [T, C]."""
    assert support.y is not None
    key = support.task * classes + support.y
    w = support.row_weights(values)
    each = values * w.view(-1, *[1] * (values.ndim - 1))
    sums = values.new_zeros(support.tasks * classes, *values.shape[1:]).index_add(0, key, each)
    weights = w.new_zeros(support.tasks * classes).index_add(0, key, w)
    lead = support.tasks, classes
    return sums.view(*lead, *values.shape[1:]), weights.view(lead)


def hidden(logits: Tensor, present: Tensor) -> Tensor:
    """Logits [N, C], -inf where the class is not present [N, C]."""
    return logits.masked_fill(~present, -math.inf)
