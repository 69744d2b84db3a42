"""Python and C++ keep the style of pyproject.toml and .clang-format; `make format` applies it."""

import shutil
import subprocess
import sys
import sysconfig

import source_tree

ROOT = source_tree.need("csrc", ".clang-format")
FOLDERS = [
    name
    for name in ("pymeta", "tests", "bench", "changelog.d", "docs", "examples")
    if (ROOT / name).is_dir()
]


def tool(name: str) -> str:
    """The program that pip installed beside this Python."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert found, f"{name} is not installed: make .venv/stamp/test"
    return found


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command[:3])}\n{done.stdout}{done.stderr}"


def test_the_folders_are_found():
    assert {"pymeta", "tests"} <= set(FOLDERS), sys.path


def test_ruff_check():
    run(tool("ruff"), "check", *FOLDERS)


def test_ruff_format():
    run(tool("ruff"), "format", "--check", "--diff", *FOLDERS)


def test_clang_format():
    kinds = {".h", ".cpp", ".cu", ".cuh"}
    sources = sorted(str(p) for p in (ROOT / "csrc").rglob("*") if p.suffix in kinds)
    assert sources, "no C++ sources below csrc"
    run(tool("clang-format"), "--dry-run", "-Werror", *sources)
