"""`Panel`: any table, sorted by entity and time; selections, splits, and what is refused."""

from __future__ import annotations

import datetime
import subprocess
import sys

import numpy as np
import pytest

from pymeta.data import Panel, Ragged
from pymeta.data.table import as_text, is_missing, read_table

COLUMNS = {
    "shop": ["b", "a", "b", "c", "a", "b"],
    "day": np.array(["2020-01-03", "2020-01-02", "2020-01-01", "2020-01-01", "2020-01-01",
                     "2020-01-02"], "datetime64[D]"),
    "size": np.array([1.5, 2.5, 3.5, 4.5, 5.5, 6.5]),
    "count": np.array([1, 2, 3, 4, 5, 6]),
    "kind": ["u", None, "v", "u", "v", "u"],
    "sold": np.array([0, 1, 0, 1, 1, 0]),
}  # fmt: skip


def panel(**changes) -> Panel:
    arguments = {"entity": "shop", "time": "day", "target": "sold", **changes}
    return Panel(COLUMNS, **arguments)


def frames() -> dict:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(COLUMNS)
    return {
        "frame": frame,
        "nullable": frame.convert_dtypes(),
        "categories": frame.astype({"shop": "category", "kind": "category"}),
        "zone": frame.assign(day=frame["day"].dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")),
    }


def assert_same(got: Panel, wanted: Panel) -> None:
    assert got.entities.tolist() == wanted.entities.tolist()
    assert got.offsets.tolist() == wanted.offsets.tolist()
    assert (got.times == wanted.times).all() and (got.y == wanted.y).all()
    assert (got.numeric, got.categorical) == (wanted.numeric, wanted.categorical)
    for name in (*got.numeric, *got.categorical):
        assert as_text(got[name]).tolist() == as_text(wanted[name]).tolist()


def test_rows_are_sorted_by_entity_and_time():
    p = panel()
    assert p.entities.tolist() == ["a", "b", "c"] and p.offsets.tolist() == [0, 2, 5, 6]
    assert p.rows.tolist() == [4, 1, 2, 5, 0, 3]
    assert p["size"].tolist() == [5.5, 2.5, 3.5, 6.5, 1.5, 4.5]
    assert p.y.dtype == np.float32 and p.y.tolist() == [1, 1, 0, 0, 0, 1]
    assert p.numeric == ("size", "count") and p.categorical == ("kind",)
    assert p.labels.tolist() == ["a", "a", "b", "b", "b", "c"] and p.sizes.tolist() == [2, 3, 1]
    assert "6 rows of 3 entities, 3 features, 2020-01-01 to 2020-01-03" in repr(p)


def test_rows_of_one_time_keep_their_order():
    data = {"e": [1, 0, 1, 0, 1], "t": [0, 0, 0, 0, 0], "x": [1.0, 2.0, 3.0, 4.0, 5.0]}
    assert Panel(data, entity="e", time="t")["x"].tolist() == [2, 4, 1, 3, 5]
    assert Panel(data, entity="e", numeric=["x"])["x"].tolist() == [2, 4, 1, 3, 5]


@pytest.mark.parametrize("form", ["frame", "nullable", "categories", "zone"])
def test_frames_of_pandas(form):
    assert_same(Panel(frames()[form], entity="shop", time="day", target="sold"), panel())


def test_frames_of_polars_and_tables_of_arrow():
    polars, arrow = pytest.importorskip("polars"), pytest.importorskip("pyarrow")
    frame = polars.DataFrame(COLUMNS)
    assert_same(Panel(frame, entity="shop", time="day", target="sold"), panel())
    table = arrow.table(COLUMNS)
    assert_same(Panel(table, entity="shop", time="day", target="sold"), panel())
    with pytest.raises(TypeError, match=r"collect\(\)"):
        Panel(frame.lazy(), entity="shop")


@pytest.mark.parametrize("ending", ["parquet", "feather", "csv", "csv.gz"])
def test_files(tmp_path, ending):
    frame, path = frames()["frame"], str(tmp_path / f"shops.{ending}")
    if ending.startswith("csv"):
        frame.to_csv(path, index=False)
    else:
        pytest.importorskip("pyarrow")
        getattr(frame, f"to_{ending}")(path)
    assert_same(Panel(path, entity="shop", time="day", target="sold"), panel())


def test_missing_values_of_every_kind_of_column():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "float": [1.0, None, np.nan],
            "int": pandas.array([1, None, 3], "Int64"),
            "bool": pandas.array([True, None, False], "boolean"),
            "mixed": np.array([1, None, 2.5], object),
            "text": ["x", None, "z"],
            "when": pandas.to_datetime(["2020-01-01", None, "2020-01-02"]),
            "date": np.array([datetime.date(2020, 1, 1), None, None], object),
        }
    )
    columns = read_table(frame)
    kinds = {name: values.dtype.kind for name, values in columns.items()}
    assert kinds == {"float": "f", "int": "f", "bool": "f", "mixed": "f", "text": "O",
                     "when": "M", "date": "M"}  # fmt: skip
    assert all(is_missing(values)[1] for values in columns.values())
    assert not any(is_missing(values)[0] for values in columns.values())
    assert as_text(columns["int"]).tolist() == ["1", None, "3"]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"entity": "store"}, ValueError, "entity: no column is called 'store'; there are shop, "),
        ({"entity": ["shop"]}, TypeError, "entity: expected a column's name, got list"),
        (
            {"time": "kind", "numeric": ["size"]},
            ValueError,
            "time: kind: expected times such as 2011-12-31",
        ),
        ({"target": "kind"}, ValueError, "target: 1 row has no kind; drop them"),
        ({"numeric": ["kind"]}, TypeError, "numeric: kind does not hold numbers"),
        ({"numeric": ["sold"]}, ValueError, "numeric: sold is the entity, the time or the target"),
        ({"numeric": "size"}, TypeError, "numeric: expected a list of names, got str"),
        ({"numeric": ["size", "size"]}, ValueError, "each feature once"),
        ({"time": None}, TypeError, "numeric: day holds times, which are no feature"),
        ({"entity": "kind"}, ValueError, "entity: 1 row has no group"),
    ],
)
def test_what_is_refused(changes, error, says):
    with pytest.raises(error, match=says):
        panel(**changes)


