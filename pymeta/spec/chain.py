"""The layers of a model in the order of their use: by walking it, or tracing its forward.

`walk(model, ...)` goes through an `nn.Sequential` (nested ones too), and traces any other module's
forward with torch.fx: a chain of known layers, in which a sum of two branches that begin with one
value is written as the layers fork, turn and join (csrc/core/layers/branches.h). `Refused` says
which layer or construct is in the way.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from pymeta.spec.layers import (
    FLATTEN,
    FORK,
    FUNCTIONS,
    JOIN,
    METHODS,
    MODULES,
    TURN,
    WEIGHTED,
    Called,
    Layer,
    layer_of,
    parts_of,
)
from pymeta.spec.modules import Fixed
from pymeta.spec.refused import Refused
from pymeta.spec.watch import hooked


@dataclass
class Step:
    """One layer of the chain; `module` is None where the forward calls a function.

    `tensors` are names in `owner`, which is `module` where there is one.
    """

    layer: Layer
    name: str
    module: nn.Module | None
    tensors: tuple[str, ...] = ()
    owner: nn.Module | None = None

    def __post_init__(self) -> None:
        self.owner = self.owner or self.module


def is_sequential(module: nn.Module) -> bool:
    """Whether a module's forward is nn.Sequential's."""
    return type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def walk(module: nn.Module, name: str, fixed: Fixed) -> Iterator[Step]:
    """The layers of a module, in the order of their use."""
    if type(module) in MODULES:
        for part in parts_of(name, module, fixed):
            yield Step(part.layer, name, module, part.tensors)
        return
    if hooked(module):
        raise Refused(f"{name or type(module).__name__} has hooks")
    if is_sequential(module):
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(child, _join(name, key), fixed)
        return
    if type(module).__module__.startswith("torch.nn."):
        layer_of(name, module)  # raises: not a known layer
    yield from _traced(module, name, fixed)


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
        return type(m) in MODULES or is_sequential(m) or super().is_leaf_module(m, qualname)


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


def _looks_at_shape(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op not in ("call_method", "call_function"):
        return False
    if node.op == "call_method":
        return node.target == "size"
    if node.target is operator.getitem:
        return _looks_at_shape(node.args[0])
    return node.target is getattr and node.args[1:] == ("shape",)


def _is_all_positions(node: Any, current: fx.Node, axes: int) -> bool:
    """Whether a node is how many positions there are: x.size(2), x.shape[-1] or x.shape[2:]."""
    if not _looks_at_shape(node):
        return False
    if node.op == "call_method" and len(node.args) == 2:
        return axes == 1 and node.args[0] is current and node.args[1] in (2, -1)
    if node.target is not operator.getitem or node.args[0].args[0] is not current:
        return False
    if isinstance(node.args[1], int):
        return axes == 1 and node.args[1] in (2, -1)
    return node.args[1] in (slice(2, None), slice(-axes, None))


_WHOLE: dict[Any, Layer] = {
    F.max_pool1d: ("adaptive_max_pool1d", 1),
    F.max_pool2d: ("adaptive_max_pool2d", 1, 1),
    F.avg_pool1d: ("global_avg_pool1d",),
    F.avg_pool2d: ("global_avg_pool2d",),
}


_DEFAULTS = {
    "stride": None, "padding": 0, "dilation": 1, "divisor_override": None, "return_indices": False,
}  # fmt: skip


def _pools_all(node: fx.Node, current: fx.Node) -> bool:
    """Whether a pooling has a window of all positions, whose number the forward asks for."""
    if node.target not in _WHOLE or len(node.args) > 2:
        return False
    others = {name: value for name, value in node.kwargs.items() if name != "kernel_size"}
    if any(value != _DEFAULTS.get(name, value) for name, value in others.items()):
        return False
    axes = int(_WHOLE[node.target][0][-2])
    size = node.args[1] if len(node.args) == 2 else node.kwargs.get("kernel_size")
    if isinstance(size, (tuple, list)) and axes == 1 and len(size) == 1:
        size = size[0]
    return _is_all_positions(size, current, axes)


def _is_maximum(node: Any) -> bool:
    """Whether a node is a maximum over a dimension of which only the values are read."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    is_max = (node.op, node.target) in (("call_method", "max"), ("call_function", torch.max))
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return is_max and type(dim) is int and _reads_values(next(iter(node.users)), node)


