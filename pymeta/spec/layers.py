"""The layers that the native core knows, as torch spells them: modules, functions, methods.

A layer is a tuple as `_native.Network` takes it, such as ("linear", 1, 40, True) or ("relu",). What
its arguments are, and the shapes of its parameters, the native core says (`architecture.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from pymeta.spec.watch import hooked

Layer: TypeAlias = tuple[Any, ...]
FLATTEN: Layer = ("flatten",)
IDENTITY: Layer = ("identity",)


class Refused(Exception):
    """Raised while a model is examined; its message is the reason why it is not native."""


def _affine(m: nn.Module) -> tuple[bool, bool]:
    """Which of weight and bias there are."""
    return m.weight is not None, m.bias is not None


def _linear(m: nn.Linear) -> Layer:
    return ("linear", m.in_features, m.out_features, m.bias is not None)


def _batch_norm(m: nn.BatchNorm1d) -> Layer:
    return ("batch_norm", m.num_features, m.eps, *_affine(m))


def _layer_norm(m: nn.LayerNorm) -> Layer:
    if len(m.normalized_shape) != 1:
        raise Refused(f"LayerNorm over the shape {tuple(m.normalized_shape)}")
    return ("layer_norm", m.normalized_shape[0], m.eps, *_affine(m))


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Layer:
    if not negative_slope >= 0:
        raise Refused(f"LeakyReLU with negative_slope {negative_slope}")
    return ("leaky_relu", float(negative_slope))


def _elu(alpha: float = 1.0, inplace: bool = False) -> Layer:
    if not alpha > 0:
        raise Refused(f"ELU with alpha {alpha}")
    return ("elu", float(alpha))


def _gelu(approximate: str = "none") -> Layer:
    return ("gelu_tanh",) if approximate == "tanh" else ("gelu",)


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Layer:
    if not beta > 0:
        raise Refused(f"Softplus with beta {beta}")
    return ("softplus", float(beta), float(threshold))


def _flatten(start_dim: int = 0, end_dim: int = -1) -> Layer:
    if start_dim != 1 or end_dim != -1:
        raise Refused(f"Flatten from dimension {start_dim} to {end_dim}")
    return FLATTEN


def _dropout(m: nn.Dropout) -> Layer:
    if m.training and m.p > 0:
        raise Refused("Dropout in training mode draws random numbers")
    return IDENTITY


class Known(NamedTuple):
    """A module type of which the layer is known."""

    layer: Callable[[Any], Layer]
    reads: tuple[str, ...] = ()  # the attributes that `layer` looks at, besides SLOTS


# The parameters and buffers of which it matters whether they are there.
SLOTS = ("weight", "bias", "running_mean")

MODULES: dict[type, Known] = {
    nn.Linear: Known(_linear, ("in_features", "out_features")),
    nn.BatchNorm1d: Known(_batch_norm, ("num_features", "eps", "training")),
    nn.LayerNorm: Known(_layer_norm, ("normalized_shape", "eps")),
    nn.Identity: Known(lambda m: IDENTITY),
    nn.Dropout: Known(_dropout, ("p", "training")),
    nn.Flatten: Known(lambda m: _flatten(m.start_dim, m.end_dim), ("start_dim", "end_dim")),
    nn.ReLU: Known(lambda m: ("relu",)),
    nn.LeakyReLU: Known(lambda m: _leaky_relu(m.negative_slope), ("negative_slope",)),
    nn.ELU: Known(lambda m: _elu(m.alpha), ("alpha",)),
    nn.Tanh: Known(lambda m: ("tanh",)),
    nn.Sigmoid: Known(lambda m: ("sigmoid",)),
    nn.SiLU: Known(lambda m: ("silu",)),
    nn.GELU: Known(lambda m: _gelu(m.approximate), ("approximate",)),
    nn.Softplus: Known(lambda m: _softplus(m.beta, m.threshold), ("beta", "threshold")),
}


def _simple(layer: Layer) -> Callable[..., Layer]:
    return lambda inplace=False: layer


FUNCTIONS: dict[Any, Callable[..., Layer]] = {
    torch.relu: _simple(("relu",)),
    F.relu: _simple(("relu",)),
    torch.tanh: _simple(("tanh",)),
    F.tanh: _simple(("tanh",)),
    torch.sigmoid: _simple(("sigmoid",)),
    F.sigmoid: _simple(("sigmoid",)),
    F.silu: _simple(("silu",)),
    F.leaky_relu: _leaky_relu,
    F.elu: _elu,
    F.gelu: _gelu,
    F.softplus: _softplus,
    torch.flatten: _flatten,
}
METHODS: dict[str, Callable[..., Layer]] = {
    "relu": _simple(("relu",)),
    "tanh": _simple(("tanh",)),
    "sigmoid": _simple(("sigmoid",)),
    "flatten": _flatten,
}


def label_of(name: str, module: nn.Module) -> str:
    """What messages call a layer: its place in the model, and its class."""
    return f"layer {name} ({type(module).__name__})" if name else type(module).__name__


def layer_of(name: str, module: nn.Module) -> Layer:
    """The layer that a module is; Refused, with the reason, where it is none."""
    known, label = MODULES.get(type(module)), label_of(name, module)
    if known is None:
        raise Refused(f"{label} has no native kernel")
    if hooked(module):
        raise Refused(f"{label} has hooks")
    if "forward" in module.__dict__:
        raise Refused(f"{label} has a forward of its own")
    try:
        return known.layer(module)
    except Refused as refusal:
        raise Refused(f"{label}: {refusal}") from None
