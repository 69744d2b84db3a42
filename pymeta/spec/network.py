"""nn.Module -> the chain of layers that the native core runs, or the reason why not.

`describe(model)` walks an `nn.Sequential` (nested ones too), or traces any other module's forward
with torch.fx, and returns a `Description` when what it finds is a chain of known layers applied to
rows of features; otherwise an `Unsupported` that says which layer or construct is in the way.
What begins with convolutions takes rows of any height and width: it is `Unshaped` until the shape
of a row is given.
Only one thread at a time may do so, because tracing patches torch (`Plan` sees to it).

The `watch` of either tells cheaply whether the model is still that: layers exchanged, train/eval
switched, hooks added or layer settings changed are all seen.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from pymeta import native
from pymeta.spec.layers import (
    AXES,
    FLATTEN,
    FUNCTIONS,
    IDENTITY,
    METHODS,
    MODULES,
    SLOTS,
    Layer,
    Refused,
    label_of,
    layer_of,
)
from pymeta.spec.watch import Watch, hooked


@dataclass(frozen=True)
class Unsupported:
    """The native core cannot run this model; `reason` says why, `watch` until when.

    `row_shape` is the shape of rows for which it cannot, where that may be why.
    """

    reason: str
    watch: Watch = field(repr=False, compare=False)
    row_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Unshaped(Unsupported):
    """A chain that can be described once the shape of its rows is known."""


@dataclass(frozen=True)
class Description:
    """A chain of layers.

    Attributes:
        layers: for `_native.Network`, e.g. ("linear", 1, 40, True), ("relu",).
        names: the parameters' names, layer by layer, weight before bias.
        network: the native Network.
        in_features: columns of the input.
        out_features: columns of the output.
        flattens: whether the chain begins with Flatten, so that rows may have any shape.
        batch_norm: whether a layer normalises over rows.
        row_shape: of a row of the input, [channels, length] or [channels, height, width]; None
            where it has one axis of features.
        running: the layer that would use running statistics in the mode it is in, where one is.
        watch: whether the model is still this chain, of the same parameters.
    """

    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    network: Any = field(repr=False, compare=False)
    in_features: int
    out_features: int
    flattens: bool
    batch_norm: bool
    row_shape: tuple[int, ...] | None
    running: str | None
    watch: Watch = field(repr=False, compare=False)


def _modes(model: nn.Module) -> Watch:
    """The modules of a model, their modes and hooks: all that a refusal is judged by."""
    modules = list(model.modules())
    places = [(module.__dict__, "training") for module in modules]
    return Watch(places, modules, modules, counted=False)


def _chain(leaves: Iterable[nn.Module], containers: Iterable[nn.Module]) -> Watch:
    """What a chain depends on in its layers, and in the modules that hold them."""
    layers = list({id(m): m for m in leaves}.values())
    holders = list(containers)
    places = []
    for m in layers:
        places += [(m.__dict__, name) for name in MODULES[type(m)].reads]
        places += [(d, k) for d in (m._parameters, m._buffers) for k in d if k in SLOTS]
    places += [(m.__dict__, name) for m in holders for name in _settings(m)]
    return Watch(places, layers + holders, holders)


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
    if type(module) in MODULES:
        yield _Step(layer_of(name, module), name, module)
        return
    if hooked(module):
        raise Refused(f"{name or type(module).__name__} has hooks")
    if _is_sequential(module):
        for key, child in module._modules.items():
            if child is not None:
                yield from _walk(child, _join(name, key))
        return
    if type(module).__module__.startswith("torch.nn.") or not module._modules:
        layer_of(name, module)  # raises: not a known layer
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
        return type(m) in MODULES or _is_sequential(m) or super().is_leaf_module(m, qualname)


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
        raise Refused(f"{name}: {node.target}{shape} is not a flattening of rows")
    table: dict[Any, Callable[..., Layer]] = METHODS if node.op == "call_method" else FUNCTIONS
    target = getattr(node.target, "__name__", str(node.target))
    if node.target not in table:
        raise Refused(f"{name}: {target} has no native kernel, or is more than a chain")
    try:
        return table[node.target](*node.args[1:], **dict(node.kwargs))
    except TypeError:
        raise Refused(f"{name}: {target} with arguments the native core lacks") from None


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """A block in which the forward may run without side effects: the user did not call it.

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
        raise Refused(f"{label} has a forward of its own")
    try:
        with _untouched(module):
            graph = _Tracer().trace(module)
    except Exception as error:  # a stranger's forward may raise anything when traced
        raise Refused(f"the forward of {label} cannot be traced ({type(error).__name__})") from None
    current: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if current is not None:
                raise Refused(f"the forward of {label} takes more than one input")
            current = node
            continue
        if node.op == "get_attr":
            raise Refused(f"the forward of {label} uses {node.target} directly")
        first = node.args[0] if node.args else None
        if node.op in ("call_method", "call_function") and _looks_at_shape(node):
            continue  # only ever used by a view, which checks it
        if first is not current or current is None:
            raise Refused(f"the forward of {label} is not a chain (at {node.name})")
        if node.op == "output":
            continue
        if node.op == "call_module":
            if len(node.args) != 1 or node.kwargs:
                raise Refused(f"the forward of {label} calls {node.target} with more inputs")
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
        raise Refused(f"parameter {twice} is used more than once")
    unused = [n for n in known.values() if n not in set(names)]
    if unused:
        raise Refused(f"parameter {unused[0]} is not part of the chain")
    return tuple(names)


