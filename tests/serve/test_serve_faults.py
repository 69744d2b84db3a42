"""A real process on loopback, and what befalls it: kills, full disks, locks, bad clients."""

import contextlib
import json
import signal
import socket
import sqlite3
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from serve_help import SOON, Process, adapter, alone, served, task, until, wide_adapter

pytest.importorskip("fastapi")

import fuzz_bodies
import postgres

from pymeta.serve.store import Store

PATH = "/v1/adapt-predict"
QUIET = ("--log-level", "warning")
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux has these limits")


@pytest.fixture(scope="module")
def server():
    with postgres.running() as found:
        yield found


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A process for several tests, each of which leaves it as it was."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "files").mkdir()
    store = f"sqlite:///{folder / 'files' / 'rows.db'}?timeout=0.2"
    with served(folder, "--log-level", "error", "--patience", "2", "--store", store) as running:
        running.files, running.url = folder / "files", f"sqlite:///{folder / 'files' / 'rows.db'}"
        yield running


def predicted(service, given=None) -> np.ndarray:
    got = service.call("POST", PATH, {"tasks": [given or task()]})
    assert got.status == 200, got.body
    return np.array(got.json["predictions"][0], np.float32)


def row(number: int) -> dict:
    """A row that is known again by its target."""
    return {"xs": [[number % 7, number % 5, 1]], "ys": [number]}


def targets(url: str, name: str) -> list[float]:
    """The targets of all stored rows of an entity, read beside the service."""
    store = Store(url)
    try:
        return [y for entity, rows in store.each() if entity == name for y in rows.y[:, 0].tolist()]
    finally:
        store.close()


def everything(client: socket.socket) -> bytes:
    """What comes until the other side closes."""
    return b"".join(iter(lambda: client.recv(65536), b""))


# ---- kills --------------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_killed_while_rows_are_written_no_acknowledged_row_is_lost(tmp_path, database, request):
    """And a client that sends again what was not acknowledged has it there once."""
    url = f"sqlite:///{tmp_path / 'rows.db'}"
    if database == "postgresql":
        url = request.getfixturevalue("server").url
    store = ["--store", url]
    adapter().save(tmp_path / "adapter.safetensors")
    service = Process(tmp_path, *QUIET, *store).wait()
    service.call("DELETE", "/v1/entities/a")
    acknowledged, unsure, lock = [], [], threading.Lock()

    def write(client: int) -> None:
        connection = service.connection()
        for i in range(10_000):
            number = 10_000 * client + i
            try:
                headers = {"Content-Type": "application/json", "Idempotency-Key": str(number)}
                connection.request("PUT", "/v1/entities/a/rows", json.dumps(row(number)), headers)
                answer = connection.getresponse()
                assert answer.status == 200 and answer.read()
            except Exception:
                with lock:
                    unsure.append(number)
                return
            with lock:
                acknowledged.append(number)

    clients = [threading.Thread(target=write, args=(c,)) for c in range(4)]
    for client in clients:
        client.start()
    until(lambda: len(acknowledged) >= 40)
    service.kill()
    for client in clients:
        client.join(SOON)
    assert len(unsure) == 4 and len(acknowledged) >= 40
    with served(tmp_path, *QUIET, *store) as again:
        found = targets(url, "a")
        assert set(acknowledged) <= set(found) <= {*acknowledged, *unsure}
        assert len(found) == len(set(found))
        for number in [*unsure, *acknowledged[:5]]:
            got = again.call(
                "PUT", "/v1/entities/a/rows", row(number), {"Idempotency-Key": str(number)}
            )
            assert got.status == 200 and got.json["replayed"] == (number in found)
        assert sorted(targets(url, "a")) == sorted({*acknowledged, *unsure})


def test_killed_while_models_are_swapped_one_of_them_serves(tmp_path):
    adapter(0).save(tmp_path / "adapter.safetensors")
    service = Process(tmp_path, *QUIET, "--store", "none").wait()
    adapter(1).save(tmp_path / "adapter.safetensors")
    assert service.call("POST", "/v1/models/reload").status == 200
    names = [v["version"] for v in reversed(service.call("GET", "/v1/models").json["versions"])]
    swaps = []

    def swap() -> None:
        with contextlib.suppress(Exception):
            while True:
                swaps.append(service.call("POST", f"/v1/models/{names[len(swaps) % 2]}/promote"))

    thread = threading.Thread(target=swap)
    thread.start()
    until(lambda: len(swaps) >= 6)
    service.kill()
    thread.join(SOON)
    with served(tmp_path, *QUIET, "--store", "none") as again:
        serving = again.call("GET", "/v1/models").json["serving"]
        assert np.array_equal(predicted(again), alone(adapter(names.index(serving)), task()))