def test_columns_in_the_index_are_named():
    frame = pytest.importorskip("pandas").DataFrame(COLUMNS).set_index(["shop", "day"])
    with pytest.raises(ValueError, match=r"^entity: 'shop' is in the table's index; give \.reset_"):
        Panel(frame, entity="shop", time="day", target="sold")
    assert_same(Panel(frame.reset_index(), entity="shop", time="day", target="sold"), panel())


def test_tables_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data: expected a path that ends in \.parquet"):
        Panel(str(tmp_path / "shops.xlsx"), entity="shop")
    with pytest.raises(TypeError, match=r"data: expected a DataFrame .*, got ndarray"):
        Panel(np.zeros((2, 2)), entity="shop")
    with pytest.raises(ValueError, match="equally many rows, got a 1, b 2"):
        Panel({"a": [1], "b": [1, 2]}, entity="a")
    with pytest.raises(TypeError, match="data: b: expected numbers, strings or times"):
        Panel({"a": [1, 2], "b": [1, "x"]}, entity="a")
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match=r"several called \['a'\]"):
        Panel(pandas.DataFrame([[1, 2]], columns=["a", "a"]), entity="a")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas, .*pymeta-kernels\[data\]"):
        panel().to_frame()


def test_targets():
    assert panel(target="size", time="day").y.tolist() == [5.5, 2.5, 3.5, 6.5, 1.5, 4.5]
    named = Panel({"e": [0, 0, 1], "y": ["no", "yes", "no"]}, entity="e", target="y")
    assert named.classes.tolist() == ["no", "yes"]
    assert named.y.dtype == np.int64 and named.y.tolist() == [0, 1, 0]
    whole = panel(classes=True)
    assert whole.y.dtype == np.int64 and whole.classes.tolist() == [0, 1]
    with pytest.raises(ValueError, match="target: expected a panel with targets"):
        panel(target=None).episodes(tasks=1, support=1, query=1)
    with pytest.raises(ValueError, match="infinite"):
        Panel({"e": [0], "y": [np.inf]}, entity="e", target="y")


