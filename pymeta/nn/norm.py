"""Batch normalisation that differs from inner step to inner step (Antoniou et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase


class PerStepBatchNorm(_NormBase):
    """Batch normalisation with running statistics, a scale and a shift of each inner step.

    MAML++ calls it per-step batch normalisation, running statistics (BNRS) and weights and biases
    (BNWB). Inner step k uses row k of each tensor, and every step from the last row on the last
    one; so does the query set after the steps, and after step k of a multi-step loss row k. A
    learner has to make at least `steps` inner steps.

    In train mode a set is normalised by its own statistics, as nn.BatchNorm1d and 2d do, and the
    support sets' statistics at step k go into row k of the running ones. In eval mode those are
    used. Rows may have positions: [rows, channels], [rows, channels, length] or
    [rows, channels, height, width].

    Attributes:
        weight: [steps, num_features], or None.
        bias: likewise.
        running_mean: likewise.
        running_var: likewise, unbiased variances.
        steps: how many rows there are.
        step: the inner step that the module is at; None for the last. The learners set it for
            the time of a call, `at_step` does in loops of your own.
    """

    def __init__(
        self,
        num_features: int,
        steps: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        """Make rows for `steps` inner steps; the rest is as in nn.BatchNorm1d.

        Raises:
            ValueError: `steps` is not an integer of at least 1.
        """
        if type(steps) is not int or steps < 1:
            raise ValueError(f"steps: expected an integer of at least 1, got {steps!r}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.steps = steps
        self.step: int | None = None
        rows = (steps, num_features)
        if affine:
            self.weight = nn.Parameter(torch.ones(rows))
            self.bias = nn.Parameter(torch.zeros(rows))
        if track_running_stats:
            self.register_buffer("running_mean", torch.zeros(rows))
            self.register_buffer("running_var", torch.ones(rows))

    def forward(self, x: Tensor) -> Tensor:
        """X [rows, channels, ...], normalised over rows and positions."""
        if x.ndim not in (2, 3, 4) or x.shape[1] != self.num_features:
            raise ValueError(
                f"input: expected [rows, {self.num_features}] with up to two axes of positions "
                f"behind, got {list(x.shape)}"
            )
        row = self.steps - 1 if self.step is None else min(self.step, self.steps - 1)
        mean, var = (None if t is None else t[row] for t in (self.running_mean, self.running_var))
        weight, bias = (None if t is None else t[row] for t in (self.weight, self.bias))
        measures = self.training or mean is None
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean of all calls, each of which went through all rows
                calls = -(-int(self.num_batches_tracked) // self.steps)
                momentum = 1.0 / max(calls, 1)
        return F.batch_norm(x, mean, var, weight, bias, measures, momentum, self.eps)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.num_features}, steps={self.steps}, eps={self.eps}, affine={self.affine}"


@contextmanager
def at_step(model: nn.Module, step: int | None) -> Iterator[None]:
    """A block in which all of a model's `PerStepBatchNorm` are at an inner step.

    Args:
        model: whose modules.
        step: the number of the step, from 0 on; None for the last.
    """
    modules = [m for m in model.modules() if isinstance(m, PerStepBatchNorm)]
    before = [m.step for m in modules]
    try:
        for module in modules:
            module.step = step
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.step = own
