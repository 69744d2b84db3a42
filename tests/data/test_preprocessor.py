"""`Preprocessor`: what scikit-learn's parts give, from a file too; and what has leaked is found."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest

from pymeta.data import Panel, Preprocessor
from pymeta.data.encoders import credibility

sklearn = pytest.importorskip("sklearn")


def data(rows=400, seed=0, **changes):
    rng = np.random.default_rng(seed)
    income = rng.lognormal(0, 1, rows)
    income[rng.random(rows) < 0.1] = np.nan
    kind = rng.choice(np.array(["car", "house", "boat", "yacht", None]), rows,
                      p=[0.45, 0.3, 0.14, 0.01, 0.1])  # fmt: skip
    state = rng.integers(0, 12, rows)
    columns = {
        "income": income,
        "age": rng.integers(18, 90, rows),
        "kind": kind,
        "state": state,
        "day": np.datetime64("2020-01-01") + rng.integers(0, 300, rows),
        "y": (rng.random(rows) < 0.1 + 0.05 * state).astype(int),
    }
    return {**columns, **changes}


def panel(time: str | None = "day", **changes) -> Panel:
    return Panel(
        data(**changes), entity="state", time=time, target="y", numeric=["income", "age"],
        categorical=["kind"],
    )  # fmt: skip


def columns_of(p: Panel):
    kind = np.array(["(missing)" if v is None else v for v in p["kind"]], object)[:, None]
    return np.stack([p["income"], p["age"].astype(float)], axis=1), kind


@pytest.mark.parametrize("scale", ["standard", "robust", None])
@pytest.mark.parametrize("clip", [(0.01, 0.99), (0, 1), None])
def test_it_is_what_scikit_learns_parts_give(scale, clip):
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import OneHotEncoder, RobustScaler, StandardScaler

    train, later = panel(), panel(seed=1)
    prep = train.preprocessor(scale=scale, clip=clip, dtype="float64").fit(train)
    x, kind = columns_of(train)
    other_x, other_kind = columns_of(later)
    imputer = SimpleImputer(strategy="median").fit(x)
    low, high = (-np.inf, np.inf) if clip is None else np.nanquantile(x, clip, axis=0)
    encoder = OneHotEncoder(min_frequency=20, handle_unknown="infrequent_if_exist").fit(kind)
    scaler = {"standard": StandardScaler, "robust": RobustScaler}.get(scale)
    if scaler is not None:
        scaler = scaler().fit(np.clip(imputer.transform(x), low, high))
    for p, numbers, categories in ((train, x, kind), (later, other_x, other_kind)):
        wanted = np.clip(imputer.transform(numbers), low, high)
        wanted = wanted if scaler is None else scaler.transform(wanted)
        wanted = np.concatenate(
            [wanted, np.isnan(numbers[:, :1]), encoder.transform(categories).toarray()], axis=1
        )
        assert np.allclose(prep(p).x, wanted, rtol=1e-12, atol=1e-12)
    named = ("income", "age", "income missing", "kind=(missing)", "kind=boat", "kind=car")
    assert prep.features == (*named, "kind=house", "kind=(other)")


def test_unknown_and_rare_categories():
    train = Panel({"e": [0] * 6, "k": list("aaabbc")}, entity="e")
    new = Panel({"e": [1] * 4, "k": ["a", "c", "z", None]}, entity="e")
    shared = train.preprocessor(min_rows=2).fit(train)
    assert shared.features == ("k=a", "k=b", "k=(other)")
    assert shared(new).x.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]]
    all_known = train.preprocessor(min_rows=1).fit(train)
    assert all_known(new).x.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    few = train.preprocessor(min_rows=1, max_categories=2).fit(train)
    assert few.features == ("k=a", "k=(other)")


def test_categories_are_compared_as_text():
    """A file may hold whole numbers as floats, because some are missing."""
    train = Panel({"e": [0] * 4, "k": [1, 1, 2, 2]}, entity="e", categorical=["k"])
    prep = train.preprocessor(min_rows=1).fit(train)
    new = Panel({"e": [0] * 3, "k": [1.0, np.nan, 2.0]}, entity="e", categorical=["k"])
    assert prep(new).x.tolist() == [[1, 0], [0, 0], [0, 1]]


def test_nothing_is_beyond_what_training_saw():
    train = panel()
    prep = train.preprocessor(clip=(0, 1)).fit(train)
    wild = Panel(data(age=np.full(400, 1e9), income=np.full(400, np.inf)), entity="state",
                 numeric=["income", "age"], categorical=["kind"])  # fmt: skip
    assert np.array_equal(prep(wild).x[:, :2], np.tile(prep(train).x[:, :2].max(axis=0), (400, 1)))
    free = train.preprocessor(clip=None).fit(train)
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        free(wild)


def test_a_column_that_training_has_not_filled():
    train = Panel({"e": [0, 0], "x": [np.nan, np.nan], "z": [1.0, 1.0]}, entity="e")
    prep = train.preprocessor().fit(train)
    new = Panel({"e": [0], "x": [5.0], "z": [2.0]}, entity="e")
    assert np.isfinite(prep(new).x).all() and prep.features == ("x", "z", "x missing")


# ---- the entity's mean --------------------------------------------------------------------------


def test_an_entitys_mean_is_of_earlier_rows_alone():
    e = ["a", "a", "a", "a", "b", "b"]
    day = np.array([1, 2, 2, 3, 1, 5])
    train = Panel({"e": e, "t": day, "y": [1.0, 0, 1, 1, 0, 0]}, entity="e", time="t", target="y")
    prep = train.preprocessor(encode_entity=True, smooth=2.0, scale=None).fit(train)
    assert prep.features == ("mean e",)
    m = 0.5
    wanted = [m, (1 + 2 * m) / 3, (1 + 2 * m) / 3, (2 + 2 * m) / 5, m, (0 + 2 * m) / 3]
    assert np.allclose(prep(train).x[:, 0], wanted)
    later = Panel({"e": ["a", "b", "c"], "t": [9, 9, 9]}, entity="e", time="t")
    assert np.allclose(prep(later).x[:, 0], [(3 + 1) / 6, (0 + 1) / 4, m])
    delayed = train.preprocessor(encode_entity=True, smooth=2.0, scale=None, gap=1).fit(train)
    wanted = [m, m, m, (1 + 2 * m) / 3, m, (0 + 2 * m) / 3]
    assert np.allclose(delayed(train).x[:, 0], wanted)


def test_the_mean_does_not_see_the_rows_own_target_or_later_ones():
    """Whatever later targets are, the feature is the same, up to the mean of all."""
    rng = np.random.default_rng(0)
    base = {"e": np.repeat(np.arange(5), 20), "t": np.tile(np.arange(20), 5)}
    y = rng.normal(size=100)
    changed = np.where(base["t"] >= 10, rng.permutation(y), y)
    changed += (y.sum() - changed.sum()) / 50 * (base["t"] >= 10)  # the same mean of all
    means = []
    for values in (y, changed):
        p = Panel({**base, "y": values}, entity="e", time="t", target="y")
        prep = p.preprocessor(encode_entity=True, smooth=3.0, scale=None, dtype="float64").fit(p)
        means.append(prep(p).x[:, 0])
    early = base["t"] <= 10
    assert np.allclose(means[0][early], means[1][early], atol=1e-6)
    assert not np.allclose(means[0], means[1], atol=1e-3)


def test_without_times_a_row_gets_the_mean_of_other_folds():
    """Were its own target in it, the feature would tell random targets; left out, it would too."""
    rng = np.random.default_rng(0)
    e, y = np.repeat(np.arange(200), 5), rng.normal(size=1000)
    p = Panel({"e": e, "y": y}, entity="e", target="y")
    prep = p.preprocessor(encode_entity=True, smooth=1.0).fit(p)
    assert abs(np.corrcoef(prep(p).x[:, 0], p.y)[0, 1]) < 0.15
    new = Panel({"e": e, "y": y}, entity="e", target="y")
    assert np.corrcoef(prep(new).x[:, 0], new.y)[0, 1] > 0.4  # had it been as if they were new
    with pytest.raises(ValueError, match="some of its rows were fitted on and some not"):
        prep(p.of([1, 2]))


def test_means_find_their_rows_whatever_the_labels_order():
    """9 comes before 10, but "10" before "9"."""
    e = np.repeat([10, 9, 100], 50)
    y = np.repeat([1.0, 5.0, 9.0], 50)
    p = Panel({"e": e, "y": y}, entity="e", target="y")
    prep = p.preprocessor(encode_entity=True, smooth=0.0, scale=None).fit(p)
    assert np.allclose(prep(p).x[:, 0], p.y)
    assert np.allclose(prep(Panel({"e": [9, 10, 11]}, entity="e")).x[:, 0], [5, 1, 5])


def test_credibility_is_buehlmanns():
    """With equal sizes: within variance over between variance, by the analysis of variance."""
    rng = np.random.default_rng(0)
    groups, rows = 400, 30
    means = rng.normal(size=groups) * 0.5
    y = (means[:, None] + rng.normal(size=(groups, rows)) * 2).ravel()
    k = credibility(y, np.repeat(np.arange(groups), rows))
    cells = y.reshape(groups, rows)
    within = cells.var(axis=1, ddof=1).mean()
    assert np.isclose(k, within / (cells.mean(axis=1).var(ddof=1) - within / rows))
    assert 10 < k < 25  # of 16
    nothing = credibility(rng.normal(size=900), np.repeat(np.arange(300), 3))
    assert nothing > 20
    assert credibility(np.arange(5.0), np.zeros(5, int)) >= 1e9


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", ["day", None])
@pytest.mark.parametrize("encode", [True, False])
def test_files_keep_everything(tmp_path, time, encode):
    train, later = panel(time), panel(time, seed=1)
    gap = np.timedelta64(5, "D") if encode and time else None
    prep = train.preprocessor(encode_entity=encode, gap=gap, clip=(0.01, 0.98)).fit(train)
    path = tmp_path / "prep.safetensors"
    prep.save(path)
    loaded = Preprocessor.load(path)
    assert loaded.features == prep.features
    assert np.array_equal(loaded(later).x, prep(later).x)
    for name in ("clip", "scale", "indicators", "min_rows", "dtype", "gap", "encode_entity"):
        assert getattr(loaded, name) == getattr(prep, name) or name == "clip"
    assert tuple(loaded.clip) == prep.clip
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_a_loaded_one_needs_numpy_alone(tmp_path):
    train = panel()
    prep = train.preprocessor(encode_entity=True).fit(train)
    path = tmp_path / "prep.safetensors"
    prep.save(path)
    row = {"income": [1.0], "age": [30], "kind": ["car"], "state": [3],
           "day": np.array(["2021-01-01"], "datetime64[D]")}  # fmt: skip
    code = (
        "import sys, numpy as np\n"
        "for name in ('pandas', 'sklearn', 'scipy', 'torch'): sys.modules[name] = None\n"
        "from pymeta.data import Preprocessor\n"
        f"prep = Preprocessor.load({str(path)!r})\n"
        "row = {'income': [1.0], 'age': [30], 'kind': ['car'], 'state': [3],\n"
        "       'day': np.array(['2021-01-01'], 'datetime64[D]')}\n"
        "print(prep.transform(row).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(prep.transform(row).tolist())


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("categories", lambda d: d["columns"][0].update(frequent=9), "no such places"),
        ("categories", lambda d: d["columns"][0]["known"].reverse(), "no such places"),
        ("preprocessor", lambda d: d.update(dtype="float16"), "dtype: expected"),
        ("preprocessor", lambda d: d.pop("clip"), "clip is missing"),
        ("preprocessor", lambda d: d["until"].update(unit="eons"), "no unit of time"),
        ("entity", lambda d: d["labels"].pop(), "its rows do not fit its entities"),
        ("entity", lambda d: d["labels"].reverse(), "its rows do not fit its entities"),
        ("numbers", lambda d: d["columns"].pop(), "not of 1 column"),
    ],
)
def test_files_that_say_other_things_are_refused(tmp_path, part, change, says):
    """Files that are whole by their checksums, but no preprocessor."""
    from pymeta.models import file

    train, path = panel(), tmp_path / "prep.safetensors"
    train.preprocessor(encode_entity=True).fit(train).save(path)
    contents = file.read(path, "preprocessor", verify=True)
    described = copy.deepcopy(contents.described)
    change(described[part])
    tensors = {n: raw._replace(data=raw.data.copy()) for n, raw in contents.tensors.items()}
    file.write(path, "preprocessor", described, tensors)
    with pytest.raises(ValueError, match=rf"prep\.safetensors: .*{says}"):
        Preprocessor.load(path)
    with pytest.raises(ValueError, match="holds 'preprocessor', expected 'adapter'"):
        file.read(path, "adapter", verify=True)


@pytest.mark.parametrize(
    ("tensor", "change", "says"),
    [
        (".numbers.scale", lambda a: a * 0, "a scale is not > 0"),
        (".numbers.low", lambda a: a + 1e9, "limits are not in order"),
        (".entity.offsets", lambda a: a.astype(float), "its rows do not fit"),
        (".entity.offsets", lambda a: a[::-1], "its rows do not fit"),
        (".entity.sums", lambda a: a[:-1], "its rows do not fit"),
        (".entity.times", lambda a: a[:-1], "its times do not fit"),
        (".other.times", lambda a: a, "belongs to no part"),
    ],
)
def test_files_of_other_arrays_are_refused(tmp_path, tensor, change, says):
    from pymeta.models import file

    train, path = panel(), tmp_path / "prep.safetensors"
    train.preprocessor(encode_entity=True).fit(train).save(path)
    contents = file.read(path, "preprocessor", verify=True)
    tensors = dict(contents.tensors)
    raw = tensors.get(tensor, tensors[".entity.times"])
    array = raw.data.view(np.int64 if raw.dtype == "I64" else np.float64).reshape(raw.shape)
    array = np.ascontiguousarray(change(array))
    dtype = "I64" if array.dtype.kind == "i" else "F64"
    tensors[tensor] = file.Raw(dtype, array.shape, array.reshape(-1).view(np.uint8))
    file.write(path, "preprocessor", contents.described, tensors)
    with pytest.raises(ValueError, match=rf"prep\.safetensors: .*{says}"):
        Preprocessor.load(path)


def test_tables_go_through_as_they_are():
    train = panel()
    prep = train.preprocessor(encode_entity=True).fit(train)
    rows = train.to_dict()
    assert np.array_equal(prep.transform(rows), prep(train).x)
    for name, says in (("age", "no column is called 'age'"), ("state", "'state', which the mean")):
        with pytest.raises(ValueError, match=says):
            prep.transform({n: v for n, v in rows.items() if n != name})
    with pytest.raises(TypeError, match="age: expected numbers as in training"):
        prep.transform({**rows, "age": ["old"] * len(train)})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clip": (0.9, 0.1)}, "clip: expected two quantiles"),
        ({"clip": 3}, "clip: expected two quantiles in 0..1 or None, got 3"),
        ({"scale": "log"}, "scale: expected 'standard', 'robust' or None"),
        ({"dtype": "float16"}, "dtype: expected"),
        ({"smooth": -1.0}, "smooth: expected a number >= 0"),
        ({"gap": 3}, "gap: expected None"),
        ({"min_rows": 0}, "min_rows: expected a whole number >= 1"),
        ({"max_categories": 0}, "max_categories: expected a whole number >= 1"),
    ],
)
def test_options_that_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        panel().preprocessor(**options)


def test_a_row_whose_number_is_missing():
    pandas = pytest.importorskip("pandas")
    train = panel()
    prep = train.preprocessor().fit(train)
    row = {"income": [None], "age": [30], "kind": [None]}
    wanted = prep.transform({**row, "income": np.array([np.nan])})
    assert np.array_equal(prep.transform(row), wanted)
    assert np.array_equal(prep.transform(pandas.DataFrame(row)), wanted)
    assert wanted[0, prep.features.index("income missing")] > 0
    with pytest.raises(TypeError, match="income: expected numbers as in training"):
        prep.transform({**row, "income": ["much"]})


def test_what_it_is_and_what_it_is_called_with():
    train = panel()
    prep = train.preprocessor(min_rows=1)
    assert repr(prep) == "Preprocessor(3 columns; not fitted)"
    assert (
        repr(prep.fit(train)) == f"Preprocessor(3 columns, {len(prep.features)} features, float32)"
    )
    with pytest.raises(TypeError, match=r"panel: expected a Panel, got dict; .*prep.transform"):
        prep(data())
    with pytest.raises(TypeError, match=r"panel: expected a Panel, got dict$"):
        prep.fit(data())


def test_use_before_fitting():
    p = panel()
    with pytest.raises(ValueError, match=r"call \.fit\(train\) first"):
        p.preprocessor()(p)
    with pytest.raises(ValueError, match="expected rows to fit on"):
        p.preprocessor().fit(p.split_time("1990-01-01")[0])
    three = Panel({"e": [0, 1, 2], "y": ["a", "b", "c"]}, entity="e", target="y")
    with pytest.raises(ValueError, match="got 3 classes"):
        three.preprocessor(encode_entity=True).fit(three)


# ---- leaks --------------------------------------------------------------------------------------


def series(rows=60, entities=3):
    rng = np.random.default_rng(0)
    t = np.tile(np.arange(rows), entities)
    y = rng.normal(size=rows * entities)
    past = np.concatenate([[0.0], y[:-1]])
    return {"e": np.repeat(np.arange(entities), rows), "t": t, "y": y, "past": past}


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_copy_of_the_target_is_found(rows):
    columns = series()
    honest = Panel(columns, entity="e", time="t", target="y")
    honest.check_leakage()
    leaked = 3 - 2 * np.roll(columns["y"], -rows)
    p = Panel({**columns, "leak": leaked}, entity="e", time="t", target="y")
    when = "of the same row" if rows == 0 else f"{rows} rows later"
    with pytest.raises(ValueError, match=f"feature leak: it is the target y {when}"):
        p.check_leakage()
    p.check_leakage(ahead=rows - 1) if rows else None
    prepared = p.preprocessor(clip=None).fit(p)(p)
    with pytest.raises(ValueError, match="feature leak"):
        prepared.check_leakage()


def test_a_persistent_series_is_not_a_leak():
    rng = np.random.default_rng(0)
    level = np.cumsum(rng.normal(size=5000)) + 1000
    data = {"e": np.zeros(4999), "t": np.arange(4999), "past": level[:-1], "y": level[1:]}
    Panel(data, entity="e", time="t", target="y").check_leakage()


def test_a_feature_that_tells_the_classes_apart():
    p = panel()
    p.check_leakage()
    paid = np.where(p["y"] == 1, 10.0, 500.0) + np.arange(len(p))
    with pytest.raises(ValueError, match="feature age: it tells the two classes of y apart"):
        p.with_columns(age=paid).check_leakage()


def test_what_a_preprocessor_has_seen():
    p = panel()
    past, future = p.split_time("2020-07-01")
    prep = past.preprocessor().fit(past)
    future.check_leakage(prep)
    with pytest.raises(ValueError, match=r"prep: it was fitted on \d+ of the panel's 400 rows"):
        p.check_leakage(prep)
    with pytest.raises(ValueError, match="prep: it was fitted on rows up to 2020-10-26"):
        other = panel(seed=2)
        future.check_leakage(other.preprocessor().fit(other))


def test_a_loaded_preprocessor_is_checked_by_its_times(tmp_path):
    past, future = panel().split_time("2020-07-01")
    past.preprocessor().fit(past).save(tmp_path / "p")
    prep = Preprocessor.load(tmp_path / "p")
    future.check_leakage(prep)
    with pytest.raises(ValueError, match="are not later; fit it on rows before"):
        past.check_leakage(prep)


def test_features_that_see_the_future():
    p = Panel(series(), entity="e", time="t", target="y")

    def trailing(part: Panel):
        return np.concatenate([np.cumsum(part["y"][a:b]) for a, b in
                               zip(part.offsets[:-1], part.offsets[1:], strict=True)])  # fmt: skip

    p.check_leakage(build=trailing)
    p.check_leakage(build=lambda part: part.with_features(part["past"][:, None]))
    with pytest.raises(ValueError, match=r"build: feature 1 changes in .*seen the future"):
        p.check_leakage(
            build=lambda part: np.stack([part["past"], part["past"] - part["past"].mean()], axis=1)
        )
    with pytest.raises(ValueError, match=r"build: expected features of shape \[180, features\]"):
        p.check_leakage(build=lambda part: np.zeros(3))
