"""The tasks of one call as tensors: shapes, ragged sizes, dtypes.

A `TaskSet` is the support side or the query side of all T tasks, in one of three forms:

    uniform   x [T, rows, ...]     every task has `rows` rows
    padded    x [T, rows, ...]     task t uses the first sizes[t] of its rows
    packed    x [sum, ...]         task t's rows are starts[t] : starts[t] + sizes[t]

Lists become uniform where all sizes are equal and packed otherwise. A numpy array is taken for the
tensor that shares its memory. Nothing here looks at the values of a tensor, so a call costs no pass
over the data. The values (labels, weights, sizes) are checked

    on the CPU        by the native core, as it reads them;
    on a device       sizes by `values.check_sizes`, on the host, where they are kept; labels and
                      weights not at all, which would mean to wait for them: a wrong one makes all
                      that depends on it NaN. PYMETA_CHECK_VALUES=1 has `values.check_values` look;
    for torch         by `values.check_values`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pymeta.spec.losses import Loss

Rows: TypeAlias = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]
Sizes: TypeAlias = Tensor | np.ndarray | Sequence[int] | None

_PLAIN = (Tensor, torch.nn.Parameter)
_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
_INTEGERS = (*_SIGNED, torch.uint64, torch.uint32, torch.uint16, torch.uint8)


class Names(NamedTuple):
    """What the caller knows one side's arguments as, for messages."""

    x: str
    y: str
    sizes: str
    weights: str


SUPPORT = Names("xs", "ys", "support_sizes", "support_weights")
QUERY = Names("xq", "yq", "query_sizes", "query_weights")


@dataclass(frozen=True)
class Expected:
    """What the model and the loss ask of the inputs; None where it is not known."""

    loss: Loss
    dtype: torch.dtype
    device: torch.device
    in_features: int | None = None
    out_features: int | None = None
    flattens: bool = False
    batch_norm: bool = False


