"""The examples: few-shot tasks, the demo, the loans and Reptile's sinusoids, end to end."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import source_tree
import torch

sys.path.insert(0, str(source_tree.need("examples") / "examples"))

import _common
import _credit_report
import _credit_rivals
import _credit_starts
import _digits
import _sinusoids
import _starts
import credit_data
import demo
import lending_club
import pandas as pd
import reptile_sine

# ---- episodes -----------------------------------------------------------------------------------


def numbered(classes: int, variants: int, drawings: int) -> np.ndarray:
    """An image table whose pixels say where they are from: (class, variant, drawing)."""
    where = np.indices((classes, variants, drawings)).transpose(1, 2, 3, 0)
    return where.astype(np.uint8)


@pytest.mark.parametrize(
    ("classes", "variants", "drawings", "ways", "shots", "queries"),
    [(24, 4, 20, 5, 1, 15), (5, 1, 6, 5, 3, 3), (7, 2, 9, 3, 5, 4), (250, 1, 20, 250, 1, 1)],
)
def test_episodes_are_balanced_and_disjoint(classes, variants, drawings, ways, shots, queries):
    table = numbered(classes, variants, drawings)
    draw = _common.Episodes(table, ways=ways, shots=shots, queries=queries, seed=3)
    batch = draw(40)
    assert batch.xs.shape == (40, ways * shots, 3) and batch.xq.shape == (40, ways * queries, 3)
    assert batch.xs.dtype == torch.float32 and batch.ys.dtype == torch.int64
    for xs, ys, xq, yq in zip(*batch, strict=True):
        assert torch.bincount(ys, minlength=ways).tolist() == [shots] * ways
        assert torch.bincount(yq, minlength=ways).tolist() == [queries] * ways
        # A label stands for one (class, variant), and no two labels for the same class.
        meaning = {int(y): tuple(x[:2].tolist()) for x, y in zip(xs, ys, strict=True)}
        assert all(meaning[int(y)] == tuple(x[:2].tolist()) for x, y in zip(xs, ys, strict=True))
        assert all(meaning[int(y)] == tuple(x[:2].tolist()) for x, y in zip(xq, yq, strict=True))
        assert len({first for first, _ in meaning.values()}) == ways
        rows = [tuple(x.tolist()) for x in torch.cat([xs, xq])]
        assert len(set(rows)) == len(rows)


def test_episodes_reach_everything_and_repeat_with_their_seed():
    table = numbered(9, 4, 6)
    draw, again, other = (
        _common.Episodes(table, ways=3, shots=1, queries=2, seed=s) for s in (1, 1, 2)
    )
    first = draw(500)
    seen = {tuple(x.tolist()) for x in torch.cat([first.xs, first.xq], dim=1).flatten(0, 1)}
    assert len(seen) == 9 * 4 * 6
    assert torch.equal(first.xq, again(500).xq)
    assert not torch.equal(first.xq, other(500).xq)
    assert not torch.equal(first.xq, draw(500).xq)


@pytest.mark.parametrize("among", [5, 8, 300, 4400])
def test_distinct_draws_are_distinct_and_uniform(among):
    drawn = _common.distinct(np.random.default_rng(0), 4000, 5, among)
    assert drawn.min() >= 0 and drawn.max() < among
    assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()
    # The mean of each place is near the middle: 6 standard errors of a uniform draw.
    error = 6 * among / np.sqrt(12 * len(drawn))
    assert np.abs(drawn.mean(axis=0) - (among - 1) / 2).max() < error


def test_episodes_refuse_what_the_table_cannot_give():
    table = numbered(4, 1, 6)
    with pytest.raises(ValueError, match="there are 6"):
        _common.Episodes(table, ways=3, shots=5, queries=2)
    with pytest.raises(ValueError, match="there are 4"):
        _common.Episodes(table, ways=5, shots=1, queries=2)


def test_moved_drawings_are_moved_by_every_shift_and_no_more():
    images = np.random.default_rng(0).integers(1, 255, size=(2, 300, 36)).astype(np.uint8)
    moved = _common.moved(np.random.default_rng(1), images, 2)
    assert moved.shape == images.shape and moved.dtype == np.uint8
    framed = np.pad(images.reshape(-1, 6, 6), ((0, 0), (2, 2), (2, 2)))
    seen = set()
    for before, after in zip(framed, moved.reshape(-1, 6, 6), strict=True):
        shifts = [(down, across) for down in range(5) for across in range(5)]
        found = [at for at in shifts
                 if np.array_equal(before[at[0]:at[0] + 6, at[1]:at[1] + 6], after)]  # fmt: skip
        assert len(found) == 1
        seen.update(found)
    assert len(seen) == 25


def test_episodes_move_each_drawing_by_itself():
    table = np.full((4, 1, 6, 36), 7, np.uint8)
    shape = {"ways": 3, "shots": 1, "queries": 2}
    still, moving = (_common.Episodes(table, **shape, shift=shift)(20) for shift in (0, 1))
    assert (still.xs == 7).all() and (still.xq == 7).all()
    for rows in (moving.xs, moving.xq):
        assert set(rows.unique().tolist()) == {0.0, 7.0}
        assert len(torch.unique(rows.reshape(-1, 36), dim=0)) == 9
    assert torch.equal(moving.yq, still.yq)


def test_mean_interval():
    mean, half = _common.mean_interval(np.array([0.0, 1.0] * 200))
    assert mean == 0.5
    assert half == pytest.approx(1.96 * 0.5 / 20, rel=2e-3)  # n - 1 in the variance
    with pytest.raises(ValueError, match="two values"):
        _common.mean_interval(np.array([1.0]))


# ---- the demo -----------------------------------------------------------------------------------


def test_turned_digits():
    drawings = np.zeros((1, 400, 8, 8), np.float32)
    drawings[:, :, 1, 3:5] = 16.0  # a mark above the middle
    table = _digits.turned(drawings, copies=1, seed=0)
    assert table.shape == (1, 1, 400, 64) and table.dtype == np.uint8
    images = table.reshape(400, 8, 8).astype(float)
    row, column = np.mgrid[:8, :8] - 3.5
    mass = images.sum(axis=(1, 2))
    middle = [(images * axis).sum(axis=(1, 2)) / mass for axis in (row, column)]
    angle = np.rad2deg(np.arctan2(middle[1], -middle[0]))
    limit = _digits.LARGEST_TURN
    assert np.abs(angle).max() < limit + 2 and np.abs(angle).max() > 0.9 * limit
    assert abs(angle.mean()) < 6 * limit / np.sqrt(3 * 400)


def test_mixtures_are_made_of_halves():
    drawings = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1) + np.zeros((3, 4, 8, 8), "f4")
    mixed = _digits.mixtures(drawings, seed=0)
    assert mixed.shape == (3 + 2 * 3 * 2, 4, 8, 8)
    assert np.array_equal(mixed[:3], drawings)
    corners = {(m[0, 0, 0], m[0, 0, 7], m[0, 7, 0], m[0, 7, 7]) for m in mixed[3:]}
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    assert corners == {(a, a, b, b) for a, b in pairs} | {(a, b, a, b) for a, b in pairs}


def test_digits_held_out_cover_all():
    assert {digit for held in demo.HELD_OUT for digit in held} == set(range(10))


def test_sinusoids_are_sinusoids():
    draw = _sinusoids.Sinusoids(10, 7, seed=0)
    batch = draw(50)
    assert batch.xs.shape == (50, 10, 1) and batch.xq.shape == (50, 7, 1)
    for x, y in ((batch.xs, batch.ys), (batch.xq, batch.yq)):
        expected = torch.from_numpy(draw.amplitude) * torch.sin(x - torch.from_numpy(draw.phase))
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory):
    """The whole demo, small: its results and its figure."""
    path = tmp_path_factory.mktemp("demo") / "figures" / "demo.png"
    return demo.main(["--quick", "--out", str(path)]), path


def test_demo_scores(demo_run):
    results, _ = demo_run
    assert len(results) == 3
    for problem, methods in results.items():
        assert set(methods) == {demo.MAML, demo.PRETRAINED, demo.SCRATCH}
        sizes = {len(scores[steps]) for scores in methods.values() for steps in demo.STEPS}
        assert len(sizes) == 1, problem
        before, one, after = (methods[demo.MAML][steps].mean() for steps in (0, 1, 5))
        scratch = {steps: methods[demo.SCRATCH][steps].mean() for steps in (1, 5)}
        if "error" in problem:
            assert after < 0.8 * before
            assert after < 0.7 * scratch[5]
            assert all(np.all(scores[0] >= 0) for scores in methods.values())
        else:
            assert after > before + 10
            assert one > scratch[1] + 8
            assert all(np.all((s >= 0) & (s <= 100)) for m in methods.values() for s in m.values())


def test_demo_table(demo_run):
    results, _ = demo_run
    lines = demo.table(results).splitlines()
    assert [line for line in lines if "accuracy" in line or "error" in line] == list(results)
    rows = [line for line in lines if line.startswith("  MAML")]
    assert len(rows) == 3 and all(row.count("±") == len(demo.STEPS) for row in rows)
    mean, _ = _common.mean_interval(next(iter(results.values()))[demo.MAML][5])
    assert f"{mean:.1f} ±" in rows[0]


def test_demo_figure(demo_run):
    from matplotlib import image

    _, path = demo_run
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800
    assert pixels[..., :3].std() > 0.01  # not an empty page


def test_tuning_picks_the_best_step_size():
    """With 'rates' of which all but one diverge or do nothing, that one is taken."""
    torch.manual_seed(0)
    tasks = _sinusoids.Sinusoids(10, 20, seed=1)(30)
    problem = _starts.Problem("mse", _sinusoids.squared_errors, False, (0.0, 0.005, 1e6))
    network = _sinusoids.sinusoid_network()
    tuned = _starts.tuned_scores([network], problem, tasks, tasks)
    # torch sums the errors, and promises no bits
    wanted = _starts.scores_after(network, problem, tasks, 0.005, 10)
    np.testing.assert_allclose(tuned[10], wanted, rtol=1e-5)
    wanted = _starts.scores_after(network, problem, tasks, 0.0, 0)
    np.testing.assert_allclose(tuned[0], wanted, rtol=1e-5)


# ---- LendingClub --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loans_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of invented loans, where what the income says differs from state to state."""
    path = tmp_path_factory.mktemp("loans") / "loans.csv.gz"
    credit_data.generate(path, 9000)
    return path


