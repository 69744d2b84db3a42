"""The benchmark as a program, and with its workers in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from background import Program

from pymeta.bench import (
    __main__ as cli,
)
from pymeta.bench.cases import CASES
from pymeta.bench.worker import Server

TINY = "W1 T=1 K=1"


W5 = CASES["W5 fine-tuning T=1000 K=20"]


def bench(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program as a stranger starts it, far from any source tree."""
    return subprocess.run(
        [sys.executable, "-m", "pymeta.bench", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


RESULTS = Program(
    *(sys.executable, "-m", "pymeta.bench", "--cases", TINY, "--rounds", "3", "--seconds", "0.01"),
    *("--without", "torch", "jax", "higher", "scikit-learn", "--out", "found.json"),
)


class LocalWorker:
    """A contestant's worker in this process: the same requests and answers."""

    def __init__(self, name: str, kind: str, log, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.folder, self.alive = name, folder, True
        self.asked: list[str] = []
        self._server, self._answers = Server(name, kind), []

    def send(self, **request) -> None:
        self.asked.append(request["do"])
        self._answers.append(json.loads(json.dumps(self._server.answer(request))))

    def receive(self, patience=None) -> dict:
        return self._answers.pop(0)

    def ask(self, patience=None, **request) -> dict:
        self.send(**request)
        return self.receive()

    def close(self, at_once: bool = False) -> None:
        self.alive = False


def run_in_process(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    """`main` with workers in this process; the exit status and the JSON."""
    out = tmp_path / "found.json"
    status = cli.main([*arguments, "--rounds", "1", "--seconds", "0.002", "--out", str(out)])
    return status, json.loads(out.read_text())
