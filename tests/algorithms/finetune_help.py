"""Fine-tuning by hand: tasks, and loops over torch.optim."""

import torch
from helpers import targets

from pymeta import FineTune

SIZES = [7, 0, 12, 5, 1, 9]


def tuner(backend, net, **options):
    options = {"loss": "mse", "lr": 0.1, "epochs": 4, **options}
    if "optimizer" in options:
        options.pop("lr")
    return FineTune(net, backend=backend, **options)


def ragged(loss="mse", sizes=SIZES, inputs=2, out=3):
    """(xs, ys, weights) of tasks of different sizes."""
    xs = [torch.randn(n, inputs, dtype=torch.float64) for n in sizes]
    ys = [targets(loss, n, out=out) for n in sizes]
    return xs, ys, [torch.rand(n, dtype=torch.float64) for n in sizes]
