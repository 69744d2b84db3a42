"""Bodies to arrays and back: JSON, numpy's npz, and Arrow's stream format, by content type.

    JSON    schemas.py says what is in it
    npz     xs [rows of all tasks, in], ys, weights, offset, xq, query_offset; support_sizes [T]
            and query_sizes [T] say how the rows are shared among the tasks; left out, there is one
    Arrow   a table with a record for each task: xs and xq are lists of lists of numbers, ys,
            weights and offsets lists of numbers or of lists

Nothing is unpickled, and what an npz would unpack to is counted before it is unpacked.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json
from starlette.responses import Response

from pymeta.serve import schemas
from pymeta.serve.model import Model
from pymeta.serve.problem import Problem, invalid, of_validation
from pymeta.serve.settings import Limits
from pymeta.spec.show import counted

JSON = "application/json"
NPZ = "application/x-npz"
ARROW = "application/vnd.apache.arrow.stream"
KINDS = (JSON, NPZ, ARROW)
_BESIDES = ("weights", "offset", "query_offset")


class Tasks(NamedTuple):
    """T tasks, checked: lists of arrays as `Adapter.adapt_predict` takes them."""

    xs: list[np.ndarray]
    ys: list[np.ndarray]
    weights: list[np.ndarray] | None
    xq: list[np.ndarray]
    offset: list[np.ndarray] | None = None
    query_offset: list[np.ndarray] | None = None

    @property
    def form(self) -> tuple[int, ...]:
        """What tasks of one native call have in common: the axes of each part, 0 for none."""
        parts = (self.ys, self.weights, self.offset, self.query_offset)
        return tuple(part[0].ndim if part else 0 for part in parts)

    @property
    def rows(self) -> int:
        """Rows of all supports and queries: what a call's time grows with."""
        return sum(map(len, self.xs)) + sum(map(len, self.xq))


@dataclass
class Answer:
    """What is answered to each task."""

    model: str
    predictions: Sequence[np.ndarray]  # T arrays [rows, out]
    status: Sequence[int]
    probabilities: Sequence[np.ndarray] | None = None
    attributions: Sequence[np.ndarray] | None = None  # T arrays [rows, in]
    explained: Sequence[np.ndarray] | None = None  # T arrays [rows], which output it is
    more: dict[str, Any] = field(default_factory=dict)  # members of the JSON body


def kind_of(content_type: str | None) -> str:
    """The kind of a body; 415 where it is not one of ours."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind in KINDS:
        return kind
    raise Problem(415, f"content-type: expected {', '.join(KINDS)}, got {kind[:60] or 'none'}")


def parse(adapter: TypeAdapter[Any], body: bytes) -> Any:
    """A JSON body as its schema has it; a Problem where it is not."""
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        raise of_validation(errors) from None


# ---- requests ---------------------------------------------------------------------------------


def read_tasks(kind: str, body: bytes, model: Model, limits: Limits) -> Tasks:
    """The tasks of a request."""
    given: Sequence[Any]
    if kind == JSON:
        given = parse(schemas.ADAPT_PREDICT, body).tasks
    else:
        given = _records(kind, body, ("xs", "ys", "xq"), _BESIDES, limits)
    if not 1 <= len(given) <= limits.tasks:
        raise invalid("tasks", f"expected 1 to {limits.tasks}, got {len(given)}")
    xs: list[Any] = []
    ys: list[Any] = []
    weights: list[Any] = []
    xq: list[Any] = []
    for i, task in enumerate(given):
        place = f"tasks.{i}"
        x, y, w = support(task, place, model, limits, stored=False)
        xs.append(x)
        ys.append(y)
        weights.append(w)
        xq.append(queries(task, place, model, limits))
    if model.adapter.loss.takes_classes:
        ys = _of_one_kind(ys, model)
    return Tasks(
        xs,
        ys,
        _weights(weights, xs, model),
        xq,
        _offsets("offset", given, xs, model),
        _offsets("query_offset", given, xq, model),
    )


def _of_one_kind(ys: list[np.ndarray], model: Model) -> list[np.ndarray]:
    """A request's targets are all labels or all probabilities; none of no rows are of any kind."""
    soft = next((y for y in ys if y.ndim == 2), None)
    if soft is not None:
        nothing = np.zeros((0, soft.shape[1]), model.adapter.dtype)
        ys = [y if len(y) else nothing for y in ys]
        _check_alike("ys", ys)
    return ys


def _weights(weights: list[Any], xs: list[np.ndarray], model: Model) -> list[np.ndarray] | None:
    """A request's weights: none at all, or ones where a task has none."""
    there = next((w for w in weights if w is not None), None)
    if there is None:
        return None
    _check_alike("weights", weights)
    columns, dtype = there.shape[1:], model.adapter.dtype
    return [
        np.ones((len(x), *columns), dtype) if w is None else w
        for w, x in zip(weights, xs, strict=True)
    ]


