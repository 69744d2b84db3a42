"""Programs that tests wait for and that need nothing of this process: compilers, mypy, mkdocs.

Together they take minutes. Where there are cores to spare, as many as there are such cores run at a
time beside the tests, at a lower priority, in the order in which tests ask for them; elsewhere, and
where several processes share the tests (pytest-xdist), each begins when its test asks for it.

    MYPY = Program(sys.executable, "-m", "mypy", cwd=ROOT)

    @pytest.mark.background(MYPY)
    def test_mypy():
        assert MYPY.result().returncode == 0
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest


class Program:
    """A command that runs at most once in a session, and what it said.

    Args:
        command: the words. "{folder}" in them is a folder of the program's own.
        cwd: where it runs; by default in that folder.
        environment: variables besides this process's.
    """

    def __init__(self, *command: str, cwd: Path | None = None, **environment: str) -> None:
        self._command, self._cwd, self._environment = command, cwd, environment
        self._process: subprocess.Popen[bytes] | None = None
        self._place: Path | None = None

    @property
    def folder(self) -> Path:
        """Where it may write; there until the session ends."""
        if self._place is None:
            self._place = Path(tempfile.mkdtemp(prefix="pymeta-background-"))
            (self._place / "own").mkdir()
        return self._place / "own"

    def start(self, *, nice: bool = False) -> None:
        """Begin, unless it has begun."""
        if self._process is not None:
            return
        words = [word.replace("{folder}", str(self.folder)) for word in self._command]
        if nice and shutil.which("nice"):
            words = ["nice", "-n", "10", *words]
        with open(self._said("out"), "wb") as out, open(self._said("err"), "wb") as err:
            self._process = subprocess.Popen(
                words,
                cwd=self._cwd or self.folder,
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def begun(self) -> bool:
        """Whether it has started."""
        return self._process is not None

    @property
    def runs(self) -> bool:
        """Whether it is at work now."""
        return self._process is not None and self._process.poll() is None

    def result(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end."""
        self.start()
        assert self._process is not None
        status = self._process.wait()
        said = [self._said(name).read_text() for name in ("out", "err")]
        return subprocess.CompletedProcess(self._command, status, *said)

    def end(self) -> None:
        """Nobody asks any more: kill it where it still runs, remove its files."""
        if self._process is not None and self.runs:
            self._process.kill()
            self._process.wait()
        if self._place is not None:
            shutil.rmtree(self._place, ignore_errors=True)
        self._process = self._place = None

    def _said(self, name: str) -> Path:
        return self.folder.parent / name


def programs_of(items: Iterable[pytest.Item]) -> list[Program]:
    """What the chosen tests will ask for, each once, in the order of the tests."""
    marks = (mark for item in items for mark in item.iter_markers("background"))
    return list(dict.fromkeys(program for mark in marks for program in mark.args))


def spare() -> int:
    """How many cores the tests leave to programs; none where each core has tests of its own."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return 0
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) - 1
    return (os.cpu_count() or 1) - 1


def advance(programs: list[Program], spare: int) -> None:
    """Start the next ones, so that as many run as there are cores to spare."""
    free = spare - sum(program.runs for program in programs)
    waiting = [program for program in programs if not program.begun]
    for program in waiting[: max(free, 0)]:
        program.start(nice=True)
