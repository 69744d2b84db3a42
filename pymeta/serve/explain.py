"""Attributions of predictions by integrated gradients (`pymeta.explain`), and reason codes.

The baseline is the mean of the task's own support rows, so that the attributions say what sets a
row apart from what its entity usually is: they add up to the prediction less that at the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pymeta.explain import integrated_gradients
from pymeta.models.arrays import AdaptedArrays
from pymeta.serve.problem import invalid

METHOD = "integrated gradients from the mean of the task's support rows"
STEPS = 32  # points on each path
REASONS = 5


class Attributions(NamedTuple):
    """Of one task's rows."""

    values: np.ndarray  # [rows, in]
    output: np.ndarray  # [rows] the output that is explained
    baseline: np.ndarray  # [rows] what it is at the mean


def attributions(
    models: AdaptedArrays, means: Sequence[np.ndarray], xq: Sequence[np.ndarray]
) -> list[Attributions]:
    """Attributions of every task's rows to the output that `default_outputs` picks.

    Args:
        models: adapted to T tasks.
        means: T arrays [in], the means of the support rows.
        xq: T arrays [rows, in], the rows that were predicted.

    Raises:
        Problem: the model has batch normalisation.
    """
    if models.mixes_rows:
        raise invalid("explain", "batch normalisation leaves a row no reasons of its own")
    if not sum(map(len, xq)):
        nothing = [Attributions(q, np.zeros(0, np.int64), np.zeros(0, q.dtype)) for q in xq]
        return nothing
    found = integrated_gradients(models, list(xq), baseline=np.stack(means), steps=STEPS)
    each = zip(found.values, found.outputs, found.baselines, strict=True)
    return [Attributions(*parts) for parts in each]


def check_cost(xq: Sequence[np.ndarray], limit: int) -> None:
    """A Problem where the points on the paths would be more than `limit` numbers."""
    cost = STEPS * sum(q.size for q in xq)
    if cost > limit:
        raise invalid("explain", f"{cost} numbers to predict; expected at most {limit}: fewer rows")


def described(found: Sequence[Attributions], names: Sequence[str] | None) -> list[Any]:
    """As JSON: for each task, for each row, the output, the attributions and the reasons."""
    return [
        [
            {
                "output": int(output),
                "baseline": float(baseline),
                "attributions": values.tolist(),
                "reasons": reasons(values, names),
            }
            for values, output, baseline in zip(*each, strict=True)
        ]
        for each in found
    ]


def reasons(values: np.ndarray, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """The features that moved a row's output most, the largest first; those of 0 are none."""
    order = np.argsort(-np.abs(values), kind="stable")[:REASONS]
    return [
        {
            "feature": int(f),
            "name": names[f] if names else f"x{f}",
            "code": f"R{f + 1}{'+' if values[f] > 0 else '-'}",
            "attribution": float(values[f]),
        }
        for f in order
        if values[f] != 0 and np.isfinite(values[f])
    ]


def mean_of(support: np.ndarray) -> np.ndarray:
    """The mean [in] of support rows [rows, in]; 0 where there are none."""
    return support.mean(0, dtype=np.float64) if len(support) else np.zeros(support.shape[1])