def test_it_finishes_what_it_accepted_when_told_to_stop(tmp_path):
    """Requests whose bodies are half there at the time of SIGTERM are answered."""
    with served(tmp_path, *QUIET, "--store", "none") as service:
        body = json.dumps({"tasks": [task()]}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        clients = [socket.create_connection(("127.0.0.1", service.port), SOON) for _ in range(8)]
        for client in clients:
            client.sendall(head.encode() + body[:50])
        in_flight = b"pymeta_requests_in_flight 9.0"  # and the one that asks
        until(lambda: in_flight in service.call("GET", "/metrics").body)
        service.process.send_signal(signal.SIGTERM)

        def closed() -> bool:
            try:
                socket.create_connection(("127.0.0.1", service.port), 1).close()
            except OSError:
                return True
            return False

        until(closed)
        for client in clients:
            client.sendall(body[50:])
            answer = everything(client)
            assert answer.startswith(b"HTTP/1.1 200"), answer
            found = json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"][0]
            assert np.array_equal(np.float32(found), alone(adapter(), task()))
            client.close()
        assert service.process.wait(SOON) in (0, -signal.SIGTERM)


# ---- the database -------------------------------------------------------------------------------


def stored(service, number: int, name: str = "a") -> int:
    return service.call("PUT", f"/v1/entities/{name}/rows", row(number)).status


@linux
def test_a_full_disk(service):
    """The file cannot grow: rows are refused by 507 until it can, all else goes on."""
    import resource

    assert stored(service, 0, "full") == 200
    unlimited = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE)
    size = max(p.stat().st_size for p in service.files.iterdir())
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (size + 8192, unlimited[1]))
    try:
        statuses = []
        until(
            lambda: (
                statuses.append(stored(service, len(statuses) + 1, "full")) or statuses[-1] != 200
            )
        )
        assert statuses[-1] == 507, statuses
        assert np.array_equal(predicted(service), alone(adapter(), task()))
        got = service.call("POST", "/v1/entities/full/predict", {"xq": [[1, 2, 3]]})
        assert got.status == 200 and got.json["rows"] == len(statuses)
    finally:
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, unlimited)
    until(lambda: stored(service, 10_000, "full") == 200)
    kept = [float(i) for i in range(len(statuses))]  # the one that was refused is not there
    assert targets(service.url, "full") == [*kept, 10_000]


def test_a_locked_database(service):
    assert stored(service, 0, "locked") == 200
    other = sqlite3.connect(service.files / "rows.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        got = service.call("PUT", "/v1/entities/locked/rows", row(1))
        assert got.status == 503 and "locked" in got.json["detail"] and got.headers["retry-after"]
        assert (
            service.call("POST", "/v1/entities/locked/predict", {"xq": [[1, 2, 3]]}).status == 200
        )
        assert service.call("GET", "/readyz").status == 200  # it can be read
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert stored(service, 2, "locked") == 200
    assert targets(service.url, "locked") == [0, 2]


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_database_that_is_gone_and_back(tmp_path, database, request):
    files = tmp_path / "files"
    files.mkdir()
    if database == "sqlite":
        url = f"sqlite:///{files / 'rows.db'}"
        moved = tmp_path / "moved"
        gone, back = partial(files.rename, moved), partial(moved.rename, files)
    else:
        server = request.getfixturevalue("server")
        url, gone, back = server.url, server.stop, server.start
    with served(tmp_path, *QUIET, "--store", url) as service:
        service.call("DELETE", "/v1/entities/a")
        assert stored(service, 0) == 200
        gone()
        try:
            assert stored(service, 1) == 503
            assert service.call("POST", "/v1/entities/a/predict", {"xq": [[1, 2, 3]]}).status == 503
            ready = service.call("GET", "/readyz")
            assert ready.status == 503 and "cannot be reached" in ready.json["detail"]
            assert np.array_equal(predicted(service), alone(adapter(), task()))
        finally:
            back()
        assert service.call("GET", "/readyz").status == 200
        assert stored(service, 2) == 200
        assert targets(url, "a") == [0, 2]


# ---- clients ------------------------------------------------------------------------------------


def connected(service, ports: list[int]) -> int:
    """How many connections from these ports the service's side still holds open."""
    found = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, remote, state = line.split()[1:4]
        ours = int(local.rpartition(":")[2], 16) == service.port
        if ours and int(remote.rpartition(":")[2], 16) in ports:
            found += state in ("01", "08")  # established, or closed by the client alone
    return found


def port_of(client: socket.socket) -> int:
    return client.getsockname()[1]


def what_is_left(client: socket.socket) -> bytes:
    """All that can still be read."""
    client.settimeout(SOON)
    data = b""
    with contextlib.suppress(OSError):
        while chunk := client.recv(65536):
            data += chunk
    return data


@linux
def test_a_client_that_stops_reading(service):
    """It holds up nobody, and is given up after a while."""
    clients = []
    for _ in range(10):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", service.port))
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300)
        clients.append(client)
    ports = [port_of(client) for client in clients]
    assert connected(service, ports) == 10
    for i in range(10):
        assert np.array_equal(predicted(service), alone(adapter(), task()))
        assert stored(service, i, "read") == 200
    until(lambda: connected(service, ports) == 0)
    for client in clients:
        assert what_is_left(client).count(b"HTTP/1.1 200") < 300
        client.close()


