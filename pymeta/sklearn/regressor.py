"""The regressor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.metrics import d2_pinball_score, r2_score
from sklearn.utils.validation import check_is_fitted, validate_data

from pymeta.sklearn.base import MetaEstimator
from pymeta.sklearn.offsets import numbers
from pymeta.sklearn.parameters import one_of
from pymeta.spec.losses import Loss, QuantileLoss, StudentTNLLLoss, describe_loss
from pymeta.tasks.groups import Array

_REGRESSION = (
    "mse", "huber", "l1", "quantile", "poisson_nll", "qlike", "gaussian_nll", "student_t_nll",
)  # fmt: skip


def _regression_loss(loss: Any) -> Loss:
    """A loss of the regressor; ValueError unless it is one."""
    if not isinstance(loss, (QuantileLoss, StudentTNLLLoss)):
        one_of("loss", loss, _REGRESSION)
    return describe_loss(loss)


def _check_amounts(y: Array, weights: Array | None, loss: Loss) -> None:
    """ValueError where a target that weighs something is negative, for a loss with a log link."""
    wrong = (y < 0).reshape(len(y), -1).any(axis=1)
    if weights is not None:
        wrong &= weights > 0
    if loss.targets == "amounts" and wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"y: row {at}: expected numbers of at least 0 for {loss.kind}, got {float(y[at].min())}"
        )


@dataclass(kw_only=True, eq=False, repr=False)
class MetaRegressor(RegressorMixin, MetaEstimator):
    """One small neural regressor for each group, all from one meta-learned start.

    Targets are standardised inside: `fit` takes the mean and the standard deviation of all its
    (weighted) rows, the networks see the quotients, also in `adapt`, and predictions are scaled
    back. Where a loss has a log link ("poisson_nll", "qlike"), targets are divided by their mean
    alone. Losses and `loss_curve_` are in those units.

    All arguments but the loss are those of `MetaClassifier`, and so are all other attributes.

    Args:
        loss: "mse"; "huber": quadratic up to one standard deviation, then linear; "l1"; "quantile"
            (the median) or a `pymeta.QuantileLoss` of one level or several; "poisson_nll" for
            counts and "qlike" for variances, both of the logarithm of what is predicted;
            "gaussian_nll", "student_t_nll" or a `pymeta.StudentTNLLLoss`, which predict a scale
            beside the location.

    Attributes:
        y_mean_: what is subtracted from targets.
        y_scale_: what they are then divided by.

    Raises:
        TypeError, ValueError: in `fit`, where a parameter is not as described.
    """

    loss: Any = "mse"

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(
        self,
        X: Any,
        y: Any,
        groups: Any = None,
        sample_weight: Any = None,
        *,
        offset: Any = None,
        times: Any = None,
    ) -> MetaRegressor:
        """Learn what groups share, and how far they may go from it.

        Args:
            X: [rows, features], numbers without NaN or infinities.
            y: [rows], or [rows, targets] for several at once; of at least 0 where the loss has a
                log link.
            groups: [rows], each row's group: numbers or strings. None for one group of all rows.
            sample_weight: [rows], weights of the rows' losses, >= 0. A row of weight 0 is as
                good as absent.
            offset: a pooled model's predictions, in place of `base`: [rows] (or of y's shape), in
                the units of y, of a log link's the logarithm. What is learned is then the
                remainder, and all later calls need offsets as well.
            times: [rows], numbers or dates. Given, rows are used in their order, as with
                shuffle=False: support and what is adapted to come first.

        Returns:
            The estimator, without adapted groups (unless `adapt_on_fit`).
        """
        self._check_parameters()
        loss = _regression_loss(self.loss)
        X, y = self._validated(X, y, self.dtype, reset=True)
        _check_amounts(y, self._row_weights(X, y, sample_weight), loss)
        self._columns = 1 if y.ndim == 1 else y.shape[1]
        self._is_table = y.ndim == 2
        self._fit(X, y, groups, sample_weight, offset, times)
        return self

    def _validated(self, X: Any, y: Any, dtype: Any, reset: bool) -> tuple[Array, Array]:
        X, y = validate_data(
            self, X, y, dtype=dtype, order="C", y_numeric=True, multi_output=True, reset=reset
        )
        y = np.asarray(y, dtype=np.float64)
        if not reset and y.shape[1:] != ((self._columns,) if self._is_table else ()):
            wanted = f"[rows, {self._columns}]" if self._is_table else "[rows]"
            raise ValueError(f"y: expected shape {wanted}, as fit had, got {list(y.shape)}")
        return X, y

    def _scale_targets(self, y: Array, offset: Array | None, weights: Array | None) -> None:
        weights = np.ones(len(y)) if weights is None or not weights.any() else weights
        mean: Any = np.average(y, weights=weights, axis=0)
        middle, scale = mean, mean
        if describe_loss(self.loss).targets == "amounts":
            middle = 0.0 * mean
        else:
            if offset is not None:  # what a remainder of 0 predicts is the offset
                y, middle = y - offset.reshape(y.shape), 0.0 * mean
            scale = np.sqrt(np.average((y - middle) ** 2, weights=weights, axis=0))
        scale = np.where(scale > 0, scale, 1.0)
        self.y_mean_, self.y_scale_ = (v if self._is_table else float(v) for v in (middle, scale))

    def adapt(
        self,
        X: Any,
        y: Any,
        groups: Any,
        sample_weight: Any = None,
        *,
        offset: Any = None,
        times: Any = None,
    ) -> MetaRegressor:
        """Fine-tune the shared start to each group; all groups in one call.

        Groups may be new, or known from `fit` or an earlier `adapt`, whose model is replaced; the
        models of other groups stay.

        Args:
            X: [rows, features].
            y: [rows], or [rows, targets].
            groups: [rows], each row's group.
            sample_weight: as in `fit`.
            offset: as in `fit`.
            times: as in `fit`.

        Returns:
            The estimator.
        """
        return self._adapted(X, y, groups, sample_weight, offset, times, goes_on=False)

    def partial_fit(
        self,
        X: Any,
        y: Any,
        groups: Any = None,
        sample_weight: Any = None,
        *,
        offset: Any = None,
        times: Any = None,
    ) -> MetaRegressor:
        """Adapt on: groups go on from their own models with these rows alone.

        A group without a model begins with the start; the pull back (`anchor`) is to where it went
        on from, and so does the gate compare. Without groups, it is the shared model that learns
        on. An estimator that is not fitted is fitted first. Methods with heads need all of a
        group's rows and refuse.

        Args:
            X: [rows, features].
            y: as in `fit`.
            groups: [rows], each row's group.
            sample_weight: as in `fit`.
            offset: as in `fit`.
            times: as in `fit`.

        Returns:
            The estimator.
        """
        if not hasattr(self, "models_"):
            self.fit(X, y, groups, sample_weight, offset=offset, times=times)
            if groups is None or self.adapt_on_fit:
                return self
        return self._adapted(X, y, groups, sample_weight, offset, times, goes_on=True)

    def _adapted(
        self,
        X: Any,
        y: Any,
        groups: Any,
        sample_weight: Any,
        offset: Any,
        times: Any,
        goes_on: bool,
    ) -> MetaRegressor:
        check_is_fitted(self)
        self._check_parameters()
        X, y = self._validated(X, y, self._form.dtype, reset=False)
        _check_amounts(y, self._row_weights(X, y, sample_weight), self._loss)
        self._adapt_rows(X, y, groups, sample_weight, offset, times, goes_on)
        return self

    def predict(self, X: Any, groups: Any = None, *, offset: Any = None) -> Array:
        """The prediction for each row, [rows], or [rows, targets] where y was a table.

        For a likelihood it is the location, for a log link the rate or variance itself. For a
        quantile loss of several levels there is one more axis at the end, [..., levels].

        Args:
            X: [rows, features].
            groups: [rows], each row's group; None where all rows are for the shared start.
            offset: as in `fit`.
        """
        raw, loss = self._raw(X, groups, offset), self._loss
        raw = raw.reshape(len(raw), -1, self._columns)  # [rows, levels or location and scale, ..]
        if loss.targets == "amounts":
            return self._shaped(np.exp(raw[:, 0]) * self.y_scale_)
        values = raw * self.y_scale_ + self.y_mean_
        if len(loss.levels) > 1:
            return np.moveaxis(values, 1, 2) if self._is_table else values[:, :, 0]
        return self._shaped(values[:, 0])

    def _shaped(self, values: Array) -> Array:
        """[rows, targets] in the form of y."""
        return values if self._is_table else values[:, 0]

    def predict_scale(self, X: Any, groups: Any = None) -> Array:
        """The scale that a likelihood, or method="bayesian", predicts for each row, [rows].

        The standard deviation for "gaussian_nll"; for Student's t distribution, of more than two
        degrees of freedom v, that is the scale times sqrt(v / (v - 2)).

        Args:
            X: [rows, features].
            groups: [rows], each row's group; None where all rows are for the shared start.

        Raises:
            AttributeError: the loss predicts no scale.
        """
        check_is_fitted(self)
        if self._start.has_variances:
            return self._shaped(np.sqrt(self._raw(X, groups, variances=True)) * self.y_scale_)
        if self._loss.kind not in ("gaussian_nll", "student_t_nll"):
            raise AttributeError(
                f"predict_scale: expected the loss gaussian_nll or student_t_nll, or "
                f"method='bayesian', got {self._loss.kind}"
            )
        raw = self._raw(X, groups, np.zeros(len(X)) if self._offset_from == "caller" else None)
        found: Array = self._shaped(np.exp(raw[:, self._columns :]) * self.y_scale_)
        return found

    def score(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        groups: Any = None,
        *,
        offset: Any = None,
    ) -> float:
        """The R^2 of `predict(X, groups)`, the mean over targets.

        Of several quantiles it is the mean of their D^2, which compares the pinball loss with that
        of the empirical quantile.
        """
        predicted = self.predict(X, groups, offset=offset)
        levels = self._loss.levels
        if len(levels) < 2:
            return float(r2_score(y, predicted, sample_weight=sample_weight))
        each = [
            d2_pinball_score(y, predicted[..., i], alpha=level, sample_weight=sample_weight)
            for i, level in enumerate(levels)
        ]
        return float(np.mean(each))

    @property
    def _loss(self) -> Loss:
        """That of the fitted networks."""
        return describe_loss(self._form.loss)

    def _loss_name(self) -> Any:
        return self.loss

    def _outputs(self) -> int:
        return self._columns * describe_loss(self.loss).outputs_per_target

    def _target(self, y: Array, dtype: Any) -> Array:
        return ((y - self.y_mean_) / self.y_scale_).astype(dtype)

    def _offset_of(self, offset: Array) -> Array:
        found = offset[:, None] if offset.ndim == 1 else offset
        if found.shape[1] not in (1, self._columns):
            raise ValueError(f"offset: expected {self._columns} for each row, got {found.shape[1]}")
        found = np.broadcast_to(found, (len(found), self._columns))
        loss = self._loss
        if loss.targets == "amounts":
            return found - np.log(self.y_scale_)
        found = found / self.y_scale_
        if loss.levels:
            return np.tile(found, (1, loss.outputs_per_target))
        rest = np.zeros((len(found), self._form.widths[-1] - self._columns))  # of the scales
        return np.concatenate([found, rest], axis=1)

    def _base_kind(self) -> str:
        return "amounts" if describe_loss(self.loss).targets == "amounts" else "numbers"

    def _of_base(self, model: Any, X: Array) -> Array:
        is_amount = describe_loss(self.loss).targets == "amounts"
        return numbers(model, X, self._base_scale if is_amount else None)