def _network(layers: tuple[Layer, ...]) -> Any:
    """The native Network of the layers; Refused where they do not fit each other."""
    missing = native.missing()
    if missing is not None:
        raise Refused(missing)
    try:
        return native.extension().Network(layers)
    except ValueError as error:
        raise Refused(str(error)) from None


def _running(steps: list[_Step]) -> str | None:
    """The first layer in eval mode that has running statistics."""
    for step in steps:
        m = step.module
        if not isinstance(m, _NormBase) or m.training:
            continue
        if m.running_mean is not None:
            return label_of(step.name, m)
    return None


_SETTINGS = (bool, int, float, str, type(None))


def _settings(module: nn.Module) -> list[str]:
    """The names of the plain values on a traced module, which its forward may depend on."""
    if _is_sequential(module):
        return []
    return [k for k, v in module.__dict__.items() if isinstance(v, _SETTINGS)]


def _axes(step: _Step) -> tuple[int, ...] | None:
    """How many axes of positions a layer's rows may have; None where any number will do."""
    if step.module is None:
        return AXES.get(step.layer[0])
    return MODULES[type(step.module)].axes


def _image(row_shape: tuple[int, ...]) -> Layer:
    if len(row_shape) not in (2, 3):
        raise Refused(
            f"rows of shape {list(row_shape)}; expected [channels, length] or "
            f"[channels, height, width]"
        )
    return ("image", row_shape[0], *(row_shape[1:] if len(row_shape) == 3 else (1, row_shape[1])))


def _axes_behind(step: _Step, axes: int) -> int:
    """How many axes of positions rows have behind a layer that got them with `axes`."""
    if step.layer[0] == "unflatten":
        assert isinstance(step.module, nn.Unflatten)
        return len(step.module.unflattened_size) - 1
    return 0 if step.layer == FLATTEN else axes


def _shaped(steps: list[_Step], row_shape: tuple[int, ...] | None) -> list[Layer]:
    """The layers for rows of a shape, or of one axis; Refused where a layer does not take them."""
    axes = 0 if row_shape is None else len(row_shape) - 1
    layers: list[Layer] = [] if row_shape is None else [_image(row_shape)]
    for step in steps:
        wanted = _axes(step)
        if wanted is not None and axes not in wanted:
            label = step.name if step.module is None else label_of(step.name, step.module)
            got = "one axis of features" if axes == 0 else f"{axes} axes of positions"
            raise Refused(f"{label} does not take rows with {got}")
        if step.layer != IDENTITY and (step.layer != FLATTEN or axes):
            layers.append(step.layer)
        axes = _axes_behind(step, axes)
    if axes:
        raise Refused("its output has positions besides features: flatten it")
    return layers


def _takes_positions(steps: list[_Step]) -> bool:
    """Whether the chain itself takes rows with positions, so that it has to know their shape."""
    for step in steps:
        if step.layer[0] == "unflatten":
            return False
        if 0 not in (_axes(step) or (0,)):
            return True
    return False


def _described(model: nn.Module, row_shape: tuple[int, ...] | None) -> Description | Unshaped:
    steps = list(_walk(model, ""))
    names = _parameter_names(steps, model)
    spatial = _takes_positions(steps)
    if spatial and row_shape is None:
        return Unshaped(
            "the shape of its rows, [channels, height, width], is known with the first call",
            _of_a_chain(steps, model),
        )
    layers = _shaped(steps, row_shape if spatial else None)
    network = _network(tuple(layers))
    kinds = [s.layer for s in steps if s.layer != IDENTITY]
    return Description(
        layers=tuple(layers),
        names=names,
        network=network,
        in_features=network.in_features,
        out_features=network.out_features,
        flattens=not spatial and bool(kinds) and kinds[0] == FLATTEN,
        batch_norm=network.mixes_rows,
        row_shape=row_shape if spatial else None,
        running=_running(steps),
        watch=_of_a_chain(steps, model),
    )


def _of_a_chain(steps: list[_Step], model: nn.Module) -> Watch:
    return _chain(
        [s.module for s in steps if s.module is not None],
        [m for m in model.modules() if type(m) not in MODULES],
    )


def describe(
    model: nn.Module, row_shape: tuple[int, ...] | None = None
) -> Description | Unsupported:
    """The chain of layers a model is, or the reason why the native core cannot run it.

    `row_shape` is the shape of a row of its input, which matters where the rows have positions.
    """
    try:
        return _described(model, row_shape)
    except Refused as refusal:
        return Unsupported(str(refusal), _modes(model), row_shape)
