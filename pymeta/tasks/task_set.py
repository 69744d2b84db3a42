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
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pymeta.spec.losses import Loss
from pymeta.spec.show import counted
from pymeta.tasks.checks import Expected, Kind, Names, checked, of_table

Rows: TypeAlias = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]
Sizes: TypeAlias = Tensor | np.ndarray | Sequence[int] | None

_PLAIN = (Tensor, torch.nn.Parameter)
_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
_INTEGERS = (*_SIGNED, torch.uint64, torch.uint32, torch.uint16, torch.uint8)


SUPPORT = Names("xs", "ys", "support_sizes", "support_weights", "support_offset")
QUERY = Names("xq", "yq", "query_sizes", "query_weights", "query_offset")


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
    offset: Tensor | None = None  # [..., out], is added to the model's outputs
    distributions: bool = False  # y are such over the classes, not labels
    loss: Loss | None = None  # what its targets are held against
    context: int = 0  # so many first rows of each task are only there to normalise by
    by_support: bool = False  # it is normalised by other rows: a single one is a set

    @property
    def weight_columns(self) -> int:
        """1 for weights of rows; how many targets a row has for weights of single ones."""
        by_target = self.weights is not None and self.weights.ndim == self.lead + 1
        return self.weights.shape[-1] if by_target and self.weights is not None else 1

    @property
    def lead(self) -> int:
        """How many axes of a tensor come before those of a row."""
        return 1 if self.starts is not None else 2

    @property
    def uniform(self) -> bool:
        """Whether every task has the same number of rows and x is [T, rows, ...]."""
        return self.sizes is None

    @property
    def padded(self) -> bool:
        """Whether x is [T, rows, ...] and some rows may only fill it up."""
        return self.sizes is not None and self.starts is None

    @property
    def plain(self) -> bool:
        """Whether tasks are of one size and have inputs and targets alone."""
        return all(v is None for v in (self.starts, self.sizes, self.weights, self.offset))

    @property
    def counts(self) -> list[int]:
        """The number of rows of each task."""
        return [self.rows] * self.tasks if self.sizes is None else self.sizes.tolist()

    def of_task(self, t: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Task t's own rows: x [rows, ...], y, weights, offset (None where there are none)."""

        def own(whole: Tensor | None) -> Tensor | None:
            if whole is None:
                return None
            if self.starts is not None:
                assert self.sizes is not None
                return whole.narrow(0, int(self.starts[t]), int(self.sizes[t]))
            return whole[t] if self.sizes is None else whole[t, : int(self.sizes[t])]

        x = own(self.x)
        assert x is not None
        return x, own(self.y), own(self.weights), own(self.offset)

    @property
    def keeps_weightless(self) -> bool:
        """Whether rows of weight 0 are looked at, because the gradient by that weight is wanted."""
        w = self.weights
        return self.context > 0 or (w is not None and w.requires_grad and torch.is_grad_enabled())

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
                offset=None if self.offset is None else self.offset[begin:end],
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
            offset=None if self.offset is None else self.offset[first:last],
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


class _Tensors(Kind):
    """Tensors; arrays become such."""

    noun = "tensor"
    whose = "as the model's parameters have"

    def one(self, name: str, value: Any, where: str) -> Tensor:
        """`value` as a dense, real tensor."""
        if type(value) is not Tensor:
            value = tensor_of(name, of_table(name, value))
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name}: expected a tensor or array{where}, got {type(value).__name__}"
                )
        if value.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
        if value.dtype.is_complex:
            raise TypeError(f"{name}: expected real numbers, got {value.dtype}")
        return value

    def is_integer(self, array: Tensor) -> bool:
        """Whether it holds integers."""
        return array.dtype in _INTEGERS

    def joined(self, arrays: Sequence[Tensor], equal: bool) -> Tensor:
        """Stacked or concatenated."""
        return torch.stack(tuple(arrays)) if equal else torch.cat(tuple(arrays))

    def labels(self, y: Tensor) -> Tensor:
        """As int64."""
        return y if y.dtype is torch.int64 else y.long()

    def cast(self, name: str, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Weights of any dtype will do."""
        return weights if weights.dtype == dtype else weights.to(dtype)

    def device_of(self, array: Tensor) -> torch.device:
        """The tensor's."""
        return array.device


_TENSORS = _Tensors()


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_sizes(name: str, sizes: Any, tasks: int) -> Tensor:
    """`sizes` as int64 [T] on the CPU; whether they are in range is checked with the values."""
    sizes = tensor_of(name, of_table(name, sizes))
    if not isinstance(sizes, Tensor):
        if not isinstance(sizes, (list, tuple)):
            raise TypeError(f"{name}: expected integers [T], got {type(sizes).__name__}")
        wrong = next((n for n in sizes if not _is_integer(n)), None)
        if wrong is not None:
            raise TypeError(f"{name}: expected integers [T], got a {type(wrong).__name__} in it")
        if any(abs(n) >= 2**63 for n in sizes):
            raise ValueError(f"{name}: expected integers below 2^63, got {max(sizes, key=abs)}")
        sizes = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    if sizes.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected integers, got {sizes.dtype}")
    if sizes.shape != (tasks,):
        raise ValueError(f"{name}: expected shape [{tasks}], got {list(sizes.shape)}")
    checked: Tensor = sizes
    return dense(checked.to("cpu", torch.int64))


def dense(tensor: Tensor) -> Tensor:
    """`tensor` with the memory layout that the core can read: contiguous, not negated, there."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor._is_zerotensor():  # zeros that have no memory, which autograd uses
        tensor = tensor.clone()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def task_set(
    names: Names,
    x: Any,
    y: Any,
    sizes: Any,
    weights: Any,
    expected: Expected,
    offset: Any = None,
) -> TaskSet:
    """Check one side's arguments and bring them into one of the three forms.

    Args:
        names: `SUPPORT` or `QUERY`.
        x: [T, rows, ...], or a list of T tensors [rows_t, ...]; here as everywhere, numpy arrays
            are accepted wherever tensors are.
        y: [T, rows] or [T, rows, out], or a list likewise; None where `names` has none for it.
        sizes: how many of its rows each task uses, [T] integers, or None for all.
        weights: [T, rows] or [T, rows, columns of y], a list of such of single tasks, or None.
        expected: what the model and the loss ask for.
        offset: [T, rows, out] ([T, rows] where out is 1), a list likewise, or None.

    Raises:
        TypeError: something has the wrong type or dtype.
        ValueError: something has the wrong shape or device.
    """
    given = checked(_TENSORS, names, x, y, weights, expected, sizes is not None, offset)
    x = given.x
    out = TaskSet(
        x, given.y, given.weights, x.shape[0], 0, names, lengths=given.lengths, offset=given.offset
    )
    if given.lengths is not None:
        out.tasks, out.rows = len(given.lengths), max(given.lengths)
    else:
        out.rows = x.shape[1]
    if given.packed:
        out.sizes = torch.tensor(given.lengths, dtype=torch.int64, device="cpu")
        out.starts = out.sizes.cumsum(0) - out.sizes
    elif sizes is not None:
        out.sizes = _check_sizes(names.sizes, sizes, out.tasks)
    if given.more_axes:
        out.reason = f"{names.x} has more than one feature axis"
    out.loss = expected.loss
    out.distributions = given.y is not None and (
        expected.loss.takes_classes and given.y.is_floating_point()
    )
    if out.distributions and given.y.requires_grad and torch.is_grad_enabled():
        out.reason = f"{names.y} are distributions over classes, by which gradients are wanted"
    parts = (x, given.y, given.weights, given.offset)
    if not all(type(v) in _PLAIN for v in parts if v is not None):
        out.reason = f"an input ({names.x}, {names.y} or {names.weights}) is a tensor subclass"
    return out


def check_same_tasks(support: TaskSet, query: TaskSet) -> None:
    """Raise ValueError unless both sides have the same number of tasks."""
    if support.tasks != query.tasks:
        raise ValueError(
            f"{query.names.x}: expected {counted(support.tasks, 'task')} as {support.names.x} has, "
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


def shaped(predictions: Tensor | list[Tensor], query: TaskSet) -> Tensor | list[Tensor]:
    """Predictions in the form xq came in: a list of [rows_t, ...], or [T, rows, ...].

    Args:
        predictions: [T, rows, ...]; [sum of rows, ...] of a packed set; or T tensors.
        query: the set they belong to.
    """
    if isinstance(predictions, list):
        return predictions if query.lengths is not None else _padded(predictions, query.rows)
    if query.lengths is None:
        return predictions
    if query.starts is not None:
        return list(predictions.split_with_sizes(query.lengths))
    return list(predictions.unbind(0))


def _padded(predictions: list[Tensor], rows: int) -> Tensor:
    def padded(values: Tensor) -> Tensor:
        below = [0, 0] * (values.ndim - 1)
        return torch.nn.functional.pad(values, [*below, 0, rows - values.shape[0]])

    return torch.stack([padded(values) for values in predictions])


def with_context(query: TaskSet, support: TaskSet, classes: bool) -> TaskSet:
    """The query rows of each task behind its support rows, which weigh nothing.

    For batch normalisation by the support rows alone. Both sets are [T, rows, ...], the query
    without weights or offsets of its own. `classes` is whether targets are classes.
    """
    rows = support.rows

    def behind(value: float, whole: Tensor) -> Tensor:
        context = whole.new_full((query.tasks, rows, *whole.shape[2:]), value)
        return torch.cat([context, whole], 1)

    y = query.y
    if y is not None:  # targets that every loss takes
        outputs = y.shape[-1] if query.distributions else 1
        y = behind(0 if classes and not query.distributions else 1 / outputs, y)
    weights = None if y is None else behind(0.0, query.x.new_ones(query.tasks, query.rows))
    return replace(
        query, x=torch.cat([support.x, query.x], 1), y=y, weights=weights,
        rows=rows + query.rows, context=rows,
    )  # fmt: skip
