"""The native kernels: every executor, instruction set and dtype against the float64 reference.

What a kernel must be is said in three ways here. Close to `pymeta.reference` in float64, on
networks, losses and options drawn by hypothesis (`Case`). Equal to the last bit wherever the
project promises it: whatever tasks come along, in any order, on any number of threads, on either
executor. And right by itself: closed forms, finite differences, gradcheck.
"""

import collections
import copy
import itertools
import math
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import LOSSES, assert_close, batch, gradients, mlp, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import (
    ACTIVATIONS,
    DTYPES,
    EPS,
    EXECUTORS,
    ISAS,
    OPTIMIZERS,
    PATHS,
    PROFILE,
    SOMETIMES,
    chains,
    flat,
    largest,
    lost,
    magnitudes,
    make_layer,
    same_bits,
    shaken,
    takes,
    using,
)
from torch import nn

import pymeta
from pymeta import native

# ---- cases ------------------------------------------------------------------------------------

# Where a module's value, slope or curvature jumps.
KINKS = {
    nn.ReLU: lambda m: 0.0,
    nn.LeakyReLU: lambda m: 0.0,
    nn.ELU: lambda m: 0.0,
    nn.Softplus: lambda m: m.threshold / m.beta,
}


@dataclass(frozen=True)
class Case:
    """One network and one call; everything random in it comes from `seed`."""

    chain: tuple[tuple, ...]
    loss: str = "mse"
    loss_options: bool = False
    tasks: int = 3
    support: int = 5
    query: int = 4
    form: str = "uniform"  # of the tasks: "uniform", "padded", "list"
    weights: bool = False
    steps: int = 2
    first_order: bool = False
    lr: str | None = None  # LearnableLR(per=...), or None: a number
    per_step: bool = False
    optimizer: str = "plain"  # one of OPTIMIZERS
    mask: int = 0  # which of the ways to adapt only some parameters
    input_gradients: bool = True
    seed: int = 0

    @property
    def inputs(self) -> int:
        return self.chain[0][1]

    @property
    def out(self) -> int:
        return next(layer[2] for layer in reversed(self.chain) if len(layer) > 2)

    @property
    def batch_norm(self) -> bool:
        return any(layer[0] == "batch_norm" for layer in self.chain)


def make_net(case: Case) -> nn.Sequential:
    """The network in float32: whatever is rounded is so for every dtype alike."""
    torch.manual_seed(case.seed)
    net = nn.Sequential(*map(make_layer, case.chain))
    for module in net:
        if isinstance(module, (nn.BatchNorm1d, nn.LayerNorm)):
            for p in module.parameters():
                nn.init.normal_(p, mean=0.5)
    return net


def make_loss(case: Case, dtype: torch.dtype) -> str | nn.Module:
    if not case.loss_options:
        return case.loss
    weight = torch.rand(case.out) + 0.25
    if case.loss == "cross_entropy":
        return nn.CrossEntropyLoss(weight=weight, label_smoothing=0.25, ignore_index=-7)
    if case.loss == "bce_with_logits":
        return nn.BCEWithLogitsLoss(weight=weight, pos_weight=weight.flip(0) * 3)
    return nn.HuberLoss(delta=0.5) if case.loss == "huber" else nn.MSELoss()


def make_sizes(case: Case, rows: int) -> list[int]:
    """Rows of each task: any number up to `rows`, zero among them; BatchNorm has no single row."""
    if case.form == "uniform":
        return [rows] * case.tasks
    sizes = torch.randint(0, rows + 1, (case.tasks,)).tolist()
    return [n if n != 1 or not case.batch_norm else 0 for n in sizes]


@dataclass
class Side:
    """The support or the query side of a case's tasks; x and y [T, rows, ...] hold padding too."""

    x: torch.Tensor
    y: torch.Tensor
    weights: torch.Tensor | None
    sizes: list[int]

    def to(self, dtype):
        y = self.y.to(dtype) if self.y.is_floating_point() else self.y
        weights = None if self.weights is None else self.weights.to(dtype)
        return Side(self.x.to(dtype), y, weights, self.sizes)

    def of(self, tasks: list[int]):
        weights = None if self.weights is None else self.weights[tasks]
        return Side(self.x[tasks], self.y[tasks], weights, [self.sizes[t] for t in tasks])


def make_side(case: Case, rows: int) -> Side:
    x = torch.randn(case.tasks, rows, case.inputs)
    y = targets(case.loss, case.tasks, rows, out=case.out, dtype=torch.float32)
    # Rows that do not count are in no batch statistics, and one row that does would be refused:
    # test_weightless_rows.py has these.
    left_out = 0.0 if case.batch_norm else 0.2
    if case.loss == "cross_entropy" and case.loss_options:
        y[torch.rand(y.shape) < left_out] = -7
    weights = torch.rand(case.tasks, rows) if case.weights else None
    if weights is not None:
        weights[torch.rand(weights.shape) < left_out] = 0.0
    return Side(x, y, weights, make_sizes(case, rows))


