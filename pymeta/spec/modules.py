"""What pymeta asks of torch modules, and the lock under which one is called as a function."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

Function = TypeVar("Function", bound=Callable[..., Any])

_lock = threading.RLock()


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()  # the thread that held the old one did not survive the fork


if hasattr(os, "register_at_fork"):  # where there are forks
    os.register_at_fork(after_in_child=_new_lock)


def one_at_a_time() -> AbstractContextManager[Any]:
    """The lock that is held while `functional_call` has other tensors put into a module.

    Whoever reads a module's parameters under it reads the module's own.
    """
    return _lock


def uses_running_statistics(model: nn.Module) -> str | None:
    """The name of a normalisation layer that would use running statistics, if there is one."""
    for name, module in model.named_modules():
        evaluates = isinstance(module, _NormBase) and not module.training
        if evaluates and module.running_mean is not None:
            return name or type(module).__name__
    return None


def drop_running_statistics(model: nn.Module) -> None:
    """Let every normalisation of a module use its input's statistics, in eval mode too."""
    for layer in model.modules():
        if isinstance(layer, _NormBase):
            layer.track_running_stats = False
            layer._buffers.update(dict.fromkeys(layer._buffers))


def check_statistics(model: nn.Module) -> None:
    """Raise ValueError where a normalisation layer would use its running statistics."""
    name = uses_running_statistics(model)
    if name is not None:
        raise ValueError(
            f"model: {name} is in eval mode and would use running statistics, but pymeta "
            f"normalises each set by its own: call .train() on it, or make it with "
            f"track_running_stats=False"
        )


def outside_graphs(function: Function) -> Function:
    """`function` for torch.compile: not traced, but called in eager mode."""
    disable: Any = torch.compiler.disable
    disabled: Function = disable(function)
    return disabled
