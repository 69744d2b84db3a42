"""The metrics of predictions, one object each; `METRICS` has them by name.

All are held to scikit-learn's and scipy's in the tests. They are written anew because those take
one sample a call, and intervals take thousands.
"""

from __future__ import annotations

import numpy as np

from pymeta.metrics.base import Additive, Metric, Ranked, below, group_sums, per_group
from pymeta.tasks.groups import Array

BINS = 10
_EPS = np.finfo(np.float64).eps


def _mean(sums: Array) -> Array:
    mean: Array = sums[..., 0] / sums[..., -1]
    return mean


# ---- of two classes: y is 0 or 1 ----------------------------------------------------------------


def _auc(positive: Array, negative: Array, first: Array) -> Array:
    """The chance that a positive has the larger prediction, ties counting half."""
    wins = positive * (below(negative, first) + negative / 2)
    won, p, n = (group_sums(v, first) for v in (wins, positive, negative))
    found: Array = won / (p * n)
    return found


def _gini(positive: Array, negative: Array, first: Array) -> Array:
    return 2 * _auc(positive, negative, first) - 1


def _ks(positive: Array, negative: Array, first: Array) -> Array:
    """The largest distance between the two classes' distribution functions."""
    upto = [(below(v, first) + v) / per_group(v, first) for v in (positive, negative)]
    distance: Array = np.maximum.reduceat(np.abs(upto[0] - upto[1]), first, axis=1)
    return distance


def _average_precision(positive: Array, negative: Array, first: Array) -> Array:
    """The precision at each threshold, weighted by the recall that it adds."""
    all_positive = per_group(positive, first)
    hits = all_positive - below(positive, first)
    misses = per_group(negative, first) - below(negative, first)
    gained = np.where(positive > 0, positive / all_positive * hits / (hits + misses), 0.0)
    return group_sums(gained, first)


def precision_at(share: float) -> Ranked:
    """The share of 1 among the rows with the largest predictions: what a review budget finds.

    Rows with one prediction are taken in equal parts where the budget ends among them.

    Args:
        share: of the rows that are reviewed, 0 < share < 1.

    Example:
        >>> from pymeta.metrics import precision_at
        >>> precision_at(0.5)([1, 0, 1, 0], [0.9, 0.8, 0.2, 0.1])
        0.5
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share!r}")

    def finish(positive: Array, negative: Array, first: Array) -> Array:
        rows = positive + negative
        budget = share * per_group(rows, first)
        above = per_group(rows, first) - below(rows.copy(), first) - rows
        taken = np.clip(np.divide(budget - above, rows, where=rows > 0, out=0 * rows), 0, 1)
        return group_sums(positive * taken, first) / group_sums(rows, first) / share

    return Ranked(f"precision at {100 * share:g} %", True, "binary", finish)


def _log_losses(y: Array, p: Array) -> Array:
    p = np.clip(p, _EPS, 1 - _EPS)  # as scikit-learn has it
    losses: Array = -(y * np.log(p) + (1 - y) * np.log1p(-p))
    return losses[:, None]


def _in_bins(y: Array, p: Array) -> Array:
    """Y - p in the column of p's bin."""
    out = np.zeros((len(p), BINS))
    out[np.arange(len(p)), np.minimum((p * BINS).astype(int), BINS - 1)] = y - p
    return out


def _calibration(sums: Array) -> Array:
    error: Array = np.abs(sums[..., :-1]).sum(axis=-1) / sums[..., -1]
    return error


auc = Ranked("AUC", True, "binary", _auc)
gini = Ranked("Gini", True, "binary", _gini)
ks = Ranked("KS", True, "binary", _ks)
average_precision = Ranked("average precision", True, "binary", _average_precision)
log_loss = Additive("log loss", False, "binary", _log_losses, _mean, (0.0, 1.0))
brier = Additive("Brier", False, "binary", lambda y, p: (y - p)[:, None] ** 2, _mean, (0.0, 1.0))
calibration_error = Additive(
    "calibration error", False, "binary", _in_bins, _calibration, (0.0, 1.0)
)
accuracy = Additive(
    "accuracy",
    True,
    "binary",
    lambda y, p: ((p > 0.5) == (y == 1))[:, None] * 1.0,
    _mean,
    (0.0, 1.0),
)

# ---- of numbers ---------------------------------------------------------------------------------


def _qlike(y: Array, p: Array) -> Array:
    ratio = y / p
    losses: Array = ratio - np.log(ratio) - 1
    return losses[:, None]


def _moments(y: Array, p: Array) -> Array:
    y, p = y - y.mean(), p - p.mean()  # which correlations do not see, and rounding does
    return np.column_stack([y, p, y * y, p * p, y * p])


def _correlation(sums: Array) -> Array:
    n = sums[..., 5]
    y, p, yy, pp, yp = (sums[..., i] / n for i in range(5))
    found: Array = (yp - y * p) / np.sqrt((yy - y * y) * (pp - p * p))
    return found


def _errors(y: Array, p: Array) -> Array:
    centred = y - y.mean()
    return np.column_stack([(y - p) ** 2, centred, centred**2])


def _r2(sums: Array) -> Array:
    error, y, yy, n = (sums[..., i] for i in range(4))
    found: Array = 1 - error / (yy - y * y / n)
    return found


mse = Additive("MSE", False, "numbers", lambda y, p: (y - p)[:, None] ** 2, _mean)
rmse = Additive(
    "RMSE", False, "numbers", lambda y, p: (y - p)[:, None] ** 2, lambda s: np.sqrt(_mean(s))
)
mae = Additive("MAE", False, "numbers", lambda y, p: abs(y - p)[:, None], _mean)
qlike = Additive("QLIKE", False, "positive", _qlike, _mean)
r2 = Additive("R2", True, "numbers", _errors, _r2)
ic = Additive("IC", True, "numbers", _moments, _correlation)

METRICS: dict[str, Metric] = {
    "auc": auc,
    "gini": gini,
    "ks": ks,
    "average_precision": average_precision,
    "log_loss": log_loss,
    "brier": brier,
    "calibration_error": calibration_error,
    "accuracy": accuracy,
    "mse": mse,
    "rmse": rmse,
    "mae": mae,
    "qlike": qlike,
    "r2": r2,
    "ic": ic,
}


def metric_of(metric: str | Metric) -> Metric:
    """A metric by its name, or itself; ValueError where there is none of that name."""
    if isinstance(metric, Metric):
        return metric
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    return METRICS[metric]
