"""Each entity's labelled rows, in SQLite or PostgreSQL.

    entities   a name, a revision that every change raises, the window, how many features
    rows       one labelled row each: when, features and targets as little-endian float64, weight
    answers    what was answered to each idempotency key

An append is one transaction: it is acknowledged once it is on the disk. Writers of one entity wait
for each other; SQLite has one writer at a time for all of them. Statements are SQLAlchemy's, so
that values only ever come in as bound parameters. Calls block; the service makes them in threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from pymeta.serve.database import connect, guarded, upsert
from pymeta.serve.problem import Problem
from pymeta.spec.show import counted

_KEPT_ANSWERS = 1000  # of each entity: how many idempotency keys are remembered
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # which alone counts up by itself

META = sa.MetaData()
ENTITIES = sa.Table(
    "entities",
    META,
    sa.Column("id", _INTEGER, primary_key=True, autoincrement=True),
    sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("features", sa.Integer, nullable=False),
    sa.Column("targets", sa.Integer, nullable=False),
    sa.Column("stored", sa.BigInteger, nullable=False),  # how many rows there are
    sa.Column("window_rows", sa.Integer),
    sa.Column("window_days", sa.Float),
    sqlite_autoincrement=True,  # a number is never used again
)
ROWS = sa.Table(
    "rows",
    META,
    sa.Column("id", _INTEGER, primary_key=True, autoincrement=True),
    sa.Column("entity", sa.ForeignKey("entities.id", ondelete="CASCADE"), nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False),  # microseconds since 1970, UTC
    sa.Column("x", sa.LargeBinary, nullable=False),
    sa.Column("y", sa.LargeBinary, nullable=False),
    sa.Column("weight", sa.Float(53), nullable=False),
    sa.Index("rows_by_time", "entity", "at", "id"),
)
ANSWERS = sa.Table(
    "answers",
    META,
    sa.Column("id", _INTEGER, primary_key=True, autoincrement=True),
    sa.Column("entity", sa.ForeignKey("entities.id", ondelete="CASCADE"), nullable=False),
    sa.Column("key", sa.String(200), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("answer", sa.Text, nullable=False),
    sa.UniqueConstraint("entity", "key"),
)


@dataclass(frozen=True)
class Window:
    """The newest `rows` of an entity that lie at most `days` before the newest; None: any."""

    rows: int | None = None
    days: float | None = None


@dataclass(frozen=True)
class Labelled:
    """Rows of one entity, oldest first."""

    x: np.ndarray  # [rows, in] float64
    y: np.ndarray  # [rows] or [rows, out] float64
    weights: np.ndarray  # [rows] float64
    at: np.ndarray  # [rows] int64, microseconds since 1970, UTC

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.x)


@dataclass(frozen=True)
class Entity:
    """What is known of an entity besides its rows."""

    id: int
    name: str
    revision: int
    window: Window


class Store:
    """Entities and their rows; usable from several threads and processes."""

    def __init__(self, url: str, *, kept_rows: int = 10_000, window: Window | None = None) -> None:
        """Connect, and make the tables where they are not there.

        Args:
            url: SQLAlchemy's, such as "sqlite:///pymeta.db" or "postgresql+psycopg://...".
            kept_rows: of an entity; the oldest beyond them are deleted.
            window: where an entity has none of its own.

        Raises:
            ValueError: the URL is none, or of another database.
            Problem: 503 where the database cannot be reached.
        """
        self._kept, self._window = kept_rows, window or Window(200)
        self.engine: Engine = connect(url)
        with guarded():
            META.create_all(self.engine)
        self._sqlite = self.engine.dialect.name == "sqlite"

    def close(self) -> None:
        """Let all connections go."""
        self.engine.dispose()

    def ping(self) -> None:
        """A Problem unless the database answers and has the tables."""
        with guarded(), self.engine.connect() as connection:
            connection.execute(sa.select(ENTITIES.c.id).limit(1)).all()

    # ---- writing ------------------------------------------------------------------------------

    def append(
        self,
        name: str,
        rows: Labelled,
        *,
        key: str | None = None,
        window: Window | None = None,
        timed: bool = True,
    ) -> dict[str, Any]:
        """Add rows to an entity, which is made where it is not there.

        Args:
            name: of the entity.
            rows: to add.
            key: the same one again, with the same rows, does nothing and answers as before.
            window: instead of the entity's.
            timed: whether the times came with the rows, or are those of their arrival.

        Returns:
            appended, revision, replayed.

        Raises:
            Problem: 409 where the entity's rows have other widths, or the key came with other
                rows; 503, 507 where the database does not work.
        """
        digest = _digest(rows, window, timed)
        with guarded(), self._writing() as connection:
            entity, stored = self._locked(connection, name, rows)
            before = self._answered(connection, entity.id, key, digest)
            if before is not None:
                return {**before, "replayed": True}
            self._insert(connection, entity.id, rows)
            stored = self._bounded(connection, entity.id, stored + len(rows))
            values: dict[str, Any] = {"revision": entity.revision + 1, "stored": stored}
            if window is not None:
                values |= {"window_rows": window.rows, "window_days": window.days}
            update = sa.update(ENTITIES).where(ENTITIES.c.id == entity.id).values(values)
            connection.execute(update)
            answer = {"appended": len(rows), "revision": entity.revision + 1}
            if key is not None:
                self._remember(connection, entity, key, digest, answer)
        return {**answer, "replayed": False}

    def delete(self, name: str) -> int | None:
        """Erase an entity with all that came of it; its number, None where there was none.

        SQLite overwrites what it erases, in its log too.
        """
        with guarded(), self._writing() as connection:
            where = ENTITIES.c.name == name
            found = connection.execute(sa.select(ENTITIES.c.id).where(where)).scalar_one_or_none()
            if found is None:
                return None
            for table in (ROWS, ANSWERS):
                connection.execute(sa.delete(table).where(table.c.entity == found))
            connection.execute(sa.delete(ENTITIES).where(ENTITIES.c.id == found))
        if self._sqlite:
            with guarded(), closing(self.engine.raw_connection()) as raw:
                raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return int(found)

    # ---- reading ------------------------------------------------------------------------------

    def entity(self, name: str) -> Entity:
        """What is known of an entity; a Problem (404) where there is none."""
        with guarded(), self.engine.connect() as connection:
            return self._entity(connection, name)

    def rows(self, name: str) -> tuple[Entity, Labelled]:
        """An entity and the rows of its window, of one moment; 404 where there is none."""
        with guarded(), self._reading() as connection:
            entity = self._entity(connection, name)
            found = self._newest(connection, entity.id, entity.window)
        return entity, _labelled(found)

    def extent(self, name: str) -> tuple[Entity, int, datetime | None, datetime | None]:
        """An entity, how many rows there are, and when the oldest and the newest were."""
        with guarded(), self._reading() as connection:
            entity = self._entity(connection, name)
            stored = sa.select(ENTITIES.c.stored).where(ENTITIES.c.id == entity.id)
            mine = ROWS.c.entity == entity.id
            oldest = sa.select(sa.func.min(ROWS.c.at)).where(mine)
            newest = sa.select(sa.func.max(ROWS.c.at)).where(mine)
            count, first, last = (connection.scalar(q) for q in (stored, oldest, newest))
        return entity, int(count or 0), _moment(first), _moment(last)

    def each(self, batch: int = 200) -> Iterator[tuple[str, Labelled]]:
        """All entities by name with all their rows; a snapshot of each, not of the whole."""
        after = ""
        while True:
            select = sa.select(ENTITIES.c.id, ENTITIES.c.name).where(ENTITIES.c.name > after)
            with guarded(), self._reading() as connection:
                page = connection.execute(select.order_by(ENTITIES.c.name).limit(batch)).all()
            for id_, name in page:
                with guarded(), self._reading() as connection:
                    found = self._newest(connection, id_, Window())
                if found:  # it was not erased meanwhile
                    yield name, _labelled(found)
            if len(page) < batch:
                return
            after = page[-1][1]

    # ---- pieces -------------------------------------------------------------------------------

    def _writing(self) -> Any:
        """A transaction that nobody else's write can come into."""
        return self.engine.execution_options(writes=True).begin()

    def _reading(self) -> Any:
        """A transaction that sees one moment."""
        if self._sqlite:
            return self.engine.begin()
        return self.engine.execution_options(isolation_level="REPEATABLE READ").begin()

    def _window_of(self, rows: int | None, days: float | None) -> Window:
        if rows is None and days is None:
            return self._window
        return Window(rows, days)

    def _entity(self, connection: Connection, name: str) -> Entity:
        c = ENTITIES.c
        select = sa.select(c.id, c.revision, c.window_rows, c.window_days).where(c.name == name)
        row = connection.execute(select).one_or_none()
        if row is None:
            raise Problem(404, "there is no such entity", "id")
        return Entity(row.id, name, row.revision, self._window_of(row.window_rows, row.window_days))

    def _locked(self, connection: Connection, name: str, rows: Labelled) -> tuple[Entity, int]:
        """The entity, made if need be, and its number of rows; nobody else changes it now."""
        features, targets = rows.x.shape[1], _columns(rows.y)
        new = {"name": name, "revision": 0, "stored": 0}
        new |= {"features": features, "targets": targets}
        connection.execute(upsert(connection, ENTITIES).values(new).on_conflict_do_nothing())
        select = sa.select(ENTITIES).where(ENTITIES.c.name == name).with_for_update()
        row = connection.execute(select).one()
        if (row.features, row.targets) != (features, targets):
            raise Problem(
                409,
                f"the entity's rows have {counted(row.features, 'feature')} and "
                f"{counted(row.targets, 'target')}, these "
                f"have {features} and {targets}; delete it first, or use another one",
                "xs",
            )
        window = self._window_of(row.window_rows, row.window_days)
        return Entity(row.id, name, row.revision, window), row.stored

    @staticmethod
    def _answered(connection: Connection, entity: int, key: str | None, digest: str) -> Any:
        """What was answered to a key before; None for a new one."""
        if key is None:
            return None
        c = ANSWERS.c
        select = sa.select(c.digest, c.answer).where(c.entity == entity, c.key == key)
        found = connection.execute(select).one_or_none()
        if found is None:
            return None
        if found.digest != digest:
            raise Problem(
                409, "this idempotency key came with other rows before", "idempotency-key"
            )
        return json.loads(found.answer)

    @staticmethod
    def _remember(
        connection: Connection, entity: Entity, key: str, digest: str, answer: dict[str, Any]
    ) -> None:
        values = {"entity": entity.id, "key": key, "digest": digest, "answer": json.dumps(answer)}
        connection.execute(sa.insert(ANSWERS).values(values))
        if entity.revision % 100 == 99:  # often enough
            _delete_all_but_newest(connection, ANSWERS, [ANSWERS.c.id], entity.id, _KEPT_ANSWERS)

    def _bounded(self, connection: Connection, entity: int, stored: int) -> int:
        """Delete the oldest rows beyond the limit; how many are left."""
        if stored <= self._kept:
            return stored
        _delete_all_but_newest(connection, ROWS, [ROWS.c.at, ROWS.c.id], entity, self._kept)
        return self._kept

    @staticmethod
    def _insert(connection: Connection, entity: int, rows: Labelled) -> None:
        x, y = rows.x.astype("<f8"), rows.y.astype("<f8")
        values = [
            {
                "entity": entity,
                "at": int(rows.at[i]),
                "x": x[i].tobytes(),
                "y": y[i].tobytes(),
                "weight": float(rows.weights[i]),
            }
            for i in range(len(rows))
        ]
        connection.execute(sa.insert(ROWS), values)

    @staticmethod
    def _newest(connection: Connection, entity: int, window: Window) -> Sequence[Any]:
        """The rows of a window, newest first."""
        c = ROWS.c
        select = sa.select(c.at, c.x, c.y, c.weight).where(c.entity == entity)
        if window.days is not None:
            newest = sa.select(sa.func.max(c.at)).where(c.entity == entity).scalar_subquery()
            select = select.where(c.at >= newest - round(window.days * 86_400_000_000))
        select = select.order_by(c.at.desc(), c.id.desc())
        return connection.execute(select.limit(window.rows) if window.rows else select).all()


