"""The rivals a colleague would ask for: linear models, empirical Bayes, boosted trees.

Each is a `Model` and learns from all rows that were known before the query, those of the tested
entities included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pymeta.data.encoders import credibility
from pymeta.data.optional import need
from pymeta.data.panel import Panel
from pymeta.metrics.base import is_binary
from pymeta.metrics.models import FromEstimator, Target, linear
from pymeta.tasks.groups import Array

_NEWTON_STEPS = 25


class Pooled:
    """One linear model for all entities: logistic regression, or ridge regression."""

    def __init__(self, link: str, prep: Mapping[str, Any] | None) -> None:
        """`link` and `prep` are those of `FromEstimator`."""
        self.link, self.options = link, prep

    def fit(self, train: Panel) -> Pooled:
        """Fit on all rows."""
        model = linear(is_binary(train.need_y()))
        self.model = FromEstimator(model, link=self.link, prep=self.options).fit(train)
        return self

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """Without the history."""
        return self.model.predict(None, query)


class PerEntity(Pooled):
    """A linear model for each entity, of its own rows; the pooled one where it has too few.

    Too few are fewer than two, or of one class. Features are prepared on all rows.
    """

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """Fit a model for each entity and predict."""
        out = super().predict(None, query)
        if history is None:
            return out
        base = self.model
        clone = need("sklearn.base", "compare").clone
        x, y = base.prep(history).x, history.need_y()
        wanted, xq = base._wanted(y), base.prep(query).x
        at = {label: e for e, label in enumerate(history.entities.tolist())}
        for e, label in enumerate(query.entities.tolist()):
            if label not in at:
                continue
            rows = slice(*history.offsets[at[label] : at[label] + 2])
            too_few = len(x[rows]) < 2 or (base.is_binary and len(np.unique(wanted[rows])) < 2)
            if too_few:
                continue
            own = clone(base.estimator).fit(x[rows], wanted[rows])
            asked = slice(*query.offsets[e : e + 2])
            if base.target is None:
                out[asked] = own.predict_proba(xq[asked])[:, 1]
            else:
                out[asked] = base.target.back(own.predict(xq[asked]))
        return out


class Intercepts(Pooled):
    """The pooled linear model, and for each entity a shift drawn towards 0 (empirical Bayes).

    Regression: the mean residual times n / (n + k), k the ratio of the variance within entities to
    that between them. Two classes: the mode of the posterior of the shift b of the logit, whose
    prior is N(0, tau^2), with tau^2 from the scores' moments (DerSimonian and Laird 1986).
    """

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """Shift the pooled predictions."""
        base = self.model
        raw = self._scores(query)
        if history is not None:
            shift = np.zeros(len(query.entities))
            known = np.isin(query.entities, history.entities)
            shift[known] = self._shifts(history)[np.isin(history.entities, query.entities)]
            raw = raw + np.repeat(shift, query.sizes)
        return 1 / (1 + np.exp(-raw)) if base.target is None else base.target.back(raw)

    def _scores(self, panel: Panel) -> Array:
        """Logits, or predictions in the units the model learned in."""
        fitted, x = self.model.fitted, self.model.prep(panel).x
        binary = self.model.target is None
        found = fitted.decision_function(x) if binary else fitted.predict(x)
        return np.asarray(found, dtype=np.float64)

    def _shifts(self, history: Panel) -> Array:
        y, raw, codes = history.need_y(), self._scores(history), history.codes
        if self.model.target is None:
            return logit_shifts(y, raw, codes, len(history.entities))
        residual = self.model.target.to(y) - raw
        n = history.sizes
        return np.bincount(codes, residual) / (n + credibility(residual, codes))


def logit_shifts(y: Array, logits: Array, codes: Array, groups: int) -> Array:
    """The groups' shifts of the logit, by empirical Bayes: [groups].

    Args:
        y: [rows] of 0 and 1.
        logits: [rows], of the pooled model.
        codes: [rows], each row's group.
        groups: how many there are.
    """

    def moments(shift: Array) -> tuple[Array, Array]:
        p = 1 / (1 + np.exp(-(logits + shift[codes])))
        score = np.bincount(codes, y - p, minlength=groups)
        return score, np.bincount(codes, p * (1 - p), minlength=groups)

    score, info = moments(np.zeros(groups))
    heard = info > 1e-12
    spread = float((score[heard] ** 2 / info[heard]).sum()) - heard.sum()
    tau2 = spread / float(info.sum()) if spread > 0 else 0.0  # E[score^2] = info + info^2 tau^2
    shift = np.zeros(groups)
    if tau2 <= 0:
        return shift
    for _ in range(_NEWTON_STEPS):
        score, info = moments(shift)
        step = (score - shift / tau2) / (info + 1 / tau2)
        shift += np.clip(step, -1, 1)
    return shift


class Boosted:
    """LightGBM, with or without the entity as a category.

    Its number of trees is that of the least loss on the last fifth of the training rows; then it is
    fitted on all of them.

    Args:
        link: as in `FromEstimator`.
        prep: as there.
        entity: whether it knows the entity.
        seed: its own.
        threads: how many it uses.
    """

    trees = 500

    def __init__(
        self,
        link: str,
        prep: Mapping[str, Any] | None,
        *,
        entity: bool,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        """Keep the settings; ImportError where LightGBM is not installed."""
        self.lightgbm = need("lightgbm", "the LightGBM baseline", "compare")
        self.link, self.entity, self.seed, self.threads = link, entity, seed, threads
        self.options = {**(prep or {}), "scale": None, "clip": None}

    def _x(self, panel: Panel) -> Array:
        x = self.prep(panel).x
        if not self.entity:
            return x
        at = np.minimum(np.searchsorted(self.known, panel.entities), len(self.known) - 1)
        code = np.where(self.known[at] == panel.entities, at, -1)  # LightGBM's missing category
        return np.column_stack([x, np.repeat(code, panel.sizes)])

    def _make(self, trees: int) -> Any:
        kind = self.lightgbm.LGBMClassifier if self.target is None else self.lightgbm.LGBMRegressor
        return kind(
            n_estimators=trees,
            learning_rate=0.05,
            num_leaves=15,
            min_child_samples=50,
            reg_lambda=1.0,
            random_state=self.seed,
            n_jobs=self.threads,
            deterministic=True,
            force_row_wise=True,
            verbose=-1,
        )

    def fit(self, train: Panel) -> Boosted:
        """Choose the number of trees and fit."""
        self.prep = train.preprocessor(**self.options).fit(train)
        self.known = train.entities
        y = train.need_y()
        self.target = None if is_binary(y) else Target(y, self.link)
        wanted = y.astype(int) if self.target is None else self.target.to(y)
        x = self._x(train)
        late = _last_fifth(train, self.seed)
        fixed = {"categorical_feature": [x.shape[1] - 1]} if self.entity else {}
        trees = self.trees
        if len(np.unique(wanted[~late])) > 1 and late.any():
            stop = self.lightgbm.early_stopping(30, verbose=False)
            held = {"eval_X": (x[late],), "eval_y": (wanted[late],), "callbacks": [stop]}
            first = self._make(trees).fit(x[~late], wanted[~late], **held, **fixed)
            trees = max(int(first.best_iteration_ or trees), 1)
        self.fitted = self._make(trees).fit(x, wanted, **fixed)
        if self.target is not None:
            self.target.smeared(y, self.fitted.predict(x))
        return self

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """Without the history, whose rows it was fitted on."""
        x = self._x(query)
        if self.target is None:
            return np.asarray(self.fitted.predict_proba(x))[:, 1]
        return self.target.back(np.asarray(self.fitted.predict(x)))


def _last_fifth(panel: Panel, seed: int) -> Array:
    """Which rows are the last ones in time, or random where there is none: bool [rows]."""
    if panel.times is None:
        return np.random.default_rng(seed).random(len(panel)) < 0.2
    cut = np.sort(panel.times)[int(0.8 * len(panel))]
    late: Array = panel.times >= cut
    return late


def baselines(
    link: str, prep: Mapping[str, Any] | None, seed: int, lightgbm: bool | None, threads: int
) -> dict[str, Any]:
    """All of them by name; LightGBM where it is installed, or where it is asked for."""
    found: dict[str, Any] = {
        "pooled linear": Pooled(link, prep),
        "linear by entity": PerEntity(link, prep),
        "empirical Bayes": Intercepts(link, prep),
    }
    if lightgbm is not False:
        try:
            for name, entity in (("LightGBM", False), ("LightGBM, entity", True)):
                found[name] = Boosted(link, prep, entity=entity, seed=seed, threads=threads)
        except ImportError:
            if lightgbm:
                raise
    return found
