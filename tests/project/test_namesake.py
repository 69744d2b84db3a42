"""The registry's other `pymeta`, a parser generator, in the same folder: told, with the cure."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pymeta

PACKAGE = Path(pymeta.__file__).parent
PARSERS = ("boot.py", "builder.py", "grammar.py", "runtime.py")  # and an __init__.py without code


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a copy of the package's Python files, first in a new process's sys.path."""
    keep = shutil.ignore_patterns("__pycache__", "*.pyi")
    shutil.copytree(PACKAGE, tmp_path / "pymeta", ignore=keep)
    return tmp_path


def run(site: Path, *words: str) -> subprocess.CompletedProcess:
    # -P, -S and the like would lose numpy; the finder of an editable install would come first
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in repr(f)]; "
        f"sys.path.insert(0, {str(site)!r}); "
    )
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code + words[0], *words[1:]],
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_nothing_is_said_where_it_is_not_there(site: Path):
    done = run(site, "import pymeta, pymeta.native; print(pymeta.__file__)")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.strip() == str(site / "pymeta" / "__init__.py")


def test_its_files_beside_ours_are_a_warning(site: Path):
    for name in PARSERS:
        (site / "pymeta" / name).write_text("")
    done = run(site, "import pymeta; print(pymeta.SGD(0.1))")
    assert done.returncode == 0 and "SGD" in done.stdout
    assert "UserWarning: the parser generator" in done.stderr
    assert "pip uninstall -y pymeta pymeta-kernels" in done.stderr


def test_its_init_over_ours_is_an_error(site: Path):
    for name in (*PARSERS, "__init__.py"):
        (site / "pymeta" / name).write_text("")
    done = run(site, "import pymeta.native")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "ImportError: " in done.stderr and "belongs to another package" in done.stderr
    done = run(site, "from pymeta.cli import main; sys.exit(main(['--version']))")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("pymeta: ") and "pip install pymeta-kernels" in done.stderr
