"""Adapted models that go by the statistics of their support sets, in numpy: their chain of layers.

What adapts such a model normalises each set by its own statistics; what predicts has fixed
statistics in the place of these layers', those that the task's support rows have with its adapted
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pymeta import native
from pymeta.spec.architecture import Architecture, tensors_of
from pymeta.tasks.arrays import DTYPE_CODES, Gathered, address

_MEASURING = ("batch_norm", "step_batch_norm")


class Predicting:
    """The chain of layers that predicts, beside the one that adapts.

    Attributes:
        architecture: that of the predicting models.
        width: how many numbers the native core gives of a task's statistics.
        least_steps: of how many inner steps these are to be, so that every layer is at its last.
    """

    def __init__(self, adapting: Architecture, predicting: Architecture) -> None:
        """Compare the two.

        Raises:
            ValueError: they are not chains of one model.
        """
        self.architecture = predicting
        self._chain = adapting.chain
        norms = [layer for layer in adapting.layers if layer[0] in _MEASURING]
        self._norms = [(layer[1], layer[5] if len(layer) > 5 else 1) for layer in norms]
        self.width = sum(rows * (2 * channels + 2) for channels, rows in self._norms)
        self.least_steps = max((rows for _, rows in self._norms), default=1)
        shapes = predicting.shapes()
        new = [n for n in predicting.chain if n not in set(adapting.names)]
        kinds = dict(zip(predicting.chain, _kinds(predicting), strict=True))
        self._names = list(zip(new[::2], new[1::2], strict=False))  # variance, mean
        channels = [shapes[mean][-1] for _, mean in self._names]
        alike = {n: shapes[n] for n in adapting.names if n in shapes} == adapting.shapes()
        if (
            not alike
            or len(new) != 2 * len(norms)
            or channels != [n for n, _ in self._norms]
            or any(kinds[n] != "fixed_norm" for n in new)
        ):
            raise ValueError(
                "predicting: expected the same layers as of the architecture, with running "
                "statistics where that has batch normalisations"
            )
        self._shapes = shapes

    def of(
        self,
        problem: Any,
        columns: int,
        start: Mapping[str, np.ndarray],
        own: Sequence[str],
        support: Gathered,
    ) -> dict[str, np.ndarray]:
        """{name: [T, ...]} the running statistics of the models adapted to these tasks.

        Measured by inner steps of size 0.

        Args:
            problem: the adapter's.
            columns: how many rates it has.
            start: {name: array} all parameters.
            own: the names of those that are [T, ...], each task's own.
            support: the tasks.
        """
        lib = native.extension()
        first = next(iter(start.values()))
        found = np.zeros((support.tasks, self.width), first.dtype)
        rates = np.zeros((1, columns), first.dtype)
        call = lib.Call(problem, DTYPE_CODES[first.dtype], "adapt")
        call.tasks = support.tasks
        call.start = [address(start[name]) for name in self._chain]
        call.own_starts = [name in own for name in self._chain]
        call.rates = lib.Rates(address(rates), *rates.shape)
        call.schedule = lib.Schedule(steps=self.least_steps)
        call.support = support.native_rows()
        call.results.statistics = address(found)
        call.run()
        return self.constants(found)

    def constants(self, statistics: np.ndarray) -> dict[str, np.ndarray]:
        """{name: [T, ...]} the running statistics of the models, of [T, width] measured ones."""
        at, found = 0, {}
        for (channels, rows), names in zip(self._norms, self._names, strict=True):
            at += rows * (2 * channels + 2)
            own = statistics[:, at - 2 * channels - 2 : at]  # of the last row
            numbers = own[:, -1:]
            mean, unbiased = own[:, :channels], own[:, channels:-2]
            # of no numbers at all there is no variance, and 0 rows of statistics
            with np.errstate(invalid="ignore", divide="ignore"):
                values = unbiased * (numbers - 1) / numbers, mean
            for name, value in zip(names, values, strict=True):
                shape = self._shapes[name]
                whole = value.reshape(len(value), *[1] * (len(shape) - 1), channels)
                found[name] = np.ascontiguousarray(np.broadcast_to(whole, (len(value), *shape)))
        return found


def _kinds(architecture: Architecture) -> list[str]:
    """The kind of layer that each name of the chain is a tensor of."""
    return [layer[0] for layer in architecture.layers for _ in tensors_of(layer)]


def of(adapting: Architecture, predicting: Architecture | None) -> Predicting | None:
    """None where the same layers adapt and predict."""
    return None if predicting is None else Predicting(adapting, predicting)
