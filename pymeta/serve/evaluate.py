"""How well an adapter predicts entities' later rows from their earlier ones, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pymeta.models.adapter import Adapter
from pymeta.models.arrays import softmax
from pymeta.spec.losses import Loss


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


def mean_loss(loss: Loss, z: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """The weighted mean loss of rows: what `pymeta.reference` defines, 0 without weight.

    Args:
        loss: the loss.
        z: outputs [rows, out] float64.
        y: targets [rows] classes, or [rows, out].
        weights: [rows].
    """
    w = weights.astype(np.float64)
    with np.errstate(all="ignore"):
        if loss.takes_classes:
            values, w = _cross_entropy(loss, z, y, w)
        else:
            values = w * _elementwise(loss, z, y.reshape(z.shape).astype(np.float64)).mean(1)
        total = w.sum()
        return float(values[w > 0].sum() / total) if total > 0 else 0.0


def _elementwise(loss: Loss, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    values: np.ndarray
    if loss.kind == "mse":
        values = np.square(z - y)
        return values
    if loss.kind == "huber":
        size = np.abs(z - y)
        near = 0.5 * np.square(size)
        values = np.where(size <= loss.delta, near, loss.delta * (size - 0.5 * loss.delta))
        return values
    positive = np.array(loss.pos_weight or (1.0,))
    weight = np.array(loss.weight or (1.0,))
    # log sigmoid(z) = -log(1 + exp(-z)), without overflow
    values = weight * (positive * y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z))
    return values


def _cross_entropy(
    loss: Loss, z: np.ndarray, y: np.ndarray, w: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(weighted values, the weights of the mean), both [rows]."""
    classes = z.shape[1]
    c = np.array(loss.weight or (1.0,) * classes)
    log_p = np.log(np.maximum(softmax(z), np.finfo(np.float64).tiny))
    kept = y != loss.ignore_index
    label = np.where(kept, y, 0)
    value = -c[label] * log_p[np.arange(len(y)), label]
    if loss.label_smoothing:
        uniform = -(log_p * c).sum(1) / classes
        value = (1 - loss.label_smoothing) * value + loss.label_smoothing * uniform
    return w * kept * value, w * kept * c[label]
