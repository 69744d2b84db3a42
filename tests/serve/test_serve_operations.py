"""Limits, logs, metrics, health, OpenAPI, the command."""

import json
import logging
import subprocess
import sys

import pytest
from serve_help import BROKEN_OFF, STALLED, adapter, in_process, task

pytest.importorskip("fastapi")

from pymeta import cli
from pymeta.serve import logs
from pymeta.serve.settings import Limits, Settings

PATH, BODY = "/v1/adapt-predict", {"tasks": [task()]}


@pytest.fixture
def service(tmp_path):
    with in_process(tmp_path) as running:
        yield running


@pytest.fixture
def lines(caplog):
    """The lines of the log so far."""
    caplog.set_level("INFO", "pymeta.serve")
    formatter = logs.JsonLines()
    return lambda: [json.loads(formatter.format(record)) for record in caplog.records]


# ---- limits -------------------------------------------------------------------------------------


def test_a_body_that_is_too_long_is_413(tmp_path):
    settings = Settings(limits=Limits(body_bytes=1000))
    with in_process(tmp_path, store=None, settings=settings) as service:
        said = service.call("POST", PATH, b" " * 10, headers={"content-length": "1001"})
        assert said.status == 413 and said.json["field"] == "body"
        sent = service.call("POST", PATH, chunks=[b" " * 600] * 2)  # which says no length
        assert sent.status == 413 and "1000 bytes" in sent.json["detail"]
        assert service.call("POST", PATH, BODY).status == 200


def test_a_body_that_comes_too_slowly_is_408(tmp_path):
    settings = Settings(limits=Limits(body_seconds=0.1))
    with in_process(tmp_path, store=None, settings=settings) as service:
        got = service.call("POST", PATH, chunks=[b"{", STALLED])
        assert got.status == 408 and got.headers["connection"] == "close"
        assert "0.1 seconds" in got.json["detail"]


def test_a_body_that_is_broken_off_is_400(service):
    assert service.call("POST", PATH, chunks=[b"{", BROKEN_OFF]).status == 400


def test_an_archive_that_unpacks_to_too_much_is_413(tmp_path):
    import io

    import numpy as np

    into = io.BytesIO()
    np.savez_compressed(into, xs=np.zeros((100_000, 3)), ys=np.zeros(100_000), xq=np.zeros((1, 3)))
    settings = Settings(limits=Limits(body_bytes=100_000))
    assert len(into.getvalue()) < 100_000
    with in_process(tmp_path, store=None, settings=settings) as service:
        headers = {"content-type": "application/x-npz"}
        assert service.call("POST", PATH, into.getvalue(), headers=headers).status == 413


def test_an_explanation_that_costs_too_much_is_422(tmp_path):
    settings = Settings(limits=Limits(explained_values=32 * 3 * 2 - 1))
    with in_process(tmp_path, store=None, settings=settings) as service:
        got = service.call("POST", f"{PATH}?explain=true", BODY)
        assert got.status == 422 and got.json["field"] == "explain"
        one = {"tasks": [task(0, 7, 1)]}
        assert service.call("POST", f"{PATH}?explain=true", one).status == 200


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_wait_us": -1}, "batch_wait_us"),
        ({"batch_wait_us": 2e6}, "batch_wait_us"),
        ({"window_days": 0}, "window_days"),
        ({"threads": 0}, "threads"),
    ],
)
def test_wrong_settings(options, named):
    with pytest.raises(ValueError, match=named):
        Settings(**options)


def test_wrong_limits():
    with pytest.raises(ValueError, match="rows"):
        Limits(rows=0)


# ---- logs ---------------------------------------------------------------------------------------


def test_a_request_is_a_line_without_features_or_names(service, lines):
    secret = {"xs": [[123.456, 1, 2]], "ys": [77.5], "xq": [[654.321, 1, 2]]}
    tasks = {"tasks": [secret]}
    service.call("POST", f"{PATH}?explain=true", tasks, headers={"x-request-id": "mine-1"})
    rows = {"xs": secret["xs"], "ys": secret["ys"]}
    service.call("PUT", "/v1/entities/secret-name/rows", rows)
    service.call("POST", "/v1/entities/secret-name/predict", {"xq": secret["xq"]})
    service.call("POST", PATH, {"tasks": [{**secret, "xs": [[123.456, 1]]}]})
    service.call("DELETE", "/v1/entities/secret-name")
    found = [line for line in lines() if line["message"] == "request"]
    assert [line["status"] for line in found] == [200, 200, 200, 422, 204]
    assert found[0]["request_id"] == "mine-1" and found[0]["method"] == "POST"
    assert found[1]["route"] == "/v1/entities/{id}/rows" and found[1]["ms"] > 0
    text = json.dumps(lines())
    for part in ("123.4", "654.3", "77.5", "secret-name"):
        assert part not in text


def test_an_error_is_500_and_a_line_without_its_message(service, lines, monkeypatch):
    monkeypatch.setattr(service.app.state.service, "batcher", None)
    got = service.call("POST", PATH, BODY)
    assert got.status == 500 and got.json["request_id"] == got.headers["x-request-id"]
    assert "NoneType" not in got.body.decode()
    (line,) = [line for line in lines() if line["message"] == "failed"]
    assert line["error"] == "AttributeError" and "stateless.py" in line["at"][-1]
    assert line["request_id"] == got.headers["x-request-id"]
    assert "has no attribute" not in json.dumps(lines())