def test_loans_are_read_as_they_are_known_at_issue(loans_file, tmp_path):
    raw, loans = pd.read_csv(loans_file), credit_data.load(loans_file)
    assert len(loans) == len(raw) == 9000
    assert not {"loan_status", "total_pymnt", "recoveries"} & set(loans.columns)
    known = {*credit_data.FEATURES, *credit_data.GROUPS.values(), "default", "issued"}
    assert set(loans.columns) == known
    assert loans["issued"].is_monotonic_increasing
    first = raw.iloc[0]
    year, month = map(int, first["issue_d"].split("-"))
    opened = [int(n) for n in first["earliest_cr_line"].split("-")]
    assert loans["credit_months"][0] == 12 * (year - opened[0]) + month - opened[1]
    assert loans["annual_inc"][0] == pytest.approx(np.log(1 + first["annual_inc"]))
    years = {"< 1 year": 0, "1 year": 1, "7 years": 7, "10+ years": 10}
    assert loans["employment_years"].equals(raw["emp_length"].map(years))
    raw.drop(columns=["dti", "grade"]).to_csv(tmp_path / "part.csv")
    with pytest.raises(ValueError, match="no column dti, grade"):
        credit_data.load(tmp_path / "part.csv")


def test_folds_keep_groups_whole():
    groups = np.random.default_rng(0).choice(np.arange(40), 3000, p=np.arange(1, 41) / 820)
    part = _credit_starts.dealt(groups, 4, np.random.default_rng(1))
    assert all(len(set(part[groups == g])) == 1 for g in range(40))
    assert np.bincount(part).min() > 0.8 * 3000 / 4


