"""Attributions of predictions by integrated gradients, and reason codes: `pymeta.explain`'s.

The baseline is the mean of the task's own support rows (of a category that the network embeds, the
commonest), so that the attributions say what sets a row apart from what its entity usually is: they
add up to the prediction less that at the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pymeta.explain import Attributions, integrated_gradients, reason_codes
from pymeta.explain.embedded import columns_behind
from pymeta.models.arrays import AdaptedArrays
from pymeta.serve.problem import invalid
from pymeta.spec.architecture import Architecture, embedded_columns
from pymeta.spec.show import counted
from pymeta.tasks.ragged import Ragged

METHOD = "integrated gradients from the mean of the task's support rows"
STEPS = 32  # points on each path
REASONS = 5


def attributions(
    models: AdaptedArrays, means: Sequence[np.ndarray], xq: Sequence[np.ndarray]
) -> Attributions:
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
    rows = Ragged(np.concatenate(list(xq)), [len(q) for q in xq])
    if not len(rows.values):
        none = Ragged(np.zeros(0, rows.values.dtype), rows.sizes)
        return Attributions(rows, Ragged(np.zeros(0, np.int64), rows.sizes), none, none)
    return integrated_gradients(models, rows, baseline=np.stack(means), steps=STEPS)


def check_cost(chain: Architecture, xq: Sequence[np.ndarray], limit: int) -> None:
    """A Problem where the points on the paths would be more than `limit` numbers.

    Args:
        chain: the network: a row is as wide as it is behind its embeddings.
        xq: the rows of each task.
        limit: how many numbers may be.
    """
    cost = STEPS * sum(map(len, xq)) * len(columns_behind(chain))
    if cost > limit:
        raise invalid(
            "explain", f"{counted(cost, 'number')} to predict; expected at most {limit}: fewer rows"
        )


def described(found: Attributions, names: Sequence[str] | None) -> list[Any]:
    """As JSON: for each task, for each row, the output, the attributions and the reasons.

    Features of one name are one reason: their attributions are added up.
    """
    codes = reason_codes(found, names, most=REASONS)
    parts = (found.outputs, found.baselines, found.values, codes.columns, codes.amounts)
    return [
        [
            {
                "output": output,
                "baseline": baseline,
                "attributions": values,
                "reasons": [
                    _reason(column, codes.names[column], amount)
                    for column, amount in zip(columns, amounts, strict=True)
                    if column >= 0
                ],
            }
            for output, baseline, values, columns, amounts in zip(
                *(part.tolist() for part in task), strict=True
            )
        ]
        for task in zip(*parts, strict=True)
    ]


def _reason(column: int, name: str, amount: float) -> dict[str, Any]:
    code = f"R{column + 1}{'+' if amount > 0 else '-'}"
    return {"feature": column, "name": name, "code": code, "attribution": amount}


def mean_of(support: np.ndarray, chain: Architecture) -> np.ndarray:
    """The mean [in] of support rows [rows, in], of categories the commonest; 0 without rows.

    Args:
        support: the rows.
        chain: the network, which says what columns are categories.
    """
    if not len(support):
        return np.zeros(support.shape[1])
    found: np.ndarray = support.mean(0, dtype=np.float64)
    for column, _ in embedded_columns(chain.layers):
        values, counts = np.unique(support[:, column], return_counts=True)
        found[column] = values[np.argmax(counts)]  # the least of those that are as common
    return found
