"""Fraud by pattern and by hour, on made transactions."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("lightgbm")

from pymeta.finance import Deployed, fraud, fraud_panel
from pymeta.finance.jobs.fraud import fraud_split


def transactions(patterns=10, frauds=40, rows=3000, seed=0) -> dict:
    """Frauds of each pattern lie in a direction of their own."""
    rng = np.random.default_rng(seed)
    centre = 3 * rng.normal(size=(patterns, 6))
    which = np.repeat(np.arange(patterns), frauds)
    x = np.concatenate(
        [rng.normal(size=(rows, 6)), centre[which] + rng.normal(size=(len(which), 6))]
    )
    y = np.r_[np.zeros(rows), np.ones(len(which))].astype(int)
    kind = np.r_[rng.integers(0, patterns, rows), which]
    order = rng.permutation(len(y))
    table = {f"V{i}": x[order, i] for i in range(6)}
    seconds = np.sort(rng.uniform(0, 20 * 3600, len(y)))
    return {"Time": seconds, **table, "Class": y[order], "true": kind[order]}


def test_clusters_are_patterns_and_hours_are_hours(tmp_path):
    table = transactions()
    panel = fraud_panel(table, {"pattern": "true"}, patterns=10)
    assert panel.features == tuple(f"V{i}" for i in range(6))
    true = np.array(table["true"])[panel.rows]
    for e in range(10):  # nearly all frauds of a cluster are of one pattern
        own = true[(panel.codes == e) & (panel.y == 1)]
        assert np.bincount(own.astype(int)).max() > 0.8 * len(own)
    hours = fraud_panel(table, by="hour")
    assert hours.entities.tolist() == list(range(20))
    assert (hours.labels == table["Time"][hours.rows] // 3600).all()
    assert len(fraud_panel(table, {"pattern": "true"}, by="pattern").entities) == 10
    x = np.stack([v for k, v in table.items() if k not in ("Class", "true")], axis=1)
    names = np.array(["Time", *(f"V{i}" for i in range(6))])
    np.savez(tmp_path / "t.npz", X=x, y=table["Class"], columns=names)
    again = fraud_panel(tmp_path / "t.npz", patterns=10)
    assert again.entities.tolist() == panel.entities.tolist() and (again.y == panel.y).all()


def test_a_split_labels_a_few_cases_and_hours_are_later():
    panel = fraud_panel(transactions(), patterns=10)
    parts = fraud_split(panel, by="cluster", shots=3, share=0.3, seed=0)
    assert len(parts.history.entities) == 3
    assert not np.isin(parts.history.entities, parts.train.entities).any()
    counts = np.bincount(parts.history.codes, parts.history.y)
    assert counts.tolist() == [3, 3, 3]
    assert len(parts.history) + len(parts.query) + len(parts.train) == len(panel)
    assert len(parts.past) == len(parts.train) + len(parts.history)
    hours = fraud_panel(transactions(), by="hour")
    parts = fraud_split(hours, by="hour", shots=3, share=0.4, seed=0)
    assert parts.train.entities.max() < parts.query.entities.min() == 12
    assert parts.history["order"].max() > parts.query["order"].min()  # of an hour before
    for e in range(8):
        mine = [p["order"][p.codes == e] for p in (parts.history, parts.query)]
        assert mine[0].max() < mine[1].min()


def test_what_cannot_be_read_is_refused():
    table = transactions(patterns=3, rows=50)
    with pytest.raises(ValueError, match="by: expected 'cluster', 'hour' or 'pattern', got 'day'"):
        fraud_panel(table, by="day")
    with pytest.raises(ValueError, match="expected a column for the pattern, None is none"):
        fraud_panel(table, by="pattern")
    with pytest.raises(ValueError, match="expected a column for the target, 'bad' is none"):
        fraud_panel(table, {"target": "bad"})


@pytest.mark.parametrize("by", ["cluster", "hour"])
def test_fraud_runs_and_is_deployed(by, tmp_path):
    table = transactions()
    found = fraud(table, by=by, patterns=10, quick=True, base="linear", budget=0.02)
    verdicts = found.report.verdicts
    assert verdicts["pooled linear", "average precision"] != "lose"
    assert "precision at 2 %" in found.report.metrics
    if by == "cluster":
        assert verdicts["adapted, unadapted", "average precision"] != "lose"
        value = {li.name: li.scores[0].pooled for li in found.report.lines}
        assert value["adapted"] > value["adapted, unadapted"]
    found.save(tmp_path)
    panel = fraud_panel(table, by=by, patterns=10)
    p = Deployed.load(tmp_path).predict(panel, panel)
    assert p[panel.y == 1].mean() > 0.3 + p[panel.y == 0].mean()
