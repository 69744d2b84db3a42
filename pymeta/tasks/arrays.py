"""The tasks of one call as numpy arrays, without torch: what `task_set.py` is for tensors.

There are fewer forms: all tasks have equally many rows (arrays with a leading task axis), or each
has its own (lists of arrays, one for each task). Nothing is cast: values have the dtype of the
weights, classes are integers. Arrays that are not contiguous are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_byte
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from pymeta import native
from pymeta.spec.architecture import Architecture
from pymeta.spec.losses import Loss
from pymeta.spec.show import counted
from pymeta.tasks.checks import Expected, Kind, Names, checked, cure, of_table

DTYPE_CODES = {np.dtype(np.float32): 4, np.dtype(np.float64): 8}
Rows: TypeAlias = "np.ndarray | Sequence[np.ndarray]"


class Gathered(NamedTuple):
    """T tasks, contiguous: [T, rows, ...], or packed [sum of rows, ...] with `starts`."""

    x: np.ndarray
    y: np.ndarray | None
    weights: np.ndarray | None
    tasks: int
    rows: int
    starts: np.ndarray | None
    sizes: np.ndarray | None
    lengths: list[int] | None  # of the list that came, where one came
    offset: np.ndarray | None = None  # [..., out]
    distributions: bool = False  # y are such over the classes, not labels
    keeps_weightless: bool = False  # gradients by weights of 0 are wanted

    @property
    def weight_columns(self) -> int:
        """1 for weights of rows; how many targets a row has for weights of single ones."""
        by_target = self.weights is not None and self.weights.ndim == self.x.ndim
        return self.weights.shape[-1] if by_target and self.weights is not None else 1

    def native_rows(self) -> Any:
        """The native `Rows`; the arrays must stay alive."""
        return native.extension().Rows(
            address(self.x),
            address(self.y),
            address(self.weights),
            self.rows,
            address(self.starts),
            address(self.sizes),
            address(self.offset),
            self.weight_columns,
            self.distributions,
            self.keeps_weightless,
        )

    def room(self, given: Any, columns: int) -> np.ndarray:
        """Memory for `columns` values for each row: what is `given` as out, where that fits."""
        shape = (*self.x.shape[:-1], columns)
        if given is None:
            return np.empty(shape, self.x.dtype)
        if self.lengths is not None:
            raise ValueError("out: expected None where the arrays come in a list")
        out = need_array("out", given)
        if out.dtype != self.x.dtype:
            raise TypeError(f"out: expected {self.x.dtype}, got {out.dtype}")
        if out.shape != shape or not out.flags.carray:
            raise ValueError(
                f"out: expected a contiguous, writable array of shape {list(shape)}, "
                f"got shape {list(out.shape)}"
            )
        return out

    def shaped(self, outputs: np.ndarray) -> Any:
        """Rows' values in the form x came in: a list of views where that was a list."""
        if self.lengths is None:
            return outputs
        if self.starts is None:
            return list(outputs)
        return np.split(outputs, np.cumsum(self.lengths)[:-1])


def address(array: np.ndarray | None) -> int:
    """The address of an array's data; 0 for none."""
    if array is None:
        return 0
    buffer: Any = array
    try:  # five times as quick as numpy's own ways
        return addressof(c_byte.from_buffer(buffer))
    except (TypeError, ValueError, BufferError):  # read-only, not contiguous, or empty
        return int(array.__array_interface__["data"][0])


def dense(array: np.ndarray) -> np.ndarray:
    """The array, or a copy of it that is contiguous and aligned."""
    flags = array.flags
    if flags.c_contiguous and flags.aligned:
        return array
    return np.require(array, requirements=["C", "A"])


def need_array(name: str, value: Any) -> np.ndarray:
    """`value`, or a table's values; TypeError unless that is a numpy array."""
    value = of_table(name, value)
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: expected a numpy array, got {type(value).__name__}")
    if hasattr(value, "mask"):
        raise TypeError(f"{name}: expected an array without a mask, got {type(value).__name__}")
    return value


