"""Networks that embed categories: what lies behind their first layers.

A category has no gradient, its embedding has. So a network is split: `Embedded.rows` does what the
first layers do, for every task with its own tables, and `rest` is the network behind them, whose
rows are [numbers and embeddings]. What is found for these numbers is added up by the column that
they came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pymeta.explain.baselines import Baselines, baselines_of
from pymeta.explain.rows import Packed, as_array
from pymeta.models.arrays import AdaptedArrays
from pymeta.spec.architecture import Architecture


def columns_behind(chain: Architecture) -> np.ndarray:
    """[wide], the input's column that each feature behind a chain's embeddings came from."""
    first = [layer for layer in chain.layers if layer[0] == "embedding"]
    columns = list(range(first[0][1] if first else chain.in_features))
    for _, _, place, _, width in first:
        columns[place : place + 1] = [columns[place]] * width
    return np.array(columns)


class Embedded:
    """The layers of adapted models that embed categories, and the models behind them.

    Attributes:
        rest: the models of what follows.
        columns: [wide], the input's column that each of their features came from.
    """

    def __init__(self, models: Any) -> None:
        """Split the models.

        Raises:
            ValueError: they are no chain of layers that begins with embeddings.
        """
        chain = models.architecture if hasattr(models, "architecture") else models._architecture()
        if chain is None:
            raise ValueError(
                "models: a row's categories have no gradient, and this network is no chain of "
                "known layers that could be explained behind its embeddings; embed them by "
                "pymeta.nn.TabularInput, or explain a network of one-hot columns"
            )
        first = [layer for layer in chain.layers if layer[0] == "embedding"]
        count = len(first)
        tables, left = chain.chain[:count], chain.chain[count:]
        stacked, shared = (
            {n: as_array(n, v) for n, v in held.items()}
            for held in (models._stacked, models._shared)
        )
        names = tuple(n for n in chain.names if n in left)
        self.rest = AdaptedArrays(
            Architecture(chain.layers[count:], names, left, False),
            models.loss,
            {n: v for n, v in stacked.items() if n in left},
            {n: v for n, v in shared.items() if n in left},
            len(models),
        )
        # [T or 1, categories, width], and where the category stands by then
        self._tables = [(stacked[n] if n in stacked else shared[n][None]) for n in tables]
        self._places = [layer[2] for layer in first]
        self.columns = columns_behind(chain)

    def _wide(self, name: str, values: np.ndarray, task: np.ndarray) -> np.ndarray:
        """Rows [N, features] of tasks [N] as [N, wide]."""
        for table, place in zip(self._tables, self._places, strict=True):
            given = values[:, place]
            codes = given.astype(np.int64)
            wrong = (codes != given) | (codes < 0) | (codes >= table.shape[1])
            if wrong.any():
                column = self.columns[place]
                raise ValueError(
                    f"{name}: column {column}: expected a category, a whole number from 0 to "
                    f"{table.shape[1] - 1}, got {given[wrong][0]}"
                )
            looked_up = table[task if len(table) > 1 else 0, codes]
            values = np.concatenate([values[:, :place], looked_up, values[:, place + 1 :]], axis=1)
        return np.ascontiguousarray(values)

    def _tasks(self, rows: Packed) -> np.ndarray:
        """[N], whose each row is."""
        return np.repeat(np.arange(len(rows.sizes)), rows.sizes)

    def rows(self, rows: Packed) -> Packed:
        """The rows, embedded.

        Raises:
            ValueError: they are of another width, or a category is out of range.
        """
        features = int(self.columns.max()) + 1
        if rows.row != (features,) or len(rows.sizes) != len(self.rest):
            raise ValueError(
                f"xq: expected {len(self.rest)} tasks of rows [rows, {features}], got "
                f"{len(rows.sizes)} of [rows, {', '.join(map(str, rows.row))}]"
            )
        return rows._replace(values=self._wide("xq", rows.values, self._tasks(rows)))

    def by_column(self, values: np.ndarray) -> np.ndarray:
        """[N, wide] added up by the input's columns: [N, features]."""
        found = np.zeros((len(values), int(self.columns.max()) + 1), values.dtype)
        np.add.at(found.T, self.columns, values.T)
        return found

    def baselines(self, baseline: Any, population: Any, rows: Packed) -> Baselines:
        """What paths begin at: baselines of `integrated_gradients`, embedded.

        Without any, numbers begin at 0 and a category at the mean of its table.
        """
        task = self._tasks(rows)
        if baseline is None and population is None:
            values = np.zeros((len(self.rest), rows.row[0]), rows.values.dtype)
            for table, place in zip(self._tables, self._places, strict=True):
                mean = np.broadcast_to(table.mean(1), (len(self.rest), table.shape[2]))
                values = np.concatenate([values[:, :place], mean, values[:, place + 1 :]], axis=1)
            return Baselines(values[task][:, None], True)
        given = baselines_of(baseline, population, rows)
        if given.of_rows:
            return Baselines(self._wide("baseline", given.values[:, 0], task)[:, None], True)
        name = "baseline" if population is None else "population"
        if all(len(table) == 1 for table in self._tables):  # the same for all tasks
            zero = np.zeros(len(given.values), np.int64)
            return Baselines(self._wide(name, given.values, zero), False)
        return _OfTasks(given.values, False, self, name, task)


@dataclass(frozen=True)
class _OfTasks(Baselines):
    """Rows that every task embeds by its own tables, as they are asked for."""

    space: Embedded
    name: str
    task: np.ndarray

    def at(self, which: np.ndarray) -> np.ndarray:
        """[N, points, wide]."""
        rows, points = len(self.task), len(which)
        given = np.broadcast_to(self.values[which], (rows, points, self.values.shape[1]))
        flat = given.reshape(rows * points, -1)
        wide = self.space._wide(self.name, flat, np.repeat(self.task, points))
        return wide.reshape(rows, points, -1)
