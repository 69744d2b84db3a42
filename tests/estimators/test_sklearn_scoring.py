"""Searches and cross-validation that adapt inside each fold, and how groups get there."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from sklearn import config_context
from sklearn.linear_model import LinearRegression
from sklearn.metrics import log_loss, r2_score
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn_help import PLAIN, levels, opposites, quick

from pymeta.sklearn import AdaptScorer, MetaRegressor, adapt_score


def test_it_scores_what_groups_models_say_of_their_later_rows(fitted):
    X, y, g = opposites(groups=6, rows=20, seed=4)
    early = np.arange(len(g)) % 20 < 10
    before = copy.deepcopy(fitted)
    wanted = copy.deepcopy(fitted).adapt(X[early], y[early], groups=g[early])
    late = ~early
    score = adapt_score(fitted, X, y, groups=g)
    assert score == wanted.score(X[late], y[late], groups=g[late]) > 0.9
    assert fitted.score(X, y) < 0.7
    assert len(fitted.adapted_groups_) == len(before.adapted_groups_) == 0  # it is a copy
    loss = AdaptScorer("neg_log_loss")(fitted, X, y, groups=g)
    p = wanted.predict_proba(X[late], groups=g[late])
    assert loss == pytest.approx(-log_loss(y[late], p, labels=["no", "yes"]))
    more = AdaptScorer(share=0.9)(fitted, X, y, groups=g)
    last = np.arange(len(g)) % 20 >= 18
    wanted = copy.deepcopy(fitted).adapt(X[~last], y[~last], groups=g[~last])
    assert more == wanted.score(X[last], y[last], groups=g[last])
    assert AdaptScorer(shuffle=True)(fitted, X, y, groups=g) > 0.9
    backwards = AdaptScorer(times=True)(fitted, X, y, groups=g, times=-np.arange(len(g)))
    wanted = copy.deepcopy(fitted).adapt(X[late][::-1], y[late][::-1], groups=g[late][::-1])
    assert backwards == wanted.score(X[early], y[early], groups=g[early])


@pytest.mark.parametrize("in_pipeline", [False, True])
def test_a_search_over_whole_groups_adapts_inside_each_fold(in_pipeline):
    X, y, g = opposites(groups=9)
    with config_context(enable_metadata_routing=True):
        model = quick().set_fit_request(groups=True)
        grid = {"adapt_lr": [0.0, 0.5], "adapt_epochs": [20]}
        if in_pipeline:
            model = make_pipeline(StandardScaler(), model)
            grid = {f"metaclassifier__{name}": values for name, values in grid.items()}
        search = GridSearchCV(model, grid, cv=GroupKFold(3), scoring=adapt_score)
        search.fit(X, y, groups=g)
    best = search.best_params_
    assert 0.5 in best.values()
    scores = search.cv_results_["mean_test_score"]
    assert scores[0] < 0.7 and scores[1] > 0.85  # with a step of 0 it is the start's
    last = search.best_estimator_[-1] if in_pipeline else search.best_estimator_
    assert last.n_iter_ == 5  # iterations: the groups came to fit


def test_weights_and_offsets_come_along():
    X, y, g = levels(groups=6, rows=20)
    known = LinearRegression().fit(X, y).predict(X)
    weights = np.random.default_rng(0).uniform(0.5, 2, len(y))
    scorer = AdaptScorer("r2", sample_weight=True, offset=True)
    with config_context(enable_metadata_routing=True):
        asked = {"groups": True, "offset": True, "sample_weight": True}
        model = MetaRegressor(hidden=(8,), iterations=5, random_state=0, **PLAIN)
        model.set_fit_request(**asked)
        params = {"groups": g, "offset": known, "sample_weight": weights}
        options = {"cv": GroupKFold(2), "scoring": scorer, "params": params}
        done = cross_validate(model, X, y, **options, return_estimator=True, return_indices=True)
    for score, estimator, test in zip(
        done["test_score"], done["estimator"], done["indices"]["test"], strict=True
    ):
        place = np.array([np.sum(g[test][:i] == g[test][i]) for i in range(len(test))])
        early, late = test[place < 10], test[place >= 10]
        estimator.adapt(
            X[early], y[early], g[early], sample_weight=weights[early], offset=known[early]
        )
        p = estimator.predict(X[late], groups=g[late], offset=known[late])
        assert score == pytest.approx(r2_score(y[late], p, sample_weight=weights[late]))


def test_without_routing_nothing_is_silent():
    X, y, g = opposites(groups=9)
    search = GridSearchCV(quick(), {"adapt_lr": [0.1]}, cv=GroupKFold(3))
    with pytest.warns(UserWarning, match=r"^groups: got none, .*set_fit_request"):
        search.fit(X, y, groups=g)
    with pytest.raises(ValueError, match=r"^groups: adapt_score got none; enable"):
        adapt_score(quick(method="pooled").fit(X, y), X, y)
    with pytest.raises(ValueError, match=r"^groups: none has two rows"):
        adapt_score(quick(method="pooled").fit(X, y), X, y, groups=np.arange(len(y)))
    for share in (0, 1, 1.5):
        with pytest.raises(ValueError, match=r"^share: expected a fraction"):
            AdaptScorer(share=share)
