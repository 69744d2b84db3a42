"""LendingClub's loans as a problem, and the models that adapt: each learns a start, then adapts it.

For lending_club.py, which says how the groups and the time are split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import credit_data
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from pymeta.sklearn import MetaClassifier

Array = NDArray[Any]

VALIDATION, CUT = "2010-07", "2011-01"  # the first months of the validation period and the future
SEED = 0
MAML, REPTILE, TUNED = "MAML, adapted", "Reptile, adapted", "pooled network, fine-tuned"
UNADAPTED = "pooled network, not adapted"


class Learner(NamedTuple):
    """A way to learn a start, with the settings among which the validation period decides."""

    name: str
    fits: list[dict[str, Any]]
    adaptations: list[dict[str, Any]]


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    folds: int
    validations: int  # on how many thirds of a fold's other groups settings are compared
    learners: tuple[Learner, ...]
    penalties: tuple[float, ...]  # C of the logistic regressions
    trees: tuple[dict[str, int], ...]


# what `fit` would choose and look after by itself is what this comparison varies
PLAIN = {"method": "maml", "anchor_rows": None, "gate": False, "clip_inputs": False}


def columns() -> ColumnTransformer:
    """Numbers: missing ones filled in and marked, standardised, cut at five. Choices: one-hot."""
    numbers = make_pipeline(
        SimpleImputer(strategy="median", add_indicator=True),
        StandardScaler(),
        FunctionTransformer(np.clip, kw_args={"a_min": -5, "a_max": 5}),
    )
    choices = OneHotEncoder(handle_unknown="ignore", min_frequency=20, sparse_output=False)
    return ColumnTransformer(
        [("numbers", numbers, credit_data.NUMERIC), ("choices", choices, credit_data.CHOICES)]
    )


def dealt(groups: Array, parts: int, rng: np.random.Generator) -> Array:
    """A part 0 .. parts-1 for each row, the same for a group's rows; parts are of similar size."""
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    part = np.empty(len(names), dtype=int)
    largest_first = np.argsort(-sizes, kind="stable")
    for i in range(0, len(names), parts):
        together = largest_first[i : i + parts]
        part[together] = rng.permutation(parts)[: len(together)]
    return part[codes]


class Problem:
    """The loans of one grouping: which are past and future, and their features as seen then."""

    def __init__(self, loans: pd.DataFrame, group: str) -> None:
        self.loans = loans
        self.y = loans["default"].to_numpy()
        self.groups = loans[group].to_numpy(dtype=str)
        issued = loans["issued"].to_numpy(dtype=str)
        self.past, self.future = issued < CUT, issued >= CUT
        self.early = issued < VALIDATION
        self.late = self.past & ~self.early
        self.rows = dict(zip(*np.unique(self.groups[self.past], return_counts=True), strict=True))

    def features(self, known: Array) -> Array:
        """All loans' features, by preprocessing that was fitted on those `known` (a mask)."""
        table = self.loans[credit_data.FEATURES]
        return columns().fit(table[known]).transform(table).astype(np.float32)


def fitted(problem: Problem, X: Array, rows: Array, settings: dict[str, Any]) -> MetaClassifier:
    """The start learnt from `rows` (a mask)."""
    return MetaClassifier(**settings).fit(X[rows], problem.y[rows], groups=problem.groups[rows])


def adapted_to(
    model: MetaClassifier, problem: Problem, X: Array, rows: Array, settings: dict[str, Any]
) -> MetaClassifier:
    """The model, its start adapted to the groups of `rows` (a mask), all in one call."""
    model.set_params(**settings)
    return model.adapt(X[rows], problem.y[rows], groups=problem.groups[rows])


class Trial(NamedTuple):
    """A rehearsal before the cut: features, and the rows to learn, to adapt to and to score."""

    X: Array
    learn: Array
    own: Array
    late: Array


def trials(problem: Problem, others: Array, number: int, rng: np.random.Generator) -> list[Trial]:
    """Each adapts to another third of the `others` (a mask), having learnt from the rest."""
    third = dealt(problem.groups, 3, rng)
    found = []
    for part in range(number):
        mine = others & (third == part)
        learn = problem.early & others & ~mine
        X = problem.features(learn)
        found.append(Trial(X, learn, problem.early & mine, problem.late & mine))
    return found


def chosen(
    problem: Problem, learner: Learner, trials: Sequence[Trial]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings with the least log-loss in the validation period, on held-out groups."""
    losses = np.zeros((len(learner.fits), len(learner.adaptations)))
    for X, learn, own, late in trials:
        for i, fit in enumerate(learner.fits):
            model = fitted(problem, X, learn, fit)
            for j, adaptation in enumerate(learner.adaptations):
                adapted_to(model, problem, X, own, adaptation)
                p = model.predict_proba(X[late], groups=problem.groups[late])[:, 1]
                losses[i, j] += log_loss(problem.y[late], p, normalize=False)
    i, j = np.unravel_index(losses.argmin(), losses.shape)
    return learner.fits[i], learner.adaptations[j]


def told(settings: dict[str, Any]) -> str:
    """Those settings that something is chosen by."""
    names = ("hidden", "epochs", "iterations", "inner_lr", "adapt_lr", "adapt_epochs")
    return ", ".join(f"{n}={settings[n]}" for n in names if n in settings)


def with_starts(problem: Problem, size: Size, say: Callable[[str], None]) -> dict[str, Array]:
    """Each learner's chances of default for all loans of the future, group by held-out group."""
    rng = np.random.default_rng(SEED)
    fold = dealt(problem.groups, size.folds, rng)
    found = {n: np.full(len(problem.y), np.nan) for n in (MAML, REPTILE, TUNED, UNADAPTED)}
    for k in range(size.folds):
        others = fold != k
        learn, own = problem.past & others, problem.past & ~others
        future = problem.future & ~others
        X, rehearsals = problem.features(learn), trials(problem, others, size.validations, rng)
        for learner in size.learners:
            fit, adaptation = chosen(problem, learner, rehearsals)
            model = fitted(problem, X, learn, fit)
            if learner.name == TUNED:
                found[UNADAPTED][future] = model.predict_proba(X[future])[:, 1]
            adapted_to(model, problem, X, own, adaptation)
            p = model.predict_proba(X[future], groups=problem.groups[future])[:, 1]
            found[learner.name][future] = p
            say(f"fold {k + 1} of {size.folds}: {learner.name}: {told({**fit, **adaptation})}")
    return found
