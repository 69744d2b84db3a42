"""Whether something has changed since it was examined: one answer for models, plans and calls.

A `Watch` holds the objects that were found at some places (a parameter in a module's `_parameters`,
an attribute in its `__dict__`), and the form of some tensors. It is current as long as each place
has the same object, no module has got an attribute, a child or a hook more, and the tensors have
the same form. That is asked before every native call, which may itself take a few microseconds;
so it is no walk, but a few passes over prepared lists. Values are not its business.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, TypeAlias

from torch import Tensor, nn

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
    """

    __slots__ = ("_about", "_alike", "_found")

    def __init__(self, tensors: Sequence[Tensor], there: bool = False) -> None:
        """Note it; RuntimeError where a tensor's layout has no such form."""
        self._about = _there if there else _here
        self._found = self._of(tensors)
        self._alike = _guard(tensors)

    def _of(self, ts: Sequence[Tensor]) -> list[Any]:
        # four passes in C are quicker than one of comprehension
        return [*map(self._about, ts), *map(_contiguous, ts), *map(_negated, ts), *map(_zero, ts)]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether so many other tensors have the same form; may raise as the constructor does."""
        return self._alike(*tensors) or self._of(tensors) == self._found


def _never(*_: Tensor) -> bool:
    return False


def _guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """What tells in one call that tensors are exactly alike, by torch.compile's own means.

    It asks for more than a `Form` (strides that do not matter, the mode of the moment), so that a
    no is none; where this torch has nothing of the kind, it always says no.
    """
    try:
        guards: Any = import_module("torch._C._dynamo.guards")
        options = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}
        check: Callable[..., bool] = guards.TensorGuards(*tensors, **options).check
        return check if check(*tensors) else _never
    except Exception:  # it is private to torch, and may be anything
        return _never


def _columns(places: Sequence[Place]) -> tuple[list[dict[str, Any]], list[str]]:
    return [place for place, _ in places], [key for _, key in places]


class Watch:
    """The objects at some places, the modules around them, and the forms of some tensors."""

    def __init__(
        self,
        places: Iterable[Place] = (),
        modules: Sequence[nn.Module] = (),
        holders: Sequence[nn.Module] = (),
        counted: bool = True,
    ) -> None:
        """Note what is there now.

        Args:
            places: of objects.
            modules: whose hooks and class count, and whose number of attributes where `counted`.
            holders: of those, the modules whose children count.
            counted: whether one attribute more is a change: a forward of its own, say.
        """
        found = [*places, *((m._modules, name) for m in holders for name in m._modules)]
        self._places = [place for place, _ in found]
        self._keys = [key for _, key in found]
        self._objects = [place[key] for place, key in found]
        # Whatever dictionary a module has for hooks now, none may be in it, or some still.
        hooks = [(m.__dict__, name) for m in modules for name in HOOKS]
        self._free = _columns([place for place in hooks if not place[0][place[1]]])
        self._taken = _columns([place for place in hooks if place[0][place[1]]])
        self._modules = list(modules)
        self._types = list(map(type, modules))
        self._attributes = [m.__dict__ for m in modules] if counted else []
        self._counts = list(map(len, self._attributes))
        self._children = [m._modules for m in holders]
        self._order = list(map(list, self._children))
        self.tensors: list[Tensor] = []
        self._form = Form(self.tensors)

    def and_also(
        self, places: Iterable[Place], tensors: Sequence[Tensor], there: bool = False
    ) -> Watch:
        """A copy that watches more places and tensors; `there`: distinguish devices of one type."""
        other = object.__new__(Watch)
        other.__dict__.update(self.__dict__)
        known = {(id(place), key) for place, key in zip(self._places, self._keys, strict=True)}
        more = [(place, key) for place, key in places if (id(place), key) not in known]
        other._places = [*self._places, *(place for place, _ in more)]
        other._keys = [*self._keys, *(key for _, key in more)]
        other._objects = [*self._objects, *(place[key] for place, key in more)]
        other.tensors = [*self.tensors, *tensors]
        other._form = Form(other.tensors, there)
        return other

    def is_current(self) -> bool:
        """Whether all of it is still there, in the same form, and nothing was added."""
        return self.is_there() and self._form.fits(self.tensors)

    def is_there(self) -> bool:
        """As `is_current`, without a look at the tensors' forms."""
        now = map(operator.getitem, self._places, self._keys)
        try:
            same = all(map(operator.is_, now, self._objects))
        except KeyError:  # something was deleted
            return False
        return (
            same
            and not any(map(operator.getitem, *self._free))
            and all(map(operator.getitem, *self._taken))
            and list(map(len, self._attributes)) == self._counts
            and list(map(type, self._modules)) == self._types
            and list(map(list, self._children)) == self._order
        )
