"""T models of one structure in stacked arrays: what `Adapted` and `AdaptedArrays` share.

A parameter that all models have in common is kept once, one that each has of its own as
[T, ...]. Everything here works on tensors and on numpy arrays alike; what differs between the two
are the few static methods at the end of `Stacked`. In a file each parameter is one tensor under
its own name, shared ones without the task axis, and the file says which they are.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np

from pymeta.models.entities import checked, write_entities
from pymeta.models.file import Contents, Path, Raw, errors_about, read, write
from pymeta.spec.architecture import Architecture, Shape, read_architecture
from pymeta.spec.fields import Fields
from pymeta.spec.history import History
from pymeta.spec.losses import Loss, check_width, loss_fields, read_loss
from pymeta.spec.show import counted

Array = TypeVar("Array")  # torch.Tensor or np.ndarray
Self = TypeVar("Self", bound="Stacked[Any]")


def positions(index: Any, tasks: int) -> int | slice | np.ndarray:
    """Which of `tasks` tasks an index means.

    Args:
        index: an integer; a slice; integers or a mask of bools, as a list, array or tensor.
        tasks: their number.

    Returns:
        An int in 0..tasks-1, a slice with a positive step, or int64 positions.

    Raises:
        TypeError: it is none of these.
        IndexError: there is no such task, or the mask has another length.
    """
    if isinstance(index, slice):
        start, stop, step = index.indices(tasks)
        return slice(start, stop, step) if step > 0 else np.arange(start, stop, step)
    if not isinstance(index, (list, tuple)) and getattr(index, "ndim", 0) == 0:
        try:
            return int(_in_range(np.asarray(operator.index(index)), tasks))
        except TypeError:
            raise _no_index(type(index).__name__) from None
    try:
        chosen = np.asarray(index)
    except (TypeError, ValueError):  # a ragged list, a tensor on another device
        raise _no_index(type(index).__name__) from None
    if chosen.size == 0 and isinstance(index, (list, tuple)):
        return np.zeros(0, np.int64)
    if chosen.ndim != 1 or chosen.dtype.kind not in "biu":
        raise _no_index(f"{chosen.dtype} of shape {list(chosen.shape)}")
    if chosen.dtype.kind == "b":
        if chosen.size != tasks:
            raise IndexError(
                f"task: a mask of {counted(chosen.size, 'bool')} for {counted(tasks, 'task')}"
            )
        return np.flatnonzero(chosen)
    return _in_range(chosen.astype(np.int64), tasks)


def _no_index(got: str) -> TypeError:
    return TypeError(
        f"task: expected an integer, a slice, a list of integers or a mask of bools, got {got}"
    )


def _in_range(chosen: np.ndarray, tasks: int) -> np.ndarray:
    wrong = chosen[(chosen < -tasks) | (chosen >= tasks)]
    if wrong.size:
        raise IndexError(f"task: {wrong.flat[0]} is not one of {counted(tasks, 'task')}")
    return np.where(chosen < 0, chosen + tasks, chosen)


class Stacked(ABC, Generic[Array]):
    """T models of one structure, each with its own weights.

    Attributes:
        loss: what they were adapted by, as a description.
        history: the learning curves, where they were requested.
    """

    def __init__(
        self,
        names: Iterable[str],
        loss: Loss,
        stacked: Mapping[str, Array],
        shared: Mapping[str, Array],
        tasks: int,
        status: Array | None,
        history: History | None,
    ) -> None:
        """Hold them, without a copy.

        Args:
            names: of all parameters, in the model's order.
            loss: what they were adapted by.
            stacked: {name: [tasks, ...]}, the parameters of which each task has its own.
            shared: {name: [...]}, all others.
            tasks: how many.
            status: [tasks] int8; None to look at the weights when it is first asked for.
            history: of the adaptation, if there is one.
        """
        self._names = tuple(names)
        self.loss = loss
        self._stacked = dict(stacked)
        self._shared = dict(shared)
        self._tasks = tasks
        self._status = status
        self.history = history

    @property
    def parameters(self) -> dict[str, Array]:
        """{name: [T, ...]} in the model's order; shared ones are expanded views."""
        return {name: self._whole(name) for name in self._names}

    @property
    def status(self) -> Array:
        """[T] int8: 0 where all of a task's own weights are finite, 1 where it diverged."""
        if self._status is None:
            self._status = self._not_finite(self._stacked.values(), self._tasks)
        return self._status

    def _told(self, model: str) -> str:
        """What `repr` says: how many models of what, their size, and what is known of them."""
        own: Iterable[Any] = self._stacked.values()
        common: Iterable[Any] = self._shared.values()
        adapted = sum(math.prod(value.shape[1:]) for value in own)
        size = adapted + sum(math.prod(value.shape) for value in common)
        parts = [f"{self._tasks:,} x {model}", f"{counted(size, 'parameter', form=',')} each"]
        if self._shared:
            parts[-1] += f", {adapted:,} of them adapted"
        parts.append(self.loss.name)
        if self._status is not None:  # what is not known yet is not worked out to be shown
            status: Any = self._status
            for code, what in ((1, "not finite"), (2, "of a loss that grew")):
                count = int((status == code).sum())
                parts += [f"{count:,} {what}"] if count else []
        parts += ["with history"] if self.history is not None else []
        return f"{type(self).__name__}({'; '.join(parts)})"

    def __len__(self) -> int:
        """The number of tasks."""
        return self._tasks

    def _check_classifies(self) -> None:
        if self.loss.kind not in ("cross_entropy", "bce_with_logits"):
            raise TypeError(
                f"predict_proba: expected models of the loss cross_entropy or bce_with_logits, "
                f"these are of {self.loss.kind}"
            )

    def _whole(self, name: str) -> Array:
        own = self._stacked.get(name)
        return self._expanded(self._shared[name], self._tasks) if own is None else own

    def _number(self, task: Any) -> int:
        """Which task an integer means; TypeError or IndexError where it is none of them."""
        where = positions(task, self._tasks)
        if not isinstance(where, int):
            raise TypeError(f"task: expected an integer, got {type(task).__name__}")
        return where

    def _of_task(self, task: int) -> dict[str, Array]:
        """{name: value} of one task; views."""
        return {n: self._whole(n)[task] for n in self._names}  # type: ignore[index]

    def _at(self: Self, where: slice | np.ndarray) -> Self:
        """The models at some positions; views where they are a slice."""
        tasks = len(range(*where.indices(self._tasks)) if isinstance(where, slice) else where)
        index = where if isinstance(where, slice) else self._index(where)
        history = self.history and History.of(
            {name: value[index] for name, value in self.history.values().items()}
        )
        stacked = {name: value[index] for name, value in self._stacked.items()}
        status = None if self._status is None else self._status[index]
        return self._like(stacked, self._shared, tasks, status, history)

    @classmethod
    def concatenate(cls: type[Self], models: Iterable[Self]) -> Self:
        """All models of several objects in one, in their order.

        What is shared stays shared where it is the same in all of them. The history is kept where
        every one of them has the same parts of one; shorter curves are filled up with NaN.

        Raises:
            TypeError: one of them is something else.
            ValueError: there is none, or they differ in structure, names, shapes, dtype or loss.
        """
        models = list(models)
        for i, each in enumerate(models):
            if not isinstance(each, cls):
                raise TypeError(
                    f"models[{i}]: expected a pymeta.{cls.__name__}, got {type(each).__name__}"
                )
            difference = models[0]._difference(each)
            if difference:
                raise ValueError(f"models[{i}]: {difference}, which differs from models[0]")
        if not models:
            raise ValueError("models: expected at least one, got an empty list")
        stacked, shared = {}, {}
        for name in models[0]._names:
            common = [m._shared.get(name) for m in models]
            if all(c is not None and cls._same(c, common[0]) for c in common):
                shared[name] = common[0]
            else:
                stacked[name] = cls._joined([m._whole(name) for m in models])
        status = cls._joined([m.status for m in models])
        tasks = sum(m._tasks for m in models)
        return models[0]._like(stacked, shared, tasks, status, cls._joined_history(models))

    @classmethod
    def _joined_history(cls, models: list[Self]) -> History | None:
        parts = [m.history.values() if m.history else {} for m in models]
        if not parts[0] or any(part.keys() != parts[0].keys() for part in parts):
            return None
        joined = {}
        for name in parts[0]:
            values = [part[name] for part in parts]
            if values[0].ndim == 2:
                width = max(v.shape[1] for v in values)
                values = [cls._widened(v, width) for v in values]
            joined[name] = cls._joined(values)
        return History.of(joined)

    def _difference(self: Self, other: Self) -> str | None:
        """What of `other` keeps the two from being one object, if anything does."""
        if other.loss != self.loss:
            return f"its loss is {other.loss}"
        if other._names != self._names:
            return f"its parameters are {', '.join(other._names) or 'none'}"
        for name in self._names:
            mine, its = self._whole(name), other._whole(name)
            if its.shape[1:] != mine.shape[1:]:
                return f"{name} has the shape {list(its.shape[1:])}"
            if its.dtype != mine.dtype:
                return f"{name} is {its.dtype}"
        return None

    # ---- files --------------------------------------------------------------------------------

    def save(self, path: Path, *, entities: Iterable[Any] | None = None) -> None:
        """Write all models into one safetensors file; what they share is written once.

        The file is written under another name and then renamed, so that no reader sees half
        of it.

        Args:
            path: of the file.
            entities: whose each model is, T names in the models' order. They are written beside
                it, into a file that ends in .entities.json, from which `pymeta predict` has them.

        Raises:
            OSError: it cannot be written.
            TypeError: a parameter has a dtype that these files do not hold.
            ValueError: there are not T names, or one of them twice.
        """
        names = None if entities is None else checked(entities, self._tasks)
        architecture = self._architecture()
        own = {
            f".history.{n}": v for n, v in (self.history.values() if self.history else {}).items()
        }
        own[".status"] = self.status
        described = {
            "architecture": None if architecture is None else architecture.described(),
            "loss": loss_fields(self.loss),
            "models": {
                "tasks": self._tasks,
                "names": list(self._names),
                "shared": sorted(self._shared),
                "history": sorted(n.removeprefix(".history.") for n in own if n != ".status"),
            },
        }
        tensors = {**self._stacked, **self._shared, **own}
        write(path, "models", described, {name: self._to_raw(v) for name, v in tensors.items()})
        if names is not None:
            write_entities(path, names)

    def _like(
        self: Self,
        stacked: dict[str, Array],
        shared: dict[str, Array],
        tasks: int,
        status: Array | None,
        history: History | None,
    ) -> Self:
        """An object of the same structure that holds these."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._stacked, other._shared, other._tasks = stacked, shared, tasks
        other._status, other.history = status, history
        return other

    # ---- what differs between torch and numpy -------------------------------------------------

    @abstractmethod
    def _architecture(self) -> Architecture | None:
        """The chain of layers; None where the structure is not a chain."""

    @staticmethod
    @abstractmethod
    def _index(where: np.ndarray) -> Any:
        """Positions in the form that indexes an array."""

    @staticmethod
    @abstractmethod
    def _expanded(value: Array, tasks: int) -> Array:
        """[...] as a view [tasks, ...]."""

    @staticmethod
    @abstractmethod
    def _joined(values: list[Array]) -> Array:
        """[T_i, ...] one after another."""

    @staticmethod
    @abstractmethod
    def _widened(value: Array, width: int) -> Array:
        """[T, n] with NaN in new columns up to `width`."""

    @staticmethod
    @abstractmethod
    def _same(a: Array, b: Array) -> bool:
        """Whether two arrays are equal."""

    @staticmethod
    @abstractmethod
    def _not_finite(values: Iterable[Array], tasks: int) -> Array:
        """[tasks] int8: 1 where a value of the task is not finite."""

    @staticmethod
    @abstractmethod
    def _to_raw(value: Array) -> Raw:
        """An array in its stored form."""


@dataclass(frozen=True)
class Saved:
    """The contents of a file of models, checked: what `Stacked` was made of."""

    architecture: Architecture | None
    names: tuple[str, ...]
    loss: Loss
    stacked: dict[str, Raw]
    shared: dict[str, Raw]
    tasks: int
    status: Raw
    history: dict[str, Raw]

    def shapes(self) -> dict[str, Shape]:
        """{name: shape} of one model's parameters."""
        return {
            n: self.shared[n].shape if n in self.shared else self.stacked[n].shape[1:]
            for n in self.names
        }


