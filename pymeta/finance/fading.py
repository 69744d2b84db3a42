"""How a remainder fades as the rows that an entity was adapted to grow old.

Training tasks predict rows that follow their support at once, up to so many times later. What was
adapted to rows older than that is not known to be worth anything: the remainder halves with each
such stretch of time that has passed beyond it. So labels that come late cost little.
"""

from __future__ import annotations

import numpy as np

from pymeta.data import Panel
from pymeta.tasks.groups import Array


def as_numbers(times: Array) -> Array:
    """Times as float64: datetimes in seconds, other times as they are."""
    kind = times.dtype.kind
    return times.astype("datetime64[s]").astype(np.float64) if kind == "M" else times.astype(float)


def reach(times: Array, rows: int) -> float:
    """How long so many rows of an entity last, by the mean step between distinct times."""
    distinct = np.unique(as_numbers(times))
    steps = max(len(distinct) - 1, 1)
    return float((distinct[-1] - distinct[0]) / steps * rows)


def faded(history: Panel, query: Panel, far: float) -> Array:
    """[rows of query], float32 in 0..1: what is left of each row's remainder.

    Args:
        history: the rows that were adapted to.
        query: of rows without any in the history nothing fades, there is nothing.
        far: how long after its last row an entity is as training tasks were.
    """
    last = as_numbers(history.need_times("history"))[history.offsets[1:] - 1]
    at = np.minimum(np.searchsorted(history.entities, query.labels), len(last) - 1)
    age = as_numbers(query.need_times("query")) - last[at]
    older = np.where(history.entities[at] == query.labels, np.maximum(age / far - 1, 0), 0)
    return np.asarray(0.5**older, dtype=np.float32)
