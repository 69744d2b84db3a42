"""Allocation: how much of each asset of a group, by a policy that is adapted to the last periods.

A policy network gives a score to every asset of a group (a sector); scores of 0 are the portfolio
of inverse volatility, where it begins. Inner steps fit the scores to the assets' relative returns
of the last periods; the outer loss is the utility of the weights, net of costs, in the next period,
differentiated through the inner loop by the gradient of its predictions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pymeta.finance.periods import Periods, groups_of, until
from pymeta.finance.policy import SUPPORT, Policy
from pymeta.finance.portfolio import (
    Bounds,
    minimum_variance,
    portfolio_report,
    simulate,
)
from pymeta.finance.prices import read_prices
from pymeta.finance.result import Result, Say, result, silent
from pymeta.metrics import Report
from pymeta.spec.show import counted


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
        columns: what a table's columns are called, {"entity": ..., "time": ..., "close": ...,
            "open": ..., "high": ..., "low": ...}, as there.
        utility: "log" (of wealth), "sharpe" or "mean_variance".
        aversion: the aversion to variance, for "mean_variance".
        size: the most stocks in a group.
        days: the days in a period.
        cost: the cost of a trade, as a share of what is traded.
        leverage: the sum of the weights' absolute values.
        turnover: the most that is traded at once, as a share of wealth; no limit by default.
        long_only: whether no weight is below 0.
        share: the share of groups that is tested and not trained on, and of periods: the last
            ones.
        seeds: how many runs, each with other tested groups and other starts.
        quick: use one seed and fewer training steps, to see it run.
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
    first = max(round(0.7 * periods), SUPPORT)
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share!r}")
    if periods - first < 2:
        raise ValueError(f"days: expected more than {SUPPORT + 2} periods, got {periods}")
    reports: list[Report] = []
    chosen: list[float] = []
    for seed in range(1 if quick else seeds):
        held = set(
            np.random.default_rng(seed).permutation(names)[: max(round(share * len(names)), 2)]
        )
        say(f"seed {seed + 1}: {', '.join(sorted(held))} tested")
        train = [until(groups[n], first) for n in names if n not in held]
        policy = Policy(bounds, utility, aversion, steps=steps, seed=seed)
        facts = {
            "tested": ", ".join(sorted(held)),
            "periods": f"{periods - first} of {counted(days, 'day')}",
        }
        tested = [groups[n] for n in sorted(held)]
        reports.append(_compared(policy, train, tested, first, facts))
        chosen.append(policy.strength)
    settings = {"utility": utility, "bounds": bounds, "days": days, "strengths": chosen}
    final = Policy(bounds, utility, aversion, steps=steps, seed=0)
    return result("allocation", reports, lambda: final.fit(list(groups.values())), say, settings)
