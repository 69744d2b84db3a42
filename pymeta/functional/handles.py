"""Handles, by which custom operators of torch find the learner or `Operator` that they run."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

_owners: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(owner: Any) -> str:
    """A handle for `owner`, good for as long as that lives.

    It is a string, because torch.compile before 2.7 takes an integer that differs from module to
    module for a variable.
    """
    handle = f"{type(owner).__name__}-{next(_numbers)}"
    _owners[handle] = owner
    return handle


def owner_of(handle: str) -> Any:
    """What was registered; RuntimeError where it is gone."""
    owner = _owners.get(handle)
    if owner is None:
        raise RuntimeError(f"what a compiled call belongs to, {handle}, is no longer there")
    return owner
