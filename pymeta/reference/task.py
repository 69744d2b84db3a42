"""One task: the inner loop as the papers have it, in differentiable torch operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from pymeta.reference.loss import shifted, task_loss
from pymeta.reference.modules import By, Called, Parameters
from pymeta.reference.rules import direction, first_state
from pymeta.spec.inner import InnerLoop
from pymeta.spec.losses import Loss
from pymeta.spec.running import Measured
from pymeta.spec.schedule import Batch
from pymeta.tasks.values import beside, counting

# one task's x, y, weights, and what is added to the outputs
Set: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

# ---- one task ---------------------------------------------------------------------------------


def _rows(task: Set, batch: Batch) -> Set:
    """A batch's rows of a task."""
    if batch.rows is None:
        return task
    return _at(task, torch.from_numpy(batch.rows).to(task[0].device))


def _at(task: Set, rows: Tensor) -> Set:
    """Some rows of a set, by their numbers or a mask."""
    x, y, weights, offset = task
    weights = None if weights is None else weights[rows]
    return x[rows], y[rows], weights, None if offset is None else offset[rows]


def that_count(loss: Loss, task: Set) -> Set:
    """The rows of a set that count; all others are left out, whatever they hold.

    Without targets, all of them do.
    """
    _, y, weights, _ = task
    if y is None:
        return task
    count = counting(loss, y, weights)
    return task if bool(count.all()) else _at(task, count)


class Sifted(NamedTuple):
    """What is used of a set.

    Attributes:
        rows: those that count, and behind them those that stand beside them.
        counting: how many count; None: all of these.
        where: the numbers of these rows in the set; None: they are all of it, in its order.
    """

    rows: Set
    counting: int | None = None
    where: Tensor | None = None


def sifted(loss: Loss, task: Set) -> Sifted:
    """A set without the rows that are not used. Where none counts, none is.

    Without targets, all of them count.
    """
    x, y, weights, offset = task
    if y is None:
        return Sifted(task)
    count = counting(loss, y, weights)
    if bool(count.all()):
        return Sifted(task)
    where, n = count.nonzero()[:, 0], int(count.sum())
    if n:
        others = beside(loss, x, y, weights, offset).nonzero()[:, 0]
        where = torch.cat([where, others])
    return Sifted(_at(task, where), None if n == len(where) else n, where)


def adapt_task(
    model: Called,
    inner: InnerLoop,
    start: Parameters,
    fixed: Parameters,
    support: Set,
    task_id: int = 0,
    watch: Callable[[Parameters], bool] | None = None,
    sift: bool = False,
    anchor: Tensor | None = None,
) -> tuple[Parameters, list[Tensor]]:
    """The inner loop.

    Args:
        model: as the task calls it.
        inner: how to adapt.
        start: the parameters to adapt.
        fixed: all others.
        support: the task's rows.
        task_id: tells the task's shuffles from others'.
        watch: is shown the parameters after each epoch; ends the loop by returning True.
        sift: whether there may be rows that do not count.
        anchor: [], the strength of the task's pull towards the start, in place of the recipe's,
            of which `batch.py` finds that which depends on rows.

    Returns:
        The adapted parameters, and the loss of each step's batch before that step.
    """
    theta, losses = start, []
    state = first_state(inner.optimizer, start)
    pull = inner.anchor.strength if anchor is None else anchor
    for step, batch in enumerate(inner.schedule.batches(support[0].shape[0], task_id)):
        rows = _rows(support, batch)
        used, count, _ = sifted(inner.loss, rows) if sift else Sifted(rows)

        def batch_loss(
            adapted: Parameters, buffers: Parameters, used: Set, count: int | None = count
        ) -> tuple[Tensor, tuple[Parameters, dict[int, Measured]]]:
            x, y, w, offset = used
            whole = {**fixed, **adapted}
            outputs, after, measured = model.step_with_buffers(whole, buffers, x[:count])
            if count is not None:
                outputs = torch.cat([outputs, model.beside(whole, buffers, x, count)])
            loss = task_loss(inner.loss, shifted(outputs, offset), y, w, count)
            return loss, (after, measured)

        model.at_step(step)
        with model.normalising(By(single=sift and batch.rows is not None)):
            gradient, (loss, (model.buffers, measured)) = torch.func.grad_and_value(
                batch_loss, has_aux=True
            )(theta, model.buffers, used)
        losses.append(loss)
        if len(used[1]):
            model.measured.append(measured)
        if inner.first_order:
            gradient = {name: g.detach() for name, g in gradient.items()}
        if anchor is not None or pull:
            gradient = {n: g + pull * (theta[n] - start[n]) for n, g in gradient.items()}
        d, state = direction(inner.optimizer, step, theta, gradient, state)
        theta = {
            name: p - inner.rates.of(inner.lr, step, name, p.shape) * d[name]
            for name, p in theta.items()
        }
        if batch.ends_epoch and watch is not None and watch(theta):
            break
    model.at_step(None)
    return theta, losses


