"""Adapted models and their tasks in numpy, without torch: `AdaptedArrays`, `Gathered`.

`gather` is to numpy what `tasks.py` is to torch, with fewer forms: all tasks have equally many
rows (arrays with a leading task axis), or each has its own (lists of arrays, one for each task).
Nothing is cast: values have the dtype of the weights, classes are integers. Arrays that are not
contiguous are copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from pymeta import native
from pymeta.models.file import Path, Raw
from pymeta.models.stacked import Stacked, load, positions
from pymeta.spec.architecture import Architecture
from pymeta.spec.history import History
from pymeta.spec.losses import Loss, native_loss

Rows: TypeAlias = "np.ndarray | Sequence[np.ndarray]"
Pointers: TypeAlias = tuple[int, int, int, int, int, int]  # `Rows` of _native.pyi

DTYPE_CODES = {np.dtype(np.float32): 4, np.dtype(np.float64): 8}
_RAW_DTYPES: dict[np.dtype[Any], str] = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(np.int64): "I64",
    np.dtype(np.int8): "I8",
}
_DTYPES = {code: dtype for dtype, code in _RAW_DTYPES.items()}


# ---- tasks ------------------------------------------------------------------------------------


class Names(NamedTuple):
    """What the caller knows the arguments as, for messages."""

    x: str
    y: str = ""
    weights: str = ""


class Expected(NamedTuple):
    """What the models ask of their inputs."""

    architecture: Architecture
    loss: Loss
    dtype: np.dtype


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

    def pointers(self) -> Pointers:
        """For the native core; the arrays must stay alive."""
        return (
            address(self.x),
            address(self.y),
            address(self.weights),
            self.rows,
            address(self.starts),
            address(self.sizes),
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
    """Where an array's data lie; 0 for none."""
    return 0 if array is None else array.__array_interface__["data"][0]


def dense(array: np.ndarray) -> np.ndarray:
    """The array, or a copy of it that is contiguous and aligned."""
    return np.require(array, requirements=["C", "A"])


def need_array(name: str, value: Any) -> np.ndarray:
    """`value`, or TypeError where it is no numpy array."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: expected a numpy array, got {type(value).__name__}")
    if hasattr(value, "mask"):
        raise TypeError(f"{name}: expected an array without a mask, got {type(value).__name__}")
    return value


def _joined(name: str, values: Sequence[Any], lengths: list[int] | None) -> np.ndarray:
    """A list's arrays one behind the other, of the given lengths where there are some."""
    if not values:
        raise ValueError(
            f"{name}: expected one array for each task, got an empty list "
            f"(no tasks at all is an array of shape [0, rows, ...])"
        )
    if lengths is not None and len(values) != len(lengths):
        raise ValueError(f"{name}: expected {len(lengths)} arrays, got {len(values)}")
    first = need_array(f"{name}[0]", values[0])
    for t, value in enumerate(values):
        need_array(f"{name}[{t}]", value)
        if value.ndim == 0 or value.shape[1:] != first.shape[1:]:
            like = "".join(f", {n}" for n in first.shape[1:])
            raise ValueError(
                f"{name}[{t}]: expected shape [rows{like}] as {name}[0] has, "
                f"got {list(value.shape)}"
            )
        if value.dtype != first.dtype:
            raise TypeError(f"{name}[{t}]: expected {first.dtype} as {name}[0], got {value.dtype}")
        if lengths is not None and len(value) != lengths[t]:
            raise ValueError(f"{name}[{t}]: expected {lengths[t]} rows, got {len(value)}")
    return np.concatenate(values)


def _check_x(name: str, x: np.ndarray, expected: Expected, lead: int) -> np.ndarray:
    """Bring x into the form [..., in]; `lead` axes come before the features."""
    if x.dtype != expected.dtype:
        raise TypeError(f"{name}: expected {expected.dtype} as the weights are, got {x.dtype}")
    features = expected.architecture.in_features
    if expected.architecture.flattens and x.ndim > lead + 1:
        x = x.reshape(*x.shape[:lead], math.prod(x.shape[lead:]))
    if x.ndim != lead + 1 or x.shape[-1] != features:
        axes = "tasks, rows" if lead == 2 else "rows"
        raise ValueError(f"{name}: expected shape [{axes}, {features}], got {list(x.shape)}")
    return dense(x)


