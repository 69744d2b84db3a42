"""A process that calls the native core on arrays at the ends of pages: see test_faults.py.

python fault_guarded.py SEED COUNT [planted]: COUNT random cases, each on every instruction set and
executor, once with every array at the end and once at the start of its pages; on the emulated
device, where the build has one, the workspace as well. Before each call it prints what it calls,
so that the last line names the one that died. With `planted` the first call reads one task more
than there is.
"""

from __future__ import annotations

import itertools
import random
import sys
from typing import Any

import numpy as np
from guarded import Pages

from pymeta import native

ACTIVATIONS = (("relu",), ("tanh",), ("sigmoid",), ("silu",), ("gelu",), ("gelu_tanh",),
               ("leaky_relu", 0.1), ("elu", 1.0), ("softplus", 1.0, 20.0))  # fmt: skip
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 40, 70)
OPTIMIZERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sgd", {}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("sgd", {"clip_norm": 0.5, "anchor": 0.1}),
    ("adam", {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3}),
    ("rmsprop", {"alpha": 0.9, "eps": 1e-3}),
    ("rmsprop", {"alpha": 0.9, "eps": 1e-3, "momentum": 0.5, "centered": True}),
)

lib = native.extension()


class Case:
    """A network, a loss, a recipe and tasks, drawn at random."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.layers = list(self._layers())
        self.network = lib.Network(self.layers)
        self.sizes = self.network.parameter_sizes
        self.inputs, self.out = self.network.in_features, self.network.out_features
        losses = ["mse", "huber", "cross_entropy", "bce_with_logits", "l1", "qlike"]
        self.loss = chance.choice(losses + ["gaussian_nll"] * (self.out % 2 == 0))
        self.columns = self.out // 2 if self.loss == "gaussian_nll" else self.out  # of targets
        self.shifts, beside = chance.random() < 0.4, chance.random() < 0.5
        self.soft = beside and self.loss == "cross_entropy"
        self.by_target = beside and self.loss != "cross_entropy"  # whose weights these are
        self.optimizer = chance.choice(OPTIMIZERS)
        self.per_element = chance.random() < 0.3
        self.real = chance.choice((np.float32, np.float64))
        self.tasks = chance.choice((1, 2, 5, 16, 17, 33))
        norm = any(layer[0] == "batch_norm" for layer in self.layers)
        self.rows = [chance.randint(2 if norm else 1, 19) for _ in range(3)]
        self.ragged, self.weighted = chance.random() < 0.4 and not norm, chance.random() < 0.4
        self.batch = 0 if norm else chance.choice((0, 0, 1, 3, 4))
        self.steps = chance.randint(0, 3)
        self.own = [chance.random() < 0.3 for _ in self.sizes]
        self.wants = [chance.random() < 0.6 for _ in range(6)]
        self.seed = seed

    def _layers(self) -> Any:
        chance, width = self.chance, self.chance.choice(WIDTHS)
        for _ in range(chance.randint(1, 3)):
            if chance.random() < 0.3:
                kind = chance.choice(("layer_norm", "batch_norm"))
                yield (kind, width, 1e-5, chance.random() < 0.7, chance.random() < 0.7)
            out = chance.choice(WIDTHS)
            yield ("linear", width, out, chance.random() < 0.8)
            width = out
            if chance.random() < 0.7:
                yield chance.choice(ACTIVATIONS)

    def problem(self) -> Any:
        kind, options = self.optimizer
        groups = None if self.per_element else [0] * len(self.sizes)
        return lib.Problem(
            self.network, lib.Loss(self.loss), [True] * len(self.sizes), groups,
            lib.Optimizer(kind, **options),
        )  # fmt: skip

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.layers} {self.loss} {self.optimizer} {self.real.__name__}"


class Call:
    """A case's arrays, at the ends or the starts of pages."""

    def __init__(self, case: Case, at: str, on_device: bool) -> None:
        self.case, self.pages, self.on_device = case, Pages(at), on_device
        self.random = np.random.default_rng(case.seed)
        self.start = [self.array(self.normal(n)) for n in case.sizes]
        columns = sum(case.sizes) if case.per_element else 1
        self.lr = self.array(np.full((2, columns), 0.05))
        self.support, self.query, self.validation = (self.rows(n) for n in case.rows)
        self.rates = lib.Rates(address(self.lr), *self.lr.shape)

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.normal(size=shape) * 0.3

    def array(self, values: np.ndarray) -> np.ndarray:
        return self.pages.array(values.astype(self.case.real))

    def rows(self, rows: int) -> tuple[Any, ...]:
        """What `Rows` takes, of one set; ragged ones are packed without a gap."""
        case = self.case
        sizes = starts = None
        total = case.tasks * rows
        if case.ragged:
            counts = self.random.integers(0, rows + 1, case.tasks)
            sizes = self.pages.array(counts.astype(np.int64))
            starts = self.pages.array((np.cumsum(counts) - counts).astype(np.int64))
            total = int(counts.sum())
        x = self.array(self.normal(total, case.inputs))
        if case.soft:
            y = self.array(self.random.random((total, case.out)))
        elif case.loss == "cross_entropy":
            y = self.pages.array(self.random.integers(0, case.out, total).astype(np.int64))
        else:
            y = self.array((self.normal(total, case.columns) > 0) * 1.0)
        weights, columns = None, case.columns if case.weighted and case.by_target else 1
        if case.weighted:
            weights = self.array(self.random.random((total, columns)))
        offset = self.array(self.normal(total, case.out)) if case.shifts else None
        return x, y, weights, rows, starts, sizes, offset, columns, case.soft

    def native(self, rows: tuple[Any, ...]) -> Any:
        return lib.Rows(*(v if isinstance(v, int) else address(v) for v in rows))

    def result(self, *shape: int) -> int:
        return address(self.pages.room(shape, self.case.real))

    def made(self, problem: Any, job: str, **parts: Any) -> None:
        """A call, here or on the emulated device with a workspace of what it asks for."""
        print(f"  {job}", flush=True)
        call = lib.Call(problem, np.dtype(self.case.real).itemsize, job)
        for name, value in parts.items():
            setattr(call, name, value)
        if not self.on_device:
            call.run()
            return
        needed = call.run(device=(-1, 0, 0, 0))
        room = self.pages.room(needed, np.uint8)
        assert call.run(device=(-1, 0, address(room), needed)) == needed

    def results(self, **where: int | list[int]) -> Any:
        made = lib.Results()
        for name, value in where.items():
            setattr(made, name, value)
        return made

    def run(self, problem: Any, planted: bool) -> None:
        case, tasks = self.case, self.case.tasks + planted
        start = [address(p) for p in self.start]
        support, query = self.native(self.support), self.native(self.query)
        x_rows, q_rows = len(self.support[0]), len(self.query[0])
        gradients = [self.result(n) for n in case.sizes] if case.wants[0] else []
        predictions = self.result(q_rows, case.out)
        shared = {"tasks": tasks, "start": start}
        self.made(problem, "predict", **shared, query=query,
                  results=self.results(predictions=predictions))  # fmt: skip
        extras = (
            self.result(*self.lr.shape) if case.wants[2] else 0,
            self.result(x_rows, case.inputs) if case.wants[3] else 0,
            self.result(q_rows, case.inputs) if case.wants[4] else 0,
        )
        shared |= {"rates": self.rates, "support": support}
        self.made(
            problem, "meta", **shared, query=query, schedule=lib.Schedule(steps=case.steps),
            first_order=case.wants[1], gradients=lib.Gradients(gradients, *extras),
            results=self.results(
                losses=self.result(tasks), mean_loss=self.result(1), predictions=predictions
            ),
        )  # fmt: skip
        batches = {
            "batch_size": case.batch, "seed": 7, "stream": 1,
            "task_ids": address(self.pages.array(np.arange(tasks))),
        }  # fmt: skip
        by_steps = lib.Schedule(steps=case.steps, **batches)
        by_epochs = lib.Schedule(epochs=case.steps, **batches)
        self.made(
            problem, "reptile", **shared, schedule=by_steps, gradients=lib.Gradients(gradients),
            results=self.results(losses=self.result(tasks), mean_loss=self.result(1)),
        )  # fmt: skip
        own = [
            address(self.array(self.normal(tasks, n))) if apart else s
            for n, s, apart in zip(case.sizes, start, case.own, strict=True)
        ]
        results = self.results(
            adapted=[self.result(tasks, n) for n in case.sizes],
            status=address(self.pages.room(tasks, np.int8)),
        )
        shared |= {"start": own, "own_starts": case.own, "results": results}
        if case.wants[5]:
            self.made(problem, "adapt", **shared, schedule=by_steps)
            return
        results.train_curves = self.result(tasks, case.steps)
        results.validation_curves = self.result(tasks, case.steps + 1)
        results.best_epochs = address(self.pages.room(tasks, np.int64))
        results.epochs_run = address(self.pages.room(tasks, np.int64))
        self.made(problem, "adapt", **shared, schedule=by_epochs, patience=1,
                  validation=self.native(self.validation))  # fmt: skip

    def run_engine(self, problem: Any) -> None:
        print("  Engine", flush=True)
        case, code = self.case, np.dtype(self.case.real).itemsize
        start = [address(p) for p in self.start]
        engine = lib.Engine(problem, code, start, self.rates, lib.Schedule(steps=case.steps))
        rows, queries = case.rows[:2]
        y = self.random.integers(0, case.out, rows).astype(np.int64)
        if case.loss != "cross_entropy" or case.soft:
            y = (self.normal(rows, case.columns) > 0).astype(case.real)
        columns = case.columns if case.by_target else 1
        weights = self.random.random((rows, columns) if columns > 1 else rows)
        engine.adapt_predict(
            self.array(self.normal(rows, case.inputs)),
            self.pages.array(y),
            self.array(self.normal(queries, case.inputs)),
            self.pages.room((queries, case.out), case.real),
            self.array(weights) if case.weighted else None,
            *(self.array(self.normal(n, case.out)) for n in (rows, queries) if case.shifts),
        )


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.__array_interface__["data"][0]


def main() -> None:
    first, count, planted = int(sys.argv[1]), int(sys.argv[2]), "planted" in sys.argv
    paths = list(
        itertools.product(native.isas(), ("rows", "lanes", "mixed", "stacked"), ("end", "start"))
    )
    if lib.emulates():
        paths += [(native.isa(), "emulated", "end"), (native.isa(), "emulated", "start")]
    for seed in range(first, first + count):
        case = Case(seed)
        print(case, flush=True)
        problem = case.problem()
        for isa, executor, at in paths:
            print(f" {isa} {executor} {at}", flush=True)
            native.set_isa(isa)
            native.set_executor("auto" if executor == "emulated" else executor)
            native.set_num_threads(1 + seed % 2)
            call = Call(case, at, executor == "emulated")
            if not call.on_device or problem.unfit_for_device() is None:
                call.run(problem, planted)
            if not call.on_device:
                call.run_engine(problem)
    print(f"{count * len(paths)} calls survived")


if __name__ == "__main__":
    main()
