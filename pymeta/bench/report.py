"""Results for people: tables for the terminal and for Markdown, and the JSON behind them.

The JSON: {"schema": 2, "date", "device": "cpu" | "cuda" | "rehearsal", "options", "machine",
"cases": [row], "summary": [figures that the Markdown shows]}. A row has the case, what it needs
(flops, bytes) and "contestants": {variant: {"median_s", "min_s", "rounds_s" (the rounds' medians),
"error_in_tolerances", "relative_error", "compile_s", "note", ...} or {"error": why there is none}};
on a CUDA device also "device_s", seconds a call in a burst.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

import pymeta
from pymeta.bench.contestants import cores

SCHEMA = 2
Row = dict[str, Any]

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
CUDA_COLUMNS = {
    "pymeta": "pymeta",
    "pymeta graph": "pymeta, graph",
    "pymeta tf32x3": "pymeta, 3xTF32",
    "torch vmap": "torch.func vmap",
    "torch vmap graph": "vmap, graph",
    "torch compiled": "torch.compile",
    "torch compiled graph": "torch.compile, graph",
    "jax vmap": "JAX",
    "jax scanned steps": "JAX, scanned steps",
}


def machine() -> dict[str, Any]:
    """The processor, its cores, and the versions in use."""
    versions: dict[str, str | None] = {"pymeta": pymeta.__version__}
    for package in ("torch", "jax", "numpy", "higher", "scikit-learn"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


# ---- figures of a row ----------------------------------------------------------------------------


def _threads(row: Row) -> list[int]:
    names = [n for n in row["contestants"] if n.startswith("pymeta kernel ")]
    return sorted(int(n.split()[-1][:-1]) for n in names)


def _median(row: Row, name: str) -> float | None:
    found: float | None = row["contestants"].get(name, {}).get("median_s")
    return found


def _is_trip(name: str) -> bool:
    """Whether this is a call of a learner with its backward, as the planner has it.

    A bare kernel, `accumulate_grad` and products in 3xTF32 have rows of their own.
    """
    others = ("kernel", "accumulate_grad", "tf32x3", ",")
    return name.startswith("pymeta") and not any(other in name for other in others)


def own_time(row: Row) -> float | None:
    """Seconds of pymeta's round trip, on whatever number of threads or in whatever form is best."""
    times = [
        e["median_s"] for n, e in row["contestants"].items() if _is_trip(n) and "median_s" in e
    ]
    return min(times, default=None)


def best_rival(row: Row) -> tuple[str, float] | None:
    """The fastest rival whose answer was right, and its seconds."""
    times = [
        (e["median_s"], n)
        for n, e in row["contestants"].items()
        if not n.startswith("pymeta") and "median_s" in e
    ]
    return (min(times)[1], min(times)[0]) if times else None


def of_peak(row: Row, entry: Row, device: dict[str, Any]) -> float | None:
    """The fraction of the peak of what the contestant may use: its cores, or the device."""
    seconds, peak = entry.get("median_s"), row["fma_peak"]
    if device:
        seconds, peak = entry.get("device_s"), device.get("facts", {}).get("peak_flops")
        peak = peak or device.get("peaks", {}).get("matmul_flops")
    elif peak:
        peak *= entry.get("threads", 1)
    return row["flops_per_task"] * row["tasks"] / seconds / peak if seconds and peak else None


def roofline(row: Row, device: dict[str, Any]) -> dict[str, Any] | None:
    """What the device allows: seconds for the flops and for the bytes, and which binds.

    Flops at the data sheet's float32 peak (a matrix product's measured rate where the clock is
    unknown), bytes at the measured rate of a copy.
    """
    peaks, facts = device.get("peaks", {}), device.get("facts", {})
    flops = facts.get("peak_flops") or peaks.get("matmul_flops")
    if not flops or not peaks.get("copy_bytes"):
        return None
    arithmetic = row["flops_per_task"] * row["tasks"] / flops
    memory = row["bytes"] / peaks["copy_bytes"]
    return {
        "flops_s": arithmetic,
        "bytes_s": memory,
        "binds": "flops" if arithmetic >= memory else "bytes",
        "limit_s": max(arithmetic, memory),
    }


