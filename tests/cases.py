"""Random and fixed cases of the kernels, and how close to the reference a result has to be.

A `Case` is one network and one call, drawn by hypothesis or fixed; a `Problem` makes it concrete;
`Wanted` has the float64 reference's results and derives the bounds.
"""

import copy
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Self

import blocks
import torch
from blocks import MEASURING, every_layer
from helpers import LOSSES, MORE_LOSSES, gradients, targets
from hypothesis import strategies as st
from images import (
    KINDS,
    conv,
    conv_norm_block,
    layer_norm,
    layer_norm_last,
    make_image_layer,
    may_transform,
)
from kernels import (
    DTYPES,
    EPS,
    OPTIMIZERS,
    PATHS,
    SOMETIMES,
    chains,
    flat,
    largest,
    lost,
    make_layer,
    shaken,
    takes,
    using,
)
from kinks import NORMS, is_kinked, walk
from torch import nn

import pymeta
from pymeta import native
from pymeta.spec.losses import describe_loss

# ---- cases ------------------------------------------------------------------------------------


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
    anchor: str | None = None  # "one" for all tasks, over their "rows", or each of its "own"
    mask: int = 0  # which of the ways to adapt only some parameters
    input_gradients: bool = True
    seed: int = 0
    beside: tuple[str, ...] = ()  # of "soft" labels, weights of "elements", "offset"
    ties: bool = False  # rows of a few integers

    @property
    def row_shape(self) -> tuple[int, ...]:
        first = self.chain[0]
        return first[1] if first[0] == "rows" else (first[1],)

    @property
    def out(self) -> int:
        return next(layer[2] for layer in reversed(self.chain) if len(layer) > 2)

    @property
    def layers(self) -> list[tuple]:
        """All layers, those of branches among them."""
        return list(every_layer(self.chain))

    @property
    def batch_norm(self) -> bool:
        return any(layer[0].startswith(MEASURING) for layer in self.layers)


def _module(layer: tuple) -> nn.Module:
    if layer[0] in blocks.KINDS:
        return blocks.make_block(layer, _module)
    return make_image_layer(layer) if layer[0] in KINDS else make_layer(layer)


def make_net(case: Case) -> nn.Sequential:
    """The network in float32: whatever is rounded is so for every dtype alike."""
    torch.manual_seed(case.seed)
    net = nn.Sequential(*map(_module, [layer for layer in case.chain if layer[0] != "rows"]))
    for module in net.modules():
        if isinstance(module, NORMS):
            for p in module.parameters():
                nn.init.normal_(p, mean=0.5)
    return net


def make_loss(case: Case) -> Any:
    if not case.loss_options or case.loss in WITHOUT_OPTIONS:
        return case.loss
    if case.loss == "quantile":
        return pymeta.QuantileLoss((0.2, 0.9))
    if case.loss == "student_t_nll":
        return pymeta.StudentTNLLLoss(2.5)
    weight = torch.rand(case.out) + 0.25
    if case.loss == "cross_entropy":
        return nn.CrossEntropyLoss(weight=weight, label_smoothing=0.25, ignore_index=-7)
    if case.loss == "bce_with_logits":
        return nn.BCEWithLogitsLoss(weight=weight, pos_weight=weight.flip(0) * 3)
    return nn.HuberLoss(delta=0.5) if case.loss == "huber" else nn.MSELoss()


WITHOUT_OPTIONS = ("l1", "poisson_nll", "qlike", "gaussian_nll")


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
    anchors: torch.Tensor | None = None  # of the support side, where tasks have their own
    offset: torch.Tensor | None = None

    def to(self, dtype):
        y = self.y.to(dtype) if self.y.is_floating_point() else self.y
        weights = None if self.weights is None else self.weights.to(dtype)
        anchors = None if self.anchors is None else self.anchors.to(dtype)
        offset = None if self.offset is None else self.offset.to(dtype)
        return Side(self.x.to(dtype), y, weights, self.sizes, anchors, offset)

    def counting(self, case: Case, t: int) -> torch.Tensor:
        """Which of a task's rows weigh something: bool [its rows]."""
        rows = self.sizes[t]
        counts = torch.ones(rows, dtype=torch.bool)
        if self.weights is not None:
            weigh = self.weights[t, :rows] != 0
            counts &= weigh if weigh.ndim == 1 else weigh.any(1)
        if case.loss == "cross_entropy" and not self.y.is_floating_point():
            counts &= self.y[t, :rows] != -7
        return counts

    def of(self, tasks: list[int]):
        weights = None if self.weights is None else self.weights[tasks]
        anchors = None if self.anchors is None else self.anchors[tasks]
        sizes = [self.sizes[t] for t in tasks]
        offset = None if self.offset is None else self.offset[tasks]
        return Side(self.x[tasks], self.y[tasks], weights, sizes, anchors, offset)


