"""The learning curves of fine-tuned tasks, as tensors or numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import numpy as np

from pymeta.spec.show import as_numpy, counted, number


@dataclass(frozen=True, repr=False)
class History:
    """The learning curves of T fine-tuned tasks; an epoch that did not run has NaN.

    Attributes:
        train: [T, epochs], each epoch's mean training loss.
        validation: [T, epochs + 1], the validation loss before (column 0) and after each epoch.
        best_epochs: [T] int64, after which epoch the weights kept were reached (0: the start).
        epochs: [T] int64, how many epochs ran.
    """

    train: Any
    validation: Any | None
    best_epochs: Any | None
    epochs: Any

    def __repr__(self) -> str:
        """How many curves, and their mean at both ends."""
        train = as_numpy(self.train)
        parts = [
            f"{counted(len(train), 'task')}, {counted(train.shape[1], 'epoch')}",
            f"train {_ends(train)}",
        ]
        if self.validation is not None:
            parts.append(f"validation {_ends(as_numpy(self.validation))}")
        if self.best_epochs is not None and len(train):
            best = as_numpy(self.best_epochs)
            parts.append(f"best epochs {best.min()}..{best.max()}")
        return f"History({'; '.join(parts)})"

    def to_pandas(self) -> Any:
        """The curves as a DataFrame: a row for each task and epoch that ran.

        Returns:
            Columns task, epoch (0 is the start, where there is a validation loss of it), train,
            validation (where there is one) and best (bool, where epochs were chosen).

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ModuleNotFoundError:
            raise ImportError(
                "to_pandas needs pandas, which is not installed: pip install 'pymeta-kernels[data]'"
            ) from None
        train = as_numpy(self.train)
        tasks, epochs = train.shape
        first = 0 if self.validation is not None else 1
        before = np.full((tasks, 1 - first), np.nan)
        columns: dict[str, Any] = {
            "task": np.repeat(np.arange(tasks), epochs + 1 - first),
            "epoch": np.tile(np.arange(first, epochs + 1), tasks),
            "train": np.concatenate([before, train], axis=1).ravel(),
        }
        if self.validation is not None:
            columns["validation"] = as_numpy(self.validation).ravel()
        if self.best_epochs is not None:
            best = np.repeat(as_numpy(self.best_epochs), epochs + 1 - first)
            columns["best"] = columns["epoch"] == best
        ran = columns["epoch"] <= np.repeat(as_numpy(self.epochs), epochs + 1 - first)
        return pandas.DataFrame({name: values[ran] for name, values in columns.items()})

    def values(self) -> dict[str, Any]:
        """{field: value} of what is there."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    @staticmethod
    def of(values: Mapping[str, Any]) -> History:
        """The opposite of `values`."""
        return History(**{f.name: values.get(f.name) for f in fields(History)})


def _ends(curves: np.ndarray) -> str:
    """The mean over tasks of the first and of the last value that each curve has."""
    there = np.isfinite(curves)
    some = there.any(axis=1)
    if not some.any():
        return "none finite"
    rows = np.flatnonzero(some)
    first = curves[rows, there[rows].argmax(axis=1)]
    last = curves[rows, curves.shape[1] - 1 - there[rows][:, ::-1].argmax(axis=1)]
    return f"{number(first.mean())} -> {number(last.mean())}"
