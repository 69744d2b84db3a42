"""TF-IDF and its main directions, fitted by scikit-learn and used by numpy alone.

    text -> words and pairs of words -> counts times idf, of norm 1 -> directions (truncated SVD)

as `TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)` and `TruncatedSVD` have it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
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

    def _terms(self, texts: Sequence[str]) -> Iterator[tuple[Array, Array]]:
        """Of each text the known terms, and their weights, of norm 1."""
        place = {term: i for i, term in enumerate(self.vocabulary.tolist())}
        for text in texts:
            words = _TOKEN.findall(text.lower())
            terms = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
            known = np.array([place[t] for t in terms if t in place], dtype=np.int64)
            found, count = np.unique(known, return_counts=True)
            weight = (1 + np.log(count)) * self.idf[found]
            yield found, weight / (np.linalg.norm(weight) or 1.0)

    def tfidf(self, texts: Sequence[str]) -> Array:
        """[texts, terms], rows of norm 1 (of 0 where no term is known)."""
        out = np.zeros((len(texts), len(self.vocabulary)))
        for row, (terms, weights) in enumerate(self._terms(texts)):
            out[row, terms] = weights
        return out

    def __call__(self, texts: Sequence[str]) -> Array:
        """Features [texts, features], float32."""
        by_term = np.ascontiguousarray(self.directions.T / self.scale)
        out = np.empty((len(texts), by_term.shape[1]), np.float32)
        for row, (terms, weights) in enumerate(self._terms(texts)):
            out[row] = weights @ by_term[terms]
        return out

    def save(self, path: Any) -> None:
        """Write an .npz."""
        np.savez(path, vocabulary=self.vocabulary, idf=self.idf, directions=self.directions,
                 scale=self.scale)  # fmt: skip

    @classmethod
    def load(cls, path: Any) -> Words:
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(**{k: file[k] for k in ("vocabulary", "idf", "directions", "scale")})
