"""The CUDA executor on a GPU; skipped as a whole where there is none.

The same things are asked of it as of the CPU's executors in test_kernels.py and test_recipes.py,
by the same cases and the same bounds: close to the float64 reference, equal to the last bit
wherever that is promised. Beside these stands what only a GPU has: streams, graphs, a host that
runs ahead, memory that runs out. What the executor computes is tested without a GPU as well, on the
emulated device; here the two are compared, to the last bit.
"""

import collections
import copy
import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import FIXED, Case, Problem, Wanted, cases, is_kinked, meta_gradient, of_tasks
from cases import walk as walk_along
from helpers import batch, gradients, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import (
    DTYPES,
    EPS,
    OPTIMIZERS,
    PROFILE,
    WIDTHS,
    chains,
    flat,
    largest,
    lost,
    same_bits,
    shaken,
)
from test_recipes import Adaptations, Recipe, recipes
from torch import nn

import pymeta
from pymeta import native

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
if native.cuda_reason() is not None:
    pytest.skip(f"no CUDA executor: {native.cuda_reason()}", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
emulator = pytest.mark.skipif(not native.emulates(), reason="built without the emulated device")


# ---- cases on the device ------------------------------------------------------------------------


def on(device: torch.device, value):
    """Tensors, alone or in dictionaries and sequences, on a device."""
    if isinstance(value, dict):
        return {name: on(device, v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [on(device, v) for v in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def moved(problem: Problem, device: torch.device = DEVICE) -> Problem:
    """The same problem with its tasks on a device."""
    problem = copy.copy(problem)
    for name in ("support", "query"):
        side = getattr(problem, name)
        parts = [on(device, v) for v in (side.x, side.y, side.weights)]
        anchors = None if side.anchors is None else on(device, side.anchors)
        setattr(problem, name, type(side)(*parts, side.sizes, anchors))
    return problem


def module_of(problem: Problem, dtype: torch.dtype, device: torch.device = DEVICE) -> pymeta.MAML:
    return problem.module(dtype, "auto").to(device)


def results(problem: Problem, module: pymeta.MAML, tasks: list[int] | None = None) -> dict:
    """What a call gives for these tasks, on the CPU."""
    device = next(module.parameters()).device
    return on(torch.device("cpu"), moved(problem, device).results(module, tasks))


def runs_natively(module) -> bool:
    """Whether the executor takes the model; where it does not, it has to say why."""
    said = module.explain()
    if said.startswith("native-cuda"):
        return True
    assert said.startswith("torch: ") and "CUDA executor takes" in said, said
    return False


@pytest.fixture(autouse=True)
def _fallbacks_are_errors(recwarn):
    """No test passes by running in torch."""
    yield
    fallen = [str(w.message) for w in recwarn if "runs in torch" in str(w.message)]
    assert not fallen, fallen


@pytest.fixture
def blocks():
    """Sets threads and shared memory of a block; both are put back."""
    extension = native.extension()

    def choose(threads: int = 0, memory: int = 0) -> None:
        native.set_block_threads(threads)
        extension.set_block_bytes(memory)

    before = native.block_threads(), extension.block_bytes()
    yield choose
    choose(*before)


# ---- against the reference ----------------------------------------------------------------------


def compare(case: Case, counts: collections.Counter) -> None:
    """One case in both dtypes; float32 only where no kink is within reach of its rounding."""
    problem, steepest, dtypes = Problem(case), 1.0, DTYPES
    modules = {dtype: module_of(problem, dtype) for dtype in dtypes}
    if not runs_natively(modules[torch.float64]):
        counts["unfit"] += 1
        return
    if is_kinked(case) or any(layer[0].endswith("norm") for layer in case.chain):
        nearest, steepest = walk_along(problem)
        if nearest < 64 * EPS[torch.float32]:
            dtypes = (torch.float64,)
    wanted = Wanted(problem, steepest)
    for dtype in dtypes:
        wrong = wanted.differences(results(problem, modules[dtype]), dtype)
        assert not wrong, "\n".join([f"{case} {dtype}", *wrong])
        counts[dtype] += 1


def test_random_cases_against_the_reference():
    counts = collections.Counter()

    @settings(PROFILE, max_examples=60)
    @given(cases())
    def check(case):
        compare(case, counts)

    check()
    assert counts[torch.float64] >= 45 and counts[torch.float32] >= 35, counts


@pytest.mark.parametrize("name", FIXED)
def test_fixed_cases_against_the_reference(name):
    counts = collections.Counter()
    compare(FIXED[name], counts)
    assert counts[torch.float64] == 1 or name.startswith("20 layers")


def test_the_comparison_can_fail():
    case = Case((("linear", 3, 8, True), ("tanh",), ("linear", 8, 2, True)), seed=4)
    wanted = Wanted(Problem(case))
    for change in ({"first_order": True}, {"steps": 1}):
        other = Problem(replace(case, **change))
        got = results(other, module_of(other, torch.float32))
        assert wanted.differences(got, torch.float32)


LAYERS = (("linear", 24, 64, True), ("relu",), ("linear", 64, 64, True), ("relu",))
WORKLOADS = {
    "W1": Case(
        (("linear", 1, 40, True), ("relu",), ("linear", 40, 40, True), ("relu",),
         ("linear", 40, 1, True)), tasks=33, support=10, query=10, steps=5,
    ),
    "W2": Case(
        (("linear", 784, 256, True), ("relu",), ("linear", 256, 128, True), ("relu",),
         ("linear", 128, 64, True), ("relu",), ("linear", 64, 64, True), ("relu",),
         ("linear", 64, 5, True)), "cross_entropy", tasks=8, support=5, query=25, steps=1,
    ),
    "W3": Case((*LAYERS, ("linear", 64, 1, True)), "bce_with_logits", tasks=20, support=32,
               query=32, steps=5),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_benchmarks_networks_against_the_reference(name):
    """In float64, where their many ReLUs are no nearer to their kinks than rounding reaches."""
    case = replace(WORKLOADS[name], input_gradients=False)
    problem = Problem(case)
    wanted = Wanted(problem)
    module = module_of(problem, torch.float64)
    assert runs_natively(module)
    wrong = wanted.differences(results(problem, module), torch.float64)
    assert not wrong, wrong


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
    problem = Problem(case)
    module = module_of(problem, dtype)
    if not runs_natively(module):
        return
    there = moved(problem)
    support, query = there.support.to(dtype), there.query.to(dtype)
    arguments, options = there.arguments(support, query)
    kept = {k: v for k, v in options.items() if k.startswith("support")}
    wanted = results(problem, module)["predictions"]
    models = module.adapt(*arguments[:2], **kept)
    got = models(arguments[2], query_sizes=query.sizes if case.form == "padded" else None)
    got = [p[:n].cpu() for p, n in zip(got, query.sizes, strict=True)]
    assert same_bits(got, wanted)


ODD = Case(
    (("linear", 5, 33, True), ("layer_norm", 33, 33, True), ("tanh",), ("linear", 33, 17, True),
     ("relu",), ("linear", 17, 3, True)), "cross_entropy", tasks=21, form="list", weights=True,
    support=9, query=11, steps=3, lr="parameter", per_step=True, optimizer="nesterov", seed=2,
)  # fmt: skip


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


# ---- wrong values, NaN --------------------------------------------------------------------------


def classes(tasks: int = 6) -> tuple[pymeta.MAML, list[torch.Tensor]]:
    net = mlp(3, 20, 4, dtype=torch.float32)
    module = pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=2, backend="native").to(DEVICE)
    data = batch("cross_entropy", tasks, inputs=3, out=4, dtype=torch.float32)
    return module, on(DEVICE, data)


@pytest.mark.parametrize("wrong", [4, -1, 2**40])
@pytest.mark.parametrize("side", [1, 3])
def test_a_wrong_label_spoils_its_task_alone(side, wrong):
    module, data = classes()
    before, models_before = module(*data), module.adapt(*data[:2])
    data[side][2, 1] = wrong
    after, models = module(*data), module.adapt(*data[:2])
    others = [0, 1, 3, 4, 5]
    assert after.task_losses[2].isnan() and after.loss.isnan()
    assert same_bits(after.task_losses[others], before.task_losses[others])
    assert same_bits(after.predictions[others], before.predictions[others])
    for n, v in models.parameters.items():
        assert same_bits(v[others], models_before.parameters[n][others])
        assert v[2].isnan().any() == (side == 1)
    assert models.status.tolist() == [0, 0, int(side == 1), 0, 0, 0]
    assert all(g.isnan().any() for g in gradients(after.loss, *module.parameters()))


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_a_wrong_weight_spoils_its_task_alone(wrong):
    module, data = classes()
    weights = torch.ones(6, data[0].shape[1], device=DEVICE)
    before = module(*data, support_weights=weights)
    weights[4, 0] = wrong
    after = module(*data, support_weights=weights)
    others = [0, 1, 2, 3, 5]
    assert after.task_losses[4].isnan()
    assert same_bits(after.task_losses[others], before.task_losses[others])


def test_checked_values_are_refused():
    """PYMETA_CHECK_VALUES=1, which is read at import."""
    program = """
import torch, pymeta
net = torch.nn.Linear(3, 4).cuda()
maml = pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=1, backend="native")
x, y = torch.randn(2, 5, 3).cuda(), torch.zeros(2, 5, dtype=torch.int64).cuda()
assert maml(x, y, x, y).loss.isfinite()
y[1, 3] = 4
try:
    maml(x, y, x, y)
except ValueError as error:
    assert "task 1, row 3" in str(error), error
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYMETA_CHECK_VALUES": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stdout.strip() == "refused", done.stdout + done.stderr


@settings(PROFILE, max_examples=25)
@given(
    cases(tasks=(2, 5, 17, 33)),
    st.sampled_from([math.nan, math.inf, -math.inf, 3e38]),
    st.sampled_from(["xs", "ys", "xq"]),
    st.sampled_from(DTYPES),
)
def test_a_diverged_task_is_its_own_affair(case, poison, where, dtype):
    problem = Problem(case)
    side = problem.query if where == "xq" else problem.support
    spoiled = int(torch.randint(case.tasks, ()))
    others = [t for t in range(case.tasks) if t != spoiled]
    module = module_of(problem, dtype)
    if not runs_natively(module):
        return
    wanted = results(problem, module)
    values = side.y if where == "ys" and side.y.is_floating_point() else side.x
    values[spoiled] = poison
    got = results(problem, module)
    assert same_bits(of_tasks(got, others), of_tasks(wanted, others))
    for name in ("xs", "xq"):
        if case.input_gradients:
            assert same_bits(got[name][others], wanted[name][others])


def test_what_earlier_calls_left_in_memory_does_not_matter():
    """Working memory comes from torch's allocator with whatever is in it; here NaN."""
    problem = Problem(ODD)
    module = module_of(problem, torch.float32)
    wanted = results(problem, module)
    torch.cuda.empty_cache()
    for size in (1 << 10, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26):
        for _ in range(4):
            torch.full((size,), math.nan, device=DEVICE)
    got = results(problem, module)
    assert same_bits(of_tasks(got, range(21)), of_tasks(wanted, range(21)))
    assert same_bits(meta_gradient(got), meta_gradient(wanted))


# ---- streams and graphs -------------------------------------------------------------------------


class Sines:
    """A small MAML, and as many different meta-batches for it as are wanted."""

    def __init__(self, tasks: int = 25, dtype: torch.dtype = torch.float32) -> None:
        net = mlp(1, 40, 40, 1, act=nn.ReLU, dtype=dtype)
        self.maml = pymeta.MAML(net, loss="mse", lr=0.01, steps=2, backend="native").to(DEVICE)
        self.tasks, self.dtype = tasks, dtype

    def data(self, seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return on(DEVICE, batch("mse", self.tasks, 10, 10, 1, 1, self.dtype))

    def step(self, data) -> list[torch.Tensor]:
        """Loss, losses, predictions and meta-gradient of a call."""
        out = self.maml(*data)
        return [out.loss.detach(), out.task_losses, out.predictions] + list(
            torch.autograd.grad(out.loss, list(self.maml.parameters()))
        )

    def captured(self, static) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
        """A graph of `step`, and its results."""
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                self.step(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self.step(static)
        return graph, found


def copies(tensors) -> list[torch.Tensor]:
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("tasks", [1, 25, 3000])
def test_a_replayed_graph_equals_an_eager_call(tasks):
    sines = Sines(tasks)
    wanted = {seed: copies(sines.step(sines.data(seed))) for seed in range(3)}
    static = sines.data(0)
    graph, found = sines.captured(static)
    for seed in (0, 1, 2, 0):
        for place, value in zip(static, sines.data(seed), strict=True):
            place.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(found, wanted[seed])


def test_a_graph_follows_the_parameters():
    """A training step in a graph: the call, its gradient and torch's update."""
    sines, other = Sines(), Sines()
    other.maml.load_state_dict(sines.maml.state_dict())
    batches = [sines.data(seed) for seed in range(4)]

    def train(s: Sines, data) -> torch.Tensor:
        loss = s.maml(*data).loss
        found = torch.autograd.grad(loss, list(s.maml.parameters()))
        with torch.no_grad():
            for p, g in zip(s.maml.parameters(), found, strict=True):
                p.sub_(g, alpha=0.1)
        return loss.detach()

    static = copies(batches[0])
    start = copies(other.maml.parameters())
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            train(other, static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train(other, static)
    with torch.no_grad():
        for p, s in zip(other.maml.parameters(), start, strict=True):
            p.copy_(s)
    for data in batches:
        for place, value in zip(static, data, strict=True):
            place.copy_(value)
        graph.replay()
        assert same_bits(loss.clone(), train(sines, data))
    assert same_bits(list(other.maml.parameters()), list(sines.maml.parameters()))


def test_a_replay_between_a_call_and_its_backward_changes_nothing():
    """The graph's gradients lie in memory that no other call has, before the capture or after."""
    sines = Sines()
    data, static = sines.data(1), sines.data(2)
    wanted = copies(sines.step(data))
    graph, found = sines.captured(static)
    graph.replay()
    graphs = copies(found)
    out = sines.maml(*data)
    graph.replay()
    got = torch.autograd.grad(out.loss, list(sines.maml.parameters()))
    assert same_bits(got, wanted[3:])
    graph.replay()
    assert same_bits(found, graphs)


def test_adapting_and_predicting_in_a_graph():
    sines = Sines()
    finetune = pymeta.FineTune(
        sines.maml.model, loss="mse", optimizer=pymeta.Adam(0.01), epochs=3, batch_size=4,
        backend="native",
    ).to(DEVICE)  # fmt: skip

    def adapt(data):
        found = []
        for models in (sines.maml.adapt(*data[:2]), finetune(*data[:2])):
            found += [*models.parameters.values(), models(data[2])]
        return found

    wanted = {seed: copies(adapt(sines.data(seed))) for seed in range(2)}
    static = sines.data(0)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        adapt(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = adapt(static)
    for seed in (1, 0):
        for place, value in zip(static, sines.data(seed), strict=True):
            place.copy_(value)
        graph.replay()
        assert same_bits(found, wanted[seed])


def test_side_streams():
    """Calls on streams of their own, in flight together, do not disturb each other."""
    sines = Sines(300)
    batches = [sines.data(seed) for seed in range(6)]
    wanted = [copies(sines.step(data)) for data in batches]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for i, data in enumerate(batches):
            with torch.cuda.stream(streams[i % 3]):
                torch.cuda._sleep(2_000_000 * (3 - i % 3))
                found.append(sines.step(data))
        torch.cuda.synchronize()
        for got, right in zip(found, wanted, strict=True):
            assert same_bits(got, right)


def test_a_call_waits_for_what_its_stream_does_before():
    sines = Sines()
    wanted = copies(sines.step(sines.data(1)))
    values, places = sines.data(1), sines.data(2)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for place, value in zip(places, values, strict=True):
            place.copy_(value, non_blocking=True)
        got = sines.step(places)
    stream.synchronize()
    assert same_bits(got, wanted)


def ahead(kind: str):
    """A call of a kind, to be made again and again."""
    sines = Sines()
    model, data = sines.maml.model, sines.data(0)
    sizes = [10, 4, 7, 1, 9] * 5
    finetune = pymeta.FineTune(
        model, loss="mse", optimizer=pymeta.Adam(0.01), epochs=2, backend="native"
    )
    reptile = pymeta.Reptile(model, loss="mse", lr=0.01, steps=3, backend="native")
    return {
        "meta": lambda: sines.step(data),
        "padded": lambda: sines.maml(*data, support_sizes=sizes, query_sizes=sizes),
        "adapt": lambda: sines.maml.adapt(*data[:2])(data[2]),
        "finetune": lambda: finetune(*data[:2]),
        "reptile": lambda: torch.autograd.grad(reptile(*data[:2]).loss, list(model.parameters())),
    }[kind]


@pytest.mark.parametrize("kind", ["meta", "padded", "adapt", "finetune", "reptile"])
def test_the_host_runs_ahead(kind):
    """No call waits for the device, nor does anything around it that torch would call a wait."""
    call = ahead(kind)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # about half a second
        kept = call()
        done.record()
        waited = done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert kept is not None and not waited


def test_memory_is_steady():
    sines = Sines(1000)
    data = sines.data(0)
    for _ in range(5):
        sines.step(data)
        sines.maml.adapt(*data[:2])(data[2])
    torch.cuda.synchronize()

    def state():
        stats = torch.cuda.memory_stats(DEVICE)
        return torch.cuda.memory_allocated(DEVICE), stats["segment.all.allocated"]

    before = state()
    for _ in range(30):
        sines.step(data)
        sines.maml.adapt(*data[:2])(data[2])
    torch.cuda.synchronize()
    assert state() == before


# ---- memory that runs out, devices, errors ------------------------------------------------------


@pytest.mark.parametrize("what", ["results", "workspace"])
def test_out_of_memory_is_torchs_error_and_leaves_all_usable(what):
    name, tasks = ("W1", 65536) if what == "results" else ("W2", 512)
    problem = Problem(replace(WORKLOADS[name], tasks=tasks, input_gradients=False))
    module, there = module_of(problem, torch.float32), moved(problem)
    support, query = there.support.to(torch.float32), there.query.to(torch.float32)
    small = [v[:4] for v in (support.x, support.y, query.x, query.y)]
    wanted = module(*small).task_losses.clone()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    room = torch.cuda.memory_reserved(DEVICE) + (32 << 20)
    torch.cuda.set_per_process_memory_fraction(room / total, DEVICE)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            if what == "results":
                module.adapt(support.x, support.y)
            else:
                module(support.x, support.y, query.x, query.y)
        assert same_bits(module(*small).task_losses, wanted)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    whole = module(support.x, support.y, query.x, query.y)
    assert same_bits(whole.task_losses[:4], wanted)


def test_tensors_of_another_device_are_refused():
    module, data = classes()
    with pytest.raises(ValueError, match=r"xs: .*cuda:0.*cpu"):
        module(data[0].cpu(), *data[1:])
    with pytest.raises(ValueError, match=r"yq: .*cuda:0.*cpu"):
        module(*data[:3], data[3].cpu())


def test_what_the_executor_cannot_run_says_so():
    deep = mlp(*[3] * 20, dtype=torch.float32).to(DEVICE)
    with pytest.raises(ValueError, match=r'backend="native": .*layers'):
        module = pymeta.MAML(deep, loss="mse", lr=0.1, steps=1, backend="native")
        module(*on(DEVICE, batch(inputs=3, out=3, dtype=torch.float32)))


def test_a_driver_error_names_the_device_and_the_call():
    """An illegal address ends a CUDA context, so this is for another process."""
    program = """
import torch, pymeta
net = torch.nn.Sequential(torch.nn.Linear(3, 4)).cuda()
maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="native")
x, y = torch.randn(2, 5, 3).cuda(), torch.randn(2, 5, 4).cuda()
maml(x, y, x, y)
torch.cuda.synchronize()
plan = maml._plan
memory = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
for _ in range(3):
    try:
        plan.problem.predict(
            plan.dtype_code, [8, 8], [False, False], 2, (8, 0, 0, 5, 0, 0), 8,
            device=(0, 0, memory.data_ptr(), memory.numel()),
        )
    except RuntimeError as error:
        print(error, flush=True)
        break
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        pass  # the illegal address; from now on the driver refuses everything
import os
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600
    )
    assert done.stdout.startswith("cuda:0: predict: "), done.stdout + done.stderr


def test_explain_and_info_name_the_device():
    module, data = classes()
    assert module.explain().startswith("native-cuda sm_")
    module(*data)
    said = module.explain()
    assert said.startswith("native-cuda sm_") and "6 tasks" in said, said
    done = subprocess.run(
        [sys.executable, "-m", "pymeta.info"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert torch.cuda.get_device_name(0) in done.stdout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_every_device_has_the_same_results():
    sines = Sines()
    wanted = copies(sines.step(sines.data(0)))
    for ordinal in range(1, torch.cuda.device_count()):
        other = torch.device("cuda", ordinal)
        maml = copy.deepcopy(sines.maml).to(other)
        out = maml(*on(other, sines.data(0)))  # while cuda:0 is torch's current device
        found = torch.autograd.grad(out.loss, list(maml.parameters()))
        assert torch.cuda.current_device() == 0
        got = on(DEVICE, [out.loss.detach(), out.task_losses, out.predictions, *found])
        if torch.cuda.get_device_capability(other) == torch.cuda.get_device_capability(0):
            assert same_bits(got, wanted)


def test_most_networks_that_are_drawn_fit():
    """The strategies are shared: were they to grow past the executor, the counts would show it."""
    fits = collections.Counter()

    @settings(PROFILE, max_examples=40)
    @given(chains())
    def check(chain):
        problem = Problem(Case(chain if len(chain[0]) > 2 else (("linear", 2, 2, True), *chain)))
        fits[runs_natively(module_of(problem, torch.float32))] += 1

    check()
    assert fits[True] >= 30, fits
