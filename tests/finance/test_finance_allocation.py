"""Allocation: bounds, costs, rivals, and the job on made prices."""

from __future__ import annotations

import finance_help
import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

import pymeta
from pymeta.finance import allocation
from pymeta.finance.periods import Periods, groups_of, until
from pymeta.finance.policy import Policy
from pymeta.finance.portfolio import (
    Bounds,
    drifted,
    minimum_variance,
    portfolio_report,
    simulate,
)


@pytest.mark.parametrize("long_only", [True, False])
def test_weights_keep_to_their_bounds(long_only):
    torch.manual_seed(0)
    base = torch.rand(5, 4).softmax(-1)
    bounds = Bounds(long_only=long_only, leverage=1.5, turnover=0.1)
    torch.testing.assert_close(bounds.weights(torch.zeros(5, 4), base), 1.5 * base)
    weights = bounds.weights(3 * torch.randn(5, 4), base)
    torch.testing.assert_close(weights.abs().sum(-1), torch.full((5,), 1.5))
    assert (weights >= 0).all() == long_only
    held = 1.5 * base
    moved = bounds.within(weights, held)
    traded = (moved - held).abs().sum(-1) / 2
    assert (traded <= 0.1 + 1e-6).all() and traded.max() > 0.09
    near = held + 0.01 * torch.tensor([1.0, -1, 0, 0])
    torch.testing.assert_close(bounds.within(near, held), near)


def test_bounds_that_make_no_sense_are_refused():
    for options, name in (({"leverage": 0}, "leverage"), ({"turnover": 0.0}, "turnover"),
                          ({"cost": 1.0}, "cost")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Bounds(**options)
    with pytest.raises(ValueError, match="utility: expected one of"):
        Policy(Bounds(), "luck", 1.0, steps=1, seed=0)


def test_returns_are_net_of_costs():
    growth = np.ones((2, 3, 2))
    growth[0, :, 0] = [1.1, 1.2, 1.3]  # the first asset wins a third in period 0
    choices = {0: torch.tensor([0.5, 0.5]), 1: torch.tensor([0.5, 0.5])}
    returns, turnover = simulate(lambda k, held: choices[k], growth, Bounds(cost=0.01))
    held = drifted(choices[0], torch.tensor([1.3, 1.0]))
    torch.testing.assert_close(held, torch.tensor([0.65, 0.5]) / 1.15)
    traded = float((choices[1] - held).abs().sum() / 2)
    assert turnover == pytest.approx(traded)
    wealth = np.cumprod(1 + returns)
    assert wealth[2] == pytest.approx(1.15 - 0.01)  # all of it is bought at first
    assert wealth[-1] == pytest.approx(1.14 * (1 - 2 * traded * 0.01), rel=1e-6)
    free, _ = simulate(lambda k, held: choices[k], growth, Bounds(cost=0.0))
    assert np.prod(1 + free) == pytest.approx(1.15)


def test_minimum_variance_is_that_of_its_formula():
    rng = np.random.default_rng(0)
    returns = rng.normal(size=(4000, 3)) * [1, 2, 4]
    np.testing.assert_allclose(minimum_variance(returns), np.array([16, 4, 1]) / 21, atol=0.02)
    returns[:, 1] = returns[:, 0] * 2 + 0.01 * rng.normal(size=4000)  # better held short
    weights = minimum_variance(returns, shrink=0.0)
    assert weights[1] == 0 and weights.min() >= 0 and weights.sum() == pytest.approx(1)


def test_periods_know_the_past_alone():
    close = finance_help.prices(stocks=5, days=360, ranges=False).close
    whole = Periods(close, 20)
    changed = close.copy()
    changed[:, 300:] *= np.linspace(1, 2, 60)
    other = Periods(changed, 20)
    known = (300 - 252) // 20 + 1  # periods that begin before day 300
    np.testing.assert_array_equal(whole.x[:known], other.x[:known])
    np.testing.assert_array_equal(whole.base[:known], other.base[:known])
    assert not np.array_equal(whole.x[known], other.x[known])
    np.testing.assert_allclose(whole.growth[0, -1], close[:, 272] / close[:, 252])
    assert len(until(whole, 2).x) == 2


def test_a_policy_finds_what_pays():
    """Momentum pays in made periods: the policy holds more of what has risen."""
    rng = np.random.default_rng(0)

    def made():
        group = object.__new__(Periods)
        group.x = rng.normal(size=(20, 8, 6)).astype(np.float32)
        moved = 0.03 * group.x[..., 0] + 0.01 * rng.normal(size=(20, 8))
        group.y = group.x[..., 0]
        group.base = np.full((20, 8), 1 / 8, np.float32)
        group.growth = np.exp(moved)[:, None] * np.ones((1, 5, 1))
        group.past = [rng.normal(size=(252, 8))] * 20
        return group

    policy = Policy(Bounds(), "log", 1.0, steps=80, seed=0).fit([made() for _ in range(6)])
    group = made()
    ours, _ = simulate(policy.chooser(group, 6), group.growth[6:], Bounds())
    base, _ = simulate(lambda k, held: torch.full((8,), 1 / 8), group.growth[6:], Bounds())
    assert np.log1p(ours).sum() > np.log1p(base).sum() + 0.1
    assert policy.strength == 1.0
    for group in (
        groups := [made() for _ in range(6)]
    ):  # what pays is noise: nothing is held for it
        group.x = rng.normal(size=(20, 8, 6)).astype(np.float32)
    assert Policy(Bounds(), "log", 1.0, steps=40, seed=0).fit(groups).strength == 0.0


def test_a_report_has_intervals_of_differences():
    rng = np.random.default_rng(0)
    returns = 0.01 * rng.normal(size=(3, 200))
    runs = {"ours": (returns + 0.002, 0.1, 1.0, 1.0), "theirs": (returns, 0.2, 0.0, 1.0)}
    report = portfolio_report(runs, 20, {})
    assert report.verdicts["theirs", "log wealth a year"] == "win"
    gap = report.pairs[0].gaps["blocks of time"]
    assert gap.value == pytest.approx(0.002 * 252, rel=0.01) and gap.low > 0.4
    assert "turnover" in report.markdown()


@pytest.mark.parametrize("utility", ["log", "sharpe", "mean_variance"])
def test_allocation_runs_and_is_deployed(utility, tmp_path):
    p = finance_help.prices(stocks=24, days=600, ranges=False)
    found = allocation(p, quick=True, size=8, utility=utility, turnover=0.3)
    names = [line.name for line in found.report.lines]
    assert names == ["adapted policy", "policy, unadapted", "equal weight", "inverse volatility",
                     "minimum variance"]  # fmt: skip
    found.save(tmp_path)
    assert pymeta.Adapter.load(tmp_path / "adapter.safetensors").in_features == 6
    assert (tmp_path / "report.html").exists()


def test_groups_are_stocks_without_gaps():
    p = finance_help.prices(stocks=12, days=320, ranges=False)
    p.close[3, 100] = np.nan
    groups = groups_of(p, 4, 20)
    assert len(groups) == 2 and all(g.x.shape[1] == 4 for g in groups.values())
    with pytest.raises(ValueError, match="expected two groups of four stocks without gaps, got 0"):
        groups_of(finance_help.prices(stocks=3, days=320), 4, 20)
