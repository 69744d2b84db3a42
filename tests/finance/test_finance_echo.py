"""`Echo`: what comes back after a time, and how far away in time residuals tell of each other."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("sklearn")

from pymeta.data import Panel, Ragged
from pymeta.finance import Deployed, Remainder
from pymeta.finance.echo import Echo, covariances


def reports(entities=40, days=140, every=13, seed=0, link="identity", start=0) -> Panel:
    """Numbers with a peak every so many days, on days of each entity's own."""
    rng = np.random.default_rng(seed)
    e, day = np.repeat(np.arange(entities), days), np.tile(np.arange(days), entities)
    first = rng.integers(0, every, entities)
    x, noise = rng.normal(size=len(e)), rng.normal(size=len(e))
    y = x + 2.0 * ((day - first[e]) % every == 0) + 0.3 * noise
    table = {"e": e, "t": day + start, "x": x, "y": np.exp(y) if link == "log" else y}
    return Panel(table, entity="e", time="t", target="y")


def anew(p: Panel) -> Panel:
    """The same rows, of no training panel that a model could know."""
    return Panel(p.to_dict(), entity="e", time="t", target="y")


def fitted(p: Panel, **options) -> Remainder:
    options = {"support": 40, "query": 5, "history": 40, "steps": 30, "tasks": 16, **options}
    return Remainder(**options).fit(p)


def loss(y, p, link):
    y = y.astype(float)
    return np.mean(y / p - np.log(y / p) - 1) if link == "log" else np.mean((y - p) ** 2)


@pytest.mark.parametrize("link", ["identity", "log"])
def test_what_comes_back_is_foreseen_and_chosen(link):
    past, future = reports(link=link).split_time(133)
    tested = np.arange(10)
    model = fitted(past.of(np.arange(10, 40)), forms=("pooled", "level", "echo"), link=link)
    assert model.form == "echo"
    history, query = past.of(tested), future.of(tested)
    alone, ours = model.predict(None, query), model.predict(history, query)
    assert loss(query.y, ours, link) < 0.6 * loss(query.y, alone, link)
    peaks = query.y - alone > np.quantile(query.y - alone, 0.95)
    assert (ours / alone if link == "log" else ours - alone)[peaks].mean() > 1.5 * (link == "log")


def test_without_anything_that_comes_back_nothing_is_adapted():
    p = reports(every=10**9)
    assert fitted(p, forms=("pooled", "echo")).form == "pooled"


def test_the_mean_is_that_of_a_gaussian_process():
    """Against the formula, written out for two tasks of other sizes, one of which has no rows."""
    rng = np.random.default_rng(0)
    k = 0.5 ** np.arange(6) + np.r_[1.0, np.zeros(5)]
    echo = Echo(0.0, 1.0, k, None, (-9.0, 9.0), 0.25, worth=2.0, near=4.0)
    x = [np.array([3.0, 4, 7]), np.zeros(0), np.array([0.0, 5.0])]
    y = [rng.normal(size=len(a)) for a in x]
    xq = [np.array([8.0, 9.0]), np.array([1.0]), np.array([30.0])]
    sizes, asked = [len(a) for a in x], [len(a) for a in xq]

    def ragged(parts, sizes):
        return Ragged(np.concatenate(parts).astype(np.float32)[:, None], sizes)

    offset = ragged([np.full(n, 0.5) for n in sizes], sizes)
    ours = echo.adapt(ragged(x, sizes), ragged(y, sizes), support_offset=offset)
    base = ragged([np.arange(float(n)) for n in asked], asked)
    found = ours(ragged(xq, asked), offset=base)

    def between(a, b):
        apart = np.abs(a[:, None] - b[None]).astype(int)
        return np.where(apart < 6, k[np.minimum(apart, 5)], 0)

    residual = y[0].astype(np.float32) - 0.5
    level = residual.sum() / (3 + 2)
    seen = residual - level - 0.25
    wanted = level + between(xq[0], x[0]) @ np.linalg.solve(between(x[0], x[0]), seen) + [0.0, 1.0]
    own = (y[2].astype(np.float32) - 0.5).sum() / (2 + 2)  # fades: 25 units after the last row
    assert found.shape == (4, 1) and found.dtype == np.float32
    np.testing.assert_allclose(found[:2, 0], wanted, rtol=1e-5, atol=1e-6)
    assert found[2, 0] == 0  # without rows
    np.testing.assert_allclose(found[3, 0], own * 0.5 ** (25 / 4 - 1), rtol=1e-5)


