"""pymeta: adapt many small models at once, and learn where they should start.

`import pymeta` is cheap and does not import torch; the names below are loaded when first used.
Adapters, adapted arrays and the descriptions of optimisers and schedules need no torch at all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymeta.adapted import Adapted
    from pymeta.adapter import Adapter
    from pymeta.arrays import AdaptedArrays
    from pymeta.finetune import FineTune
    from pymeta.maml import MAML, Outcome
    from pymeta.native import num_threads, set_num_threads
    from pymeta.optimizers import SGD, Adam, LearnableLR
    from pymeta.reptile import Reptile, ReptileOutcome
    from pymeta.schedule import Schedule
    from pymeta.stacked import History

_HOMES = {
    "MAML": "maml",
    "Outcome": "maml",
    "Reptile": "reptile",
    "ReptileOutcome": "reptile",
    "FineTune": "finetune",
    "Adapted": "adapted",
    "AdaptedArrays": "arrays",
    "Adapter": "adapter",
    "History": "stacked",
    "SGD": "optimizers",
    "Adam": "optimizers",
    "LearnableLR": "optimizers",
    "Schedule": "schedule",
    "num_threads": "native",
    "set_num_threads": "native",
}

__all__ = [
    "MAML",
    "SGD",
    "Adam",
    "Adapted",
    "AdaptedArrays",
    "Adapter",
    "FineTune",
    "History",
    "LearnableLR",
    "Outcome",
    "Reptile",
    "ReptileOutcome",
    "Schedule",
    "num_threads",
    "set_num_threads",
]

_TORCH_HOMES = {"maml", "reptile", "finetune", "adapted"}
_OLDEST_TORCH = (2, 4)


def _need_torch(name: str) -> None:
    """Raise ImportError, saying what to do, unless a torch that is new enough is installed."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":  # torch is there, but broken
            raise
        raise ImportError(
            f"pymeta.{name} needs torch, which is not installed: pip install torch"
        ) from None
    found = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if found < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise ImportError(
            f"pymeta.{name} needs torch >= {oldest}, found {torch.__version__}: "
            f"pip install --upgrade torch"
        )


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("pymeta")
    if name not in _HOMES:
        raise AttributeError(f"module 'pymeta' has no attribute {name!r}")
    if _HOMES[name] in _TORCH_HOMES:
        _need_torch(name)
    value = getattr(import_module(f"pymeta.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "__version__"})
