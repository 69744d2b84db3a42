"""Adapted weights by entity, kept until the entity's rows or the model change."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from pymeta.models.arrays import AdaptedArrays
from pymeta.serve.model import Model


@dataclass(frozen=True)
class Adapted:
    """What an entity was adapted to."""

    model: Model
    revision: int
    models: AdaptedArrays  # of one task
    mean: np.ndarray  # [in], of the support rows, for explanations
    rows: int


class Cache:
    """The least recently used goes first; used on the event loop alone."""

    def __init__(self, most: int) -> None:
        """Empty."""
        self._most = most
        self._kept: OrderedDict[int, Adapted] = OrderedDict()

    def __len__(self) -> int:
        """The number of entities."""
        return len(self._kept)

    def get(self, entity: int, revision: int, model: Model) -> Adapted | None:
        """What is kept of an entity, if it is of these rows and this model."""
        found = self._kept.get(entity)
        if found is None or found.revision != revision or found.model is not model:
            return None
        self._kept.move_to_end(entity)
        return found

    def put(self, entity: int, adapted: Adapted) -> None:
        """Keep it, in place of what there was."""
        self._kept[entity] = adapted
        self._kept.move_to_end(entity)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def drop(self, entity: int) -> None:
        """Forget an entity."""
        self._kept.pop(entity, None)
