"""Implicit MAML against unrolled second order, by the number of inner steps.

The processor's time of a call and its backward, on one thread, and the working memory of a thread
in the inner loop: the implicit gradient keeps no step, so that its memory is flat and only the way
forward grows. Before the clock starts, the implicit gradient is compared with that of the torch
backend in float64.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pymeta.bench.operator import SHAPES, TOLERANCE, Ways

CASES = ("sinusoids, 256 tasks", "segments, 1,000 tasks, 5 steps")
UNROLLED, IMPLICIT_STEPS = (8, 16, 32, 64), (16, 64)
STRENGTH, CG_STEPS = 5.0, 5


def _learner(ways: Ways, steps: int, implicit: bool, backend: str = "native") -> Any:
    import pymeta

    pull: dict[str, Any] = {"anchor": STRENGTH}
    if implicit:
        pull = {"implicit": pymeta.Implicit(STRENGTH, CG_STEPS, tolerance=0.0)}
    return pymeta.MAML(ways.network, loss="mse", lr=0.01, steps=steps, backend=backend, **pull)


def _run(maml: Any, ways: Ways) -> Callable[[], None]:
    def run() -> None:
        for p in maml.parameters():
            p.grad = None
        maml(ways.xs, ways.ys, ways.xq, ways.yq).loss.backward()

    return run


def _check(ways: Ways) -> float:
    """The largest relative error of the implicit gradient; AssertionError beyond the tolerance."""
    few = copy.copy(ways)
    for name in ("xs", "ys", "xq", "yq"):
        setattr(few, name, getattr(ways, name)[:16])
    exact, worst = few.in_doubles(), 0.0
    pair = _learner(few, 16, True), _learner(exact, 16, True, "torch")
    for maml, data in zip(pair, (few, exact), strict=True):
        _run(maml, data)()
    for p, q in zip(*(m.parameters() for m in pair), strict=True):
        error = float((p.grad.double() - q.grad).abs().max() / q.grad.abs().max())
        assert error <= TOLERANCE, f"implicit: off by {error:.1e}"
        worst = max(worst, error)
    return worst


def _workspace(maml: Any, ways: Ways, steps: int, implicit: bool) -> int:
    """Bytes of working memory of a thread: of the whole sweep, or of the one step gone back to."""
    from pymeta import native

    plan = maml._plan
    schedule = native.extension().Schedule(steps=1 if implicit else steps)
    s = ways.shape
    found = plan.problem.plan(
        4, "meta", schedule, s.tasks, s.support, s.query, second_order=True
    )  # fmt: skip
    return int(found["workspace_bytes"])


def curve(seconds: float) -> tuple[dict[str, Any], list[list[str]]]:
    """The rows of all cases, and as lines of a table."""
    rows: dict[str, Any] = {}
    lines = []
    for case in CASES:
        ways = Ways(SHAPES[case])
        error = _check(ways)
        kinds = [(k, False) for k in UNROLLED] + [(k, True) for k in IMPLICIT_STEPS]
        mamls = {kind: _learner(ways, *kind) for kind in kinds}
        runs = {kind: _run(maml, ways) for kind, maml in mamls.items()}
        times: dict[Any, list[float]] = {kind: [] for kind in kinds}
        for run in runs.values():
            run()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[kinds[0]]) < 3:
            for kind, run in runs.items():
                start = time.process_time()
                run()
                times[kind].append(time.process_time() - start)
        base = float(np.quantile(times[16, True], 0.1))
        name = case.split(", 5")[0]
        for kind in kinds:
            us = float(np.quantile(times[kind], 0.1))
            work = _workspace(mamls[kind], ways, *kind)
            what = f"implicit, {CG_STEPS} CG steps" if kind[1] else "unrolled"
            rows[f"{name}, {what}, {kind[0]} steps"] = {"us": 1e6 * us, "workspace_bytes": work}
            lines.append([
                name, what, str(kind[0]), f"{1e6 * us:.0f}", f"{us / base:.2f}", str(work),
                f"{error:.0e}" if kind[1] else "",
            ])  # fmt: skip
        print(f"{name}: {1e6 * base:.0f} us", flush=True)
    return rows, lines


def write(out: Path, seconds: float) -> None:
    """Measure, and write the table beside the operator's."""
    from pymeta.bench import report

    rows, lines = curve(seconds)
    head = ["case, one thread", "gradient", "inner steps", "us", "of implicit at 16",
            "workspace, bytes", "error"]  # fmt: skip
    report.write_one(
        out.with_name(f"{out.stem}-implicit.json"), "Implicit gradients", __doc__, head, lines, rows
    )
