"""The scikit-learn estimators: scikit-learn's own checks, and what groups add to them."""

from __future__ import annotations

import doctest
import pickle
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.impute import SimpleImputer
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn_help import NETWORKS, PLAIN, levels, opposites, quick, same_models

from pymeta import AdaptedArrays
from pymeta.sklearn import MetaClassifier, MetaRegressor
from pymeta.sklearn.episodes import Draw, Rows

# ---- scikit-learn's checks ----------------------------------------------------------------------


# The check compares two ways to the same mathematics (weights against repeated rows) to seven
# digits. In float64 it passes.
ROUNDING = {
    "check_sample_weight_equivalence_on_dense_data": (
        "the same up to the rounding of float32, the default dtype"
    )
}


class ThreeGroups(MetaClassifier):
    """A classifier that finds groups in the rows, so that the checks come to meta-training."""

    def fit(self, X, y, sample_weight=None):
        groups = np.arange(len(y)) % 3 if hasattr(y, "__len__") else None
        return super().fit(X, y, groups=groups, sample_weight=sample_weight)


ESTIMATORS = [
    MetaClassifier(),
    MetaRegressor(),
    MetaClassifier(dtype="float64"),
    MetaRegressor(dtype="float64"),
]


GROUPED = [
    ThreeGroups(method, hidden=(16,), iterations=100, inner_lr=0.01, meta_lr=0.02, dtype="float64")
    for method in ("maml", "reptile")
]


def expected_failures(estimator):
    if isinstance(estimator, ThreeGroups):
        reason = "which rows are in a group, and support there, depends on the number of rows"
        return {"check_sample_weight_equivalence_on_dense_data": reason}
    return {}


@parametrize_with_checks(ESTIMATORS + GROUPED, expected_failed_checks=expected_failures)
def test_scikit_learns_checks(estimator, check):
    reason = ROUNDING.get(check.func.__name__) if estimator.dtype == "float32" else None
    if reason:
        pytest.skip(reason)  # whether it passes is the processor's affair
    with warnings.catch_warnings():
        # The checks feed all kinds of data on purpose; those on warnings look at them themselves.
        warnings.simplefilter("ignore", category=ConvergenceWarning)
        check(estimator)


# ---- groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NETWORKS)
def test_adapting_solves_what_one_model_cannot(method):
    X, y, g = opposites()
    model = MetaClassifier(method, iterations=200, adapt_epochs=30, adapt_lr=0.2, random_state=0)
    model.fit(X, y, groups=g)
    assert len(model.loss_curve_) == model.n_iter_ == (100 if method == "pooled" else 200)
    assert len(model.adapted_groups_) == 0
    later, truth, groups = opposites(seed=1)
    assert model.score(later, truth) < 0.7
    assert model.adapt(X, y, groups=g) is model
    assert model.score(later, truth, groups=groups) > 0.9
    assert model.score(later, truth) < 0.7


def test_groups_that_fit_never_saw(fitted):
    model = pickle.loads(pickle.dumps(fitted))
    X, y, g = opposites(groups=6, rows=40, seed=2)
    names = np.array([f"new {i}" for i in g])
    support, query = np.arange(len(g)) % 2 == 0, np.arange(len(g)) % 2 == 1
    model.adapt(X[support], y[support], groups=names[support])
    assert model.adapted_groups_.tolist() == [f"new {i}" for i in range(6)]
    assert model.score(X[query], y[query], groups=names[query]) > 0.9


def test_other_groups_get_the_start(fitted):
    model = pickle.loads(pickle.dumps(fitted))
    X, y, g = opposites()
    some = g < 4
    model.adapt(X[some], y[some], groups=g[some])
    start, own = model.predict_proba(X), model.predict_proba(X, groups=g)
    assert np.array_equal(start, fitted.predict_proba(X))
    assert np.array_equal(own[~some], start[~some])
    assert not np.isclose(own[some], start[some]).any(axis=1).all()
    with_strangers = np.where(some, g, -1)
    assert np.array_equal(model.predict_proba(X, groups=with_strangers), own)


