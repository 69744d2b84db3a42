"""Runs the benchmark: `python -m bench [--cases W1 "W2 no BN"] [--without higher] [--quick]`.

Every contestant has its process (`bench/worker.py`). For each case: everyone prepares (compiles),
everyone's loss and gradients are checked against float64, and only then rounds of timing begin,
in which everyone has a turn, so that a slow moment of the machine hits all of them alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import report, verify
from bench.cases import CASES, Case
from bench.worker import CONTESTANTS, environment

RESULTS = Path(__file__).parent / "results"
SLOW = 0.5  # seconds: calls slower than this get three rounds only


class Worker:
    """A contestant's process."""

    def __init__(self, name: str, log: Any) -> None:
        """Start it; it imports its library at the first request."""
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(name),
            cwd=Path(__file__).parents[1],
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer; {"error": ...} where the process is gone."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"error": "the process ended"}

    def close(self) -> None:
        """End it."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def say(text: str) -> None:
    """Tell the terminal; standard output is for the table."""
    print(text, file=sys.stderr, flush=True)


def prepare(case: Case, workers: list[Worker]) -> dict[str, dict[str, Any]]:
    """Everyone prepares the case and is checked: {variant: its row, not yet timed}."""
    data = verify.make_data(case)
    reference = verify.make_reference(case, data)
    entries: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        data.save(path)
        for worker in workers:
            answer = worker.ask(do="prepare", case=case.name, data=str(path), folder=folder)
            if "error" in answer:
                say(f"  {worker.name}: {answer['error']}")
                entries[worker.name] = {"error": answer["error"]}
                continue
            for variant, found in answer["variants"].items():
                with np.load(found.pop("gradients")) as stored:
                    gradients = [stored[key] for key in stored.files]
                try:
                    found["error_in_tolerances"] = verify.check(
                        case, reference, variant, found["loss"], gradients
                    )
                except AssertionError as wrong:
                    say(f"  WRONG {wrong}")
                    found = {"error": str(wrong)}
                entries[variant] = {**found, "worker": worker.name}
    return entries


def measure(case: Case, workers: list[Worker], rounds: int, seconds: float) -> dict[str, Any]:
    """Prepare, check and time one case; its row of the results."""
    entries = prepare(case, workers)
    named = {w.name: w for w in workers}
    right = {variant: e for variant, e in entries.items() if "error" not in e}
    medians: dict[str, list[float]] = {variant: [] for variant in right}
    least = dict.fromkeys(right, float("inf"))
    peaks = []
    for turn in range(rounds):
        if "pymeta" in named:
            peaks.append(named["pymeta"].ask(do="peak", seconds=0.05).get("flops", 0.0))
        for variant, entry in right.items():
            if turn >= 3 and min(medians[variant]) > SLOW:
                continue
            answer = named[entry["worker"]].ask(do="time", variant=variant, seconds=seconds)
            medians[variant].append(float(np.median(answer["times"])))
            least[variant] = min(least[variant], *answer["times"])
            time.sleep(0.01)  # thread pools that spin after their work come to rest
    for variant, entry in right.items():
        entry["median_s"] = float(np.median(medians[variant]))
        entry["min_s"] = least[variant]
    peak = max(peaks, default=0.0) or None
    return {
        "case": case.name,
        "tasks": case.tasks,
        "flops_per_task": case.flops(),
        "fma_peak": peak,
        "tolerance": verify.tolerance(case),
        "contestants": entries,
    }


def choose(patterns: list[str] | None) -> list[Case]:
    """The cases whose names begin with one of the patterns."""
    chosen = [c for c in CASES.values() if not patterns or c.name.startswith(tuple(patterns))]
    if not chosen:
        sys.exit(f"no case begins with {patterns}; there are: {', '.join(CASES)}")
    return chosen


def main() -> None:
    """Run the cases asked for, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", help="cases whose names begin so; default all")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="contestants; default all")
    parser.add_argument("--without", nargs="+", choices=CONTESTANTS, default=[])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.15, help="of each turn")
    parser.add_argument(
        "--quick", action="store_true", help="three short rounds, no compilers' minutes"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "latest", help="without suffix")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 3, 0.05
        options.without = [*options.without, "torch compiled", "torch loop", "higher"]
    names = [n for n in options.only or CONTESTANTS if n not in options.without]
    options.out.parent.mkdir(parents=True, exist_ok=True)

    # The reference is no contestant; on one thread it waits for nobody's busy core.
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with open(options.out.parent / "workers.log", "w") as log:
        workers = [Worker(name, log) for name in names]
        try:
            for case in choose(options.cases):
                start = time.perf_counter()
                rows.append(measure(case, workers, options.rounds, options.seconds))
                say(f"{report.line(rows[-1])}   ({time.perf_counter() - start:.0f} s)")
                report.write(options.out, rows)  # after each case: a long run can be stopped
        finally:
            for worker in workers:
                worker.close()
    print((options.out.with_suffix(".md")).read_text())
    if any(
        "error_in_tolerances" not in e and "allowed" in e.get("error", "")
        for row in rows
        for e in row["contestants"].values()
    ):
        sys.exit("a contestant's answer was wrong, see above")


if __name__ == "__main__":
    main()