def _check_y(name: str, y: np.ndarray, expected: Expected, lead: tuple[int, ...]) -> np.ndarray:
    """Bring y into the form [...] (classes) or [..., out] for rows of the shape `lead`."""
    out, shown = expected.architecture.out_features, ", ".join(map(str, lead))
    if expected.loss.takes_classes:
        if y.dtype.kind not in "iu":
            raise TypeError(f"{name}: expected class indices (integers), got {y.dtype}")
        if y.shape != lead:
            raise ValueError(f"{name}: expected shape [{shown}], got {list(y.shape)}")
        return dense(y.astype(np.int64, copy=False))
    if y.dtype != expected.dtype:
        raise TypeError(f"{name}: expected {expected.dtype} as the weights are, got {y.dtype}")
    if y.shape != (*lead, out) and not (out == 1 and y.shape == lead):
        bare = f" or [{shown}]" if out == 1 else ""
        raise ValueError(f"{name}: expected shape [{shown}, {out}]{bare}, got {list(y.shape)}")
    return dense(y)


def _check_weights(
    name: str, weights: np.ndarray, expected: Expected, lead: tuple[int, ...]
) -> np.ndarray:
    if weights.dtype != expected.dtype:
        raise TypeError(f"{name}: expected {expected.dtype}, got {weights.dtype}")
    if weights.shape != lead:
        raise ValueError(
            f"{name}: expected one weight for each row, shape [{', '.join(map(str, lead))}], "
            f"got {list(weights.shape)}"
        )
    return dense(weights)


def gather(names: Names, x: Any, y: Any, weights: Any, expected: Expected) -> Gathered:
    """Check one side's arguments and bring them into one of the two forms.

    Args:
        names: of the arguments.
        x: [T, rows, in], or a list of T arrays [rows_t, in]; where the architecture flattens,
            rows may have any shape of that many elements.
        y: [T, rows] classes, or [T, rows, out] values ([T, rows] where out is 1), or a list
            likewise; None where there are no targets.
        weights: [T, rows], a list of [rows_t], or None.
        expected: what the models ask for.

    Raises:
        TypeError: something is no array, or has the wrong dtype.
        ValueError: something has the wrong shape.
    """
    lengths: list[int] | None = None
    if isinstance(x, (list, tuple)):
        x, given = _joined(names.x, x, None), x
        lengths = [len(value) for value in given]
    x = _check_x(names.x, need_array(names.x, x), expected, 2 if lengths is None else 1)
    lead = x.shape[:-1]
    if y is not None:
        y = _check_y(names.y, _alike(names, names.y, y, lengths), expected, lead)
    if weights is not None:
        found = _alike(names, names.weights, weights, lengths)
        weights = _check_weights(names.weights, found, expected, lead)
    if lengths is None:
        return Gathered(x, y, weights, lead[0], lead[1], None, None, None)
    if min(lengths) == max(lengths):
        shape = (len(lengths), lengths[0])
        x, y, weights = (
            None if a is None else a.reshape(*shape, *a.shape[1:]) for a in (x, y, weights)
        )
        return Gathered(x, y, weights, *shape, None, None, lengths)
    sizes = np.array(lengths, np.int64)
    starts = np.cumsum(sizes) - sizes
    return Gathered(x, y, weights, len(lengths), max(lengths), starts, sizes, lengths)


def gather_queries(xq: Any, tasks: int, why: str, expected: Expected) -> Gathered:
    """Queries for so many tasks; TypeError or ValueError as `gather`."""
    query = gather(Names("xq"), xq, None, None, expected)
    if query.tasks != tasks:
        raise ValueError(f"xq: expected {tasks} tasks, {why}, got {query.tasks}")
    return query


def _alike(names: Names, name: str, values: Any, lengths: list[int] | None) -> np.ndarray:
    """`values` as one array; a list exactly where x was one, of the same lengths."""
    if lengths is None:
        return need_array(name, values)
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            f"{name}: expected a list of {len(lengths)} arrays because {names.x} is one, "
            f"got {type(values).__name__}"
        )
    return _joined(name, values, lengths)


# ---- models -----------------------------------------------------------------------------------


