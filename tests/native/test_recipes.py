"""Adaptation by every recipe: the native core against its twin in torch, and against itself.

A `Recipe` is drawn by hypothesis: a network, an inner optimiser, steps or epochs, minibatches,
anchor, frozen parameters, starts of each task's own, ragged rows, weights, validation and patience.
`backend.adapt` must give what `reference.adapt` and `reference.reptile` give in float64, on every
executor and instruction set, and the same bits whatever comes along.
"""

import collections
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import (
    DTYPES,
    EPS,
    PATHS,
    PROFILE,
    bits,
    flat,
    largest,
    lost,
    same_bits,
    shaken,
    using,
)
from recipes import Adaptations, Recipe, recipes
from torch import nn

import pymeta
from pymeta import native, reference
from pymeta.backend import adapt as native_adapt
from pymeta.spec.schedule import permutation

NUMBERS = ("epochs", "best", "status")  # equal, not close


def without_nan(value) -> torch.Tensor:
    return torch.nan_to_num(flat(value), nan=1e30)


def compare(recipe: Recipe) -> bool:
    """One recipe on every path, in float64; whether the tasks stayed finite, so that it counts.

    As in cases.py, the error that an honest kernel may have is the machine epsilon times a
    condition number, for which what the reference loses in float32 (`shaken`) stands, and has as
    its floor the rounding of sums of as many terms as there are.
    """
    problem = Adaptations(recipe)
    wanted = problem.follow(reference, torch.float64)
    with shaken():
        single = problem.follow(reference, torch.float32)
    if wanted["status"].any() or single["status"].any():
        return False
    steps = recipe.steps if recipe.epochs is None else recipe.epochs * recipe.rows
    widths = sum(max(layer[1], layer[2]) for layer in recipe.chain if len(layer) > 2)
    terms = math.sqrt((widths + recipe.rows) * (steps + 1))
    for isa, executor in PATHS:
        with using(isa, executor):
            got = problem.follow(native_adapt, torch.float64)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            if name in NUMBERS:
                assert torch.equal(got[name], value), f"{isa} {executor} {name}: {recipe}"
                continue
            whole = largest(torch.nan_to_num(flat(value)))
            bound = 64 * EPS[torch.float64] * (lost(name, single, wanted) + terms * whole + terms)
            error = largest(without_nan(got[name]) - without_nan(value))
            assert error <= bound, f"{isa} {executor} {name}: {error} > {bound}: {recipe}"
    return True


def test_random_recipes_against_the_reference():
    counts = collections.Counter()

    @settings(PROFILE, max_examples=80)
    @given(recipes())
    def check(recipe):
        counts[compare(recipe)] += 1

    check()
    assert counts[True] >= 60


def test_the_comparison_can_fail():
    chain = (("linear", 3, 8, True), ("tanh",), ("linear", 8, 2, True))
    recipe = Recipe(chain, optimizer="adam", batch_size=2, seed=4)
    problem = Adaptations(recipe)
    wanted = problem.follow(reference, torch.float64)
    for change in ({"seed": 5}, {"batch_size": 3}, {"optimizer": "adamw"}, {"anchor": 0.01}):
        problem.recipe = replace(recipe, **change)
        got = problem.follow(native_adapt, torch.float64)
        assert largest(flat(got["weights"]) - flat(wanted["weights"])) > 1e-6


# A first layer that the rows executor never materialises but at the end, for those it adapts.
WIDE = Recipe(
    (("linear", 70, 18, True), ("tanh",), ("linear", 18, 3, True)), "cross_entropy", steps=4,
    epochs=None, tasks=21, rows=24, seed=3,
)  # fmt: skip


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_wide_first_layer_against_the_reference(frozen):
    assert compare(replace(WIDE, frozen=frozen))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_validation_rows_that_weigh_nothing_judge_nothing(loss):
    chain = (("linear", 3, 8, True), ("tanh",), ("linear", 8, 2, True))
    recipe = Recipe(chain, loss, "adam", epochs=4, validates=True, patience=1, weights=True, seed=6)
    problem = Adaptations(recipe)
    lengths = [len(y) for _, y, _ in problem.validation]
    blind = lengths.index(max(lengths))
    x, y, weights = problem.validation[blind]
    problem.validation[blind] = x, y, torch.zeros_like(weights)
    wanted = problem.follow(reference, torch.float64)
    assert len(problem.support[blind][0]) > 0
    assert wanted["epochs"][blind] == wanted["best"][blind] == 4
    for isa, executor in PATHS:
        with using(isa, executor):
            got = problem.follow(native_adapt, torch.float64)
        assert torch.equal(got["epochs"], wanted["epochs"])
        assert torch.equal(got["best"], wanted["best"])
        assert torch.equal(got["validation"].isnan(), wanted["validation"].isnan())


@pytest.mark.parametrize("epochs", [None, 2])
def test_more_tasks_than_chunks(epochs):
    """A chunk's tasks follow one another in the same memory: nothing of one is left in the next."""
    chain = (("linear", 2, 3, True), ("tanh",), ("linear", 3, 1, True))
    steps = 3 if epochs is None else None
    recipe = Recipe(chain, steps=steps, epochs=epochs, batch_size=2, tasks=140, rows=5)
    assert compare(recipe)


