"""The table of methods: how `fit` learns what groups share, and what a group's model then is.

Another method is another entry. Those with neither `head` nor `own` learn a start of the network,
and a group's model is that network, fine-tuned. Those with a `head` learn features by the hidden
layers and something closed on top (`pymeta.learners`): a group's model is what is fitted there.
Those with a learner of their `own` have it adapt the network to a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from pymeta.sklearn.episodes import Draw
from pymeta.sklearn.network import Form, inner_optimizer, pull
from pymeta.sklearn.parameters import Parameters, count
from pymeta.spec.losses import describe_loss

if TYPE_CHECKING:
    import torch

    from pymeta.learners import EncodedLearner

# (settings, form, what is trained, where meta-batches come from, seed) -> a meta-batch's loss
Losses: TypeAlias = "Callable[[Parameters, Form, Any, Draw, int], Callable[[], torch.Tensor]]"
Head: TypeAlias = "Callable[[Form, torch.nn.Sequential], EncodedLearner]"
OwnLearner: TypeAlias = "Callable[[Parameters, Form, torch.nn.Sequential], torch.nn.Module]"


class Method(NamedTuple):
    """A method.

    Attributes:
        losses: makes the function that draws a meta-batch and gives its loss; None for pooled
            training alone.
        head: makes the learner of the (pretrained) network: its hidden layers are the encoder;
            None where a group's model is the network, fine-tuned.
        own: makes the learner whose `adapt` gives a group's network; None likewise.
        kinds: the kinds of loss that it takes; None for all.
        by_class: whether it compares rows with those of each class: two classes have two outputs,
            and without rows there are no classes, so that the shared model is fitted to all rows.
        head_only: whether it adapts the network's last layer alone, whatever is set.
    """

    losses: Losses | None = None
    head: Head | None = None
    own: OwnLearner | None = None
    kinds: tuple[str, ...] | None = None
    by_class: bool = False
    head_only: bool = False

    @property
    def tunes(self) -> bool:
        """Whether a group's model is the network, fine-tuned."""
        return self.head is None and self.own is None

    @property
    def is_random(self) -> bool:
        """Whether it has networks of its own beside the estimator's, which begin at random."""
        return self.own is not None or self.head is _relation


class WithRates:
    """The loss of a meta-batch, and what of the inner loop is learned with it.

    Attributes:
        rates: [layers], the step sizes, a parameter; or None.
        pulls: the strength of the pull to the start, a module; or None.
    """

    def __init__(
        self, loss: Callable[[], torch.Tensor], rates: torch.nn.Parameter | None, pulls: Any
    ) -> None:
        """Keep all."""
        self._loss, self.rates, self.pulls = loss, rates, pulls

    def __call__(self) -> torch.Tensor:
        """The loss of the next meta-batch."""
        return self._loss()


# ---- starts of networks -------------------------------------------------------------------------


def _of_maml(maml: Any, draw: Draw) -> Callable[[], torch.Tensor]:
    """The query loss after adaptation, of a meta-batch."""

    def loss() -> torch.Tensor:
        support, query = draw.episode()
        s, q = draw.rows.lists(support), draw.rows.lists(query)
        found: torch.Tensor = maml(s.xs, s.ys, q.xs, q.ys, **s.as_support, **q.as_query).loss
        return found

    return loss


def _maml(
    settings: Parameters, form: Form, network: torch.nn.Sequential, draw: Draw, seed: int
) -> Callable[[], torch.Tensor]:
    import pymeta

    rate = pymeta.LearnableLR(form.lr, per="layer") if settings.learn_lr else form.lr
    maml = pymeta.MAML(
        network,
        loss=form.loss,
        optimizer=inner_optimizer(settings, rate),
        **pull(settings),
        steps=int(settings.inner_steps),
        first_order=bool(settings.first_order),
        adapt=[n for n, _ in network.named_parameters() if form.adapts(n)],
    )
    rates = maml.lr if settings.learn_lr else None
    return WithRates(_of_maml(maml, draw), rates, maml.learned_anchor)


def _encoded(
    settings: Parameters, form: Form, network: torch.nn.Sequential, draw: Draw, seed: int
) -> Callable[[], torch.Tensor]:
    import pymeta
    from pymeta.learners import EncodedMAML

    rate = pymeta.LearnableLR(form.lr, per="layer") if settings.learn_lr else form.lr
    learner = EncodedMAML(
        form.encoder(network),
        network[-1],
        loss=form.loss,
        optimizer=inner_optimizer(settings, rate),
        **pull(settings),
        steps=int(settings.inner_steps),
        first_order=bool(settings.first_order),
    )
    return WithRates(_of_maml(learner, draw), learner.maml.lr if settings.learn_lr else None, None)


def _implicit(
    settings: Parameters, form: Form, network: torch.nn.Sequential, draw: Draw, seed: int
) -> Callable[[], torch.Tensor]:
    import torch

    import pymeta

    rows = pull(settings)["anchor_rows"]
    maml = pymeta.MAML(
        network,
        loss=form.loss,
        optimizer=inner_optimizer(settings, form.lr),
        steps=int(settings.inner_steps),
        first_order=bool(settings.first_order),  # which it refuses
        implicit=pymeta.Implicit(settings.pull or 1.0),
        adapt=[n for n, _ in network.named_parameters() if form.adapts(n)],
    )

    def loss() -> torch.Tensor:
        support, query = draw.episode()
        s, q = draw.rows.lists(support), draw.rows.lists(query)
        strengths = None
        if rows is not None:
            counts = [max(len(index), 1) for index in support]
            strengths = rows / torch.tensor(counts, dtype=s.xs[0].dtype)
        outcome: pymeta.Outcome = maml(
            s.xs, s.ys, q.xs, q.ys, anchor=strengths, **s.as_support, **q.as_query
        )
        return outcome.loss

    return loss


