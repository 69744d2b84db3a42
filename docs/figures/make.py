"""Draws the figures of how-it-works.md: python docs/figures/make.py

Plain SVG on a light card of its own, so that they can be read on a light page and on a dark one.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

INK, SOFT, LINE = "#1f2933", "#52606d", "#7b8794"
PYTHON, CORE, BACK = "#dbe7f3", "#dff0e3", "#f8e3d4"  # fills: Python, native core, the way back
FONT = "font-family='system-ui, sans-serif'"
BOLD = "font-weight='600'"
MONO = "font-family='ui-monospace, monospace'"


def text(x: float, y: float, words: str, size: int = 13, style: str = "", ink: str = INK) -> str:
    """Words that begin at x (or are anchored there by `style`), their base line at y."""
    font = style if "font-family" in style else f"{FONT} {style}"
    return f"<text x='{x}' y='{y}' font-size='{size}' fill='{ink}' {font}>{escape(words)}</text>"


def middle(x: float, y: float, words: str, size: int = 13, style: str = "", ink: str = INK) -> str:
    """Words around x."""
    return text(x, y, words, size, f"text-anchor='middle' {style}", ink)


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    """A rounded box."""
    at = f"x='{x}' y='{y}' width='{width}' height='{height}'"
    return f"<rect {at} rx='6' fill='{fill}' stroke='{LINE}'/>"


def arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    """A line along the points with a head at its end."""
    path = " ".join(f"{x},{y}" for x, y in points)
    dash = " stroke-dasharray='4 3'" if dashed else ""
    return (
        f"<polyline points='{path}' fill='none' stroke='{INK}' stroke-width='1.4'{dash} "
        "marker-end='url(#head)'/>"
    )


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole file."""
    head = (
        "<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' "
        f"markerHeight='7' orient='auto'><path d='M0 0 8 4 0 8z' fill='{INK}'/></marker></defs>"
    )
    card = f"<rect width='{width}' height='{height}' rx='10' fill='#fbfcfd'/>"
    size = f"viewBox='0 0 {width} {height}' width='{width}' height='{height}'"
    lines = [f"<title>{escape(title)}</title>", head, card, *parts]
    inside = "\n".join(lines)
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img'>\n{inside}\n</svg>\n"


CALL = [
    (PYTHON, "The call", "maml(xs, ys, xq, yq)", "pymeta/algorithms/maml.py"),
    (PYTHON, "Check", "shapes, dtypes, sizes; lists are joined, nothing is padded", "pymeta/tasks"),
    (PYTHON, "Look", "is the model still the chain that was seen before?", "spec/watch.py"),
    (
        PYTHON,
        "Hand over",
        "addresses and sizes; one buffer for all gradients",
        "backend/prepared.py",
    ),
    (CORE, "Let go of the GIL", "addresses become a Call", "csrc/bind/module.cpp"),
    (CORE, "Plan", "check labels and weights; rows or lanes? borrow one block", "cpu/dispatch.cpp"),
    (CORE, "Pack", "parameters into the executor's layout; tasks into chunks", "cpu/driver.h"),
    (CORE, "Run", "each thread takes chunks as they come (below)", "core/algorithms"),
    (CORE, "Add", "the chunks' sums in a fixed order; torch's layout", "cpu/driver.h"),
    (PYTHON, "Return", "loss, task losses, predictions; one autograd node", "backend/prepared.py"),
    (PYTHON, "loss.backward()", "adds the gradient that is there already to .grad", "torch"),
]


def call() -> str:
    """One call's life, from above to below."""
    left, width, height, gap = 150, 590, 44, 16
    parts, y = [], 24
    ends: list[float] = []
    for fill, name, what, where in CALL:
        parts += [
            box(left, y, width, height, fill),
            text(left + 14, y + 19, name, 14, BOLD),
            text(left + 14, y + 36, what, 12, "", SOFT),
            text(left + width - 14, y + 19, where, 12, f"text-anchor='end' {MONO}", SOFT),
        ]
        ends.append(y)
        y += height + gap
    for top in ends[:-1]:
        x = left + width / 2
        parts.append(arrow((x, top + height), (x, top + height + gap - 1)))
    for first, last, name in ((0, 3, "Python"), (4, 8, "native core"), (9, 10, "Python")):
        top, end = ends[first], ends[last] + height
        parts += [
            f"<path d='M138 {top} h-8 v{end - top} h8' fill='none' stroke='{LINE}'/>",
            text(20, (top + end) / 2, name, 13, BOLD),
        ]
    return drawing(760, int(y + 8), "The life of one call of MAML", parts)


