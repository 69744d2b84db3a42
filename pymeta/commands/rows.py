"""The rows of a table as tasks, for `pymeta adapt` and `pymeta predict`.

A table is what `pymeta.data.read_table` reads: Parquet, Feather or CSV. Its features are the
columns named by `--features`, or what `--preprocessor` makes of it, or every column that has no
other use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pymeta.data.table import Columns, as_text, is_missing, read_table
from pymeta.spec.losses import Loss
from pymeta.spec.show import counted

Array = Any


class Grouped(NamedTuple):
    """Rows in the order of their entities.

    Attributes:
        names: [T] the entities, sorted.
        sizes: [T] int64, each one's rows.
        order: [rows] int64: position `i` holds the table's row `order[i]`.
    """

    names: list[str]
    sizes: Array
    order: Array


def column(table: Columns, name: str, option: str) -> Array:
    """A column; ValueError naming the option where there is none of that name."""
    if name not in table:
        raise ValueError(f"{option}: no column is called {name!r}; there are {', '.join(table)}")
    return table[name]


def numbers(table: Columns, names: Sequence[str], option: str, dtype: Any) -> Array:
    """[rows, columns] finite numbers; ValueError that names the column that is not."""
    found = []
    for name in names:
        values = column(table, name, option)
        if values.dtype.kind not in "fiub":
            raise ValueError(
                f"{option}: {name} is not a column of numbers; encode it first (--preprocessor)"
            )
        missing = int((~np.isfinite(values.astype(np.float64))).sum())
        if missing:
            raise ValueError(
                f"{option}: {name}: {counted(missing, 'value is', 'values are')} missing or "
                "infinite; fill them first "
                f"(--preprocessor)"
            )
        found.append(values.astype(dtype))
    rows = len(next(iter(table.values()), ()))
    return np.stack(found, axis=1) if found else np.empty((rows, 0), dtype)


def features(table: Columns, options: Any, used: set[str], dtype: Any, width: int) -> Array:
    """[rows, width] the features that the options mean.

    Args:
        table: the columns.
        options: parsed; `features` and `preprocessor` are looked at.
        used: columns that are something else: the entity, the target, the weights.
        dtype: of the result.
        width: how many columns the model takes.
    """
    if options.preprocessor is not None:
        from pymeta.data import Preprocessor

        x = Preprocessor.load(options.preprocessor).transform(table).astype(dtype)
        what = "--preprocessor makes"
    else:
        names = options.features or [n for n in table if n not in used]
        x, what = numbers(table, names, "--features", dtype), f"columns {', '.join(names)} are"
    if x.shape[1] != width:
        raise ValueError(f"--features: the model takes {width}, the {what} {x.shape[1]}")
    return x


def targets(table: Columns, names: Sequence[str], loss: Loss, dtype: Any) -> Array:
    """[rows] classes for cross_entropy, else [rows, columns] values."""
    if not loss.takes_classes:
        return numbers(table, names, "--target", dtype)
    if len(names) != 1:
        raise ValueError(f"--target: cross_entropy takes one column of classes, got {len(names)}")
    values = numbers(table, names, "--target", np.float64)[:, 0]
    if (values != np.round(values)).any():
        raise ValueError(f"--target: {names[0]}: expected classes 0, 1, 2, ..., got fractions")
    return values.astype(np.int64)


def grouped(table: Columns, entity: str | None) -> Grouped:
    """Rows by entity; without one, all rows are of one task."""
    rows = len(next(iter(table.values()), ()))
    if rows == 0:
        raise ValueError("rows: the table has none")
    if entity is None:
        return Grouped(["all"], np.array([rows]), np.arange(rows))
    values = column(table, entity, "--entity")
    if is_missing(values).any():
        raise ValueError(
            f"--entity: {entity}: "
            f"{counted(int(is_missing(values).sum()), 'row has', 'rows have')} none"
        )
    labels = as_text(values).astype(str)
    names, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return Grouped(names.tolist(), sizes, np.argsort(codes, kind="stable"))


def read(path: str) -> Columns:
    """The table in a file; ValueError that begins with its path."""
    try:
        return read_table(path)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
