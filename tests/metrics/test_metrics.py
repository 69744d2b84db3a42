"""Metrics are scikit-learn's and scipy's; groups are one by one; resamples are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from pymeta import metrics
from pymeta.metrics import METRICS, Bootstrap, evaluate, information_coefficient, time_blocks

sklearn_metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


def binary(rows=300, seed=0, ties=True):
    rng = np.random.default_rng(seed)
    y = (rng.random(rows) < 0.3).astype(int)
    p = np.clip(0.25 * y + rng.random(rows) * 0.7, 0.01, 0.99)
    return y, np.round(p, 1 if ties else 8), rng.integers(0, 4, rows).astype(float)


def numbers(rows=300, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.lognormal(0, 1, rows)
    return y, y * rng.lognormal(0, 0.3, rows), rng.integers(0, 4, rows).astype(float)


def ks_by_hand(y, p, sample_weight=None):
    w = np.ones(len(y)) if sample_weight is None else sample_weight
    cut = np.unique(p)[:, None]
    shares = [((p <= cut) * w * (y == c)).sum(1) / (w * (y == c)).sum() for c in (0, 1)]
    return abs(shares[0] - shares[1]).max()


def bins_by_hand(y, p, sample_weight=None):
    w = np.ones(len(y)) if sample_weight is None else sample_weight
    which = np.minimum((p * 10).astype(int), 9)
    parts = [abs((w * (y - p))[which == b].sum()) for b in range(10)]
    return sum(parts) / w.sum()


def qlike_by_hand(y, p, sample_weight=None):
    return np.average(y / p - np.log(y / p) - 1, weights=sample_weight)


def correlation(y, p, sample_weight=None):
    c = np.cov(y, p, aweights=sample_weight)
    return c[0, 1] / np.sqrt(c[0, 0] * c[1, 1])


def auc(y, p, **kw):
    return sklearn_metrics.roc_auc_score(y, p, **kw)


WANTED = {
    "auc": auc,
    "gini": lambda y, p, **kw: 2 * auc(y, p, **kw) - 1,
    "ks": ks_by_hand,
    "average_precision": sklearn_metrics.average_precision_score,
    "log_loss": lambda y, p, **kw: sklearn_metrics.log_loss(y, p, labels=[0, 1], **kw),
    "brier": sklearn_metrics.brier_score_loss,
    "calibration_error": bins_by_hand,
    "accuracy": lambda y, p, **kw: sklearn_metrics.accuracy_score(y, p > 0.5, **kw),
    "mse": sklearn_metrics.mean_squared_error,
    "rmse": lambda y, p, **kw: sklearn_metrics.mean_squared_error(y, p, **kw) ** 0.5,
    "mae": sklearn_metrics.mean_absolute_error,
    "qlike": qlike_by_hand,
    "r2": sklearn_metrics.r2_score,
    "ic": correlation,
}


def sample(name, **options):
    is_binary = METRICS[name].targets == "binary"
    return binary(**options) if is_binary else numbers(**options)


def test_every_metric_has_an_oracle():
    assert WANTED.keys() == METRICS.keys()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("seed", [0, 1])
def test_they_are_scikit_learns(name, seed):
    y, p, w = sample(name, seed=seed)
    assert np.isclose(METRICS[name](y, p), WANTED[name](y, p), rtol=1e-10)
    assert np.isclose(METRICS[name](y, p, w), WANTED[name](y, p, sample_weight=w), rtol=1e-10)
    assert np.isclose(METRICS[name](y[:, None], p[:, None]), METRICS[name](y, p))


def test_ks_is_scipys():
    y, p, _ = binary(ties=False)
    wanted = stats.ks_2samp(p[y == 1], p[y == 0]).statistic
    assert np.isclose(METRICS["ks"](y, p), wanted)


@pytest.mark.parametrize("name", METRICS)
def test_groups_are_one_by_one(name):
    y, p, _ = sample(name)
    codes = np.random.default_rng(1).integers(0, 9, len(y))
    codes[codes == 4] = 5  # a group without rows
    codes[0], codes[1:][codes[1:] == 7] = 7, 8  # and one of a single row
    got = METRICS[name].by_group(y, p, codes, 9)
    assert np.isnan(got[4]) and got.shape == (9,)
    for g in (0, 1, 2, 3, 5, 6, 8):
        assert np.isclose(got[g], WANTED[name](y[codes == g], p[codes == g]), rtol=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_a_resample_is_rows_repeated(name, monkeypatch):
    monkeypatch.setattr("pymeta.metrics.base._CHUNK", 700)  # several chunks of draws
    y, p, _ = sample(name)
    codes = np.arange(len(y)) % 10
    counts = np.random.default_rng(0).multinomial(10, np.full(10, 0.1), size=7).astype(float)
    got = METRICS[name].resampled(y, p, codes, counts)
    for draw, row in zip(got, counts, strict=True):
        rows = np.repeat(np.arange(len(y)), row[codes].astype(int))
        assert np.isclose(draw, WANTED[name](y[rows], p[rows]), rtol=1e-9)


@pytest.mark.parametrize("name", ["auc", "gini", "ks", "average_precision"])
def test_one_class_has_no_ranking(name):
    metric = METRICS[name]
    assert np.isnan(metric([1, 1], [0.2, 0.3])) and np.isnan(metric([], []))
    assert np.isnan(metric([1, 0], [0.2, 0.3], [1, 0]))
    got = metric.by_group(np.array([1, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4]), [0, 0, 1, 1], 2)
    assert np.isnan(got[0]) and np.isfinite(got[1])


@pytest.mark.parametrize(
    ("name", "arguments", "error", "says"),
    [
        ("auc", ([0, 2], [0.1, 0.2]), ValueError, "y: AUC expects targets of 0 and 1"),
        (
            "log_loss",
            ([0, 1], [0.1, 1.2]),
            ValueError,
            "p: log loss expects 0 to 1, got 0.1 to 1.2",
        ),
        ("qlike", ([1.0, 0.0], [1.0, 1.0]), ValueError, "y: QLIKE expects numbers > 0"),
        ("qlike", ([1.0, 2.0], [1.0, -1.0]), ValueError, "p: QLIKE expects numbers > 0"),
        ("mse", ([1.0, np.nan], [1.0, 1.0]), ValueError, "y: 1 of 2 are not finite"),
        ("mse", ([1.0], [1.0, 1.0]), ValueError, r"p: expected shape \[1\], as y has, got \[2\]"),
        ("mse", (["a"], [1.0]), TypeError, "y: expected numbers"),
        ("mse", ([1.0], [1.0], [-1.0]), ValueError, "weights: expected finite numbers >= 0"),
    ],
)
def test_what_is_refused(name, arguments, error, says):
    with pytest.raises(error, match=says):
        METRICS[name](*arguments)


# ---- tables -------------------------------------------------------------------------------------


def test_a_table_by_entity_and_size():
    y, p, _ = binary(rows=400)
    entity = np.repeat(list("abcd"), [10, 30, 60, 300])
    (score,) = evaluate(y, p, entity, metrics=["auc"])
    own = {e: auc(y[entity == e], p[entity == e]) for e in "abcd"}
    assert np.isclose(score.pooled, auc(y, p)) and np.isclose(score.macro, np.mean([*own.values()]))
    assert list(score.by_size) == ["1-20", "21-50", "51-100", "101-500"]
    assert np.allclose([*score.by_size.values()], [*own.values()]) and score.entities == 4
    (score,) = evaluate(y, p, entity, metrics=[metrics.auc], size=np.full(400, 7), edges=(5, 10))
    assert list(score.by_size) == ["6-10"] and score.counts == {"6-10": 4}
    with pytest.raises(ValueError, match=r"metric: expected one of auc, gini, .*, got 'roc'"):
        evaluate(y, p, entity, metrics=["roc"])


# ---- intervals ----------------------------------------------------------------------------------


def test_intervals_of_a_mean_are_the_closed_form():
    """The mean of g groups' means: normal, with the deviation of the means over sqrt(g)."""
    rng = np.random.default_rng(0)
    groups, rows = 200, 10
    y = np.zeros(groups * rows)
    p = np.repeat(rng.normal(size=groups), rows) + 0.01 * rng.normal(size=groups * rows)
    over = np.repeat(np.arange(groups), rows)
    draws = Bootstrap(over, draws=4000, seed=1)
    means = (p**2).reshape(groups, rows).mean(axis=1)
    half = 1.96 * means.std(ddof=1) / np.sqrt(groups)
    for macro in (False, True):
        found = draws.interval("mse", y, p, macro=macro)
        assert np.isclose(found.value, means.mean())
        assert np.isclose(found.high - found.low, 2 * half, rtol=0.1)


