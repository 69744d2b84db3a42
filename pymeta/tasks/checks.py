"""The checks of tasks' arrays that ask for types and shapes alone, for torch and numpy alike.

An argument is one array for all tasks ([T, rows, ...]) or a list with one for each ([rows_t, ...]).
`checked` brings one side's arguments (inputs, targets, weights, offset) to what the model takes, or
raises a TypeError or ValueError that names the argument, what was expected, what came, and where
there is one, the cure. What torch and numpy do each in their way is a `Kind`. Tables and columns of
pandas or polars are taken for the arrays of their numbers. Nothing here looks at values.

This module does not import torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pymeta.spec.losses import Loss
from pymeta.spec.show import counted
from pymeta.tasks.ragged import Ragged


class Names(NamedTuple):
    """What the caller knows one side's arguments as, for messages."""

    x: str
    y: str = ""
    sizes: str = ""
    weights: str = ""
    offset: str = ""


@dataclass(frozen=True)
class Expected:
    """What the model and the loss ask of the inputs; None where it is not known."""

    loss: Loss
    dtype: Any  # torch's or numpy's
    device: Any = None  # torch's
    in_features: int | None = None
    out_features: int | None = None
    flattens: bool = False
    batch_norm: bool = False
    row_shape: tuple[int, ...] | None = None  # where rows have more than one axis
    categories: tuple[tuple[int, int], ...] = ()  # (column, how many) of those that are embedded
    misfit: str | None = None  # why the model does not take rows of the shape that these have


class Checked(NamedTuple):
    """One side's arguments, checked: [T, rows, ...], or where `packed` [sum of rows, ...]."""

    x: Any
    y: Any
    weights: Any
    lengths: list[int] | None  # of the list that came, where one came
    packed: bool
    more_axes: bool  # of features, than one
    offset: Any  # [T, rows, out], or [T, rows] of one output


class Kind(ABC):
    """What differs between torch and numpy."""

    noun: str  # in messages
    whose: str  # the dtype that inputs must have

    @abstractmethod
    def one(self, name: str, value: Any, where: str) -> Any:
        """`value` as an array of this kind; TypeError where it is none, nor a table.

        `where` says how else it could have come.
        """

    @abstractmethod
    def is_integer(self, array: Any) -> bool:
        """Whether it holds integers."""

    @abstractmethod
    def joined(self, arrays: Sequence[Any], equal: bool) -> Any:
        """A list's arrays in one: stacked where they are of equal sizes, else one after another."""

    @abstractmethod
    def labels(self, y: Any) -> Any:
        """Integers as int64."""

    @abstractmethod
    def cast(self, name: str, weights: Any, dtype: Any) -> Any:
        """Weights in the dtype of the model; TypeError where they are to come in it."""

    @abstractmethod
    def device_of(self, array: Any) -> Any:
        """Where it is; None where there is one place only."""


def _shape(array: Any) -> str:
    return str(list(array.shape))


def of_table(name: str, value: Any) -> Any:
    """A table or column of pandas or polars as an array; all else as it is."""
    if isinstance(value, np.ndarray) or not hasattr(value, "to_numpy"):
        return value
    array = value.to_numpy()
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise TypeError(
            f"{name}: expected numbers, got a {type(value).__name__} of dtype "
            f"{getattr(array, 'dtype', '?')}: choose its columns of numbers, without missing ones, "
            f"or convert it, as by .to_numpy(np.float32)"
        )
    return array


def row_shape_of(x: Any) -> tuple[int, ...] | None:
    """The shape of a row of one side's inputs; None where that is not to be seen."""
    lead = 2
    if isinstance(x, (list, tuple)):
        if not x:
            return None
        x, lead = x[0], 1
    shape = getattr(x, "shape", None)
    return None if shape is None or len(shape) <= lead else tuple(shape[lead:])


def cure(given: Any, dtype: Any) -> str:
    """How the caller gets the dtype that is expected, for messages."""
    while isinstance(given, (list, tuple)) and given:
        given = given[0]
    short = str(dtype).removeprefix("torch.")
    if hasattr(given, "requires_grad"):
        return f"cast it, as by .to(torch.{short})"
    return f"cast it, as by .astype(np.{short})"


# ---- lists ------------------------------------------------------------------------------------


