"""The files pymeta writes: safetensors, checked before anything in them is believed.

A file is what https://github.com/huggingface/safetensors describes (8 bytes with the length of a
JSON header, the header, the tensors' bytes), so that any safetensors reader can look into it. Its
metadata says what it is:

    format          "pymeta"
    kind            "adapter" (one start and how to adapt from it) or "models" (T adapted models)
    version         "1"
    data_checksum   CRC-32 of the tensors' bytes
    checksum        CRC-32 of everything in the header but itself
    and, each as JSON, what `architecture.py`, `stacked.py` and `adapter.py` put there.

Tensors with names that begin with a dot are pymeta's own; torch allows no parameter such a name.

`read` maps the tensors into memory and does not copy them: pages are read when they are touched,
and writing to one changes neither the file nor another reader's copy. Whatever is wrong with a
file is a ValueError that begins with its path. Like every memory-mapped file, it must not be
written to in place while it is in use; `write` never does that, it puts a new file in its place.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from pymeta.spec.fields import Fields

Path: TypeAlias = "str | os.PathLike[str]"

FORMAT = "pymeta"
VERSION = 1
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1}
_LARGEST_HEADER = 100_000_000  # the limit of safetensors itself


class Raw(NamedTuple):
    """A tensor as stored in a file: safetensors' name of its dtype, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray  # uint8 [bytes]


@dataclass(frozen=True)
class Contents:
    """What `read` found.

    Attributes:
        path: of the file, for messages.
        described: the metadata that are JSON, parsed.
        tensors: mapped from the file.
    """

    path: str
    described: dict[str, Any]
    tensors: dict[str, Raw]


@contextmanager
def errors_about(path: str) -> Iterator[None]:
    """Let every ValueError of the block begin with the path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ---- writing ----------------------------------------------------------------------------------


def _header(
    described: Mapping[str, str], tensors: Mapping[str, Raw]
) -> tuple[dict[str, Any], list[Raw]]:
    """The header, and the tensors in the order it gives them: the widest items first, aligned."""
    header: dict[str, Any] = {"__metadata__": dict(described)}
    ordered, end = [], 0
    for name in sorted(tensors, key=lambda n: (-ITEM_BYTES[tensors[n].dtype], n)):
        raw = tensors[name]
        begin, end = end, end + raw.data.nbytes
        header[name] = {
            "dtype": raw.dtype,
            "shape": list(raw.shape),
            "data_offsets": [begin, end],
        }
        ordered.append(raw)
    return header, ordered


def _header_checksum(header: Mapping[str, Any]) -> str:
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "checksum"}
    text = json.dumps({**header, "__metadata__": metadata}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def write(path: Path, kind: str, described: Mapping[str, Any], tensors: Mapping[str, Raw]) -> None:
    """Write a file whole or not at all: under another name first, then put in place.

    Args:
        path: where to; a file that is there is replaced.
        kind: "adapter" or "models".
        described: goes into the metadata, each value as JSON.
        tensors: by name.

    Raises:
        OSError: it cannot be written.
        ValueError: a tensor has the name that safetensors keeps for itself.
    """
    path = os.fspath(path)
    if "__metadata__" in tensors:
        raise ValueError("a parameter is called __metadata__, which no safetensors file can hold")
    metadata = {"format": FORMAT, "kind": kind, "version": str(VERSION)}
    metadata |= {name: json.dumps(value, allow_nan=False) for name, value in described.items()}
    header, ordered = _header(metadata, tensors)
    checksum = 0
    for raw in ordered:
        checksum = zlib.crc32(raw.data.data, checksum)
    header["__metadata__"]["data_checksum"] = f"{checksum:08x}"
    header["__metadata__"]["checksum"] = _header_checksum(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder, name = os.path.split(path)
    # not tempfile's: those are private to the user, whatever the umask says
    unfinished = os.path.join(folder, f".{name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with open(unfinished, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for raw in ordered:
                file.write(raw.data.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        if os.path.exists(unfinished):
            os.unlink(unfinished)
        raise


# ---- reading ----------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an entry appears twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _parsed(what: str, text: str | bytes) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read ({error})") from None


def _checked_by_safetensors(path: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"no valid safetensors file ({error})") from None


def _read_header(file: Any, size: int) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    if size == 0:
        raise ValueError("the file is empty")
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length % 8 or length > min(size - 8, _LARGEST_HEADER):
        raise ValueError(
            f"not a safetensors file, or a truncated one: {size} bytes, "
            f"of which the header would be {length}"
        )
    header = _parsed("the header", file.read(length))
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise ValueError("a safetensors file without metadata; pymeta did not write it")
    return header, 8 + length


def kind_of(path: Path) -> str:
    """What a file of pymeta's holds: "adapter", "models", "preprocessor".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: pymeta did not write it, or it is of a newer version.
    """
    path = os.fspath(path)
    with _opened(path) as file:
        metadata = _read_header(file, os.fstat(file.fileno()).st_size)[0]["__metadata__"]
        kind = metadata.get("kind")
        _check_kind(metadata, kind)
        if not isinstance(kind, str):
            raise ValueError("it does not say what it holds; pymeta did not write it")
        return kind


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A file to read, whose ValueErrors begin with its path."""
    if os.path.isdir(path):
        raise ValueError(f"{path}: is a folder")
    with open(path, "rb") as file, errors_about(path):
        yield file


