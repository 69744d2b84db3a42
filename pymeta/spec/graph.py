"""A traced forward as a chain of layers.

Each call on a value is a layer or several (`_called`). A value that is read more than once is kept,
and what reads it later names it (csrc/core/layers/branches.h): sums, products and concatenations
of values, and whatever begins once more with one (`Forward`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from pymeta.spec.branches import ADD, CHANNELS, CONCATENATE, KEEP, MULTIPLY, RECALL
from pymeta.spec.joins import Join, is_cut, join_of, overwrites, part_of_cut, scale_of
from pymeta.spec.layers import (
    FLATTEN,
    FUNCTIONS,
    IDENTITY,
    METHODS,
    UNSQUEEZE,
    VIEW,
    WEIGHTED,
    Called,
    Layer,
    label_of,
)
from pymeta.spec.order import PERMUTE, SCALE
from pymeta.spec.refused import Refused


@dataclass
class Step:
    """One layer of the chain; `module` is None where the forward calls a function.

    `tensors` are names in `owner`, which is `module` where there is one. `value` is what the step
    keeps or reads of other steps' values, whatever object stands for it.
    """

    layer: Layer
    name: str
    module: nn.Module | None
    tensors: tuple[str, ...] = ()
    owner: nn.Module | None = None
    value: Any = None

    def __post_init__(self) -> None:
        self.owner = self.owner or self.module

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.layer[0] if self.module is None else label_of(self.name, self.module)


def gated_steps(name: str, dim: Any, module: nn.Module | None = None) -> Iterator[Step]:
    """Half of the channels times the sigmoid of the other half (torch's GLU)."""
    if type(dim) is not int:
        raise Refused(f"{name}: GLU along dimension {dim}")
    whole, half = object(), object()
    yield Step((KEEP, 0), name, module, value=whole)
    yield Step((CHANNELS, dim, 0, 1, 2), name, module)
    yield Step((KEEP, 0), name, module, value=half)
    yield Step((RECALL,), name, module, value=whole)
    yield Step((CHANNELS, dim, 1, 2, 2), name, module)
    yield Step(("sigmoid",), name, module)
    yield Step((MULTIPLY,), name, module, value=half)


def _is_size(node: Any, dimension: int) -> bool:
    """Whether a node is x.size(dimension) or x.shape[dimension] of some value."""
    if not _looks_at_shape(node):
        return False
    if node.op == "call_method":
        return bool(node.args[1:] == (dimension,))
    return node.target is operator.getitem and bool(node.args[1] == dimension)


def _viewed(node: fx.Node) -> tuple[Layer, ...]:
    """The layers of a view: flattened rows, of which all values have as many, in another shape."""
    shape = node.args[1:] or tuple(node.kwargs.values())
    rows, *sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
    is_whole = bool(sizes) and (sizes[0] == -1 or _is_size(sizes[0], 1))
    if _is_size(rows, 0) and is_whole and all(type(n) is int and n == 1 for n in sizes[1:]):
        return (FLATTEN, *[(UNSQUEEZE, -1)] * len(sizes[1:]))
    is_plain = all(type(n) is int and n > 0 for n in sizes)
    if (_is_size(rows, 0) or rows == -1) and is_plain and 1 <= len(sizes) <= 3:
        return (FLATTEN, (VIEW, *sizes))
    target = getattr(node.target, "__name__", node.target)
    raise Refused(f"{target}{shape} is neither a flattening of rows nor a shape for each")


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
    if is_cut(maximum):
        return (part_of_cut(node),)
    if _pools_all(node, current):
        return (_WHOLE[node.target],)
    if node.target in ("view", "reshape", torch.reshape):
        try:
            return _viewed(node)
        except Refused as refusal:
            raise Refused(f"{name}: {refusal}") from None
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


def _parameters(node: fx.Node) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    """Weight, bias and what else there is, positional or named, of a call of WEIGHTED."""
    options = dict(node.kwargs)
    given = list(node.args[1:])
    before = 1 if node.target is F.layer_norm else 0  # its shape
    weight = given.pop(before) if len(given) > before else options.pop("weight", None)
    bias = given.pop(before) if len(given) > before else options.pop("bias", None)
    return weight, bias, tuple(given), options


def _is_parameter(node: fx.Node, user: fx.Node) -> bool:
    """Whether a call takes a node as its weight, bias or scale, and as nothing else."""
    scale = scale_of(user)
    if scale is not None:
        return scale[1] is node
    if user.op != "call_function" or user.target not in WEIGHTED:
        return False
    weight, bias, *_ = _parameters(user)
    return user.all_input_nodes.count(node) == 1 and (node is weight or node is bias)


_VIEWS = ("identity", "flatten", "squeeze", UNSQUEEZE, VIEW, "part", CHANNELS, KEEP, PERMUTE)


@dataclass
class _Piece:
    """Steps in a row of the chain, and where the value that they give is read again."""

    steps: list[Step]
    value: object | None = None  # stands for that value, once something reads it


class Forward:
    """A traced forward as a chain of layers.

    A value has a place: the number of the piece of the chain that gives it. What is made of the
    value that was made last follows it in the chain; of any other one, behind a step that recalls
    it.
    """

    def __init__(
        self,
        graph: fx.Graph,
        module: nn.Module,
        name: str,
        label: str,
        walk: Callable[[nn.Module, str], Iterator[Step]],
    ) -> None:
        self._module, self._name, self._label, self._walk = module, name, label, walk
        # what looks at a shape is used by a view, which checks it
        nodes = [n for n in graph.nodes if not _looks_at_shape(n)]
        inputs = [n for n in nodes if n.op == "placeholder"]
        if len(inputs) > 1:
            raise Refused(f"the forward of {label} takes more than one input")
        for node in nodes:
            if node.op == "get_attr" and not all(_is_parameter(node, user) for user in node.users):
                raise Refused(f"the forward of {label} uses {node.target} directly")
        left_out = [n for n in nodes if n.op == "get_attr" or _is_maximum(n) or is_cut(n)]
        self._nodes = {n: i for i, n in enumerate(nodes) if n not in left_out}
        self._scales = {n: scale for n in self._nodes if (scale := scale_of(n)) is not None}
        joins = ((n, join_of(n)) for n in self._nodes if n not in self._scales)
        self._joins = {n: join for n, join in joins if join is not None}
        self._before: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._made: dict[fx.Node, list[Step]] = {}
        self._pieces = [_Piece([])]  # the first gives the input
        self._places = {inputs[0]: 0}
        self._input = inputs[0]

    def steps(self) -> list[Step]:
        """All layers."""
        for node in self._nodes:  # in their order, so that the first that is none is named
            self._values(node)
        *inner, output = self._nodes
        self._made[output] = []
        (given,) = self._values(output)
        self._make(given)
        for node in inner:  # what nobody reads, such as the last block of WaveNet's sum with its x
            self._make(node)
        self._go_to(given)
        self._check_overwritten()
        found: list[Step] = []
        for piece in self._pieces:
            found += piece.steps
            if piece.value is not None:
                found.append(Step((KEEP, 0), self._name, None, value=piece.value))
        return found

    def _no_chain(self, node: fx.Node) -> Refused:
        return Refused(f"the forward of {self._label} is not a chain (at {node.name})")

    # ---- what a node reads ----------------------------------------------------------------------

    def _values(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes whose values a node takes."""
        if node is self._input:
            return ()
        if node not in self._before:
            join = self._joins.get(node)
            values = (self._first(node),) if join is None else join.terms
            if any(value not in self._nodes for value in values):
                raise self._no_chain(node)
            self._before[node] = values
        return self._before[node]

    def _first(self, node: fx.Node) -> fx.Node:
        if node in self._scales:
            return self._scales[node][0]
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and (_is_maximum(first) or is_cut(first)):
            first = first.args[0]
        if not isinstance(first, fx.Node):
            raise self._no_chain(node)
        return first

    def _check_overwritten(self) -> None:
        """Refused where a value is read behind a call that has written over it.

        Views of a value, such as its parts, are in the same memory.
        """
        roots: dict[fx.Node, fx.Node] = {}
        lost: dict[fx.Node, fx.Node] = {}
        for node in self._nodes:
            values = self._values(node)
            for value in values:
                if roots[value] in lost:
                    raise Refused(
                        f"the forward of {self._label} reads {value.name}, which "
                        f"{lost[roots[value]].name} has written over"
                    )
            steps = self._made.get(node, [])
            is_view = bool(values) and all(s.layer[0] in _VIEWS for s in steps)
            roots[node] = roots[values[0]] if is_view and node not in self._joins else node
            acting = next((s for s in steps if s.layer[0] not in _VIEWS), None)
            if overwrites(node) or getattr(acting and acting.module, "inplace", False):
                lost[roots[values[0]]] = node

    # ---- the chain ------------------------------------------------------------------------------

    @property
    def _last(self) -> int:
        return len(self._pieces) - 1

    def _add(self, steps: list[Step]) -> int:
        self._pieces.append(_Piece(steps))
        return self._last

    def _value_at(self, place: int) -> object:
        """What stands for the value of a place, which from now on is kept."""
        piece = self._pieces[place]
        piece.value = piece.value or object()
        return piece.value

    def _reading(self, layer: Layer, place: int) -> Step:
        return Step(layer, self._name, None, value=self._value_at(place))

    def _go_to(self, node: fx.Node) -> None:
        """Let the value of a node that is made be the last one."""
        if self._places[node] != self._last:
            self._places[node] = self._add([self._reading((RECALL,), self._places[node])])

    def _make(self, node: fx.Node) -> None:
        """Make the value of a node, if nothing has."""
        line: list[fx.Node] = []
        while node not in self._places and node not in self._joins:
            line.append(node)
            node = self._values(node)[0]
        if node not in self._places:
            self._join(node, self._joins[node])
        elif line:
            self._go_to(node)
        for below in reversed(line):
            self._made[below] = list(self._of(below, self._values(below)[0]))
            self._places[below] = self._add(self._made[below])

    def _join(self, node: fx.Node, join: Join) -> None:
        """The terms one after the other, each joined to those before it as soon as it is there."""
        before = dict(self._places)
        first, *others = join.terms
        if first in self._places and any(self._root(other) is first for other in others):
            self._go_to(first)  # x + f(x): both read one place
        place = -1
        for value, factor in zip(join.terms, join.factors, strict=True):
            self._make(value)
            summand = 0.0 if join.kind else join.summand
            if (factor, summand) != (1, 0):
                self._go_to(value)
                term = self._add([Step(("affine", factor, summand), self._name, None)])
            else:
                term = self._places[value]
            place = term if place < 0 else self._joined(join, place, term)
        self._places |= before  # where this join has recalled them is its own
        self._places[node] = place
        self._made[node] = []

    def _root(self, node: fx.Node) -> fx.Node:
        """The made value that the making of a node's begins with."""
        while node not in self._places:
            node = self._values(node)[0]
        return node

    def _joined(self, join: Join, first: int, second: int) -> int:
        """Two values in one, where the last one is either of them or none."""
        if self._last not in (first, second):
            second = self._add([self._reading((RECALL,), second)])
        is_last = second != self._last  # the one that is read by its name
        other = second if is_last else first
        layer = (CONCATENATE, join.dim, is_last) if join.kind == CONCATENATE else (join.kind,)
        return self._add([self._reading(layer, other)])

    # ---- a call ---------------------------------------------------------------------------------

    def _parameter(self, node: fx.Node) -> nn.Parameter:
        try:
            return self._module.get_parameter(str(node.target))
        except AttributeError:
            raise Refused(f"{self._label}: a weight that is no parameter") from None

    def _weighted(self, node: fx.Node) -> Step:
        """A function of the value and of parameters."""
        weight, bias, rest, options = _parameters(node)
        there = [n for n in (weight, bias) if n is not None]
        if any(not isinstance(n, fx.Node) or n.op != "get_attr" for n in there):
            raise Refused(f"{self._label}: a weight that is computed")
        found = {n: self._parameter(n) for n in there}
        try:
            layer = WEIGHTED[node.target](found.get(weight), bias is not None, *rest, **options)
        except (TypeError, AttributeError):  # arguments of a kind that it does not have
            raise Refused(f"{self._label}: {node.name} with unknown arguments") from None
        except Refused as refusal:
            raise Refused(f"{self._label}: {refusal}") from None
        tensors = tuple(str(n.target) for n in there)
        return Step(layer, self._name, None, tensors, self._module)

    def _scaled(self, parameter: fx.Node) -> Step:
        """The value times a parameter, along the last axis."""
        found = self._parameter(parameter)
        if found.ndim != 1:
            shape = list(found.shape)
            raise Refused(f"{self._label}: a factor {parameter.target} of shape {shape}")
        return Step((SCALE, len(found)), self._name, None, (str(parameter.target),), self._module)

    def _is_expansion(self, node: fx.Node) -> bool:
        """Whether a value is expanded to what it is then added to or multiplied by."""
        if (node.op, node.target) != ("call_method", "expand_as") or len(node.args) != 2:
            return False
        joins = [self._joins.get(user) for user in node.users]
        return all(
            join is not None and join.kind in (ADD, MULTIPLY) and node.args[1] in join.terms
            for join in joins
        )

    def _of(self, node: fx.Node, before: fx.Node) -> Iterator[Step]:
        if node.op == "call_function" and node.target in WEIGHTED:
            yield self._weighted(node)
            return
        if node in self._scales:
            yield self._scaled(self._scales[node][1])
            return
        if node.op == "call_function" and node.target is F.glu:
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
            yield from gated_steps(self._label, dim)
            return
        if self._is_expansion(node):
            yield Step(IDENTITY, self._name, None)
            return
        if node.op != "call_module":
            for layer in _called(node, self._label, before):
                yield Step(layer, self._name, None)
            return
        if len(node.args) != 1 or node.kwargs:
            raise Refused(f"the forward of {self._label} calls {node.target} with more inputs")
        path = str(node.target)
        yield from self._walk(
            self._module.get_submodule(path), f"{self._name}.{path}" if self._name else path
        )