def _offsets(
    name: str, given: Sequence[Any], rows: list[np.ndarray], model: Model
) -> list[np.ndarray] | None:
    """A request's offsets of one side: none at all, or zeros where a task has none."""
    values = [getattr(task, name) for task in given]
    if all(value is None for value in values):
        return None
    out, dtype = model.adapter.out_features, model.adapter.dtype
    return [
        np.zeros((len(x), out), dtype)
        if value is None
        else model.offset(f"tasks.{i}.{name}", value, len(x))
        for i, (value, x) in enumerate(zip(values, rows, strict=True))
    ]


def support(
    task: Any, place: str, model: Model, limits: Limits, *, stored: bool
) -> tuple[Any, Any, Any]:
    """(xs, ys, weights or None) of one task.

    Rows that are to be stored have one label and one weight each; others may have probabilities of
    classes, and weights of single targets.
    """
    prefix = f"{place}." if place else ""
    _check_rows(f"{prefix}xs", task.xs, limits)
    x = model.rows(f"{prefix}xs", task.xs)
    y = model.targets(f"{prefix}ys", task.ys, len(x), soft=not stored)
    if task.weights is None:
        return x, y, None
    return x, y, model.weights(f"{prefix}weights", task.weights, len(x), single=not stored)


def queries(task: Any, place: str, model: Model, limits: Limits) -> np.ndarray:
    """The rows to predict of one task."""
    name = f"{place}.xq" if place else "xq"
    _check_rows(name, task.xq, limits)
    return model.rows(name, task.xq)


def read_queries(kind: str, body: bytes, model: Model, limits: Limits) -> np.ndarray:
    """The rows to predict of an entity."""
    return queries(_only(kind, body, schemas.QUERIES, ("xq",), (), limits), "", model, limits)


def read_rows(kind: str, body: bytes, model: Model, limits: Limits) -> tuple[Any, Any, Any, Any]:
    """(xs, ys, weights or None, what else was said) of rows to append."""
    given = _only(kind, body, schemas.ROWS, ("xs", "ys"), ("weights", "at"), limits)
    x, y, w = support(given, "", model, limits, stored=True)
    if not len(x):
        raise invalid("xs", "expected at least one row")
    if given.at is not None and len(given.at) != len(x):
        raise invalid("at", f"expected {len(x)} time stamps, one for each row, got {len(given.at)}")
    return x, y, w, given


def _only(kind: str, body: bytes, schema: Any, names: Any, optional: Any, limits: Limits) -> Any:
    if kind == JSON:
        return parse(schema, body)
    given = _records(kind, body, names, optional, limits)
    if len(given) != 1:
        raise invalid("tasks", f"expected one record for one entity, got {len(given)}")
    return given[0]


def _check_rows(name: str, rows: Any, limits: Limits) -> None:
    if len(rows) > limits.rows:
        raise invalid(name, f"expected at most {counted(limits.rows, 'row')}, got {len(rows)}")


def _check_alike(name: str, parts: list[Any]) -> None:
    """A Problem where tasks of one request have targets or weights of different kinds."""
    axes = [(i, part.ndim) for i, part in enumerate(parts) if part is not None]
    odd = next((i for i, n in axes if n != axes[0][1]), None)
    if odd is not None:
        raise invalid(
            f"tasks.{odd}.{name}",
            f"expected {counted(axes[0][1], 'axis')} as tasks.{axes[0][0]} has: a request's "
            "tasks have labels "
            f"or probabilities, and weights of rows or of targets",
        )


