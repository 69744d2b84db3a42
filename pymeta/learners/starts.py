"""A model's adapted parameters as one start for each task: what learners on MAML share.

named   {name: [T, ...]}, as MAML takes a start of each task's own
joined  [T, P], the same in one matrix, P the coordinates of all of them
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from pymeta.algorithms.maml import MAML


def adapted(maml: MAML) -> dict[str, Tensor]:
    """The parameters that the inner loop changes, by name."""
    patterns = maml.adapted_patterns
    return {
        name: p
        for name, p in maml.model.named_parameters()
        if p.requires_grad
        and (patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns))
    }


def joined(parameters: Mapping[str, Tensor]) -> Tensor:
    """{name: [...]} as [P]."""
    return torch.cat([p.reshape(-1) for p in parameters.values()])


def named(values: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[T, P] as {name: [T, ...]}."""
    parts = torch.split(values, [p.numel() for p in like.values()], dim=1)
    return {
        name: part.reshape(len(values), *p.shape)
        for (name, p), part in zip(like.items(), parts, strict=True)
    }


def tasks_in(xs: Any) -> int:
    """How many tasks inputs are of; 0 for what MAML will refuse."""
    if isinstance(xs, Tensor) and xs.ndim == 0:
        return 0
    return len(xs) if hasattr(xs, "__len__") else 0
