"""The estimators: `MetaClassifier` and `MetaRegressor`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, d2_pinball_score, r2_score
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from pymeta.models.arrays import softmax
from pymeta.sklearn.base import MetaEstimator
from pymeta.sklearn.methods import METHODS
from pymeta.sklearn.parameters import one_of
from pymeta.spec.losses import Loss, QuantileLoss, StudentTNLLLoss, describe_loss
from pymeta.tasks.groups import Array, labels_of


@dataclass(kw_only=True, eq=False, repr=False)
class MetaClassifier(ClassifierMixin, MetaEstimator):
    """One small neural classifier for each group, all from one meta-learned start.

    `fit` learns the start, `adapt` makes a model for each group, and the predicting methods take
    the `groups` of their rows: rows of an adapted group are given to its model, all others (and
    all rows, where no groups are given) to the shared start.

    Two classes have one logit and the binary cross-entropy, more have the softmax.

    Read more in `pymeta.sklearn`, the module, which shows the use in a Pipeline.

    Args:
        method: how `fit` learns the start. "maml": such that a few steps on a group's support
            rows do well on its query rows (Finn et al. 2017). "reptile": moved towards what the
            groups are adapted to (Nichol et al. 2018). "pooled": ordinary training on all rows,
            as is also done where there are fewer than two groups to learn from. These fine-tune
            the network. "ridge" and "bayesian" learn features by the hidden layers and a prior
            of the last layer, which is then exact for each group (`pymeta.learners.RidgeHead`,
            `BayesianHead`, for the loss "mse" alone; with hidden=() it is empirical Bayes), and
            "protonet", "matching" and "relation" compare rows with those of each class
            (`ProtoNet`, `MatchingNet`, `RelationNet`); `inner_*`, `adapt_*` and `anchor*` do not
            concern them. "relational" has a start for each group, by its relations to learned
            prototypes, and "meta_lstm" a learned optimiser (`RelationalMAML`, `MetaLSTM`); both
            adapt as they were trained, by `inner_steps` and `inner_lr`.
        hidden: widths of the hidden layers; () for a linear model.
        activation: "relu", "tanh", "elu", "gelu" or "silu".
        inner_optimizer: what takes the steps on a group, here and in `adapt`: "sgd", "momentum"
            (SGD with momentum 0.9), "adam" or "rmsprop".
        inner_lr: its step size.
        inner_steps: its steps on a group in `fit`.
        inner_batch_size: rows of a step in `adapt` and in Reptile; None for all of the group's
            (MAML always takes all).
        first_order: leave the second derivatives out of MAML (FOMAML).
        head_only: adapt the last layer alone, all others are shared (ANIL).
        meta_lr: step size of AdamW, which trains the start: on the meta-gradient, falling
            linearly to a hundredth, or constant in pooled training. A head's prior learns ten
            times as fast.
        weight_decay: AdamW's.
        iterations: meta-batches of MAML and Reptile.
        tasks_per_batch: groups in a meta-batch.
        draw: which they are: "groups" draws every group equally often, "rows" in proportion to
            its rows, which keeps the network from memorising many small groups.
        task_rows: at most so many rows of each group are used in a meta-batch; None for all.
        support: rows of a task that are support in MAML, as a fraction or a number; the others
            are query rows. A group of one row has only that query row, with nothing to adapt to.
        shuffle: draw the support rows at random. False where rows are in order of time: the
            support rows are then the first ones, as they will be in use.
        epochs: passes over the rows in pooled training.
        batch_size: rows of a step in pooled training; None for all.
        pretrain_epochs: epochs of pooled training before MAML or Reptile begins.
        adapt_lr: step size in `adapt`; None for `inner_lr`.
        adapt_epochs: passes over a group's rows in `adapt`; None for `inner_steps`.
        anchor: strength of the pull back to the start (L2-SP), in `adapt` and in the inner steps
            of `fit`.
        anchor_rows: in its place: the start is worth so many rows, the strength is this over the
            rows of the group; None for `anchor`.
        adapt_validation: fraction of each group's rows that `adapt` holds out, to keep the best
            epoch's weights; with shuffle=False the last ones.
        adapt_patience: stop a group after so many epochs without improvement on those rows.
        adapt_on_fit: let `fit` end with `adapt` on its own rows and groups.
        class_weight: as in scikit-learn: None, "balanced" (by the rows given to `fit`), or
            {class: weight}; they hold in `adapt` too.
        dtype: "float32" or "float64", in which everything is computed.
        random_state: the same integer gives the same bits, for any number of threads.
        verbose: whether to print how training goes.

    Attributes:
        classes_: [C], the class labels.
        adapted_groups_: labels of the groups that have a model.
        models_: the models as a `pymeta.AdaptedArrays`: the shared start, then theirs in order.
        n_features_in_: as in scikit-learn.
        feature_names_in_: as in scikit-learn.
        n_iter_: iterations, or epochs of pooled training.
        loss_curve_: the loss of each of them.

    Raises:
        TypeError, ValueError: in `fit`, where a parameter is not as described.

    Example:
        >>> import numpy as np
        >>> from pymeta.sklearn import MetaClassifier
        >>> rng = np.random.default_rng(0)
        >>> X, g = rng.normal(size=(600, 2)), np.repeat(np.arange(20), 30)
        >>> y = (X[:, 0] > 0) == (g % 2 == 0)         # odd groups mean the opposite
        >>> model = MetaClassifier(iterations=200, random_state=0).fit(X, y, groups=g)
        >>> bool(model.score(X, y) < 0.7)             # the start alone cannot know
        True
        >>> bool(model.adapt(X, y, groups=g).score(X, y, groups=g) > 0.9)
        True
    """

    class_weight: Any = None

    def fit(self, X: Any, y: Any, groups: Any = None, sample_weight: Any = None) -> MetaClassifier:
        """Learn the shared start.

        Args:
            X: [rows, features], numbers without NaN or infinities.
            y: [rows], class labels.
            groups: [rows], each row's group: numbers or strings. None for one group of all rows.
            sample_weight: [rows], weights of the rows' losses, >= 0. A row of weight 0 is as
                good as absent.

        Returns:
            The estimator, without adapted groups (unless `adapt_on_fit`).
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=self.dtype, order="C")
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError(f"y: expected two classes or more, got one class, {self.classes_[0]}")
        # Set here, for what `method` is set to later holds for the next fit.
        self._one_logit = len(self.classes_) == 2 and not METHODS[self.method].by_class
        self._class_weights = None
        if self.class_weight is not None:
            # A row of weight 0 is as good as absent here, too. A class that has no other rows
            # weighs 1: nothing is multiplied by it.
            weights = self._row_weights(X, y, sample_weight)
            counted = y if weights is None else y[weights > 0]
            here = np.isin(self.classes_, counted)
            found = np.ones(len(self.classes_))
            found[here] = compute_class_weight(
                self.class_weight, classes=self.classes_[here], y=counted
            )
            self._class_weights = found
        self._fit(X, y, groups, sample_weight)
        return self

    def adapt(self, X: Any, y: Any, groups: Any, sample_weight: Any = None) -> MetaClassifier:
        """Fine-tune the shared start to each group; all groups in one call.

        Groups may be new, or known from `fit` or an earlier `adapt`, whose model is replaced; the
        models of other groups stay. A group of a single row or class is adapted like any other.

        Args:
            X: [rows, features].
            y: [rows], labels among `classes_`.
            groups: [rows], each row's group.
            sample_weight: as in `fit`.

        Returns:
            The estimator.

        Raises:
            ValueError: there is a label that `fit` has not seen.
        """
        check_is_fitted(self)
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=self._form.dtype, order="C", reset=False)
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"y: {unknown[:5].tolist()} are not classes that fit has seen")
        self._adapt(X, y, labels_of(groups, X), sample_weight)
        return self

    def decision_function(self, X: Any, groups: Any = None) -> Array:
        """The logits: [rows] of the second of two classes, or [rows, C].

        Args:
            X: [rows, features].
            groups: [rows], each row's group; None where all rows are for the shared start.
        """
        raw = self._raw(X, groups)
        if raw.shape[1] == 2:  # of each class, where others have their difference
            return raw[:, 1] - raw[:, 0]
        return raw[:, 0] if raw.shape[1] == 1 else raw

    def predict_proba(self, X: Any, groups: Any = None) -> Array:
        """The probabilities of the classes, [rows, C], in the order of `classes_`.

        Args:
            X: [rows, features].
            groups: [rows], each row's group; None where all rows are for the shared start.
        """
        raw = self._raw(X, groups)
        if raw.shape[1] == 1:
            raw = np.concatenate([np.zeros_like(raw), raw], axis=1)
        return softmax(raw)

    def predict(self, X: Any, groups: Any = None) -> Array:
        """The most probable class of each row.

        Args:
            X: [rows, features].
            groups: [rows], each row's group; None where all rows are for the shared start.
        """
        raw = self._raw(X, groups)
        index = raw[:, 0] > 0 if raw.shape[1] == 1 else raw.argmax(axis=1)
        return self.classes_[index.astype(np.intp)]

    def score(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> float:
        """The accuracy of `predict(X, groups)`."""
        return float(accuracy_score(y, self.predict(X, groups), sample_weight=sample_weight))

    def _loss_name(self) -> str:
        return "bce_with_logits" if self._one_logit else "cross_entropy"

    def _outputs(self) -> int:
        return 1 if self._one_logit else len(self.classes_)

    def _target(self, y: Array, dtype: Any) -> Array:
        codes = np.searchsorted(self.classes_, y)
        return codes.astype(dtype if self._one_logit else np.int64)

    def _row_weights(self, X: Array, y: Array, sample_weight: Any) -> Array | None:
        weights = super()._row_weights(X, y, sample_weight)
        if self._class_weights is None:
            return weights
        of_class: Array = self._class_weights[np.searchsorted(self.classes_, y)]
        return of_class if weights is None else weights * of_class


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
    wrong = y < 0 if weights is None else (y < 0) & (weights > 0)
    if loss.targets == "amounts" and wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"y: row {at}: expected numbers of at least 0 for {loss.kind}, got {float(y[at])}"
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

    def fit(self, X: Any, y: Any, groups: Any = None, sample_weight: Any = None) -> MetaRegressor:
        """Learn the shared start.

        Args:
            X: [rows, features], numbers without NaN or infinities.
            y: [rows], numbers; of at least 0 where the loss has a log link.
            groups: [rows], each row's group: numbers or strings. None for one group of all rows.
            sample_weight: [rows], weights of the rows' losses, >= 0. A row of weight 0 is as
                good as absent.

        Returns:
            The estimator, without adapted groups (unless `adapt_on_fit`).
        """
        self._check_parameters()
        loss = _regression_loss(self.loss)
        X, y = validate_data(self, X, y, dtype=self.dtype, order="C", y_numeric=True)
        y = y.astype(np.float64)
        weights = self._row_weights(X, y, sample_weight)
        weights = np.ones(len(y)) if weights is None or not weights.any() else weights
        mean = float(np.average(y, weights=weights))
        _check_amounts(y, weights, loss)
        if loss.targets == "amounts":
            self.y_mean_, scale = 0.0, mean
        else:
            self.y_mean_ = mean
            scale = math.sqrt(np.average((y - mean) ** 2, weights=weights))
        self.y_scale_ = scale if scale > 0 else 1.0
        self._fit(X, y, groups, sample_weight)
        return self

    def adapt(self, X: Any, y: Any, groups: Any, sample_weight: Any = None) -> MetaRegressor:
        """Fine-tune the shared start to each group; all groups in one call.

        Groups may be new, or known from `fit` or an earlier `adapt`, whose model is replaced; the
        models of other groups stay.

        Args:
            X: [rows, features].
            y: [rows].
            groups: [rows], each row's group.
            sample_weight: as in `fit`.

        Returns:
            The estimator.
        """
        check_is_fitted(self)
        self._check_parameters()
        X, y = validate_data(
            self, X, y, dtype=self._form.dtype, order="C", y_numeric=True, reset=False
        )
        _check_amounts(y, self._row_weights(X, y, sample_weight), self._loss)
        self._adapt(X, y, labels_of(groups, X), sample_weight)
        return self

    def predict(self, X: Any, groups: Any = None) -> Array:
        """The prediction for each row, [rows]; [rows, levels] for a quantile loss of several.

        For a likelihood it is the location, for a log link the rate or variance itself.

        Args:
            X: [rows, features].
            groups: [rows], each row's group; None where all rows are for the shared start.
        """
        raw, loss = self._raw(X, groups), self._loss
        if loss.targets == "amounts":
            return np.exp(raw[:, 0]) * self.y_scale_
        several = len(loss.levels) > 1
        return (raw if several else raw[:, 0]) * self.y_scale_ + self.y_mean_

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
            return np.sqrt(self._raw(X, groups, variances=True)[:, 0]) * self.y_scale_
        if self._loss.kind not in ("gaussian_nll", "student_t_nll"):
            raise AttributeError(
                f"predict_scale: expected the loss gaussian_nll or student_t_nll, or "
                f"method='bayesian', got {self._loss.kind}"
            )
        return np.exp(self._raw(X, groups)[:, 1]) * self.y_scale_

    def score(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> float:
        """The R^2 of `predict(X, groups)`.

        Of several quantiles it is the mean of their D^2, which compares the pinball loss with that
        of the empirical quantile.
        """
        predicted = self.predict(X, groups)
        if predicted.ndim == 1:
            return float(r2_score(y, predicted, sample_weight=sample_weight))
        levels = zip(self._loss.levels, predicted.T, strict=True)
        each = [
            d2_pinball_score(y, p, alpha=level, sample_weight=sample_weight) for level, p in levels
        ]
        return float(np.mean(each))

    @property
    def _loss(self) -> Loss:
        """That of the fitted networks."""
        return describe_loss(self._form.loss)

    def _loss_name(self) -> Any:
        return self.loss

    def _outputs(self) -> int:
        return describe_loss(self.loss).outputs_per_target

    def _target(self, y: Array, dtype: Any) -> Array:
        return ((y.astype(np.float64) - self.y_mean_) / self.y_scale_).astype(dtype)
