"""Random rows of many tasks at once: no Python for each task.

Everything is a flat array with the tasks one after another, as in `Ragged`: `sizes` [T] says how
many entries each has.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from pymeta.tasks.groups import Array

_LARGE = 2  # a pool of so many times the numbers wanted is drawn from by rejection
_PLACES = 1 << 20  # an array with a place for each number of all pools may be so long


def within(sizes: Array) -> Array:
    """0, 1, .. sizes[t]-1 of each task, one after another: [sum]."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    places: Array = np.arange(total) - np.repeat(ends - sizes, sizes)
    return places


def slices(starts: Array, sizes: Array) -> Array:
    """The indices starts[t] .. starts[t]+sizes[t]-1 of each task: [sum]."""
    return np.repeat(starts, sizes) + within(sizes)


def distinct(
    rng: np.random.Generator,
    pool: Array,
    count: Array,
    taken: tuple[Array, Array] | None = None,
) -> Array:
    """For each task `count[t]` distinct numbers of 0..pool[t]-1, in random order: [sum].

    Every sequence of them is equally likely. Where a pool is large, numbers are drawn, and those
    that are there already are drawn again: which of two equal ones that is does not depend on what
    they are, so no sequence is preferred. Otherwise the pool is put in random order, and its first
    ones are taken.

    Args:
        rng: the source of randomness.
        pool: [T], what is there.
        count: [T], how many are wanted; no more than are there.
        taken: numbers that are not to be drawn: task after task [sum], and how many [T].
    """
    marked, marks = (np.zeros(0, np.int64), 0 * pool) if taken is None else taken
    large = pool >= _LARGE * (count + marks)
    if large.all() or not large.any():
        return (_by_rejection if large.all() else _by_keys)(rng, pool, count, marked, marks)
    out = np.empty(int(count.sum()), np.int64)
    for some, draw in ((large, _by_rejection), (~large, _by_keys)):
        own = marked[np.repeat(some, marks)]
        out[np.repeat(some, count)] = draw(rng, pool[some], count[some], own, marks[some])
    return out


def _by_keys(
    rng: np.random.Generator, pool: Array, count: Array, taken: Array, marks: Array
) -> Array:
    """Put each pool in random order, what is taken last."""
    starts = np.cumsum(pool) - pool
    keys = rng.random(int(pool.sum()))
    keys[np.repeat(starts, marks) + taken] = 1.5
    order = np.argsort(keys + 2.0 * np.repeat(np.arange(len(pool)), pool), kind="stable")
    drawn: Array = order[slices(starts, count)] - np.repeat(starts, count)
    return drawn


def _by_rejection(
    rng: np.random.Generator, pool: Array, count: Array, taken: Array, marks: Array
) -> Array:
    """Draw, and draw again what is there already."""
    begins = np.cumsum(pool) - pool
    start, size = np.repeat(begins, count), np.repeat(pool, count)
    owner = _Owners(int(pool.sum()), len(start))
    owner.take(np.repeat(begins, marks) + taken, np.full(len(taken), len(start)))
    drawn = np.empty(len(start), np.int64)
    open_ = np.arange(len(start))
    while len(open_):
        place = start[open_] + (rng.random(len(open_)) * size[open_]).astype(np.int64)
        won = owner.take(place, open_)
        drawn[open_[won]] = place[won]
        open_ = open_[~won]
    own: Array = drawn - start
    return own


class _Owners:
    """Whose each place is: an array where there are few places, a sorted list where many."""

    def __init__(self, places: int, wanted: int) -> None:
        few = places <= max(_PLACES, 64 * wanted)
        self._owner = np.full(places, -1, np.int32) if few else None
        self._taken = np.zeros(0, np.int64)

    def take(self, place: Array, who: Array) -> Array:
        """Give free places away; bool, who got what he wanted."""
        if self._owner is not None:
            free = self._owner[place] < 0
            self._owner[place[free]] = who[free]
            won: Array = free & (self._owner[place] == who)
            return won
        first = np.zeros(len(place), bool)
        first[np.unique(place, return_index=True)[1]] = True
        at = np.searchsorted(self._taken, place)
        known = self._taken[np.minimum(at, len(self._taken) - 1)] if len(self._taken) else place - 1
        won = first & (known != place)
        self._taken = np.sort(np.concatenate([self._taken, place[won]]))
        return won


def between(rng: np.random.Generator, low: Array | int, high: Array | int, size: int) -> Array:
    """Whole numbers, each of low..high with the same chance: [size]."""
    low, high = np.broadcast_to(low, size), np.broadcast_to(high, size)
    drawn: Array = low + (rng.random(size) * (high - low + 1)).astype(np.int64)
    return drawn


def size_range(name: str, value: Any) -> tuple[int, int]:
    """A number of rows, or the least and the most: (low, high).

    Raises:
        TypeError: it is neither a whole number nor a pair of them.
        ValueError: a number is below 1, or the second below the first.
    """
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(map(is_whole, pair)):
        raise TypeError(f"{name}: expected a number of rows or (least, most), got {value!r}")
    low, high = int(pair[0]), int(pair[1])
    if not 1 <= low <= high:
        raise ValueError(f"{name}: expected 1 <= least <= most, got {value!r}")
    return low, high


def is_whole(value: Any) -> bool:
    """Whether this is a whole number; numpy's timedelta64, which says it is one, is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.timedelta64))


def whole(name: str, value: Any, least: int) -> int:
    """A whole number that is not below `least`; TypeError or ValueError otherwise."""
    if not is_whole(value):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value}")
    return int(value)
