"""The rows of all tasks one after another, and the models that are asked about them.

Whatever form the rows came in (one array, a list, tensors), they are handled as one numpy array
[N, *row] and the tasks' sizes, so that nothing here costs Python more for more tasks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pymeta.tasks.checks import of_table
from pymeta.tasks.ragged import Ragged, in_tasks


def as_array(name: str, value: Any) -> np.ndarray:
    """A tensor, table, list of numbers or array as an array; TypeError where it is none."""
    value = of_table(name, value)
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    found = np.asarray(value)
    if found.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected numbers, got {type(value).__name__}")
    return found


class Packed(NamedTuple):
    """The rows of T tasks."""

    values: np.ndarray  # [N, *row]
    sizes: np.ndarray  # int64 [T]
    is_list: bool  # whether they came as one
    rows: int = 0  # of each task, where they came as one array

    @classmethod
    def of(cls, name: str, x: Any) -> Packed:
        """Rows as a caller gives them: [T, rows, *row], a list of [rows_t, *row], or a `Ragged`.

        Raises:
            TypeError: they are no numbers.
            ValueError: an array has fewer than three axes, or a list's arrays do not fit.
        """
        if isinstance(x, Ragged):
            return cls(as_array(name, x.values), x.sizes, True)
        if isinstance(x, (list, tuple)):
            if not x:
                raise ValueError(f"{name}: expected an array for each task, got an empty list")
            each = [as_array(f"{name}[{t}]", value) for t, value in enumerate(x)]
            odd = [t for t, v in enumerate(each) if v.ndim < 2 or v.shape[1:] != each[0].shape[1:]]
            if odd:
                raise ValueError(
                    f"{name}[{odd[0]}]: expected shape [rows, features] as {name}[0] has, got "
                    f"{list(each[odd[0]].shape)}"
                )
            return cls(np.concatenate(each), np.array([len(v) for v in each], np.int64), True)
        values = as_array(name, x)
        if values.ndim < 3:
            raise ValueError(
                f"{name}: expected shape [tasks, rows, features], got {list(values.shape)}"
            )
        tasks, rows = values.shape[:2]
        sizes = np.full(tasks, rows, np.int64)
        return cls(values.reshape(tasks * rows, *values.shape[2:]), sizes, False, rows)

    @property
    def row(self) -> tuple[int, ...]:
        """The shape of a row."""
        return tuple(self.values.shape[1:])

    def shaped(self, values: np.ndarray) -> Any:
        """Values [N, ...] in the form that the rows came in."""
        if self.is_list:
            return Ragged(values, self.sizes)
        return values.reshape(len(self.sizes), self.rows, *values.shape[1:])


class Explained:
    """Adapted models, asked in numpy whether they are torch's or not."""

    def __init__(self, models: Any) -> None:
        """TypeError unless they are adapted models; ValueError where rows are not independent."""
        if not hasattr(models, "input_gradients") or not hasattr(models, "loss"):
            raise TypeError(
                f"models: expected adapted models, as a learner's `adapt` returns, got "
                f"{type(models).__name__}"
            )
        if models.mixes_rows:
            raise ValueError(
                "models: batch normalisation makes each prediction depend on all rows of its call, "
                "so that a row has no attributions of its own; use GroupNorm or LayerNorm"
            )
        if getattr(models, "has_categories", False):
            raise ValueError(
                "models: a row's categories have no gradient where the network itself embeds them; "
                "integrated_gradients goes by their embeddings"
            )
        self._models = models
        self.loss = models.loss
        held = models.parameters if hasattr(models, "parameters") else models.state
        like = next(iter(held.values()))
        self._device = getattr(like, "device", None) if hasattr(like, "detach") else None

    def __len__(self) -> int:
        return len(self._models)

    def _given(self, values: np.ndarray, sizes: np.ndarray) -> Any:
        """Rows in the form that the models take."""
        if self._device is None:
            return in_tasks(values, sizes)
        import torch

        return in_tasks(
            torch.from_numpy(np.require(values, requirements=["W"])).to(self._device), sizes
        )

    def predict(self, values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The outputs [N, out] on rows [N, *row]."""
        if not len(sizes):
            return np.zeros((0, 1), values.dtype)
        return _flat(self._models(self._given(values, sizes)))

    def gradients(
        self, values: np.ndarray, sizes: np.ndarray, cotangents: np.ndarray
    ) -> np.ndarray:
        """The gradient [N, *row] of sum(cotangents * outputs) by the rows."""
        if not len(sizes):
            return np.zeros_like(values)
        xq, flows = self._given(values, sizes), self._given(cotangents, sizes)
        return _flat(self._models.input_gradients(xq, flows)).reshape(values.shape)


def _flat(found: Any) -> np.ndarray:
    """What a call returned as [N, ...]."""
    if isinstance(found, list):
        return np.concatenate([as_array("", each) for each in found])
    values = as_array("", found)
    return values.reshape(-1, *values.shape[2:])
