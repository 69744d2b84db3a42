"""A hundred thousand fine-tuned models: `python -m pymeta.bench.many`.

Tasks of W5's kind (24-64-64-1 ReLU, 50 rows, 20 epochs of full-batch Adam) through
`FineTune.stream`, 1,000 at a time, whose results are dropped once looked at; and through one call,
which returns them all. Each run has a process of its own, with the allocator as it comes, on all
cores; its peak resident memory is the kernel's count (VmHWM), and next to it stands what was
resident before the first task, with torch loaded and the data in place.

The data are W5's thousand tasks, over and over. So every run can be checked: the first thousand
results are compared with float64 as in `python -m pymeta.bench`, and all later ones must be equal
to them bit by bit, wherever in the stream they stand. The checks are not in the time.

Writes pymeta-many.{md,json} in the current folder, or what `--out` says. Needs Linux and torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pymeta.bench.cases import CASES, Data

CASE = CASES["W5 fine-tuning T=1000 K=20"]
RUNS = (("stream", 1_000), ("stream", 10_000), ("stream", 100_000), ("call", 100_000))
MODEL_BYTES = 4 * sum(i * o + o for i, o in CASE.layers)


def memory(field: str) -> int:
    """A size in bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def forget_peak() -> None:
    """Have VmHWM begin anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


class Answers:
    """Keeps the first thousand results, and holds all others against them."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.first: list[Any] | None = None

    def look(self, models: Any) -> None:
        """The results of the next thousands of tasks; AssertionError where they are not equal."""
        stacked = list(models.parameters.values())
        for start in range(0, len(models), CASE.tasks):
            part = [p[start : start + CASE.tasks] for p in stacked]
            if self.first is None:
                self.first = [p.clone() for p in part]
            for p, q in zip(part, self.first, strict=True):
                assert p.equal(q), f"tasks from {start} on are not as the first ones"

    def save(self, path: Path) -> None:
        """Write the first thousand, for the parent to compare."""
        assert self.first is not None
        np.savez(path, *(p.numpy() for p in self.first))


def child(form: str, tasks: int, folder: Path) -> dict[str, Any]:
    """One run: seconds in pymeta, and bytes resident before and at most."""
    import torch

    import pymeta
    from pymeta.bench import ours
    from pymeta.bench.torch_rivals import make_model

    torch.set_num_threads(1)  # pymeta has its own threads
    data = Data.load(folder / "data.npz")
    tune = pymeta.FineTune(
        make_model(CASE, data),
        loss=CASE.loss,
        optimizer=ours.inner_optimizer(CASE),
        epochs=CASE.steps,
        backend="native",
    )
    xs, ys = torch.from_numpy(data.xs), torch.from_numpy(data.ys)
    answers = Answers()
    peak = ours.peak(0.2)

    def single() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return itertools.islice(itertools.cycle(zip(xs, ys, strict=True)), tasks)

    if form == "call":
        rounds = tasks // CASE.tasks
        xs, ys = xs.repeat(rounds, 1, 1), ys.repeat(rounds, 1, 1)
    forget_peak()
    before = memory("VmRSS")
    start = time.perf_counter()
    if form == "call":
        models = tune(xs, ys, progress=False)
        seconds = time.perf_counter() - start
        highest = memory("VmHWM")
        answers.look(models)
    else:
        stream, seconds, seen = iter(tune.stream(single(), chunk=CASE.tasks)), 0.0, 0
        while True:
            start = time.perf_counter()
            models = next(stream, None)
            seconds += time.perf_counter() - start
            if models is None:
                break
            seen += len(models)
            answers.look(models)
            del models
        assert seen == tasks, f"{seen} models of {tasks} tasks"
        highest = memory("VmHWM")
    answers.save(folder / "first.npz")
    found = {"form": form, "tasks": tasks, "seconds": seconds, "before": before, "peak": highest}
    return {**found, "threads": pymeta.num_threads(), "fma_peak": peak}


def write(path: Path, rows: list[dict[str, Any]], error: float) -> str:
    """Write `path`.json and `path`.md; the latter's text."""
    from pymeta.bench import report

    machine = report.machine()
    lines = []
    for row in rows:
        rate = row["tasks"] / row["seconds"]
        share = rate * CASE.flops() / (row["threads"] * row["fma_peak"])
        grown = (row["peak"] - row["before"]) / 2**20
        lines.append([
            "`FineTune.stream`" if row["form"] == "stream" else "one call",
            f"{row['tasks']:,}", f"{row['seconds']:.2f}", f"{rate:,.0f}", f"{share:.0%}",
            f"{row['before'] / 2**20:.0f}", f"{row['peak'] / 2**20:.0f}", f"{grown:.0f}",
            f"{2**20 * grown / row['tasks']:,.0f}",
        ])  # fmt: skip
    head = ["", "tasks", "s", "tasks/s", "of all cores' FMA peaks", "MiB before", "MiB at most",
            "MiB more", "bytes more per task"]  # fmt: skip
    text = f"""# Many tasks

{machine["cpu"]}, {rows[0]["threads"]} threads. {CASE.flops() / 1e6:.1f} MFLOP a task; a model takes
{MODEL_BYTES:,} bytes, a task's data {4 * CASE.support * (CASE.sizes[0] + 1):,}. The first results
are within {error:.2g} tolerances of float64, all others equal to them bit by bit.

{report.table(head, lines)}
"""
    path.with_suffix(".md").write_text(text)
    result = {"machine": machine, "flops_per_task": CASE.flops(), "error": error, "runs": rows}
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return text


def main() -> None:
    """Run all of `RUNS`, each in a process, or be one of these."""
    parser = argparse.ArgumentParser(prog="python -m pymeta.bench.many", description=__doc__)
    parser.add_argument("--most", type=int, default=100_000, help="leave larger runs out")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("pymeta-many.json"),
        metavar="FILE",
        help="Markdown goes beside it",
    )
    parser.add_argument("--child", nargs=3, metavar=("FORM", "TASKS", "FOLDER"), help="internal")
    options = parser.parse_args()
    if options.child:
        form, tasks, folder = options.child
        print(json.dumps(child(form, int(tasks), Path(folder))))
        return

    import torch

    from pymeta.bench import verify

    torch.set_num_threads(1)
    data = verify.make_data(CASE)
    reference = verify.make_reference(CASE, data)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows, errors = [], []
    with tempfile.TemporaryDirectory() as folder:
        data.save(Path(folder) / "data.npz")
        for form, tasks in RUNS:
            if tasks > options.most:
                continue
            done = subprocess.run(
                [sys.executable, "-m", "pymeta.bench.many", "--child", form, str(tasks), folder],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            with np.load(Path(folder) / "first.npz") as stored:
                first = [stored[key] for key in stored.files]
            errors.append(verify.check(CASE, reference, f"pymeta {form}", None, first))
            print(rows[-1], file=sys.stderr, flush=True)
    print(write(options.out, rows, max(errors)))


if __name__ == "__main__":
    main()
