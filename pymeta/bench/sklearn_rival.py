"""Fine-tuning by scikit-learn: a loop over tasks of `MLPClassifier.fit`, from the given weights.

The classifier begins with weights of its own; one that was fitted before goes on from those it
has (`warm_start`), with a new Adam. So each task gets a copy of a fitted classifier with the
case's weights put in. Early stopping is out of reach, the penalty 0 and the order fixed. Its
Adam adds epsilon to the root before the bias is corrected, torch after it: `EPSILON` is torch's in
the first step, where it matters most.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from pymeta.bench.cases import LOOP_TASKS, Array, Case, Data

EPSILON = 1e-8 * (1 - 0.999) ** 0.5


def loop(case: Case, data: Data) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """(run, read) for the first `LOOP_TASKS` tasks of a case with one output and Adam."""
    weights = [np.ascontiguousarray(w.T) for w in data.parameters[::2]]
    biases = data.parameters[1::2]
    labels = data.ys[:LOOP_TASKS, :, 0].astype(np.int64)
    template = MLPClassifier(
        case.sizes[1:-1],
        activation=case.activation,
        solver=case.optimizer,
        alpha=0.0,
        batch_size=case.support,
        learning_rate_init=case.lr,
        max_iter=case.steps,
        shuffle=False,
        warm_start=True,
        epsilon=EPSILON,
        n_iter_no_change=case.steps + 1,
    )
    warnings.filterwarnings("ignore", category=ConvergenceWarning)
    template.fit(data.xs[0], labels[0])

    def run() -> list[Any]:
        fitted = []
        for x, y in zip(data.xs, labels, strict=False):
            model = copy.deepcopy(template)
            model.coefs_ = [w.copy() for w in weights]
            model.intercepts_ = [b.copy() for b in biases]
            fitted.append(model.fit(x, y))
        return fitted

    def read(fitted: list[Any]) -> tuple[None, list[Array]]:
        found = []
        for i in range(len(weights)):
            found.append(np.stack([m.coefs_[i].T for m in fitted]))
            found.append(np.stack([m.intercepts_[i] for m in fitted]))
        return None, found

    return run, read
