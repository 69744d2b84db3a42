"""How a task is adapted, and what becomes of many: what the reference and the native core share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymeta.spec.anchors import NO_ANCHOR, Anchor
from pymeta.spec.history import History
from pymeta.spec.losses import Loss
from pymeta.spec.optimizers import SGD, Optimizer, Rates
from pymeta.spec.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN = SGD(1.0)


@dataclass(frozen=True)
class InnerLoop:
    """How one task is adapted.

    Attributes:
        loss: what is made small.
        lr: [columns] or [rows, columns] values laid out by `rates`.
        rates: their layout.
        schedule: how many steps, and on which rows.
        first_order: take the gradients of the loss as constants.
        optimizer: the rule of a step; its lr is not looked at, `lr` takes its place.
        query_loss: what query sets are judged by; None: `loss`.
        anchor: pulls towards the start, where a call has no strength of each task's own.
    """

    loss: Loss
    lr: Tensor
    rates: Rates
    schedule: Schedule
    first_order: bool = False
    optimizer: Optimizer = _PLAIN
    anchor: Anchor = NO_ANCHOR
    query_loss: Loss | None = None

    @property
    def judge(self) -> Loss:
        """The loss of query sets."""
        return self.loss if self.query_loss is None else self.query_loss


@dataclass
class Adaptation:
    """What became of T tasks.

    Attributes:
        parameters: {name: [T, ...]} of what was adapted, or was each task's own from the start.
        status: [T] int8, 1 where an adapted value is not finite, otherwise 0.
        history: the learning curves, where they were asked for.
    """

    parameters: dict[str, Tensor]
    status: Tensor
    history: History | None = None
