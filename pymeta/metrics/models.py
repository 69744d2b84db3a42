"""What `compare` runs: anything that learns from a training panel and predicts query rows.

    model.fit(train)                  learn from training rows
    model.predict(history, query)     [rows of query], probabilities of class 1 or numbers

`history` are earlier rows of the query's entities, with targets: what a model may adapt to; None
asks for predictions without any. Models that adapt say so by `adapts = True`.

scikit-learn's estimators (pymeta's too) and pymeta's learners become such models by `as_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, Protocol

import numpy as np

from pymeta.data.draw import whole
from pymeta.data.optional import need
from pymeta.data.panel import Panel
from pymeta.metrics.base import is_binary
from pymeta.tasks.groups import Array
from pymeta.tasks.ragged import Ragged


class Model(Protocol):
    """What `compare` asks of a model."""

    def fit(self, train: Panel) -> Any:
        """Learn from training rows."""

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """[rows of query], with `history` to adapt to."""


class Target:
    """Targets as a regression sees them: standardised, of their logarithm where that is asked for.

    Args:
        y: [rows], of training.
        link: "identity" or "log", which makes predictions positive.
    """

    def __init__(self, y: Array, link: str) -> None:
        """Learn the mean and the scale."""
        if link not in ("identity", "log"):
            raise ValueError(f"link: expected 'identity' or 'log', got {link!r}")
        if link == "log" and y.min() <= 0:
            raise ValueError(f"link: 'log' expects targets > 0, got {y.min()}")
        self.link = link
        seen = self._linked(y)
        self.mean, self.scale = float(seen.mean()), float(seen.std()) or 1.0
        self.smear = 1.0

    def _linked(self, y: Array) -> Array:
        linked: Array = np.log(y) if self.link == "log" else y
        return linked.astype(np.float64)

    def to(self, y: Array) -> Array:
        """Targets for the model to learn."""
        return (self._linked(y) - self.mean) / self.scale

    def smeared(self, y: Array, p: Array) -> None:
        """Learn by what factor exponentials of predictions are too small (Duan 1983)."""
        if self.link == "log":
            self.smear = float(np.exp((self.to(y) - p) * self.scale).mean())

    def back(self, p: Array) -> Array:
        """Predictions in the units of the targets."""
        p = p.astype(np.float64) * self.scale + self.mean
        return np.exp(p) * self.smear if self.link == "log" else p


class FromEstimator:
    """An estimator of scikit-learn, or one of pymeta's, which has `adapt`.

    Args:
        estimator: not fitted; a clone of it is.
        link: for regression, see `Target`.
        prep: options of the panel's preprocessor.
    """

    def __init__(
        self, estimator: Any, *, link: str = "identity", prep: Mapping[str, Any] | None = None
    ) -> None:
        """Keep what is to be cloned."""
        self.estimator, self.link, self.options = estimator, link, dict(prep or {})
        self.adapts = hasattr(estimator, "adapt")

    def fit(self, train: Panel) -> FromEstimator:
        """Fit a preprocessor and a clone of the estimator."""
        clone = need("sklearn.base", "comparing estimators").clone
        self.prep = train.preprocessor(**self.options).fit(train)
        self.fitted = clone(self.estimator)
        y = train.need_y()
        self.is_binary = is_binary(y)
        self.target = None if self.is_binary else Target(y, self.link)
        x = self.prep(train).x
        wanted = self._wanted(y)
        groups = self._of(train) if self.adapts else {}
        self.fitted.fit(x, wanted, **groups)
        if self.target is not None:
            self.target.smeared(y, self._raw(x))
        return self

    def _of(self, panel: Panel) -> dict[str, Any]:
        """Groups, and times where there are some and the estimator takes them."""
        given = {"groups": panel.labels}
        takes = signature(self.fitted.adapt).parameters
        return (
            given
            if panel.times is None or "times" not in takes
            else {**given, "times": panel.times}
        )

    def _wanted(self, y: Array) -> Array:
        return y.astype(int) if self.target is None else self.target.to(y)

    def _raw(self, x: Array, **groups: Any) -> Array:
        if self.target is None:
            return np.asarray(self.fitted.predict_proba(x, **groups))[:, 1]
        return np.asarray(self.fitted.predict(x, **groups))

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """Adapt to the history, where the estimator does, and predict."""
        groups = {}
        if self.adapts and history is not None:
            fitted = self.fitted.adapt
            fitted(self.prep(history).x, self._wanted(history.need_y()), **self._of(history))
            groups = {"groups": query.labels}
        found = self._raw(self.prep(query).x, **groups)
        return found if self.target is None else self.target.back(found)


class FromLearner:
    """A learner of pymeta (MAML, `pymeta.learners`), trained on episodes of the training panel.

    Args:
        make: called with the number of features; returns the learner.
        episodes: options of `Panel.episodes`; `batches` are the training steps.
        lr: Adam's step size, which falls to a tenth along a cosine.
        base: None, "linear", or an estimator of scikit-learn: a pooled model, fitted first, whose
            logits (or predictions) are an offset of the learner's outputs, so that only what it
            leaves is adapted. One that fits training rows far better than others leaves too little
            to learn from.
        history: at most so many last rows of each entity are adapted to; None for all. As many as
            support has in training is what the learner is used to.
        link: for regression, see `Target`.
        prep: options of the panel's preprocessor.
        seed: of torch, before `make`, and of the episodes unless they have their own.

    Example:
        >>> from pymeta.metrics import FromLearner
        >>> options = {"tasks": 16, "support": (5, 40), "query": 20, "batches": 200}
        >>> ours = FromLearner(lambda features: make_maml(features), episodes=options)
    """

    adapts = True

    def __init__(
        self,
        make: Callable[[int], Any],
        *,
        episodes: Mapping[str, Any],
        lr: float = 1e-3,
        base: Any = None,
        history: int | None = None,
        link: str = "identity",
        prep: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        """Keep what training needs."""
        if not callable(make) or hasattr(make, "parameters"):
            raise TypeError(
                f"make: expected a function of the number of features that makes a learner, got "
                f"{type(make).__name__}"
            )
        if "batches" not in episodes:
            raise ValueError("episodes: expected batches=..., the number of training steps")
        self.make, self.episodes = make, {"seed": seed, **episodes}
        self.lr, self.link, self.options, self.seed = lr, link, dict(prep or {}), seed
        if base is not None and base != "linear" and not hasattr(base, "get_params"):
            raise TypeError(f"base: expected 'linear', an estimator or None, got {base!r}")
        self.base = base
        self.history = None if history is None else whole("history", history, 1)

    def fit(self, train: Panel) -> FromLearner:
        """Train the learner."""
        torch = need("torch", "FromLearner", "torch")
        self.prep = train.preprocessor(**self.options).fit(train)
        y = train.need_y()
        self.target = None if is_binary(y) else Target(y, self.link)
        panel = self._prepared(train)
        self._fit_base(panel)
        offset = self._offset(panel)
        torch.manual_seed(self.seed)
        self.learner = self.make(panel.x.shape[1])
        adam = torch.optim.Adam(self.learner.parameters(), self.lr)
        steps = int(self.episodes["batches"])
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(steps, 1), self.lr / 10)
        for batch in panel.episodes(**self.episodes):
            adam.zero_grad()
            names = ("support_offset", "query_offset")
            both = {} if offset is None else dict(zip(names, batch.take(offset), strict=True))
            self.learner(*batch, **both).loss.backward()
            adam.step()
            rate.step()
        if self.target is not None:
            self.target.smeared(y, self._raw(panel, panel))
        return self

    def _prepared(self, panel: Panel) -> Panel:
        prepared = self.prep(panel)
        if self.target is None:
            return prepared
        return prepared._changed(y=self.target.to(panel.need_y()).astype(np.float32))

    def _fit_base(self, panel: Panel) -> None:
        """Fit the pooled model to a prepared panel."""
        self.fitted = None
        if self.base is None:
            return
        base = linear(self.target is None) if isinstance(self.base, str) else self.base
        y = panel.need_y()
        fitted = need("sklearn.base", "FromLearner with a base").clone(base)
        self.fitted = fitted.fit(panel.x, y.astype(int) if self.target is None else y)

    def _offset(self, panel: Panel) -> Array | None:
        """The pooled model's logits or predictions of a prepared panel: float32 [rows, 1]."""
        if self.fitted is None:
            return None
        if self.target is not None:
            found = self.fitted.predict(panel.x)
        elif hasattr(self.fitted, "decision_function"):
            found = self.fitted.decision_function(panel.x)
        else:
            p = np.clip(self.fitted.predict_proba(panel.x)[:, 1], 1e-6, 1 - 1e-6)
            found = np.log(p / (1 - p))
        return np.asarray(found, dtype=np.float32)[:, None]

    def _raw(self, history: Panel | None, query: Panel) -> Array:
        """Predictions for a prepared query: logits' probabilities, or numbers."""
        known = _known(history, query.entities)
        xs, ys = history_of(known, query.entities, query.x.shape[1])
        of_support, of_query = {}, {}
        if self.fitted is not None:
            own = np.zeros((0, 1), np.float32) if known is None else self._offset(known)
            of_support = {"support_offset": Ragged(own, xs.sizes)}
            of_query = {"offset": Ragged(self._offset(query), query.sizes)}
        models = self.learner.adapt(xs, ys, **of_support)
        tasks = Ragged(query.x, query.sizes)
        predict = models.predict_proba if self.target is None else models
        found = predict(tasks, **of_query)
        out = np.concatenate([np.asarray(rows.detach()) for rows in found])
        return out[..., -1].astype(np.float64)

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """Adapt to each entity's history and predict."""
        if history is not None and self.history is not None:
            history = history.last(self.history)
        prepared = None if history is None else self._prepared(history)
        found = self._raw(prepared, self.prep(query))
        return found if self.target is None else self.target.back(found)


