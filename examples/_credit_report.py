"""What lending_club.py shows: scores of each group and of all, a table, a figure, a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _common import mean_interval
from _credit_rivals import LOGISTIC
from _credit_starts import CUT, MAML, REPTILE, TUNED, Array, Problem

from pymeta.metrics import auc, brier, ks, log_loss

Scores = dict[str, float]

LEAST_ROWS, LEAST_OF_A_KIND = 30, 3  # what a group's future must have to count in the macro average
METRICS = {"AUC": auc, "KS": ks, "Brier": brier, "log-loss": log_loss}

HEAD = f"""# LendingClub: a credit model for every state and every 3-digit zip code

Made by `examples/lending_club.py`, which begins with a description of the method: the past is
everything issued before {CUT}, the future everything after it; the start of MAML, Reptile and the
fine-tuned network has never seen the group that it is adapted to. *Macro* is the mean over the
groups with at least {LEAST_ROWS} future loans, {LEAST_OF_A_KIND} of each outcome; *micro* treats
all future loans as one set. Higher is better for AUC and KS, lower for Brier score and log-loss.
The last column is the mean difference over groups and half the width of its 95 % interval. The
interval does not include the randomness of training: with other random starts, the pooled
network's AUC has a standard deviation of 0.0014 (states, macro) and 0.0021 (micro), so differences
of that size between networks mean nothing.
"""


def scores(y: Array, p: Array) -> Scores:
    """The four measures of chances `p` of the outcomes `y`."""
    return {name: float(metric(y, p)) for name, metric in METRICS.items()}


def scored(problem: Problem, found: dict[str, Array]) -> tuple[pd.DataFrame, dict[str, Scores]]:
    """Each group's scores (a row for each group and method), and those of all future loans."""
    rows = []
    for name in np.unique(problem.groups[problem.future]):
        mask = problem.future & (problem.groups == name)
        y = problem.y[mask]
        if len(y) < LEAST_ROWS or min(y.sum(), len(y) - y.sum()) < LEAST_OF_A_KIND:
            continue
        counts = {"past": int(problem.rows.get(name, 0)), "future": len(y), "defaults": y.sum()}
        for method, p in found.items():
            rows.append({"group": name, **counts, "method": method, **scores(y, p[mask])})
    future = problem.future
    return pd.DataFrame(rows), {m: scores(problem.y[future], p[future]) for m, p in found.items()}


@dataclass(frozen=True)
class Result:
    """What came out for one grouping."""

    grouping: str
    tasks: pd.DataFrame
    micro: dict[str, Scores]
    timing: dict[str, Any]

    @property
    def groups(self) -> int:
        """How many groups are in the macro average."""
        return self.tasks["group"].nunique()

    def macro(self, method: str) -> Scores:
        """The mean over groups."""
        mine = self.tasks[self.tasks["method"] == method]
        return {m: float(mine[m].mean()) for m in METRICS}

    def gain(self, method: str, metric: str = "AUC") -> tuple[float, float]:
        """Mean and half 95 % interval over groups of the difference to the logistic regression."""
        wide = self.tasks.pivot(index="group", columns="method", values=metric)
        return mean_interval((wide[method] - wide[LOGISTIC]).to_numpy())


def verdict(result: Result) -> str:
    """What the numbers say, whoever has won."""
    macro = {m: result.macro(m)["AUC"] for m in result.micro}
    micro = {m: s["AUC"] for m, s in result.micro.items()}
    best, best_micro = max(macro, key=macro.__getitem__), max(micro, key=micro.__getitem__)
    lines = [
        f"Highest AUC, macro: {best} ({macro[best]:.4f}); micro: {best_micro} "
        f"({micro[best_micro]:.4f})."
    ]
    for method in (MAML, REPTILE, TUNED):
        mean, half = result.gain(method)
        word = "indistinguishable from" if abs(mean) <= half else "above" if mean > 0 else "below"
        lines.append(f"{method}: {word} {LOGISTIC} (macro AUC {mean:+.4f} ± {half:.4f}).")
    return "\n".join(f"- {line}" for line in lines)


def table(result: Result) -> str:
    """Markdown: a line for each method; then the times and the verdict."""
    heads = [f"{m} {kind}" for kind in ("macro", "micro") for m in METRICS]
    lines = [
        f"## {result.grouping}: {result.groups} groups in the macro average",
        "",
        f"| method | {' | '.join(heads)} | macro AUC against {LOGISTIC} |",
        f"|---|{'---:|' * (len(heads) + 1)}",
    ]
    for method, micro in result.micro.items():
        cells = [f"{s[m]:.4f}" for s in (result.macro(method), micro) for m in METRICS]
        mean, half = result.gain(method)
        difference = "" if method == LOGISTIC else f"{mean:+.4f} ± {half:.4f}"
        lines.append(f"| {method} | {' | '.join(cells)} | {difference} |")
    timing = result.timing
    times = "; ".join(f"{name}: {1e3 * s:,.0f} ms" for name, s in timing["seconds"].items())
    lines += ["", f"To adapt to the past of all {timing['groups']} groups "]
    lines[-1] += f"({timing['threads']} threads): {times}."
    return "\n".join([*lines, "", verdict(result)])


def figure(results: Sequence[Result], path: Path) -> None:
    """Each method's macro AUC against the pooled logistic regression's, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = [m for m in results[0].micro if m != LOGISTIC][::-1]
    fig, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 3.8), sharey=True)
    for ax, result in zip(np.atleast_1d(axes), results, strict=True):
        for place, method in enumerate(methods):
            mean, half = result.gain(method)
            ours = method in (MAML, REPTILE, TUNED)
            ax.errorbar(mean, place, xerr=half, fmt="o", capsize=3, color=f"C{int(not ours)}")
        ax.axvline(0, color="grey", linewidth=1)
        ax.set_title(f"{result.grouping}: {result.groups} groups")
        ax.set_xlabel("macro AUC, difference to one logistic regression")
        ax.grid(axis="x", alpha=0.3)
    np.atleast_1d(axes)[0].set_yticks(range(len(methods)), methods)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)