def _entries(kind: Kind, name: str, values: Sequence[Any], least: int, axes: str) -> list[Any]:
    """A list's arrays, which may differ in their number of rows only."""
    if not values:
        raise ValueError(
            f"{name}: expected one {kind.noun} for each task, got an empty list "
            f"(no tasks at all is one of shape [0, rows, ...])"
        )
    out = [kind.one(f"{name}[{t}]", value, "") for t, value in enumerate(values)]
    first = out[0]
    for t, value in enumerate(out):
        if value.ndim < least:
            raise ValueError(f"{name}[{t}]: expected shape {axes}, got {_shape(value)}")
        if value.shape[1:] != first.shape[1:] or value.ndim != first.ndim:
            like = "".join(f", {n}" for n in first.shape[1:])
            raise ValueError(
                f"{name}[{t}]: expected shape [rows{like}] as {name}[0] has, got {_shape(value)}"
            )
        if value.dtype != first.dtype:
            raise TypeError(f"{name}[{t}]: expected {first.dtype} as {name}[0], got {value.dtype}")
        if kind.device_of(value) != kind.device_of(first):
            raise ValueError(
                f"{name}[{t}]: expected it on {kind.device_of(first)} as {name}[0], "
                f"got {kind.device_of(value)}"
            )
    return out


def _first_of(kind: Kind, name: str, values: Sequence[Any]) -> list[Any]:
    """The arrays of the inputs' list, checked; of `Ragged` ones, which are alike, the first."""
    few = values[:1] if isinstance(values, Ragged) else values
    return _entries(kind, name, few, 2, "[rows, features]")


def _joined(kind: Kind, name: str, given: Any, entries: list[Any], equal: bool) -> Any:
    """A list's arrays in one; what is given as `Ragged` lies in one already."""
    if not isinstance(given, Ragged):
        return kind.joined(entries, equal)
    values = kind.one(name, given.values, "")
    shape = len(given), int(given.sizes[0]), *values.shape[1:]
    return values.reshape(shape) if equal else values


