"""`Panel`: a table whose rows belong to entities, sorted so that an entity is a slice.

Rows are kept sorted by (entity, time), stably, as arrays with offsets: entity e has the rows
offsets[e] : offsets[e+1]. Nothing is copied for each entity, and nothing is done for each of them
in Python. A panel never changes; the methods that select rows return new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pymeta.data.batch import Tasks, make_tasks
from pymeta.data.draw import slices, whole
from pymeta.data.table import Columns, as_times, index_names, is_missing, read_table, time_text
from pymeta.spec.show import counted
from pymeta.tasks.groups import Array, labels_of

if TYPE_CHECKING:
    from pymeta.data.episodes import Episodes
    from pymeta.data.preprocess import Preprocessor
    from pymeta.data.windows import Windows


class Panel:
    """Rows with an entity, features, and maybe a time and a target.

    Args:
        data: a DataFrame of pandas or polars, an Arrow table, a dict of arrays [rows], or the path
            of a Parquet, Feather or CSV file.
        entity: the column that says whose row it is (numbers or strings), none missing.
        time: the column of times (or of numbers) by which an entity's rows are ordered; None where
            there is no order.
        target: the column to be predicted, none missing; None where there is none (yet).
        numeric: columns that are features as numbers. With both `numeric` and `categorical` None,
            all other columns are features, by their kind.
        categorical: columns that are features by category.
        classes: whether targets are classes, y = 0..C-1 as int64; None for: where they are
            strings. Other targets are float32 (two classes for "bce_with_logits" are 0 and 1).

    Attributes:
        entities: [E], the entities' labels, sorted.
        offsets: [E + 1], entity e has the rows offsets[e] : offsets[e+1].
        times: [rows], or None.
        y: [rows] float32, or int64 class indices; None without a target.
        classes: [C], the labels of the classes, or None.
        numeric: names of the numeric features.
        categorical: names of the categorical features.
        rows: [rows], where each row stood in the data.

    Raises:
        ImportError: the data need pandas or pyarrow, which is not installed.
        TypeError: an argument or a column is of the wrong type.
        ValueError: a column is not there, or lacks values where none may be missing.

    Example:
        >>> from pymeta.data import Panel
        >>> data = {"shop": ["b", "a", "b"], "day": [1, 1, 0], "size": [2.0, 3.0, 4.0]}
        >>> panel = Panel(data, entity="shop", time="day", target="size")
        >>> panel.entities.tolist(), panel.offsets.tolist(), panel.y.tolist()
        (['a', 'b'], [0, 1, 3], [3.0, 4.0, 2.0])
    """

    entities: Array
    offsets: Array
    times: Array | None
    y: Array | None
    classes: Array | None
    rows: Array

    def __init__(
        self,
        data: Any,
        *,
        entity: str,
        time: str | None = None,
        target: str | None = None,
        numeric: Sequence[str] | None = None,
        categorical: Sequence[str] | None = None,
        classes: bool | None = None,
    ) -> None:
        """Read the table, check it, and sort it."""
        columns = read_table(data)
        self.entity, self.time, self.target = entity, time, target
        for argument, name in (("entity", entity), ("time", time), ("target", target)):
            if name is not None or argument == "entity":
                _need(columns, argument, name, in_index=name in index_names(data))
        own = {entity, time, target}
        self.numeric, self.categorical = _features(columns, own, numeric, categorical)
        labels = labels_of(columns[entity], columns[entity], "entity")
        self.entities, codes = np.unique(labels, return_inverse=True)
        times = None if time is None else as_times(time, columns[time])
        order = np.lexsort((codes,) if times is None else (times, codes))
        self.rows = order
        self.offsets = _offsets(codes, len(self.entities))
        self.times = None if times is None else times[order]
        self._columns = {name: values[order] for name, values in columns.items()}
        self.classes, self.y = _target(target, self._columns, classes)
        self._x: Array | None = None
        self._names: tuple[str, ...] = ()
        self._source = object()  # the same for all that is selected of these data

    # ---- what is in it ------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        features = counted(len(self.features), "feature") if self.features else "no features"
        span = ""
        if self.times is not None and len(self):
            span = f", {time_text(self.times.min())} to {time_text(self.times.max())}"
        size = f"{counted(len(self), 'row')} of {counted(len(self.entities), 'entity')}"
        return f"Panel({size}, {features}{span})"

    def __getitem__(self, column: str) -> Array:
        """A column of the data, in the panel's order of rows."""
        return self._columns[_need(self._columns, "column", column)]

    @property
    def sizes(self) -> Array:
        """[E], how many rows each entity has."""
        return np.diff(self.offsets)

    @property
    def codes(self) -> Array:
        """[rows], the index in `entities` of each row's entity."""
        return np.repeat(np.arange(len(self.entities)), self.sizes)

    @property
    def labels(self) -> Array:
        """[rows], each row's entity."""
        return np.repeat(self.entities, self.sizes)

    @property
    def features(self) -> tuple[str, ...]:
        """The names of x's columns."""
        return self._names or (*self.numeric, *self.categorical)

    @property
    def is_prepared(self) -> bool:
        """Whether x is that of a preprocessor or of `with_features`."""
        return bool(self._names)

    @property
    def x(self) -> Array:
        """The features [rows, features], float32 unless a preprocessor made others.

        Raises:
            ValueError: the panel is not prepared, and has categories or missing numbers.
        """
        if self._x is None:
            self._x = self._raw_x()
        return self._x

    def _raw_x(self) -> Array:
        cure = "prepare the panel: prep = train.preprocessor().fit(train), then prep(panel)"
        if self.categorical:
            raise ValueError(f"x: {self.categorical[0]} is a category, not a number; {cure}")
        out = np.empty((len(self), len(self.numeric)), np.float32)
        for i, name in enumerate(self.numeric):
            out[:, i] = self._columns[name]
            bad = ~np.isfinite(out[:, i])
            if bad.any():
                raise ValueError(
                    f"x: {counted(int(bad.sum()), 'row has', 'rows have')} no finite {name}; {cure}"
                )
        return out

    def need_y(self) -> Array:
        """The targets; ValueError where there are none."""
        if self.y is None:
            raise ValueError("target: expected a panel with targets: Panel(..., target=...)")
        return self.y

    def to_dict(self) -> Columns:
        """All columns of the data, in the panel's order of rows."""
        return dict(self._columns)

    def to_frame(self) -> Any:
        """All columns of the data as a pandas DataFrame, in the panel's order of rows."""
        from pymeta.data.optional import need

        return need("pandas", "Panel.to_frame").DataFrame(self._columns)

    # ---- parts of it --------------------------------------------------------------------------

    def where(self, chosen: Array) -> Panel:
        """The rows that are chosen; entities without any are left out.

        Args:
            chosen: bool [rows], or increasing row numbers.
        """
        chosen = np.asarray(chosen)
        if chosen.dtype.kind == "b":
            if chosen.shape != (len(self),):
                raise ValueError(
                    f"chosen: expected bool [{len(self)}], got shape {list(chosen.shape)}"
                )
            chosen = np.flatnonzero(chosen)
        elif chosen.dtype.kind not in "iu" or chosen.ndim != 1:
            raise TypeError(f"chosen: expected bool or row numbers [n], got dtype {chosen.dtype}")
        elif (np.diff(chosen) <= 0).any() or (len(chosen) and chosen[0] < 0):
            raise ValueError("chosen: expected increasing row numbers")
        found, codes = np.unique(self.codes[chosen], return_inverse=True)
        return self._changed(
            entities=self.entities[found],
            offsets=_offsets(codes, len(found)),
            times=None if self.times is None else self.times[chosen],
            y=None if self.y is None else self.y[chosen],
            rows=self.rows[chosen],
            _columns={name: values[chosen] for name, values in self._columns.items()},
            _x=None if self._x is None else self._x[chosen],
        )

    def of(self, entities: Any) -> Panel:
        """The rows of these entities.

        Raises:
            ValueError: one of them is not in the panel.
        """
        wanted = self._labels_like(entities)
        unknown = np.setdiff1d(wanted, self.entities)
        if len(unknown):
            raise ValueError(f"entities: {unknown[:5].tolist()} are not in the panel")
        return self.where(np.repeat(np.isin(self.entities, wanted), self.sizes))

    def _labels_like(self, entities: Any) -> Array:
        """Labels of entities, which are of the kind that the panel's are: [T]."""
        wanted = np.asarray([entities] if isinstance(entities, str) else entities).reshape(-1)
        if len(wanted) and (wanted.dtype.kind in "US") != (self.entities.dtype.kind in "US"):
            raise TypeError(
                f"entities: expected labels like {self.entities[:1].tolist()}, got "
                f"{wanted[:1].tolist()}"
            )
        return wanted

    def last(self, rows: int) -> Panel:
        """The last rows of each entity, at most so many."""
        sizes = np.minimum(self.sizes, whole("rows", rows, 1))
        return self.where(slices(self.offsets[1:] - sizes, sizes))

    def split_time(self, at: Any, *, gap: Any = None) -> tuple[Panel, Panel]:
        """The rows before a time, and those from then on.

        Args:
            at: a time, such as "2011-01-01".
            gap: so much time before `at` is in neither part, as a numpy timedelta64 or a number:
                where a target is known only later, rows just before `at` have seen what follows.

        Raises:
            ValueError: the panel has no times.
        """
        times = self.need_times("split_time")
        at = as_time(times, "at", at)
        return self.where(times < (at if gap is None else at - as_gap(times, gap))), self.where(
            times >= at
        )

    def split_entities(self, share: float, *, seed: int) -> tuple[Panel, Panel]:
        """Entities to learn from, and others to test on; an entity is in one part whole.

        Args:
            share: the share of the entities that is in the second part, 0 < share < 1.
            seed: which they are.
        """
        if not isinstance(share, (int, float)) or not 0 < share < 1:
            raise ValueError(f"share: expected a number between 0 and 1, got {share!r}")
        count = len(self.entities)
        if count < 2:
            raise ValueError(f"share: expected two entities or more to split, got {count}")
        held = min(max(round(share * count), 1), count - 1)
        chosen = np.zeros(count, bool)
        chosen[np.random.default_rng(seed).permutation(count)[:held]] = True
        mask = np.repeat(chosen, self.sizes)
        return self.where(~mask), self.where(mask)

    def with_features(self, x: Array, names: Sequence[str] | None = None) -> Panel:
        """The panel with other features, in the panel's order of rows.

        Args:
            x: [rows, features], finite numbers; float64 stays, all else becomes float32.
            names: of the features.
        """
        x = np.asarray(x)
        if x.ndim != 2 or len(x) != len(self) or x.dtype.kind not in "fiub":
            raise ValueError(
                f"x: expected numbers of shape [{len(self)}, features], got {x.dtype} of shape "
                f"{list(x.shape)}"
            )
        if not np.isfinite(x).all():
            raise ValueError("x: expected finite numbers, got NaN or infinities")
        x = np.ascontiguousarray(x, x.dtype if x.dtype == np.float64 else np.float32)
        kept = tuple(f"x{i}" for i in range(x.shape[1])) if names is None else tuple(names)
        if len(kept) != x.shape[1]:
            raise ValueError(f"names: expected {counted(x.shape[1], 'name')}, got {len(kept)}")
        return self._changed(_x=x, _names=kept)

    def with_columns(self, **columns: Any) -> Panel:
        """The panel with some of its columns replaced or new ones, in the panel's order of rows.

        A replaced target is the new target; a new column is no feature. A prepared panel has to be
        prepared again.
        """
        table = {**self._columns, **read_table(columns)}
        for name, values in table.items():
            if len(values) != len(self):
                raise ValueError(f"{name}: expected {counted(len(self), 'row')}, got {len(values)}")
        if {self.entity, self.time} & columns.keys():
            raise ValueError("columns: the entity and the time order the rows: make a new Panel")
        y = self.y
        if self.target in columns:
            _, y = _target(self.target, table, False if self.classes is None else None)
        return self._changed(_columns=table, y=y, _x=None, _names=())

    def _changed(self, **fields: Any) -> Panel:
        twin = object.__new__(type(self))
        twin.__dict__.update({**self.__dict__, **fields})
        return twin

    def need_times(self, what: str) -> Array:
        """The times; ValueError where there are none."""
        if self.times is None:
            raise ValueError(f"{what}: expected a panel with times: Panel(..., time=...)")
        return self.times

    # ---- what is made of it -------------------------------------------------------------------

    def preprocessor(self, **options: Any) -> Preprocessor:
        """A `Preprocessor` for the panel's columns, with its options; not fitted yet."""
        from pymeta.data.preprocess import Preprocessor

        return Preprocessor(self.numeric, self.categorical, **options)

    def tasks(self, entities: Any = None) -> Tasks:
        """Each entity's rows as a task, in their order: `maml.adapt(*panel.tasks())`.

        Args:
            entities: the labels of other tasks, in this order, such as those of the panel that
                models were adapted to. One without rows in this panel has a task of none: adapted
                to it, a model stays at the start.
        """
        return make_tasks(self, self.entities if entities is None else self._labels_like(entities))

    def episodes(self, **options: Any) -> Episodes:
        """Meta-batches drawn of the panel: see `Episodes` for the options."""
        from pymeta.data.episodes import Episodes

        return Episodes(self, **options)

    def windows(self, *, support: int, query: int, gap: int = 0, step: int = 1) -> Windows:
        """All windows of the panel: see `Windows`."""
        from pymeta.data.windows import Windows

        return Windows(self, support=support, query=query, gap=gap, step=step)

    def check_leakage(
        self,
        prep: Preprocessor | None = None,
        *,
        build: Callable[[Panel], Any] | None = None,
        ahead: int = 5,
        cuts: int = 3,
    ) -> None:
        """Raise where a feature or a preprocessor has seen what is to be predicted.

        Features that are the target, or the target `ahead` rows later at most, up to a factor and
        a constant, or that tell two classes apart without an error, are refused. So is a `prep`
        that was fitted on this panel's rows, or on rows of its times or later ones. `build` is
        called on the rows before each of some times and must give what it gives for these rows of
        the whole panel.

        Args:
            prep: what was fitted, on training rows; this panel is to be predicted.
            build: makes features of a panel, [rows, features] in its order of rows.
            ahead: how many rows ahead of a feature the target is looked for.
            cuts: how many times `build` is tried at.

        Raises:
            ValueError: what has leaked, by name.
        """
        from pymeta.data import leakage

        leakage.check_features(self, ahead)
        if prep is not None:
            leakage.check_fit(self, prep)
        if build is not None:
            leakage.check_build(self, build, cuts)


