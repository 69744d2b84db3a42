"""pymeta: adapt many small models at once, and learn where they should start.

`import pymeta` is cheap and does not import torch; the names below are loaded when first used.
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


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("pymeta")
    if name not in _HOMES:
        raise AttributeError(f"module 'pymeta' has no attribute {name!r}")
    value = getattr(import_module(f"pymeta.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "__version__"})
