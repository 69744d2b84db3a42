"""The parts of a preprocessor: numbers, categories, and the entity's mean target.

Each is fitted with scikit-learn on training rows and keeps what it learned as arrays, so that it is
applied by numpy alone, and written to a file without pickle. `columns` are those of `table.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from pymeta.data.optional import need
from pymeta.data.table import as_text, is_missing
from pymeta.spec.fields import Fields
from pymeta.spec.show import counted
from pymeta.tasks.groups import Array

Columns: TypeAlias = Mapping[str, Array]
Arrays: TypeAlias = dict[str, Array]

MISSING, OTHER = "(missing)", "(other)"
FOLDS = 5


@dataclass
class Numbers:
    """Imputation by the median, clipping to quantiles of training, scaling.

    Attributes:
        columns: names [F].
        fill: [F], what stands for missing values.
        low: [F], what smaller values become; -inf where they are not clipped.
        high: [F], likewise.
        centre: [F], what is subtracted.
        scale: [F], what is divided by.
        indicated: [F], 1 where a column of its own says which values were missing.
    """

    columns: tuple[str, ...]
    fill: Array
    low: Array
    high: Array
    centre: Array
    scale: Array
    indicated: Array

    @classmethod
    def fit(
        cls,
        columns: Columns,
        names: tuple[str, ...],
        clip: tuple[float, float] | None,
        scale: str | None,
        indicators: bool,
    ) -> Numbers:
        """Learn from training rows."""
        impute = need("sklearn.impute", "fitting a preprocessor")
        scalers = need("sklearn.preprocessing", "fitting a preprocessor")
        x = _matrix(columns, names)
        x[np.isinf(x)] = np.nan  # which no median knows; they are clipped when applied
        missing = np.isnan(x)
        low, high = np.full(len(names), -np.inf), np.full(len(names), np.inf)
        fill = np.zeros(len(names))
        if names:
            imputer = impute.SimpleImputer(strategy="median", keep_empty_features=True).fit(x)
            fill = imputer.statistics_
            known = ~missing.all(axis=0)
            if clip is not None and known.any():
                low[known], high[known] = np.nanquantile(x[:, known], clip, axis=0)
        part = cls(names, fill, low, high, np.zeros(len(names)), np.ones(len(names)), np.zeros(0))
        part.indicated = (missing.any(axis=0) & indicators).astype(float)
        if names and scale is not None:
            kind = scalers.StandardScaler if scale == "standard" else scalers.RobustScaler
            fitted = kind().fit(part._clipped(x))
            part.centre = fitted.mean_ if scale == "standard" else fitted.center_
            part.scale = fitted.scale_
        return part

    def _clipped(self, x: Array) -> Array:
        return np.clip(np.where(np.isnan(x), self.fill, x), self.low, self.high)

    def apply(self, columns: Columns) -> Array:
        """[rows, features] of float64."""
        x = _matrix(columns, self.columns)
        scaled = (self._clipped(x) - self.centre) / self.scale
        return np.concatenate([scaled, np.isnan(x[:, self.indicated > 0])], axis=1)

    @property
    def names(self) -> list[str]:
        """Of the features."""
        missing = [f"{n} missing" for n, i in zip(self.columns, self.indicated, strict=True) if i]
        return [*self.columns, *missing]

    @property
    def sources(self) -> list[str]:
        """The column that each feature was made of."""
        missing = [n for n, i in zip(self.columns, self.indicated, strict=True) if i]
        return [*self.columns, *missing]

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """What a file holds of it: JSON, and arrays."""
        held = ("fill", "low", "high", "centre", "scale", "indicated")
        return {"columns": list(self.columns)}, {name: getattr(self, name) for name in held}

    @classmethod
    def read(cls, fields: Fields, arrays: Arrays) -> Numbers:
        """The part of which `state` is; ValueError where it is none."""
        names = fields.list_of("columns", str)
        fields.end()
        held = ("fill", "low", "high", "centre", "scale", "indicated")
        for name in held:
            if name not in arrays or arrays[name].shape != (len(names),):
                raise ValueError(
                    f"{fields.what}: {name} is missing, or not of {counted(len(names), 'column')}"
                )
        if not (arrays["low"] <= arrays["high"]).all() or not (arrays["scale"] > 0).all():
            raise ValueError(f"{fields.what}: limits are not in order, or a scale is not > 0")
        return cls(names, *(arrays[name] for name in held))


@dataclass
class Categories:
    """One-hot columns; rare categories share one, and so do unknown ones where there is such.

    Attributes:
        known: for each column its categories, sorted.
        place: for each column the one-hot column of each category.
        frequent: for each column how many categories have one of their own; `place` of the others
            is that number.
    """

    known: dict[str, list[str]]
    place: dict[str, list[int]]
    frequent: dict[str, int]

    @classmethod
    def fit(
        cls, columns: Columns, names: tuple[str, ...], min_rows: int, most: int | None
    ) -> Categories:
        """Learn from training rows."""
        part = cls({}, {}, {})
        for name in names:
            scalers = need("sklearn.preprocessing", "fitting a preprocessor")
            encoder = scalers.OneHotEncoder(
                min_frequency=min_rows, max_categories=most, handle_unknown="infrequent_if_exist"
            )
            encoder.fit(_texts(columns[name]).astype(object)[:, None])
            known = [str(c) for c in encoder.categories_[0]]
            rare = encoder.infrequent_categories_[0]
            rare = set() if rare is None else set(map(str, rare))
            own = [c for c in known if c not in rare]
            part.known[name], part.frequent[name] = known, len(own)
            part.place[name] = [len(own) if c in rare else own.index(c) for c in known]
        return part

    def _shares(self, name: str) -> bool:
        return self.frequent[name] in self.place[name]

    def apply(self, columns: Columns) -> Array:
        """[rows, features] of float64."""
        rows = len(next(iter(columns.values()))) if columns else 0
        out = [np.zeros((rows, 0))]
        for name, known in self.known.items():
            own = self.frequent[name]
            other = own if self._shares(name) else -1
            place = np.array(self.place[name], np.int64)
            out.append(_one_hot(_texts(_column(columns, name)), known, place, own, other))
        return np.concatenate(out, axis=1)

    @property
    def names(self) -> list[str]:
        """Of the features."""
        out = []
        for name, known in self.known.items():
            own = sorted(zip(self.place[name], known, strict=True))[: self.frequent[name]]
            out += [f"{name}={label}" for _, label in own]
            out += [f"{name}={OTHER}"] * self._shares(name)
        return out

    @property
    def sources(self) -> list[str]:
        """The column that each feature was made of."""
        counts = {n: self.frequent[n] + self._shares(n) for n in self.known}
        return [name for name, count in counts.items() for _ in range(count)]

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """What a file holds of it: JSON, and arrays."""
        columns = [
            {"name": n, "known": k, "place": self.place[n], "frequent": self.frequent[n]}
            for n, k in self.known.items()
        ]
        return {"columns": columns}, {}

    @classmethod
    def read(cls, fields: Fields, arrays: Arrays) -> Categories:
        """The part of which `state` is; ValueError where it is none."""
        part = cls({}, {}, {})
        for i, entry in enumerate(fields.take("columns", list, "a list")):
            column = Fields(f"{fields.what}: column {i}", entry)
            name = column.text("name")
            part.known[name] = known = list(column.list_of("known", str))
            part.place[name] = place = list(column.list_of("place", int))
            part.frequent[name] = own = column.integer("frequent", 0)
            column.end()
            fits = set(place) in ({*range(own)}, {*range(own + 1)}) and known == sorted(known)
            if len(place) != len(known) or not fits:
                raise ValueError(f"{column.what}: its categories have no such places")
        fields.end()
        return part


@dataclass
class EntityTarget:
    """The mean target of a row's entity before the row, drawn towards the mean of all.

    (sum + k m) / (n + k), where n training rows of the entity are earlier in time than the row, m
    is the mean of all, and k says how many rows' worth m counts: with `smooth=None` that is
    Buehlmann's ratio of the variance within entities to that between them. Where rows have no
    time, training rows get the mean of four fifths of the rows, without their own.

    Attributes:
        labels: [E], the entities as strings, sorted.
        offsets: [E + 1].
        times: [rows] as int64 or float64, or None; the training rows', by entity and time.
        sums: [rows + 1], 0 and the cumulative sums of their targets.
        mean: of all.
        smooth: k.
    """

    labels: Array
    offsets: Array
    times: Array | None
    sums: Array
    mean: float
    smooth: float
    unit: str = ""  # of times that are datetime64

    @classmethod
    def fit(
        cls, labels: Array, times: Array | None, y: Array, smooth: float | None
    ) -> EntityTarget:
        """Learn from training rows.

        Args:
            labels: [rows], the entities.
            times: [rows], or None.
            y: [rows], numbers.
            smooth: k, or None for the ratio of variances.
        """
        known, codes = np.unique(_texts(labels).astype(str), return_inverse=True)
        order = np.lexsort((codes,) if times is None else (times, codes))
        counts = np.bincount(codes, minlength=len(known))
        y = y[order].astype(np.float64)
        unit = "" if times is None or times.dtype.kind != "M" else np.datetime_data(times.dtype)[0]
        part = cls(
            known,
            np.concatenate([[0], np.cumsum(counts)]),
            None if times is None else _numbers(times[order]),
            np.concatenate([[0.0], np.cumsum(y)]),
            float(y.mean()),
            0.0,
            unit,
        )
        part.smooth = (
            credibility(y, np.repeat(np.arange(len(known)), counts)) if smooth is None else smooth
        )
        return part

    def apply(self, labels: Array, times: Array | None) -> Array:
        """[rows] of float64, for rows that were not fitted on unless they have times."""
        texts = _texts(labels).astype(str)
        at = np.minimum(np.searchsorted(self.labels, texts), len(self.labels) - 1)
        is_known = self.labels[at] == texts
        begin, end = self.offsets[at], self.offsets[at + 1]
        if self.times is not None:
            if times is None:
                raise ValueError("time: the entity's mean was learned with times, and needs them")
            end = self._before(at, self._as_fitted(times))
        n = np.where(is_known, end - begin, 0)
        total = np.where(is_known, self.sums[end] - self.sums[begin], 0.0)
        return _drawn(total, n, self.smooth, self.mean)

    def _as_fitted(self, times: Array) -> Array:
        if bool(self.unit) != (times.dtype.kind == "M"):
            raise TypeError(f"time: expected times as in training, got dtype {times.dtype}")
        return _numbers(times.astype(f"datetime64[{self.unit}]") if self.unit else times)

    def _before(self, at: Array, times: Array) -> Array:
        """Where an entity's rows that are earlier than a time end: [rows]."""
        assert self.times is not None
        distinct = np.unique(self.times)
        span = len(distinct) + 1
        codes = np.repeat(np.arange(len(self.labels)), np.diff(self.offsets)) * span
        keys = codes + np.searchsorted(distinct, self.times)
        ends: Array = np.searchsorted(keys, at * span + np.searchsorted(distinct, times))
        return ends

    def across_folds(self) -> Array:
        """[rows], for the training rows themselves by entity, each without its own fifth."""
        sizes = np.diff(self.offsets)
        y, codes = np.diff(self.sums), np.repeat(np.arange(len(sizes)), sizes)
        fold = np.random.default_rng(0).permutation(len(y)) % FOLDS
        key = codes * FOLDS + fold
        count = np.bincount(key, minlength=len(sizes) * FOLDS)
        total = np.bincount(key, y, minlength=len(sizes) * FOLDS)
        n = sizes[codes] - count[key]
        s = np.bincount(codes, y, minlength=len(sizes))[codes] - total[key]
        of_fold = np.bincount(fold, y, minlength=FOLDS)
        others = len(y) - np.bincount(fold, minlength=FOLDS)
        mean = ((y.sum() - of_fold) / np.maximum(others, 1))[fold]
        return _drawn(s, n, self.smooth, mean)

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """What a file holds of it: JSON, and arrays."""
        arrays = {"offsets": self.offsets, "sums": self.sums}
        if self.times is not None:
            arrays["times"] = self.times
        described = {"labels": self.labels.tolist(), "mean": self.mean, "smooth": self.smooth}
        return {**described, "unit": self.unit}, arrays

    @classmethod
    def read(cls, fields: Fields, arrays: Arrays) -> EntityTarget:
        """The part of which `state` is; ValueError where it is none."""
        labels = np.array(fields.list_of("labels", str), dtype=str)
        mean, smooth, unit = fields.number("mean"), fields.number("smooth"), fields.text("unit")
        fields.end()
        nothing = np.zeros(0, np.int64)
        offsets, sums = arrays.get("offsets", nothing), arrays.get("sums", nothing)
        times = arrays.get("times")
        fits = offsets.shape == (len(labels) + 1,) and sums.ndim == 1 and len(labels) > 0
        fits = fits and offsets.dtype.kind == "i" and bool((labels[1:] > labels[:-1]).all())
        if not fits or len(sums) != offsets[-1] + 1 or offsets[0] != 0 or any(np.diff(offsets) < 0):
            raise ValueError(f"{fields.what}: its rows do not fit its entities")
        if times is not None and times.shape != (len(sums) - 1,):
            raise ValueError(f"{fields.what}: its times do not fit its rows")
        return cls(labels, offsets, times, sums, mean, smooth, unit)


