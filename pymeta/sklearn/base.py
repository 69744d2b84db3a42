"""What the classifier and the regressor do alike: learn a start, adapt it to groups, predict."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
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

from pymeta.sklearn.choosing import Judge, choose, outputs_of
from pymeta.sklearn.episodes import Draw, Rows, cut_of, in_order, sample
from pymeta.sklearn.gate import gains, keeps
from pymeta.sklearn.methods import METHODS, Method
from pymeta.sklearn.network import Form, parameters_of, start_lr
from pymeta.sklearn.parameters import one_of
from pymeta.sklearn.starts import HeadStart, How, LearnerStart, Models, NetworkStart, Start
from pymeta.sklearn.training import meta_train, pooled
from pymeta.sklearn.with_base import WithBase
from pymeta.spec.anchors import LearnableAnchor
from pymeta.spec.losses import describe_loss
from pymeta.tasks.groups import Array, labels_of, members_of

_LEAST_GATED = 6  # rows of a group, for the gate to ask a third of them
_COPIED = 256  # models at a time


def _seed(rng: Any) -> int:
    return int(rng.randint(np.iinfo(np.int32).max))


@dataclass(kw_only=True, eq=False, repr=False)
class MetaEstimator(WithBase):
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

    def _scale_targets(self, y: Array, offset: Array | None, weights: Array | None) -> None:
        """Learn what targets are scaled by, if they are; of rows that count."""

    # ---- checks ---------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        one_of("method", self.method, ("auto", *METHODS))
        super()._check_parameters()

    def _checked_method(self, name: str) -> Method:
        """What a method's name means; ValueError where it does not take the loss."""
        method = METHODS[name]
        kind = describe_loss(self._loss_name()).kind
        if method.kinds is not None and kind not in method.kinds:
            raise ValueError(
                f"method: {name!r} takes the loss {' or '.join(method.kinds)}, got {kind}"
            )
        return method

    def _row_weights(self, X: Array, y: Array, sample_weight: Any) -> Array | None:
        """The rows' weights as they enter the loss, float64 [rows]; None for all ones."""
        if sample_weight is None:
            return None
        weights: Array = column_or_1d(sample_weight, dtype=np.float64)
        check_consistent_length(X, weights)
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError("sample_weight: expected finite weights >= 0")
        return weights

    def _rows(
        self, X: Array, y: Array, sample_weight: Any, offset: Array | None
    ) -> tuple[Rows, Array]:
        """The rows to train on, and which of X's they are: rows of weight 0 are left out."""
        weights = self._row_weights(X, y, sample_weight)
        kept = np.arange(len(X)) if weights is None else np.flatnonzero(weights > 0)
        dtype = X.dtype
        weights = None if weights is None else weights.astype(dtype)
        offset = None if offset is None else offset.astype(dtype)
        rows = Rows(self._inputs(X), self._target(y, dtype), weights, offset)
        return rows if len(kept) == len(X) else rows.at(kept), kept

    # ---- fit ------------------------------------------------------------------------------------

    def _fit(
        self, X: Array, y: Array, groups: Any, sample_weight: Any, offset: Any, times: Any
    ) -> None:
        """Learn what groups share; y is as `_target` takes it."""
        rng = check_random_state(self.random_state)
        labels = self._labels(X, groups)
        X, y, labels, sample_weight, offset = in_order(times, X, y, labels, sample_weight, offset)
        weights = self._row_weights(X, y, sample_weight)
        counted = np.arange(len(X)) if weights is None else np.flatnonzero(weights > 0)
        if len(counted) == 0:
            raise ValueError("sample_weight: all weights are zero, there is nothing to learn from")
        self._ordered = times is not None or not self.shuffle
        self._range = None
        if self.clip_inputs:
            self._range = (X[counted].min(axis=0), X[counted].max(axis=0))
        raw = self._fitted_base(X, y, labels, weights, counted, offset)
        of_counted = None if weights is None else weights[counted]
        self._scale_targets(y[counted], None if raw is None else raw[counted], of_counted)
        self._form = self._made_form(X.shape[1], raw is not None)
        offsets = None if raw is None else self._offset_of(raw)
        rows, kept = self._rows(X, y, sample_weight, offsets)
        members = [] if labels is None else members_of(labels[kept])[1]
        cut = cut_of(times)
        self._learn(rows, members, rng, None if cut is None else int(np.searchsorted(kept, cut)))
        self._begin()
        if labels is not None and self.adapt_on_fit:
            self._adapt(X, y, labels, sample_weight, offsets)

    def _labels(self, X: Array, groups: Any) -> Array | None:
        if groups is not None:
            return labels_of(groups, X)
        if self.method != "pooled":
            warnings.warn(
                f"groups: got none, so that method={self.method!r} learns from all rows as one; "
                f"give fit the groups (in a search or cross-validation, by metadata routing: "
                f"set_fit_request(groups=True)), or use method='pooled'",
                UserWarning,
                stacklevel=4,
            )
        return None

    def _made_form(self, features: int, is_remainder: bool) -> Form:
        """What the networks are; of a remainder the last layer begins with zeros."""
        widths = (features, *(int(w) for w in self.hidden), self._outputs())
        methods = [self._checked_method(n) for n in self._names(is_remainder) if n != "zero"]
        loss = self._loss_name()
        head_only = bool(self.head_only) or any(method.head_only for method in methods)
        return Form(widths, self.activation, self.dtype, loss, head_only, is_remainder)

    def _names(self, is_remainder: bool) -> tuple[str, ...]:
        """The names of the starts to choose among: the safest first, the one asked for last."""
        method = "maml" if self.method == "auto" else self.method
        if self._base_is_linear:
            return "zero", "pooled", method
        if is_remainder and METHODS[method].tunes:
            return "zero", method
        return ("pooled", method) if self.method == "auto" else (method,)

    def _learn(self, rows: Rows, members: list[Array], rng: Any, cut: int | None) -> None:
        """Learn the starts that are needed, and how groups adapt."""
        names = self._names(self._form.is_remainder)
        if len(members) < 2:
            names = names[:1] if self.method == "auto" else names[-1:]
        self.choice_ = None
        if (self.chooses_strength or self.method == "auto") and len(members) > 1:

            def learn(some: list[Array]) -> dict[str, Start]:
                index = np.sort(np.concatenate(some))  # rows stay in their order
                own = [np.searchsorted(index, m) for m in some]
                return self._learned(names, rows.at(index), own, rng)[0]

            adapted = [name for name in names if name != "zero"]
            loss = describe_loss(self._form.loss)
            seed = _seed(rng)
            self.choice_ = choose(self, loss, rows, members, learn, adapted, rng, seed, cut)
        rest, chosen = names[0], names[-1]
        if self.choice_ is not None:
            rest, chosen = self.choice_.rest, self.choice_.way.start
            names = tuple(dict.fromkeys((rest, chosen)))
        starts, curves = self._learned(names, rows, members, rng)
        self._rest, self._start = starts[rest], starts[chosen]
        if isinstance(self.anchor_rows, LearnableAnchor):
            self.anchor_rows_ = self._start.how(self).anchor_rows
        self.loss_curve_ = curves[chosen]
        self.n_iter_ = len(self.loss_curve_)
        self._seed = _seed(rng)

    def _learned(
        self, names: tuple[str, ...], rows: Rows, members: list[Array], rng: Any
    ) -> tuple[dict[str, Start], dict[str, list[float]]]:
        """The starts of these names, and the losses on the way to each."""
        form, initial = self._form, self._form.initial(rng)
        starts: dict[str, Start] = {}
        curves: dict[str, list[float]] = {}
        pretrained: dict[str, Array] | None = None

        def lr_of(network: Any) -> float:
            return start_lr(self, form, network, sample(self, rows, members))

        pretrains = self._base_is_linear or not form.is_remainder
        if self.method == "auto" and pretrains and len(members) > 1 and names != ("zero",):
            network = form.network(initial)
            curves["pooled"] = pooled(self, form, network, rows, self.epochs, _seed(rng), True)
            pretrained = parameters_of(network)
        for name in names:
            if name == "zero":
                starts[name], curves[name] = (
                    NetworkStart(form, initial, lr_of(form.network(initial))),
                    [0.0],
                )
            elif name == "pooled" and pretrained is not None:
                starts[name] = NetworkStart(form, pretrained, lr_of(form.network(pretrained)))
            else:
                network = form.network(initial if pretrained is None else pretrained)
                starts[name], curves[name] = self._start_of(
                    name, network, rows, members, rng, pretrained is None
                )
        for start in starts.values():
            if not start.is_finite():
                raise ValueError(
                    f"meta_lr, inner_lr: training diverged with {self.meta_lr} and {self.inner_lr}"
                )
        return starts, curves

    def _start_of(
        self, name: str, network: Any, rows: Rows, members: list[Array], rng: Any, pretrain: bool
    ) -> tuple[Start, list[float]]:
        """What a method learns, beginning with the network, which it changes."""
        method, curve, rates, pulls = METHODS[name], [], None, None
        meta = method.losses is not None and len(members) > 1
        epochs = self.pretrain_epochs if meta else self.epochs
        if epochs and pretrain:
            curve = pooled(self, self._form, network, rows, epochs, _seed(rng))
        form = self._form
        if method.tunes or method.own is not None:
            form = form._replace(lr=start_lr(self, form, network, sample(self, rows, members)))
        learned = self._learner(method, form, network, _seed(rng) if method.is_random else 0)
        learned = learned.to(next(network.parameters()).dtype)
        if meta:
            assert method.losses is not None
            draw = Draw(self, rows, members, rng)
            loss_of_batch = method.losses(self, form, learned, draw, _seed(rng))
            rates = getattr(loss_of_batch, "rates", None)
            pulls = getattr(loss_of_batch, "pulls", None)
            curve = meta_train(self, name, learned, loss_of_batch)
        if method.own is not None:
            return LearnerStart(self._form, learned), curve
        if method.head is None:
            found = None if rates is None else rates.detach().numpy().copy()
            worth = None if pulls is None else pulls.value
            return NetworkStart(self._form, parameters_of(learned), form.lr, found, worth), curve
        all_rows = np.arange(len(rows.x) if method.by_class else 0)
        return HeadStart(learned.requires_grad_(False), rows.lists([all_rows])), curve

    def _learner(self, method: Method, form: Form, network: Any, seed: int) -> Any:
        """What a method trains: the network, or a learner on it."""
        if method.head is None and method.own is None:
            return network
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if method.own is not None:
                return method.own(self, form, network)
            assert method.head is not None
            return method.head(form, network)

    # ---- adapt ----------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Begin without groups: model 0 is the shared one."""
        self.models_: Models = self._rest.shared()
        self._places: dict[Any, int] = {}
        self._seen: set[Any] = set()
        self._said: set[str] = set()
        self.adapted_groups_ = self.gated_groups_ = np.empty(0, dtype=object)

    def _how(self) -> How | None:
        """How groups are adapted: as it was chosen, but for what is set now; None for not."""
        how = self._start.how(self)
        if self.choice_ is None:
            return how
        chosen = self.choice_.way.how
        if chosen is None:
            return None if self.chooses_strength else how
        if self.adapt_epochs is None:
            how = replace(how, epochs=chosen.epochs)
        if not self.chooses_strength:
            return how
        return replace(how, anchor=chosen.anchor, anchor_rows=chosen.anchor_rows)

    def _adapt(
        self,
        X: Array,
        y: Array,
        labels: Array,
        sample_weight: Any,
        offsets: Array | None,
        goes_on: bool = False,
    ) -> None:
        """Fine-tune the start to the rows of every label, all in one call, and keep the models."""
        rows, kept = self._rows(X, y, sample_weight, offsets)
        names, members = members_of(labels)
        how = self._how()
        if how is None:
            self._say_once(
                "unadapted",
                "adapt: for groups held out in fit, models of their own did no better than the "
                "shared one, which all groups keep; anchor_rows=None (or a number) adapts anyway",
            )
            self._seen |= {*names.tolist()}
            self._keep(set() if goes_on else {*names.tolist()}, [], None)
            return
        # Where rows were left out, the others move up; a group without any makes no step.
        place = np.full(len(X), -1)
        place[kept] = np.arange(len(kept))
        members = [place[m][place[m] >= 0] for m in members]
        own = self._own(names) if goes_on else None
        lists = rows.lists(members)
        models, fine = self._start.adapt(self, how, lists, self._seed, own)
        if not fine.all():
            lost = names[~fine].tolist()
            warnings.warn(
                f"adapt_lr: adaptation diverged for {len(lost)} of {len(names)} "
                f"groups, which keep the shared start: {', '.join(map(repr, lost[:5]))}",
                ConvergenceWarning,
                stacklevel=3,
            )
        if self._rest is not self._start:  # without rows, the start would not be the shared model
            fine &= np.array([len(m) > 0 for m in members])
        kept_out = fine & ~self._passes(names, rows, members, how, own)
        fine &= ~kept_out
        self._seen |= {*names.tolist()}
        replaced = names[fine] if goes_on else names  # who goes on falls back to what it had
        self._keep({*replaced.tolist()}, names[fine].tolist(), models[fine])
        out = {*self.gated_groups_.tolist()} - {*names.tolist()} | {*names[kept_out].tolist()}
        self.gated_groups_ = np.array([*sorted(out, key=repr), None], dtype=object)[:-1]

    def _adapt_rows(
        self,
        X: Array,
        y: Array,
        groups: Any,
        sample_weight: Any,
        offset: Any,
        times: Any,
        goes_on: bool,
    ) -> None:
        """As `_adapt`, with what the caller gave."""
        if groups is None and not goes_on:
            raise ValueError("groups: expected a label for each row, got None")
        labels = None if groups is None else labels_of(groups, X)
        offsets = self._offsets(X, offset)
        X, y, labels, weights, offsets = in_order(times, X, y, labels, sample_weight, offsets)
        if labels is None:
            self._go_on(self._rows(X, y, weights, offsets)[0])
        else:
            self._adapt(X, y, labels, weights, offsets, goes_on)

    def _go_on(self, rows: Rows) -> None:
        """Let the shared model learn on; groups keep their own."""
        how = self._how() or self._start.how(self)
        one = rows.lists([np.arange(len(rows.x))])
        self._start = self._rest = self._rest.gone_on(self, how, one, self._seed)
        kind: Any = type(self.models_)
        self.models_ = kind.concatenate([self._rest.shared(), self.models_[1:]])

    def _own(self, names: Array) -> Models:
        """The models that groups have now; those without one begin with the start."""
        kind: Any = type(self.models_)
        both = kind.concatenate([self._start.shared(), self.models_])
        where = [1 + self._places[n] if n in self._places else 0 for n in names.tolist()]
        found: Models = both[where]
        return found

    def _passes(
        self, names: Array, rows: Rows, members: list[Array], how: How, own: Models | None
    ) -> Array:
        """Which groups the gate lets have models of their own, bool [T]."""
        passes = np.ones(len(members), dtype=bool)
        asked = [t for t, m in enumerate(members) if self.gate and len(m) >= _LEAST_GATED]
        if not asked:
            return passes
        early, later = [], []
        for m in (members[t] for t in asked):
            order = np.arange(len(m))
            if self.is_shuffled:  # by the number of rows alone
                order = np.random.RandomState(self._seed).permutation(len(m))
            cut = len(m) - max(len(m) // 3, 1)
            early.append(m[np.sort(order[:cut])])
            later.append(m[np.sort(order[cut:])])
        judge = Judge(describe_loss(self._form.loss), rows, later)
        before = None if own is None else own[asked]
        tried, _ = self._start.adapt(self, how, rows.lists(early), self._seed, before)
        rest = self._rest.shared() if before is None else before
        without, own_losses = (judge.losses(outputs_of(m, rows, later)) for m in (rest, tried))
        found = gains(without, own_losses, judge.codes, len(asked))
        prior = None if self.choice_ is None else self.choice_.prior
        passes[asked] = keeps(found, prior)
        return passes

    def _keep(self, replaced: set[Any], adapted: list[Any], own: Models | None) -> None:
        """Put the adapted groups' own models in the place of what others had before."""
        others = [label for label in self._places if label not in replaced]
        kept = self.models_[[0, *(self._places[label] for label in others)]]
        kind: Any = type(kept)
        self.models_ = kind.concatenate([kept] if own is None else [kept, own])
        self._places = {label: i for i, label in enumerate(others + adapted, start=1)}
        self.adapted_groups_ = np.array([*self._places, None], dtype=object)[:-1]

    def _say_once(self, what: str, message: str) -> None:
        """Warn, the first time since `fit`."""
        if what not in self._said:
            self._said.add(what)
            warnings.warn(message, UserWarning, stacklevel=5)

    # ---- predict --------------------------------------------------------------------------------

    def _raw(self, X: Any, groups: Any, offset: Any = None, variances: bool = False) -> Array:
        """The models' outputs [rows, out], every row's by that of its group; or their variances."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=self._form.dtype, order="C", reset=False)
        x = self._inputs(X)
        labels = [] if groups is None else labels_of(groups, X).tolist()
        self._look_at_strangers(labels)
        places = np.array([self._places.get(label, 0) for label in labels] or [0] * len(X))
        order = np.argsort(places, kind="stable")
        used, counts = np.unique(places, return_counts=True)
        xs = np.split(x[order], np.cumsum(counts)[:-1])
        kind: Any = type(self.models_)
        outputs = kind.variances if variances else kind.__call__
        raw = np.empty((len(X), self._form.widths[-1]))
        raw[order] = np.concatenate(_outputs_of(self.models_, used, xs, outputs))
        if variances:
            return raw
        offsets = self._offsets(X, offset)
        return raw if offsets is None else raw + offsets

    def _look_at_strangers(self, labels: list[Any]) -> None:
        """Warn, once, or raise where groups are asked for that `adapt` was never given."""
        if not labels or self.unknown == "start":
            return
        strangers = sorted({label for label in labels if label not in self._seen}, key=repr)
        if not strangers:
            return
        shown = ", ".join(map(repr, strangers[:5])) + (", ..." if len(strangers) > 5 else "")
        known = next(iter(self._seen), None)
        if known is not None and isinstance(known, str) != isinstance(strangers[0], str):
            raise TypeError(
                f"groups: expected labels of type {type(known).__name__}, as adapt was given "
                f"({known!r}), got {type(strangers[0]).__name__} ({shown})"
            )
        message = f"groups: {len(strangers)} were never adapted to"
        if self.unknown == "error":
            raise ValueError(f"{message}: {shown}; unknown='warn' gives them the shared start")
        self._say_once("strangers", f"{message} and get the shared start: {shown} (said once)")


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
