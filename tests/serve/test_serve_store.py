"""The store, the same tests on SQLite and on PostgreSQL."""

import itertools
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serve_help import SOON, adapter, alone, in_process, task

pytest.importorskip("fastapi")

import postgres
import sqlalchemy as sa

from pymeta.serve.problem import Problem
from pymeta.serve.store import META, ROWS, Labelled, Store, Window


@pytest.fixture(scope="module")
def server():
    with postgres.running() as found:
        yield found


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'rows.db'}"
    found = request.getfixturevalue("server").url
    engine = sa.create_engine(found)
    META.drop_all(engine)
    engine.dispose()
    return found


@pytest.fixture
def store(url):
    made = Store(url, kept_rows=50)
    yield made
    made.close()


def rows(seed: int, count: int, at=None) -> Labelled:
    random = np.random.default_rng(seed)
    at = np.arange(count) if at is None else np.array(at)
    x, y = random.normal(size=(count, 3)), random.normal(size=(count, 1))
    return Labelled(x, y, random.random(count), at.astype(np.int64))


def equal(a: Labelled, b: Labelled) -> bool:
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("x", "y", "weights", "at"))


def joined(*parts: Labelled) -> Labelled:
    return Labelled(
        *(np.concatenate([getattr(p, n) for p in parts]) for n in ("x", "y", "weights", "at"))
    )


def test_rows_come_back_bit_by_bit_in_the_order_of_time(store):
    given = rows(0, 7, [3, 1, 2, 9, 2, 0, 2])
    assert store.append("a", given) == {"appended": 7, "revision": 1, "replayed": False}
    entity, found = store.rows("a")
    order = np.argsort(given.at, kind="stable")
    assert equal(
        found, Labelled(given.x[order], given.y[order], given.weights[order], given.at[order])
    )
    assert entity.revision == 1 and store.entity("a") == entity


def test_windows(store):
    day = 86_400_000_000
    given = rows(0, 6, np.array([1, 2, 3, 10, 11, 12]) * day)
    store.append("a", given, window=Window(4))
    assert store.rows("a")[1].at.tolist() == [3 * day, 10 * day, 11 * day, 12 * day]
    store.append("a", rows(1, 1, [12 * day]), window=Window(None, 2))
    assert store.rows("a")[1].at.tolist() == [10 * day, 11 * day, 12 * day, 12 * day]
    store.append("a", rows(1, 1, [0]), window=Window(2, 100))
    assert store.rows("a")[1].at.tolist() == [12 * day] * 2
    store.append("a", rows(1, 1, [0]), window=Window())  # the service's
    assert store.entity("a").window == Window(200)


def test_the_oldest_rows_beyond_the_limit_are_deleted(store):
    for i in range(8):
        store.append("a", rows(i, 9, np.arange(9) + 9 * i))
    store.append("b", rows(0, 9))
    _, found = store.rows("a")
    assert found.at.tolist() == list(range(22, 72)) and len(store.rows("b")[1]) == 9
    _, count, oldest, newest = store.extent("a")
    assert count == 50 and (newest - oldest).microseconds == 49
    with store.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(ROWS)) == 59


def test_keys(store):
    first = store.append("a", rows(0, 2), key="k")
    assert store.append("a", rows(0, 2), key="k") == {**first, "replayed": True}
    assert not store.append("b", rows(0, 2), key="k")["replayed"]
    assert not store.append("a", rows(0, 2), key="l")["replayed"]
    for other in (rows(1, 2), rows(0, 2, [5, 6])):
        with pytest.raises(Problem) as refused:
            store.append("a", other, key="k")
        assert refused.value.status == 409
    assert store.append("a", rows(0, 2, [5, 6]), key="m", timed=False)["replayed"] is False
    assert store.append("a", rows(0, 2, [7, 8]), key="m", timed=False)["replayed"] is True
    assert len(store.rows("a")[1]) == 6


