"""Trend: ranks, DoubleAdapt against an eager loop, and the job on made prices."""

from __future__ import annotations

import finance_help
import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

import pymeta
from pymeta.data import Panel
from pymeta.finance import DoubleAdapt, trend, trend_panel
from pymeta.finance.jobs.trend import Trend
from pymeta.finance.stretches import Stretches, ranks


def test_ranks_are_of_each_day():
    values = np.array([[3.0, 1.0], [1.0, np.nan], [2.0, 5.0]])
    np.testing.assert_array_equal(ranks(values), [[0.5, -0.5], [-0.5, np.nan], [0.0, 0.5]])


def test_features_do_not_see_the_future():
    p = finance_help.prices(stocks=6, days=320, ranges=False)
    whole = trend_panel(p, 5)
    assert len(whole.numeric) == 9

    def build(part: Panel):
        days = int((part.times.max() - p.days[0]).astype(int)) + 1
        cut = type(p)(p.names, p.days[:days], p.close[:, :days], {})
        again = trend_panel(cut, 5, target=False)
        kept = again.where(np.isin(again.times, part.times))
        return np.column_stack([kept[n] for n in kept.numeric])

    whole.check_leakage(build=build)
    row = int(np.flatnonzero((whole.labels == "S02") & (whole.times == p.days[300]))[0])
    moved = np.log(p.close[:, 305]) - np.log(p.close[:, 300])
    assert whole.y[row] == pytest.approx(ranks(moved[:, None])[2, 0])
    with pytest.raises(ValueError, match="expected more than 255 days of prices, got 200"):
        trend_panel(finance_help.prices(stocks=3, days=200))


def eager(model: DoubleAdapt, xs, ys, xq, weights):
    """What DoubleAdapt is, by autograd, task by task."""
    w1, b1, w2, b2 = model.maml.model.parameters()
    lr = model.maml.lr

    def network(p, x):
        return torch.tanh(x @ p[0].T + p[1]) @ p[2].T + p[3]

    out = []
    for t in range(len(xs)):
        x, y = model.features(xs[t]), model.targets(xs[t], ys[t])
        p = [w1, b1, w2, b2]
        for _ in range(model.maml.steps):
            error = weights[t] * (network(p, x)[:, 0] - y) ** 2
            loss = error.sum() / weights[t].sum()
            grads = torch.autograd.grad(loss, p, create_graph=True)
            p = [v - lr[i // 2] * g for i, (v, g) in enumerate(zip(p, grads, strict=True))]
        out.append(model.back(xq[t], network(p, model.features(xq[t]))[:, 0]))
    return torch.stack(out)


def test_double_adapt_is_an_eager_loop_end_to_end():
    torch.manual_seed(0)
    model = DoubleAdapt(5, hidden=4, heads=3).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.maml.lr.data.abs_()
    xs, xq = torch.randn(3, 8, 5).double(), torch.randn(3, 6, 5).double()
    ys, weights = torch.randn(3, 8).double(), torch.rand(3, 8).double()
    assert "native" in model.maml.explain()
    found, wanted = model(xs, ys, xq, weights), eager(model, xs, ys, xq, weights)
    torch.testing.assert_close(found, wanted)
    target = torch.randn_like(found)
    grads = [
        torch.autograd.grad(((p - target) ** 2).mean(), list(model.parameters()))
        for p in (found, wanted)
    ]
    assert len(grads[0]) == 10
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def test_maps_begin_as_identities_and_go_back():
    torch.manual_seed(0)
    model = DoubleAdapt(4)
    x, y = torch.randn(7, 4), torch.randn(7)
    torch.testing.assert_close(model.features(x), x)
    torch.testing.assert_close(model.targets(x, y), y)
    torch.testing.assert_close(model.back(x, model.targets(x, y)), y)
    assert not hasattr(DoubleAdapt(4, maps=False), "matrix")


def test_a_grid_has_each_row_once():
    panel = trend_panel(finance_help.prices(stocks=4, days=300, ranges=False))
    panel = panel.where(np.arange(len(panel)) % 7 != 3)  # rows are missing
    grid = Stretches(panel, panel.y)
    assert grid.here.sum() == len(panel)
    x, y, w = grid.part(np.array([2, 5]), 3, np.array([[0, 1, 2, 3], [3, 2, 1, 0]]))
    assert x.shape == (2, 12, 9) and y.shape == w.shape == (2, 12)
    day = np.unique(panel.times)[6]  # the second one of the second task
    row = np.flatnonzero((panel.times == day) & (panel.codes == 2))
    if len(row):
        np.testing.assert_array_equal(x[1, 5], panel.x[row[0]])
        assert y[1, 5] == panel.y[row[0]] and w[1, 5] == 1
    else:
        assert w[1, 5] == 0


def test_what_shifts_is_learned():
    """The sign of a feature's effect changes every forty days: the last days tell it."""
    rng = np.random.default_rng(0)
    stocks, days = 30, 480
    x = rng.uniform(-0.5, 0.5, (stocks, days))
    sign = np.where(np.arange(days) // 40 % 2, 1.0, -1.0)
    y = sign * x + 0.2 * rng.normal(size=x.shape)
    table = {
        "stock": np.repeat(np.arange(stocks), days),
        "day": np.tile(np.arange(days), stocks),
        "x": x.reshape(-1),
        "rank": y.reshape(-1),
    }
    panel = Panel(table, entity="stock", time="day", target="rank")
    past, future = panel.split_time(450)  # within a stretch: 440 to 479
    model = Trend(5, 1, incremental=False, steps=120).fit(past)
    adapted = model.predict(past, future)
    alone = model.predict(None, future)
    assert np.corrcoef(adapted, future.y)[0, 1] > 0.3 + np.corrcoef(alone, future.y)[0, 1]
    with pytest.raises(ValueError, match="days: expected training of 41 days or more, got 30"):
        Trend(20, 1).fit(future)


def test_trend_runs_and_is_deployed(tmp_path):
    p = finance_help.prices(stocks=16, days=460, ranges=False)
    found = trend(p, days=10, quick=True, share=0.4)
    names = [line.name for line in found.report.lines]
    assert names[0] == "DoubleAdapt" and "pooled linear, fitted again" in names
    assert found.report.metrics == ["IC", "MSE"]
    found.save(tmp_path)
    adapter = pymeta.Adapter.load(tmp_path / "adapter.safetensors")
    assert adapter.in_features == 9 and set(np.load(tmp_path / "maps.npz")) >= {"matrix", "coef"}