def test_nothing_is_learnt_from_the_future_or_from_held_out_groups(loans_file):
    problem = _credit_starts.Problem(credit_data.load(loans_file), "addr_state")
    issued = problem.loans["issued"].to_numpy()
    others = np.isin(problem.groups, ["AA", "AB", "AC", "AD", "AE", "AF"])
    trials = _credit_starts.trials(problem, others, 3, np.random.default_rng(0))
    adapted = [set(problem.groups[trial.own]) for trial in trials]
    assert set.union(*adapted) == set(problem.groups[others])
    for trial, groups in zip(trials, adapted, strict=True):
        assert not groups & set(problem.groups[trial.learn])
        assert set(problem.groups[trial.late]) == groups
        for rows in (trial.learn, trial.own, trial.late):
            assert not (rows & ~others).any() and rows.any()
        assert issued[trial.learn | trial.own].max() < _credit_starts.VALIDATION
        assert issued[trial.late].min() >= _credit_starts.VALIDATION
        assert issued[trial.late].max() < _credit_starts.CUT
        # Preprocessing: what was learnt from has mean 0, nothing else is promised to.
        assert abs(trial.X[trial.learn, :3].mean()) < 0.02


def test_loan_scores():
    y, p = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.2, 0.6, 0.5, 0.9])
    scores = _credit_report.scores(y, p)
    assert scores["AUC"] == pytest.approx(5 / 6)  # of six pairs one is in the wrong order
    assert scores["KS"] == pytest.approx(2 / 3)  # at 0.5: both defaults, one of three others
    assert scores["Brier"] == pytest.approx((0.01 + 0.04 + 0.36 + 0.25 + 0.01) / 5)
    expected = -np.log([0.9, 0.8, 0.4, 0.5, 0.9]).mean()
    assert scores["log-loss"] == pytest.approx(expected)