def test_a_refused_append_changes_nothing(store):
    store.append("a", rows(0, 2), key="k")
    wide = Labelled(np.ones((1, 4)), np.ones((1, 1)), np.ones(1), np.zeros(1, np.int64))
    with pytest.raises(Problem) as refused:
        store.append("a", wide, key="l")
    assert refused.value.status == 409 and store.entity("a").revision == 1
    assert equal(store.rows("a")[1], rows(0, 2))
    assert store.append("a", rows(1, 1), key="l")["revision"] == 2


def test_erasure(store):
    for name in "ab":
        store.append(name, rows(0, 2), key="k")
    first = store.entity("a").id
    assert store.delete("a") == first and store.delete("a") is None
    for look in (store.entity, store.rows, store.extent):
        with pytest.raises(Problem) as refused:
            look("a")
        assert refused.value.status == 404
    assert len(store.rows("b")[1]) == 2
    assert store.append("a", rows(0, 2), key="k")["replayed"] is False
    assert store.entity("a").id > first  # numbers are not used again, so that no cache mistakes one


def test_each_entity_with_all_its_rows(store):
    given = {f"e{i}": rows(i, 1 + i) for i in range(7)}
    for name, some in given.items():
        store.append(name, some, window=Window(1))
    found = dict(store.each(batch=3))
    assert list(found) == sorted(given) and all(equal(found[n], given[n]) for n in given)
    for name in given:
        store.delete(name)
    assert dict(store.each()) == {}


def test_concurrent_appends_are_all_there(store, url):
    """Two stores, as of two processes; several entities, some rows each."""
    other = Store(url, kept_rows=50)
    jobs = list(itertools.product(range(3), range(10)))

    def work(job):
        entity, number = job
        some = rows(10 * entity + number, 2, [number, number])
        return (store, other)[number % 2].append(f"e{entity}", some, key=str(number))["revision"]

    with ThreadPoolExecutor(8) as threads:
        revisions = list(threads.map(work, jobs))
    for entity in range(3):
        assert sorted(r for r, j in zip(revisions, jobs, strict=True) if j[0] == entity) == list(
            range(1, 11)
        )
        wanted = joined(*(rows(10 * entity + n, 2, [n, n]) for n in range(10)))
        assert equal(store.rows(f"e{entity}")[1], wanted)
    other.close()


def test_one_key_from_many_at_once_appends_once(store):
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: store.append("a", rows(0, 2), key="k"), range(16)))
    assert sorted(a["replayed"] for a in answers) == [False] + [True] * 15
    assert len(store.rows("a")[1]) == 2


def test_a_reader_sees_one_moment(store):
    """Rows and revision belong together while a writer is at work."""
    store.append("a", rows(0, 1))
    stop, torn = threading.Event(), []

    def read():
        while not stop.is_set():
            entity, found = store.rows("a")
            if len(found) != entity.revision:
                torn.append((entity.revision, len(found)))

    thread = threading.Thread(target=read)
    thread.start()
    for i in range(1, 40):
        store.append("a", rows(i, 1, [i]))
    stop.set()
    thread.join(SOON)
    assert torn == []


def test_statements_only_have_bound_parameters(store):
    """Names and keys that would be SQL are names and keys."""
    evil = "x'; DELETE FROM rows; --"
    store.append(evil, rows(0, 2), key=evil)
    store.append("b", rows(1, 2))
    assert store.delete("' OR '1'='1") is None
    assert len(store.rows(evil)[1]) == 2 and [n for n, _ in store.each()] == ["b", evil]


def test_what_was_stored_is_there_for_the_next_process(store, url):
    store.append("a", rows(0, 5), key="k")
    store.close()
    again = Store(url)
    assert (
        equal(again.rows("a")[1], rows(0, 5)) and again.append("a", rows(0, 5), key="k")["replayed"]
    )
    again.close()


def test_a_service_on_it(url, tmp_path):
    with in_process(tmp_path, adapter(), store=url) as service:
        body = {"xs": task()["xs"], "ys": task()["ys"]}
        assert service.call("PUT", "/v1/entities/a/rows", body).status == 200
        for cached in (False, True):
            got = service.call("POST", "/v1/entities/a/predict", {"xq": task()["xq"]}).json
            assert got["cached"] is cached
            assert np.array_equal(np.float32(got["predictions"][0]), alone(adapter(), task()))
        assert service.call("GET", "/v1/entities:export").status == 200
        assert service.call("DELETE", "/v1/entities/a").status == 204
        assert service.call("GET", "/readyz").status == 200


