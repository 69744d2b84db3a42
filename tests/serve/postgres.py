"""A PostgreSQL server of the tests' own: Debian's package, a temporary folder, a free port."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_help import SOON, until


def programs() -> Path:
    """The folder of initdb and postgres; the test is skipped where there is none."""
    pytest.importorskip("psycopg", reason='pip install "pymeta-kernels[postgres]"')
    found = [
        Path(p).resolve().parent for p in (shutil.which("initdb"), shutil.which("pg_ctl")) if p
    ]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in found:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    reason = "no PostgreSQL server: make test-postgres installs it (Debian's postgresql)"
    (pytest.fail if os.environ.get("PYMETA_TEST_POSTGRES") else pytest.skip)(reason)


class Postgres:
    """Started by `start`, stopped by `stop`; the data stays in between."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.folder = programs(), folder
        self.user: str | None = None  # a server refuses to be root's
        if os.geteuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            self.user = "postgres" if "postgres" in names else "nobody"
            shutil.chown(folder, self.user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen | None = None
        words = ["-U", "pymeta", "-A", "trust", "--no-sync", "--encoding", "UTF8", "--locale", "C"]
        made = subprocess.run(
            [self.bin / "initdb", "-D", folder / "data", *words],
            capture_output=True,
            text=True,
            cwd=folder,
            **self._as(),
        )
        assert made.returncode == 0, made.stderr

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://pymeta@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        settings = ["-h", "127.0.0.1", "-p", str(self.port), "-k", str(self.folder)]
        self.process = subprocess.Popen(
            [self.bin / "postgres", "-D", self.folder / "data", *settings],
            stderr=(self.folder / "log").open("ab"),
            cwd=self.folder,
            **self._as(),
        )
        until(self.answers)

    def answers(self) -> bool:
        import psycopg

        assert self.process.poll() is None, (self.folder / "log").read_text()
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(self.url.replace("+psycopg", "")).close()
            return True
        return False

    def stop(self) -> None:
        """Fast: whoever is connected is disconnected."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(SOON)
            self.process = None

    def _as(self) -> dict[str, object]:
        # With a sanitizer's library loaded into it, even `postgres -V` never ends.
        options: dict[str, object] = {
            "env": {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        }
        if self.user is not None:
            group = pwd.getpwnam(self.user).pw_gid
            options |= {"user": self.user, "group": group, "extra_groups": []}
        return options


@contextlib.contextmanager
def running() -> Iterator[Postgres]:
    """A server for some tests."""
    programs()
    with tempfile.TemporaryDirectory(prefix="pymeta-pg-", ignore_cleanup_errors=True) as folder:
        server = Postgres(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
