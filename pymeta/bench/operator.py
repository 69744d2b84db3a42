"""What the operator's other gradients cost: `python -m pymeta.bench.operator`.

The time of a MAML call and its backward (second order) by what is differentiated, as a ratio to the
built-in loss in the same run: a cotangent of the predictions (without query targets), of the tasks'
losses, gradients by targets, by row weights and by offsets, a loss after each step, with weights as
an argument and from outside, and `accumulate_grad`, which leaves autograd out. They take turns, and
a low quantile of each is taken. Before the clock starts every gradient is compared with that of the
torch backend in float64.

A second table has implicit MAML against unrolled steps (`implicit.py`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Shape(NamedTuple):
    """A network, as widths with ReLUs between, and a meta-batch."""

    sizes: tuple[int, ...]
    tasks: int
    support: int
    query: int
    steps: int


SHAPES = {
    "sinusoids, 1 task": Shape((1, 40, 40, 1), 1, 10, 10, 1),
    "sinusoids, 20 tasks": Shape((1, 40, 40, 1), 20, 10, 10, 1),
    "sinusoids, 25 tasks": Shape((1, 40, 40, 1), 25, 10, 10, 1),
    "sinusoids, 256 tasks": Shape((1, 40, 40, 1), 256, 10, 10, 1),
    "sinusoids, 256 tasks, 5 steps": Shape((1, 40, 40, 1), 256, 10, 10, 5),
    "segments, 1,000 tasks, 5 steps": Shape((24, 64, 64, 1), 1000, 20, 20, 5),
    "wide, 32 tasks, 5 steps": Shape((256, 256, 128, 64, 5), 32, 5, 75, 5),
}
# Of the largest entry, against float64. In float32 a ReLU whose input is next to 0 may be another.
TOLERANCE, TOLERANCE_OF_DOUBLES = 2e-2, 1e-9


class Ways:
    """One shape's data, and the ways of differentiating a call of it."""

    def __init__(self, shape: Shape) -> None:
        """Draw it all; torch's generator decides."""
        import torch

        self.shape = shape
        tasks, rows = shape.tasks, {"s": shape.support, "q": shape.query}
        self.xs, self.xq = (torch.randn(tasks, n, shape.sizes[0]) for n in rows.values())
        self.ys, self.yq = (torch.randn(tasks, n, shape.sizes[-1]) for n in rows.values())
        self.weights = 0.1 + torch.rand(tasks, shape.support)
        self.flow = torch.randn(tasks, shape.query, shape.sizes[-1])
        self.of_losses = torch.randn(tasks)
        layers: list[Any] = []
        for a, b in zip(shape.sizes, shape.sizes[1:], strict=False):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
        self.network = torch.nn.Sequential(*layers[:-1])
        self.of_steps = torch.rand(shape.steps, tasks)
        self.offsets = [torch.randn_like(y) for y in (self.ys, self.yq)]

    def in_doubles(self) -> Ways:
        """The same data and network in float64."""
        import copy

        import torch

        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(other, name, value.double())
        other.offsets = [v.double() for v in self.offsets]
        other.network = copy.deepcopy(self.network).double()
        return other

    def of(self, maml: Any) -> dict[str, Callable[[], None]]:
        """{name: call and backward}; each leaves the gradients in the parameters' `.grad`."""
        xs, ys, xq, yq = self.xs, self.ys, self.xq, self.yq
        ys_grad, weights_grad = ys.clone().requires_grad_(), self.weights.clone().requires_grad_()
        offsets = {"support_offset": self.offsets[0], "query_offset": self.offsets[1]}
        offsets_grad = {n: v.clone().requires_grad_() for n, v in offsets.items()}
        steps = self.shape.steps
        even = [1 / steps] * steps
        ways: dict[str, Callable[[], Any]] = {
            "built-in loss": lambda: maml(xs, ys, xq, yq).loss.backward(),
            "predictions": lambda: maml(xs, ys, xq).predictions.backward(self.flow),
            "task losses": lambda: maml(xs, ys, xq, yq).task_losses.backward(self.of_losses),
            "gradient by ys": lambda: maml(xs, ys_grad, xq, yq).loss.backward(),
            "row weights": lambda: maml(
                xs, ys, xq, yq, support_weights=self.weights
            ).loss.backward(),
            "row weights, gradient by them": lambda: maml(
                xs, ys, xq, yq, support_weights=weights_grad
            ).loss.backward(),
            "offsets": lambda: maml(xs, ys, xq, yq, **offsets).loss.backward(),
            "offsets, gradient by them": lambda: maml(
                xs, ys, xq, yq, **offsets_grad
            ).loss.backward(),
            "a loss after each step": lambda: maml(
                xs, ys, xq, yq, step_weights=even
            ).loss.backward(),
            "step losses": lambda: maml(xs, ys, xq, yq, step_weights=even).step_losses.backward(
                self.of_steps
            ),
            "accumulate_grad": lambda: maml.accumulate_grad(xs, ys, xq, yq),
        }

        def cleared(way: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                for p in maml.parameters():
                    p.grad = None
                way()

            return run

        return {name: cleared(way) for name, way in ways.items()}


def check(ways: Ways) -> float:
    """The largest relative error of any way's gradients in float32; AssertionError beyond a bound.

    In float64, too, where the bound is small.
    """
    import pymeta

    exact = ways.in_doubles()
    options: dict[str, Any] = {"loss": "mse", "lr": 0.01, "steps": ways.shape.steps}
    reference = pymeta.MAML(exact.network, backend="torch", **options)
    wanted, worst = exact.of(reference), 0.0
    for given, tolerance in ((ways.in_doubles(), TOLERANCE_OF_DOUBLES), (ways, TOLERANCE)):
        module = pymeta.MAML(given.network, backend="native", **options)
        got, worst = given.of(module), 0.0
        for name in got:
            got[name]()
            wanted[name]()
            for p, q in zip(module.parameters(), reference.parameters(), strict=True):
                assert p.grad is not None and q.grad is not None
                error = float((p.grad.double() - q.grad).abs().max() / q.grad.abs().max())
                assert error <= tolerance, f"{name}: off by {error:.1e}, more than {tolerance}"
                worst = max(worst, error)
    return worst


def measure(ways: Ways, seconds: float) -> dict[str, float]:
    """{name: microseconds}, the 10 % quantile of calls that took turns.

    Each way has a learner of its own, which knows its last call, as in a training loop.
    """
    import pymeta

    options: dict[str, Any] = {"loss": "mse", "lr": 0.01, "steps": ways.shape.steps}

    def every() -> dict[str, Callable[[], None]]:
        return ways.of(pymeta.MAML(ways.network, backend="native", **options))

    runs = {name: every()[name] for name in every()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * float(np.quantile(t, 0.1)) for name, t in times.items()}


def main() -> None:
    """Measure all shapes and write them."""
    parser = argparse.ArgumentParser(prog="python -m pymeta.bench.operator", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each shape")
    parser.add_argument("--out", type=Path, default=Path("pymeta-operator.json"), metavar="FILE")
    options = parser.parse_args()

    import torch

    from pymeta import native
    from pymeta.bench import report

    torch.manual_seed(0)
    torch.set_num_threads(1)
    native.set_num_threads(1)
    rows: dict[str, dict[str, float]] = {}
    body = []
    for name, shape in SHAPES.items():
        ways = Ways(shape)
        error = check(ways)
        rows[name] = measure(ways, options.seconds)
        base = rows[name]["built-in loss"]
        ratios = [f"{us / base:.2f}" for us in list(rows[name].values())[1:]]
        body.append([name, f"{base:.0f}", *ratios, f"{error:.0e}"])
        print(f"{name}: {base:.0f} us", flush=True)
    head = ["case, one thread", "built-in loss, us", *list(rows[next(iter(rows))])[1:], "error"]
    report.write_one(options.out, "Gradients of the operator", __doc__, head, body, rows)

    from pymeta.bench import implicit

    implicit.write(options.out, options.seconds)


if __name__ == "__main__":
    main()
