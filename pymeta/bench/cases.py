"""What is measured: networks, tasks and flop counts, in plain numpy, equal for every contestant.

W1  1-40-40-1 ReLU, MSE, 10+10 rows: the sinusoids of the MAML paper (Finn et al. 2017, sec. 5.1)
W2  784-256-128-64-64-5 ReLU, with and without batch normalisation, cross-entropy, 5+25 rows:
    the paper's non-convolutional network on 5-way 1-shot images (sec. 5.2)
W3  24-64-64-1 ReLU, binary cross-entropy, 32+32 rows: a small scoring model for each segment
conv4  four 3x3 convolutions of 64 channels on 28x28 images, cross-entropy, 5+25 rows (Vinyals et
    al. 2016): the field's network
windows  convolutions of width 3 over 40 days of 5 series, 16-32-32 channels, binary cross-entropy,
    32+32 rows: up or down, a model for each asset
W4  Reptile, 1-64-64-1 tanh, MSE, 10 rows, 32 steps: the sinusoids of Nichol et al. 2018 (sec. 4.1)
W5  fine-tuning, W3's network on 50 rows, 20 epochs of full-batch Adam: a thousand scoring models
W6  latency: W3's network adapted to 20 rows by 5 steps, then one row predicted (latency.py)

W1 to W3, conv4 and windows are meta-gradients of MAML; `Case.job` says what a case computes.
`CASES` are what a CPU is measured by, `CUDA_CASES` the same with the numbers of tasks that a GPU is
for.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LOOP_TASKS = 50  # a loop over fine-tuning tasks takes so many, each as long as the others


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: e.g. "W1 T=25 K=1".
        sizes: widths of the chain; the activation (after batch normalisation, where there is one)
            between.
        image: (height, width) where rows are images of sizes[0] channels, (length,) where they
            are sequences, or (). Every layer but the last is then a convolution of width 3 with
            padding, behind its activation a max pooling of width 2.
        loss: "mse", "cross_entropy" or "bce_with_logits".
        support, query: rows of a task.
        steps: inner steps, each on all of the support rows.
        lr: inner step size.
        tasks: T.
        job: what is computed: "maml", the mean query loss after adaptation and its gradient;
            "reptile", the mean over steps and tasks of the support loss, and theta - mean theta';
            "finetune", every task's theta'; "predict", every task's raw outputs at theta' on its
            query rows.
        activation: "relu" or "tanh".
        optimizer: of the inner steps: "sgd", or "adam" with torch's defaults.
        batch_norm: normalise each hidden layer by its set's statistics.
        first_order: inner gradients are constants.
        margin: keep only tasks whose answer rounding cannot change by chance; 0 keeps all.
            "maml": no ReLU's input is closer to 0 than this, relative to the layer's root mean
            square. Other jobs: drawn errors move the answer by less than this, relative to how
            far the parameters move in all. `verify.py` says why.
        distinct: how many tasks are drawn, where that is fewer than T: they come over and over,
            in a drawn order (`order`). 0: all T.
    """

    name: str
    sizes: tuple[int, ...]
    loss: str
    support: int
    query: int
    steps: int
    lr: float
    tasks: int
    job: str = "maml"
    activation: str = "relu"
    optimizer: str = "sgd"
    batch_norm: bool = False
    first_order: bool = False
    margin: float = 0.0
    distinct: int = 0
    image: tuple[int, ...] = ()

    @staticmethod
    def read(value: dict[str, Any]) -> Case:
        """The case that `as_json` wrote."""
        tuples = {name: tuple(value.get(name, ())) for name in ("sizes", "image")}
        return Case(**{**value, **tuples})

    def as_json(self) -> dict[str, Any]:
        """Its attributes, as JSON can hold them."""
        return asdict(self)

    @property
    def base(self) -> Case:
        """The case of the distinct tasks alone."""
        return replace(self, tasks=self.distinct, distinct=0) if self.distinct else self

    def order(self) -> NDArray[np.int64]:
        """Which of the distinct tasks each task is, [T]; equally often, as far as T allows."""
        if not self.distinct:
            return np.arange(self.tasks)
        shuffled: NDArray[np.int64] = np.random.default_rng(self.tasks).permutation(self.tasks)
        return shuffled % self.distinct

    @property
    def parameter_count(self) -> int:
        """The network's parameters."""
        plain = sum(i * o + o for i, o in self.products)
        return plain + (2 * sum(self.sizes[1:-1]) if self.batch_norm else 0)

    def describe(self) -> str:
        """Network, loss and rows in a line."""
        norm = " BN" if self.batch_norm else ""
        rows = f"{self.support}+{self.query}" if self.query else f"{self.support}"
        convolutional = f"conv {'x'.join(map(str, self.image))} " if self.image else ""
        network = f"{convolutional}{'-'.join(map(str, self.sizes))}{norm} {self.activation}"
        return f"{network}, {self.loss}, {rows} rows, {self.steps} x {self.optimizer}"

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(in, out) of every linear layer."""
        return list(zip(self.sizes[:-1], self.sizes[1:], strict=True))

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row of inputs."""
        return (self.sizes[0], *self.image)

    def positions(self, layer: int) -> int:
        """How many positions layer number `layer` has outputs at."""
        last = layer == len(self.layers) - 1
        return 1 if last or not self.image else math.prod(n >> layer for n in self.image)

    @property
    def products(self) -> list[tuple[int, int]]:
        """(in, out) of the product that each layer is at every position of its output."""
        if not self.image:
            return self.layers
        *hidden, (inputs, outputs) = self.layers
        left = math.prod(n >> len(hidden) for n in self.image)
        taps = 3 ** len(self.image)
        return [*((taps * i, o) for i, o in hidden), (inputs * left, outputs)]

    def weight_shapes(self) -> list[tuple[int, ...]]:
        """Of each layer, as torch has them."""
        if not self.image:
            return [(o, i) for i, o in self.layers]
        window = (3,) * len(self.image)
        shapes: list[tuple[int, ...]] = [(o, i, *window) for i, o in self.layers[:-1]]
        inputs, outputs = self.products[-1]
        return [*shapes, (outputs, inputs)]

    def bytes_moved(self) -> int:
        """Bytes that a whole call must move at least: inputs read once, results written once.

        Float32, class indices int64. Inputs are the tasks' rows and the parameters; results the
        gradient, every task's loss and its predictions, or in fine-tuning every task's
        parameters.
        """
        label = 8 if self.loss == "cross_entropy" else 4 * self.sizes[-1]
        row = 4 * math.prod(self.row_shape) + label
        total = self.tasks * (self.support + self.query) * row + 4 * self.parameter_count
        if self.job == "finetune":
            return total + 4 * self.tasks * self.parameter_count
        results = self.tasks * (1 + self.query * self.sizes[-1]) + self.parameter_count
        return total + 4 * results

    def flops(self) -> int:
        """Floating-point operations of one task: the products of the linear layers, no more.

        In units of 2 * rows * in * out (at each position of a convolution's output, taps that lie
        outside the image included): forward 1; backward 2, but 1 for the first layer, whose
        input needs no gradient; a Hessian-vector product 6 (RZ: 2, R of the delta: 2, R of the
        weight gradient: 2), but 2 for the first layer. A step is forward and backward, in
        second order also one Hessian-vector product; the query set is forward and backward (a
        prediction, where that is the job, forward alone).
        """
        total = 0
        exact = self.job == "maml" and not self.first_order
        for i, (inputs, outputs) in enumerate(self.products):
            backward, product = (1, 2) if i == 0 else (2, 6)
            step = 1 + backward + (product if exact else 0)
            query = 1 + (backward if self.job == "maml" else 0)
            rows = self.steps * self.support * step + self.query * query
            total += 2 * inputs * outputs * self.positions(i) * rows
        return total


