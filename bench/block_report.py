"""What a block of the CUDA executor does for a task, beside the goals, without a GPU.

    python bench/block_report.py accesses_*.json --instructions instructions_*.json
    python bench/block_report.py accesses_*.json --kernels kernels.json

The first two are what the programs `block_accesses_*` and `block_instructions_*` print, one for
each family of calls (csrc/tests/counts): the plan of the benchmark's cases for an H200, and counts
of emulated blocks, each for one task. The third is what `kernel_report.py --json` wrote. `make
cuda` makes all three.

    wavefronts      of shared memory in products, by a model of its banks; "modelled" is what the
                    planner reckons, to which no two lanes ask for the same
    control         instructions of the first warp outside of products, counted on the host's
                    processor
    all warps       the same of all warps together
    products        instructions of a warp in products: its multiply-adds and accesses, and a fifth
                    for the loops around them, as in the code that nvcc makes
    tasks           of a multiprocessor at once, by shared memory, registers and warps
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# By case: wavefronts, instructions of a warp, tasks of a multiprocessor. None: no goal.
GOALS: dict[str, tuple[int | None, int | None, int | None]] = {
    "W1 T=65536 K=1": (5_000, 10_000, None),
    "W3 T=16384 K=5": (90_000, None, 2),
}
# Bytes of the kernels of the families whose calls are lists of operations.
KERNEL_GOALS = {
    "plain": {"stack_bytes": 512, "code_bytes": 600_000},
    "chains": {"stack_bytes": 512},
}
LOOPS = 0.2  # instructions of a product's loops, of those inside

Row = dict[str, Any]


def product_instructions(row: Row) -> int:
    """Of the first warp, in products."""
    first = row["first_warp"]
    return round((1 + LOOPS) * (first["multiply_adds"] + first["accesses"]))


def join(accesses: list[Row], instructions: list[Row]) -> list[Row]:
    """The rows of both programs, by case; a ValueError where their plans differ."""
    control = {row["case"]: row for row in instructions}
    joined = []
    for row in accesses:
        other = control.get(row["case"])
        if other and any(row[k] != other[k] for k in ("threads", "block_bytes", "barriers")):
            raise ValueError(f"{row['case']}: the two files are of different plans")
        joined.append({
            **row,
            "control": other["instructions"] if other else None,
            "control_of_all": other["all_instructions"] if other else None,
            "products": product_instructions(row),
        })  # fmt: skip
    return joined


def missed(rows: list[Row], kernels: list[Row]) -> list[str]:
    """The goals that are not met, in words."""
    found = []
    for row in rows:
        wavefronts, instructions, tasks = GOALS.get(row["case"], (None, None, None))
        if wavefronts is not None and row["wavefronts"] > wavefronts:
            found.append(f"{row['case']}: {row['wavefronts']:,} wavefronts, goal {wavefronts:,}")
        if instructions is not None and row["control"] is not None:
            whole = row["control"] + row["products"]
            if whole > instructions:
                found.append(f"{row['case']}: {whole:,} instructions, goal {instructions:,}")
        if tasks is not None and row["at_once"] < tasks:
            found.append(f"{row['case']}: {row['at_once']} task at once, goal {tasks}")
    for kernel in kernels:
        if not all(word in kernel["name"] for word in ("run_tasks", "float")):
            continue
        family = next((name for name in KERNEL_GOALS if f"_{name}_" in kernel["name"]), None)
        for key, goal in KERNEL_GOALS.get(family or "", {}).items():
            if kernel[key] is not None and kernel[key] > goal:
                what = key.removesuffix("_bytes")
                found.append(
                    f"{kernel['arch']}, {family}: {kernel[key]:,} bytes of {what}, goal {goal:,}"
                )
    return found


def table(rows: list[Row]) -> str:
    """A Markdown table."""
    lines = [
        "| case | family | threads | tasks | shared memory, KiB | barriers | wavefronts | modelled "
        "| control | all warps | products |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        numbers = (
            *(row["threads"], row["at_once"], round(row["block_bytes"] / 1024), row["barriers"]),
            *(row["wavefronts"], round(row["modelled"]["wavefronts"])),
            *(row["control"], row["control_of_all"], row["products"]),
        )
        cells = ("-" if n is None else f"{n:,}" for n in numbers)
        lines.append(f"| {row['case']} | {row['family']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read(*paths: Path) -> list[Row]:
    """The rows of all files."""
    return [row for path in paths for row in json.loads(path.read_text())]


def main(arguments: list[str] | None = None) -> int:
    """Print the table and the goals that are missed; the exit code."""
    head, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("accesses", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--instructions", nargs="+", type=Path, metavar="FILE", default=[])
    parser.add_argument("--kernels", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    try:
        rows = join(read(*given.accesses), read(*given.instructions))
        kernels = read(given.kernels) if given.kernels else []
    except (OSError, ValueError) as error:
        print(f"block_report: {error}", file=sys.stderr)
        return 2
    print(table(rows), end="\n\n")
    for line in missed(rows, kernels):
        print(f"Missed: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
