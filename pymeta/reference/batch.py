"""All tasks of a call: together by `torch.vmap`, or one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pymeta.reference.blame import rows_named
from pymeta.reference.loss import shifted, task_loss
from pymeta.reference.modules import Applied, Parameters, applied
from pymeta.reference.task import Set, adapt_task, task_outcome, that_count
from pymeta.reference.validation import Validation, weighs
from pymeta.spec.history import History
from pymeta.spec.inner import Adaptation, InnerLoop
from pymeta.spec.once import REPTILE, once
from pymeta.spec.running import Norms
from pymeta.spec.schedule import Schedule
from pymeta.tasks.task_set import TaskSet
from pymeta.tasks.values import leaves_out, weighing_rows

# ---- all tasks --------------------------------------------------------------------------------


class Own(NamedTuple):
    """What the tasks have of their own, in place of what they share; T of each.

    Attributes:
        anchor: [T], the strength of each task's pull towards its start.
        lr: [T, rows, columns].
        start: {name: [T, ...]}.
    """

    anchor: Tensor | None = None
    lr: Tensor | None = None
    start: Mapping[str, Tensor] = {}  # never changed

    def of_all(self) -> dict[str, Any]:
        """What there is."""
        given = {"anchor": self.anchor, "lr": self.lr, "start": dict(self.start) or None}
        return {name: value for name, value in given.items() if value is not None}

    def of_task(self, t: int) -> dict[str, Any]:
        """What one task has."""
        own = self.of_all()
        start = {name: value[t] for name, value in own.pop("start", {}).items()}
        return {**{name: value[t] for name, value in own.items()}, "start": start}


NOTHING_OWN = Own()


def _with_strengths(own: Own, inner: InnerLoop, support: TaskSet) -> Own:
    """With the strengths that depend on how many rows of a task weigh something."""
    if own.anchor is not None or not inner.anchor.rows:
        return own
    counts = weighing_rows(support, inner.loss)
    return own._replace(anchor=inner.lr.new_tensor([inner.anchor.of(n) for n in counts]))


def _whole(parameters: Mapping[str, Tensor], mine: Mapping[str, Any]) -> Parameters:
    """All parameters that a task starts with, given what it has of its own."""
    return {**parameters, **mine.get("start", {})}


def _recipe(inner: InnerLoop, own: dict[str, Any]) -> InnerLoop:
    """The recipe with a task's own rates."""
    return replace(inner, lr=own["lr"]) if "lr" in own else inner


def _together(
    model: Applied,
    one: Callable[..., Any],
    sets: Sequence[TaskSet],
    own: dict[str, Any] | None = None,
) -> Any:
    """`one` over all tasks at once, or None where that cannot be done.

    `own` is a tree of tensors [T, ...], a last argument of `one`, where it has one.
    """
    if not all(s.uniform for s in sets):
        return None
    arguments: tuple[Any, ...] = tuple((s.x, s.y, s.weights, s.offset) for s in sets)
    dims: tuple[Any, ...] = tuple(tuple(None if v is None else 0 for v in a) for a in arguments)
    if own is not None:
        arguments, dims = (*arguments, own), (*dims, 0 if own else None)
    return model.together(one, dims, *arguments)


def _connected_zero(like: Tensor, tensors: Iterable[Tensor | None]) -> Tensor:
    """A 0 whose gradient by all of these is 0: the loss over no tasks."""
    parts = [v.flatten()[:0].sum().to(like.dtype) for v in tensors if v is not None]
    return torch.stack(parts).sum()


def _split(parameters: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Parameters, Parameters]:
    adapted = {name: parameters[name] for name in names}
    return adapted, {n: p for n, p in parameters.items() if n not in adapted}


class Evaluated(NamedTuple):
    """What `evaluate` returns, differentiable by everything that went in.

    Attributes:
        losses: [T].
        predictions: [T, rows, out] where all tasks have equal sizes, otherwise a list of T
            tensors [rows_t, out].
        step_losses: [steps, T]; None without weights of the steps.
        statistics: [T, width], those of the norms (pymeta/spec/running.py), where there are some.
    """

    losses: Tensor
    predictions: list[Tensor] | Tensor
    step_losses: Tensor | None
    statistics: Tensor | None


