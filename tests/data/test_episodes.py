"""Meta-batches, windows and augmentations: what is drawn, how often, and in which form."""

from __future__ import annotations

import numpy as np
import pytest

from pymeta.data import Bootstrap, Jitter, MixUp, Panel, Ragged
from pymeta.data.batch import Batch
from pymeta.data.draw import distinct

SIZES = [3, 12, 30, 7, 200]


def panel(sizes=SIZES, times=True, target="number", ties=1, seed=0) -> Panel:
    """x is the row's number and its place in the entity; `ties` rows have one time."""
    rng = np.random.default_rng(seed)
    e = np.repeat(np.arange(len(sizes)), sizes)
    place = np.concatenate([np.arange(n) for n in sizes])
    y = {
        "number": rng.normal(size=len(e)),
        "class": (rng.random(len(e)) < 0.3).astype(int),
        "three": rng.integers(0, 3, len(e)),
    }[target]
    data = {"e": e, "row": np.arange(len(e)), "place": place, "t": place // ties, "y": y}
    options = {"numeric": ["row", "place"], "classes": target == "three"}
    return Panel(data, entity="e", time="t" if times else None, target="y", **options)


def sides(batch: Batch, t: int):
    """The places of task t's rows in their entity: support, query."""
    return batch.xs[t][:, 1], batch.xq[t][:, 1]


def assert_consistent(p: Panel, batch: Batch) -> None:
    """Arrays, rows, sizes and entities tell the same story."""
    assert len(batch) == 4
    for x, y, rows, sizes in (
        (batch.xs, batch.ys, batch.support_rows, batch.support_sizes),
        (batch.xq, batch.yq, batch.query_rows, batch.query_sizes),
    ):
        flat_x = np.concatenate([np.asarray(v) for v in x])
        flat_y = np.concatenate([np.asarray(v) for v in y])
        assert np.array_equal(flat_x, p.x[rows]) and np.array_equal(flat_y, p.y[rows])
        assert [len(v) for v in x] == sizes.tolist() == [len(v) for v in y]
        assert np.array_equal(p.labels[rows], np.repeat(batch.entities, sizes))
        equal = len(set(sizes.tolist())) == 1
        assert isinstance(x, np.ndarray) == equal == (not isinstance(x, Ragged))
    for t in range(len(batch.xs)):
        support, query = sides(batch, t)
        assert not set(support.tolist()) & set(query.tolist())
        assert len(set(support.tolist())) == len(support) and len(set(query)) == len(query)


@pytest.mark.parametrize("target", ["number", "class", "three"])
@pytest.mark.parametrize(("support", "query"), [(4, 2), ((2, 9), (1, 4)), (4, (1, 3))])
@pytest.mark.parametrize("split", ["time", "rows"])
def test_batches_are_what_they_say(split, support, query, target):
    p = panel(target=target)
    low, high = (support, support) if isinstance(support, int) else support
    fewest, most = (query, query) if isinstance(query, int) else query
    episodes = p.episodes(tasks=8, support=support, query=query, split=split, batches=25, seed=3)
    assert len(episodes) == 25
    assert episodes.qualifying.tolist() == [e for e, n in enumerate(SIZES) if n >= low + fewest]
    for batch in episodes:
        assert_consistent(p, batch)
        assert batch.xs[0].dtype == np.float32
        assert low <= batch.support_sizes.min() <= batch.support_sizes.max() <= high
        assert fewest <= batch.query_sizes.min() <= batch.query_sizes.max() <= most
        assert len(batch.entities) == 8


def test_a_batch_goes_into_a_call_as_it_is():
    torch = pytest.importorskip("torch")
    import pymeta

    p = panel()
    maml = pymeta.MAML(
        torch.nn.Sequential(torch.nn.Linear(2, 1)), loss="mse", lr=1e-5, steps=1, backend="native"
    )
    for support in (4, (2, 6)):
        for batch in p.episodes(tasks=6, support=support, query=2, batches=2, seed=0):
            assert maml(*batch).task_losses.shape == (6,)
    assert len(maml.adapt(*p.tasks())) == 5


@pytest.mark.parametrize("gap", [0, 1, 3])
@pytest.mark.parametrize("ties", [1, 4])
def test_query_is_later_than_support_by_the_gap(gap, ties):
    p = panel(ties=ties)
    seen = set()
    for batch in p.episodes(tasks=16, support=(1, 5), query=(1, 3), gap=gap, batches=40, seed=0):
        for t in range(16):
            support, query = sides(batch, t)
            assert (np.diff(support) == 1).all() and (np.diff(query) == 1).all()
            assert query[0] // ties > support[-1] // ties
            later = support[-1] // ties * ties + ties  # the first row of a later time
            assert query[0] == later + gap
            seen.add((batch.entities[t], support[-1]))
    ends = {e for e, _ in seen}
    assert ends == set(range(len(SIZES))) if gap == 0 and ties == 1 else ends


def test_every_cut_is_drawn_and_none_that_leaves_too_little():
    p = panel([10])
    ends = [
        int(sides(batch, 0)[0][-1])
        for batch in p.episodes(tasks=1, support=3, query=2, gap=1, batches=300, seed=0)
    ]
    assert set(ends) == {2, 3, 4, 5, 6}  # six at most: 7 is the gap, 8 and 9 the query
    counts = np.bincount(ends)[2:]
    assert counts.min() > 30  # of 60; 30 are 4.3 standard deviations away


def test_gaps_of_time():
    days = np.array([0, 1, 2, 10, 11, 30], "datetime64[D]")
    data = {"e": [0] * 6, "t": days, "x": np.arange(6.0), "y": np.zeros(6)}
    p = Panel(data, entity="e", time="t", target="y")
    pairs = set()
    gap = np.timedelta64(8, "D")
    for batch in p.episodes(tasks=1, support=1, query=1, gap=gap, batches=100, seed=0):
        pairs.add((int(batch.xs[0, 0, 0]), int(batch.xq[0, 0, 0])))
    assert pairs == {(0, 3), (1, 3), (2, 4), (3, 5), (4, 5)}
    numbers = Panel({**data, "t": [0.0, 1, 2, 10, 11, 30]}, entity="e", time="t", target="y")
    drawn = numbers.episodes(tasks=1, support=1, query=1, gap=8.0, batches=100, seed=0)
    assert {(int(b.xs[0, 0, 0]), int(b.xq[0, 0, 0])) for b in drawn} == pairs
    with pytest.raises(TypeError, match=r"gap: expected a stretch of time >= 0, .*, got 2\.5"):
        p.episodes(tasks=1, support=1, query=1, gap=2.5)


def test_random_rows_are_drawn_evenly():
    p = panel([8, 40], times=False)
    support, query = np.zeros((2, 40)), np.zeros((2, 40))
    for batch in p.episodes(tasks=2, support=3, query=2, batches=1000, seed=0):
        for t, e in enumerate(batch.entities):
            s, q = sides(batch, t)
            np.add.at(support[e], s.astype(int), 1)
            np.add.at(query[e], q.astype(int), 1)
    for counts, size in ((support, 3), (query, 2)):
        for e, n in enumerate((8, 40)):
            mean = 1000 * size / n
            assert abs(counts[e, :n] - mean).max() < 5 * np.sqrt(mean)
            assert counts[e].sum() == 1000 * size


@pytest.mark.parametrize("pool", [6, 60, 60_000])
def test_distinct_numbers_are_a_fair_draw(pool):
    """By sorting and by both forms of rejection: no number and no order is preferred."""
    rng = np.random.default_rng(0)
    tasks = 3000
    drawn = distinct(rng, np.full(tasks, pool), np.full(tasks, 5)).reshape(tasks, 5)
    assert drawn.min() >= 0 and drawn.max() < pool
    assert (np.diff(np.sort(drawn, axis=1)) > 0).all()
    means = drawn.mean(axis=0) / (pool - 1)
    assert abs(means - 0.5).max() < 5 * 0.4 / np.sqrt(tasks)
    rises = (drawn[:, 0] < drawn[:, 1]).mean()
    assert abs(rises - 0.5) < 5 * 0.5 / np.sqrt(tasks)


@pytest.mark.parametrize("largest", [900, 9_000_000])
def test_distinct_numbers_of_unequal_pools(largest):
    rng = np.random.default_rng(0)
    pool, count = np.array([5, 1, largest, 40, 7]), np.array([5, 0, 20, 1, 4])
    drawn = np.split(distinct(rng, pool, count), np.cumsum(count)[:-1])
    for n, k, values in zip(pool, count, drawn, strict=True):
        assert len(values) == k == len(set(values.tolist())) and all(0 <= v < n for v in values)
    assert set(drawn[0].tolist()) == set(range(5))


@pytest.mark.parametrize("factor", [1, 10, 1_000_000])
def test_what_is_taken_is_not_drawn(factor):
    """The rest is drawn evenly, by sorting and by both forms of rejection."""
    rng = np.random.default_rng(0)
    pool, count, marks = factor * np.array([6, 12, 8]), np.array([3, 2, 5]), np.array([3, 0, 2])
    taken = np.array([0, 2, 5, 1, 7])
    counts = np.zeros(6)
    for _ in range(400):
        first, _, last = np.split(distinct(rng, pool, count, (taken, marks)), [3, 5])
        assert not {0, 2, 5} & set(first.tolist()) and not {1, 7} & set(last.tolist())
        assert len(set(first.tolist())) == 3 and len(set(last.tolist())) == 5
        counts += np.bincount(last * 6 // pool[2], minlength=6)
    if factor > 1:
        assert abs(counts - 400 * 5 / 6).max() < 5 * np.sqrt(400 * 5 / 6)
    else:
        assert set(np.flatnonzero(counts)) == set(range(5))


@pytest.mark.parametrize("target", ["class", "three"])
def test_balanced_support(target):
    p = panel([40, 50, 60, 4], times=False, target=target)
    classes = 2 if target == "class" else 3
    query = []
    episodes = p.episodes(tasks=6, support=(6, 11), query=8, balanced=True, batches=60, seed=1)
    assert episodes.qualifying.tolist() == [0, 1, 2]
    for batch in episodes:
        assert_consistent(p, batch)
        for ys in batch.ys:
            counts = np.bincount(ys.astype(int), minlength=classes)
            assert counts.max() - counts.min() <= 1
        query.append(np.concatenate([y.ravel() for y in batch.yq]))
    assert 0.1 < (np.concatenate(query) == 1).mean() < 0.5  # the query is as the rest is


def test_entities_in_proportion_to_their_rows():
    p = panel([20, 180], times=False)
    counts = {"entities": 0, "rows": 0}
    for draw in counts:
        for batch in p.episodes(tasks=1, support=2, query=2, draw=draw, batches=500, seed=0):
            counts[draw] += int(batch.entities[0] == 1)
    assert abs(counts["entities"] - 250) < 60 and abs(counts["rows"] - 450) < 40
    more = p.episodes(tasks=5, support=2, query=2, batches=20, seed=0)
    assert all(sorted(np.bincount(b.entities).tolist()) == [2, 3] for b in more)


def test_the_same_seed_gives_the_same_batches():
    p = panel()
    jitter = Jitter(0.1)

    def drawn(seed):
        episodes = p.episodes(
            tasks=4, support=(2, 5), query=2, batches=3, seed=seed, augment=jitter
        )
        once, again = (np.concatenate([x for b in episodes for x in b.xs]) for _ in range(2))
        assert seed is None or np.array_equal(once, again)
        return once

    assert np.array_equal(drawn(7), drawn(7))
    assert not np.array_equal(drawn(7), drawn(8)) and not np.array_equal(drawn(None), drawn(None))


def test_episodes_without_an_end():
    episodes = panel().episodes(tasks=2, support=2, query=1, seed=0)
    batches = iter(episodes)
    assert all(len(next(batches).entities) == 2 for _ in range(5))
    with pytest.raises(TypeError, match="give batches="):
        len(episodes)


def test_what_there_is_of_rows_comes_in_the_same_form():
    p = panel()
    (batch,) = p.episodes(tasks=3, support=(2, 5), query=2, batches=1, seed=0)
    support, query = batch.take(p.y * 2)
    assert isinstance(support, Ragged) and query.shape == batch.yq.shape
    assert all(np.array_equal(s, 2 * y) for s, y in zip(support, batch.ys, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"tasks": 0}, ValueError, "tasks: expected a whole number >= 1, got 0"),
        ({"tasks": 2.5}, TypeError, "tasks: expected a whole number, got 2.5"),
        ({"support": (5, 2)}, ValueError, r"support: expected 1 <= least <= most, got \(5, 2\)"),
        ({"query": 0}, ValueError, "query: expected 1 <= least"),
        ({"support": "all"}, TypeError, "support: expected a number of rows or"),
        ({"support": 300}, ValueError, "a task needs 302 at least .*the largest entity has 200"),
        ({"split": "windows"}, ValueError, "split: expected 'time', 'rows' or None"),
        ({"gap": -1}, ValueError, "gap: expected a whole number >= 0, got -1"),
        ({"split": "rows", "gap": 1}, ValueError, "gap: expected 0"),
        ({"balanced": True}, ValueError, "balanced: expected False with split=.time."),
        (
            {"split": "rows", "balanced": True},
            ValueError,
            "two classes or more, got 252 numbers, such as",
        ),
        ({"draw": "all"}, ValueError, "draw: expected 'entities' or 'rows'"),
        ({"batches": -1}, ValueError, "batches"),
    ],
)
def test_what_is_refused(changes, error, says):
    arguments = {"tasks": 2, "support": 3, "query": 2, **changes}
    with pytest.raises(error, match=says):
        panel().episodes(**arguments)


