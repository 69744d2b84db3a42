"""What the settings of a recipe have to be, without torch: learners and operators ask the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from pymeta.spec.losses import Loss, describe_loss
from pymeta.spec.optimizers import OPTIMIZERS, SGD, LearnableLR, Optimizer, check_lr


def _named(value: Any) -> str:
    """What a caller gave, for a message: a string or a class says more than its type."""
    if isinstance(value, str):
        return repr(value)
    kind = value if isinstance(value, type) else type(value)
    is_torchs = kind.__module__.startswith("torch.optim")  # whose classes have the names of ours
    name = f"torch.optim.{kind.__name__}" if is_torchs else kind.__name__
    return f"the class {name}" if kind is value else name


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
            f"optimizer: expected {', '.join(rules[:-1])} or {rules[-1]}, got {_named(optimizer)}"
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


def check_flag(name: str, value: Any) -> bool:
    """`value`; TypeError unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


TF32X3 = "tf32x3"  # or "float32"


def check_precision(value: Any) -> str:
    """How products of float32 numbers are made; ValueError where it is unknown."""
    if value not in ("float32", TF32X3):
        raise ValueError(f'precision: expected "float32" or "{TF32X3}", got {value!r}')
    return str(value)


def check_precision_of(precision: str, dtype: str) -> None:
    """ValueError where parameters of this dtype ("float64") have no such products."""
    if precision == TF32X3 and dtype != "float32":
        raise ValueError(
            f'precision: "{TF32X3}" is for models in float32, and this one is in {dtype}: expected '
            f'"float32", which leaves them as they are, or a model after .float()'
        )


def check_query_statistics(value: Any) -> str:
    """What normalises query sets; ValueError where it is neither."""
    if value not in ("own", "support"):
        raise ValueError(f'query_statistics: expected "own" or "support", got {value!r}')
    return str(value)


def check_query_loss(value: Any) -> Loss | None:
    """What query sets are judged by, described; None stays."""
    try:
        return None if value is None else describe_loss(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"query_{error}") from None


def check_clip(name: str, value: Any) -> float | None:
    """`value` as a float or None; TypeError or ValueError unless it is finite and > 0, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number > 0 or None, got {type(value).__name__}")
    if not value > 0 or math.isinf(value):
        raise ValueError(f"{name}: expected a finite number > 0 or None, got {value}")
    return float(value)


CLIPS_THE_LOSS = (
    "task_clip: limits tasks' shares of the gradient of out.loss, not of a gradient that flows "
    "through other results; differentiate out.loss alone, or set task_clip=None"
)


def matching(patterns: Sequence[str] | None, names: Sequence[str]) -> frozenset[str]:
    """The names that any of the fnmatch patterns matches; all of them where patterns is None.

    Raises:
        ValueError: a pattern matches nothing.
    """
    if patterns is None:
        return frozenset(names)
    matched: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise ValueError(
                f"adapt: the pattern {pattern!r} matches no parameter; "
                f"there are {', '.join(names) or 'none'}"
            )
        matched.update(hits)
    return frozenset(matched)
