"""One task's arrays as the native engine takes them, and what its messages call them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pymeta.tasks.arrays import dense


def as_engines_want(
    xs: Any, ys: Any, xq: Any, out: Any, weights: Any, *offsets: Any
) -> tuple[Any, ...]:
    """One task's arrays made contiguous and integers int64, where they are arrays."""
    if isinstance(ys, np.ndarray) and ys.dtype.kind in "iu":
        ys = ys.astype(np.int64, copy=False)
    xs, ys, xq, weights, *shifts = (
        dense(a) if isinstance(a, np.ndarray) else a for a in (xs, ys, xq, weights, *offsets)
    )
    return xs, ys, xq, out, weights, *shifts


@contextmanager
def weights_by_name() -> Iterator[None]:
    """Let the native core's messages call the weights what `adapt` calls them."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("support_weights", "weights")) from None