def _reads_values(user: fx.Node, maximum: fx.Node) -> bool:
    return user.op == "call_function" and (
        (user.target is operator.getitem and user.args == (maximum, 0))
        or (user.target is getattr and user.args == (maximum, "values"))
    )


def _largest(dim: Any, keepdim: Any = False) -> tuple[Layer, ...]:
    """The largest of all positions of a sequence, which is what the last dimension is."""
    if dim not in (2, -1):
        raise Refused(f"the maximum over dimension {dim}")
    pool: Layer = ("adaptive_max_pool1d", 1)
    return (pool,) if keepdim else (pool, FLATTEN)


def _called(node: fx.Node, name: str, current: fx.Node) -> tuple[Layer, ...]:
    """The layers that a function or method call on the current value amounts to."""
    maximum = node.args[0]
    if isinstance(maximum, fx.Node) and _is_maximum(maximum):
        options: dict[str, Any] = dict(maximum.kwargs)
        return _largest(*maximum.args[1:], **options)
    if _pools_all(node, current):
        return (_WHOLE[node.target],)
    if node.op == "call_method" and node.target in ("view", "reshape"):
        shape = node.args[1:]
        if len(shape) == 2 and _is_rows(shape[0], current) and shape[1] == -1:
            return (FLATTEN,)
        raise Refused(f"{name}: {node.target}{shape} is not a flattening of rows")
    table: dict[Any, Called] = METHODS if node.op == "call_method" else FUNCTIONS
    target = getattr(node.target, "__name__", str(node.target))
    if node.target not in table:
        raise Refused(f"{name}: {target} has no native kernel, or is more than a chain")
    try:
        found = table[node.target](*node.args[1:], **dict(node.kwargs))
        return found if isinstance(found[0], tuple) else (found,)
    except Refused as refusal:
        raise Refused(f"{name}: {refusal}") from None
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


def _traced(module: nn.Module, name: str, fixed: Fixed) -> Iterator[Step]:
    """The layers of a module whose forward is found, by tracing it, to be a chain."""
    label = name or type(module).__name__
    if "forward" in module.__dict__:  # tracing would look at the class's
        raise Refused(f"{label} has a forward of its own")
    try:
        with _untouched(module):
            graph = _Tracer().trace(module)
    except Exception as error:  # a stranger's forward may raise anything when traced
        raise Refused(f"the forward of {label} cannot be traced ({type(error).__name__})") from None
    yield from _Forward(graph, module, name, label, fixed).steps()


