"""The methods that lending_club.py compares with: of all groups' past, or of each group alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from _credit_starts import SEED, Array, Problem, Size, told
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import OneHotEncoder

from pymeta.sklearn import MetaClassifier

NETWORK = "pooled network, all groups' past"
LOGISTIC, WITH_GROUP = "logistic regression", "logistic regression, group as a feature"
BOOSTING, EACH = "gradient boosting, group as a feature", "logistic regression per group"

# A rival learns from some rows and scores others: features, two masks -> chances.
Predict = Callable[[Array, Array, Array], Array]


def by_fitting(problem: Problem, model: Any) -> Predict:
    """The features alone."""

    def predict(X: Array, learn: Array, score: Array) -> Array:
        return model.fit(X[learn], problem.y[learn]).predict_proba(X[score])[:, 1]

    return predict


def logistic(penalty: float) -> LogisticRegression:
    return LogisticRegression(C=penalty, solver="newton-cholesky")


def with_group(problem: Problem, penalty: float) -> Predict:
    """A logistic regression with an indicator of each group: its own level of risk."""

    def predict(X: Array, learn: Array, score: Array) -> Array:
        encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32)
        groups = problem.groups[:, None]
        own = encoder.fit(groups[learn]).transform(groups)
        X = np.concatenate([X, own], axis=1)
        return by_fitting(problem, logistic(penalty))(X, learn, score)

    return predict


def boosting(problem: Problem, settings: dict[str, int]) -> Predict:
    """Gradient boosting with the group as a category: the 254 largest ones, and all others."""

    def predict(X: Array, learn: Array, score: Array) -> Array:
        names, sizes = np.unique(problem.groups[learn], return_counts=True)
        largest = names[np.argsort(-sizes, kind="stable")][:254]
        place = {name: float(i) for i, name in enumerate(largest)}
        group = [[place.get(name, np.nan)] for name in problem.groups]
        X = np.concatenate([X, np.array(group, np.float32)], axis=1)
        model = HistGradientBoostingClassifier(
            learning_rate=0.05,
            categorical_features=[X.shape[1] - 1],
            early_stopping=False,
            random_state=SEED,
            **settings,
        )
        return by_fitting(problem, model)(X, learn, score)

    return predict


def regressions(problem: Problem, X: Array, learn: Array, penalty: float) -> dict[str, Any]:
    """A logistic regression for each group that has both kinds of loans."""
    models = {}
    order = np.flatnonzero(learn)
    order = order[np.argsort(problem.groups[order], kind="stable")]
    names, starts = np.unique(problem.groups[order], return_index=True)
    for name, rows in zip(names, np.split(order, starts[1:]), strict=True):
        if len(np.unique(problem.y[rows])) == 2:
            models[name] = logistic(penalty).fit(X[rows], problem.y[rows])
    return models


def one_a_group(problem: Problem, penalty: float) -> Predict:
    """A group's own regression; the share of defaults in all of the past where it has none."""

    def predict(X: Array, learn: Array, score: Array) -> Array:
        models = regressions(problem, X, learn, penalty)
        p = np.full(len(X), problem.y[learn].mean())
        for name in np.unique(problem.groups[score]):
            rows = score & (problem.groups == name)
            if name in models:
                p[rows] = models[name].predict_proba(X[rows])[:, 1]
        return p[score]

    return predict


def rivals(problem: Problem, size: Size, say: Callable[[str], None]) -> tuple[dict, dict]:
    """The other methods' chances for all future loans, and the settings chosen for them."""
    entries: dict[str, tuple[Callable[[Any], Predict], Sequence[Any]]] = {
        NETWORK: (
            lambda settings: by_fitting(problem, MetaClassifier(**settings)),
            size.learners[-1].fits,
        ),
        LOGISTIC: (lambda c: by_fitting(problem, logistic(c)), size.penalties),
        WITH_GROUP: (lambda c: with_group(problem, c), size.penalties),
        BOOSTING: (lambda settings: boosting(problem, settings), size.trees),
        EACH: (lambda c: one_a_group(problem, c), size.penalties),
    }
    then, now = problem.features(problem.early), problem.features(problem.past)
    found, settings = {}, {}
    for name, (make, among) in entries.items():

        def loss(setting: Any, make: Callable[[Any], Predict] = make) -> float:
            p = make(setting)(then, problem.early, problem.late)
            return log_loss(problem.y[problem.late], p)

        settings[name] = min(among, key=loss)
        p = np.full(len(problem.y), np.nan)
        p[problem.future] = make(settings[name])(now, problem.past, problem.future)
        found[name] = p
        say(f"{name}: {told(settings[name]) if name == NETWORK else settings[name]}")
    return found, settings
