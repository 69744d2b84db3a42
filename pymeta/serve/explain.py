"""Attributions of predictions by occlusion, and reason codes.

The attribution of a feature is how much the output changes when the feature is taken from the row
and put at the mean of the task's support rows: f(row) - f(row with the mean there). All variants of
all rows are one native call with the adapted weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pymeta.models.arrays import AdaptedArrays
from pymeta.serve.model import Model
from pymeta.serve.problem import invalid

METHOD = "occlusion: each feature replaced by the mean of the task's support rows"
REASONS = 5


class Attributions(NamedTuple):
    """Of one task's rows."""

    values: np.ndarray  # [rows, in]
    output: np.ndarray  # [rows] the output that is explained


def attributions(
    model: Model,
    models: AdaptedArrays,
    means: Sequence[np.ndarray],
    xq: Sequence[np.ndarray],
    predicted: Sequence[np.ndarray],
) -> list[Attributions]:
    """Attributions of every task's rows to the output that `model.explained` names.

    Args:
        model: which the tasks were adapted from.
        models: adapted to T tasks.
        means: T arrays [in], the means of the support rows.
        xq: T arrays [rows, in], the rows that were predicted.
        predicted: T arrays [rows, out], the outputs there.
    """
    variants = [_occluded(m, q) for m, q in zip(means, xq, strict=True)]
    outputs = models([v.reshape(-1, v.shape[-1]) for v in variants])
    found = []
    for variant, output, before in zip(variants, outputs, predicted, strict=True):
        rows, features = variant.shape[:2]
        chosen = model.explained(before)
        without = output.reshape(rows, features, -1)
        each = np.arange(rows)
        values = before[each, chosen][:, None] - without[each, :, chosen]
        found.append(Attributions(values, chosen))
    return found


def check_cost(xq: Sequence[np.ndarray], limit: int) -> None:
    """A Problem where the variants would be more than `limit` numbers."""
    cost = sum(len(q) * q.shape[1] ** 2 for q in xq)
    if cost > limit:
        raise invalid("explain", f"{cost} numbers to predict; expected at most {limit}: fewer rows")


def described(found: Sequence[Attributions], names: Sequence[str] | None) -> list[Any]:
    """As JSON: for each task, for each row, the output, the attributions and the reasons."""
    return [
        [
            {
                "output": int(output),
                "attributions": values.tolist(),
                "reasons": reasons(values, names),
            }
            for values, output in zip(each.values, each.output, strict=True)
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


def _occluded(mean: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """[rows, in, in]: variant f of a row has feature f at the mean."""
    features = queries.shape[1]
    variants = np.repeat(queries[:, None, :], features, 1)
    each = np.arange(features)
    variants[:, each, each] = mean
    return variants
