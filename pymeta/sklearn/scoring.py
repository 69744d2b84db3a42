"""A scorer that adapts: what a group's model predicts of the group's later rows.

Scikit-learn's own scorers ask a fitted estimator to predict rows of groups that it has never seen,
so that it is the shared model that they judge. This one adapts a copy to the first rows of each
group of the fold, as it would be in use, and scores its predictions of the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
from sklearn.metrics import get_scorer
from sklearn.utils import _safe_indexing
from sklearn.utils.metadata_routing import MetadataRequest

from pymeta.tasks.groups import labels_of, members_of


class AdaptScorer:
    """A scorer for `cross_validate`, `GridSearchCV` and their like.

    It needs the groups, which reach a scorer by scikit-learn's metadata routing alone:

        sklearn.set_config(enable_metadata_routing=True)
        model = MetaClassifier().set_fit_request(groups=True)
        search = GridSearchCV(model, grid, cv=GroupKFold(), scoring=adapt_score)
        search.fit(X, y, groups=groups)

    The estimator may be the last of a Pipeline. A group of a single row is not scored.

    Args:
        scoring: a name that `sklearn.metrics.get_scorer` knows, or a scorer of scikit-learn; None
            for the estimator's own `score`.
        share: of each group's rows, the fraction that is adapted to.
        shuffle: whether those are random ones (the same ones each time); False for the first.
        sample_weight: whether it asks for `sample_weight` too.
        times: whether it asks for `times` too, by which rows are then put in order.
        offset: whether it asks for `offset` too.

    Raises:
        ValueError: `share` is not between 0 and 1; in a call, where there are no groups, or no
            group has two rows.
    """

    def __init__(
        self,
        scoring: Any = None,
        *,
        share: float = 0.5,
        shuffle: bool = False,
        sample_weight: bool = False,
        times: bool = False,
        offset: bool = False,
    ) -> None:
        """Check the arguments."""
        if not 0 < share < 1:
            raise ValueError(f"share: expected a fraction in (0, 1), got {share!r}")
        self.scoring, self.share, self.shuffle = scoring, share, shuffle
        self._scorer: Callable[..., float] | None = None
        if scoring is not None:
            self._scorer = get_scorer(scoring) if isinstance(scoring, str) else scoring
        asked = {"groups": True, "sample_weight": sample_weight, "times": times, "offset": offset}
        self._asked = [name for name, wanted in asked.items() if wanted]

    def __repr__(self) -> str:
        return f"AdaptScorer({self.scoring!r}, share={self.share}, shuffle={self.shuffle})"

    def get_metadata_routing(self) -> Any:
        """What scikit-learn is to route to a call."""
        request = MetadataRequest(owner=self)
        for name in self._asked:
            request.score.add_request(param=name, alias=True)
        return request

    def __call__(
        self,
        estimator: Any,
        X: Any,
        y: Any,
        groups: Any = None,
        sample_weight: Any = None,
        times: Any = None,
        offset: Any = None,
    ) -> float:
        """The score, of a fitted estimator, on rows of groups."""
        if groups is None:
            raise ValueError(
                "groups: adapt_score got none; enable scikit-learn's metadata routing "
                "(sklearn.set_config(enable_metadata_routing=True)) and give the groups to fit "
                "(of a search) or as params={'groups': ...} (of cross_validate)"
            )
        early, late = self._split(X, labels_of(groups, X), times)
        if hasattr(estimator, "steps"):
            X, estimator = estimator[:-1].transform(X), estimator[-1]
        columns = {"groups": groups, "sample_weight": sample_weight, "offset": offset}

        def at(index: Any, *names: str) -> dict[str, Any]:
            given = {n: columns[n] for n in names if columns[n] is not None}
            return {n: _safe_indexing(np.asarray(v), index) for n, v in given.items()}

        model = copy.deepcopy(estimator)
        model.adapt(
            _safe_indexing(X, early), _safe_indexing(y, early),
            **at(early, "groups", "sample_weight", "offset"),
        )  # fmt: skip
        x, truth = _safe_indexing(X, late), _safe_indexing(y, late)
        weights = at(late, "sample_weight")
        bound = _Bound(model, at(late, "groups", "offset"))
        if self._scorer is None:
            return float(model.score(x, truth, **bound.options, **weights))
        return float(self._scorer(bound, x, truth, **weights))

    def _split(self, X: Any, labels: Any, times: Any) -> tuple[Any, Any]:
        """The rows to adapt to and those to score, each group's first and others."""
        early, late = [], []
        for index in members_of(labels)[1]:
            if len(index) < 2:
                continue
            order = index
            if times is not None:
                order = index[np.argsort(np.asarray(times)[index], kind="stable")]
            elif self.shuffle:
                order = np.random.RandomState(0).permutation(index)
            cut = min(max(round(self.share * len(index)), 1), len(index) - 1)
            early.append(order[:cut])
            late.append(order[cut:])
        if not early:
            raise ValueError("groups: none has two rows, one to adapt to and one to score")
        return np.concatenate(early), np.concatenate(late)


class _Bound:
    """A fitted estimator that predicts with the groups of the rows it is asked about."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self.model, self.options = model, options
        self._estimator_type = getattr(model, "_estimator_type", None)
        if hasattr(model, "classes_"):
            self.classes_ = model.classes_

    def __sklearn_tags__(self) -> Any:
        return self.model.__sklearn_tags__()

    def predict(self, X: Any) -> Any:
        return self.model.predict(X, **self.options)

    def __getattr__(self, name: str) -> Any:
        if name not in ("predict_proba", "decision_function"):
            raise AttributeError(name)
        method = getattr(self.model, name)
        return wraps(method)(lambda X: method(X, **self.options))


adapt_score = AdaptScorer()
