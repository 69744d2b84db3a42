"""The whole suite as other machines would run it: python tests/arrangements.py [NAME ...] [-- ...]

One machine shows one of the ways in which torch, its BLAS and pymeta's kernels can compute, one
number of cores and one order of tests. This runs the suite in others, one after the other, and
prints a table of what passed in each. What stands after `--` goes to pytest. An arrangement that
this machine cannot have is named in the table, with the reason. The logs, with the failures, lie in
build/arrangements/NAME.txt, and the exit status is 1 if a test failed in any of them.

    make arrangements                                  all of them; they take an hour
    python tests/arrangements.py "isa avx2" "one core" -- tests/native/test_kernels.py -x
    python tests/arrangements.py --list
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOGS = HERE.parent / "build" / "arrangements"
COUNTS = ("passed", "failed", "error", "skipped", "xfailed")


@dataclass(frozen=True)
class Arrangement:
    """How the suite is run.

    Attributes:
        environment: variables that are set.
        needs: what the machine has to have; a key of `lacking`.
        one_core: on one core alone, which another process keeps busy.
    """

    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None
    one_core: bool = False


def threads(count: int) -> dict[str, str]:
    return {"PYMETA_NUM_THREADS": str(count), "OMP_NUM_THREADS": str(count)}


ARRANGEMENTS = {
    "as it is": Arrangement(),
    "aten default": Arrangement({"ATEN_CPU_CAPABILITY": "default"}),
    "aten avx2": Arrangement({"ATEN_CPU_CAPABILITY": "avx2"}, "avx2"),
    "mkl compatible": Arrangement({"MKL_CBWR": "COMPATIBLE"}, "mkl"),
    "mkl avx2": Arrangement({"MKL_CBWR": "AVX2"}, "mkl"),
    "onednn avx2": Arrangement({"ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2"),
    "isa baseline": Arrangement({"PYMETA_ISA": "baseline"}, "isa baseline"),
    "isa avx2": Arrangement({"PYMETA_ISA": "avx2"}, "isa avx2"),
    "isa avx512": Arrangement({"PYMETA_ISA": "avx512"}, "isa avx512"),
    "one thread": Arrangement(threads(1)),
    "two threads": Arrangement(threads(2)),
    "one core": Arrangement(needs="affinity", one_core=True),
    "random order": Arrangement({"PYMETA_TEST_ORDER": "random"}),
    "other rounding": Arrangement({"PYMETA_TEST_ROUNDING": "1"}, "torch"),
}


def lacking(need: str | None) -> str | None:
    """Why this machine cannot have an arrangement, or None."""
    if need is None:
        return None
    if need == "affinity":
        return None if hasattr(os, "sched_setaffinity") else "no sched_setaffinity here"
    if need.startswith("isa "):
        from pymeta import native

        name = need.removeprefix("isa ")
        built = ", ".join(native.isas())
        return None if name in native.isas() else f"pymeta runs {built} here"
    try:
        import torch
    except ImportError:
        return "no torch"
    if need == "mkl" and not torch.backends.mkl.is_available():
        return "this torch has no MKL"
    capability = torch.backends.cpu.get_cpu_capability()
    if need == "avx2" and capability not in ("AVX2", "AVX512"):
        return f"torch's capability is {capability}"
    return None


def _busy() -> None:
    while True:
        pass


@contextmanager
def on_one_core(wanted: bool):
    """This process and its children on one core, beside a process that never rests."""
    if not wanted:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    neighbour = multiprocessing.get_context("fork").Process(target=_busy, daemon=True)
    neighbour.start()
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.join()
        os.sched_setaffinity(0, before)


def counts_of(text: str) -> dict[str, int]:
    """pytest's last line as numbers; empty where it printed none."""
    lines = [line for line in text.splitlines() if re.search(r" in [\d.]+s", line)]
    found = re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed)", lines[-1] if lines else "")
    return {name.removesuffix("s"): int(n) for n, name in found}


def run(name: str, options: list[str]) -> tuple[dict[str, int], int, float]:
    """One arrangement: its counts, pytest's exit status, and the seconds it took."""
    arrangement, log = ARRANGEMENTS[name], LOGS / f"{name.replace(' ', '_')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    with on_one_core(arrangement.one_core), open(log, "w") as out:
        status = subprocess.run(
            command, cwd=HERE.parent, stdout=out, stderr=subprocess.STDOUT, check=False,
            env={**os.environ, **arrangement.environment},
        ).returncode  # fmt: skip
    return counts_of(log.read_text()), status, time.monotonic() - begin


def row(name: str, cells: list[object]) -> str:
    return f"| {name:15} |" + "".join(f" {cell!s:>7} |" for cell in cells)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description="The suite as other machines would run it.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="these arrangements alone")
    parser.add_argument("--list", action="store_true", help="name the arrangements")
    options = parser.parse_args(arguments[:at])
    if unknown := [n for n in options.names if n not in ARRANGEMENTS]:
        parser.error(f"no arrangement {unknown[0]!r}; there are {', '.join(ARRANGEMENTS)}")
    if options.list:
        print(*ARRANGEMENTS, sep="\n")
        return 0
    print(row("arrangement", [*COUNTS, "seconds"]), row("---", ["---:"] * 6), sep="\n", flush=True)
    red = []
    for name in options.names or ARRANGEMENTS:
        if why := lacking(ARRANGEMENTS[name].needs):
            print(f"| {name:15} | not on this machine: {why}", flush=True)
            continue
        counts, status, seconds = run(name, arguments[at + 1 :])
        print(row(name, [*(counts.get(c, 0) for c in COUNTS), f"{seconds:.0f}"]), flush=True)
        if status or not counts.get("passed"):
            red.append(name)
    if red:
        print(f"not green: {', '.join(red)}; the logs are in {LOGS}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