def left_out(case: Case, drawn: torch.Tensor) -> torch.Tensor:
    """Which of rows [T, rows, ...] are to weigh nothing.

    They are in no batch statistics, and a single row that is would be refused: the first two are.
    """
    if case.batch_norm:
        drawn[:, :2] = False
    return drawn


def make_side(case: Case, rows: int) -> Side:
    x = torch.randn(case.tasks, rows, *case.row_shape)
    if case.ties:
        x = x.round()
    if case.chain[0][0] == "tabular":
        blocks.fill_categories(x, case.chain[0])
    columns = case.out
    if case.loss in MORE_LOSSES:
        columns = describe_loss(make_loss(case)).target_columns(case.out)
    y = targets(case.loss, case.tasks, rows, out=columns, dtype=torch.float32)
    if case.loss == "cross_entropy" and case.loss_options:
        y[left_out(case, torch.rand(y.shape) < 0.2)] = -7
    weights = torch.rand(case.tasks, rows) if case.weights else None
    if weights is not None:
        weights[left_out(case, torch.rand(weights.shape) < 0.2)] = 0.0
    side = Side(x, y, weights, make_sizes(case, rows))
    if "offset" in case.beside:
        side.offset = torch.randn(case.tasks, rows, case.out)
    if "soft" in case.beside and case.loss == "cross_entropy":
        side.y = torch.randn(case.tasks, rows, case.out).softmax(-1)
    if "elements" in case.beside and case.loss != "cross_entropy":
        side.weights = torch.rand(y.shape)
        masked = left_out(case, torch.rand(y.shape) < 0.3)
        side.weights[masked] = 0.0
        side.y[masked] = math.nan
    return side


