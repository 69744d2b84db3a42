"""What callers give to torch's adapted models: parameters, checked; rows, whose form stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_stacked(own: Mapping[str, Tensor], given: Any) -> int:
    """The number of tasks; TypeError or ValueError unless `given` fits the model's own."""
    if not isinstance(given, Mapping):
        raise TypeError(f"parameters: expected a dictionary, got {type(given).__name__}")
    if not own or given.keys() != own.keys():
        odd = sorted(map(str, given.keys() ^ own.keys()))
        raise ValueError(
            f"parameters: expected the model's ({', '.join(own) or 'it has none'}); "
            f"missing or unknown: {', '.join(odd) or 'none'}"
        )
    tasks: int | None = None
    for name, parameter in own.items():
        value = given[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"parameters: {name}: expected a tensor, got {type(value).__name__}")
        if (
            value.ndim == 0
            or value.shape[1:] != parameter.shape
            or len(value) != (len(value) if tasks is None else tasks)
        ):
            wanted = ["T" if tasks is None else tasks, *parameter.shape]
            raise ValueError(
                f"parameters: {name}: expected shape [{', '.join(map(str, wanted))}], "
                f"got {list(value.shape)}"
            )
        if value.dtype != parameter.dtype or value.device != parameter.device:
            raise ValueError(
                f"parameters: {name}: expected {parameter.dtype} on {parameter.device} as the "
                f"model's, got {value.dtype} on {value.device}"
            )
        tasks = len(value)
    assert tasks is not None
    return tasks


def in_form_of(xq: Any, values: Any) -> Any:
    """Values for each element of rows, in the rows' own shape where the model flattened them."""
    if isinstance(values, list):
        pairs = zip(values, xq, strict=True)
        return [value.reshape(tuple(x.shape)) for value, x in pairs]
    return values if isinstance(xq, (list, tuple)) else values.reshape(tuple(xq.shape))