def test_adapting_again_adds_and_replaces(fitted):
    X, y, g = opposites()
    one, parts = (pickle.loads(pickle.dumps(fitted)) for _ in range(2))
    one.adapt(X, y, groups=g)
    first, second = g < 12, g >= 12
    parts.adapt(X[first], y[first], groups=g[first])
    parts.adapt(X[second], y[second], groups=g[second])
    assert same_models(one, parts)  # a group's model depends on its own rows alone
    assert parts.adapted_groups_.tolist() == one.adapted_groups_.tolist() == list(range(20))
    before = parts.decision_function(X, groups=g)
    turned = np.where(y == "yes", "no", "yes")
    five = g == 5
    parts.adapt(X[five], turned[five], groups=g[five])
    after = parts.decision_function(X, groups=g)
    assert sorted(parts.adapted_groups_) == list(range(20)) and len(parts.models_) == 21
    assert np.array_equal(after[~five], before[~five])
    assert parts.score(X[five], turned[five], groups=g[five]) > 0.9


def test_models_are_those_of_the_groups(fitted):
    X, y, g = opposites(groups=5, seed=3)
    model = pickle.loads(pickle.dumps(fitted)).adapt(X, y, groups=g)
    assert isinstance(model.models_, AdaptedArrays)
    alone = model.models_[1:].predict_proba([X[g == i].astype("f4") for i in range(5)])
    together = model.predict_proba(X, groups=g)
    for i in range(5):
        np.testing.assert_allclose(together[g == i, 1], alone[i][:, 0], rtol=1e-5)


def test_ragged_groups_of_one_row_and_of_one_class():
    X, y, _ = opposites()
    sizes = [1, 1, 2, 3, 57, 200, 336]
    g = np.repeat([f"{n} rows, {i}" for i, n in enumerate(sizes)], sizes)
    y[g == "57 rows, 4"] = "no"
    for method in NETWORKS:
        model = quick(method=method, iterations=20).fit(X, y, groups=g).adapt(X, y, groups=g)
        assert len(model.adapted_groups_) == len(sizes)
        p = model.predict_proba(X, groups=g)
        assert np.isfinite(p).all() and np.allclose(p.sum(axis=1), 1)
        order = np.random.default_rng(0).permutation(len(X))
        mixed = model.predict_proba(X[order], groups=g[order])
        np.testing.assert_allclose(mixed, p[order], rtol=1e-5)


def test_all_groups_of_one_row():
    X, y, _ = opposites(groups=4, rows=10)
    model = quick().fit(X, y, groups=np.arange(40)).adapt(X, y, groups=np.arange(40))
    assert len(model.adapted_groups_) == 40


@pytest.mark.parametrize("shuffle", [True, False])
def test_episodes_split_groups(fitted, shuffle):
    members = [np.arange(10), np.arange(10, 11), np.arange(11, 100)]
    rows = Rows(np.zeros((100, 2)), np.zeros(100), None)
    estimator = quick(shuffle=shuffle, task_rows=20, support=0.3, tasks_per_batch=3)
    draw = Draw(estimator, rows, members, np.random.RandomState(0))
    seen = set()
    for _ in range(200):
        support, query = draw.episode()
        for s, q in zip(support, query, strict=True):
            group = next(m for m in members if q[0] in m)
            n = min(len(group), 20)
            assert (len(s), len(q)) == {1: (0, 1), 10: (3, 7), 20: (6, 14)}[n]
            used = np.concatenate([s, q])
            assert len(set(used)) == n and set(used) <= set(group)
            assert shuffle or (np.diff(used) > 0).all()
            seen |= set(used)
    assert seen == set(range(100))


