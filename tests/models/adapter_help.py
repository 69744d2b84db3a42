"""Learners whose adapters are tested."""

import numpy as np
import torch
from torch import nn

import pymeta


def make(net, **options) -> pymeta.MAML:
    """A MAML with learned step sizes that differ from each other, where they are learned."""
    rule = {} if "lr" in options or "optimizer" in options else {"lr": 0.1}
    maml = pymeta.MAML(net, backend="native", **{"loss": "mse", "steps": 3, **rule, **options})
    if isinstance(maml.lr, nn.Parameter):
        with torch.no_grad():
            maml.lr.uniform_(0.02, 0.2)
    return maml


def arrays(*tensors):
    return [t.numpy() for t in tensors]


XS, YS, XQ = np.zeros((3, 5, 2)), np.zeros((3, 5, 2)), np.zeros((3, 4, 2))
