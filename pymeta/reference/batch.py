"""All tasks of a call: together by `torch.vmap`, or one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pymeta.reference.loss import shifted, task_loss
from pymeta.reference.modules import Applied, Parameters, applied
from pymeta.reference.task import Set, adapt_task, task_outcome, that_count
from pymeta.reference.validation import Validation, weighs
from pymeta.spec.history import History
from pymeta.spec.inner import Adaptation, InnerLoop
from pymeta.spec.once import REPTILE, once
from pymeta.spec.schedule import Schedule
from pymeta.tasks.task_set import TaskSet
from pymeta.tasks.values import leaves_out

# ---- all tasks --------------------------------------------------------------------------------


def _own(anchors: Tensor | None, start: Parameters | None = None) -> dict[str, Any]:
    """What the tasks have of their own, [T, ...] each: their anchors, their starts."""
    own: dict[str, Any] = {} if anchors is None else {"anchor": anchors}
    return {**own, "start": dict(start)} if start else own


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


def _each(values: Tensor | None, tasks: int) -> Sequence[Tensor | None]:
    return [None] * tasks if values is None else values.unbind(0)


def _connected_zero(parameters: Mapping[str, Tensor], lr: Tensor, *inputs: Tensor) -> Tensor:
    """A 0 whose gradient by all of these is 0: the loss over no tasks."""
    parts = [v.flatten()[:0].sum().to(lr.dtype) for v in (*parameters.values(), lr, *inputs)]
    return torch.stack(parts).sum()


def _split(parameters: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Parameters, Parameters]:
    adapted = {name: parameters[name] for name in names}
    return adapted, {n: p for n, p in parameters.items() if n not in adapted}


def meta_loss(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    inner: InnerLoop,
    support: TaskSet,
    query: TaskSet,
    anchors: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor] | Tensor]:
    """The mean query loss over tasks, differentiable by everything that went in.

    Args:
        model: any module that maps [rows, ...] to [rows, out].
        parameters: {name: value} for all of its parameters.
        names: those that the inner loop adapts.
        inner: loss, lr, steps.
        support: T tasks.
        query: T tasks.
        anchors: [T], the strength of each task's pull towards the start, in place of `inner`'s.

    Returns:
        The loss [], task losses [T] and predictions: [T, rows, out] where all tasks have equal
        sizes, otherwise a list of T tensors [rows_t, out].
    """
    if support.tasks == 0:
        zero = _connected_zero(parameters, inner.lr, support.x, query.x)
        return zero, inner.lr.new_zeros(0), []
    sift = leaves_out(support, inner.loss) or leaves_out(query, inner.judge)
    with applied(model) as use:

        def one(support_set: Set, query_set: Set, own: dict[str, Any]) -> tuple[Tensor, Tensor]:
            called, start = use.of_a_task(dict(parameters))
            adapted, fixed = _split(start, names)
            pull = own.get("anchor")
            return task_outcome(called, inner, adapted, fixed, support_set, query_set, sift, pull)

        done = None if sift else _together(use, one, (support, query), _own(anchors))
        if done is not None:
            each_loss, predictions = cast(tuple[Tensor, Tensor], done)
            return each_loss.mean(), each_loss, predictions
        each = [
            one(cast(Set, support.of_task(t)), cast(Set, query.of_task(t)), _own(pull))
            for t, pull in enumerate(_each(anchors, support.tasks))
        ]
    losses = torch.stack([loss for loss, _ in each])
    return losses.mean(), losses, [outputs for _, outputs in each]


class _Tasks(NamedTuple):
    """T adapted tasks: their parameters [T, ...], the losses of their steps, their validation."""

    parameters: Parameters
    losses: Sequence[Tensor]
    validations: Sequence[Validation | None]


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
) -> tuple[Parameters, Tensor, Validation | None]:
    """One task's adapted parameters, losses of its steps [steps], and validation."""
    called, parameters = model.of_a_task(parameters)
    start, fixed = _split(parameters, names)
    watch = None
    held = None if validation is None else that_count(inner.loss, validation)
    if held is not None and weighs(inner.loss, held):
        x, y, weights, offset = held

        def validation_loss(theta: Parameters) -> Tensor:
            with model.evaluating():
                outputs = shifted(called({**fixed, **theta}, x), offset)
            return task_loss(inner.loss, outputs, y, weights)

        watch = Validation(validation_loss, start, patience)
    theta, losses = adapt_task(called, inner, start, fixed, support, task_id, watch, sift, anchor)
    if watch is not None:
        theta = watch.best
    # vmap wants every output to be a new tensor, also after no step at all
    theta = {name: value.clone() for name, value in theta.items()}
    return theta, torch.stack(losses) if losses else inner.lr.new_zeros(0), watch


