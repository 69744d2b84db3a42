"""What comes back: each entity's residuals as a Gaussian process over time, its covariance learned.

A firm reports four times a year, a shop sells most before the same feast every year: how wrong the
pooled model was for an entity 13 weeks ago may tell more of today than all it has been told since.
Which ages tell how much is the same for all entities and learned over those of training: the
covariance of residuals by their distance in time. What an entity has of its own, its level, its
dates, is in its rows, and the posterior mean given these is exact:

    g(t) = k(t, T)' K(T, T)^-1 v(T)        T its rows' times, v their residuals

Where the predictions are of a logarithm, v is the ratio of targets to predictions, less its mean,
because that is what QLIKE answers to; rare large ones are cut.

A level of the last rows, drawn to 0 by how much entities differ (Buehlmann's credibility), comes
first, and v is of what it leaves: where all that a pooled model sees is shifted, levels follow at
once, and ratios by themselves, a few large ones among them, would tell of them late and badly.
Rows older than all distances that were learned say nothing, and a level fades as in
`pymeta.finance.fading`, so that with labels that come very late what is left is the pooled model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pymeta.data import Panel
from pymeta.data.encoders import credibility
from pymeta.finance.fading import as_numbers
from pymeta.finance.offsets import rows_of
from pymeta.tasks.groups import Array

_CUT = 0.99  # the quantile of residuals above which they are cut
_OWN = 0.1  # the share of the variance that every row has for itself, at least
_RECENT = 60  # rows whose level is taken
_AT_A_TIME = 32  # entities whose spectra are summed at once


class Echo:
    """A head that adapts to entities' residuals by how far away in time they are.

    Attributes:
        begin: the first time of training, as a number.
        unit: the usual step between times: distances are whole numbers of it.
        covariance: [distances], of residuals so many units apart; what is farther is 0.
        log: the scale of the predictions where they are of a logarithm, otherwise None.
        cut: (least, most): where residuals are cut.
        mean: of what is left of them.
        worth: how many rows the level of 0 is worth.
        near: units after which a level begins to fade.
    """

    def __init__(
        self,
        begin: float,
        unit: float,
        covariance: Array,
        log: float | None,
        cut: tuple[float, float],
        mean: float,
        worth: float,
        near: float,
    ) -> None:
        """Keep what was learned."""
        self.begin, self.unit, self.log = begin, unit, log
        self.covariance = np.asarray(covariance, dtype=np.float64)
        self.cut, self.mean = (float(cut[0]), float(cut[1])), float(mean)
        self.worth, self.near = float(worth), float(near)

    # ---- learning -----------------------------------------------------------------------------

    @classmethod
    def learned(cls, panel: Panel, offset: Array, support: int, later: int, log: Any) -> Echo:
        """Learn of training rows.

        Args:
            panel: with times and targets, as the pooled model sees them.
            offset: [rows, 1], the pooled model's outputs.
            support: rows of a task that are adapted to, at most.
            later: rows from there to the last that is predicted.
            log: the scale of the targets where they are of a logarithm, otherwise None.

        Raises:
            ValueError: there are no times, or an entity has two rows of one time.
        """
        times = as_numbers(panel.need_times("forms='echo'"))
        codes = panel.codes
        same = int(((np.diff(times) == 0) & (np.diff(codes) == 0)).sum())
        if same:
            raise ValueError(
                f"forms: 'echo' expects one row of each entity and time, got {same} more"
            )
        distinct = np.unique(times)
        steps = np.diff(distinct)
        unit = float(np.median(steps)) if len(steps) else 1.0
        row = float(steps.mean()) / unit if len(steps) else 1.0  # a row's units
        residual = panel.need_y().astype(np.float64) - offset[:, 0]
        worth = float(credibility(residual, codes))
        residual = residual - (np.bincount(codes, residual) / (panel.sizes + worth))[codes]
        seen = residual if log is None else np.exp(residual * log)
        least, most = np.quantile(seen, [0.0 if log is not None else 1 - _CUT, _CUT])
        mean = float(np.clip(seen, least, most).mean())
        nothing = np.zeros(1)
        begin = float(distinct[0])
        found = cls(begin, unit, nothing, log, (least, most), mean, worth, later * row)
        found.covariance = covariances(
            np.rint((times - begin) / unit).astype(np.int64),
            codes,
            found._values(residual),
            math.ceil((support + later) * row) + 1,
        )
        return found

    def firmed(self, firmer: float) -> Echo:
        """A copy that believes residuals so many times less."""
        covariance = self.covariance.copy()
        covariance[1:] /= firmer
        return Echo(**{**self.__dict__, "covariance": covariance, "worth": self.worth * firmer})

    # ---- use ----------------------------------------------------------------------------------

    def clock(self, times: Array) -> Array:
        """[rows, 1], float32: the feature that the head takes, whole units since `begin`."""
        found = np.rint((as_numbers(times) - self.begin) / self.unit)
        return np.asarray(found, dtype=np.float32)[:, None]

    def adapt(self, xs: Any, ys: Any, *, support_offset: Any) -> Echoes:
        """The posteriors of tasks.

        Args:
            xs: T tasks' rows of `clock`.
            ys: their targets.
            support_offset: the pooled model's outputs of them.
        """
        places = [np.asarray(x).reshape(-1).astype(np.int64) for x in xs]
        residual = rows_of(ys).astype(np.float64) - rows_of(support_offset)
        parts = np.split(residual, np.cumsum([len(p) for p in places])[:-1])
        levels = [self._level(p) for p in parts]
        values = [self._values(p - level) for p, level in zip(parts, levels, strict=True)]
        return Echoes(self, places, values, levels)

    def _level(self, residual: Array) -> float:
        """The level of a task's last rows, which are in the order of time."""
        last = residual[-_RECENT:]
        return float(last.sum() / (len(last) + self.worth))

    def _values(self, residual: Array) -> Array:
        """[rows], v: of mean 0 over training, 1 being the prediction itself for a logarithm."""
        cut = np.clip(residual if self.log is None else np.exp(residual * self.log), *self.cut)
        return cut - self.mean if self.log is None else cut / self.mean - 1

    def _between(self, first: Array, second: Array) -> Array:
        """The covariances [first, second] of places, none of which is the same row."""
        apart = np.abs(first[:, None] - second[None])
        known = self.covariance[np.minimum(apart, len(self.covariance) - 1)]
        known = np.where(apart < len(self.covariance), known, 0.0)
        return np.where(apart == 0, (1 - _OWN) * self.covariance[0], known)

    def weights(self, support: Array, query: Array) -> Array:
        """What each support row's v counts for each query row: [support, query], by places."""
        own = _OWN * self.covariance[0] * np.eye(len(support))
        found: Array = np.linalg.solve(
            self._between(support, support) + own, self._between(support, query)
        )
        return found

    # ---- files --------------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.__dict__, "covariance": self.covariance.tolist()}

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Echo:
        """What `described` told."""
        return cls(**described)


