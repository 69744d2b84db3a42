"""What is drawn of a panel: `Batch`, to be called as `maml(*batch)`, and `Tasks`, to adapt to.

Both are tuples of arrays ([T, rows, ...], or `Ragged` where sizes differ) and know which rows of
the panel they hold, so that whatever else there is of the rows (weights, an offset, times) can be
brought into the same form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pymeta.data.draw import slices
from pymeta.tasks.groups import Array
from pymeta.tasks.ragged import in_tasks

if TYPE_CHECKING:
    from pymeta.data.panel import Panel


class _Both(NamedTuple):
    xs: Any
    ys: Any
    xq: Any
    yq: Any


class Batch(_Both):
    """T tasks, each with support and query rows: (xs, ys, xq, yq).

    Attributes:
        xs: support inputs [T, rows, features], or `Ragged`.
        ys: support targets [T, rows], or `Ragged`.
        xq: query inputs, like xs.
        yq: query targets, like ys.
        entities: [T], whose rows they are.
        support_rows: [sum of sizes], which rows of the panel are support, task after task.
        query_rows: likewise.
        support_sizes: [T].
        query_sizes: [T].
    """

    entities: Array
    support_rows: Array
    query_rows: Array
    support_sizes: Array
    query_sizes: Array

    def take(self, values: Array) -> tuple[Any, Any]:
        """What there is of the panel's rows, in the form of the tasks.

        Args:
            values: [rows of the panel, ...].

        Returns:
            The support rows' values and the query rows', in the forms of ys and yq.
        """
        return (
            in_tasks(values[self.support_rows], self.support_sizes),
            in_tasks(values[self.query_rows], self.query_sizes),
        )

    def with_values(self, xs: Any, ys: Any, xq: Any, yq: Any) -> Batch:
        """The same rows with other inputs and targets."""
        twin = type(self)(xs, ys, xq, yq)
        twin.__dict__.update(self.__dict__)
        return twin


def make_batch(
    panel: Panel, support: tuple[Array, Array], query: tuple[Array, Array], entities: Array
) -> Batch:
    """A batch of a panel's rows.

    Args:
        panel: whose x and y are taken.
        support: the rows [sum of sizes], and the sizes [T].
        query: likewise.
        entities: [T], codes.
    """
    x, y = panel.x, panel.need_y()
    sides = [in_tasks(v.take(rows, axis=0), n) for rows, n in (support, query) for v in (x, y)]
    batch = Batch(*sides)
    batch.entities = panel.entities[entities]
    batch.support_rows, batch.support_sizes = support
    batch.query_rows, batch.query_sizes = query
    return batch


class _Some(NamedTuple):
    xs: Any
    ys: Any


class Tasks(_Some):
    """All rows of T entities: (xs, ys), as `maml.adapt(*tasks)` takes them.

    An entity without rows has a task of none.

    Attributes:
        xs: inputs [T, rows, features], or `Ragged`.
        ys: targets [T, rows], or `Ragged`; None where the panel has no target.
        entities: [T], the entities' labels.
        sizes: [T].
    """

    entities: Array
    sizes: Array


def make_tasks(panel: Panel, entities: Array) -> Tasks:
    """The rows of these entities as tasks; of the panel's own, they are views of its arrays."""
    x, y, sizes = panel.x, panel.y, panel.sizes
    if entities is not panel.entities:
        there = np.isin(entities, panel.entities)
        codes = np.searchsorted(panel.entities, entities[there])
        kept, sizes = sizes[codes], np.zeros(len(entities), sizes.dtype)
        sizes[there] = kept
        rows = slices(panel.offsets[codes], kept)
        x, y = x[rows], None if y is None else y[rows]
    tasks = Tasks(in_tasks(x, sizes), None if y is None else in_tasks(y, sizes))
    tasks.entities, tasks.sizes = entities, sizes
    return tasks