def test_a_level_comes_first():
    """Levels, which a process of ratios alone would tell late, of entities that report nothing."""
    rng = np.random.default_rng(3)
    e, day = np.repeat(np.arange(30), 100), np.tile(np.arange(100), 30)
    y = np.exp(rng.normal(size=30)[e] + 0.3 * rng.normal(size=len(e)))
    table = {"e": e, "t": day, "x": rng.normal(size=len(e)), "y": y}
    past, future = Panel(table, entity="e", time="t", target="y").split_time(95)
    model = fitted(past, forms=("echo",), link="log")
    found = np.log(model.predict(anew(past), future) / future.y)
    levels = np.bincount(future.codes, found) / 5
    assert levels.std() < 0.25 < 0.7 < np.log(model.predict(None, future) / future.y).std()


def test_covariances_are_means_of_products_of_a_process():
    rng = np.random.default_rng(1)
    entities, days, far = 70, 60, 9
    code, place = np.repeat(np.arange(entities), days), np.tile(np.arange(days), entities)
    v = rng.normal(size=(entities, days + 3))
    v = (v[:, 3:] + 0.8 * v[:, :-3]).reshape(-1)
    kept = rng.random(len(v)) < 0.8
    code, place, v = code[kept], place[kept], v[kept]
    found = covariances(place, code, v, far)
    grid = np.full((entities, days), np.nan)
    grid[code, place] = v
    means = [np.nanmean(grid[:, d:] * grid[:, : days - d]) for d in range(far)]
    np.testing.assert_allclose(found, means * (1 - np.arange(far) / days), atol=0.05)
    assert found[3] > 0.5 > 0.1 > abs(found[2])
    apart = np.abs(np.subtract.outer(np.arange(far), np.arange(far)))
    assert np.linalg.eigvalsh(found[apart]).min() > 0.05 * found[0]


def test_old_rows_say_nothing():
    past, future = reports().split_time(100)
    model = fitted(past, forms=("echo",))
    history = anew(past.where(past.times < 40))
    alone = model.predict(None, future)
    np.testing.assert_allclose(model.predict(history, future), alone, rtol=0, atol=1e-3)
    assert np.abs(model.predict(anew(past), future) - alone).max() > 0.5


def test_echo_needs_times_numbers_and_one_row_of_each():
    p = reports(entities=10, days=60)
    table = p.to_dict()
    with pytest.raises(ValueError, match="forms: expected no 'echo' for a target of two classes"):
        odd = {**table, "y": (p.y > 1).astype(int)}
        fitted(Panel(odd, entity="e", time="t", target="y"), forms=("echo",))
    still = {k: v for k, v in table.items() if k != "t"}
    with pytest.raises(ValueError, match="forms='echo': expected a panel with times"):
        fitted(Panel(still, entity="e", target="y"), forms=("echo",), split="rows")
    twice = {k: np.concatenate([v, v[:1]]) for k, v in table.items()}
    with pytest.raises(ValueError, match="'echo' expects one row of each entity and time, got 1"):
        fitted(Panel(twice, entity="e", time="t", target="y"), forms=("echo",))


@pytest.mark.parametrize("link", ["identity", "log"])
def test_what_comes_back_is_deployed(tmp_path, link):
    past, future = reports(link=link).split_time(133)
    model = fitted(past, forms=("echo",), link=link)
    deployed = Deployed.of(model, past)
    deployed.save(tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["form"] == "echo"
    again = Deployed.load(tmp_path)
    history = anew(past)
    wanted = model.predict(history, future)
    np.testing.assert_allclose(again.predict(history, future), wanted, rtol=1e-4)
    assert np.abs(wanted - model.predict(None, future)).max() > 0.3
    np.testing.assert_allclose(again.predict(None, future), model.predict(None, future), rtol=1e-4)