def _reptile(
    settings: Parameters, form: Form, network: torch.nn.Sequential, draw: Draw, seed: int
) -> Callable[[], torch.Tensor]:
    import pymeta

    reptile = pymeta.Reptile(
        network,
        loss=form.loss,
        optimizer=inner_optimizer(settings, form.lr),
        **pull(settings),
        steps=int(settings.inner_steps),
        batch_size=count(settings.inner_batch_size),
        adapt=[n for n, _ in network.named_parameters() if form.adapts(n)],
        seed=seed,
    )

    def loss() -> torch.Tensor:
        rows = draw.rows.lists(draw.groups())
        outcome: pymeta.ReptileOutcome = reptile(rows.xs, rows.ys, **rows.as_support)
        return outcome.loss

    return loss


# ---- heads --------------------------------------------------------------------------------------


def _of_head(
    settings: Parameters, form: Form, learner: torch.nn.Module, draw: Draw, seed: int
) -> Callable[[], torch.Tensor]:
    """A learner is trained as it will be used: fitted to support rows, judged by query rows."""
    by_class = METHODS[settings.method].by_class

    def loss() -> torch.Tensor:
        support, query = draw.episode()
        if by_class:  # which only rows of the support set's classes can be asked about
            codes = draw.rows.y
            both = [
                (s, q[np.isin(codes[q], codes[s])])
                for s, q in zip(support, query, strict=True)
                if len(s)
            ]
            support, query = [s for s, _ in both], [q for _, q in both]
        s, q = draw.rows.lists(support), draw.rows.lists(query)
        found: torch.Tensor = learner(s.xs, s.ys, q.xs, q.ys, **s.as_support, **q.as_query).loss
        return found

    return loss


def _ridge(form: Form, network: torch.nn.Sequential) -> EncodedLearner:
    from pymeta.learners import RidgeHead

    return RidgeHead(
        form.encoder(network),
        features=form.widths[-2],
        outputs=form.widths[-1],
        loss=form.loss,
    )


def _bayesian(form: Form, network: torch.nn.Sequential) -> EncodedLearner:
    from pymeta.learners import BayesianHead

    return BayesianHead(form.encoder(network), features=form.widths[-2], outputs=form.widths[-1])


def _protonet(form: Form, network: torch.nn.Sequential) -> EncodedLearner:
    from pymeta.learners import ProtoNet

    return ProtoNet(form.encoder(network), ways=form.widths[-1])


def _matching(form: Form, network: torch.nn.Sequential) -> EncodedLearner:
    from pymeta.learners import MatchingNet

    return MatchingNet(form.encoder(network), ways=form.widths[-1], learn_temperature=True)


def _relation(form: Form, network: torch.nn.Sequential) -> EncodedLearner:
    from torch import nn

    from pymeta.learners import RelationNet

    width = form.widths[-2]
    judge = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))
    return RelationNet(
        form.encoder(network), judge, ways=form.widths[-1], loss="cross_entropy", average=True
    )


# ---- learners of their own ----------------------------------------------------------------------

_LARGEST_GATE = 0.5  # a step size of more is for the gate to learn


def _meta_lstm(settings: Parameters, form: Form, network: torch.nn.Sequential) -> torch.nn.Module:
    from pymeta.learners import MetaLSTM

    lr = form.lr
    if settings.inner_lr == "auto":
        lr = min(lr, _LARGEST_GATE)
    elif not 0 < lr < 1:
        raise ValueError(
            f"inner_lr: 'meta_lstm' begins with a gate of this size, between 0 and 1, got {lr}"
        )
    adapt = [n for n, _ in network.named_parameters() if form.adapts(n)]
    return MetaLSTM(
        network, loss=form.loss, steps=int(settings.inner_steps), lr=lr, adapt=adapt
    )  # fmt: skip


def _relational(settings: Parameters, form: Form, network: torch.nn.Sequential) -> torch.nn.Module:
    from pymeta.learners import RelationalMAML

    loss = describe_loss(form.loss)
    return RelationalMAML(
        network, loss=form.loss, features=form.widths[0],
        targets=form.widths[-1] // loss.outputs_per_target,
        optimizer=inner_optimizer(settings, form.lr),
        steps=int(settings.inner_steps), first_order=bool(settings.first_order),
        adapt=[n for n, _ in network.named_parameters() if form.adapts(n)],
    )  # fmt: skip


METHODS: dict[str, Method] = {
    "maml": Method(_maml),
    "implicit": Method(_implicit),
    "encoded": Method(_encoded, head_only=True),
    "reptile": Method(_reptile),
    "pooled": Method(),
    "ridge": Method(_of_head, _ridge, kinds=("mse", "bce_with_logits", "cross_entropy")),
    "bayesian": Method(_of_head, _bayesian, kinds=("mse",)),
    "protonet": Method(_of_head, _protonet, kinds=("cross_entropy",), by_class=True),
    "matching": Method(_of_head, _matching, kinds=("cross_entropy",), by_class=True),
    "relation": Method(_of_head, _relation, kinds=("cross_entropy",), by_class=True),
    "meta_lstm": Method(_of_head, own=_meta_lstm),
    "relational": Method(_of_head, own=_relational),
}
