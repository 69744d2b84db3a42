"""A remainder beside the pooled model, on tasks of entities that it was not trained on.

Where tasks have fixed sizes and times, these are all windows of the panel, a query after the other:
every later row counts once. Otherwise they are episodes, drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from pymeta.data import Panel
from pymeta.data.draw import is_whole
from pymeta.finance.offsets import Offsets, rows_of
from pymeta.metrics.stress import stressed_rows
from pymeta.tasks.groups import Array

_BATCHES = 12  # of episodes
_BLOCKS = 12  # of time, of which the most stressed quarter is looked at apart
_AT_A_TIME = 512  # windows


class Check(NamedTuple):
    """A remainder beside the pooled model: its loss, and ours less it.

    Attributes:
        pooled: the pooled model's.
        gap: ours less it.
        error: the gap's standard error over entities.
        stressed: the gap in the quarter of the blocks of time that was most stressed, as
            `compare` has it; 0 without times.
    """

    pooled: float
    gap: float
    error: float
    stressed: float


class Found(NamedTuple):
    """What a head said of query rows.

    Attributes:
        ours: [rows], its losses.
        pooled: [rows], the pooled model's.
        y: [rows], the targets, in their own units.
        times: [rows], or None.
        entities: [rows], the labels.
    """

    ours: Array
    pooled: Array
    y: Array
    times: Array | None
    entities: Array


class Task(NamedTuple):
    """Tasks, and which rows of the panel their query is."""

    xs: Any
    ys: Any
    given: Any
    xq: Any
    yq: Any
    asked: Any
    rows: Array


def tasks_of(
    panel: Panel, offsets: Offsets, options: Mapping[str, Any], most: int | None
) -> Iterator[Task]:
    """Batches of tasks to check with.

    Args:
        panel: the rows, with seen targets.
        offsets: of its rows.
        options: of `Panel.episodes`.
        most: the longest support that is tried; queries begin after so many rows.
    """
    if not is_walk(panel, options):
        for batch in panel.episodes(**options, batches=_BATCHES):
            given, asked = offsets.take(batch)
            yield Task(batch.xs, batch.ys, given, batch.xq, batch.yq, asked, batch.query_rows)
        return
    last, query = options["support"], options["query"]
    windows = panel.windows(
        support=max(most or 0, last), query=query, gap=options["gap"], step=query
    )
    for batch in windows.batches(_AT_A_TIME):
        given, asked = offsets.take(batch)
        xs, ys, given = (np.asarray(v)[:, -last:] for v in (batch.xs, batch.ys, given))
        yield Task(xs, ys, given, batch.xq, batch.yq, asked, batch.query_rows)


def is_walk(panel: Panel, options: Mapping[str, Any]) -> bool:
    """Whether windows go through time: sizes are fixed, and no entity has two rows of one time."""
    if panel.times is None or options["split"] == "rows":
        return False
    if not all(is_whole(options[name]) for name in ("support", "query", "gap")):
        return False
    length = options["support"] + options["gap"] + options["query"]
    same = (panel.times[1:] == panel.times[:-1]) & (panel.codes[1:] == panel.codes[:-1])
    return bool((panel.sizes >= length).any() and not same.any())


@torch.no_grad()
def found_by(
    head: Any,
    panel: Panel,
    offsets: Offsets,
    options: Mapping[str, Any],
    most: int | None,
    loss: Callable[[Array, Array], Array],
    raw: Callable[[Array], Array],
) -> Found:
    """The losses of a head and of the pooled model.

    Args:
        head: that adapts.
        panel: rows of entities that it was not trained on, with its features and seen targets.
        offsets: of the rows.
        options: of `Panel.episodes`.
        most: as in `tasks_of`.
        loss: of outputs and targets, [rows] each.
        raw: makes targets in their own units of seen ones.
    """
    parts: list[tuple[Array, ...]] = []
    for task in tasks_of(panel, offsets, options, most):
        models = head.adapt(task.xs, task.ys, support_offset=task.given)
        p = rows_of(models(task.xq, offset=task.asked))
        parts.append((p, rows_of(task.asked), rows_of(task.yq), task.rows))
    p, base, y, rows = (np.concatenate(v) for v in zip(*parts, strict=True))
    times = None if panel.times is None else panel.times[rows]
    return Found(loss(p, y), loss(base, y), raw(y), times, panel.labels[rows])


def check_of(parts: list[Found]) -> Check:
    """What the folds' rows say together; an entity's rows count as one."""
    ours, pooled, y, labels = (
        np.concatenate([getattr(f, n) for f in parts]) for n in ("ours", "pooled", "y", "entities")
    )
    gap = ours - pooled
    _, codes = np.unique(labels, return_inverse=True)
    gaps = np.bincount(codes, gap) / np.bincount(codes)
    stressed = 0.0
    if parts[0].times is not None:
        times = np.concatenate([f.times for f in parts if f.times is not None])
        block = -(-len(np.unique(times)) // _BLOCKS)
        stressed = float(gap[stressed_rows(y, times, float(y.mean()), block)].mean())
    error = float(gaps.std() / len(gaps) ** 0.5)
    return Check(float(pooled.mean()), float(gap.mean()), error, stressed)
