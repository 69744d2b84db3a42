"""The strength of the pull towards the start, learned by MAML: the parameter behind it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pymeta.backend.plan import Plan
from pymeta.spec.anchors import LearnableAnchor
from pymeta.tasks.task_set import TaskSet
from pymeta.tasks.values import weighing_rows


class LearnedAnchor(nn.Module):
    """The logarithm of a strength, or of the rows that the start is worth.

    Attributes:
        log: [], the parameter.
        of_rows: whether it is divided by the rows of a task.
    """

    def __init__(self, initial: float, of_rows: bool) -> None:
        """Begin with a value."""
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(initial)))
        self.of_rows = of_rows

    @property
    def value(self) -> float:
        """The strength, or the rows, as they are now."""
        return math.exp(float(self.log.detach()))

    def strengths(self, support: TaskSet, plan: Plan) -> Tensor:
        """[T], those of the tasks, with the parameter's graph."""
        log = self.log.to(plan.expected.device, plan.expected.dtype)
        if not self.of_rows:
            return log.exp().expand(support.tasks).contiguous()
        counts = torch.tensor(weighing_rows(support, plan.expected.loss), dtype=log.dtype)
        return log.exp() / counts.clamp(min=1).to(log.device)


def numbers_of(anchor: Any, anchor_rows: Any) -> tuple[dict[str, Any], LearnedAnchor | None]:
    """`anchor` and `anchor_rows` as options of a learner, and what is learned in their place.

    Raises:
        ValueError: both are given.
    """
    of_rows = isinstance(anchor_rows, LearnableAnchor)
    if not of_rows and not isinstance(anchor, LearnableAnchor):
        return {"anchor": anchor, "anchor_rows": anchor_rows}, None
    if anchor != 0 if of_rows else anchor_rows is not None:
        raise ValueError(
            f"anchor, anchor_rows: expected one of them, got {anchor} and {anchor_rows}"
        )
    described = anchor_rows if of_rows else anchor
    return {}, LearnedAnchor(described.initial, of_rows)