def _family(base: Case, **options: Sequence[Any]) -> list[Case]:
    cases = [base]
    for field, values in options.items():
        cases = [replace(c, **{field: v}) for c in cases for v in values]
    return cases


_W1 = Case("W1", (1, 40, 40, 1), "mse", 10, 10, 1, 0.01, 1)
_W2 = Case("W2 no BN", (784, 256, 128, 64, 64, 5), "cross_entropy", 5, 25, 1, 0.4, 32, margin=1e-5)
_W2_BN = replace(_W2, name="W2 BN", margin=5e-5, batch_norm=True)
_CONV4 = Case(
    *("conv4", (1, 64, 64, 64, 64, 5), "cross_entropy", 5, 25, 1, 0.4, 1),
    batch_norm=True,
    image=(28, 28),
)
_WINDOWS = Case(
    *("windows", (5, 16, 32, 32, 1), "bce_with_logits", 32, 32, 5, 0.1, 64), image=(40,)
)
_W3 = Case("W3", (24, 64, 64, 1), "bce_with_logits", 32, 32, 5, 0.1, 64)
_W4 = Case(
    *("W4 Reptile", (1, 64, 64, 1), "mse", 10, 0, 32, 0.02, 32),
    job="reptile",
    activation="tanh",
    margin=1e-4,
)
_W5 = Case(
    *("W5 fine-tuning", _W3.sizes, _W3.loss, 50, 0, 20, 1e-3, 1000),
    job="finetune",
    optimizer="adam",
    margin=1e-4,
)