class Problem:
    """A case made concrete: a network, two sides, and the modules that compute on them."""

    judges = True  # whether calls have query targets

    def judged_whole(self) -> Self:
        """With query sets of which all rows count, where it matters for predictions."""
        if self.case.batch_norm:
            self.query.weights = None
            if self.case.loss == "cross_entropy":
                self.query.y = self.query.y.clamp(min=0)
        return self

    @property
    def measures_some(self) -> bool:
        """Whether batch statistics leave rows out."""
        rows = [(s, t) for s in (self.support, self.query) for t in range(self.case.tasks)]
        return self.case.batch_norm and not all(s.counting(self.case, t).all() for s, t in rows)

    def __init__(self, case: Case) -> None:
        self.case = case
        self.net = make_net(case)
        names = [n for n, _ in self.net.named_parameters()]
        # all, those of even place, the last one, biases where there are any
        masks = (None, names[::2], names[-1:], [n for n in names if "bias" in n] or names[:1])
        self.adapt = masks[case.mask] if names else None
        self.rate = float(torch.tensor(0.05 + 0.15 * torch.rand(()).item()))
        self.loss = make_loss(case)
        self.support = make_side(case, case.support)
        self.query = make_side(case, case.query)
        self.lr_values = torch.rand(100_000) * 0.2
        if case.anchor == "own":
            self.support.anchors = 2 * torch.rand(case.tasks)

    def module(self, dtype: torch.dtype, backend: str = "native") -> pymeta.MAML:
        case = self.case
        net = copy.deepcopy(self.net).to(dtype)
        lr = self.rate
        if case.lr:
            lr = pymeta.LearnableLR(lr, case.lr, case.per_step)
        pull = {"one": {"anchor": 0.75}, "rows": {"anchor_rows": 3.0}}.get(case.anchor, {})
        module = pymeta.MAML(
            net, **pull, loss=self.loss, optimizer=OPTIMIZERS[case.optimizer](lr), steps=case.steps,
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
            *arguments[:2], **{k: v for k, v in options.items() if not k.startswith("query")}
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
        arguments, options = [], {} if support.anchors is None else {"anchor": support.anchors}
        for name, side in (("support", support), ("query", query)):
            values = [side.x, side.y, side.weights, side.offset]
            if self.case.form == "list":
                values = [
                    None if v is None else [v[t, :n] for t, n in enumerate(side.sizes)]
                    for v in values
                ]
            elif self.case.form == "padded":
                options[f"{name}_sizes"] = side.sizes
            arguments += values[:2]
            options[f"{name}_weights"], options[f"{name}_offset"] = values[2:]
        return arguments, options


def besides(loss: str) -> list[tuple[str, ...]]:
    """What a case of a loss may have beside."""
    own = "soft" if loss == "cross_entropy" else "elements"
    return [(own, "offset"), (own,), ("offset",)]


@st.composite
def cases(draw, tasks=(1, 2, 3, 5, 17, 20), chain=None, losses=LOSSES, beside=False):
    chain = draw(chains() if chain is None else chain)
    lr = draw(st.sampled_from([None, None, "network", "layer", "parameter"]))
    if not any(len(layer) > 3 and (layer[0] == "linear" or layer[3]) for layer in chain):
        chain = (("linear", chain[0][1], chain[0][1], True), *chain)
    loss = draw(st.sampled_from(losses))
    out = Case(chain).out
    if loss in MORE_LOSSES and out % 2:  # some have two outputs for each target
        chain = (*chain, ("linear", out, out + 1, True))
    return Case(
        chain=chain,
        loss=loss,
        loss_options=draw(st.booleans()),
        tasks=draw(st.sampled_from(tasks)),
        support=draw(st.integers(2, 8)),
        query=draw(st.integers(2, 8)),
        form=draw(st.sampled_from(["uniform", "uniform", "padded", "list"])),
        weights=draw(st.booleans()),
        steps=draw(st.integers(blocks.least_steps(chain), 4)),
        first_order=draw(SOMETIMES),
        lr=lr,
        per_step=lr is not None and draw(st.booleans()),
        optimizer=draw(st.sampled_from(["plain", *sorted(OPTIMIZERS)])),
        anchor=draw(st.sampled_from([None, None, "one", "rows", "own"])),
        mask=draw(st.sampled_from([0, 0, 1, 2, 3])),
        input_gradients=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        beside=draw(st.sampled_from(besides(loss))) if beside else (),
    )


# ---- how close is close -----------------------------------------------------------------------


SUMMING = ("linear", "conv", "layer_norm", "group_norm", "instance_norm", *MEASURING)


def longest_sum(case: Case) -> int:
    """The most terms that a chain of sums in this case adds up."""
    widths = sum(max(layer[1], layer[2]) for layer in case.layers if layer[0].startswith(SUMMING))
    if case.chain[0][0] == "rows":  # gradients are sums over positions too
        widths += (case.support + case.query) * math.prod(case.row_shape[1:])
    passes = 1 if case.first_order else 3
    return (widths + case.support + case.query) * (passes * case.steps + 2)


# The groups of results that are made from the same deltas.
GRADIENTS = (
    "gradients", "lr", "rates", "xs", "xq", "ys", "yq", "support_weights", "query_weights",
    "anchor", "support_offset", "query_offset",
)  # fmt: skip


def growth_of(case: Case) -> float:
    """See `Wanted`."""
    return 2.0 if any(map(may_transform, case.layers)) else 1.0


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

        |native - reference| <= 16 eps (condition + sqrt(n) max|group| + max|all|) steepness growth

    A normalisation subtracts the mean, which leaves a relative error of eps |mean| / std behind.
    In which direction depends on how its derivative is written, and the reference writes it
    differently; so the largest |mean| / std of the whole way, where above 1, is the `steepness`.

    The native path does some convolutions by Winograd's transforms, torch does not here. What they
    add up has (5/3)^2 times the variance of the direct sum of independent terms, 5/3 along each
    axis (2, 3/2, 3/2, 2 are the variances of the four products, each output adds up three), and
    they round sums of two twice more on each side: `growth` is 2 for them.
    """

    FACTOR = 16

    def __init__(self, problem: Problem, steepness: float = 1.0) -> None:
        self.problem, self.steepness = problem, steepness
        self.reference = problem.results(problem.module(torch.float64, "torch"))
        with shaken():
            single = problem.results(problem.module(torch.float32, "torch"))
        terms = math.sqrt(longest_sum(problem.case))
        groups = [n for n, v in self.reference.items() if v is not None]
        overall = max((largest(self.reference[n]) for n in GRADIENTS if n in groups), default=0.0)
        self.magnitudes = {}
        for name in groups:
            every = overall if name in GRADIENTS else 0.0
            condition = lost(name, single, self.reference)
            self.magnitudes[name] = condition + terms * largest(self.reference[name]) + every

    def bound(self, name: str, dtype: torch.dtype) -> float:
        growth = growth_of(self.problem.case)
        return self.FACTOR * EPS[dtype] * self.steepness * growth * self.magnitudes[name]

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


def compare(case: Case) -> tuple[torch.dtype, ...]:
    """One case on every path; in float32 only where no kink is within reach of its rounding.

    Returns the dtypes that were compared.
    """
    return compare_problem(Problem(case))


def compare_problem(problem: Problem) -> tuple[torch.dtype, ...]:
    """As `compare`, of a problem."""
    case, dtypes, steepest = problem.case, DTYPES, 1.0
    if is_kinked(case) or any("norm" in layer[0] for layer in case.layers):
        nearest, steepest = walk(problem)
        if nearest < 64 * growth_of(case) * EPS[torch.float32]:
            dtypes = (torch.float64,)
    Wanted(problem, steepest).check(dtypes)
    return dtypes


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


SMOOTH = {
    "mlp": ((LIN, 3, 9, True), ("tanh",), (LIN, 9, 2, True)),
    "norms": (
        ("layer_norm", 3, 3, True), (LIN, 3, 17, False), ("batch_norm", 17, 17, True), ("gelu",),
        (LIN, 17, 5, True), ("layer_norm", 5, 5, True), ("sigmoid",), (LIN, 5, 2, True),
    ),
    "smooth": ((LIN, 3, 6, True), ("softplus",), ("silu",), (LIN, 6, 6, True), ("gelu_tanh",)),
}  # fmt: skip


IMAGES = {
    # odd sizes, floor pooling that drops pixels, one channel, more channels than a vector
    "conv4": Case(
        (("rows", (1, 13, 15)), conv(1, 6, (3, 3), 1, 1), ("batch_norm_image", 6, 6, 2, True),
         ("relu",), ("max_pool", 2, 2, 2, 0, 1), conv(6, 33, (3, 3), 1, 1),
         ("batch_norm_image", 33, 33, 2, True), ("relu",), ("max_pool", 2, 2, 2, 0, 1),
         ("flatten",), (LIN, 33 * 9, 5, True)),
        loss="cross_entropy", steps=1, tasks=3,
    ),
    "1x1 images": Case(
        (("rows", (3, 1, 1)), conv(3, 4, (3, 3), 1, 1), ("tanh",),
         ("max_pool", 2, 3, 2, 1, 1), conv(4, 5, (2, 2), 3, 1), ("flatten",), (LIN, 5, 2, True)),
        tasks=18, steps=2,
    ),
    "stride larger than kernel": Case(
        (("rows", (2, 9, 7)), conv(2, 5, (2, 1), (3, 3), 0), ("silu",),
         conv(5, 4, (1, 2), (2, 2), (0, 1)), ("flatten",), (LIN, 4 * 2 * 2, 2, True)), steps=2,
    ),
    "depthwise and grouped": Case(
        (("rows", (6, 5, 4)), conv(6, 6, (3, 3), 1, 1, 1, 6), ("silu",),
         conv(6, 18, (2, 2), 1, 0, 2, 3), ("gelu",), conv(18, 36, (1, 1), 1, 0, 1, 18, False),
         ("global_pool", 2), ("flatten",), (LIN, 36, 3, True)), steps=2,
    ),
    "sequences": Case(
        (("rows", (2, 21)), conv(2, 16, (3,)), ("relu",), conv(16, 32, (3,), 2, 1, 2),
         ("batch_norm_image", 32, 32, 1, False), ("softplus",), ("avg_pool", 1, 3, 2, 1, False),
         ("flatten",), (LIN, 32 * 5, 3, True)), steps=2, form="list", tasks=17,
    ),
    "groups of channels": Case(
        (("rows", (2, 5, 3)), conv(2, 34, (3, 3), 1, 1), ("group_norm", 34, 34, 17, True),
         ("silu",), conv(34, 6, (2, 2)), ("group_norm", 6, 6, 6, False), ("tanh",),
         ("flatten",), (LIN, 6 * 8, 3, True)), steps=2, form="padded", tasks=18,
    ),
    "layer norms": Case(
        (("rows", (3, 5, 3)), layer_norm((3, 5, 3)), conv(3, 17, (2, 2)),
         layer_norm((17, 4, 2), bias=False), ("silu",), ("zeros", 2, (1, 0, 0, 2)),
         conv(17, 4, (3, 2)), layer_norm((4, 4, 2), False, False), ("tanh",),
         ("adaptive_avg_pool", 2, (2, 1)), ("flatten",), (LIN, 8, 3, True)),
        steps=2, form="padded", tasks=18, lr="parameter", optimizer="momentum",
    ),
    "causal sequences": Case(
        (("rows", (5, 11)), ("zeros", 1, (2, 0)), conv(5, 17, (3,)), ("relu",),
         ("zeros", 1, (4, 0)), conv(17, 16, (3,), 1, 0, 2), layer_norm((16, 11)), ("relu",),
         ("adaptive_max_pool", 1, (1,)), ("flatten",), (LIN, 16, 1, True)),
        steps=2, form="list", tasks=17,
    ),
    # by Winograd's transforms: tiles that are cut off, one image and many in a block of tiles
    "3x3 of odd sizes": Case(
        (("rows", (3, 9, 11)), conv(3, 16, (1, 1)), ("tanh",), conv(16, 19, (3, 3), 1, 1),
         ("batch_norm_image", 19, 19, 2, True), ("relu",), ("max_pool", 2, 2, 2, 0, 1),
         ("flatten",), (LIN, 19 * 20, 3, True)), support=3, query=2, steps=2, tasks=2,
        loss="cross_entropy",
    ),
    "3x3 without padding and with more": Case(
        (("rows", (16, 10, 10)), conv(16, 33, (3, 3)), ("silu",),
         conv(33, 16, (3, 3), 1, (2, 0), bias=False), ("global_pool", 2), ("flatten",),
         (LIN, 16, 2, True)), support=4, query=3, steps=1, tasks=17, form="list",
    ),
    "3x3 of many rows": Case(
        (("rows", (16, 8, 8)), conv(16, 16, (3, 3), 1, 1), ("tanh",), ("global_pool", 2),
         ("flatten",), (LIN, 16, 2, True)), support=80, query=40, steps=1, tasks=1, weights=True,
    ),
    "channels last": Case(
        (("rows", (3, 6, 5)), conv(3, 17, (2, 2)), layer_norm_last(17, 2), ("silu",),
         conv(17, 6, (2, 2)), conv_norm_block(6, 2, 7, True, "gelu"),
         layer_norm_last(6, 2, True, False), ("flatten",), (LIN, 72, 3, True)),
        steps=2, form="padded", tasks=18, lr="parameter", optimizer="momentum",
    ),
    "channels of sequences last": Case(
        (("rows", (2, 11)), conv(2, 33, (3,)), ("tanh",), layer_norm_last(33, 1, False, False),
         conv_norm_block(33, 1, 3, False, "silu"), ("global_pool", 1), ("flatten",),
         (LIN, 33, 3, True)), steps=2, form="list", tasks=17, loss="cross_entropy",
    ),
    "many rows": Case(
        (("rows", (3, 6, 6)), conv(3, 17, (3, 3), 1, 1), ("relu",), ("global_pool", 2),
         ("flatten",), (LIN, 17, 2, True)), support=70, query=40, steps=1, tasks=2, weights=True,
    ),
}  # fmt: skip


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
        "anchor": draw(st.sampled_from([None, None, None, "own"])),
        "input_gradients": False,
        "tasks": case.tasks if case.form == "uniform" else min(case.tasks, 9),
    }
    return replace(case, **changes)


def is_factored(problem: Problem, rows: int) -> bool:
    plan = problem.module(torch.float32)._plan
    schedule = native.extension().Schedule(steps=problem.case.steps)
    found = plan.problem.plan(4, "meta", schedule, 8, rows, rows, second_order=True)
    return found["factored"] and problem.case.anchor != "own"  # which the plan knows nothing of


def of_tasks(results: dict, tasks) -> list[torch.Tensor]:
    """All that belongs to some tasks alone; without query targets there are no losses."""
    predictions = [results["predictions"][t] for t in tasks]
    adapted = [v[list(tasks)] for v in results.get("adapted", {}).values()]
    losses = [results["task_losses"][list(tasks)]] if "task_losses" in results else []
    return [*losses, *predictions, *adapted]


def meta_gradient(results: dict) -> list[torch.Tensor]:
    extra = [results.get(n) for n in ("loss", "lr", "xs", "xq")]
    return [*results["gradients"].values(), *(v for v in extra if v is not None)]
