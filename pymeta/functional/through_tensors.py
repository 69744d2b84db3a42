"""Operators on numpy arrays where torch runs them: by tensors that share the arrays' memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymeta.functional.evaluation import Results

if TYPE_CHECKING:
    from pymeta.functional.calls import Flows, Request, Side
    from pymeta.functional.tensors import Tensors


class ThroughTensors:
    """The same calls for numpy arrays, by tensors that share their memory."""

    def __init__(self, tensors: Tensors) -> None:
        """Wrap what runs calls with tensors."""
        self._tensors = tensors

    def adapt(self, request: Request) -> Any:
        """As `Tensors.adapt`."""
        with torch.no_grad():
            return _in_numpy(self._tensors.adapt(request))

    def adapt_predict(self, request: Request) -> Any:
        """As `Tensors.adapt_predict`."""
        with torch.no_grad():
            return _in_numpy(self._tensors.adapt_predict(request))

    def predict(self, parameters: Mapping[str, Any], query: Side) -> Any:
        """As `Tensors.predict`."""
        with torch.no_grad():
            return _in_numpy(self._tensors.predict(parameters, query))

    def gradients(self, request: Request, wrt: tuple[str, ...], flows: Flows | None) -> Any:
        """As `Tensors.gradients`."""
        results, found = self._tensors.gradients(request, wrt, flows)
        return _in_numpy(results), _in_numpy(found)


def _in_numpy(value: Any) -> Any:
    """A tree of tensors as one of arrays."""
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {name: _in_numpy(v) for name, v in value.items()}
    if isinstance(value, Results):
        return Results(*map(_in_numpy, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_in_numpy, value))
    return value
