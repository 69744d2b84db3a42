"""Adapting, Reptile and predicting by the native core: the twins of `pymeta.reference`'s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymeta import native
from pymeta.backend.gradients import NOTHING, Extras, Layout
from pymeta.backend.inputs import (
    address,
    chained,
    native_lr,
    native_rates,
    predicted_shape,
    ready,
)
from pymeta.backend.node import OfLoss, with_graph
from pymeta.backend.plan import Plan
from pymeta.backend.prepared import MadeAdapted, prepare
from pymeta.backend.recipe import Recipe
from pymeta.spec import running
from pymeta.spec.history import History
from pymeta.spec.inner import Adaptation
from pymeta.spec.once import REPTILE
from pymeta.tasks.task_set import TaskSet, dense

if TYPE_CHECKING:
    from pymeta.spec.inner import InnerLoop
    from pymeta.spec.schedule import Schedule


def _ids_there(plan: Plan, task_ids: Tensor | None) -> Tensor | None:
    """The tasks' ids where the core reads them."""
    if task_ids is None or plan.device is None:
        return task_ids
    return plan.device.upload("task_ids", task_ids)


def permutations(sizes: Tensor, seed: int, task_ids: Tensor | None, purpose: int) -> Tensor:
    """A permutation of `sizes` [T] rows for each task, one after another: int64 [sum of sizes]."""
    out = torch.empty(int(sizes.sum()), dtype=torch.int64, device="cpu")
    arguments = (len(sizes), sizes.data_ptr(), out.data_ptr())
    native.extension().shuffle(seed, 0, address(task_ids), 0, purpose, *arguments)
    return out


def memory(
    plan: Plan,
    parameters: list[Tensor],
    tasks: int,
    schedule: Schedule,
    curves: bool,
    validated: bool,
) -> Adaptation:
    """Memory for what becomes of T tasks, on the parameters' device; the curves of it are NaN."""
    named = dict(zip(plan.names, parameters, strict=True))
    device = plan.expected.device
    history = None
    if curves and schedule.epochs is not None:
        ran, best = torch.zeros(2, tasks, dtype=torch.int64, device=device)
        history = History(
            train=plan.scalar.new_full((tasks, schedule.epochs), math.nan),
            validation=(
                plan.scalar.new_full((tasks, schedule.epochs + 1), math.nan) if validated else None
            ),
            best_epochs=best if validated else None,
            epochs=ran,
        )
    return Adaptation(
        {n: named[n].new_empty(tasks, *named[n].shape) for n in plan.adapted},
        torch.zeros(tasks, dtype=torch.int8, device=device),
        history,
    )


def adapt(
    plan: Plan,
    parameters: list[Tensor],
    lr: Tensor,
    inner: InnerLoop,
    support: TaskSet,
    *,
    start: dict[str, Tensor] | None = None,
    validation: TaskSet | None = None,
    patience: int | None = None,
    curves: bool = False,
    task_ids: Tensor | None = None,
    anchors: Tensor | None = None,
    rates: Tensor | None = None,
    out: Adaptation | None = None,
) -> Adaptation:
    """The native twin of `reference.adapt`.

    Args:
        plan: of the model.
        parameters: in the order of `plan.names`.
        lr: as `Learner._lr` gives it.
        inner: the schedule is taken from here; loss and optimiser are the plan's.
        support: T tasks.
        start: {name: [T, ...]} of parameters that each task has of its own.
        validation: T tasks; their best weights are kept.
        patience: epochs without a better validation loss after which a task stops.
        curves: whether to keep the losses of the epochs.
        task_ids: [T] int64.
        anchors: [T], dense, where the tasks have strengths of their own.
        rates: [T, rows, columns], dense, where they have step sizes of their own.
        out: contiguous memory for the result; made where left out.
    """
    plan.check_steps(inner.schedule)
    lr, s = native_lr(plan, lr) if rates is None else rates, ready(plan, support)
    watched = None if validation is None else ready(plan, validation)
    ids = _ids_there(plan, task_ids)
    start = {} if start is None else {n: dense(p) for n, p in start.items()}
    shared = chained(plan, parameters)
    names = [plan.names[i] for i in plan.chain]
    if out is None:
        validated = validation is not None
        out = memory(plan, parameters, s.tasks, inner.schedule, curves, validated)
    history = out.history

    if s.tasks > 0:
        schedule = inner.schedule
        call = plan.call("adapt")
        call.tasks = s.tasks
        call.start = [start.get(n, p).data_ptr() for n, p in zip(names, shared, strict=True)]
        call.own_starts = [n in start for n in names]
        call.rates = native_rates(lr, rates is not None)
        call.schedule = native.schedule(schedule, address(ids))
        call.support = native.rows(s)
        call.validation = None if watched is None else native.rows(watched)
        call.patience = -1 if patience is None else patience
        call.anchors = address(anchors)
        results = call.results
        results.adapted = [
            address(out.parameters.get(n) if n in plan.adapted else None) for n in names
        ]
        results.status = out.status.data_ptr()
        if history is not None:
            results.train_curves = address(history.train)
            results.validation_curves = address(history.validation)
            results.best_epochs = address(history.best_epochs)
            results.epochs_run = address(history.epochs)
        watched_rows = None if watched is None else watched.rows
        key = (s.tasks, s.rows, watched_rows, lr.shape, schedule, anchors is None, *start)
        plan.runner(call.run, "adapt", *key)()
    kept = {n: p for n, p in start.items() if n not in plan.adapted}
    return Adaptation({**out.parameters, **kept}, out.status, history)