@pytest.mark.skipif(not native.emulates(), reason="this build has no emulated device")
def test_more_tasks_than_chunks_of_blocks():
    """Blocks have 2,048 chunks where there are as many tasks."""
    tasks = 4500
    net = nn.Sequential(nn.Linear(1, 1)).double()
    x, y, xq, yq = (torch.randn(tasks, 2, 1, dtype=torch.float64) for _ in range(4))
    maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend="native")
    reptile = pymeta.Reptile(net, loss="mse", lr=0.1, steps=2, backend="native")

    def results():
        found = []
        for out in (maml(x, y, xq, yq), reptile(x, y)):
            gradients = torch.autograd.grad(out.loss, list(net.parameters()))
            found += [out.loss.detach(), out.task_losses, *gradients]
        return found

    wanted = results()
    with using(executor="emulated", threads=1):
        got = results()
    bound = 64 * EPS[torch.float64] * math.sqrt(tasks)
    for g, w in zip(got, wanted, strict=True):
        assert largest(g - w) <= bound * (1 + largest(w))


# ---- the same to the last bit -------------------------------------------------------------------


FIXED = {
    "minibatches": Recipe(
        (("linear", 5, 33, True), ("relu",), ("linear", 33, 1, True)), "bce_with_logits", "adam",
        batch_size=4, tasks=37, rows=19, validates=True, patience=1, weights=True, seed=7,
    ),
    "own starts, clip": Recipe(
        (("linear", 3, 20, True), ("tanh",), ("linear", 20, 5, True)), "cross_entropy", "nesterov",
        epochs=4, own_starts=2, anchor=0.25, tasks=19, rows=12, frozen=1, seed=8,
    ),
    "steps": Recipe(
        (("linear", 2, 40, True), ("layer_norm", 40, 40, True), ("silu",), ("linear", 40, 3, True)),
        optimizer="adam, decay", steps=9, epochs=None, batch_size=3, tasks=20, own_shuffles=True,
    ),
    "frozen body": Recipe(
        (("linear", 4, 17, True), ("relu",), ("linear", 17, 9, True), ("tanh",),
         ("linear", 9, 1, True)), optimizer="momentum", frozen=4, tasks=21, seed=2,
    ),
}  # fmt: skip


def of_task(results: dict, t: int) -> list[torch.Tensor]:
    each = [w[t] for w in results["weights"]]
    return each + [results[n][t] for n in ("train", "validation", "losses") if n in results]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FIXED)
def test_a_task_alone_permuted_and_on_any_path_has_the_same_bits(name, dtype):
    problem = Adaptations(FIXED[name])
    tasks = FIXED[name].tasks
    order = torch.randperm(tasks, generator=torch.Generator().manual_seed(1)).tolist()
    for isa in native.isas():
        with using(isa, "rows", 1):
            wanted = problem.follow(native_adapt, dtype)
        for executor in ("rows", "lanes", "mixed", "stacked", "auto"):
            with using(isa, executor, 2):
                whole = problem.follow(native_adapt, dtype)
                moved = problem.follow(native_adapt, dtype, order)
                alone = {t: problem.follow(native_adapt, dtype, [t]) for t in (0, 3, tasks - 1)}
            for t in range(tasks):
                assert same_bits(of_task(whole, t), of_task(wanted, t))
                assert same_bits(of_task(moved, order.index(t)), of_task(wanted, t))
            for t, one in alone.items():
                assert same_bits(of_task(one, 0), of_task(wanted, t))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_reptile_has_the_same_bits_on_any_number_of_threads(threads):
    problem = Adaptations(FIXED["steps"])
    for executor in ("rows", "lanes"):
        with using(executor=executor, threads=1):
            wanted = problem.follow(native_adapt, torch.float32)
        with using(executor=executor, threads=threads):
            got = problem.follow(native_adapt, torch.float32)
        assert same_bits(got["differences"], wanted["differences"])


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("name", [*FIXED, "wide"])
def test_a_task_of_nan_is_reported_and_leaves_the_others_alone(name, isa, executor):
    recipe = {**FIXED, "wide": WIDE}[name]
    problem = Adaptations(recipe)
    with using(isa, executor):
        before = problem.follow(native_adapt, torch.float32)
        spoiled = max(range(len(problem.support)), key=lambda t: len(problem.support[t][0]))
        problem.support[spoiled][0][0, 0] = math.nan
        after = problem.follow(native_adapt, torch.float32)
    tasks = range(len(problem.support))
    assert all(same_bits(of_task(before, t), of_task(after, t)) for t in tasks if t != spoiled)
    assert not before["status"].any()
    if not recipe.validates:  # with validation rows the finite start is the best there is
        assert after["status"].tolist() == [int(t == spoiled) for t in tasks]
    else:
        assert not after["status"].any() and after["best"][spoiled] == 0


# ---- the shuffle --------------------------------------------------------------------------------


@settings(PROFILE, max_examples=50)
@given(
    st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**40),
    st.integers(0, 1), st.lists(st.integers(0, 70), min_size=1, max_size=5), st.booleans(),
)  # fmt: skip
def test_native_shuffle_is_that_of_numpy(seed, stream, epoch, purpose, sizes, identified):
    ids = torch.arange(len(sizes)) * 2**50 + seed % 1000
    lengths = torch.tensor(sizes)
    out = torch.full((sum(sizes) + 1,), -1)
    native.extension().shuffle(
        seed, stream, ids.data_ptr() if identified else 0, epoch, purpose, len(sizes),
        lengths.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    wanted = [
        permutation(seed, stream, int(i) if identified else 0, epoch, n, purpose)
        for i, n in zip(ids, sizes, strict=True)
    ]
    assert out.tolist() == [*(int(i) for p in wanted for i in p), -1]


def test_bits_sees_a_difference_of_one_bit():
    a = torch.tensor([1.0, 2.0])
    assert same_bits(a, a.clone()) and not same_bits(a, torch.nextafter(a, a + 1))
    assert bits(torch.tensor([0.0])).item() != bits(torch.tensor([-0.0])).item()
