"""What is measured: networks, tasks and flop counts, in plain numpy, equal for every contestant.

W1  1-40-40-1 ReLU, MSE, 10+10 rows: the sinusoids of the MAML paper (Finn et al. 2017, sec. 5.1)
W2  784-256-128-64-64-5 ReLU, with and without batch normalisation, cross-entropy, 5+25 rows:
    the paper's non-convolutional network on 5-way 1-shot images (sec. 5.2)
W3  24-64-64-1 ReLU, binary cross-entropy, 32+32 rows: a small scoring model for each segment
W4  Reptile, 1-64-64-1 tanh, MSE, 10 rows, 32 steps: the sinusoids of Nichol et al. 2018 (sec. 4.1)
W5  fine-tuning, W3's network on 50 rows, 20 epochs of full-batch Adam: a thousand scoring models
W6  latency: W3's network adapted to 20 rows by 5 steps, then one row predicted (bench/latency.py)

W1 to W3 are meta-gradients of MAML; `Case.job` says what a case computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: e.g. "W1 T=25 K=1".
        sizes: widths of the chain; the activation (after batch normalisation, where there is one)
            between.
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
            far the parameters move in all. `bench/verify.py` says why.
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

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(in, out) of every linear layer."""
        return list(zip(self.sizes[:-1], self.sizes[1:], strict=True))

    def flops(self) -> int:
        """Floating-point operations of one task: the products of the linear layers, no more.

        In units of 2 * rows * in * out: forward 1; backward 2, but 1 for the first layer, whose
        input needs no gradient; a Hessian-vector product 6 (RZ: 2, R of the delta: 2, R of the
        weight gradient: 2), but 2 for the first layer. A step is forward and backward, in
        second order also one Hessian-vector product; the query set is forward and backward (a
        prediction, where that is the job, forward alone).
        """
        total = 0
        exact = self.job == "maml" and not self.first_order
        for i, (inputs, outputs) in enumerate(self.layers):
            backward, product = (1, 2) if i == 0 else (2, 6)
            step = 1 + backward + (product if exact else 0)
            query = 1 + (backward if self.job == "maml" else 0)
            total += 2 * inputs * outputs * (self.steps * self.support * step + self.query * query)
        return total


def _family(base: Case, **options: tuple) -> list[Case]:
    cases = [base]
    for field, values in options.items():
        cases = [replace(c, **{field: v}) for c in cases for v in values]
    return cases


def _cases() -> dict[str, Case]:
    w1 = Case("", (1, 40, 40, 1), "mse", 10, 10, 1, 0.01, 1)
    w2 = Case("", (784, 256, 128, 64, 64, 5), "cross_entropy", 5, 25, 1, 0.4, 32)
    w3 = Case("", (24, 64, 64, 1), "bce_with_logits", 32, 32, 5, 0.1, 64)
    w4 = Case("", (1, 64, 64, 1), "mse", 10, 0, 32, 0.02, 32, job="reptile", activation="tanh")
    w5 = Case("", w3.sizes, w3.loss, 50, 0, 20, 1e-3, 1000, job="finetune", optimizer="adam")
    found = [
        *(
            replace(c, name=f"W1 T={c.tasks} K={c.steps}")
            for c in _family(w1, steps=(1, 5), tasks=(1, 25, 256, 1024))
        ),
        *(
            replace(c, name=f"W2 {'BN' if c.batch_norm else 'no BN'} T={c.tasks} K={c.steps}")
            for c in (replace(w2, margin=1e-5), replace(w2, margin=5e-5, batch_norm=True))
        ),
        *(
            replace(c, name=f"W3{' first order' * c.first_order} T={c.tasks} K={c.steps}")
            for c in _family(w3, first_order=(False, True), tasks=(64, 1024))
        ),
        replace(w4, margin=1e-4, name=f"W4 Reptile T={w4.tasks} K={w4.steps}"),
        replace(w5, margin=1e-4, name=f"W5 fine-tuning T={w5.tasks} K={w5.steps}"),
    ]
    return {c.name: c for c in found}


CASES = _cases()

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
        xs, xq: [T, rows, in].
        ys, yq: [T, rows, out], or class indices [T, rows] (int64).
    """

    parameters: list[np.ndarray]
    xs: np.ndarray
    ys: np.ndarray
    xq: np.ndarray
    yq: np.ndarray

    def astype(self, dtype: type) -> Data:
        """The same numbers, their floating arrays in another dtype."""

        def convert(a: np.ndarray) -> np.ndarray:
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

    def of(self, tasks: slice | list[int]) -> Data:
        """The same parameters with some of the tasks."""
        sets = (self.xs, self.ys, self.xq, self.yq)
        return Data(self.parameters, *(a[tasks] for a in sets))


def draw(case: Case) -> Data:
    """Seeded data of a case, float32 (and int64 for classes)."""
    rng = np.random.default_rng([sum(case.sizes), case.tasks])
    parameters = []
    for i, (inputs, outputs) in enumerate(case.layers):
        bound = inputs**-0.5  # torch's default initialisation of a linear layer
        parameters.append(rng.uniform(-bound, bound, (outputs, inputs)))
        parameters.append(rng.uniform(-bound, bound, outputs))
        if case.batch_norm and i < len(case.layers) - 1:
            parameters.append(rng.uniform(0.5, 1.5, outputs))
            parameters.append(rng.uniform(-0.5, 0.5, outputs))
    make = {"mse": _sinusoids, "cross_entropy": _images, "bce_with_logits": _segments}[case.loss]
    arrays = make(rng, case)
    return Data(parameters, *arrays).astype(np.float32)


def _sinusoids(rng: np.random.Generator, case: Case) -> list[np.ndarray]:
    amplitude = rng.uniform(0.1, 5.0, (case.tasks, 1, 1))
    phase = rng.uniform(0.0, np.pi, (case.tasks, 1, 1))
    arrays = []
    for rows in (case.support, case.query):
        x = rng.uniform(-5.0, 5.0, (case.tasks, rows, 1))
        arrays += [x, amplitude * np.sin(x - phase)]
    return arrays


def _images(rng: np.random.Generator, case: Case) -> list[np.ndarray]:
    ways = case.sizes[-1]
    centres = rng.random((case.tasks, ways, case.sizes[0]))
    arrays = []
    for rows in (case.support, case.query):
        labels = np.tile(np.arange(ways), (case.tasks, rows // ways))
        chosen = np.take_along_axis(centres, labels[:, :, None], axis=1)
        ink = rng.random(chosen.shape) < 0.3 * chosen  # strokes: about a sixth of the pixels
        arrays += [ink.astype(np.float64), labels.astype(np.int64)]
    return arrays


def _segments(rng: np.random.Generator, case: Case) -> list[np.ndarray]:
    teacher = rng.normal(size=(case.tasks, case.sizes[0], 1)) / case.sizes[0] ** 0.5
    arrays = []
    for rows in (case.support, case.query):
        x = rng.normal(size=(case.tasks, rows, case.sizes[0]))
        chance = 1.0 / (1.0 + np.exp(1.0 - 2.0 * (x @ teacher)))
        arrays += [x, (rng.random(chance.shape) < chance).astype(np.float64)]
    return arrays
