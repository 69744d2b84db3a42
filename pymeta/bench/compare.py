"""Two files of results side by side: `python -m pymeta.bench --compare a.json b.json`.

For each case and contestant that both have: the times, b's over a's, and the noise: how far the
rounds' medians of each run lie apart, relative to their median. A difference counts as one
("slower", "faster") where it is larger than both runs' noise together, and than 3 %.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pymeta.bench.report import aligned, figure

LEAST = 0.03  # a difference below this is none, however quiet the machine was


class Difference(NamedTuple):
    """A contestant's time in both runs."""

    case: str
    contestant: str
    before: float  # seconds
    after: float
    noise: float  # of both runs together, relative

    @property
    def ratio(self) -> float:
        """After over before: above 1 is slower."""
        return self.after / self.before

    @property
    def verdict(self) -> str:
        """In a word; "" where the noise may explain it."""
        if abs(self.ratio - 1) <= max(self.noise, LEAST):
            return ""
        return "slower" if self.ratio > 1 else "faster"


def read(path: Path) -> dict[str, Any]:
    """The results in a file; ValueError or OSError where there are none."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    cases = found.get("cases") if isinstance(found, dict) else None
    good = isinstance(cases, list) and all(
        isinstance(c, dict) and isinstance(c.get("contestants"), dict) and "case" in c
        for c in cases
    )
    if not good:
        raise ValueError(f"{path}: not written by python -m pymeta.bench")
    result: dict[str, Any] = found
    return result


def noise(entry: dict[str, Any]) -> float:
    """How far the rounds lie apart, relative (where they were not kept: the fastest call)."""
    median = float(entry["median_s"])
    rounds = entry.get("rounds_s") or [entry.get("min_s", median), median]
    return float((max(rounds) - min(rounds)) / median)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[Difference]:
    """What both files have measured."""
    earlier = {row["case"]: row["contestants"] for row in before["cases"]}
    found = []
    for row in after["cases"]:
        for name, b in row["contestants"].items():
            a = earlier.get(row["case"], {}).get(name, {})
            if "median_s" in a and "median_s" in b:
                both = noise(a) + noise(b)
                found.append(Difference(row["case"], name, a["median_s"], b["median_s"], both))
    return found


def _unlike(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Where the two runs' circumstances differ."""
    lines = []
    a, b = before["machine"], after["machine"]
    for what in ("cpu", "cores", "python"):
        if a.get(what) != b.get(what):
            lines.append(f"{what}: {a.get(what)} and {b.get(what)}")
    if before.get("device", "cpu") != after.get("device", "cpu"):
        lines.append(f"device: {before.get('device', 'cpu')} and {after.get('device', 'cpu')}")
    names = (x.get("device", {}).get("facts", {}).get("name") for x in (a, b))
    if len(set(names)) > 1:
        lines.append("the CUDA devices are not of one kind")
    for package, version in b.get("versions", {}).items():
        if a.get("versions", {}).get(package) != version:
            lines.append(f"{package}: {a.get('versions', {}).get(package)} and {version}")
    return lines


def text(first: Path, second: Path) -> str:
    """The comparison for the terminal; ValueError or OSError where a file has no results."""
    before, after = read(first), read(second)
    found = differences(before, after)
    if not found:
        raise ValueError(f"{first} and {second} have no case and contestant in common")
    lines = [
        [d.case, d.contestant, figure(1e3 * d.before), figure(1e3 * d.after),
         f"{d.ratio:.3f}", f"{d.noise:.1%}", d.verdict]
        for d in found
    ]  # fmt: skip
    head = ["case", "contestant", "ms in a", "ms in b", "b / a", "noise of both", ""]
    parts = [f"a: {first}, {before.get('date', 'no date')}"]
    parts += [f"b: {second}, {after.get('date', 'no date')}"]
    unlike = _unlike(before, after)
    if unlike:
        parts.append("The runs differ in more than time: " + "; ".join(unlike) + ".")
    slower = [d for d in found if d.verdict == "slower" and d.contestant.startswith("pymeta")]
    own = [d for d in found if d.contestant.startswith("pymeta")]
    parts += ["", aligned(head, lines, left=2), ""]
    parts.append(f"pymeta is slower beyond the noise in {len(slower)} of {len(own)} comparisons.")
    return "\n".join(parts)
