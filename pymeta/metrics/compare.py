"""`compare`: ours beside the rivals, on the same split, with intervals, in words.

    past | gap | query        in time: everything before `at` may be learned from

The tested entities are a share of all: what is given learns its start from the *other* entities'
past, and then has the tested entities' own past to adapt to (history). Baselines learn from all of
the past at once. All predict the tested entities' rows from `at` on. Without times, the tested
entities' rows are split at random into history and query.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pymeta.data.panel import Panel
from pymeta.metrics.base import Metric, is_binary
from pymeta.metrics.baselines import baselines
from pymeta.metrics.bootstrap import Bootstrap, Resampled, time_blocks
from pymeta.metrics.models import as_model
from pymeta.metrics.report import Line, Pair, Part, Report
from pymeta.metrics.scores import metric_of
from pymeta.metrics.stress import Test, standard_tests, stressed_rows
from pymeta.metrics.tables import evaluate
from pymeta.spec.show import counted
from pymeta.tasks.groups import Array

BINARY = ("log_loss", "auc", "brier", "calibration_error")
NUMBERS = ("mse", "r2")
_LEAST_BLOCKS = 5  # of time, for an interval over them


@dataclass
class Split:
    """What is learned from, adapted to, and predicted.

    Attributes:
        train: past rows of the entities that are not tested.
        history: past rows of those that are.
        query: their later rows.
        past: train and history.
    """

    train: Panel
    history: Panel
    query: Panel
    past: Panel


def split(panel: Panel, *, at: Any, share: float, gap: Any, seed: int) -> Split:
    """The split of `compare`, by its arguments.

    Raises:
        ValueError: a part of it would be empty.
    """
    panel.need_y()
    if panel.times is not None:
        at = np.quantile(panel.times.astype(np.float64), 0.7) if at is None else at
        if panel.times.dtype.kind == "M" and isinstance(at, float):
            at = np.int64(np.ceil(at)).astype(panel.times.dtype)
        past, later = panel.split_time(at, gap=gap)
        tested = past.split_entities(share, seed=seed)[1].entities if share else past.entities
        chosen = np.isin(past.labels, tested)
        history, train = past.where(chosen), past.where(~chosen) if share else past
        query = later.where(np.isin(later.labels, tested))
    else:
        if at is not None or gap is not None:
            raise ValueError("at, gap: expected None for a panel without times")
        train, tested_rows = panel.split_entities(share, seed=seed)
        early = np.random.default_rng(seed).random(len(tested_rows)) < 0.5
        history, query = tested_rows.where(early), tested_rows.where(~early)
        known = np.isin(panel.rows, query.rows)
        past = panel.where(~known)
    for name, part in (("train", train), ("history", history), ("query", query)):
        if not len(part):
            raise ValueError(f"at, share: they leave no rows for {name}")
    return Split(train, history, query, past)


@dataclass
class _Run:
    """One model, fitted, with its predictions and its times in seconds."""

    name: str
    model: Any
    is_ours: bool
    history: Panel | None
    fit: float = 0.0
    predict: float = 0.0
    p: Array = field(default_factory=lambda: np.zeros(0))


def _predicted(name: str, model: Any, history: Panel | None, query: Panel) -> Array:
    if history is not None and not len(history):  # a stress test has left no row of it
        history = None
    found = np.asarray(model.predict(history, query), dtype=np.float64)
    if found.shape != (len(query),):
        raise ValueError(
            f"models: {name}: expected predictions of shape [{len(query)}], the rows of query, "
            f"got {list(found.shape)}"
        )
    bad = int((~np.isfinite(found)).sum())
    if bad:
        raise ValueError(
            f"models: {name}: {bad} of {counted(len(query), 'prediction')} are not finite"
        )
    return found


def _run(name: str, model: Any, parts: Split, is_ours: bool) -> list[_Run]:
    """Fit and predict; of a model that adapts, its unadapted start as well."""
    run = _Run(name, model, is_ours, parts.history)
    begin = time.perf_counter()
    model.fit(parts.train if is_ours else parts.past)
    fitted = time.perf_counter()
    run.p = _predicted(name, model, parts.history, parts.query)
    run.fit, run.predict = fitted - begin, time.perf_counter() - fitted
    runs = [run]
    if is_ours and getattr(model, "adapts", False):
        start = _Run(f"{name}, unadapted", model, False, None, run.fit)
        begin = time.perf_counter()
        start.p = _predicted(start.name, model, None, parts.query)
        start.predict = time.perf_counter() - begin
        runs.append(start)
    return runs


class _Judge:
    """Scores and differences of one query panel."""

    def __init__(self, query: Panel, block: int, draws: int, seed: int) -> None:
        self.y, self.query = query.need_y().astype(np.float64), query
        self.over: dict[str, Bootstrap] = {}
        self._known: dict[tuple[str, str, str], Resampled] = {}
        if len(query.entities) > 1:
            self.over["entities"] = Bootstrap(query.codes, draws=draws, seed=seed)
        if query.times is not None:
            blocks = time_blocks(query.times, block)
            if _count(blocks) >= _LEAST_BLOCKS:
                self.over["blocks of time"] = Bootstrap(blocks, draws=draws, seed=seed)

    def _drawn(self, what: str, run: _Run, metric: Metric) -> Resampled:
        """A run's resampled metric; computed once."""
        key = (what, run.name, metric.name)
        if key not in self._known:
            self._known[key] = self.over[what].resampled(metric, self.y, run.p)
        return self._known[key]

    def line(self, run: _Run, metrics: Sequence[Metric], sizes: Array) -> Line:
        """A model's row of the table."""
        scores = evaluate(self.y, run.p, self.query.labels, metrics=metrics, size=sizes)
        first = next(iter(self.over), None)
        intervals = [
            None if first is None else self.over[first].of(self._drawn(first, run, m))
            for m in metrics
        ]
        return Line(run.name, run.is_ours, scores, intervals, run.fit, run.predict)

    def pair(self, ours: _Run, theirs: _Run, metric: Metric) -> Pair:
        """Ours against one rival in one metric."""
        gaps = {
            what: draws.of(*(self._drawn(what, r, metric) for r in (ours, theirs)))
            for what, draws in self.over.items()
        }
        groups = {what: draws.groups for what, draws in self.over.items()}
        both = metric(self.y, ours.p), metric(self.y, theirs.p)
        return Pair(
            ours.name, theirs.name, metric.name, metric.larger_is_better, both, gaps, groups
        )