_SUMS = {
    "call_function": (operator.add, operator.iadd, torch.add),
    "call_method": ("add", "add_"),
}


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two values and nothing else."""
    return (
        node.target in _SUMS.get(node.op, ())
        and len(node.args) == 2
        and all(isinstance(a, fx.Node) for a in node.args)
        and not node.kwargs
    )


def _parameters(node: fx.Node) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    """Weight, bias and what else there is, positional or named, of a call of WEIGHTED."""
    options = dict(node.kwargs)
    given = list(node.args[1:])
    weight = given.pop(0) if given else options.pop("weight", None)
    bias = given.pop(0) if given else options.pop("bias", None)
    return weight, bias, tuple(given), options


def _is_parameter(node: fx.Node, user: fx.Node) -> bool:
    """Whether a function takes a node as its weight or its bias, and as nothing else."""
    if user.op != "call_function" or user.target not in WEIGHTED:
        return False
    weight, bias, *_ = _parameters(user)
    return user.all_input_nodes.count(node) == 1 and (node is weight or node is bias)


class _Forward:
    """A traced forward as a chain of layers; a sum of two branches is fork, turn and join."""

    def __init__(
        self, graph: fx.Graph, module: nn.Module, name: str, label: str, fixed: Fixed
    ) -> None:
        self._module, self._name, self._label, self._fixed = module, name, label, fixed
        self._before: dict[fx.Node, fx.Node] = {}
        # what looks at a shape is used by a view, which checks it
        self._nodes: list[fx.Node] = [n for n in graph.nodes if not _looks_at_shape(n)]
        inputs = [n for n in self._nodes if n.op == "placeholder"]
        if len(inputs) > 1:
            raise Refused(f"the forward of {label} takes more than one input")
        for node in self._nodes:
            if node.op == "get_attr" and not all(_is_parameter(node, user) for user in node.users):
                raise Refused(f"the forward of {label} uses {node.target} directly")
        self._nodes = [n for n in self._nodes if n.op != "get_attr" and not _is_maximum(n)]
        self._input = inputs[0]
        self._read = {self._input}

    def steps(self) -> list[Step]:
        """All layers."""
        for node in self._nodes:  # in their order, so that the first that is none is named
            self._source(node)
        output = self._nodes[-1]
        steps = self._between(self._input, self._source(output))
        unread = [n for n in self._nodes if n not in self._read and n.op != "output"]
        if unread:
            raise self._no_chain(unread[0])
        return steps

    def _no_chain(self, node: fx.Node) -> Refused:
        return Refused(f"the forward of {self._label} is not a chain (at {node.name})")

    def _source(self, node: fx.Node) -> fx.Node:
        """The node whose value a node takes: of a sum, that which both branches begin with."""
        if node is self._input:
            return node
        if node not in self._before:
            self._before[node] = self._fork(node) if _is_sum(node) else self._first(node)
        return self._before[node]

    def _first(self, node: fx.Node) -> fx.Node:
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and _is_maximum(first):
            first = first.args[0]
        if not isinstance(first, fx.Node) or first not in self._nodes:
            raise self._no_chain(node)
        return first

    def _line(self, node: fx.Node) -> list[fx.Node]:
        """A node and all that its value comes from, without what lies within branches."""
        line = [node]
        while line[-1] is not self._input:
            line.append(self._source(line[-1]))
        return line

    def _fork(self, node: fx.Node) -> fx.Node:
        """The last value that both terms of a sum come from."""
        first, second = (self._line(a) for a in node.args if isinstance(a, fx.Node))
        return next(n for n in first if n in second)

    def _between(self, source: fx.Node, node: fx.Node) -> list[Step]:
        """The layers from one node's value to another's."""
        pieces: list[list[Step]] = []
        while node is not source:
            self._read.add(node)
            before = self._source(node)
            if _is_sum(node):
                f, g = (self._between(before, a) for a in node.args if isinstance(a, fx.Node))
                if not f:  # x + f(x)
                    f, g = g, f
                ends = [Step(layer, self._name, None) for layer in (FORK, TURN, JOIN)]
                pieces.append([ends[0], *f, ends[1], *g, ends[2]])
            else:
                pieces.append(list(self._of(node, before)))
            node = before
        return [step for piece in reversed(pieces) for step in piece]

    def _weighted(self, node: fx.Node) -> Step:
        """A function of the value and of parameters."""
        weight, bias, rest, options = _parameters(node)
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            raise Refused(f"{self._label}: a weight that is computed")
        tensors = tuple(str(n.target) for n in (weight, bias) if isinstance(n, fx.Node))
        known = dict(self._module.named_parameters(remove_duplicate=False))
        found = [known.get(path) for path in tensors]
        if any(parameter is None for parameter in found):
            raise Refused(f"{self._label}: a weight that is no parameter")
        try:
            layer = WEIGHTED[node.target](found[0], bias is not None, *rest, **options)
        except TypeError:
            raise Refused(f"{self._label}: {weight.target} with unknown arguments") from None
        return Step(layer, self._name, None, tensors, self._module)

    def _of(self, node: fx.Node, before: fx.Node) -> Iterator[Step]:
        if node.op == "call_function" and node.target in WEIGHTED:
            yield self._weighted(node)
            return
        if node.op != "call_module":
            for layer in _called(node, self._label, before):
                yield Step(layer, self._name, None)
            return
        if len(node.args) != 1 or node.kwargs:
            raise Refused(f"the forward of {self._label} calls {node.target} with more inputs")
        path = str(node.target)
        yield from walk(self._module.get_submodule(path), _join(self._name, path), self._fixed)
