"""Calls whose inputs are wrong in one place."""

from helpers import mlp

import pymeta

OPTIONS = {"loss": "mse", "lr": 0.1, "steps": 1}


def make(backend, loss="mse", net=None, **options):
    net = mlp(2, 4, 3) if net is None else net
    return pymeta.MAML(net, backend=backend, loss=loss, **{"lr": 0.1, "steps": 1, **options})
