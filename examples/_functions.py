"""Families of functions as tasks for regression: sinusoids alone, or four families mixed.

The mixture is that of Yao et al. 2019 (HSML, section 5.1) with their ranges; x is uniform in
[-5, 5], and the targets have noise of the deviation ``NOISE``. All parameters are uniform:

    sinusoid   a sin(w x + b)           0.1 <= a <= 5, 0.8 <= w <= 1.2, 0 <= b <= 2 pi
    line       a x + b                  |a| and |b| <= 3
    quadratic  a x^2 + b x + c          |a| <= 0.2, |b| <= 2, |c| <= 3
    cubic      a x^3 + b x^2 + c x + d  |a| <= 0.1, |b| <= 0.2, |c| <= 2, |d| <= 3
"""

from __future__ import annotations

import math

import torch

FAMILIES = ("sinusoid", "line", "quadratic", "cubic")
NOISE = 0.3


class Functions:
    """Draws tasks of a family, or of all four in equal shares (``family="mixed"``).

    A call gives (xs, ys, xq, yq), each [tasks, rows, 1], the query targets without noise;
    ``kinds`` [tasks] says of which family each task of the last call was.
    """

    def __init__(self, family: str, shots: int, queries: int, seed: int) -> None:
        if family not in (*FAMILIES, "mixed"):
            raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, mixed, got {family}")
        self.family, self.shots, self.queries = family, shots, queries
        self.random = torch.Generator().manual_seed(seed)
        self.kinds = torch.zeros(0, dtype=torch.int64)

    def _uniform(self, tasks: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(tasks, 1, 1, generator=self.random)

    def _values(self, tasks: int, x: torch.Tensor) -> torch.Tensor:
        """Each task's function at x [tasks, rows, 1]; all four, of which one is chosen."""

        def polynomial(*bounds: float) -> torch.Tensor:
            value = torch.zeros_like(x)
            for bound in bounds:
                value = value * x + self._uniform(tasks, -bound, bound)
            return value

        amplitude, frequency = self._uniform(tasks, 0.1, 5), self._uniform(tasks, 0.8, 1.2)
        phase = self._uniform(tasks, 0, 2 * math.pi)
        each = torch.stack(
            [
                amplitude * torch.sin(frequency * x + phase),
                polynomial(3, 3),
                polynomial(0.2, 2, 3),
                polynomial(0.1, 0.2, 2, 3),
            ]
        )
        return each[self.kinds, torch.arange(tasks)]

    def __call__(self, tasks: int) -> tuple[torch.Tensor, ...]:
        """The next ``tasks`` tasks."""
        if self.family == "mixed":
            self.kinds = torch.randint(len(FAMILIES), (tasks,), generator=self.random)
        else:
            self.kinds = torch.full((tasks,), FAMILIES.index(self.family))
        rows = self.shots + self.queries
        x = 10 * torch.rand(tasks, rows, 1, generator=self.random) - 5
        y = self._values(tasks, x)
        noise = NOISE * torch.randn(tasks, self.shots, 1, generator=self.random)
        s = self.shots
        return x[:, :s], y[:, :s] + noise, x[:, s:], y[:, s:]
