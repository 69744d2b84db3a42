"""The pooled model below an estimator's networks: given as `base`, by the caller, or linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pymeta.sklearn.choosing import is_choosable
from pymeta.sklearn.offsets import checked_offset, cross_fitted, fitted
from pymeta.sklearn.parameters import Parameters
from pymeta.sklearn.pooled_linear import pooled_linear
from pymeta.tasks.groups import Array


@dataclass(kw_only=True, eq=False, repr=False)
class WithBase(Parameters):
    """An estimator whose networks may learn what a pooled model leaves."""

    # ---- what the subclasses know ----------------------------------------------------------------

    def _offset_of(self, offset: Array) -> Array:
        """An offset in the units of the outputs, [rows] or [rows, out] -> [rows, out]."""
        raise NotImplementedError

    def _of_base(self, model: Any, X: Array) -> Array:
        """What a fitted pooled model predicts, as an offset."""
        raise NotImplementedError

    def _base_kind(self) -> str:
        """What base="auto" is to predict: "classes", "amounts" or "numbers"."""
        raise NotImplementedError

    # ---- offsets --------------------------------------------------------------------------------

    def _inputs(self, X: Array) -> Array:
        """The features within what `fit` saw, where that is asked for."""
        if self._range is None:
            return X
        clipped: Array = np.clip(X, *self._range)
        return clipped

    def _offsets(self, X: Array, offset: Any) -> Array | None:
        """The rows' offsets [rows, out] in the units of the outputs, by whom they come."""
        if self._offset_from is None:
            if offset is not None:
                raise ValueError("offset: expected None, because fit had none")
            return None
        if self._offset_from == "base":
            if offset is not None:
                raise ValueError("offset: expected None, because base predicts it")
            return self._offset_of(self._of_base(self.base_, X))
        if offset is None:
            raise ValueError("offset: expected one for each row, as fit had, got None")
        return self._offset_of(checked_offset(offset, X))

    def _fitted_base(
        self,
        X: Array,
        y: Array,
        labels: Array | None,
        weights: Array | None,
        counted: Array,
        offset: Any,
    ) -> Array | None:
        """Fit the pooled model, if there is one; the rows' offsets in its units, or None."""
        self._offset_from, self._base_is_linear = None, False
        if offset is not None:
            if self.base is not None and not isinstance(self.base, str):
                raise ValueError("offset: expected None, because base predicts it")
            self._offset_from = "caller"
            return checked_offset(offset, X)
        x, t = self._inputs(X)[counted], y[counted]
        w = None if weights is None else weights[counted]
        groups = None if labels is None else labels[counted]
        base = self.base
        if isinstance(base, str):
            base = self._linear_base(x, t, w, groups)
        if base is None:
            return None
        self._offset_from = "base"
        self._base_scale = t.mean() if t.dtype.kind == "f" else None
        self.base_ = fitted(base, x, t, w)
        found = cross_fitted(base, x, t, w, groups, self._of_base)
        offsets = np.zeros((len(X), *found.shape[1:]))
        offsets[counted] = found
        return offsets

    def _linear_base(self, x: Array, t: Array, weights: Array | None, groups: Array | None) -> Any:
        """What base="auto" comes to: a linear model where method="auto" can choose, or None."""
        if self.method != "auto" or groups is None:
            return None
        if not is_choosable(np.unique(groups, return_counts=True)[1]):
            return None
        if self._base_kind() == "classes" and len(np.unique(t)) < 2:
            return None
        self._base_is_linear = True
        return pooled_linear(self._base_kind(), x, t, weights, groups)
