"""Entities over HTTP: rows in, predictions of what is stored, erasure, Parquet."""

import asyncio
import io
import threading

import numpy as np
import pytest
from serve_help import SOON, adapter, alone, in_process, task, until

pytest.importorskip("fastapi")

from pymeta.serve.parquet import MEDIA_TYPE
from pymeta.serve.settings import Limits, Settings


@pytest.fixture
def service(tmp_path):
    with in_process(tmp_path) as running:
        yield running


def rows(seed: int = 0, count: int = 7, **more):
    given = task(seed, count)
    return {"xs": given["xs"], "ys": given["ys"], **more}


def days(*numbers) -> list[str]:
    return [f"2026-03-{n:02}T12:00:00Z" for n in numbers]


def put(service, name: str, body, **headers):
    got = service.call("PUT", f"/v1/entities/{name}/rows", body, headers=headers)
    assert got.status == 200, got.body
    return got.json


def predict(service, name: str, xq=None, query: str = ""):
    got = service.call("POST", f"/v1/entities/{name}/predict{query}", {"xq": xq or task()["xq"]})
    assert got.status == 200, got.body
    return got.json


def same(answer, given) -> bool:
    wanted = alone(adapter(), {**given, "xq": task()["xq"]})
    return np.array_equal(np.array(answer["predictions"][0], np.float32), wanted)


def test_a_prediction_has_the_bits_of_a_lone_call_on_the_stored_rows(service):
    put(service, "a", rows(0, 4))
    put(service, "a", rows(1, 3))
    both = {n: rows(0, 4)[n] + rows(1, 3)[n] for n in ("xs", "ys")}
    answer = predict(service, "a")
    assert same(answer, both) and answer["rows"] == 7 and answer["revision"] == 2


def test_weights_are_stored(service):
    weights = [0, 1, 2, 0.5, 0, 1, 1]
    put(service, "a", rows(weights=weights))
    assert same(predict(service, "a"), rows(weights=weights))


def test_the_adapted_weights_are_kept_until_rows_come_or_the_model_changes(service, tmp_path):
    put(service, "a", rows())
    assert [predict(service, "a")["cached"] for _ in range(3)] == [False, True, True]
    put(service, "b", rows(1))
    assert predict(service, "a")["cached"]
    put(service, "a", rows(2))
    assert [predict(service, "a")["cached"] for _ in range(2)] == [False, True]
    adapter(1).save(tmp_path / "adapter.safetensors")
    assert service.call("POST", "/v1/models/reload").status == 200
    answer = predict(service, "a")
    assert not answer["cached"] and answer["model"].startswith("v0002")
    metrics = service.call("GET", "/metrics").body.decode()
    assert "pymeta_cache_hits_total 4.0" in metrics and "pymeta_cache_misses_total 3.0" in metrics


def test_concurrent_predictions_adapt_once(service):
    put(service, "a", rows())
    request = ("POST", "/v1/entities/a/predict", {"xq": task()["xq"]})
    answers = service.calls([request] * 20)
    assert all(same(a.json, rows()) for a in answers)
    assert "pymeta_adaptations_total 1.0" in service.call("GET", "/metrics").body.decode()


def test_the_least_recently_used_weights_are_dropped(tmp_path):
    settings = Settings(limits=Limits(cached_entities=2))
    with in_process(tmp_path, settings=settings) as service:
        for name in "abc":
            put(service, name, rows())
        found = [predict(service, name)["cached"] for name in "aabbaaccab"]
        assert found == [0, 1, 0, 1, 1, 1, 0, 1, 1, 0]


def test_the_window_is_the_newest_rows(service):
    given = rows(0, 7, at=days(1, 9, 3, 7, 5, 8, 2))
    put(service, "a", {**given, "window": {"rows": 3}})
    newest = [3, 5, 1]  # of the 7th, the 8th and the 9th, in the order of time
    assert same(predict(service, "a"), {n: [given[n][i] for i in newest] for n in ("xs", "ys")})
    put(service, "a", {**rows(1, 1, at=days(4)), "window": {"days": 2.5}})
    assert same(predict(service, "a"), {n: [given[n][i] for i in newest] for n in ("xs", "ys")})
    state = service.call("GET", "/v1/entities/a").json
    assert state == {
        "id": "a",
        "rows": 8,
        "revision": 2,
        "window": {"rows": None, "days": 2.5},
        "oldest": "2026-03-01T12:00:00Z",
        "newest": "2026-03-09T12:00:00Z",
    }