def adapt_with_graph(
    plan: Plan,
    recipe: Recipe,
    parameters: list[Tensor],
    lr: Tensor,
    inner: InnerLoop,
    support: TaskSet,
    start: dict[str, Tensor],
    trains: Sequence[bool] | None = None,
) -> dict[str, Tensor]:
    """The adapted parameters {name: [T, ...]}, differentiable by everything that went in.

    Their gradient costs one more native call, which makes the inner steps anew.

    Args:
        plan: of the model.
        recipe: as for `prepare`; its steps are those of `inner`'s schedule.
        parameters: in the plan's order, the shared ones.
        lr: as the core takes it where `recipe.per_task_lr`, else as `Learner._lr` gives it.
        inner: as for `adapt`.
        support: T tasks.
        start: {name: [T, ...]} of what each task has of its own.
        trains: as for `prepare`.
    """
    operands = [start.get(n, p) for n, p in zip(plan.names, parameters, strict=True)]
    call, extras = prepare(plan, recipe, operands, lr, support, None, trains=trains)
    with torch.no_grad():
        done = adapt(
            plan, parameters, lr, inner, support, start=start, anchors=recipe.anchors,
            rates=extras.lr if recipe.per_task_lr else None,
        )  # fmt: skip
    adapted = {name: done.parameters[name] for name in plan.adapted}
    if call.layout is None or not adapted:
        return adapted
    made = MadeAdapted(call, operands, extras, call.layout, None)
    return dict(zip(adapted, with_graph(made, tuple(adapted.values())), strict=True))


def losses(
    plan: Plan, parameters: list[Tensor], own: dict[str, Tensor], support: TaskSet
) -> Tensor:
    """The loss of each task's rows [T], with its own parameters {name: [T, ...]}; no graph."""
    found = [own.get(n, p) for n, p in zip(plan.names, parameters, strict=True)]
    recipe = Recipe(0, True, own=tuple(own))
    lr = plan.scalar.new_zeros(plan.rates.columns)
    with torch.no_grad():
        call, extras = prepare(plan, recipe, found, lr, support, support)
        return call.run(found, extras, None).losses


