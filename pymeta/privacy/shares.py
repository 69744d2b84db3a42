"""The sum over tasks of their clipped shares of a learner's gradient.

A task's share is its own gradient of the loss by all that is learned together (for Reptile
theta - theta_t), scaled to a norm of at most C. MAML and Reptile clip and add natively, in one
call (`task_clip`). Of a head on an encoder, sixteen tasks are computed together and differentiated
by one vectorised way back; the tasks of all other learners, and those that this cannot be done
with, are differentiated one after another.

What a task adds has to be bounded whatever the task holds: a share that is not finite counts as 0,
as does one that a head cannot solve for. It is found by halving the batch, so that an ordinary
batch costs one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pymeta.algorithms.maml import MAML
from pymeta.algorithms.reptile import Reptile
from pymeta.learners.base import EncodedLearner, has_batch_norm
from pymeta.learners.ridge import Unsolvable
from pymeta.spec.running import any_tracked
from pymeta.tasks.ragged import Ragged

Shares: TypeAlias = list[Tensor]  # like the parameters, float64
_AT_A_TIME = 16  # tasks of a head: the work of the way back grows by as much, calls get rarer
# of a head, or of what an encoder computes; numbers that are too large, or none
_UNSOLVED: Any = (Unsolvable, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
_Sum: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], Shares]


def count_tasks(first: Any) -> int:
    """How many tasks an argument holds: [T, ...], or a list of T."""
    return len(first)


def some_tasks(value: Any, begin: int, end: int) -> Any:
    """The tasks begin..end-1 of an argument; None stays."""
    if value is None:
        return None
    if isinstance(value, Ragged):
        starts = [0, *value.sizes.cumsum().tolist()]
        return Ragged(value.values[starts[begin] : starts[end]], value.sizes[begin:end])
    return value[begin:end]


class ClippedSum:
    """How a learner's shares are clipped and added."""

    def __init__(self, learner: Any, clip: float, parameters: Sequence[Tensor]) -> None:
        """TypeError where it is no learner whose gradient is a sum over tasks."""
        self._learner, self._clip, self._parameters = learner, clip, list(parameters)
        self._sum = self._chosen()
        self._vectorised = isinstance(learner, EncodedLearner)

    def _chosen(self) -> _Sum:
        learner = self._learner
        is_own = type(learner).forward in (MAML.forward, Reptile.forward)  # not what overrides it
        if not is_own and not type(learner).__module__.startswith("pymeta.learners."):
            raise TypeError(
                f"learner: expected a pymeta.MAML, a Reptile, or a learner of pymeta.learners, "
                f"got {type(learner).__name__}"
            )
        self._check_nothing_is_kept()
        if not is_own and has_batch_norm(learner):
            raise ValueError(
                "learner: batch normalisation of its networks lets tasks see each other; use "
                "GroupNorm or LayerNorm"
            )
        if is_own and getattr(learner, "implicit", None) is None:
            learner.task_clip = self._clip
            return self._natively
        return self._some_at_a_time

    def _check_nothing_is_kept(self) -> None:
        if any_tracked(self._learner.modules()):
            raise ValueError(
                "learner: the running statistics of its batch normalisation would keep what tasks "
                "show them, without clipping and noise; make it with track_running_stats=False, "
                "or use GroupNorm or LayerNorm"
            )

    def __call__(self, data: tuple[Any, ...], options: dict[str, Any]) -> Shares:
        """The sum, 0 for no task.

        Args:
            data: the learner's arguments, of T tasks.
            options: likewise by name; those that are None, or hold something for each task.
        """
        self._check_nothing_is_kept()  # a mode may have changed
        if not count_tasks(data[0]):
            return self.nothing()
        return self._finite(data, options)

    def nothing(self) -> Shares:
        """The sum over no task."""
        return [torch.zeros_like(p, dtype=torch.float64) for p in self._parameters]

    def _finite(self, data: tuple[Any, ...], options: dict[str, Any]) -> Shares:
        found = self._sum(data, options)
        if all(bool(share.isfinite().all()) for share in found):
            return found
        tasks = count_tasks(data[0])
        if tasks == 1:
            return self.nothing()
        total = self.nothing()
        for begin, end in ((0, tasks // 2), (tasks // 2, tasks)):
            part = tuple(some_tasks(value, begin, end) for value in data)
            own = {name: some_tasks(value, begin, end) for name, value in options.items()}
            total = [t + s for t, s in zip(total, self._finite(part, own), strict=True)]
        return total

    def _gradients(self, loss: Tensor) -> Shares:
        found = torch.autograd.grad(
            loss, self._parameters, allow_unused=True, materialize_grads=True
        )
        return [g.to(torch.float64) for g in found]

    def _natively(self, data: tuple[Any, ...], options: dict[str, Any]) -> Shares:
        if self._learner.task_clip != self._clip:
            raise RuntimeError(
                f"learner.task_clip: expected {self._clip}, the clip of the private training, got "
                f"{self._learner.task_clip}"
            )
        with torch.enable_grad():
            loss = self._learner(*data, **options).loss
        tasks = count_tasks(data[0])
        return [g * tasks for g in self._gradients(loss)]  # of which the loss is the mean

    def _some_at_a_time(self, data: tuple[Any, ...], options: dict[str, Any]) -> Shares:
        total = self.nothing()
        tasks = count_tasks(data[0])
        for begin in range(0, tasks, _AT_A_TIME):
            end = min(begin + _AT_A_TIME, tasks)
            part = tuple(some_tasks(value, begin, end) for value in data)
            own = {name: some_tasks(value, begin, end) for name, value in options.items()}
            shares = self._together(part, own) if self._vectorised else None
            if shares is None:
                shares = self._one_by_one(part, own)
            total = [a + b for a, b in zip(total, shares, strict=True)]
        return total

    def _together(self, data: tuple[Any, ...], options: dict[str, Any]) -> Shares | None:
        """The sum over some tasks at once; None where one of them, or a layer, forbids it.

        A share that is not finite may make others so, which is why they are then all found anew.
        """
        try:
            with torch.enable_grad():
                losses = self._learner(*data, **options).task_losses
                found = torch.autograd.grad(
                    losses,
                    self._parameters,
                    torch.eye(len(losses), dtype=losses.dtype, device=losses.device),
                    is_grads_batched=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
        except _UNSOLVED:
            return None
        except RuntimeError:  # a layer whose way back cannot be vectorised; if not, it comes again
            self._vectorised = False
            return None
        each = [g.to(torch.float64) for g in found]  # [tasks, ...]
        if not all(bool(g.isfinite().all()) for g in each):
            return None
        norms = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in each]).sum(0).sqrt()
        factors = (self._clip / (norms + 1e-6)).clamp(max=1.0)
        return [torch.tensordot(factors, g, 1) for g in each]

    def _one_by_one(self, data: tuple[Any, ...], options: dict[str, Any]) -> Shares:
        total = self.nothing()
        for t in range(count_tasks(data[0])):
            one = tuple(some_tasks(value, t, t + 1) for value in data)
            own = {name: some_tasks(value, t, t + 1) for name, value in options.items()}
            try:
                with torch.enable_grad():
                    share = self._gradients(self._learner(*one, **own).loss)
            except _UNSOLVED:
                continue
            norm = torch.stack([g.square().sum() for g in share]).sum().sqrt()
            factor = (self._clip / (norm + 1e-6)).clamp(max=1.0)
            share = [factor * g for g in share]
            if all(bool(s.isfinite().all()) for s in share):
                total = [a + b for a, b in zip(total, share, strict=True)]
        return total
