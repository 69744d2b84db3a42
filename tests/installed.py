"""Test a wheel as a stranger gets it: python tests/installed.py WHEEL [--torch VERSION] [TESTS...]

Makes a fresh environment, installs the wheel and the tests' own needs into it, copies tests/ into
a folder without the source tree, and runs pytest there. With --torch, that version of torch goes
in as well, and all tests that need no source tree are run; without, torch must be absent, and the
tests of the deployed part are run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDS = ["pytest", "hypothesis", "pyelftools"]
NEEDS_WITH_TORCH = ["scikit-learn", "pandas"]

# Which files are imported: the installed ones, and torch only where it was asked for.
PROBE = """
import importlib.util, pathlib, sys
import pymeta, pymeta._native
for module in (pymeta, pymeta._native):
    assert pathlib.Path(sys.prefix) in pathlib.Path(module.__file__).parents, module.__file__
torch = importlib.util.find_spec("torch") is not None
assert torch == (sys.argv[1] == "torch"), f"torch is {'there' if torch else 'not there'}"
print("pymeta", pymeta.__version__, "from", pathlib.Path(pymeta.__file__).parent)
"""


def run(*command: str | Path, **options) -> None:
    """Run a command; end with its exit code where it fails."""
    print("$", *command, flush=True)
    code = subprocess.run([str(word) for word in command], check=False, **options).returncode
    if code:
        sys.exit(code)


def clean_environment() -> dict[str, str]:
    """This process's environment without what could bring the source tree back in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PYMETA_SOURCE": str(ROOT)}  # for test_wheel.py, which compares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", metavar="VERSION")
    parser.add_argument("tests", nargs="*", help="of tests/, for example test_maml.py; default all")
    options = parser.parse_intermixed_args()
    wheel = options.wheel.resolve(strict=True)
    needs = NEEDS + (NEEDS_WITH_TORCH if options.torch else [])
    with tempfile.TemporaryDirectory(prefix="pymeta-") as temporary:
        folder, environment = Path(temporary), clean_environment()
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        pip = (python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
        if options.torch:
            run(*pip, "--no-compile", f"torch=={options.torch}", env=environment)
        target = f"{wheel}[torch,serve]" if options.torch else f"{wheel}[serve]"
        run(*pip, target, *needs, env=environment)
        (folder / "run").mkdir()
        shutil.copytree(ROOT / "tests", folder / "run" / "tests")
        shutil.copy(ROOT / "pyproject.toml", folder / "run")  # pytest's settings
        here = {"cwd": folder / "run", "env": environment}
        run(python, "-c", PROBE, "torch" if options.torch else "", **here)
        tests = [f"tests/{name}" for name in options.tests] or ["tests"]
        run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, **here)


if __name__ == "__main__":
    main()
