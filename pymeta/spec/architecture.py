"""A chain of layers as plain data: what it takes to run it without torch, and its form in JSON.

`network.py` finds the chain in a torch module; here it is known already. A layer is a tuple as
`_native.Network` takes it, such as ("linear", 1, 40, True) or ("relu",).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from pymeta import native
from pymeta.spec.branches import in_this_spelling
from pymeta.spec.fields import Fields
from pymeta.spec.show import counted

Layer: TypeAlias = tuple[Any, ...]
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """A chain of layers and the names of its parameters.

    Attributes:
        layers: for `_native.Network`.
        names: the parameters' names in the order of the torch module.
        chain: the same names layer by layer, weight before bias: the order the native core wants.
        flattens: whether rows may have any shape that has `in_features` elements.
    """

    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    chain: tuple[str, ...]
    flattens: bool

    @cached_property
    def in_features(self) -> int:
        """Columns of the input."""
        return int(self.network().in_features)

    @cached_property
    def out_features(self) -> int:
        """Columns of the output."""
        return int(self.network().out_features)

    @cached_property
    def batch_norm(self) -> bool:
        """Whether a layer normalises over rows."""
        return bool(self.network().mixes_rows)

    @property
    def constants(self) -> frozenset[str]:
        """The names of running statistics, which nobody learns."""
        kinds = [layer[0] for layer in self.layers for _ in tensors_of(layer)]
        pairs = zip(self.chain, kinds, strict=True)
        return frozenset(name for name, kind in pairs if kind == "fixed_norm")

    @property
    def row_shape(self) -> Shape | None:
        """The shape of a row, where it is not one axis of features."""
        return row_shape(self.layers)

    def shapes(self) -> dict[str, Shape]:
        """{name: shape} of the parameters, in the order of `names`."""
        shapes = dict(zip(self.chain, self.network().parameter_shapes, strict=True))
        return {name: shapes[name] for name in self.names}

    def network(self) -> Any:
        """The native Network; ValueError where the layers do not fit each other."""
        return native.extension().Network(self.layers)

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "layers": [list(layer) for layer in self.layers],
            "names": list(self.names),
            "chain": list(self.chain),
            "flattens": self.flattens,
        }

    def __str__(self) -> str:
        """Its layers in a line, such as "linear 1 40, relu, linear 40 1"."""
        return ", ".join(_line(layer) for layer in self.layers)


def row_shape(layers: Sequence[Layer]) -> Shape | None:
    """The shape of a row of the input, where a chain says that it is not one axis of features."""
    if not layers or layers[0][0] != "image":
        return None
    channels, height, width = layers[0][1:]
    # files of 0.1 say 1 of a sequence, too
    sequence = height == 0 or any(layer[0] in _OF_SEQUENCES for layer in layers)
    return (channels, width) if sequence else (channels, height, width)


_TENSORS: dict[str, tuple[str, ...]] = {
    "fixed_norm": ("running_var", "running_mean"), "embedding": ("weight",), "concatenate": (),
}  # fmt: skip


def tensors_of(layer: Sequence[Any]) -> tuple[str, ...]:
    """What a layer has of weight and bias: its flags say it; one flag is the bias's alone."""
    if layer[0] in _TENSORS:
        return _TENSORS[layer[0]]
    form = _form(layer[0]) or ""
    flags = [bool(v) for v, kind in zip(layer[1:], form, strict=True) if kind == "b"]
    there = flags if len(flags) != 1 else [True, *flags]
    return tuple(name for name, has in zip(("weight", "bias"), there, strict=False) if has)


def embedded_columns(layers: Sequence[Layer]) -> tuple[tuple[int, int], ...]:
    """(column, number of categories) of the columns of the input that a chain embeds."""
    found, wider = [], 0
    for layer in layers:
        if layer[0] != "embedding":
            break
        _, feature, categories, width = layer[1:]
        found.append((feature - wider, categories))
        wider += width - 1
    return tuple(found)


_OF_SEQUENCES = ("conv1d", "max_pool1d", "avg_pool1d", "global_avg_pool1d")


def _line(layer: Layer) -> str:
    form = _form(layer[0]) or ""
    shown = [v for v, kind in zip(layer[1:], form, strict=True) if kind != "b"]
    return " ".join(map(str, (layer[0], *shown)))


def _form(name: str) -> str | None:
    """What follows a layer's name: n a size, c a count, i an integer, b a bool, x a number."""
    forms: dict[str, str] = native.extension().layer_forms()
    return forms.get(name)


def _read_layer(index: int, value: Any) -> Layer:
    what = f"architecture: layer {index}"
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise ValueError(f"{what}: expected a list that begins with a name")
    form = _form(value[0])
    if form is None:
        raise ValueError(f"{what}: unknown kind of layer {value[0][:60]!r}")
    if len(value) - 1 != len(form):
        raise ValueError(
            f"{what}: {value[0]} has {counted(len(form), 'value')}, got {len(value) - 1}"
        )
    fields = Fields(what, {str(i): v for i, v in enumerate(value)})
    take = {
        "n": lambda i: fields.integer(i, 1, 2**24),
        "c": lambda i: fields.integer(i, 0, 2**24),
        "i": lambda i: fields.integer(i, -(2**24), 2**24),
        "b": fields.boolean,
        "x": fields.number,
    }
    return (value[0], *(take[kind](str(i)) for i, kind in enumerate(form, start=1)))


def read_architecture(value: Any) -> Architecture:
    """The architecture of its JSON form; ValueError where that is none."""
    fields = Fields("architecture", value)
    layers = in_this_spelling(fields.take("layers", list, "a list of layers"))
    found = Architecture(
        tuple(_read_layer(i, layer) for i, layer in enumerate(layers)),
        fields.list_of("names", str),
        fields.list_of("chain", str),
        fields.boolean("flattens"),
    )
    fields.end()
    try:
        tensors = len(found.network().parameter_shapes)
    except ValueError as error:
        raise ValueError(f"architecture: {error}") from None
    if len(found.chain) != tensors:
        raise ValueError(
            f"architecture: {counted(tensors, 'parameter')} in the layers, {len(found.chain)} in "
            "chain"
        )
    if len(set(found.names)) != len(found.names) or sorted(found.names) != sorted(found.chain):
        raise ValueError("architecture: names and chain are not the same names in two orders")
    return found