def credibility(y: Array, codes: Array) -> float:
    """Buehlmann's k: the variance of y within groups over that of the groups' means.

    Both by the analysis of variance with groups of unequal sizes (Buehlmann and Straub 1970);
    a large number where the means differ no more than chance has it.
    """
    n = np.bincount(codes).astype(float)
    n = n[n > 0]
    groups, rows = len(n), len(y)
    _, codes = np.unique(codes, return_inverse=True)
    means = np.bincount(codes, y) / n
    within = float(((y - means[codes]) ** 2).sum()) / max(rows - groups, 1)
    if groups < 2:
        return 1e9 * rows
    size = (rows - (n**2).sum() / rows) / (groups - 1)
    between = (float((n * (means - y.mean()) ** 2).sum()) / (groups - 1) - within) / size
    return min(within / between, 1e9 * rows) if between > 0 else 1e9 * rows


def _drawn(total: Array, n: Array, k: float, mean: Any) -> Array:
    """Means of n rows that add up to `total`, drawn to `mean`, which counts as k rows."""
    weight = n + k
    drawn: Array = np.where(weight > 0, total + k * mean, mean) / np.where(weight > 0, weight, 1)
    return drawn


def _matrix(columns: Columns, names: tuple[str, ...]) -> Array:
    rows = len(next(iter(columns.values()))) if columns else 0
    out = np.empty((rows, len(names)))
    for i, name in enumerate(names):
        values = _column(columns, name)
        if values.dtype.kind == "O" and is_missing(values).all():
            values = np.full(rows, np.nan)  # of one row, say, whose number is missing
        if values.dtype.kind not in "fiub":
            raise TypeError(f"{name}: expected numbers as in training, got dtype {values.dtype}")
        out[:, i] = values
    return out


def _column(columns: Columns, name: str) -> Array:
    if name not in columns:
        raise ValueError(
            f"data: no column is called {name!r}, which the preprocessor was fitted on"
        )
    return columns[name]


def _texts(values: Array) -> Array:
    """As strings; missing ones are a category of their own."""
    texts = as_text(values)
    return np.array([MISSING if v is None else v for v in texts.tolist()], dtype=str)


def _numbers(times: Array) -> Array:
    return times.view(np.int64) if times.dtype.kind == "M" else times.astype(np.float64)


def _one_hot(texts: Array, known: list[str], place: Array, own: int, other: int) -> Array:
    names = np.array(known, dtype=str)
    at = np.minimum(np.searchsorted(names, texts), len(names) - 1)
    column = np.where(names[at] == texts, place[at], other)
    out = np.zeros((len(texts), own + (other >= 0)))
    rows = np.flatnonzero(column >= 0)
    out[rows, column[rows]] = 1.0
    return out