def reptile(
    plan: Plan,
    parameters: list[Tensor],
    lr: Tensor,
    inner: InnerLoop,
    support: TaskSet,
    task_ids: Tensor | None = None,
    anchors: Tensor | None = None,
    task_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The native twin of `reference.reptile`: (loss [], task losses [T])."""
    lr, s = native_lr(plan, lr), ready(plan, support)
    ids = _ids_there(plan, task_ids)
    wanted = torch.is_grad_enabled() and bool(plan.trainable)
    extras = Extras(lr, s.x, None, None, None, None, None)
    layout = Layout.of(plan, (wanted, *NOTHING[1:]), None, extras)
    gradients = None if layout is None else layout.memory()
    loss = torch.empty_like(plan.scalar)
    losses = lr.new_empty(s.tasks)
    if s.tasks == 0:
        loss.zero_()
        if gradients is not None:
            gradients.flat.zero_()
    else:
        call = plan.call("reptile")
        call.tasks = s.tasks
        ordered = chained(plan, parameters)  # held while the core reads them
        call.start = [p.data_ptr() for p in ordered]
        call.rates = native_rates(lr)
        call.schedule = native.schedule(inner.schedule, address(ids))
        call.support = native.rows(s)
        call.anchors = address(anchors)
        call.task_clip = task_clip or 0.0
        call.results.losses, call.results.mean_loss = losses.data_ptr(), loss.data_ptr()
        call.gradients = None if gradients is None else gradients.native
        statistics = running.memory(plan.norms, losses, s.tasks) if layout is not None else None
        call.results.statistics = address(statistics)
        anchored = anchors is not None
        how = (wanted, anchored, task_clip is not None)
        plan.runner(call.run, "reptile", s.tasks, s.rows, inner.schedule, *how)()
        if statistics is not None:
            running.update(plan.norms, statistics)
    if layout is not None and gradients is not None:
        inputs = layout.inputs(parameters, extras)
        (loss,) = with_graph(OfLoss(gradients, layout.idle, inputs, REPTILE), (loss,))
    return loss, losses


def input_gradients(
    plan: Plan,
    stacked: dict[str, Tensor],
    shared: dict[str, Tensor],
    query: TaskSet,
    cotangents: Tensor,
) -> Tensor:
    """The native twin of `reference.input_gradients`: like query.x.

    It is the meta-gradient of no inner step, from a start of each task's own.
    """
    names = [plan.names[i] for i in plan.chain]
    q = ready(plan, query)
    tensors = [dense(stacked[n] if n in stacked else shared[n]) for n in names]
    cotangents = dense(cotangents)
    found = torch.zeros_like(q.x)
    if q.tasks == 0:
        return found
    lr = plan.lr_tensor(0.0)
    call = plan.call("meta")
    call.tasks = q.tasks
    call.start = [t.data_ptr() for t in tensors]
    call.own_starts = [n in stacked for n in names]
    call.rates = native_rates(lr)
    call.schedule = native.extension().Schedule(steps=0)
    call.query = native.rows(q)
    call.cotangents = native.extension().Cotangents(predictions=cotangents.data_ptr())
    call.gradients = native.extension().Gradients(xq=found.data_ptr())
    plan.runner(call.run, "input_gradients", q.tasks, q.rows, *stacked)()
    return found


def set_statistics(
    plan: Plan, parameters: list[Tensor], stacked: dict[str, Tensor], support: TaskSet
) -> Tensor:
    """The native twin of `reference.set_statistics`, of the plan's `set_norms`.

    Made by inner steps of size 0 from each task's own weights.

    Args:
        plan: of the model.
        parameters: those that tasks share, in the order of `plan.names`.
        stacked: {name: [T, ...]} those that each task has of its own.
        support: T tasks.
    """
    s = ready(plan, support)
    found = plan.scalar.new_zeros(s.tasks, running.width(plan.set_norms))
    if s.tasks == 0:
        return found
    own = {n: dense(p) for n, p in stacked.items()}
    names = [plan.names[i] for i in plan.chain]
    ordered = chained(plan, parameters)  # held while the core reads them
    call = plan.call("adapt")
    call.tasks = s.tasks
    call.start = [own.get(n, p).data_ptr() for n, p in zip(names, ordered, strict=True)]
    call.own_starts = [n in own for n in names]
    lr = native_lr(plan, plan.scalar.new_zeros(plan.rates.columns))
    call.rates = native_rates(lr)
    steps = running.most_rows(plan.set_norms)
    call.schedule = native.extension().Schedule(steps=steps)
    call.support = native.rows(s)
    call.results.statistics = found.data_ptr()
    plan.runner(call.run, "statistics", s.tasks, s.rows, steps, *own)()
    return found


def predict(
    plan: Plan, stacked: dict[str, Tensor], shared: dict[str, Tensor], query: TaskSet
) -> Tensor:
    """The native twin of `reference.predict`; [sum of rows, out] where the query is packed."""
    names = [plan.names[i] for i in plan.chain]
    q = ready(plan, query)
    tensors = [dense(stacked[n] if n in stacked else shared[n]) for n in names]
    # the core leaves rows that only pad untouched
    make = q.x.new_zeros if q.padded else q.x.new_empty
    predictions = make(predicted_shape(plan, q))
    call = plan.call("predict")
    call.tasks = q.tasks
    call.start = [t.data_ptr() for t in tensors]
    call.own_starts = [n in stacked for n in names]
    call.query = native.rows(q)
    call.results.predictions = predictions.data_ptr()
    plan.runner(call.run, "predict", q.tasks, q.rows, *stacked)()
    return predictions
