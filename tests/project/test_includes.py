"""What may include what in csrc/: `bind -> runtime -> cpu, cuda -> core`, without a circle."""

import re
from pathlib import Path

import pytest
import source_tree

CSRC = source_tree.need("csrc") / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
KINDS = {".h", ".cpp", ".cu", ".cuh"}
LONGEST = 560  # lines of a file

# What each room may include besides itself.
ROOMS = {
    "core": set(),
    "cpu": {"core"},
    "cuda": {"core"},
    "runtime": {"core", "cpu", "cuda"},
    "bind": {"core", "cuda", "runtime"},
    "tests": {"core", "cuda", "runtime"},
}


def included(csrc: Path) -> dict[Path, list[Path]]:
    """{file: files of csrc that it includes}, all of them resolved."""
    files = sorted(p.resolve() for p in csrc.rglob("*") if p.suffix in KINDS)
    found = {}
    for file in files:
        names = INCLUDE.findall(file.read_text())
        found[file] = [(file.parent / name).resolve() for name in names]
    return found


def room(file: Path, csrc: Path) -> str:
    return file.relative_to(csrc.resolve()).parts[0]


def trespasses(csrc: Path) -> list[str]:
    """Includes from a room that may not know the other one, and of files that are not there."""
    found = []
    for file, others in included(csrc).items():
        here = room(file, csrc)
        for other in others:
            known = other.is_file() and other.is_relative_to(csrc.resolve())
            if not known or room(other, csrc) not in ROOMS[here] | {here}:
                found.append(f"{file.relative_to(csrc.resolve())} includes {other}")
    return found


def circle(csrc: Path) -> list[str]:
    """Files that include one another in a circle, if there are any."""
    graph, done = included(csrc), set()

    def walk(file: Path, path: list[Path]) -> list[Path]:
        if file in path:
            return [*path[path.index(file) :], file]
        if file in done:
            return []
        for other in graph.get(file, []):
            if met := walk(other, [*path, file]):
                return met
        done.add(file)
        return []

    for file in graph:
        if met := walk(file, []):
            return [p.name for p in met]
    return []


def test_rooms_include_what_is_below_them():
    graph = included(CSRC)
    assert {room(file, CSRC) for file in graph} == set(ROOMS)
    assert sum(map(len, graph.values())) > 100
    assert trespasses(CSRC) == []


def test_there_is_no_circle():
    assert circle(CSRC) == []


def test_no_file_is_long():
    long = {
        str(file.relative_to(CSRC.resolve())): lines
        for file in included(CSRC)
        if (lines := len(file.read_text().splitlines())) > LONGEST
    }
    assert long == {}


@pytest.mark.parametrize("planted", ["../cpu/b.h", "../nowhere.h"])
def test_a_trespass_is_seen(planted, tmp_path):
    for name in ("core", "cpu"):
        (tmp_path / name).mkdir()
    (tmp_path / "cpu" / "b.h").write_text('#include "../core/a.h"\n')
    (tmp_path / "core" / "a.h").write_text("// nothing\n")
    assert trespasses(tmp_path) == [] and circle(tmp_path) == []
    (tmp_path / "core" / "a.h").write_text(f'#include "{planted}"\n')
    assert len(trespasses(tmp_path)) == 1


def test_a_circle_is_seen(tmp_path):
    (tmp_path / "core").mkdir()
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / "core" / f"{name}.h").write_text(f'#include "{other}.h"\n')
    assert sorted(circle(tmp_path)[:-1]) == ["a.h", "b.h", "c.h"]
