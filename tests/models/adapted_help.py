"""Adapted models of a small network."""

import torch

import pymeta


def make(net, backend, **options):
    return pymeta.MAML(net, backend=backend, **{"loss": "mse", "lr": 0.1, "steps": 2, **options})


def history(tasks: int, epochs: int, **more) -> pymeta.History:
    return pymeta.History(
        **{
            "train": torch.rand(tasks, epochs),
            "validation": None,
            "best_epochs": None,
            "epochs": torch.full((tasks,), epochs),
            **more,
        }
    )


def random_models(net, tasks: int = 5, shared=("0.weight",), **options) -> pymeta.Adapted:
    """Models of random weights, of which those named are shared."""
    parameters = {
        n: torch.randn(p.shape, dtype=p.dtype).expand(tasks, *p.shape)
        if n in shared
        else torch.randn(tasks, *p.shape, dtype=p.dtype)
        for n, p in net.named_parameters()
    }
    return pymeta.Adapted.from_stacked(net, parameters, **{"loss": "mse", **options})
