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

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pymeta import native
from pymeta.spec.attributes import Attributes
from pymeta.spec.branches import CHANNELS, KEEP, READERS, Kept, channels
from pymeta.spec.chain import is_sequential, walk
from pymeta.spec.graph import Step
from pymeta.spec.layers import (
    FLATTEN,
    IDENTITY,
    SLOTS,
    SQUEEZE,
    UNSQUEEZE,
    VIEW,
    Layer,
    axes_of,
    is_known,
    known,
    label_of,
)
from pymeta.spec.misfit import asks_for_axes, misfit
from pymeta.spec.modules import Fixed, running_statistics
from pymeta.spec.order import PERMUTE, SCALE, Order, first, is_of_channels, permuted
from pymeta.spec.order import check as check_order
from pymeta.spec.refused import Refused
from pymeta.spec.show import counted
from pymeta.spec.slices import PART, resolve, takes_one
from pymeta.spec.watch import Place, Watch


@dataclass(frozen=True)
class Unsupported:
    """The native core cannot run this model; `reason` says why, `watch` until when.

    `row_shape` is the shape of rows for which it cannot, where that may be why; `by_shape`: whether
    there is more to say once it is known. `misfit` says why torch cannot run such rows either; None
    where it may.
    """

    reason: str
    watch: Watch = field(repr=False, compare=False)
    row_shape: tuple[int, ...] | None = None
    by_shape: bool = False
    misfit: str | None = None


@dataclass(frozen=True)
class Unshaped(Unsupported):
    """A chain that can be described once the shape of its rows is known."""

    by_shape: bool = True


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
        norms: the modules of the batch normalisations that go by the statistics of sets, in the
            order in which the native core gives these.
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
    norms: tuple[nn.Module, ...]
    watch: Watch = field(repr=False, compare=False)


def _settings(layers: Iterable[nn.Module]) -> list[Place]:
    """Where known layers have what they are described by."""
    places: list[Place] = []
    for m in layers:
        names = (*known(m).reads, "inplace")
        places += [(m.__dict__, name) for name in names if name in m.__dict__]
        places += [(d, k) for d in (m._parameters, m._buffers) for k in d if k in SLOTS]
    return places


def _watched(layers: list[nn.Module], holders: list[nn.Module], traced: list[nn.Module]) -> Watch:
    """What known layers, the modules that hold them, and traced ones among these depend on."""
    attributes = [Attributes(m) for m in traced]
    places = _settings(layers)
    places += [place for a in attributes for place in a.places]
    places += [(m._parameters, name) for m in holders for name in m._parameters]
    ordered = [container for a in attributes for container in a.ordered]
    sized = [container for a in attributes for container in a.sized]
    # a parameter or a child more is no part of a chain
    sized += [m._parameters for m in layers + holders] + [m._modules for m in layers]
    return Watch(places, layers + holders, holders, ordered=ordered, sized=sized)


def _all_of(model: nn.Module) -> Watch:
    """All that a refusal may have been judged by.

    Modules of torch's that are no known layers were judged by their class alone. What they keep
    may change with each call.
    """
    layers = [m for m in model.modules() if is_known(m)]
    holders = [m for m in model.modules() if not is_known(m)]
    own = [m for m in holders if not type(m).__module__.startswith("torch.nn.")]
    children = [(m._modules, name) for m in layers for name in m._modules]
    modes = [(m.__dict__, "training") for m in model.modules()]
    return _watched(layers, holders, own).and_also([*children, *modes], [])


def _chain(leaves: Iterable[nn.Module], containers: Iterable[nn.Module]) -> Watch:
    """What a chain depends on in its layers, and in the modules that hold them."""
    layers, holders = list({id(m): m for m in leaves}.values()), list(containers)
    return _watched(layers, holders, [m for m in holders if not is_sequential(m)])


# ---- the whole --------------------------------------------------------------------------------


def _tensor(module: nn.Module | None, path: str) -> Any:
    """A parameter or buffer of a module, None where it has none of that name."""
    assert module is not None
    owner, _, key = path.rpartition(".")
    holder = module.get_submodule(owner)
    found = holder._parameters.get(key)
    return holder._buffers.get(key) if found is None else found