def test_the_services_window_and_the_rows_it_keeps(tmp_path):
    settings = Settings(window_rows=2, limits=Limits(kept_rows=5))
    with in_process(tmp_path, settings=settings) as service:
        given = rows(0, 9)
        put(service, "a", given)
        assert same(predict(service, "a"), {n: given[n][-2:] for n in ("xs", "ys")})
        assert service.call("GET", "/v1/entities/a").json["rows"] == 5
        put(service, "a", {**rows(1, 1), "window": {"rows": 100}})
        last = {n: given[n][-4:] + rows(1, 1)[n] for n in ("xs", "ys")}
        assert same(predict(service, "a"), last)


def test_an_idempotency_key_counts_once(service):
    key = {"idempotency-key": "k-1"}
    first = put(service, "a", rows(), **key)
    again = put(service, "a", rows(), **key)
    assert first == {"appended": 7, "revision": 1, "replayed": False}
    assert again == {"appended": 7, "revision": 1, "replayed": True}
    assert service.call("GET", "/v1/entities/a").json["rows"] == 7
    put(service, "b", rows(1), **key)  # each entity has its own
    other = service.call("PUT", "/v1/entities/a/rows", rows(1), headers=key)
    assert other.status == 409 and other.json["field"] == "idempotency-key"
    timed = service.call("PUT", "/v1/entities/a/rows", rows(at=days(*range(1, 8))), headers=key)
    assert timed.status == 409


def test_concurrent_requests_with_one_key_append_once(service):
    request = ("PUT", "/v1/entities/a/rows", rows())

    async def together():
        headers = {"idempotency-key": "k"}
        return await asyncio.gather(
            *(service.request(*request, headers=headers) for _ in range(10))
        )

    answers = service.run(together())
    assert sorted(a.json["replayed"] for a in answers) == [False] + [True] * 9
    assert service.call("GET", "/v1/entities/a").json["rows"] == 7


def test_explanations(service):
    put(service, "a", rows())
    stored = predict(service, "a", query="?explain=true")["explanations"]
    given = {"tasks": [{**rows(), "xq": task()["xq"]}]}
    stateless = service.call("POST", "/v1/adapt-predict?explain=true", given).json["explanations"]
    for a, b in zip(stored[0], stateless[0], strict=True):
        assert np.allclose(a["attributions"], b["attributions"], rtol=1e-4, atol=1e-6)


