"""The learning curves of fine-tuned tasks, as tensors or numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class History:
    """The learning curves of T fine-tuned tasks; an epoch that did not run has NaN.

    Attributes:
        train: [T, epochs], each epoch's mean training loss.
        validation: [T, epochs + 1], the validation loss before (column 0) and after each epoch.
        best_epochs: [T] int64, after which epoch the weights kept were reached (0: the start).
        epochs: [T] int64, how many epochs ran.
    """

    train: Any
    validation: Any | None
    best_epochs: Any | None
    epochs: Any

    def values(self) -> dict[str, Any]:
        """{field: value} of what is there."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    @staticmethod
    def of(values: Mapping[str, Any]) -> History:
        """The opposite of `values`."""
        return History(**{f.name: values.get(f.name) for f in fields(History)})
