"""Draws the README's figure, time per task against tasks in a call, from a run of the benchmark.

``python bench/figure.py bench/results/latest.json docs/tasks.png``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

TASKS = (1, 25, 256, 1024)
LINES = {  # label: colour, contestants of which the fastest is drawn
    "PyTorch, a loop over tasks": ("0.5", ("torch loop",)),
    "torch.func (vmap)": ("#d55e00", ("torch vmap",)),
    "JAX (jit of vmap)": ("#009e73", ("jax 1 thread", "jax all threads", "jax shard_map")),
    "pymeta": ("#0072b2", ("pymeta 1t", "pymeta 2t")),
}


def microseconds(cases: dict[str, dict], names: Sequence[str]) -> list[float]:
    """[len(TASKS)]: the time per task of the fastest of these contestants."""
    times = []
    for tasks in TASKS:
        found = cases[f"W1 T={tasks} K=1"]["contestants"]
        best = min(found[name]["median_s"] for name in names if "median_s" in found.get(name, {}))
        times.append(1e6 * best / tasks)
    return times


def main(source: str, figure: str) -> None:
    """Draw it."""
    cases = {case["case"]: case for case in json.loads(Path(source).read_text())["cases"]}
    mpl.use("Agg")
    canvas, axes = plt.subplots(figsize=(8.8, 4.84), layout="constrained")
    for label, (colour, names) in LINES.items():
        width = 3 if label == "pymeta" else 1.5
        times = microseconds(cases, names)
        axes.loglog(TASKS, times, color=colour, marker="o", linewidth=width, label=label)
    axes.set_title("One MAML step, exact second order (1-40-40-1)")
    axes.set_xlabel("tasks in a call")
    axes.set_ylabel("microseconds a task, Python included")
    axes.set_ylim(bottom=1)
    axes.set_xticks(TASKS, [f"{tasks:,}" for tasks in TASKS])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside right center", frameon=False)
    canvas.savefig(figure, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
