"""A native call that is made again keeps its plan, and its results are those of a new one.

Whatever a plan depends on is changed between two calls, and changed back: the settings, the sizes,
which rows weigh something, which results and gradients are asked for. So it is on a device, where
the list of operations is kept as well.
"""

import itertools

import numpy as np
import pytest
from helpers import in_threads
from kernels import using

from pymeta import native
from pymeta.spec.losses import Loss, native_loss

lib = native.extension()
TASKS, ROWS, INPUTS, OUT = 25, 6, 3, 2
LAYERS = [("linear", INPUTS, 9, True), ("tanh",), ("linear", 9, OUT, True)]
REALS = [np.float32, np.float64]
EXECUTORS = ["rows", "lanes", "mixed", "stacked", "auto"]
HOST, EMULATED = None, -1
DEVICES = [HOST, *[EMULATED] * native.emulates()]
needs_emulator = pytest.mark.skipif(not native.emulates(), reason="built without emulated blocks")


def pointer(array):
    return 0 if array is None else array.ctypes.data


class Arrays:
    """What a call reads and writes; `asked` names the results and gradients that are wanted."""

    def __init__(self, network, real, seed, asked=("predictions", "gradients")):
        random = np.random.default_rng(seed)

        def drawn(*shape):
            return random.normal(size=shape).astype(real)

        self.start = [drawn(size) * real(0.5) for size in network.parameter_sizes]
        self.lr = np.array([0.1], real)
        self.xs, self.xq = drawn(TASKS, ROWS, INPUTS), drawn(TASKS, ROWS, INPUTS)
        self.ys, self.yq = drawn(TASKS, ROWS, OUT), drawn(TASKS, ROWS, OUT)
        self.mean, self.losses = np.zeros(1, real), np.zeros(TASKS, real)
        self.predictions = np.zeros((TASKS, ROWS, OUT), real)
        self.gradients = [np.zeros_like(p) for p in self.start]
        self.lr_gradient, self.xs_gradient = np.zeros_like(self.lr), np.zeros_like(self.xs)
        self.into_losses, self.into_predictions = drawn(TASKS), drawn(TASKS, ROWS, OUT)
        self.asked = asked

    def arguments(self):
        """Those of `RepeatedCall.run`."""
        has = self.asked.__contains__
        gradients = None
        if has("gradients"):
            gradients = lib.Gradients(
                [*map(pointer, self.gradients)],
                lr=pointer(self.lr_gradient) if has("of lr") else 0,
                xs=pointer(self.xs_gradient) if has("of xs") else 0,
            )
        cotangents = None
        if has("cotangents"):
            cotangents = lib.Cotangents(pointer(self.into_losses), pointer(self.into_predictions))
        return {
            "start": [*map(pointer, self.start)],
            "rates": pointer(self.lr),
            "xs": pointer(self.xs),
            "ys": pointer(self.ys),
            "xq": pointer(self.xq),
            "yq": 0 if has("no targets") else pointer(self.yq),
            "mean_loss": 0 if has("no targets") else pointer(self.mean),
            "losses": 0 if has("no targets") else pointer(self.losses),
            "predictions": pointer(self.predictions) if has("predictions") else 0,
            "gradients": gradients,
            "cotangents": cotangents,
        }

    def results(self):
        made = [self.mean, self.losses, self.predictions, self.lr_gradient, self.xs_gradient]
        return b"".join(array.tobytes() for array in [*made, *self.gradients])


