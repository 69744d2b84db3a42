"""What `fit` has learned and `adapt` begins from: a network's start, or a head on a network.

Both make models for groups, all in one call, and models of both are used alike: `models(xs)` gives
the outputs of each on its own rows, `models[...]` are some of them, `concatenate` joins them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from pymeta.models.arrays import AdaptedArrays
from pymeta.sklearn.episodes import Lists, Tensors
from pymeta.sklearn.network import Form, inner_optimizer, rows_of
from pymeta.sklearn.parameters import Parameters, count
from pymeta.spec.anchors import LearnableAnchor
from pymeta.tasks.groups import Array

if TYPE_CHECKING:
    from pymeta.learners import EncodedLearner

STRENGTHS = (None, 5.0, 20.0, 80.0, 320.0)  # rows that the start is worth; None: it pulls not
LONGER = (1, 4)  # times inner_steps
_AT_A_TIME = 1024  # groups that a head is fitted to


@dataclass(frozen=True)
class How:
    """How a network is fine-tuned to groups.

    Attributes:
        epochs: passes over a group's rows.
        anchor: the strength of the pull back to the start, for every group.
        anchor_rows: in its place: the rows that the start is worth.
    """

    epochs: int
    anchor: float = 0.0
    anchor_rows: float | None = None

    @staticmethod
    def of(settings: Parameters) -> How:
        """What the settings say; of what is left open, the least."""
        rows = rows_of(settings)
        epochs = count(settings.adapt_epochs) or int(settings.inner_steps)
        return How(epochs, settings.pull, rows)

    def strengths(self, counts: Array, lr: float) -> Array | None:
        """[T], where a group of few rows would be pulled past the start by one step."""
        if self.anchor_rows is None or lr == 0:
            return None
        own = self.anchor_rows / np.maximum(counts, 1)
        return np.minimum(own, 1 / lr) if (own * lr > 1).any() else None


class Start(Protocol):
    """What groups begin from.

    Attributes:
        has_variances: whether its models know those of their outputs.
    """

    has_variances: bool

    def is_finite(self) -> bool:
        """Whether what was learned is finite."""

    def shared(self) -> Models:
        """The one model of rows without a group's own."""

    def how(self, settings: Parameters) -> How:
        """The way to adapt that the settings, and what was learned, say."""

    def hows(self, settings: Parameters) -> list[How]:
        """The ways to adapt that the settings leave open."""

    def gone_on(self, settings: Parameters, how: How, rows: Lists, seed: int) -> Start:
        """What becomes of it with the rows of all, as one group."""

    def adapt(
        self, settings: Parameters, how: How, rows: Lists, seed: int, own: Models | None = None
    ) -> tuple[Models, Array]:
        """The models of T groups, and which of them are of use, bool [T].

        `own` are the models that the groups have already, and go on from.
        """