def test_a_client_that_is_gone_is_no_error(service, lines):
    got = service.call("GET", "/openapi.json", gone=True)
    assert got.status == 0
    assert [line["message"] for line in lines()] == ["request"]
    assert lines()[0]["status"] == 0
    text = service.call("GET", "/metrics").body.decode()
    assert 'pymeta_answers_total{route="other",status="broken off"} 1.0' in text


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a\nb", "ä"])
def test_a_request_id_that_is_none_is_replaced(service, given):
    got = service.call("GET", "/healthz", headers={"x-request-id": given})
    assert got.headers["x-request-id"] != given and len(got.headers["x-request-id"]) == 16


def test_lines_are_json():
    record = logging.LogRecord("pymeta.serve", 30, "f.py", 1, "said %s", ("so",), None)
    record.fields = {"status": 200}
    line = json.loads(logs.JsonLines().format(record))
    assert line["message"] == "said so" and line["level"] == "warning" and line["status"] == 200


# ---- metrics, health ----------------------------------------------------------------------------


def test_metrics(service):
    for _ in range(3):
        service.call("POST", PATH, {"tasks": [task()] * 2})
    service.call("POST", PATH, {"tasks": []})
    service.call("PUT", "/v1/entities/a/rows", {"xs": task()["xs"], "ys": task()["ys"]})
    text = service.call("GET", "/metrics").body.decode()
    for line in (
        'pymeta_answers_total{route="/v1/adapt-predict",status="200"} 3.0',
        'pymeta_answers_total{route="/v1/adapt-predict",status="422"} 1.0',
        'pymeta_request_seconds_count{route="/v1/adapt-predict"} 4.0',
        'pymeta_stage_seconds_count{stage="decode"} 5.0',
        'pymeta_stage_seconds_count{stage="native"} 3.0',
        'pymeta_stage_seconds_count{stage="store"} 1.0',
        "pymeta_adaptations_total 6.0",
        "pymeta_rows_appended_total 7.0",
        "pymeta_queue_tasks 0.0",
        "pymeta_requests_in_flight 1.0",
        'pymeta_batch_tasks_bucket{le="2.0"} 3.0',
    ):
        assert line in text, line
    version = service.call("GET", "/v1/models").json["serving"]
    assert f'pymeta_model{{version="{version}"}} 1.0' in text
    assert "/v1/entities/a" not in text


def test_health_and_readiness(service):
    assert service.call("GET", "/healthz").json == {"status": "ok"}
    ready = service.call("GET", "/readyz")
    assert ready.status == 200 and ready.json["model"].startswith("v0001-")
    service.app.state.service.ready = False
    got = service.call("GET", "/readyz")
    assert got.status == 503 and "shutting down" in got.json["detail"]


# ---- OpenAPI ------------------------------------------------------------------------------------


def references(node) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if "$ref" in node else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_the_openapi_page_is_whole_and_its_examples_work(service):
    page = service.call("GET", "/openapi.json").json
    for reference in references(page):
        assert reference.removeprefix("#/components/schemas/") in page["components"]["schemas"]
    tried = 0
    for path, methods in page["paths"].items():
        for method, said in methods.items():
            content = said.get("requestBody", {}).get("content", {}).get("application/json")
            if content is None:
                continue
            with_three = json.loads(json.dumps(content["example"]).replace("[0.", "[0, 0."))
            got = service.call(method.upper(), path.format(id="a"), with_three)
            assert got.status == 200, got.body
            properties = page["components"]["schemas"]
            answer = said["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
            known = properties[answer.rpartition("/")[2]]["properties"]
            assert set(got.json) <= set(known)
            tried += 1
    assert tried == 3


# ---- the command --------------------------------------------------------------------------------


def test_the_command_lists_its_subcommands(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert cli.main([]) == 2 and cli.main(["nothing"]) == 2
    assert "no command 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_is_there_and_has_help(name, capsys):
    try:
        code = cli.main([name, "--help"])
    except SystemExit as ended:  # as argparse does it
        code = ended.code
    assert code == 0 and f"pymeta {name}" in capsys.readouterr().out


def test_help_imports_nothing():
    code = (
        "import sys; from pymeta.cli import main; main(['--help'])\n"
        "assert not [m for m in ('numpy', 'torch', 'fastapi') if m in sys.modules]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_is_said(monkeypatch, capsys):
    def missing(name):
        raise ImportError('pymeta.serve needs fastapi: pip install "pymeta-kernels[serve]"')

    monkeypatch.setattr(cli, "import_module", missing)
    assert cli.main(["serve"]) == 1
    assert (
        'pymeta serve: pymeta.serve needs fastapi: pip install "pymeta-kernels[serve]"'
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.safetensors", "--batch-wait-us", "-1"], "batch_wait_us"),
        (["missing.safetensors"], "missing.safetensors"),
        (["a.safetensors", "--store", "mysql://x"], "sqlite or postgresql"),
        (["a.safetensors", "--store", "nonsense"], "expected a URL"),
        (["a.safetensors", "--retrain", "often"], "cron"),
        (["a.safetensors", "--feature-names", "names"], "expected 3 names, got 2"),
        (["a.safetensors", "--token-file", "names"], "names: expected"),
        (["b.safetensors"], "b.safetensors"),
    ],
)
def test_serve_refuses_what_will_not_do(tmp_path, monkeypatch, capsys, words, said):
    adapter().save(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("no adapter")
    (tmp_path / "names").write_text("age\nincome\n")
    monkeypatch.chdir(tmp_path)
    kept = {name: list(logging.getLogger(name).handlers) for name in ("pymeta.serve", "uvicorn")}
    try:
        assert cli.main(["serve", *words, "--port", "0"]) == 1
    finally:
        for name, handlers in kept.items():
            logging.getLogger(name).handlers = handlers
            logging.getLogger(name).propagate = True
    assert said in capsys.readouterr().err
