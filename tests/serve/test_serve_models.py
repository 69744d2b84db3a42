"""Versions: swapped between calls, refused with a reason, rolled back; a kill leaves one whole."""

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serve_help import SOON, adapter, alone, in_process, task, until, wide_adapter

pytest.importorskip("fastapi")

from pymeta.serve.registry import Refused, Registry
from pymeta.serve.settings import Settings

PATH = "/v1/adapt-predict"
CALM = Settings(watch_seconds=0)


@pytest.fixture
def service(tmp_path):
    with in_process(tmp_path, adapter(0), store=None, settings=CALM) as running:
        running.file = tmp_path / "adapter.safetensors"
        yield running


def predicted(service, seed: int = 0) -> np.ndarray:
    got = service.call("POST", PATH, {"tasks": [task(seed)]})
    assert got.status == 200, got.body
    return np.array(got.json["predictions"][0], np.float32)


def test_reload_serves_the_file_that_is_there_now(service):
    assert np.array_equal(predicted(service), alone(adapter(0), task()))
    same = service.call("POST", "/v1/models/reload").json
    assert same["serving"] == same["before"]
    adapter(1).save(service.file)
    changed = service.call("POST", "/v1/models/reload").json
    assert changed["serving"] != changed["before"] == same["serving"]
    assert np.array_equal(predicted(service), alone(adapter(1), task()))


def test_roll_back_and_promote(service):
    adapter(1).save(service.file)
    first, second = reversed(service.call("POST", "/v1/models/reload").json.values())
    assert service.call("POST", "/v1/models/rollback").json == {"serving": first, "before": second}
    assert np.array_equal(predicted(service), alone(adapter(0), task()))
    assert service.call("POST", "/v1/models/rollback").status == 409
    assert service.call("POST", f"/v1/models/{second}/promote").json["serving"] == second
    assert np.array_equal(predicted(service), alone(adapter(1), task()))
    listed = service.call("GET", "/v1/models").json
    assert [(v["version"], v["serving"]) for v in listed["versions"]] == [
        (second, True),
        (first, False),
    ]
    assert listed["in_features"] == 3 and listed["loss"] == "mse"


@pytest.mark.parametrize("name", ["nothing", "v0001-00000000", "..%2f..%2fetc", "v0001-../../x"])
def test_a_version_that_is_not_there(service, name):
    assert service.call("POST", f"/v1/models/{name}/promote").status in (404, 409)


def test_a_bad_file_is_refused_and_the_old_model_stays(service):
    good = service.file.read_bytes()
    for bad in (b"", b"nothing of the kind", good[:-1], good[:500] + b"?" + good[501:]):
        service.file.write_bytes(bad)
        got = service.call("POST", "/v1/models/reload")
        assert got.status == 409 and got.json["detail"].startswith("adapter.safetensors: ")
        assert str(service.file.parent) not in got.json["detail"]
        assert np.array_equal(predicted(service), alone(adapter(0), task()))
    ready = service.call("GET", "/readyz")
    assert ready.status == 200 and ready.json["last_refused"].startswith("adapter.safetensors: ")
    assert len(service.call("GET", "/v1/models").json["versions"]) == 1
    service.file.write_bytes(good)
    assert service.call("POST", "/v1/models/reload").status == 200
    assert "last_refused" not in service.call("GET", "/readyz").json


def test_a_model_of_another_shape_is_refused_each_time_it_is_tried(service):
    wide_adapter().save(service.file)
    for _ in range(2):
        got = service.call("POST", "/v1/models/reload")
        assert got.status == 409 and "another shape: 4 features" in got.json["detail"]
        assert np.array_equal(predicted(service), alone(adapter(0), task()))


def test_a_missing_file_is_refused(service):
    service.file.unlink()
    assert service.call("POST", "/v1/models/reload").status == 409
    assert np.array_equal(predicted(service), alone(adapter(0), task()))


def test_a_changed_file_is_found(tmp_path):
    settings = Settings(watch_seconds=0.05)
    with in_process(tmp_path, adapter(0), store=None, settings=settings) as service:
        adapter(1).save(tmp_path / "adapter.safetensors")
        wanted = alone(adapter(1), task())
        until(lambda: np.array_equal(predicted(service), wanted))
        # and so is what another process promotes
        registry = Registry(tmp_path / "adapter.versions")
        adapter(2).save(tmp_path / "other.safetensors")
        version = registry.add_file(tmp_path / "other.safetensors", "retrain", {"loss": 1.5})
        registry.promote(version.name)
        until(lambda: np.array_equal(predicted(service), alone(adapter(2), task())))
        listed = service.call("GET", "/v1/models").json["versions"]
        assert listed[0]["source"] == "retrain" and listed[0]["report"] == {"loss": 1.5}


def test_a_service_that_starts_again_serves_what_it_served(tmp_path):
    with in_process(tmp_path, adapter(0), store=None, settings=CALM) as service:
        adapter(1).save(tmp_path / "adapter.safetensors")
        service.call("POST", "/v1/models/reload")
        service.call("POST", "/v1/models/rollback")
    with in_process(tmp_path, None, store=None, settings=CALM) as service:
        assert np.array_equal(predicted(service), alone(adapter(0), task()))
    adapter(2).save(tmp_path / "adapter.safetensors")  # a new file is what is meant
    with in_process(tmp_path, None, store=None, settings=CALM) as service:
        assert np.array_equal(predicted(service), alone(adapter(2), task()))