# ---- windows ------------------------------------------------------------------------------------


def test_windows_walk_through_time():
    p = panel([9, 4, 12])
    windows = p.windows(support=4, gap=1, query=2, step=2)
    starts = [
        (int(e), int(p["place"][s])) for e, s in zip(windows.entities, windows.starts, strict=True)
    ]
    assert starts == [(0, 0), (0, 2), (2, 0), (2, 2), (2, 4)] and len(windows) == 5
    batch = windows[:]
    assert_consistent(p, batch)
    assert batch.xs.shape == (5, 4, 2) and batch.xq.shape == (5, 2, 2) and batch.ys.shape == (5, 4)
    assert batch.xs[1, :, 1].tolist() == [2, 3, 4, 5] and batch.xq[1, :, 1].tolist() == [7, 8]
    assert windows.times.tolist() == [5, 7, 5, 7, 9]
    parts = list(windows.batches(2))
    assert [len(b.entities) for b in parts] == [2, 2, 1]
    assert np.array_equal(np.concatenate([b.xs for b in parts]), batch.xs)
    shuffled = np.concatenate([b.support_rows for b in windows.batches(2, seed=1)])
    assert sorted(shuffled) == sorted(batch.support_rows) and list(shuffled) != list(
        batch.support_rows
    )
    assert len(next(iter(windows)).entities) == 5
    assert windows[windows.entities == 0].entities.tolist() == [0, 0]