class Problem:
    """A case made concrete: a network, two sides, and the modules that compute on them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.net = make_net(case)
        names = [n for n, _ in self.net.named_parameters()]
        # all, those of even place, the last one, biases where there are any
        masks = (None, names[::2], names[-1:], [n for n in names if "bias" in n] or names[:1])
        self.adapt = masks[case.mask] if names else None
        self.rate = float(torch.tensor(0.05 + 0.15 * torch.rand(()).item()))
        self.loss = make_loss(case, torch.float32)
        self.support = make_side(case, case.support)
        self.query = make_side(case, case.query)
        self.lr_values = torch.rand(100_000) * 0.2

    def module(self, dtype: torch.dtype, backend: str = "native") -> pymeta.MAML:
        case = self.case
        net = copy.deepcopy(self.net).to(dtype)
        lr = self.rate
        if case.lr:
            lr = pymeta.LearnableLR(lr, case.lr, case.per_step)
        module = pymeta.MAML(
            net, loss=self.loss, optimizer=OPTIMIZERS[case.optimizer](lr), steps=case.steps,
            first_order=case.first_order, adapt=self.adapt, backend=backend,
        )  # fmt: skip
        if case.lr:
            with torch.no_grad():
                module.lr.copy_(self.lr_values[: module.lr.numel()].view_as(module.lr))
        return module

    def results(self, module: pymeta.MAML, tasks: list[int] | None = None) -> dict:
        """Everything a call returns, as {name: tensor}; the per-task ones are cut to size."""
        case, dtype = self.case, next(module.model.parameters()).dtype
        tasks = list(range(case.tasks)) if tasks is None else tasks
        support, query = self.support.of(tasks).to(dtype), self.query.of(tasks).to(dtype)
        inputs = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if case.input_gradients:
            inputs |= {"xs": support.x.requires_grad_(), "xq": query.x.requires_grad_()}
        arguments, options = self.arguments(support, query)
        out = module(*arguments, **options)
        found = dict(zip(inputs, gradients(out.loss, *inputs.values()), strict=True))
        models = module.adapt(
            *arguments[:2], **{k: v for k, v in options.items() if k.startswith("support")}
        )
        return {
            "loss": out.loss.detach(),
            "task_losses": out.task_losses,
            "predictions": [p[:n] for p, n in zip(out.predictions, query.sizes, strict=True)],
            "gradients": {n: g for n, g in found.items() if n not in ("lr", "xs", "xq")},
            "lr": found.get("lr"),
            "xs": found.get("xs"),
            "xq": found.get("xq"),
            "adapted": {n: v for n, v in models.parameters.items() if n in module._plan.adapted},
        }

    def arguments(self, support: Side, query: Side) -> tuple[list, dict]:
        """What MAML is called with, in the case's form."""
        arguments, options = [], {}
        for name, side in (("support", support), ("query", query)):
            values = [side.x, side.y, side.weights]
            if self.case.form == "list":
                values = [
                    None if v is None else [v[t, :n] for t, n in enumerate(side.sizes)]
                    for v in values
                ]
            elif self.case.form == "padded":
                options[f"{name}_sizes"] = side.sizes
            arguments += values[:2]
            options[f"{name}_weights"] = values[2]
        return arguments, options


