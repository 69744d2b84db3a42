"""Text: new intents, or kinds of message, of which a few examples each are there.

Features are the main directions of TF-IDF, or the embeddings of an encoder of one's own. A linear
map of them and a prior of the last layer's are learned on tasks of training classes; the last layer
itself is exact for the examples of a task (`RidgeHead`, softmax regression by Newton's method). All
classes of a test are new.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from pymeta.data import Panel
from pymeta.data.table import read_table
from pymeta.finance.deploy import adapter_of
from pymeta.finance.intents import (
    QUERY,
    Intents,
    Tasks,
    centroid,
    encoder_of,
    head_of,
    learned,
    logistic,
    split_classes,
    trained,
)
from pymeta.finance.result import Result, Say, result, silent
from pymeta.finance.words import Words
from pymeta.learners import ProtoNet
from pymeta.metrics import Report, accuracy
from pymeta.metrics.compare import _Judge, _Run
from pymeta.spec.show import counted
from pymeta.tasks.groups import Array, labels_of


def read_texts(data: Any, columns: Mapping[str, str] | None = None) -> tuple[Array, Any]:
    """Labels [rows], and texts, or embeddings float32 [rows, features].

    Args:
        data: a table with a text and a label a row, or its path; or an .npz with embeddings `X`
            [rows, features] and labels `y`.
        columns: {"text": ..., "label": ...}; {"text": "text", "label": "category"} by default.
    """
    if isinstance(data, (str, os.PathLike)) and os.fspath(data).endswith(".npz"):
        with np.load(data, allow_pickle=False) as file:
            return file["y"], file["X"].astype(np.float32)
    table, named = read_table(data), {"text": "text", "label": "category", **(columns or {})}
    for role in ("text", "label"):
        if named[role] not in table:
            there = ", ".join(table)[:300]
            raise ValueError(f"columns: no column is called {named[role]!r}; there are {there}")
    labels = labels_of(table[named["label"]], table[named["label"]], named["label"])
    return labels, [str(t) for t in table[named["text"]]]


def _compared(labels: Array, x: Array, ways: int, shots: int, share: float, seed: int, steps: int,
              episodes: int) -> Report:  # fmt: skip
    """Ours and the rivals on tasks of held-out classes."""
    train, test = (
        Tasks(x, [np.flatnonzero(labels == c) for c in part], ways, shots)
        for part in split_classes(labels, ways, shots, share, seed)
    )
    rng = np.random.default_rng(seed)
    which, s, q = test.draw(rng, episodes)
    truth, entity = test.labels(episodes, QUERY), np.repeat(which, QUERY, axis=1).reshape(-1)

    def fit(learner: Any) -> Any:
        return trained(learner, train, steps, seed)

    makers: dict[str, Callable[[], Any]] = {
        "learned head": lambda: learned(fit(head_of(x.shape[1], ways)), test),
        "ProtoNet": lambda: learned(fit(ProtoNet(encoder_of(x.shape[1]))), test),
        "head, not trained": lambda: learned(head_of(x.shape[1], ways), test),
        "logistic regression": lambda: logistic(test),
        "nearest mean": lambda: centroid(test),
    }
    table = {"class": entity, "right": np.ones(len(entity))}
    judge = _Judge(Panel(table, entity="class", target="right"), 1, 500, seed)
    order = np.argsort(entity, kind="stable")
    runs: list[_Run] = []
    for name, make in makers.items():
        torch.manual_seed(seed)
        begin = time.perf_counter()
        predict = make()
        fitted = time.perf_counter()
        right = (predict(s, q) == truth).reshape(-1).astype(np.float64)
        run = _Run(name, None, not runs, None, fitted - begin, time.perf_counter() - fitted)
        run.p = right[order]
        runs.append(run)
    sizes = np.full(len(entity), shots)
    lines = [judge.line(r, [accuracy], sizes) for r in runs]
    pairs = [judge.pair(runs[0], r, accuracy) for r in runs[1:]]
    facts = {
        "tasks": f"{episodes} of {counted(ways, 'held-out class', 'held-out classes')}, "
        f"{counted(shots, 'example')} of each"
    }
    return Report(lines, pairs, [], [], [accuracy.name], facts)


def text(
    data: Any,
    *,
    columns: Mapping[str, str] | None = None,
    ways: int = 5,
    shots: int = 5,
    features: int = 128,
    share: float = 0.35,
    seeds: int = 3,
    quick: bool = False,
    say: Say = silent,
) -> Result:
    """Compare on classes that training has not seen, and train a model for deployment.

    Args:
        data: a table with a text and a label in each row, or an .npz with embeddings `X` and
            labels `y`.
        columns: {"text": ..., "label": ...}; {"text": "text", "label": "category"} by default.
        ways: how many classes a task has.
        shots: how many examples of each class are labelled.
        features: how many directions of TF-IDF are kept; embeddings are taken as they are.
        share: the share of classes that is tested and not trained on.
        seeds: how many runs, each with other tested classes and other starts.
        quick: use one seed and fewer training steps, to see it run.
        say: is told of progress.

    Returns:
        The `Result`. Intervals are over the tested classes.

    Raises:
        ImportError: a package of the extra `finance` is missing.
        TypeError, ValueError: an argument is not as described.
    """
    labels, texts = read_texts(data, columns)
    steps, reports = 20 if quick else 200, []
    for seed in range(1 if quick else seeds):
        say(f"seed {seed + 1}")
        train, _ = split_classes(labels, ways, shots, share, seed)
        x = texts
        if not isinstance(texts, np.ndarray):
            seen = np.isin(labels, train)
            words = Words.fit([t for t, s in zip(texts, seen, strict=True) if s], features, seed)
            x = words(texts)
        args = (labels, x, ways, shots, share, seed, steps, 40 if quick else 200)
        reports.append(_compared(*args))

    def deploy() -> Intents:
        words = None if isinstance(texts, np.ndarray) else Words.fit(texts, features)
        x = texts if words is None else words(texts)
        rows = [np.flatnonzero(labels == c) for c in np.unique(labels)]
        tasks = Tasks(x, [r for r in rows if len(r) >= shots + QUERY], ways, shots)
        head = trained(head_of(x.shape[1], ways), tasks, steps, 0)
        _, s, _ = tasks.draw(np.random.default_rng(0), 50)
        y = tasks.labels(50, shots).reshape(-1)
        table = {"task": np.repeat(np.arange(50), ways * shots), "y": y}
        panel = Panel(table, entity="task", target="y", classes=True)
        return Intents(words, adapter_of(head, panel.with_features(x[s.reshape(-1)])))

    settings = {"ways": ways, "shots": shots, "features": features, "seeds": len(reports)}
    return result("text", reports, deploy, say, settings)
