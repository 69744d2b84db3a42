"""Calm and stressed periods, and tests that make things worse than they were.

A stress test is a function (history, query) -> (history, query, touched): other panels of the same
rows, and which query rows it touches [rows of query]. Models are not fitted again: this is what
would happen to them in use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from pymeta.data.panel import Panel
from pymeta.spec.show import counted
from pymeta.tasks.groups import Array

Test: TypeAlias = Callable[[Panel, Panel], tuple[Panel, Panel, Array]]


def stressed_rows(y: Array, times: Array, usual: float, block: int, share: float = 0.25) -> Array:
    """Which rows are in the worst blocks of time: bool [rows].

    A block is so many distinct times; the worst ones are those whose targets are farthest from
    the usual mean on average (for 0 and 1: whose share of 1 is largest), up to `share` of them.

    Args:
        y: [rows], the targets.
        times: [rows].
        usual: the mean of training.
        block: distinct times in a block.
        share: of the blocks.
    """
    _, rank = np.unique(times, return_inverse=True)
    blocks = rank // block
    count = int(blocks.max(initial=0)) + 1
    badness = y if np.isin(y, (0, 1)).all() else np.abs(y - usual)
    size = np.bincount(blocks, minlength=count)
    mean = np.bincount(blocks, badness, minlength=count) / np.maximum(size, 1)
    worst = np.argsort(-mean, kind="stable")[: max(round(share * count), 1)]
    return np.isin(blocks, worst)


def _last(query: Panel, periods: int) -> Array:
    """The query rows of the last distinct times; all where there are no times."""
    if query.times is None:
        return np.ones(len(query), bool)
    distinct = np.unique(query.times)
    last: Array = query.times >= distinct[-min(periods, len(distinct))]
    return last


def scale_levels(factor: float, periods: int = 40, *, target: bool = False) -> Test:
    """Numbers are `factor` times as large in the last periods; the target too where asked for."""

    def test(history: Panel, query: Panel) -> tuple[Panel, Panel, Array]:
        touched = _last(query, periods)
        names = (*query.numeric, *([query.target] if target and query.target else []))
        changed = {n: np.where(touched, query[n] * factor, query[n]) for n in names}
        return history, query.with_columns(**changed), touched

    return test


def scale_volatility(factor: float, periods: int = 40) -> Test:
    """Numbers are `factor` times as far from their median in the last periods."""

    def test(history: Panel, query: Panel) -> tuple[Panel, Panel, Array]:
        touched = _last(query, periods)
        changed = {}
        for name in query.numeric:
            values = query[name].astype(np.float64)
            known = values[np.isfinite(values)]
            middle = float(np.median(known)) if len(known) else 0.0
            changed[name] = np.where(touched, middle + factor * (values - middle), values)
        return history, query.with_columns(**changed), touched

    return test


def without(feature: str) -> Test:
    """A feature is missing in all query rows."""

    def test(history: Panel, query: Panel) -> tuple[Panel, Panel, Array]:
        empty = np.full(len(query), None if feature in query.categorical else np.nan)
        return history, query.with_columns(**{feature: empty}), np.ones(len(query), bool)

    return test


def delay_labels(periods: int) -> Test:
    """The targets of the history's last periods are not known yet: those rows are gone."""

    def test(history: Panel, query: Panel) -> tuple[Panel, Panel, Array]:
        return history.where(~_last(history, periods)), query, np.ones(len(query), bool)

    return test


def strongest(panel: Panel) -> str | None:
    """The numeric feature that goes with the target most closely; None where there is none."""
    best, found = 0.0, None
    y = panel.need_y().astype(np.float64)
    for name in panel.numeric:
        x = panel[name].astype(np.float64)
        here = np.isfinite(x)
        if here.sum() > 2 and x[here].std() > 0 and y[here].std() > 0:
            strength = abs(float(np.corrcoef(x[here], y[here])[0, 1]))
            if strength > best:
                best, found = strength, name
    return found


def standard_tests(past: Panel, periods: int = 40) -> dict[str, Test]:
    """The tests of `compare`, by name, for what there is in a panel."""
    tests: dict[str, Test] = {}
    if past.numeric:
        for factor in (2, 4):
            tests[f"levels x {factor}"] = scale_levels(factor, periods)
        for factor in (2, 4):
            tests[f"volatility x {factor}"] = scale_volatility(factor, periods)
        gone = strongest(past)
        if gone is not None:
            tests[f"without {gone}"] = without(gone)
    if past.times is not None:
        tests[f"labels {counted(periods, 'period')} late"] = delay_labels(periods)
    return tests
