"""Loans, cards and transactions: a table with a row for each, and what its columns are.

A `Schema` says which columns are what. Those of two public files are known and taken where a table
has their columns; for a table of one's own it is given, or its features are all other columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pymeta.data import Panel
from pymeta.data.table import as_times, is_missing, read_table
from pymeta.tasks.groups import Array


@dataclass(frozen=True)
class Schema:
    """What the columns of a table are.

    Attributes:
        segment: the columns whose values together are the entity.
        target: 0 and 1, the column of the outcome.
        time: the column by which rows are ordered, or None.
        numeric: features that are numbers.
        categorical: features that are categories.
        logs: those of the numbers that are amounts, taken as log(1 + x) of what is positive.
        since: {new column: the column of an earlier time}, months from there to the row's time.
    """

    segment: tuple[str, ...]
    target: str
    time: str | None = None
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()
    since: Mapping[str, str] | None = None


LENDING_CLUB = Schema(
    ("addr_state",),
    "default",
    "issue_d",
    ("loan_amnt", "term", "int_rate", "installment", "annual_inc", "dti", "fico_range_low",
     "delinq_2yrs", "inq_last_6mths", "mths_since_last_delinq", "mths_since_last_record",
     "open_acc", "pub_rec", "revol_bal", "revol_util", "total_acc", "meets_policy"),
    ("purpose", "grade", "emp_length", "home_ownership", "verification_status"),
    ("loan_amnt", "annual_inc", "revol_bal", "installment"),
    {"credit age": "earliest_cr_line"},
)  # fmt: skip
_MONTHS = (1, 2, 3, 4, 5, 6)
TAIWAN = Schema(
    ("EDUCATION", "MARRIAGE"),
    "default",
    None,
    ("LIMIT_BAL", "AGE", "PAY_0", *(f"PAY_{m}" for m in _MONTHS[1:]),
     *(f"BILL_AMT{m}" for m in _MONTHS), *(f"PAY_AMT{m}" for m in _MONTHS)),
    ("SEX", "EDUCATION", "MARRIAGE"),
    ("LIMIT_BAL", *(f"BILL_AMT{m}" for m in _MONTHS), *(f"PAY_AMT{m}" for m in _MONTHS)),
)  # fmt: skip
KNOWN = (LENDING_CLUB, TAIWAN)


def schema_of(table: Mapping[str, Array]) -> Schema | None:
    """The known schema whose columns a table has; None where there is none."""
    for schema in KNOWN:
        wanted = {schema.target, *schema.segment, *schema.numeric, *schema.categorical}
        if wanted | ({schema.time} - {None}) <= table.keys():
            return schema
    return None


def loans_panel(
    data: Any,
    columns: Mapping[str, str] | None = None,
    *,
    numeric: str | Sequence[str] | None = None,
    categorical: str | Sequence[str] | None = None,
) -> Panel:
    """A panel of a table's rows, by its schema and what is given in its place.

    Args:
        data: a table or a path, as `pymeta.data.Panel` takes it.
        columns: {"segment": ..., "target": ..., "time": ...}, those that are not a known schema's:
            the column that is the entity (or several, "a,b", whose values together are), the one
            of 0 and 1, and the one of times.
        numeric: features that are numbers.
        categorical: features that are categories. With both None and no known schema, all columns
            that are nothing else.

    Raises:
        ValueError: a column is missing, or segment or target are not given and not known.
    """
    given = dict(columns or {})
    unknown = given.keys() - {"segment", "target", "time"}
    if unknown:
        raise ValueError(f"columns: expected segment, target and time, got {sorted(unknown)}")
    segment, target, time = (given.get(role) for role in ("segment", "target", "time"))
    table = dict(read_table(data))
    known = schema_of(table)
    if known is None and (segment is None or target is None):
        raise ValueError(
            "columns: expected segment and target, because the table is none of the known ones"
        )
    schema = known or Schema((), "")
    if segment is not None:
        schema = replace(schema, segment=_names(segment))
    schema = replace(schema, target=target or schema.target, time=time or schema.time)
    if numeric is not None or categorical is not None:
        features = _names(numeric or ()), _names(categorical or ())
        schema = replace(schema, numeric=features[0], categorical=features[1], logs=(), since=None)
    named = (*schema.segment, schema.target, *schema.numeric, *schema.categorical)
    for name in (*named, *([schema.time] if schema.time else ())):
        if name not in table:
            there = ", ".join(table)[:300]
            raise ValueError(f"columns: no column is called {name!r}; there are {there}")
    return _made(table, schema)


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        return tuple(name for name in given.split(",") if name)
    return tuple(given)


def _made(table: dict[str, Array], schema: Schema) -> Panel:
    numeric = list(schema.numeric)
    for name in schema.logs:
        values = table[name].astype(np.float64)
        table[name] = np.log1p(np.maximum(values, 0))
    for name, column in (schema.since or {}).items():
        assert schema.time is not None
        now, then = as_times(schema.time, table[schema.time]), table[column]
        there = ~is_missing(then)
        months = np.full(len(now), np.nan)
        months[there] = (now[there] - as_times(column, then[there])) / np.timedelta64(30, "D")
        table[name] = months
        numeric.append(name)
    entity, features = schema.segment[0], (tuple(numeric), tuple(schema.categorical))
    if len(schema.segment) > 1 or entity in features[0] + features[1]:
        entity = " x ".join(schema.segment) + " (segment)"
        parts = [table[c].astype(str) for c in schema.segment]
        table[entity] = np.array(["|".join(p) for p in zip(*parts, strict=True)], dtype=object)
    kept = ~is_missing(table[entity]) & ~is_missing(table[schema.target])
    table = {name: values[kept] for name, values in table.items()}
    own = {entity, schema.target, schema.time}
    given = bool(features[0] or features[1])
    return Panel(
        table,
        entity=entity,
        time=schema.time,
        target=schema.target,
        numeric=[n for n in features[0] if n not in own] if given else None,
        categorical=[n for n in features[1] if n not in own] if given else None,
    )
