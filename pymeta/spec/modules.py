"""What pymeta asks of torch modules, and the lock under which one is called as a function."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

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


# What a subclass may have of its own without doing anything else than its base.
_HARMLESS = frozenset((
    "__init__", "__doc__", "__module__", "__qualname__", "__annotations__", "__annotate__",
    "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__",
    "__constants__", "__repr__", "extra_repr", "reset_parameters",
))  # fmt: skip


def is_plainly(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module of a subclass computes what its base does: the class adds names alone.

    One that puts something else where the base looks (a `weight` that is computed, as torch's
    parametrizations are) may compute anything.
    """
    its = type(module)
    if its is base:
        return True
    if its.__module__.startswith("torch.") or its.forward is not base.forward:
        return False
    added = {name for c in its.__mro__ if c not in base.__mro__ for name in vars(c)} - _HARMLESS
    read = {*dir(base), *module.__dict__, *module._parameters, *module._buffers, *module._modules}
    return added.isdisjoint(read)


# The names of normalisation layers that use running statistics; None: those in eval mode do.
Fixed: TypeAlias = "frozenset[str] | None"


def is_fixed(name: str, module: nn.Module, fixed: Fixed = None) -> bool:
    """Whether a module normalises by its running statistics."""
    if not isinstance(module, _NormBase) or module.running_mean is None:
        return False
    return not module.training if fixed is None else name in fixed


def running_statistics(model: nn.Module, fixed: Fixed = None) -> dict[str, Tensor]:
    """{name: tensor} of the running statistics that a model's layers normalise by."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if is_fixed(name, module, fixed):
            for key in ("running_mean", "running_var"):
                buffer = module._buffers[key]
                assert buffer is not None
                found[f"{name}.{key}" if name else key] = buffer
    return found


def fixed_among(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """The layers whose running statistics are among the names of a model's tensors."""
    named = set(names)
    return frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        and (f"{name}.running_mean" if name else "running_mean") in named
    )


def drop_running_statistics(model: nn.Module, fixed: frozenset[str]) -> None:
    """Let a module's normalisations use their input's statistics in either mode.

    All but the fixed ones, which are put into eval mode.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _NormBase):
            if name in fixed:
                layer.eval()
                continue
            layer.track_running_stats = False
            layer._buffers.update(dict.fromkeys(layer._buffers))