def test_draws_in_proportion_to_rows():
    members = [np.arange(90), np.arange(90, 100)]
    rows = Rows(np.zeros((100, 2)), np.zeros(100), None)
    for kind, share in (("rows", 0.9), ("groups", 0.5)):
        estimator = quick(draw=kind, tasks_per_batch=1)
        draw = Draw(estimator, rows, members, np.random.RandomState(0))
        first = np.mean([draw.groups()[0][0] < 90 for _ in range(2000)])
        assert abs(first - share) < 5 * np.sqrt(share * (1 - share) / 2000)


# ---- trouble ------------------------------------------------------------------------------------


def test_diverged_groups_keep_the_start():
    X, y, g = levels(groups=4)
    model = MetaRegressor(hidden=(8,), iterations=5, adapt_lr=1e6, adapt_epochs=40, **PLAIN)
    model.fit(X, y, groups=g)
    with pytest.warns(ConvergenceWarning, match=r"adapt_lr: .* 3 of 4 groups.* 'g0', 'g1', 'g3'"):
        model.adapt(X, y, groups=g, sample_weight=(g == "g2") * 0.0 + (g != "g2"))
    assert model.adapted_groups_.tolist() == ["g2"]  # it had no rows to diverge on
    assert np.array_equal(model.predict(X, groups=g), model.predict(X))


@pytest.mark.parametrize("method", NETWORKS)
def test_diverged_training_is_an_error(method):
    X, y, g = levels(groups=4)
    model = MetaRegressor(method, inner_lr=1e6, meta_lr=1e30, iterations=50, inner_steps=20)
    with pytest.raises(ValueError, match="meta_lr"):
        model.fit(X, y, groups=g)


@pytest.mark.parametrize(
    ("parameter", "value", "error"),
    [
        ("method", "fomaml", ValueError),
        ("activation", "softmax", ValueError),
        ("inner_optimizer", "lbfgs", ValueError),
        ("dtype", "float16", ValueError),
        ("draw", "all", ValueError),
        ("hidden", 64, TypeError),
        ("hidden", (64, 0), ValueError),
        ("hidden", (64.0,), TypeError),
        ("support", 0.0, ValueError),
        ("support", 1.0, ValueError),
        ("support", 0, ValueError),
        ("support", "half", TypeError),
        ("inner_lr", -0.1, ValueError),
        ("inner_lr", float("nan"), ValueError),
        ("inner_lr", "0.1", TypeError),
        ("meta_lr", float("inf"), ValueError),
        ("meta_lr", None, TypeError),
        ("weight_decay", -1, ValueError),
        ("anchor", -1.0, ValueError),
        ("anchor_rows", 0, ValueError),
        ("anchor_rows", "20", TypeError),
        ("inner_steps", 0, ValueError),
        ("inner_steps", 2.0, TypeError),
        ("iterations", 0, ValueError),
        ("epochs", 0, ValueError),
        ("pretrain_epochs", -1, ValueError),
        ("tasks_per_batch", 0, ValueError),
        ("task_rows", 0, ValueError),
        ("batch_size", 0, ValueError),
        ("inner_batch_size", 0, ValueError),
        ("adapt_lr", -1.0, ValueError),
        ("adapt_epochs", 0, ValueError),
        ("adapt_validation", 1.0, ValueError),
        ("adapt_patience", 0, ValueError),
        ("adapt_patience", 3, ValueError),  # without rows held out
        ("first_order", 1, TypeError),
        ("head_only", "yes", TypeError),
        ("shuffle", None, TypeError),
        ("adapt_on_fit", 0, TypeError),
    ],
)
def test_bad_parameters_are_named(parameter, value, error):
    X, y, g = opposites(groups=2)
    model = MetaClassifier(**{parameter: value})  # says nothing yet, as scikit-learn asks
    with pytest.raises(error, match=f"^{parameter}: "):
        model.fit(X, y, groups=g)
    with pytest.raises(NotFittedError):
        model.predict(X)


