"""The layers of a model in the order of their use: by walking it, or tracing its forward.

`walk(model, ...)` goes through an `nn.Sequential` (nested ones too), and traces any other module's
forward with torch.fx: a chain of known layers, in which what reads an earlier value once more names
it (csrc/core/layers/branches.h). `Refused` says which layer or construct is in the way.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import fx, nn

from pymeta.spec.graph import Forward, Step, gated_steps
from pymeta.spec.layers import is_known, layer_of, parts_of
from pymeta.spec.modules import Fixed
from pymeta.spec.refused import Refused
from pymeta.spec.watch import hooked


def is_sequential(module: nn.Module) -> bool:
    """Whether a module's forward is nn.Sequential's."""
    return type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def walk(module: nn.Module, name: str, fixed: Fixed) -> Iterator[Step]:
    """The layers of a module, in the order of their use."""
    if is_known(module):
        if isinstance(module, nn.GLU):
            layer_of(name, module)  # hooks, and a forward of its own
            yield from gated_steps(name, module.dim, module)
            return
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


class _Value(fx.Proxy):
    """A traced value, of which `a += b` is another call than `a = a + b`: it writes over a."""

    def _overwritten(self, function: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._overwritten(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._overwritten(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._overwritten(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._overwritten(operator.itruediv, other)


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

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        return is_known(m) or is_sequential(m) or super().is_leaf_module(m, qualname)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
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
        with untouched(module):
            graph = _Tracer().trace(module)
    except Exception as error:  # a stranger's forward may raise anything when traced
        raise Refused(f"the forward of {label} cannot be traced ({type(error).__name__})") from None
    try:
        found = Forward(graph, module, name, label, lambda m, path: walk(m, path, fixed)).steps()
    except Refused:
        with suppress(Refused):
            yield from _first_steps(graph, module, name, fixed)
        raise
    yield from found


def _first_steps(graph: fx.Graph, module: nn.Module, name: str, fixed: Fixed) -> Iterator[Step]:
    """Of a forward that is no chain, the module that it begins with: it says what rows it takes."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    readers = [node for node in graph.nodes if node.args and node.args[0] in inputs[:1]]
    if readers and readers[0].op == "call_module":
        path = str(readers[0].target)
        yield from walk(module.get_submodule(path), _join(name, path), fixed)