@st.composite
def cases(draw, tasks=(1, 2, 3, 5, 17, 20), chain=None):
    chain = draw(chains() if chain is None else chain)
    lr = draw(st.sampled_from([None, None, "network", "layer", "parameter"]))
    if not any(len(layer) > 2 and (layer[0] == "linear" or layer[3]) for layer in chain):
        chain = (("linear", chain[0][1], chain[0][1], True), *chain)
    return Case(
        chain=chain,
        loss=draw(st.sampled_from(LOSSES)),
        loss_options=draw(st.booleans()),
        tasks=draw(st.sampled_from(tasks)),
        support=draw(st.integers(2, 8)),
        query=draw(st.integers(2, 8)),
        form=draw(st.sampled_from(["uniform", "uniform", "padded", "list"])),
        weights=draw(st.booleans()),
        steps=draw(st.integers(0, 4)),
        first_order=draw(SOMETIMES),
        lr=lr,
        per_step=lr is not None and draw(st.booleans()),
        optimizer=draw(st.sampled_from(["plain", *sorted(OPTIMIZERS)])),
        mask=draw(st.sampled_from([0, 0, 1, 2, 3])),
        input_gradients=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


# ---- how close is close -----------------------------------------------------------------------


def longest_sum(case: Case) -> int:
    """The most terms that a chain of sums in this case adds up."""
    widths = sum(max(layer[1], layer[2]) for layer in case.chain if len(layer) > 2)
    passes = 1 if case.first_order else 3
    return (widths + case.support + case.query) * (passes * case.steps + 2)


class Wanted:
    """The float64 reference of a problem, and how far from it rounding can take an honest kernel.

    To first order an algorithm's error is its machine epsilon times a condition number, whatever
    the order of its sums: the roundings enter at the same places. The condition of a group of
    results (all predictions, all gradients, ...) is measured by what the same formulas lose in
    float32 in torch, max |torch32 - reference| / eps32, and holds for float64 as for float32.
    Two such maxima over many roundings differ by a few standard deviations at most: 16 for that.
    torch's results are `shaken` there, each of them by up to an eps32 at random: where all that a
    group adds up cancels, as gradients in front of a normalisation do, float32 may well have lost
    nothing, and the reference be 0. As a measured loss can be small by luck all the same, the
    bound has a floor: the rounding of a sum of n terms, which grows as sqrt(n) eps, relative to
    the group's largest value (and, for gradients, one eps of the largest gradient of all, since
    they are made from the same deltas).

        |native - reference| <= 16 eps (condition + sqrt(n) max|group| + max|all|) steepness

    A normalisation subtracts the mean, which leaves a relative error of eps |mean| / std behind.
    In which direction depends on how its derivative is written, and the reference writes it
    differently; so the largest |mean| / std of the whole way, where above 1, is the `steepness`.
    """

    FACTOR = 16

    def __init__(self, problem: Problem, steepness: float = 1.0) -> None:
        self.problem, self.steepness = problem, steepness
        self.reference = problem.results(problem.module(torch.float64, "torch"))
        with shaken():
            single = problem.results(problem.module(torch.float32, "torch"))
        terms = math.sqrt(longest_sum(problem.case))
        groups = [n for n, v in self.reference.items() if v is not None]
        overall = max(
            largest(self.reference[n]) for n in ("gradients", "xs", "xq", "lr") if n in groups
        )
        self.magnitudes = {}
        for name in groups:
            every = overall if name in ("gradients", "xs", "xq", "lr") else 0.0
            condition = lost(name, single, self.reference)
            self.magnitudes[name] = condition + terms * largest(self.reference[name]) + every

    def bound(self, name: str, dtype: torch.dtype) -> float:
        return self.FACTOR * EPS[dtype] * self.steepness * self.magnitudes[name]

    def differences(self, got: dict, dtype: torch.dtype) -> list[str]:
        """What is not within its bound, in words."""
        found = []
        for name in self.magnitudes:
            difference = flat(got[name]) - flat(self.reference[name])
            assert difference.shape == flat(self.reference[name]).shape
            error, bound = largest(difference), self.bound(name, dtype)
            if not error <= bound:  # a NaN is not within any bound
                found.append(f"{name}: off by {error:.2e}, bound {bound:.2e}")
        return found

    def check(self, dtypes=DTYPES, paths=PATHS) -> None:
        wrong = []
        for dtype in dtypes:
            module = self.problem.module(dtype)
            for isa, executor in paths:
                if not takes(executor, module):
                    continue
                with using(isa, executor):
                    got = self.problem.results(module)
                wrong += [f"{isa} {executor} {dtype}: {d}" for d in self.differences(got, dtype)]
        assert not wrong, "\n".join([str(self.problem.case), *wrong])


def is_kinked(case: Case) -> bool:
    names = {layer[0] for layer in case.chain}
    kinked = {n for n, make in ACTIVATIONS.items() if type(make()) in KINKS}
    return bool(names & kinked) or case.loss == "huber"


def walk(problem: Problem) -> tuple[float, float]:
    """What the reference meets on its way: (how near a kink, how steep a normalisation).

    The first is the smallest |z - kink| / max |z|: on the two sides of a kink derivatives differ
    however exact the arithmetic. An exact hit, as the zeros behind a ReLU are for the next one, is
    the same for everybody and does not count. The second is the largest |mean| / std, at least 1.
    """
    case, found = problem.case, {"nearest": math.inf, "steepest": 1.0}

    def look_for_kinks(z: torch.Tensor, kink: float) -> None:
        gaps = (z.detach().abs() if kink == 0 else (z.detach() - kink).abs()).flatten()
        gaps = gaps[gaps > 0]
        if gaps.numel():
            gap = float(gaps.min() / max(float(z.abs().max()), abs(kink)))
            found["nearest"] = min(found["nearest"], gap)

    def look_at_means(z: torch.Tensor, axis: int, eps: float) -> None:
        std = (z.var(axis, unbiased=False) + eps).sqrt()
        found["steepest"] = max(found["steepest"], float((z.mean(axis).abs() / std).max()))

    module = problem.module(torch.float64)
    net = copy.deepcopy(module.model)
    for layer in net:
        if type(layer) in KINKS:
            kink = KINKS[type(layer)](layer)
            layer.register_forward_pre_hook(
                lambda m, args, kink=kink: look_for_kinks(args[0], kink)
            )
        elif isinstance(layer, (nn.BatchNorm1d, nn.LayerNorm)):
            axis = 0 if isinstance(layer, nn.BatchNorm1d) else 1
            layer.register_forward_pre_hook(
                lambda m, args, axis=axis: look_at_means(args[0].detach(), axis, m.eps)
            )
    support, query = problem.support.to(torch.float64), problem.query.to(torch.float64)
    arguments, options = problem.arguments(support, query)
    options = {k: v for k, v in options.items() if k.startswith("support")}
    for step in range(case.steps + 1):
        models = module.adapt(*arguments[:2], steps=step, **options)
        for side in (support, query) if step == case.steps else (support,):
            for t, rows in enumerate(side.sizes):
                if rows == 0:
                    continue
                values = {n: v[t] for n, v in models.parameters.items()}
                y = torch.func.functional_call(net, values, (side.x[t, :rows],))
                if case.loss == "huber":
                    delta = problem.loss.delta if case.loss_options else 1.0
                    look_for_kinks((y - side.y[t, :rows]).abs(), delta)
    return found["nearest"], found["steepest"]


def compare(case: Case) -> tuple[torch.dtype, ...]:
    """One case on every path; in float32 only where no kink is within reach of its rounding.

    Returns the dtypes that were compared.
    """
    problem, steepest = Problem(case), 1.0
    dtypes = DTYPES
    if is_kinked(case) or any(layer[0].endswith("norm") for layer in case.chain):
        nearest, steepest = walk(problem)
        if nearest < 64 * EPS[torch.float32]:
            dtypes = (torch.float64,)
    Wanted(problem, steepest).check(dtypes)
    return dtypes


def test_random_cases_against_the_reference():
    counts = collections.Counter()

    @settings(PROFILE, max_examples=100)
    @given(cases())
    def check(case):
        counts.update(compare(case))

    check()
    assert counts[torch.float64] >= 100
    assert counts[torch.float32] >= 80  # the cases that a kink rules out are the exception


def test_the_comparison_can_fail():
    """The other order of gradient, a step missing, an lr a little off: all are out of bounds."""
    case = Case((("linear", 3, 8, True), ("tanh",), ("linear", 8, 2, True)), seed=4)
    wanted = Wanted(Problem(case))
    for change in ({"first_order": True}, {"steps": 1}):
        other = Problem(replace(case, **change))
        got = other.results(other.module(torch.float32))
        assert wanted.differences(got, torch.float32)
    slower = Problem(case)
    slower.rate *= 1 - 1e-3
    assert wanted.differences(slower.results(slower.module(torch.float32)), torch.float32)
    slower.rate = wanted.problem.rate * (1 - 1e-12)
    assert wanted.differences(slower.results(slower.module(torch.float64)), torch.float64)


LIN = "linear"


def deep(count: int, width: int, act: str) -> tuple:
    layers = [((LIN, width, width, True), (act,)) for _ in range(count - 1)]
    return (*itertools.chain(*layers), (LIN, width, 3, True))


FIXED = {
    "width 1": Case(((LIN, 1, 1, True), ("tanh",), (LIN, 1, 1, True)), tasks=20, steps=3),
    "one weight": Case(((LIN, 1, 1, False),), tasks=5, steps=4),
    "width 1000": Case(((LIN, 7, 1000, True), ("relu",), (LIN, 1000, 5, True)), tasks=2, steps=1),
    "1000 inputs, gradients to them": Case(((LIN, 1000, 3, True),), tasks=3),
    "1000 outputs": Case(((LIN, 3, 1000, True),), loss="cross_entropy", tasks=2, steps=1),
    "20 layers": Case(deep(20, 6, "gelu"), loss="cross_entropy", tasks=3),
    "20 layers, 20 tasks": Case(deep(20, 9, "silu"), loss="cross_entropy", tasks=20, steps=1),
    "one row": Case(((LIN, 5, 6, True), ("silu",), (LIN, 6, 2, True)), support=1, query=1),
    "no support": Case(((LIN, 5, 6, True), ("tanh",), (LIN, 6, 2, True)), support=0, weights=True),
    "no query": Case(((LIN, 5, 6, True), ("tanh",), (LIN, 6, 2, True)), query=0),
    "no rows": Case(((LIN, 5, 6, True), ("tanh",), (LIN, 6, 2, True)), support=0, query=0),
    "two rows of BatchNorm": Case(
        ((LIN, 5, 6, True), ("batch_norm", 6, 6, True), ("tanh",), (LIN, 6, 2, True)),
        support=2, query=2, tasks=18,
    ),
    # Nothing is left of these but what rounding leaves: gradients in front of a normalisation that
    # has one feature, or constant rows, cancel, and are 0 in one order of sums and not in another.
    "cancelled, 0 in the reference": Case(
        ((LIN, 1, 1, True), ("layer_norm", 1, 1, True), ("batch_norm", 1, 1, True),
         ("batch_norm", 1, 1, False)), tasks=2, support=2, query=2, steps=0, seed=3,
    ),
    "cancelled, a little in the reference": Case(
        ((LIN, 1, 1, True), ("layer_norm", 1, 1, False), ("batch_norm", 1, 1, True),
         ("batch_norm", 1, 1, False)), tasks=2, support=2, query=2, steps=0, seed=0,
    ),
    "200 rows": Case(
        ((LIN, 5, 16, True), ("batch_norm", 16, 16, True), ("tanh",), (LIN, 16, 5, True)),
        support=200, query=130, tasks=17, form="list", loss="cross_entropy", steps=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_fixed_cases_against_the_reference(name):
    compare(FIXED[name])


@pytest.mark.parametrize("isa, executor", PATHS)
def test_no_tasks(isa, executor):
    """The mean over nothing is 0 here, and so is its gradient."""
    with using(isa, executor):
        for chain in (FIXED["one row"].chain, FACTORED):
            problem = Problem(Case(chain, tasks=0, lr="network"))
            got = problem.results(problem.module(torch.float32))
            assert got["loss"] == 0 and got["task_losses"].shape == (0,)
            assert all(v.shape[0] == 0 for v in got["adapted"].values())
            assert not any(g.any() for g in got["gradients"].values())
            models = problem.module(torch.float32).adapt(problem.support.x, problem.support.y)
            assert models(problem.query.x).shape == (0, problem.case.query, problem.case.out)


# ---- the factored first layer -------------------------------------------------------------------

FACTORED = ((LIN, 70, 18, True), ("tanh",), (LIN, 18, 3, True))


@st.composite
def factored_cases(draw):
    """A wide first layer and one lr for all: what rows never materialises where rows are few."""
    width = draw(st.sampled_from([64, 65, 100, 129]))
    out = draw(st.sampled_from([16, 17, 33]))
    tail = draw(chains(max_layers=1))
    bridge = (draw(st.sampled_from(["relu", "tanh"])),), (LIN, out, tail[0][1], True)
    case = draw(
        cases(tasks=(1, 3, 9, 40), chain=st.just(((LIN, width, out, True), *bridge, *tail)))
    )
    changes = {
        "support": draw(st.sampled_from([2, 8, 16, 17, 24])),
        "lr": draw(st.sampled_from([None, None, "network"])),
        "per_step": False,
        "optimizer": draw(st.sampled_from(["plain", "plain", "plain", "momentum"])),
        "input_gradients": False,
        "tasks": case.tasks if case.form == "uniform" else min(case.tasks, 9),
    }
    return replace(case, **changes)


@settings(PROFILE, max_examples=25)
@given(factored_cases())
def test_factored_first_layer_against_the_reference(case):
    compare(case)


def is_factored(problem: Problem, rows: int) -> bool:
    plan = problem.module(torch.float32)._plan
    schedule = (problem.case.steps, -1, 0, 0, 0, 0)
    found = plan.problem.plan(4, "meta", schedule, 8, rows, rows, second_order=True)
    return found["factored"]


def test_factored_and_unfactored_tasks_in_one_call():
    """4 * rows <= inputs decides, task by task."""
    case = Case(FACTORED, tasks=24, support=40, query=6, form="list", lr="network", steps=3,
                input_gradients=False, loss="cross_entropy", seed=5)  # fmt: skip
    problem = Problem(case)
    few = [4 * n <= 70 for n in problem.support.sizes]
    assert any(few) and not all(few) and is_factored(problem, 40)
    Wanted(problem).check()


def test_factored_tasks_in_several_waves():
    """Thousands of query rows overflow the memory that the tasks of one wave share."""
    case = Case(((LIN, 64, 256, True), ("tanh",), (LIN, 256, 1, True)), tasks=20, support=9,
                query=2000, steps=1, input_gradients=False)  # fmt: skip
    problem = Problem(case)
    assert is_factored(problem, 9)
    Wanted(problem).check(dtypes=(torch.float32,), paths=[(native.isas()[-1], "rows")])


# ---- independent of the reference ---------------------------------------------------------------

SMOOTH = {
    "mlp": ((LIN, 3, 9, True), ("tanh",), (LIN, 9, 2, True)),
    "norms": (
        ("layer_norm", 3, 3, True), (LIN, 3, 17, False), ("batch_norm", 17, 17, True), ("gelu",),
        (LIN, 17, 5, True), ("layer_norm", 5, 5, True), ("sigmoid",), (LIN, 5, 2, True),
    ),
    "smooth": ((LIN, 3, 6, True), ("softplus",), ("silu",), (LIN, 6, 6, True), ("gelu_tanh",)),
}  # fmt: skip


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(
    "loss, optimizer",
    [
        ("mse", "plain"), ("cross_entropy", "plain"), ("bce_with_logits", "plain"),
        ("mse", "nesterov"), ("cross_entropy", "adam, decay"), ("bce_with_logits", "adamw"),
    ],
)  # fmt: skip
def test_finite_differences_of_the_native_loss(isa, executor, name, loss, optimizer):
    """The loss along a random line through parameters, lr and inputs.

    A central difference with step h errs by h^2 times a third derivative, which the difference
    at 2h shows (theirs is four times as large), and by the rounding of the loss over h.
    """
    case = Case(SMOOTH[name], loss=loss, loss_options=True, tasks=5, form="list", lr="parameter",
                per_step=True, steps=3, weights=True, optimizer=optimizer, seed=3)  # fmt: skip
    problem = Problem(case)
    module = problem.module(torch.float64)
    support, query = problem.support.to(torch.float64), problem.query.to(torch.float64)
    inputs = [*module.parameters(), support.x.requires_grad_(), query.x.requires_grad_()]
    directions = [torch.randn_like(v) for v in inputs]
    start = [v.detach().clone() for v in inputs]

    def loss_at(step):
        with torch.no_grad():
            for v, s, d in zip(inputs, start, directions, strict=True):
                v.copy_(s + step * d)
        arguments, options = problem.arguments(support, query)
        return module(*arguments, **options).loss

    with using(isa, executor):
        value = loss_at(0.0)
        slope = sum(
            float((g * d).sum()) for g, d in zip(gradients(value, *inputs), directions, strict=True)
        )
        with torch.no_grad():
            near, far = (float(loss_at(h) - loss_at(-h)) / (2 * h) for h in (1e-5, 2e-5))
    rounding = 64 * EPS[torch.float64] * (1 + abs(float(value.detach()))) / 1e-5
    assert abs(slope) > 1e3 * rounding
    assert abs(slope - near) <= abs(near - far) + rounding


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_regression_has_its_closed_form(isa, executor, dtype):
    """w' = w - lr A'(A w - y) 2/n, K times; its Jacobian is (1 - lr 2/n A'A)^K."""
    tasks, rows, width, lr, steps = 20, 6, 5, 0.125, 3
    xs, ys, xq, yq = batch(tasks=tasks, support=rows, query=8, inputs=width, out=1, dtype=dtype)
    net = nn.Linear(width, 1, bias=False).to(dtype)
    module = pymeta.MAML(nn.Sequential(net), loss="mse", lr=lr, steps=steps, backend="native")
    with using(isa, executor):
        out = module(xs, ys, xq, yq)
        got = gradients(out.loss, net.weight)[0]
        adapted = module.adapt(xs, ys).parameters["0.weight"]
    a, y, b, z = (v.double() for v in (xs, ys, xq, yq))
    w = net.weight.detach().double().T.expand(tasks, width, 1)
    for _ in range(steps):
        w = w - lr * 2 / rows * a.mT @ (a @ w - y)
    shrink = torch.eye(width, dtype=torch.float64) - lr * 2 / rows * a.mT @ a
    wanted = torch.linalg.matrix_power(shrink, steps).mT @ (2 / 8 * b.mT @ (b @ w - z))
    assert_close(adapted, w.mT, terms=width * rows)
    assert_close(got, wanted.mean(0).T, terms=width * rows * tasks)
    assert_close(out.task_losses, (b @ w - z).square().mean((1, 2)), terms=width * rows)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradcheck(executor):
    net = mlp(2, 3, 2)
    xs, ys, xq, yq = batch("cross_entropy", tasks=2, support=3, query=2)
    rate = pymeta.LearnableLR(0.1, "layer", per_step=True)
    module = pymeta.MAML(net, loss="cross_entropy", lr=rate, steps=2, backend="native")
    inputs = (*module.parameters(), xs.requires_grad_(), xq.requires_grad_())
    with using(executor=executor):
        assert torch.autograd.gradcheck(lambda *_: module(xs, ys, xq, yq).loss, inputs)


# ---- the same to the last bit -------------------------------------------------------------------


def of_tasks(results: dict, tasks) -> list[torch.Tensor]:
    """All that belongs to some tasks alone."""
    predictions = [results["predictions"][t] for t in tasks]
    adapted = [v[list(tasks)] for v in results["adapted"].values()]
    return [results["task_losses"][list(tasks)], *predictions, *adapted]


def meta_gradient(results: dict) -> list[torch.Tensor]:
    extra = [results[n] for n in ("lr", "xs", "xq") if results[n] is not None]
    return [results["loss"], *results["gradients"].values(), *extra]


@settings(PROFILE)
@given(cases(tasks=(1, 3, 8, 17, 33, 70)), st.sampled_from(DTYPES), ISAS)
def test_a_tasks_bits_are_its_own(case, dtype, isa):
    """Alone, permuted, among others, on either executor, on any number of threads."""
    problem = Problem(case)
    module = problem.module(dtype)
    every = list(range(case.tasks))
    shuffled = torch.randperm(case.tasks).tolist()
    with using(isa, "rows", 1):
        wanted = problem.results(module)
    for executor in EXECUTORS:
        with using(isa, executor, 1):
            one_thread = problem.results(module)
            assert same_bits(of_tasks(one_thread, every), of_tasks(wanted, every)), executor
            permuted = problem.results(module, shuffled)
            assert same_bits(of_tasks(permuted, every), of_tasks(wanted, shuffled)), executor
            for t in {0, case.tasks // 2, case.tasks - 1}:
                alone = problem.results(module, [t])
                assert same_bits(of_tasks(alone, [0]), of_tasks(wanted, [t])), executor
        for threads in (2, 3, 5):
            with using(isa, executor, threads):
                got = problem.results(module)
            assert same_bits(of_tasks(got, every), of_tasks(wanted, every)), (executor, threads)
            assert same_bits(meta_gradient(got), meta_gradient(one_thread)), (executor, threads)
        if case.tasks == 1 and case.lr is None:  # nothing is summed over tasks
            assert same_bits(meta_gradient(one_thread), meta_gradient(wanted)), executor


@settings(PROFILE, max_examples=15)
@given(factored_cases(), st.sampled_from(DTYPES), ISAS)
def test_a_factored_tasks_bits_are_its_own(case, dtype, isa):
    """As above, on the one executor that factors the first layer."""
    problem = Problem(case)
    module = problem.module(dtype)
    every = list(range(case.tasks))
    shuffled = torch.randperm(case.tasks).tolist()
    with using(isa, "rows", 1):
        wanted = problem.results(module)
        permuted = problem.results(module, shuffled)
        assert same_bits(of_tasks(permuted, every), of_tasks(wanted, shuffled))
        for t in {0, case.tasks - 1}:
            assert same_bits(of_tasks(problem.results(module, [t]), [0]), of_tasks(wanted, [t]))
    for executor, threads in (("rows", 2), ("rows", 3), ("auto", 2)):
        with using(isa, executor, threads):
            got = problem.results(module)
        assert same_bits(of_tasks(got, every), of_tasks(wanted, every))
        # the sum over tasks is the executor's, and an unfactored case may go to the other one
        if executor == "rows" or is_factored(problem, case.support):
            assert same_bits(meta_gradient(got), meta_gradient(wanted))


@settings(PROFILE, max_examples=40)
@given(cases(tasks=(2, 5, 17, 33)), st.sampled_from(DTYPES), ISAS)
def test_an_adapted_models_predictions_are_the_calls_own(case, dtype, isa):
    """predict() on what adapt() returned is the query pass of a call, in bits."""
    problem = Problem(case)
    module = problem.module(dtype)
    support, query = problem.support.to(dtype), problem.query.to(dtype)
    arguments, options = problem.arguments(support, query)
    kept = {k: v for k, v in options.items() if k.startswith("support")}
    with using(isa, "rows"):
        wanted = problem.results(module)["predictions"]
    for executor in EXECUTORS:
        with using(isa, executor):
            models = module.adapt(*arguments[:2], **kept)
            sizes = query.sizes if case.form == "padded" else None
            got = models(arguments[2], query_sizes=sizes)
        got = [p[:n] for p, n in zip(got, query.sizes, strict=True)]
        assert same_bits(got, wanted), executor


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_earlier_calls_left_in_memory_does_not_matter(executor):
    """Working memory is handed from call to call; here full of NaN."""
    problem = Problem(Case(((LIN, 3, 5, True), ("tanh",), (LIN, 5, 2, True))))
    module = problem.module(torch.float32)
    spoilt = [torch.full_like(v, math.nan) for v in batch(inputs=3, dtype=torch.float32)]
    support, query = problem.support, problem.query
    with using(executor=executor, threads=1):
        wanted = problem.results(module)
        models = module.adapt(support.x, support.y)
        for width in range(60, 220, 20):  # more sizes than the core keeps blocks
            wide = mlp(3, width, 2, act=nn.Softplus, dtype=torch.float32)
            pymeta.MAML(wide, loss="mse", lr=0.1, steps=3, backend="native")(*spoilt)
        assert same_bits(list(models(query.x)), wanted["predictions"])
        got = problem.results(module)
        assert same_bits(of_tasks(got, range(3)), of_tasks(wanted, range(3)))
        assert same_bits(meta_gradient(got), meta_gradient(wanted))


# ---- NaN, infinity, huge numbers ----------------------------------------------------------------

POISONS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 3e38}


@settings(PROFILE)
@given(
    cases(tasks=(2, 5, 17, 33)),
    st.sampled_from(sorted(POISONS)),
    st.sampled_from(["xs", "ys", "xq"]),
    st.sampled_from(DTYPES),
    ISAS,
)
def test_a_diverged_task_is_its_own_affair(case, poison, where, dtype, isa):
    problem = Problem(case)
    side = problem.query if where == "xq" else problem.support
    spoiled = int(torch.randint(case.tasks, ()))
    others = [t for t in range(case.tasks) if t != spoiled]
    module = problem.module(dtype)
    paths = [(e, n) for e in EXECUTORS for n in (1, 2)]
    wanted = {}
    for path in paths:
        with using(isa, *path):
            wanted[path] = problem.results(module)
    values = side.y if where == "ys" and side.y.is_floating_point() else side.x
    no_probability = values is side.y and case.loss == "bce_with_logits"  # but for NaN, an error
    values[spoiled] = math.nan if no_probability else POISONS[poison]
    for path in paths:
        with using(isa, *path):
            got = problem.results(module)
        assert same_bits(of_tasks(got, others), of_tasks(wanted[path], others)), path
        for name in ("xs", "xq"):
            if case.input_gradients:
                assert same_bits(got[name][others], wanted[path][name][others]), path


@pytest.mark.parametrize("isa, executor", PATHS)
def test_a_factored_task_that_diverges_is_its_own_affair(isa, executor):
    problem = Problem(Case(FACTORED, tasks=9, input_gradients=False))
    module, others = problem.module(torch.float32), [0, 1, 2, 3, 4, 6, 7, 8]
    with using(isa, executor):
        wanted = problem.results(module)
        problem.support.x[5, 2] = math.nan
        got = problem.results(module)
    assert same_bits(of_tasks(got, others), of_tasks(wanted, others))
    assert got["task_losses"][5].isnan() and got["gradients"]["model.0.weight"].isnan().all()


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_of_nan_and_infinity_are_torchs(isa, executor, dtype, name):
    """Values and slopes, behind a linear layer (whose store does the ReLU) and behind another.

    One output alone: the sum over a row would be NaN for infinities of both signs.
    """
    numbers = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30, 1.0, -1.0]
    for extra in ([], [ACTIVATIONS[name]()]):
        net = nn.Sequential(nn.Linear(1, 1), ACTIVATIONS[name](), *extra).to(dtype)
        with torch.no_grad():
            net[0].weight.fill_(1.0)
            net[0].bias.zero_()
        x = torch.tensor(numbers, dtype=dtype).view(-1, 1, 1).requires_grad_()
        y = torch.full_like(x, -3e38)  # huber's slope is 1 here whatever the output
        module = pymeta.MAML(net, loss="huber", lr=0.1, steps=0, backend="native")
        with using(isa, executor):
            out = module(x, y, x, y)
        wanted = net.double()(x.detach().double())  # in float32 torch's own GELU(inf) is NaN
        assert torch.equal(out.predictions.isnan(), wanted.isnan())
        usable = ~wanted.isnan()
        assert torch.allclose(
            out.predictions[usable].double(), wanted[usable], rtol=16 * EPS[dtype]
        )


@pytest.mark.parametrize("isa", native.isas())
def test_infinity_is_the_same_on_both_executors(isa):
    """Predictions of infinite rows are torch's: what only pads a vector adds no 0 * infinity."""
    net = mlp(3, 5, 2, act=nn.ReLU, dtype=torch.float32)
    with torch.no_grad():
        for p in net.parameters():
            p.abs_()
    xs, ys, xq, yq = batch(inputs=3, dtype=torch.float32)
    xq[1] = math.inf
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=0, backend="native")
    for executor in EXECUTORS:
        with using(isa, executor):
            got = module(xs, ys, xq, yq).predictions
        assert torch.equal(got[1], net(xq[1])) and (got[1] == math.inf).all(), executor


LACKING = {
    # over the zeros of a row that is not there: 1 / sqrt(0)
    "LayerNorm without eps": lambda net, data: setattr(net[1], "eps", 0.0),
    # the square of an error there would overflow
    "large outputs": lambda net, data: [v.add_(1e25) for v in (net[-1].bias, data[1], data[3])],
    # a task that has diverged, and no query rows
    "diverged": lambda net, data: data[0][1].fill_(math.nan),
}  # fmt: skip


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("name", LACKING)
def test_rows_that_a_shorter_task_lacks_are_not_there(isa, executor, name):
    """Whatever a network makes of them: nothing of it reaches a loss or a gradient."""
    net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2))
    data = batch(tasks=4, inputs=3, dtype=torch.float32)
    with torch.no_grad():
        LACKING[name](net, data)
    sizes, spoiled = (
        {"support_sizes": [5, 2, 0, 3], "query_sizes": [4, 0, 3, 2]},
        name == "diverged",
    )
    rate = 0.0 if name == "large outputs" else 0.1
    modules = [
        pymeta.MAML(net, loss="mse", lr=rate, steps=1, backend=b) for b in ("native", "torch")
    ]
    with using(isa, executor):
        got = modules[0](*data, **sizes)
        found = gradients(got.loss, *net.parameters())
    wanted = modules[1](*data, **sizes)
    assert got.task_losses[1] == 0 and wanted.task_losses[1] == 0
    assert got.task_losses.isfinite().all()
    assert torch.allclose(got.task_losses, wanted.task_losses, rtol=1e-3)
    if not spoiled:
        assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("isa, executor", PATHS)
