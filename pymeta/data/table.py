"""Any table as columns: {name: array}, each of numbers, times or objects (strings).

    numbers   float, int or bool arrays; missing ones are NaN
    times     datetime64, in UTC and without a zone; missing ones are NaT
    strings   object arrays; missing ones are None

pandas and polars frames, Arrow tables, dicts of arrays, and paths of Parquet, Feather and CSV files
are taken. pandas and pyarrow are imported where a table needs them; polars never is.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, TypeAlias

import numpy as np

from pymeta.data.optional import need
from pymeta.spec.show import counted
from pymeta.tasks.groups import Array

Columns: TypeAlias = dict[str, Array]

_READERS = {
    ".parquet": "read_parquet",
    ".pq": "read_parquet",
    ".feather": "read_feather",
    ".arrow": "read_feather",
    ".csv": "read_csv",
    ".csv.gz": "read_csv",
    ".csv.zip": "read_csv",
}


def is_missing(values: Array) -> Array:
    """Which values of a column are missing: bool [rows]."""
    if values.dtype.kind == "f":
        missing: Array = np.isnan(values)
    elif values.dtype.kind == "M":
        missing = np.isnat(values)
    elif values.dtype.kind == "O":
        missing = np.fromiter((v is None for v in values.tolist()), bool, len(values))
    else:
        missing = np.zeros(len(values), bool)
    return missing


def read_table(source: Any) -> Columns:
    """The columns of a table, all of equally many rows.

    Args:
        source: a pandas or polars DataFrame, an Arrow table, a dict of arrays, or a path that
            ends in .parquet, .feather, .csv or .csv.gz.

    Raises:
        ImportError: the table needs pandas or pyarrow, which is not installed.
        TypeError: it is none of these, or a column holds what is neither numbers, strings nor
            times.
        ValueError: the file is of an unknown kind, two columns have one name, or columns differ in
            their rows.
    """
    if isinstance(source, (str, os.PathLike)):
        source = _read_file(os.fspath(source))
    columns = {str(name): _column(str(name), values) for name, values in _series(source)}
    rows = {len(values) for values in columns.values()}
    if len(rows) > 1:
        sizes = ", ".join(f"{name} {len(values)}" for name, values in columns.items())
        raise ValueError(f"data: expected columns of equally many rows, got {sizes[:200]}")
    return columns


def index_names(source: Any) -> list[str]:
    """The names of a pandas table's index, which is none of its columns."""
    names = getattr(getattr(source, "index", None), "names", None) or []
    return [name for name in names if isinstance(name, str)]


def _read_file(path: str) -> Any:
    ending = next((e for e in sorted(_READERS, key=len, reverse=True) if path.endswith(e)), None)
    if ending is None:
        raise ValueError(
            f"data: expected a path that ends in {', '.join(_READERS)}, got {path!r}; read other "
            f"files with pandas or polars, and give the DataFrame"
        )
    pandas = need("pandas", f"reading {os.path.basename(path)}")
    if _READERS[ending] != "read_csv":
        need("pyarrow", f"reading {os.path.basename(path)}")
    return getattr(pandas, _READERS[ending])(path)