def task_outcome(
    model: Called,
    inner: InnerLoop,
    adapted: Parameters,
    fixed: Parameters,
    support: Set,
    query: Set,
    sift: bool = False,
    anchor: Tensor | None = None,
    step_weights: Tensor | None = None,
    by_support: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One task: adapt on the support set, evaluate on the query set.

    `anchor` is as for `adapt_task`. Where rows are to be sifted, those that are not used have
    outputs all the same, as constants. `query` may be without targets. With `by_support` batch
    normalisation of query rows goes by the statistics of the support rows that count.

    Returns:
        The loss on the query set [], that after each step weighed by `step_weights` where those
        are given; outputs [rows, out]; the losses after each step, [0] without weights.
    """
    (x, y, weights, offset), count, where = sifted(inner.judge, query) if sift else Sifted(query)

    context = that_count(inner.loss, support)[0] if sift else support[0]

    def called(theta: Parameters, x: Tensor) -> Tensor:
        if not by_support:
            return model({**fixed, **theta}, x)
        together = torch.cat([context, x])
        with model.normalising(By(len(context), len(together), single=True)):
            return model({**fixed, **theta}, together)[len(context) :]

    def evaluated(theta: Parameters) -> tuple[Tensor, Tensor]:
        before = model.buffers
        outputs = called(theta, x[:count])
        if count is not None:
            others = (
                called(theta, x)[count:]
                if by_support
                else model.beside({**fixed, **theta}, before, x, count)
            )
            outputs = torch.cat([outputs, others])
        outputs = shifted(outputs, offset)
        # query sets without targets have no loss
        none = outputs.new_zeros(())
        return none if y is None else task_loss(inner.judge, outputs, y, weights, count), outputs

    after_steps: list[Tensor] = []

    def watch(theta: Parameters) -> bool:
        model.at_step(len(after_steps))
        after_steps.append(evaluated(theta)[0])
        return False

    watching = None if step_weights is None else watch
    adapted, _ = adapt_task(
        model, inner, adapted, fixed, support, watch=watching, sift=sift, anchor=anchor
    )
    loss, outputs = evaluated(adapted)
    steps = outputs.new_zeros(0)
    if step_weights is not None:
        # a task without rows makes no step
        after_steps += [loss] * (len(step_weights) - len(after_steps))
        steps = torch.stack(after_steps)
        loss = (step_weights * steps).sum()
    if where is not None and len(where) == len(query[0]):
        outputs = outputs[where.argsort()]
    elif where is not None:
        if by_support:
            with torch.no_grad():
                all_rows = called(adapted, query[0])
        else:
            of_those = counting(inner.judge, query[1], query[2])
            all_rows = model.of_all_rows({**fixed, **adapted}, query[0], of_those)
        of_all = shifted(all_rows, query[3])
        outputs = of_all.detach().index_put((where,), outputs)
    return loss, outputs, steps
