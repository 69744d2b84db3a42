"""Problems for the estimators."""

from __future__ import annotations

import numpy as np

from pymeta.sklearn import METHODS, MetaClassifier

# the methods that fine-tune a network, that have another learner do so, that fit a head on one
NETWORKS = [n for n, method in METHODS.items() if method.head is None and method.own is None]
LEARNERS = [n for n, method in METHODS.items() if method.own is not None]
HEADS = [name for name, method in METHODS.items() if method.head is not None]


# nothing is chosen, and nobody looks after
PLAIN = {"method": "maml", "anchor_rows": None, "gate": False, "clip_inputs": False}
PLAIN |= {"inner_lr": 0.05, "learn_lr": False, "clip_norm": None}


def opposites(groups=20, rows=30, seed=0):
    """Even groups mean one thing, odd ones the opposite: X [n, 2], y [n] of strings, g [n]."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(groups), rows)
    X = rng.normal(size=(len(g), 2))
    y = np.where((X[:, 0] > 0) == (g % 2 == 0), "yes", "no")
    return X, y, g


def levels(groups=20, rows=15, seed=0):
    """Every group has its own slope and level: X [n, 1], y [n], g [n] of strings."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(groups), rows)
    slope, level = rng.normal(size=(2, groups))
    X = rng.uniform(-1, 1, (len(codes), 1))
    return X, slope[codes] * X[:, 0] + 3 * level[codes], np.array([f"g{c}" for c in codes])


def quick(**parameters):
    """A classifier that is trained for a moment, and adapts without further thought."""
    return MetaClassifier(
        **{"hidden": (8,), "iterations": 5, "epochs": 3, "random_state": 0, **PLAIN, **parameters}
    )


def same_models(a, b):
    """Whether all models are the same bits."""
    return a.models_.parameters.keys() == b.models_.parameters.keys() and all(
        np.array_equal(p, b.models_.parameters[n]) for n, p in a.models_.parameters.items()
    )