def load(path: Path, verify: bool) -> Saved:
    """Map a file that `Stacked.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another kind, or of a newer version.
    """
    contents = read(path, "models", verify=verify)
    with errors_about(contents.path):
        return _saved(contents)


def _saved(contents: Contents) -> Saved:
    described = Fields("metadata", contents.described)
    architecture = None
    if not described.is_null("architecture"):
        architecture = read_architecture(described.take("architecture", dict, "an object"))
    loss = read_loss(described.object("loss"))
    models = described.object("models")
    described.end()
    tasks, names = models.integer("tasks", 0), models.list_of("names", str)
    shared = set(models.list_of("shared", str))
    history = models.list_of("history", str)
    models.end()
    tensors = dict(contents.tensors)
    expected = {*names, ".status", *(f".history.{name}" for name in history)}
    if tensors.keys() != expected or not shared <= set(names) or len(set(names)) != len(names):
        odd = sorted(tensors.keys() ^ expected) or sorted(shared - set(names)) or names
        raise ValueError(f"the tensors are not those it says it has (see {odd[0][:60]!r})")
    out = Saved(
        architecture,
        names,
        loss,
        stacked={n: tensors[n] for n in names if n not in shared},
        shared={n: tensors[n] for n in names if n in shared},
        tasks=tasks,
        status=tensors[".status"],
        history={n: tensors[f".history.{n}"] for n in history},
    )
    _check(out)
    return out


