"""Connections to SQLite and PostgreSQL, and what becomes of their errors.

SQLite: a write-ahead log that is synced at each commit, so that readers and the writer do not wait
for each other; a writer asks for its turn at once, and waits for it (5 seconds, or as the URL says
by ?timeout=); erased bytes are overwritten. The file is made here at the start and never again:
where it is gone, requests fail until it is back, and a file put in its place is found.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from pymeta.serve.problem import Problem, unavailable

_WAIT_SECONDS = 5.0
_FULL = ("disk is full", "disk full", "no space left", "disk i/o error", "could not extend file")


def connect(url: str) -> Engine:
    """An engine for a URL; ValueError where it is none, or of a database that is not known."""
    try:
        made = make_url(url)
    except ArgumentError:
        raise ValueError(
            "store: expected a URL such as sqlite:///pymeta.db or "
            "postgresql+psycopg://user@host/database"
        ) from None
    name = made.get_backend_name()
    if name == "sqlite":
        return _sqlite(made)
    if name == "postgresql":
        return _postgresql(made)
    raise ValueError(f"store: expected sqlite or postgresql, got {name}")


def upsert(connection: Connection, table: sa.Table) -> Any:
    """An insert that knows `on_conflict_do_nothing`."""
    from sqlalchemy.dialects import postgresql, sqlite

    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    return dialect.insert(table)


@contextmanager
def guarded() -> Iterator[None]:
    """Turn a database's errors into Problems: 507 where it is full, else 503.

    Their text, which may hold values of statements, is not passed on.
    """
    try:
        yield
    except PoolTimeout:
        raise unavailable("too many requests wait for the database") from None
    except (OperationalError, InterfaceError, DisconnectionError) as error:
        text = str(getattr(error, "orig", error)).lower()
        if any(words in text for words in _FULL):
            raise Problem(507, "the database's disk is full, or cannot be written") from None
        if "locked" in text:
            raise unavailable("the database is locked by another process") from None
        raise unavailable("the database cannot be reached") from None
    except DBAPIError as error:
        if error.connection_invalidated:
            raise unavailable("the database cannot be reached") from None
        raise RuntimeError(f"database: {type(error.orig).__name__}") from None
    except SQLAlchemyError as error:
        raise RuntimeError(f"database: {type(error).__name__}") from None


def _postgresql(url: URL) -> Engine:
    try:
        return sa.create_engine(
            url,
            pool_pre_ping=True,
            pool_timeout=_WAIT_SECONDS,
            hide_parameters=True,
            connect_args={"connect_timeout": round(_WAIT_SECONDS)},
        )
    except ModuleNotFoundError as error:
        raise ValueError(
            f"store: {url.drivername} needs {error.name}, which is not installed: "
            f'pip install "pymeta-kernels[postgres]" and begin the URL with postgresql+psycopg://'
        ) from None


def _sqlite(url: URL) -> Engine:
    if url.database in (None, "", ":memory:"):
        raise ValueError("store: expected a file, as in sqlite:///pymeta.db; got none")
    path = Path(str(url.database)).absolute()
    wait = _wait_of(url)

    def opened(mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"file:{quote(str(path))}?mode={mode}",
            uri=True,
            timeout=wait,
            check_same_thread=False,
            isolation_level=None,  # transactions begin where we say so
        )

    def creator() -> sqlite3.Connection:
        connection = opened("rw")
        connection.execute(f"PRAGMA busy_timeout = {round(1000 * wait)}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")
        return connection

    try:
        opened("rwc").close()
        with_header = opened("rw")
        with_header.execute("PRAGMA user_version = 1")  # the file is there once it is written
        with_header.close()
    except sqlite3.Error as error:
        raise ValueError(f"store: {path.name}: {error}") from None
    engine = sa.create_engine(
        "sqlite://",
        creator=creator,
        poolclass=sa.QueuePool,
        pool_timeout=_WAIT_SECONDS,
        hide_parameters=True,
    )
    _watch(engine, path)
    return engine


def _wait_of(url: URL) -> float:
    """How long a writer waits for its turn, in seconds."""
    given = dict(url.query)
    try:
        wait = float(str(given.pop("timeout", _WAIT_SECONDS)))
    except ValueError:
        wait = -1.0
    if given or not 0 <= wait <= 600:
        raise ValueError("store: expected no options but ?timeout=SECONDS, from 0 to 600")
    return wait


def _watch(engine: Engine, path: Path) -> None:
    """Begin transactions as they are meant, and leave connections to a file that is gone."""

    def identity() -> tuple[int, int]:
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino

    @event.listens_for(engine, "connect")
    def _connected(_: Any, record: Any) -> None:
        record.info["file"] = identity()

    @event.listens_for(engine, "checkout")
    def _checked_out(_: Any, record: Any, __: Any) -> None:
        try:
            same = record.info["file"] == identity()
        except OSError:
            same = False
        if not same:
            raise DisconnectionError("the database's file is gone, or another one")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