def evaluate(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    inner: InnerLoop,
    support: TaskSet,
    query: TaskSet,
    own: Own = NOTHING_OWN,
    step_weights: Tensor | None = None,
    norms: Norms = (),
    by_support: bool = False,
) -> Evaluated:
    """Adapt to every task, and evaluate on its query set.

    Args:
        model: any module that maps [rows, ...] to [rows, out].
        parameters: {name: value} for all of its parameters.
        names: those that the inner loop adapts.
        inner: loss, lr, steps.
        support: T tasks.
        query: T tasks; without targets their losses are 0.
        own: what tasks have of their own in place of `parameters` and of `inner`'s.
        step_weights: [steps] of the query losses after each step; None: the last alone.
        norms: batch normalisations whose statistics of the support sets are wanted.
        by_support: whether query sets are normalised by the support sets' statistics.
    """
    tasks = support.tasks
    if tasks == 0:
        sides = [v for s in (support, query) for v in (s.x, s.y, s.weights, s.offset)]
        zero = _connected_zero(
            inner.lr,
            (v for v in (*parameters.values(), inner.lr, own.lr, own.anchor, *own.start.values(),
                         *sides)
             if v is not None and v.is_floating_point()),
        )  # fmt: skip
        steps = None if step_weights is None else zero.expand(len(step_weights), 0)
        return Evaluated(zero.expand(0), [], steps, None)
    own = _with_strengths(own, inner, support)
    sift = leaves_out(support, inner.loss) or leaves_out(query, inner.judge)
    outputs: list[Tensor] | Tensor
    with (
        applied(model, parameters, norms) as use,
        rows_named(model, use, lambda t: _whole(parameters, own.of_task(t)), support, query),
    ):

        def one(support_set: Set, query_set: Set, mine: dict[str, Any]) -> tuple[Tensor, ...]:
            whole = _whole(parameters, mine)
            called, start = use.of_a_task(whole)
            adapted, fixed = _split(start, names)
            pull, recipe = mine.get("anchor"), _recipe(inner, mine)
            sets = (support_set, query_set)
            outcome = task_outcome(
                called, recipe, adapted, fixed, *sets, sift, pull, step_weights, by_support
            )
            return *outcome, called.statistics()

        done = None if sift else _together(use, one, (support, query), own.of_all())
        if done is not None:
            losses, outputs, steps, found = cast(tuple[Tensor, ...], done)
        else:
            each = [
                one(cast(Set, support.of_task(t)), cast(Set, query.of_task(t)), own.of_task(t))
                for t in range(tasks)
            ]
            losses, steps, found = (torch.stack([task[i] for task in each]) for i in (0, 2, 3))
            outputs = [task[1] for task in each]
    steps_then = None if step_weights is None else steps.T
    return Evaluated(losses, outputs, steps_then, found if norms else None)


def mean_loss(losses: Tensor) -> Tensor:
    """The mean of [T], and 0 over no tasks."""
    return losses.mean() if len(losses) else losses.sum()


class _Tasks(NamedTuple):
    """T adapted tasks: their parameters [T, ...], the losses of their steps, their validation.

    And the statistics of their norms, [T, width], [T, 0] where none were asked for.
    """

    parameters: Parameters
    losses: Sequence[Tensor]
    validations: Sequence[Validation | None]
    statistics: Tensor


def _adapt_one(
    model: Applied,
    inner: InnerLoop,
    names: Sequence[str],
    parameters: Parameters,
    support: Set,
    task_id: int = 0,
    validation: Set | None = None,
    patience: int | None = None,
    sift: bool = False,
    anchor: Tensor | None = None,
) -> tuple[Parameters, Tensor, Tensor, Validation | None]:
    """One task's adapted parameters, losses of its steps [steps], statistics, and validation."""
    called, parameters = model.of_a_task(parameters)
    start, fixed = _split(parameters, names)
    watch = None
    held = None if validation is None else that_count(inner.loss, validation)
    if held is not None and weighs(inner.loss, held):
        x, y, weights, offset = held

        def validation_loss(theta: Parameters) -> Tensor:
            called.at_step(None)
            with model.evaluating():
                outputs = shifted(called({**fixed, **theta}, x), offset)
            return task_loss(inner.loss, outputs, y, weights)

        watch = Validation(validation_loss, start, patience)
    theta, losses = adapt_task(called, inner, start, fixed, support, task_id, watch, sift, anchor)
    if watch is not None:
        theta = watch.best
    # vmap wants every output to be a new tensor, also after no step at all
    theta = {name: value.clone() for name, value in theta.items()}
    stacked = torch.stack(losses) if losses else inner.lr.new_zeros(0)
    return theta, stacked, called.statistics(), watch


