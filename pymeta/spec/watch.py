"""Whether something has changed since it was examined: one answer for models, plans and calls.

A `Watch` holds the objects that were found at some places (a parameter in a module's `_parameters`,
an attribute in its `__dict__`), and the form of some tensors. It is current as long as each place
has the same object, no module has got an attribute, a child or a hook more, and the tensors have
the same form. That is asked before every native call, which may itself take a few microseconds;
so it is no walk, but one native pass over prepared tuples. Values are not its business.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pymeta import native

Place: TypeAlias = tuple[dict[str, Any], str]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks."""
    return any(module.__dict__[hooks] for hooks in HOOKS)


_here = operator.attrgetter("shape", "dtype", "is_cpu", "requires_grad")
_there = operator.attrgetter("shape", "dtype", "device", "requires_grad")
_contiguous, _negated, _zero = Tensor.is_contiguous, Tensor.is_neg, Tensor._is_zerotensor


class Form:
    """All about some tensors but their values, by which others are found to be like them.

    Of their devices, whether it is the CPU; `there`: the devices themselves.

    Attributes:
        alike: tells in one call whether other tensors, one after another, are exactly like them;
            where it says no, `fits` knows.
    """

    __slots__ = ("_about", "_found", "alike")

    def __init__(self, tensors: Sequence[Tensor], there: bool = False) -> None:
        """Note it; RuntimeError where a tensor's layout has no such form."""
        self._about = _there if there else _here
        self._found = self._of(tensors)
        self.alike = exactly_like(tensors)

    def _of(self, ts: Sequence[Tensor]) -> list[Any]:
        # four passes in C are quicker than one of comprehension
        return [*map(self._about, ts), *map(_contiguous, ts), *map(_negated, ts), *map(_zero, ts)]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether so many other tensors have the same form; may raise as the constructor does."""
        return self.alike(*tensors) or self._of(tensors) == self._found


def _never(*_: Tensor) -> bool:
    return False


def exactly_like(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """What tells in one call that tensors are exactly alike, by torch.compile's own means.

    It asks for more than a `Form` (strides that do not matter, the mode of the moment), so that a
    no is none; where this torch has nothing of the kind, it always says no. What is no tensor is
    not like one.
    """
    try:
        core: Any = torch._C
        options = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}
        check: Callable[..., bool] = core._dynamo.guards.TensorGuards(*tensors, **options).check
        return check if check(*tensors) else _never
    except Exception:  # it is private to torch, and may be anything
        return _never


def _unchanged_in_python(
    places: tuple[Any, ...],
    truths: tuple[Any, ...],
    lengths: tuple[Any, ...],
    types: tuple[Any, ...],
    orders: tuple[Any, ...],
) -> bool:
    """What the native `unchanged` does (`csrc/bind/watch.cpp`), where there is no extension."""
    try:
        return (
            all(place[key] is there for place, key, there in _by(3, places))
            and all(bool(place[key]) is is_true for place, key, is_true in _by(3, truths))
            and all(len(container) == length for container, length in _by(2, lengths))
            and all(type(module) is its for module, its in _by(2, types))
            and all(list(children) == order for children, order in _by(2, orders))
        )
    except LookupError:  # something was deleted
        return False


def _by(size: int, flat: tuple[Any, ...]) -> Iterable[tuple[Any, ...]]:
    return zip(*(flat[i::size] for i in range(size)), strict=True)


_unchanged: Callable[..., bool] = (
    _unchanged_in_python if native.missing() else native.extension().unchanged
)


def _flat(groups: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(chain.from_iterable(groups))


class Watch:
    """The objects at some places, the modules around them, and the forms of some tensors.

    All is in flat tuples, as `_unchanged` reads them: a dictionary, a key, the object that was
    there, then the next dictionary.
    """

    def __init__(
        self,
        places: Iterable[Place] = (),
        modules: Sequence[nn.Module] = (),
        holders: Sequence[nn.Module] = (),
        counted: bool = True,
        ordered: Iterable[list[Any] | dict[Any, Any]] = (),
        sized: Iterable[list[Any] | dict[Any, Any]] = (),
    ) -> None:
        """Note what is there now.

        Args:
            places: of objects.
            modules: whose hooks and class count, and whose number of attributes where `counted`.
            holders: of those, the modules whose children count.
            counted: whether one attribute more is a change: a forward of its own, say.
            ordered: lists whose entries count, as far as they are equal, and dictionaries whose
                keys do.
            sized: those of which only the length counts.
        """
        found = [*places, *((m._modules, name) for m in holders for name in m._modules)]
        self._places = _flat((place, key, place[key]) for place, key in found)
        # Whatever dictionary a module has for hooks now, none may be in it, or some still.
        hooks = [(m.__dict__, name) for m in modules for name in HOOKS]
        self._truths = _flat((place, name, bool(place[name])) for place, name in hooks)
        self._types = _flat((m, type(m)) for m in modules)
        counts = [*(m.__dict__ for m in modules if counted), *sized]
        self._lengths = _flat((container, len(container)) for container in counts)
        orders = [*(m._modules for m in holders), *ordered]
        self._orders = _flat((container, list(container)) for container in orders)
        self.tensors: list[Tensor] = []
        self._form = Form(self.tensors)
        self._look()

    def _look(self) -> None:
        # As `is_current`, without a look at the tensors' forms.
        all_of_it = self._places, self._truths, self._lengths, self._types, self._orders
        self.is_there: Callable[[], bool] = partial(_unchanged, *all_of_it)

    def and_also(
        self, places: Iterable[Place], tensors: Sequence[Tensor], there: bool = False
    ) -> Watch:
        """A copy that watches more places and tensors; `there`: distinguish devices of one type."""
        other = object.__new__(Watch)
        other.__dict__.update(self.__dict__)
        known = {(id(place), key) for place, key, _ in _by(3, self._places)}
        more = [(place, key) for place, key in places if (id(place), key) not in known]
        other._places = (*self._places, *_flat((place, key, place[key]) for place, key in more))
        other.tensors = [*self.tensors, *tensors]
        other._form = Form(other.tensors, there)
        other._look()
        return other

    def is_current(self) -> bool:
        """Whether all of it is still there, in the same form, and nothing was added."""
        return self.is_there() and self._form.fits(self.tensors)
