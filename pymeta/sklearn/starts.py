"""What `fit` has learned and `adapt` begins from: a network's start, or a head on a network.

Both make models for groups, all in one call, and models of both are used alike: `models(xs)` gives
the outputs of each on its own rows, `models[...]` are some of them, `concatenate` joins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from pymeta.models.arrays import AdaptedArrays
from pymeta.sklearn.episodes import Tensors
from pymeta.sklearn.network import Form, inner_optimizer, pull
from pymeta.sklearn.parameters import Parameters, count
from pymeta.tasks.groups import Array

if TYPE_CHECKING:
    from pymeta.learners import EncodedLearner

_AT_A_TIME = 1024  # groups that a head is fitted to


class Start(Protocol):
    """What groups begin from.

    Attributes:
        has_variances: whether its models know those of their outputs.
    """

    has_variances: bool

    def shared(self) -> Models:
        """The one model of rows without a group's own."""

    def adapt(
        self, settings: Parameters, xs: Tensors, ys: Tensors, ws: Tensors | None, seed: int
    ) -> tuple[Models, Array]:
        """The models of T groups, and which of them are of use, bool [T]."""


class NetworkStart:
    """The parameters of a network, which a group's own rows fine-tune."""

    has_variances = False

    def __init__(self, form: Form, parameters: dict[str, Array]) -> None:
        """Keep the parameters {name: array}."""
        self.form, self.parameters = form, parameters

    def shared(self) -> AdaptedArrays:
        """The start itself."""
        return self._models({n: p[None] for n, p in self.parameters.items()})

    def _models(self, stacked: dict[str, Array]) -> AdaptedArrays:
        own = {n: p for n, p in stacked.items() if self.form.adapts(n)}
        return self.form.models(own, {n: p for n, p in self.parameters.items() if n not in own})

    def adapt(
        self, settings: Parameters, xs: Tensors, ys: Tensors, ws: Tensors | None, seed: int
    ) -> tuple[AdaptedArrays, Array]:
        """Fine-tune to T groups, as the settings of `adapt` say."""
        models = self._fine_tuner(settings, seed)(
            xs, ys, weights=ws, progress=bool(settings.verbose)
        )
        own = {n: p.numpy() for n, p in models.parameters.items()}
        return self._models(own), models.status.numpy() == 0

    def _fine_tuner(self, settings: Parameters, seed: int) -> Any:
        """The inner loop's optimiser, with rows and epochs."""
        import pymeta

        lr = settings.inner_lr if settings.adapt_lr is None else settings.adapt_lr
        return pymeta.FineTune(
            self.form.network(self.parameters),
            loss=self.form.loss,
            optimizer=inner_optimizer(settings.inner_optimizer, lr),
            epochs=count(settings.adapt_epochs) or int(settings.inner_steps),
            batch_size=count(settings.inner_batch_size),
            **pull(settings),
            freeze=[n for n in self.parameters if not self.form.adapts(n)] or None,
            validation=float(settings.adapt_validation),
            validation_rows="random" if settings.shuffle else "last",
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

    def _shared(self) -> dict[str, Array]:
        return {n: p.detach().numpy().copy() for n, p in self.learner.model.named_parameters()}

    def shared(self) -> AdaptedArrays:
        """The start that all groups have in common."""
        return self._models({n: p[None] for n, p in self._shared().items()})

    def _models(self, stacked: dict[str, Array]) -> AdaptedArrays:
        own = {n: p for n, p in stacked.items() if self.form.adapts(n)}
        return self.form.models(own, {n: p for n, p in self._shared().items() if n not in own})

    def adapt(
        self, settings: Parameters, xs: Tensors, ys: Tensors, ws: Tensors | None, seed: int
    ) -> tuple[AdaptedArrays, Array]:
        """Adapt to T groups, as the learner was trained to."""
        parts, fine = [], []
        for first in range(0, len(xs), _AT_A_TIME):
            part = slice(first, first + _AT_A_TIME)
            models = self.learner.adapt(
                xs[part], ys[part], support_weights=None if ws is None else ws[part]
            )
            own = {n: p.numpy() for n, p in models.parameters.items()}
            parts.append(self._models(own))
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

    def __init__(self, learner: EncodedLearner, xs: Tensors, ys: Tensors, ws: Tensors | None):
        """Keep the learner; the shared model is fitted to the rows of the one group given.

        Without any rows it is the prior.
        """
        from pymeta.learners import BayesianHead

        self.learner = learner
        self.has_variances = isinstance(learner, BayesianHead)
        self._shared = self._fitted(xs, ys, ws)

    def shared(self) -> HeadModels:
        """The prior's, or where there is none, that of all rows."""
        return self._shared

    def _fitted(self, xs: Tensors, ys: Tensors, ws: Tensors | None) -> HeadModels:
        models = self.learner.adapt(xs, ys, support_weights=ws)
        return HeadModels(self.learner, {n: v.numpy() for n, v in models.state.items()})

    def adapt(
        self, settings: Parameters, xs: Tensors, ys: Tensors, ws: Tensors | None, seed: int
    ) -> tuple[HeadModels, Array]:
        """Fit to T groups."""
        parts = []
        for first in range(0, len(xs), _AT_A_TIME):
            part = slice(first, first + _AT_A_TIME)
            parts.append(self._fitted(xs[part], ys[part], None if ws is None else ws[part]))
        models = HeadModels.concatenate(parts)
        fine = np.ones(len(xs), dtype=bool)
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
