"""The pooled model's outputs of a panel's rows, as the remainder's heads take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pymeta.data import Ragged
from pymeta.tasks.groups import Array


class Offsets(NamedTuple):
    """The pooled model's outputs of a panel's rows, float32 [rows, 1].

    Attributes:
        asked: as they are: what a prediction is added to.
        given: with what all entities have in common at the row's time: entities are adapted to
            the rest.
    """

    asked: Array
    given: Array

    def where(self, rows: Array) -> Offsets:
        """Of some rows."""
        return Offsets(self.asked[rows], self.given[rows])

    def take(self, batch: Any) -> tuple[Any, Any]:
        """Those of a batch's support rows, and of its query rows."""
        return batch.take(self.given)[0], batch.take(self.asked)[1]


def rows_of(values: Any) -> Array:
    """[sum of rows] of what tasks have, in any of their forms, of one output."""
    if isinstance(values, Ragged):
        return np.asarray(values.values).reshape(-1)
    if isinstance(values, (list, tuple)):
        return np.concatenate([np.asarray(v).reshape(-1) for v in values])
    return np.asarray(values).reshape(-1)
