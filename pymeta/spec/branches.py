"""The values that a chain keeps: which of them its layers read, for rows with such axes.

A step that keeps or reads a value names it by some object of its own. The native core numbers the
values in the order in which they are kept (csrc/core/layers/branches.h).
"""

from __future__ import annotations

from typing import Any, TypeAlias

from pymeta.spec.refused import Refused

Layer: TypeAlias = tuple[Any, ...]
Order: TypeAlias = tuple[int, ...]
KEEP, RECALL = "keep", "recall"
ADD, MULTIPLY, CONCATENATE = "add", "multiply", "concatenate"
READERS = (RECALL, ADD, MULTIPLY, CONCATENATE)
CHANNELS = "channels"  # (CHANNELS, dimension, first, end, parts) before the axes are known


def is_of_branches(layer: Layer) -> bool:
    """Whether a layer keeps or reads a value."""
    return layer[0] == KEEP or layer[0] in READERS


def _check_channels(dim: int, order: Order, what: str) -> None:
    channels = order.index(1)
    if dim not in (channels, channels - len(order)):
        raise Refused(f"{what} along dimension {dim}, which is not that of the channels")


def channels(layer: Layer, order: Order) -> Layer:
    """The native layer of some channels of rows whose axes have this order (`order.py`)."""
    _, dim, *ends = layer
    _check_channels(dim, order, "a part")
    return (CHANNELS, *ends)


class Kept:
    """The values that are kept, while one goes through the steps of a chain."""

    def __init__(self) -> None:
        self._values: dict[Any, tuple[int, Order]] = {}  # number, order of its axes

    def keep(self, value: Any, order: Order) -> None:
        """Note a value."""
        self._values[value] = (len(self._values), order)

    def read(self, layer: Layer, value: Any, order: Order) -> tuple[Layer, Order]:
        """The native layer that reads a value, and the order of the axes behind it."""
        number, its_order = self._values[value]
        kind = layer[0]
        if kind == RECALL:
            return (RECALL, number), its_order
        if len(order) != len(its_order):
            axes, its_axes = len(order) - 2, len(its_order) - 2
            raise Refused(
                f"values with {axes} and with {its_axes} axes of positions are joined ({kind})"
            )
        if order != its_order:
            raise Refused(f"values whose axes are permuted in two ways are joined ({kind})")
        if kind == CONCATENATE:
            _, dim, is_last = layer
            _check_channels(dim, order, "a concatenation")
            return (CONCATENATE, number, is_last), order
        assert kind in (ADD, MULTIPLY)
        return (kind, number), order


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
