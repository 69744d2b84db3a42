"""The parameters that the classifier and the regressor share, and their checks."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from pymeta.spec.anchors import LearnableAnchor

ACTIVATIONS = {"relu": "ReLU", "tanh": "Tanh", "elu": "ELU", "gelu": "GELU", "silu": "SiLU"}
_FLAGS = ("gate", "clip_inputs", "learn_lr")
OPTIMIZERS = ("sgd", "momentum", "adam", "rmsprop")
_IMPLICIT = 2.0  # the strength of Rajeswaran et al. 2019


def one_of(name: str, value: Any, among: Iterable[str]) -> None:
    """ValueError, naming the parameter, unless the value is `among` what it may be."""
    if value not in tuple(among):
        raise ValueError(f"{name}: expected one of {', '.join(among)}, got {value!r}")


def count(value: Any) -> int | None:
    """A number as a plain int; None stays."""
    return None if value is None else int(value)


def flag(name: str, value: Any) -> None:
    """TypeError unless the value is a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def integer(name: str, value: Any, least: int) -> None:
    """TypeError or ValueError unless the value is an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value}")


def real(name: str, value: Any, below: float = math.inf) -> None:
    """TypeError or ValueError unless the value is a finite number >= 0 and < `below`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= float(value) < below:
        limit = "finite and >= 0" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{name}: expected a number {limit}, got {value}")


def _check_support(value: Any) -> None:
    """`support` is a number of rows, or a fraction of them."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        integer("support", value, 1)
        return
    real("support", value, 1.0)
    if value == 0:
        raise ValueError("support: expected a fraction in (0, 1), or a number of rows, got 0.0")


@dataclass(kw_only=True, eq=False, repr=False)
class Parameters(BaseEstimator):
    """What `MetaClassifier` describes; scikit-learn finds it in the signature of `__init__`."""

    method: str = field(default="auto", kw_only=False)
    base: Any = "auto"
    hidden: tuple[int, ...] = (64, 64)
    activation: str = "relu"
    inner_optimizer: str = "sgd"
    inner_lr: Any = "auto"
    learn_lr: bool = True
    clip_norm: float | None = 10.0
    inner_steps: int = 5
    inner_batch_size: int | None = None
    first_order: bool = False
    head_only: bool = False
    meta_lr: float = 1e-3
    weight_decay: float = 0.0
    iterations: int = 1000
    tasks_per_batch: int = 16
    draw: str = "groups"
    task_rows: int | None = 256
    support: float = 0.5
    shuffle: bool = True
    epochs: int = 100
    batch_size: int | None = 128
    pretrain_epochs: int = 0
    adapt_lr: float | None = None
    adapt_epochs: int | None = None
    anchor: float = 0.0
    anchor_rows: Any = "auto"
    gate: bool = True
    unknown: str = "warn"
    on_divergence: str = "start"
    clip_inputs: bool = True
    adapt_validation: float = 0.0
    adapt_patience: int | None = None
    adapt_on_fit: bool = False
    dtype: str = "float32"
    random_state: Any = None
    verbose: bool = False
    callback: Any = None

    def _check_parameters(self) -> None:
        """Raise TypeError or ValueError, naming it, where a parameter is not as documented."""
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("inner_optimizer", self.inner_optimizer, OPTIMIZERS)
        one_of("draw", self.draw, ("groups", "rows"))
        one_of("dtype", self.dtype, ("float32", "float64"))
        if not isinstance(self.hidden, (tuple, list)):
            raise TypeError(f"hidden: expected a tuple of widths, got {self.hidden!r}")
        for width in self.hidden:
            integer("hidden", width, 1)
        _check_support(self.support)
        one_of("unknown", self.unknown, ("start", "warn", "error"))
        one_of("on_divergence", self.on_divergence, ("start", "keep", "raise"))
        named = isinstance(self.base, str) and self.base == "auto"
        if self.base is not None and not named and not hasattr(self.base, "fit"):
            got = repr(self.base) if isinstance(self.base, str) else type(self.base).__name__
            raise TypeError(
                f"base: expected 'auto', an estimator of scikit-learn or None, got {got}"
            )
        for name in ("first_order", "head_only", "shuffle", "adapt_on_fit", *_FLAGS):
            flag(name, getattr(self, name))
        least = {"inner_steps": 1, "iterations": 1, "epochs": 1, "tasks_per_batch": 1}
        for name, value in {**least, "pretrain_epochs": 0}.items():
            integer(name, getattr(self, name), value)
        optional = {"task_rows": 1, "batch_size": 1, "adapt_epochs": 1}
        for name, value in {**optional, "inner_batch_size": 1, "adapt_patience": 1}.items():
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), value)
        for name in ("meta_lr", "weight_decay", "anchor"):
            real(name, getattr(self, name))
        if not isinstance(self.inner_lr, str):
            real("inner_lr", self.inner_lr)
        elif self.inner_lr != "auto":
            raise TypeError(f"inner_lr: expected 'auto' or a number, got {self.inner_lr!r}")
        if self.clip_norm is not None:
            real("clip_norm", self.clip_norm)
            if self.clip_norm == 0:
                raise ValueError("clip_norm: expected a number > 0 or None, got 0")
        self._check_anchor_rows()
        if self.callback is not None and not callable(self.callback):
            raise TypeError(
                f"callback: expected a function of (stage, iteration, loss) or None, got "
                f"{type(self.callback).__name__}"
            )
        if self.adapt_lr is not None:
            real("adapt_lr", self.adapt_lr)
        real("adapt_validation", self.adapt_validation, 1.0)
        if self.adapt_patience is not None and self.adapt_validation == 0:
            raise ValueError("adapt_patience: expected adapt_validation > 0 with it, got 0")

    def _check_anchor_rows(self) -> None:
        rows = self.anchor_rows
        if rows is None:
            return
        if isinstance(rows, str):
            if rows != "auto":
                raise TypeError(
                    f"anchor_rows: expected 'auto', None, a number or a LearnableAnchor, got "
                    f"{rows!r}"
                )
            return
        if isinstance(rows, LearnableAnchor):
            if self.method != "maml":
                raise ValueError(
                    f"anchor_rows: expected method='maml', which alone learns a LearnableAnchor, "
                    f"got method={self.method!r}"
                )
            rows = rows.initial
        real("anchor_rows", rows)
        if rows == 0 or self.anchor:
            raise ValueError(
                f"anchor_rows: expected 'auto', None, or a number > 0 and anchor=0 with it, got "
                f"{rows} and anchor={self.anchor}"
            )

    _ordered = False  # whether `fit` was told that rows are in the order of time

    @property
    def is_shuffled(self) -> bool:
        """Whether the order of a group's rows means nothing."""
        return self.shuffle and not self._ordered

    @property
    def pull(self) -> float:
        """The strength of the pull back to the start, where `anchor_rows` does not give it."""
        if self.anchor or self.method != "implicit":
            return float(self.anchor)
        rows = self.anchor_rows
        return _IMPLICIT if rows is None or isinstance(rows, str) else 0.0

    @property
    def chooses_strength(self) -> bool:
        """Whether `fit` is to find out how strongly groups are pulled back."""
        return isinstance(self.anchor_rows, str) and not self.anchor