def test_windows_that_are_refused():
    with pytest.raises(ValueError, match="no entity has the 500 rows of a window"):
        panel().windows(support=400, query=100)
    with pytest.raises(ValueError, match="time: 6 rows are of the time of the row before, first"):
        panel([12], ties=2).windows(support=2, query=1)
    with pytest.raises(ValueError, match="step: expected a whole number >= 1"):
        panel().windows(support=2, query=1, step=0)
    with pytest.raises(TypeError, match=r"\[i:i\+1\]"):
        _ = panel().windows(support=2, query=1)[0]


# ---- augmentation -------------------------------------------------------------------------------


def drawn(p: Panel, augment, support=(6, 9)) -> tuple[Batch, Batch]:
    """A batch as it is, and augmented."""
    options = {"tasks": 4, "support": support, "query": 3, "batches": 1, "seed": 5}
    return next(iter(p.episodes(**options))), next(iter(p.episodes(**options, augment=augment)))


def test_jitter():
    plain, noisy = drawn(panel(), Jitter(0.5))
    noise = noisy.xs.values - plain.xs.values
    assert 0.3 < noise.std() < 0.7 and noisy.xs.values.dtype == np.float32
    assert np.array_equal(noisy.xq, plain.xq) and np.array_equal(noisy.ys.values, plain.ys.values)
    _, both = drawn(panel(), Jitter(0.5, query=True))
    assert not np.array_equal(both.xq, plain.xq)


