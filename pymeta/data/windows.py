"""All windows of a panel: so many rows of support, a gap, so many rows of query, and a step on.

    | support | gap | query |
         step -> | support | gap | query |

Windows of an entity begin at its first row. They are the tasks of a walk through time: adapt to the
last 60 days, predict the next 21, and on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pymeta.data.batch import Batch, make_batch
from pymeta.data.draw import slices, whole, within
from pymeta.spec.show import counted
from pymeta.tasks.groups import Array

if TYPE_CHECKING:
    from pymeta.data.panel import Panel


class Windows:
    """The windows of a panel, entity after entity; made by `panel.windows(...)`.

    Args:
        panel: with targets, and with times that increase from row to row of an entity (if any).
        support: rows of support.
        query: rows of query.
        gap: rows left out between them. Where a target is known h rows later only, a gap of h - 1
            keeps it from telling of the query.
        step: how many rows a window begins after the one before it.

    Attributes:
        entities: [W], codes of the entities.
        starts: [W], the first row of each window's support.

    Raises:
        TypeError, ValueError: an argument is not as described, no entity has rows enough, or two
            rows of an entity are of one time.

    Example:
        >>> from pymeta.data import Panel
        >>> data = {"e": [0] * 9, "t": list(range(9)), "x": [1.0] * 9, "y": [0.0] * 9}
        >>> windows = Panel(data, entity="e", time="t", target="y").windows(support=3, query=2)
        >>> len(windows), windows[:2].query_rows.tolist()
        (5, [3, 4, 4, 5])
    """

    def __init__(
        self, panel: Panel, *, support: int, query: int, gap: int = 0, step: int = 1
    ) -> None:
        self._panel = panel
        self.support, self.query = whole("support", support, 1), whole("query", query, 1)
        self.gap, self.step = whole("gap", gap, 0), whole("step", step, 1)
        panel.need_y()
        self._refuse_ties()
        length = self.support + self.gap + self.query
        counts = np.maximum((panel.sizes - length) // self.step + 1, 0)
        if not counts.any():
            raise ValueError(
                f"support, query: no entity has the {counted(length, 'row')} of a window, the "
                "largest has "
                f"{int(panel.sizes.max(initial=0))}"
            )
        self.entities = np.repeat(np.arange(len(counts)), counts)
        self.starts = panel.offsets[self.entities] + within(counts) * self.step

    def _refuse_ties(self) -> None:
        times, codes = self._panel.times, self._panel.codes
        if times is None:
            return
        tied = np.flatnonzero((times[1:] == times[:-1]) & (codes[1:] == codes[:-1]))
        if len(tied):
            where = self._panel.labels[tied[0]]
            raise ValueError(
                f"time: {counted(len(tied), 'row is', 'rows are')} of the time of the row "
                f"before, first of {where!r} "
                f'at {times[tied[0]]}; windows go by rows: use episodes(split="time"), or make one '
                f"row of each time"
            )

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def times(self) -> Array:
        """[W], the time of each window's first query row."""
        times = self._panel.need_times("Windows.times")
        first: Array = times[self.starts + self.support + self.gap]
        return first

    def __getitem__(self, which: Any) -> Batch:
        """Some windows as a batch: a slice, or an array of indices or bools."""
        if isinstance(which, (int, np.integer)):
            raise TypeError("which: expected a slice or an array of windows; of one, take [i:i+1]")
        starts = self.starts[which]
        count = len(starts)
        s, q = np.full(count, self.support), np.full(count, self.query)
        support = slices(starts, s), s
        query = slices(starts + self.support + self.gap, q), q
        return make_batch(self._panel, support, query, self.entities[which])

    def batches(self, tasks: int, *, seed: int | None = None) -> Iterator[Batch]:
        """All windows once, so many at a time: in order, or shuffled by a seed."""
        tasks = whole("tasks", tasks, 1)
        order = np.arange(len(self))
        if seed is not None:
            order = np.random.default_rng(seed).permutation(len(self))
        for first in range(0, len(self), tasks):
            yield self[order[first : first + tasks]]

    def __iter__(self) -> Iterator[Batch]:
        """Batches of 256 windows, in order."""
        return self.batches(256)
