"""Integrated gradients of many models at once, against captum on each: CPU time of one thread.

    python bench/explain.py [--tasks 200] [--repeats 7]

The attributions are compared before anything is timed. Needs captum (extra `test`).
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import numpy as np
import torch
from captum.attr import IntegratedGradients

import pymeta
from pymeta.explain import integrated_gradients

STEPS = 32


def main() -> None:
    """Compare, time in turn, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pymeta.set_num_threads(1)
    tasks, rows = options.tasks, 5
    net = torch.nn.Sequential(
        torch.nn.Linear(24, 64), torch.nn.Tanh(),
        torch.nn.Linear(64, 64), torch.nn.Tanh(),
        torch.nn.Linear(64, 1),
    )  # fmt: skip
    maml = pymeta.MAML(net, loss="mse", lr=0.01, steps=3)
    xs, ys, xq = torch.randn(tasks, 20, 24), torch.randn(tasks, 20, 1), torch.randn(tasks, rows, 24)
    models = maml.adapt(xs, ys)
    modules = list(models)

    def ours() -> np.ndarray:
        return integrated_gradients(models, xq, steps=STEPS).values

    def theirs() -> np.ndarray:
        how = {"n_steps": STEPS, "method": "gausslegendre"}
        pairs = zip(modules, xq, strict=True)
        each = [IntegratedGradients(module).attribute(x, **how) for module, x in pairs]
        return torch.stack(each).detach().numpy()

    wanted = theirs()
    error = np.abs(ours() - wanted).max()
    assert error < 1e-5 * np.abs(wanted).max(), error
    times: dict[str, list[float]] = {"pymeta": [], "captum": []}
    for _ in range(options.repeats):
        for name, run in (("pymeta", ours), ("captum", theirs)):
            begin = time.process_time()
            run()
            times[name].append(time.process_time() - begin)
    found = {name: median(values) for name, values in times.items()}
    ratio = median(b / a for a, b in zip(times["pymeta"], times["captum"], strict=True))
    print(f"{tasks} models, 24-64-64-1, {rows} rows each, {STEPS} points on each path:")
    print(f"pymeta {1e3 * found['pymeta']:.1f} ms, captum {1e3 * found['captum']:.1f} ms")
    print(f"{ratio:.1f} times")


if __name__ == "__main__":
    main()
