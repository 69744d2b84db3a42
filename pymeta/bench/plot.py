"""The figure of `--plot`: time per task against the number of tasks and against the width.

pymeta's line is its round trip with the better number of threads (on a device: its better form);
each rival's is its fastest variant. Where a rival's line crosses below ours the place is marked,
and where we lose the background is shaded.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from pymeta.bench.report import best_rival, own_time

Row = dict[str, Any]
Line = list[tuple[float, float]]  # x, microseconds per task

LABELS = {
    "tasks": ("tasks", "1-40-40-1, 10+10 rows, 1 step"),
    "width": ("width h of 1-h-h-1", "10+10 rows, 1 step"),
}


def missing() -> str | None:
    """Why no figure can be drawn; None where it can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return f"needs matplotlib ({error}): pip install matplotlib"
    return None


def lines(points: list[tuple[int, Row]]) -> dict[str, Line]:
    """{contestant: its line}; "pymeta" is the first."""
    found: dict[str, Line] = {"pymeta": []}
    for x, row in points:
        ours = own_time(row)
        if ours is not None:
            found["pymeta"].append((x, 1e6 * ours / row["tasks"]))
        least: dict[str, float] = {}
        for name, e in row["contestants"].items():
            if not name.startswith("pymeta") and "median_s" in e:
                who = e["worker"]
                least[who] = min(e["median_s"], least.get(who, math.inf))
        for who, seconds in least.items():
            found.setdefault(who, []).append((x, 1e6 * seconds / row["tasks"]))
    return found


def crossings(points: list[tuple[int, Row]]) -> list[float]:
    """Where the best rival's time and ours cross, interpolated on logarithmic axes."""
    known = []
    for x, row in points:
        ours, rival = own_time(row), best_rival(row)
        if ours is not None and rival is not None:
            known.append((math.log(x), math.log(rival[1] / ours)))
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(known):
        if (y0 < 0) != (y1 < 0):
            found.append(math.exp(x0 + (x1 - x0) * y0 / (y0 - y1)))
    return found


def losing(points: list[tuple[int, Row]]) -> list[tuple[float, float]]:
    """The ranges of x in which the best rival is faster."""
    compared = [
        (float(x), rival[1] < ours)
        for x, row in points
        if (ours := own_time(row)) is not None and (rival := best_rival(row)) is not None
    ]
    if not compared:
        return []
    edges = [compared[0][0], *crossings(points), compared[-1][0]]
    lost = compared[0][1]
    found = []
    for low, high in itertools.pairwise(edges):
        if lost:
            found.append((low, high))
        lost = not lost
    return found


def draw(path: Path, content: dict[str, Any], axes_of: dict[str, list[tuple[int, Row]]]) -> None:
    """Write the figure; the suffix of `path` says what kind (.png, .svg, .pdf).

    Raises:
        ValueError: matplotlib does not know the suffix.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(axes_of), figsize=(5.5 * len(axes_of), 4.2), squeeze=False, layout="constrained"
    )
    for panel, (axis, points) in zip(panels[0], axes_of.items(), strict=True):
        for name, line in lines(points).items():
            wide = name == "pymeta"
            panel.plot(*zip(*line, strict=True), marker="o", lw=2.5 if wide else 1.3, label=name)
        for low, high in losing(points):
            panel.axvspan(low, high, color="tab:red", alpha=0.08, lw=0)
        for x in crossings(points):
            panel.axvline(x, color="tab:red", ls=":", lw=1)
            panel.annotate(
                f"crossover at {x:.3g}", (x, 0.98), xycoords=("data", "axes fraction"),
                xytext=(3, 0), textcoords="offset points",
                rotation=90, ha="left", va="top", fontsize=8, color="tab:red",
            )  # fmt: skip
        label, title = LABELS[axis]
        count = "" if axis == "tasks" else f"{points[0][1]['tasks']} tasks, "
        panel.set(xscale="log", yscale="log", xlabel=label, title=count + title)
        panel.set_xticks([x for x, _ in points], [f"{x:,}" for x, _ in points])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("microseconds per task")
    panels[0][0].legend()
    where = content["machine"].get("device", {}).get("facts", {}).get("name")
    shown = where or f"{content['machine']['cpu']}, {content['machine']['cores']} cores"
    figure.suptitle(f"{shown}; {content['date']}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def known_suffix(path: Path) -> bool:
    """Whether matplotlib can write such a file."""
    from matplotlib.backend_bases import FigureCanvasBase

    return path.suffix[1:].lower() in FigureCanvasBase.get_supported_filetypes()
