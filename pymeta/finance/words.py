"""TF-IDF and its main directions, fitted by scikit-learn and used by numpy alone.

    text -> words and pairs of words -> counts times idf, of norm 1 -> directions (truncated SVD)

as `TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)` and `TruncatedSVD` have it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymeta.data.optional import need
from pymeta.tasks.groups import Array

_TOKEN = re.compile(r"(?u)\b\w\w+\b")


@dataclass(frozen=True)
class Words:
    """A fitted encoder of texts.

    Attributes:
        vocabulary: [terms], words and pairs of words, sorted.
        idf: [terms].
        directions: [features, terms].
        scale: [features], what features are divided by.
    """

    vocabulary: Array
    idf: Array
    directions: Array
    scale: Array

    @classmethod
    def fit(cls, texts: Sequence[str], features: int, seed: int = 0) -> Words:
        """Learn from training texts.

        Args:
            texts: of training.
            features: how many directions, at most.
            seed: of the decomposition.
        """
        text = need("sklearn.feature_extraction.text", "pymeta.finance.text", "finance")
        svd = need("sklearn.decomposition", "pymeta.finance.text", "finance").TruncatedSVD
        made = text.TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        counted = made.fit_transform(texts)
        features = min(features, counted.shape[1] - 1, counted.shape[0] - 1)
        parts = svd(features, random_state=seed).fit(counted)
        scale = np.maximum(parts.transform(counted).std(axis=0), 1e-6)
        return cls(made.get_feature_names_out().astype(str), made.idf_, parts.components_, scale)

    def tfidf(self, texts: Sequence[str]) -> Array:
        """[texts, terms], rows of norm 1 (of 0 where no term is known)."""
        place = {term: i for i, term in enumerate(self.vocabulary.tolist())}
        out = np.zeros((len(texts), len(place)))
        for row, text in enumerate(texts):
            words = _TOKEN.findall(text.lower())
            for term in words + [f"{a} {b}" for a, b in itertools.pairwise(words)]:
                if term in place:
                    out[row, place[term]] += 1
        here = out > 0
        out[here] = 1 + np.log(out[here])
        out *= self.idf
        norm = np.linalg.norm(out, axis=1, keepdims=True)
        return np.asarray(out / np.where(norm > 0, norm, 1))

    def __call__(self, texts: Sequence[str]) -> Array:
        """Features [texts, features], float32."""
        parts = [
            self.tfidf(texts[i : i + 2000]) @ self.directions.T for i in range(0, len(texts), 2000)
        ]
        found = np.concatenate(parts) if parts else np.zeros((0, len(self.scale)))
        return np.asarray(found / self.scale, dtype=np.float32)

    def save(self, path: Any) -> None:
        """Write an .npz."""
        np.savez(path, vocabulary=self.vocabulary, idf=self.idf, directions=self.directions,
                 scale=self.scale)  # fmt: skip

    @classmethod
    def load(cls, path: Any) -> Words:
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(**{k: file[k] for k in ("vocabulary", "idf", "directions", "scale")})
