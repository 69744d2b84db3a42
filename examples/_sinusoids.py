"""The sinusoids of demo.py: tasks, the network, the score, a few curves to be drawn."""

from __future__ import annotations

import numpy as np
import torch
from _common import Batch
from _plots import Curves
from _starts import Problem, best_rate
from numpy.typing import NDArray
from torch import nn

import pymeta

SINUSOID_RATE = 0.01  # the inner step size in training
SINUSOID_RATES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


def squared_errors(predictions: torch.Tensor, targets: torch.Tensor) -> NDArray[np.float64]:
    """Mean squared error of each task, [T]."""
    return (predictions - targets).double().square().mean((-2, -1)).numpy()


SINUSOIDS = Problem("mse", squared_errors, False, SINUSOID_RATES)


class Sinusoids:
    """Draws tasks; support and query rows are [T, rows, 1]."""

    def __init__(self, shots: int, queries: int, seed: int) -> None:
        self.shots, self.queries = shots, queries
        self.rng = np.random.default_rng(seed)
        self.amplitude = self.phase = np.empty(0)

    def __call__(self, tasks: int) -> Batch:
        """The next ``tasks`` tasks; their amplitudes and phases are kept for a plot."""
        self.amplitude = self.rng.uniform(0.1, 5.0, (tasks, 1, 1))
        self.phase = self.rng.uniform(0.0, np.pi, (tasks, 1, 1))
        x = self.rng.uniform(-5.0, 5.0, (tasks, self.shots + self.queries, 1))
        y = self.amplitude * np.sin(x - self.phase)
        x, y = torch.from_numpy(x).float(), torch.from_numpy(y).float()
        support, query = slice(None, self.shots), slice(self.shots, None)
        return Batch(*(v[:, s].contiguous() for s in (support, query) for v in (x, y)))


def sinusoid_network() -> nn.Sequential:
    """1-40-40-1."""
    return nn.Sequential(
        nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    )


def curves(network: nn.Module, plain: nn.Module, tuning: Batch) -> Curves:
    """Three held-out sinusoids, before and after adaptation, with the step sizes of the table."""
    sinusoids = Sinusoids(10, 1, seed=14)
    support = sinusoids(3)
    x = np.linspace(-5, 5, 201)
    truth = sinusoids.amplitude[..., 0] * np.sin(x - sinusoids.phase[..., 0])
    shown = Curves(x, truth, support)
    grid = torch.from_numpy(x).float().view(1, -1, 1).repeat(3, 1, 1)

    def fit(label: str, start: nn.Module, steps: int) -> None:
        rate = best_rate([start], SINUSOIDS, tuning, steps)
        maml = pymeta.MAML(start, loss="mse", lr=rate, steps=1)
        fitted = maml.adapt(support.xs, support.ys, steps=steps)(grid)
        shown.fits[label] = fitted[..., 0].numpy()

    fit("MAML before", network, 0)
    fit("MAML, 1 step", network, 1)
    fit("MAML, 10 steps", network, 10)
    fit("pre-trained, 10 steps", plain, 10)
    return shown
