"""The layers that the native core knows, as torch spells them: modules, functions, methods.

A layer is a tuple as `_native.Network` takes it, such as ("linear", 1, 40, True) or ("relu",). What
its arguments are, and the shapes of its parameters, the native core says (`architecture.py`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from pymeta.nn.norm import PerStepBatchNorm
from pymeta.nn.tabular import TabularInput
from pymeta.spec.branches import MULTIPLY
from pymeta.spec.modules import Fixed, is_fixed, is_plainly
from pymeta.spec.order import METHODS as PERMUTATIONS
from pymeta.spec.order import PERMUTE, SCALE, axes_of_permuted
from pymeta.spec.order import of as permutation
from pymeta.spec.refused import Refused
from pymeta.spec.slices import of_index, of_narrow, of_select
from pymeta.spec.watch import hooked

Layer: TypeAlias = tuple[Any, ...]
FLATTEN: Layer = ("flatten",)
IDENTITY: Layer = ("identity",)
# (SQUEEZE, dimension, ...), (UNSQUEEZE, dimension), (VIEW, size, ...) of each flattened row: none
# of the native core's; `network.py` knows what they are
SQUEEZE, UNSQUEEZE, VIEW = "squeeze", "unsqueeze", "view"


class Part(NamedTuple):
    """A layer, and what the module calls its tensors, in their order."""

    layer: Layer
    tensors: tuple[str, ...] = ("weight", "bias")


def _affine(m: nn.Module) -> tuple[bool, bool]:
    """Which of weight and bias there are."""
    return m.weight is not None, m.bias is not None


def _linear(m: nn.Linear) -> Layer:
    return ("linear", m.in_features, m.out_features, m.bias is not None)


def _batch_norm(m: nn.BatchNorm1d | nn.BatchNorm2d) -> Layer:
    return ("batch_norm", m.num_features, m.eps, *_affine(m))


def _step_batch_norm(m: PerStepBatchNorm) -> Layer:
    return ("step_batch_norm", m.num_features, m.eps, *_affine(m), m.steps)


def _embeddings(m: TabularInput) -> list[Part]:
    parts, features, feature = [], m.in_features, m.numeric
    for i, (categories, width) in enumerate(zip(m.cardinalities, m.dims, strict=True)):
        layer = ("embedding", features, feature, categories, width)
        parts.append(Part(layer, (f"tables.{i}",)))
        features, feature = features + width - 1, feature + width
    return parts


def _group_norm(m: nn.GroupNorm) -> Layer:
    return ("group_norm", m.num_channels, m.num_groups, m.eps, *_affine(m))


def _instance_norm(m: nn.InstanceNorm1d | nn.InstanceNorm2d) -> Layer:
    return ("group_norm", m.num_features, m.num_features, m.eps, *_affine(m))


def _layer_norm(m: nn.LayerNorm) -> list[Part]:
    channels, *sizes = m.normalized_shape
    if not sizes:
        return [Part(("layer_norm", channels, m.eps, *_affine(m)))]
    if len(sizes) > 2:
        raise Refused(f"LayerNorm over the shape {tuple(m.normalized_shape)}")
    height, width = (0, *sizes)[-2:]  # 0: a sequence
    return [
        Part(("group_norm", channels, 1, m.eps, False, False), ()),
        Part(("elementwise_affine", channels, height, width, *_affine(m))),
    ]


# ---- sequences and images -----------------------------------------------------------------------
#
# A window is (height, width) for both: a sequence is an image of height 1.


def _two(value: int | Sequence[int], first: int = 1) -> tuple[int, int]:
    """A setting along height and width; `first` is the height's where there is none."""
    if isinstance(value, int):
        return (value, value) if first < 0 else (first, value)
    values = tuple(value)
    if len(values) == 1:
        return (values[0], values[0]) if first < 0 else (first, values[0])
    return values[0], values[1]


def _sides(padding: tuple[int, int]) -> tuple[int, int, int, int]:
    return padding[0], padding[0], padding[1], padding[1]