def _check_kind(metadata: dict[str, Any], kind: str | None) -> None:
    found = metadata.get("format")
    if found != FORMAT:
        raise ValueError(f"its format is {found!r}, not {FORMAT!r}; pymeta did not write it")
    version = metadata.get("version")
    if not isinstance(version, str) or not (version.isascii() and version.isdigit()):
        raise ValueError(f"its version is {version!r}, which is not a number")
    if len(version) > 9 or int(version) > VERSION:
        raise ValueError(f"written by a newer pymeta: version {version}, this one reads {VERSION}")
    if int(version) < 1:
        raise ValueError(f"its version is {version}, this pymeta reads {VERSION}")
    if metadata.get("kind") != kind:
        raise ValueError(f"holds {metadata.get('kind')!r}, expected {kind!r}")


def _raw(name: str, entry: Any, data: np.ndarray) -> Raw:
    """One tensor of the mapped `data`, if that is what its entry in the header says."""
    fields = Fields(f"tensor {name}", entry)
    dtype = fields.text("dtype")
    shape, offsets = (fields.list_of(key, int) for key in ("shape", "data_offsets"))
    if dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name} has the dtype {dtype}, which pymeta does not write")
    begin, end = offsets if len(offsets) == 2 else (0, -1)
    item = ITEM_BYTES[dtype]
    fits = 0 <= begin <= end <= data.size and begin % item == 0 and all(n >= 0 for n in shape)
    if not fits or end - begin != math.prod(shape) * item:
        raise ValueError(
            f"tensor {name} of shape {list(shape)} cannot be the bytes {list(offsets)} "
            f"of {data.size}"
        )
    return Raw(dtype, shape, data[begin:end])


def read(path: Path, kind: str, *, verify: bool) -> Contents:
    """Open a file of pymeta's and map its tensors.

    Args:
        path: of the file.
        kind: what it must hold: "adapter" or "models".
        verify: also compare the tensors' bytes with their checksum, which reads all of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another kind, or of a newer version.
    """
    path = os.fspath(path)
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(file, size)
        _check_kind(header["__metadata__"], kind)
        _checked_by_safetensors(path)
        if header["__metadata__"].get("checksum") != _header_checksum(header):
            raise ValueError("the header does not have its checksum: the file is damaged")
        data = np.empty(0, np.uint8)
        if size > start:
            data = np.asarray(np.memmap(file, np.uint8, "c", start, (size - start,)))
        metadata = header.pop("__metadata__")
        if verify and f"{zlib.crc32(data.data):08x}" != metadata.get("data_checksum"):
            raise ValueError("the tensors do not have their checksum: the file is damaged")
        own = ("format", "kind", "version", "checksum", "data_checksum")
        described = {n: _parsed(n, text) for n, text in metadata.items() if n not in own}
        return Contents(path, described, {n: _raw(n, e, data) for n, e in header.items()})
