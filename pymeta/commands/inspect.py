"""`pymeta inspect FILE`: what is in a file of ours, after its checksums were compared."""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

from pymeta.models import file
from pymeta.models.adapter import Adapter
from pymeta.models.stacked import Saved, load
from pymeta.spec.architecture import Architecture

Facts = dict[str, Any]


def facts(path: file.Path) -> Facts:
    """What is in a file: plain data, fit for JSON.

    Returns:
        {"file", "bytes", "kind", "tensors": {name: {"dtype", "shape"}}} and what a file of that
        kind says of itself; for kinds that are not known here, its metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or pymeta did not write it.
    """
    kind = file.kind_of(path)
    contents = file.read(path, kind, verify=True)
    found: Facts = {"file": os.fspath(path), "bytes": os.path.getsize(path), "kind": kind}
    describe = _KINDS.get(kind, lambda p: contents.described)
    tensors = {n: {"dtype": r.dtype, "shape": list(r.shape)} for n, r in contents.tensors.items()}
    return {**found, **describe(path), "tensors": tensors}


def _network(architecture: Architecture) -> Facts:
    count = sum(math.prod(shape) for shape in architecture.shapes().values())
    return {"model": str(architecture), "parameters": count}


def _adapter(path: file.Path) -> Facts:
    a = Adapter.load(path)
    s = a.schedule
    recipe: Facts = {"steps": s.steps} if s.epochs is None else {"epochs": s.epochs}
    if s.batch_size:
        recipe["batch_size"] = s.batch_size
    pull = {"anchor": a.anchor} if a.anchor else {}
    pull |= {"anchor_rows": a.anchor_rows} if a.anchor_rows is not None else {}
    weights = {} if a.class_weights is None else {"class_weights": a.class_weights}
    return {
        **_network(a.architecture),
        "inputs": a.in_features,
        "outputs": a.out_features,
        "dtype": str(a.dtype),
        "loss": a.loss.kind,
        "optimizer": str(a.optimizer),
        "lr": {"smallest": float(a.lr.min()), "largest": float(a.lr.max()), "count": a.lr.size},
        **recipe,
        "adapted": list(a.adapted),
        **pull,
        **weights,
    }


def _models(path: file.Path) -> Facts:
    saved = load(path, verify=False)  # `facts` has compared the checksum
    status = saved.status.data.view("i1")
    network = {"model": "not a chain of layers: load it with pymeta.Adapted"}
    return {
        **(network if saved.architecture is None else _network(saved.architecture)),
        "models": saved.tasks,
        "not_finite": int((status == 1).sum()),
        "loss_grew": int((status == 2).sum()),
        "loss": saved.loss.kind,
        "own": list(saved.stacked),
        "shared": list(saved.shared),
        **_curves(saved),
    }


def _curves(saved: Saved) -> Facts:
    return {"epochs": saved.history["train"].shape[1]} if saved.history else {}


def _preprocessor(path: file.Path) -> Facts:
    from pymeta.data import Preprocessor

    prep = Preprocessor.load(path)
    return {"features": list(prep.features), "dtype": prep.dtype, "clip": prep.clip}


_KINDS = {"adapter": _adapter, "models": _models, "preprocessor": _preprocessor}


def text(found: Facts) -> str:
    """Facts in lines for people."""
    lines = []
    for name, value in found.items():
        if name == "tensors":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value)) or "none"
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"{name:<14}{value}")
    width = max((len(n) for n in found["tensors"]), default=0)
    lines.append("tensors")
    lines += [f"  {n:<{width}}  {t['dtype']} {t['shape']}" for n, t in found["tensors"].items()]
    return "\n".join(lines)


def command(words: Sequence[str]) -> int:
    """`pymeta inspect FILE [--json]`; 1 where it cannot be read."""
    parser = ArgumentParser(
        prog="pymeta inspect",
        description="What is in a file that pymeta wrote: an adapter, adapted models, or a "
        "preprocessor. Its checksums are compared first.",
    )
    parser.add_argument("file", help="a .safetensors file")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(list(words))
    try:
        found = facts(options.file)
    except (OSError, ValueError) as error:
        print(f"pymeta inspect: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=1) if options.json else text(found))
    return 0
