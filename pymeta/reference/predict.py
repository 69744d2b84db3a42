"""Networks of T tasks as they are: their outputs, and what normalises these."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pymeta.reference.blame import rows_named
from pymeta.reference.loss import shifted
from pymeta.reference.modules import Parameters, applied
from pymeta.reference.task import Set, that_count
from pymeta.spec.inner import InnerLoop
from pymeta.spec.running import Norms, most_rows, width
from pymeta.tasks.task_set import TaskSet
from pymeta.tasks.values import leaves_out


def set_statistics(
    model: nn.Module,
    stacked: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    inner: InnerLoop,
    support: TaskSet,
    norms: Norms,
) -> Tensor:
    """What batch normalisations measure of each task's rows that count: [T, width(norms)].

    Args:
        model: the module.
        stacked: {name: [T, ...]} the parameters that each task has of its own.
        shared: {name: [...]} all others.
        inner: says which rows count.
        support: T tasks.
        norms: modules of the model.
    """
    if support.tasks == 0:
        return inner.lr.new_zeros(0, width(norms))
    sift = leaves_out(support, inner.loss)
    found = []
    with applied(model, {**stacked, **shared}, norms) as use, torch.no_grad():
        for t in range(support.tasks):
            own = {name: value[t] for name, value in stacked.items()}
            called, parameters = use.of_a_task({**shared, **own})
            rows = cast(Set, support.of_task(t))
            x = (that_count(inner.loss, rows) if sift else rows)[0]
            measured = called.step_with_buffers(parameters, called.buffers, x)[2]
            called.measured = [measured] * most_rows(norms)
            found.append(called.statistics())
    return torch.stack(found)


def input_gradients(
    model: nn.Module,
    stacked: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    query: TaskSet,
    cotangents: Tensor | Sequence[Tensor],
) -> Tensor:
    """The gradient of sum(cotangents * predictions) by the queries' inputs: like query.x.

    Args:
        model: as for `predict`, likewise what follows.
        stacked: {name: [T, ...]}.
        shared: {name: [...]}.
        query: T tasks.
        cotangents: like the predictions.
    """
    if query.tasks == 0:
        return torch.zeros_like(query.x)
    x = query.x.detach().requires_grad_()
    query = copy.copy(query)
    query.x = x
    with torch.enable_grad():
        outputs = predict(model, stacked, shared, query)
        total = sum((o * c).sum() for o, c in zip(outputs, cotangents, strict=True))
        (found,) = torch.autograd.grad(total, x, materialize_grads=True, allow_unused=True)
    return found


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

    def own_of(t: int) -> Parameters:
        return {**shared, **{n: p[t] for n, p in stacked.items()}}

    with applied(model, {**stacked, **shared}) as use, rows_named(model, use, own_of, query):

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
