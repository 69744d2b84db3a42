"""The pooled model that a job stands on: one for all entities, whose output is an offset.

What is adapted later is the remainder that this model leaves. A model that has learned its training
rows by heart leaves too little of them, so that training rows get the output of a model that was
fitted without their entity (cross-fitting); all other rows get that of the model of all entities.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from pymeta.data import Panel
from pymeta.data.optional import need
from pymeta.finance.blend import Blend, trees
from pymeta.metrics.base import is_binary
from pymeta.metrics.models import Target, linear
from pymeta.tasks.groups import Array

BASES = ("linear", "lightgbm", "blend")


def estimator(base: Any, binary: bool, seed: int) -> Any:
    """An unfitted scikit-learn estimator: of a name in `BASES`, or the one that is given."""
    if base == "linear":
        return linear(binary)
    if base == "lightgbm":
        return trees(binary, seed)
    if base == "blend" and binary:
        return Blend(seed=seed)
    if not hasattr(base, "get_params"):
        raise TypeError(f"base: expected one of {BASES} or an estimator, got {base!r}")
    return base


class Pooled:
    """A preprocessor and a pooled model, in logits or in standardised units of the target.

    Args:
        base: "linear", "lightgbm", "blend" (for two classes, the mean of both's logits that is best
            on rows held out), or an estimator of scikit-learn.
        link: "identity", or "log" for targets > 0 whose predictions have to be.
        prep: options of the panel's preprocessor.
        folds: of entities, for the training rows' offsets.
        seed: of the folds and of LightGBM.

    Attributes:
        prep: the fitted preprocessor.
        target: how targets are seen; None for two classes.
        fitted: the estimator.
    """

    def __init__(
        self,
        base: Any = "linear",
        *,
        link: str = "identity",
        prep: Mapping[str, Any] | None = None,
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        """Keep the settings."""
        self.base, self.link, self.options = base, link, dict(prep or {})
        self.folds, self.seed = folds, seed
        self.target: Target | None = None

    def fit(self, train: Panel, prep: Any = None, target: Target | None = None) -> Pooled:
        """Fit the preprocessor, unless it is given, the model, and the models of the folds.

        A `target` that is given says in which units targets are seen.

        Raises:
            ValueError: targets are 0 and 1, and all the same.
        """
        clone = need("sklearn.base", "pymeta.finance", "finance").clone
        self.prep = train.preprocessor(**self.options).fit(train) if prep is None else prep
        y = train.need_y()
        binary = is_binary(y)
        if binary and len(np.unique(y)) < 2:
            raise ValueError(f"target: expected 0 and 1 in training, got {int(y[0])} alone")
        self.target = None if binary else copy.copy(target) or Target(y, self.link)
        x = self.prep(train).x
        wanted = y.astype(int) if self.target is None else self.target.to(y)
        made = estimator(self.base, binary, self.seed)
        base_is_linear = isinstance(self.base, str) and self.base == "linear"
        self.fitted = clone(made).fit(x, wanted)
        if isinstance(made, Blend):  # the folds blend as the whole does
            made = Blend(self.fitted.weight_, self.seed)
        self._rows, self._source = train.rows, train._source
        self._own = self._outputs(self.fitted, x)
        count = len(train.entities)
        fold = np.random.default_rng(self.seed).permutation(count) % self.folds
        fold = np.repeat(fold, train.sizes)
        for k in range(self.folds if count >= self.folds else 0):
            inside = fold == k
            if len(np.unique(wanted[~inside])) > 1:
                own = clone(made).fit(x[~inside], wanted[~inside])
                self._own[inside] = self._outputs(own, x[inside])
        if self.target is not None:  # a linear model knows its rows no better than others
            self.target.smeared(y, self._outputs(self.fitted, x) if base_is_linear else self._own)
        return self

    def targets(self, panel: Panel) -> Array:
        """[rows] float32, the targets as the model sees them."""
        y = panel.need_y()
        return (y if self.target is None else self.target.to(y)).astype(np.float32)

    def offset(self, panel: Panel, x: Array) -> Array:
        """[rows, 1] float32: logits or predictions; of training rows those of their fold.

        Args:
            panel: whose rows they are.
            x: its prepared features.
        """
        found = self._outputs(self.fitted, x)
        if panel._source is self._source:
            order = np.argsort(self._rows, kind="stable")
            at = order[np.minimum(np.searchsorted(self._rows[order], panel.rows), len(order) - 1)]
            seen = self._rows[at] == panel.rows
            found[seen] = self._own[at[seen]]
        return found.astype(np.float32)[:, None]

    def back(self, raw: Array, smear: float | None = None) -> Array:
        """Probabilities, or predictions in the target's units, of logits or standardised ones."""
        if self.target is None:
            return np.asarray(1 / (1 + np.exp(-raw.astype(np.float64))))
        found = self.target.back(raw)
        return found if smear is None else found / self.target.smear * smear

    def _outputs(self, fitted: Any, x: Array) -> Array:
        return raw_outputs(fitted, x, self.target is None)


def raw_outputs(fitted: Any, x: Array, binary: bool) -> Array:
    """What an estimator says of rows before any link: float64 [rows].

    Args:
        fitted: of scikit-learn, or alike.
        x: [rows, features].
        binary: whether these are logits.
    """
    if not binary:
        return np.asarray(fitted.predict(x), dtype=np.float64)
    if hasattr(fitted, "decision_function"):
        return np.asarray(fitted.decision_function(x), dtype=np.float64)
    p = np.clip(np.asarray(fitted.predict_proba(x), dtype=np.float64)[:, 1], 1e-6, 1 - 1e-6)
    logits: Array = np.log(p / (1 - p))
    return logits