def _parts_in_time(
    runs: list[_Run], parts: Split, metric: Metric, block: int, draws: int, seed: int
) -> list[Part]:
    """Calm and stressed periods apart, where there is more than one block of time."""
    query = parts.query
    if query.times is None or _count(time_blocks(query.times, block)) < 2:
        return []
    usual = float(parts.past.need_y().mean())
    stressed = stressed_rows(query.need_y(), query.times, usual, block)
    found = []
    for name, rows in (("calm", ~stressed), ("stressed", stressed)):
        if rows.any():
            found.append(_part(name, runs, query, rows, [r.p for r in runs], metric, draws, seed))
    return found


def _part(
    name: str,
    runs: list[_Run],
    query: Panel,
    rows: Array,
    predictions: list[Array],
    metric: Metric,
    draws: int,
    seed: int,
) -> Part:
    """Some rows of a query: every model's metric, and ours less each rival's over entities."""
    y, codes = query.need_y().astype(np.float64)[rows], query.codes[rows]
    values = {r.name: metric(y, p[rows]) for r, p in zip(runs, predictions, strict=True)}
    gaps = {}
    if len(np.unique(codes)) > 1:
        over = Bootstrap(codes, draws=draws, seed=seed)
        drawn = [over.resampled(metric, y, p[rows]) for p in predictions]
        ours = next(d for r, d in zip(runs, drawn, strict=True) if r.is_ours)
        gaps = {r.name: over.of(ours, d) for r, d in zip(runs, drawn, strict=True) if not r.is_ours}
    return Part(name, int(rows.sum()), values, gaps)


def _stress(
    runs: list[_Run], parts: Split, tests: Mapping[str, Test], metric: Metric, draws: int, seed: int
) -> list[Part]:
    found = []
    for name, test in tests.items():
        history, query, touched = test(parts.history, parts.query)
        if not touched.any():
            continue
        predictions = [
            _predicted(r.name, r.model, None if r.history is None else history, query) for r in runs
        ]
        found.append(_part(name, runs, query, touched, predictions, metric, draws, seed))
    return found


