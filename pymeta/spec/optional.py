"""Packages that only some of pymeta needs: imported when used, and missed by a sentence."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def need(module: str, what: str, extra: str = "data") -> Any:
    """A module of an extra, for `what`; ImportError that names the extra where it is missing."""
    root = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != root:  # it is there, but broken
            raise
        raise ImportError(
            f"{what} needs {root}, which is not installed: pip install 'pymeta-kernels[{extra}]'"
        ) from None