def _parameter_names(steps: list[Step], model: nn.Module, fixed: Fixed) -> tuple[str, ...]:
    """The chain's tensors in its order: each of the model's parameters exactly once.

    Running statistics that are used are among them.
    """
    known = {id(p): n for n, p in model.named_parameters()}
    constants = {id(b): n for n, b in running_statistics(model, fixed).items()}
    names: list[str] = []
    for step in steps:
        for path in step.tensors:
            tensor = _tensor(step.owner, path)
            if tensor is not None:
                names.append(known[id(tensor)] if id(tensor) in known else constants[id(tensor)])
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise Refused(f"parameter {twice} is used more than once")
    unused = [n for n in known.values() if n not in set(names)]
    if unused:
        raise Refused(f"parameter {unused[0]} is not part of the chain")
    return tuple(names)


def _network(layers: tuple[Layer, ...], steps: list[Step], shaped: bool) -> Any:
    """The native Network of the layers; Refused where it does not run them.

    `shaped`: whether they are for the rows of a call, which may be what does not fit.
    """
    missing = native.missing()
    if missing is not None:
        raise Refused(missing)
    try:
        return native.extension().Network(layers)
    except ValueError as error:
        if not shaped:
            _check_widths(steps)
        raise Refused(str(error)) from None


_MISFIT = re.compile(
    r"layers: layer \d+ takes ([\d x]+) features, the one before it gives ([\d x]+)"
)


def _as_torch(shape: str, sequence: bool) -> list[int]:
    """A text such as "4 x 5 x 3", of height, width and channels, in torch's order."""
    *sizes, channels = map(int, shape.split(" x "))
    return [channels, *(sizes[1:] if sequence else sizes)]


def _may_be_positions(before: list[Step], takes: str, gives: str) -> bool:
    """Whether a layer may get so many features of rows with positions, by the Flatten before it.

    Such as nn.Linear(5, 3), nn.Flatten(), nn.Linear(12, 1) of rows [4, 5].
    """
    acting = [step.layer == FLATTEN for step in before if step.layer != IDENTITY]
    return True in acting[1:] and int(takes) % int(gives) == 0


def _check_widths(steps: list[Step]) -> None:
    """ValueError where a layer takes another number of features, or shape, than it is given.

    That is no reason to fall back: torch cannot run such a model either. (With positions it may,
    where a linear layer is meant for the last axis alone; then `_shaped` refuses.)
    """
    for k, step in enumerate(steps):
        try:
            native.extension().Network(tuple(_shaped(steps[: k + 1], None, whole=False)))
        except (ValueError, Refused) as error:
            found = _MISFIT.fullmatch(str(error))
            if found is None or step.module is None:
                continue
            givers = [
                label_of(s.name, s.module)
                for s in steps[:k]
                if s.module not in (None, step.module) and any(True for _ in s.module.parameters())
            ]
            giver = givers[-1] if givers else "a row"
            label = label_of(step.name, step.module)
            if step.layer[0] == "elementwise_affine":
                takes, gives = (_as_torch(shape, step.layer[2] == 0) for shape in found.groups())
                raise ValueError(
                    f"model: {label} takes rows of shape {takes}, but {giver} gives {gives}"
                ) from None
            if " x " not in found[0] and not _may_be_positions(steps[:k], *found.groups()):
                raise ValueError(
                    f"model: {label} takes {counted(int(found[1]), 'feature')}, but {giver} gives "
                    f"{found[2]}"
                ) from None


def _norms(steps: list[Step]) -> tuple[nn.Module, ...]:
    """The modules of the batch normalisations that go by the statistics of sets."""
    kinds = ("batch_norm", "step_batch_norm")
    return tuple(s.module for s in steps if s.layer[0] in kinds and s.module is not None)


def _image(row_shape: tuple[int, ...]) -> Layer:
    if len(row_shape) not in (2, 3):
        cure = f" (x.view(-1, 1, {row_shape[0]}) makes these)" if len(row_shape) == 1 else ""
        raise Refused(
            f"rows of shape {list(row_shape)}; expected [channels, length]{cure} or "
            f"[channels, height, width]"
        )
    channels, *sizes = row_shape
    return ("image", channels, *(sizes if len(sizes) == 2 else (0, *sizes)))  # 0: a sequence


