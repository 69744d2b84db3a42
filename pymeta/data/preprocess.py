"""`Preprocessor`: what is learned of training rows to make numbers of a panel's columns.

It is fitted with scikit-learn and applied by numpy: the file it is saved to holds arrays and JSON,
as an adapter's does, and what is deployed needs neither scikit-learn nor pandas to load it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pymeta.data.draw import whole
from pymeta.data.encoders import Categories, EntityTarget, Numbers
from pymeta.data.table import as_text, as_times, read_table
from pymeta.models import file
from pymeta.spec.fields import Fields
from pymeta.spec.show import counted
from pymeta.tasks.groups import Array

if TYPE_CHECKING:
    from pymeta.data.panel import Panel

KIND = "preprocessor"
_PARTS: dict[str, Any] = {"numbers": Numbers, "categories": Categories, "entity": EntityTarget}
_DTYPES = {"F64": np.float64, "I64": np.int64}


class Preprocessor:
    """Imputes, clips, scales and encodes; made by `panel.preprocessor(...)`.

    Missing numbers become the training rows' median, and a column of its own says which were
    missing. Numbers are clipped to quantiles of training, so that no model sees what training never
    saw. Categories become one-hot columns.

    Args:
        numeric: names of the columns of numbers.
        categorical: names of the columns of categories.
        clip: the quantiles to which numbers are clipped; None for no clipping, (0, 1) for the
            training rows' range.
        scale: "standard" (mean 0, variance 1), "robust" (median 0, quartiles one apart) or None.
        indicators: whether missing numbers are indicated, where training had some.
        min_rows: categories of fewer training rows share one column.
        max_categories: at most so many columns for a categorical one; None for any number.
        encode_entity: whether the entity's mean target, of rows earlier in time, is a feature.
        smooth: how many rows' worth the mean of all counts in that mean; None for the ratio of the
            variance within entities to that between them (empirical Bayes).
        gap: how much later than its row a target is known; younger rows are left out of the mean.
        dtype: "float32" or "float64".

    Attributes:
        features: names of the features it makes; after `fit`.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> from pymeta.data import Panel
        >>> data = {"shop": ["a", "a", "b"], "x": [1.0, None, 3.0], "kind": ["u", "v", "u"]}
        >>> panel = Panel(data, entity="shop")
        >>> prep = panel.preprocessor(clip=None, scale=None, min_rows=1).fit(panel)
        >>> prep.features
        ('x', 'x missing', 'kind=u', 'kind=v')
        >>> prep.sources
        ('x', 'x', 'kind', 'kind')
        >>> prep(panel).x.tolist()
        [[1.0, 0.0, 1.0, 0.0], [2.0, 1.0, 0.0, 1.0], [3.0, 0.0, 1.0, 0.0]]
    """

    def __init__(
        self,
        numeric: tuple[str, ...],
        categorical: tuple[str, ...],
        *,
        clip: tuple[float, float] | None = (0.001, 0.999),
        scale: str | None = "standard",
        indicators: bool = True,
        min_rows: int = 20,
        max_categories: int | None = None,
        encode_entity: bool = False,
        smooth: float | None = None,
        gap: Any = None,
        dtype: str = "float32",
    ) -> None:
        """Check the options."""
        if clip is not None and not _are_quantiles(clip):
            raise ValueError(f"clip: expected two quantiles in 0..1 or None, got {clip!r}")
        if scale not in ("standard", "robust", None):
            raise ValueError(f"scale: expected 'standard', 'robust' or None, got {scale!r}")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype: expected 'float32' or 'float64', got {dtype!r}")
        if smooth is not None and not smooth >= 0:
            raise ValueError(f"smooth: expected a number >= 0 or None, got {smooth!r}")
        if gap is not None and not encode_entity:
            raise ValueError("gap: expected None, because encode_entity is False")
        self.numeric, self.categorical = tuple(numeric), tuple(categorical)
        self.clip, self.scale, self.indicators = clip, scale, indicators
        self.min_rows = whole("min_rows", min_rows, 1)
        self.max_categories = (
            None if max_categories is None else whole("max_categories", max_categories, 1)
        )
        self.encode_entity, self.smooth, self.gap = encode_entity, smooth, gap
        self.dtype = dtype
        self._parts: dict[str, Any] = {}
        self._entity, self._time = "", ""
        self._mean_of_entity = (0.0, 1.0)  # its centre and scale
        self._until: Any = None  # the last training time
        self._seen: tuple[object, Array] | None = None  # the source and its rows; not in a file

    # ---- learning -----------------------------------------------------------------------------

    def fit(self, panel: Panel) -> Preprocessor:
        """Learn from training rows, and from them alone.

        Raises:
            ImportError: scikit-learn is not installed.
            ValueError: the panel has no rows, or no target where the entity is to be encoded.
        """
        _need_panel(panel)
        if not len(panel):
            raise ValueError("panel: expected rows to fit on, got none")
        columns = panel.to_dict()
        self._parts = {
            "numbers": Numbers.fit(columns, self.numeric, self.clip, self.scale, self.indicators),
            "categories": Categories.fit(
                columns, self.categorical, self.min_rows, self.max_categories
            ),
        }
        self._entity, self._time = panel.entity, panel.time or ""
        self._until = None if panel.times is None else panel.times.max()
        self._seen = (panel._source, np.sort(panel.rows))
        if self.encode_entity:
            self._fit_entity(panel)
        return self

    def _fit_entity(self, panel: Panel) -> None:
        y = panel.need_y()
        if panel.classes is not None and len(panel.classes) > 2:
            raise ValueError(
                f"encode_entity: expected a target of numbers or of two classes, got "
                f"{counted(len(panel.classes), 'class')}"
            )
        part = EntityTarget.fit(panel.labels, panel.times, y, self.smooth)
        self._parts["entity"] = part
        if self.scale is not None:
            means = self._means(panel)
            self._mean_of_entity = (float(means.mean()), float(means.std()) or 1.0)

    def _means(self, panel: Panel) -> Array:
        """The means of entities' targets for a panel's rows: [rows], not scaled."""
        part: EntityTarget = self._parts["entity"]
        source, rows = self._seen or (None, np.zeros(0))
        if part.times is None and source is panel._source and np.isin(panel.rows, rows).any():
            return self._across_folds(part, panel)
        return part.apply(panel.labels, self._shifted(panel.times))

    def _across_folds(self, part: EntityTarget, panel: Panel) -> Array:
        """Training rows do not see their own target; they are all here, or it is an error."""
        assert self._seen is not None
        if not np.array_equal(np.sort(panel.rows), self._seen[1]):
            raise ValueError(
                "panel: some of its rows were fitted on and some not; an entity's mean without "
                "times is for the training panel as a whole, or for other rows"
            )
        means = np.empty(len(panel))
        means[np.argsort(as_text(panel.labels).astype(str), kind="stable")] = part.across_folds()
        return means

    def _shifted(self, times: Array | None) -> Array | None:
        if times is None or self.gap is None:
            return times
        from pymeta.data.panel import as_gap

        shifted: Array = times - as_gap(times, self.gap)
        return shifted

    # ---- use ----------------------------------------------------------------------------------

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` was called, or it was loaded."""
        return bool(self._parts)

    def _need_fit(self) -> None:
        if not self.is_fitted:
            raise ValueError("preprocessor: expected a fitted one: call .fit(train) first")

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the features that it makes."""
        self._need_fit()
        own = self._parts["numbers"].names + self._parts["categories"].names
        return (*own, *([f"mean {self._entity}"] if self.encode_entity else []))

    @property
    def sources(self) -> tuple[str, ...]:
        """The column of the table that each feature was made of: 'kind' of 'kind=u'."""
        self._need_fit()
        own = self._parts["numbers"].sources + self._parts["categories"].sources
        return (*own, *([self._entity] if self.encode_entity else []))

    def __repr__(self) -> str:
        columns = counted(len(self.numeric) + len(self.categorical), "column")
        if not self.is_fitted:
            return f"Preprocessor({columns}; not fitted)"
        return f"Preprocessor({columns}, {counted(len(self.features), 'feature')}, {self.dtype})"

    def __call__(self, panel: Panel) -> Panel:
        """The panel with the features this makes; its order of rows stays.

        Raises:
            TypeError, ValueError: a column is missing or of another kind, or a value is infinite
                and not clipped.
        """
        _need_panel(panel, "; of another table, prep.transform(table) makes the features")
        x = self._matrix(panel.to_dict(), lambda: self._means(panel))
        return panel.with_features(x, self.features)

    def transform(self, data: Any) -> Array:
        """The features [rows, features] of a table, in its order of rows.

        Args:
            data: as for `Panel`; the entity and the time are needed where the entity is encoded.
        """
        columns = read_table(data)

        def means() -> Array:
            for name in (self._entity, self._time):
                if name and name not in columns:
                    raise ValueError(f"data: no column is called {name!r}, which the mean needs")
            times = as_times(self._time, columns[self._time]) if self._time else None
            part: EntityTarget = self._parts["entity"]
            return part.apply(columns[self._entity], self._shifted(times))

        return self._matrix(columns, means)

    def _matrix(self, columns: dict[str, Array], means: Any) -> Array:
        self._need_fit()
        found = [self._parts["numbers"].apply(columns), self._parts["categories"].apply(columns)]
        if self.encode_entity:
            centre, scale = self._mean_of_entity
            found.append(((means() - centre) / scale)[:, None])
        return np.concatenate(found, axis=1).astype(self.dtype)

    # ---- files --------------------------------------------------------------------------------

    def save(self, path: file.Path) -> None:
        """Write it to a file, as arrays and JSON in safetensors' format.

        Raises:
            OSError: it cannot be written.
            ValueError: it is not fitted.
        """
        self._need_fit()
        described: dict[str, Any] = {"preprocessor": self._described()}
        tensors = {}
        for name, part in self._parts.items():
            described[name], arrays = part.state()
            for key, array in arrays.items():
                kind = "I64" if array.dtype.kind == "i" else "F64"
                data = np.ascontiguousarray(array, _DTYPES[kind])
                tensors[f".{name}.{key}"] = file.Raw(
                    kind, data.shape, data.reshape(-1).view(np.uint8)
                )
        file.write(path, KIND, described, tensors)

    def _described(self) -> dict[str, Any]:
        gap = None if self.gap is None else _as_json(self.gap)
        until = None if self._until is None else _as_json(self._until)
        return {
            "clip": None if self.clip is None else list(self.clip),
            "scale": self.scale,
            "indicators": self.indicators,
            "min_rows": self.min_rows,
            "max_categories": self.max_categories,
            "smooth": self.smooth,
            "dtype": self.dtype,
            "entity": self._entity,
            "time": self._time,
            "mean_of_entity": list(self._mean_of_entity),
            "gap": gap,
            "until": until,
        }

    @classmethod
    def load(cls, path: file.Path) -> Preprocessor:
        """What `save` wrote; needs numpy alone.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or of another kind.
        """
        contents = file.read(path, KIND, verify=True)
        with file.errors_about(contents.path):
            arrays: dict[str, dict[str, Array]] = {name: {} for name in _PARTS}
            for name, raw in contents.tensors.items():
                _, part, key = (*name.split("."), "", "")[:3]
                if part not in arrays or raw.dtype not in _DTYPES:
                    raise ValueError(f"tensor {name} belongs to no part of a preprocessor")
                data = raw.data.view(_DTYPES[raw.dtype]).reshape(raw.shape)
                arrays[part][key] = np.array(data)
            found = {
                name: part.read(Fields(name, contents.described[name]), arrays[name])
                for name, part in _PARTS.items()
                if name in contents.described
            }
            if not {"numbers", "categories"} <= found.keys():
                raise ValueError("a part of the preprocessor is missing")
            return cls._read(Fields("preprocessor", contents.described.get("preprocessor")), found)

    @classmethod
    def _read(cls, fields: Fields, parts: dict[str, Any]) -> Preprocessor:
        def maybe(name: str, take: Any) -> Any:
            return None if fields.is_null(name) else take(name)

        clip, scale = maybe("clip", fields.numbers), maybe("scale", fields.text)
        options = {
            "clip": clip,
            "scale": scale,
            "indicators": fields.boolean("indicators"),
            "min_rows": fields.integer("min_rows", 1),
            "max_categories": maybe("max_categories", lambda n: fields.integer(n, 1)),
            "smooth": maybe("smooth", fields.number),
            "dtype": fields.text("dtype"),
            "encode_entity": "entity" in parts,
            "gap": maybe("gap", lambda n: _from_json(fields.object(n), np.timedelta64)),
        }
        numeric, categorical = parts["numbers"].columns, tuple(parts["categories"].known)
        prep = cls(numeric, categorical, **options)
        prep._parts = parts
        prep._entity, prep._time = fields.text("entity"), fields.text("time")
        centre = fields.numbers("mean_of_entity")
        if len(centre) != 2:
            raise ValueError(f"{fields.what}: mean_of_entity: expected two numbers")
        prep._mean_of_entity = (centre[0], centre[1])
        prep._until = maybe("until", lambda n: _from_json(fields.object(n), np.datetime64))
        fields.end()
        return prep


def _are_quantiles(values: Any) -> bool:
    numbers = isinstance(values, (tuple, list)) and len(values) == 2
    return numbers and 0 <= values[0] < values[1] <= 1


def _need_panel(panel: Any, cure: str = "") -> None:
    from pymeta.data.panel import Panel

    if not isinstance(panel, Panel):
        raise TypeError(f"panel: expected a Panel, got {type(panel).__name__}{cure}")


def _as_json(value: Any) -> dict[str, Any]:
    """A time or a stretch of it."""
    if hasattr(value, "total_seconds"):
        value = np.timedelta64(value)
    if isinstance(value, (np.datetime64, np.timedelta64)):
        return {"unit": np.datetime_data(value.dtype)[0], "value": int(value.astype(np.int64))}
    return {"unit": "", "value": float(value)}


def _from_json(fields: Fields, kind: Any) -> Any:
    unit = fields.text("unit")
    value = fields.integer("value", -(2**63)) if unit else fields.number("value")
    fields.end()
    try:
        return kind(value, unit) if unit else value
    except (TypeError, ValueError) as error:
        raise ValueError(f"{fields.what}: {unit!r} is no unit of time ({error})") from None
