"""Calls of a traced forward that join several values, or take some of the channels of one.

    a + b, a - b, a * b, torch.add(a, b, alpha=2), torch.cat([a, b], 1)       a `Join`
    2 * a, 1 - a, -a, a / 4                                                  a `Join` of one value
    gamma * a, where gamma is a parameter                                    `scale_of` a value
    a.chunk(2, 1)[0], torch.split(a, [3, 5], 1)[1]                           channels of a value

The layers that these become are those of csrc/core/layers/branches.h.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from pymeta.spec.branches import ADD, CHANNELS, CONCATENATE, MULTIPLY
from pymeta.spec.refused import Refused

Layer: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Join:
    """Values joined by one of branches.READERS, each times a factor; a number added to that.

    `kind` is "" where there is a single value; `dim` is a concatenation's.
    """

    kind: str
    terms: tuple[fx.Node, ...]
    factors: tuple[float, ...]
    summand: float = 0.0
    dim: int = 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _sum(a: Any, b: Any, sign: float, alpha: Any = 1) -> Join | None:
    """Of a + sign alpha b."""
    if not _is_number(alpha):
        return None
    factor = sign * float(alpha)
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return Join(ADD, (a, b), (1.0, factor))
    if isinstance(a, fx.Node) and _is_number(b):
        return Join("", (a,), (1.0,), factor * b)
    if isinstance(b, fx.Node) and _is_number(a):
        return Join("", (b,), (factor,), float(a))
    return None


def _product(a: Any, b: Any) -> Join | None:
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return Join(MULTIPLY, (a, b), (1.0, 1.0))
    if isinstance(b, fx.Node):
        a, b = b, a
    return Join("", (a,), (float(b),)) if _is_number(b) else None


def _quotient(a: Any, b: Any) -> Join | None:
    return _product(a, 1.0 / b) if isinstance(a, fx.Node) and _is_number(b) and b != 0 else None


def _concatenation(tensors: Any, dim: Any = 0) -> Join | None:
    if not isinstance(tensors, (list, tuple)) or not tensors or type(dim) is not int:
        return None
    if not all(isinstance(t, fx.Node) for t in tensors):
        return None
    return Join(CONCATENATE, tuple(tensors), (1.0,) * len(tensors), dim=dim)


Joining: TypeAlias = Callable[..., "Join | None"]


def _added(a: Any, b: Any, alpha: Any = 1) -> Join | None:
    return _sum(a, b, 1.0, alpha)


def _subtracted(a: Any, b: Any, alpha: Any = 1) -> Join | None:
    return _sum(a, b, -1.0, alpha)


_FUNCTIONS: dict[Any, Joining] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _added),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract), _subtracted),
    torch.rsub: lambda a, b, alpha=1: _sum(b, a, -1.0) if alpha == 1 else None,
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply), _product),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), _quotient),
    **dict.fromkeys((operator.neg, torch.neg), lambda a: _product(a, -1)),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _concatenation),
}
_METHODS: dict[str, Joining] = {
    **dict.fromkeys(("add", "add_"), _added),
    **dict.fromkeys(("sub", "sub_"), _subtracted),
    **dict.fromkeys(("mul", "mul_", "multiply"), _product),
    **dict.fromkeys(("div", "div_"), _quotient),
    "neg": lambda a: _product(a, -1),
}
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def join_of(node: fx.Node) -> Join | None:
    """What a call joins; None where it does not join values, or in a way that is not known."""
    table: dict[Any, Joining] = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(
        node.op, {}
    )
    make = table.get(node.target)
    if make is None:
        return None
    options: dict[str, Any] = dict(node.kwargs)
    options = {{"other": "b", "input": "a"}.get(name, name): v for name, v in options.items()}
    if "axis" in options:
        options["dim"] = options.pop("axis")
    try:
        return make(*node.args, **options)
    except TypeError:
        return None


def scale_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The value and the parameter whose product a call is, in either order; None: it is none."""
    join = join_of(node)
    if join is None or join.kind != MULTIPLY:
        return None
    value, parameter = sorted(join.terms, key=lambda term: term.op == "get_attr")
    if value.op == "get_attr" or parameter.op != "get_attr":
        return None
    return None if overwrites(node) and join.terms[0] is parameter else (value, parameter)


def overwrites(node: fx.Node) -> bool:
    """Whether a call writes what it gives over its first value."""
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function" or node.target in _IN_PLACE:
        return node.op == "call_function"
    function: Any = node.target
    if getattr(function, "__name__", "").endswith("_"):  # as torch.relu_ is called
        return True
    try:
        bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # one of torch's own, of which the others never do
        return False
    return bound.arguments.get("inplace") is True


# ---- parts of channels --------------------------------------------------------------------------


def _ends_of_chunk(index: int, chunks: Any, dim: Any = 0) -> Layer:
    if type(chunks) is not int or chunks < 1 or not -chunks <= index < chunks:
        raise Refused(f"part {index} of {chunks} chunks")
    return (CHANNELS, dim, index % chunks, index % chunks + 1, chunks)


def _ends_of_split(index: int, sizes: Any, dim: Any = 0) -> Layer:
    if type(sizes) is int and sizes > 0 and index >= 0:
        return (CHANNELS, dim, index * sizes, (index + 1) * sizes, 0)
    plain = isinstance(sizes, Sequence) and all(type(n) is int and n > 0 for n in sizes)
    if plain and -len(sizes) <= index < len(sizes):
        first = sum(sizes[: index % len(sizes)])
        return (CHANNELS, dim, first, first + sizes[index], 0)
    raise Refused(f"part {index} of a split by {sizes}")


_CUTS: dict[tuple[str, Any], Callable[..., Layer]] = {
    ("call_function", torch.chunk): _ends_of_chunk,
    ("call_method", "chunk"): _ends_of_chunk,
    ("call_function", torch.split): _ends_of_split,
    ("call_method", "split"): _ends_of_split,
}


def is_cut(node: Any) -> bool:
    """Whether a node cuts a value into parts, all of which are taken by a number."""
    if not isinstance(node, fx.Node) or (node.op, node.target) not in _CUTS:
        return False
    return all(
        user.op == "call_function"
        and user.target is operator.getitem
        and user.args[0] is node
        and type(user.args[1]) is int
        for user in node.users
    )


def part_of_cut(node: fx.Node) -> Layer:
    """The layer of a part, `cut[index]`."""
    cut, index = node.args
    assert isinstance(cut, fx.Node)
    options: dict[str, Any] = dict(cut.kwargs)
    for name in ("split_size_or_sections", "split_size"):
        if name in options:
            options["sizes"] = options.pop(name)
    try:
        layer = _CUTS[cut.op, cut.target](index, *cut.args[1:], **options)
    except TypeError:
        raise Refused(f"{cut.name}: with arguments the native core lacks") from None
    if type(layer[1]) is not int:
        raise Refused(f"{cut.name} along dimension {layer[1]}")
    return layer
