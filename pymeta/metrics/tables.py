"""Metrics pooled, by entity, and by size of entity."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pymeta.metrics.base import Metric
from pymeta.metrics.scores import metric_of
from pymeta.tasks.groups import labels_of


class Score(NamedTuple):
    """One metric of some predictions.

    Attributes:
        metric: its name.
        pooled: of all rows together.
        macro: the mean over entities of each one's own, of those where it is defined.
        entities: how many those are.
        by_size: {"1-20": ...}, the mean over the entities of so many rows.
        counts: {"1-20": ...}, how many of them have a value.
    """

    metric: str
    pooled: float
    macro: float
    entities: int
    by_size: dict[str, float]
    counts: dict[str, int]


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def evaluate(
    y: Any,
    p: Any,
    entity: Any,
    *,
    metrics: Sequence[str | Metric],
    size: Any = None,
    edges: Sequence[int] = (20, 50, 100, 500),
) -> list[Score]:
    """Metrics of predictions, pooled and by entity.

    Args:
        y: [rows], the targets.
        p: [rows], the predictions.
        entity: [rows], whose they are.
        metrics: names in `METRICS`, or metrics.
        size: [rows], the size of each row's entity where that is not its rows here (the rows it
            was adapted to, say); None for its rows here.
        edges: where sizes are cut: up to the first, from there up to the second, and on.

    Example:
        >>> from pymeta.metrics import evaluate
        >>> (score,) = evaluate([0, 1, 0, 1], [0.1, 0.9, 0.6, 0.4], [1, 1, 2, 2], metrics=["auc"])
        >>> score.pooled, score.macro
        (0.75, 0.5)
    """
    y = np.asarray(y)
    labels, codes = np.unique(labels_of(entity, y, "entity"), return_inverse=True)
    sizes = np.bincount(codes, minlength=len(labels))
    if size is not None:
        given = np.asarray(size)
        if given.shape != codes.shape:
            raise ValueError(f"size: expected shape [{len(y)}], got {list(given.shape)}")
        sizes = np.zeros(len(labels), np.int64)
        sizes[codes] = given
    bounds = [0, *edges]
    names = [f"{a + 1}-{b}" for a, b in itertools.pairwise(bounds)]
    names.append(f"over {bounds[-1]}")
    bucket = np.searchsorted(edges, sizes, side="left")
    scores = []
    for metric in map(metric_of, metrics):
        own = metric.by_group(y, np.asarray(p), codes, len(labels))
        parts = {n: own[bucket == i] for i, n in enumerate(names) if (bucket == i).any()}
        scores.append(
            Score(
                metric.name,
                metric(y, p),
                _mean(own),
                int(np.isfinite(own).sum()),
                {n: _mean(v) for n, v in parts.items()},
                {n: int(np.isfinite(v).sum()) for n, v in parts.items()},
            )
        )
    return scores