def test_splits_in_time():
    p = panel()
    past, future = p.split_time("2020-01-02")
    assert past.rows.tolist() == [4, 2, 3] and future.rows.tolist() == [1, 5, 0]
    assert future.entities.tolist() == ["a", "b"] and future.offsets.tolist() == [0, 1, 3]
    past, future = p.split_time(datetime.date(2020, 1, 3), gap=np.timedelta64(1, "D"))
    assert past.rows.tolist() == [4, 2, 3] and future.rows.tolist() == [0]
    past, future = p.split_time("2019-01-01")
    assert len(past) == 0 and len(past.entities) == 0 and len(future) == 6
    with pytest.raises(ValueError, match="at: expected a time such as"):
        p.split_time("soon")
    with pytest.raises(
        TypeError, match=r"gap: expected .* such as np.timedelta64\(30, 'D'\), got 3"
    ):
        p.split_time("2020-01-02", gap=3)
    numbers = Panel({"e": [0, 0], "t": [1.5, 2.5], "x": [0.0, 1.0]}, entity="e", time="t")
    assert [len(part) for part in numbers.split_time(2)] == [1, 1]
    with pytest.raises(TypeError, match="at: expected a number"):
        numbers.split_time("2020")
    with pytest.raises(ValueError, match="split_time: expected a panel with times"):
        panel(time=None, numeric=["size"]).split_time(1)


def test_splits_of_entities():
    data = {"e": np.repeat(np.arange(40), 3), "x": np.arange(120.0)}
    p = Panel(data, entity="e")
    train, test = p.split_entities(0.25, seed=0)
    assert len(train.entities) == 30 and len(test.entities) == 10
    assert np.array_equal(np.sort([*train.entities, *test.entities]), np.arange(40))
    assert (train.sizes == 3).all() and (test.sizes == 3).all()
    again, other = (p.split_entities(0.25, seed=s)[1].entities.tolist() for s in (0, 1))
    assert again == test.entities.tolist() != other
    with pytest.raises(ValueError, match="share: expected a number between 0 and 1"):
        p.split_entities(10, seed=0)
    with pytest.raises(ValueError, match="two entities or more"):
        p.of(3).split_entities(0.5, seed=0)


def test_selections():
    p = panel()
    assert p.of("b").rows.tolist() == [2, 5, 0] and p.of(["c", "a"]).rows.tolist() == [4, 1, 3]
    assert p.last(1).rows.tolist() == [1, 0, 3] and p.last(2).offsets.tolist() == [0, 2, 4, 5]
    assert p.where(p["size"] > 3).rows.tolist() == [4, 2, 5, 3]
    assert p.where(np.array([0, 5])).entities.tolist() == ["a", "c"]
    with pytest.raises(ValueError, match=r"\['d'\] are not in the panel"):
        p.of(["a", "d"])
    with pytest.raises(TypeError, match=r"entities: expected labels like \['a'\], got \[3\]"):
        p.of([3])
    with pytest.raises(ValueError, match="increasing"):
        p.where(np.array([1, 0]))
    with pytest.raises(ValueError, match=r"bool \[6\]"):
        p.where(np.ones(3, bool))


def test_a_panel_without_a_preprocessor():
    p = panel(numeric=["size", "count"])
    assert p.x.dtype == np.float32 and p.x[0].tolist() == [5.5, 5.0] and not p.is_prepared
    assert p.where(p["size"] > 3).x[:, 0].tolist() == [5.5, 3.5, 6.5, 4.5]
    with pytest.raises(ValueError, match="x: kind is a category, not a number; prepare the panel"):
        _ = panel().x
    holes = Panel({"e": [0, 0], "x": [1.0, np.nan]}, entity="e")
    with pytest.raises(ValueError, match="x: 1 row has no finite x; prepare the panel"):
        _ = holes.x