def test_bad_loss_of_the_regressor():
    X, y, g = levels(groups=2)
    with pytest.raises(ValueError, match=r"^loss: "):
        MetaRegressor(loss="cross_entropy").fit(X, y, groups=g)


def pandas_labels(g):
    pd = pytest.importorskip("pandas")
    return pd.Series(g).astype("Int64").mask(g == 3)


BAD_GROUPS = {
    "too few": (lambda g: g[:-1], r"expected a label for each row of X, shape \[600\], got .*599"),
    "two columns": (lambda g: np.stack([g, g], axis=1), r"got shape \[600, 2\]"),
    "a table": (lambda g: [[i, i] for i in g], r"got shape \[600, 2\]"),
    "one string": (lambda g: "a", "got the str 'a'"),
    "one number": (lambda g: 3, "got the int '3'"),
    "NaN": (lambda g: np.where(np.arange(len(g)) == 7, np.nan, g), r"1 row has no group \(nan\)"),
    "NaN in a list": (lambda g: [float("nan") if i == 3 else f"g{i}" for i in g], r"30 .*\(nan\)"),
    "NaN in a tuple": (lambda g: tuple(np.nan if i == 3 else f"g{i}" for i in g), r"30 .*\(nan\)"),
    "None": (lambda g: [None if i == 3 else str(i) for i in g], r"30 rows have no group \(None\)"),
    "None in an array": (
        lambda g: np.array([None if i == 3 else str(i) for i in g], dtype=object),
        r"30 rows have no group \(None\)",
    ),
    "a complex NaN": (lambda g: np.where(g == 3, complex(np.nan), g), "30 rows have no group"),
    "masked": (lambda g: np.ma.array(g, mask=g == 3), r"30 rows have no group \(masked\)"),
    "columns": (
        lambda g: np.stack([g, g], 1),
        r"one label .* shape \[\d+, 2\]; to group by several",
    ),
    "tuples": (lambda g: [(i, "a") for i in g], r"shape \[\d+, 2\]; .*join them into one label"),
    "tuples in an array": (
        lambda g: np.array([*((i, "a") for i in g), None], dtype=object)[:-1],
        r"got the tuple \(.*, 'a'\); .*join them into one label",
    ),
    "a structured array": (
        lambda g: np.array([(i, 2.0) for i in g], dtype=[("a", int), ("b", float)]),
        r"got the tuple \(.*, 2.0\); .*join them into one label",
    ),
    "a set": (lambda g: set(range(len(g))), "got the set"),
    "a dictionary": (lambda g: dict.fromkeys(range(len(g))), "got the dict"),
    "NaT": (
        lambda g: np.where(g == 3, np.datetime64("NaT"), np.datetime64("2020-01-01")),
        "30 rows have no group",
    ),
    "pandas": (pandas_labels, "30 rows have no group"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_bad_groups(case, fitted):
    X, y, g = opposites()
    make, message = BAD_GROUPS[case]
    groups = make(g)
    calls = [lambda c=call: c(X, y, groups=groups) for call in (fitted.adapt, quick().fit)]
    predicting = (fitted.predict, fitted.predict_proba, fitted.decision_function)
    calls += [lambda c=call: c(X, groups=groups) for call in predicting]
    for call in calls:
        with pytest.raises(ValueError, match=f"^groups: .*{message}"):
            call()
    assert len(fitted.adapted_groups_) == 0


def test_groups_of_several_kinds(fitted):
    X, y, g = opposites()
    mixed = [i if i == 3 else str(i) for i in g]
    for groups in (mixed, np.array(mixed, dtype=object)):
        for call in (fitted.adapt, quick().fit, lambda X, y, groups: fitted.predict(X, groups)):
            with pytest.raises(
                TypeError, match=r"groups: expected labels of one kind, got .*and str"
            ):
                call(X, y, groups=groups)
    with pytest.raises(TypeError, match="groups"):
        fitted.adapt(X, y)


def test_strangers_are_named_once(fitted):
    model = pickle.loads(pickle.dumps(fitted))
    X, y, g = opposites()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(X)
        model.adapt(X[g < 4], y[g < 4], groups=g[g < 4]).predict(X[g < 4], groups=g[g < 4])
    with pytest.warns(
        UserWarning, match=r"groups: 16 were never adapted to .* 10, 11, 12, 13, 14, \.\.\."
    ):
        model.predict(X, groups=g)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(X, groups=g)


@pytest.mark.parametrize("step", [1, 2])
def test_predicting_copies_no_more_than_some_models(step):
    """600 models of 17 kB: all of them, one after another, and every other one."""
    X, y, g = opposites(groups=600, rows=2)
    model = quick(hidden=(64, 64), iterations=1).fit(X, y, groups=g).adapt(X, y, groups=g)
    some = g % step == 0
    X, g = X[some], g[some]
    wanted = np.concatenate([model.predict_proba(X[g == i], groups=g[g == i]) for i in g[::2]])
    tracemalloc.start()
    got = model.predict_proba(X, groups=g)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(got, wanted)
    size = sum(v.nbytes for v in model.models_.parameters.values())
    assert peak < size * (0.1 if step == 1 else 0.48)  # 256 of 601 models, and what the rows take


def test_bad_rows(fitted):
    X, y, g = opposites()
    broken = np.where(np.arange(X.size).reshape(X.shape) == 5, np.nan, X)
    for call in (fitted.adapt, quick().fit):
        with pytest.raises(ValueError, match="NaN"):
            call(broken, y, groups=g)
        for wrong in (-1.0, np.nan, np.inf):
            with pytest.raises(ValueError, match="sample_weight: expected finite weights >= 0"):
                call(X, y, groups=g, sample_weight=np.where(g == 0, wrong, 1.0))
        with pytest.raises(ValueError, match="inconsistent numbers of samples"):
            call(X, y, groups=g, sample_weight=np.ones(3))
    with pytest.raises(ValueError, match="sample_weight: all weights are zero"):
        quick().fit(X, y, groups=g, sample_weight=np.zeros(len(g)))
    with pytest.raises(ValueError, match=r"y: \['maybe'\] are not classes"):
        fitted.adapt(X, np.where(g == 0, "maybe", y), groups=g)
    with pytest.raises(ValueError, match="features"):
        fitted.adapt(X[:, :1], y, groups=g)
    with pytest.raises(NotFittedError):
        quick().adapt(X, y, groups=g)
    with pytest.raises(ValueError, match="one class"):
        quick().fit(X, np.full(len(y), "yes"), groups=g)


# ---- as part of scikit-learn --------------------------------------------------------------------


def test_parameters_go_round():
    for model in (MetaClassifier("reptile", hidden=(3,)), MetaRegressor("pooled", loss="huber")):
        parameters = model.get_params()
        assert parameters["method"] == model.method
        again = type(model)(**parameters)
        assert again.get_params() == parameters == clone(model).get_params()
        assert again.set_params(anchor=0.5).anchor == 0.5


def test_pipeline_with_missing_values_and_categories():
    pd = pytest.importorskip("pandas")
    X, y, g = opposites()
    rng = np.random.default_rng(0)
    table = pd.DataFrame(X, columns=["signal", "noise"])
    table["kind"] = rng.choice(["a", "b"], len(g))
    table.loc[rng.random(len(g)) < 0.1, "noise"] = np.nan
    columns = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), ["signal", "noise"]),
            ("kinds", OneHotEncoder(), ["kind"]),
        ]
    )
    groups = pd.Series(g, name="customer").astype("category")
    pipe = make_pipeline(columns, MetaClassifier(iterations=200, random_state=0))
    pipe.fit(table, pd.Series(y), metaclassifier__groups=groups)
    assert pipe.score(table, y) < 0.7
    pipe[-1].adapt(pipe[:-1].transform(table), y, groups=groups)
    assert (pipe.predict(table, groups=groups) == y).mean() > 0.9
    assert pipe.predict_proba(table, groups=groups).shape == (len(g), 2)


