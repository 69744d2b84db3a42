"""The linear pooled model that `base="auto"` begins with: ridge or logistic regression, or a GLM.

Features are scaled inside, and how strongly coefficients are drawn to 0 is chosen by
cross-validation over groups, once: what `fit` and its folds are then fitted with is the same.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge
from sklearn.model_selection import GroupKFold

from pymeta.tasks.groups import Array

_FOLDS = 3
_STRENGTHS = tuple(10.0**k for k in range(-1, 5))  # of the penalty, in rows


class Scaled(BaseEstimator):
    """An estimator on features of mean 0 and variance 1; a feature that is constant counts not.

    A feature of two values (a category, what was missing) is centred, but left on its scale: a rare
    category would get a large one, and learn from few rows what nothing draws back.

    Args:
        model: an estimator of scikit-learn that takes weights.
    """

    def __init__(self, model: Any) -> None:
        """Keep the estimator."""
        self.model = model

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> Scaled:
        """Fit a clone, with its features scaled."""
        X = np.asarray(X, dtype=np.float64)
        self.centre_, scale = X.mean(axis=0), X.std(axis=0)
        low, high = X.min(axis=0), X.max(axis=0)
        scale[((low == X) | (high == X)).all(axis=0) & (low < high)] = 1.0
        self.scale_ = np.where(scale > 1e-12 * np.abs(self.centre_), scale, np.inf)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # near its end is good enough
            self.fitted_ = clone(self.model).fit(self._scaled(X), y, sample_weight=sample_weight)
        if hasattr(self.fitted_, "classes_"):
            self.classes_ = self.fitted_.classes_
        return self

    def _scaled(self, X: Array) -> Array:
        return np.asarray((X - self.centre_) / self.scale_)

    def predict(self, X: Array) -> Array:
        """As the estimator's."""
        return np.asarray(self.fitted_.predict(self._scaled(X)))

    def predict_proba(self, X: Array) -> Array:
        """As the estimator's, where it is a classifier."""
        return np.asarray(self.fitted_.predict_proba(self._scaled(X)))


def _made(kind: str, strength: float, rows: int) -> Scaled:
    if kind == "classes":
        return Scaled(LogisticRegression(C=1 / strength, max_iter=200))
    if kind == "amounts":
        return Scaled(PoissonRegressor(alpha=strength / rows, max_iter=200))
    return Scaled(Ridge(alpha=strength))


def _loss(kind: str, model: Scaled, X: Array, y: Array) -> Array:
    """[rows], what the model is fitted to make small."""
    if kind == "classes":
        p = np.zeros((len(y), len(model.classes_) + 1))
        p[:, :-1] = model.predict_proba(X)  # a class that it was never shown has 0
        at = np.searchsorted(model.classes_, y)
        at = np.where(np.isin(y, model.classes_), at, len(model.classes_))
        return np.asarray(-np.log(np.maximum(p[np.arange(len(y)), at], 1e-6)))
    found = model.predict(X)
    if kind == "amounts":
        return np.asarray(found - y * np.log(np.maximum(found, 1e-12)))
    return np.asarray(np.square(y - found).reshape(len(y), -1).mean(axis=1))


def pooled_linear(kind: str, X: Array, y: Array, weights: Array | None, labels: Array) -> Scaled:
    """The unfitted model, with the penalty that predicts other groups best.

    Args:
        kind: "classes", "amounts" (>= 0, with a log link) or "numbers".
        X: [rows, features].
        y: [rows], or for numbers [rows, targets].
        weights: [rows], or None.
        labels: [rows], the groups.
    """
    total = np.zeros(len(_STRENGTHS))
    own = np.ones(len(X)) if weights is None else weights
    for train, test in GroupKFold(_FOLDS).split(X, y, labels):
        if kind == "classes" and len(np.unique(y[train])) < 2:
            continue
        for i, strength in enumerate(_STRENGTHS):
            model = _made(kind, strength, len(train)).fit(X[train], y[train], own[train])
            total[i] += (own[test] * _loss(kind, model, X[test], y[test])).sum()
    best = len(total) - 1 - int(np.argmin(total[::-1]))  # the firmest of equals
    return _made(kind, _STRENGTHS[best], len(X))
