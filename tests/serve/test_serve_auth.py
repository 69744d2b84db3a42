"""Who may do what: tokens, scopes, rates, expiry, and loopback alone without them."""

import json
import stat
from datetime import datetime, timezone

import pytest
from serve_help import adapter, in_process, task, until

pytest.importorskip("fastapi")

from pymeta import cli
from pymeta.serve import auth
from pymeta.serve.settings import Settings

PATH, BODY = "/v1/adapt-predict", {"tasks": [task()]}
QUICK = Settings(watch_seconds=0.05)


def write(path, *entries) -> list[str]:
    """A token file; the tokens of its entries (name, scopes, per second, expires)."""
    made = [auth.new_token(*entry) for entry in entries]
    path.write_text(json.dumps({"tokens": [entry for _, entry in made]}))
    return [token for token, _ in made]


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture
def service(tmp_path):
    file = tmp_path / "tokens.json"
    everything = ["read", "write", "admin"]
    tokens = write(
        file,
        ("reader", ["read"], None, None),
        ("writer", ["write"], None, None),
        ("admin", everything, None, None),
        ("slow", ["read"], 2, None),
        ("old", everything, None, "2020-01-01T00:00:00Z"),
    )
    with in_process(tmp_path, adapter(), token_file=file, settings=QUICK) as running:
        running.tokens = dict(
            zip(("reader", "writer", "admin", "slow", "old"), tokens, strict=True)
        )
        running.file = file
        yield running


WANTED = {
    ("POST", "/v1/adapt-predict"): "read",
    ("PUT", "/v1/entities/a/rows"): "write",
    ("POST", "/v1/entities/a/predict"): "read",
    ("GET", "/v1/entities/a"): "read",
    ("DELETE", "/v1/entities/a"): "write",
    ("POST", "/v1/entities:import"): "write",
    ("GET", "/v1/entities:export"): "admin",
    ("GET", "/v1/models"): "read",
    ("POST", "/v1/models/reload"): "admin",
    ("POST", "/v1/models/rollback"): "admin",
    ("POST", "/v1/models/v1/promote"): "admin",
    ("POST", "/v1/models/retrain"): "admin",
    ("GET", "/metrics"): "read",
    ("GET", "/healthz"): "open",
    ("GET", "/readyz"): "open",
}
EITHER = {"read": ("reader", "writer"), "write": ("writer", "reader"), "admin": ("admin", "writer")}


@pytest.mark.parametrize(("method", "path"), WANTED)
def test_every_path_wants_its_scope(service, method, path):
    scope = WANTED[method, path]
    if scope == "open":
        assert service.call(method, path).status == 200
        return
    none = service.call(method, path)
    assert none.status == 401 and none.headers["www-authenticate"] == "Bearer"
    good, other = EITHER[scope]
    wrong = service.call(method, path, headers=bearer(service.tokens[other]))
    assert wrong.status == 403 and scope in wrong.json["detail"]
    if path != "/v1/models/retrain":  # which would start
        right = service.call(method, path, headers=bearer(service.tokens[good]))
        assert right.status not in (401, 403)


def test_every_path_is_in_the_table_above(service):
    page = service.call("GET", "/openapi.json").json["paths"]
    found = {(m.upper(), p.format(id="a", version="v1")) for p, ms in page.items() for m in ms}
    assert found == set(WANTED)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer pm_wrong",
        "Basic {reader}",
        "{reader}",
        "Bearer {reader}x",
        "Bearer {reader} x",
        "Bearer {hash}",
    ],
)
def test_wrong_tokens(service, header):
    known = json.loads(service.file.read_text())["tokens"][0]["sha256"]
    header = header.format(reader=service.tokens["reader"], hash=known)
    assert service.call("POST", PATH, BODY, headers={"authorization": header}).status == 401


def test_an_expired_token(service):
    got = service.call("POST", PATH, BODY, headers=bearer(service.tokens["old"]))
    assert got.status == 401 and "expired" in got.json["detail"]


def test_a_token_expires_while_the_service_runs(tmp_path):
    (token,) = write(tmp_path / "t.json", ("a", ["read"], None, "2030-06-01T12:00:00+02:00"))
    now = [datetime(2030, 6, 1, 9, 59, 59, tzinfo=timezone.utc)]
    guard = auth.Guard(tmp_path / "t.json", now=lambda: now[0])
    scope = {"headers": [(b"authorization", f"Bearer {token}".encode())]}
    assert guard.admit(scope, "read") == "a"
    now[0] = datetime(2030, 6, 1, 10, 0, 0, tzinfo=timezone.utc)
    with pytest.raises(auth.Problem) as refused:
        guard.admit(scope, "read")
    assert refused.value.status == 401


