"""The values that a chain keeps: which of them its layers read, for rows with so many axes.

A step that keeps or reads a value names it by some object of its own. The native core numbers the
values in the order in which they are kept (csrc/core/layers/branches.h).
"""

from __future__ import annotations

from typing import Any, TypeAlias

from pymeta.spec.refused import Refused

Layer: TypeAlias = tuple[Any, ...]
KEEP, RECALL = "keep", "recall"
ADD, MULTIPLY, CONCATENATE = "add", "multiply", "concatenate"
READERS = (RECALL, ADD, MULTIPLY, CONCATENATE)
CHANNELS = "channels"  # (CHANNELS, dimension, first, end, parts) before the axes are known


def is_of_branches(layer: Layer) -> bool:
    """Whether a layer keeps or reads a value."""
    return layer[0] == KEEP or layer[0] in READERS


def _check_channels(dim: int, axes: int, what: str) -> None:
    if dim not in (1, -axes - 1):
        raise Refused(f"{what} along dimension {dim}, which is not that of the channels")


def channels(layer: Layer, axes: int) -> Layer:
    """The native layer of some channels of rows with so many axes of positions."""
    _, dim, *ends = layer
    _check_channels(dim, axes, "a part")
    return (CHANNELS, *ends)


class Kept:
    """The values that are kept, while one goes through the steps of a chain."""

    def __init__(self) -> None:
        self._values: dict[Any, tuple[int, int]] = {}  # number, axes

    def keep(self, value: Any, axes: int) -> None:
        """Note a value."""
        self._values[value] = (len(self._values), axes)

    def read(self, layer: Layer, value: Any, axes: int) -> tuple[Layer, int]:
        """The native layer that reads a value, and how many axes there are behind it."""
        number, its_axes = self._values[value]
        kind = layer[0]
        if kind == RECALL:
            return (RECALL, number), its_axes
        if axes != its_axes:
            raise Refused(
                f"values with {axes} and with {its_axes} axes of positions are joined ({kind})"
            )
        if kind == CONCATENATE:
            _, dim, is_last = layer
            _check_channels(dim, axes, "a concatenation")
            return (CONCATENATE, number, is_last), axes
        assert kind in (ADD, MULTIPLY)
        return (kind, number), axes


def in_this_spelling(layers: list[Any]) -> list[Any]:
    """Layers as files have them, where they spell a sum of two branches fork, turn, join."""
    if not any(isinstance(v, list) and v and v[0] == "fork" for v in layers):
        return layers
    found: list[Any] = []
    kept = 0
    open_: list[list[int]] = []  # the numbers of what a fork gives, and of what its turn ends
    for layer in layers:
        name = layer[0] if isinstance(layer, list) and layer else None
        if name == "fork":
            found.append([KEEP, *layer[1:]])
            open_.append([kept])
            kept += 1
        elif name == "turn" and len(layer) == 1 and open_ and len(open_[-1]) == 1:
            found += [[KEEP, 0], [RECALL, open_[-1][0]]]
            open_[-1].append(kept)
            kept += 1
        elif name == "join" and len(layer) == 1 and open_ and len(open_[-1]) == 2:
            found.append([ADD, open_.pop()[1]])
        else:
            found.append(layer)
    return found