class _Arrays(Kind):
    """numpy arrays, and nothing but them."""

    noun = "array"
    whose = "as the weights are"

    def one(self, name: str, value: Any, where: str) -> np.ndarray:
        """`value` as an array."""
        return need_array(name, value)

    def is_integer(self, array: np.ndarray) -> bool:
        """Whether it holds integers."""
        return array.dtype.kind in "iu"

    def joined(self, arrays: Sequence[np.ndarray], equal: bool) -> np.ndarray:
        """Stacked or concatenated."""
        return np.stack(arrays) if equal else np.concatenate(arrays)

    def labels(self, y: np.ndarray) -> np.ndarray:
        """As int64."""
        return y.astype(np.int64, copy=False)

    def cast(self, name: str, weights: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Weights have the dtype of the model."""
        if weights.dtype != dtype:
            raise TypeError(
                f"{name}: expected {dtype}, got {weights.dtype}; {cure(weights, dtype)}"
            )
        return weights

    def device_of(self, array: np.ndarray) -> None:
        """There is one place only."""


_ARRAYS = _Arrays()


def gather(
    names: Names, x: Any, y: Any, weights: Any, expected: Expected, offset: Any = None
) -> Gathered:
    """Check one side's arguments and bring them into one of the two forms.

    Args:
        names: of the arguments.
        x: [T, rows, in], or a list of T arrays [rows_t, in]; where the architecture flattens,
            rows may have any shape of that many elements.
        y: [T, rows] classes, or [T, rows, out] values ([T, rows] where out is 1), or a list
            likewise; None where there are no targets.
        weights: [T, rows] or [T, rows, columns of y], a list of such of single tasks, or None.
        expected: what the models ask for.
        offset: [T, rows, out] ([T, rows] where out is 1), a list likewise, or None.

    Raises:
        TypeError: something is no array, or has the wrong dtype.
        ValueError: something has the wrong shape.
    """
    given = checked(_ARRAYS, names, x, y, weights, expected, sized=False, offset=offset)
    if given.more_axes:
        raise ValueError(
            f"{names.x}: expected one axis of features, got shape {list(given.x.shape)}"
        )
    x, y, weights, offset = (
        None if a is None else dense(a) for a in (given.x, given.y, given.weights, given.offset)
    )
    assert x is not None
    if expected.row_shape is not None:
        x = x.reshape(*x.shape[: 1 if given.packed else 2], expected.in_features)
    floats = y is not None and y.dtype.kind == "f"
    beside = offset, expected.loss.takes_classes and floats
    if not given.packed:
        return Gathered(x, y, weights, x.shape[0], x.shape[1], None, None, given.lengths, *beside)
    assert given.lengths is not None
    sizes = np.array(given.lengths, np.int64)
    starts = np.cumsum(sizes) - sizes
    lengths = given.lengths
    return Gathered(x, y, weights, len(sizes), int(sizes.max()), starts, sizes, lengths, *beside)


def gather_queries(
    xq: Any, tasks: int, why: str, expected: Expected, offset: Any = None, name: str = "offset"
) -> Gathered:
    """Queries for so many tasks; TypeError or ValueError as `gather`; `name` is the offset's."""
    query = gather(Names("xq", offset=name), xq, None, None, expected, offset)
    if query.tasks != tasks:
        raise ValueError(f"xq: expected {counted(tasks, 'task')}, {why}, got {query.tasks}")
    return query


def expected_of(architecture: Architecture, loss: Loss, dtype: np.dtype) -> Expected:
    """What models of an architecture ask of their inputs."""
    return Expected(
        loss,
        dtype,
        in_features=architecture.in_features,
        out_features=architecture.out_features,
        flattens=architecture.flattens,
        row_shape=architecture.row_shape,
    )


def ids_of(task_ids: Any, tasks: int) -> np.ndarray | None:
    """Task ids as int64 [T]; TypeError or ValueError where they are not T numbers >= 0."""
    if task_ids is None:
        return None
    ids = np.asarray(task_ids)
    if ids.dtype.kind not in "iu" and ids.size:
        raise TypeError(f"task_ids: expected {counted(tasks, 'integer')}, got {ids.dtype}")
    if ids.shape != (tasks,):
        raise ValueError(
            f"task_ids: expected {counted(tasks, 'integer')}, got shape {list(ids.shape)}"
        )
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= 2**63 - 1:
        raise ValueError(f"task_ids: expected integers in 0..{2**63 - 1}")
    return ids.astype(np.int64)
