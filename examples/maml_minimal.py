"""MAML on a module of your own: sinusoids of unknown amplitude and phase from ten points each.

    python examples/maml_minimal.py

Replace `network` by your `nn.Module` and `draw` by your tasks: support rows to adapt to, and query
rows that the adapted network is judged by, stacked along a leading task axis.
"""

from __future__ import annotations

import torch
from torch import nn

import pymeta


def draw(tasks: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on sinusoids: x and y [tasks, rows, 1]."""
    amplitude, phase = 0.1 + 4.9 * torch.rand(tasks, 1, 1), torch.pi * torch.rand(tasks, 1, 1)
    x = 10 * torch.rand(tasks, rows, 1) - 5
    return x, amplitude * torch.sin(x - phase)


def main(iterations: int = 2000) -> dict[int, float]:
    """Meta-train, then adapt to new sinusoids; the mean squared error by number of steps."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    )
    maml = pymeta.MAML(network, loss="mse", lr=0.01, steps=1)
    outer = torch.optim.Adam(maml.parameters(), 1e-3)
    for _ in range(iterations):
        x, y = draw(tasks=25, rows=20)
        outer.zero_grad()
        maml(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]).loss.backward()
        outer.step()
    x, y = draw(tasks=1000, rows=60)
    errors = {}
    for steps in (0, 1, 10):
        models = maml.adapt(x[:, :10], y[:, :10], steps=steps)  # 1,000 networks in one call
        errors[steps] = (models(x[:, 10:]) - y[:, 10:]).square().mean().item()
        print(f"after {steps:2} steps on ten points: mean squared error {errors[steps]:.2f}")
    return errors


if __name__ == "__main__":
    main()
