"""DoubleAdapt: learned affine maps of features and targets before the inner loop.

Zhao, Kong, Shen 2023, "DoubleAdapt: A Meta-learning Approach to Incremental Learning for Stock
Trend Forecasting" (arXiv:2306.09862). A task is a stretch of days: support are the last days whose
outcome is known, query the next ones. Between the two the distribution shifts, and so both are
mapped to where they are alike, by H heads that share a row by its likeness to learned prototypes:

    G(x) = x + sum_h s_h(x) (A_h x + b_h)        s(x) = softmax(cos(x, p_h) / tau)
    y'   = sum_h s_h(x) (gamma_h y + beta_h)     and back: y = sum_h s_h(x) (p - beta_h) / gamma_h

All begin as identities. The maps, the start and the step sizes are trained end to end: the native
inner loop gives gradients to its support rows and targets, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pymeta import MAML, LearnableLR


class DoubleAdapt(nn.Module):
    """The maps around MAML on a small network.

    Args:
        features: how many there are.
        hidden: the network's width.
        heads: H.
        temperature: tau.
        steps: inner steps.
        lr: the inner step size at the beginning; it is learned for each layer.
        maps: whether there are maps; without them it is MAML.

    Raises:
        TypeError, ValueError: an argument is not as MAML takes it.
    """

    def __init__(
        self,
        features: int,
        *,
        hidden: int = 16,
        heads: int = 4,
        temperature: float = 0.5,
        steps: int = 2,
        lr: float = 0.05,
        maps: bool = True,
    ) -> None:
        """Make the network, whose last layer begins at zero, and the maps."""
        super().__init__()
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        network = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), last)
        rate = LearnableLR(lr, per="layer")
        self.maml = MAML(network, loss="mse", lr=rate, steps=steps)
        self.temperature, self.maps = temperature, maps
        if maps:
            self.prototypes = nn.Parameter(torch.randn(heads, features))
            self.matrix = nn.Parameter(torch.zeros(heads, features, features))
            self.shift = nn.Parameter(torch.zeros(heads, features))
            self.log_gamma = nn.Parameter(torch.zeros(heads))
            self.beta = nn.Parameter(torch.zeros(heads))

    def shares(self, x: Tensor) -> Tensor:
        """How much of a row each head has: [..., heads]."""
        likeness = (
            nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(self.prototypes, dim=-1).mT
        )
        return (likeness / self.temperature).softmax(-1)

    def features(self, x: Tensor) -> Tensor:
        """G(x), [..., features]."""
        if not self.maps:
            return x
        s = self.shares(x)
        moved = torch.einsum("...i,hji->...hj", x, self.matrix) + self.shift
        return x + (s.unsqueeze(-1) * moved).sum(-2)

    def targets(self, x: Tensor, y: Tensor) -> Tensor:
        """Mapped targets [...] of rows x [..., features]."""
        if not self.maps:
            return y
        return (self.shares(x) * (self.log_gamma.exp() * y.unsqueeze(-1) + self.beta)).sum(-1)

    def back(self, x: Tensor, p: Tensor) -> Tensor:
        """Predictions in the units of the targets."""
        if not self.maps:
            return p
        return (self.shares(x) * (p.unsqueeze(-1) - self.beta) / self.log_gamma.exp()).sum(-1)

    def forward(
        self, xs: Tensor, ys: Tensor, xq: Tensor, support_weights: Tensor | None = None
    ) -> Tensor:
        """Predictions [T, query rows], adapted to the support rows; they carry the graph.

        Args:
            xs: [T, rows, features].
            ys: [T, rows].
            xq: [T, query rows, features].
            support_weights: [T, rows], or None.
        """
        out = self.maml(
            self.features(xs), self.targets(xs, ys), self.features(xq),
            support_weights=support_weights,
        )  # fmt: skip
        predictions: Tensor = out.predictions
        return self.back(xq, predictions[..., 0])