def test_features_of_ones_own():
    p = panel().with_features(np.arange(12.0).reshape(6, 2), ["a", "b"])
    assert p.is_prepared and p.features == ("a", "b") and p.x.dtype == np.float64
    assert p.of("c").x.tolist() == [[10, 11]]
    for x, says in ((np.zeros((5, 1)), r"\[6, features\]"), (np.full((6, 1), np.nan), "finite")):
        with pytest.raises(ValueError, match=f"x: .*{says}"):
            p.with_features(x)


def test_columns_may_be_replaced():
    p = panel()
    other = p.with_columns(sold=1 - p["sold"], extra=np.arange(6.0))
    assert (other.y == 1 - p.y).all() and other["extra"][5] == 5 and (p.y == p["sold"]).all()
    with pytest.raises(ValueError, match="make a new Panel"):
        p.with_columns(day=np.arange(6))
    with pytest.raises(ValueError, match="size: expected 6 rows, got 2"):
        p.with_columns(size=[1.0, 2.0])


def test_tasks_are_the_entities():
    p = panel(numeric=["size"])
    tasks = p.tasks()
    assert isinstance(tasks.xs, Ragged) and tasks.entities.tolist() == ["a", "b", "c"]
    assert [x[:, 0].tolist() for x in tasks.xs] == [[5.5, 2.5], [3.5, 6.5, 1.5], [4.5]]
    assert [y.tolist() for y in tasks.ys] == [[1, 1], [0, 0, 0], [1]]
    assert np.shares_memory(tasks.xs.values, p.x)
    equal = p.last(1).tasks()
    assert equal.xs.shape == (3, 1, 1) and equal.ys.shape == (3, 1)
    assert panel(target=None, numeric=["size"]).tasks().ys is None


def test_tasks_in_the_order_of_other_entities():
    p = panel(numeric=["size"])
    tasks = p.tasks(["c", "d", "a"])  # nothing of d is here
    assert [x[:, 0].tolist() for x in tasks.xs] == [[4.5], [], [5.5, 2.5]]
    assert [y.tolist() for y in tasks.ys] == [[1], [], [1, 1]]
    assert tasks.entities.tolist() == ["c", "d", "a"] and tasks.sizes.tolist() == [1, 0, 2]
    assert p.tasks(np.array(["b"])).xs.shape == (1, 3, 1)
    assert panel(target=None, numeric=["size"]).tasks(["d"]).ys is None
    with pytest.raises(TypeError, match="entities: expected labels like"):
        p.tasks([1, 2])


def test_models_and_the_rows_they_predict_are_in_one_order():
    torch = pytest.importorskip("torch")
    import pymeta

    whole = panel(numeric=["size"])
    past, future = whole.split_time("2020-01-02")  # a and c have one row before, b has
    future = future.of(["a", "b"])
    net = torch.nn.Linear(1, 1)
    maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=1)
    models = maml.adapt(*past.of(["b", "c"]).tasks(whole.entities))
    predicted = models(future.tasks(whole.entities).xs)
    assert [len(p) for p in predicted] == [1, 2, 0]
    start = net(torch.tensor(future.of("a").x))
    torch.testing.assert_close(predicted[0], start)  # no rows to adapt to
    assert not torch.equal(predicted[1], net(torch.tensor(future.of("b").x)))


def test_what_is_deployed_needs_neither_pandas_nor_torch():
    code = (
        "import sys\n"
        "for name in ('pandas', 'sklearn', 'scipy', 'torch', 'pyarrow'): sys.modules[name] = None\n"
        "from pymeta.data import Panel\n"
        "p = Panel({'e': [1, 0], 'x': [1.0, 2.0], 'y': [0.0, 1.0]}, entity='e', target='y')\n"
        "print(p.tasks().xs.tolist(), p.episodes)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("[[[2.0]], [[1.0]]]"), done.stderr