def test_names_of_columns():
    pd = pytest.importorskip("pandas")
    X, y, g = opposites()
    table = pd.DataFrame(X, columns=["signal", "noise"])
    model = quick().fit(table, y, groups=g)
    assert model.feature_names_in_.tolist() == ["signal", "noise"] and model.n_features_in_ == 2
    with pytest.raises(ValueError, match="feature names"):
        model.adapt(table[["noise", "signal"]], y, groups=g)


def test_cross_validation_passes_groups_on():
    X, y, g = opposites()
    done = cross_validate(quick(), X, y, params={"groups": g}, cv=2, return_estimator=True)
    assert all(e.n_iter_ == 5 for e in done["estimator"])  # iterations, not epochs


def test_grid_search_with_metadata_routing():
    X, y, g = opposites()
    estimator = quick(adapt_on_fit=True, inner_steps=20)
    with config_context(enable_metadata_routing=True):
        estimator.set_fit_request(groups=True).set_score_request(groups=True)
        search = GridSearchCV(
            make_pipeline(StandardScaler(), estimator),
            {"metaclassifier__inner_lr": np.array([0.001, 0.5])},
            cv=StratifiedKFold(2, shuffle=True, random_state=0),
        ).fit(X, y, groups=g)
        assert search.best_params_ == {"metaclassifier__inner_lr": 0.5}
        assert search.score(X, y, groups=g) > 0.9


