"""The pooled model of an estimator: fitted first, its predictions are the networks' offset.

What is then learned is the remainder. It begins at zero, so that without rows of its own a group's
prediction is the pooled model's. Of the rows it is fitted to, a pooled model knows too much: their
offsets are predicted by clones that have not seen the row's group (cross-fitting), or a remainder
would learn from errors smaller than those that come.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import GroupKFold, KFold
from sklearn.utils.validation import has_fit_parameter

from pymeta.tasks.groups import Array

_FOLDS = 5
_LEAST = 1e-6  # a probability; a rate, in means of the targets


def checked_offset(offset: Any, X: Array) -> Array:
    """An offset as float64 [rows] or [rows, k]; ValueError where it is none."""
    found = np.asarray(offset, dtype=np.float64)
    if found.ndim not in (1, 2) or len(found) != len(X):
        raise ValueError(
            f"offset: expected shape [{len(X)}] or [{len(X)}, outputs], got {list(found.shape)}"
        )
    if not np.isfinite(found).all():
        raise ValueError("offset: expected finite numbers")
    return found


def fitted(model: Any, X: Array, y: Array, weights: Array | None) -> Any:
    """A clone of the model, fitted to the rows."""
    fresh = clone(model)
    if weights is not None and has_fit_parameter(fresh, "sample_weight"):
        return fresh.fit(X, y, sample_weight=weights)
    return fresh.fit(X, y)


def log_odds(model: Any, X: Array, classes: Array, one_logit: bool) -> Array:
    """What the model predicts of classes as offsets: [rows] of the second of two, or [rows, C].

    A class that it was never shown is as improbable as any it can be sure of.
    """
    given = np.asarray(model.predict_proba(X), dtype=np.float64)
    p = np.full((len(X), len(classes)), _LEAST)
    p[:, np.searchsorted(classes, model.classes_)] = np.clip(given, _LEAST, 1 - _LEAST)
    logs = np.log(p)
    found: Array = logs[:, 1] - np.log1p(-p[:, 1]) if one_logit else logs
    return found


def numbers(model: Any, X: Array, scale: float | None) -> Array:
    """What the model predicts as offsets; of a log link (`scale`, the mean) the logarithm."""
    p = np.asarray(model.predict(X), dtype=np.float64)
    if p.shape[:1] != (len(X),) or p.ndim > 2:
        raise ValueError(f"base: expected predictions [rows], got shape {list(p.shape)}")
    return p if scale is None else np.log(np.maximum(p, _LEAST * scale))


def cross_fitted(
    model: Any, X: Array, y: Array, weights: Array | None, labels: Array | None, predict: Any
) -> Array:
    """Each row's offset, by a clone that has not seen its group (or, without groups, the row).

    `predict` makes offsets of a fitted model and rows.
    """
    groups = 0 if labels is None else len(np.unique(labels))
    folds = min(_FOLDS, groups if groups > 1 else len(X))
    if folds < 2:
        return np.asarray(predict(fitted(model, X, y, weights), X))
    split = GroupKFold(folds) if groups > 1 else KFold(folds)
    found: Array | None = None
    for train, test in split.split(X, y, labels):
        w = None if weights is None else weights[train]
        part = np.asarray(predict(fitted(model, X[train], y[train], w), X[test]))
        found = np.zeros((len(X), *part.shape[1:])) if found is None else found
        found[test] = part
    assert found is not None
    return found