def _alike(kind: Kind, name: str, values: Any, x_name: str, lengths: list[int]) -> list[Any]:
    """The arrays of a list that goes with the inputs' list."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            f"{name}: expected a list of {len(lengths)} {kind.noun}s because {x_name} is one, "
            f"got {type(values).__name__}"
        )
    if isinstance(values, Ragged) and values.sizes.tolist() == lengths:
        return _entries(kind, name, values[:1], 1, "[rows] or [rows, out]")
    out = _entries(kind, name, values, 1, "[rows] or [rows, out]")
    if len(out) != len(lengths):
        raise ValueError(
            f"{name}: expected {len(lengths)} {kind.noun}s as {x_name}, got {len(out)}"
        )
    for t, (value, rows) in enumerate(zip(out, lengths, strict=True)):
        if value.shape[0] != rows:
            raise ValueError(
                f"{name}[{t}]: expected {counted(rows, 'row')} as {x_name}[{t}], got "
                f"{value.shape[0]}"
            )
    return out


def _check_one_input(names: Names, x: Sequence[Any], y: Any) -> None:
    """Raise where a list is several inputs of all tasks, rather than one of each."""
    lead = tuple(getattr(y, "shape", ()))[:2]
    shapes = [tuple(getattr(value, "shape", ()))[:2] for value in x]
    if len(lead) == 2 and shapes and all(shape == lead for shape in shapes):
        raise TypeError(
            f"{names.x}: expected one input, got {len(x)}, each of shape "
            f"[{lead[0]}, {lead[1]}, ...] as {names.y}: several inputs are not supported; join "
            f"them along the last axis, and let the model take them apart"
        )


# ---- single arrays ----------------------------------------------------------------------------


def _check_x(kind: Kind, names: Names, x: Any, given: Any, expected: Expected, lead: int) -> Any:
    """Bring x into the form [..., in], where the model is known to take that."""
    if x.dtype != expected.dtype:
        raise TypeError(
            f"{names.x}: expected {expected.dtype} {kind.whose}, got {x.dtype}; "
            f"{cure(given, expected.dtype)}"
        )
    if expected.row_shape is not None:
        if tuple(x.shape[lead:]) != expected.row_shape:
            raise ValueError(
                f"{names.x}: expected rows of shape {list(expected.row_shape)}, "
                f"got {list(x.shape[lead:])} (shape {_shape(x)})"
            )
        return x
    if expected.flattens and x.ndim > lead + 1:
        x = x.reshape(*x.shape[:lead], math.prod(x.shape[lead:]))
    shape = x.shape
    if len(shape) <= lead or shape[-1] != expected.in_features:
        got = shape[-1] if len(shape) > lead else "none"
        raise ValueError(
            f"{names.x}: expected {counted(expected.in_features, 'feature')}, which is what the "
            "model "
            f"takes, got {got} (shape {_shape(x)})"
        )
    return x


def _check_y(kind: Kind, names: Names, y: Any, given: Any, expected: Expected, lead: int) -> Any:
    """Classes [*lead], or values [*lead, columns] ([*lead] where that is 1).

    Classes may also be floats [*lead, classes], distributions over them.
    """
    loss, out = expected.loss, expected.out_features
    if loss.targets == "anything":
        return y
    if loss.takes_classes and not kind.is_integer(y):
        return _check_distributions(names, y, given, expected, lead)
    if loss.takes_classes:
        if y.ndim != lead:
            raise ValueError(
                f"{names.y}: expected class indices of shape [tasks, rows] for {loss.kind} "
                f"(in a list: [rows]), got {_shape(y)}"
            )
        return kind.labels(y)
    if y.dtype != expected.dtype:
        raise TypeError(
            f"{names.y}: expected {expected.dtype} values for {loss.kind}, got {y.dtype}; "
            f"{cure(given, expected.dtype)}"
        )
    shape = y.shape
    axes = len(shape) - lead
    if out is None:
        return y
    columns = loss.target_columns(out)
    if (axes == 1 and shape[-1] == columns) or (axes == 0 and columns == 1):
        return y
    each = loss.outputs_per_target
    raise ValueError(
        f"{names.y}: expected shape [tasks, rows, {columns}]"
        f"{' or [tasks, rows]' if columns == 1 else ''}"
        f"{f' ({loss.kind} has {each} outputs for each target)' if each > 1 else ''}, "
        f"got {_shape(y)}"
    )


def _check_distributions(names: Names, y: Any, given: Any, expected: Expected, lead: int) -> Any:
    """Floats [*lead, classes], of the model's dtype."""
    out = expected.out_features
    if y.dtype != expected.dtype or y.ndim != lead + 1:
        raise TypeError(
            f"{names.y}: expected class indices (integers) for {expected.loss.kind}, or "
            f"{expected.dtype} distributions [tasks, rows, classes], got {y.dtype} of shape "
            f"{_shape(y)}"
        )
    if out is not None and y.shape[-1] != out:
        raise ValueError(
            f"{names.y}: expected distributions over {out} classes, shape [tasks, rows, {out}], "
            f"got {_shape(y)}"
        )
    return y


def _check_weights(
    kind: Kind, names: Names, weights: Any, y: Any, expected: Expected, lead: int
) -> Any:
    """Weights of rows [*lead], or of single targets [*lead, columns] where there are several."""
    columns = 1 if y is None or y.ndim == lead or expected.loss.takes_classes else y.shape[-1]
    if weights.ndim == lead + 1 and weights.shape[-1] == columns == 1:
        weights = weights.reshape(weights.shape[:lead])
    by_target = weights.ndim == lead + 1 and columns > 1 and weights.shape[-1] == columns
    if weights.ndim != lead and not by_target:
        or_targets = f", or for each target, [tasks, rows, {columns}]" if columns > 1 else ""
        raise ValueError(
            f"{names.weights}: expected one weight for each row, shape [tasks, rows]"
            f"{or_targets}, got {_shape(weights)}"
        )
    return kind.cast(names.weights, weights, expected.dtype)


def _check_offset(kind: Kind, names: Names, offset: Any, expected: Expected, lead: int) -> Any:
    """What is added to outputs: [*lead, out], or [*lead] of one output."""
    out, axes = expected.out_features, offset.ndim - lead
    if not (axes == 1 and out in (None, offset.shape[-1])) and not (axes == 0 and out in (None, 1)):
        raise ValueError(
            f"{names.offset}: expected a number for each output, shape [tasks, rows, {out}]"
            f"{' or [tasks, rows]' if out == 1 else ''}, got {_shape(offset)}"
        )
    return kind.cast(names.offset, offset, expected.dtype)


