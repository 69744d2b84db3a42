"""A version of the model, and what it asks of rows that come over the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymeta.models.adapter import Adapter
from pymeta.models.arrays import sigmoid, softmax
from pymeta.serve.problem import Problem, invalid
from pymeta.spec.show import counted


@dataclass(frozen=True)
class Shape:
    """What clients see of a model: a new one of another shape breaks them."""

    in_features: int
    out_features: int
    loss: str

    def __str__(self) -> str:
        """In words."""
        size = f"{counted(self.in_features, 'feature')}, {counted(self.out_features, 'output')}"
        return f"{size}, {self.loss}"


@dataclass(frozen=True, eq=False)
class Model:
    """An adapter and the version it is known by; two are the same only if they are one object."""

    version: str
    adapter: Adapter

    @property
    def shape(self) -> Shape:
        """What clients see of it."""
        a = self.adapter
        return Shape(a.in_features, a.out_features, a.loss.kind)

    def rows(self, field: str, values: Any) -> np.ndarray:
        """Rows [rows, in]; a Problem that names the field where they are none."""
        return _matrix(field, values, self.adapter.in_features, self.adapter.dtype)

    def targets(self, field: str, values: Any, rows: int, soft: bool = False) -> np.ndarray:
        """Targets [rows] or [rows, out] as the adapter wants them; else a Problem.

        `soft` says whether classes may come as probabilities [rows, out].
        """
        found = _array(field, values, np.dtype(np.float64))
        if len(found) != rows:
            raise invalid(
                field, f"expected {counted(rows, 'target')}, one for each row, got {len(found)}"
            )
        loss, out = self.adapter.loss, self.adapter.out_features
        if loss.takes_classes and soft and found.ndim == 2:
            if found.shape[1] != out:
                raise invalid(
                    field, f"expected {counted(out, 'probability')} a row, got {_shape(found)}"
                )
            _check(field, found, (found >= 0) & (found <= 1), "a probability in 0..1")
            return _cast(field, found, self.adapter.dtype)
        if loss.takes_classes:
            return _classes(field, found, out, loss.ignore_index)
        columns = loss.target_columns(out)
        if not (found.shape == (rows, columns) or (found.ndim == 1 and columns == 1) or not rows):
            raise invalid(
                field, f"expected {counted(columns, 'value')} for each row, got {_shape(found)}"
            )
        if loss.targets == "probabilities":
            _check(field, found, (found >= 0) & (found <= 1), "a probability in 0..1")
        if loss.targets == "amounts":
            _check(field, found, found >= 0, f"a number of at least 0, as {loss.kind} takes")
        return _cast(field, found.reshape(rows, columns), self.adapter.dtype)

    def weights(self, field: str, values: Any, rows: int, single: bool = False) -> np.ndarray:
        """Weights [rows]; else a Problem.

        `single` says whether they may be those of single targets [rows, columns].
        """
        found = _array(field, values, np.dtype(np.float64))
        loss, out = self.adapter.loss, self.adapter.out_features
        columns = 1 if loss.takes_classes else loss.target_columns(out)
        of_targets = single and columns > 1 and found.shape == (rows, columns)
        if found.shape != (rows,) and not of_targets:
            each = f", or one for each of {columns} targets" if single and columns > 1 else ""
            raise invalid(
                field,
                f"expected {counted(rows, 'weight')}, one for each row{each}, got {_shape(found)}",
            )
        _check(field, found, found >= 0, "a weight >= 0")
        return _cast(field, found, self.adapter.dtype)

    def offset(self, field: str, values: Any, rows: int) -> np.ndarray:
        """What is added to outputs [rows, out]; else a Problem."""
        found, out = _array(field, values, np.dtype(np.float64)), self.adapter.out_features
        if found.shape != (rows, out) and not (found.shape == (rows,) and out == 1) and len(found):
            raise invalid(
                field,
                f"expected a number for each output, shape [{rows}, {out}], got {_shape(found)}",
            )
        if len(found) != rows:
            raise invalid(field, f"expected {counted(rows, 'row')}, got {len(found)}")
        return _cast(field, found.reshape(rows, out), self.adapter.dtype)

    def probabilities(self, outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of outputs [rows, out] each; a Problem where the loss knows no probabilities."""
        loss = self.adapter.loss
        if loss.kind not in ("cross_entropy", "bce_with_logits"):
            raise invalid("probabilities", f"the loss {loss.kind} has none")
        squash = softmax if loss.takes_classes else sigmoid
        return [squash(o) for o in outputs]


def _array(field: str, values: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """Numbers as an array of one or two axes."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "fiu":
            raise invalid(field, f"expected numbers, got {values.dtype}")
        found = values
    else:
        try:
            found = np.array(values, np.float64)
        except ValueError:
            raise _ragged(field, values) from None
    if not 1 <= found.ndim <= 2:
        raise invalid(field, f"expected one or two axes, got {found.ndim}")
    return _cast(field, found, dtype)


def _cast(field: str, found: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Contiguous and of a dtype; a Problem unless all of it is finite there."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(found, dtype)
    if not np.isfinite(cast).all():
        _check(field, cast, np.isfinite(cast), f"a finite number within {dtype}")
    return cast


def _matrix(field: str, values: Any, columns: int, dtype: np.dtype[Any]) -> np.ndarray:
    if not len(values):
        return np.empty((0, columns), dtype)
    found = _array(field, values, dtype)
    if found.ndim != 2 or found.shape[1] != columns:
        raise invalid(field, f"expected rows of {counted(columns, 'feature')}, got {_shape(found)}")
    return found


def _classes(field: str, found: np.ndarray, classes: int, ignored: int) -> np.ndarray:
    if found.ndim != 1:
        raise invalid(field, f"expected one class for each row, got {_shape(found)}")
    allowed = ((found >= 0) & (found < classes) & (found == np.floor(found))) | (found == ignored)
    _check(field, found, allowed, f"a class in 0..{classes - 1}")
    return found.astype(np.int64)


def _check(field: str, found: np.ndarray, allowed: np.ndarray, wanted: str) -> None:
    """A Problem that names the first value that is not allowed; the value is not repeated."""
    if not allowed.all():
        place = np.unravel_index(int(np.argmin(allowed)), allowed.shape)
        raise invalid(f"{field}.{'.'.join(map(str, place))}", f"expected {wanted}")


def _shape(found: np.ndarray) -> str:
    return f"shape {list(found.shape)}"


def _ragged(field: str, values: Sequence[Any]) -> Problem:
    """Rows of different lengths: name the first that differs."""
    lengths = [len(row) if isinstance(row, list) else -1 for row in values]
    odd = next(i for i, n in enumerate(lengths) if n != lengths[0])
    return invalid(
        f"{field}.{odd}", f"expected {counted(lengths[0], 'value')} as the row before, got another"
    )
