"""An adapter and tasks for the processes of test_faults.py; torch is not imported."""

from __future__ import annotations

import numpy as np

import pymeta
from pymeta.spec.architecture import Architecture
from pymeta.spec.losses import Loss


def adapter(inputs: int, width: int, out: int, *, steps: int = 3, loss: str = "mse"):
    """An Adapter of a network with one hidden layer."""
    random = np.random.default_rng(0)
    layers = (("linear", inputs, width, True), ("tanh",), ("linear", width, out, True))
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    chain = Architecture(layers, names, names, False)
    return pymeta.Adapter(
        chain,
        {n: (random.normal(size=s) * 0.1).astype(np.float32) for n, s in chain.shapes().items()},
        adapted=names,
        loss=Loss(loss),
        optimizer=pymeta.SGD(0.01),
        schedule=pymeta.Schedule(steps=steps),
    )


def data(tasks: int, rows: int, inputs: int, out: int, *, classes: bool = False):
    """xs, ys, xq of tasks."""
    random = np.random.default_rng(tasks)
    xs, xq = (random.normal(size=(tasks, rows, inputs)).astype(np.float32) for _ in range(2))
    if classes:
        return xs, random.integers(0, out, (tasks, rows)), xq
    return xs, random.normal(size=(tasks, rows, out)).astype(np.float32), xq