def _check(saved: Saved) -> None:
    """Raise ValueError where shapes and dtypes are not what they must be."""
    tasks = saved.tasks
    for name, raw in saved.stacked.items():
        if raw.shape[:1] != (tasks,):
            raise ValueError(
                f"{name} has the shape {list(raw.shape)}, expected {counted(tasks, 'task')}"
            )
    wrong = [n for n, r in (saved.stacked | saved.shared).items() if r.dtype in ("I8", "I64")]
    if wrong:
        raise ValueError(f"{wrong[0]} is not of a floating point dtype")
    _expect(".status", saved.status, (tasks,), ("I8",))
    _check_history(saved.history, tasks)
    if saved.architecture is not None:
        check_width(saved.loss, saved.architecture.out_features)
        shapes = saved.architecture.shapes()
        if list(shapes.items()) != list(saved.shapes().items()):
            name = next((n for n in shapes if saved.shapes().get(n) != shapes[n]), "their order")
            raise ValueError(f"the parameters do not fit the architecture (see {name})")


def _check_history(history: dict[str, Raw], tasks: int) -> None:
    if not history:
        return
    if not {"train", "epochs"} <= history.keys() <= {f.name for f in fields(History)}:
        raise ValueError(f"a history of {', '.join(history)[:60]}")
    epochs = history["train"].shape[-1] if history["train"].shape else 0
    for name, raw in history.items():
        if name in ("train", "validation"):
            shape = (tasks, epochs + (name == "validation"))
            _expect(f".history.{name}", raw, shape, ("F16", "BF16", "F32", "F64"))
        else:
            _expect(f".history.{name}", raw, (tasks,), ("I64",))


def _expect(name: str, raw: Raw, shape: Shape, dtypes: tuple[str, ...]) -> None:
    if raw.shape != shape or raw.dtype not in dtypes:
        raise ValueError(
            f"{name} is {raw.dtype} of shape {list(raw.shape)}, expected {' or '.join(dtypes)} "
            f"of shape {list(shape)}"
        )
