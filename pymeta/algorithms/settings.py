"""The settings of the learners: what each has to be, checked alike in the constructor and later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from pymeta import native
from pymeta.spec.losses import Loss, describe_loss
from pymeta.spec.optimizers import OPTIMIZERS, SGD, LearnableLR, Optimizer, check_lr
from pymeta.spec.schedule import LARGEST_SEED, check_batch_size, check_count

# name -> (learner, value) -> what is kept
Checks: TypeAlias = Mapping[str, Callable[[Any, Any], Any]]


def _check_model(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def one_optimizer(lr: Any, optimizer: Any, learnable: bool) -> Optimizer:
    """The inner optimiser given by exactly one of `lr` and `optimizer`."""
    if (lr is None) == (optimizer is None):
        both = "neither" if lr is None else "both"
        raise ValueError(f"lr, optimizer: expected exactly one of them, got {both}")
    if optimizer is None:
        optimizer = SGD(lr if isinstance(lr, LearnableLR) else check_lr("lr", lr))
    elif type(optimizer) not in OPTIMIZERS.values():
        rules = [f"pymeta.{rule.__name__}" for rule in OPTIMIZERS.values()]
        raise TypeError(
            f"optimizer: expected {', '.join(rules[:-1])} or {rules[-1]}, "
            f"got {type(optimizer).__name__}"
        )
    if isinstance(optimizer.lr, LearnableLR) and not learnable:
        name = "lr" if lr is not None else "optimizer.lr"
        raise TypeError(f"{name}: expected a number, got a LearnableLR, which only MAML can learn")
    kept: Optimizer = optimizer
    return kept


def check_patterns(name: str, patterns: Any) -> tuple[str, ...] | None:
    """Patterns for fnmatch as a tuple; TypeError unless they are a list of strings or None."""
    if patterns is None:
        return None
    if (
        isinstance(patterns, str)
        or not isinstance(patterns, Sequence)
        or not all(isinstance(p, str) for p in patterns)
    ):
        raise TypeError(
            f"{name}: expected a list of patterns such as ['4.*'], got {type(patterns).__name__}"
        )
    return tuple(patterns)


def _check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def check_query_loss(value: Any) -> Loss | None:
    """What query sets are judged by, described; None stays."""
    try:
        return None if value is None else describe_loss(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"query_{error}") from None


def _check_clip(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number > 0 or None, got {type(value).__name__}")
    if not value > 0 or math.isinf(value):
        raise ValueError(f"{name}: expected a finite number > 0 or None, got {value}")
    return float(value)


# Those of all learners.
_OF_ALL: Checks = {
    "model": lambda self, value: _check_model(value),
    "loss": lambda self, value: describe_loss(value),
    "lr": lambda self, value: self._checked_lr(value),
    "adapted_patterns": lambda self, value: check_patterns("adapt", value),
    "backend": lambda self, value: native.backend(value),
}
# Those of several.
_OF_SOME: Checks = {
    "steps": lambda self, value: check_count("steps", value),
    "epochs": lambda self, value: check_count("epochs", value),
    "batch_size": lambda self, value: check_batch_size(value),
    "seed": lambda self, value: check_count("seed", value, most=LARGEST_SEED),
    "first_order": lambda self, value: _check_flag("first_order", value),
    "task_clip": lambda self, value: _check_clip("task_clip", value),
}


def checks_of(*names: str, **own: Callable[[Any, Any], Any]) -> Checks:
    """A learner's checks: those of all learners, those of several by their names, its own."""
    return {**_OF_ALL, **{name: _OF_SOME[name] for name in names}, **own}
