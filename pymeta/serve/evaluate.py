"""How well an adapter predicts entities' later rows from their earlier ones, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pymeta.models.adapter import Adapter
from pymeta.spec.measure import mean_loss


@dataclass(frozen=True)
class Task:
    """Support rows of an entity, and the rows that came after them."""

    xs: np.ndarray
    ys: np.ndarray
    ws: np.ndarray
    xq: np.ndarray
    yq: np.ndarray
    wq: np.ndarray


def losses(adapter: Adapter, tasks: Sequence[Task], batch: int = 500) -> np.ndarray:
    """[T] each task's mean loss on its query rows; infinite where it is not finite."""
    found = []
    for first in range(0, len(tasks), batch):
        some = tasks[first : first + batch]
        supports = [t.xs for t in some], [t.ys for t in some], [t.ws for t in some]
        models = adapter.adapt(supports[0], supports[1], weights=supports[2])
        outputs = models([t.xq for t in some])
        found += [
            mean_loss(adapter.loss, output.astype(np.float64), t.yq, t.wq)
            for output, t in zip(outputs, some, strict=True)
        ]
    values = np.array(found, np.float64)
    return np.where(np.isfinite(values), values, np.inf)
