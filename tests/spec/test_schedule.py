"""Which rows a step uses: the generator against numpy and by hand, batches against the words."""

import collections
import itertools

import numpy as np
import pytest

from pymeta import native
from pymeta.spec.schedule import SHUFFLE, SPLIT, Schedule, permutation


def test_permutation_is_fisher_and_yates_on_philox():
    key, counter = [3, 5], [0, 2, 7, 1]
    words = np.random.Philox(
        key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)
    ).random_raw(9)
    wanted = list(range(10))
    for i, word in zip(range(9, 0, -1), words, strict=True):
        j = int(word) * (i + 1) // 2**64
        wanted[i], wanted[j] = wanted[j], wanted[i]
    got = permutation(3, 5, 7, 2, 10, purpose=1)
    assert got.dtype == np.int64 and got.tolist() == wanted


def test_philox_is_the_published_generator():
    """The known answer of Random123 for Philox4x64-10 with all counters and keys 0.

    numpy advances the counter before the first block, so the counter here is one before 0.
    """
    last = np.array([2**64 - 1] * 4, dtype=np.uint64)
    words = np.random.Philox(key=np.zeros(2, np.uint64), counter=last).random_raw(4)
    assert [hex(int(w)) for w in words] == [
        "0x16554d9eca36314c",
        "0xdb20fe9d672d0fdc",
        "0xd7e772cee186176b",
        "0x7e68b68aec7ba23b",
    ]


def test_permutations_are_permutations_and_all_different():
    seen = set()
    base = {"seed": 1, "stream": 1, "task_id": 1, "epoch": 1, "purpose": SHUFFLE}
    changes = [{}, {"seed": 2}, {"stream": 2}, {"task_id": 2}, {"epoch": 2}, {"purpose": SPLIT}]
    for change in changes:
        order = permutation(**{**base, **change}, rows=20)
        assert sorted(order) == list(range(20))
        seen.add(tuple(order))
    assert len(seen) == len(changes)
    assert permutation(0, 0, 0, 0, 0).tolist() == [] and permutation(0, 0, 0, 0, 1).tolist() == [0]


def test_permutations_are_uniform():
    """All 24 orders of four rows, with counts as chance has them (chi squared, 23 degrees)."""
    counts = collections.Counter(tuple(permutation(0, 0, t, 0, 4)) for t in range(2400))
    assert set(counts) == set(itertools.permutations(range(4)))
    chi = sum((n - 100) ** 2 / 100 for n in counts.values())
    assert 5 < chi < 60  # about 1 in 100,000 draws lies outside


@pytest.mark.skipif(native.missing() is not None, reason="no extension")
@pytest.mark.parametrize("purpose", [SHUFFLE, SPLIT])
@pytest.mark.parametrize("ids", [None, [0, 2**62, 5, 1, 9]])
def test_the_native_core_shuffles_alike(purpose, ids):
    sizes = np.array([7, 0, 1, 64, 1000], np.int64)
    out = np.empty(int(sizes.sum()), np.int64)
    task_ids = None if ids is None else np.array(ids, np.int64)
    native.extension().shuffle(
        *(2**63 - 1, 11, 0 if task_ids is None else task_ids.ctypes.data, 4, purpose),
        *(len(sizes), sizes.ctypes.data, out.ctypes.data),
    )
    for t, order in enumerate(np.split(out, np.cumsum(sizes)[:-1])):
        task_id = 0 if ids is None else ids[t]
        wanted = permutation(2**63 - 1, 11, task_id, 4, int(sizes[t]), purpose)
        assert order.tolist() == wanted.tolist()


def rows_of(batches, rows):
    return [list(range(rows)) if b.rows is None else b.rows.tolist() for b in batches]


def test_batches_of_epochs():
    schedule = Schedule(epochs=3, batch_size=4, seed=2, stream=6)
    batches = list(schedule.batches(10, task_id=8))
    assert [b.size for b in batches] == [4, 4, 2] * 3 == [len(r) for r in rows_of(batches, 10)]
    assert [b.ends_epoch for b in batches] == [False, False, True] * 3
    rows = rows_of(batches, 10)
    for epoch in range(3):
        order = [r for batch in rows[3 * epoch : 3 * epoch + 3] for r in batch]
        assert order == permutation(2, 6, 8, epoch, 10).tolist()
    assert schedule.step_count(10) == 9 and schedule.batch_count(10) == 3


def test_batches_of_steps_go_on_over_epochs():
    by_steps = list(Schedule(steps=5, batch_size=4).batches(10))
    by_epochs = list(Schedule(epochs=2, batch_size=4).batches(10))
    assert rows_of(by_steps, 10) == rows_of(by_epochs, 10)[:5]


@pytest.mark.parametrize("size", [None, 10, 11])
def test_one_batch_of_all_rows_is_in_their_own_order(size):
    batches = list(Schedule(steps=3, batch_size=size, seed=1).batches(10))
    assert [(b.rows, b.size, b.ends_epoch) for b in batches] == [(None, 10, True)] * 3


def test_no_rows_are_no_steps():
    for schedule in (Schedule(steps=4), Schedule(epochs=4), Schedule(steps=4, batch_size=2)):
        assert list(schedule.batches(0)) == [] and schedule.step_count(0) == 0
    assert list(Schedule(steps=0).batches(5)) == [] == list(Schedule(epochs=0).batches(5))


BAD = {
    "neither": (ValueError, r"steps, epochs: expected exactly one.*neither", {"steps": None}),
    "both": (ValueError, r"steps, epochs: .*both", {"epochs": 2}),
    "steps": (ValueError, r"steps: expected an integer >= 0, got -1", {"steps": -1}),
    "steps type": (TypeError, r"steps: .*got float", {"steps": 1.0}),
    "epochs": (ValueError, r"epochs: .*got -1", {"steps": None, "epochs": -1}),
    "epochs type": (TypeError, r"epochs: .*got bool", {"steps": None, "epochs": True}),
    "batch_size": (ValueError, r"batch_size: expected an integer >= 1, got 0", {"batch_size": 0}),
    "batch_size large": (
        ValueError,
        r"batch_size: expected an integer <= 2147483647, got 2147483648",
        {"batch_size": 2**31},
    ),
    "steps large": (ValueError, r"steps: .*<= 2147483647, got 2147483648", {"steps": 2**31}),
    "batch_size type": (TypeError, r"batch_size: .*got str", {"batch_size": "4"}),
    "seed": (ValueError, r"seed: .*got -1", {"seed": -1}),
    "seed large": (ValueError, r"seed: .*got 9223372036854775808", {"seed": 2**63}),
    "seed type": (TypeError, r"seed: .*got NoneType", {"seed": None}),
    "stream": (ValueError, r"stream: .*got -1", {"stream": -1}),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_schedules_are_refused(case):
    error, message, options = BAD[case]
    with pytest.raises(error, match=message):
        Schedule(**{"steps": 3, **options})
