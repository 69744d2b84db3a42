"""Random numbers that privacy can rest on: from the operating system, or seeded for experiments."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from pymeta.privacy.accounting import check_integer

_BITS = 53  # of a float64's mantissa
_TERMS = 4  # normal numbers in a sum


class Randomness:
    """Uniform and normal numbers in float64.

    Without a seed they come from the operating system's cryptographic generator: whoever saw some
    of them cannot tell the others. A normal number is then the sum of four over two, because the
    low bits of a single one that floating point computed give its argument away (Mironov 2012;
    Holohan, Braghin 2021, arXiv:2107.10138). With a seed they come from numpy's PCG64, which is not
    secure: for tests and experiments.
    """

    def __init__(self, seed: int | None) -> None:
        """TypeError or ValueError unless the seed is None or an integer >= 0."""
        number = None if seed is None else check_integer("seed", seed, 0)
        self._generator = None if number is None else np.random.default_rng(number)

    def uniform(self, count: int) -> np.ndarray:
        """[count] in [0, 1)."""
        if self._generator is not None:
            return self._generator.random(count)
        bits = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(64 - _BITS)
        return bits * 2.0**-_BITS

    def normal(self, count: int) -> np.ndarray:
        """[count] of mean 0 and variance 1."""
        if self._generator is not None:
            return self._generator.standard_normal(count)
        pairs = self.uniform(2 * _TERMS * count).reshape(2, _TERMS, count)
        radius = np.sqrt(-2 * np.log1p(-pairs[0]))  # Box, Muller 1958
        each = radius * np.cos(2 * np.pi * pairs[1])
        total: np.ndarray = each.sum(0) / np.sqrt(_TERMS)
        return total

    def state(self) -> dict[str, Any] | None:
        """Of the seeded generator, to go on from; None of the system's."""
        return None if self._generator is None else dict(self._generator.bit_generator.state)

    def go_on(self, state: dict[str, Any] | None) -> None:
        """Take up a state; ValueError where it is of the other kind."""
        if (state is None) != (self._generator is None):
            raise ValueError("state: expected one of the same kind of random numbers")
        if self._generator is not None:
            self._generator.bit_generator.state = state or {}
