"""What is shipped: the extension's links and exports, what the wheel and the sdist hold.

The extension that is imported here is always looked at. The archives are those in the folder that
PYMETA_DIST names, and PYMETA_SOURCE is where they were built from (`make wheel` sets both). Each
check of an archive is first made to fail on a doctored copy of one that is put together from the
installed files.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from importlib.metadata import metadata
from pathlib import Path

import pytest

import pymeta
from pymeta import native

VERSION = pymeta.__version__
PACKAGE = Path(pymeta.__file__).parent
SOURCE = Path(os.environ.get("PYMETA_SOURCE", Path(__file__).resolve().parents[2]))
INFO = f"pymeta_kernels-{VERSION}.dist-info"
DIST_INFO = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
LIMIT = 20_000_000  # bytes of an archive

elf = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")

# The C library, the unwinder (glibc loads it too) and the loader: neither torch, CUDA or Python,
# nor the C++ runtime, which is linked in.
SYSTEM = re.compile(r"(libc|libm|libgcc_s|libpthread|libdl|librt)\.so\.\d+|ld-linux[-\w]*\.so\.\d+")
IN_WHEEL = re.compile(
    rf"pymeta/(\w+/)*\w+\.py|pymeta/bench/chosen\.json|pymeta/py\.typed|pymeta/_native\.pyi|pymeta/_native\.[\w-]+\.(so|pyd)"
    rf"|{re.escape(INFO)}/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/LICENSE|sboms/[\w.-]+\.json)"
)
IN_SDIST = re.compile(
    r"PKG-INFO|pyproject\.toml|CMakeLists\.txt|LICENSE|README\.md|CHANGELOG\.md"
    r"|cmake/[\w-]+\.(cmake|map|py)|csrc/README\.md|csrc/(\w+/)+\w+\.(h|cpp|cu|cuh)"
    r"|pymeta/(\w+/)*\w+\.pyi?|pymeta/bench/chosen\.json|pymeta/py\.typed|tests/(\w+/)*[\w.-]+"
)


# ---- the extension ------------------------------------------------------------------------------


def link_problems(path: Path) -> list[str]:
    """What the dynamic section of an extension should not say."""
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile

    problems = []
    with path.open("rb") as file:
        read = ELFFile(file)
        (dynamic,) = (s for s in read.iter_sections() if isinstance(s, DynamicSection))
        for tag in dynamic.iter_tags():
            if tag.entry.d_tag == "DT_NEEDED" and not SYSTEM.fullmatch(tag.needed):
                problems.append(f"needs {tag.needed}")
            if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH", "DT_TEXTREL"):
                problems.append(f"has {tag.entry.d_tag}")
        for segment in read.iter_segments("PT_GNU_STACK"):
            if segment["p_flags"] & 1:
                problems.append("asks for an executable stack")
    return problems


def exports(path: Path) -> list[str]:
    """The symbols that an extension shows to others."""
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".dynsym")
        return [
            symbol.name
            for symbol in table.iter_symbols()
            if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_LOCAL"
        ]


@pytest.fixture
def extension() -> Path:
    module = native.extension()
    if b"__asan_init" in (code := Path(module.__file__).read_bytes()) or b"__tsan_init" in code:
        pytest.skip("a sanitizer's build")
    return Path(module.__file__)


def doctored(path: Path, folder: Path, old: bytes, new: bytes) -> Path:
    """A copy with one string replaced by another of the same length."""
    code = path.read_bytes()
    assert len(old) == len(new) and old in code
    copy = folder / path.name
    copy.write_bytes(code.replace(old, new))
    return copy


@elf
def test_the_extension_needs_the_c_library_alone(extension):
    assert link_problems(extension) == []


@elf
def test_another_library_is_noticed(extension, tmp_path):
    copy = doctored(extension, tmp_path, b"\0libc.so.6\0", b"\0libt.so.6\0")
    assert link_problems(copy) == ["needs libt.so.6"]
    for name in ("libtorch.so", "libc10.so", "libcudart.so.12", "libstdc++.so.6", "libcrypt.so.1"):
        assert not SYSTEM.fullmatch(name)


@elf
def test_the_extension_shows_its_entry_alone(extension):
    assert exports(extension) == ["PyInit__native"]


@elf
def test_another_export_is_noticed(extension, tmp_path):
    copy = doctored(extension, tmp_path, b"\0PyInit__native\0", b"\0PyInit__mative\0")
    assert exports(copy) == ["PyInit__mative"]
    torch = pytest.importorskip("torch")
    assert len(exports(Path(torch._C.__file__))) > 1


# ---- the wheel ----------------------------------------------------------------------------------

Files = dict[str, bytes]


def hash_of(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def file_problems(files: Files, allowed: re.Pattern[str], wanted: set[str]) -> list[str]:
    problems = [f"stray {name}" for name in files if not allowed.fullmatch(name)]
    problems += [f"no {name}" for name in sorted(wanted - set(files))]
    return problems


def record_problems(files: Files) -> list[str]:
    """Whether RECORD names every file with its hash and length."""
    rows = list(csv.reader(io.StringIO(files[f"{INFO}/RECORD"].decode())))
    listed = {name: (digest, size) for name, digest, size in rows}
    problems = [f"not in RECORD: {name}" for name in sorted(set(files) - set(listed))]
    problems += [f"only in RECORD: {name}" for name in sorted(set(listed) - set(files))]
    for name, data in files.items():
        said = listed.get(name, ("", ""))
        if name != f"{INFO}/RECORD" and said != (f"sha256={hash_of(data)}", str(len(data))):
            problems.append(f"RECORD is wrong about {name}")
    return problems


def metadata_problems(text: str) -> list[str]:
    found = HeaderParser().parsestr(text)
    problems = []
    expected = {"Name": "pymeta-kernels", "Version": VERSION, "License-Expression": "Apache-2.0"}
    expected |= {"Requires-Python": ">=3.10", "Description-Content-Type": "text/markdown"}
    for key, value in expected.items():
        if found[key] != value:
            problems.append(f"{key} is {found[key]}")
    always = [r for r in found.get_all("Requires-Dist", []) if "extra ==" not in r]
    if {re.split(r"[^\w-]", r)[0] for r in always} != {"numpy", "safetensors"}:
        problems.append(f"requires {', '.join(always)}")
    if not {"torch", "sklearn"} <= set(found.get_all("Provides-Extra", [])):
        problems.append("lacks an extra")
    if "Typing :: Typed" not in found.get_all("Classifier", []):
        problems.append("not classified as typed")
    return problems


def wheel_problems(files: Files, size: int) -> list[str]:
    wanted = {
        "pymeta/py.typed",
        "pymeta/_native.pyi",
        "pymeta/__init__.py",
        "pymeta/models/adapter.py",
    }
    wanted |= {f"{INFO}/{name}" for name in DIST_INFO}
    problems = file_problems(files, IN_WHEEL, wanted)
    if sum(name.endswith((".so", ".pyd")) for name in files) != 1:
        problems.append("not one extension")
    if size > LIMIT:
        problems.append(f"{size} bytes")
    if f"{INFO}/RECORD" in files:
        problems += record_problems(files)
    if f"{INFO}/METADATA" in files:
        problems += metadata_problems(files[f"{INFO}/METADATA"].decode())
    return problems


def with_record(files: Files) -> Files:
    """The same with a RECORD that is right."""
    rows = [(n, f"sha256={hash_of(d)}", len(d)) for n, d in files.items() if "RECORD" not in n]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([*rows, (f"{INFO}/RECORD", "", "")])
    return {**files, f"{INFO}/RECORD": text.getvalue().encode()}


@pytest.fixture
def good_wheel() -> Files:
    """What a wheel of the installed package would hold."""
    names = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".pyi", ".typed")]
    files = {f"pymeta/{p.relative_to(PACKAGE).as_posix()}": p.read_bytes() for p in names}
    code = Path(native.extension().__file__)
    files[f"pymeta/{code.name}"] = code.read_bytes()
    files[f"{INFO}/METADATA"] = _metadata()
    files[f"{INFO}/WHEEL"] = b"Wheel-Version: 1.0\n"
    files[f"{INFO}/licenses/LICENSE"] = b"Apache"
    files[f"{INFO}/entry_points.txt"] = b"[console_scripts]\npymeta = pymeta.cli:main\n"
    return with_record(files)


def _metadata() -> bytes:
    """As pyproject.toml has it now, not as it was when the package was installed for editing."""
    lines = [f"Metadata-Version: 2.4\nName: pymeta-kernels\nVersion: {VERSION}"]
    lines += ["License-Expression: Apache-2.0", "Requires-Python: >=3.10"]
    lines += ["Description-Content-Type: text/markdown", "Classifier: Typing :: Typed"]
    lines += ["Requires-Dist: numpy>=1.24", "Requires-Dist: safetensors>=0.4.3"]
    lines += ['Requires-Dist: torch>=2.4; extra == "torch"', "Provides-Extra: torch"]
    return "\n".join([*lines, "Provides-Extra: sklearn", "", "Text"]).encode()


def without(name: str):
    return lambda files: with_record({n: d for n, d in files.items() if n != name})


def adding(name: str, data: bytes = b""):
    return lambda files: with_record({**files, name: data})


def replacing(name: str, old: bytes, new: bytes):
    def change(files: Files) -> Files:
        assert old in files[name]
        return with_record({**files, name: files[name].replace(old, new)})

    return change


METADATA = f"{INFO}/METADATA"
DAMAGE = {
    "stray tests/algorithms/test_maml.py": adding("tests/algorithms/test_maml.py"),
    "stray pymeta/__pycache__/maml.cpython-311.pyc": adding(
        "pymeta/__pycache__/maml.cpython-311.pyc"
    ),
    "stray pymeta.libs/libgomp-1.so.1": adding("pymeta.libs/libgomp-1.so.1"),
    "stray csrc/core/call/network.h": adding("csrc/core/call/network.h"),
    f"no {INFO}/entry_points.txt": without(f"{INFO}/entry_points.txt"),
    "no pymeta/py.typed": without("pymeta/py.typed"),
    "no pymeta/_native.pyi": without("pymeta/_native.pyi"),
    "not one extension": adding("pymeta/_native.cp39-win_amd64.pyd"),
    "not in RECORD: pymeta/odd.py": lambda files: {**files, "pymeta/odd.py": b""},
    "RECORD is wrong about pymeta/algorithms/maml.py": lambda files: {
        **files,
        "pymeta/algorithms/maml.py": b"changed",
    },
    "requires numpy>=1.24, safetensors>=0.4.3, torch>=2.4": replacing(
        METADATA, b'; extra == "torch"', b""
    ),
    "Version is 0.0.0": replacing(METADATA, f"\nVersion: {VERSION}".encode(), b"\nVersion: 0.0.0"),
    "lacks an extra": replacing(METADATA, b"Provides-Extra: torch\n", b""),
}


def test_a_good_wheel_has_no_problems(good_wheel):
    assert wheel_problems(good_wheel, 1) == []


@pytest.mark.parametrize("problem", DAMAGE)
def test_damage_to_a_wheel_is_noticed(good_wheel, problem):
    assert problem in wheel_problems(DAMAGE[problem](good_wheel), 1)


def test_a_heavy_wheel_is_noticed(good_wheel):
    assert wheel_problems(good_wheel, 20_000_001) == ["20000001 bytes"]


# ---- the sdist ----------------------------------------------------------------------------------


def sdist_problems(files: Files, size: int) -> list[str]:
    wanted = {"PKG-INFO", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"}
    wanted |= {"cmake/exports.map", "csrc/bind/module.cpp", "csrc/cpu/kernels.cpp"}
    wanted |= {"pymeta/__init__.py", "pymeta/py.typed", "pymeta/_native.pyi", "tests/conftest.py"}
    problems = file_problems(files, IN_SDIST, wanted)
    if size > LIMIT:
        problems.append(f"{size} bytes")
    return problems


SMALL_SDIST = [
    *("PKG-INFO", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "cmake/exports.map"),
    *("csrc/bind/module.cpp", "csrc/cpu/kernels.cpp", "csrc/cuda/block.cuh", "pymeta/__init__.py"),
    *("pymeta/py.typed", "pymeta/_native.pyi", "pymeta/bench/__main__.py", "tests/conftest.py"),
]


def test_a_small_sdist_has_no_problems():
    assert sdist_problems(dict.fromkeys(SMALL_SDIST, b""), 1) == []


@pytest.mark.parametrize(
    "name",
    [
        "build/cp311/_native.so",
        "pymeta/_native.cpython-311-x86_64-linux-gnu.so",
        "csrc/a.o",
        "docs/demo.png",
        ".github/workflows/ci.yml",
    ],
)
def test_a_stray_file_in_an_sdist_is_noticed(name):
    assert sdist_problems(dict.fromkeys([*SMALL_SDIST, name], b""), 1) == [f"stray {name}"]


@pytest.mark.parametrize("name", ["pymeta/py.typed", "CMakeLists.txt", "cmake/exports.map"])
def test_a_file_missing_in_an_sdist_is_noticed(name):
    rest = [n for n in SMALL_SDIST if n != name]
    assert sdist_problems(dict.fromkeys(rest, b""), 1) == [f"no {name}"]


# ---- what `make wheel` built --------------------------------------------------------------------


def built(pattern: str) -> list[Path]:
    folder = os.environ.get("PYMETA_DIST")
    if folder is None:
        pytest.skip("PYMETA_DIST names no folder with archives (make wheel does)")
    found = sorted(Path(folder).glob(pattern))
    assert found, f"no {pattern} in {folder}"
    return found


def same_as_source(files: Files, folders: tuple[str, ...]) -> list[str]:
    """Python, C++ and CUDA files of the source tree that the archive lacks or has otherwise."""
    kinds = {".py", ".pyi", ".typed", ".h", ".cpp", ".cu", ".cuh"}
    paths = [p for f in folders for p in (SOURCE / f).rglob("*") if p.suffix in kinds]
    assert paths
    names = {p.relative_to(SOURCE).as_posix(): p for p in paths}
    return [n for n, p in sorted(names.items()) if files.get(n) != p.read_bytes()]


def test_the_wheel(tmp_path):
    for path in built("*.whl"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            members = [info for info in archive.infolist() if not info.is_dir()]
            files = {info.filename: archive.read(info) for info in members}
        assert wheel_problems(files, path.stat().st_size) == []
        assert same_as_source(files, ("pymeta",)) == []
        interpreter, abi, platforms = path.stem.split("-")[2:]
        wanted = {f"{interpreter}-{abi}-{platform}" for platform in platforms.split(".")}
        said = HeaderParser().parsestr(files[f"{INFO}/WHEEL"].decode()).get_all("Tag")
        assert set(said) == wanted
        assert not platforms.startswith("linux_"), "it was not repaired"
        (name,) = (name for name in files if name.endswith((".so", ".pyd")))
        assert str(SOURCE).encode() not in files[name], "it names the folder it was built in"
        if files[name].startswith(b"\x7fELF"):
            (tmp_path / "_native.so").write_bytes(files[name])
            assert link_problems(tmp_path / "_native.so") == []
            assert exports(tmp_path / "_native.so") == ["PyInit__native"]


def test_the_sdist():
    for path in built("*.tar.gz"):
        with tarfile.open(path) as archive:
            members = [m for m in archive.getmembers() if not m.isdir()]
            assert all(m.isfile() for m in members)
            contents = {m.name: archive.extractfile(m).read() for m in members}
        top = f"pymeta_kernels-{VERSION}/"
        assert all(name.startswith(top) for name in contents)
        files = {name.removeprefix(top): data for name, data in contents.items()}
        assert sdist_problems(files, path.stat().st_size) == []
        assert same_as_source(files, ("pymeta", "csrc", "tests")) == []
        assert metadata_problems(files["PKG-INFO"].decode()) == []


def test_the_installed_metadata():
    """An editable install keeps those of the day it was made, so only what never changes."""
    found = metadata("pymeta-kernels")
    assert found["Name"] == "pymeta-kernels" and found["License-Expression"] == "Apache-2.0"
    assert (PACKAGE / "py.typed").exists() and (PACKAGE / "_native.pyi").exists()
