"""`pymeta adapt` and `pymeta predict`: the library's results, in the table's order, by name."""

import subprocess
import sys

import numpy as np
import pytest

import pymeta
from pymeta import cli
from pymeta.spec.architecture import Architecture
from pymeta.spec.losses import Loss

pandas = pytest.importorskip("pandas")
NAMES = ("0.weight", "0.bias")


def adapter(loss: str = "mse", outputs: int = 1, columns: int = 2) -> pymeta.Adapter:
    chain = Architecture((("linear", columns, outputs, True),), NAMES, NAMES, False)
    random = np.random.default_rng(0)
    weights = {n: random.normal(size=s).astype(np.float32) for n, s in chain.shapes().items()}
    return pymeta.Adapter(
        chain,
        weights,
        adapted=NAMES,
        loss=Loss(loss),
        optimizer=pymeta.SGD(0.1),
        schedule=pymeta.Schedule(steps=4),
    )


@pytest.fixture
def table():
    random = np.random.default_rng(1)
    shop = random.permutation(np.repeat(["north", "south", "9"], (5, 8, 3)))
    x = random.normal(size=(16, 2)).astype(np.float32)
    y = (x.sum(1) + (shop == "north")).astype(np.float32)
    return pandas.DataFrame({"shop": shop, "y": y, "a": x[:, 0], "b": x[:, 1]})


@pytest.fixture
def folder(tmp_path, monkeypatch, table):
    monkeypatch.chdir(tmp_path)
    adapter().save("adapter.safetensors")
    table.to_csv("rows.csv", index=False)
    return tmp_path


ADAPT = ["adapt", "adapter.safetensors", "rows.csv", "--target", "y", "--entity", "shop"]
ADAPT += ["--out", "models.safetensors"]
PREDICT = ["predict", "models.safetensors", "rows.csv", "--out", "out.csv"]


def test_each_row_is_predicted_by_its_entitys_model(folder, table, capsys):
    assert cli.main(ADAPT) == 0
    said = capsys.readouterr().out
    assert said.startswith("models.safetensors: 3 models adapted to 16 rows in ")
    assert said.rstrip().endswith("; 0 diverged")
    assert cli.main(PREDICT) == 0
    got = pandas.read_csv("out.csv")
    assert list(got.columns) == ["shop", "prediction"]
    assert got["shop"].tolist() == table["shop"].tolist()
    for name, rows in table.groupby("shop"):
        x = rows[["a", "b"]].to_numpy(np.float32)
        y = rows[["y"]].to_numpy(np.float32)
        wanted = adapter().adapt_predict(x, y, x)[:, 0]
        assert np.array_equal(got.loc[rows.index, "prediction"].to_numpy(np.float32), wanted), name


def test_steps_weights_and_chosen_features(folder, table):
    table.assign(w=2.0, extra="text").to_csv("rows.csv", index=False)
    words = [*ADAPT, "--features", "b,a", "--weight", "w", "--steps", "2"]
    assert cli.main(words) == 0
    models = pymeta.AdaptedArrays.load("models.safetensors")
    rows = table[table["shop"] == "9"]  # "9" sorts first
    x, y = rows[["b", "a"]].to_numpy(np.float32)[None], rows["y"].to_numpy(np.float32)[None]
    wanted = adapter().adapt(x, y, weights=np.full_like(y, 2), steps=2)
    assert np.array_equal(models.parameters["0.weight"][0], wanted.parameters["0.weight"][0])
    assert cli.main(PREDICT) == 0  # the features are remembered


def test_entities_without_a_model(folder, table, capsys):
    assert cli.main(ADAPT) == 0
    new = table.assign(shop=table["shop"].replace("9", "west"))
    new.to_csv("rows.csv", index=False)
    capsys.readouterr()
    assert cli.main(PREDICT) == 1
    assert "--entity: 1 of 3 have no model (west); --start ADAPTER" in capsys.readouterr().err
    assert cli.main([*PREDICT, "--start", "adapter.safetensors"]) == 0
    got = pandas.read_csv("out.csv")
    start = adapter().parameters
    x = new[["a", "b"]].to_numpy(np.float32)
    wanted = (x @ start["0.weight"].T + start["0.bias"])[:, 0]
    west = (new["shop"] == "west").to_numpy()
    assert np.allclose(got["prediction"][west], wanted[west], atol=1e-6)
    assert not np.allclose(got["prediction"][~west], wanted[~west], atol=1e-3)


def test_an_adapter_predicts_by_its_start(folder, table, capsys):
    words = ["predict", "adapter.safetensors", "rows.csv", "--features", "a,b"]
    assert cli.main(words) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "prediction" and len(lines) == len(table)


def test_classes_and_probabilities(folder, table, capsys):
    adapter("cross_entropy", 3).save("adapter.safetensors")
    table.assign(y=np.arange(16) % 3).to_csv("rows.csv", index=False)
    assert cli.main(ADAPT) == 0 and cli.main(PREDICT) == 0
    got = pandas.read_csv("out.csv")
    columns = [f"probability_{i}" for i in range(3)]
    assert list(got.columns) == ["shop", "class", *columns]
    assert np.allclose(got[columns].sum(axis=1), 1, atol=1e-5)
    assert (got[columns].to_numpy().argmax(1) == got["class"]).all()
    table.assign(y=0.5).to_csv("rows.csv", index=False)
    capsys.readouterr()
    assert cli.main(ADAPT) == 1
    assert "--target: y: expected classes 0, 1, 2" in capsys.readouterr().err