class NetworkStart:
    """The parameters of a network, which a group's own rows fine-tune."""

    has_variances = False

    def __init__(
        self,
        form: Form,
        parameters: dict[str, Array],
        lr: float,
        rates: Array | None = None,
        worth: float | None = None,
    ) -> None:
        """Keep the parameters {name: array}, and the step size, or those of layers [layers].

        `worth` is how many rows it has learned to be worth (`anchor_rows`); None where it has not.
        """
        self.form, self.parameters = form, parameters
        self.lr, self.rates, self.worth = lr, rates, worth

    def is_finite(self) -> bool:
        """Whether all parameters are."""
        rates = [] if self.rates is None else [self.rates]
        return all(np.isfinite(p).all() for p in (*self.parameters.values(), *rates))

    def shared(self) -> AdaptedArrays:
        """The start itself."""
        return self._models({n: p[None] for n, p in self.parameters.items()})

    def _models(self, stacked: dict[str, Array]) -> AdaptedArrays:
        own = {n: p for n, p in stacked.items() if self.form.adapts(n)}
        return self.form.models(own, {n: p for n, p in self.parameters.items() if n not in own})

    def how(self, settings: Parameters) -> How:
        """What the settings say; how strongly it pulls, as it has learned."""
        plain = How.of(settings)
        learned = isinstance(settings.anchor_rows, LearnableAnchor) and self.worth is not None
        return replace(plain, anchor_rows=self.worth) if learned else plain

    def hows(self, settings: Parameters) -> list[How]:
        """Epochs and strengths."""
        plain = self.how(settings)
        strengths = STRENGTHS if settings.chooses_strength else (plain.anchor_rows,)
        times = LONGER if settings.adapt_epochs is None else (1,)
        return [
            replace(
                plain,
                epochs=t * plain.epochs,
                anchor=plain.anchor if s is None else 0.0,
                anchor_rows=s,
            )
            for t, s in itertools.product(times, strengths)
        ]

    def adapt(
        self,
        settings: Parameters,
        how: How,
        rows: Lists,
        seed: int,
        own: Models | None = None,
    ) -> tuple[AdaptedArrays, Array]:
        """Fine-tune to T groups, from the start or from models of their own."""
        import torch

        start = None
        if own is not None:
            names = (n for n in own.parameters if self.form.adapts(n))
            start = {n: torch.from_numpy(np.ascontiguousarray(own.parameters[n])) for n in names}
        counts = np.array([len(x) for x in rows.xs])
        pull = how.strengths(counts, self._largest_lr(settings))
        models = self._fine_tuner(settings, how, seed)(
            rows.xs, rows.ys, weights=rows.weights, offset=rows.offsets, start=start,
            anchor=pull, progress=bool(settings.verbose),
        )  # fmt: skip
        found = {n: p.numpy() for n, p in models.parameters.items()}
        status = models.status.numpy()
        kept = (0, 2) if settings.on_divergence == "keep" else (0,)
        return self._models(found), np.isin(status, kept)

    def gone_on(self, settings: Parameters, how: How, rows: Lists, seed: int) -> NetworkStart:
        """The start, fine-tuned; as it is, where that diverges."""
        models, fine = self.adapt(settings, how, rows, seed)
        if not fine.all():
            return self
        return NetworkStart(self.form, models.state_dict(0), self.lr, self.rates, self.worth)

    def _largest_lr(self, settings: Parameters) -> float:
        """The step size of `adapt`, where layers have their own the largest."""
        if settings.adapt_lr is not None:
            return float(settings.adapt_lr)
        return self.lr if self.rates is None else float(self.rates.max())

    def _fine_tuner(self, settings: Parameters, how: How, seed: int) -> Any:
        """The inner loop's optimiser, with rows and epochs."""
        import pymeta

        return pymeta.FineTune(
            self.form.network(self.parameters),
            loss=self.form.loss,
            optimizer=inner_optimizer(settings, self._largest_lr(settings)),
            layer_lr=None if settings.adapt_lr is not None else self.rates,
            on_divergence=settings.on_divergence,
            epochs=how.epochs,
            batch_size=count(settings.inner_batch_size),
            anchor=how.anchor,
            anchor_rows=how.anchor_rows,
            freeze=[n for n in self.parameters if not self.form.adapts(n)] or None,
            validation=float(settings.adapt_validation),
            validation_rows="random" if settings.is_shuffled else "last",
            patience=count(settings.adapt_patience),
            seed=seed,
        )


class LearnerStart:
    """A learner whose `adapt` makes networks of groups: MetaLSTM, RelationalMAML."""

    has_variances = False

    def __init__(self, form: Form, learner: Any) -> None:
        """Keep both, the learner as it is."""
        self.form, self.learner = form, learner.requires_grad_(False)
        # what is adapted has to require grad, or the learner would not know it
        for name, parameter in learner.model.named_parameters():
            parameter.requires_grad_(form.adapts(name))

    def is_finite(self) -> bool:
        """Whether all that was learned is."""
        return all(bool(p.isfinite().all()) for p in self.learner.parameters())

    def _shared(self) -> dict[str, Array]:
        return {n: p.detach().numpy().copy() for n, p in self.learner.model.named_parameters()}

    def shared(self) -> AdaptedArrays:
        """The start that all groups have in common."""
        return self._models({n: p[None] for n, p in self._shared().items()})

    def _models(self, stacked: dict[str, Array]) -> AdaptedArrays:
        own = {n: p for n, p in stacked.items() if self.form.adapts(n)}
        return self.form.models(own, {n: p for n, p in self._shared().items() if n not in own})

    def how(self, settings: Parameters) -> How:
        """It has learned how."""
        return How.of(settings)

    def hows(self, settings: Parameters) -> list[How]:
        """The one it has learned."""
        return [How.of(settings)]

    def gone_on(self, settings: Parameters, how: How, rows: Lists, seed: int) -> LearnerStart:
        """Refused: it has learned to make models of groups alone."""
        raise ValueError("groups: expected a label for each row, got None")

    def adapt(
        self,
        settings: Parameters,
        how: How,
        rows: Lists,
        seed: int,
        own: Models | None = None,
    ) -> tuple[AdaptedArrays, Array]:
        """Adapt to T groups, as the learner was trained to."""
        if own is not None:
            raise ValueError(
                "partial_fit: this method adapts from its own start alone; give all rows to adapt"
            )
        parts, fine = [], []
        for first in range(0, len(rows.xs), _AT_A_TIME):
            part = rows.some(slice(first, first + _AT_A_TIME))
            models = self.learner.adapt(part.xs, part.ys, **part.as_support)
            parts.append(self._models({n: p.numpy() for n, p in models.parameters.items()}))
            fine.append(models.status.numpy() == 0)
        return type(parts[0]).concatenate(parts), np.concatenate(fine)


