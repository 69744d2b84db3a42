"""nn.Module -> the chain of layers that the native core runs, or the reason why not.

`describe(model)` walks an `nn.Sequential` (nested ones too), or traces any other module's forward
with torch.fx, and returns a `Description` when what it finds is a chain of known layers applied to
rows of features; otherwise an `Unsupported` that says which layer or construct is in the way.
Only one thread at a time may do so, because tracing patches torch (`Plan` sees to it).

Either remembers what it looked at, and `is_current()` tells cheaply whether the model is still
that: layers exchanged, train/eval switched, hooks added or layer settings changed are all seen.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx, nn
from torch.nn import functional as F

Layer: TypeAlias = tuple[Any, ...]
FLATTEN: Layer = ("flatten",)
IDENTITY: Layer = ("identity",)


@dataclass(frozen=True)
class Unsupported:
    """The native core cannot run this model; `reason` says why."""

    reason: str
    seen: tuple[tuple[nn.Module, bool, int], ...] = field(default=(), repr=False)
    model: nn.Module | None = field(default=None, repr=False)

    def is_current(self) -> bool:
        """Whether the model still has the modules, modes and hooks it was judged by."""
        return self.model is not None and _modes(self.model) == self.seen


@dataclass(frozen=True)
class Description:
    """A chain of layers.

    Attributes:
        layers: for `_native.Network`, e.g. ("linear", 1, 40, True), ("relu",).
        names: the parameters' names, layer by layer, weight before bias.
        in_features: columns of the input.
        out_features: columns of the output.
        flattens: whether the chain begins with Flatten, so that rows may have any shape.
        batch_norm: whether a layer normalises over rows.
        running: the layer that would use running statistics in the mode it is in, where one is.
    """

    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    in_features: int
    out_features: int
    flattens: bool
    batch_norm: bool
    running: str | None
    state: _State = field(repr=False, compare=False)

    def is_current(self) -> bool:
        """Whether the model is the same chain still, of the same parameters."""
        return self.state.is_current()


class _Refused(Exception):
    """Raised while walking a model; its message is the reason."""


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hooked(module: nn.Module) -> bool:
    return any(module.__dict__[hooks] for hooks in _HOOKS)


class _State:
    """What the description of a model depends on: the objects that were found in its modules.

    `is_current` runs on every call, next to a native core that may need a few microseconds, so it
    is no walk but a few passes over prepared lists.
    """

    def __init__(self, leaves: Iterable[nn.Module], containers: Iterable[nn.Module]) -> None:
        """Note the layers of the chain, and the modules that hold them."""
        layers = list({id(m): m for m in leaves}.values())
        holders = list(containers)
        found: list[tuple[dict[str, Any], str]] = []
        for m in layers:
            found += [(m.__dict__, name) for name in _MODULES[type(m)].reads]
            found += [(d, k) for d in (m._parameters, m._buffers) for k in d if k in _SLOTS]
        for m in holders:
            found += [(m.__dict__, name) for name in _settings(m)]
            found += [(m._modules, name) for name in m._modules]
        self.modules = layers + holders
        self.types = list(map(type, self.modules))
        # Hooks are seen when their dictionary is exchanged, and when something is put into it.
        found += [(m.__dict__, name) for m in self.modules for name in _HOOKS]
        self.hooks = [m.__dict__[name] for m in self.modules for name in _HOOKS]
        self.places = [place for place, _ in found]
        self.keys = [key for _, key in found]
        self.objects = [place[key] for place, key in found]
        # A forward of its own makes a module another one, and is one attribute more.
        self.attributes = [m.__dict__ for m in self.modules]
        self.counts = list(map(len, self.attributes))
        self.children = [m._modules for m in holders]
        self.order = list(map(list, self.children))

    def is_current(self) -> bool:
        """Whether all of it is still there, and nothing was added."""
        now = map(operator.getitem, self.places, self.keys)
        try:
            same = all(map(operator.is_, now, self.objects))
        except KeyError:  # something was deleted
            return False
        return (
            same
            and list(map(len, self.attributes)) == self.counts
            and list(map(type, self.modules)) == self.types
            and list(map(list, self.children)) == self.order
            and not any(self.hooks)
        )


def _modes(model: nn.Module) -> tuple[tuple[nn.Module, bool, int], ...]:
    return tuple((m, m.training, int(_hooked(m))) for m in model.modules())


# ---- single layers ----------------------------------------------------------------------------


def _affine(m: nn.Module) -> tuple[bool, bool]:
    """Which of weight and bias there are."""
    return m.weight is not None, m.bias is not None


def _linear(m: nn.Linear) -> Layer:
    return ("linear", m.in_features, m.out_features, m.bias is not None)


def _batch_norm(m: nn.BatchNorm1d) -> Layer:
    return ("batch_norm", m.num_features, m.eps, *_affine(m))


def _layer_norm(m: nn.LayerNorm) -> Layer:
    if len(m.normalized_shape) != 1:
        raise _Refused(f"LayerNorm over the shape {tuple(m.normalized_shape)}")
    return ("layer_norm", m.normalized_shape[0], m.eps, *_affine(m))


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Layer:
    if not negative_slope >= 0:
        raise _Refused(f"LeakyReLU with negative_slope {negative_slope}")
    return ("leaky_relu", float(negative_slope))


def _elu(alpha: float = 1.0, inplace: bool = False) -> Layer:
    if not alpha > 0:
        raise _Refused(f"ELU with alpha {alpha}")
    return ("elu", float(alpha))


def _gelu(approximate: str = "none") -> Layer:
    return ("gelu_tanh",) if approximate == "tanh" else ("gelu",)


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Layer:
    if not beta > 0:
        raise _Refused(f"Softplus with beta {beta}")
    return ("softplus", float(beta), float(threshold))


def _flatten(start_dim: int = 0, end_dim: int = -1) -> Layer:
    if start_dim != 1 or end_dim != -1:
        raise _Refused(f"Flatten from dimension {start_dim} to {end_dim}")
    return FLATTEN


def _dropout(m: nn.Dropout) -> Layer:
    if m.training and m.p > 0:
        raise _Refused("Dropout in training mode draws random numbers")
    return IDENTITY


class _Known(NamedTuple):
    """A module type of which the layer is known."""

    layer: Callable[[Any], Layer]
    reads: tuple[str, ...] = ()  # the attributes that `layer` looks at, besides _SLOTS


# The parameters and buffers of which it matters whether they are there.
_SLOTS = ("weight", "bias", "running_mean")

_MODULES: dict[type, _Known] = {
    nn.Linear: _Known(_linear, ("in_features", "out_features")),
    nn.BatchNorm1d: _Known(_batch_norm, ("num_features", "eps", "training")),
    nn.LayerNorm: _Known(_layer_norm, ("normalized_shape", "eps")),
    nn.Identity: _Known(lambda m: IDENTITY),
    nn.Dropout: _Known(_dropout, ("p", "training")),
    nn.Flatten: _Known(lambda m: _flatten(m.start_dim, m.end_dim), ("start_dim", "end_dim")),
    nn.ReLU: _Known(lambda m: ("relu",)),
    nn.LeakyReLU: _Known(lambda m: _leaky_relu(m.negative_slope), ("negative_slope",)),
    nn.ELU: _Known(lambda m: _elu(m.alpha), ("alpha",)),
    nn.Tanh: _Known(lambda m: ("tanh",)),
    nn.Sigmoid: _Known(lambda m: ("sigmoid",)),
    nn.SiLU: _Known(lambda m: ("silu",)),
    nn.GELU: _Known(lambda m: _gelu(m.approximate), ("approximate",)),
    nn.Softplus: _Known(lambda m: _softplus(m.beta, m.threshold), ("beta", "threshold")),
}


def _simple(layer: Layer) -> Callable[..., Layer]:
    return lambda inplace=False: layer


_FUNCTIONS: dict[Any, Callable[..., Layer]] = {
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
_METHODS: dict[str, Callable[..., Layer]] = {
    "relu": _simple(("relu",)),
    "tanh": _simple(("tanh",)),
    "sigmoid": _simple(("sigmoid",)),
    "flatten": _flatten,
}


def _label(name: str, module: nn.Module) -> str:
    return f"layer {name} ({type(module).__name__})" if name else type(module).__name__


def _layer(name: str, module: nn.Module) -> Layer:
    known, label = _MODULES.get(type(module)), _label(name, module)
    if known is None:
        raise _Refused(f"{label} has no native kernel")
    if _hooked(module):
        raise _Refused(f"{label} has hooks")
    if "forward" in module.__dict__:
        raise _Refused(f"{label} has a forward of its own")
    try:
        return known.layer(module)
    except _Refused as refusal:
        raise _Refused(f"{label}: {refusal}") from None


# ---- walking the model ------------------------------------------------------------------------


@dataclass
class _Step:
    """One layer of the chain; `module` is None where the forward calls a function."""

    layer: Layer
    name: str
    module: nn.Module | None


def _is_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _walk(module: nn.Module, name: str) -> Iterator[_Step]:
    """The layers of a module, in the order of their use."""
    if type(module) in _MODULES:
        yield _Step(_layer(name, module), name, module)
        return
    if _hooked(module):
        raise _Refused(f"{name or type(module).__name__} has hooks")
    if _is_sequential(module):
        for key, child in module._modules.items():
            if child is not None:
                yield from _walk(child, _join(name, key))
        return
    if type(module).__module__.startswith("torch.nn.") or not module._modules:
        _layer(name, module)  # raises: not a known layer
    yield from _traced(module, name)


class _Tracer(fx.Tracer):
    """Looks into containers only; every known layer and every torch module stays one node.

    While torch.fx traces, it is in the way of every module of the process. What other threads
    call meanwhile is none of its business.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def _is_mine(self) -> bool:
        return threading.get_ident() == self._thread

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if not self._is_mine():
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not self._is_mine():
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        return type(m) in _MODULES or _is_sequential(m) or super().is_leaf_module(m, qualname)


