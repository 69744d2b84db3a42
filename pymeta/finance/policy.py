"""A policy network over the assets of a group, adapted to the last periods, and its training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pymeta import MAML, LearnableLR
from pymeta.finance.periods import FEATURES, Periods, until
from pymeta.finance.portfolio import Bounds, drifted
from pymeta.tasks.groups import Array

STRENGTHS = (0.0, 0.1, 0.25, 0.5, 1.0)
UTILITIES = ("log", "sharpe", "mean_variance")
SUPPORT = 6  # periods that are adapted to


class Policy:
    """The policy network, its training and its portfolios.

    Args:
        bounds: of the portfolios.
        utility: "log", "sharpe" or "mean_variance".
        aversion: to variance, of "mean_variance".
        steps: of training.
        seed: of everything random.
    """

    def __init__(
        self, bounds: Bounds, utility: str, aversion: float, *, steps: int, seed: int
    ) -> None:
        """Make the network, whose last layer begins at zero."""
        if utility not in UTILITIES:
            raise ValueError(f"utility: expected one of {UTILITIES}, got {utility!r}")
        self.bounds, self.utility, self.aversion, self.steps = bounds, utility, aversion, steps
        torch.manual_seed(seed)
        self.rng, self.strength = np.random.default_rng(seed), 1.0
        last = nn.Linear(8, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        network = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), last)
        self.maml = MAML(network, loss="mse", lr=LearnableLR(0.02, per="layer"), steps=2)

    def fit(self, groups: list[Periods]) -> Policy:
        """Choose the strength, and train on all periods.

        The strength is what scores are multiplied by, chosen on the last third of the periods by a
        policy trained on those before: it has to be better than 0, the portfolio of inverse
        volatility, by its own standard error.
        """
        middle = max(round(2 / 3 * min(len(g.x) for g in groups)), SUPPORT + 1)
        begin = copy.deepcopy(self.maml.state_dict())
        self._train([until(g, middle) for g in groups])
        self.strength = self._chosen(groups, middle)
        self.maml.load_state_dict(begin)
        self._train(groups)
        return self

    @torch.no_grad()
    def _chosen(self, groups: list[Periods], first: int) -> float:
        """The strength of most utility, less its standard error over periods."""
        worth = {}
        periods = range(first, min(len(g.x) for g in groups))
        for strength in STRENGTHS:
            self.strength, net = strength, np.zeros((len(periods), len(groups)))
            for j, group in enumerate(groups):
                choose = self.chooser(group, 0)
                for i, k in enumerate(periods):
                    *_, held, grown = self._task(group, k, np.arange(group.x.shape[1]))
                    weights = self.bounds.within(choose(k, held), held)
                    traded = float((weights - held).abs().sum())
                    net[i, j] = float((weights * (grown - 1)).sum()) - self.bounds.cost * traded
            each = net if self.utility == "sharpe" else self._each(net)
            worth[strength] = each.mean(axis=1)
        gaps = {s: w - worth[0.0] for s, w in worth.items()}
        score = {s: g.mean() - g.std() / max(len(g), 1) ** 0.5 for s, g in gaps.items()}
        return max(score, key=lambda s: score[s]) if len(periods) > 1 else 0.0

    def _each(self, net: Array) -> Array:
        """Log wealth, or mean less variance, of single net returns."""
        if self.utility == "log":
            return np.asarray(np.log1p(np.maximum(net, -0.9)))
        return np.asarray(net - self.aversion / 2 * net**2)

    def _train(self, groups: list[Periods]) -> None:
        """Steps on 16 periods each."""
        assets = min(g.x.shape[1] for g in groups)
        places = [(g, k) for g in groups for k in range(SUPPORT, len(g.x))]
        if not places:
            raise ValueError(f"days: expected more than {SUPPORT} periods to train on")
        adam = torch.optim.Adam(self.maml.parameters(), 3e-3, weight_decay=1e-3)
        for _ in range(self.steps):
            drawn = [places[i] for i in self.rng.integers(0, len(places), 16)]
            batch = [
                self._task(g, k, self.rng.permutation(g.x.shape[1])[:assets]) for g, k in drawn
            ]
            xs, ys, xq, base, held, grown = (torch.stack(v) for v in zip(*batch, strict=True))
            scores = self.maml(xs, ys, xq).predictions[..., 0]
            weights = self.bounds.within(self.bounds.weights(scores, base), held)
            traded = (weights - held).abs().sum(-1)
            net = (weights * (grown - 1)).sum(-1) - self.bounds.cost * traded
            adam.zero_grad()
            loss = -self._utility(net)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.maml.parameters(), 1.0)
            adam.step()

    def _utility(self, net: Tensor) -> Tensor:
        """Of the tasks' net returns [T]."""
        if self.utility == "log":
            return torch.log1p(net.clamp_min(-0.9)).mean()
        if self.utility == "sharpe":
            return net.mean() / net.std().clamp_min(1e-4)
        return (net - self.aversion / 2 * net.square()).mean()

    def _task(self, group: Periods, k: int, assets: Array) -> tuple[Tensor, ...]:
        """A period of a group, what was known, and its outcome."""
        before = slice(k - SUPPORT, k)
        base = group.base[k][assets] / group.base[k][assets].sum()
        earlier = group.base[k - 1][assets] / group.base[k - 1][assets].sum()
        held = drifted(
            self.bounds.leverage * torch.as_tensor(earlier),
            torch.as_tensor(group.growth[k - 1, -1, assets], dtype=torch.float32),
        )
        xs, ys = group.x[before][:, assets], group.y[before][:, assets]
        parts = (xs.reshape(-1, FEATURES), ys.reshape(-1), group.x[k][assets], base)
        grown = torch.as_tensor(group.growth[k, -1, assets], dtype=torch.float32)
        return (*(torch.as_tensor(p) for p in parts), held, grown)

    @torch.no_grad()
    def chooser(self, group: Periods, first: int, adapted: bool = True) -> Any:
        """What `simulate` asks: the weights of period first + k."""
        every = np.arange(group.x.shape[1])

        def choose(k: int, held: Tensor) -> Tensor:
            xs, ys, xq, base, *_ = self._task(group, first + k, every)
            steps = None if adapted else 0
            scores = self.maml(xs[None], ys[None], xq[None], steps=steps).predictions[0, :, 0]
            return self.bounds.weights(self.strength * scores.detach(), base)

        return choose

    def save(self, folder: Any) -> list[Path]:
        """Write adapter.safetensors: scores of features as `Periods` makes them."""
        path = Path(folder) / "adapter.safetensors"
        self.adapter.save(path)
        return [path]

    @property
    def adapter(self) -> Any:
        """The `pymeta.Adapter` of scores."""
        return self.maml.adapter()