def _delete_all_but_newest(
    connection: Connection, table: sa.Table, order: Sequence[Any], entity: int, keep: int
) -> None:
    descending = [column.desc() for column in order]
    mine = table.c.entity == entity
    beyond = sa.select(table.c.id).where(mine).order_by(*descending).offset(keep)
    if connection.dialect.name == "sqlite":
        beyond = beyond.limit(-1)  # without which SQLite has no offset
    connection.execute(sa.delete(table).where(table.c.id.in_(beyond)))


def microseconds(moment: datetime) -> int:
    """Since 1970, UTC, exactly."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _moment(at: int | None) -> datetime | None:
    return None if at is None else _EPOCH + timedelta(microseconds=at)


def _columns(y: np.ndarray) -> int:
    return 1 if y.ndim == 1 else y.shape[1]


def _digest(rows: Labelled, window: Window | None, timed: bool) -> str:
    """Of what an idempotency key came with."""
    hashed = hashlib.sha256(repr((rows.x.shape, rows.y.shape, window)).encode())
    for array in (rows.x, rows.y, rows.weights, *([rows.at] if timed else [])):
        hashed.update(np.ascontiguousarray(array, "<f8").tobytes())
    return hashed.hexdigest()


def _labelled(found: Sequence[Any]) -> Labelled:
    """Rows that came newest first."""
    found = found[::-1]
    x = np.frombuffer(b"".join(row.x for row in found), "<f8").astype(np.float64)
    y = np.frombuffer(b"".join(row.y for row in found), "<f8").astype(np.float64)
    count = len(found)
    return Labelled(
        x.reshape(count, -1) if count else x.reshape(0, 0),
        y.reshape(count, -1) if count else y.reshape(0, 0),
        np.array([row.weight for row in found], np.float64),
        np.array([row.at for row in found], np.int64),
    )