@pytest.mark.parametrize("macro", [False, True])
def test_intervals_cover_as_often_as_they_say(macro):
    """Of two equal models the difference is 0: 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        shift = np.repeat(rng.normal(size=40), 10)
        y = shift + rng.normal(size=400)
        a, b = (np.repeat(rng.normal(size=40) * 0.5, 10) for _ in range(2))
        draws = Bootstrap(np.repeat(np.arange(40), 10), draws=400, seed=int(rng.integers(1 << 30)))
        covered += not draws.difference("mse", y, a, b, macro=macro).is_significant
    assert (
        178 <= covered <= 199
    )  # 190 expected, 3.1 its deviation, and the bootstrap is a bit narrow


def test_a_difference_is_paired():
    rng = np.random.default_rng(0)
    entity = np.repeat(np.arange(50), 20)
    hard = np.repeat(rng.lognormal(0, 1, 50), 20)  # what is hard for one is hard for both
    y = rng.normal(size=1000) * hard
    ours, theirs = 0.5 * y, 0.48 * y
    draws = Bootstrap(entity, draws=500)
    paired = draws.difference("mse", y, ours, theirs)
    alone = [draws.interval("mse", y, p) for p in (ours, theirs)]
    assert paired.is_significant and paired.high < 0
    assert alone[0].high > alone[1].low  # apart, nothing could be told
    assert np.isclose(paired.value, alone[0].value - alone[1].value)


@pytest.mark.parametrize("name", ["auc", "average_precision", "log_loss", "ic"])
def test_an_interval_is_that_of_a_loop(name):
    y, p, _ = binary(ties=False)
    over = np.arange(len(y)) % 15
    found = Bootstrap(over, draws=200, seed=3).interval(name, y, p)
    drawn = np.random.default_rng(3).integers(0, 15, (200, 15))
    members = [np.flatnonzero(over == g) for g in range(15)]
    values = [WANTED[name](*(v[np.concatenate([members[g] for g in row])] for v in (y, p)))
              for row in drawn]  # fmt: skip
    assert np.allclose([found.low, found.high], np.quantile(values, [0.025, 0.975]))
    assert np.isclose(found.value, WANTED[name](y, p))


def test_blocks_of_time():
    days = np.array(["2020-01-05", "2020-01-01", "2020-01-02", "2020-01-09"], "datetime64[D]")
    assert time_blocks(days, 2).tolist() == [1, 0, 0, 1]
    assert time_blocks([5, 5, 7, 9], 1).tolist() == [0, 0, 1, 2]
    with pytest.raises(ValueError, match="length: expected a whole number >= 1"):
        time_blocks(days, 0)


def test_bootstraps_that_are_refused():
    with pytest.raises(ValueError, match="over: expected two groups or more, got 1"):
        Bootstrap([1, 1])
    with pytest.raises(ValueError, match="level"):
        Bootstrap([1, 2], level=95)


# ---- finance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [False, True])
def test_information_coefficients_are_scipys(ranks):
    rng = np.random.default_rng(0)
    day = rng.integers(0, 6, 200)
    y = rng.normal(size=200) + 1e6 * day
    p = np.round(0.3 * (y - 1e6 * day) + rng.normal(size=200), 1)
    found = information_coefficient(y, p, day, ranks=ranks)
    f = stats.spearmanr if ranks else stats.pearsonr
    wanted = [f(y[day == d], p[day == d]).statistic for d in range(6)]
    assert np.allclose(found.values, wanted, atol=1e-7) and np.isclose(found.mean, np.mean(wanted))
    assert np.isclose(found.ir, np.mean(wanted) / np.std(wanted, ddof=1))


def test_figures_of_returns():
    returns = [0.1, -0.5, 0.2, 0.1]
    assert np.isclose(metrics.drawdown(returns), 0.5) and metrics.drawdown([0.1, 0.1]) == 0
    wanted = np.mean(returns) / np.std(returns, ddof=1) * np.sqrt(12)
    assert np.isclose(metrics.sharpe(returns, periods=12), wanted)
    assert np.isnan(metrics.sharpe([0.1])) and np.isnan(metrics.sharpe([0.1, 0.1]))
    assert metrics.turnover([[1, 0], [0, 1], [0, 1]]) == 0.5
    drifted = metrics.turnover([[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0, 0]])
    assert np.isclose(drifted, (abs(0.5 - 2 / 3) + abs(0.5 - 1 / 3)) / 2)
    assert metrics.turnover([[1.0, 0.0]]) == 0
    with pytest.raises(ValueError, match=r"weights: expected shape \[periods, assets\]"):
        metrics.turnover([1.0, 2.0])


def test_r2_against_a_baseline():
    y, p, _ = numbers()
    assert np.isclose(metrics.r2_out_of_sample(y, p, y.mean()), sklearn_metrics.r2_score(y, p))
    assert metrics.r2_out_of_sample(y, p, p) == 0


def test_the_index_of_population_stability():
    rng = np.random.default_rng(0)
    old = rng.normal(size=20_000)
    assert metrics.psi(old, rng.normal(size=20_000)) < 0.01
    shifted = metrics.psi(old, rng.normal(size=20_000) + 1)
    wanted = 1.0  # of two normals one apart: sum of both divergences, without bins
    assert 0.8 * wanted < shifted < wanted
    assert np.isclose(metrics.psi([0, 0, 1, 1], [0, 1, 1, 1], bins=2),
                      (0.25 - 0.5) * np.log(0.5) + (0.75 - 0.5) * np.log(1.5))  # fmt: skip
    assert np.isfinite(metrics.psi([1.0, 2.0], [5.0]))
    with pytest.raises(ValueError, match="expected rows in both"):
        metrics.psi([], [1.0])


def test_precision_at_a_budget_is_that_of_the_rows_reviewed():
    metric = metrics.precision_at(0.1)
    y, p, _ = binary(ties=False)
    first = np.argsort(-p)[:30]
    assert metric(y, p) == pytest.approx(y[first].mean())
    # ties at the end of the budget count in equal parts; weights are numbers of rows
    assert metrics.precision_at(0.5)([1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]) == pytest.approx(0.25)
    y, p, w = binary()
    repeated = [np.repeat(v, w.astype(int)) for v in (y, p)]
    assert metric(y, p, w) == pytest.approx(metric(*repeated))
    groups = np.arange(300) % 3
    each = [metric(y[groups == g], p[groups == g]) for g in range(3)]
    np.testing.assert_allclose(metric.by_group(y, p, groups, 3), each)
    for share in (0, 1, True, "a"):
        with pytest.raises(ValueError, match="share: expected a number between 0 and 1"):
            metrics.precision_at(share)