def test_a_preprocessor_makes_the_features(folder, table):
    pytest.importorskip("sklearn")
    from pymeta.data import Panel

    table.loc[2, "a"] = np.nan
    table["kind"] = ["old", "new"] * 8
    table.to_csv("rows.csv", index=False)
    panel = Panel(table, entity="shop", target="y")
    prep = panel.preprocessor().fit(panel)
    prep.save("prep.safetensors")
    adapter(columns=len(prep.features)).save("adapter.safetensors")
    assert cli.main([*ADAPT, "--preprocessor", "prep.safetensors"]) == 0
    assert cli.main(PREDICT) == 0
    assert pandas.read_csv("out.csv")["prediction"].notna().all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "z"], "--target: no column is called 'z'; there are shop, y, a, b"),
        (["--entity", "z"], "--entity: no column is called 'z'"),
        (["--weight", "z"], "--weight: no column is called 'z'"),
        (["--features", "a"], "--features: the model takes 2, the columns a are 1"),
        (["--features", "a,shop"], "--features: shop is not a column of numbers"),
        (["--steps", "-1"], "--steps: expected at least 0, got -1"),
        (["--out", "models.bin"], "--out: expected a file that ends in .safetensors"),
    ],
)
def test_what_is_refused(folder, capsys, words, said):
    assert cli.main([*ADAPT, *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pymeta adapt: ") and said in line


def test_missing_values_and_files_are_refused(folder, table, capsys):
    table.loc[3, "b"] = np.nan
    table.to_csv("rows.csv", index=False)
    assert cli.main(ADAPT) == 1
    assert "--features: b: 1 value is missing or infinite" in capsys.readouterr().err
    table.loc[4, "shop"] = None
    table.to_csv("rows.csv", index=False)
    assert cli.main(ADAPT) == 1
    assert "--entity: shop: 1 row has none" in capsys.readouterr().err
    for words in (["adapt", "none.safetensors", *ADAPT[2:]], [*ADAPT[:2], "none.csv", *ADAPT[3:]]):
        assert cli.main(words) == 1
        assert "none." in capsys.readouterr().err
    assert cli.main([*ADAPT[:2], "rows.txt", *ADAPT[3:]]) == 1
    assert "expected a path that ends in" in capsys.readouterr().err


def test_names_that_do_not_fit_the_models_are_refused(folder, capsys):
    assert cli.main(ADAPT) == 0
    (folder / "models.entities.json").write_text('{"entity": "shop"}')
    assert cli.main(PREDICT) == 1
    assert "not the names of the 3 models" in capsys.readouterr().err


def test_models_without_the_names_of_entities_are_refused(folder, capsys):
    assert cli.main(ADAPT) == 0
    (folder / "models.entities.json").unlink()
    assert cli.main(PREDICT) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "models.entities.json: no such file, which says whose each model" in line
    assert "pymeta adapt" in line


def test_neither_imports_torch(folder):
    for words in (ADAPT, PREDICT):
        code = "import sys; sys.modules['torch'] = None; from pymeta.cli import main; "
        done = subprocess.run(
            [sys.executable, "-c", f"{code}sys.exit(main({words!r}))"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


# ---- models that a learner saved ----------------------------------------------------------------


def test_models_of_a_learner_with_the_names_of_their_entities(folder, table, capsys):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    groups = list(table.drop(columns="y").groupby("shop"))
    xs = [rows[["a", "b"]].to_numpy(np.float32) for _, rows in groups]
    ys = [table.loc[rows.index, ["y"]].to_numpy(np.float32) for _, rows in groups]
    tune = pymeta.FineTune(torch.nn.Linear(2, 1), loss="mse", optimizer=pymeta.SGD(0.1), epochs=3)
    models = tune([torch.tensor(x) for x in xs], [torch.tensor(y) for y in ys])
    models.save("models.safetensors", entities=[name for name, _ in groups])
    table.drop(columns="y").to_csv("rows.csv", index=False)
    assert cli.main(PREDICT) == 1
    said = capsys.readouterr().err
    assert "--entity: expected the column that says which of the 3 models in models" in said
    assert cli.main([*PREDICT, "--entity", "shop"]) == 0
    got = pandas.read_csv("out.csv")
    for i, (_, rows) in enumerate(groups):
        wanted = models[i](torch.tensor(xs[i])).detach().numpy()[:, 0]
        assert np.allclose(got.loc[rows.index, "prediction"], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "error", "said"),
    [
        (["a"], ValueError, "entities: expected 3 names, got 1"),
        (["a", "b", "a"], ValueError, "entities: 'a' is there 2 times"),
        ("abc", TypeError, "entities: expected a name for each model, got 'abc'"),
        (3, TypeError, "entities: expected a name for each model, got 3"),
    ],
)
def test_wrong_names_are_refused_before_anything_is_written(tmp_path, names, error, said):
    x = np.zeros((3, 2, 2), np.float32)
    models = adapter().adapt(x, x[:, :, :1])
    with pytest.raises(error, match=said):
        models.save(tmp_path / "models.safetensors", entities=names)
    assert list(tmp_path.iterdir()) == []
