"""The kernels of one instruction set share nothing with those of another.

csrc/cpu/kernels.cpp and cell.cpp are compiled once per instruction set and floating type. Were an
inline function compiled in two of these objects, the linker would keep one copy, and the AVX2 path
could run AVX-512 code. So an object may define one global symbol, its table, and no weak one; and
its machine code may name no register that its instruction set does not have. The objects of one
instruction set are held to the same rule: it costs nothing and needs no exception.
"""

import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import source_tree

ROOT = source_tree.need("csrc", "CMakeLists.txt")
FOLDER = re.compile(r"pymeta_kernels_(?P<isa>[a-z0-9]+)_(?P<real>float|double)\.dir$")
# Registers that an instruction set does not have: AVX-512's zmm (and masks) in AVX2, ymm in SSE2.
FORBIDDEN = {"baseline": r"%[yz]mm\d|%k[0-7]\b", "avx2": r"%zmm\d|%k[0-7]\b"}
EXPECTED = {
    "x86_64": {"baseline", "avx2", "avx512"},
    "aarch64": {"neon"},
    "arm64": {"neon"},
}.get(platform.machine(), {"baseline"})

nm = pytest.mark.skipif(platform.system() != "Linux", reason="reads ELF objects")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def program(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert found, f"no {name}: make .venv/stamp/test, and binutils from the system"
    return found


def up_to_date(build: Path, path: Path) -> bool:
    """Whether an object is newer than all that it was compiled from, as Ninja recorded it."""
    ninja = program("ninja")
    known = run(ninja, "-C", str(build), "-t", "deps", str(path.relative_to(build)))
    inputs = [build / line.strip() for line in known.splitlines() if line.startswith("    ")]
    ours = [p for p in inputs if ROOT in p.resolve().parents]
    changed = all(p.exists() and p.stat().st_mtime <= path.stat().st_mtime for p in ours)
    options = (build / "build.ninja").stat().st_mtime >= (ROOT / "CMakeLists.txt").stat().st_mtime
    return bool(ours) and changed and options


def chosen(build: Path) -> set[str]:
    """The instruction sets that a folder was configured for: PYMETA_ISAS, or all."""
    cache = (build / "CMakeCache.txt").read_text()
    found = re.search(r"^PYMETA_ISAS:\w+=(.+)$", cache, flags=re.MULTILINE)
    return set(found[1].split(";")) if found else EXPECTED


def find_objects(build: Path) -> dict[tuple[str, str, str], Path]:
    found = {}
    for folder in build.glob("CMakeFiles/pymeta_kernels_*.dir"):
        name = FOLDER.match(folder.name)
        if name["isa"] in chosen(build):  # others may lie there from an earlier configuration
            for path in folder.rglob("*.o"):
                found[name["isa"], name["real"], path.name.split(".")[0]] = path
    return found


def complete(objects: dict, isas: set[str]) -> bool:
    return set(objects) == {
        (isa, real, source)
        for isa in isas
        for real in ("float", "double")
        for source in ("kernels", "cell")
    }


def compile_objects(build: Path) -> dict[tuple[str, str, str], Path]:
    cmake, ninja = program("cmake"), program("ninja")
    run(
        *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
        *(f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DPYMETA_BUILD_PYTHON=OFF"),
    )
    run(cmake, "--build", str(build), "--target", "pymeta_core", "--parallel", "2")
    return find_objects(build)


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[tuple[str, str, str], Path]:
    """{(isa, real, source): object file}, from the package's own build if that is up to date."""
    tag = f"cp{''.join(platform.python_version_tuple()[:2])}-*"
    for build in (ROOT / "build").glob(tag):
        found = find_objects(build)
        if complete(found, chosen(build)) and all(
            up_to_date(build, path) for path in found.values()
        ):
            return found
    found = compile_objects(tmp_path_factory.mktemp("kernels"))
    assert complete(found, EXPECTED), f"found {sorted(found)}, not both types of {EXPECTED}"
    return found


@nm
def test_each_object_defines_its_table_and_nothing_else(objects):
    tables = {}
    for key, path in objects.items():
        symbols = [line.split()[-2:] for line in run(program("nm"), str(path)).splitlines()]
        weak = [name for kind, name in symbols if kind in "WwVvu"]
        assert not weak, f"{key}: weak symbols {weak}"
        shared = [name for kind, name in symbols if kind.isupper() and kind != "U"]
        assert len(shared) == 1, f"{key}: exports {shared}, not its one table"
        tables[key] = shared[0]
    assert len(set(tables.values())) == len(tables), f"two objects export one name: {tables}"


@nm
def test_no_object_calls_cpp_code_outside(objects):
    """What a kernel does not define itself is C's (memcpy, expf), never C++'s or the pool's."""
    for key, path in objects.items():
        names = [
            line.split()[-1]
            for line in run(program("nm"), "--undefined-only", str(path)).splitlines()
        ]
        mangled = [name for name in names if name.startswith("_Z")]
        assert not mangled, f"{key}: calls {mangled}"


@nm
def test_code_names_no_register_beyond_its_instruction_set(objects):
    held = [key for key in objects if key[0] in FORBIDDEN]
    if not held and EXPECTED & set(FORBIDDEN):
        pytest.skip(f"PYMETA_ISAS: {', '.join(sorted({isa for isa, *_ in objects}))} alone")
    for isa, real, source in held:
        path = objects[isa, real, source]
        found = re.findall(
            FORBIDDEN[isa], run(program("objdump"), "-d", "--no-show-raw-insn", str(path))
        )
        assert not found, f"{isa} {real} {source}: {len(found)} uses of {sorted(set(found))}"
    built = {isa for isa, *_ in objects}
    assert len(held) == 4 * len(built & set(FORBIDDEN))
