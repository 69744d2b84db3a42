"""A chain of layers as plain data: what it takes to run it without torch, and its form in JSON.

`network.py` finds the chain in a torch module; here it is known already. A layer is a tuple as
`_native.Network` takes it, such as ("linear", 1, 40, True) or ("relu",).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from pymeta import native
from pymeta.file import Fields

Layer: TypeAlias = tuple[Any, ...]
Shape: TypeAlias = tuple[int, ...]

# What follows a layer's name: n a number of features, b a bool, x a number.
_FORMS = {
    "linear": "nnb",
    "batch_norm": "nxbb",
    "layer_norm": "nxbb",
    "relu": "",
    "leaky_relu": "x",
    "elu": "x",
    "tanh": "",
    "sigmoid": "",
    "silu": "",
    "gelu": "",
    "gelu_tanh": "",
    "softplus": "xx",
}


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

    @property
    def in_features(self) -> int:
        """Columns of the input."""
        first: Layer = next(layer for layer in self.layers if "n" in _FORMS[layer[0]])
        return int(first[1])

    @property
    def out_features(self) -> int:
        """Columns of the output."""
        last = [layer for layer in self.layers if "n" in _FORMS[layer[0]]][-1]
        return int(last[2] if last[0] == "linear" else last[1])

    @property
    def batch_norm(self) -> bool:
        """Whether a layer normalises over rows."""
        return any(layer[0] == "batch_norm" for layer in self.layers)

    def shapes(self) -> dict[str, Shape]:
        """{name: shape} of the parameters, in the order of `names`."""
        shapes = dict(zip(self.chain, _shapes(self.layers), strict=True))
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


def _line(layer: Layer) -> str:
    form = _FORMS[layer[0]]
    shown = [v for v, kind in zip(layer[1:], form, strict=True) if kind != "b"]
    return " ".join(map(str, (layer[0], *shown)))


def _shapes(layers: tuple[Layer, ...]) -> Iterator[Shape]:
    """The shapes of the chain's parameters, in its order."""
    for layer in layers:
        if layer[0] == "linear":
            _, inputs, outputs, bias = layer
            yield (outputs, inputs)
            if bias:
                yield (outputs,)
        elif layer[0] in ("batch_norm", "layer_norm"):
            _, features, _, weight, bias = layer
            yield from [(features,)] * (weight + bias)


def _read_layer(index: int, value: Any) -> Layer:
    what = f"architecture: layer {index}"
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise ValueError(f"{what}: expected a list that begins with a name")
    form = _FORMS.get(value[0])
    if form is None:
        raise ValueError(f"{what}: unknown kind of layer {value[0][:60]!r}")
    if len(value) - 1 != len(form):
        raise ValueError(f"{what}: {value[0]} has {len(form)} values, got {len(value) - 1}")
    fields = Fields(what, {str(i): v for i, v in enumerate(value)})
    take = {"n": lambda i: fields.integer(i, 1, 2**24), "b": fields.boolean, "x": fields.number}
    return (value[0], *(take[kind](str(i)) for i, kind in enumerate(form, start=1)))


def read_architecture(value: Any) -> Architecture:
    """The architecture of its JSON form; ValueError where that is none."""
    fields = Fields("architecture", value)
    layers = fields.take("layers", list, "a list of layers")
    found = Architecture(
        tuple(_read_layer(i, layer) for i, layer in enumerate(layers)),
        fields.list_of("names", str),
        fields.list_of("chain", str),
        fields.boolean("flattens"),
    )
    fields.end()
    tensors = len(list(_shapes(found.layers)))
    if len(found.chain) != tensors:
        raise ValueError(
            f"architecture: {tensors} parameters in the layers, {len(found.chain)} in chain"
        )
    if len(set(found.names)) != len(found.names) or sorted(found.names) != sorted(found.chain):
        raise ValueError("architecture: names and chain are not the same names in two orders")
    try:
        found.network()
    except ValueError as error:
        raise ValueError(f"architecture: {error}") from None
    return found
