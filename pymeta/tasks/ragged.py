"""The rows of tasks of different sizes, one after another in one array.

A `Ragged` is a tuple with one view for each task, so it goes wherever a list of arrays goes. What
knows it better takes `values` and `sizes` as they are and looks at no task by itself: a call with
10,000 tasks in this form costs Python no more than one with ten.

This module does not import torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class Ragged(tuple[Any, ...]):
    """T arrays [rows_t, ...] that are slices of one.

    `Ragged(values, sizes)` is made of an array or tensor [sum of rows, ...], the tasks' rows one
    after another, and of how many rows each task has. TypeError where sizes are no integers,
    ValueError where they are negative or do not add up to the rows there are.

    Attributes:
        values: as given.
        sizes: int64 [T].

    Example:
        >>> import numpy as np
        >>> from pymeta.tasks.ragged import Ragged
        >>> two = Ragged(np.arange(10.0).reshape(5, 2), [3, 2])
        >>> two[1].tolist()
        [[6.0, 7.0], [8.0, 9.0]]
    """

    values: Any
    sizes: np.ndarray

    def __new__(cls, values: Any, sizes: Any) -> Ragged:
        """Check the sizes and take the views."""
        sizes = np.asarray(sizes)
        if sizes.dtype.kind not in "iu" and sizes.size:
            raise TypeError(f"sizes: expected integers [T], got dtype {sizes.dtype}")
        sizes = sizes.astype(np.int64)
        rows = len(values)
        if sizes.ndim != 1 or (sizes < 0).any():
            raise ValueError(f"sizes: expected integers [T] >= 0, got shape {list(sizes.shape)}")
        if sizes.sum() != rows:
            raise ValueError(
                f"sizes: expected a sum of {rows}, the rows of values, got {sizes.sum()}"
            )
        ends = np.cumsum(sizes).tolist()
        starts = [0, *ends[:-1]]
        self = tuple.__new__(cls, [values[a:b] for a, b in zip(starts, ends, strict=False)])
        self.values, self.sizes = values, sizes
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made of the one array."""
        return type(self), (self.values, self.sizes)


def in_tasks(values: Any, sizes: np.ndarray) -> Any:
    """Rows one after another as tasks: [T, rows, ...] where all sizes are equal, else `Ragged`."""
    if len(sizes) and (sizes == sizes[0]).all():
        return values.reshape(len(sizes), int(sizes[0]), *values.shape[1:])
    return Ragged(values, sizes)
