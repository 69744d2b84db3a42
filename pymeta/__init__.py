"""pymeta: adapt many small models at once, and learn where they should start.

`import pymeta` is cheap and does not import torch; the names below are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymeta.adapted import Adapted
    from pymeta.maml import MAML, Outcome
    from pymeta.native import num_threads, set_num_threads
    from pymeta.optimizers import SGD, LearnableLR

_HOMES = {
    "MAML": "maml",
    "Outcome": "maml",
    "Adapted": "adapted",
    "SGD": "optimizers",
    "LearnableLR": "optimizers",
    "num_threads": "native",
    "set_num_threads": "native",
}

__all__ = [
    "MAML",
    "SGD",
    "Adapted",
    "LearnableLR",
    "Outcome",
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