def test_relu_of_nan_is_nan(isa, executor):
    for net in (
        mlp(3, 20, 20, 7, act=nn.ReLU),
        nn.Sequential(nn.Linear(3, 18), nn.ReLU()).double(),
    ):
        module = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="native")
        xs, ys, xq, yq = batch(tasks=3, inputs=3, out=net[-1].out_features if len(net) > 2 else 18)
        xq[1, 2, 0] = math.nan
        with using(isa, executor):
            out = module(xs, ys, xq, yq)
        assert out.predictions[1, 2].isnan().all() and out.task_losses[1].isnan()
        assert out.predictions[1, [0, 1, 3]].isfinite().all()
        assert out.predictions[[0, 2]].isfinite().all()


# ---- elementary functions -----------------------------------------------------------------------


def grid(dtype: torch.dtype) -> torch.Tensor:
    """4096 numbers: dense where functions bend, both tails, zeros, denormals."""
    tiny = torch.finfo(dtype).tiny
    parts = [
        torch.linspace(-12, 12, 2000, dtype=torch.float64),
        torch.linspace(-120, 120, 1000, dtype=torch.float64),
        *(s * torch.logspace(math.log10(tiny) - 2, 1, 500, dtype=torch.float64) for s in (1, -1)),
        torch.tensor([0.0, -0.0, tiny, -tiny], dtype=torch.float64),
    ]
    values = torch.cat(parts).to(dtype)
    return torch.cat([values, torch.full((4096 - len(values),), 0.5, dtype=dtype)])


