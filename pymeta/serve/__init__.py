"""A service around an `Adapter`: adapt and predict over HTTP, keep each entity's rows, retrain.

    pymeta serve adapter.safetensors                  # a process of its own
    app = pymeta.serve.create_app("adapter.safetensors")    # for any ASGI server

It needs the extra `serve`: pip install "pymeta-kernels[serve]". The serving process does not
import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymeta.serve.app import create_app
    from pymeta.serve.settings import Limits, Settings

__all__ = ["Limits", "Settings", "create_app"]

_HOMES = {"create_app": "app", "Limits": "settings", "Settings": "settings"}
_PARTS = {
    "anyio",
    "apscheduler",
    "fastapi",
    "prometheus_client",
    "pyarrow",
    "pydantic",
    "sqlalchemy",
    "starlette",
    "uvicorn",
}


def need_extra(error: ModuleNotFoundError) -> ImportError:
    """What to raise instead of an error about a module that the extra would bring."""
    missing = (error.name or "").split(".")[0]
    if missing not in _PARTS:
        return error
    return ImportError(
        f'pymeta.serve needs {missing}, which is not installed: pip install "pymeta-kernels[serve]"'
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pymeta.serve' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"pymeta.serve.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise need_extra(error) from None
    globals()[name] = value
    return value