@dataclass
class TaskSet:
    """One side (support or query) of all tasks; see the module's head for the three forms."""

    x: Tensor
    y: Tensor | None
    weights: Tensor | None
    tasks: int
    rows: int
    names: Names
    starts: Tensor | None = None
    sizes: Tensor | None = None
    lengths: list[int] | None = None  # of the list that came, where one came
    reason: str | None = None  # why the native core cannot take this set, where it cannot
    there: tuple[Tensor | None, Tensor] | None = None  # starts, sizes on the device of a call

    @property
    def uniform(self) -> bool:
        """Whether every task has the same number of rows and x is [T, rows, ...]."""
        return self.sizes is None

    @property
    def padded(self) -> bool:
        """Whether x is [T, rows, ...] and some rows may only fill it up."""
        return self.sizes is not None and self.starts is None

    @property
    def counts(self) -> list[int]:
        """The number of rows of each task."""
        return [self.rows] * self.tasks if self.sizes is None else self.sizes.tolist()

    def of_task(self, t: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Task t's own rows: x [rows, ...], y, weights [rows] (None where there are none)."""

        def own(whole: Tensor | None) -> Tensor | None:
            if whole is None:
                return None
            if self.starts is not None:
                assert self.sizes is not None
                return whole.narrow(0, int(self.starts[t]), int(self.sizes[t]))
            return whole[t] if self.sizes is None else whole[t, : int(self.sizes[t])]

        x = own(self.x)
        assert x is not None
        return x, own(self.y), own(self.weights)

    def part(self, first: int, last: int) -> TaskSet:
        """The tasks first .. last-1; views of this set's memory."""
        if self.starts is not None and self.sizes is not None and first < last:
            begin = int(self.starts[first])
            end = int(self.starts[last - 1] + self.sizes[last - 1])
            return replace(
                self,
                x=self.x[begin:end],
                y=None if self.y is None else self.y[begin:end],
                weights=None if self.weights is None else self.weights[begin:end],
                tasks=last - first,
                starts=self.starts[first:last] - begin,
                sizes=self.sizes[first:last],
                lengths=None,
                there=None,
            )
        return replace(
            self,
            x=self.x[first:last],
            y=None if self.y is None else self.y[first:last],
            weights=None if self.weights is None else self.weights[first:last],
            tasks=last - first,
            sizes=None if self.sizes is None else self.sizes[first:last],
            lengths=None,
            there=None,
        )

    def valid(self) -> Tensor | None:
        """Which rows of a padded set are rows: bool [T, rows]; None where all of them are."""
        if self.sizes is None or self.starts is not None:
            return None
        sizes = self.sizes.to(self.x.device)
        return torch.arange(self.rows, device=self.x.device) < sizes.unsqueeze(-1)

    def place(self, index: int) -> str:
        """Task and row, as "task 3, row 7", of an index into the flattened rows."""
        if self.starts is None:
            return f"task {index // self.rows}, row {index % self.rows}"
        task = int((self.starts <= index).nonzero()[-1])
        while self.sizes is not None and int(self.sizes[task]) == 0:
            task -= 1
        return f"task {task}, row {index - int(self.starts[task])}"


class _Writable:
    """A read-only array shown to numpy as a writable one, which torch takes without a warning."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # keeps the memory
        interface = dict(array.__array_interface__)
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def tensor_of(name: str, value: Any) -> Any:
    """A numpy array as a tensor that shares its memory, if it can; all else as it is.

    pymeta writes to no input, so a read-only array will do. One that torch cannot share (of the
    other byte order, or with negative strides) is copied.

    Raises:
        TypeError: the array does not hold numbers that torch knows.
    """
    if not isinstance(value, np.ndarray):
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array without a mask, got a MaskedArray")
    if value.dtype.kind not in "fiubc":
        raise TypeError(f"{name}: expected an array of numbers, got dtype {value.dtype}")
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    if any(stride < 0 or stride % value.itemsize for stride in value.strides):
        value = value.copy()
    if not value.flags.writeable:
        value = np.asarray(_Writable(value))
    try:
        return torch.from_numpy(value)
    except TypeError:  # longdouble
        raise TypeError(f"{name}: expected an array of numbers, got dtype {value.dtype}") from None


def _tensors_of(name: str, values: Any) -> Any:
    """A list's arrays as tensors, or one array as a tensor; None stays."""
    if isinstance(values, (list, tuple)):
        if not any(isinstance(value, np.ndarray) for value in values):
            return values
        return [tensor_of(f"{name}[{t}]", value) for t, value in enumerate(values)]
    return tensor_of(name, values)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _need_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor or array with a leading task axis, or a list of them, "
            f"one for each task; got {type(value).__name__}"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")


def _check_list(name: str, values: Sequence[Any], y: bool) -> None:
    """Raise unless these are tensors that differ in their number of rows only."""
    if not values:
        raise ValueError(
            f"{name}: expected one tensor for each task, got an empty list "
            f"(no tasks at all is a tensor of shape [0, rows, ...])"
        )
    first = values[0]
    for t, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{t}]: expected a tensor or array, got {type(value).__name__}")
        if value.ndim < (1 if y else 2):
            shape = "[rows] or [rows, out]" if y else "[rows, features]"
            raise ValueError(f"{name}[{t}]: expected shape {shape}, got {_shape(value)}")
        if value.shape[1:] != first.shape[1:] or value.ndim != first.ndim:
            raise ValueError(
                f"{name}[{t}]: expected shape [rows{''.join(f', {n}' for n in first.shape[1:])}] "
                f"as {name}[0] has, got {_shape(value)}"
            )
        if value.dtype != first.dtype or value.device != first.device:
            raise ValueError(
                f"{name}[{t}]: expected {first.dtype} on {first.device} as {name}[0], "
                f"got {value.dtype} on {value.device}"
            )


def _joined(values: Sequence[Tensor], equal: bool) -> Tensor:
    return torch.stack(tuple(values)) if equal else torch.cat(tuple(values))