def _named(cases: Sequence[Case]) -> dict[str, Case]:
    """By names such as "W3 first order T=64 K=5"."""
    named = [
        replace(c, name=f"{c.name}{' first order' * c.first_order} T={c.tasks} K={c.steps}")
        for c in cases
    ]
    return {c.name: c for c in named}


CASES = _named([
    *_family(_W1, steps=(1, 5), tasks=(1, 25, 256, 1024)),
    _W2,
    _W2_BN,
    *_family(_CONV4, tasks=(1, 4, 32)),
    *_family(_WINDOWS, tasks=(64, 500)),
    *_family(_W3, first_order=(False, True), tasks=(64, 1024)),
    _W4,
    _W5,
])  # fmt: skip

# So many of a GPU's tasks are drawn: float64 must follow, on the CPU.
_DISTINCT = {_W1.name: 1024, _W2.name: 32, _W3.name: 1024, _W5.name: 1000}


def _repeated(case: Case) -> Case:
    drawn = _DISTINCT[case.name]
    return replace(case, distinct=drawn) if case.tasks > drawn else case


# The most telling ones first: a run may be cut off.
CUDA_CASES = _named([
    _repeated(replace(base, steps=steps, tasks=tasks))
    for base, steps, tasks in (
        (_W1, 1, 25),
        (_W1, 1, 4096),
        (_W3, 5, 1024),
        (_W1, 5, 4096),
        (_W3, 5, 16384),
        (_W5, 20, 1000),
        (_W2, 1, 32),
        (_W1, 5, 25),
        (_W1, 1, 256),
        (_W1, 5, 256),
        (_W3, 5, 64),
        (_W1, 1, 65536),
        (_W1, 5, 65536),
        (_W2, 1, 1024),
        (_W5, 20, 100000),
    )
])  # fmt: skip

# What `--quick` takes: small enough for a minute in all.
_FEW = _named([replace(_W5, tasks=100)])
QUICK_CASES = {**{name: CASES[name] for name in ("W1 T=25 K=1", "W1 T=256 K=1")}, **_FEW}
QUICK_CUDA_CASES = {
    name: CUDA_CASES[name] for name in ("W1 T=25 K=1", "W1 T=4096 K=1", "W3 T=1024 K=5")
}


def sweep(cuda: bool) -> dict[str, list[tuple[int, Case]]]:
    """What `--plot` draws: {axis: [(x, case)]}, time against tasks and against width.

    W1's network for 1 to 4,096 tasks (a GPU: 65,536), and 1-h-h-1 for 64 tasks (1,024).
    """
    tasks = [4**i for i in range(9 if cuda else 7)]
    widths = [2**i for i in range(3, 10)]
    few = 1024 if cuda else 64
    return {
        "tasks": [
            (t, replace(_W1, name=f"sweep tasks={t}", tasks=t, distinct=1024 * (t > 1024)))
            for t in tasks
        ],
        "width": [
            (h, replace(_W1, name=f"sweep width={h}", sizes=(1, h, h, 1), tasks=few))
            for h in widths
        ],
    }


# One task at a time, its weights thrown away; several tasks, so that no call is like the last one.
LATENCY = Case(
    *("W6 latency", (24, 64, 64, 1), "bce_with_logits", 20, 1, 5, 0.1, 64),
    job="predict",
    margin=1e-4,
)


@dataclass(frozen=True)
class Data:
    """Parameters and tasks of a case.

    Attributes:
        parameters: in torch's order and shapes: each layer's weight [out, in] and bias [out],
            followed, where the case has them, by its batch normalisation's weight and bias.
        xs, xq: [T, rows, in]; T may be `Case.distinct`, until `of(case.order())`.
        ys, yq: [T, rows, out], or class indices [T, rows] (int64).
    """

    parameters: list[Array]
    xs: Array
    ys: Array
    xq: Array
    yq: Array

    def astype(self, dtype: type) -> Data:
        """The same numbers, their floating arrays in another dtype."""

        def convert(a: Array) -> Array:
            return a if a.dtype == np.int64 else a.astype(dtype)

        return Data(
            [convert(p) for p in self.parameters],
            *(convert(a) for a in (self.xs, self.ys, self.xq, self.yq)),
        )

    def save(self, path: Path) -> None:
        """Write an .npz file."""
        np.savez(path, *self.parameters, xs=self.xs, ys=self.ys, xq=self.xq, yq=self.yq)

    @staticmethod
    def load(path: Path) -> Data:
        """Read what `save` wrote."""
        with np.load(path) as stored:
            arrays = dict(stored)
        sets = [arrays.pop(name) for name in ("xs", "ys", "xq", "yq")]
        return Data([arrays[f"arr_{i}"] for i in range(len(arrays))], *sets)

    def of(self, tasks: slice | list[int] | NDArray[np.int64]) -> Data:
        """The same parameters with some of the tasks."""
        sets = (self.xs, self.ys, self.xq, self.yq)
        return Data(self.parameters, *(a[tasks] for a in sets))


