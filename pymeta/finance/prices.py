"""Daily prices: read from a file, and what jobs make of them.

    close, and if there are: open, high, low     float64 [stocks, days], NaN where there is no row

Read from an .npz of such arrays with `dates` [days] and `tickers` [stocks], or from a table with a
row for each stock and day.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymeta.data.table import as_times, read_table
from pymeta.tasks.groups import Array, labels_of

COLUMNS = {"entity": "ticker", "time": "date", "close": "close"}
OPTIONAL = ("open", "high", "low")


@dataclass(frozen=True)
class Prices:
    """Arrays [stocks, days] of prices, sorted by stock and by day.

    Attributes:
        names: [stocks].
        days: [days], datetime64[D].
        close: [stocks, days].
        others: {"open", "high", "low"}: likewise, those that there are.
        groups: [stocks], a sector of each, or None.
    """

    names: Array
    days: Array
    close: Array
    others: Mapping[str, Array]
    groups: Array | None = None

    @property
    def returns(self) -> Array:
        """[stocks, days], logarithmic, NaN where a close is missing; the first day is NaN."""
        out = np.full(self.close.shape, np.nan)
        out[:, 1:] = np.diff(np.log(self.close), axis=1)
        return out

    def last(self, days: int) -> Prices:
        """The last days."""
        others = {k: v[:, -days:] for k, v in self.others.items()}
        return Prices(self.names, self.days[-days:], self.close[:, -days:], others, self.groups)

    def variance(self) -> Array:
        """[stocks, days], each day's realised variance in squared per cent, > 0 or NaN.

        Garman and Klass 1980 of open, high, low and close with the squared return overnight;
        without those, the squared return. Days without a move get a thousandth of the stock's
        median, for logarithms.
        """
        if all(name in self.others for name in OPTIONAL):
            o, h, low = (np.log(self.others[n]) for n in OPTIONAL)
            c = np.log(self.close)
            night = np.full(c.shape, np.nan)
            night[:, 1:] = o[:, 1:] - c[:, :-1]
            inside = 0.5 * (h - low) ** 2 - (2 * np.log(2) - 1) * (c - o) ** 2
            found = np.maximum(inside, 0) + night**2
        else:
            found = self.returns**2
        found = 1e4 * found
        positive = np.where(found > 0, found, np.nan)
        with np.errstate(all="ignore"):
            floor = 1e-3 * np.nanmedian(positive, axis=1, keepdims=True)
        return np.where(np.isfinite(found), np.maximum(found, floor), np.nan)


def read_prices(data: Any, columns: Mapping[str, str] | None = None) -> Prices:
    """Prices of a file or a table.

    Args:
        data: the path of an .npz with `close` [stocks, days], `dates`, `tickers`, and maybe `open`,
            `high`, `low`, `sector`; or a table as `pymeta.data.Panel` takes it, with a row for each
            stock and day.
        columns: what columns of a table are called, where that is not {"entity": "ticker",
            "time": "date", "close": "close", "open": "open", "high": "high", "low": "low"}.

    Raises:
        ValueError: a column is missing, or a stock has two rows of one day.
    """
    if isinstance(data, Prices):
        return data
    if isinstance(data, (str, os.PathLike)) and os.fspath(data).endswith(".npz"):
        return _from_arrays(os.fspath(data))
    table = read_table(data)
    named = {**COLUMNS, **{n: n for n in OPTIONAL if n in table}, **(columns or {})}
    for role, name in named.items():
        if name not in table:
            known = ", ".join(table)
            raise ValueError(
                f"columns: no column is called {name!r}, for the {role}; there are {known[:300]}"
            )
    return _from_rows(table, named)


def _from_arrays(path: str) -> Prices:
    with np.load(path, allow_pickle=False) as file:
        for name in ("close", "dates", "tickers"):
            if name not in file:
                raise ValueError(f"data: {path} has no array {name!r}")
        close = file["close"].astype(np.float64)
        others = {n: file[n].astype(np.float64) for n in OPTIONAL if n in file}
        days = file["dates"].astype("datetime64[D]")
        groups = file.get("sector")
        return Prices(file["tickers"], days, close, others, groups)


def _from_rows(table: Mapping[str, Array], named: Mapping[str, str]) -> Prices:
    labels = labels_of(table[named["entity"]], table[named["entity"]], named["entity"])
    names, row = np.unique(labels, return_inverse=True)
    time = as_times(named["time"], table[named["time"]])
    days, column = np.unique(time, return_inverse=True)
    at = row * len(days) + column
    if len(np.unique(at)) < len(at):
        raise ValueError(
            f"columns: expected one row of each {named['entity']} and {named['time']}, got "
            f"{len(at) - len(np.unique(at))} more"
        )
    found = {}
    for role in named:
        if role not in ("entity", "time"):
            grid = np.full(len(names) * len(days), np.nan)
            grid[at] = table[named[role]].astype(np.float64)
            found[role] = grid.reshape(len(names), len(days))
    days = days.astype("datetime64[D]") if days.dtype.kind == "M" else days
    return Prices(names, days, found.pop("close"), found)


def trailing(values: Array, days: int, least: float = 0.5) -> Array:
    """The mean of the last `days` columns up to each, of those that are there: [stocks, days].

    NaN where fewer than the share `least` of them are.
    """
    here = np.isfinite(values)
    sums = np.cumsum(np.where(here, values, 0.0), axis=1)
    counts = np.cumsum(here, axis=1).astype(np.float64)
    sums[:, days:] -= sums[:, :-days].copy()
    counts[:, days:] -= counts[:, :-days].copy()
    with np.errstate(all="ignore"):
        return np.where(counts >= max(least * days, 1), sums / counts, np.nan)


def ahead(values: Array, days: int) -> Array:
    """The mean of the next `days` columns after each; NaN where one of them is missing."""
    out = np.full(values.shape, np.nan)
    sums = np.cumsum(np.nan_to_num(values), axis=1)
    bad = np.cumsum(~np.isfinite(values), axis=1)
    whole = (bad[:, days:] - bad[:, :-days]) == 0
    out[:, :-days] = np.where(whole, (sums[:, days:] - sums[:, :-days]) / days, np.nan)
    return out
