"""The same comparison with several seeds, as one report.

Seeds choose other tested entities and other starts of training. Most rows are those of the other
seeds, too, so that the mean over seeds knows little more than each of them: an interval here is the
mean of the seeds' intervals, and no narrower for their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pymeta.metrics.bootstrap import Interval
from pymeta.metrics.report import Line, Pair, Part, Report
from pymeta.metrics.tables import Score


def mean_report(reports: Sequence[Report]) -> Report:
    """The mean of reports on the same models and metrics, each figure and each end of an interval.

    Args:
        reports: of `compare`, with one seed each.

    Raises:
        ValueError: there are none, or they are not of the same models and metrics.
    """
    if not reports:
        raise ValueError("reports: expected one or more, got none")
    first = reports[0]
    named = [([line.name for line in r.lines], r.metrics) for r in reports]
    if any(n != named[0] for n in named):
        raise ValueError("reports: expected the same models and metrics in all of them")
    if len(reports) == 1:
        return first
    facts = {f"seed {i}, {k}": v for i, r in enumerate(reports) for k, v in r.facts.items()}
    return Report(
        lines=[_line([r.lines[i] for r in reports]) for i in range(len(first.lines))],
        pairs=[_pair([r.pairs[i] for r in reports]) for i in range(len(first.pairs))],
        periods=_parts([r.periods for r in reports]),
        stress=_parts([r.stress for r in reports]),
        metrics=first.metrics,
        facts={"seeds": f"{len(reports)}, whose figures and intervals are averaged", **facts},
    )


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if np.isfinite(v)]
    return float(np.mean(known)) if known else float("nan")


def _interval(intervals: Sequence[Interval | None]) -> Interval | None:
    if any(i is None for i in intervals):
        return None
    return Interval(*(float(np.mean(ends)) for ends in zip(*intervals, strict=True)))


def _shared(dicts: Sequence[dict[str, Any]], mean: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """The mean by name, of the names that all have."""
    return {k: mean([d[k] for d in dicts]) for k in dicts[0] if all(k in d for d in dicts)}


def _score(scores: Sequence[Score]) -> Score:
    return Score(
        scores[0].metric,
        _mean([s.pooled for s in scores]),
        _mean([s.macro for s in scores]),
        round(_mean([s.entities for s in scores])),
        _shared([s.by_size for s in scores], _mean),
        _shared([s.counts for s in scores], lambda n: round(_mean(n))),
    )


def _line(lines: Sequence[Line]) -> Line:
    first = lines[0]
    many = range(len(first.scores))
    return Line(
        first.name,
        first.is_ours,
        [_score([li.scores[m] for li in lines]) for m in many],
        [_interval([li.intervals[m] for li in lines]) for m in many],
        _mean([li.fit for li in lines]),
        _mean([li.predict for li in lines]),
    )


def _pair(pairs: Sequence[Pair]) -> Pair:
    first = pairs[0]
    return Pair(
        first.ours,
        first.theirs,
        first.metric,
        first.larger_is_better,
        (_mean([p.values[0] for p in pairs]), _mean([p.values[1] for p in pairs])),
        _shared([p.gaps for p in pairs], _interval),
        _shared([p.groups for p in pairs], lambda n: round(_mean(n))),
    )


def _parts(runs: Sequence[list[Part]]) -> list[Part]:
    """Of parts that all runs have."""
    by_name = [{p.name: p for p in parts} for parts in runs]
    return [
        Part(
            name,
            round(_mean([p.rows for p in parts])),
            _shared([p.values for p in parts], _mean),
            _shared([p.gaps for p in parts], _interval),
        )
        for name, parts in _shared(by_name, list).items()
    ]