def sweep() -> str:
    """The inner loop forward, and back through it."""
    parts: list[str] = []
    xs = [30, 210, 390, 570]
    width, top, below = 140, 76, 236
    parts.append(text(30, 30, "forward: adapt, then evaluate", 14, BOLD))
    tapes = ["tape 0", "tape 1", "tape K-1", "its tape"]
    steps = ["step 0", "step 1", "step K-1", "query"]
    forward = [
        ("g = dL/dθ", "θ[1] = θ[0] - lr g"),
        ("g = dL/dθ", "θ[2] = θ[1] - lr g"),
        ("g = dL/dθ", "θ[K] = … - lr g"),
        ("forward", "L(θ[K]; query)"),
    ]
    backward = ["v += H[0] u", "v += H[1] u", "v += H[K-1] u", "v = dL/dθ[K]"]
    for i, x in enumerate(xs):
        parts += [
            box(x, top, width, 72, CORE),
            middle(x + width / 2, top + 20, steps[i], 13, BOLD),
            middle(x + width / 2, top + 41, forward[i][0], 11, MONO, SOFT),
            middle(x + width / 2, top + 58, forward[i][1], 10 if i < 3 else 11, MONO, SOFT),
            box(x, below, width, 72, BACK),
            middle(x + width / 2, below + 22, backward[i], 12, f"{BOLD} {MONO}"),
        ]
        if i < 3:
            parts += [
                middle(x + width / 2, below + 42, "u = -lr v", 11, MONO, SOFT),
                middle(x + width / 2, below + 59, "lr gets -g v", 11, MONO, SOFT),
            ]
        else:
            parts.append(middle(x + width / 2, below + 42, "backward pass", 11, "", SOFT))
        parts += [
            arrow((x + width / 2, top + 72), (x + width / 2, below - 1), dashed=True),
            text(x + width / 2 + 8, 182, tapes[i], 12, BOLD),
            text(x + width / 2 + 8, 198, "activations", 11, "", SOFT),
            text(x + width / 2 + 8, 212, "and deltas", 11, "", SOFT),
        ]
    for i in range(3):
        skip = i == 1
        parts += [
            arrow((xs[i] + width, top + 36), (xs[i + 1] - 1, top + 36), dashed=skip),
            arrow((xs[i + 1], below + 36), (xs[i] + width + 1, below + 36), dashed=skip),
        ]
        label = f"θ[{i + 1}]" if i < 2 else "θ[K]"
        parts.append(middle(xs[i] + width + 20, top - 10, label, 11, MONO, SOFT))
    parts += [
        arrow((100, below + 72), (100, below + 108)),
        text(
            710,
            below + 104,
            "backward: one tangent pass for each step",
            14,
            f"text-anchor='end' {BOLD}",
        ),
        text(112, below + 104, "v is the meta-gradient", 13, BOLD),
        text(112, below + 122, "of each task; added up over the tasks of a chunk", 12, "", SOFT),
    ]
    return drawing(740, 376, "MAML's inner loop and the second-order reverse sweep", parts)


def tangent() -> str:
    """The four passes through a layer."""
    rows = [
        ("forward", "z = x W + b", "a = f(z)", CORE),
        ("backward", "c = dL/da,  d = c f'(z)", "dx = d Wᵀ,  g = xᵀ d", CORE),
        ("tangent of forward", "rz = rx W + x U", "ra = f'(z) rz", BACK),
        (
            "tangent of backward",
            "rd = f'(z) rc + f''(z) c rz",
            "rdx = rd Wᵀ + d Uᵀ,  Hu = rxᵀ d + xᵀ rd",
            BACK,
        ),
    ]
    parts = []
    for i, (name, first, second, fill) in enumerate(rows):
        y = 20 + 58 * i
        parts += [
            box(20, y, 700, 46, fill),
            text(34, y + 28, name, 13, BOLD),
            text(200, y + 28, first, 12, MONO),
            text(420, y + 28, second, 12, MONO),
        ]
    return drawing(740, 260, "The four passes through a linear layer", parts)


FIGURES = {"call.svg": call, "sweep.svg": sweep, "tangent.svg": tangent}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        Path(__file__).with_name(name).write_text(draw())