def wanted_derivatives(name: str, z: torch.Tensor) -> list[torch.Tensor]:
    """Value, slope and curvature in float64: torch's, where those are exact in the tails."""
    z = z.double().clone().requires_grad_()
    f = ACTIVATIONS[name]().double()
    value = f(z)
    slope = torch.autograd.grad(value.sum(), z, create_graph=True)[0]
    curvature = torch.zeros_like(z)
    if slope.requires_grad:
        curvature = torch.autograd.grad(slope.sum(), z)[0]
    if name == "gelu":  # torch's 1 + erf loses the lower tail
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        cdf = 0.5 * torch.special.erfc(-z / math.sqrt(2))
        value, slope, curvature = z * cdf, cdf + z * density, density * (2 - z * z)
    if name == "silu":
        value = z * torch.sigmoid(z)
    return [v.detach() for v in (value, slope, curvature)]


def native_derivatives(name: str, z: torch.Tensor) -> list[torch.Tensor]:
    """Value, slope and curvature out of a chain of one Linear and the activation.

    4096 tasks of one row each, a power of two. Huber's slope is -delta = -1 for targets far above.
    No steps: predictions are f(z), and the gradient towards xq is -f'(z). One step of lr 1 on the
    bias moves it by f'(z_support); the gradient towards xs is then f''(z_support) times that
    towards xq, whatever the query is.
    """
    net = nn.Sequential(nn.Linear(1, 1), ACTIVATIONS[name]()).to(z.dtype)
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.zero_()
    xs = z.clone().view(-1, 1, 1).requires_grad_()
    y = torch.full_like(xs, 1e30).detach()
    module = pymeta.MAML(net, loss="huber", lr=1.0, steps=1, adapt=["0.bias"], backend="native")
    out = module(xs, y, xs, y, steps=0)
    slope = -gradients(out.loss, xs)[0] * len(z)
    # wherever f' moves it, no activation is flat at a query near 0.25
    xq = torch.full_like(xs, 0.25).detach().requires_grad_()
    second = gradients(module(xs, y, xq, y).loss, xs, xq)
    return [out.predictions.flatten(), slope.flatten(), (second[0] / second[1]).flatten()]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_activations(name, dtype):
    """Within 8 eps of the magnitudes each formula adds up (a few ulp), and 16 of float64's own.

    A sigmoid or an exponential below the smallest normal number may be flushed to zero: `tiny`,
    times what it is multiplied by (z, and in the second derivative a quotient).
    """
    z = grid(dtype)
    wanted = wanted_derivatives(name, z)
    if name == "softplus_3":  # at the threshold the value jumps, and the grid may hit it
        z = torch.where((3 * z.double() - 2).abs() < 1e-5, torch.zeros_like(z), z)
        wanted = wanted_derivatives(name, z)
    scales = magnitudes(name, z.double(), wanted[0])
    factor = 8 if dtype == torch.float32 else 16
    tiny = torch.finfo(dtype).tiny
    for isa, executor in PATHS:
        with using(isa, executor, threads=1):
            got = native_derivatives(name, z)
        for order, (g, w, s) in enumerate(zip(got, wanted, scales, strict=True)):
            excess = (
                (g.double() - w).abs()
                - factor * EPS[dtype] * s
                - (4 + z.double().abs() + 4096 * order) * tiny
            )
            worst = int(excess.argmax())
            ulps = float((g.double() - w).abs()[worst] / EPS[dtype] / s[worst])
            assert excess[worst] <= 0, (
                f"{isa} {executor}: derivative {order} at {float(z[worst])!r} is "
                f"{float(g[worst])!r}, wanted {float(w[worst])!r}: {ulps:.1f} eps"
            )


# ---- concurrent callers -------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["rows", "lanes", "auto"])
def test_concurrent_callers_get_the_result_of_a_lone_one(executor):
    """More callers than cores, each wanting the pool; every call has the bits of the first."""
    sizes = (40, 3, 64, 17, 130, 1)
    many = [
        Problem(Case(FACTORED if i == 2 else SMOOTH["mlp"], tasks=tasks, seed=i, lr="network",
                     form="list" if i % 2 else "uniform", loss="cross_entropy"))
        for i, tasks in enumerate(sizes)
    ]  # fmt: skip
    modules = [p.module(DTYPES[i % 2]) for i, p in enumerate(many)]
    wrong, start = [], threading.Barrier(len(many))
    with using(executor=executor, threads=3):
        wanted = [p.results(m) for p, m in zip(many, modules, strict=True)]

        def work(i):
            try:
                start.wait()
                for _ in range(15):
                    got = many[i].results(modules[i])
                    same = same_bits(meta_gradient(got), meta_gradient(wanted[i]))
                    tasks = range(sizes[i])
                    if not same or not same_bits(of_tasks(got, tasks), of_tasks(wanted[i], tasks)):
                        wrong.append(i)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(many))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
