"""The loss of a set of rows in numpy: what `pymeta/reference/loss.py` defines, without torch."""

from __future__ import annotations

import math

import numpy as np

from pymeta.spec.losses import Loss


def mean_loss(loss: Loss, z: np.ndarray, y: np.ndarray, weights: np.ndarray | None) -> float:
    """The weighted mean loss of rows, in float64; 0 without weight.

    Args:
        loss: the loss.
        z: outputs [rows, out].
        y: targets [rows] classes, or distributions over them [rows, out]; otherwise
            [rows, columns], or [rows] for one column.
        weights: [rows], [rows, columns] of single targets, or None for all ones. What weighs
            nothing contributes nothing, whatever it is.
    """
    z = z.astype(np.float64)
    w = np.ones(len(z)) if weights is None else weights.astype(np.float64)
    with np.errstate(all="ignore"):
        if loss.takes_classes:
            values, shares = _cross_entropy(loss, z, y)
        else:
            columns = loss.target_columns(z.shape[1])
            values = _of_targets(loss, z, y.reshape(len(z), columns).astype(np.float64))
            values = values.mean(1) if w.ndim == 1 else values
            shares = np.ones_like(values)
        total = (w * shares).sum()
        return float((w * values)[w > 0].sum() / total) if total > 0 else 0.0


def row_losses(loss: Loss, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The loss of each row, [rows] in float64; outputs and targets as for `mean_loss`."""
    z = z.astype(np.float64)
    with np.errstate(all="ignore"):
        if loss.takes_classes:
            return _cross_entropy(loss, z, y)[0]
        columns = loss.target_columns(z.shape[1])
        each = _of_targets(loss, z, y.reshape(len(z), columns).astype(np.float64))
        means: np.ndarray = each.mean(1)
        return means


def _of_targets(loss: Loss, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The loss of each target, [rows, columns]."""
    if loss.kind in ("gaussian_nll", "student_t_nll"):
        return _location_scale(loss, z, y)
    if loss.kind == "quantile":
        each = np.split(z, len(loss.levels), axis=1)
        parts = [
            q * np.maximum(y - part, 0) + (1 - q) * np.maximum(part - y, 0)
            for q, part in zip(loss.levels, each, strict=True)
        ]
        return np.asarray(np.mean(parts, axis=0))
    if loss.kind == "bce_with_logits":
        positive, weight = (np.array(v or (1.0,)) for v in (loss.pos_weight, loss.weight))
        # log sigmoid(z) = -log(1 + exp(-z)), without overflow
        both = positive * y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
        return np.asarray(weight * both)
    size = np.abs(z - y)
    return np.asarray({
        "mse": lambda: np.square(size),
        "huber": lambda: np.where(
            size < loss.delta, 0.5 * np.square(size), loss.delta * (size - 0.5 * loss.delta)
        ),
        "l1": lambda: size,
        "poisson_nll": lambda: np.exp(z) - y * z,
        "qlike": lambda: z + y * np.exp(-z),
    }[loss.kind]())  # fmt: skip


def _location_scale(loss: Loss, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    location, log_scale = np.split(z, 2, axis=1)
    r = (location - y) * np.exp(-log_scale)
    if loss.kind == "gaussian_nll":
        return np.asarray(log_scale + np.square(r) / 2 + math.log(2 * math.pi) / 2)
    v = loss.dof
    constant = math.lgamma(v / 2) - math.lgamma((v + 1) / 2) + math.log(v * math.pi) / 2
    return np.asarray(log_scale + (v + 1) / 2 * np.log1p(np.square(r) / v) + constant)


def _cross_entropy(loss: Loss, z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's value, and what it counts in the mean; both [rows]."""
    classes = z.shape[1]
    c = np.array(loss.weight or (1.0,) * classes)
    shifted = z - z.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    e = loss.label_smoothing
    if y.dtype.kind == "f":
        q = c * ((1 - e) * y + e / classes)
        return -np.where(q == 0, 0.0, q * log_p).sum(1), np.ones(len(z))
    kept = y != loss.ignore_index
    label = np.where(kept, y, 0)
    value = -(1 - e) * c[label] * log_p[np.arange(len(y)), label]
    if e:
        value = value - e * (log_p * c).sum(1) / classes
    return np.where(kept, value, 0.0), kept * c[label]