def draw(case: Case) -> Data:
    """Seeded data of a case, float32 (and int64 for classes)."""
    rng = np.random.default_rng([sum(case.sizes), case.tasks])
    parameters: list[Array] = []
    for i, ((inputs, outputs), shape) in enumerate(
        zip(case.products, case.weight_shapes(), strict=True)
    ):
        bound = inputs**-0.5  # torch's default initialisation of a linear layer
        parameters.append(rng.uniform(-bound, bound, shape))
        parameters.append(rng.uniform(-bound, bound, outputs))
        if case.batch_norm and i < len(case.layers) - 1:
            parameters.append(rng.uniform(0.5, 1.5, outputs))
            parameters.append(rng.uniform(-0.5, 0.5, outputs))
    makers: dict[str, Callable[[np.random.Generator, Case], list[Array]]] = {
        "mse": _sinusoids,
        "cross_entropy": _images,
        "bce_with_logits": _segments,
    }
    xs, ys, xq, yq = makers[case.loss](rng, case)
    return Data(parameters, xs, ys, xq, yq).astype(np.float32)


# ---- tasks that rounding does not decide ---------------------------------------------------------
#
# Which tasks of a case with a margin are taken is worked out by `verify.select`, in up to minutes;
# its answers for the cases above lie in chosen.json, together with a checksum of what was drawn, so
# that a numpy which draws other numbers is noticed. `python -m pymeta.bench.verify` writes it anew.


def pool(case: Case) -> Data:
    """The tasks that a case with a margin chooses from."""
    return draw(replace(case, tasks=(16 if case.job == "maml" else 4) * case.tasks))


def fingerprint(case: Case, data: Data) -> tuple[str, int]:
    """What a choice depends on: the case but its name, and the numbers drawn."""
    described = {**case.as_json(), "name": "", "distinct": 0}
    if not case.image:  # as it was before there were any
        del described["image"]
    what = json.dumps(described, sort_keys=True)
    sums = zlib.crc32(data.xs.tobytes())
    for parameter in data.parameters:
        sums = zlib.crc32(parameter.tobytes(), sums)
    return what, sums


@functools.cache
def _choices() -> dict[str, Any]:
    text = (resources.files("pymeta.bench") / "chosen.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


def chosen(case: Case, data: Data) -> list[int] | None:
    """The tasks of its pool that the case takes; None where that has to be worked out."""
    what, checksum = fingerprint(case, data)
    entry = _choices().get(what)
    if entry is None or entry["checksum"] != checksum:
        return None
    return list(entry["tasks"])


def _sinusoids(rng: np.random.Generator, case: Case) -> list[Array]:
    amplitude = rng.uniform(0.1, 5.0, (case.tasks, 1, 1))
    phase = rng.uniform(0.0, np.pi, (case.tasks, 1, 1))
    arrays = []
    for rows in (case.support, case.query):
        x = rng.uniform(-5.0, 5.0, (case.tasks, rows, 1))
        arrays += [x, amplitude * np.sin(x - phase)]
    return arrays


def _images(rng: np.random.Generator, case: Case) -> list[Array]:
    ways = case.sizes[-1]
    centres = rng.random((case.tasks, ways, math.prod(case.row_shape)))
    arrays = []
    for rows in (case.support, case.query):
        labels = np.tile(np.arange(ways), (case.tasks, rows // ways))
        chosen = np.take_along_axis(centres, labels[:, :, None], axis=1)
        ink = rng.random(chosen.shape) < 0.3 * chosen  # strokes: about a sixth of the pixels
        shaped = ink.reshape(case.tasks, rows, *case.row_shape)
        arrays += [shaped.astype(np.float64), labels.astype(np.int64)]
    return arrays


def _segments(rng: np.random.Generator, case: Case) -> list[Array]:
    features = math.prod(case.row_shape)
    teacher = rng.normal(size=(case.tasks, features, 1)) / features**0.5
    arrays = []
    for rows in (case.support, case.query):
        x = rng.normal(size=(case.tasks, rows, features))
        chance = 1.0 / (1.0 + np.exp(1.0 - 2.0 * (x @ teacher)))
        labels = (rng.random(chance.shape) < chance).astype(np.float64)
        arrays += [x.reshape(case.tasks, rows, *case.row_shape), labels]
    return arrays
