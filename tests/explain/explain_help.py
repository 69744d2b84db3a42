"""Adapted models to be explained, and what a plain loop of autograd says of them."""

from __future__ import annotations

import numpy as np
import torch
from helpers import batch, mlp

import pymeta

SIZES = [3, 1, 6, 4]


def adapted(loss="mse", out=2, act=torch.nn.Tanh, backend="native", dtype=torch.float64, **options):
    """A MAML of a small network, and (models, xs, ys, xq) of four tasks."""
    net = mlp(5, 7, out, act=act, dtype=dtype)
    maml = pymeta.MAML(net, loss=loss, lr=0.2, steps=3, backend=backend, **options)
    xs, ys, xq, _ = batch(loss, tasks=4, support=8, query=6, inputs=5, out=out, dtype=dtype)
    return maml, maml.adapt(xs, ys), xs, ys, xq


def ragged(xq):
    """The first few rows of each task, differently many."""
    return [x[:n] for x, n in zip(xq, SIZES, strict=True)]


def by_autograd(models, xq, outputs):
    """The gradient of each row's output by the row, model by model."""
    found = []
    for t, (x, chosen) in enumerate(zip(xq, outputs, strict=True)):
        x = torch.as_tensor(x).clone().requires_grad_()
        out = models[t](x)
        picked = out[torch.arange(len(out)), torch.as_tensor(np.asarray(chosen))]
        (grad,) = torch.autograd.grad(picked.sum(), x)
        found.append(grad)
    return found


def tensors(values):
    """Arrays of single tasks as tensors."""
    return [torch.as_tensor(np.asarray(v)) for v in values]
