"""Draws time per task against tasks from a file of results: python docs/figures/tasks.py [JSON]

The default is bench/results/latest.json, one run on two quiet cores, whose tables are in
docs/benchmarks.md; `pymeta bench --plot` measures and draws the same on another machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "latest.json"
OUT = ROOT / "docs" / "tasks.png"
CASES = ("W1 T=1 K=1", "W1 T=25 K=1", "W1 T=256 K=1", "W1 T=1024 K=1")
LINES = {  # how a contestant's names begin: what it is called, and its colour
    "torch loop": ("PyTorch, a loop over tasks", "#7f7f7f"),
    "higher": ("higher, a loop over tasks", "#b9a3d0"),
    "torch vmap": ("torch.func (vmap)", "#d55e00"),
    "torch compiled": ("torch.compile", "#e69f00"),
    "jax": ("JAX (jit of vmap)", "#009e73"),
    "pymeta": ("pymeta", "#0072b2"),
}


def lines(content: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """{contestant: [(tasks, microseconds a task)]}, each the best of its variants."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in LINES}
    for row in content["cases"]:
        if row["case"] not in CASES:
            continue
        for name, points in found.items():
            times = [
                entry["median_s"]
                for variant, entry in row["contestants"].items()
                if variant.startswith(name) and "kernel" not in variant and "median_s" in entry
            ]
            if times:
                points.append((row["tasks"], 1e6 * min(times) / row["tasks"]))
    return {name: points for name, points in found.items() if points}


def main(source: Path = RESULTS, out: Path = OUT) -> None:
    """Read the results, write the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        drawn, axis = pyplot.subplots(figsize=(8, 4.4), layout="constrained")
        for name, points in lines(json.loads(source.read_text())).items():
            label, colour = LINES[name]
            width = 3 if name == "pymeta" else 1.6
            axis.plot(*zip(*points, strict=True), color=colour, lw=width, marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel="tasks in a call")
        axis.set_ylabel("microseconds a task, Python included")
        ticks = [int(case.split()[1].removeprefix("T=")) for case in CASES]
        axis.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axis.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.set_title("One MAML step, exact second order (1-40-40-1)", fontsize=11)
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        drawn.savefig(out, dpi=110)
        pyplot.close(drawn)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
