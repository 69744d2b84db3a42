"""The settings of the learners: what each has to be, checked alike in the constructor and later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn

from pymeta import native
from pymeta.spec.losses import describe_loss
from pymeta.spec.schedule import LARGEST_SEED, check_batch_size, check_count
from pymeta.spec.settings import check_clip, check_flag, check_patterns, check_precision

# name -> (learner, value) -> what is kept
Checks: TypeAlias = Mapping[str, Callable[[Any, Any], Any]]


def _check_model(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


# Those of all learners.
_OF_ALL: Checks = {
    "model": lambda self, value: _check_model(value),
    "loss": lambda self, value: describe_loss(value),
    "lr": lambda self, value: self._checked_lr(value),
    "adapted_patterns": lambda self, value: check_patterns("adapt", value),
    "backend": lambda self, value: native.backend(value),
    "precision": lambda self, value: check_precision(value),
}
# Those of several.
_OF_SOME: Checks = {
    "steps": lambda self, value: check_count("steps", value),
    "epochs": lambda self, value: check_count("epochs", value),
    "batch_size": lambda self, value: check_batch_size(value),
    "seed": lambda self, value: check_count("seed", value, most=LARGEST_SEED),
    "first_order": lambda self, value: check_flag("first_order", value),
    "task_clip": lambda self, value: check_clip("task_clip", value),
}


def checks_of(*names: str, **own: Callable[[Any, Any], Any]) -> Checks:
    """A learner's checks: those of all learners, those of several by their names, its own."""
    return {**_OF_ALL, **{name: _OF_SOME[name] for name in names}, **own}
