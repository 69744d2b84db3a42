"""pymeta: adapt many small models at once, and learn where they should start.

`import pymeta` is cheap and does not import torch; the names below are loaded when first used, and
so are the packages, as in `pymeta.data.Panel`.
Adapters, adapted arrays and the descriptions of losses, optimisers and schedules need no torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymeta.algorithms.finetune import FineTune
    from pymeta.algorithms.maml import MAML
    from pymeta.algorithms.outcome import Outcome
    from pymeta.algorithms.reptile import Reptile, ReptileOutcome
    from pymeta.algorithms.step_size import step_size
    from pymeta.models.adapted import Adapted
    from pymeta.models.adapter import Adapter
    from pymeta.models.arrays import AdaptedArrays
    from pymeta.native import free_memory, num_threads, set_num_threads
    from pymeta.spec.anchors import LearnableAnchor
    from pymeta.spec.history import History
    from pymeta.spec.implicit import Implicit
    from pymeta.spec.losses import QuantileLoss, StudentTNLLLoss
    from pymeta.spec.optimizers import SGD, Adam, LearnableLR, RMSprop
    from pymeta.spec.schedule import Schedule

_HOMES = {
    "MAML": "algorithms.maml",
    "Outcome": "algorithms.outcome",
    "Reptile": "algorithms.reptile",
    "ReptileOutcome": "algorithms.reptile",
    "FineTune": "algorithms.finetune",
    "Adapted": "models.adapted",
    "AdaptedArrays": "models.arrays",
    "Adapter": "models.adapter",
    "History": "spec.history",
    "Implicit": "spec.implicit",
    "QuantileLoss": "spec.losses",
    "StudentTNLLLoss": "spec.losses",
    "LearnableAnchor": "spec.anchors",
    "SGD": "spec.optimizers",
    "Adam": "spec.optimizers",
    "RMSprop": "spec.optimizers",
    "LearnableLR": "spec.optimizers",
    "Schedule": "spec.schedule",
    "free_memory": "native",
    "num_threads": "native",
    "set_num_threads": "native",
    "step_size": "algorithms.step_size",
}

_PACKAGES = {
    "data",
    "explain",
    "finance",
    "functional",
    "learners",
    "metrics",
    "native",
    "nn",
    "privacy",
    "serve",
    "sklearn",
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
    "Implicit",
    "LearnableAnchor",
    "LearnableLR",
    "Outcome",
    "QuantileLoss",
    "RMSprop",
    "Reptile",
    "ReptileOutcome",
    "Schedule",
    "StudentTNLLLoss",
    "free_memory",
    "num_threads",
    "set_num_threads",
    "step_size",
]

_TORCH_HOMES = {
    "algorithms.maml",
    "algorithms.outcome",
    "algorithms.reptile",
    "algorithms.finetune",
    "algorithms.step_size",
    "models.adapted",
}
_OLDEST_TORCH = (2, 4)


def _need_torch(name: str) -> None:
    """Raise ImportError, saying what to do, unless a torch that is new enough is installed."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":  # torch is there, but broken
            raise
        raise ImportError(
            f"pymeta.{name} needs torch, which is not installed: "
            "pip install 'pymeta-kernels[torch]'"
        ) from None
    found = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if found < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise ImportError(
            f"pymeta.{name} needs torch >= {oldest}, found {torch.__version__}: "
            f"pip install --upgrade torch"
        )


def _version() -> str:
    """That of the installed distribution; "0+unknown" where the source tree is used without."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pymeta-kernels")
    except PackageNotFoundError:
        return "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _PACKAGES:
        return import_module(f"pymeta.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'pymeta' has no attribute {name!r}")
    if _HOMES[name] in _TORCH_HOMES:
        _need_torch(name)
    value = getattr(import_module(f"pymeta.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PACKAGES, "__version__"})


if os.path.exists(os.path.join(os.path.dirname(__file__), "grammar.py")):  # the parser's
    import_module("pymeta.namesake").warn_of_files()
