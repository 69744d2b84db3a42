"""How far groups may go from what they share: chosen on the later rows of groups held out.

Some groups are kept from training (or all in turn, by folds). Each is adapted to its first rows,
in every way that is open (from which start, for how many epochs, pulled back how strongly, or not
at all), and judged by its later rows; where times are known, by rows later than all of training.
Of all ways that are not told apart from the best (one standard error of the paired difference, over
groups; for not adapting, two) the one is taken whose predictions move least: where adaptation does
not clearly help, nothing is adapted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pymeta.sklearn.episodes import Rows
from pymeta.sklearn.gate import Prior, gains, prior_of
from pymeta.sklearn.parameters import Parameters
from pymeta.sklearn.starts import How, Models, Start
from pymeta.spec.losses import Loss
from pymeta.spec.measure import row_losses
from pymeta.spec.show import counted
from pymeta.tasks.groups import Array

_LEAST, _MANY, _MOST = 6, 24, 200  # groups
_FOLDS = 3
_LEAST_ROWS = 4  # of a group, for its later ones to say anything


@dataclass(frozen=True, repr=False)
class Way:
    """A way for groups to have models.

    Attributes:
        start: the name of where they begin.
        how: how they are adapted; None where they are not.
        loss: the mean loss of the held-out groups' later rows.
        error: the standard error of its difference from the best way.
        moved: the mean distance of predictions from those of the first start.
    """

    start: str
    how: How | None
    loss: float = np.nan
    error: float = np.nan
    moved: float = np.nan

    def __repr__(self) -> str:
        """As in `<pooled, 20 epochs, anchor_rows=80: loss 0.4378>`."""
        words = [self.start, "not adapted"]
        if self.how is not None:
            words[1] = counted(self.how.epochs, "epoch")
            strength = f"anchor={self.how.anchor:g}" if self.how.anchor else ""
            if self.how.anchor_rows:
                strength = f"anchor_rows={self.how.anchor_rows:g}"
            words += [strength] if strength else []
        return f"<{', '.join(words)}: loss {self.loss:.4g}>"


@dataclass(frozen=True, repr=False)
class Choice:
    """What was chosen.

    Attributes:
        way: for groups with rows of their own.
        rest: the start whose model all other rows get.
        prior: what groups gain by the way over `rest`; None where that is not known.
        ways: all that were compared.
    """

    way: Way
    rest: str
    prior: Prior | None = None
    ways: tuple[Way, ...] = ()

    def __repr__(self) -> str:
        compared = f" of {counted(len(self.ways), 'way')}" if self.ways else ""
        return f"Choice({self.way}{compared}; without a model of its own: {self.rest})"


def is_choosable(sizes: Sequence[int] | Array) -> bool:
    """Whether groups of so many rows are enough to hold some out."""
    return bool((np.asarray(sizes) >= _LEAST_ROWS).sum() >= _LEAST)


def folds(members: Sequence[Array], rng: Any) -> list[tuple[list[int], list[int]]]:
    """Numbers of the groups to train with and to judge by, for each fold; none of few groups.

    A third of many groups is held out once, at most 200; of fewer, each is in one of three folds.
    """
    able = [g for g, m in enumerate(members) if len(m) >= _LEAST_ROWS]
    if not is_choosable([len(m) for m in members]):
        return []
    order = rng.permutation(able)
    if len(able) >= _MANY:
        parts = [order[: min(len(able) // _FOLDS, _MOST)]]
    else:
        parts = np.array_split(order, _FOLDS)
    found = []
    for part in parts:
        judges = {int(g) for g in part}
        found.append(([g for g in range(len(members)) if g not in judges], sorted(judges)))
    return found


def halves(members: Sequence[Array], shuffle: bool, rng: Any) -> tuple[list[Array], list[Array]]:
    """The first and the later rows of groups; at random where order means nothing."""
    early, later = [], []
    for index in members:
        ordered = rng.permutation(index) if shuffle else index
        cut = (len(index) + 1) // 2
        early.append(np.sort(ordered[:cut]))
        later.append(np.sort(ordered[cut:]))
    return early, later


def sides_of(members: Sequence[Array], cut: int) -> tuple[list[Array], list[Array]]:
    """The rows of groups before the row `cut`, and from it on."""
    return [m[m < cut] for m in members], [m[m >= cut] for m in members]


def judged_over_time(members: Sequence[Array], cut: int | None) -> list[Array] | None:
    """The members, of those groups alone that have rows on both sides of a cut in time.

    Rows of one time have much in common in all groups. What was learned from others' rows of a time
    looks better on it than it will on times to come, so that where enough groups go on over the
    cut, training sees nothing behind it, and what lies behind it judges. None where too few do.
    """
    if cut is None:
        return None
    least = _LEAST_ROWS // 2
    pairs = zip(members, *sides_of(members, cut), strict=True)
    some = [m if min(len(a), len(b)) >= least else m[:0] for m, a, b in pairs]
    return some if is_choosable([len(m) for m in some]) else None


def outputs_of(models: Models, rows: Rows, members: Sequence[Array]) -> Array:
    """The outputs, offsets included, of T models (or of one) on their sets of rows, joined."""
    index = np.concatenate(members)
    if len(models) == 1:
        found = models([rows.x[index]])[0]
    else:
        found = np.concatenate(models([rows.x[m] for m in members]))
    return found if rows.offset is None else found + rows.offset[index]


class Judge:
    """The later rows of the groups held out, and what they say of models.

    Attributes:
        y: [rows, ...], their targets.
        weights: [rows].
        codes: [rows], whose each is.
        groups: how many groups there are.
    """

    def __init__(self, loss: Loss, rows: Rows, later: Sequence[Array]) -> None:
        """Note the rows."""
        self.loss, index = loss, np.concatenate(later)
        self.y, self.groups = rows.y[index], len(later)
        self.weights = np.ones(len(index)) if rows.weights is None else rows.weights[index]
        self.codes = np.repeat(np.arange(len(later)), [len(m) for m in later])

    def losses(self, outputs: Array) -> Array:
        """Of outputs [rows, out] the losses [rows]; what is not finite is as bad as can be."""
        found = row_losses(self.loss, outputs, self.y)
        return np.where(np.isfinite(found), found, np.inf)

    def of_groups(self, losses: Array) -> Array:
        """The sums over groups of the weighted losses."""
        return np.bincount(self.codes, losses * self.weights, self.groups)

    def error(self, sums: Array, best: Array) -> float:
        """The standard error, over groups, of the difference of two means over rows."""
        rows = np.bincount(self.codes, self.weights, self.groups)
        difference = sums - best
        spread = difference - difference.sum() / rows.sum() * rows
        scale = self.groups / max(self.groups - 1, 1)
        return float(np.sqrt(scale * np.square(spread).sum()) / rows.sum())


def ways_of(settings: Parameters, starts: Mapping[str, Start], adapted: Sequence[str]) -> list[Way]:
    """All that is open: every start as it is, and those to adapt from with each strength."""
    ways = [Way(name, None) for name in starts]
    for name in adapted:
        ways += [Way(name, how) for how in starts[name].hows(settings)]
    return ways


def choose(
    settings: Parameters,
    loss: Loss,
    rows: Rows,
    members: Sequence[Array],
    learn: Callable[[list[Array]], Mapping[str, Start]],
    adapted: Sequence[str],
    rng: Any,
    seed: int,
    cut: int | None = None,
) -> Choice | None:
    """The way for groups; None where there are too few groups to hold some out.

    Args:
        settings: of the estimator.
        loss: by which ways are judged.
        rows: all that there are to learn from.
        members: the rows of each group.
        learn: learns the starts, by name, from the rows of some groups; the safest comes first.
        adapted: the names of those to adapt from.
        rng: draws the groups held out.
        seed: of adaptation.
        cut: the first row of the times to judge by, where rows are in the order of time.
    """
    able = judged_over_time(members, cut)
    parts = folds(members if able is None else able, rng)
    if not parts:
        return None
    outputs: dict[Way, list[Array]] = {}
    judged: list[Array] = []
    for train, judges in parts:
        known, own = [members[g] for g in train], [members[g] for g in judges]
        if able is not None and cut is not None:
            known = [m for m in sides_of(known, cut)[0] if len(m)]
        starts = learn(known)
        if able is not None and cut is not None:
            early, later = sides_of(own, cut)
        else:
            early, later = halves(own, settings.is_shuffled, rng)
        support = rows.lists(early)
        judged += later
        for way in ways_of(settings, starts, adapted):
            models = starts[way.start].shared()
            if way.how is not None:
                models = starts[way.start].adapt(settings, way.how, support, seed)[0]
            outputs.setdefault(way, []).append(outputs_of(models, rows, later))
    judge = Judge(loss, rows, judged)
    joined = {way: np.concatenate(found) for way, found in outputs.items()}
    first = next(iter(joined.values()))
    moved = {way: float(np.abs(found - first).mean()) for way, found in joined.items()}
    return _chosen(
        judge, [(replace(w, moved=moved[w]), judge.losses(o)) for w, o in joined.items()]
    )


def _chosen(judge: Judge, found: list[tuple[Way, Array]]) -> Choice:
    way, losses, ways = _safest(judge, found)
    unadapted = [pair for pair in found if pair[0].how is None]
    rest, without, _ = _safest(judge, unadapted)
    prior = None
    if way.how is not None:
        prior = prior_of(gains(without, losses, judge.codes, judge.groups))
    return Choice(way, rest.start, prior, tuple(ways))


def _safest(judge: Judge, found: list[tuple[Way, Array]]) -> tuple[Way, Array, list[Way]]:
    """Of those within one standard error of the best, the one that moves least; its losses."""
    sums = [judge.of_groups(losses) for _, losses in found]
    best = min(range(len(found)), key=lambda i: float(sums[i].sum()))
    ways = []
    with np.errstate(invalid="ignore"):  # of infinite losses
        for (way, _), own in zip(found, sums, strict=True):
            error = judge.error(own, sums[best])
            ways.append(replace(way, loss=float(own.sum() / judge.weights.sum()), error=error))
    near = [i for i, way in enumerate(ways) if i == best or way.loss - ways[best].loss <= way.error]
    chosen = min(near, key=lambda i: (ways[i].moved, i))
    return ways[chosen], found[chosen][1], ways
