"""N-way tasks of classes, what is trained on them, their plain rivals, and what is deployed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pymeta import Adapter
from pymeta.data.optional import need
from pymeta.finance.words import Words
from pymeta.learners import RidgeHead
from pymeta.spec.show import counted
from pymeta.tasks.groups import Array

QUERY = 10  # rows of each class
_WIDTH = 64


@dataclass(frozen=True)
class Tasks:
    """N-way tasks of classes.

    Attributes:
        x: [rows, features].
        classes: the rows of each class that may be drawn.
        ways: classes of a task.
        shots: examples of each.
    """

    x: Array
    classes: list[Array]
    ways: int
    shots: int

    def draw(self, rng: np.random.Generator, tasks: int) -> tuple[Array, Array, Array]:
        """Classes [T, ways], support rows [T, ways * shots], query rows [T, ways * query]."""
        which, support, query = [], [], []
        for _ in range(tasks):
            chosen = rng.permutation(len(self.classes))[: self.ways]
            rows = [rng.permutation(self.classes[c])[: self.shots + QUERY] for c in chosen]
            which.append(chosen)
            support.append(np.concatenate([r[: self.shots] for r in rows]))
            query.append(np.concatenate([r[self.shots :] for r in rows]))
        return np.array(which), np.array(support), np.array(query)

    def labels(self, tasks: int, each: int) -> Array:
        """[T, ways * each], 0..ways-1."""
        return np.tile(np.repeat(np.arange(self.ways), each), (tasks, 1))


def encoder_of(features: int) -> nn.Module:
    """A linear map that begins as the first directions."""
    layer = nn.Linear(features, min(_WIDTH, features), bias=False)
    nn.init.eye_(layer.weight)
    return nn.Sequential(layer)


def trained(learner: Any, tasks: Tasks, steps: int, seed: int) -> Any:
    """A learner after so many steps on 8 tasks each."""
    rng = np.random.default_rng(seed)
    by = [p for p in learner.parameters() if p.requires_grad]
    adam = torch.optim.Adam(by, 3e-3)
    ys, yq = (torch.as_tensor(tasks.labels(8, n)) for n in (tasks.shots, QUERY))
    for _ in range(steps):
        _, s, q = tasks.draw(rng, 8)
        adam.zero_grad()
        learner(torch.as_tensor(tasks.x[s]), ys, torch.as_tensor(tasks.x[q]), yq).loss.backward()
        adam.step()
    return learner


def head_of(features: int, ways: int) -> RidgeHead:
    """Ours, untrained; its prior mean stays 0, for classes have no order."""
    width = min(_WIDTH, features)
    head = RidgeHead(encoder_of(features), features=width, outputs=ways, loss="cross_entropy")
    head.prior_mean.requires_grad_(False)
    return head


def learned(learner: Any, tasks: Tasks) -> Callable[[Array, Array], Array]:
    """What a learner says, adapted to each task's examples."""

    def predict(s: Array, q: Array) -> Array:
        ys = torch.as_tensor(tasks.labels(len(s), tasks.shots))
        found = learner.adapt(torch.as_tensor(tasks.x[s]), ys)(torch.as_tensor(tasks.x[q]))
        return np.asarray(found.argmax(-1))

    return predict


def logistic(tasks: Tasks) -> Callable[[Array, Array], Array]:
    """Logistic regression on each task's examples, of features of norm 1."""
    regression = need("sklearn.linear_model", "pymeta.finance.text", "finance").LogisticRegression
    norm = np.linalg.norm(tasks.x, axis=1, keepdims=True)
    unit, y = tasks.x / np.maximum(norm, 1e-9), tasks.labels(1, tasks.shots)[0]

    def predict(s: Array, q: Array) -> Array:
        return np.stack(
            [regression(C=10.0).fit(unit[a], y).predict(unit[b]) for a, b in zip(s, q, strict=True)]
        )

    return predict


def centroid(tasks: Tasks) -> Callable[[Array, Array], Array]:
    """The nearest mean of a class's examples, by cosine."""
    unit = tasks.x / np.maximum(np.linalg.norm(tasks.x, axis=1, keepdims=True), 1e-9)

    def predict(s: Array, q: Array) -> Array:
        means = unit[s].reshape(len(s), tasks.ways, tasks.shots, -1).mean(axis=2)
        means /= np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-9)
        return np.asarray((unit[q] @ means.transpose(0, 2, 1)).argmax(-1))

    return predict


def split_classes(labels: Array, ways: int, shots: int, share: float, seed: int) -> list[Array]:
    """Classes to train on, and others to test on; those with too few rows are left out."""
    classes, counts = np.unique(labels, return_counts=True)
    classes = classes[counts >= shots + QUERY]
    order = np.random.default_rng(seed).permutation(classes)
    held = round(share * len(order))
    if min(held, len(order) - held) < ways:
        raise ValueError(
            f"ways, share: expected {counted(ways, 'class')} of {counted(shots + QUERY, 'row')} "
            "or more to train on "
            f"and as many to test on, got {len(order)} in all"
        )
    return [order[held:], order[:held]]


@dataclass
class Intents:
    """What is deployed: the encoder of texts (None for embeddings) and the adapter."""

    words: Words | None
    adapter: Adapter

    def predict(self, examples: Any, labels: Any, texts: Any) -> list[Any]:
        """The label of each text, given examples of as many classes as it was trained for."""
        known, y = np.unique(np.asarray(labels), return_inverse=True)
        xs, xq = ((self.words(t) if self.words else np.asarray(t)) for t in (examples, texts))
        out = self.adapter.adapt_predict(xs, y.astype(np.int64), xq)
        found: list[Any] = known[out.argmax(axis=-1)].tolist()
        return found

    def save(self, folder: Any) -> list[Path]:
        """Write adapter.safetensors and words.npz; their paths."""
        paths = [Path(folder) / "adapter.safetensors", Path(folder) / "words.npz"]
        self.adapter.save(paths[0])
        if self.words is None:
            return paths[:1]
        self.words.save(paths[1])
        return paths

    @classmethod
    def load(cls, folder: Any) -> Intents:
        """What `save` wrote."""
        path = Path(folder) / "words.npz"
        words = Words.load(path) if path.exists() else None
        return cls(words, Adapter.load(Path(folder) / "adapter.safetensors"))
