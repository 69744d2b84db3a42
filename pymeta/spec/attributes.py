"""What a traced forward may read on its module besides tensors, and how changes of it are seen.

A forward is traced with the values that its module has then: `x[..., : -self.sizes[0]]` becomes a
slice by a number. So each attribute counts, and where it is a list, a dictionary or a plain record
of settings, what is in it, in any depth. Whatever else it is counts as the object that it is.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

from torch import Tensor, nn

from pymeta.spec.watch import Place

Container: TypeAlias = list[Any] | dict[Any, Any]

_MOST = 1024  # entries that are compared before each call; of more, how many there are
_OF_MODULES = frozenset(nn.Module().__dict__) - {"training"}  # others watch these
_PLAIN = (bool, int, float, str, slice, type(None), tuple, list, dict)


class Attributes:
    """Of a module: the places of values, and the containers whose entries or whose length count.

    Attributes:
        places: of objects.
        ordered: lists, whose entries count, and dictionaries, whose keys do.
        sized: of which only the length counts.
    """

    def __init__(self, module: nn.Module) -> None:
        """Look at what is there now."""
        self.places: list[Place] = []
        self.ordered: list[Container] = []
        self.sized: list[Container] = []
        self._seen: set[int] = set()
        for name, value in module.__dict__.items():
            if name not in _OF_MODULES:
                self.places.append((module.__dict__, name))
                self._look_into(value)

    def _look_into(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, dict):
            self._keep(value, len(value) <= _MOST)
        elif isinstance(value, list):  # others than plain values may not be comparable
            self._keep(value, len(value) <= _MOST and all(isinstance(v, _PLAIN) for v in value))
        for entry in _entries(value):
            self._look_into(entry)

    def _keep(self, container: Container, compared: bool) -> None:
        (self.ordered if compared else self.sized).append(container)
        if compared and isinstance(container, dict):
            self.places += [(container, key) for key in container]


def _entries(value: Any) -> Iterator[Any]:
    """What is in a container, and the dictionary of a record."""
    if isinstance(value, dict):
        yield from value.values() if len(value) <= _MOST else ()
    elif isinstance(value, (list, tuple)):
        yield from value[:_MOST]
    elif _is_record(value):
        yield vars(value)


def _is_record(value: Any) -> bool:
    """Whether it is a dataclass or a namespace, or has nothing but plain values anyway."""
    if isinstance(value, (type, nn.Module, Tensor)) or not hasattr(value, "__dict__"):
        return False
    if isinstance(value, (SimpleNamespace, Namespace)) or is_dataclass(value):
        return True
    inside = vars(value)
    return 0 < len(inside) <= _MOST and all(isinstance(v, _PLAIN) for v in inside.values())
