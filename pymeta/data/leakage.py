"""Has a feature, or a preprocessor, seen what is to be predicted? Errors that say which.

What can be told from the data alone is told: copies of the target, of now or of later rows, and
features that change when the future is taken away. A feature that merely knows too much cannot be
told from a good one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pymeta.data.table import time_text
from pymeta.spec.show import counted
from pymeta.tasks.groups import Array

if TYPE_CHECKING:
    from pymeta.data.panel import Panel
    from pymeta.data.preprocess import Preprocessor

_COPY = 1 - 1e-6  # a correlation above is that of float32's rounding
_LEAST = 20  # rows, and distinct values, that a correlation is taken of
_POSITIVES = 10


def _columns(panel: Panel) -> list[tuple[str, Array]]:
    if panel.is_prepared:
        return [(name, panel.x[:, i]) for i, name in enumerate(panel.features)]
    return [(name, panel[name]) for name in panel.numeric]


def _correlation(a: Array, b: Array) -> float:
    """Of the rows where both are there; 0 where too few are or one is constant."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    here = np.isfinite(a) & np.isfinite(b)
    a, b = a[here], b[here]
    if len(a) < _LEAST or min(len(np.unique(a)), len(np.unique(b))) < _LEAST:
        return 0.0
    return abs(float(np.corrcoef(a, b)[0, 1]))


def _separates(x: Array, y: Array) -> bool:
    """Whether some threshold tells two classes apart without an error."""
    here = np.isfinite(x.astype(np.float64))
    x, y = x[here], y[here]
    ones, zeros = x[y == 1], x[y == 0]
    if min(len(ones), len(zeros)) < _POSITIVES:
        return False
    return bool(ones.min() > zeros.max() or ones.max() < zeros.min())


def check_features(panel: Panel, ahead: int) -> None:
    """Raise where a feature is the target of its row or of one of the next ones."""
    y = panel.y
    if y is None:
        return
    binary = bool(np.isin(y, (0, 1)).all())
    codes = panel.codes
    for name, values in _columns(panel):
        if binary:
            if _separates(values, y):
                raise ValueError(
                    f"feature {name}: it tells the two classes of {panel.target} apart without an "
                    f"error, as what is known only once the target is; leave it out"
                )
            continue
        for rows in range(ahead + 1 if panel.times is not None else 1):
            now, then = slice(0, len(y) - rows), slice(rows, None)
            same = codes[now] == codes[then]
            if _correlation(values[now][same], y[then][same]) > _COPY:
                when = "of the same row" if rows == 0 else f"{rows} rows later"
                raise ValueError(
                    f"feature {name}: it is the target {panel.target} {when}, up to a factor and a "
                    f"constant; leave it out, or shift it back in time"
                )


def check_fit(panel: Panel, prep: Preprocessor) -> None:
    """Raise where a preprocessor was fitted on the panel's rows, or on their time or later."""
    prep._need_fit()
    if prep._seen is not None and prep._seen[0] is panel._source:
        both = int(np.isin(panel.rows, prep._seen[1]).sum())
        if both:
            raise ValueError(
                f"prep: it was fitted on {both} of the panel's {len(panel)} rows; fit it on the "
                f"training part alone"
            )
    if prep._until is not None and panel.times is not None and len(panel):
        late = int((panel.times <= prep._until).sum())
        if late:
            raise ValueError(
                f"prep: it was fitted on rows up to {time_text(prep._until)}, and {late} of the "
                f"panel's {len(panel)} rows are not later; fit it on rows before "
                f"{time_text(panel.times.min())}"
            )


def _built(panel: Panel, build: Callable[[Panel], Any]) -> Array:
    found = build(panel)
    values = np.asarray(getattr(found, "x", found), dtype=np.float64)
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or len(values) != len(panel):
        raise ValueError(
            f"build: expected features of shape [{len(panel)}, features], got shape "
            f"{list(values.shape)}"
        )
    return values


def check_build(panel: Panel, build: Callable[[Panel], Any], cuts: int) -> None:
    """Raise where features of rows before a time depend on rows from then on."""
    times = panel.need_times("build")
    whole = _built(panel, build)
    distinct = np.unique(times)
    places = np.linspace(0, len(distinct), cuts + 2)[1:-1].astype(int)
    for at in distinct[np.unique(places)]:
        before = times < at
        if not before.any():
            continue
        part = _built(panel.where(before), build)
        wanted = whole[before]
        if part.shape != wanted.shape:
            raise ValueError(
                f"build: it makes {wanted.shape[1]} features of the panel, and {part.shape[1]} of "
                f"its rows before {at}"
            )
        scale = np.nanmax(np.abs(wanted), axis=0, initial=0.0)
        same = np.isclose(part, wanted, rtol=0, atol=1e-9 * scale + 1e-300, equal_nan=True)
        wrong = np.flatnonzero(~same.all(axis=0))
        if len(wrong):
            rows = int((~same[:, wrong[0]]).sum())
            raise ValueError(
                f"build: feature {wrong[0]} changes in {counted(rows, 'row')} before "
                f"{time_text(at)} when the rows from then on are removed: it has seen the future"
            )