def linear(binary: bool) -> Any:
    """Logistic regression for two classes, or ridge regression."""
    models = need("sklearn.linear_model", "compare")
    return models.LogisticRegression(max_iter=1000) if binary else models.Ridge(alpha=1.0)


def _known(history: Panel | None, entities: Array) -> Panel | None:
    """The rows of these entities; None where there are none."""
    if history is None:
        return None
    known = history.where(np.repeat(np.isin(history.entities, entities), history.sizes))
    return known if len(known) else None


def history_of(known: Panel | None, entities: Array, features: int) -> tuple[Ragged, Ragged]:
    """A support set for each of `entities`: its rows in a panel, none where it has none."""
    if known is None:
        nothing = np.zeros(len(entities), np.int64)
        x, y = np.zeros((0, features), np.float32), np.zeros(0, np.float32)
        return Ragged(x, nothing), Ragged(y, nothing)
    sizes = np.zeros(len(entities), np.int64)
    sizes[np.searchsorted(entities, known.entities)] = known.sizes
    return Ragged(known.x, sizes), Ragged(known.need_y(), sizes)


def as_model(name: str, value: Any, *, link: str, prep: Mapping[str, Any] | None) -> Any:
    """A model as it is, or an estimator as one; TypeError where it is neither."""
    if hasattr(value, "get_params"):
        return FromEstimator(value, link=link, prep=prep)
    if callable(getattr(value, "fit", None)) and callable(getattr(value, "predict", None)):
        return value
    hint = "; wrap a learner as FromLearner(...)" if hasattr(value, "adapt") else ""
    raise TypeError(
        f"models: {name}: expected an estimator, or a model with fit(train) and "
        f"predict(history, query), got {type(value).__name__}{hint}"
    )