class Echoes:
    """T adapted tasks: called as a learner's adapted models are.

    Args:
        echo: what was learned.
        places: of each task's support rows, in units of time.
        values: their v.
        levels: of each task.
    """

    def __init__(
        self, echo: Echo, places: list[Array], values: list[Array], levels: list[float]
    ) -> None:
        """Keep them."""
        self.echo, self.places, self.values, self.levels = echo, places, values, levels

    def __call__(self, xq: Any, *, offset: Any) -> Array:
        """[rows of query, 1], float32: the offset and what comes back.

        Args:
            xq: T tasks' rows of `Echo.clock`.
            offset: the pooled model's outputs of them.
        """
        asked = [np.asarray(x).reshape(-1).astype(np.int64) for x in xq]
        found = [np.zeros(len(a)) for a in asked]
        scale = 1.0 if self.echo.log is None else self.echo.log
        for tasks in self._alike(asked):
            support, query = self.places[tasks[0]], asked[tasks[0]]
            if len(support) and len(query):
                weights = self.echo.weights(support, query) / scale
                age = np.maximum((query - support[-1]) / self.echo.near - 1, 0)
                together = np.stack([self.values[t] for t in tasks]) @ weights
                for t, moved in zip(tasks, together, strict=True):
                    found[t] = moved + self.levels[t] * 0.5**age
        moved = np.concatenate([np.zeros(0), *found])
        return np.asarray(rows_of(offset) + moved, dtype=np.float32)[:, None]

    def _alike(self, asked: list[Array]) -> list[list[int]]:
        """Tasks whose rows lie alike in time: they have the same weights."""
        groups: dict[tuple[bytes, bytes], list[int]] = {}
        for t, (support, query) in enumerate(zip(self.places, asked, strict=True)):
            first = support[0] if len(support) else 0
            key = (support - first).tobytes(), (query - first).tobytes()
            groups.setdefault(key, []).append(t)
        return list(groups.values())


def covariances(place: Array, codes: Array, values: Array, distances: int) -> Array:
    """[distances], the covariance of an entity's values by their distance, that of 0 first.

    The sums over pairs of rows, divided by how many there are, drawn to 0 by how much of the time
    has no pair so far apart, and made those of a process (Bochner): a spectrum is nowhere negative,
    and some of it is every row's own.

    Args:
        place: [rows], whole numbers >= 0.
        codes: [rows], which entity.
        values: [rows], of mean 0.
        distances: how many, at most.
    """
    span = int(place.max(initial=0)) + 1
    kept = max(min(distances, span - 1), 1)
    sums, counts = np.zeros(kept), np.zeros(kept)
    for first in range(0, int(codes.max(initial=0)) + 1, _AT_A_TIME):
        mine = (codes >= first) & (codes < first + _AT_A_TIME)
        grid = np.zeros((2, _AT_A_TIME, span))
        grid[0, codes[mine] - first, place[mine]] = values[mine]
        grid[1, codes[mine] - first, place[mine]] = 1
        sums, counts = (
            total + _pairs(part, kept) for total, part in zip((sums, counts), grid, strict=True)
        )
    found = np.where(counts > 0.5, sums / np.maximum(counts, 1), 0) * (1 - np.arange(kept) / span)
    variance = found[0]
    circle = np.zeros(1 << (2 * kept - 1).bit_length())
    circle[:kept] = found
    circle[len(circle) - kept + 1 :] = found[:0:-1]
    spectrum = np.maximum(np.fft.rfft(circle).real, _OWN * variance)
    return np.asarray(np.fft.irfft(spectrum, len(circle))[:kept])


def _pairs(grid: Array, distances: int) -> Array:
    """[distances], the sums of products so far apart, of rows [entities, places]."""
    length = 1 << (grid.shape[1] + distances).bit_length()
    power = (np.abs(np.fft.rfft(grid, length)) ** 2).sum(axis=0)
    return np.asarray(np.fft.irfft(power, length)[:distances])