def _is_rows(node: Any, current: fx.Node) -> bool:
    """Whether a node is the number of rows: x.size(0), x.shape[0] or len(x)."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method" and node.target == "size":
        return node.args == (current, 0)
    if node.op == "call_function" and node.target is operator.getitem and node.args[1] == 0:
        shape = node.args[0]
        if not isinstance(shape, fx.Node):
            return False
        if shape.op == "call_method":
            return shape.target == "size" and shape.args == (current,)
        return shape.target is getattr and shape.args == (current, "shape")
    return False


def _looks_at_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "size"
    return node.op == "call_function" and (
        (node.target is getattr and node.args[1:] == ("shape",)) or node.target is operator.getitem
    )


def _called(node: fx.Node, name: str, current: fx.Node) -> Layer:
    """The layer that a function or method call on the current value amounts to."""
    if node.op == "call_method" and node.target in ("view", "reshape"):
        shape = node.args[1:]
        if len(shape) == 2 and _is_rows(shape[0], current) and shape[1] == -1:
            return FLATTEN
        raise _Refused(f"{name}: {node.target}{shape} is not a flattening of rows")
    table: dict[Any, Callable[..., Layer]] = _METHODS if node.op == "call_method" else _FUNCTIONS
    target = getattr(node.target, "__name__", str(node.target))
    if node.target not in table:
        raise _Refused(f"{name}: {target} has no native kernel, or is more than a chain")
    try:
        return table[node.target](*node.args[1:], **dict(node.kwargs))
    except TypeError:
        raise _Refused(f"{name}: {target} with arguments the native core lacks") from None


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """A block in which the forward may run without a trace: it is no call of the user's.

    What it assigns to modules is put back, and it sees copies of the buffers.
    """
    parts = list(module.modules())
    attributes = [(m.__dict__, dict(m.__dict__)) for m in parts]
    buffers = [(m._buffers, dict(m._buffers)) for m in parts]
    try:
        for own, kept in buffers:
            own.update({n: b if b is None else b.clone() for n, b in kept.items()})
        yield
    finally:
        for now, before in (*attributes, *buffers):
            for added in now.keys() - before.keys():
                del now[added]
            now.update(before)


def _traced(module: nn.Module, name: str) -> Iterator[_Step]:
    """The layers of a module whose forward is found, by tracing it, to be a chain."""
    label = name or type(module).__name__
    if "forward" in module.__dict__:  # tracing would look at the class's
        raise _Refused(f"{label} has a forward of its own")
    try:
        with _untouched(module):
            graph = _Tracer().trace(module)
    except Exception as error:  # a stranger's forward may raise anything when traced
        raise _Refused(
            f"the forward of {label} cannot be traced ({type(error).__name__})"
        ) from None
    current: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if current is not None:
                raise _Refused(f"the forward of {label} takes more than one input")
            current = node
            continue
        if node.op == "get_attr":
            raise _Refused(f"the forward of {label} uses {node.target} directly")
        first = node.args[0] if node.args else None
        if node.op in ("call_method", "call_function") and _looks_at_shape(node):
            continue  # only ever used by a view, which checks it
        if first is not current or current is None:
            raise _Refused(f"the forward of {label} is not a chain (at {node.name})")
        if node.op == "output":
            continue
        if node.op == "call_module":
            if len(node.args) != 1 or node.kwargs:
                raise _Refused(f"the forward of {label} calls {node.target} with more inputs")
            yield from _walk(module.get_submodule(str(node.target)), _join(name, str(node.target)))
        else:
            yield _Step(_called(node, label, current), name, None)
        current = node


# ---- the whole --------------------------------------------------------------------------------


def _parameter_names(steps: list[_Step], model: nn.Module) -> tuple[str, ...]:
    """The chain's parameters in its order; each of the model's exactly once."""
    known = {id(p): n for n, p in model.named_parameters()}
    names: list[str] = []
    for step in steps:
        if step.module is None:
            continue
        for key in ("weight", "bias"):
            parameter = step.module._parameters.get(key)
            if parameter is not None:
                names.append(known[id(parameter)])
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise _Refused(f"parameter {twice} is used more than once")
    unused = [n for n in known.values() if n not in set(names)]
    if unused:
        raise _Refused(f"parameter {unused[0]} is no part of the chain")
    return tuple(names)


def _widths(layers: list[Layer]) -> tuple[int, int]:
    """(in_features, out_features) of the chain; refuses one whose layers do not fit."""
    first: int | None = None
    width: int | None = None
    for layer in layers:
        if layer[0] not in ("linear", "batch_norm", "layer_norm"):
            continue
        if width is not None and layer[1] != width:
            raise _Refused(f"{layer[0]} of {layer[1]} features follows {width} features")
        first = layer[1] if first is None else first
        width = layer[2] if layer[0] == "linear" else layer[1]
    if first is None or width is None:
        raise _Refused("there is no layer with a number of features")
    return first, width


def _running(steps: list[_Step]) -> str | None:
    """The first layer in eval mode that has running statistics."""
    for step in steps:
        m = step.module
        if isinstance(m, nn.BatchNorm1d) and not m.training and m.running_mean is not None:
            return _label(step.name, m)
    return None


_SETTINGS = (bool, int, float, str, type(None))


def _settings(module: nn.Module) -> list[str]:
    """The names of the plain values on a traced module, which its forward may depend on."""
    if _is_sequential(module):
        return []
    return [k for k, v in module.__dict__.items() if isinstance(v, _SETTINGS)]


def _described(model: nn.Module) -> Description:
    steps = list(_walk(model, ""))
    names = _parameter_names(steps, model)
    layers = [s.layer for s in steps if s.layer not in (FLATTEN, IDENTITY)]
    in_features, out_features = _widths(layers)
    kinds = [s.layer for s in steps if s.layer != IDENTITY]
    return Description(
        layers=tuple(layers),
        names=names,
        in_features=in_features,
        out_features=out_features,
        flattens=bool(kinds) and kinds[0] == FLATTEN,
        batch_norm=any(layer[0] == "batch_norm" for layer in layers),
        running=_running(steps),
        state=_State(
            [s.module for s in steps if s.module is not None],
            [m for m in model.modules() if type(m) not in _MODULES],
        ),
    )


def describe(model: nn.Module) -> Description | Unsupported:
    """The chain of layers a model is, or the reason why the native core cannot run it."""
    try:
        return _described(model)
    except _Refused as refusal:
        return Unsupported(str(refusal), _modes(model), model)
