"""Models walked through time: adapted, or fitted again, every so many periods.

A desk does not adapt once a year. `Walking` cuts the query into blocks of periods and gives the
model, for each block, what was known when it began: the history, and the query rows of blocks
before it, as far as their targets were known by then.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from pymeta.data import Panel
from pymeta.data.draw import whole
from pymeta.data.panel import as_gap
from pymeta.tasks.groups import Array


def stacked(first: Panel, second: Panel) -> Panel:
    """The rows of two panels of the same columns as one."""
    a, b = first.to_dict(), second.to_dict()
    classes = None if first.classes is None else True
    return Panel(
        {name: np.concatenate([a[name], b[name]]) for name in a},
        entity=first.entity,
        time=first.time,
        target=first.target,
        numeric=first.numeric,
        categorical=first.categorical,
        classes=False if classes is None else classes,
    )


class Walking:
    """A model for `pymeta.metrics.compare`, walked through the query.

    Args:
        model: anything with fit(train) and predict(history, query).
        every: distinct times in a block; one also ends where ten usual steps of time pass.
        gap: how much later than its row a target is known, as in `Panel.split_time`; rows younger
            than that are not adapted to.
        history: at most so many last rows of each entity are given to the model; None for all.
        refit: whether the model is fitted again for each block, to all rows known by then, in
            place of being adapted. Its `fit` has to return it.
    """

    def __init__(
        self,
        model: Any,
        *,
        every: int = 21,
        gap: Any = None,
        history: int | None = None,
        refit: bool = False,
    ) -> None:
        """Keep the settings."""
        self.model, self.every, self.gap = model, whole("every", every, 1), gap
        self.history, self.refit = history, refit
        self.adapts = bool(getattr(model, "adapts", False)) and not refit

    def fit(self, train: Panel) -> Walking:
        """Fit the model."""
        self.model.fit(train)
        self._train = train
        self._fitted: dict[Any, Any] = {}  # by the time when a block begins
        return self

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """Block after block; without a history, what the model predicts without one."""
        if history is None:
            return np.asarray(self.model.predict(None, query))
        times = query.need_times("Walking")
        distinct = np.unique(times)
        late = self._delay(history, distinct)
        out = np.empty(len(query))
        block_of = self._blocks(distinct)
        blocks = block_of[np.searchsorted(distinct, times)]
        for number, begin in enumerate(distinct[np.diff(block_of, prepend=-1) > 0]):
            known = self._known(history, query.where(blocks < number), begin - late)
            out[blocks == number] = self._block(known, query.where(blocks == number), begin)
        return out

    def _blocks(self, distinct: Array) -> Array:
        """The block of each distinct time, from 0: it ends where a long time passes, too."""
        steps = np.diff(distinct)
        usual = np.median(steps) if len(steps) else 0
        begins = np.concatenate([[0], np.flatnonzero(steps > 10 * usual) + 1])
        place = np.arange(len(distinct))
        place -= begins[np.searchsorted(begins, place, side="right") - 1]
        return np.cumsum(place % self.every == 0) - 1

    def _delay(self, history: Panel, distinct: Array) -> Any:
        """How old a row has to be: the gap, or more where the history ends earlier than that.

        A history that ends long before the query says that targets are known as late as that.
        """
        none = distinct[0] - distinct[0]
        gap = none if self.gap is None else as_gap(distinct, self.gap)
        usual = np.median(np.diff(distinct)) if len(distinct) > 1 else none
        silent = distinct[0] - history.need_times("Walking").max() - usual
        return max(gap, silent) if silent > 10 * usual else gap

    def _known(self, history: Panel, before: Panel, until: Any) -> Panel:
        if self.history is not None and not self.refit:
            history = history.last(self.history)
        known = stacked(history, before) if len(before) else history
        known = known.where(known.need_times("Walking") < until)
        if self.history is None or self.refit:
            return known
        return known.last(self.history)

    def _block(self, known: Panel, block: Panel, begin: Any) -> Array:
        if not self.refit:
            return np.asarray(self.model.predict(known, block))
        if begin not in self._fitted:  # stress tests do not fit again
            rest = self._train.where(~np.isin(self._train.labels, known.entities))
            model = copy.deepcopy(self.model)
            self._fitted[begin] = model.fit(stacked(rest, known) if len(rest) else known)
        return np.asarray(self._fitted[begin].predict(known, block))
