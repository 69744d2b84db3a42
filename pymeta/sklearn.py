"""scikit-learn estimators for many groups at once: `MetaClassifier` and `MetaRegressor`.

A *group* is a segment with its own few rows: a customer, a merchant, a region, a machine. `fit`
learns one shared start (a small fully connected network) from the groups it is given, `adapt`
fine-tunes that start to each group, known or new, and `predict` uses each group's own model for
the group's rows and the shared start for all other rows. Whatever is done to many groups is done
in one native call.

    model = MetaClassifier(method="maml").fit(X, y, groups=g)     # the shared start
    model.adapt(X_new, y_new, groups=g_new)                       # a model for each group
    model.predict_proba(X_later, groups=g_later)

Preprocessing is scikit-learn's own. `groups` reaches the estimator through the Pipeline:

    pipe = make_pipeline(SimpleImputer(), StandardScaler(), MetaClassifier())
    pipe.fit(X, y, metaclassifier__groups=g)
    pipe[-1].adapt(pipe[:-1].transform(X_new), y_new, groups=g_new)
    pipe.predict_proba(X_later, groups=g_later)

Inputs should be standardised: the networks start as PyTorch's layers do, and the step sizes are
meant for inputs of unit size. torch is imported by `fit` and `adapt`, pandas never.
"""

from __future__ import annotations

import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import check_random_state, compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from pymeta.architecture import Architecture
from pymeta.arrays import AdaptedArrays, softmax
from pymeta.losses import describe_loss

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]
Tensors: TypeAlias = "list[torch.Tensor]"

METHODS = ("maml", "reptile", "pooled")
ACTIVATIONS = {"relu": "ReLU", "tanh": "Tanh", "elu": "ELU", "gelu": "GELU", "silu": "SiLU"}
OPTIMIZERS = ("sgd", "momentum", "adam")


# ---- parameters ---------------------------------------------------------------------------------


def _one_of(name: str, value: Any, among: Iterable[str]) -> None:
    if value not in tuple(among):
        raise ValueError(f"{name}: expected one of {', '.join(among)}, got {value!r}")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def _integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value}")