@pytest.mark.parametrize("target", ["class", "three", "number"])
def test_mixtures_stay_in_their_task_and_class(target):
    p = panel(target=target, times=False)
    plain, mixed = drawn(p, MixUp(0.4), support=(6, 7))
    assert any(not np.array_equal(a, b) for a, b in zip(plain.xs, mixed.xs, strict=True))
    for x, y, was_x, was_y in zip(mixed.xs, mixed.ys, plain.xs, plain.ys, strict=True):
        if target != "number":
            assert np.array_equal(y, was_y)
        for i in range(len(x)):
            mates = np.ones(len(x), bool) if target == "number" else was_y == was_y[i]
            low, high = was_x[mates].min(axis=0), was_x[mates].max(axis=0)
            slack = 1e-5 * (abs(high) + abs(low))
            assert (low - slack <= x[i]).all() and (x[i] <= high + slack).all()
            if target == "number":
                assert was_y.min() - 1e-5 <= y[i] <= was_y.max() + 1e-5


def test_a_bootstrap_knows_its_rows():
    p = panel()
    plain, again = drawn(p, Bootstrap())
    assert np.array_equal(p.x[again.support_rows], again.xs.values)
    assert np.array_equal(p.y[again.support_rows], again.ys.values)
    assert np.array_equal(p.labels[again.support_rows], p.labels[plain.support_rows])
    assert len(np.unique(again.support_rows)) < len(np.unique(plain.support_rows))
    assert set(again.support_rows) <= set(plain.support_rows)


def test_augmentations_follow_one_another():
    _, batch = drawn(panel(), [Bootstrap(), Jitter(1e-3)])
    assert 0 < abs(batch.xs.values - panel().x[batch.support_rows]).max() < 0.1
    with pytest.raises(ValueError, match="scale: expected a number > 0, got -1"):
        Jitter(-1)
    with pytest.raises(ValueError, match="alpha"):
        MixUp(0)
