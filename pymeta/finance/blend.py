"""A scorecard and boosted trees, and the mean of their logits that predicts held-out rows best."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymeta.data.optional import need
from pymeta.metrics.models import linear
from pymeta.tasks.groups import Array

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the trees
_TREES = {"n_estimators": 150, "learning_rate": 0.05, "num_leaves": 15, "min_child_samples": 50}


def trees(binary: bool, seed: int) -> Any:
    """LightGBM with settings for tables of some ten thousand rows; not fitted."""
    lightgbm = need("lightgbm", "base='lightgbm'", "finance")
    kind = lightgbm.LGBMClassifier if binary else lightgbm.LGBMRegressor
    return kind(**_TREES, random_state=seed, n_jobs=1, deterministic=True, verbose=-1)


class Blend:
    """A classifier: (1 - w) logits of logistic regression and w of LightGBM.

    Args:
        weight: w; None for that of `WEIGHTS` whose log loss on a quarter of the rows, held out, is
            least.
        seed: which rows those are.
    """

    def __init__(self, weight: float | None = None, seed: int = 0) -> None:
        """Keep the settings."""
        self.weight, self.seed = weight, seed

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """For scikit-learn's `clone`."""
        return {"weight": self.weight, "seed": self.seed}

    def set_params(self, **params: Any) -> Blend:
        """Likewise."""
        self.__dict__.update(params)
        return self

    def fit(self, x: Array, y: Array) -> Blend:
        """Choose the weight, and fit what has one."""
        self.weight_ = self._chosen(x, y) if self.weight is None else self.weight
        self.parts_ = self._parts(x, y)
        return self

    def _parts(self, x: Array, y: Array) -> tuple[Any, Any]:
        """Those that count: logistic regression and LightGBM, or None."""
        w = self.weight_
        scorecard = linear(True).fit(x, y) if w < 1 else None
        return scorecard, trees(True, self.seed).fit(x, y) if w > 0 else None

    def _chosen(self, x: Array, y: Array) -> float:
        held = np.random.default_rng(self.seed).random(len(y)) < 0.25
        if min(len(np.unique(y[held])), len(np.unique(y[~held]))) < 2:
            return 0.0
        self.weight_ = 0.5
        a, b = (self._logits(m, x[held]) for m in self._parts(x[~held], y[~held]))
        losses = [_log_loss(y[held], (1 - w) * a + w * b) for w in WEIGHTS]
        return WEIGHTS[int(np.argmin(losses))]

    @staticmethod
    def _logits(model: Any, x: Array) -> Array:
        if hasattr(model, "decision_function"):
            return np.asarray(model.decision_function(x), dtype=np.float64)
        return np.asarray(model.predict(x, raw_score=True), dtype=np.float64)

    def decision_function(self, x: Array) -> Array:
        """[rows], logits."""
        w, (a, b) = self.weight_, self.parts_
        out = np.zeros(len(x))
        if a is not None:
            out += (1 - w) * self._logits(a, x)
        if b is not None:
            out += w * self._logits(b, x)
        return out


def _log_loss(y: Array, logits: Array) -> float:
    return float((np.logaddexp(0, logits) - y * logits).mean())