def _adapt_tasks(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    inner: InnerLoop,
    support: TaskSet,
    own: Own,
    task_ids: Sequence[int] | None,
    validation: TaskSet | None = None,
    patience: int | None = None,
    norms: Norms = (),
) -> _Tasks:
    """Adapt to every task; `own` is what they do not share."""
    tasks = support.tasks
    own = _with_strengths(own, inner, support)
    sift = leaves_out(support, inner.loss)
    sets = (support,) if validation is None else (support, validation)
    with (
        applied(model, parameters, norms) as use,
        rows_named(model, use, lambda t: _whole(parameters, own.of_task(t)), *sets),
    ):

        def one(support_set: Set, mine: dict[str, Any]) -> tuple[Parameters, Tensor, Tensor]:
            whole = _whole(parameters, mine)
            pull, recipe = mine.get("anchor"), _recipe(inner, mine)
            return _adapt_one(use, recipe, names, whole, support_set, anchor=pull)[:3]

        alike = validation is None and task_ids is None and tasks > 0 and not sift
        done = _together(use, one, (support,), own.of_all()) if alike else None
        if done is not None:
            stacked, losses, found = cast(tuple[Parameters, Tensor, Tensor], done)
            return _Tasks(stacked, losses.unbind(0), [None] * tasks, found)
        each = []
        for t in range(tasks):
            mine = own.of_task(t)
            task_id = 0 if task_ids is None else int(task_ids[t])
            watched = None if validation is None else cast(Set, validation.of_task(t))
            whole = {**parameters, **mine["start"]}
            support_set = cast(Set, support.of_task(t))  # support sets have targets
            options = (task_id, watched, patience, sift, mine.get("anchor"))
            recipe = _recipe(inner, mine)
            each.append(_adapt_one(use, recipe, names, whole, support_set, *options))
    stacked = {name: parameters[name].new_empty(0, *parameters[name].shape) for name in names}
    if tasks:
        stacked = {name: torch.stack([task[0][name] for task in each]) for name in names}
    found = torch.stack([task[2] for task in each]) if tasks else torch.zeros(0, 0)
    return _Tasks(stacked, [task[1] for task in each], [task[3] for task in each], found)


def _history(schedule: Schedule, support: TaskSet, tasks: _Tasks, dtype: torch.dtype) -> History:
    """The learning curves of T tasks; NaN where an epoch did not run."""
    assert schedule.epochs is not None
    shape = (support.tasks, schedule.epochs)
    train = support.x.new_full(shape, torch.nan, dtype=dtype)
    validation = train.new_full((shape[0], shape[1] + 1), torch.nan)
    best, ran = torch.zeros(2, support.tasks, dtype=torch.int64, device="cpu")
    for t, (rows, losses) in enumerate(zip(support.counts, tasks.losses, strict=True)):
        count = schedule.batch_count(rows)
        if losses.numel():
            sizes = torch.full((count,), schedule.batch_size or rows, device=train.device)
            sizes[-1] = rows - int(sizes[:-1].sum())
            means = (losses.view(-1, count) * sizes).sum(1) / rows
            train[t, : len(means)] = means
            ran[t] = best[t] = len(means)
        watch = tasks.validations[t]
        if watch is not None:
            validation[t, : len(watch.curve)] = torch.stack(watch.curve)
            best[t] = watch.best_epoch
    return History(train, validation, best, ran)


def not_finite(parameters: Iterable[Tensor], tasks: int) -> Tensor:
    """[tasks] int8: 1 where any of a task's values, in tensors [tasks, ...], is not finite."""
    status = torch.zeros(tasks, dtype=torch.int8, device="cpu")
    for values in parameters:
        if tasks:
            status[~values.isfinite().reshape(tasks, -1).all(1).cpu()] = 1
    return status


def adapt(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    inner: InnerLoop,
    support: TaskSet,
    *,
    start: Mapping[str, Tensor] | None = None,
    validation: TaskSet | None = None,
    patience: int | None = None,
    curves: bool = False,
    task_ids: Sequence[int] | None = None,
    anchors: Tensor | None = None,
    rates: Tensor | None = None,
) -> Adaptation:
    """Adapt to every task.

    With a validation set, a task gets the weights of the epoch (or the start) at which its loss
    on it was lowest; without one, or where the task has no rows in it, the last ones.

    Args:
        model: any module that maps [rows, ...] to [rows, out].
        parameters: {name: value} for all of its parameters.
        names: those that are adapted.
        inner: how.
        support: T tasks.
        start: {name: [T, ...]}, what each task has of its own, in place of `parameters`.
        validation: T tasks, looked at after each epoch.
        patience: stop a task after so many epochs in a row without a lower validation loss.
        curves: whether a history is wanted (where the schedule has epochs).
        task_ids: [T], tell the tasks' shuffles from each other's; all 0 where left out.
        anchors: [T], the strength of each task's pull towards its start, in place of `inner`'s.
        rates: [T, rows, columns], each task's lr, in place of `inner`'s.
    """
    start = dict(start or {})
    tasks = _adapt_tasks(
        model,
        dict(parameters),
        names,
        inner,
        support,
        Own(anchors, rates, start),
        task_ids,
        validation,
        patience,
    )
    history = None
    if curves:
        history = _history(inner.schedule, support, tasks, inner.lr.dtype)
        if validation is None:
            history = replace(history, validation=None, best_epochs=None)
    status = not_finite(tasks.parameters.values(), support.tasks)
    return Adaptation({**start, **tasks.parameters}, status, history)