def compare(
    panel: Panel | Split,
    models: Mapping[str, Any],
    *,
    metrics: Sequence[str | Metric] | None = None,
    at: Any = None,
    gap: Any = None,
    share: float = 0.25,
    link: str = "identity",
    prep: Mapping[str, Any] | None = None,
    lightgbm: bool | None = None,
    threads: int = 1,
    stress: bool | Mapping[str, Test] = True,
    block: int = 21,
    draws: int = 1000,
    seed: int = 0,
) -> Report:
    """Models beside simple rivals on the same rows, and in words who wins.

    The rivals are a pooled linear model, one for each entity, empirical-Bayes intercepts, LightGBM
    with and without the entity, and the start of each model that adapts, unadapted.

    Args:
        panel: with targets, numbers or 0 and 1; or a `Split` of your own, for which `at`, `gap` and
            `share` do not count.
        models: by name: estimators of scikit-learn or of pymeta, `FromLearner(...)`, or anything
            with fit(train) and predict(history, query); the first one is the one of the verdicts.
        metrics: names in `METRICS`, or metrics; the first one decides in periods and stress tests.
            None for log loss, AUC, Brier and calibration error, or MSE and R2.
        at: the time from which rows are predicted; None for after seven tenths of the time.
        gap: so much time before `at` is left out (`Panel.split_time`).
        share: the share of entities that are tested; 0 for all, whose past is then learned from.
        link: "log" for regressions of targets > 0 whose predictions have to be (QLIKE).
        prep: options of the preprocessor, of the baselines and of estimators.
        lightgbm: whether it is among the rivals; None for where it is installed.
        threads: of LightGBM.
        stress: whether there are stress tests, or the tests by name (`pymeta.metrics.stress`).
            Models are not fitted again: late labels are missed by those that adapt.
        block: distinct times in a block: of the bootstrap, and of calm and stressed periods.
        draws: of the bootstrap.
        seed: of everything random here.

    Raises:
        ImportError: scikit-learn is not installed, or LightGBM where it is asked for.
        TypeError, ValueError: an argument is not as described, or a part of the split is empty.
    """
    _check(panel, models)
    if isinstance(panel, Split):
        parts = panel
    else:
        parts = split(panel, at=at, share=share, gap=gap, seed=seed)
    y, classes = parts.query.need_y(), parts.past.classes
    if classes is not None and len(classes) > 2:
        raise ValueError(f"target: expected numbers or two classes, got {len(classes)}")
    usual = BINARY if is_binary(parts.past.need_y()) else NUMBERS
    chosen = [metric_of(m) for m in (usual if metrics is None else metrics)]
    runs: list[_Run] = []
    for name, value in models.items():
        runs += _run(name, as_model(name, value, link=link, prep=prep), parts, True)
    for name, model in baselines(link, prep, seed, lightgbm, threads).items():
        runs += _run(name, model, parts, False)
    judge = _Judge(parts.query, block, draws, seed)
    sizes = _history_sizes(parts)
    lines = [judge.line(r, chosen, sizes) for r in runs]
    ours = runs[0]
    pairs = [judge.pair(ours, r, m) for m in chosen for r in runs if r is not ours]
    tests = standard_tests(parts.past) if stress is True else (stress or {})
    return Report(
        lines=lines,
        pairs=pairs,
        periods=_parts_in_time(runs, parts, chosen[0], block, draws, seed),
        stress=_stress(runs, parts, tests, chosen[0], draws, seed),
        metrics=[m.name for m in chosen],
        facts=_facts(parts, y, block),
    )


def _check(panel: Any, models: Any) -> None:
    if not isinstance(panel, (Panel, Split)):
        raise TypeError(
            f"panel: expected a Panel or a Split, got {type(panel).__name__}; make one: "
            f"pymeta.data.Panel(table, entity=..., time=..., target=...)"
        )
    if not isinstance(models, Mapping):
        raise TypeError(
            f"models: expected models by name, as in {{'ours': model}}, got {type(models).__name__}"
        )
    if not models:
        raise ValueError("models: expected one model or more, got none")


def _count(blocks: Array) -> int:
    return len(np.unique(blocks))


def _history_sizes(parts: Split) -> Array:
    """How many rows each query row's entity has in the history: [rows]."""
    labels, sizes = parts.history.entities, parts.history.sizes
    at = np.minimum(np.searchsorted(labels, parts.query.entities), len(labels) - 1)
    known = labels[at] == parts.query.entities
    return np.repeat(np.where(known, sizes[at], 0), parts.query.sizes)


def _facts(parts: Split, y: Array, block: int) -> dict[str, str]:
    """What a reader has to know of the split."""
    times = parts.query.times
    facts = {
        "train": repr(parts.train),
        "history": repr(parts.history),
        "query": repr(parts.query),
        "mean target of query": f"{float(y.mean()):.4g}",
    }
    facts = {name: text.removeprefix("Panel(").removesuffix(")") for name, text in facts.items()}
    if times is not None and (blocks := _count(time_blocks(times, block))) < _LEAST_BLOCKS:
        facts["intervals"] = (
            f"none over time: query has {counted(blocks, 'block')} of {block} distinct times, "
            f"{_LEAST_BLOCKS} are needed; a smaller block= makes more"
        )
    return facts
