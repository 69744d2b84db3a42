"""What a call asks of the inner loop and its judgement, besides tasks and parameters."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Recipe(NamedTuple):
    """How a call adapts and what it weighs; all tensors dense, of the parameters' dtype and device.

    Attributes:
        steps: how many inner steps.
        first_order: whether inner gradients are constants.
        anchors: [T] strengths of the tasks' own, or None.
        step_weights: [steps] of the query losses after each step; None for the last alone.
        task_clip: the largest norm of a task's share of the gradient; 0 for any.
        own: the names of the parameters of which each task has a start of its own.
        per_task_lr: whether lr is [T, rows, columns].
    """

    steps: int
    first_order: bool
    anchors: Tensor | None = None
    step_weights: Tensor | None = None
    task_clip: float = 0.0
    own: tuple[str, ...] = ()
    per_task_lr: bool = False

    @property
    def plain(self) -> bool:
        """Whether, anchors aside, there is nothing but the last query loss from a shared start."""
        weighed = self.step_weights is not None or self.task_clip
        return not (weighed or self.own or self.per_task_lr)
