"""What the classifier and the regressor do alike: learn a start, adapt it to groups, predict."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from pymeta.sklearn.episodes import Draw, Rows
from pymeta.sklearn.methods import METHODS, Method
from pymeta.sklearn.network import Form
from pymeta.sklearn.parameters import Parameters, one_of
from pymeta.sklearn.starts import HeadStart, LearnerStart, Models, NetworkStart, Start
from pymeta.sklearn.training import meta_train, pooled
from pymeta.spec.losses import describe_loss
from pymeta.tasks.groups import Array, labels_of, members_of

_COPIED = 256  # models at a time


def _seed(rng: Any) -> int:
    return int(rng.randint(np.iinfo(np.int32).max))


@dataclass(kw_only=True, eq=False, repr=False)
class MetaEstimator(Parameters):
    """What the classifier and the regressor share; see `MetaClassifier` for the parameters."""

    # ---- what the subclasses know ----------------------------------------------------------------

    def _loss_name(self) -> Any:
        raise NotImplementedError

    def _outputs(self) -> int:
        """The width of the output."""
        raise NotImplementedError

    def _target(self, y: Array, dtype: Any) -> Array:
        """Y ready for the loss."""
        raise NotImplementedError

    # ---- checks ---------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        one_of("method", self.method, METHODS)
        super()._check_parameters()

    def _method(self) -> Method:
        """What `method` names; ValueError where it does not take the loss."""
        method = METHODS[self.method]
        kind = describe_loss(self._loss_name()).kind
        if method.kinds is not None and kind not in method.kinds:
            raise ValueError(
                f"method: {self.method!r} takes the loss {' or '.join(method.kinds)}, got {kind}"
            )
        return method

    def _rows(self, X: Array, y: Array, sample_weight: Any) -> tuple[Rows, Array]:
        """The rows to train on, and which of X's they are: rows of weight 0 are left out."""
        weights = self._row_weights(X, y, sample_weight)
        kept = np.arange(len(X)) if weights is None else np.flatnonzero(weights > 0)
        target = self._target(y, X.dtype)
        if weights is None:
            return Rows(X, target, None), kept
        return Rows(X[kept], target[kept], weights[kept].astype(X.dtype)), kept

    def _row_weights(self, X: Array, y: Array, sample_weight: Any) -> Array | None:
        """The rows' weights as they enter the loss, float64 [rows]; None for all ones."""
        if sample_weight is None:
            return None
        weights: Array = column_or_1d(sample_weight, dtype=np.float64)
        check_consistent_length(X, weights)
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError("sample_weight: expected finite weights >= 0")
        return weights

    # ---- fit ------------------------------------------------------------------------------------

    def _fit(self, X: Array, y: Array, groups: Any, sample_weight: Any) -> None:
        """Learn the shared start; y is as `_target` takes it."""
        rng = check_random_state(self.random_state)
        labels = None if groups is None else labels_of(groups, X)
        rows, kept = self._rows(X, y, sample_weight)
        if len(kept) == 0:
            raise ValueError("sample_weight: all weights are zero, there is nothing to learn from")
        members = [] if labels is None else members_of(labels[kept])[1]
        widths = (X.shape[1], *(int(w) for w in self.hidden), self._outputs())
        method = self._method()
        self._form = Form(
            widths, self.activation, self.dtype, self._loss_name(), bool(self.head_only)
        )
        self._start, curve = self._learned(method, rows, members, rng)
        self.loss_curve_, self.n_iter_ = curve, len(curve)
        self._seed = _seed(rng)
        self._begin()
        if labels is not None and self.adapt_on_fit:
            self._adapt(X, y, labels, sample_weight)

    def _learned(
        self, method: Method, rows: Rows, members: list[Array], rng: Any
    ) -> tuple[Start, list[float]]:
        """What groups begin from, and the losses on the way there."""
        network = self._form.network(self._form.initial(rng))
        meta = method.losses is not None and len(members) > 1
        epochs = self.pretrain_epochs if meta else self.epochs
        curve = pooled(self, self._form, network, rows, epochs, _seed(rng)) if epochs else []
        learned = self._learner(method, network, _seed(rng) if method.is_random else 0)
        learned = learned.to(next(network.parameters()).dtype)
        if meta:
            assert method.losses is not None
            draw = Draw(self, rows, members, rng)
            curve = meta_train(
                self, learned, method.losses(self, self._form, learned, draw, _seed(rng))
            )
        start = {n: p.detach().numpy().copy() for n, p in learned.named_parameters()}
        if not all(np.isfinite(p).all() for p in start.values()):
            raise ValueError(
                f"meta_lr, inner_lr: training diverged with {self.meta_lr} and {self.inner_lr}"
            )
        if method.own is not None:
            return LearnerStart(self._form, learned), curve
        if method.head is None:
            return NetworkStart(self._form, start), curve
        all_rows = np.arange(len(rows.x) if method.by_class else 0)
        return HeadStart(learned.requires_grad_(False), *rows.lists([all_rows])), curve

    def _learner(self, method: Method, network: Any, seed: int) -> Any:
        """What a method trains: the network, or a learner on it."""
        if method.head is None and method.own is None:
            return network
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if method.own is not None:
                return method.own(self, self._form, network)
            assert method.head is not None
            return method.head(self._form, network)

    # ---- adapt ----------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Begin without groups: model 0 is the shared one."""
        self.models_: Models = self._start.shared()
        self._places: dict[Any, int] = {}
        self._seen: set[Any] = set()
        self._warned = False
        self.adapted_groups_ = np.empty(0, dtype=object)

    def _adapt(self, X: Array, y: Array, labels: Array, sample_weight: Any) -> None:
        """Fine-tune the start to the rows of every label, all in one call, and keep the models."""
        rows, kept = self._rows(X, y, sample_weight)
        names, members = members_of(labels)
        # Where rows were left out, the others move up; a group without any makes no step.
        place = np.full(len(X), -1)
        place[kept] = np.arange(len(kept))
        xs, ys, ws = rows.lists([place[m][place[m] >= 0] for m in members])
        models, fine = self._start.adapt(self, xs, ys, ws, self._seed)
        if not fine.all():
            lost = names[~fine].tolist()
            warnings.warn(
                f"adapt_lr: adaptation diverged for {len(lost)} of {len(names)} groups, which "
                f"keep the shared start: {', '.join(map(repr, lost[:5]))}",
                ConvergenceWarning,
                stacklevel=3,
            )
        self._keep(set(names.tolist()), names[fine].tolist(), models[fine])

    def _keep(self, seen: set[Any], adapted: list[Any], own: Models) -> None:
        """Put the adapted groups' own models in the place of what the groups seen had."""
        self._seen |= seen
        others = [label for label in self._places if label not in seen]
        kept = self.models_[[0, *(self._places[label] for label in others)]]
        self.models_ = type(own).concatenate([kept, own])  # type: ignore[list-item]
        self._places = {label: i for i, label in enumerate(others + adapted, start=1)}
        self.adapted_groups_ = np.array([*self._places, None], dtype=object)[:-1]

    # ---- predict --------------------------------------------------------------------------------

    def _raw(self, X: Any, groups: Any, variances: bool = False) -> Array:
        """The models' outputs [rows, out], every row's by that of its group; or their variances."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=self._form.dtype, order="C", reset=False)
        labels = [] if groups is None else labels_of(groups, X).tolist()
        self._name_strangers(labels)
        places = np.array([self._places.get(label, 0) for label in labels] or [0] * len(X))
        order = np.argsort(places, kind="stable")
        used, counts = np.unique(places, return_counts=True)
        xs = np.split(X[order], np.cumsum(counts)[:-1])
        kind: Any = type(self.models_)
        outputs = kind.variances if variances else kind.__call__
        raw = np.empty((len(X), self._form.widths[-1]))
        raw[order] = np.concatenate(_outputs_of(self.models_, used, xs, outputs))
        return raw

    def _name_strangers(self, labels: list[Any]) -> None:
        """Warn, once, where groups are asked for that `adapt` was never given."""
        if self._warned or not labels:
            return
        strangers = sorted({label for label in labels if label not in self._seen}, key=repr)
        if strangers:
            self._warned = True
            shown = ", ".join(map(repr, strangers[:5]))
            warnings.warn(
                f"groups: {len(strangers)} were never adapted to and get the shared start: "
                f"{shown}{', ...' if len(strangers) > 5 else ''} (this is said once)",
                UserWarning,
                stacklevel=4,
            )


def _outputs_of(models: Any, used: Array, xs: list[Array], outputs: Any) -> list[Array]:
    """What `outputs` says of the `used` models, in order, each on its own rows.

    Models that lie one after another are used where they lie; others are copied, but only
    some at a time.
    """
    if used[-1] - used[0] + 1 == len(used):
        found: list[Array] = outputs(models[int(used[0]) : int(used[-1]) + 1], xs)
        return found
    if len(used) <= _COPIED:
        found = outputs(models[used], xs)
        return found
    chunks = range(0, len(used), _COPIED)
    parts = [slice(first, first + _COPIED) for first in chunks]
    return [o for part in parts for o in _outputs_of(models, used[part], xs[part], outputs)]
