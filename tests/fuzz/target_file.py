"""Fuzz target: `Adapter.load` and `AdaptedArrays.load` on any file.

The first byte says what the others are. Even: the file as it is. Odd: a line of JSON, then the
tensors' bytes; the file is then put together of them, with the length of the header and the
checksums that belong to it, and metadata that are no strings written as JSON. So the fuzzer
reaches what lies behind the checksums without having to guess them.

A file is refused by a ValueError that begins with its path, or it can be used: whatever loads is
called, saved and loaded again, and is then the same.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from typing import Any

import numpy as np

from pymeta.models.adapter import Adapter  # not as pymeta.Adapter: imported, and instrumented, now
from pymeta.models.arrays import AdaptedArrays
from pymeta.models.file import _header_checksum

MOST_WORK = 1 << 16  # steps x parameters that a call may cost
OWN = ("format", "kind", "version", "checksum", "data_checksum")
FOLDER = tempfile.TemporaryDirectory(prefix="pymeta-fuzz-")
PATH = os.path.join(FOLDER.name, "x.safetensors")
AGAIN = os.path.join(FOLDER.name, "again.safetensors")


def whole(header: Any, tensors: bytes) -> bytes:
    """The file of a header and tensors, as `pymeta.models.file.write` would lay it out."""
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        metadata = {
            k: v if isinstance(v, str) else json.dumps(v)
            for k, v in header["__metadata__"].items()
            if k != "checksum"
        }
        metadata["data_checksum"] = f"{zlib.crc32(tensors):08x}"
        header = {**header, "__metadata__": metadata}
        metadata["checksum"] = _header_checksum(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + tensors


def content(data: bytes) -> bytes:
    """The file that the bytes mean."""
    if not data or data[0] % 2 == 0:
        return data[1:]
    line, _, tensors = data[1:].partition(b"\n")
    try:
        return whole(json.loads(line), tensors)
    except (ValueError, RecursionError):
        return len(line).to_bytes(8, "little") + line + tensors


def seed_of(file: bytes) -> bytes:
    """The opposite of `content`: an odd input that means this file."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = {
        k: v if k in OWN else json.loads(v) for k, v in header["__metadata__"].items()
    }
    return b"\1" + json.dumps(header).encode() + b"\n" + file[end:]


def cheap(adapter: Adapter, rows: int) -> bool:
    schedule = adapter.schedule
    steps = schedule.steps if schedule.epochs is None else schedule.epochs * rows
    return (steps + 1) * sum(p.size for p in adapter.parameters.values()) < MOST_WORK


def use_adapter(adapter: Adapter) -> None:
    rows = 4
    x = np.linspace(-1, 1, rows * adapter.in_features, dtype=adapter.dtype)
    y = np.zeros(rows, np.int64)
    if not adapter.loss.takes_classes:
        y = np.zeros((rows, adapter.out_features), adapter.dtype)
    x = x.reshape(rows, -1)
    repr(adapter)
    if cheap(adapter, rows):
        out = adapter.adapt_predict(x, y, x)
        assert out.shape == (rows, adapter.out_features)
        assert len(adapter.adapt(x[None], y[None])) == 1
    adapter.save(AGAIN)
    first = adapter._parts()
    again = Adapter.load(AGAIN)._parts()
    for parts in (first, again):
        lr, start = parts.pop("lr"), parts.pop("parameters")
        parts["arrays"] = {n: a.tobytes() for n, a in start.items()}
        parts["lr"] = None if lr is None else lr.tobytes()
    assert first == again


def use_models(models: AdaptedArrays) -> None:
    repr(models)
    tasks = len(models)
    x = np.ones((tasks, 2, models.architecture.in_features), models.dtype)
    if x.size * sum(p.size for p in models.parameters.values()) < MOST_WORK:
        assert models(x).shape == (tasks, 2, models.architecture.out_features)
    if tasks:
        models.state_dict(0)
        models[:1]
    models.save(AGAIN)
    assert len(AdaptedArrays.load(AGAIN, verify=True)) == tasks


def one_input(data: bytes) -> None:
    """Load the file that the bytes are, as each of its kinds."""
    with open(PATH, "wb") as file:
        file.write(content(data))
    for load, use in (
        (Adapter.load, use_adapter),
        (lambda p: AdaptedArrays.load(p, verify=False), None),
        (lambda p: AdaptedArrays.load(p, verify=True), use_models),
    ):
        try:
            found = load(PATH)
        except ValueError as error:
            assert str(error).startswith(f"{PATH}: "), error
            continue
        if use is not None:
            with np.errstate(all="ignore"):
                use(found)
