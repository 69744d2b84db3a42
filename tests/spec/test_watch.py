"""Whether something has changed: the native pass and its twin in Python say the same."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pymeta import native
from pymeta.spec import watch
from pymeta.spec.watch import Watch

TWINS = {"native": native.extension().unchanged, "python": watch._unchanged_in_python}


class Own(dict):
    """A dictionary with a way of its own to look things up."""

    def __getitem__(self, key: Any) -> Any:
        return dict.__getitem__(self, key)["inside"]


def make() -> tuple[nn.Sequential, dict[str, Any], Watch]:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    model[1].register_forward_hook(lambda *_: None)
    place = {"seen": object(), "gone": 1}
    places = [(place, "seen"), (place, "gone")]
    places += [(m._parameters, name) for m in model for name in m._parameters]
    return model, place, Watch(places, list(model.modules()), [model])


def is_there(found: Watch, unchanged: Callable[..., bool]) -> bool:
    return unchanged(found._places, found._truths, found._lengths, found._types, found._orders)


def another_order(model: nn.Sequential) -> None:
    first = model._modules.pop("0")
    model._modules["0"] = first  # the same objects under the same names


CHANGES: dict[str, Callable[[nn.Sequential, dict[str, Any]], Any]] = {
    "an object": lambda m, place: place.update(seen=object()),
    "an equal object": lambda m, place: place.update(gone=1.0),
    "one deleted": lambda m, place: place.pop("gone"),
    "a parameter": lambda m, place: setattr(m[0], "bias", nn.Parameter(torch.zeros(3))),
    "a module": lambda m, place: m.__setitem__(1, nn.ReLU()),
    "one more": lambda m, place: m.append(nn.ReLU()),
    "another order": lambda m, place: another_order(m),
    "a hook": lambda m, place: m[2].register_forward_hook(lambda *_: None),
    "no hook": lambda m, place: m[1]._forward_hooks.clear(),
    "an attribute": lambda m, place: setattr(m[0], "forward", None),
    "a class": lambda m, place: setattr(m[1], "__class__", nn.Tanh),
    "no hooks at all": lambda m, place: m[0].__dict__.pop("_forward_hooks"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("twin", TWINS)
def test_each_change_is_seen(twin, change):
    model, place, found = make()
    assert is_there(found, TWINS[twin])
    CHANGES[change](model, place)
    assert not is_there(found, TWINS[twin])


@pytest.mark.parametrize("twin", TWINS)
def test_what_does_not_count_is_not_seen(twin):
    model, place, found = make()
    place["more"] = 1  # at no place that is watched
    with torch.no_grad():
        model[0].weight.fill_(2)  # a value
    model[1].register_forward_hook(lambda *_: None)  # there are some still
    assert is_there(found, TWINS[twin])


@pytest.mark.parametrize("twin", TWINS)
def test_dictionaries_of_other_classes(twin):
    unchanged, key = TWINS[twin], object()
    ordered, own = OrderedDict(a=key, b=2), Own(a={"inside": key})
    places = (ordered, "a", key, own, "a", key)
    assert unchanged(places, (), (), (), (ordered, ["a", "b"]))
    assert not unchanged((own, "a", dict.__getitem__(own, "a")), (), (), (), ())
    ordered.move_to_end("a")
    assert unchanged(places, (), (), (), ())
    assert not unchanged((), (), (), (), (ordered, ["a", "b"]))


def test_wrong_arguments_raise():
    unchanged = TWINS["native"]
    for wrong in ([], 3, None):
        with pytest.raises(TypeError, match="places"):
            unchanged(wrong, (), (), (), ())
    with pytest.raises(ValueError, match="places: expected a multiple of 3 entries, got 2"):
        unchanged(({}, 1), (), (), (), ())
    with pytest.raises(ValueError, match="orders: expected a multiple of 2 entries, got 1"):
        unchanged((), (), (), (), ({},))
    for places in (({}, [], None), (3, "a", None), (None, None, None)):
        with pytest.raises(TypeError):
            unchanged(places, (), (), (), ())
    with pytest.raises(TypeError):
        unchanged((), (), (3, 0), (), ())
    with pytest.raises(TypeError):
        unchanged((), (), (), (), (3, []))


def test_an_error_of_an_object_is_passed_on():
    class Unsure:
        def __bool__(self) -> bool:
            raise RuntimeError("unsure")

    for unchanged in TWINS.values():
        with pytest.raises(RuntimeError, match="unsure"):
            unchanged((), ({"a": Unsure()}, "a", True), (), (), ())


def test_it_holds_nothing_that_the_collector_cannot_see():
    """The native pass keeps no reference, nor does it lose one."""
    import sys

    value, place = object(), {}
    place["a"] = value
    arguments = ((place, "a", value), (place, "a", True), (place, 1), (value, object), ())
    before = [sys.getrefcount(v) for v in (value, place, object)]
    for _ in range(100):
        assert TWINS["native"](*arguments)
    assert [sys.getrefcount(v) for v in (value, place, object)] == before


def test_whether_an_attribute_is_true():
    any_true, names = native.extension().any_true, ("first", "last")
    objects = [types.SimpleNamespace(first=None, last=[]) for _ in range(3)]
    assert any_true(objects, names) is False
    assert any_true([], names) is False
    objects[2].last.append(0)
    assert any_true(objects, names) is True
    assert any_true(tuple(objects), ("first",)) is False
    with pytest.raises(AttributeError, match="other"):
        any_true(objects, ("other",))
    with pytest.raises(TypeError):
        any_true(objects, (7,))
    with pytest.raises(TypeError):
        any_true(7, names)