def test_a_rate_is_each_tokens_own(service, monkeypatch):
    monkeypatch.setattr(auth, "monotonic", lambda: 1000.0)
    slow = bearer(service.tokens["slow"])
    statuses = [service.call("POST", PATH, BODY, headers=slow).status for _ in range(4)]
    assert statuses == [200, 200, 429, 429]
    refused = service.call("POST", PATH, BODY, headers=slow)
    assert refused.headers["retry-after"] == "1" and "2 requests a second" in refused.json["detail"]
    assert service.call("POST", PATH, BODY, headers=bearer(service.tokens["reader"])).status == 200
    monkeypatch.setattr(auth, "monotonic", lambda: 1000.5)
    assert service.call("POST", PATH, BODY, headers=slow).status == 200
    assert service.call("POST", PATH, BODY, headers=slow).status == 429


def test_a_token_is_revoked_and_another_added_while_it_runs(service):
    reader = bearer(service.tokens["reader"])
    assert service.call("POST", PATH, BODY, headers=reader).status == 200
    (new,) = write(service.file, ("new", ["read"], None, None))
    until(lambda: service.call("POST", PATH, BODY, headers=bearer(new)).status == 200)
    assert service.call("POST", PATH, BODY, headers=reader).status == 401


def test_a_file_that_is_damaged_while_it_runs_changes_nothing(service):
    guard = service.app.state.service.guard
    service.file.write_text("{")
    guard.refresh()
    assert guard._seen == guard._signature()  # it was looked at
    reader = bearer(service.tokens["reader"])
    assert service.call("POST", PATH, BODY, headers=reader).status == 200


def test_the_body_is_not_read_before_the_token(service):
    got = service.call("POST", PATH, chunks=[])  # whose body never comes
    assert got.status == 401


FINE = {"name": "a", "sha256": "0" * 64, "scopes": ["read"]}
DAMAGED = {
    "{": "expected",
    "[]": "expected",
    '{"tokens": {}}': None,
    json.dumps({"tokens": [FINE, {**FINE, "sha256": "0" * 63}]}): "token 1: sha256",
    json.dumps({"tokens": [{**FINE, "scopes": ["all"]}]}): "token 0: scopes",
    json.dumps({"tokens": [{**FINE, "scopes": []}]}): "token 0: scopes",
    json.dumps({"tokens": [{**FINE, "name": "a b"}]}): "token 0: name",
    json.dumps({"tokens": [{**FINE, "per_second": 0}]}): "token 0: per_second",
    json.dumps({"tokens": [{**FINE, "per_second": True}]}): "token 0: per_second",
    json.dumps({"tokens": [{**FINE, "expires": "2027-01-01T00:00:00"}]}): "token 0: expires",
    json.dumps({"tokens": [{**FINE, "expires": 5}]}): "token 0: expires",
    json.dumps({"tokens": [{**FINE, "token": "secret"}]}): "token 0: expected",
}


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    if DAMAGED[text] is None:
        assert auth.read_tokens(tmp_path / "t.json") == []
        return
    with pytest.raises(ValueError, match=DAMAGED[text]):
        auth.read_tokens(tmp_path / "t.json")


# ---- without tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "host", "status"),
    [
        ("127.0.0.1", "localhost", 200),
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("::1", "[::1]:8000", 200),
        ("192.0.2.7", "192.0.2.7", 403),
        ("192.0.2.7", "localhost", 403),
        ("127.0.0.1", "evil.example", 403),  # a name that somebody else's server gave us
    ],
)
def test_without_tokens_loopback_alone_is_served(tmp_path, server, host, status):
    with in_process(tmp_path, store=None) as service:
        got = service.call("POST", PATH, BODY, server=server, headers={"host": host})
        assert got.status == status, got.body
    with in_process(tmp_path, store=None, listen_without_tokens=True) as service:
        got = service.call("POST", PATH, BODY, server=server, headers={"host": host})
        assert got.status == 200


def test_nothing_listens_beyond_loopback_without_tokens_unless_told_so(
    tmp_path, monkeypatch, capsys
):
    adapter().save(tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    for host in ("0.0.0.0", "::"):
        assert cli.main(["serve", "a.safetensors", "--host", host, "--port", "0"]) == 1
        assert "--listen-without-tokens" in capsys.readouterr().err
    assert not (tmp_path / "pymeta.db").exists()


def test_the_token_command(tmp_path, capsys):
    file = tmp_path / "t.json"
    for i, name in enumerate(("a", "b")):
        words = ["token", str(file), "--name", name, "--scopes", "read,write", "--per-second", "5"]
        assert cli.main([*words, "--expires", "2030-01-01T00:00:00Z"]) == 0
        token = capsys.readouterr().out.strip()
        assert token not in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
        guard = auth.Guard(file)
        scope = {"headers": [(b"authorization", f"Bearer {token}".encode())]}
        assert guard.admit(scope, "write") == name and len(guard._tokens) == i + 1
    before = file.read_text()
    assert cli.main(["token", str(file), "--name", "c", "--scopes", "all"]) == 1
    assert "scopes" in capsys.readouterr().err and file.read_text() == before
