"""What the examples share: few-shot tasks drawn from a table of images, and means with intervals.

An image table is ``uint8 [classes, variants, drawings, pixels]``. A *variant* is the same drawing
turned (or flipped): every (class, variant) pair counts as a class of its own, but one task never
holds two variants of one class, because a turned 0 is still a 0.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

# Below this many classes it is cheaper to sort random keys than to draw and look for repeats.
_SORT_BELOW = 256


class Batch(NamedTuple):
    """Support and query sets of T tasks; rows are in class order, which no model here can use."""

    xs: torch.Tensor  # float32 [T, ways * shots, pixels]
    ys: torch.Tensor  # int64   [T, ways * shots], labels 0 .. ways - 1
    xq: torch.Tensor  # float32 [T, ways * queries, pixels]
    yq: torch.Tensor  # int64   [T, ways * queries]

    def part(self, start: int, stop: int) -> Batch:
        """The tasks ``start`` to ``stop - 1``."""
        return Batch(*(tensor[start:stop] for tensor in self))


def distinct(rng: np.random.Generator, rows: int, picks: int, among: int) -> NDArray[np.int64]:
    """``rows`` independent ordered draws of ``picks`` different numbers below ``among``."""
    if picks > among:
        raise ValueError(f"cannot draw {picks} different ones among {among}")
    if among < _SORT_BELOW:
        return rng.random((rows, among), dtype=np.float32).argsort(axis=1)[:, :picks]
    drawn = rng.integers(among, size=(rows, picks))
    while True:
        ordered = np.sort(drawn, axis=1)
        clash = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if not clash.any():
            return drawn
        drawn[clash] = rng.integers(among, size=(int(clash.sum()), picks))


def moved(rng: np.random.Generator, images: NDArray[np.uint8], shift: int) -> NDArray[np.uint8]:
    """[..., side * side]: each image moved by -shift .. shift pixels down and across."""
    side = math.isqrt(images.shape[-1])
    flat = images.reshape(-1, side, side)
    framed = np.pad(flat, ((0, 0), (shift, shift), (shift, shift)))
    start = rng.integers(2 * shift + 1, size=(2, len(flat), 1)) + np.arange(side)
    picked = framed[np.arange(len(flat))[:, None, None], start[0][:, :, None], start[1][:, None]]
    return picked.reshape(images.shape)


class Episodes:
    """Draws N-way K-shot tasks, all tasks of a batch in one gather.

    ``images`` is the table described above; ``scale`` turns its bytes into network inputs. The
    rows of a task's support and query set are different drawings of the same ``ways`` classes.
    The table stays in bytes: gathering bytes and widening them afterwards touches a quarter of
    the memory, which is what such a draw costs.

    ``shift``: each drawing, a square one, is moved by itself, by up to that many pixels each way.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        *,
        ways: int,
        shots: int,
        queries: int,
        scale: float = 1.0,
        seed: int = 0,
        shift: int = 0,
    ) -> None:
        self.classes, self.variants, self.drawings, pixels = images.shape
        if shots + queries > self.drawings:
            raise ValueError(
                f"{shots} + {queries} drawings wanted of each class, there are {self.drawings}"
            )
        if ways > self.classes:
            raise ValueError(f"{ways} classes wanted in a task, there are {self.classes}")
        self.table = np.ascontiguousarray(images).reshape(-1, pixels)
        self.ways, self.shots, self.queries, self.scale = ways, shots, queries, scale
        self.rng, self.shift = np.random.default_rng(seed), shift

    def indices(self, tasks: int) -> NDArray[np.int64]:
        """Rows of the table, int64 [tasks, ways, shots + queries]."""
        shape = (tasks, self.ways, 1)
        classes = distinct(self.rng, tasks, self.ways, self.classes).reshape(shape)
        variants = self.rng.integers(self.variants, size=shape)
        rows = distinct(self.rng, tasks * self.ways, self.shots + self.queries, self.drawings)
        rows = rows.reshape(tasks, self.ways, -1)
        return (classes * self.variants + variants) * self.drawings + rows

    def __call__(self, tasks: int) -> Batch:
        """The next ``tasks`` tasks."""
        index = self.indices(tasks)
        xs, ys = self._rows(index[..., : self.shots])
        xq, yq = self._rows(index[..., self.shots :])
        return Batch(xs, ys, xq, yq)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream of random numbers is."""
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.rng.bit_generator.state = state["rng"]

    def _rows(self, index: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        tasks, ways, each = index.shape
        rows = self.table.take(index.reshape(tasks, -1), axis=0)
        x = (moved(self.rng, rows, self.shift) if self.shift else rows).astype(np.float32)
        if self.scale != 1.0:
            x *= np.float32(self.scale)
        labels = torch.arange(ways).repeat_interleave(each)
        return torch.from_numpy(x), labels.repeat(tasks, 1)


# Options that may be others when training goes on: what they say is about files, or about testing.
_FREE = ("checkpoint", "data", "json", "quiet", "test_tasks")


class Checkpoint:
    """Training's state in a file, from which a later run goes on as if nothing had come between.

    ``parts`` are all that training changes, by name, each with ``state_dict()`` and
    ``load_state_dict()``: the learner, the optimiser, its schedule, the stream of tasks, the best
    so far. torch's own random numbers are kept with them. ``path`` None: nothing is kept.
    ``free`` names the options, besides those of ``_FREE``, that may be others when it goes on.
    """

    def __init__(
        self, path: Path | None, options: dict[str, Any], free: tuple[str, ...] = (), **parts: Any
    ) -> None:
        self.path, self.parts = path, parts
        self.options = {k: str(v) for k, v in options.items() if k not in (*_FREE, *free)}

    def load(self) -> dict[str, Any]:
        """Put all parts back; the numbers that were kept with them, none where there is no file.

        Raises:
            ValueError: the file is of a run with other options.
        """
        if self.path is None or not self.path.exists():
            return {}
        kept = torch.load(self.path, weights_only=True)
        for name in kept["options"].keys() | self.options.keys():
            now, then = self.options.get(name), kept["options"].get(name)
            if now != then:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{self.path} is of a run with {option} {then}, not {now}")
        for name, part in self.parts.items():
            part.load_state_dict(kept["parts"][name])
        torch.set_rng_state(kept["torch"])
        return kept["numbers"]

    def save(self, **numbers: Any) -> None:
        """Keep all parts, and numbers beside them. The file is there as a whole or not at all."""
        if self.path is None:
            return
        kept = {
            "options": self.options,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "torch": torch.get_rng_state(),
            "numbers": numbers,
        }
        beside = self.path.with_name(self.path.name + ".part")
        torch.save(kept, beside)
        os.replace(beside, self.path)


def one_torch_thread() -> None:
    """Keep torch itself to one thread, for what little of the work is its own here.

    pymeta has its own threads. torch's meet at a barrier in every operation, where on a busy
    machine they wait for each other many times longer than an operation of this size takes.
    """
    torch.set_num_threads(1)


def mean_interval(values: NDArray[np.floating] | torch.Tensor) -> tuple[float, float]:
    """Mean over tasks and the half width of its 95 % confidence interval (normal quantile)."""
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2:
        raise ValueError("an interval needs at least two values")
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(values.size))


def accuracies(predictions: torch.Tensor, labels: torch.Tensor) -> NDArray[np.float64]:
    """Share of right answers in each task: ``[T, Q, ways]`` and ``[T, Q]`` give ``[T]``."""
    return (predictions.argmax(-1) == labels).double().mean(-1).numpy()
