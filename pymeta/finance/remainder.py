"""`Remainder`: a pooled model, and for each entity what it leaves, as far as that can be learned.

    output = pooled(x) + w' f(x)        w = 0 for an entity without rows

The head w is exact for each entity: the posterior of a linear model (ridge or logistic) whose prior
was learned over the training entities, so that an entity of few rows stays near the pooled model.
What f is, or whether there is a remainder at all, is chosen by the loss of later rows of training
entities that the choice has not been trained on:

    pooled    no remainder
    score     the pooled model's own output and 1: a level and a slope for each entity
    linear    all features and 1
    network   16 features of a network, trained through the heads
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pymeta.data import Panel, Ragged
from pymeta.finance.pooled import Pooled
from pymeta.finance.walk import stacked
from pymeta.learners import BayesianHead, RidgeHead
from pymeta.metrics.models import _known, history_of
from pymeta.tasks.groups import Array

FORMS = ("pooled", "score", "linear", "network")
_CHECKED = 12  # batches of tasks that a form is judged by
_BLOCKS = 12  # of time, the worst quarter of which has to be no worse than the pooled model
FIRMER = (1.0, 4.0, 16.0)  # what a head's precision may be multiplied by
_WIDTH = 16


class Check(NamedTuple):
    """A remainder beside the pooled model: its loss, and ours less it.

    Attributes:
        pooled: the pooled model's.
        gap: ours less it.
        error: the gap's standard error over entities.
        worst: the gap in the quarter of the blocks of time that is worst for ours, less its
            standard error.
    """

    pooled: float
    gap: float
    error: float
    worst: float


class Remainder:
    """A model for `pymeta.metrics.compare`: the pooled model and each entity's remainder.

    Args:
        base: the pooled model: "linear", "lightgbm", "blend", or an estimator of scikit-learn.
        link: "log" for targets > 0 whose predictions have to be.
        forms: what may be adapted, of "pooled", "score", "linear" and "network".
        support: rows of a training task that are adapted to: a number, or (least, most).
        query: rows of it that are predicted.
        gap: rows between the two, or a timedelta64, as in `Panel.episodes`.
        split: "time" or "rows", as there.
        steps: training steps of a head.
        tasks: of each step.
        lr: Adam's step size, which falls to a tenth.
        precision: the heads' prior precision at the beginning of training; None for 100 (30 for two
            classes).
        history: at most so many last rows of an entity are adapted to; None for all.
        refit: whether the pooled model is fitted again, once, to training rows and the first
            history together, as rivals are that know all of the past.
        prep: options of the panel's preprocessor.
        seed: of everything random.

    Attributes:
        pooled: the pooled model.
        form: what was chosen.
        firmer: what the learned precision was multiplied by.
        losses: {form: (loss, standard error of its difference to the pooled model's)}.
        head: the trained learner; None where the form is "pooled".
    """

    adapts = True

    def __init__(
        self,
        *,
        base: Any = "linear",
        link: str = "identity",
        forms: Sequence[str] = FORMS,
        support: int | tuple[int, int] = (5, 250),
        query: int | tuple[int, int] = 60,
        gap: Any = 0,
        split: str | None = None,
        steps: int = 150,
        tasks: int = 64,
        lr: float = 0.05,
        precision: float | None = None,
        history: int | None = None,
        refit: bool = False,
        prep: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        """Check and keep the settings."""
        unknown = [f for f in forms if f not in FORMS]
        if unknown or not forms:
            raise ValueError(f"forms: expected some of {FORMS}, got {list(forms)}")
        self.forms, self.steps, self.lr, self.history = tuple(forms), steps, lr, history
        self.seed, self.refit, self.precision = seed, refit, precision
        self.pooled = Pooled(base, link=link, prep=prep, seed=seed)
        self.episodes = {
            "tasks": tasks,
            "support": support,
            "query": query,
            "gap": gap,
            "split": split,
            "seed": seed,
        }

    # ---- training -----------------------------------------------------------------------------

    def fit(self, train: Panel) -> Remainder:
        """Fit the pooled model, choose the form and train its head."""
        self.pooled.fit(train)
        self._train = train
        self._again: tuple[Pooled, Panel] | None = None
        panel, offset = self._seen(train)
        self._scale = (float(offset.mean()), float(offset.std()) or 1.0)
        torch.manual_seed(self.seed)
        self.losses: dict[str, tuple[float, float]] = {}
        self.form, self.firmer = self._chosen(panel, offset)
        self.head: Any = None
        self.smear = None if self.pooled.target is None else self.pooled.target.smear
        if self.form != "pooled":
            shown = self._shown(panel, offset, self.form)
            self.head = firmed(self._trained(shown, offset, self.form), self.firmer)
            self._learn_smear(shown, offset)
        return self

    def _seen(self, panel: Panel) -> tuple[Panel, Array]:
        """The panel with prepared features and seen targets, and its offset."""
        prepared = self.pooled.prep(panel)
        offset = self.pooled.offset(panel, prepared.x)
        if panel.y is None:
            return prepared, offset
        return prepared._changed(y=self.pooled.targets(panel)), offset

    def _shown(self, panel: Panel, offset: Array, form: str) -> Panel:
        """The panel with the features that the head of a form takes."""
        if form != "score":
            return panel
        return panel.with_features(self._score(offset), ["score"])

    def _score(self, offset: Array) -> Array:
        centre, scale = self._scale
        found: Array = (offset - np.float32(centre)) / np.float32(scale)
        return np.clip(found, -5, 5)

    def _chosen(self, panel: Panel, offset: Array) -> tuple[str, float]:
        """The form and its firmness, by later rows of entities that no head was trained on.

        A remainder has to be better than the pooled model by its own standard error over entities,
        and no worse in the quarter of the blocks of time that is worst for it.
        """
        rest = [f for f in self.forms if f != "pooled"]
        if not rest or len(panel.entities) < 8:
            return self.forms[0] if len(self.forms) == 1 else (*rest, "pooled")[0], 1.0
        held = np.zeros(len(panel.entities), bool)
        order = np.random.default_rng(self.seed).permutation(len(held))
        held[order[: max(len(held) // 4, min(5, len(held) // 2))]] = True
        rows = np.repeat(held, panel.sizes)
        best = ("pooled", 1.0) if "pooled" in self.forms else (rest[0], 1.0)
        least = 0.0 if "pooled" in self.forms else np.inf
        for form in rest:
            shown = self._shown(panel, offset, form)
            head = self._trained(shown.where(~rows), offset[~rows], form)
            for firmer in FIRMER:
                check = self._checked(firmed(head, firmer), shown.where(rows), offset[rows])
                self.losses.setdefault("pooled", (check.pooled, 0.0))
                known = self.losses.get(form, (np.inf, 0.0))
                self.losses[form] = min(known, (check.pooled + check.gap, check.error))
                safe = check.worst <= 0 or "pooled" not in self.forms
                if safe and check.gap + check.error * ("pooled" in self.forms) < least:
                    best, least = (form, firmer), check.gap + check.error
        return best

    @torch.no_grad()
    def _checked(self, head: Any, panel: Panel, offset: Array) -> Check:
        """A head beside the pooled model, on tasks of a panel."""
        tasks = min(self.episodes["tasks"], len(panel.entities))
        episodes = panel.episodes(**{**self.episodes, "tasks": tasks, "batches": _CHECKED})
        found: list[tuple[Array, ...]] = []
        for batch in episodes:
            given, asked = batch.take(offset)
            models = head.adapt(batch.xs, batch.ys, support_offset=given)
            p = rows_of(models(batch.xq, offset=asked))
            found.append((p, rows_of(asked), rows_of(batch.yq), batch.query_rows))
        p, base, y, rows = (np.concatenate(v) for v in zip(*found, strict=True))
        ours, theirs = self._loss(p, y), self._loss(base, y)
        codes = panel.codes[rows]  # an entity's tasks share rows: they count as one
        gaps = np.bincount(codes, ours - theirs) / np.maximum(np.bincount(codes), 1)
        gaps = gaps[np.bincount(codes) > 0]
        worst = 0.0
        if panel.times is not None:
            rank = np.unique(panel.times[rows], return_inverse=True)[1]
            block = rank * _BLOCKS // (rank.max() + 1)
            each = np.bincount(block, ours - theirs) / np.maximum(np.bincount(block), 1)
            there = np.isin(block, np.argsort(each)[-max(len(each) // 4, 1) :])
            gap = (ours - theirs)[there]
            worst = float(gap.mean() - gap.std() / len(gap) ** 0.5)
        error = float(gaps.std() / len(gaps) ** 0.5)
        return Check(float(theirs.mean()), float((ours - theirs).mean()), error, worst)

    def _loss(self, raw: Array, y: Array) -> Array:
        if self.pooled.target is None:
            return np.asarray(np.logaddexp(0, raw) - y * raw)
        if self.pooled.link == "log":  # QLIKE, of predictions that are right on average
            rest = (y - raw).astype(np.float64) * self.pooled.target.scale
            smear = np.exp(rest).mean()
            return np.asarray(np.exp(rest) / smear - rest + np.log(smear) - 1)
        return np.asarray((raw - y) ** 2)

    def _trained(self, panel: Panel, offset: Array, form: str) -> BayesianHead | RidgeHead:
        """A head, trained on episodes of a panel; without rows it predicts what the base does."""
        torch.manual_seed(self.seed)
        width = panel.x.shape[1]
        encoder: nn.Module = nn.Identity()
        features = width
        if form == "network":
            layers = (nn.Linear(width, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH), nn.Tanh())
            encoder, features = nn.Sequential(*layers), _WIDTH
        if self.pooled.target is None:
            head: BayesianHead | RidgeHead = RidgeHead(
                encoder,
                features=features,
                outputs=1,
                loss="bce_with_logits",
                precision=self.precision or 30.0,
            )
        else:
            head = BayesianHead(
                encoder, features=features, outputs=1, precision=self.precision or 100.0
            )
        head.prior_mean.requires_grad_(False)
        by = [p for p in head.parameters() if p.requires_grad]
        adam = torch.optim.Adam(by, self.lr if form != "network" else self.lr / 5)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(self.steps, 1), self.lr / 10)
        for batch in panel.episodes(**self.episodes, batches=self.steps):
            adam.zero_grad()
            given, asked = batch.take(offset)
            head(*batch, support_offset=given, query_offset=asked).loss.backward()
            nn.utils.clip_grad_norm_(by, 1.0)
            adam.step()
            rate.step()
        return head

    def _learn_smear(self, shown: Panel, offset: Array) -> None:
        """By what factor exponentials of predictions are too small, from rows not adapted to."""
        if self.pooled.link != "log":
            return
        target = self.pooled.target
        assert target is not None and self.head is not None
        sums = np.zeros(2)  # of the ratio of targets to predictions, adapted and not, on one sample
        for batch in shown.episodes(**self.episodes, batches=2 * _CHECKED):
            given, asked = batch.take(offset)
            models = self.head.adapt(batch.xs, batch.ys, support_offset=given)
            y = rows_of(batch.yq).astype(np.float64)
            for i, p in enumerate((rows_of(models(batch.xq, offset=asked)), rows_of(asked))):
                sums[i] += np.exp((y - p) * target.scale).sum()
        self.smear = target.smear * sums[0] / sums[1]  # of all rows, by a paired ratio

    # ---- use ----------------------------------------------------------------------------------

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """[rows of query], with what can be learned of its entities' history."""
        first = self.pooled
        try:
            if history is not None and self.refit:
                self.pooled, history = self._fitted_again(history)
            return self._predicted(history, query)
        finally:
            self.pooled = first

    def _fitted_again(self, history: Panel) -> tuple[Pooled, Panel]:
        """The pooled model of training rows and a history, and that history as its training rows.

        So the history gets the offsets of models without its entity, as training rows did.
        """
        rest = ~np.isin(self._train.labels, history.entities)
        if not rest.any():
            return self.pooled, history
        known = stacked(self._train.where(rest), history)
        if self._again is None:
            first = self.pooled
            again = Pooled(first.base, link=first.link, prep=first.options, seed=self.seed)
            # a head on all features was trained on these; one on the score does not mind others
            prep = first.prep if self.form in ("linear", "network") else None
            self._again = again.fit(known, prep, first.target), known
        again, first_known = self._again
        mine = np.isin(first_known.labels, history.entities)
        same = len(first_known) == len(known)
        return again, first_known.where(mine) if same else history

    def _predicted(self, history: Panel | None, query: Panel) -> Array:
        panel, offset = self._seen(query)
        if history is None or self.head is None:
            return self.pooled.back(offset[:, 0])
        if self.history is not None:
            history = history.last(self.history)
        known = _known(history, query.entities)
        shown = self._shown(panel, offset, self.form)
        own, own_offset = None, np.zeros((0, 1), np.float32)
        if known is not None:
            own, own_offset = self._seen(known)
            own = self._shown(own, own_offset, self.form)
        xs, ys = history_of(own, query.entities, shown.x.shape[1])
        models = self.head.adapt(xs, ys, support_offset=Ragged(own_offset, xs.sizes))
        found = models(Ragged(shown.x, query.sizes), offset=Ragged(offset, query.sizes))
        return self.pooled.back(rows_of(found), self.smear)


@torch.no_grad()
def firmed(head: BayesianHead | RidgeHead, firmer: float) -> BayesianHead | RidgeHead:
    """A copy whose prior precision is so many times as large."""
    if firmer == 1:
        return head
    twin = copy.deepcopy(head)
    if isinstance(twin, RidgeHead):
        twin.log_precision.add_(math.log(firmer))
    else:
        diagonal = torch.diag(twin.prior_root.diagonal() + math.log(firmer) / 2)
        twin.prior_root.copy_(twin.prior_root.tril(-1) * firmer**0.5 + diagonal)
    return twin


def rows_of(values: Any) -> Array:
    """[sum of rows] of what tasks have, in any of their forms, of one output."""
    if isinstance(values, Ragged):
        return np.asarray(values.values).reshape(-1)
    if isinstance(values, (list, tuple)):
        return np.concatenate([np.asarray(v).reshape(-1) for v in values])
    return np.asarray(values).reshape(-1)
