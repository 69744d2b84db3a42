"""Which of a row's outputs is explained."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymeta.explain.rows import Packed, as_array
from pymeta.spec.losses import Loss


def default_outputs(loss: Loss, outputs: np.ndarray) -> np.ndarray:
    """Which output of each row is explained where nobody says.

    The largest of classes' or probabilities' logits; the level nearest the median of quantiles;
    else the first, which is the location where there is one.

    Args:
        loss: what the models were adapted by.
        outputs: [N, out].

    Returns:
        int64 [N].
    """
    if loss.targets in ("labels", "probabilities"):
        chosen: np.ndarray = outputs.argmax(1)
        return chosen
    level = int(np.argmin([abs(q - 0.5) for q in loss.levels])) if loss.levels else 0
    return np.full(len(outputs), level * loss.target_columns(outputs.shape[1]), np.int64)


def chosen_outputs(output: Any, loss: Loss, outputs: np.ndarray, like: Packed) -> np.ndarray:
    """The outputs that are explained: int64 [N].

    Args:
        output: None, the number of one, or numbers in the form of the rows' tasks.
        loss: what the models were adapted by.
        outputs: [N, out].
        like: the rows.

    Raises:
        TypeError: it is not made of integers.
        ValueError: it is out of range, or not one for each row.
    """
    if output is None:
        return default_outputs(loss, outputs)
    rows, out = outputs.shape
    if isinstance(output, (list, tuple)) and len(output) == len(like.sizes):
        given = np.concatenate([as_array("output", o).reshape(-1) for o in output])
    else:
        given = as_array("output", output)
    if given.dtype.kind not in "iu":
        raise TypeError(f"output: expected an integer, or one for each row, got {given.dtype}")
    if given.size not in (1, rows):
        raise ValueError(f"output: expected one number, or {rows} for the rows, got {given.size}")
    if given.size and not 0 <= int(given.min()) <= int(given.max()) < out:
        raise ValueError(
            f"output: expected numbers in 0..{out - 1}, got {int(given.min())}..{int(given.max())}"
        )
    return np.broadcast_to(given.reshape(-1), (rows,)).astype(np.int64)