def summary(row: Row, device: dict[str, Any] | None = None) -> Row:
    """The figures that the Markdown shows; times are medians, in seconds."""
    found: Row = {"case": row["case"], "pymeta_s": own_time(row)}
    rival = best_rival(row)
    if rival is not None:
        found["best_rival"], found["best_rival_s"] = rival
        ours = found["pymeta_s"]
        found["best_rival_ratio"] = rival[1] / ours if ours else None
    if device:
        found["roofline"] = roofline(row, device)
        return found
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
    ours = found["pymeta_s"]
    for name in RIVALS:
        if (theirs := _median(row, name)) is not None:
            found[f"{name} s"] = theirs
            found[f"{name} ratio"] = theirs / ours if ours else None
            found[f"{name} compile_s"] = row["contestants"][name]["compile_s"]
    return found


# ---- text ----------------------------------------------------------------------------------------


def figure(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else figure(1e3 * seconds)


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else figure(1e6 * seconds)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def aligned(head: list[str], lines: list[list[str]], left: int = 1) -> str:
    """A table for the terminal: the first columns and the last to the left, others to the right."""
    width = [max(len(cells[i]) for cells in [head, *lines]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [
            c.ljust(width[i]) if i < left or i == len(head) - 1 else c.rjust(width[i])
            for i, c in enumerate(cells)
        ]
        return "  " + "  ".join(padded).rstrip()

    return "\n".join(line(cells) for cells in [head, *lines])


def _note(name: str, e: Row) -> str:
    """What was chosen; and of compilers, for how long they compiled."""
    parts = [e["note"]] if e["note"] else []
    if name.startswith("jax") or "compiled" in name:
        parts.append(f"compiled in {e['compile_s']:.1f} s")
    return ", ".join(parts)


def _times(row: Row, e: Row, device: dict[str, Any]) -> list[str]:
    per_task = e["device_s"] if device and "device_s" in e else e["median_s"]
    first = [_us(e["median_s"]), _us(e.get("device_s"))] if device else [_ms(e["median_s"])]
    return [*first, figure(1e6 * per_task / row["tasks"])]


def text_of(row: Row, device: dict[str, Any]) -> str:
    """A case for the terminal: what it is, a line for each contestant, and the best rival."""
    head = ["", "error", "of tolerance", "ms a call", "us a task", "x pymeta", "of peak", "note"]
    if device:
        head[3:4] = ["wall us", "device us"]
    ours, lines, failed = own_time(row), [], []
    for name, e in row["contestants"].items():
        if "error" in e:
            failed.append(f"  {name}: {e['error'].splitlines()[0]}")
            continue
        lines.append([
            name,
            f"{e['relative_error']:.1e}",
            f"{e['error_in_tolerances']:.2g}",
            *_times(row, e, device),
            _number(e["median_s"] / ours if ours else None, ".3g"),
            _number(of_peak(row, e, device), ".0%"),
            _note(name, e),
        ])  # fmt: skip
    parts = [f"{row['case']}   ({row['described']}; {row['flops_per_task']:,} flops a task)"]
    if lines:
        parts.append(aligned(head, lines))
    parts += failed
    rival = best_rival(row)
    if rival is not None and ours:
        parts.append(f"  best rival: {rival[0]}, {rival[1] / ours:.3g} times pymeta's time")
    limit = roofline(row, device) if device else None
    if limit is not None:
        parts.append("  " + _roofline_text(row, limit))
    return "\n".join(parts) + "\n"


def _device_time(row: Row) -> float | None:
    entries = [e for n, e in row["contestants"].items() if _is_trip(n) and "device_s" in e]
    return min((e["device_s"] for e in entries), default=None)


def _roofline_text(row: Row, limit: dict[str, Any]) -> str:
    found = (
        f"roofline: {row['flops_per_task'] * row['tasks']:.3g} flops take "
        f"{_us(limit['flops_s'])} us, {row['bytes']:.3g} bytes {_us(limit['bytes_s'])} us; "
        f"{limit['binds']} bind"
    )
    seconds = _device_time(row)
    return found + (f"; pymeta is at {limit['limit_s'] / seconds:.0%} of it" if seconds else "")


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def _ours(rows: list[Row], sums: list[Row]) -> str:
    lines = []
    for row, s in zip(rows, sums, strict=True):
        if "us_per_task" not in s:
            continue
        error = row["contestants"]["pymeta kernel 1t"]["error_in_tolerances"]
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
            f"{error:.2g}",
        ])  # fmt: skip
    head = ["case", "executor", "us/task, 1 thread", "GFLOP/s", "of FMA peak (best)", "all cores",
            "of all peaks", "Python adds us", "round trip ms", "error / tolerance"]  # fmt: skip
    return table(head, lines) if lines else "(pymeta was not measured)"


def _error(row: Row, name: str) -> str:
    found: str = row["contestants"].get(name, {}).get("error", "")
    return found


def _columns(rows: list[Row], columns: dict[str, str], device: bool) -> str:
    """Times of all contestants, and in parentheses how many times pymeta's that is."""
    lines = []
    for row in rows:
        ours = own_time(row)
        cells = [row["case"]] + ([] if device else [_ms(ours)])
        for name in columns:
            theirs = _median(row, name)
            if theirs is None:
                cells.append("wrong" if row["contestants"].get(name, {}).get("wrong") else "-")
                continue
            shown = _us(theirs) if device else _ms(theirs)
            rival = not name.startswith("pymeta")
            cells.append(shown + (f" ({theirs / ours:.3g}x)" if ours and rival else ""))
        lines.append(cells)
    return table(["case", *([] if device else ["pymeta"]), *columns.values()], lines)


def _compile(rows: list[Row], sums: list[Row]) -> str:
    names = [n for n in RIVALS if n.startswith(("jax", "torch compiled"))]
    lines = [
        [r["case"], *(_number(s.get(f"{n} compile_s"), ".3g") for n in names)]
        for r, s in zip(rows, sums, strict=True)
    ]
    return table(["case", *(RIVALS[n] for n in names)], lines)


def _failures(rows: list[Row]) -> str:
    found = [
        f"- {row['case']}, {name}: {e['error'].splitlines()[0]}"
        for row in rows
        for name, e in row["contestants"].items()
        if "error" in e
    ]
    return "\n\nNot measured:\n\n" + "\n".join(found) if found else ""


def _cpu_markdown(content: dict[str, Any]) -> str:
    rows, sums, found = content["cases"], content["summary"], content["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v)
    peaks = [row["fma_peak"] for row in rows if row["fma_peak"]]
    peak = f", FMA peak of one core {max(peaks) / 1e9:.0f} GFLOP/s (float32)" if peaks else ""
    return f"""# Benchmark

{found["cpu"]}, {found["cores"]} cores{peak}. Python {found["python"]}, {versions}.
{content["date"]}. Float32; W1 to W3 are meta-gradients, in exact second order unless a case says
first order. Every figure belongs to an answer that was checked against float64 before. Times are
medians of the rounds' medians. The method stands in bench/README.md.

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

{_columns(rows, RIVALS, device=False)}

Seconds that a rival compiles before its first result, for these shapes (pymeta: none):

{_compile(rows, sums)}{_failures(rows)}
"""


def _rooflines(rows: list[Row], device: dict[str, Any]) -> str:
    lines = []
    for row in rows:
        limit, seconds = roofline(row, device), _device_time(row)
        if limit is None:
            continue
        rate = row["flops_per_task"] * row["tasks"] / seconds if seconds else None
        peak, product = device["facts"].get("peak_flops"), device["peaks"]["matmul_flops"]
        lines.append([
            row["case"],
            f"{row['flops_per_task'] * row['tasks']:.3g}",
            f"{row['bytes']:.3g}",
            _us(limit["flops_s"]),
            _us(limit["bytes_s"]),
            limit["binds"],
            _us(seconds),
            _number(rate / 1e12 if rate else None, ".3g"),
            _number(rate / peak if rate and peak else None, ".0%"),
            _number(rate / product if rate else None, ".0%"),
        ])  # fmt: skip
    head = ["case", "flops", "bytes", "flops take us", "bytes take us", "binds", "pymeta us",
            "TFLOP/s", "of the peak", "of a matrix product"]  # fmt: skip
    return table(head, lines) if lines else "(the device's ceilings were not measured)"


def _device_text(device: dict[str, Any]) -> str:
    facts, peaks = device.get("facts", {}), device.get("peaks", {})
    parts = [facts.get("name", "an unknown device")]
    if facts.get("driver"):
        parts.append(f"driver {facts['driver']}, CUDA {facts['cuda']} of torch")
    if facts.get("peak_flops"):
        parts.append(
            f"float32 peak {facts['peak_flops'] / 1e12:.1f} TFLOP/s ({facts['multiprocessors']} "
            f"multiprocessors at {facts['max_mhz']:.0f} MHz)"
        )
    if peaks:
        parts.append(
            f"a float32 matrix product of {peaks['matmul_size']:.0f} (no TF32) reaches "
            f"{peaks['matmul_flops'] / 1e12:.3g} TFLOP/s, "
            f"a copy {peaks['copy_bytes'] / 1e12:.3g} TB/s, in this run"
        )
    return "; ".join(parts)


def _cuda_markdown(content: dict[str, Any]) -> str:
    rows, found, device = content["cases"], content["machine"], content["machine"]["device"]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v)
    what = _device_text(device)
    note = "\n**A rehearsal on the CPU: no figure means anything.**\n"
    wide = textwrap.fill(f"{what}. Python {found['python']}, {versions}. {content['date']}.", 100)
    return f"""# Benchmark on a CUDA device
{note if content["device"] == "rehearsal" else ""}
{wide}

IEEE float32 for everyone. Every figure belongs to an answer that was checked against float64
before. The method stands in bench/README.md.

## One call

Microseconds from the call to the result (wall clock, synchronised; medians of the rounds' medians),
and in parentheses how many times pymeta's better form that is (below 1: we lose).

{_columns(rows, CUDA_COLUMNS, device=True)}

## The roofline

What the products' flops take at the float32 peak and what the inputs and results take at the rate
of a copy; and what pymeta takes, per call in a burst of calls.

{_rooflines(rows, device)}{_failures(rows)}
"""


# ---- files ---------------------------------------------------------------------------------------


def content_of(
    kind: str, options: dict[str, Any], device: dict[str, Any], rows: list[Row]
) -> dict[str, Any]:
    """Everything about a run, as the JSON file has it."""
    found = machine()
    if kind != "cpu":
        found["device"] = device
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "schema": SCHEMA,
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "device": kind,
        "options": options,
        "machine": found,
        "cases": rows,
        "summary": [summary(row, device) for row in rows],
    }


def write_file(path: Path, text: str) -> None:
    """Write it whole or not at all: a run may be cut off."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    os.replace(beside, path)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write `path`, which ends in .json, and the same in Markdown beside it."""
    write_file(path, json.dumps(content, indent=1) + "\n")
    markdown = _cpu_markdown if content["device"] == "cpu" else _cuda_markdown
    write_file(path.with_suffix(".md"), markdown(content))


def write_one(
    out: Path, title: str, about: str | None, head: list[str], lines: list[list[str]], rows: Any
) -> None:
    """Write and print one table: `out` gets the machine and the `rows`, its twin .md the text."""
    text = f"# {title}\n\n{about}\n{table(head, lines)}\n"
    write_file(out, json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    write_file(out.with_suffix(".md"), text)
    print(text)