# ---- columns ------------------------------------------------------------------------------------


def _need(columns: Columns, argument: str, name: Any, in_index: bool = False) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected a column's name, got {type(name).__name__}")
    if name not in columns:
        if in_index:
            raise ValueError(f"{argument}: {name!r} is in the table's index; give .reset_index()")
        known = ", ".join(columns)
        raise ValueError(f"{argument}: no column is called {name!r}; there are {known[:300]}")
    return name


def _features(
    columns: Columns,
    own: set[str | None],
    numeric: Sequence[str] | None,
    categorical: Sequence[str] | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The numeric and the categorical features, as told or by the columns' kinds."""
    if numeric is None and categorical is None:
        rest = {n: v for n, v in columns.items() if n not in own}
        times = [n for n, v in rest.items() if v.dtype.kind == "M"]
        if times:
            raise TypeError(
                f"numeric: {times[0]} holds times, which are no feature; make numbers of them (an "
                f"age in days), or name the features: numeric=[...], categorical=[...]"
            )
        categories = tuple(n for n, v in rest.items() if v.dtype.kind == "O")
        return tuple(n for n in rest if n not in categories), categories
    given = []
    for argument, names in (("numeric", numeric or ()), ("categorical", categorical or ())):
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"{argument}: expected a list of names, got {type(names).__name__}")
        for name in names:
            _need(columns, argument, name)
            if argument == "numeric" and columns[name].dtype.kind not in "fiub":
                raise TypeError(
                    f"numeric: {name} does not hold numbers (dtype {columns[name].dtype}); convert "
                    f"it, or name it in categorical"
                )
            if name in own:
                raise ValueError(f"{argument}: {name} is the entity, the time or the target")
        given.append(tuple(names))
    twice = sorted({n for n in (*given[0], *given[1]) if (*given[0], *given[1]).count(n) > 1})
    if twice:
        raise ValueError(f"numeric, categorical: expected each feature once, got {twice} twice")
    return given[0], given[1]


