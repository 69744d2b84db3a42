"""The results as JSON and as a Markdown table."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

RIVALS = {
    "torch vmap": "torch.func vmap",
    "torch compiled": "torch.compile",
    "torch loop": "torch loop",
    "higher": "higher",
    "jax 1 thread": "JAX 1 thread",
    "jax all threads": "JAX all threads",
    "jax shard_map": "JAX shard_map",
    "scikit-learn": "scikit-learn",
}


def machine() -> dict[str, Any]:
    """The processor, its cores, and the versions in use."""
    versions = {}
    for package in ("pymeta", "torch", "jax", "numpy", "higher", "scikit-learn"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


def _threads(row: dict[str, Any]) -> list[int]:
    names = [n for n in row["contestants"] if n.startswith("pymeta kernel ")]
    return sorted(int(n.split()[-1][:-1]) for n in names)


def _median(row: dict[str, Any], name: str) -> float | None:
    return row["contestants"].get(name, {}).get("median_s")


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """The figures that the table shows; times are medians, in seconds."""
    found: dict[str, Any] = {"case": row["case"]}
    threads = _threads(row)
    if threads and (one := _median(row, "pymeta kernel 1t")):
        found["us_per_task"] = 1e6 * one / row["tasks"]
        found["gflops"] = row["flops_per_task"] * row["tasks"] / one / 1e9
        if row["fma_peak"]:
            best = row["contestants"]["pymeta kernel 1t"]["min_s"]
            found["of_peak"] = found["gflops"] * 1e9 / row["fma_peak"]
            found["of_peak_best"] = found["of_peak"] * one / best
        trip = _median(row, "pymeta 1t")
        found["python_us"] = 1e6 * (trip - one) if trip else None
        several = _median(row, f"pymeta kernel {threads[-1]}t")
        found["threads_speedup"] = one / several if several else None
        if several and row["fma_peak"]:
            all_peaks = threads[-1] * row["fma_peak"]
            found["of_all_peaks"] = row["flops_per_task"] * row["tasks"] / several / all_peaks
        # Ratios compare whole round trips, on whatever number of threads does best.
        trips = [t for n in threads if (t := _median(row, f"pymeta {n}t"))]
        found["pymeta_s"] = min(trips, default=None)
    ours = found.get("pymeta_s")
    for name in RIVALS:
        if (theirs := _median(row, name)) is not None:
            found[f"{name} s"] = theirs
            found[f"{name} ratio"] = theirs / ours if ours else None
            found[f"{name} compile_s"] = row["contestants"][name]["compile_s"]
    return found


def figure(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else figure(1e3 * seconds)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def line(row: dict[str, Any]) -> str:
    """A case in one line, for the terminal."""
    s = summary(row)
    parts = [f"{row['case']}:"]
    if s.get("us_per_task"):
        parts.append(
            f"pymeta {s['us_per_task']:.3g} us/task, {_number(s.get('of_peak'), '.0%')} of peak;"
        )
    parts += [f"{n} {_ms(s[f'{n} s'])} ms" for n in RIVALS if f"{n} s" in s]
    return " ".join(parts)


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def _ours(rows: list[dict[str, Any]], sums: list[dict[str, Any]]) -> str:
    lines = []
    for row, s in zip(rows, sums, strict=True):
        if "us_per_task" not in s:
            continue
        lines.append([
            row["case"],
            row["contestants"]["pymeta kernel 1t"]["note"],
            f"{s['us_per_task']:.3g}",
            f"{s['gflops']:.0f}",
            f"{_number(s.get('of_peak'), '.0%')} ({_number(s.get('of_peak_best'), '.0%')})",
            _number(s["threads_speedup"], ".2f") + "x",
            _number(s.get("of_all_peaks"), ".0%"),
            _number(s["python_us"], ".0f"),
            _ms(s["pymeta_s"]),
            f"{row['contestants']['pymeta 1t']['error_in_tolerances']:.2g}",
        ])  # fmt: skip
    head = ["case", "executor", "us/task, 1 thread", "GFLOP/s", "of FMA peak (best)", "all cores",
            "of all peaks", "Python adds us", "round trip ms", "error / tolerance"]  # fmt: skip
    return table(head, lines) if lines else "(pymeta was not measured)"


def _rivals(rows: list[dict[str, Any]], sums: list[dict[str, Any]]) -> str:
    lines = []
    for row, s in zip(rows, sums, strict=True):
        cells = [row["case"], _ms(s.get("pymeta_s"))]
        for name in RIVALS:
            if f"{name} s" in s:
                ratio = s[f"{name} ratio"]
                cells.append(_ms(s[f"{name} s"]) + (f" ({ratio:.3g}x)" if ratio else ""))
            else:
                cells.append("wrong" if "allowed" in _error(row, name) else "-")
        lines.append(cells)
    return table(["case", "pymeta", *RIVALS.values()], lines)


def _compile(rows: list[dict[str, Any]], sums: list[dict[str, Any]]) -> str:
    names = [n for n in RIVALS if n.startswith(("jax", "torch compiled"))]
    lines = [
        [r["case"], *(_number(s.get(f"{n} compile_s"), ".3g") for n in names)]
        for r, s in zip(rows, sums, strict=True)
    ]
    return table(["case", *(RIVALS[n] for n in names)], lines)


def _error(row: dict[str, Any], name: str) -> str:
    return row["contestants"].get(name, {}).get("error", "")


def _failures(rows: list[dict[str, Any]]) -> str:
    found = [
        f"- {row['case']}, {name}: {e['error'].splitlines()[0]}"
        for row in rows
        for name, e in row["contestants"].items()
        if "error" in e
    ]
    return "\n\nNot measured:\n\n" + "\n".join(found) if found else ""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `path`.json and `path`.md."""
    found = machine()
    sums = [summary(row) for row in rows]
    content = {"machine": found, "cases": rows, "summary": sums}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v)
    peaks = [row["fma_peak"] for row in rows if row["fma_peak"]]
    peak = f", FMA peak of one core {max(peaks) / 1e9:.0f} GFLOP/s (float32)" if peaks else ""
    text = f"""# Benchmark

{found["cpu"]}, {found["cores"]} cores{peak}. Python {found["python"]}, {versions}.
Float32; W1 to W3 are meta-gradients, in exact second order unless a case says first order. Every
figure belongs to an answer that was checked against float64 before. Times are medians of the
rounds' medians. The method stands in bench/README.md.

## pymeta

us/task, GFLOP/s and the fraction of the peak (in parentheses: by the fastest call) are the bare
native call on one thread; "all cores" is its speed-up, "of all peaks" its fraction of that many
cores' peaks; "Python adds" is what `maml(...)` and `backward()` (`reptile(...)` and `backward()`,
`finetune(...)`) take beyond it; "round trip" is that call with the better number of threads.

{_ours(rows, sums)}

## Rivals

Milliseconds for all tasks of a case, and in parentheses how many times pymeta's round trip that is
(below 1: we lose). In fine-tuning the loops (torch, scikit-learn) take some of the tasks, and their
time is scaled.

{_rivals(rows, sums)}

Seconds that a rival compiles before its first result, for these shapes (pymeta: none):

{_compile(rows, sums)}{_failures(rows)}
"""
    path.with_suffix(".md").write_text(text)
