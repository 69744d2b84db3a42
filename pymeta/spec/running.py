"""Running statistics of batch normalisation: which layers have some, and what a call adds to them.

In train mode a layer normalises each set by the set's own statistics, and a call of a learner in
which gradients are wanted moves the running ones as one training call of torch does,

    running = (1 - momentum) running + momentum s

(with momentum None the mean over all calls), where s is the mean over the tasks of each task's mean
over its inner steps of the support set's mean and unbiased variance. A `PerStepBatchNorm` has rows
for the steps, and each row gets the mean over the steps that use it. Query sets have no part in it,
and a task without support rows has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from pymeta.nn.norm import PerStepBatchNorm

Norms: TypeAlias = Sequence[nn.Module]


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module normalises over the rows of a set."""
    return isinstance(module, (_BatchNorm, PerStepBatchNorm))


def is_tracked(module: nn.Module) -> bool:
    """Whether a call in the module's mode moves its running statistics."""
    there = is_batch_norm(module) and module.running_mean is not None
    return there and module.training


def kept_by(
    model: nn.Module, modules: Norms, statistics: Tensor
) -> tuple[frozenset[str], dict[str, Tensor]]:
    """Statistics of sets in the place of running ones.

    Args:
        model: whose modules these are.
        modules: batch normalisations.
        statistics: as for `of_support`.

    Returns:
        The modules' names, and {name: [T, ...]} of their running statistics.

    Raises:
        ValueError: a module has no running statistics.
    """
    names = _names(model)
    fixed = fixed_by(model, modules)
    found: dict[str, Tensor] = {}
    for module, pair in zip(modules, of_support(modules, statistics), strict=True):
        name = names[id(module)]
        for key, value in zip(("running_mean", "running_var"), pair, strict=True):
            buffer = module._buffers[key]
            assert buffer is not None
            whole = value.reshape(len(value), *[1] * (buffer.ndim - 1), -1)
            found[f"{name}.{key}" if name else key] = whole.expand(-1, *buffer.shape).contiguous()
    return fixed, found


def fixed_by(model: nn.Module, modules: Norms) -> frozenset[str]:
    """The names of batch normalisations that get statistics in the place of running ones.

    Raises:
        ValueError: a module has no running statistics.
    """
    names = _names(model)
    for module in modules:
        if any(module._buffers.get(n) is None for n in ("running_mean", "running_var")):
            raise ValueError(
                f"query_statistics: adapted models keep the support sets' statistics in the "
                f"place of running ones, and layer {names[id(module)]} has none: make it with "
                f"track_running_stats=True"
            )
    return frozenset(names[id(m)] for m in modules)


def _names(model: nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


def any_tracked(modules: Iterable[nn.Module]) -> bool:
    """Whether a call moves any running statistics."""
    return any(map(is_tracked, modules))


def _rows(module: nn.Module) -> int:
    return module.steps if isinstance(module, PerStepBatchNorm) else 1


def most_rows(modules: Norms) -> int:
    """The number of steps that the modules have rows of their own for; 1 for none."""
    return max(map(_rows, modules), default=1)


def _channels(module: nn.Module) -> int:
    assert isinstance(module, _NormBase)
    return module.num_features


def memory(modules: Norms, like: Tensor, tasks: int) -> Tensor | None:
    """Room for the statistics of T tasks, of the kind of `like`; None where nobody wants any."""
    return like.new_empty(tasks, width(modules)) if any_tracked(modules) and tasks > 0 else None


def width(modules: Norms) -> int:
    """How many numbers a task's statistics are."""
    return sum(_rows(m) * (2 * _channels(m) + 2) for m in modules)


Measured: TypeAlias = tuple[Tensor, Tensor, Tensor]  # mean and unbiased variance, of how many []


def of_steps(modules: Norms, steps: Sequence[Mapping[int, Measured]]) -> Tensor:
    """A task's statistics from those of its inner steps: of each, those of the modules that ran.

    Returns:
        [width]: of each module and each of its rows the means, the variances, how many steps they
        are the mean of, and of how many numbers each is.
    """
    parts: list[Tensor] = []
    like = next((means for s in steps for means, *_ in s.values()), torch.zeros(0))
    for i, module in enumerate(modules):
        rows, channels = _rows(module), _channels(module)
        for row in range(rows):
            own = [s[i] for k, s in enumerate(steps) if i in s and min(k, rows - 1) == row]
            if own:
                parts += [torch.stack([pair[j] for pair in own]).mean(0) for j in (0, 1)]
            else:
                parts.append(like.new_zeros(2 * channels))
            numbers = [torch.stack([s[2] for s in own]).mean()] if own else [like.new_zeros(())]
            parts.append(torch.stack([like.new_full((), float(len(own))), *numbers]))
    return torch.cat([p.detach() for p in parts])


@torch.no_grad()
def update(modules: Norms, statistics: Tensor) -> None:
    """Move the running statistics of those modules that are tracked.

    Args:
        modules: batch normalisations.
        statistics: [T, width(modules)], as `of_steps` has them.
    """
    at = 0
    for module in modules:
        rows, channels = _rows(module), _channels(module)
        end = at + rows * (2 * channels + 2)
        own = statistics[:, at:end].detach().reshape(len(statistics), rows, -1).double()
        at = end
        if is_tracked(module):
            assert isinstance(module, _NormBase)
            _update_one(module, own)


def of_support(modules: Norms, statistics: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each module normalises by: the sets' means and (biased) variances [T, channels].

    Args:
        modules: batch normalisations.
        statistics: [T, width(modules)] of passes with the same weights, one for each row.
    """
    at, found = 0, []
    for module in modules:
        rows, channels = _rows(module), _channels(module)
        at += rows * (2 * channels + 2)
        own = statistics[:, at - 2 * channels - 2 : at]  # the last row
        numbers = own[:, -1:]
        found.append((own[:, :channels], own[:, channels:-2] * (numbers - 1) / numbers))
    return found


def _update_one(module: _NormBase, own: Tensor) -> None:
    """Of one module: own [T, rows, 2 channels + 2]."""
    channels = module.num_features
    made = own[..., -2:-1] > 0
    if not bool(made.any()):  # there were no inner steps: nothing was measured, and no call counts
        return
    tasks = made.sum(0)  # [rows, 1]
    mean = torch.where(made, own[..., :-2], 0.0).sum(0) / tasks
    calls = 1
    if module.num_batches_tracked is not None:
        each = _rows(module)  # a call in plain torch makes as many in a loop
        module.num_batches_tracked.add_(each)
        calls = int(module.num_batches_tracked) // each if module.momentum is None else 1
    momentum = 1.0 / max(calls, 1) if module.momentum is None else module.momentum
    for buffer, new in (
        (module.running_mean, mean[:, :channels]),
        (module.running_var, mean[:, channels:]),
    ):
        assert buffer is not None
        old = buffer.double().reshape(len(new), channels)
        moved = torch.where(tasks > 0, old + momentum * (new - old), old)
        buffer.copy_(moved.reshape(buffer.shape))
