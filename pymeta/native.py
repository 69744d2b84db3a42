"""Loads the native extension, and holds its options.

Environment variables, read once when this module is imported:

    PYMETA_ISA          the instruction set, one of `isas()`; default the best of this machine
    PYMETA_EXECUTOR     "rows", "lanes", "mixed", "stacked", "auto" (default: chosen from the
                        shapes), or in builds for development "emulated": tensors on the CPU go the
                        way of CUDA tensors, to the CUDA executor's code on threads of the host
    PYMETA_NUM_THREADS  how many threads one call may use; default all cores that this process may
                        use: its affinity, and the CPU quota of its control group
    PYMETA_KEPT_BYTES   how much working memory is kept between calls; default 256 MiB
    PYMETA_BLOCK_THREADS  threads of a block of the CUDA executor; default chosen from the shapes
    PYMETA_SPECIALISE   1: calls with CUDA tensors have kernels of their own (pymeta/specialise.py);
                        default 0
    PYMETA_CHECK_VALUES 1: each call with CUDA tensors waits for them and checks labels and weights,
                        as calls on the CPU do; default 0: a wrong one makes its task's results NaN

and PYMETA_BACKEND ("native", "torch" or "auto"), read when a learner is made: it decides
wherever `backend="auto"` leaves the choice open. This module does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pymeta.namesake import require_ours

if TYPE_CHECKING:
    from pymeta.spec.schedule import Schedule
    from pymeta.tasks.task_set import TaskSet

BACKENDS = ("auto", "native", "torch")

require_ours()

_native: Any = None
_missing: str | None = None

emulating = False  # whether the executor is "emulated"; read by every call
checking_values = False  # whether calls on a device check labels and weights first
try:
    from pymeta import _native
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
    """How many threads a call may use.

    Unless it was set: the cores that this process may use, by its affinity and by the CPU quota of
    its control group (as containers have it), rounded up.
    """
    return int(extension().num_threads())


def set_num_threads(n: int) -> None:
    """Let every call use up to `n` threads; ValueError unless n >= 1."""
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an integer >= 1, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n: expected an integer >= 1, got {n}")
    extension().set_num_threads(n)


def free_memory() -> int:
    """Give working memory that no call uses now back to the system; how many bytes that was.

    Calls keep theirs for the next ones, up to `kept_bytes()`. What an `Adapter` keeps for itself
    goes with it, and the workspace of calls with CUDA tensors is torch's.
    """
    return int(extension().free_memory())


def kept_bytes() -> int:
    """How many bytes of working memory are kept between calls, at most."""
    return int(extension().kept_bytes())


def set_kept_bytes(n: int) -> None:
    """Keep up to `n` bytes of working memory between calls; 0: none.

    A call that needs more has all it needs, and gives back what is beyond when it ends.

    Raises:
        TypeError: `n` is no integer.
        ValueError: it is negative.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an integer >= 0, got {type(n).__name__}")
    if n < 0:
        raise ValueError(f"n: expected an integer >= 0, got {n}")
    extension().set_kept_bytes(n)


def isas() -> list[str]:
    """The instruction sets that this machine can run, slowest first."""
    return list(extension().isas())


def isa() -> str:
    """The instruction set in use."""
    return str(extension().isa())


def set_isa(name: str) -> None:
    """Use another instruction set; ValueError where this machine lacks it."""
    extension().set_isa(name)


def executor() -> str:
    """The executor in use: "auto", "rows", "lanes", "mixed", "stacked" or "emulated"."""
    return str(extension().executor())


def set_executor(name: str) -> None:
    """Use one executor for everything on the CPU, or "auto"; ValueError where it is unknown."""
    global emulating
    extension().set_executor(name)
    emulating = name == "emulated"


# ---- CUDA -------------------------------------------------------------------------------------


def cuda_reason() -> str | None:
    """Why the CUDA executor cannot run here; None where it can."""
    if _missing is not None:
        return _missing
    reason: str | None = extension().cuda_reason()
    return reason


def devices() -> list[dict[str, Any]]:
    """The CUDA devices, in the order of their ordinals.

    Each is {"ordinal", "name", "capability": "9.0", "multiprocessors", "shared_bytes"}; none where
    `cuda_reason()` says why.
    """
    return list(extension().devices())


def emulates() -> bool:
    """Whether this build has the emulated device: the executor "emulated"."""
    return bool(extension().emulates())


