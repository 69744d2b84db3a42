"""Features of rows by an encoder: which of its parameters are trained, and what is kept of it.

An encoder is any module from rows [N, ...] to features [N, d]; it sees the rows of all tasks in one
batch (or in several, where a batch has a largest size). Where nothing of it is trained, it runs
without a graph, and the features of rows can be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pymeta.learners.rows import encoded
from pymeta.spec.show import counted


def blocks(encoder: nn.Module) -> list[str]:
    """The names of an encoder's layers: the children of its longest ModuleList or Sequential.

    Children without parameters are no layers. ValueError where there is no such container.
    """
    best: list[str] = []
    for name, module in encoder.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            found = [
                f"{name}.{child}" if name else child
                for child, layer in module.named_children()
                if any(True for _ in layer.parameters())
            ]
            best = max(best, found, key=len)
    if not best:
        raise ValueError(
            "train: there is no nn.Sequential or nn.ModuleList with layers in the encoder; give "
            "patterns of parameter names in place of a number of layers"
        )
    return best


def choose(encoder: nn.Module, train: bool | int | Sequence[str] | None) -> None:
    """Set which of an encoder's parameters require grad; see `EncodedMAML`.

    Raises:
        TypeError: `train` is none of what is described there.
        ValueError: there are not so many layers, or a pattern matches nothing.
    """
    if train is None:
        return
    if isinstance(train, bool):
        encoder.requires_grad_(train)
        return
    names = [name for name, _ in encoder.named_parameters()]
    if isinstance(train, int):
        layers = blocks(encoder)
        if not 1 <= train <= len(layers):
            raise ValueError(f"train: expected 1 to {counted(len(layers), 'layer')}, got {train}")
        patterns = [f"{layer}.*" for layer in layers[-train:]]
    elif isinstance(train, str) or not isinstance(train, Sequence):
        raise TypeError(
            f"train: expected a bool, a number of layers or a list of patterns, got {train!r}"
        )
    else:
        patterns = list(train)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"train: the pattern {pattern!r} matches no parameter of the encoder; there are "
                f"{', '.join(names) or 'none'}"
            )
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))


class Features:
    """Runs an encoder; with `keep`, rows that were seen before are looked up.

    What is kept counts as long as the encoder's parameters and buffers are as they were. A row is
    known by its bytes. Copies and pickles keep nothing.
    """

    def __init__(self, keep: bool, at_once: int | None) -> None:
        """`at_once` is the most rows of a batch; None for all."""
        self.keep, self.at_once = keep, at_once
        self.clear()

    def clear(self) -> None:
        """Forget all features."""
        self._places: dict[bytes, int] = {}
        self._table: Tensor | None = None
        self._of: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """The options."""
        return {"keep": self.keep, "at_once": self.at_once}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restored without any features."""
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        """How many rows are kept."""
        return len(self._places)

    def __call__(self, encoder: nn.Module, x: Tensor) -> Tensor:
        """The features [N, d] of rows [N, ...].

        Raises:
            ValueError: what the encoder returns is not of this shape.
        """
        if self.keep:
            with torch.no_grad():
                return self._kept(encoder, x)
        return self._computed(encoder, x)

    def _computed(self, encoder: nn.Module, x: Tensor) -> Tensor:
        parts = (x,) if self.at_once is None or len(x) == 0 else torch.split(x, self.at_once)
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(encoder, x)):
            found = [self._one(encoder, part) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    @staticmethod
    def _one(encoder: nn.Module, x: Tensor) -> Tensor:
        features = encoded(encoder, x)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(x):
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"encoder: expected features of shape [{len(x)}, d], got {got}")
        return features

    def _kept(self, encoder: nn.Module, x: Tensor) -> Tensor:
        state = [
            (t.data_ptr(), t._version) for t in (*encoder.parameters(), *encoder.buffers())
        ]  # of what the features are
        of = (state, x.dtype, x.device, tuple(x.shape[1:]), encoder.training)
        if of != self._of:
            self.clear()
            self._of = of
        raw = np.ascontiguousarray(x.detach().cpu().contiguous().view(torch.uint8).numpy())
        keys = [row.tobytes() for row in raw.reshape(len(x), -1)] if len(x) else []
        fresh = {key: n for n, key in enumerate(keys) if key not in self._places}
        if fresh or self._table is None:
            rows = torch.tensor(list(fresh.values()), dtype=torch.int64, device=x.device)
            computed = self._computed(encoder, x[rows])
            self._add(list(fresh), computed)
        assert self._table is not None
        places = torch.tensor([self._places[key] for key in keys], dtype=torch.int64)
        return self._table[places.to(self._table.device)]

    def _add(self, keys: list[bytes], computed: Tensor) -> None:
        """Put features of new rows into the table, which doubles where it is full."""
        used, needed = len(self._places), len(self._places) + len(keys)
        table = self._table
        if table is None or needed > len(table):
            larger = computed.new_empty(max(2 * used, needed), computed.shape[1])
            if table is not None:
                larger[:used] = table[:used]
            self._table = table = larger
        table[used:needed] = computed
        self._places.update(zip(keys, range(used, needed), strict=True))


def is_trained(encoder: nn.Module, x: Tensor) -> bool:
    """Whether a graph through an encoder is of any use."""
    return x.requires_grad or any(p.requires_grad for p in encoder.parameters())