def test_a_service_of_a_folder_alone(tmp_path):
    from pymeta.serve import create_app

    with pytest.raises(Refused, match="no version serves"):
        create_app(models=tmp_path / "empty")
    with pytest.raises(ValueError, match="at least one"):
        create_app()
    with in_process(tmp_path, adapter(0), store=None):
        pass
    app = create_app(models=tmp_path / "adapter.versions")
    assert app.state.service.model.version.startswith("v0001-")


def test_a_file_that_is_no_adapter_leaves_no_folder_behind(tmp_path):
    from pymeta.serve import create_app

    file = tmp_path / "models.safetensors"
    rows = np.ones((1, 5, 3), np.float32), np.ones((1, 5), np.float32)
    adapter(0).adapt(*rows).save(file)
    with pytest.raises(
        ValueError, match=r"models\.safetensors: holds 'models', expected 'adapter'"
    ):
        create_app(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        create_app(tmp_path / "nowhere.safetensors")
    assert list(tmp_path.iterdir()) == [file]


def test_a_version_that_was_changed_by_hand_does_not_serve(service):
    adapter(1).save(service.file)
    names = service.call("POST", "/v1/models/reload").json
    file = service.file.parent / "adapter.versions" / f"{names['before']}.safetensors"
    adapter(5).save(file)
    got = service.call("POST", "/v1/models/rollback")
    assert got.status == 409 and "has changed" in got.json["detail"]
    assert np.array_equal(predicted(service), alone(adapter(1), task()))


LISTS = [
    "",
    "{}",
    "[]",
    '{"versions": [{}], "served": [], "source": null}',
    '{"versions": [], "served": ["v0001-00000000"], "source": null}',
]


@pytest.mark.parametrize("text", LISTS)
def test_a_damaged_list_of_versions_is_refused(tmp_path, text):
    (tmp_path / "versions.json").write_text(text)
    with pytest.raises(Refused, match=r"versions\.json is damaged"):
        Registry(tmp_path).manifest()


def test_two_threads_add_versions_and_none_is_lost(tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(12)]
    for i, file in enumerate(files):
        adapter(i).save(file)
    registries = Registry(tmp_path / "models"), Registry(tmp_path / "models")
    with ThreadPoolExecutor(4) as threads:
        add = [threads.submit(registries[i % 2].add_file, f, "file") for i, f in enumerate(files)]
        names = [each.result(SOON).name for each in add]
    assert len(set(names)) == 12
    assert [v.name for v in registries[0].manifest().versions] == sorted(names)


def test_swaps_under_load_leave_each_answer_to_one_model(tmp_path):
    """Every answer is that of the version it names, whichever serves by then."""
    with in_process(tmp_path, adapter(0), store=None, settings=CALM) as service:
        adapter(1).save(tmp_path / "adapter.safetensors")
        names = service.call("POST", "/v1/models/reload").json
        versions = names["before"], names["serving"]
        wanted = {name: alone(adapter(i), task()) for i, name in enumerate(versions)}
        answers = []
        for i in range(20):  # each time some come before the swap, and some after
            swap = ("POST", f"/v1/models/{versions[i % 2]}/promote", None)
            request = ("POST", PATH, {"tasks": [task()]})
            found = service.calls([*[request] * 8, swap, *[request] * 8])
            assert found.pop(8).json["serving"] == versions[i % 2]
            answers += found
    assert {a.json["model"] for a in answers} == set(wanted)
    for answer in answers:
        found = np.array(answer.json["predictions"][0], np.float32)
        assert np.array_equal(found, wanted[answer.json["model"]])


KILLED = """
import sys
from pathlib import Path
from pymeta.serve.registry import Registry
registry, names = Registry(Path(sys.argv[1])), sys.argv[2:]
print("begun", flush=True)
while True:
    for name in names:
        registry.promote(name)
"""


def test_killed_while_a_model_is_swapped(tmp_path):
    """Whatever moment it is killed at, the list is whole and one of the two serves."""
    registry = Registry(tmp_path / "models")
    names = []
    for i in range(2):
        adapter(i).save(tmp_path / "a.safetensors")
        names.append(registry.add_file(tmp_path / "a.safetensors", "file").name)
    served = set()
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "models"), *names],
            stdout=subprocess.PIPE,
            env=os.environ,
        )
        assert process.stdout.readline() == b"begun\n"
        before = json.loads((tmp_path / "models" / "versions.json").read_text())
        until(lambda before=before: registry.manifest().served != tuple(before["served"]))
        process.kill()
        process.wait(SOON)
        name = registry.manifest().serving
        served.add(name)
        model = registry.load(name).adapter
        assert np.array_equal(alone(model, task()), alone(adapter(names.index(name)), task()))
    assert served <= set(names)
    registry.promote(names[0])  # a lock that a killed process held is nobody's
