"""JSON objects from strangers: every entry is taken out once, and checked."""

from __future__ import annotations

import math
from typing import Any


class Fields:
    """A JSON object of which every entry is taken out and checked; ValueError says what is wrong.

    Each method takes an entry by its name; `end` raises where something is left.
    """

    def __init__(self, what: str, value: Any) -> None:
        """`what` is the object's name for messages."""
        if not isinstance(value, dict):
            raise ValueError(f"{what}: expected a JSON object, got {_brief(value)}")
        self.what = what
        self._left = dict(value)

    def __contains__(self, name: str) -> bool:
        """Whether there is an entry of this name that was not taken."""
        return name in self._left

    def take(self, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """An entry of one of these types; a bool does not count as a number."""
        if name not in self._left:
            raise ValueError(f"{self.what}: {name} is missing")
        value = self._left.pop(name)
        if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
            raise ValueError(f"{self.what}: {name}: expected {expected}, got {_brief(value)}")
        return value

    def object(self, name: str) -> Fields:
        """An entry that is an object itself."""
        return Fields(f"{self.what}: {name}", self.take(name, dict, "an object"))

    def boolean(self, name: str) -> bool:
        """A bool."""
        return bool(self.take(name, bool, "true or false"))

    def integer(self, name: str, low: int, high: int = 2**63 - 1) -> int:
        """A whole number in low..high."""
        value: int = self.take(name, int, "a whole number")
        if not low <= value <= high:
            raise ValueError(f"{self.what}: {name}: {_brief(value)} is not in {low}..{high}")
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        return self._finite(name, self.take(name, (int, float), "a number"))

    def text(self, name: str) -> str:
        """A string."""
        return str(self.take(name, str, "a string"))

    def list_of(self, name: str, kind: type) -> tuple[Any, ...]:
        """A list of which every element has one type."""
        values = self.take(name, list, "a list")
        if not all(type(v) is kind for v in values):
            raise ValueError(f"{self.what}: {name}: expected only {kind.__name__}s in the list")
        return tuple(values)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        values = self.take(name, list, "a list")
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
            raise ValueError(f"{self.what}: {name}: expected only numbers in the list")
        return tuple(self._finite(name, v) for v in values)

    def is_null(self, name: str) -> bool:
        """Whether the entry is null, in which case it is taken."""
        null = self._left.get(name, 0) is None
        if null:
            del self._left[name]
        return null

    def is_a(self, name: str, kind: type) -> bool:
        """Whether the entry is there and of this type; it is not taken."""
        return isinstance(self._left.get(name), kind)

    def end(self) -> None:
        """Raise where an entry is left over."""
        if self._left:
            raise ValueError(f"{self.what}: unknown entry {_brief(next(iter(self._left)))}")

    def _finite(self, name: str, value: int | float) -> float:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{self.what}: {name}: {_brief(value)} is not a finite number")
        return number


def _brief(value: Any) -> str:
    """A value for a message: not longer than a line."""
    try:
        text = repr(value)
    except ValueError:  # a number with more digits than Python prints
        text = "a number too long to print"
    return text if len(text) <= 60 else f"{text[:57]}..."
