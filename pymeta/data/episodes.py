"""Meta-batches drawn of a panel: which entities, which of their rows are support and query.

Two ways to split a task's rows:

    "time"   a cut in the entity's rows: support are the last rows up to it, query the first rows
             that are later in time than all of support (by a gap, if there is one)
    "rows"   support and query are distinct rows drawn at random, and equally many of each class
             in support where that is asked for

All tasks of a batch are drawn at once by array operations; the same seed gives the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pymeta.data.augment import Augmentation
from pymeta.data.batch import Batch, make_batch
from pymeta.data.draw import between, distinct, is_whole, size_range, slices, whole, within
from pymeta.spec.show import counted
from pymeta.tasks.groups import Array

if TYPE_CHECKING:
    from pymeta.data.panel import Panel

Side = tuple[Array, Array]  # rows [sum of sizes], sizes [T]


def next_later(panel: Panel, gap: Any) -> Array:
    """For each row the first row of its entity that a query after it may begin with: [rows].

    That is the first one later in time, and `gap` rows on (a whole number), or later by more than
    `gap` (a timedelta, or a number that is a float). Where there is none, it is the entity's end.
    """
    ends = panel.offsets[1:][panel.codes]
    rows = is_whole(gap)
    if panel.times is None:
        if not rows:
            raise TypeError(
                f"gap: expected a number of rows for a panel without times, got {gap!r}"
            )
        plain: Array = np.minimum(np.arange(1, len(panel) + 1) + int(gap), ends)
        return plain
    from pymeta.data.panel import as_gap

    distinct_times, rank = np.unique(panel.times, return_inverse=True)
    until = distinct_times if rows else distinct_times + as_gap(panel.times, gap)
    later = np.searchsorted(distinct_times, until, side="right")
    span = len(distinct_times) + 1
    codes = panel.codes * span
    first = np.searchsorted(codes + rank, codes + later[rank], side="left")
    after: Array = np.minimum(first + (int(gap) if rows else 0), ends)
    return after


class Episodes:
    """Meta-batches of a panel; made by `panel.episodes(...)`. Iterating begins anew each time.

    Args:
        panel: prepared, with targets.
        tasks: how many tasks a batch has. An entity is drawn once in a batch, where there are
            enough of them.
        support: how many rows of support: a number, or (least, most) for a random number of each
            task. Fixed sizes give arrays [T, rows, ...], others `Ragged`.
        query: how many rows of query, likewise.
        split: "time" or "rows" (see above); None for "time" where the panel has times.
        gap: for "time": how many rows are left out between support and query, or as a timedelta64
            (a float, where times are numbers) how much time must be more than passed between.
        balanced: for "rows": whether support has equally many rows of each class.
        draw: "entities" draws every entity equally often, "rows" in proportion to its rows.
        batches: how many batches there are; None for no end.
        seed: the same seed gives the same batches; None for others each time.
        augment: what is done to each batch, in order: `Jitter`, `MixUp`, `Bootstrap`.

    Attributes:
        qualifying: labels of the entities that have rows enough; no others are drawn.

    Raises:
        TypeError, ValueError: an argument is not as described, or no entity has rows enough.
    """

    def __init__(
        self,
        panel: Panel,
        *,
        tasks: int,
        support: int | tuple[int, int],
        query: int | tuple[int, int],
        split: str | None = None,
        gap: Any = 0,
        balanced: bool = False,
        draw: str = "entities",
        batches: int | None = None,
        seed: int | None = None,
        augment: Augmentation | Sequence[Augmentation] = (),
    ) -> None:
        self._panel = panel
        self._tasks = whole("tasks", tasks, 1)
        self._support, self._query = size_range("support", support), size_range("query", query)
        if split not in (None, "time", "rows"):
            raise ValueError(f"split: expected 'time', 'rows' or None, got {split!r}")
        if draw not in ("entities", "rows"):
            raise ValueError(f"draw: expected 'entities' or 'rows', got {draw!r}")
        self._batches = None if batches is None else whole("batches", batches, 0)
        self._seed = seed
        self._augment = (augment,) if callable(augment) else tuple(augment)
        by_time = split == "time" or (split is None and panel.times is not None)
        if by_time and balanced:
            raise ValueError('balanced: expected False with split="time", whose support rows are '
                             'the last ones before a time; use split="rows"')  # fmt: skip
        if is_whole(gap):
            whole("gap", gap, 0)
        if not by_time and not (is_whole(gap) and gap == 0):
            raise ValueError('gap: expected 0 with split="rows", where rows have no order')
        panel.need_y()
        self._draw: _ByTime | _ByRows
        if by_time:
            self._draw = _ByTime(panel, self._support, self._query, gap)
        else:
            self._draw = _ByRows(panel, self._support, self._query, balanced)
        self._codes = np.flatnonzero(self._draw.fits)
        if not len(self._codes):
            needs = self._support[0] + self._query[0]
            raise ValueError(
                f"support, query: no entity has rows enough: a task needs {needs} at least"
                f"{self._draw.needs}, and the largest entity has {int(panel.sizes.max(initial=0))}"
            )
        sizes = panel.sizes[self._codes].astype(float)
        self._chances = sizes / sizes.sum() if draw == "rows" else None

    @property
    def qualifying(self) -> Array:
        """Labels of the entities that are drawn."""
        return self._panel.entities[self._codes]

    def __len__(self) -> int:
        if self._batches is None:
            raise TypeError("episodes without an end have no length: give batches=...")
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(self._seed)
        done = 0
        while self._batches is None or done < self._batches:
            yield self.sample(rng)
            done += 1

    def sample(self, rng: np.random.Generator) -> Batch:
        """One batch, drawn with a generator of the caller's."""
        entities = self._entities(rng)
        support, query = self._draw(rng, entities)
        batch = make_batch(self._panel, support, query, entities)
        for change in self._augment:
            batch = change(batch, rng)
        return batch

    def _entities(self, rng: np.random.Generator) -> Array:
        count, there = self._tasks, len(self._codes)
        if count <= there:
            return self._codes[rng.choice(there, count, replace=False, p=self._chances)]
        if self._chances is not None:
            return self._codes[rng.choice(there, count, p=self._chances)]
        rounds = -(-count // there)  # each of them as often as any other, up to one
        order = rng.permuted(np.tile(np.arange(there), (rounds, 1)), axis=1).reshape(-1)
        drawn: Array = self._codes[order[:count]]
        return drawn


class _ByTime:
    """A cut in time for each task."""

    needs = " (support up to a time, query after it)"

    def __init__(self, panel: Panel, support: tuple[int, int], query: tuple[int, int], gap: Any):
        self.support, self.query = support, query
        self.later = next_later(panel, gap)
        codes = panel.codes
        self.before = np.arange(1, len(panel) + 1) - panel.offsets[:-1][codes]
        self.after = panel.offsets[1:][codes] - self.later
        cuts = np.flatnonzero((self.before >= support[0]) & (self.after >= query[0]))
        self.cuts = cuts
        self.first = np.searchsorted(cuts, panel.offsets[:-1])
        self.count = np.searchsorted(cuts, panel.offsets[1:]) - self.first
        self.fits = self.count > 0

    def __call__(self, rng: np.random.Generator, entities: Array) -> tuple[Side, Side]:
        """The rows of support and query."""
        tasks = len(entities)
        first, count = self.first[entities], self.count[entities]
        cut = self.cuts[between(rng, first, first + count - 1, tasks)]
        s = between(rng, self.support[0], np.minimum(self.support[1], self.before[cut]), tasks)
        q = between(rng, self.query[0], np.minimum(self.query[1], self.after[cut]), tasks)
        return (slices(cut + 1 - s, s), s), (slices(self.later[cut], q), q)


class _ByRows:
    """Distinct rows at random."""

    needs = ""

    def __init__(
        self, panel: Panel, support: tuple[int, int], query: tuple[int, int], balanced: bool
    ) -> None:
        self.support, self.query = support, query
        self.offsets, self.sizes = panel.offsets, panel.sizes
        self.fits = self.sizes >= support[0] + query[0]
        self.balanced = balanced
        if balanced:
            self._sort_by_class(panel)

    def _sort_by_class(self, panel: Panel) -> None:
        """Put each entity's rows in order of class, and count those of each class."""
        labels, y = np.unique(panel.need_y(), return_inverse=True)
        if len(labels) < 2 or (labels != np.round(labels)).any():
            raise ValueError(
                "balanced: expected targets of two classes or more, got "
                f"{counted(len(labels), 'number')}, "
                f"such as {labels[0]}"
            )
        self.classes = len(labels)
        if self.support[0] < self.classes:
            raise ValueError(
                f"balanced: expected support >= {self.classes}, a row of each class, got "
                f"{self.support[0]}"
            )
        self.order = np.lexsort((y, panel.codes))
        key = panel.codes * self.classes + y
        self.of_class = np.bincount(key, minlength=len(self.sizes) * self.classes)
        self.class_starts = np.cumsum(self.of_class) - self.of_class
        most = -(-self.support[0] // self.classes)
        self.of_class = self.of_class.reshape(-1, self.classes)
        self.class_starts = self.class_starts.reshape(-1, self.classes)
        self.fits &= (self.of_class >= most).all(axis=1)
        self.needs = (
            f", {counted(most, 'row')} of each of {counted(self.classes, 'class')} among them"
        )

    def _numbers(self, rng: np.random.Generator, entities: Array) -> tuple[Array, Array]:
        """How many rows of support and query each task has."""
        room = self.sizes[entities]
        most = np.minimum(self.support[1], room - self.query[0])
        if self.balanced:
            most = np.minimum(most, self.of_class[entities].min(axis=1) * self.classes)
        s = between(rng, self.support[0], most, len(entities))
        q = between(rng, self.query[0], np.minimum(self.query[1], room - s), len(entities))
        return s, q

    def __call__(self, rng: np.random.Generator, entities: Array) -> tuple[Side, Side]:
        """The rows of support and query."""
        s, q = self._numbers(rng, entities)
        if self.balanced:
            return self._balanced(rng, entities, s, q)
        rows = distinct(rng, self.sizes[entities], s + q) + np.repeat(self.offsets[entities], s + q)
        is_support = within(s + q) < np.repeat(s, s + q)
        return (rows[is_support], s), (rows[~is_support], q)

    def _balanced(
        self, rng: np.random.Generator, entities: Array, s: Array, q: Array
    ) -> tuple[Side, Side]:
        classes = np.arange(self.classes)
        each = s[:, None] // self.classes + (classes < s[:, None] % self.classes)  # [T, classes]
        pool, start = self.of_class[entities].reshape(-1), self.class_starts[entities].reshape(-1)
        count = each.reshape(-1)
        places = distinct(rng, pool, count) + np.repeat(start, count)  # in order of class
        support = self.order[places]
        # the query is of all rows that are left, whatever their class
        first = self.offsets[entities]
        taken = support - np.repeat(first, s)
        rows = distinct(rng, self.sizes[entities], q, (taken, s)) + np.repeat(first, q)
        return (support, s), (rows, q)