# ---- errors -------------------------------------------------------------------------------------


def test_errors_do_not_repeat_values(store):
    """A statement that fails is a Problem or an error without its parameters."""
    given = Labelled(np.full((1, 3), 1.5), np.ones((1, 1)), np.ones(1), np.array([2**70], object))
    with pytest.raises((Problem, RuntimeError, OverflowError)) as failed:
        store.append("secret-name", given)
    assert "secret-name" not in str(failed.value) and "1.5" not in str(failed.value)


def test_a_database_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.db"):
        Store(f"sqlite:///{tmp_path / 'no folder' / 'rows.db'}")
    (tmp_path / "rows.db").write_bytes(b"no database" * 500)
    with pytest.raises(ValueError, match=r"rows\.db"):
        Store(f"sqlite:///{tmp_path / 'rows.db'}")
    for wrong in ("sqlite://", "mysql://a/b", "nothing", f"sqlite:///{tmp_path}/x.db?mode=memory",
                  f"sqlite:///{tmp_path}/x.db?timeout=long"):  # fmt: skip
        with pytest.raises(ValueError, match="store"):
            Store(wrong)


def test_a_server_that_is_not_there():
    pytest.importorskip("psycopg")
    with pytest.raises(Problem) as refused:
        Store("postgresql+psycopg://pymeta@127.0.0.1:9/none")
    assert refused.value.status == 503


def test_a_full_database_is_507(tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'rows.db'}")
    store.append("a", rows(0, 5))

    @sa.event.listens_for(store.engine, "begin")
    def _small(connection):  # SQLite's own limit: the error is that of a full disk
        connection.exec_driver_sql("PRAGMA max_page_count = 1")

    with pytest.raises(Problem) as refused:
        for i in range(100):
            store.append("a", rows(i, 50))
    assert refused.value.status == 507
    assert len(store.rows("a")[1]) >= 5
    store.close()


def test_a_lock_that_stays_is_503_and_readers_go_on(tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'rows.db'}?timeout=0.1")
    store.append("a", rows(0, 5))
    other = sqlite3.connect(tmp_path / "rows.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Problem) as refused:
        store.append("a", rows(1, 5))
    assert refused.value.status == 503 and "locked" in refused.value.detail
    assert equal(store.rows("a")[1], rows(0, 5))
    other.execute("ROLLBACK")
    assert store.append("a", rows(1, 5))["revision"] == 2
    other.close()
    store.close()


def test_a_sqlite_file_that_is_gone_and_back(tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'rows.db'}")
    store.append("a", rows(0, 5))
    moved = [(p, p.with_name(f"moved-{p.name}")) for p in sorted(tmp_path.glob("rows.db*"))]
    for a, b in moved:
        a.rename(b)
    for call in (lambda: store.append("a", rows(1, 5)), lambda: store.rows("a"), store.ping):
        with pytest.raises(Problem) as refused:
            call()
        assert refused.value.status == 503
    assert not (tmp_path / "rows.db").exists()  # no empty one was made in its place
    for a, b in moved:
        b.rename(a)
    assert equal(store.rows("a")[1], rows(0, 5))
    assert store.append("a", rows(1, 5))["revision"] == 2
    store.close()


def test_a_server_that_is_gone_and_back(server):
    engine = sa.create_engine(server.url)
    META.drop_all(engine)
    engine.dispose()
    store = Store(server.url)
    store.append("a", rows(0, 5), key="k")
    server.stop()
    for call in (lambda: store.append("a", rows(1, 5)), lambda: store.rows("a"), store.ping):
        with pytest.raises(Problem) as refused:
            call()
        assert refused.value.status == 503
    server.start()
    assert (
        equal(store.rows("a")[1], rows(0, 5)) and store.append("a", rows(0, 5), key="k")["replayed"]
    )
    store.close()