def _list_like(name: str, values: Any, x_name: str, lengths: list[int]) -> None:
    """Raise unless `values` is a list whose tensors have the given numbers of rows."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            f"{name}: expected a list of {len(lengths)} tensors because {x_name} is one, "
            f"got {type(values).__name__}"
        )
    _check_list(name, values, y=True)
    if len(values) != len(lengths):
        raise ValueError(f"{name}: expected {len(lengths)} tensors as {x_name}, got {len(values)}")
    for t, (value, rows) in enumerate(zip(values, lengths, strict=True)):
        if value.shape[0] != rows:
            raise ValueError(
                f"{name}[{t}]: expected {rows} rows as {x_name}[{t}], got {value.shape[0]}"
            )


def _from_lists(names: Names, x: Any, y: Any, sizes: Any, weights: Any) -> TaskSet:
    if sizes is not None:
        raise ValueError(
            f"{names.sizes}: expected None where {names.x} is a list (its tensors have their own "
            f"sizes), got {type(sizes).__name__}"
        )
    _check_list(names.x, x, y=False)
    lengths = [len(value) for value in x]
    if y is not None:
        _list_like(names.y, y, names.x, lengths)
    if weights is not None:
        _list_like(names.weights, weights, names.x, lengths)
    equal = min(lengths) == max(lengths)
    out = TaskSet(
        x=_joined(x, equal),
        y=None if y is None else _joined(y, equal),
        weights=None if weights is None else _joined(weights, equal),
        tasks=len(lengths),
        rows=max(lengths),
        names=names,
        lengths=lengths,
    )
    if not equal:
        out.sizes = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        out.starts = out.sizes.cumsum(0) - out.sizes
    return out


def _check_sizes(name: str, sizes: Any, tasks: int) -> Tensor:
    """`sizes` as int64 [T] on the CPU; whether they are in range is checked with the values."""
    sizes = tensor_of(name, sizes)
    if not isinstance(sizes, Tensor):
        if not isinstance(sizes, (list, tuple)) or not all(type(n) is int for n in sizes):
            raise TypeError(f"{name}: expected integers [T], got {type(sizes).__name__}")
        if any(abs(n) >= 2**63 for n in sizes):
            raise ValueError(f"{name}: expected integers below 2^63, got {max(sizes, key=abs)}")
        sizes = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    if sizes.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected integers, got {sizes.dtype}")
    if sizes.shape != (tasks,):
        raise ValueError(f"{name}: expected shape [{tasks}], got {_shape(sizes)}")
    checked: Tensor = sizes
    return dense(checked.to("cpu", torch.int64))


def _from_tensors(names: Names, x: Tensor, y: Any, sizes: Any, weights: Any) -> TaskSet:
    _need_tensor(names.x, x)
    if x.ndim < 3:
        raise ValueError(
            f"{names.x}: expected shape [tasks, rows, features], got {_shape(x)} "
            f"({x.ndim} dimensions)"
        )
    tasks, rows = x.shape[0], x.shape[1]
    for name, value in ((names.y, y), (names.weights, weights)):
        if value is not None:
            _need_tensor(name, value)
            if value.ndim < 2 or value.shape[0] != tasks or value.shape[1] != rows:
                raise ValueError(
                    f"{name}: expected shape [{tasks}, {rows}, ...] to match {names.x}, "
                    f"got {_shape(value)}"
                )
    out = TaskSet(x, y, weights, tasks, rows, names)
    if sizes is not None:
        out.sizes = _check_sizes(names.sizes, sizes, tasks)
    return out


def _check_x(x: Tensor, names: Names, expected: Expected, lead: int) -> Tensor:
    """`x`, flattened to [..., in] where the model begins with that; raises where it cannot fit."""
    if x.dtype.is_complex:
        raise TypeError(f"{names.x}: expected real numbers, got {x.dtype}")
    if expected.in_features is None:
        return x
    if x.dtype != expected.dtype:
        raise TypeError(
            f"{names.x}: expected {expected.dtype} as the model's parameters have, got {x.dtype}"
        )
    if expected.flattens and x.ndim > lead + 1:
        x = x.flatten(lead)
    if x.shape[-1] != expected.in_features:
        raise ValueError(
            f"{names.x}: expected {expected.in_features} features, which is what the model "
            f"takes, got {x.shape[-1]} (shape {_shape(x)})"
        )
    return x


def _check_y(y: Tensor, names: Names, expected: Expected, lead: int, more_axes: bool) -> Tensor:
    loss, out = expected.loss, expected.out_features
    if loss.takes_classes:
        if y.dtype not in _INTEGERS:
            raise TypeError(
                f"{names.y}: expected class indices (int64) for {loss.kind}, got {y.dtype}"
            )
        if y.ndim != lead:
            raise ValueError(
                f"{names.y}: expected class indices of shape [tasks, rows] for {loss.kind} "
                f"(in a list: [rows]), got {y.ndim - lead} more dimensions: {_shape(y)}"
            )
        return y if y.dtype is torch.int64 else y.long()
    if y.dtype != expected.dtype:
        raise TypeError(
            f"{names.y}: expected {expected.dtype} values for {loss.kind}, got {y.dtype}"
        )
    if out is None or more_axes:
        return y
    if (y.ndim == lead and out == 1) or (y.ndim == lead + 1 and y.shape[-1] == out):
        return y
    raise ValueError(
        f"{names.y}: expected shape [tasks, rows, {out}]"
        f"{' or [tasks, rows]' if out == 1 else ''}, got {_shape(y)}"
    )


def _check_weights(weights: Tensor, names: Names, expected: Expected, lead: int) -> Tensor:
    if weights.dtype.is_complex:
        raise TypeError(f"{names.weights}: expected real numbers, got {weights.dtype}")
    if weights.ndim != lead:
        raise ValueError(
            f"{names.weights}: expected one weight for each row, shape [tasks, rows], "
            f"got {_shape(weights)}"
        )
    return weights if weights.dtype == expected.dtype else weights.to(expected.dtype)


def dense(tensor: Tensor) -> Tensor:
    """`tensor` as it must lie in memory for its pointer to be read: contiguous, not negated."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _check_device(name: str, tensor: Tensor, expected: Expected) -> None:
    if tensor.device != expected.device:
        raise ValueError(
            f"{name}: expected a tensor on {expected.device}, where the model's parameters are, "
            f"got {tensor.device}"
        )