@linux
def test_half_sent_requests(service):
    """Half a head is closed, half a body is 408, a client that leaves is nobody's loss."""

    def open_with(sent: bytes) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", service.port), SOON)
        client.sendall(sent)
        return client

    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    half_body = f"{head}Content-Length: 1000\r\n\r\n{{".encode()
    left = [open_with(sent) for sent in (half_body, head.encode()) for _ in range(20)]
    ports = [port_of(client) for client in left]
    for client in left:
        client.close()
    slow = service.connection()  # between whole requests it may take its time
    slow.request("GET", "/healthz")
    assert slow.getresponse().read() == b'{"status":"ok"}'
    silent, half_head, half = open_with(b""), open_with(head.encode()), open_with(half_body)
    assert np.array_equal(predicted(service), alone(adapter(), task()))
    answer = everything(half)
    assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive within 2 seconds" in answer
    assert everything(silent) == b"" and everything(half_head) == b""
    slow.request("GET", "/healthz")
    assert slow.getresponse().read() == b'{"status":"ok"}'
    slow.close()
    until(lambda: connected(service, ports) == 0)
    assert b'status="500"' not in service.call("GET", "/metrics").body


def test_malformed_bodies_are_never_5xx(service):
    """fuzz_bodies.py by itself sends 10,000."""
    statuses = fuzz_bodies.send(service.port, 400, seed=1)
    assert statuses[200] > 10 and statuses[422] > 50 and statuses[400] > 20
    assert sum(statuses.values()) == 400
    assert np.array_equal(predicted(service), alone(adapter(), task()))
    assert not [line for line in service.lines() if line["level"] == "error"]


# ---- models and tokens --------------------------------------------------------------------------


def test_a_new_model_of_another_shape_is_refused_and_a_good_one_found(tmp_path):
    with served(tmp_path) as service:
        wide_adapter().save(tmp_path / "adapter.safetensors")
        until(lambda: any("another shape" in line.get("reason", "") for line in service.lines()))
        assert np.array_equal(predicted(service), alone(adapter(), task()))
        assert "another shape" in service.call("GET", "/readyz").json["last_refused"]
        adapter(1).save(tmp_path / "adapter.safetensors")
        until(lambda: np.array_equal(predicted(service), alone(adapter(1), task())))


def test_tokens_over_http(tmp_path):
    from pymeta.serve.auth import new_token

    good, entry = new_token("a", ["read"], None, None)
    old, expired = new_token("b", ["read"], None, "2020-01-01T00:00:00Z")
    (tmp_path / "t.json").write_text(json.dumps({"tokens": [entry, expired]}))
    with served(tmp_path, "--token-file", "t.json", "--host", "0.0.0.0") as service:
        body = {"tasks": [task()]}
        for token, status in ((good, 200), (old, 401), (good + "x", 401), ("", 401)):
            headers = {"Authorization": f"Bearer {token}"}
            assert service.call("POST", PATH, body, headers).status == status
        assert service.call("GET", "/readyz").status == 200
        written = (tmp_path / "log.jsonl").read_text()
        assert good not in written and old not in written and '"token":"a"' in written
