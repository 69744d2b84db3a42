"""What a block of the CUDA executor does for a task, counted on the emulated device.

The counting program is compiled here, three times, a quarter of a minute of one core each. Its
figures follow from the code alone: neither compiler nor machine has a part in them.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import source_tree

ROOT = source_tree.need("csrc/tests/counts", "bench/block_report.py", "CMakeLists.txt")
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def load_report():
    spec = importlib.util.spec_from_file_location("block_report", ROOT / "bench/block_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report = load_report()


def counting(folder: Path, *options: str) -> Path:
    """The counting program, compiled with these."""
    if COMPILER is None or sys.platform == "win32":
        pytest.skip("there is no C++ compiler")
    program = folder / "block_accesses"
    sources = [ROOT / "csrc/tests/counts/block_counts.cpp", ROOT / "csrc/runtime/check.cpp"]
    usual = ["-std=gnu++17", "-O1", "-w", "-ffp-contract=off", "-pthread", f"-I{ROOT / 'csrc'}"]
    usual += ["-DPYMETA_COUNT_ACCESSES", "-DPYMETA_EMULATE"]
    done = subprocess.run(
        [COMPILER, *usual, *options, *map(str, sources), "-o", str(program)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def of_family(family: str) -> list[str]:
    names = ("PYMETA_BLOCK", f"PYMETA_FAMILY={family}", "PYMETA_ISA=counted", "PYMETA_REAL=float")
    return [f"-D{name}" for name in names]


def said_by(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def count(program: Path, *cases: str) -> dict[str, dict]:
    """The rows of the cases that begin with these words, by case."""
    return {row["case"]: row for row in json.loads(said_by(program, *cases))}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return counting(tmp_path_factory.mktemp("counts"), *of_family("plain"))


@pytest.fixture(scope="module")
def counted(plain):
    """The rows of W1 and W3 in large batches and of W5."""
    return count(plain, "W1 T=65536", "W3 T=16384", "W5")


def test_options_are_those_of_the_build():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    for word in ("csrc/tests/counts/block_counts.cpp", "PYMETA_COUNT_", "PYMETA_ISA=counted"):
        assert word in cmake, word


@pytest.mark.parametrize(
    "case, barriers, multiply_adds, wavefronts",
    [
        ("W1 T=65536 K=1", 23, 7_848, 3_876),
        ("W3 T=16384 K=5", 83, 236_032, 83_632),
        ("W5 T=1000 K=20", 166, 581_120, 180_004),
    ],
)
def test_counts_are_what_they_were(case, barriers, multiply_adds, wavefronts, counted):
    """Fewer is better: then these numbers, and those in bench/README.md, follow."""
    row = counted[case]
    assert row["barriers"] == barriers
    assert row["multiply_adds"] == multiply_adds  # of all warps
    assert row["wavefronts"] == wavefronts


def test_counts_of_products_on_tensor_cores_are_what_they_were(tmp_path):
    """Less than half the wavefronts of float32, and as many as the planner reckons."""
    (row,) = count(counting(tmp_path, *of_family("tensor")), "W3 T=16384").values()
    assert (row["threads"], row["at_once"], row["barriers"]) == (256, 2, 83)
    assert (row["multiply_adds"], row["wavefronts"]) == (110_640, 37_536)
    assert row["wavefronts"] == pytest.approx(row["modelled"]["wavefronts"], rel=0.05)


def test_a_kernel_of_its_own_counts_the_same(tmp_path, plain, counted):
    """It has less control alone: the same barriers, products and accesses."""
    case, constants = "W1 T=65536 K=1", tmp_path / "constants.h"
    constants.write_text(said_by(plain, "--constants", case))
    own = count(counting(tmp_path, "-include", str(constants)), case)
    assert own == {case: counted[case]}


def test_the_planner_reckons_what_is_counted(counted):
    """It knows of no two lanes that ask for the same, so it reckons more, but not much."""
    for row in counted.values():
        assert 0.6 * row["modelled"]["wavefronts"] <= row["wavefronts"], row
        assert row["wavefronts"] <= 1.1 * row["modelled"]["wavefronts"], row


# Instructions of all warps of a task: control, which is counted on the host's processor and not
# here (bench/README.md), and a fifth more than the products' multiply-adds and accesses.
INSTRUCTIONS = {
    "W1 T=65536 K=1": 23_462,
    "W3 T=16384 K=5": 437_742,
    "W5 T=1000 K=20": 1_108_391,
}


def test_the_planner_reckons_with_the_instructions_that_were_counted(counted):
    """Its constants are for each operation, and none is exact: a sixth."""
    assert counted.keys() == INSTRUCTIONS.keys()
    for case, row in counted.items():
        assert row["modelled"]["instructions"] == pytest.approx(INSTRUCTIONS[case], rel=1 / 6), case


@pytest.mark.parametrize(
    "case, threads, tasks",
    [("W1 T=65536 K=1", 64, 7), ("W3 T=16384 K=5", 256, 2), ("W5 T=1000 K=20", 128, 3)],
)
def test_the_planner_chooses(case, threads, tasks, counted):
    """Another choice may be a better one: then bench/README.md says why."""
    assert (counted[case]["threads"], counted[case]["at_once"]) == (threads, tasks)


def test_tasks_at_once_have_registers_and_memory(counted):
    for row in counted.values():
        assert row["at_once"] * row["threads"] * 128 <= 65536, row
        assert row["at_once"] * (row["block_bytes"] + 1024) <= 233472, row
    assert counted["W1 T=65536 K=1"]["at_once"] >= 7
    assert counted["W3 T=16384 K=5"]["at_once"] >= 2


# ---- the report ---------------------------------------------------------------------------------

ROW = {
    "case": "W3 T=16384 K=5", "family": "plain", "threads": 256, "block_bytes": 140_000,
    "at_once": 1, "barriers": 9, "wavefronts": 100_000, "modelled": {"wavefronts": 110_000.4},
    "first_warp": {"multiply_adds": 1000, "accesses": 500},
}  # fmt: skip
COUNTED = {"instructions": 777, "all_instructions": 3_000}
CONTROL = {key: ROW[key] for key in ("case", "threads", "block_bytes", "barriers")}


def write(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


def test_report_holds_counts_against_goals(tmp_path, capsys):
    kernel = {"name": "cuda_plain_float::run_tasks_kernel", "arch": "sm_90", "stack_bytes": 1000}
    files = [
        write(tmp_path / "accesses", [ROW]),
        *("--instructions", write(tmp_path / "instructions", [{**CONTROL, **COUNTED}])),
        *("--kernels", write(tmp_path / "kernels", [{**kernel, "code_bytes": None}])),
    ]
    assert report.main(files) == 0
    said = capsys.readouterr().out
    row = "| W3 T=16384 K=5 | plain | 256 | 1 | 137 | 9 | 100,000 | 110,000 | 777 | 3,000 | 1,800 |"
    assert row in said
    for goal in (
        "100,000 wavefronts, goal 90,000",
        "1 task at once, goal 2",
        "1,000 bytes of stack",
    ):
        assert goal in said, goal
    assert "code" not in said


@pytest.mark.parametrize(
    "family, missed",
    [("plain", ["stack", "code"]), ("chains", ["stack"]), ("every", [])],
)
def test_report_has_goals_for_kernels_of_lists(family, missed, tmp_path, capsys):
    name = f"cuda_{family}_float::run_tasks_kernel"
    kernel = {"name": name, "arch": "sm_90", "stack_bytes": 513, "code_bytes": 600_001}
    rows = write(tmp_path / "accesses", [ROW])
    assert report.main([rows, "--kernels", write(tmp_path / "kernels", [kernel])]) == 0
    said = capsys.readouterr().out
    for what in ("stack", "code"):
        assert (f"sm_90, {family}: " in said and f"bytes of {what}, goal" in said) == (
            what in missed
        )


def test_report_refuses_counts_of_two_plans(tmp_path, capsys):
    other = {**CONTROL, **COUNTED, "threads": 64}
    files = [write(tmp_path / "a", [ROW]), "--instructions", write(tmp_path / "b", [other])]
    assert report.main(files) == 2
    assert "different plans" in capsys.readouterr().err