class _Record:
    """One task of a binary body."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        nothing = dict.fromkeys(("weights", "at", "window", "offset", "query_offset"))
        self.__dict__.update({**nothing, **values})


def _records(kind: str, body: bytes, names: Any, optional: Any, limits: Limits) -> list[_Record]:
    read = _npz_records if kind == NPZ else _arrow_records
    try:
        return read(body, names, optional, limits)
    except Problem:
        raise
    except Exception as error:  # whatever these readers say of bytes that are no such file
        raise Problem(400, f"the body is not {kind}: {type(error).__name__}") from None


def _npz_records(body: bytes, names: Any, optional: Any, limits: Limits) -> list[_Record]:
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        if sum(info.file_size for info in archive.infolist()) > limits.body_bytes:
            raise Problem(413, f"the body unpacks to more than {limits.body_bytes} bytes")
    with np.load(io.BytesIO(body), allow_pickle=False) as file:
        sizes = {"xs": "support_sizes", "xq": "query_sizes"}
        known = {*names, *optional, *sizes.values()}
        for name in file.files:
            if name not in known:
                raise invalid(name[:60], f"unknown; expected {', '.join(sorted(known))}")
        arrays = {name: np.asarray(file[name]) for name in file.files}
    for name in names:
        if name not in arrays:
            raise invalid(name, "missing")
    counts = {by: arrays.pop(by) for by in sizes.values() if by in arrays}
    cut: dict[str, Any] = {}
    for name, array in arrays.items():
        by = sizes["xq" if name in ("xq", "query_offset") else "xs"]
        cut[name] = _cut(name, array, by, counts.get(by))
    tasks = {len(parts) for parts in cut.values()}
    if len(tasks) != 1:
        raise invalid("query_sizes", "expected as many tasks as support_sizes has")
    return [_Record({n: parts[i] for n, parts in cut.items()}) for i in range(tasks.pop())]


def _cut(name: str, array: np.ndarray, by: str, sizes: np.ndarray | None) -> list[np.ndarray]:
    """The rows of all tasks, cut into those of each."""
    if array.ndim == 0:
        raise invalid(name, "expected an array with an axis of rows")
    if sizes is None:
        return [array]
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or (sizes.size and sizes.min() < 0):
        raise invalid(by, "expected integers >= 0")
    if int(sizes.sum(dtype=np.float64)) != len(array):
        raise invalid(by, f"expected a sum of {len(array)}, the rows of {name}")
    return np.split(array, np.cumsum(sizes)[:-1]) if len(sizes) else []


def _arrow_records(body: bytes, names: Any, optional: Any, limits: Limits) -> list[_Record]:
    import pyarrow as pa

    with pa.ipc.open_stream(pa.BufferReader(body)) as reader:
        table = reader.read_all()
    if table.nbytes > 2 * limits.body_bytes:
        raise Problem(413, f"the body unpacks to more than {2 * limits.body_bytes} bytes")
    for name in table.column_names:
        if name not in (*names, *optional):
            raise invalid(name[:60], f"unknown; expected {', '.join((*names, *optional))}")
    for name in names:
        if name not in table.column_names:
            raise invalid(name, "missing")
    columns = {name: _arrow_lists(name, table.column(name)) for name in table.column_names}
    return [_Record({n: rows[i] for n, rows in columns.items()}) for i in range(table.num_rows)]


def _arrow_lists(name: str, column: Any) -> list[Any]:
    """A column of lists, or of lists of lists of one length, as arrays; None for null."""
    import pyarrow as pa

    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise invalid(name, f"expected a list for each task, got {str(column.type)[:60]}")
    found: list[Any] = []
    for scalar in column:
        if not scalar.is_valid:
            found.append(None)
            continue
        values = scalar.values
        if values.null_count:
            raise invalid(name, "expected no nulls")
        if pa.types.is_nested(values.type):
            lengths = values.value_lengths().to_numpy(zero_copy_only=False)
            flat = values.flatten()
            if flat.null_count or (len(lengths) and lengths.min() != lengths.max()):
                raise invalid(name, "expected rows of one length, without nulls")
            columns = int(lengths[0]) if len(lengths) else 0
            found.append(flat.to_numpy(zero_copy_only=False).reshape(len(lengths), columns))
        elif pa.types.is_timestamp(values.type):
            found.append(values.to_pylist())
        else:
            found.append(values.to_numpy(zero_copy_only=False))
    return found


# ---- answers ----------------------------------------------------------------------------------


def respond(
    kind: str, answer: Answer, explanations: Any = None, method: str | None = None
) -> Response:
    """The answer in the kind that was asked for."""
    if kind == NPZ:
        return Response(_to_npz(answer), media_type=NPZ)
    if kind == ARROW:
        return Response(_to_arrow(answer), media_type=ARROW)
    body: dict[str, Any] = {
        "model": answer.model,
        "predictions": [p.tolist() for p in answer.predictions],
        "status": list(answer.status),
    }
    if answer.probabilities is not None:
        body["probabilities"] = [p.tolist() for p in answer.probabilities]
    if explanations is not None:
        body |= {"method": method, "explanations": explanations}
    # numbers that are not finite become null
    return Response(to_json({**body, **answer.more}, inf_nan_mode="null"), media_type=JSON)


def _columns(answer: Answer) -> dict[str, Sequence[np.ndarray]]:
    """What has a value for each row, by name."""
    found = {
        "predictions": answer.predictions,
        "probabilities": answer.probabilities,
        "attributions": answer.attributions,
        "explained": answer.explained,
    }
    return {name: values for name, values in found.items() if values is not None}


def _to_npz(answer: Answer) -> bytes:
    into = io.BytesIO()
    columns = _columns(answer).items()
    arrays: dict[str, Any] = {name: np.concatenate(list(v)) for name, v in columns}
    arrays["query_sizes"] = np.array([len(p) for p in answer.predictions], np.int64)
    arrays["status"] = np.array(answer.status, np.int8)
    arrays["model"] = np.array(answer.model)
    np.savez(into, **arrays)
    return into.getvalue()


def _to_arrow(answer: Answer) -> bytes:
    import pyarrow as pa

    columns = {name: pa.array([v.tolist() for v in vs]) for name, vs in _columns(answer).items()}
    table = pa.table({**columns, "status": pa.array(list(answer.status), pa.int8())})
    table = table.replace_schema_metadata({"model": answer.model})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data
