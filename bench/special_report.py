"""Kernels of single calls (csrc/cuda/special.h) beside the kernel of all calls, without a GPU.

    python bench/special_report.py build/counts/block_instructions_plain [--arch sm_90]

For cases of the benchmark, planned for an H200: what the first warp executes for a task outside of
products, counted on the emulated device as `block_report.py` does, with either kernel; how long
nvcc takes for the kernel, and what ptxas made of it. Needs a C++ compiler; without nvcc the last
columns are empty, without cuobjdump the code's size. `make block-report` runs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kernel_report

ROOT = Path(__file__).resolve().parents[1]
CASES = (
    "W1 T=65536 K=1", "W1 T=4096 K=5", "W3 T=16384 K=5", "W5 T=1000 K=20", "W2 T=1024 K=1",
)  # fmt: skip
# As CMakeLists.txt compiles block_instructions_*.
COUNTING = (
    "-std=gnu++17", "-O3", "-w", "-ffp-contract=off", "-fno-math-errno", "-fno-tree-vectorize",
    "-fno-tree-slp-vectorize", "-mfma", "-pthread", "-DPYMETA_COUNT_INSTRUCTIONS",
    "-DPYMETA_EMULATE",
)  # fmt: skip


def load(path: Path) -> Any:
    """A Python file of this tree that is no module of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def output_of(*command: str | Path) -> str:
    """What a program prints; it has to end well."""
    done = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def counted(case: str, constants: Path, folder: Path) -> dict[str, Any]:
    """The row of a case's own kernel."""
    program, check = folder / "counts", folder / "check.o"
    output_of("c++", *COUNTING, "-c", ROOT / "csrc/runtime/check.cpp", "-o", check)
    counts = ROOT / "csrc/tests/counts/block_counts.cpp"
    output_of("c++", *COUNTING, "-include", constants, counts, check, "-o", program)
    return json.loads(output_of(program, case))[0]


def compiled(constants: Path, folder: Path, arch: str) -> dict[str, Any]:
    """What nvcc made of the kernel; nothing without it."""
    if shutil.which("nvcc") is None:
        return {}
    one_source = load(ROOT / "cmake/one_source.py")
    header, standard = (ROOT / "csrc/cuda" / f"special_{name}.h" for name in ("kernel", "std"))
    source, cubin, log = (folder / f"kernel.{end}" for end in ("cu", "cubin", "log"))
    source.write_text(constants.read_text() + one_source.whole(header, standard))
    began = time.perf_counter()
    log.write_text(
        output_of(
            "nvcc", "-std=c++17", "-w", "-fmad=false", f"-arch={arch}", "-cubin", "-Xptxas", "-v",
            source, "-o", cubin,
        )
    )  # fmt: skip
    seconds = time.perf_counter() - began
    (kernel,) = kernel_report.collect([cubin] if shutil.which("cuobjdump") else [], [log])
    return {"seconds": seconds, **vars(kernel)}


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    head, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("counts", type=Path, metavar="PROGRAM")
    parser.add_argument("--arch", default="sm_90")
    given = parser.parse_args(arguments)
    print(
        "| case | control | all warps | with its own kernel | all warps | registers | stack "
        "| spills | code | nvcc, s |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            constants = folder / "constants.h"
            constants.write_text(output_of(given.counts.resolve(), "--constants", case))
            general = json.loads(output_of(given.counts.resolve(), case))[0]
            own = counted(case, constants, folder)
            kernel = compiled(constants, folder, given.arch)
        numbers = [row[k] for row in (general, own) for k in ("instructions", "all_instructions")]
        numbers += [kernel.get(k) for k in ("registers", "stack_bytes", "spill_store_bytes")]
        numbers += [kernel.get("code_bytes"), kernel.get("seconds")]
        cells = ("-" if n is None else f"{n:,.0f}" for n in numbers)
        print(f"| {case} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