def test_pickled_estimator_predicts_without_torch(tmp_path, fitted):
    X, y, g = opposites(seed=4)
    model = pickle.loads(pickle.dumps(fitted)).adapt(X, y, groups=g)
    np.save(tmp_path / "expected.npy", model.predict_proba(X, groups=g))
    np.savez(tmp_path / "data.npz", X=X, g=g)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = f"""
import pickle, sys
import numpy as np

class WithoutPandas:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "pandas":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutPandas())
import pymeta.sklearn
data = np.load(r"{tmp_path / "data.npz"}")
model = pickle.loads(open(r"{tmp_path / "model.pickle"}", "rb").read())
p = model.predict_proba(data["X"], groups=data["g"])
assert np.array_equal(p, np.load(r"{tmp_path / "expected.npy"}"))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_the_example_of_the_docstring():
    done = doctest.testmod(sys.modules[MetaClassifier.__module__])
    assert done.attempted > 5 and done.failed == 0


def test_verbose(capsys):
    X, y, g = opposites(groups=4)
    quick(verbose=True, iterations=20, pretrain_epochs=2).fit(X, y, groups=g)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[MetaClassifier] pooled: 2 epochs, loss ")
    assert [line for line in lines if "maml: iteration 20 of 20, loss" in line] == lines[-1:]
    quick(iterations=20).fit(X, y, groups=g)
    assert capsys.readouterr().out == ""


def test_a_callback_is_told_of_training():
    X, y, g = opposites(groups=4)
    told = []
    model = quick(callback=lambda *what: told.append(what), iterations=7, pretrain_epochs=2)
    model.fit(X, y, groups=g)
    stages = [("pooled", 1), ("pooled", 2), *(("maml", i) for i in range(1, 8))]
    assert [what[:2] for what in told] == stages
    assert [loss for stage, _, loss in told if stage == "maml"] == model.loss_curve_
    with pytest.raises(TypeError, match=r"callback: expected a function of \(stage, iteration"):
        quick(callback="print").fit(X, y, groups=g)

    def stop(stage, iteration, loss):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        quick(callback=stop).fit(X, y, groups=g)
