"""Adapted models in numpy, without torch: `AdaptedArrays`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from pymeta import native
from pymeta.models.file import Path, Raw
from pymeta.models.stacked import Stacked, load, positions
from pymeta.spec.architecture import Architecture
from pymeta.spec.history import History
from pymeta.spec.losses import Loss, native_loss
from pymeta.tasks.arrays import (
    DTYPE_CODES,
    Gathered,
    Rows,
    address,
    dense,
    expected_of,
    gather_queries,
)
from pymeta.tasks.checks import Expected

_RAW_DTYPES: dict[np.dtype[Any], str] = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(np.int64): "I64",
    np.dtype(np.int8): "I8",
}
_DTYPES = {code: dtype for dtype, code in _RAW_DTYPES.items()}


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
        status: [T] int8, 1 where a task's own weights are not finite, 2 where its loss grew and
            `on_divergence` was to look, else 0.
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
        *,
        problem: Any = None,
    ) -> None:
        """Called by `Adapter.adapt` and `load`; `problem` is what `predictor` makes of the rest."""
        super().__init__(architecture.names, loss, stacked, shared, tasks, status, history)
        self.architecture = architecture
        self._problem = predictor(architecture, loss) if problem is None else problem

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
            raise ValueError(
                f"{path}: its models are not a chain of layers; load it with pymeta.Adapted"
            )
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

    @cached_property
    def _expected(self) -> Expected:
        """What calls ask of their inputs."""
        return expected_of(self.architecture, self.loss, self.dtype)

    @property
    def mixes_rows(self) -> bool:
        """Whether a prediction depends on the other rows of its call, as with batch norm."""
        kinds = ("batch_norm", "step_batch_norm")  # of which a network of images may be certain
        return any(layer[0] in kinds for layer in self.architecture.layers)

    @property
    def has_categories(self) -> bool:
        """Whether some columns of a row are numbers of categories, which have no gradient."""
        return any(layer[0] == "embedding" for layer in self.architecture.layers)

    def __repr__(self) -> str:
        """How many models of what, and what is known of them."""
        return self._told(str(self.architecture))

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

    def __call__(
        self, xq: Rows, out: np.ndarray | None = None, *, offset: Rows | None = None
    ) -> Any:
        """Every model's raw outputs on its own rows.

        Args:
            xq: [T, rows, in], or a list of T arrays [rows_t, in], of the weights' dtype.
            out: [T, rows, out], contiguous, where the result goes; None for new memory, and
                where xq is a list.
            offset: [T, rows, out], [T, rows] where out is 1, or a list of single tasks': added
                to the outputs.

        Returns:
            [T, rows, out]; a list of [rows_t, out] where xq is a list.

        Raises:
            TypeError, ValueError: xq is not that, or one row comes to a batch normalisation.
        """
        query = gather_queries(xq, self._tasks, "one for each model", self._expected, offset)
        return self._predict(query, query.room(out, self.architecture.out_features))

    def _predict(self, query: Gathered, out: np.ndarray) -> Any:
        """As a call, for queries that are checked; the outputs go to `out`."""
        call, held = self._call("predict", query)
        call.results.predictions = address(out)
        call.run()
        del held
        return query.shaped(out)

    def _call(self, job: str, query: Gathered) -> tuple[Any, list[np.ndarray]]:
        """A native call with these weights, and the arrays that have to stay until it has run."""
        names = self.architecture.chain
        given = {**self._stacked, **self._shared}
        weights = [dense(given[name]) for name in names]
        call = native.extension().Call(self._problem, DTYPE_CODES[self.dtype], job)
        call.tasks = self._tasks
        call.start = [address(w) for w in weights]
        call.own_starts = [n in self._stacked for n in names]
        call.query = query.native_rows()
        return call, weights

    def input_gradients(self, xq: Rows, cotangents: Rows) -> Any:
        """The gradient of every model's sum(cotangents * outputs) by its rows.

        One native call for all of them (`pymeta.explain` makes attributions of it).

        Args:
            xq: as for a call.
            cotangents: in the shape of a call's result.

        Returns:
            In the shape of xq; a list where that is one.

        Raises:
            TypeError, ValueError: as a call.
        """
        why = "one for each model"
        query = gather_queries(xq, self._tasks, why, self._expected, cotangents, "cotangents")
        found = np.zeros_like(query.x)
        flows, query = query.offset, query._replace(offset=None)
        if flows is None:
            raise TypeError("cotangents: expected a number for each output, got None")
        if self._tasks:
            library = native.extension()
            none = np.zeros(1, self.dtype)  # the rate of the steps, of which there are none
            call, held = self._call("meta", query)
            call.rates = library.Rates(address(none))
            call.schedule = library.Schedule(steps=0)
            call.cotangents = library.Cotangents(predictions=address(flows))
            call.gradients = library.Gradients(xq=address(found))
            call.run()
            del held
        if query.lengths is None:
            return found.reshape(np.shape(xq))
        pairs = zip(query.shaped(found), xq, strict=True)
        return [value.reshape(np.shape(x)) for value, x in pairs]

    def predict_proba(self, xq: Rows, *, offset: Rows | None = None) -> Any:
        """Every model's probabilities on its own rows.

        For cross_entropy the softmax of the outputs over the classes; for bce_with_logits the
        sigmoid of each output. Neither overflows, however large the outputs are. A single
        output's [..., 1] is the probability of class 1; `np.concatenate([1 - p, p], -1)` has a
        column for each of the two classes.

        Args:
            xq: as for a call.
            offset: as for a call.

        Returns:
            [T, rows, out]; a list of [rows_t, out] where xq is a list.

        Raises:
            TypeError: the models were adapted by a loss that knows no probabilities; and as a
                call.
            ValueError: as a call.
        """
        self._check_classifies()
        outputs = self(xq, offset=offset)
        squash = softmax if self.loss.takes_classes else sigmoid
        return [squash(o) for o in outputs] if isinstance(outputs, list) else squash(outputs)

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle."""
        state = {**self.__dict__, "_problem": None}
        state.pop("_expected", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or pickled state."""
        self.__dict__.update(state)
        self._problem = predictor(self.architecture, self.loss)

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


def frozen(array: np.ndarray) -> np.ndarray:
    """A read-only copy."""
    array = np.array(array, order="C")
    array.flags.writeable = False
    return array


def checked_parameters(
    architecture: Architecture, parameters: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Copies, in order; TypeError or ValueError unless they are those of the architecture."""
    shapes = architecture.shapes()
    if not shapes or parameters.keys() != shapes.keys():
        raise ValueError(
            f"parameters: expected {', '.join(shapes) or 'some'}, "
            f"got {', '.join(parameters) or 'none'}"
        )
    first = parameters[next(iter(shapes))].dtype
    for name, shape in shapes.items():
        value = parameters[name]
        if value.dtype not in DTYPE_CODES or value.dtype != first:
            raise TypeError(
                f"parameters: {name} is {value.dtype}; expected float32 or float64 as the first is"
            )
        if value.shape != shape:
            raise ValueError(
                f"parameters: {name}: expected shape {list(shape)}, got {list(value.shape)}"
            )
    return {name: frozen(parameters[name]) for name in shapes}


def raw_of(array: np.ndarray) -> Raw:
    """An array in its stored form."""
    return Raw(_RAW_DTYPES[array.dtype], array.shape, dense(array).reshape(-1).view(np.uint8))


def array_of(raw: Raw) -> np.ndarray:
    """The opposite of `raw_of`, a view."""
    return raw.data.view(_DTYPES[raw.dtype]).reshape(raw.shape)


def predictor(architecture: Architecture, loss: Loss) -> Any:
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