def run(repeated, arrays, device):
    """On a device in memory of its own: NaN, as far as it is not written."""
    if device is HOST:
        repeated.run(**arrays.arguments())
        return
    need = repeated.run(**arrays.arguments(), device=(device, 0, 0, 0))
    memory = np.full(need + 64, 255, np.uint8)
    at = -(-pointer(memory) // 64) * 64
    assert repeated.run(**arrays.arguments(), device=(device, 0, at, need)) == need


class Calls:
    """Calls of one description: sizes and weights of the support rows are its own."""

    def __init__(self, real, ragged=False, weighted=False):
        self.real = real
        self.network = lib.Network(LAYERS)
        self.problem = lib.Problem(
            self.network, native_loss(Loss("mse")), [True] * 4, [0] * 4, None
        )
        self.sizes = np.full(TASKS, ROWS) if ragged else None
        self.weights = np.ones((TASKS, ROWS), real) if weighted else None

    def made(self):
        call = lib.Call(self.problem, np.dtype(self.real).itemsize, "meta")
        call.tasks, call.start = TASKS, [0] * 4
        call.rates, call.schedule = lib.Rates(1), lib.Schedule(steps=1)
        sizes, weights = pointer(self.sizes), pointer(self.weights)
        call.support = lib.Rows(rows=ROWS, sizes=sizes, weights=weights)
        call.query = lib.Rows(rows=ROWS)
        return call

    def check(self, repeated, seed, asked=("predictions", "gradients"), device=HOST):
        """The repeated call against one that is made anew; the results."""
        ours, theirs = (Arrays(self.network, self.real, seed, asked) for _ in range(2))
        run(repeated, ours, device)
        run(lib.RepeatedCall(self.made()), theirs, device)
        assert ours.results() == theirs.results()
        return ours.results()


@pytest.mark.parametrize("real", REALS)
def test_other_values_and_other_settings(real):
    calls = Calls(real)
    repeated = lib.RepeatedCall(calls.made())
    found = {}
    settings = list(itertools.product(native.isas(), EXECUTORS, (1, 3)))
    # first the threads change alone, then the instruction set
    for isa, executor, threads in [*settings, *sorted(settings, key=lambda each: each[1:])]:
        with using(isa, executor, threads):
            for seed in (0, 1, 0):
                found[executor, seed] = calls.check(repeated, seed)
    # sums over tasks have an order of each executor's own: one that was kept would be seen
    assert found["rows", 0] != found["lanes", 0] and found["rows", 0] != found["stacked", 0]
    assert found["rows", 0] != found["rows", 1]


ASKED = [
    ("predictions", "gradients"), (), ("predictions",), ("gradients",), ("gradients", "of lr"),
    ("predictions", "gradients", "of lr", "of xs"), ("gradients", "cotangents"),
    ("predictions", "gradients", "cotangents", "no targets"), ("predictions", "no targets"),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("real", REALS)
def test_other_results(real, device):
    calls = Calls(real)
    repeated = lib.RepeatedCall(calls.made())
    with using(threads=2):
        for seed, (before, after) in enumerate(itertools.product(ASKED, repeat=2)):
            calls.check(repeated, seed, before, device)
            calls.check(repeated, seed, after, device)


@needs_emulator
@pytest.mark.parametrize("real", REALS)
def test_other_blocks(real):
    """Their threads, their memory, and the kernel that runs the call; and the host in between."""
    calls = Calls(real)
    repeated = lib.RepeatedCall(calls.made())
    families = range(len(lib.block_families()))
    before = lib.block_bytes(), lib.block_family()
    settings = list(itertools.product((1, 3), (0, 16 << 10), families))
    found = []
    try:
        # first the kernels change alone, then the threads
        for threads, memory, family in [*settings, *sorted(settings, key=lambda each: each[1:])]:
            lib.set_block_bytes(memory)
            lib.set_block_family(family)
            with using(threads=threads):
                found += [calls.check(repeated, seed, device=EMULATED) for seed in (0, 1, 0)]
            calls.check(repeated, 0)
    finally:
        lib.set_block_bytes(before[0])
        lib.set_block_family(before[1])
    assert set(found[::3]) == set(found[2::3]) == {found[0]} and set(found[1::3]) == {found[1]}
    assert found[0] != found[1]


@needs_emulator
def test_rates_on_a_device_are_not_looked_at():
    """The host cannot read them: a plan that depends on them would not be one of a device."""
    calls = Calls(np.float32)
    repeated = lib.RepeatedCall(calls.made())
    arrays = Arrays(calls.network, np.float32, 0)
    nowhere = {**arrays.arguments(), "rates": 64}
    assert repeated.run(**nowhere, device=(EMULATED, 0, 0, 0)) > 0
    calls.check(repeated, 0, device=EMULATED)
    assert repeated.run(**nowhere, device=(EMULATED, 0, 0, 0)) > 0


@pytest.mark.parametrize("executor", EXECUTORS)
def test_sizes_and_weights_that_change_in_place(executor):
    random = np.random.default_rng(0)
    calls = Calls(np.float64, ragged=True, weighted=True)
    repeated = lib.RepeatedCall(calls.made())
    with using(executor=executor):
        for seed in range(8):
            calls.sizes[:] = random.integers(1, (ROWS, 3)[seed % 2], TASKS, endpoint=True)
            calls.weights[:] = 1
            if seed % 4 < 2:  # rows that weigh nothing are left out
                calls.weights[random.random((TASKS, ROWS)) < 0.5] = 0
            calls.check(repeated, seed)


@needs_emulator
def test_sizes_and_weights_that_change_in_place_on_a_device():
    """Its plan is for the largest task that there might be."""
    random = np.random.default_rng(0)
    calls = Calls(np.float64, ragged=True, weighted=True)
    repeated = lib.RepeatedCall(calls.made())
    with using(threads=2):
        for seed in range(4):
            calls.sizes[:] = random.integers(1, (ROWS, 3)[seed % 2], TASKS, endpoint=True)
            calls.weights[:] = random.random((TASKS, ROWS)) < (1, 0.5)[seed // 2]
            calls.check(repeated, seed, device=EMULATED)


def test_after_an_error_it_is_as_before():
    calls = Calls(np.float32, weighted=True)
    repeated = lib.RepeatedCall(calls.made())
    before = calls.check(repeated, 0)
    calls.weights[3, 2] = -1
    with pytest.raises(ValueError, match="support_weights: task 3, row 2"):
        calls.check(repeated, 1)
    calls.weights[3, 2] = 1
    assert calls.check(repeated, 0) == before


def test_what_is_done_to_the_call_later_changes_nothing():
    calls = Calls(np.float32)
    call = calls.made()
    repeated = lib.RepeatedCall(call)
    before = calls.check(repeated, 0)
    call.tasks, call.schedule, call.first_order = 2, lib.Schedule(steps=3), True
    call.support = call.query = lib.Rows(rows=1)
    assert calls.check(repeated, 0) == before


@pytest.mark.parametrize("device", DEVICES)
def test_threads_share_one(device):
    calls = Calls(np.float32)
    repeated = lib.RepeatedCall(calls.made())

    def work(seed):
        return [calls.check(repeated, seed, device=device) for _ in range(20)]

    with using(threads=1):
        for seed, found in enumerate(in_threads(work, [(seed,) for seed in range(4)])):
            assert set(found) == {calls.check(repeated, seed, device=device)}


def test_jobs_that_are_none():
    with pytest.raises(ValueError, match="call: expected one of job 'meta'"):
        lib.RepeatedCall(lib.Call(Calls(np.float32).problem, 4, "adapt"))
