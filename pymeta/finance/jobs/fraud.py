"""Fraud: a new pattern, or a new hour, of which a few cases are labelled.

A pattern is a cluster of frauds (k-means on the features), or a column of the table; legitimate
rows are dealt to patterns at random, since they belong to none. Of a held-out pattern, `shots`
cases and a share of its legitimate rows are labelled; all other rows are to be found. Hours are
tested later than all training hours, on their second half given their first. The question is put
as a review team has it: what is among the rows that it has time to look at?
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pymeta.data import Panel
from pymeta.data.optional import need
from pymeta.data.table import read_table
from pymeta.finance.remainder import Remainder
from pymeta.finance.result import Result, Say, compared, deployed, result, silent
from pymeta.finance.walk import stacked
from pymeta.metrics import Split, precision_at
from pymeta.tasks.groups import Array

_LEGITIMATE = 0.2  # the share of a held-out pattern's legitimate rows that is labelled
_HOUR = 3600
_NEW = ("score", "linear")  # of a new pattern, whatever the pooled model knew before it


def fraud_panel(
    data: Any,
    columns: Mapping[str, str] | None = None,
    *,
    by: str = "cluster",
    patterns: int = 15,
    seed: int = 0,
) -> Panel:
    """Rows with their pattern or their hour as the entity.

    Args:
        data: an .npz with `X` [rows, features], `y` and `columns`; or a table, or its path.
        columns: {"target": ..., "time": ..., "pattern": ...}; {"target": "Class", "time": "Time"}
            are taken where there are such columns, and all others are features.
        by: "cluster" for clusters of frauds; "hour" for hours, of times in seconds or datetimes;
            "pattern" for the column that `columns` names.
        patterns: how many clusters.
        seed: of the clusters and of how legitimate rows are dealt.

    Raises:
        ValueError: an argument is not as described, or a column is missing.
    """
    table, named = _read(data), {"target": "Class", "time": "Time", **(columns or {})}
    if by not in ("cluster", "hour", "pattern"):
        raise ValueError(f"by: expected 'cluster', 'hour' or 'pattern', got {by!r}")
    wanted = ["target", *{"hour": ["time"], "pattern": ["pattern"]}.get(by, [])]
    for role in wanted:
        if named.get(role) not in table:
            raise ValueError(
                f"columns: expected a column for the {role}, {named.get(role)!r} is none"
            )
    used = {named.get(role) for role in ("target", "time", "pattern")}
    features = [c for c in table if c not in used and table[c].dtype.kind in "fiub"]
    y = table[named["target"]].astype(int)
    if by == "hour":
        entity = _hours(table[named["time"]])
    elif by == "pattern":
        entity = table[named["pattern"]].astype(str)
    else:
        x = np.stack([table[c].astype(np.float64) for c in features], axis=1)
        entity = _clusters(x, y, patterns, seed)
    columns_ = {c: table[c].astype(np.float64) for c in features}
    own = {"pattern": entity, "fraud": y, "order": np.arange(len(y), dtype=np.float64)}
    if named["time"] in table:
        own["order"] = np.argsort(np.argsort(table[named["time"]], kind="stable")) * 1.0
    return Panel({**own, **columns_}, entity="pattern", target="fraud", numeric=features)


def _read(data: Any) -> dict[str, Array]:
    if isinstance(data, (str, os.PathLike)) and os.fspath(data).endswith(".npz"):
        with np.load(data, allow_pickle=False) as file:
            names = [str(c) for c in file["columns"]]
            return {**dict(zip(names, file["X"].T, strict=True)), "Class": file["y"]}
    return dict(read_table(data))


def _hours(times: Array) -> Array:
    if times.dtype.kind == "M":
        return np.asarray(times.astype("datetime64[h]").astype(np.int64))
    return np.asarray(times.astype(np.float64) // _HOUR).astype(np.int64)


def _clusters(x: Array, y: Array, patterns: int, seed: int) -> Array:
    """A pattern for each row: a fraud's cluster, and any for a legitimate one."""
    cluster = need("sklearn.cluster", "by='cluster'", "finance")
    scaled = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    fit = cluster.KMeans(patterns, n_init=5, random_state=seed).fit_predict(scaled[y == 1])
    entity = np.random.default_rng(seed).integers(0, patterns, len(y))
    entity[y == 1] = fit
    return entity


