"""The order of a value's axes in torch: `x.permute(0, 2, 3, 1)`, `transpose(1, 2)` and the like.

The native core has the channels of a position side by side, whatever torch's order is; so a
permutation moves no number there. It changes what torch calls the axes, which an order says:
(0, 1, 2, 3) where they are rows, channels, height and width, (0, 2, 3, 1) where the channels are
last. What works on each number, or on the last axis where that has the channels, such as a
LayerNorm between two permutes, is the same in any order; all else is for the first one alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from pymeta.spec.branches import ADD, CHANNELS, CONCATENATE, KEEP, MULTIPLY, RECALL
from pymeta.spec.refused import Refused

Layer: TypeAlias = tuple[Any, ...]
Order: TypeAlias = tuple[int, ...]
PERMUTE = "permute"  # (PERMUTE, the method's name, its arguments, those by name)
SCALE = "scale"  # (SCALE, numbers): times a parameter of as many, along the last axis
METHODS = ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims")

_OF_NUMBERS = frozenset((
    "identity", "affine", "relu", "leaky_relu", "elu", "tanh", "sigmoid", "silu", "gelu",
    "gelu_tanh", "softplus", KEEP, RECALL, ADD, MULTIPLY,
))  # fmt: skip
_OF_LAST_AXIS = ("layer_norm", "linear", SCALE)
_BY_ITS_AXES = (PERMUTE, CONCATENATE, CHANNELS)  # which say what axis they mean


def of(method: str) -> Callable[..., Layer]:
    """What makes a layer of a call of a method of METHODS, or of torch's function of that name."""
    return lambda *given, **named: (PERMUTE, method, given, tuple(named.items()))


def first(axes: int) -> Order:
    """The order of rows, channels and so many axes of positions."""
    return tuple(range(axes + 2))


def permuted(layer: Layer, order: Order) -> Order:
    """The order behind a permutation: torch itself says what it does to sizes."""
    _, method, given, named = layer
    numbers = torch.empty(order, device="cpu")  # of which there are none: its rows are 0
    try:
        found = tuple(getattr(numbers, method)(*given, **dict(named)).shape)
    except (TypeError, RuntimeError, IndexError):
        shown = ", ".join([*map(str, given), *(f"{name}={value}" for name, value in named)])
        raise Refused(f"{method}({shown}) of rows with the axes {_named(order)}") from None
    if found[0] != 0:
        raise Refused(f"{method} moves the axis of the rows")
    return found


def axes_of_permuted(layer: Layer) -> tuple[int, ...]:
    """How many axes of positions a permutation may be of."""
    found = []
    for axes in range(3):
        try:
            permuted(layer, first(axes))
        except Refused:
            continue
        found.append(axes)
    return tuple(found)


def is_of_channels(layer: Layer, order: Order) -> bool:
    """Whether a layer of the last axis is one of the channels of each position."""
    return layer[0] in _OF_LAST_AXIS and order[-1] == 1


def check(layer: Layer, order: Order, label: str) -> None:
    """Refused where a layer would take the axes of an order for others."""
    any_order = layer[0] in _OF_NUMBERS or layer[0] in _BY_ITS_AXES
    if not (any_order or is_of_channels(layer, order) or order == first(len(order) - 2)):
        raise Refused(f"{label} of rows with the axes {_named(order)}, as a permute has left them")


def _named(order: Order) -> str:
    positions = ["length"] if len(order) == 3 else ["height", "width"]
    names = ["rows", "channels", *positions]
    return f"[{', '.join(names[axis] for axis in order)}]"
