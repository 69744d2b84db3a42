"""Reptile and fine-tuning on a GPU, and the same bits: emulated, repeated, in any batch."""

import collections
import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import Case, Problem, cases, is_kinked, meta_gradient, of_tasks
from cuda_help import DEVICE, ODD, WORKLOADS, module_of, moved, on, results, runs_natively
from helpers import gradients, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import (
    DTYPES,
    EPS,
    OPTIMIZERS,
    PROFILE,
    WIDTHS,
    flat,
    largest,
    lost,
    same_bits,
    shaken,
)
from recipes import Adaptations, Recipe, recipes

import pymeta
from pymeta import native

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
if native.cuda_reason() is not None:
    pytest.skip(f"no CUDA executor: {native.cuda_reason()}", allow_module_level=True)


emulator = pytest.mark.skipif(not native.emulates(), reason="built without the emulated device")


# ---- Reptile and fine-tuning --------------------------------------------------------------------


class Adapting:
    """A recipe of test_recipes.py by the public learners, on any device."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.made = Adaptations(recipe)
        self.frozen = [n for n, _ in self.made.net.named_parameters() if n not in self.made.adapted]

    def learner(self, dtype: torch.dtype, device: torch.device, backend: str):
        recipe = self.recipe
        shared = {
            "loss": recipe.loss, "optimizer": OPTIMIZERS[recipe.optimizer](0.1),
            "batch_size": recipe.batch_size, "seed": recipe.seed, "backend": backend,
        }  # fmt: skip
        net = copy.deepcopy(self.made.net).to(dtype)
        if recipe.epochs is None:
            learner = pymeta.Reptile(
                net, steps=recipe.steps, adapt=self.made.adapted or None, **shared
            )
        else:
            learner = pymeta.FineTune(
                net, epochs=recipe.epochs, anchor=recipe.anchor, freeze=self.frozen or None,
                patience=recipe.patience, **shared,
            )  # fmt: skip
        return learner.to(device)

    def results(self, learner, tasks: list[int] | None = None) -> dict:
        """What the adaptation of these tasks gives, as {name: value}, on the CPU."""
        like = next(learner.parameters())
        tasks = list(range(self.recipe.tasks)) if tasks is None else tasks

        def columns(rows: list[tuple]) -> list:
            parts = zip(*(rows[t] for t in tasks), strict=True)
            return [
                None if part[0] is None
                else [v.to(like) if v.is_floating_point() else v.to(like.device) for v in part]
                for part in parts
            ]  # fmt: skip

        xs, ys, weights = columns(self.made.support)
        ids = self.made.ids[tasks] if self.recipe.own_shuffles else None
        if self.recipe.epochs is None:
            made = learner(xs, ys, support_weights=weights, task_ids=ids)
            found = {
                "losses": made.task_losses,
                "differences": gradients(made.loss, *learner.parameters()),
            }
            models = learner.adapt(xs, ys, support_weights=weights, task_ids=ids)
        else:
            held = columns(self.made.validation) if self.recipe.validates else None
            if held is not None and held[2] is None:
                held = held[:2]
            start = {n: v[tasks].to(like) for n, v in self.made.start.items()} or None
            models = learner(
                xs, ys, weights=weights, start=start, validation_data=held, task_ids=ids,
                curves=True,
            )  # fmt: skip
            curves = models.history
            found = {"train": curves.train, "epochs": curves.epochs}
            if self.recipe.validates:
                found |= {"validation": curves.validation, "best": curves.best_epochs}
        found |= {
            "weights": [models.parameters[n] for n in self.made.adapted],
            "status": models.status,
        }
        return on(torch.device("cpu"), found)


NUMBERS = ("epochs", "best", "status")  # equal, not close


def compare_recipe(recipe: Recipe, counts: collections.Counter) -> None:
    """One recipe, in float64 and, where nothing jumps, in float32; bounds as in test_recipes.py."""
    adapting, cpu = Adapting(recipe), torch.device("cpu")
    if not runs_natively(adapting.learner(torch.float64, DEVICE, "auto")):
        counts["unfit"] += 1
        return
    wanted = adapting.results(adapting.learner(torch.float64, cpu, "torch"))
    with shaken():
        single = adapting.results(adapting.learner(torch.float32, cpu, "torch"))
    if wanted["status"].any() or single["status"].any():
        counts["diverged"] += 1
        return
    case = Case(recipe.chain, recipe.loss)
    jumps = is_kinked(case) or recipe.validates or "clip" in recipe.optimizer
    steps = recipe.steps if recipe.epochs is None else recipe.epochs * recipe.rows
    widths = sum(max(layer[1], layer[2]) for layer in recipe.chain if len(layer) > 2)
    terms = math.sqrt((widths + recipe.rows) * (steps + 1))
    for dtype in (torch.float64,) if jumps else DTYPES:
        got = adapting.results(adapting.learner(dtype, DEVICE, "native"))
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            where = f"{dtype} {name}: {recipe}"
            if name in NUMBERS:
                assert torch.equal(got[name], value), where
                continue
            assert torch.equal(flat(got[name]).isnan(), flat(value).isnan()), where
            whole = largest(torch.nan_to_num(flat(value)))
            bound = 64 * EPS[dtype] * (lost(name, single, wanted) + terms * whole + terms)
            error = largest(torch.nan_to_num(flat(got[name])) - torch.nan_to_num(flat(value)))
            assert error <= bound, f"{error} > {bound}: {where}"
        counts[dtype] += 1


def test_random_recipes_against_the_reference():
    counts = collections.Counter()

    @settings(PROFILE, max_examples=60)
    @given(recipes())
    def check(recipe):
        compare_recipe(recipe, counts)

    check()
    assert counts[torch.float64] >= 40 and counts[torch.float32] >= 10, counts


CUSTOMERS = Recipe(
    (("linear", 5, 33, True), ("tanh",), ("linear", 33, 1, True)), "bce_with_logits", "adam",
    batch_size=4, tasks=37, rows=19, validates=True, patience=1, weights=True, own_shuffles=True,
    seed=7,
)  # fmt: skip


REPTILE = replace(CUSTOMERS, epochs=None, steps=9, validates=False, patience=None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", [CUSTOMERS, REPTILE], ids=["customers", "reptile"])
def test_an_adapted_task_has_its_own_bits_among_any_others(recipe, dtype):
    adapting = Adapting(recipe)

    def of_task(found: dict, t: int) -> list[torch.Tensor]:
        each = [w[t] for w in found["weights"]]
        return each + [found[n][t] for n in ("train", "validation", "losses") if n in found]

    def follow(tasks):
        return adapting.results(adapting.learner(dtype, DEVICE, "native"), tasks)

    whole, again = follow(None), follow(None)
    order = torch.randperm(recipe.tasks, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = follow(order)
    for t in range(recipe.tasks):
        assert same_bits(of_task(again, t), of_task(whole, t))
        assert same_bits(of_task(shuffled, order.index(t)), of_task(whole, t))
    for t in (0, 3, recipe.tasks - 1):
        assert same_bits(of_task(follow([t]), 0), of_task(whole, t))


def test_held_out_rows_and_class_weights_are_the_references():
    """What FineTune prepares itself, around the native call."""
    net = mlp(4, 12, 1)
    x = [torch.randn(n, 4, dtype=torch.float64) for n in (20, 7, 33)]
    y = [(torch.rand(len(v)) < 0.3).double() for v in x]
    found = []
    for device, backend in ((torch.device("cpu"), "torch"), (DEVICE, "native")):
        finetune = pymeta.FineTune(
            copy.deepcopy(net), loss="bce_with_logits", optimizer=pymeta.Adam(0.05), epochs=6,
            batch_size=5, validation=0.25, patience=2, class_weights="balanced", backend=backend,
        ).to(device)  # fmt: skip
        models = finetune(on(device, x), on(device, y), curves=True)
        probabilities = torch.cat(models.predict_proba(on(device, x)))
        found.append(on(torch.device("cpu"), [probabilities, models.history.best_epochs]))
    assert torch.equal(found[0][1], found[1][1])
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-9, atol=1e-12)


# ---- the same to the last bit -------------------------------------------------------------------


@settings(PROFILE, max_examples=30)
@given(cases(tasks=(1, 3, 8, 17, 33, 70)), st.sampled_from(DTYPES))
def test_a_tasks_bits_are_its_own(case, dtype):
    """Again, alone, permuted, among others."""
    problem = Problem(case)
    module = module_of(problem, dtype)
    if not runs_natively(module):
        return
    every = list(range(case.tasks))
    order = torch.randperm(case.tasks).tolist()
    wanted = results(problem, module)
    again = results(problem, module)
    assert same_bits(of_tasks(again, every), of_tasks(wanted, every))
    assert same_bits(meta_gradient(again), meta_gradient(wanted))
    assert same_bits(of_tasks(results(problem, module, order), every), of_tasks(wanted, order))
    for t in {0, case.tasks // 2, case.tasks - 1}:
        assert same_bits(of_tasks(results(problem, module, [t]), [0]), of_tasks(wanted, [t]))


@settings(PROFILE, max_examples=20)
@given(cases(tasks=(2, 5, 17, 33)), st.sampled_from(DTYPES))
def test_an_adapted_models_predictions_are_the_calls_own(case, dtype):
    problem = Problem(case).judged_whole()
    module = module_of(problem, dtype)
    if not runs_natively(module):
        return
    there = moved(problem)
    support, query = there.support.to(dtype), there.query.to(dtype)
    arguments, options = there.arguments(support, query)
    kept = {k: v for k, v in options.items() if not k.startswith("query")}
    wanted = results(problem, module)["predictions"]
    models = module.adapt(*arguments[:2], **kept)
    got = models(arguments[2], query_sizes=query.sizes if case.form == "padded" else None)
    got = [p[:n].cpu() for p, n in zip(got, query.sizes, strict=True)]
    assert same_bits(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [ODD, WORKLOADS["W1"], WORKLOADS["W3"]], ids=["odd", "W1", "W3"])
def test_bits_depend_on_neither_threads_nor_memory_of_a_block(case, dtype, blocks):
    problem = Problem(case)
    module = module_of(problem, dtype)
    wanted = results(problem, module)
    every = range(case.tasks)
    plans = [(32, 0), (64, 0), (128, 0), (256, 0), (0, 16 << 10), (64, 24 << 10), (0, 48 << 10)]
    for threads, memory in plans:
        blocks(threads, memory)
        got = results(problem, module)
        assert same_bits(of_tasks(got, every), of_tasks(wanted, every)), (threads, memory)
        assert same_bits(meta_gradient(got), meta_gradient(wanted)), (threads, memory)


def test_a_block_has_whole_warps(blocks):
    problem = Problem(ODD)
    module = module_of(problem, torch.float32)
    with pytest.raises(ValueError, match="block_threads"):
        blocks(48)
        results(problem, module)


@st.composite
def exact_cases(draw):
    """Networks whose arithmetic is the same on every machine: products, sums and comparisons."""
    widths = draw(st.lists(WIDTHS, min_size=2, max_size=4))
    chain = []
    for inputs, outputs in itertools.pairwise(widths):
        chain += [("linear", inputs, outputs, draw(st.booleans()))]
        chain += [(draw(st.sampled_from(["relu", "leaky_relu"])),)]
    whole = draw(cases(tasks=(1, 2, 5, 17), chain=st.just(tuple(chain[:-1]))))
    return replace(whole, loss="mse", loss_options=False, optimizer="plain")


@emulator
@settings(PROFILE, max_examples=30)
@given(exact_cases(), st.sampled_from(DTYPES))
def test_the_emulated_device_has_the_same_bits(case, dtype):
    problem = Problem(case)
    module = module_of(problem, dtype)
    if not runs_natively(module):
        return
    got = results(problem, module)
    before = native.executor()
    try:
        native.set_executor("emulated")
        wanted = results(problem, module_of(problem, dtype, torch.device("cpu")))
    finally:
        native.set_executor(before)
    assert same_bits(of_tasks(got, range(case.tasks)), of_tasks(wanted, range(case.tasks)))
    assert same_bits(meta_gradient(got), meta_gradient(wanted))


@pytest.mark.parametrize("name, tasks", [("W1", 65536), ("W3", 4096)])
def test_a_large_call_has_the_bits_of_small_ones(name, tasks):
    """And its mean loss and gradient are the means over the parts, as far as rounding goes."""
    case = replace(WORKLOADS[name], tasks=tasks, input_gradients=False)
    problem = Problem(case)
    module = module_of(problem, torch.float32)
    whole = results(problem, module)
    sample = torch.randint(0, tasks, (40,)).tolist()
    part = results(problem, module, sample)
    assert same_bits(of_tasks(part, range(40)), of_tasks(whole, sample))
    assert whole["loss"].item() == pytest.approx(whole["task_losses"].double().mean().item(), 1e-5)
    halves = [results(problem, module, list(range(t, tasks, 2))) for t in (0, 1)]
    for n, g in whole["gradients"].items():
        mean = sum(half["gradients"][n].double() for half in halves) / 2
        assert largest(g.double() - mean) <= 64 * math.sqrt(tasks) * EPS[torch.float32] * largest(g)
