"""Retraining promotes what is not worse on held out entities and later rows; no torch here."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from serve_help import SOON, adapter, in_process, task, until

pytest.importorskip("fastapi")

import pymeta
from pymeta.serve import evaluate, retrain
from pymeta.serve.registry import Registry
from pymeta.serve.retrain import Recipe, retrain_once
from pymeta.serve.retraining import Retraining
from pymeta.serve.settings import Settings
from pymeta.serve.store import Labelled, Store

ENTITIES = 16


def labelled(seed: int, rows: int = 40, features: int = 3) -> Labelled:
    """An entity: a slope of its own near a common one; a row each day, from one day to the next."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, features))
    slope = np.array([2.0, -1.0, 0.5] + [0.0] * (features - 3)) + 0.3 * random.normal(size=features)
    y = (x @ slope)[:, None]
    return Labelled(x, y, np.ones(rows), np.arange(rows) * 86_400_000_000)


@pytest.fixture
def place(tmp_path):
    """(store's URL, folder of versions): a model that knows nothing, and entities."""
    url, folder = f"sqlite:///{tmp_path / 'rows.db'}", tmp_path / "models"
    fill(url)
    serve(folder, adapter())
    return url, folder


def fill(url: str, entities: int = ENTITIES) -> None:
    store = Store(url)
    for i in range(entities):
        store.append(f"e{i:02}", labelled(i))
    store.close()


def serve(folder, model: pymeta.Adapter) -> str:
    registry = Registry(folder)
    model.save(folder / "made.safetensors")
    name = registry.add_file(folder / "made.safetensors", "file").name
    registry.promote(name)
    return name


REPTILE = Recipe(episodes=150, tasks=8, lr=0.3, method="reptile")


def test_a_better_model_is_promoted_and_its_report_kept(place):
    url, folder = place
    report = retrain_once(url, folder, REPTILE)
    assert report["promoted"] and report["method"] == "reptile"
    for group in report["loss"].values():
        assert group["new"] < 0.5 * group["serving"] and group["entities"] >= 4
    manifest = Registry(folder).manifest()
    assert manifest.serving == report["version"] != report["before"]
    assert manifest.versions[-1].report["loss"] == report["loss"]
    again = retrain_once(url, folder, REPTILE)
    assert again["before"] == report["version"]
    assert again["loss"]["held_out"]["serving"] == report["loss"]["held_out"]["new"]


def test_a_worse_model_is_not_promoted(place):
    url, folder = place
    retrain_once(url, folder, REPTILE)
    before = Registry(folder).manifest()
    report = retrain_once(url, folder, Recipe(episodes=30, tasks=8, lr=40.0, method="reptile"))
    assert not report["promoted"] and "version" not in report
    assert Registry(folder).manifest() == before


def test_no_episodes_change_nothing_and_are_not_worse(place):
    url, folder = place
    report = retrain_once(url, folder, Recipe(episodes=0, method="reptile"))
    assert report["promoted"] and report["version"] == report["before"]


def test_training_sees_neither_held_out_entities_nor_later_rows(place):
    url, folder = place
    store = Store(url)
    entities = dict(store.each())
    split = retrain.split_entities(entities, REPTILE)
    assert len(split.held_out) == 4 and len(split.trained) == 12
    assert not set(split.held_out) & set(split.trained)
    model = Registry(folder).load(Registry(folder).manifest().serving)
    draw = retrain._episodes(model, split, REPTILE, np.random.default_rng(0))
    allowed = {
        row.astype(np.float32).tobytes()
        for rows in split.trained.values()
        for row in rows.x[rows.at < split.cut]
    }
    seen = {row.tobytes() for _ in range(50) for t in draw() for row in (*t.xs, *t.xq)}
    assert seen <= allowed and len(seen) > 0.9 * len(allowed)
    # and support comes before the query in time: rows of an entity are in its order
    place_of = {
        row.astype(np.float32).tobytes(): at
        for rows in entities.values()
        for row, at in zip(rows.x, rows.at, strict=True)
    }
    for t in draw():
        assert max(place_of[r.tobytes()] for r in t.xs) < min(place_of[r.tobytes()] for r in t.xq)
    store.close()


