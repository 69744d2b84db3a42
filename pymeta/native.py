"""Loads the native extension, and holds its options.

Environment variables, read once when this module is imported:

    PYMETA_ISA          the instruction set, one of `isas()`; default the best of this machine
    PYMETA_EXECUTOR     "rows", "lanes", or "auto" (default: chosen from the shapes)
    PYMETA_NUM_THREADS  how many threads one call may use; default all cores

and PYMETA_BACKEND ("native", "torch" or "auto"), read when a learner is made: it decides
wherever `backend="auto"` leaves the choice open. This module does not import torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymeta.losses import Loss
    from pymeta.optimizers import SGD, Adam
    from pymeta.tasks import TaskSet

BACKENDS = ("auto", "native", "torch")

_native: Any = None
_missing: str | None = None
try:
    from pymeta import _native  # type: ignore[no-redef]
except ImportError as error:  # a source tree without a build, or a foreign platform
    _missing = f"the native extension cannot be imported ({error})"


def missing() -> str | None:
    """Why there is no native extension; None where it is loaded."""
    return _missing


def extension() -> Any:
    """The module `pymeta._native`; RuntimeError where it cannot be imported."""
    if _native is None:
        raise RuntimeError(_missing)
    return _native


def num_threads() -> int:
    """How many threads a call may use."""
    return extension().num_threads()


def set_num_threads(n: int) -> None:
    """Let every call use up to `n` threads; ValueError unless n >= 1."""
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an integer >= 1, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n: expected an integer >= 1, got {n}")
    extension().set_num_threads(n)


def isas() -> list[str]:
    """The instruction sets that this machine can run, slowest first."""
    return extension().isas()


def isa() -> str:
    """The instruction set in use."""
    return extension().isa()


def set_isa(name: str) -> None:
    """Use another instruction set; ValueError where this machine lacks it."""
    extension().set_isa(name)


def executor() -> str:
    """The executor in use: "auto", "rows" or "lanes"."""
    return extension().executor()


def set_executor(name: str) -> None:
    """Use one executor for everything, or "auto"; ValueError where it is unknown."""
    extension().set_executor(name)


def backend(argument: str) -> str:
    """The backend meant by an argument and PYMETA_BACKEND; ValueError where either is unknown."""
    if argument not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {argument!r}")
    if argument != "auto":
        return argument
    forced = os.environ.get("PYMETA_BACKEND", "").strip() or "auto"
    if forced not in BACKENDS:
        raise ValueError(f"PYMETA_BACKEND: expected one of {', '.join(BACKENDS)}, got {forced!r}")
    return forced


def _read_environment() -> None:
    try:
        if os.environ.get("PYMETA_ISA"):
            set_isa(os.environ["PYMETA_ISA"])
    except ValueError as error:
        raise ValueError(f"PYMETA_ISA: {error}") from None
    try:
        if os.environ.get("PYMETA_EXECUTOR"):
            set_executor(os.environ["PYMETA_EXECUTOR"])
    except ValueError as error:
        raise ValueError(f"PYMETA_EXECUTOR: {error}") from None
    try:
        if os.environ.get("PYMETA_NUM_THREADS"):
            set_num_threads(int(os.environ["PYMETA_NUM_THREADS"]))
    except ValueError as error:
        raise ValueError(f"PYMETA_NUM_THREADS: {error}") from None


def loss(description: Loss) -> Any:
    """The native twin of a loss."""
    return extension().Loss(
        description.kind,
        delta=description.delta,
        label_smoothing=description.label_smoothing,
        ignore_index=description.ignore_index,
        weight=description.weight,
        pos_weight=description.pos_weight,
    )


def optimizer(description: SGD | Adam, anchor: float = 0.0) -> Any:
    """The native twin of an inner optimiser (its lr goes along with each call)."""
    from pymeta.optimizers import Adam

    common = {
        "weight_decay": description.weight_decay,
        "clip_norm": description.clip_norm or 0.0,
        "anchor": anchor,
    }
    if isinstance(description, Adam):
        beta1, beta2 = description.betas
        return extension().Optimizer(
            "adam",
            beta1=beta1,
            beta2=beta2,
            eps=description.eps,
            decoupled=description.decoupled,
            **common,
        )
    return extension().Optimizer(
        "sgd", momentum=description.momentum, nesterov=description.nesterov, **common
    )


def rows(s: TaskSet) -> tuple[int, int, int, int, int, int]:
    """The `Rows` of a task set: pointers and sizes, 0 for what is absent.

    The caller keeps the tensors alive, and has made them contiguous.
    """
    return (
        s.x.data_ptr(),
        0 if s.y is None else s.y.data_ptr(),
        0 if s.weights is None else s.weights.data_ptr(),
        s.rows,
        0 if s.starts is None else s.starts.data_ptr(),
        0 if s.sizes is None else s.sizes.data_ptr(),
    )


if _native is not None:
    _read_environment()
