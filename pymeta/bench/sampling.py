"""What drawing a meta-batch costs beside a training step: `python -m pymeta.bench.sampling`.

64 tasks of 60 rows (24 features) are drawn of a panel of 1,000 entities, of a time order or not, of
fixed sizes or not, and given to a native MAML step of 24-64-64-1 (5 inner steps, second order,
binary cross-entropy): the call, `backward`, and Adam. Drawing and step take turns; medians of both
and their ratio. Before the clock starts every batch's rows are looked up in the panel one by one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

TASKS, SUPPORT, QUERY, FEATURES, STEPS = 64, 30, 30, 24, 5
ROWS: dict[str, dict[str, Any]] = {
    "by time": {"split": "time", "support": SUPPORT, "query": QUERY},
    "at random": {"split": "rows", "support": SUPPORT, "query": QUERY},
    "at random, balanced": {
        "split": "rows",
        "support": SUPPORT,
        "query": QUERY,
        "balanced": True,
    },
    "by time, ragged": {"split": "time", "support": (10, 50), "query": (10, 50)},
    "at random, ragged": {"split": "rows", "support": (10, 50), "query": (10, 50)},
}


def make_panel(entities: int = 1000) -> Any:
    """A panel with entities of 100 to 1,000 rows."""
    from pymeta.data import Panel

    rng = np.random.default_rng(0)
    e = np.repeat(np.arange(entities), rng.integers(100, 1000, entities))
    x = rng.standard_normal((len(e), FEATURES)).astype(np.float32)
    data = {"e": e, "t": np.arange(len(e)), "y": rng.integers(0, 2, len(e))}
    return Panel(data, entity="e", time="t", target="y", numeric=[]).with_features(x)


def check(panel: Any, batch: Any) -> None:
    """AssertionError unless each task's rows are the panel's, of its entity, none twice."""
    sides = (
        (batch.xs, batch.ys, batch.support_rows, batch.support_sizes),
        (batch.xq, batch.yq, batch.query_rows, batch.query_sizes),
    )
    for x, y, rows, sizes in sides:
        ends = np.cumsum(sizes)
        for t in range(TASKS):
            own = rows[ends[t] - sizes[t] : ends[t]]
            assert np.array_equal(np.asarray(x[t]), panel.x[own])
            assert np.array_equal(np.asarray(y[t]), panel.y[own])
            assert (panel.labels[own] == batch.entities[t]).all() and len(set(own)) == len(own)


def measure(panel: Any, options: dict[str, Any], rounds: int) -> dict[str, float]:
    """Medians of a draw and of a training step, in microseconds, and their ratio."""
    import torch

    import pymeta

    torch.manual_seed(0)
    layers = [torch.nn.Linear(FEATURES, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)]
    network = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(64, 1))
    maml = pymeta.MAML(network, loss="bce_with_logits", lr=0.1, steps=STEPS, backend="native")
    adam = torch.optim.Adam(maml.parameters(), 1e-3)
    episodes = panel.episodes(tasks=TASKS, seed=0, **options)
    rng = np.random.default_rng(0)
    check(panel, episodes.sample(rng))
    draws, steps = [], []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        batch = episodes.sample(rng)
        drawn = time.perf_counter()
        adam.zero_grad()
        maml(*batch).loss.backward()
        adam.step()
        draws.append(drawn - start)
        steps.append(time.perf_counter() - drawn)
    draw, step = (1e6 * statistics.median(v[3:]) for v in (draws, steps))
    return {"draw_us": draw, "step_us": step, "share": draw / step}


def main() -> None:
    """Measure all rows and write them."""
    parser = argparse.ArgumentParser(prog="python -m pymeta.bench.sampling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("pymeta-sampling.json"), metavar="FILE")
    options = parser.parse_args()

    from pymeta.bench import report

    panel = make_panel()
    rows = {name: measure(panel, how, options.rounds) for name, how in ROWS.items()}
    head = ["rows", "draw, us", "step, us", "draw / step"]
    body = [
        [n, f"{r['draw_us']:.0f}", f"{r['step_us']:.0f}", f"{r['share']:.1%}"]
        for n, r in rows.items()
    ]
    report.write_one(options.out, "Drawing a meta-batch", __doc__, head, body, rows)


if __name__ == "__main__":
    main()