def _adapt_tasks(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: Sequence[str],
    inner: InnerLoop,
    support: TaskSet,
    own: Parameters,
    task_ids: Sequence[int] | None,
    validation: TaskSet | None = None,
    patience: int | None = None,
    anchors: Tensor | None = None,
) -> _Tasks:
    """Adapt to every task; `own` is {name: [T, ...]} of what they do not share."""
    tasks = support.tasks
    sift = leaves_out(support, inner.loss)
    with applied(model) as use:

        def one(support_set: Set, mine: dict[str, Any]) -> tuple[Parameters, Tensor]:
            whole = {**parameters, **mine.get("start", {})}
            pull = mine.get("anchor")
            return _adapt_one(use, inner, names, whole, support_set, anchor=pull)[:2]

        alike = validation is None and task_ids is None and tasks > 0 and not sift
        done = _together(use, one, (support,), _own(anchors, own)) if alike else None
        if done is not None:
            stacked, losses = cast(tuple[Parameters, Tensor], done)
            return _Tasks(stacked, losses.unbind(0), [None] * tasks)
        each = []
        for t, pull in enumerate(_each(anchors, tasks)):
            mine = {name: values[t] for name, values in own.items()}
            task_id = 0 if task_ids is None else int(task_ids[t])
            watched = None if validation is None else cast(Set, validation.of_task(t))
            whole = {**parameters, **mine}
            support_set = cast(Set, support.of_task(t))  # support sets have targets
            options = (task_id, watched, patience, sift, pull)
            each.append(_adapt_one(use, inner, names, whole, support_set, *options))
    stacked = {name: parameters[name].new_empty(0, *parameters[name].shape) for name in names}
    if tasks:
        stacked = {name: torch.stack([theta[name] for theta, _, _ in each]) for name in names}
    return _Tasks(stacked, [losses for _, losses, _ in each], [watch for _, _, watch in each])


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
    """
    own = dict(start or {})
    tasks = _adapt_tasks(
        model,
        dict(parameters),
        names,
        inner,
        support,
        own,
        task_ids,
        validation,
        patience,
        anchors,
    )
    history = None
    if curves:
        history = _history(inner.schedule, support, tasks, inner.lr.dtype)
        if validation is None:
            history = replace(history, validation=None, best_epochs=None)
    status = not_finite(tasks.parameters.values(), support.tasks)
    return Adaptation({**own, **tasks.parameters}, status, history)


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
) -> tuple[Tensor, Tensor]:
    """Reptile's direction as the gradient of a loss (Nichol et al. 2018, algorithm 2).

    Args:
        model: any module that maps [rows, ...] to [rows, out].
        parameters: {name: value} for all of its parameters.
        names: those that are adapted.
        inner: how.
        support: T tasks.
        task_ids: [T], as for `adapt`.
        anchors: [T], as for `adapt`.

    Returns:
        The mean [] of the task losses, whose gradient by each parameter theta is theta - mean
        over t of theta_t (0 for those not adapted); and the task losses [T], each the mean loss
        of the inner steps' batches.
    """
    with torch.no_grad():
        at = {name: p.detach() for name, p in parameters.items()}
        tasks = _adapt_tasks(model, at, names, inner, support, {}, task_ids, anchors=anchors)
        losses = inner.lr.new_zeros(support.tasks)
        for t, steps in enumerate(tasks.losses):
            losses[t] = steps.mean() if steps.numel() else 0.0
        mean = losses.mean() if support.tasks else losses.sum()
        moved = {name: torch.zeros_like(p) for name, p in at.items()}
        if support.tasks:
            moved |= {name: at[name] - p.mean(0) for name, p in tasks.parameters.items()}
    directions = tuple(moved.values())
    towards = cast(Callable[..., Tensor], _Towards.apply)  # torch has no annotation for it
    return towards(mean, directions, *parameters.values()), losses


def predict(
    model: nn.Module,
    stacked: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    query: TaskSet,
) -> list[Tensor] | Tensor:
    """Each task's outputs on its own rows: [T, rows, out], or a list of them where ragged.

    Args:
        model: the module.
        stacked: {name: [T, ...]} the parameters that each task has of its own.
        shared: {name: [...]} all others.
        query: T tasks; targets and weights are not looked at, an offset is added.
    """
    if query.tasks == 0:
        return []
    with applied(model) as use:

        def one(own: Parameters, x: Tensor, offset: Tensor | None) -> Tensor:
            called, parameters = use.of_a_task({**shared, **own})
            return shifted(called(parameters, x), offset)

        done = None
        if query.uniform:
            dims = 0 if stacked else None, 0, None if query.offset is None else 0
            done = use.together(one, dims, dict(stacked), query.x, query.offset)
        if done is not None:
            return cast(Tensor, done)
        each = []
        for t in range(query.tasks):
            x, _, _, offset = query.of_task(t)
            each.append(one({n: p[t] for n, p in stacked.items()}, x, offset))
        return each
