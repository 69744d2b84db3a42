"""Text: TF-IDF by numpy, tasks of new classes, and the job on made sentences."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

import pymeta
from pymeta.finance import Intents, text
from pymeta.finance.intents import QUERY, Tasks, centroid, split_classes
from pymeta.finance.words import Words


def sentences(classes=24, rows=25, seed=0) -> dict:
    """Sentences of common words, and of a choice of topics that each class has."""
    rng = np.random.default_rng(seed)
    common = [f"word{i}" for i in range(60)]
    texts, labels = [], []
    for c in range(classes):
        own = [f"topic{i}" for i in rng.permutation(24)[:4]]
        for _ in range(rows):
            words = [*rng.choice(common, 6), *rng.choice(own, 3)]
            texts.append(" ".join(rng.permutation(words)) + "?")
            labels.append(f"intent{c:02d}")
    order = rng.permutation(len(texts))
    return {"text": [texts[i] for i in order], "category": np.array(labels)[order]}


def test_words_are_scikit_learns(tmp_path):
    table = sentences(classes=6)
    words = Words.fit(table["text"], 10)
    made = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    counted = made.fit_transform(table["text"])
    new = ["Word1 topic1, topic2!", "nothing known", "a word2 word2 word2"]
    np.testing.assert_allclose(words.tfidf(new), made.transform(new).toarray(), atol=1e-12)
    svd = TruncatedSVD(10, random_state=0).fit(counted)
    wanted = svd.transform(made.transform(new)) / svd.transform(counted).std(axis=0)
    np.testing.assert_allclose(words(new), wanted, atol=1e-5)
    words.save(tmp_path / "w.npz")
    np.testing.assert_array_equal(Words.load(tmp_path / "w.npz")(new), words(new))


def test_tasks_are_of_distinct_rows_and_classes():
    labels = np.repeat(np.arange(8), 20)
    train, test = split_classes(labels, 3, 4, 0.4, 0)
    assert not np.isin(test, train).any() and len(train) + len(test) == 8
    tasks = Tasks(np.zeros((160, 2)), [np.flatnonzero(labels == c) for c in test], 3, 4)
    which, s, q = tasks.draw(np.random.default_rng(0), 5)
    for t in range(5):
        assert len(np.unique(which[t])) == 3
        rows = np.concatenate([s[t], q[t]])
        assert len(np.unique(rows)) == len(rows) == 3 * (4 + QUERY)
        np.testing.assert_array_equal(labels[s[t]], np.repeat(test[which[t]], 4))
        np.testing.assert_array_equal(labels[q[t]], np.repeat(test[which[t]], QUERY))
    with pytest.raises(ValueError, match="expected 5 classes of 14 rows or more"):
        split_classes(labels, 5, 4, 0.4, 0)


def test_the_nearest_mean_is_found():
    x = np.repeat(np.eye(3), 15, axis=0) + 0.01
    tasks = Tasks(x, [np.arange(i * 15, i * 15 + 15) for i in range(3)], 3, 5)
    _, s, q = tasks.draw(np.random.default_rng(0), 4)
    np.testing.assert_array_equal(centroid(tasks)(s, q), tasks.labels(4, QUERY))


def test_text_runs_and_is_deployed(tmp_path):
    table = sentences()
    found = text(table, ways=4, shots=3, features=40, quick=True)
    value = {line.name: line.scores[0].pooled for line in found.report.lines}
    assert next(iter(value)) == "learned head" and value["learned head"] > 0.5
    assert {"ProtoNet", "logistic regression", "nearest mean"} <= set(value)
    found.save(tmp_path)
    assert pymeta.Adapter.load(tmp_path / "adapter.safetensors").out_features == 4
    model = Intents.load(tmp_path)
    labels, texts = np.array(table["category"]), np.array(table["text"])
    chosen = np.unique(labels)[[3, 9, 14, 20]]
    rows = [np.flatnonzero(labels == c) for c in chosen]
    shots, asked = np.concatenate([r[:5] for r in rows]), np.concatenate([r[5:] for r in rows])
    right = np.array(model.predict(texts[shots], labels[shots], texts[asked])) == labels[asked]
    assert right.mean() > 0.7


def test_embeddings_and_other_columns(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 20)
    x = 2 * rng.normal(size=(12, 8))[labels] + rng.normal(size=(240, 8))
    np.savez(tmp_path / "e.npz", X=x, y=labels)
    found = text(tmp_path / "e.npz", ways=3, shots=5, quick=True)
    assert found.report.lines[0].scores[0].pooled > 0.8
    (tmp_path / "out").mkdir()
    assert len(found.deployed.save(tmp_path / "out")) == 1
    first = np.concatenate([np.flatnonzero(labels == c)[:5] for c in (1, 4, 7)])
    rest = np.concatenate([np.flatnonzero(labels == c)[5:] for c in (1, 4, 7)])
    model = Intents.load(tmp_path / "out")
    got = model.predict(x[first].astype(np.float32), labels[first], x[rest].astype(np.float32))
    assert (np.array(got) == labels[rest]).mean() > 0.8
    with pytest.raises(ValueError, match="columns: no column is called 'category'"):
        text({"text": ["a"], "label": ["b"]})