class AdaptedArrays(Stacked[np.ndarray]):
    """T models of one chain of layers, each with its own weights; what `Adapter.adapt` returns.

    The twin of `pymeta.Adapted` that needs no torch; the two read each other's files.

        models(xq)                     all models, each on its own rows, in one native call
        models[10:20], models[mask]    some of the tasks; a slice is a view
        AdaptedArrays.concatenate([a, b])
        models.save(path), AdaptedArrays.load(path)

    It may be called from many threads at once.

    Attributes:
        architecture: the chain of layers.
        parameters: {name: [T, ...]}; those that were not adapted are views of one array.
        status: [T] int8, 0 where a task's own weights are finite, 1 where it diverged.
        loss: a description of the loss they were adapted by.
        history: learning curves, where a file has them.
    """

    def __init__(
        self,
        architecture: Architecture,
        loss: Loss,
        stacked: Mapping[str, np.ndarray],
        shared: Mapping[str, np.ndarray],
        tasks: int,
        status: np.ndarray | None = None,
        history: History | None = None,
    ) -> None:
        """Called by `Adapter.adapt` and `load`."""
        super().__init__(architecture.names, loss, stacked, shared, tasks, status, history)
        self.architecture = architecture
        self._problem = _predictor(architecture, loss)

    @classmethod
    def load(cls, path: Path, *, verify: bool = False) -> AdaptedArrays:
        """The models of a file that `save` (or `Adapted.save`) wrote, memory-mapped.

        Nothing but the header is read before it is needed. Writing into the parameters changes
        neither the file nor what others see of it.

        Args:
            path: of the file.
            verify: read all of it now and compare it with its checksum.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, of another kind, or of a newer version, or its
                models are of a structure that needs torch.
        """
        saved = load(path, verify)
        if saved.architecture is None:
            raise ValueError(f"{path}: its models are no chain of layers; pymeta.Adapted loads it")
        raws = [*saved.stacked.values(), *saved.shared.values()]
        if len({raw.dtype for raw in raws}) != 1 or raws[0].dtype not in ("F32", "F64"):
            raise ValueError(f"{path}: its weights are neither all F32 nor all F64")
        if any(raw.dtype not in _DTYPES for raw in saved.history.values()):
            raise ValueError(f"{path}: its history is of a dtype that numpy lacks")
        history = {name: array_of(raw) for name, raw in saved.history.items()}
        return cls(
            saved.architecture,
            saved.loss,
            {name: array_of(raw) for name, raw in saved.stacked.items()},
            {name: array_of(raw) for name, raw in saved.shared.items()},
            saved.tasks,
            array_of(saved.status),
            History.of(history) if history else None,
        )

    @property
    def dtype(self) -> np.dtype:
        """Of the weights, the inputs and the outputs."""
        return (self._stacked | self._shared)[self._names[0]].dtype

    def __repr__(self) -> str:
        """A line that says how many models of what."""
        return f"AdaptedArrays({self._tasks} x {self.architecture})"

    def __getitem__(self, task: Any) -> AdaptedArrays:
        """The models of some tasks.

        Args:
            task: a slice (a view), or integers or a mask of T bools as a list or array (a copy).
                An integer is refused: one model is `models[i : i + 1]`, its weights are
                `models.state_dict(i)`.

        Raises:
            TypeError: `task` is none of these.
            IndexError: there is no such task, or the mask is not of T bools.
        """
        where = positions(task, self._tasks)
        if isinstance(where, int):
            raise TypeError(
                "task: expected a slice, a list of integers or a mask of bools, got an integer; "
                "one model is models[i : i + 1], its weights are models.state_dict(i)"
            )
        return self._at(where)

    def state_dict(self, task: int) -> dict[str, np.ndarray]:
        """Copies of one task's parameters, by name.

        Raises:
            TypeError: `task` is no integer.
            IndexError: there is no such task.
        """
        return {name: value.copy() for name, value in self._of_task(self._number(task)).items()}

    def __call__(self, xq: Rows, out: np.ndarray | None = None) -> Any:
        """Every model's raw outputs on its own rows.

        Args:
            xq: [T, rows, in], or a list of T arrays [rows_t, in], of the weights' dtype.
            out: [T, rows, out], contiguous, where the result goes; None for new memory, and
                where xq is a list.

        Returns:
            [T, rows, out]; a list of [rows_t, out] where xq is a list.

        Raises:
            TypeError, ValueError: xq is not that, or one row comes to a batch normalisation.
        """
        expected = Expected(self.architecture, self.loss, self.dtype)
        query = gather_queries(xq, self._tasks, "one for each model", expected)
        return self._predict(query, query.room(out, self.architecture.out_features))

    def _predict(self, query: Gathered, out: np.ndarray) -> Any:
        """As a call, for queries that are checked; the outputs go to `out`."""
        names = self.architecture.chain
        given = {**self._stacked, **self._shared}
        weights = [dense(given[name]) for name in names]
        self._problem.predict(
            DTYPE_CODES[self.dtype],
            [address(w) for w in weights],
            [n in self._stacked for n in names],
            self._tasks,
            query.pointers(),
            address(out),
        )
        return query.shaped(out)

    def predict_proba(self, xq: Rows) -> Any:
        """Every model's probabilities on its own rows.

        For cross_entropy the softmax of the outputs over the classes; for bce_with_logits the
        sigmoid of each output. Neither overflows, however large the outputs are. A single
        output's [..., 1] is the probability of class 1; `np.concatenate([1 - p, p], -1)` has a
        column for each of the two classes.

        Args:
            xq: as for a call.

        Returns:
            [T, rows, out]; a list of [rows_t, out] where xq is a list.

        Raises:
            TypeError: the models were adapted by a loss that knows no probabilities; and as a
                call.
            ValueError: as a call.
        """
        self._check_classifies()
        outputs = self(xq)
        squash = softmax if self.loss.takes_classes else sigmoid
        return [squash(o) for o in outputs] if isinstance(outputs, list) else squash(outputs)

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle."""
        return {**self.__dict__, "_problem": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or pickled state."""
        self.__dict__.update(state)
        self._problem = _predictor(self.architecture, self.loss)

    # ---- what `Stacked` needs to know of arrays -----------------------------------------------

    def _architecture(self) -> Architecture:
        return self.architecture

    def _difference(self, other: AdaptedArrays) -> str | None:
        if other.architecture != self.architecture:
            return f"its model is {other.architecture}"
        return super()._difference(other)

    @staticmethod
    def _index(where: np.ndarray) -> np.ndarray:
        return where

    @staticmethod
    def _expanded(value: np.ndarray, tasks: int) -> np.ndarray:
        return np.broadcast_to(value, (tasks, *value.shape))

    @staticmethod
    def _joined(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(values)

    @staticmethod
    def _widened(value: np.ndarray, width: int) -> np.ndarray:
        return np.pad(value, ((0, 0), (0, width - value.shape[1])), constant_values=np.nan)

    @staticmethod
    def _same(a: np.ndarray, b: np.ndarray) -> bool:
        return a is b or np.array_equal(a, b)

    @staticmethod
    def _not_finite(values: Iterable[np.ndarray], tasks: int) -> np.ndarray:
        status = np.zeros(tasks, np.int8)
        for value in values:
            status[~np.isfinite(value).all(axis=tuple(range(1, value.ndim)))] = 1
        return status

    @staticmethod
    def _to_raw(value: np.ndarray) -> Raw:
        return raw_of(value)


def raw_of(array: np.ndarray) -> Raw:
    """An array as it lies in a file."""
    return Raw(_RAW_DTYPES[array.dtype], array.shape, dense(array).reshape(-1).view(np.uint8))


def array_of(raw: Raw) -> np.ndarray:
    """The opposite of `raw_of`, a view."""
    return raw.data.view(_DTYPES[raw.dtype]).reshape(raw.shape)


def _predictor(architecture: Architecture, loss: Loss) -> Any:
    """A native Problem to predict with; what it would adapt does not matter."""
    tensors = len(architecture.chain)
    return native.extension().Problem(
        architecture.network(), native_loss(loss), [False] * tensors, [0] * tensors
    )


def softmax(z: np.ndarray) -> np.ndarray:
    """Softmax over the last axis: the largest exponent is 0, so none overflows."""
    with np.errstate(invalid="ignore"):  # infinite outputs give NaN, as in torch
        p: np.ndarray = np.exp(z - z.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return p


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)), by exponents that are never above 0."""
    e = np.exp(-np.abs(z))
    p: np.ndarray = np.where(z < 0, e, np.ones_like(e)) / (1 + e)
    return p