def test_it_is_worse_where_one_of_the_groups_is(place, monkeypatch):
    """Better on the entities that it was trained on alone is not enough."""
    url, folder = place
    measured = {"held_out": [1.0, 2.0], "trained": [2.0, 1.0]}
    sizes = {4: "held_out", 12: "trained"}

    def losses(model, tasks):
        return np.array([measured[sizes[len(tasks)]].pop(0)])

    monkeypatch.setattr(retrain, "losses", losses)
    report = retrain_once(url, folder, Recipe(episodes=1, method="reptile"))
    assert not report["promoted"] and measured == {"held_out": [], "trained": []}


def test_a_model_that_diverges_is_not_promoted(place, monkeypatch):
    url, folder = place
    huge = {n: np.full_like(p, 1e30) for n, p in adapter().parameters.items()}
    monkeypatch.setattr(retrain, "_train", lambda m, a, r, d: retrain.with_start(a, huge))
    report = retrain_once(url, folder, REPTILE)
    assert not report["promoted"] and report["loss"]["held_out"]["new"] is None
    json.dumps(report, allow_nan=False)


# ---- MAML ---------------------------------------------------------------------------------------


def test_maml_is_the_learners_own_training(place):
    torch = pytest.importorskip("torch")
    from pymeta.serve import trainers

    model = adapter(dtype=np.float64)
    random = np.random.default_rng(0)

    def some(*shape):
        return random.normal(size=shape)

    tasks = [
        evaluate.Task(some(5, 3), some(5, 1), np.ones(5), some(4, 3), some(4, 1), np.ones(4))
        for _ in range(3)
    ]
    found = trainers.maml(model, 3, 0.01, lambda: tasks)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)
    ).double()
    net.load_state_dict({n: torch.tensor(p) for n, p in model.parameters.items()})
    maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=3, backend="torch")
    outer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(3):
        outer.zero_grad()
        maml(*([getattr(t, n) for t in tasks] for n in ("xs", "ys", "xq", "yq"))).loss.backward()
        outer.step()
    for name, value in found.parameters.items():
        wanted = net.state_dict()[name].numpy()
        # Adam divides a gradient by its size, so that an error of 1e-13 of it stays that small
        assert np.abs(value - wanted).max() < 1e-9 < np.abs(value - model.parameters[name]).max()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("loss", ["mse", "huber", "bce_with_logits", "cross_entropy"])
def test_an_adapter_comes_back_from_a_module(loss, learned):
    """Names that no Sequential has, norms, every loss, learned step sizes."""
    torch = pytest.importorskip("torch")
    from pymeta.serve import trainers

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.norm = torch.nn.Linear(5, 2), torch.nn.LayerNorm(5)
            self.first = torch.nn.Linear(3, 5, bias=False)

        def forward(self, x):
            return self.last(torch.nn.functional.gelu(self.norm(self.first(x))))

    rate = pymeta.LearnableLR(0.1, "layer", per_step=True) if learned else 0.1
    maml = pymeta.MAML(Odd(), loss=loss, lr=rate, steps=2, adapt=["last.*", "first.*"])
    before = maml.adapter()
    random = np.random.default_rng(0)
    y = random.integers(0, 2, (2, 6)) if loss == "cross_entropy" else random.random((2, 6, 2))
    x = random.normal(size=(2, 6, 3)).astype(np.float32)
    y = y if loss == "cross_entropy" else y.astype(np.float32)
    ones = np.ones(6, np.float32)
    tasks = [evaluate.Task(x[i], y[i], ones, x[i], y[i], ones) for i in range(2)]
    same = trainers.maml(before, 0, 0.01, lambda: tasks)
    assert np.array_equal(same.adapt_predict(x, y, x), before.adapt_predict(x, y, x))
    assert same.adapted == before.adapted == ("last.weight", "last.bias", "first.weight")
    moved = trainers.maml(before, 5, 0.01, lambda: tasks)
    assert list(moved.parameters) == list(before.parameters)
    assert evaluate.losses(moved, tasks).mean() < evaluate.losses(before, tasks).mean()
    if learned:
        assert not np.array_equal(moved.lr, before.lr)


def test_maml_trains_on_a_store(place):
    pytest.importorskip("torch")
    url, folder = place
    report = retrain_once(url, folder, Recipe(episodes=60, tasks=8, lr=0.02))
    assert report["method"] == "maml" and report["promoted"]
    assert report["loss"]["held_out"]["new"] < report["loss"]["held_out"]["serving"]


