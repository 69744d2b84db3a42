"""Results in a line: shapes and a few figures instead of all numbers. Works without torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


def as_numpy(values: Any) -> np.ndarray:
    """A tensor of any device and dtype, or an array, as an array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if values.is_floating_point():
            values = values.double()
        return np.asarray(values.numpy())
    return np.asarray(values)


def shape(values: Any) -> str:
    """The shape of an array or tensor; of a list of them, how many and of which sizes."""
    if values is None:
        return "None"
    if isinstance(values, (list, tuple)):
        rows = [len(v) for v in values]
        tail = list(values[0].shape[1:]) if values else []
        sizes = f"{min(rows)}..{max(rows)}" if rows else "0"
        return f"{len(values)} of [{', '.join([sizes, *map(str, tail)])}]"
    return str(list(values.shape))


def spread(values: Any) -> str:
    """The shape of an array or tensor, and its least, mean and largest finite value."""
    try:
        numbers = as_numpy(values).ravel()
    except (RuntimeError, TypeError):  # under a transform of torch.func there are no values
        return shape(values)
    finite = numbers[np.isfinite(numbers)]
    if not finite.size:
        return f"{shape(values)} none finite" if numbers.size else shape(values)
    lost = numbers.size - finite.size
    told = f"{shape(values)} {number(finite.min())}..{number(finite.max())}"
    told += f", mean {number(finite.mean())}"
    return f"{told}, {lost} not finite" if lost else told


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}" if math.isfinite(value) else str(float(value))


def brief(value: Any) -> str:
    """A dataclass with the fields that are not at their defaults."""
    shown = [
        f"{f.name}={getattr(value, f.name)!r}"
        for f in dataclasses.fields(value)
        if f.default is dataclasses.MISSING or getattr(value, f.name) != f.default
    ]
    return f"{type(value).__name__}({', '.join(shown)})"


def counted(count: Any, one: str, many: str = "", form: str = "") -> str:
    """A number and its noun: "1 row", "3 classes", "0 entries".

    Args:
        count: how many; a number of Python or numpy.
        one: the noun beside 1, perhaps with its verb ("row has").
        many: what stands beside other numbers; by default the noun's regular plural.
        form: how the number is formatted, as in f-strings.
    """
    return f"{count:{form}} {one if count == 1 else many or _plural(one)}"


def _plural(noun: str) -> str:
    if noun.endswith("axis"):
        return f"{noun[:-2]}es"
    if noun[-1] == "y" and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "tch", "sh")) else f"{noun}s"