def _features(steps: list[Step]) -> int:
    """The features that a chain takes, as its first layer with parameters says; 0: unknown."""
    for step in steps:
        if step.tensors and len(step.layer) > 1 and type(step.layer[1]) is int:
            return int(step.layer[1])
    return 0


def _width(layers: list[Layer]) -> int:
    """How many features a row has behind layers; 0: unknown."""
    missing = native.missing()
    if missing is not None:
        raise Refused(missing)
    try:
        return int(native.extension().Network(tuple(layers)).out_features)
    except ValueError:
        return 0


def _squeezed(dims: tuple[int, ...], axes: int, layers: list[Layer]) -> int:
    """How many axes of positions a squeeze takes away; Refused where they may be several."""
    kind, *sizes = layers[-1]
    pooled = kind.startswith("global_") or (kind.startswith("adaptive_") and set(sizes) == {1})
    pooled = pooled or (kind == "slice" and takes_one(layers[-1]))
    found = {d if d > 0 else d + axes + 2 for d in dims}
    if not pooled or not found <= set(range(2, axes + 2)):
        raise Refused(f"a squeeze of dimension {', '.join(map(str, dims))}")
    return len(found)


def _axes_behind(step: Step, axes: int) -> int:
    """How many axes of positions rows have behind a layer that got them with `axes`."""
    if step.layer[0] == "unflatten":
        assert isinstance(step.module, nn.Unflatten)
        return len(step.module.unflattened_size) - 1
    return 0 if step.layer == FLATTEN else axes


def _check_axes(step: Step, order: Order) -> None:
    wanted, axes = axes_of(step.layer, step.module), len(order) - 2
    check_order(step.layer, order, step.label)
    if step.layer[0] == PERMUTE or is_of_channels(step.layer, order):
        return
    if wanted is not None and axes not in wanted:
        if step.layer[0] == SQUEEZE and axes == 0:
            raise Refused("a squeeze of features; leave outputs [rows, 1], targets may be [rows]")
        got = "one axis of features" if axes == 0 else f"{counted(axes, 'axis')} of positions"
        raise Refused(f"{step.label} does not take rows with {got}")


class _Shaping:
    """The native layers of steps, for rows with so many axes of positions at first."""

    def __init__(self, layers: list[Layer], axes: int) -> None:
        self.layers, self._order = layers, first(axes)
        self._kept = Kept()
        self._put_in = 0  # the axes of one position that were, one after the other

    @property
    def axes(self) -> int:
        """How many axes of positions rows have by now."""
        return len(self._order) - 2

    @axes.setter
    def axes(self, axes: int) -> None:  # by layers that take no other order
        if axes != self.axes:
            self._order = first(axes)

    def add(self, step: Step, features: int) -> None:
        """The next step; `features` are those of a row, where they are known."""
        layer = step.layer
        _check_axes(step, self._order)
        put_in, self._put_in = self._put_in, 0
        if layer[0] == KEEP:
            self._kept.keep(step.value, self._order)
            self.layers.append(layer if self.layers else (KEEP, features))
        elif layer[0] in READERS:
            found, self._order = self._kept.read(layer, step.value, self._order)
            self.layers.append(found)
        elif layer[0] == CHANNELS:
            self.layers.append(channels(layer, self._order))
        elif layer[0] == PERMUTE:
            self._order = permuted(layer, self._order)
        elif layer[0] == SCALE:
            self.layers.append(("scale_shift", layer[1], True, False, 0))
        elif layer[0] == SQUEEZE:
            self.axes -= _squeezed(layer[1:], self.axes, self.layers)
            if self.axes == 0:
                self.layers.append(FLATTEN)
        elif layer[0] == UNSQUEEZE:
            self._put_axis_in(layer[1], put_in)
        elif layer[0] == VIEW:
            self._view(layer[1:], features)
        elif layer[0] == PART:
            found_layers, left = resolve(layer, self.axes)
            self.layers += [*found_layers, FLATTEN] if left < self.axes == 1 else found_layers
            self.axes = left
        else:
            if layer != IDENTITY and (layer != FLATTEN or self.axes):
                self.layers.append(layer)
            self.axes = _axes_behind(step, self.axes)

    def _put_axis_in(self, dim: int, put_in: int) -> None:
        """Of one position: behind features, or behind such an axis."""
        if self.axes != put_in or put_in == 2 or dim not in (2, self.axes + 2, -1):
            raise Refused(f"an axis put in at dimension {dim} of rows with {self.axes + 1} axes")
        self.axes += 1
        self._put_in = self.axes

    def _view(self, sizes: tuple[int, ...], features: int) -> None:
        """Of features, which have to be as many: torch would make other rows of more or fewer."""
        if len(sizes) > 1:  # its layer knows how many it takes
            self.layers.append(("unflatten", sizes[0], *([1] * (3 - len(sizes))), *sizes[1:]))
        elif math.prod(sizes) != (_width(self.layers) if self.layers else features):
            raise Refused(f"a view as rows of {sizes[0]} of rows with another number of features")
        self.axes = len(sizes) - 1


