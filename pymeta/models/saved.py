"""Torch's adapted models in files: the dtypes of tensors there, and whether a file fits a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pymeta.models.stacked import Saved
from pymeta.spec.architecture import Architecture

RAW_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
}
DTYPES = {code: dtype for dtype, code in RAW_DTYPES.items()}


def check_structure(
    saved: Saved, tensors: Mapping[str, Tensor], chain: Architecture | None
) -> None:
    """Raise ValueError unless a file's models are of this model's structure."""
    own = {name: tuple(p.shape) for name, p in tensors.items()}
    found = saved.shapes()
    if own.keys() != found.keys():
        odd = sorted(own.keys() ^ found.keys())
        raise ValueError(
            f"model: the file has the parameters {', '.join(found)}, "
            f"which are not the model's (see {odd[0]})"
        )
    raws = saved.stacked | saved.shared
    for name, parameter in tensors.items():
        if found[name] != own[name]:
            raise ValueError(
                f"model: {name} has the shape {list(found[name])} in the file, "
                f"{list(own[name])} in the model"
            )
        if DTYPES[raws[name].dtype] != parameter.dtype:
            raise ValueError(
                f"model: {name} is {DTYPES[raws[name].dtype]} in the file, "
                f"{parameter.dtype} in the model"
            )
    if chain is not None and saved.architecture is not None and chain != saved.architecture:
        raise ValueError(f"model: the file is of {saved.architecture}; the model is {chain}")