def test_the_method_follows_the_recipe():
    plain = adapter()
    assert retrain.chosen_method(plain, "auto") == "maml"
    epochs = adapter(schedule=pymeta.Schedule(epochs=2, batch_size=4))
    assert retrain.chosen_method(epochs, "auto") == "reptile"
    with pytest.raises(ValueError, match="expected reptile"):
        retrain.chosen_method(epochs, "maml")
    weighted = adapter(loss="bce_with_logits", class_weights="balanced")
    assert retrain.chosen_method(weighted, "auto") == "reptile"


# ---- refusals, the command, the service ---------------------------------------------------------


def test_too_little_is_refused(tmp_path):
    url, folder = f"sqlite:///{tmp_path / 'rows.db'}", tmp_path / "models"
    with pytest.raises(ValueError, match="no version serves"):
        retrain_once(url, folder, REPTILE)
    serve(folder, adapter())
    fill(url, 3)
    with pytest.raises(ValueError, match="at least 4 entities whose rows suit"):
        retrain_once(url, folder, REPTILE)
    store = Store(url)
    for i in range(8):  # of one moment
        rows = labelled(i)
        store.append(f"n{i}", Labelled(rows.x, rows.y, rows.weights, np.full(40, 10**15)))
    for i in range(3):
        store.delete(f"e{i:02}")
    store.close()
    with pytest.raises(ValueError, match="both before and after one moment"):
        retrain_once(url, folder, REPTILE)


@pytest.mark.parametrize(
    "options", [{"episodes": -1}, {"held_out": 1.0}, {"later": 0}, {"lr": 0}, {"method": "sgd"}]
)
def test_wrong_recipes(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Recipe(**options)


def test_the_command_without_torch(place):
    url, folder = place
    words = ["retrain", "--models", str(folder), "--store", url, "--episodes", "20", "--lr", "0.3"]
    reptile = [*words, "--method", "reptile"]
    commands = [words, reptile, [*reptile, "--seed", "1", "--lr", "1000"]]
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from pymeta.cli import main\n"
        f"for words in {commands}: print('code', main(words), flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^code (.*)$", done.stdout, re.MULTILINE) == ["1", "0", "3"]
    assert "--method reptile" in done.stderr  # which the first was told
    found = re.findall(r'"promoted": (true|false)', done.stdout)
    assert found == ["true", "false"]


def test_a_service_retrains_and_serves_what_came_of_it(tmp_path):
    fill(f"sqlite:///{tmp_path / 'rows.db'}")
    options = ["--method", "reptile", "--episodes", "50", "--lr", "0.3"]
    settings = Settings(watch_seconds=0.05)
    with in_process(tmp_path, adapter(), settings=settings, retrain_options=options) as service:
        before = service.call("GET", "/v1/models").json["serving"]
        assert service.call("POST", "/v1/models/retrain").status == 202
        assert service.call("POST", "/v1/models/retrain").status == 409
        until(lambda: service.call("GET", "/v1/models").json["serving"] != before)
        newest = service.call("GET", "/v1/models").json["versions"][0]
        assert newest["source"] == "retrain" and newest["report"]["promoted"]
        assert service.call("POST", "/v1/models/rollback").json["serving"] == before
        got = service.call("POST", "/v1/adapt-predict", {"tasks": [task()]})
        assert got.json["model"] == before


def test_the_schedule_starts_it(tmp_path, monkeypatch):
    """Every second here; the job of the schedule is the one that a request begins."""
    from apscheduler.triggers.interval import IntervalTrigger

    begun = []
    monkeypatch.setattr(Retraining, "begin", lambda self: begun.append(1))
    with in_process(tmp_path, retrain="0 3 * * *") as service:
        retraining = service.app.state.service.retraining
        (job,) = retraining._scheduler.get_jobs()
        assert job.next_run_time.hour == 3 and job.next_run_time.utcoffset().total_seconds() == 0
        service.loop.call_soon_threadsafe(job.reschedule, IntervalTrigger(seconds=1))
        until(lambda: begun, SOON)


def test_a_service_that_ends_ends_the_retraining(tmp_path):
    fill(f"sqlite:///{tmp_path / 'rows.db'}")
    options = ["--method", "reptile", "--episodes", "100000000"]
    with in_process(tmp_path, adapter(), retrain_options=options) as service:
        assert service.call("POST", "/v1/models/retrain").status == 202
        retraining = service.app.state.service.retraining
        running = retraining._running
    assert running.done()
