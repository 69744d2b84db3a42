"""Allocation: how much of each asset of a group, by a policy that is adapted to the last periods.

A policy network gives a score to every asset of a group (a sector); scores of 0 are the portfolio
of inverse volatility, where it begins. Inner steps fit the scores to the assets' relative returns
of the last periods; the outer loss is the utility of the weights, net of costs, in the next period,
differentiated through the inner loop by the gradient of its predictions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pymeta import MAML, LearnableLR
from pymeta.finance.periods import FEATURES, Periods, groups_of, until
from pymeta.finance.portfolio import (
    Bounds,
    drifted,
    minimum_variance,
    portfolio_report,
    simulate,
)
from pymeta.finance.prices import read_prices
from pymeta.finance.result import Result, Say, result, silent
from pymeta.metrics import Report
from pymeta.tasks.groups import Array

UTILITIES = ("log", "sharpe", "mean_variance")
_SUPPORT = 6  # periods that are adapted to


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
        self.rng = np.random.default_rng(seed)
        last = nn.Linear(8, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        network = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), last)
        self.maml = MAML(network, loss="mse", lr=LearnableLR(0.02, per="layer"), steps=2)

    def fit(self, groups: list[Periods]) -> Policy:
        """Train on periods of groups: each step on 16 of them."""
        assets = min(g.x.shape[1] for g in groups)
        places = [(g, k) for g in groups for k in range(_SUPPORT, len(g.x))]
        if not places:
            raise ValueError(f"days: expected more than {_SUPPORT} periods to train on")
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
        return self

    def _utility(self, net: Tensor) -> Tensor:
        """Of the tasks' net returns [T]."""
        if self.utility == "log":
            return torch.log1p(net.clamp_min(-0.9)).mean()
        if self.utility == "sharpe":
            return net.mean() / net.std().clamp_min(1e-4)
        return (net - self.aversion / 2 * net.square()).mean()

    def _task(self, group: Periods, k: int, assets: Array) -> tuple[Tensor, ...]:
        """A period of a group, what was known, and its outcome."""
        before = slice(k - _SUPPORT, k)
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
            return self.bounds.weights(scores.detach(), base)

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


def _compared(
    policy: Policy, train: list[Periods], tested: list[Periods], first: int, facts: dict[str, str]
) -> Report:
    """Ours and the rivals on the tested groups' periods from `first` on."""
    begin = time.perf_counter()
    policy.fit(train)
    fit, lever = time.perf_counter() - begin, policy.bounds.leverage
    fixed = {
        "equal weight": lambda g, k: np.full(g.x.shape[1], 1 / g.x.shape[1]),
        "inverse volatility": lambda g, k: g.base[k],
        "minimum variance": lambda g, k: minimum_variance(g.past[k]),
    }

    def formula(rule: Any, group: Periods) -> Any:
        return lambda k, held: lever * torch.as_tensor(rule(group, first + k), dtype=torch.float32)

    makers: dict[str, Any] = {
        "adapted policy": lambda g: policy.chooser(g, first),
        "policy, unadapted": lambda g: policy.chooser(g, first, adapted=False),
        **{n: (lambda g, rule=rule: formula(rule, g)) for n, rule in fixed.items()},
    }
    runs = {}
    for name, make in makers.items():
        begin = time.perf_counter()
        found = [simulate(make(g), g.growth[first:], policy.bounds) for g in tested]
        returns, turnover = np.stack([r for r, _ in found]), float(np.mean([t for _, t in found]))
        seconds = time.perf_counter() - begin
        runs[name] = (returns, turnover, fit if "policy" in name else 0.0, seconds)
    return portfolio_report(runs, tested[0].growth.shape[1], facts)


def allocation(
    data: Any,
    *,
    columns: Mapping[str, str] | None = None,
    utility: str = "log",
    aversion: float = 5.0,
    size: int = 30,
    days: int = 21,
    cost: float = 0.001,
    leverage: float = 1.0,
    turnover: float | None = None,
    long_only: bool = True,
    share: float = 0.3,
    seeds: int = 3,
    quick: bool = False,
    say: Say = silent,
) -> Result:
    """Compare portfolios of held-out groups in later periods, net of costs; train for deployment.

    Args:
        data: prices, as `pymeta.finance.read_prices` takes them, with `sector` in an .npz; without
            sectors, groups are random.
        columns: what a table's columns are called, as there.
        utility: "log" (of wealth), "sharpe" or "mean_variance".
        aversion: to variance, of "mean_variance".
        size: stocks of a group, at most.
        days: of a period.
        cost: of a trade, as a share of what is traded.
        leverage: the sum of the weights' sizes.
        turnover: the most that is traded at once, as a share of wealth; any by default.
        long_only: whether no weight is below 0.
        share: of the groups, which are tested and not trained on; of the periods, the last ones.
        seeds: how many times, with other tested groups and other starts.
        quick: one seed and fewer training steps: to see it run.
        say: is told of progress.

    Returns:
        The `Result`. Intervals are over groups, and over periods.

    Raises:
        ImportError: a package of the extra `finance` is missing.
        TypeError, ValueError: an argument is not as described.
    """
    bounds = Bounds(long_only, leverage, turnover, cost)
    groups = groups_of(read_prices(data, columns), size, days)
    names, steps = sorted(groups), 20 if quick else 300
    periods = len(next(iter(groups.values())).x)
    first = max(round(0.7 * periods), _SUPPORT)
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share!r}")
    if periods - first < 2:
        raise ValueError(f"days: expected more than {_SUPPORT + 2} periods, got {periods}")
    reports = []
    for seed in range(1 if quick else seeds):
        held = set(
            np.random.default_rng(seed).permutation(names)[: max(round(share * len(names)), 2)]
        )
        say(f"seed {seed + 1}: {', '.join(sorted(held))} tested")
        train = [until(groups[n], first) for n in names if n not in held]
        policy = Policy(bounds, utility, aversion, steps=steps, seed=seed)
        facts = {"tested": ", ".join(sorted(held)), "periods": f"{periods - first} of {days} days"}
        tested = [groups[n] for n in sorted(held)]
        reports.append(_compared(policy, train, tested, first, facts))
    settings = {"utility": utility, "bounds": bounds, "days": days, "seeds": len(reports)}
    final = Policy(bounds, utility, aversion, steps=steps, seed=0)
    return result("allocation", reports, lambda: final.fit(list(groups.values())), say, settings)
