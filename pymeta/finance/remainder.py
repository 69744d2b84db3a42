"""`Remainder`: a pooled model, and for each entity what it leaves, as far as that can be learned.

    output = pooled(x) + w' f(x)        w = 0 for an entity without rows

The head w is exact for each entity: the posterior of a linear model (ridge or logistic) whose prior
was learned over the training entities, so that an entity of few rows stays near the pooled model.
What f is, or whether there is a remainder at all, is chosen by the loss of later rows of training
entities that the choice has not been trained on:

    pooled    no remainder
    level     1: a level for each entity
    score     the pooled model's own output and 1: a level and a slope for each entity
    linear    all features and 1
    network   16 features of a network, trained through the heads
    echo      a level, and what comes back: a Gaussian process over time (`pymeta.finance.echo`)

Where tasks are of fixed sizes in time, any but the last fades as the rows it was adapted to grow
older than those of training tasks (`pymeta.finance.fading`).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from pymeta.data import Panel, Ragged
from pymeta.data.draw import is_whole
from pymeta.finance.checks import Check, Found, check_of, found_by, is_walk
from pymeta.finance.common import Common
from pymeta.finance.echo import Echo
from pymeta.finance.fading import faded, reach
from pymeta.finance.offsets import Offsets, rows_of
from pymeta.finance.pooled import Pooled
from pymeta.finance.walk import stacked
from pymeta.learners import BayesianHead, RidgeHead
from pymeta.metrics.models import history_of
from pymeta.tasks.groups import Array

FORMS = ("pooled", "level", "score", "linear", "network")
ECHO = "echo"
Head: TypeAlias = BayesianHead | RidgeHead | Echo
_FOLDS = 3  # of entities, by which forms are judged
_SURE = 1.645  # standard errors: by chance, one in twenty is better by as much
_SMEARED = 24  # batches of tasks
FIRMER = (1.0, 4.0, 16.0)  # what a head's precision may be multiplied by
_WIDTH = 16


class Remainder:
    """A model for `pymeta.metrics.compare`: the pooled model and each entity's remainder.

    Args:
        base: the pooled model: "linear", "lightgbm", "blend", or an estimator of scikit-learn.
        link: "log" for targets > 0 whose predictions have to be.
        forms: what may be adapted, of "pooled", "level", "score", "linear", "network" and, for
            numbers of a panel with times, "echo", which is not among the default ones.
        support: rows of a training task that are adapted to: a number, or (least, most).
        query: rows of it that are predicted.
        gap: rows between the two, or a timedelta64, as in `Panel.episodes`.
        split: "time" or "rows", as there.
        steps: training steps of a head.
        tasks: of each step.
        lr: Adam's step size, which falls to a tenth.
        precision: the heads' prior precision at the beginning of training; None for 100 (30 for two
            classes).
        history: at most so many last rows of an entity are adapted to; None for all. Of several
            numbers one is chosen, and training tasks have as many rows of support.
        relative: whether entities are adapted to what their targets have beside those of all
            entities at the same time (`pymeta.finance.common`): for numbers, of a panel with times.
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
        history: int | Sequence[int] | None = None,
        relative: bool = False,
        refit: bool = False,
        prep: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        """Check and keep the settings."""
        unknown = [f for f in forms if f not in (*FORMS, ECHO)]
        if unknown or not forms:
            raise ValueError(f"forms: expected some of {(*FORMS, ECHO)}, got {list(forms)}")
        self.forms, self.steps, self.lr, self.relative = tuple(forms), steps, lr, relative
        self.histories = tuple(history) if isinstance(history, Sequence) else (history,)
        if not self.histories:
            raise ValueError("history: expected a number of rows, or some to choose from, got none")
        self.history = self.histories[0]
        self.adapts = self.forms != ("pooled",)  # which has nothing to adapt
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
        if ECHO in self.forms and self.pooled.target is None:
            raise ValueError("forms: expected no 'echo' for a target of two classes")
        self._train = train
        self._again: tuple[Pooled, Panel, Common | None] | None = None
        panel, offset = self._seen(train)
        self._scale = (float(offset.mean()), float(offset.std()) or 1.0)
        self._common = self._learned_common(panel, offset)
        both = self._both(panel, offset)
        self._far: float | None = None
        if train.times is not None and is_walk(panel, self.episodes):
            last = self.episodes["gap"] + self.episodes["query"]
            self._far = reach(train.times, last)
        torch.manual_seed(self.seed)
        self.losses: dict[str, tuple[float, float]] = {}
        self.form, self.firmer, self.history = self._chosen(panel, both)
        self.head: Any = None
        self.smear = None if self.pooled.target is None else self.pooled.target.smear
        if self.form != "pooled":
            self.head = firmed(self._trained(panel, both, self.form), self.firmer)
            self._learn_smear(self._shown(panel, offset, self.form, self.head), both)
        return self

    def _learned_common(self, panel: Panel, offset: Array) -> Common | None:
        """What training rows have in common, of a panel with seen targets."""
        if not self.relative:
            return None
        if self.pooled.target is None:
            raise ValueError("relative: expected False for a target of two classes, got True")
        return Common(panel.need_times("relative"), panel.need_y() - offset[:, 0])

    def _both(self, panel: Panel, offset: Array) -> Offsets:
        """The offsets of rows with seen targets."""
        if self._common is None:
            return Offsets(offset, offset)
        residual = panel.need_y() - offset[:, 0]
        common = self._common.of(panel.need_times("relative"), residual)
        return Offsets(offset, offset + common.astype(np.float32)[:, None])

    def _episodes(self, tasks: int | None = None) -> dict[str, Any]:
        """The options of training tasks: with a choice of histories, as many rows as chosen."""
        chosen = {} if len(self.histories) == 1 else {"support": self.history}
        return {**self.episodes, **chosen, **({} if tasks is None else {"tasks": tasks})}

    def _seen(self, panel: Panel) -> tuple[Panel, Array]:
        """The panel with prepared features and seen targets, and its offset."""
        prepared = self.pooled.prep(panel)
        offset = self.pooled.offset(panel, prepared.x)
        if panel.y is None:
            return prepared, offset
        return prepared._changed(y=self.pooled.targets(panel)), offset

    def _shown(self, panel: Panel, offset: Array, form: str, head: Head | None = None) -> Panel:
        """The panel with the features that the head of a form takes."""
        if isinstance(head, Echo):
            return panel.with_features(head.clock(panel.need_times("forms='echo'")), ["time"])
        if form == "level":
            return panel.with_features(np.ones((len(panel), 1), np.float32), ["level"])
        if form != "score":
            return panel
        return panel.with_features(self._score(offset), ["score"])

    def _score(self, offset: Array) -> Array:
        centre, scale = self._scale
        found: Array = (offset - np.float32(centre)) / np.float32(scale)
        return np.clip(found, -5, 5)

    def _chosen(self, panel: Panel, offsets: Offsets) -> tuple[str, float, int | None]:
        """The form, its firmness and its history, by later rows of entities that no head has seen.

        A remainder has to be significantly better than the pooled model over entities (at 5 %, on
        one side), and no worse in the most stressed quarter of the blocks of time.
        """
        rest = [f for f in self.forms if f != "pooled"]
        if not rest or len(panel.entities) < 8:
            form = self.forms[0] if len(self.forms) == 1 else (*rest, "pooled")[0]
            return form, 1.0, self.history
        folds = self._folds(len(panel.entities))
        may_not = "pooled" in self.forms
        best = ("pooled" if may_not else rest[0], 1.0, self.histories[0])
        least = 0.0 if may_not else np.inf
        for history, form in itertools.product(self.histories, rest):
            self.history = history
            for firmer, check in self._checks(panel, offsets, form, folds).items():
                self.losses.setdefault("pooled", (check.pooled, 0.0))
                known = self.losses.get(form, (np.inf, 0.0))
                self.losses[form] = min(known, (check.pooled + check.gap, check.error))
                sure = check.gap + _SURE * check.error < 0 and check.stressed <= 0
                value = check.gap + check.error * may_not
                if (sure or not may_not) and value < least:
                    best, least = (form, firmer, history), value
        return best

    def _folds(self, entities: int) -> list[Array]:
        """Which entities are held out together, bool [entities] each."""
        order = np.random.default_rng(self.seed).permutation(entities)
        return [np.isin(np.arange(entities), order[k::_FOLDS]) for k in range(_FOLDS)]

    def _checks(
        self, panel: Panel, offsets: Offsets, form: str, folds: list[Array]
    ) -> dict[float, Check]:
        """A form by its firmness: every fold's entities with a head of the others."""
        most = None if len(self.histories) == 1 else max(h or 0 for h in self.histories)
        found: dict[float, list[Found]] = {}
        for held in folds:
            rows = np.repeat(held, panel.sizes)
            head = self._trained(panel.where(~rows), offsets.where(~rows), form)
            shown = self._shown(panel, offsets.asked, form, head)
            options = self._episodes(min(self.episodes["tasks"], int(held.sum())))
            for firmer in FIRMER:
                part = shown.where(rows), offsets.where(rows), options, most
                own = found_by(firmed(head, firmer), *part, self._loss, self._raw)
                found.setdefault(firmer, []).append(own)
        return {firmer: check_of(parts) for firmer, parts in found.items()}

    def _raw(self, y: Array) -> Array:
        """Seen targets in their own units."""
        target = self.pooled.target
        return y if target is None else target.back(y) / target.smear

    def _loss(self, raw: Array, y: Array) -> Array:
        if self.pooled.target is None:
            return np.asarray(np.logaddexp(0, raw) - y * raw)
        if self.pooled.link == "log":  # QLIKE, of predictions that are right on average
            rest = (y - raw).astype(np.float64) * self.pooled.target.scale
            smear = np.exp(rest).mean()
            return np.asarray(np.exp(rest) / smear - rest + np.log(smear) - 1)
        return np.asarray((raw - y) ** 2)

    def _trained(self, panel: Panel, offsets: Offsets, form: str) -> Head:
        """A head, trained on episodes of a panel; without rows it predicts what the base does.

        What is common to all at a time is taken out of query rows, too: no head can foresee it.
        """
        if form == ECHO:
            return self._echo(panel, offsets)
        torch.manual_seed(self.seed)
        panel = self._shown(panel, offsets.asked, form)
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
                bias=form != "level",
            )
        else:
            head = BayesianHead(
                encoder,
                features=features,
                outputs=1,
                precision=self.precision or 100.0,
                bias=form != "level",
            )
        head.prior_mean.requires_grad_(False)
        by = [p for p in head.parameters() if p.requires_grad]
        adam = torch.optim.Adam(by, self.lr if form != "network" else self.lr / 5)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(self.steps, 1), self.lr / 10)
        for batch in panel.episodes(**self._episodes(), batches=self.steps):
            adam.zero_grad()
            given, asked = batch.take(offsets.given)
            head(*batch, support_offset=given, query_offset=asked).loss.backward()
            nn.utils.clip_grad_norm_(by, 1.0)
            adam.step()
            rate.step()
        return head

    def _echo(self, panel: Panel, offsets: Offsets) -> Echo:
        """The head of what comes back, for tasks as they are."""
        target = self.pooled.target
        assert target is not None
        options = self._episodes()
        support, query = (int(np.max(options[name])) for name in ("support", "query"))
        later = query + (options["gap"] if is_whole(options["gap"]) else 0)
        log = target.scale if self.pooled.link == "log" else None
        return Echo.learned(panel, offsets.given, support, later, log)

    def _learn_smear(self, shown: Panel, offsets: Offsets) -> None:
        """By what factor exponentials of predictions are too small, from rows not adapted to."""
        if self.pooled.link != "log":
            return
        target = self.pooled.target
        assert target is not None and self.head is not None
        sums = np.zeros(2)  # of the ratio of targets to predictions, adapted and not, on one sample
        for batch in shown.episodes(**self._episodes(), batches=_SMEARED):
            given, asked = offsets.take(batch)
            models = self.head.adapt(batch.xs, batch.ys, support_offset=given)
            y = rows_of(batch.yq).astype(np.float64)
            for i, p in enumerate((rows_of(models(batch.xq, offset=asked)), rows_of(asked))):
                sums[i] += np.exp((y - p) * target.scale).sum()
        self.smear = target.smear * sums[0] / sums[1]  # of all rows, by a paired ratio

    # ---- use ----------------------------------------------------------------------------------

    def predict(self, history: Panel | None, query: Panel) -> Array:
        """[rows of query], with what can be learned of its entities' history."""
        first = self.pooled, self._common
        try:
            if history is not None and self.refit:
                history = self._fitted_again(history)
            return self._predicted(history, query)
        finally:
            self.pooled, self._common = first

    def _fitted_again(self, history: Panel) -> Panel:
        """Take the pooled model of training rows and a history; that history as its training rows.

        So the history gets the offsets of models without its entity, as training rows did.
        """
        rest = ~np.isin(self._train.labels, history.entities)
        if not rest.any():
            return history
        if self._again is None:
            known = stacked(self._train.where(rest), history)
            first = self.pooled
            again = Pooled(first.base, link=first.link, prep=first.options, seed=self.seed)
            # a head on all features was trained on these; one on the score does not mind others
            prep = first.prep if self.form in ("linear", "network") else None
            self.pooled = again.fit(known, prep, first.target)
            self._again = again, known, self._learned_common(*self._seen(known))
        self.pooled, first_known, self._common = self._again
        mine = np.isin(first_known.labels, history.entities)
        same = len(first_known) == int(rest.sum()) + len(history)
        return first_known.where(mine) if same else history

    def _predicted(self, history: Panel | None, query: Panel) -> Array:
        panel, offset = self._seen(query)
        if history is None or self.head is None:
            return self.pooled.back(offset[:, 0])
        if self.history is not None:
            history = history.last(self.history)
        shown = self._shown(panel, offset, self.form, self.head)
        own, own_offset = self._seen(history)
        given = self._both(own, own_offset).given
        mine = np.isin(own.labels, query.entities)
        given_rows = self._shown(own, own_offset, self.form, self.head)
        known = given_rows.where(mine) if mine.any() else None
        xs, ys = history_of(known, query.entities, shown.x.shape[1])
        models = self.head.adapt(xs, ys, support_offset=Ragged(given[mine], xs.sizes))
        found = models(Ragged(shown.x, query.sizes), offset=Ragged(offset, query.sizes))
        raw = rows_of(found)
        if self._far is not None and self.form != ECHO:  # which knows by itself how old rows are
            asked = offset[:, 0]
            raw = asked + faded(history, query, self._far) * (raw - asked)
        return self.pooled.back(raw, self.smear)


@torch.no_grad()
def firmed(head: Head, firmer: float) -> Head:
    """A copy whose prior precision is so many times as large."""
    if firmer == 1:
        return head
    if isinstance(head, Echo):
        return head.firmed(firmer)
    twin = copy.deepcopy(head)
    if isinstance(twin, RidgeHead):
        twin.log_precision.add_(math.log(firmer))
    else:
        diagonal = torch.diag(twin.prior_root.diagonal() + math.log(firmer) / 2)
        twin.prior_root.copy_(twin.prior_root.tril(-1) * firmer**0.5 + diagonal)
    return twin