def clipped(
    losses: Tensor, by: Sequence[Tensor], clip: float, others: Sequence[Tensor] = ()
) -> Tensor:
    """The mean of [T] losses, whose gradient is that of their clipped gradients.

    Each task's gradient by all of `by` together is scaled to a norm of at most `clip`, as
    `torch.nn.utils.clip_grad_norm_` does (Abadi et al. 2016, algorithm 1, for tasks). By `others`,
    which tasks do not share, it is that of the mean.
    """
    by = [b for b in by if b.requires_grad]
    others = [o for o in others if o.requires_grad]
    mean = mean_loss(losses)
    if not by or not losses.requires_grad:
        return mean
    gradients = partial(
        torch.autograd.grad, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    total = [torch.zeros_like(b) for b in by]
    for loss in losses:
        parts = gradients(loss, by)
        norm = torch.stack([p.square().sum() for p in parts]).sum().sqrt()
        factor = (clip / (norm + 1e-6)).clamp(max=1.0) / len(losses)
        total = [t + factor * p for t, p in zip(total, parts, strict=True)]
    if others:
        total += gradients(mean, others)
    towards = cast(Callable[..., Tensor], _Towards.apply)  # torch has no annotation for it
    return towards(mean.detach(), total, *by, *others)


class _Towards(torch.autograd.Function):
    """A loss whose gradient by given parameters is set."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *by: Tensor) -> Tensor:
        """The loss."""
        ctx.gradients, ctx.by = gradients, by
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times the incoming scalar."""
        scaled = [scale * g for g in ctx.gradients]
        return None, None, *once(REPTILE, scaled, (scale, *ctx.by))


def reptile(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    inner: InnerLoop,
    support: TaskSet,
    task_ids: Sequence[int] | None = None,
    anchors: Tensor | None = None,
    task_clip: float | None = None,
    norms: Norms = (),
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reptile's direction as the gradient of a loss (Nichol et al. 2018, algorithm 2).

    Args:
        model: any module that maps [rows, ...] to [rows, out].
        parameters: {name: value} for all of its parameters.
        names: those that are adapted.
        inner: how.
        support: T tasks.
        task_ids: [T], as for `adapt`.
        anchors: [T], as for `adapt`.
        task_clip: the largest norm of a task's theta - theta_t, all parameters together; None
            for any.
        norms: as for `evaluate`.

    Returns:
        The mean [] of the task losses, whose gradient by each parameter theta is theta - mean
        over t of theta_t (0 for those not adapted); the task losses [T], each the mean loss
        of the inner steps' batches; and the statistics as for `evaluate`.
    """
    with torch.no_grad():
        at = {name: p.detach() for name, p in parameters.items()}
        own = Own(anchors)
        tasks = _adapt_tasks(model, at, names, inner, support, own, task_ids, norms=norms)
        losses = inner.lr.new_zeros(support.tasks)
        for t, steps in enumerate(tasks.losses):
            losses[t] = steps.mean() if steps.numel() else 0.0
        mean = losses.mean() if support.tasks else losses.sum()
        moved = {name: torch.zeros_like(p) for name, p in at.items()}
        if support.tasks:
            moved |= _mean_moves(at, tasks.parameters, task_clip)
    directions = tuple(moved.values())
    towards = cast(Callable[..., Tensor], _Towards.apply)  # torch has no annotation for it
    statistics = tasks.statistics if norms and support.tasks else None
    return towards(mean, directions, *parameters.values()), losses, statistics


def _mean_moves(start: Parameters, adapted: Parameters, task_clip: float | None) -> Parameters:
    """The mean over tasks of start - adapted [T, ...], each task's clipped before."""
    if task_clip is None:
        return {name: start[name] - p.mean(0) for name, p in adapted.items()}
    moves = {name: start[name] - p for name, p in adapted.items()}
    squares = [move.flatten(1).square().sum(1) for move in moves.values()]
    if not squares:
        return {}
    factor = (task_clip / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1.0)
    return {
        name: (factor.reshape(-1, *[1] * (move.ndim - 1)) * move).mean(0)
        for name, move in moves.items()
    }