def _check_device(kind: Kind, name: str, array: Any, expected: Expected) -> None:
    if kind.device_of(array) != expected.device:
        raise ValueError(
            f"{name}: expected a {kind.noun} on {expected.device}, where the model's parameters "
            f"are, got {kind.device_of(array)}"
        )


def checked(
    kind: Kind,
    names: Names,
    x: Any,
    y: Any,
    weights: Any,
    expected: Expected,
    sized: bool,
    offset: Any = None,
) -> Checked:
    """One side's arguments, checked and brought to one array each.

    Args:
        kind: torch's or numpy's.
        names: of the arguments.
        x: [T, rows, ...], or a list of T arrays [rows_t, ...].
        y: [T, rows] or [T, rows, out], or a list likewise; None where `names` has none for it.
        weights: [T, rows] or [T, rows, columns], a list of such of single tasks, or None.
        expected: what the model and the loss ask for.
        sized: whether sizes come along, which a list has none of.
        offset: [T, rows, out], [T, rows] where out is 1, a list likewise, or None.

    Raises:
        TypeError: something has the wrong type or dtype.
        ValueError: something has the wrong shape or device.
    """
    if y is None and names.y:
        raise TypeError(f"{names.y}: expected targets as a {kind.noun} or a list, got None")
    given_x, given_y = x, y
    lengths: list[int] | None = None
    packed = False
    if isinstance(x, (list, tuple)):
        _check_one_input(names, x, y)
        if sized:
            raise ValueError(
                f"{names.sizes}: expected None where {names.x} is a list, whose entries have their "
                f"own sizes"
            )
        entries = _first_of(kind, names.x, x)
        lengths = x.sizes.tolist() if isinstance(x, Ragged) else [len(entry) for entry in entries]
        equal = min(lengths) == max(lengths)
        packed = not equal
        x = _joined(kind, names.x, x, entries, equal)
        y, weights, offset = (
            None if v is None else _joined(kind, n, v, _alike(kind, n, v, names.x, lengths), equal)
            for n, v in ((names.y, y), (names.weights, weights), (names.offset, offset))
        )
    else:
        where = " with a leading task axis, or a list of them, one for each task"
        x = kind.one(names.x, x, where)
        shape = x.shape
        if len(shape) < 3:
            raise ValueError(
                f"{names.x}: expected shape [tasks, rows, features], got {_shape(x)} "
                f"({counted(x.ndim, 'dimension')})"
            )
        lead_of = shape[0], shape[1]
        y, weights, offset = (
            None if v is None else _to_match(kind, names, n, v, lead_of)
            for n, v in ((names.y, y), (names.weights, weights), (names.offset, offset))
        )
    lead = 1 if packed else 2
    _check_device(kind, names.x, x, expected)
    if expected.misfit is not None:
        raise ValueError(f"{names.x}: {expected.misfit} (shape {_shape(x)})")
    if expected.in_features is not None:
        x = _check_x(kind, names, x, given_x, expected, lead)
    axes = 1 if expected.row_shape is None else len(expected.row_shape)
    more_axes = expected.in_features is not None and x.ndim > lead + axes
    if y is not None:
        _check_device(kind, names.y, y, expected)
        free = Expected(expected.loss, expected.dtype) if more_axes else expected
        y = _check_y(kind, names, y, given_y, free, lead)
    if weights is not None:
        _check_device(kind, names.weights, weights, expected)
        weights = _check_weights(kind, names, weights, y, expected, lead)
    if offset is not None:
        _check_device(kind, names.offset, offset, expected)
        offset = _check_offset(kind, names, offset, expected, lead)
    return Checked(x, y, weights, lengths, packed, more_axes, offset)


def _to_match(kind: Kind, names: Names, name: str, value: Any, lead: tuple[int, int]) -> Any:
    """Targets or weights for the rows of x, whose shape begins with `lead`."""
    value = kind.one(name, value, " with a leading task axis")
    shape = value.shape
    if len(shape) < 2 or shape[0] != lead[0] or shape[1] != lead[1]:
        raise ValueError(
            f"{name}: expected shape [{lead[0]}, {lead[1]}, ...] to match {names.x}, "
            f"got {_shape(value)}"
        )
    return value