def _target(
    name: str | None, columns: Columns, classes: bool | None
) -> tuple[Array | None, Array | None]:
    """The labels of the classes, where targets are such, and y."""
    if name is None:
        return None, None
    values = columns[name]
    missing = int(is_missing(values).sum())
    if missing:
        raise ValueError(
            f"target: {counted(missing, 'row has', 'rows have')} no {name}; drop them, or leave "
            "target out for rows that "
            f"are to be predicted"
        )
    if values.dtype.kind == "M":
        raise TypeError(f"target: expected numbers or classes, got the times of {name}")
    if classes or (classes is None and values.dtype.kind == "O"):
        labels, y = np.unique(values, return_inverse=True)
        return labels, y.astype(np.int64)
    if values.dtype.kind == "O":
        raise TypeError(f"target: {name} does not hold numbers; convert it, or classes=True")
    if not np.isfinite(values).all():
        raise ValueError(f"target: {name} is infinite in some rows")
    return None, values.astype(np.float32)


def _offsets(codes: Array, entities: int) -> Array:
    return np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=entities))])


def as_time(times: Array, name: str, value: Any) -> Any:
    """A point in time that compares with `times`."""
    if times.dtype.kind != "M":
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise TypeError(f"{name}: expected a number, as the times are, got {value!r}")
        return value
    try:
        return np.datetime64(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: expected a time such as 2011-12-31 ({error})") from None


def as_gap(times: Array, gap: Any) -> Any:
    """A stretch of time that can be added to `times`."""
    if times.dtype.kind != "M":
        fits = isinstance(gap, (int, float, np.number)) and not isinstance(
            gap, (bool, np.timedelta64)
        )
    else:
        gap = np.timedelta64(gap) if hasattr(gap, "total_seconds") else gap
        fits = isinstance(gap, np.timedelta64)
    if not fits or gap < type(gap)(0):
        wanted = "a number >= 0"
        if times.dtype.kind == "M":
            wanted = "a stretch of time >= 0, such as np.timedelta64(30, 'D')"
        raise TypeError(f"gap: expected {wanted}, got {gap!r}")
    return gap