@pytest.fixture(scope="module")
def loans_run(loans_file, tmp_path_factory: pytest.TempPathFactory):
    """The whole example by states, small: its result and the folder of what it wrote."""
    folder = tmp_path_factory.mktemp("lending_club")
    few = tuple(
        _credit_starts.Learner(
            name, [{**fits[0], "iterations": 250}], [{"adapt_lr": 0.2, "adapt_epochs": 20}]
        )
        for name, fits, _ in lending_club.QUICK.learners
    )
    size = replace(lending_club.QUICK, folds=2, learners=few, penalties=(0.1,))
    options = ["--data", str(loans_file), "--grouping", "state", "--out", str(folder / "table.md")]
    options += ["--tasks", str(folder / "tasks.csv"), "--figure", str(folder / "figure.png")]
    (result,) = lending_club.main(options, size=size, quiet=True)
    return result, folder


def test_adapted_credit_models_win_where_states_differ(loans_run):
    result, _ = loans_run
    adapted = (_credit_starts.MAML, _credit_starts.REPTILE, _credit_starts.TUNED)
    pooled = (_credit_starts.UNADAPTED, _credit_rivals.NETWORK, _credit_rivals.LOGISTIC)
    macro = {method: result.macro(method)["AUC"] for method in result.micro}
    assert len(macro) == 9 and max(macro.values()) < 0.95  # no outcome among the features
    for method in adapted:
        assert macro[method] > max(macro[p] for p in pooled) + 0.02
        mean, half = result.gain(method)
        assert mean == pytest.approx(macro[method] - macro[_credit_rivals.LOGISTIC])
        assert 0 < half < 0.15
    assert macro[_credit_rivals.EACH] > macro[_credit_rivals.LOGISTIC]