def _series(source: Any) -> Iterable[tuple[Any, Any]]:
    """Names and columns of a table in memory."""
    if isinstance(source, Mapping):
        return source.items()
    root = type(source).__module__.partition(".")[0]
    if root == "pyarrow":
        source = source.to_pandas()
        root = "pandas"
    lazy = hasattr(source, "collect")
    names = [] if lazy else list(getattr(source, "columns", ()))
    if root == "polars" and not lazy:
        return [(name, source[name]) for name in names]
    if root != "pandas" or not hasattr(source, "iloc"):
        cure = "; call its .collect() first" if lazy else ""
        raise TypeError(
            f"data: expected a DataFrame of pandas or polars, an Arrow table, a dict of arrays or "
            f"a path, got {type(source).__name__}{cure}"
        )
    twice = sorted({str(n) for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"data: expected one column of each name, got several called {twice}")
    return [(name, source[name]) for name in names]


def _column(name: str, values: Any) -> Array:
    """One column as an array of one of the three kinds."""
    root = type(values).__module__.partition(".")[0]
    array = _from_pandas(values) if root == "pandas" else _as_array(values)
    if array.ndim != 1:
        raise ValueError(f"data: {name}: expected one value a row, got shape {list(array.shape)}")
    if array.dtype.kind in "US":
        return array.astype(str).astype(object)
    if array.dtype.kind == "O":
        return _of_objects(name, array)
    if array.dtype.kind == "M" or array.dtype.kind in "fiub":
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    raise TypeError(
        f"data: {name}: expected numbers, strings or times, got dtype {array.dtype}; leave the "
        f"column out, or convert it"
    )


def _as_array(values: Any) -> Array:
    if hasattr(values, "to_numpy"):
        return np.asarray(values.to_numpy())
    if isinstance(values, (list, tuple)):  # no strings of what is missing
        objects = np.empty(len(values), object)
        objects[:] = values
        return objects
    return np.asarray(values)


def _from_pandas(series: Any) -> Array:
    types = need("pandas", "a pandas column").api.types
    kind = series.dtype
    if types.is_datetime64_any_dtype(kind):
        if getattr(series.dt, "tz", None) is not None:
            series = series.dt.tz_convert("UTC").dt.tz_localize(None)
        return np.asarray(series.to_numpy())
    if type(kind).__name__ == "PeriodDtype":
        return np.asarray(series.dt.to_timestamp().to_numpy())
    if type(kind).__name__ != "CategoricalDtype" and types.is_numeric_dtype(kind):  # and bools
        if isinstance(kind, np.dtype):
            return np.asarray(series.to_numpy())
        if series.isna().any():
            return np.asarray(series.to_numpy(dtype=np.float64, na_value=np.nan))
        return np.asarray(series.to_numpy(dtype=kind.numpy_dtype))
    objects = series.astype(object)
    return np.asarray(objects.where(objects.notna(), None).to_numpy(), dtype=object)


def _of_objects(name: str, values: Array) -> Array:
    """Objects as numbers or times where they are such, as strings where they are those."""
    items = [None if v is None or v != v else v for v in values.tolist()]  # NaN is not itself
    found = {type(v) for v in items if v is not None}
    if not found and any(isinstance(v, float) for v in values.tolist()):
        return np.full(len(items), np.nan)
    if found <= {str}:
        out = np.empty(len(items), object)
        out[:] = items
        return out
    if all(issubclass(t, (bool, np.bool_)) for t in found) and None not in items:
        return np.array(items, bool)
    if all(issubclass(t, (bool, int, float, Decimal, np.number, np.bool_)) for t in found):
        return np.array([np.nan if v is None else float(v) for v in items])
    if all(issubclass(t, (datetime.date, np.datetime64)) for t in found):
        return np.array(["NaT" if v is None else v for v in items], "datetime64[us]")
    kinds = " and ".join(sorted(t.__name__ for t in found))
    raise TypeError(
        f"data: {name}: expected numbers, strings or times, got a column of {kinds}; leave it "
        f"out, or convert it"
    )


def as_times(name: str, values: Array) -> Array:
    """A column of times, or of numbers that order rows; strings are read as ISO 8601."""
    if values.dtype.kind == "O":
        try:
            values = np.array(
                ["NaT" if v is None else v for v in values.tolist()], "datetime64[ns]"
            )
        except ValueError as error:
            raise ValueError(
                f"time: {name}: expected times such as 2011-12-31, got text that is none "
                f"({error}); convert it, as by pandas.to_datetime"
            ) from None
    missing = is_missing(values)
    if missing.any():
        raise ValueError(
            f"time: {name}: {counted(int(missing.sum()), 'row has', 'rows have')} no time; drop "
            "or fill them"
        )
    return values


def time_text(time: Any) -> str:
    """A time for a message: a day alone, where it is midnight."""
    if not isinstance(time, np.datetime64):
        return f"{time:g}" if isinstance(time, float) else str(time)
    day = time.astype("datetime64[D]")
    return str(day if day == time else time)


def as_text(values: Array) -> Array:
    """A column's values as strings [rows] for comparison; missing ones are None.

    1, 1.0 and "1" are the same, whatever dtype a file gave the column.
    """
    missing = is_missing(values)
    if values.dtype.kind == "O":
        return values
    distinct, codes = np.unique(values, return_inverse=True)
    texts = np.empty(len(distinct), object)
    texts[:] = [_text(v) for v in distinct.tolist()]
    out: Array = texts[codes]
    out[missing] = None
    return out


def _text(value: Any) -> str:
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else str(value)
