"""Which rows each inner step uses: minibatches, epochs, and the order of the rows.

A task of n rows and batch size B has nb = ceil(n / B) batches in an epoch, the last of which may
be smaller. Epoch e goes through the rows in the order of `permutation(seed, stream, task, e, n)`;
without a batch size, or where one batch takes all rows, they stay in their own order. Step k
is batch k % nb of epoch k // nb. So ragged tasks make different numbers of steps in an epoch.

The order comes from a counter-based generator, so that a task's epoch has the same order in any
thread, batch and executor: Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3"), as numpy has it. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pymeta.spec.fields import Fields

SHUFFLE, SPLIT = 0, 1  # what a permutation is for: an epoch's order, a validation split
LARGEST_SEED = 2**63 - 1  # and stream
_LARGEST_COUNT = 2**31 - 1  # of steps, epochs, rows: an int of the native core


class Batch(NamedTuple):
    """One step's rows of a task: their indices (None for all in their order), and their number."""

    rows: np.ndarray | None
    size: int
    ends_epoch: bool


def check_count(name: str, value: Any, least: int = 0, most: int = _LARGEST_COUNT) -> int:
    """`value` as an int; TypeError or ValueError unless it is an integer in least..most."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer >= {least}, got {type(value).__name__}")
    if not least <= value <= most:
        wanted = f">= {least}" if value < least else f"<= {most}"
        raise ValueError(f"{name}: expected an integer {wanted}, got {value}")
    return int(value)


def check_batch_size(value: Any) -> int | None:
    """`value` as a number of rows, or None for all of them; else as `check_count`."""
    return None if value is None else check_count("batch_size", value, 1)


def permutation(
    seed: int, stream: int, task_id: int, epoch: int, rows: int, purpose: int = SHUFFLE
) -> np.ndarray:
    """An order of `rows` rows, int64 [rows]: the definition that the native core repeats.

    Fisher and Yates' shuffle from the last row down: row i changes places with row
    j = floor(r (i + 1) / 2^64), r being the next word of Philox4x64-10 with the key
    (seed, stream), its counter starting at (0, epoch, task_id, purpose).
    """
    generator = np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64),
        counter=np.array([0, epoch, task_id, purpose], dtype=np.uint64),
    )
    order = list(range(rows))
    words = generator.random_raw(max(rows - 1, 0)).tolist()
    for i, word in zip(range(rows - 1, 0, -1), words, strict=True):
        j = (word * (i + 1)) >> 64
        order[i], order[j] = order[j], order[i]
    return np.array(order, dtype=np.int64)


@dataclass(frozen=True)
class Schedule:
    """How many inner steps there are, and on which rows.

    Args:
        steps: the number of steps; None where `epochs` is given.
        epochs: the number of times that all rows are gone through; None where `steps` is given.
        batch_size: rows of a step; None for all of the task's rows.
        seed: with `stream` and the task's id, what the rows' order follows from.
        stream: tells draws of one seed apart, such as those of successive training calls.

    Raises:
        TypeError, ValueError: not exactly one of steps and epochs, or one is out of range.
    """

    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    stream: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        if (self.steps is None) == (self.epochs is None):
            both = "neither" if self.steps is None else "both"
            raise ValueError(f"steps, epochs: expected exactly one of them, got {both}")
        for name, least in (("steps", 0), ("epochs", 0), ("batch_size", 1)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least)
        check_count("seed", self.seed, most=LARGEST_SEED)
        check_count("stream", self.stream, most=LARGEST_SEED)

    def batch_count(self, rows: int) -> int:
        """The number of batches in an epoch of a task with `rows` rows."""
        size = rows if self.batch_size is None else self.batch_size
        return -(-rows // size) if rows else 0

    def step_count(self, rows: int) -> int:
        """The number of steps of a task with `rows` rows; none where it has no rows."""
        if rows == 0:
            return 0
        return self.steps if self.epochs is None else self.epochs * self.batch_count(rows)  # type: ignore[return-value]

    def batches(self, rows: int, task_id: int = 0) -> Iterator[Batch]:
        """The steps' batches of a task with `rows` rows."""
        count = self.batch_count(rows)
        order: np.ndarray | None = None
        for step in range(self.step_count(rows)):
            epoch, batch = divmod(step, count)
            if count == 1:
                yield Batch(None, rows, True)
                continue
            if batch == 0:
                order = permutation(self.seed, self.stream, task_id, epoch, rows)
            assert order is not None and self.batch_size is not None
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield Batch(chosen, len(chosen), batch == count - 1)


def described_schedule(schedule: Schedule) -> dict[str, int | None]:
    """As JSON."""
    return {n: v if v is None else int(v) for n, v in asdict(schedule).items()}


def read_schedule(fields: Fields) -> Schedule:
    """The schedule that `described_schedule` made JSON of; ValueError where it is none."""

    def optional(name: str, low: int) -> int | None:
        return None if fields.is_null(name) else fields.integer(name, low)

    found = Schedule(
        steps=optional("steps", 0),
        epochs=optional("epochs", 0),
        batch_size=optional("batch_size", 1),
        seed=fields.integer("seed", 0),
        stream=fields.integer("stream", 0),
    )
    fields.end()
    return found
