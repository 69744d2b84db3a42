"""The classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from pymeta.models.arrays import softmax
from pymeta.sklearn.base import MetaEstimator
from pymeta.sklearn.methods import METHODS
from pymeta.sklearn.offsets import log_odds
from pymeta.tasks.groups import Array


@dataclass(kw_only=True, eq=False, repr=False)
class MetaClassifier(ClassifierMixin, MetaEstimator):
    """One small neural classifier for each group, all from one meta-learned start.

    `fit` learns what groups share, `adapt` makes a model for each group, and the predicting methods
    take the `groups` of their rows: rows of an adapted group are given to its model, all others
    (and all rows, where no groups are given) to the shared one.

    As it comes, it does no harm: on some groups held out, `fit` tries how far their models may go
    from what is shared, and goes nowhere if their later rows are not better off; a group whose own
    rows speak against its model keeps the shared one (`anchor_rows`, `gate`). Where there is a good
    pooled model, give it as `base`: what is learned is then its remainder.

    Two classes have one logit and the binary cross-entropy, more have the softmax.

    Read more in `pymeta.sklearn`, the module, which shows the use in a Pipeline.

    Args:
        method: how `fit` learns what groups share. "maml": such that a few steps on a group's
            support rows do well on its query rows (Finn et al. 2017). "encoded": likewise, of steps
            of the last layer alone, on features by the others (`pymeta.learners.EncodedMAML`).
            "implicit": such that the minimum that a pull to the start (`anchor`, or 2) leaves does
            well, however it is reached (`pymeta.Implicit`; `inner_steps` have to come near it).
            "reptile": moved towards what the groups are adapted to (Nichol et al. 2018). "pooled":
            ordinary training on all rows, as is also done where there are fewer than two groups to
            learn from. These fine-tune the network. "auto" chooses among a linear pooled model, a
            network trained on what that leaves (with early stopping), and MAML from there. "ridge"
            and "bayesian" learn features by the hidden layers and a prior of the last layer, which
            is then exact for each group (`pymeta.learners.RidgeHead`, `BayesianHead`, for the loss
            "mse" alone; with hidden=() it is empirical Bayes), and "protonet", "matching" and
            "relation" compare rows with those of each class (`ProtoNet`, `MatchingNet`,
            `RelationNet`); `inner_*`, `adapt_*` and `anchor*` do not concern them. "relational" has
            a start for each group, by its relations to learned prototypes, and "meta_lstm" a
            learned optimiser (`RelationalMAML`, `MetaLSTM`); both adapt as they were trained, by
            `inner_steps` and `inner_lr`. "meta_lstm" takes an LSTM's step for every weight of every
            group, many times what "maml" takes: try fewer `iterations` and a smaller `hidden`
            first, and watch it (`verbose`, `callback`).
        base: a pooled model, an estimator of scikit-learn that is not fitted; None for none. `fit`
            fits a clone, whose predictions are an offset of the networks' outputs: they learn its
            remainder, which begins at zero. Offsets of the rows of `fit` come from clones that have
            not seen the row's group. "auto": with method="auto" and groups enough to choose by (6
            of 4 rows), ridge or logistic regression (for a log link Poisson regression), whose
            penalty is chosen over groups; otherwise none.
        hidden: widths of the hidden layers; () for a linear model.
        activation: "relu", "tanh", "elu", "gelu" or "silu".
        inner_optimizer: what takes the steps on a group, here and in `adapt`: "sgd", "momentum"
            (SGD with momentum 0.9), "adam" or "rmsprop".
        inner_lr: its step size. "auto": for SGD one over the largest curvature of support sets of
            some groups (`pymeta.step_size`), 0.01 for the others.
        learn_lr: let MAML learn a step size for each layer, from `inner_lr` on (Li et al. 2017);
            `adapt` uses them.
        clip_norm: gradients of the inner steps are scaled to at most this norm; None for any.
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
        adapt_lr: step size in `adapt`; None for `inner_lr`, or what was learned.
        adapt_epochs: passes over a group's rows in `adapt`; None for `inner_steps`.
        anchor: strength of the pull back to the start (L2-SP), in `adapt` and in the inner steps
            of `fit`.
        anchor_rows: in its place: the start is worth so many rows, the strength is this over the
            rows of the group; None for `anchor`. A `pymeta.LearnableAnchor`: MAML learns how many
            (`anchor_rows_`), for method="maml". "auto": how many, and for how many epochs, is
            chosen on the later rows of groups held out from training for that, see
            `pymeta/sklearn/choosing.py`; which may come to adapting none.
        gate: whether `adapt` tries a model on a third of its group's rows (the last, or random
            ones), and the group keeps the shared one if it would not gain (see
            `pymeta/sklearn/gate.py`); of groups of 6 rows and more.
        unknown: what becomes of groups that `adapt` was never given: "start", the shared model;
            "warn", likewise, and a warning says so once; or "error".
        on_divergence: what becomes of groups whose loss on their own rows is greater after `adapt`
            than before: "start", they keep the shared model, with a warning; "keep"; or "raise",
            an ArithmeticError.
        clip_inputs: whether features are kept within the range of those that `fit` saw.
        adapt_validation: fraction of each group's rows that `adapt` holds out, to keep the best
            epoch's weights; with shuffle=False the last ones.
        adapt_patience: stop a group after so many epochs without improvement on those rows.
        adapt_on_fit: let `fit` end with `adapt` on its own rows and groups.
        class_weight: as in scikit-learn: None, "balanced" (by the rows given to `fit`), or
            {class: weight}; they hold in `adapt` too.
        dtype: "float32" or "float64", in which everything is computed.
        random_state: the same integer gives the same bits, for any number of threads.
        verbose: whether to print how training goes.
        callback: called in `fit` as callback(stage, iteration, loss) after each meta-batch (stage
            is the method's name), and when pooled training, which is one call, has ended, for
            each of its epochs (stage "pooled"); an exception that it raises ends `fit`.

    Attributes:
        classes_: [C], the class labels.
        adapted_groups_: labels of the groups that have a model.
        gated_groups_: labels of those that the gate kept from having one.
        choice_: what was chosen on the groups held out, and all that was compared; None where
            nothing was.
        base_: the fitted pooled model, if there is one.
        anchor_rows_: how many rows the start has learned to be worth; of a `LearnableAnchor`.
        models_: the models as a `pymeta.AdaptedArrays`: the shared one, then theirs in order.
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

    def fit(
        self,
        X: Any,
        y: Any,
        groups: Any = None,
        sample_weight: Any = None,
        *,
        offset: Any = None,
        times: Any = None,
    ) -> MetaClassifier:
        """Learn what groups share, and how far they may go from it.

        Args:
            X: [rows, features], numbers without NaN or infinities.
            y: [rows], class labels.
            groups: [rows], each row's group: numbers or strings. None for one group of all rows.
            sample_weight: [rows], weights of the rows' losses, >= 0. A row of weight 0 is as
                good as absent.
            offset: a pooled model's predictions, in place of `base`: logits [rows] of the second of
                two classes, or [rows, C]. What is learned is then the remainder, and all later
                calls need offsets as well.
            times: [rows], numbers or dates. Given, rows are used in their order, as with
                shuffle=False: support and what is adapted to come first.

        Returns:
            The estimator, without adapted groups (unless `adapt_on_fit`).
        """
        return self._fit_classes(X, y, groups, sample_weight, offset, times, None)

    def _fit_classes(
        self,
        X: Any,
        y: Any,
        groups: Any,
        sample_weight: Any,
        offset: Any,
        times: Any,
        classes: Any,
    ) -> MetaClassifier:
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=self.dtype, order="C")
        check_classification_targets(y)
        self.classes_ = np.unique(y if classes is None else classes)
        self._check_labels(y)
        if len(self.classes_) < 2:
            raise ValueError(f"y: expected two classes or more, got one class, {self.classes_[0]}")
        # Set here, for what `method` is set to later holds for the next fit.
        by_class = self.method in METHODS and METHODS[self.method].by_class
        self._one_logit = len(self.classes_) == 2 and not by_class
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
        self._fit(X, y, groups, sample_weight, offset, times)
        return self

    def _check_labels(self, y: Array) -> None:
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"y: {unknown[:5].tolist()} are not classes that fit has seen")

    def adapt(
        self,
        X: Any,
        y: Any,
        groups: Any,
        sample_weight: Any = None,
        *,
        offset: Any = None,
        times: Any = None,
    ) -> MetaClassifier:
        """Fine-tune the shared start to each group; all groups in one call.

        Groups may be new, or known from `fit` or an earlier `adapt`, whose model is replaced; the
        models of other groups stay. A group of a single row or class is adapted like any other.

        Args:
            X: [rows, features].
            y: [rows], labels among `classes_`.
            groups: [rows], each row's group.
            sample_weight: as in `fit`.
            offset: as in `fit`.
            times: as in `fit`.

        Returns:
            The estimator.

        Raises:
            ValueError: there is a label that `fit` has not seen.
        """
        return self._adapted(X, y, groups, sample_weight, offset, times, goes_on=False)

    def partial_fit(
        self,
        X: Any,
        y: Any,
        groups: Any = None,
        sample_weight: Any = None,
        *,
        classes: Any = None,
        offset: Any = None,
        times: Any = None,
    ) -> MetaClassifier:
        """Adapt on: groups go on from their own models with these rows alone.

        A group without a model begins with the start; the pull back (`anchor`) is to where it went
        on from, and so does the gate compare. Without groups, it is the shared model that learns
        on. An estimator that is not fitted is fitted first. Methods with heads need all of a
        group's rows and refuse.

        Args:
            X: [rows, features].
            y: [rows], labels among `classes_`.
            groups: [rows], each row's group, or None.
            sample_weight: as in `fit`.
            classes: all labels, where the first call does not have them.
            offset: as in `fit`.
            times: as in `fit`.

        Returns:
            The estimator.
        """
        if not hasattr(self, "models_"):
            self._fit_classes(X, y, groups, sample_weight, offset, times, classes)
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
    ) -> MetaClassifier:
        check_is_fitted(self)
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=self._form.dtype, order="C", reset=False)
        self._check_labels(y)
        self._adapt_rows(X, y, groups, sample_weight, offset, times, goes_on)
        return self

    def decision_function(self, X: Any, groups: Any = None, *, offset: Any = None) -> Array:
        """The logits: [rows] of the second of two classes, or [rows, C].

        Args:
            X: [rows, features].
            groups: [rows], each row's group; None where all rows are for the shared start.
            offset: as in `fit`.
        """
        raw = self._raw(X, groups, offset)
        if raw.shape[1] == 2:  # of each class, where others have their difference
            return raw[:, 1] - raw[:, 0]
        return raw[:, 0] if raw.shape[1] == 1 else raw

    def predict_proba(self, X: Any, groups: Any = None, *, offset: Any = None) -> Array:
        """The probabilities of the classes, [rows, C], in the order of `classes_`.

        Args:
            X: [rows, features].
            groups: [rows], each row's group; None where all rows are for the shared start.
            offset: as in `fit`.
        """
        raw = self._raw(X, groups, offset)
        if raw.shape[1] == 1:
            raw = np.concatenate([np.zeros_like(raw), raw], axis=1)
        return softmax(raw)

    def predict(self, X: Any, groups: Any = None, *, offset: Any = None) -> Array:
        """The most probable class of each row.

        Args:
            X: [rows, features].
            groups: [rows], each row's group; None where all rows are for the shared start.
            offset: as in `fit`.
        """
        raw = self._raw(X, groups, offset)
        index = raw[:, 0] > 0 if raw.shape[1] == 1 else raw.argmax(axis=1)
        return self.classes_[index.astype(np.intp)]

    def score(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        groups: Any = None,
        *,
        offset: Any = None,
    ) -> float:
        """The accuracy of `predict(X, groups)`."""
        predicted = self.predict(X, groups, offset=offset)
        return float(accuracy_score(y, predicted, sample_weight=sample_weight))

    def _loss_name(self) -> str:
        return "bce_with_logits" if self._one_logit else "cross_entropy"

    def _outputs(self) -> int:
        return 1 if self._one_logit else len(self.classes_)

    def _target(self, y: Array, dtype: Any) -> Array:
        codes = np.searchsorted(self.classes_, y)
        return codes.astype(dtype if self._one_logit else np.int64)

    def _offset_of(self, offset: Array) -> Array:
        found = offset[:, None] if offset.ndim == 1 else offset
        if found.shape[1] == 1 and not self._one_logit and len(self.classes_) == 2:
            found = np.concatenate([np.zeros_like(found), found], axis=1)
        if found.shape[1] != self._outputs():
            raise ValueError(
                f"offset: expected {self._outputs()} for each row, got {found.shape[1]}"
            )
        return found

    def _base_kind(self) -> str:
        return "classes"

    def _of_base(self, model: Any, X: Array) -> Array:
        return log_odds(model, X, self.classes_, len(self.classes_) == 2)

    def _row_weights(self, X: Array, y: Array, sample_weight: Any) -> Array | None:
        weights = super()._row_weights(X, y, sample_weight)
        if self._class_weights is None:
            return weights
        of_class: Array = self._class_weights[np.searchsorted(self.classes_, y)]
        return of_class if weights is None else weights * of_class
