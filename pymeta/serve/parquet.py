"""Entities' rows as Parquet: columns entity, at, x, y, weight; a record for each row."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pymeta.serve.entities import arrived
from pymeta.serve.model import Model
from pymeta.serve.problem import Problem, invalid
from pymeta.serve.settings import Limits
from pymeta.serve.store import Labelled

MEDIA_TYPE = "application/vnd.apache.parquet"
_KNOWN = ("entity", "at", "x", "y", "weight")


def key_of(body: bytes) -> str:
    """The idempotency key of a file."""
    return f"import-{hashlib.sha256(body).hexdigest()}"


def read(
    body: bytes, model: Model, limits: Limits, check_name: Callable[[str, str], str]
) -> tuple[list[tuple[str, Labelled]], bool]:
    """The rows of a file by entity, in the order they came in; whether they came with their times.

    Raises:
        Problem: 400 where it is no Parquet file, 413 where it unpacks to too much, 422 where a
            column or a value will not do.
    """
    try:
        table = _table(body, limits)
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        return _by_entity(columns, table.num_rows, model, check_name), "at" in columns
    except Problem:
        raise
    except Exception as error:  # whatever the reader says of bytes that are no such file
        raise Problem(400, f"the body is not Parquet: {type(error).__name__}") from None


def _table(body: bytes, limits: Limits) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(pa.BufferReader(body))
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    if sum(group.total_byte_size for group in groups) > 4 * limits.body_bytes:
        raise Problem(413, f"the file unpacks to more than {4 * limits.body_bytes} bytes")
    names = file.schema_arrow.names
    for name in names:
        if name not in _KNOWN:
            raise invalid(name[:60], f"unknown column; expected {', '.join(_KNOWN)}")
    for name in ("entity", "x", "y"):
        if name not in names:
            raise invalid(name, "missing column")
    return file.read(use_threads=False)  # this thread's memory alone


def _by_entity(
    columns: dict[str, Any], count: int, model: Model, check_name: Callable[[str, str], str]
) -> list[tuple[str, Labelled]]:
    names = columns["entity"].to_pylist()
    for name in set(names):
        if not isinstance(name, str):
            raise invalid("entity", "expected strings, without nulls")
        check_name(name, "entity")
    x = model.rows("x", _values("x", columns["x"], count))
    y = model.targets("y", _values("y", columns["y"], count), count).astype(np.float64)
    weights = np.ones(count)
    if "weight" in columns:
        weights = model.weights("weight", _values("weight", columns["weight"], count), count)
    at = _times(columns["at"], count) if "at" in columns else arrived(count)
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    return [
        (name, Labelled(x[i].astype(np.float64), y[i], weights[i].astype(np.float64), at[i]))
        for name, i in places.items()
    ]


def _values(name: str, column: Any, count: int) -> np.ndarray:
    """Numbers [rows], or [rows, n] of a column of lists of one length."""
    import pyarrow as pa

    if column.null_count:
        raise invalid(name, "expected no nulls")
    if not pa.types.is_nested(column.type):
        flat: np.ndarray = column.to_numpy(zero_copy_only=False)
        return flat
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    values = column.flatten()
    if values.null_count or (count and lengths.min() != lengths.max()):
        raise invalid(name, "expected lists of one length, without nulls")
    numbers: np.ndarray = values.to_numpy(zero_copy_only=False)
    return numbers.reshape(count, -1)


def _times(column: Any, count: int) -> np.ndarray:
    import pyarrow as pa

    if column.null_count or not pa.types.is_timestamp(column.type) or column.type.tz is None:
        raise invalid("at", "expected timestamps with a time zone, without nulls")
    cast = column.cast(pa.timestamp("us", "UTC"), safe=False).cast(pa.int64())
    found: np.ndarray = cast.to_numpy(zero_copy_only=False)
    return found


def write(pages: Callable[[], Iterator[tuple[str, Labelled]]]) -> Path:
    """All rows in a new temporary file, whose path is returned; the caller deletes it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("entity", pa.string()),
            ("at", pa.timestamp("us", "UTC")),
            ("x", pa.list_(pa.float64())),
            ("y", pa.list_(pa.float64())),
            ("weight", pa.float64()),
        ]
    )
    descriptor, name = tempfile.mkstemp(prefix="pymeta-", suffix=".parquet")
    os.close(descriptor)
    try:
        with pq.ParquetWriter(name, schema) as writer:
            for entity, rows in pages():
                columns = [
                    pa.array([entity] * len(rows), pa.string()),
                    pa.array(rows.at).cast(pa.timestamp("us", "UTC")),
                    pa.array(list(rows.x), pa.list_(pa.float64())),
                    pa.array(list(rows.y), pa.list_(pa.float64())),
                    pa.array(rows.weights),
                ]
                writer.write_table(pa.table(columns, schema=schema))
    except BaseException:
        Path(name).unlink()
        raise
    return Path(name)