def _shaped(
    steps: list[Step], row_shape: tuple[int, ...] | None, whole: bool = True
) -> list[Layer]:
    """The layers for rows of a shape, or of one axis; Refused where a layer does not take them.

    `whole`: whether they are all that there are, so that rows of features have to come out.
    """
    first: list[Layer] = [] if row_shape is None else [_image(row_shape)]
    shaping = _Shaping(first, 0 if row_shape is None else len(row_shape) - 1)
    for i, step in enumerate(steps):
        shaping.add(step, 0 if shaping.layers else _features(steps[i:]))
    if shaping.axes and whole:
        raise Refused("its output has positions besides features: flatten it")
    return shaping.layers


def _takes_positions(steps: list[Step]) -> bool:
    """Whether the chain itself takes rows with positions, so that it has to know their shape."""
    for step in steps:
        axes = axes_of(step.layer, step.module)
        if step.layer[0] in ("unflatten", VIEW) or axes == (0,):
            return False
        if axes is not None and 0 not in axes:
            return True
    return False


def _flattens_positions(steps: list[Step]) -> bool:
    """Whether a Flatten follows layers of either kind of rows, and fits those with positions alone.

    Such as nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(24, 1).
    """
    seen = False
    for step in steps:
        if step.layer == FLATTEN:
            break
        if step.layer != IDENTITY:
            seen = True
            if axes_of(step.layer, step.module) == (0,) or step.layer[0] == "unflatten":
                return False
    else:
        return False
    if not seen or native.missing() is not None:
        return False
    try:
        native.extension().Network(tuple(_shaped(steps, None)))
    except ValueError:
        return True
    return False


def _described(
    model: nn.Module, steps: list[Step], row_shape: tuple[int, ...] | None, fixed: Fixed
) -> Description | Unshaped:
    names = _parameter_names(steps, model, fixed)
    spatial = _takes_positions(steps)
    if not spatial and (row_shape is None or len(row_shape) > 1):
        spatial = _flattens_positions(steps)
    if spatial and row_shape is None:
        return Unshaped(
            "the shape of its rows, [channels, height, width], is known with the first call",
            _of_a_chain(steps, model),
        )
    layers = _shaped(steps, row_shape if spatial else None)
    network = _network(tuple(layers), steps, row_shape is not None)
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
        norms=_norms(steps),
        watch=_of_a_chain(steps, model),
    )


def _of_a_chain(steps: list[Step], model: nn.Module) -> Watch:
    return _chain(
        [s.module for s in steps if s.module is not None],
        [m for m in model.modules() if not is_known(m)],
    )


def describe(
    model: nn.Module, row_shape: tuple[int, ...] | None = None, fixed: Fixed = None
) -> Description | Unsupported:
    """The chain of layers a model is, or the reason why the native core cannot run it.

    `row_shape` is the shape of a row of its input, which matters where the rows have positions.
    `fixed` names the normalisations that use running statistics; None: those in eval mode do.

    Raises:
        ValueError: a layer takes another number of features than the one before it gives.
    """
    steps: list[Step] = []
    whole = False
    try:
        for step in walk(model, "", fixed):
            steps.append(step)
        whole = True
        return _described(model, steps, row_shape, fixed)
    except Refused as refusal:
        reason = str(refusal)
    odd = None if row_shape is None else misfit(model, steps, row_shape, whole)
    return Unsupported(reason, _all_of(model), row_shape, whole or asks_for_axes(steps), odd)