def test_every_future_loan_is_scored_once(loans_run, loans_file):
    result, _ = loans_run
    loans = credit_data.load(loans_file)
    future = loans[loans["issued"] >= _credit_starts.CUT]
    assert result.groups == future["addr_state"].nunique()
    for _, tasks in result.tasks.groupby("method"):
        assert tasks["future"].sum() == len(future)
        assert tasks["defaults"].sum() == future["default"].sum()
        assert np.isfinite(tasks[list(_credit_report.METRICS)]).all(axis=None)


def test_loan_outputs(loans_run):
    result, folder = loans_run
    text = (folder / "table.md").read_text()
    assert text == f"{_credit_report.HEAD}\n{_credit_report.table(result)}\n"
    best = max(result.micro, key=lambda method: result.macro(method)["AUC"])
    assert f"Highest AUC, macro: {best} ({result.macro(best)['AUC']:.4f})" in text
    assert sum(line.startswith(f"| {_credit_starts.MAML} |") for line in text.splitlines()) == 1
    assert all(f"{name}: " in text for name in result.timing["seconds"])
    tasks = pd.read_csv(folder / "tasks.csv")
    assert len(tasks) == len(result.tasks) and set(tasks["grouping"]) == {"state"}
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# ---- Reptile ------------------------------------------------------------------------------------


def test_reptile_sinusoids_are_drawn_from_the_fifty_points():
    tasks = reptile_sine.draw(np.random.default_rng(0), 40)
    assert tasks.xs.shape == tasks.ys.shape == (40, 10, 1)
    assert tasks.xq.shape == tasks.yq.shape == (40, 50, 1)
    where = (tasks.xs[..., 0, None] == reptile_sine.POINTS).long().argmax(-1)
    assert torch.equal(reptile_sine.POINTS[where], tasks.xs[..., 0])
    assert torch.equal(tasks.yq[..., 0].gather(1, where), tasks.ys[..., 0])
    assert tasks.yq.abs().amax((1, 2)).min() > 0 and tasks.yq.abs().max() <= 5
    # sinusoids of frequency 1: y(x) fits a sin(x) + b cos(x) to rounding
    basis = torch.stack([reptile_sine.POINTS.sin(), reptile_sine.POINTS.cos()], 1)
    fit = torch.linalg.lstsq(basis, tasks.yq[..., 0].T)
    assert (basis @ fit.solution - tasks.yq[..., 0].T).abs().max() < 1e-5


def test_reptile_step_size_goes_down_to_nothing():
    """The first step is OUTER_RATE times the gradient; of N iterations the last is 1 / N of it."""
    net = reptile_sine.network()
    optimizers = []
    sgd = torch.optim.SGD

    def noted(*args):
        optimizers.append((sgd(*args), []))
        optimizer, rates = optimizers[-1]
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", noted)
        reptile_sine.train(reptile_sine.learner(net), 4, seed=0, quiet=True)
    ((_, rates),) = optimizers
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


@pytest.fixture(scope="module")
def sine_run(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("sine") / "figures" / "sine.png"
    return reptile_sine.main(["--quick", "--out", str(path)]), path


def test_reptile_learns_sinusoids(sine_run):
    result, _ = sine_run
    means = {name: {k: m for k, (m, _) in by.items()} for name, by in result["mean"].items()}
    assert list(means) == [reptile_sine.REPTILE, reptile_sine.POOLED, reptile_sine.RANDOM]
    ours = means[reptile_sine.REPTILE]
    assert ours[32] < 0.4 * ours[0]
    assert ours[32] < 0.6 * min(means[name][32] for name in list(means)[1:])


def test_reptile_sinusoids_figure(sine_run):
    from matplotlib import image

    pixels = image.imread(sine_run[1])
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800
    assert pixels[..., :3].std() > 0.01