WRONG = {
    "name": ("PUT", "/v1/entities/a%20b/rows", rows(), 422, "id"),
    "long name": ("PUT", f"/v1/entities/{'a' * 201}/rows", rows(), 422, "id"),
    "no rows": ("PUT", "/v1/entities/a/rows", {"xs": [], "ys": []}, 422, "xs"),
    "times": ("PUT", "/v1/entities/a/rows", rows(at=days(1)), 422, "at"),
    "no zone": ("PUT", "/v1/entities/a/rows", rows(0, 1, at=["2026-03-01T12:00:00"]), 422, "at.0"),
    "window": ("PUT", "/v1/entities/a/rows", rows(window={"rows": 0}), 422, "window.rows"),
    "width": ("PUT", "/v1/entities/a/rows", {"xs": [[1, 2]], "ys": [1]}, 422, "xs"),
    "nobody": ("POST", "/v1/entities/nobody/predict", {"xq": [[1, 2, 3]]}, 404, "id"),
    "nobody to see": ("GET", "/v1/entities/nobody", None, 404, "id"),
    "nobody to erase": ("DELETE", "/v1/entities/nobody", None, 404, "id"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(service, name):
    method, path, body, status, field = WRONG[name]
    got = service.call(method, path.replace("%20", " "), body)
    assert (got.status, got.json["field"]) == (status, field), got.body


def test_names_that_look_like_paths_or_statements_are_names_or_refused(service, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    for name in ("..", "a'; DROP TABLE rows; --", "../../etc/passwd", "%", 'a"b', "a\x00b", "é"):
        got = service.call("PUT", f"/v1/entities/{name}/rows", rows())
        assert got.status in (200, 404, 422), got.body
        assert got.status != 200 or name == ".."
    put(service, "rows", rows())  # the table is still there
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_service_without_a_store_says_so(tmp_path):
    with in_process(tmp_path, store=None) as service:
        got = service.call("PUT", "/v1/entities/a/rows", rows())
        assert got.status == 404 and "without a store" in got.json["detail"]
        assert service.call("POST", "/v1/models/retrain").status == 404


# ---- erasure ------------------------------------------------------------------------------------


def test_erasure_leaves_no_byte_of_the_rows(service, tmp_path):
    marks = [123456.789, 2.5e-7, 98765.4321]
    stored = np.array(marks, np.float32).astype("<f8").tobytes()

    def found() -> bool:
        return any(stored in p.read_bytes() for p in tmp_path.glob("rows.db*"))

    put(service, "a", {"xs": [marks] * 50, "ys": [1.5] * 50}, **{"idempotency-key": "k"})
    put(service, "b", rows())
    predict(service, "a")
    assert found()
    assert service.call("DELETE", "/v1/entities/a").status == 204
    assert not found()
    assert service.call("GET", "/v1/entities/a").status == 404
    assert service.call("POST", "/v1/entities/a/predict", {"xq": [[1, 2, 3]]}).status == 404
    assert "pymeta_cached_entities 0.0" in service.call("GET", "/metrics").body.decode()
    # who comes back begins anew: the key is forgotten too
    assert put(service, "a", rows(3), **{"idempotency-key": "k"})["revision"] == 1
    assert same(predict(service, "a"), rows(3)) and same(predict(service, "b"), rows())


def test_weights_that_are_on_their_way_while_an_entity_is_erased_are_not_kept(service, monkeypatch):
    put(service, "a", rows())
    store, gate, entered = (
        service.app.state.service.kept.store,
        threading.Event(),
        threading.Event(),
    )
    read = store.rows

    def slow(name):
        found = read(name)
        entered.set()
        assert gate.wait(SOON)
        return found

    monkeypatch.setattr(store, "rows", slow)

    async def both():
        predicting = asyncio.create_task(
            service.request("POST", "/v1/entities/a/predict", {"xq": task()["xq"]})
        )
        await asyncio.to_thread(entered.wait, SOON)
        erased = await service.request("DELETE", "/v1/entities/a")
        gate.set()
        return erased, await predicting

    erased, predicted = service.run(both())
    assert erased.status == 204 and predicted.status == 200
    until(lambda: not service.app.state.service.kept._coming)
    assert len(service.app.state.service.kept._cache) == 0


# ---- Parquet ------------------------------------------------------------------------------------


def parquet(table) -> bytes:
    import pyarrow.parquet as pq

    into = io.BytesIO()
    pq.write_table(table, into)
    return into.getvalue()


def of_parquet(service, body: bytes):
    return service.call("POST", "/v1/entities:import", body, headers={"content-type": MEDIA_TYPE})


def test_import_and_export(service, tmp_path):
    import datetime

    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    names = [f"e{i % 3}" for i in range(30)]
    given = task(0, 30)
    moments = [
        datetime.datetime(2026, 1, 1, i // 2, tzinfo=datetime.timezone.utc) for i in range(30)
    ]
    table = pa.table(
        {"entity": names, "x": given["xs"], "y": given["ys"], "at": moments, "weight": [1.0] * 30}
    )
    got = of_parquet(service, parquet(table))
    assert got.status == 200 and got.json == {"entities": 3, "rows": 30}, got.body
    mine = [i for i, n in enumerate(names) if n == "e1"]
    assert same(predict(service, "e1"), {n: [given[n][i] for i in mine] for n in ("xs", "ys")})
    again = of_parquet(service, parquet(table))  # the same file adds nothing
    assert again.status == 200 and service.call("GET", "/v1/entities/e1").json["rows"] == 10
    exported = service.call("GET", "/v1/entities:export")
    assert exported.status == 200 and exported.headers["content-type"] == MEDIA_TYPE
    back = pq.read_table(io.BytesIO(exported.body))
    assert back.column("entity").to_pylist() == sorted(names)
    with in_process(tmp_path, store=f"sqlite:///{tmp_path / 'other.db'}") as other:
        assert of_parquet(other, exported.body).json == {"entities": 3, "rows": 30}
        assert other.call("GET", "/v1/entities:export").body == exported.body
        assert predict(other, "e2")["predictions"] == predict(service, "e2")["predictions"]


def test_parquet_files_have_one_thread(service, monkeypatch):
    """Arrow keeps memory for each thread that it runs in."""
    pytest.importorskip("pyarrow")
    from pymeta.serve import parquet

    seen = []
    for name in ("read", "write"):
        original = getattr(parquet, name)

        def spy(*arguments, original=original):
            seen.append(threading.current_thread().name)
            return original(*arguments)

        monkeypatch.setattr(parquet, name, spy)
    put(service, "a", rows())
    exported = service.call("GET", "/v1/entities:export").body
    asked = [("GET", "/v1/entities:export", None)] * 8
    answers = service.calls(asked)
    assert [a.status for a in answers] == [200] * 8
    assert of_parquet(service, exported).status == 200
    assert len(seen) == 10 and len(set(seen)) == 1 and seen[0].startswith("pymeta-parquet")


def test_a_wrong_import_stores_nothing(service):
    pa = pytest.importorskip("pyarrow")
    good = {"entity": ["a", "b"], "x": [[1.0, 2, 3]] * 2, "y": [1.0, 2]}
    wrong = {
        "x.1.2": {**good, "x": [[1.0, 2, 3], [1, 2, float("nan")]]},
        "x": {**good, "x": [[1.0, 2, 3], [1.0, 2]]},
        "y": {**good, "y": [1.0, None]},
        "weight.0": {**good, "weight": [-1.0, 1]},
        "entity": {**good, "entity": ["a", "b c"]},
        "at": {**good, "at": ["2026", "2027"]},
        "more": {**good, "more": [1, 2]},
    }
    for field, columns in wrong.items():
        got = of_parquet(service, parquet(pa.table(columns)))
        assert (got.status, got.json["field"]) == (422, field), got.body
    missing = of_parquet(service, parquet(pa.table({"entity": ["a"], "y": [1.0]})))
    assert (missing.status, missing.json["field"]) == (422, "x")
    assert of_parquet(service, b"PAR1 nothing PAR1").status == 400
    assert service.call("POST", "/v1/entities:import", b"").status == 415
    assert service.call("GET", "/v1/entities/a").status == 404


def test_an_import_that_fails_half_way_says_how_far_it_came(service):
    pa = pytest.importorskip("pyarrow")
    store = service.app.state.service.kept.store
    import pymeta.serve.store as stores

    narrow = stores.Labelled(np.ones((1, 2)), np.ones((1, 1)), np.ones(1), np.zeros(1, np.int64))
    store.append("b", narrow)
    table = pa.table({"entity": ["a", "b", "c"], "x": [[1.0, 2, 3]] * 3, "y": [1.0] * 3})
    got = of_parquet(service, parquet(table))
    assert got.status == 409 and got.json["stored"] == 1 and "after 1 of 3" in got.json["detail"]
    assert service.call("DELETE", "/v1/entities/b").status == 204
    assert of_parquet(service, parquet(table)).status == 200
    assert [service.call("GET", f"/v1/entities/{n}").json["rows"] for n in "abc"] == [1, 1, 1]


def test_stored_rows_of_another_width_are_409(service):
    import pymeta.serve.store as stores

    narrow = stores.Labelled(np.ones((1, 2)), np.ones((1, 1)), np.ones(1), np.zeros(1, np.int64))
    service.app.state.service.kept.store.append("a", narrow)
    got = service.call("POST", "/v1/entities/a/predict", {"xq": [[1, 2, 3]]})
    assert got.status == 409 and "do not suit the model" in got.json["detail"]
    assert service.call("PUT", "/v1/entities/a/rows", rows()).status == 409


def test_npz_rows(service):
    into = io.BytesIO()
    np.savez(into, xs=np.array(rows()["xs"]), ys=np.array(rows()["ys"]))
    put(service, "a", into.getvalue(), **{"content-type": "application/x-npz"})
    assert same(predict(service, "a"), rows())
