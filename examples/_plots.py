"""What demo.py shows, its table and its figure; and the figure of reptile_sine.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _common import Batch, mean_interval
from _starts import STEPS, Scores
from numpy.typing import NDArray

WAYS = 3
Fits = dict[str, tuple[Any, Any]]
MAML, PRETRAINED, SCRATCH = "MAML", "pre-trained, fine-tuned", "from scratch"


@dataclass
class Curves:
    """A few held-out sinusoids and what the networks make of their ten points."""

    x: NDArray[np.float64]  # [points]
    truth: NDArray[np.float64]  # [tasks, points]
    support: Batch
    fits: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # label -> [tasks, points]


def table(results: dict[str, Scores]) -> str:
    """One table: mean and 95 % confidence interval for each problem, method and number of steps."""
    heads = ["before" if k == 0 else f"{k} step{'s' * (k > 1)}" for k in STEPS]
    lines = [f"{'':28}" + "".join(f"{head:>15}" for head in heads)]
    for problem, methods in results.items():
        d = 2 if "error" in problem else 1
        lines += ["", problem]
        for method, scores in methods.items():
            cells = ["{:.{d}f} ± {:.{d}f}".format(*mean_interval(scores[k]), d=d) for k in STEPS]
            lines.append(f"  {method:26}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


NOTE = """Mean and 95 % confidence interval over held-out tasks. Every entry has the step size
that was best for it on other tasks, of the training classes."""
COLORS = {MAML: "#0072b2", PRETRAINED: "#d55e00", SCRATCH: "#7f7f7f"}


def figure(results: dict[str, Scores], shown: Curves, path: Path) -> None:
    """Above, adapted sinusoids; below, every column of the table against the number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with pyplot.rc_context(style):
        drawn, axes = pyplot.subplots(2, 3, figsize=(13, 8), layout="constrained")
        drawn.get_layout_engine().set(w_pad=0.1, h_pad=0.12)
        for task, axis in enumerate(axes[0]):
            draw_curves(axis, shown, task)
        axes[0, 0].set_ylabel("y")
        drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
        for axis, (problem, methods) in zip(axes[1], results.items(), strict=True):
            draw_scores(axis, problem, methods)
        axes[1, 1].legend(loc="lower right", bbox_to_anchor=(1.0, 0.12))
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=150)
        pyplot.close(drawn)


def draw_curves(axis, shown: Curves, task: int) -> None:
    """One held-out sinusoid: the truth, its ten points, and the fits."""
    axis.plot(shown.x, shown.truth[task], color="black", lw=3, alpha=0.18, label="truth")
    looks = {
        "MAML before": {"color": COLORS[MAML], "ls": ":", "lw": 1.2},
        "MAML, 1 step": {"color": "#56b4e9", "ls": "--", "lw": 1.6},
        "MAML, 10 steps": {"color": COLORS[MAML], "ls": "-", "lw": 2.0},
        "pre-trained, 10 steps": {"color": COLORS[PRETRAINED], "ls": "-", "lw": 1.4},
    }
    for label, look in looks.items():
        axis.plot(shown.x, shown.fits[label][task], label=label, **look)
    x, y = shown.support.xs[task, :, 0], shown.support.ys[task, :, 0]
    axis.plot(x, y, "o", color="black", ms=5, label="the ten points", zorder=5)
    axis.set(xlabel="x", xlim=(-5, 5), title=f"held-out sinusoid {task + 1}")


def draw_scores(axis, problem: str, methods: Scores) -> None:
    """Mean and confidence interval against the number of inner steps."""
    for method, scores in methods.items():
        means, halves = np.transpose([mean_interval(scores[k]) for k in STEPS])
        axis.errorbar(
            STEPS, means, halves, label=method, color=COLORS[method], marker="o", ms=4, capsize=3
        )
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xticks(STEPS, [str(k) for k in STEPS])
    axis.minorticks_off()
    title, unit = problem.split(": ")
    axis.set(title=title, ylabel=unit, xlabel="steps of gradient descent on the new task")
    axis.grid(axis="y", alpha=0.25)
    if "error" in problem:
        axis.set_ylim(0, None)
    else:
        axis.set_ylim(25, 100)
        axis.axhline(100 / WAYS, color="black", lw=0.8, ls=":")
        axis.text(STEPS[-1], 100 / WAYS - 1, "chance", ha="right", va="top", fontsize=9)


def starts_figure(fits: Fits, x: Any, tasks: Any, steps: int, path: Path) -> None:
    """A row for each start, a column for each task: before, after so many steps, and the truth.

    `fits` has for each start its curves before and after, both [tasks, points, 1]; `tasks` has the
    points adapted to (xs, ys), and the true values yq at `x`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context({**style, "legend.frameon": False}):
        drawn, axes = pyplot.subplots(
            len(fits), len(tasks.xs), figsize=(11, 6.5), layout="constrained", sharex=True
        )
        for row, (name, (before, after)) in zip(axes, fits.items(), strict=True):
            row[0].set_ylabel(name)
            for t, axis in enumerate(row):
                axis.plot(x, tasks.yq[t, :, 0], color="black", lw=3, alpha=0.18, label="true")
                axis.plot(x, before[t, :, 0], color="#d55e00", ls=":", label="before")
                axis.plot(x, after[t, :, 0], color="#0072b2", label=f"after {steps} steps")
                points = tasks.xs[t, :, 0], tasks.ys[t, :, 0]
                axis.plot(*points, "o", color="black", ms=4, label="the ten points")
                axis.set_ylim(-5.5, 5.5)
        handles = axes[0, 0].get_legend_handles_labels()
        drawn.legend(*handles, loc="outside upper center", ncols=4)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=150)
        pyplot.close(drawn)