def block_threads() -> int:
    """Threads of a block of the CUDA executor; 0: chosen from the shapes."""
    return int(extension().block_threads())


def set_block_threads(n: int) -> None:
    """Set the threads of a block: a multiple of 32 on a GPU, 0 to have them chosen.

    Raises:
        TypeError: `n` is no integer.
        ValueError: it is not in 0..256.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an integer in 0..256, got {type(n).__name__}")
    extension().set_block_threads(n)


def block_bytes() -> int:
    """Bytes of shared memory that a block may use; 0: chosen from the device and the shapes."""
    return int(extension().block_bytes())


def set_block_bytes(n: int) -> None:
    """Set the shared memory of a block, 0 to have it chosen; what exceeds it is kept elsewhere.

    Raises:
        TypeError: `n` is no integer.
        ValueError: it is negative, or more than there can be.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an integer >= 0, got {type(n).__name__}")
    extension().set_block_bytes(n)


def set_check_values(check: bool) -> None:
    """Whether calls on a device wait for their labels and weights and check them first."""
    global checking_values
    if not isinstance(check, bool):
        raise TypeError(f"check: expected a bool, got {type(check).__name__}")
    checking_values = check


def set_specialise(on: bool) -> None:
    """Whether calls on a device have kernels of their own, with their sizes as constants.

    Compiling one takes seconds, the first time that a call of its sizes is made on this machine; it
    is kept on disk (pymeta/specialise.py). `PYMETA_SPECIALISE=1` does this at import.

    Args:
        on: True, or False (as it is at first): all calls run on the kernels that were built.

    Raises:
        TypeError: `on` is no bool.
        ValueError: this build has no CUDA executor.
    """
    if not isinstance(on, bool):
        raise TypeError(f"on: expected a bool, got {type(on).__name__}")
    core = extension()
    if not hasattr(core, "set_specialiser"):
        if on:
            raise ValueError("on: this build of pymeta has no CUDA executor")
    elif on:
        from pymeta import specialise

        core.set_specialiser(specialise.compiled, specialise.failed)
    else:
        core.clear_specialiser()


# ---- choices ----------------------------------------------------------------------------------


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


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected an integer, got {text!r}") from None


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"expected 0 or 1, got {text!r}")
    return text == "1"


_SETTINGS: tuple[tuple[str, Callable[[str], None]], ...] = (
    ("PYMETA_ISA", set_isa),
    ("PYMETA_EXECUTOR", set_executor),
    ("PYMETA_NUM_THREADS", lambda text: set_num_threads(_integer(text))),
    ("PYMETA_KEPT_BYTES", lambda text: set_kept_bytes(_integer(text))),
    ("PYMETA_BLOCK_THREADS", lambda text: set_block_threads(_integer(text))),
    ("PYMETA_SPECIALISE", lambda text: set_specialise(_switch(text))),
    ("PYMETA_CHECK_VALUES", lambda text: set_check_values(_switch(text))),
)


def _read_environment() -> None:
    for name, use in _SETTINGS:
        try:
            if os.environ.get(name):
                use(os.environ[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


# ---- what calls are made of -------------------------------------------------------------------


def rows(s: TaskSet) -> Any:
    """The `Rows` of a task set, as the core reads them.

    The caller keeps the tensors alive, and has made them contiguous.
    """
    starts, sizes = (s.starts, s.sizes) if s.there is None else s.there
    return extension().Rows(
        s.x.data_ptr(),
        0 if s.y is None else s.y.data_ptr(),
        0 if s.weights is None else s.weights.data_ptr(),
        s.rows,
        0 if starts is None else starts.data_ptr(),
        0 if sizes is None else sizes.data_ptr(),
        0 if s.offset is None else s.offset.data_ptr(),
        s.weight_columns,
        s.distributions,
        s.keeps_weightless,
    )


def schedule(s: Schedule, task_ids: int = 0) -> Any:
    """The native `Schedule`; `task_ids` is the address of [T] int64, or 0."""
    return extension().Schedule(
        steps=-1 if s.steps is None else s.steps,
        epochs=-1 if s.epochs is None else s.epochs,
        batch_size=s.batch_size or 0,
        seed=s.seed,
        stream=s.stream,
        task_ids=task_ids,
    )


if _native is not None:
    _read_environment()
