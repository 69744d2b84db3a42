"""The short examples, end to end on made tables: each shows what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import source_tree

import pymeta
from pymeta import cli

EXAMPLES = source_tree.need("examples") / "examples"
sys.path.insert(0, str(EXAMPLES))

SHORT = ("finetune_groups", "maml_minimal", "own_csv", "serve_client", "sklearn_pipeline")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made_table(folder: Path, *, groups: int, rows: int, binary: bool) -> Path:
    """A CSV whose target depends on `a` in a way that differs from group to group."""
    pandas = pytest.importorskip("pandas")
    random = np.random.default_rng(0)
    who = np.repeat(np.arange(groups), rows)
    a, b = random.normal(size=(2, len(who)))
    slope = np.where(np.arange(groups) % 2, 2.0, -2.0)[who]
    y = slope * a + 0.5 * b + 0.1 * random.normal(size=len(who))
    table = pandas.DataFrame(
        {
            "who": [f"g{i}" for i in who],
            "day": np.tile(np.arange(rows), groups),
            "a": np.where(random.random(len(who)) < 0.02, np.nan, a),
            "b": b,
            "kind": random.choice(["x", "y"], len(who)),
            "y": (y > 0).astype(int) if binary else y,
        }
    )
    table.to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


@pytest.mark.parametrize("name", SHORT)
def test_they_are_short(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 70


def test_no_example_is_long():
    long = {p.name: len(p.read_text().splitlines()) for p in EXAMPLES.glob("*.py")}
    # comparisons of many learners on several data sets; they have a table of settings each
    allowed = {"compare_learners.py": 320, "intents.py": 360, "omniglot_metric.py": 230,
               "omniglot_optimizers.py": 220}  # fmt: skip
    assert {name: n for name, n in long.items() if n > allowed.get(name, 200)} == {}


def test_maml_minimal(capsys):
    import maml_minimal

    errors = maml_minimal.main(iterations=400)
    assert errors[10] < 0.7 * errors[0] and errors[1] < errors[0]
    assert capsys.readouterr().out.count("mean squared error") == 3


def test_own_csv(folder, capsys):
    import own_csv

    path = made_table(folder, groups=16, rows=24, binary=False)
    words = [str(path), "--entity", "who", "--target", "y", "--time", "day", "--batches", "150"]
    before, after = own_csv.main(words)
    assert after < 0.5 * before
    assert "4 held-out entities" in capsys.readouterr().out
    pymeta.Adapter.load(folder / "adapter.safetensors")
    adapt = ["adapt", "adapter.safetensors", str(path), "--entity", "who", "--target", "y"]
    adapt += ["--preprocessor", "preprocessor.safetensors", "--out", "models.safetensors"]
    assert cli.main(adapt) == 0
    assert "16 models adapted to 384 rows" in capsys.readouterr().out


def test_own_csv_with_a_target_of_text(folder, capsys):
    pandas = pytest.importorskip("pandas")
    import own_csv

    path = made_table(folder, groups=40, rows=24, binary=True)
    table = pandas.read_csv(path)
    table.assign(y=table["y"].map({0: "no", 1: "yes"})).to_csv(path, index=False)
    words = [str(path), "--entity", "who", "--target", "y", "--time", "day", "--batches", "200"]
    before, after = own_csv.main(words)
    assert after < before - 0.15
    assert "10 held-out entities: share of wrong classes" in capsys.readouterr().out
    assert pymeta.Adapter.load(folder / "adapter.safetensors").loss.kind == "cross_entropy"


def test_entities_of_a_row_or_two(folder, capsys):
    pandas = pytest.importorskip("pandas")
    import finetune_groups
    import own_csv

    path = made_table(folder, groups=12, rows=24, binary=True)
    table = pandas.read_csv(path)
    few = [table.iloc[:1].assign(who=f"one{i}") for i in range(6)]
    pandas.concat([table, *few, table.iloc[:2].assign(who="two")]).to_csv(path, index=False)
    words = [str(path), "--entity", "who", "--target", "y", "--time", "day", "--batches", "3"]
    assert np.isfinite(own_csv.main(words)).all()
    assert "5 held-out entities" in capsys.readouterr().out
    words = [str(path), "--group", "who", "--target", "y", "--epochs", "2"]
    assert np.isfinite(finetune_groups.main(words)).all()
    assert "log-loss of 48 later rows" in capsys.readouterr().out


def test_finetune_groups(folder, capsys):
    import finetune_groups

    path = made_table(folder, groups=10, rows=120, binary=True)
    before, after = finetune_groups.main([str(path), "--group", "who", "--target", "y"])
    assert after < 0.8 * before
    assert "Adapted(10 x Sequential" in capsys.readouterr().out
    words = ["predict", "models.safetensors", str(path), "--entity", "who", "--preprocessor"]
    assert cli.main([*words, "prep.safetensors"]) == 0
    who, *lines = capsys.readouterr().out.splitlines()
    assert who == "who,probability" and len(lines) == 1200


def test_sklearn_pipeline(folder):
    pytest.importorskip("sklearn")
    import sklearn_pipeline

    path = made_table(folder, groups=10, rows=60, binary=True)
    words = [str(path), "--group", "who", "--target", "y", "--iterations", "100"]
    start, adapted = sklearn_pipeline.main(words)
    assert adapted > 0.85 and adapted > start + 0.15


def test_serve_client(folder, capsys):
    pytest.importorskip("fastapi")
    import serve_client
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(2, 1))
    torch.nn.init.zeros_(net[0].weight)
    torch.nn.init.zeros_(net[0].bias)
    pymeta.MAML(net, loss="mse", lr=0.3, steps=20).adapter().save("adapter.safetensors")
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 2))
    y = np.tile([-1.0, 1.0], 20) * (2 * x[:, 0] + 1)
    lines = ["shop,a,b,sales"]
    shops = ["odd", "even"] * 20
    lines += [f"{s},{a},{b},{t}" for s, (a, b), t in zip(shops, x, y, strict=True)]
    (folder / "new.csv").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "pymeta", "serve", "adapter.safetensors", "--port", "0"]
    service = subprocess.Popen(
        [*command, "--log-level", "error"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYMETA_NUM_THREADS": "1"},
    )
    try:
        url = json.loads(service.stdout.readline())["url"]
        words = [url, "new.csv", "--entity", "shop", "--target", "sales"]
        error = serve_client.main(words)
    finally:
        service.terminate()
        service.wait(timeout=60)
        service.stdout.close()
    assert error < 0.6 * float(np.mean(y**2))  # what a prediction of 0 for every row costs
    assert "38 rows" in capsys.readouterr().out