def task_set(names: Names, x: Any, y: Any, sizes: Any, weights: Any, expected: Expected) -> TaskSet:
    """Check one side's arguments and bring them into one of the three forms.

    Args:
        names: `SUPPORT` or `QUERY`.
        x: [T, rows, ...], or a list of T tensors [rows_t, ...]; here as everywhere, numpy arrays
            are as good as tensors.
        y: [T, rows] or [T, rows, out], or a list likewise; None where `names` has none for it.
        sizes: how many of its rows each task uses, [T] integers, or None for all.
        weights: [T, rows], a list of [rows_t], or None.
        expected: what the model and the loss ask for.

    Raises:
        TypeError: something has the wrong type or dtype.
        ValueError: something has the wrong shape or device.
    """
    listed = isinstance(x, (list, tuple))
    if not type(x) is type(y) is Tensor:
        x, y = _tensors_of(names.x, x), _tensors_of(names.y, y)
    weights = _tensors_of(names.weights, weights)
    if y is None and names.y:
        raise TypeError(f"{names.y}: expected targets as a tensor, array or list, got None")
    out = (_from_lists if listed else _from_tensors)(names, x, y, sizes, weights)
    lead = 1 if out.starts is not None else 2
    _check_device(names.x, out.x, expected)
    plain = type(out.x) in _PLAIN
    out.x = _check_x(out.x, names, expected, lead)
    more_axes = expected.in_features is not None and out.x.ndim > lead + 1
    if more_axes:
        out.reason = f"{names.x} has more than one feature axis"
    if out.y is not None:
        _check_device(names.y, out.y, expected)
        plain = plain and type(out.y) in _PLAIN
        out.y = _check_y(out.y, names, expected, lead, more_axes)
    if out.weights is not None:
        _check_device(names.weights, out.weights, expected)
        plain = plain and type(out.weights) in _PLAIN
        out.weights = _check_weights(out.weights, names, expected, lead)
    if not plain:
        out.reason = f"an input ({names.x}, {names.y} or {names.weights}) is a tensor subclass"
    return out


def check_same_tasks(support: TaskSet, query: TaskSet) -> None:
    """Raise ValueError unless both sides have the same number of tasks."""
    if support.tasks != query.tasks:
        raise ValueError(
            f"{query.names.x}: expected {support.tasks} tasks as {support.names.x} has, "
            f"got {query.tasks}"
        )


def check_task_ids(task_ids: Any, tasks: int) -> Tensor | None:
    """`task_ids` as int64 [T] on the CPU; an error unless they are T integers >= 0."""
    if task_ids is None:
        return None
    if isinstance(task_ids, range):
        task_ids = list(task_ids)
    ids = _check_sizes("task_ids", task_ids, tasks)
    if bool((ids < 0).any()):
        raise ValueError(f"task_ids: expected integers >= 0, got {int(ids.min())}")
    return ids
