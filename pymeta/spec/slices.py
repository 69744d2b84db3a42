"""Parts of the positions of rows, as forwards take them: `x[:, :, :-4]`, `x[..., -1]`, `select`.

When a forward is traced it is not known yet how many axes its values have. So a part is written as
the layer (PART, items), with an item for each axis of the index, or (PART, item, dimension); and
`resolve` makes the native core's ("slice", ...) of it where the axes are known. An item is an
integer, (first, end, step) of a slice, or ELLIPSIS.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from pymeta.spec.refused import Refused

PART = "part"
ELLIPSIS = "..."
ALL = (None, None, None)
_END = 2**24  # beyond every last position: the most that the native core takes

Layer: TypeAlias = tuple[Any, ...]


def _item(index: Any) -> Any:
    if index is Ellipsis:
        return ELLIPSIS
    if type(index) is int:
        return index
    if isinstance(index, slice):
        ends = (index.start, index.stop, index.step)
        if all(v is None or type(v) is int for v in ends):
            return ends
        raise Refused("a slice whose ends are not plain numbers")
    raise Refused(f"an index that is a {type(index).__name__}")


def of_index(index: Any) -> Layer | tuple[Layer, ...]:
    """Of `x[index]`."""
    given = index if isinstance(index, tuple) else (index,)
    axes = sum(item is None for item in given)
    behind = len(given) - axes >= 2 or Ellipsis in given  # x[:, None] is in front of the channels
    if axes and behind and all(item is None for item in given[-axes:]):  # x[:, :, None]
        return (*_part(given[:-axes]), *[("unsqueeze", -1)] * axes)
    return _part(given)[0]


def _part(index: tuple[Any, ...]) -> tuple[Layer, ...]:
    items = tuple(map(_item, index))
    if ELLIPSIS not in items and any(item != ALL for item in items[:1]):
        raise Refused("a part of the rows")
    return ((PART, items),)


def of_narrow(dim: Any, start: Any, length: Any) -> Layer:
    """Of `x.narrow(dim, start, length)`, which fails where a slice would be shorter."""
    raise Refused("a narrow: its length is exact, a slice's is not; write x[..., first:end]")


def of_select(dim: Any, index: Any) -> Layer:
    """Of `x.select(dim, index)`."""
    if not all(type(v) is int for v in (dim, index)):
        raise Refused("a select by values that are not plain numbers")
    return (PART, index, dim)


def _spread(layer: Layer, dimensions: int) -> list[Any]:
    """An item for each dimension."""
    if len(layer) == 3:
        _, item, dim = layer
        items: list[Any] = [ALL] * dimensions
        if not -dimensions <= dim < dimensions:
            raise Refused(f"dimension {dim} of a value with {dimensions}")
        items[dim] = item
        return items
    items = list(layer[1])
    if items.count(ELLIPSIS) > 1 or len(items) - items.count(ELLIPSIS) > dimensions:
        raise Refused(f"an index of {len(items)} axes")
    if ELLIPSIS not in items:
        items.append(ELLIPSIS)
    at = items.index(ELLIPSIS)
    items[at : at + 1] = [ALL] * (dimensions - len(items) + 1)
    return items


def resolve(layer: Layer, axes: int) -> tuple[list[Layer], int]:
    """The native layers, and how many axes of positions are left of so many."""
    rows, channels, *positions = _spread(layer, axes + 2)
    if rows != ALL:
        raise Refused("a part of the rows")
    layers = [] if channels == ALL else [_of_channels(channels)]
    if all(item == ALL for item in positions):
        return layers, axes
    numbers: list[int] = [0, _END, 1] if axes == 1 else []
    for item in positions:
        if isinstance(item, int):
            item = (item, None if item == -1 else item + 1, None)
        first, end, step = item
        numbers += [first or 0, _END if end is None else end, 1 if step is None else step]
        if numbers[-1] < 1 or max(map(abs, numbers[-3:])) > _END:
            raise Refused(f"a slice from {first} to {end} by {step}")
    dropped = [isinstance(item, int) for item in positions]
    if dropped == [False, True]:
        raise Refused("one column of an image")
    return [*layers, ("slice", *numbers)], axes - sum(dropped)


def _of_channels(item: Any) -> Layer:
    """Of a slice of the channels."""
    if not isinstance(item, tuple) or item[2] not in (None, 1):
        raise Refused(f"of the channels {item}, which is not one after the other")
    first, end = item[0] or 0, _END if item[1] is None else item[1]
    if max(abs(first), abs(end)) > _END:
        raise Refused(f"channels from {first} to {end}")
    return ("channels", first, end, 0)


def takes_one(layer: Layer) -> bool:
    """Whether a native slice leaves one position, however many there are."""
    rows, columns = layer[1:4], layer[4:7]
    one = [end - first == 1 or (first, end) == (-1, _END) for first, end, _ in (rows, columns)]
    return one[1] and (one[0] or rows == (0, _END, 1))