class HeadModels:
    """The fitted heads of T groups.

    Attributes:
        learner: the encoder, and what the heads have in common.
        parameters: {name: [T, ...]}, what was fitted.
    """

    def __init__(self, learner: EncodedLearner, parameters: dict[str, Array]) -> None:
        """Keep both."""
        self.learner, self.parameters = learner, parameters

    @staticmethod
    def concatenate(parts: Sequence[HeadModels]) -> HeadModels:
        """All of them, one after another."""
        names = parts[0].parameters
        joined = {n: _joined([p.parameters[n] for p in parts]) for n in names}
        return HeadModels(parts[0].learner, joined)

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def __getitem__(self, where: Any) -> HeadModels:
        """Those of a slice, of numbers or of a mask."""
        return HeadModels(self.learner, {n: p[where] for n, p in self.parameters.items()})

    def _tasks(self) -> Any:
        import torch

        from pymeta.learners import AdaptedTasks

        state = {n: torch.from_numpy(p) for n, p in self.parameters.items()}
        return AdaptedTasks(self.learner, state, len(self))

    def __call__(self, xs: Sequence[Array]) -> list[Array]:
        """The outputs of each on its own rows: [rows_t, in] to [rows_t, out]."""
        return [o.numpy() for o in self._tasks()(_tensors(xs))]

    def variances(self, xs: Sequence[Array]) -> list[Array]:
        """Those of the outputs, likewise; TypeError where the learner knows none."""
        return [v.numpy() for v in self._tasks().variances(_tensors(xs))]


Models: TypeAlias = AdaptedArrays | HeadModels


class HeadStart:
    """A learner with a head, which is fitted to a group's own rows."""

    def __init__(self, learner: EncodedLearner, rows: Lists):
        """Keep the learner; the shared model is fitted to the rows of the one group given.

        Without any rows it is the prior.
        """
        from pymeta.learners import BayesianHead

        self.learner = learner
        self.has_variances = isinstance(learner, BayesianHead)
        self._shared = self._fitted(rows)

    def is_finite(self) -> bool:
        """Whether the encoder and the prior are."""
        return all(bool(p.isfinite().all()) for p in self.learner.parameters())

    def shared(self) -> HeadModels:
        """The prior's, or where there is none, that of all rows."""
        return self._shared

    def how(self, settings: Parameters) -> How:
        """It knows itself how far groups go."""
        return How.of(settings)

    def hows(self, settings: Parameters) -> list[How]:
        """The one it knows."""
        return [How.of(settings)]

    def gone_on(self, settings: Parameters, how: How, rows: Lists, seed: int) -> HeadStart:
        """Refused: what is shared is a prior."""
        raise ValueError("groups: expected a label for each row, got None; a head has no start")

    def _fitted(self, rows: Lists) -> HeadModels:
        models = self.learner.adapt(rows.xs, rows.ys, **rows.as_support)
        return HeadModels(self.learner, {n: v.numpy() for n, v in models.state.items()})

    def adapt(
        self, settings: Parameters, how: How, rows: Lists, seed: int, own: Models | None = None
    ) -> tuple[HeadModels, Array]:
        """Fit to T groups; they have to bring all their rows."""
        if own is not None:
            raise ValueError(
                "partial_fit: a head is fitted to all rows of a group at once; give them to adapt"
            )
        parts = [
            self._fitted(rows.some(slice(first, first + _AT_A_TIME)))
            for first in range(0, len(rows.xs), _AT_A_TIME)
        ]
        models = HeadModels.concatenate(parts)
        fine = np.ones(len(rows.xs), dtype=bool)
        for values in models.parameters.values():
            fine &= np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        return models, fine


def _joined(parts: list[Array]) -> Array:
    """Arrays [T, ...] one after another, zeros where others are longer, as MatchingNet's are."""
    shape = tuple(max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True))
    return np.concatenate(
        [
            np.pad(
                p, [(0, 0), *((0, most - n) for most, n in zip(shape, p.shape[1:], strict=True))]
            )
            for p in parts
        ]
    )


def _tensors(arrays: Sequence[Array]) -> Tensors:
    import torch

    return [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