def _same(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of padding="same"."""
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    top, left = (total // 2 for total in totals)
    return top, totals[0] - top, left, totals[1] - left


def _conv(m: nn.Conv1d | nn.Conv2d) -> Layer:
    if m.padding_mode != "zeros":
        raise Refused(f"padding_mode {m.padding_mode!r}")
    return _convolution(
        m.in_channels, m.out_channels, m.kernel_size, m.bias is not None, m.stride, m.padding,
        m.dilation, m.groups,
    )  # fmt: skip


def _convolution(
    inputs: int, outputs: int, kernel_size: Sequence[int], bias: bool, stride: Any, padding: Any,
    dilation: Any, groups: int,
) -> Layer:  # fmt: skip
    axes = len(kernel_size)
    kernel, stride, dilation = (
        _two(v, 1 if axes == 1 else -1) for v in (kernel_size, stride, dilation)
    )
    if isinstance(padding, str):
        sides = _same(kernel, dilation) if padding == "same" else (0, 0, 0, 0)
    else:
        sides = _sides(_two(padding, 0 if axes == 1 else -1))
    return (
        f"conv{axes}d", inputs, outputs, *kernel, *stride, *sides, *dilation, groups, bias,
    )  # fmt: skip


def _pool_window(
    axes: int, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, dilation: Any = 1
) -> tuple[int, ...]:
    if ceil_mode:
        raise Refused("pooling with ceil_mode")
    kernel = _two(kernel_size, 1 if axes == 1 else -1)
    steps = kernel if stride is None or stride == [] else _two(stride, 1 if axes == 1 else -1)
    sides = _sides(_two(padding, 0 if axes == 1 else -1))
    return (*kernel, *steps, *sides, *_two(dilation, 1 if axes == 1 else -1))


def _max_pool(axes: int) -> Callable[..., Layer]:
    def pool(
        kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Layer:  # fmt: skip
        if return_indices:
            raise Refused("pooling that returns indices")
        window = _pool_window(axes, kernel_size, stride, padding, ceil_mode, dilation)
        return (f"max_pool{axes}d", *window)

    return pool


def _avg_pool(axes: int) -> Callable[..., Layer]:
    def pool(
        kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Layer:  # fmt: skip
        window = _pool_window(axes, kernel_size, stride, padding, ceil_mode)
        if divisor_override is not None and divisor_override < 1:
            raise Refused(f"pooling with divisor_override {divisor_override}")
        divisor = divisor_override
        if divisor is None:  # 0: however many there are
            divisor = math.prod(window[:2]) if count_include_pad or not any(window[4:8]) else 0
        return (f"avg_pool{axes}d", *window, divisor)

    return pool


def _adaptive_pool(kind: str, axes: int) -> Callable[..., Layer]:
    def pool(output_size: Any, return_indices: bool = False) -> Layer:
        if return_indices:
            raise Refused("pooling that returns indices")
        sizes = (output_size,) * axes if isinstance(output_size, int) else tuple(output_size)
        if len(sizes) != axes or not all(type(n) is int for n in sizes):
            raise Refused(f"adaptive pooling to {output_size}")
        if kind == "avg" and set(sizes) == {1}:
            return (f"global_avg_pool{axes}d",)
        return (f"adaptive_{kind}_pool{axes}d", *sizes)

    return pool


def _mean(dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> tuple[Layer, ...]:
    """Over all positions, of which a negative dimension does not tell how many there are."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
    axes = {(2,): 1, (-1,): 1, (2, 3): 2, (-2, -1): 2}.get(tuple(sorted(dims)))
    if axes is None or dtype is not None:
        raise Refused(f"the mean over the dimensions {dim}")
    pool: Layer = (f"global_avg_pool{axes}d",)
    return (pool,) if keepdim else (pool, FLATTEN)


def _squeeze(dim: Any = None) -> Layer:
    """Of axes of one position; without a `dim` torch may drop the rows' or the channels', too."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
    if not dims:
        raise Refused("a squeeze that does not say of what")
    return (SQUEEZE, *dims)


def _unsqueeze(dim: Any) -> Layer:
    """An axis of one position, behind those that there are."""
    if type(dim) is not int:
        raise Refused(f"an axis put in at {dim}")
    return (UNSQUEEZE, dim)


def _pad(pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Layer:
    """A border of zeros, of (left, right) or (left, right, top, bottom); negative: cut off."""
    sides = tuple(pad)
    if mode != "constant" or value or len(sides) not in (2, 4):
        raise Refused(f"padding {sides} in mode {mode!r} by {value or 0}")
    if not all(type(n) is int for n in sides):
        raise Refused("padding by values that are not plain numbers")
    top_bottom = sides[2:] or (0, 0)
    return ("zero_pad", *top_bottom, *sides[:2])


def _constant_pad(m: nn.ConstantPad1d | nn.ConstantPad2d) -> Layer:
    return _pad(m.padding, value=m.value)


_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVG_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_SIDES = ("padding", "value")
_TO = ("output_size",)
_TO_MAX = ("output_size", "return_indices")
_CONV = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    "padding_mode",
)  # fmt: skip


def _by(make: Callable[..., Layer], names: Sequence[str]) -> Callable[[Any], Layer]:
    """The layer of a module whose attributes are what its function takes."""
    return lambda m: make(**{name: getattr(m, name) for name in names})


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


def _unflatten(m: nn.Unflatten) -> Layer:
    shape = tuple(m.unflattened_size)
    plain = all(type(n) is int and n > 0 for n in shape)
    if m.dim not in (1, -1) or len(shape) not in (2, 3) or not plain:
        raise Refused(f"Unflatten of dimension {m.dim} into {shape}")
    channels, *sizes = shape
    return ("unflatten", channels, *([1, *sizes] if len(sizes) == 1 else sizes))


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> Layer:
    if training and p > 0:
        raise Refused("Dropout in training mode draws random numbers")
    return IDENTITY


class Known(NamedTuple):
    """A module type of which the layer is known."""

    layer: Callable[[Any], Layer]
    reads: tuple[str, ...] = ()  # the attributes that `layer` looks at, besides SLOTS
    # how many of positions its rows may have; None: any; or what tells of a module
    axes: tuple[int, ...] | Callable[[Any], tuple[int, ...]] | None = None
    parts: Callable[[Any], list[Part]] | None = None  # where it is several layers


# The parameters and buffers of which it matters whether they are there.
SLOTS = ("weight", "bias", "running_mean", "running_var")

MODULES: dict[type, Known] = {
    nn.Linear: Known(_linear, ("in_features", "out_features"), (0,)),
    nn.Conv1d: Known(_conv, _CONV, (1,)),
    nn.Conv2d: Known(_conv, _CONV, (2,)),
    nn.MaxPool1d: Known(_by(_max_pool(1), _MAX_POOL), _MAX_POOL, (1,)),
    nn.MaxPool2d: Known(_by(_max_pool(2), _MAX_POOL), _MAX_POOL, (2,)),
    nn.AvgPool1d: Known(_by(_avg_pool(1), _AVG_POOL), _AVG_POOL, (1,)),
    nn.AvgPool2d: Known(
        _by(_avg_pool(2), (*_AVG_POOL, "divisor_override")), (*_AVG_POOL, "divisor_override"), (2,)
    ),
    nn.AdaptiveAvgPool1d: Known(_by(_adaptive_pool("avg", 1), _TO), _TO, (1,)),
    nn.AdaptiveAvgPool2d: Known(_by(_adaptive_pool("avg", 2), _TO), _TO, (2,)),
    nn.AdaptiveMaxPool1d: Known(_by(_adaptive_pool("max", 1), _TO_MAX), _TO_MAX, (1,)),
    nn.AdaptiveMaxPool2d: Known(_by(_adaptive_pool("max", 2), _TO_MAX), _TO_MAX, (2,)),
    nn.ZeroPad1d: Known(_constant_pad, _SIDES, (1,)),
    nn.ZeroPad2d: Known(_constant_pad, _SIDES, (2,)),
    nn.ConstantPad1d: Known(_constant_pad, _SIDES, (1,)),
    nn.ConstantPad2d: Known(_constant_pad, _SIDES, (2,)),
    nn.BatchNorm1d: Known(_batch_norm, ("num_features", "eps", "training"), (0, 1)),
    nn.BatchNorm2d: Known(_batch_norm, ("num_features", "eps", "training"), (2,)),
    PerStepBatchNorm: Known(
        _step_batch_norm, ("num_features", "steps", "eps", "training"), (0, 1, 2)
    ),
    nn.GroupNorm: Known(_group_norm, ("num_groups", "num_channels", "eps"), (0, 1, 2)),
    nn.InstanceNorm1d: Known(_instance_norm, ("num_features", "eps", "training"), (1,)),
    nn.InstanceNorm2d: Known(_instance_norm, ("num_features", "eps", "training"), (2,)),
    nn.LayerNorm: Known(
        lambda m: _layer_norm(m)[0].layer,
        ("normalized_shape", "eps"),
        lambda m: (len(m.normalized_shape) - 1,),
        _layer_norm,
    ),
    TabularInput: Known(
        lambda m: _embeddings(m)[0].layer, ("numeric", "cardinalities", "dims"), (0,), _embeddings
    ),
    nn.Identity: Known(lambda m: IDENTITY),
    nn.GLU: Known(lambda m: (MULTIPLY,), ("dim",)),  # and more: `graph.py`
    **dict.fromkeys(
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
        Known(_by(_dropout, ("p", "training")), ("p", "training")),
    ),
    nn.Unflatten: Known(_unflatten, ("dim", "unflattened_size"), (0,)),
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


def _found(module: nn.Module) -> Known | None:
    """What is known of a module of MODULES, or of a subclass that does the same; None of others."""
    base = next((its for its in type(module).__mro__ if its in MODULES), None)
    return MODULES[base] if base is not None and is_plainly(module, base) else None


def is_known(module: nn.Module) -> bool:
    """Whether a module is one of MODULES, or of a subclass that does the same."""
    return _found(module) is not None


def known(module: nn.Module) -> Known:
    """What is known of a module that `is_known`."""
    found = _found(module)
    assert found is not None, "asked of known modules alone"
    return found


def _simple(layer: Layer) -> Callable[..., Layer]:
    return lambda inplace=False: layer


# The layer, or the layers, that a call amounts to, made of what follows its input.
Called: TypeAlias = Callable[..., "Layer | tuple[Layer, ...]"]

FUNCTIONS: dict[Any, Called] = {
    **dict.fromkeys((torch.relu, torch.relu_, F.relu), _simple(("relu",))),
    **dict.fromkeys((torch.tanh, torch.tanh_, F.tanh), _simple(("tanh",))),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, F.sigmoid), _simple(("sigmoid",))),
    F.silu: _simple(("silu",)),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky_relu),
    F.elu: _elu,
    F.elu_: lambda alpha=1.0: _elu(alpha),
    F.gelu: _gelu,
    F.softplus: _softplus,
    torch.flatten: _flatten,
    F.max_pool1d: _max_pool(1),
    F.max_pool2d: _max_pool(2),
    F.avg_pool1d: _avg_pool(1),
    F.avg_pool2d: _avg_pool(2),
    F.adaptive_avg_pool1d: _adaptive_pool("avg", 1),
    F.adaptive_avg_pool2d: _adaptive_pool("avg", 2),
    F.adaptive_max_pool1d: _adaptive_pool("max", 1),
    F.adaptive_max_pool2d: _adaptive_pool("max", 2),
    torch.mean: _mean,
    torch.squeeze: _squeeze,
    torch.unsqueeze: _unsqueeze,
    torch.narrow: of_narrow,
    torch.select: of_select,
    operator.getitem: of_index,
    F.pad: _pad,
    **{getattr(torch, name): permutation(name) for name in PERMUTATIONS},
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout), _dropout),
}


def _conv_of(
    weight: torch.Tensor, bias: bool, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Layer:  # fmt: skip
    outputs, inputs, *kernel = weight.shape
    return _convolution(
        inputs * groups, outputs, kernel, bias, stride, padding, dilation, groups
    )  # fmt: skip


def _linear_of(weight: torch.Tensor, bias: bool) -> Layer:
    return ("linear", weight.shape[1], weight.shape[0], bias)


def _layer_norm_of(
    weight: torch.Tensor | None, bias: bool, normalized_shape: Sequence[int], eps: float = 1e-5
) -> Layer:
    shape = tuple(normalized_shape)
    if [*map(type, shape)] != [int] or (weight is not None and weight.shape != shape):
        raise Refused(f"layer_norm over the shape {shape}")
    return ("layer_norm", shape[0], float(eps), weight is not None, bias)


# Made of the weight, whether there is a bias, and what else there is.
WEIGHTED: dict[Any, Called] = {
    F.conv1d: _conv_of, F.conv2d: _conv_of, F.linear: _linear_of, F.layer_norm: _layer_norm_of,
}  # fmt: skip
# of the layers that functions are
AXES: dict[str, tuple[int, ...]] = {
    f"{kind}_pool{axes}d": (axes,)
    for kind in ("max", "avg", "global_avg", "adaptive_avg", "adaptive_max")
    for axes in (1, 2)
}
AXES |= {"linear": (0,), "layer_norm": (0,), "conv1d": (1,), "conv2d": (2,), SCALE: (0,)}
AXES |= dict.fromkeys((SQUEEZE, "zero_pad"), (1, 2))
METHODS: dict[str, Called] = {
    **dict.fromkeys(("relu", "relu_"), _simple(("relu",))),
    **dict.fromkeys(("tanh", "tanh_"), _simple(("tanh",))),
    **dict.fromkeys(("sigmoid", "sigmoid_"), _simple(("sigmoid",))),
    "flatten": _flatten,
    "mean": _mean,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "narrow": of_narrow,
    "select": of_select,
    "contiguous": lambda: IDENTITY,
    **{name: permutation(name) for name in PERMUTATIONS},
}


def _fixed_parts(m: _NormBase) -> list[Part]:
    """A normalisation by running statistics."""
    steps = m.steps if isinstance(m, PerStepBatchNorm) else 0
    statistics = ("running_var", "running_mean")
    parts = [Part(("fixed_norm", m.num_features, m.eps, steps), statistics)]
    if m.weight is not None or m.bias is not None:
        parts.append(Part(("scale_shift", m.num_features, *_affine(m), steps)))
    return parts


def axes_of(layer: Layer, module: nn.Module | None) -> tuple[int, ...] | None:
    """How many axes of positions a layer's rows may have; None where any number will do."""
    if module is None:
        if layer[0] == "zero_pad" and any(layer[1:3]):
            return (2,)
        return axes_of_permuted(layer) if layer[0] == PERMUTE else AXES.get(layer[0])
    axes = known(module).axes
    return axes(module) if callable(axes) else axes


def label_of(name: str, module: nn.Module) -> str:
    """What messages call a layer: its place in the model, and its class."""
    return f"layer {name} ({type(module).__name__})" if name else type(module).__name__


def parts_of(name: str, module: nn.Module, fixed: Fixed = None) -> list[Part]:
    """The layers that a module is; Refused, with the reason, where it is none.

    `fixed` names the normalisations that use running statistics; None: those in eval mode do.
    """
    layer = layer_of(name, module)
    if isinstance(module, _NormBase) and is_fixed(name, module, fixed):
        return _fixed_parts(module)
    parts = known(module).parts
    return [Part(layer)] if parts is None else parts(module)


def layer_of(name: str, module: nn.Module) -> Layer:
    """The layer that a module is; Refused, with the reason, where it is none."""
    found, label = _found(module), label_of(name, module)
    if found is None:
        raise Refused(f"{label} has no native kernel")
    if hooked(module):
        raise Refused(f"{label} has hooks")
    if "forward" in module.__dict__:
        raise Refused(f"{label} has a forward of its own")
    try:
        return found.layer(module)
    except Refused as refusal:
        raise Refused(f"{label}: {refusal}") from None