def _real(name: str, value: Any, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= float(value) < below:
        limit = "finite and >= 0" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{name}: expected a number {limit}, got {value}")


def _check_support(value: Any) -> None:
    """`support` is a number of rows, or a fraction of them."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        _integer("support", value, 1)
        return
    _real("support", value, 1.0)
    if value == 0:
        raise ValueError("support: expected a fraction in (0, 1), or a number of rows, got 0.0")


# ---- rows and groups ----------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Rows ready for training: x [n, features], y [n], weights [n] or None."""

    x: Array
    y: Array
    weights: Array | None

    def take(self, index: Array) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Some of the rows, as tensors of their own memory."""
        import torch

        w = None if self.weights is None else torch.from_numpy(self.weights[index])
        return torch.from_numpy(self.x[index]), torch.from_numpy(self.y[index]), w

    def lists(self, members: Sequence[Array]) -> tuple[Tensors, Tensors, Tensors | None]:
        """One tensor for each set of rows: xs, ys and (where there are any) weights."""
        xs, ys, ws = zip(*map(self.take, members), strict=True)
        return list(xs), list(ys), None if self.weights is None else list(ws)


def _is_missing(label: Any) -> bool:
    try:
        return label is None or bool(label != label)
    except TypeError:  # pandas' NA is neither equal to itself nor not
        return True


def _labels(groups: Any, X: Any) -> Array:
    """`groups` as an array [rows] of labels that can be told apart; missing ones are refused."""
    labels: Array = column_or_1d(groups, dtype=None)
    check_consistent_length(X, labels)
    missing = [g for g in labels.tolist() if _is_missing(g)] if labels.dtype.kind in "fO" else []
    if missing:
        raise ValueError(f"groups: {len(missing)} rows have no group ({missing[0]!r})")
    return labels


def _members(labels: Array) -> tuple[Array, list[Array]]:
    """The distinct labels in order, and for each of them its rows in their order."""
    try:
        names, codes = np.unique(labels, return_inverse=True)
    except TypeError as e:
        raise TypeError(f"groups: expected labels of one kind, {e}") from None
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    return names, np.split(order, ends[:-1])


class _Draw:
    """Draws meta-batches: some groups, of each some rows, split in support and query."""

    def __init__(self, estimator: _MetaEstimator, rows: _Rows, members: list[Array], rng: Any):
        self.rows, self.members, self.rng = rows, members, rng
        self.each = min(estimator.tasks_per_batch, len(members))
        self.limit, self.support = estimator.task_rows, estimator.support
        self.shuffle = estimator.shuffle
        sizes = np.array([len(m) for m in members], dtype=float)
        self.chances = sizes / sizes.sum() if estimator.draw == "rows" else None

    def groups(self) -> list[Array]:
        """The rows of the groups of a meta-batch, in the order in which they are to be used."""
        drawn = []
        for g in self.rng.choice(len(self.members), self.each, replace=False, p=self.chances):
            index = self.members[g]
            keep = len(index) if self.limit is None else min(len(index), self.limit)
            if self.shuffle:
                index = index[self.rng.permutation(len(index))[:keep]]
            elif keep < len(index):
                index = index[np.sort(self.rng.choice(len(index), keep, replace=False))]
            drawn.append(index)
        return drawn

    def _support_rows(self, n: int) -> int:
        """How many of n rows are support; at least one row is left for the query set."""
        rows = self.support
        if not isinstance(rows, numbers.Integral):
            rows = max(round(rows * n), 1)
        return min(int(rows), n - 1)

    def episode(self) -> tuple[list[Array], list[Array]]:
        """The support rows and the query rows of each task of a meta-batch."""
        groups = self.groups()
        ends = [self._support_rows(len(g)) for g in groups]
        support = [g[:end] for g, end in zip(groups, ends, strict=True)]
        return support, [g[end:] for g, end in zip(groups, ends, strict=True)]


# ---- the network and its training ---------------------------------------------------------------


class _Form(NamedTuple):
    """What the networks of a fitted estimator are, whatever its parameters are set to later."""

    widths: tuple[int, ...]  # of the input, the hidden layers and the output
    activation: str
    dtype: str
    loss: str
    head_only: bool

    def initial(self, rng: Any) -> dict[str, Array]:
        """What `torch.nn.Linear` starts with, drawn by `rng`: uniform within 1 / sqrt(inputs)."""
        start = {}
        for i, (n_in, n_out) in enumerate(itertools.pairwise(self.widths)):
            bound = 1 / math.sqrt(n_in)
            start[f"{2 * i}.weight"] = rng.uniform(-bound, bound, (n_out, n_in)).astype(self.dtype)
            start[f"{2 * i}.bias"] = rng.uniform(-bound, bound, n_out).astype(self.dtype)
        return start

    def network(self, parameters: dict[str, Array]) -> torch.nn.Sequential:
        """The torch network with these parameters, in memory of its own."""
        import torch
        from torch import nn

        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(self.widths):
            dtype = getattr(torch, self.dtype)
            linear: nn.Module = nn.utils.skip_init(  # type: ignore[no-untyped-call]
                nn.Linear, n_in, n_out, dtype=dtype
            )
            layers += [linear, getattr(nn, ACTIVATIONS[self.activation])()]
        network = nn.Sequential(*layers[:-1])
        network.load_state_dict({n: torch.from_numpy(p) for n, p in parameters.items()})
        return network

    def architecture(self) -> Architecture:
        """The network as plain data."""
        layers: list[tuple[Any, ...]] = []
        for n_in, n_out in itertools.pairwise(self.widths):
            layers += [("linear", n_in, n_out, True), (self.activation,)]
        names = [f"{2 * i}.{p}" for i in range(len(self.widths) - 1) for p in ("weight", "bias")]
        return Architecture(tuple(layers[:-1]), tuple(names), tuple(names), False)

    def adapts(self, name: str) -> bool:
        """Whether groups have this parameter of their own."""
        return not self.head_only or name.startswith(f"{2 * (len(self.widths) - 2)}.")

    def models(self, own: dict[str, Array], shared: dict[str, Array]) -> AdaptedArrays:
        """The models with parameters of their `own` [T, ...]; all others are `shared`."""
        tasks = len(next(iter(own.values())))
        return AdaptedArrays(self.architecture(), describe_loss(self.loss), own, shared, tasks)


def _inner_optimizer(name: str, lr: float) -> Any:
    import pymeta

    lr = float(lr)
    if name == "adam":
        return pymeta.Adam(lr)
    return pymeta.SGD(lr, momentum=0.9) if name == "momentum" else pymeta.SGD(lr)


def _count(value: Any) -> int | None:
    return None if value is None else int(value)


def _seed(rng: Any) -> int:
    return int(rng.randint(np.iinfo(np.int32).max))


class _MetaEstimator(BaseEstimator):
    """What the classifier and the regressor share; see `MetaClassifier` for the parameters."""

    # Given by the subclasses: the loss's name, the width of the output, and y ready for the loss.
    _loss_name: Callable[[], str]
    _outputs: Callable[[], int]
    _target: Callable[[Array, Any], Array]

    def __init__(
        self,
        *,
        method: str,
        hidden: tuple[int, ...],
        activation: str,
        inner_optimizer: str,
        inner_lr: float,
        inner_steps: int,
        inner_batch_size: int | None,
        first_order: bool,
        head_only: bool,
        meta_lr: float,
        weight_decay: float,
        iterations: int,
        tasks_per_batch: int,
        draw: str,
        task_rows: int | None,
        support: float,
        shuffle: bool,
        epochs: int,
        batch_size: int | None,
        pretrain_epochs: int,
        adapt_lr: float | None,
        adapt_epochs: int | None,
        anchor: float,
        adapt_validation: float,
        adapt_patience: int | None,
        adapt_on_fit: bool,
        dtype: str,
        random_state: Any,
        verbose: bool,
    ) -> None:
        self.method = method
        self.hidden = hidden
        self.activation = activation
        self.inner_optimizer = inner_optimizer
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.inner_batch_size = inner_batch_size
        self.first_order = first_order
        self.head_only = head_only
        self.meta_lr = meta_lr
        self.weight_decay = weight_decay
        self.iterations = iterations
        self.tasks_per_batch = tasks_per_batch
        self.draw = draw
        self.task_rows = task_rows
        self.support = support
        self.shuffle = shuffle
        self.epochs = epochs
        self.batch_size = batch_size
        self.pretrain_epochs = pretrain_epochs
        self.adapt_lr = adapt_lr
        self.adapt_epochs = adapt_epochs
        self.anchor = anchor
        self.adapt_validation = adapt_validation
        self.adapt_patience = adapt_patience
        self.adapt_on_fit = adapt_on_fit
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    # ---- checks ---------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        """Raise TypeError or ValueError, naming it, where a parameter is not as documented."""
        _one_of("method", self.method, METHODS)
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("inner_optimizer", self.inner_optimizer, OPTIMIZERS)
        _one_of("draw", self.draw, ("groups", "rows"))
        _one_of("dtype", self.dtype, ("float32", "float64"))
        if not isinstance(self.hidden, (tuple, list)):
            raise TypeError(f"hidden: expected a tuple of widths, got {self.hidden!r}")
        for width in self.hidden:
            _integer("hidden", width, 1)
        _check_support(self.support)
        for name in ("first_order", "head_only", "shuffle", "adapt_on_fit"):
            _flag(name, getattr(self, name))
        least = {"inner_steps": 1, "iterations": 1, "epochs": 1, "tasks_per_batch": 1}
        for name, value in {**least, "pretrain_epochs": 0}.items():
            _integer(name, getattr(self, name), value)
        optional = {"task_rows": 1, "batch_size": 1, "adapt_epochs": 1}
        for name, value in {**optional, "inner_batch_size": 1, "adapt_patience": 1}.items():
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), value)
        for name in ("inner_lr", "meta_lr", "weight_decay", "anchor"):
            _real(name, getattr(self, name))
        if self.adapt_lr is not None:
            _real("adapt_lr", self.adapt_lr)
        _real("adapt_validation", self.adapt_validation, 1.0)
        if self.adapt_patience is not None and self.adapt_validation == 0:
            raise ValueError("adapt_patience: there are no rows to look at: adapt_validation is 0")

    def _rows(self, X: Array, y: Array, sample_weight: Any) -> tuple[_Rows, Array]:
        """The rows to train on, and which of X's they are: rows of weight 0 are left out."""
        weights = self._row_weights(X, y, sample_weight)
        kept = np.arange(len(X)) if weights is None else np.flatnonzero(weights > 0)
        target = self._target(y, X.dtype)
        if weights is None:
            return _Rows(X, target, None), kept
        return _Rows(X[kept], target[kept], weights[kept].astype(X.dtype)), kept

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
        labels = None if groups is None else _labels(groups, X)
        rows, kept = self._rows(X, y, sample_weight)
        if len(kept) == 0:
            raise ValueError("sample_weight: all weights are zero, there is nothing to learn from")
        members = [] if labels is None else _members(labels[kept])[1]
        widths = (X.shape[1], *(int(w) for w in self.hidden), self._outputs())
        self._form = _Form(
            widths, self.activation, self.dtype, self._loss_name(), bool(self.head_only)
        )
        network = self._form.network(self._form.initial(rng))
        meta = self.method != "pooled" and len(members) > 1
        epochs = self.pretrain_epochs if meta else self.epochs
        curve = self._pooled(network, rows, epochs, _seed(rng)) if epochs else []
        if meta:
            curve = self._meta_train(network, _Draw(self, rows, members, rng), _seed(rng))
        start = {n: p.detach().numpy().copy() for n, p in network.named_parameters()}
        if not all(np.isfinite(p).all() for p in start.values()):
            raise ValueError(
                f"meta_lr, inner_lr: training diverged with {self.meta_lr} and {self.inner_lr}"
            )
        self.loss_curve_, self.n_iter_ = curve, len(curve)
        self._seed = _seed(rng)
        self._keep_start(start)
        if labels is not None and self.adapt_on_fit:
            self._adapt(X, y, labels, sample_weight)

    def _pooled(
        self, network: torch.nn.Sequential, rows: _Rows, epochs: int, seed: int
    ) -> list[float]:
        """Ordinary training on all rows as one task, by minibatches of Adam; the loss curve."""
        import torch

        import pymeta

        train = pymeta.FineTune(
            network,
            loss=self._form.loss,
            optimizer=pymeta.Adam(
                float(self.meta_lr), weight_decay=float(self.weight_decay), decoupled=True
            ),
            epochs=epochs,
            batch_size=_count(self.batch_size),
            seed=seed,
        )
        xs, ys, ws = rows.lists([np.arange(len(rows.x))])
        models = train(xs, ys, weights=ws, curves=True, progress=bool(self.verbose))
        curve: list[float] = models.history.train[0].tolist()
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.copy_(models.parameters[name][0])
        self._say(f"pooled: {epochs} epochs, loss {curve[0]:.4f} -> {curve[-1]:.4f}")
        return curve

    def _meta_train(self, network: torch.nn.Sequential, draw: _Draw, seed: int) -> list[float]:
        """MAML or Reptile; the loss of every iteration, from which the network learnt.

        The outer step is AdamW's, its size falling linearly to a hundredth.
        """
        import torch

        make = self._maml if self.method == "maml" else self._reptile
        one = make(network, draw, seed)
        outer = torch.optim.AdamW(
            network.parameters(), float(self.meta_lr), weight_decay=float(self.weight_decay)
        )
        decay = torch.optim.lr_scheduler.LinearLR(outer, 1.0, 0.01, total_iters=self.iterations)
        curve = []
        with torch.enable_grad():
            for i in range(self.iterations):
                loss = one()
                outer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                outer.step()
                curve.append(loss.item())
                if not math.isfinite(curve[-1]):
                    break  # and so is what has been learnt, which `_fit` refuses
                decay.step()
                if (i + 1) % max(self.iterations // 10, 1) == 0:
                    self._say(f"{self.method}: iteration {i + 1}, loss {curve[-1]:.4f}")
        return curve

    def _maml(
        self, network: torch.nn.Sequential, draw: _Draw, seed: int
    ) -> Callable[[], torch.Tensor]:
        import pymeta

        maml = pymeta.MAML(
            network,
            loss=self._form.loss,
            optimizer=_inner_optimizer(self.inner_optimizer, self.inner_lr),
            steps=int(self.inner_steps),
            first_order=bool(self.first_order),
            adapt=[n for n, _ in network.named_parameters() if self._form.adapts(n)],
        )

        def loss() -> torch.Tensor:
            support, query = draw.episode()
            xs, ys, ws = draw.rows.lists(support)
            xq, yq, wq = draw.rows.lists(query)
            outcome: pymeta.Outcome = maml(xs, ys, xq, yq, support_weights=ws, query_weights=wq)
            return outcome.loss

        return loss

    def _reptile(
        self, network: torch.nn.Sequential, draw: _Draw, seed: int
    ) -> Callable[[], torch.Tensor]:
        import pymeta

        reptile = pymeta.Reptile(
            network,
            loss=self._form.loss,
            optimizer=_inner_optimizer(self.inner_optimizer, self.inner_lr),
            steps=int(self.inner_steps),
            batch_size=_count(self.inner_batch_size),
            adapt=[n for n, _ in network.named_parameters() if self._form.adapts(n)],
            seed=seed,
        )

        def loss() -> torch.Tensor:
            xs, ys, ws = draw.rows.lists(draw.groups())
            outcome: pymeta.ReptileOutcome = reptile(xs, ys, support_weights=ws)
            return outcome.loss

        return loss

    def _say(self, line: str) -> None:
        if self.verbose:
            print(f"[{type(self).__name__}] {line}", flush=True)

    # ---- adapt ----------------------------------------------------------------------------------

    def _keep_start(self, start: dict[str, Array]) -> None:
        """Begin without groups: model 0 is the start, and what no group adapts is shared."""
        own = {n: p[None] for n, p in start.items() if self._form.adapts(n)}
        self.models_ = self._form.models(own, {n: p for n, p in start.items() if n not in own})
        self._places: dict[Any, int] = {}
        self.adapted_groups_ = np.empty(0, dtype=object)

    def _fine_tuner(self) -> Any:
        """What adapts the start to groups: the inner loop's optimiser, with rows and epochs."""
        import pymeta

        lr = self.inner_lr if self.adapt_lr is None else self.adapt_lr
        start = self.models_.state_dict(0)
        return pymeta.FineTune(
            self._form.network(start),
            loss=self._form.loss,
            optimizer=_inner_optimizer(self.inner_optimizer, lr),
            epochs=_count(self.adapt_epochs) or int(self.inner_steps),
            batch_size=_count(self.inner_batch_size),
            anchor=float(self.anchor),
            freeze=[n for n in start if not self._form.adapts(n)] or None,
            validation=float(self.adapt_validation),
            validation_rows="random" if self.shuffle else "last",
            patience=_count(self.adapt_patience),
            seed=self._seed,
        )

    def _adapt(self, X: Array, y: Array, labels: Array, sample_weight: Any) -> None:
        """Fine-tune the start to the rows of every label, all in one call, and keep the models."""
        rows, kept = self._rows(X, y, sample_weight)
        names, members = _members(labels)
        # Where rows were left out, the others move up; a group without any makes no step.
        place = np.full(len(X), -1)
        place[kept] = np.arange(len(kept))
        xs, ys, ws = rows.lists([place[m][place[m] >= 0] for m in members])
        models = self._fine_tuner()(xs, ys, weights=ws, progress=bool(self.verbose))
        fine = models.status.numpy() == 0
        if not fine.all():
            lost = names[~fine].tolist()
            warnings.warn(
                f"adapt_lr: adaptation diverged for {len(lost)} of {len(names)} groups, which "
                f"keep the shared start: {', '.join(map(repr, lost[:5]))}",
                ConvergenceWarning,
                stacklevel=3,
            )
        own = {n: p.numpy()[fine] for n, p in models.parameters.items() if self._form.adapts(n)}
        self._keep(set(names.tolist()), names[fine].tolist(), own)

    def _keep(self, seen: set[Any], adapted: list[Any], own: dict[str, Array]) -> None:
        """Put the adapted groups' own parameters in the place of what the groups seen had."""
        others = [label for label in self._places if label not in seen]
        kept = self.models_[[0, *(self._places[label] for label in others)]]
        start = self.models_.state_dict(0)
        shared = {n: p for n, p in start.items() if n not in own}
        self.models_ = AdaptedArrays.concatenate([kept, self._form.models(own, shared)])
        self._places = {label: i for i, label in enumerate(others + adapted, start=1)}
        self.adapted_groups_ = np.array([*self._places, None], dtype=object)[:-1]

    # ---- predict --------------------------------------------------------------------------------

    def _raw(self, X: Any, groups: Any) -> Array:
        """The network's outputs [rows, out], every row's by the model of its group."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=self._form.dtype, order="C", reset=False)
        labels = [] if groups is None else _labels(groups, X).tolist()
        places = np.array([self._places.get(label, 0) for label in labels] or [0] * len(X))
        order = np.argsort(places, kind="stable")
        used, counts = np.unique(places, return_counts=True)
        xs = np.split(X[order], np.cumsum(counts)[:-1])
        outputs = np.concatenate(self.models_[used](xs)).astype(np.float64)
        raw = np.empty_like(outputs)
        raw[order] = outputs
        return raw


class MetaClassifier(ClassifierMixin, _MetaEstimator):
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
            as is also done where there are fewer than two groups to learn from.
        hidden: widths of the hidden layers; () for a linear model.
        activation: "relu", "tanh", "elu", "gelu" or "silu".
        inner_optimizer: what takes the steps on a group, here and in `adapt`: "sgd", "momentum"
            (SGD with momentum 0.9) or "adam".
        inner_lr: its step size.
        inner_steps: its steps on a group in `fit`.
        inner_batch_size: rows of a step in `adapt` and in Reptile; None for all of the group's
            (MAML always takes all).
        first_order: leave the second derivatives out of MAML (FOMAML).
        head_only: adapt the last layer alone, all others are shared (ANIL).
        meta_lr: step size of AdamW, which trains the start: on the meta-gradient, falling
            linearly to a hundredth, or constant in pooled training.
        weight_decay: AdamW's.
        iterations: meta-batches of MAML and Reptile.
        tasks_per_batch: groups in a meta-batch.
        draw: which they are: "groups" draws every group equally often, "rows" in proportion to
            its rows, which keeps many small groups from being learnt by heart.
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
        anchor: strength of the pull back to the start in `adapt` (L2-SP).
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

    def __init__(
        self,
        method: str = "maml",
        *,
        hidden: tuple[int, ...] = (64, 64),
        activation: str = "relu",
        inner_optimizer: str = "sgd",
        inner_lr: float = 0.05,
        inner_steps: int = 5,
        inner_batch_size: int | None = None,
        first_order: bool = False,
        head_only: bool = False,
        meta_lr: float = 1e-3,
        weight_decay: float = 0.0,
        iterations: int = 1000,
        tasks_per_batch: int = 16,
        draw: str = "groups",
        task_rows: int | None = 256,
        support: float = 0.5,
        shuffle: bool = True,
        epochs: int = 100,
        batch_size: int | None = 128,
        pretrain_epochs: int = 0,
        adapt_lr: float | None = None,
        adapt_epochs: int | None = None,
        anchor: float = 0.0,
        adapt_validation: float = 0.0,
        adapt_patience: int | None = None,
        adapt_on_fit: bool = False,
        class_weight: Any = None,
        dtype: str = "float32",
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            method=method,
            hidden=hidden,
            activation=activation,
            inner_optimizer=inner_optimizer,
            inner_lr=inner_lr,
            inner_steps=inner_steps,
            inner_batch_size=inner_batch_size,
            first_order=first_order,
            head_only=head_only,
            meta_lr=meta_lr,
            weight_decay=weight_decay,
            iterations=iterations,
            tasks_per_batch=tasks_per_batch,
            draw=draw,
            task_rows=task_rows,
            support=support,
            shuffle=shuffle,
            epochs=epochs,
            batch_size=batch_size,
            pretrain_epochs=pretrain_epochs,
            adapt_lr=adapt_lr,
            adapt_epochs=adapt_epochs,
            anchor=anchor,
            adapt_validation=adapt_validation,
            adapt_patience=adapt_patience,
            adapt_on_fit=adapt_on_fit,
            dtype=dtype,
            random_state=random_state,
            verbose=verbose,
        )
        self.class_weight = class_weight

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
        self._class_weights = None
        if self.class_weight is not None:
            self._class_weights = compute_class_weight(
                self.class_weight, classes=self.classes_, y=y
            )
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
            raise ValueError(f"y: {unknown[:5].tolist()} are no classes that fit has seen")
        self._adapt(X, y, _labels(groups, X), sample_weight)
        return self

    def decision_function(self, X: Any, groups: Any = None) -> Array:
        """The logits: [rows] of the second of two classes, or [rows, C].

        Args:
            X: [rows, features].
            groups: [rows], each row's group; None where all rows are for the shared start.
        """
        raw = self._raw(X, groups)
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
        return "bce_with_logits" if len(self.classes_) == 2 else "cross_entropy"

    def _outputs(self) -> int:
        return 1 if len(self.classes_) == 2 else len(self.classes_)

    def _target(self, y: Array, dtype: Any) -> Array:
        codes = np.searchsorted(self.classes_, y)
        return codes.astype(dtype if len(self.classes_) == 2 else np.int64)

    def _row_weights(self, X: Array, y: Array, sample_weight: Any) -> Array | None:
        weights = super()._row_weights(X, y, sample_weight)
        if self._class_weights is None:
            return weights
        of_class: Array = self._class_weights[np.searchsorted(self.classes_, y)]
        return of_class if weights is None else weights * of_class


class MetaRegressor(RegressorMixin, _MetaEstimator):
    """One small neural regressor for each group, all from one meta-learned start.

    Targets are standardised inside: `fit` takes the mean and the standard deviation of all its
    (weighted) rows, the networks see the quotients, also in `adapt`, and predictions are scaled
    back. Losses and `loss_curve_` are in those units.

    All arguments but the loss are those of `MetaClassifier`, and so are all other attributes.

    Args:
        loss: "mse", or "huber": quadratic up to one standard deviation, then linear.

    Attributes:
        y_mean_: what is subtracted from targets.
        y_scale_: what they are then divided by.

    Raises:
        TypeError, ValueError: in `fit`, where a parameter is not as described.
    """

    def __init__(
        self,
        method: str = "maml",
        *,
        loss: str = "mse",
        hidden: tuple[int, ...] = (64, 64),
        activation: str = "relu",
        inner_optimizer: str = "sgd",
        inner_lr: float = 0.05,
        inner_steps: int = 5,
        inner_batch_size: int | None = None,
        first_order: bool = False,
        head_only: bool = False,
        meta_lr: float = 1e-3,
        weight_decay: float = 0.0,
        iterations: int = 1000,
        tasks_per_batch: int = 16,
        draw: str = "groups",
        task_rows: int | None = 256,
        support: float = 0.5,
        shuffle: bool = True,
        epochs: int = 100,
        batch_size: int | None = 128,
        pretrain_epochs: int = 0,
        adapt_lr: float | None = None,
        adapt_epochs: int | None = None,
        anchor: float = 0.0,
        adapt_validation: float = 0.0,
        adapt_patience: int | None = None,
        adapt_on_fit: bool = False,
        dtype: str = "float32",
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            method=method,
            hidden=hidden,
            activation=activation,
            inner_optimizer=inner_optimizer,
            inner_lr=inner_lr,
            inner_steps=inner_steps,
            inner_batch_size=inner_batch_size,
            first_order=first_order,
            head_only=head_only,
            meta_lr=meta_lr,
            weight_decay=weight_decay,
            iterations=iterations,
            tasks_per_batch=tasks_per_batch,
            draw=draw,
            task_rows=task_rows,
            support=support,
            shuffle=shuffle,
            epochs=epochs,
            batch_size=batch_size,
            pretrain_epochs=pretrain_epochs,
            adapt_lr=adapt_lr,
            adapt_epochs=adapt_epochs,
            anchor=anchor,
            adapt_validation=adapt_validation,
            adapt_patience=adapt_patience,
            adapt_on_fit=adapt_on_fit,
            dtype=dtype,
            random_state=random_state,
            verbose=verbose,
        )
        self.loss = loss

    def fit(self, X: Any, y: Any, groups: Any = None, sample_weight: Any = None) -> MetaRegressor:
        """Learn the shared start.

        Args:
            X: [rows, features], numbers without NaN or infinities.
            y: [rows], numbers.
            groups: [rows], each row's group: numbers or strings. None for one group of all rows.
            sample_weight: [rows], weights of the rows' losses, >= 0. A row of weight 0 is as
                good as absent.

        Returns:
            The estimator, without adapted groups (unless `adapt_on_fit`).
        """
        self._check_parameters()
        _one_of("loss", self.loss, ("mse", "huber"))
        X, y = validate_data(self, X, y, dtype=self.dtype, order="C", y_numeric=True)
        y = y.astype(np.float64)
        weights = self._row_weights(X, y, sample_weight)
        weights = np.ones(len(y)) if weights is None or not weights.any() else weights
        self.y_mean_ = float(np.average(y, weights=weights))
        deviation = math.sqrt(np.average((y - self.y_mean_) ** 2, weights=weights))
        self.y_scale_ = deviation if deviation > 0 else 1.0
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
        self._adapt(X, y, _labels(groups, X), sample_weight)
        return self

    def predict(self, X: Any, groups: Any = None) -> Array:
        """The prediction for each row, [rows].

        Args:
            X: [rows, features].
            groups: [rows], each row's group; None where all rows are for the shared start.
        """
        return self._raw(X, groups)[:, 0] * self.y_scale_ + self.y_mean_

    def score(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> float:
        """The R^2 of `predict(X, groups)`."""
        return float(r2_score(y, self.predict(X, groups), sample_weight=sample_weight))

    def _loss_name(self) -> str:
        return self.loss

    def _outputs(self) -> int:
        return 1

    def _target(self, y: Array, dtype: Any) -> Array:
        return ((y.astype(np.float64) - self.y_mean_) / self.y_scale_).astype(dtype)