def fraud_split(panel: Panel, *, by: str, shots: int, share: float, seed: int) -> Split:
    """What is known and what is to be found.

    Args:
        panel: of `fraud_panel`.
        by: as there.
        shots: frauds of a held-out pattern that are labelled; patterns with fewer than twice as
            many are not tested.
        share: of the patterns, which are held out; of the hours, the last ones.
        seed: which patterns, and which of their cases.
    """
    if by == "hour":
        cut = np.sort(panel.entities)[round((1 - share) * len(panel.entities))]
        train, later = panel.where(panel.labels < cut), panel.where(panel.labels >= cut)
        middle = [np.median(later["order"][a:b]) for a, b in _spans(later)]
        known = later["order"] <= np.repeat(middle, later.sizes)
        history, query = later.where(known), later.where(~known)
    else:
        rng = np.random.default_rng(seed)
        frauds = np.bincount(panel.codes, panel.need_y())
        order = rng.permutation(panel.entities[frauds >= 2 * shots])
        held = order[: max(round(share * len(panel.entities)), 2)]
        inside = np.isin(panel.labels, held)
        train, later = panel.where(~inside), panel.where(inside)
        history, query = _some(later, shots, rng)
    return Split(train, history, query, stacked(train, history))


def _spans(panel: Panel) -> list[tuple[int, int]]:
    return list(zip(panel.offsets[:-1].tolist(), panel.offsets[1:].tolist(), strict=True))


def _some(panel: Panel, shots: int, rng: np.random.Generator) -> tuple[Panel, Panel]:
    """`shots` frauds and a share of the legitimate rows of each entity, and the rest."""
    y, known = panel.need_y() == 1, rng.random(len(panel)) < _LEGITIMATE
    known &= ~y
    for a, b in _spans(panel):
        known[a + rng.permutation(np.flatnonzero(y[a:b]))[:shots]] = True
    return panel.where(known), panel.where(~known)


def fraud(
    data: Any,
    *,
    columns: Mapping[str, str] | None = None,
    by: str = "cluster",
    patterns: int = 15,
    shots: int = 5,
    budget: float = 0.01,
    base: str = "linear",
    share: float = 0.4,
    seeds: int = 3,
    quick: bool = False,
    say: Say = silent,
) -> Result:
    """Compare on held-out patterns or later hours, and train a model for deployment.

    Args:
        data: transactions: an .npz with `X`, `y` and `columns`, or a table, or its path.
        columns: {"target": ..., "time": ..., "pattern": ...}, as in `fraud_panel`.
        by: what a pattern is: "cluster", "hour" or "pattern", as in `fraud_panel`.
        patterns: how many clusters.
        shots: how many frauds of a new pattern are labelled.
        budget: the share of rows that are reviewed.
        base: the pooled model: "linear", "lightgbm" or "blend".
        share: the share of patterns that is held out (of hours, the last ones).
        seeds: how many runs, each with other patterns held out and other starts.
        quick: use one seed and fewer training steps, to see it run.
        say: is told of progress.

    Returns:
        The `Result`. "pooled linear" and "LightGBM" are fitted again with the labelled cases of the
        new pattern among their rows; "linear by entity" is a logistic regression of these alone.

    Raises:
        ImportError: a package of the extra `finance` is missing.
        TypeError, ValueError: an argument is not as described.
    """
    panel = fraud_panel(data, columns, by=by, patterns=patterns)
    usual = int(np.median(panel.sizes))
    support = max(min(round(0.3 * usual), 400), 2 * shots)

    def ours(seed: int) -> Remainder:
        return Remainder(
            base=base,
            forms=("pooled", *_NEW) if by == "hour" else _NEW,
            precision=2.0,
            support=(support // 2, support),
            query=(20, max(min(usual // 3, 300), 20)),
            split="rows",
            steps=30 if quick else 150,
            tasks=16,
            seed=seed,
        )

    found, last = compared(
        lambda seed: fraud_split(panel, by=by, shots=shots, share=share, seed=seed),
        lambda seed: {"adapted": ours(seed)},
        seeds=1 if quick else seeds,
        say=say,
        metrics=["average_precision", precision_at(budget), "auc", "log_loss"],
        stress=False,
        draws=200 if quick else 1000,
    )
    chosen = last["adapted"]
    settings = {"by": by, "shots": shots, "budget": budget, "base": base, "seeds": len(found)}
    settings |= {"form": chosen.form, "losses": chosen.losses}
    return result("fraud", found, lambda: deployed(ours(0), panel), say, settings)
