"""Adapting, and predicting by adapted models: calls that are prepared once, as `prepared.py`'s.

What is prepared is a native call with its parts; each time it is made, the addresses that differ
are put in. Threads may make it at once, so each takes one for itself, and puts it back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymeta import native
from pymeta.backend.inputs import native_rates, predicted_shape
from pymeta.backend.repeat import Repeat, as_it_came
from pymeta.spec.inner import Adaptation
from pymeta.spec.watch import Watch
from pymeta.tasks.task_set import TaskSet, dense

if TYPE_CHECKING:
    from pymeta.backend.plan import Plan
    from pymeta.spec.schedule import Schedule

_pointer = Tensor.data_ptr


class _Prepared:
    """Native calls that are alike. It does not hold the plan, which may hold it.

    Attributes:
        holds: whether a call with other tensors would be like the one that it was made of.
    """

    def __init__(self, plan: Plan, repeat: Repeat) -> None:
        self.holds = repeat.holds
        self._problem, self._dtype, self._device = plan.problem, plan.dtype_code, plan.device
        self._free: deque[tuple[Any, Callable[[], Any]]] = deque()

    def _made(self) -> tuple[Any, Callable[[], Any]]:
        """A native call, and what runs it."""
        raise NotImplementedError

    def _of_job(self, job: str) -> Any:
        return native.extension().Call(self._problem, self._dtype, job)

    def _runner(self, call: Any, *key: Hashable) -> Callable[[], Any]:
        return call.run if self._device is None else partial(self._device.run, call.run, key)

    def _taken(self) -> tuple[Any, Callable[[], Any]]:
        try:
            return self._free.pop()
        except IndexError:
            return self._made()


class PreparedAdapt(_Prepared):
    """Adapting to all task sets of one form.

    Attributes:
        note: what `Learner._last` is to say of such a call.
    """

    def __init__(
        self,
        plan: Plan,
        repeat: Repeat,
        lr: Tensor,
        schedule: Schedule,
        support: TaskSet,
        note: Any,
    ) -> None:
        """Prepare it; use `prepared_adapt`."""
        super().__init__(plan, repeat)
        self.plan, self.note = plan, note
        self._lr, self._schedule, self._tasks = lr, schedule, support.tasks
        self._rows, self._distributions = support.rows, support.distributions
        named = dict(zip(plan.names, plan.parameters, strict=True))
        self._made_of = [(n, (support.tasks, *named[n].shape)) for n in plan.adapted]
        self._status = torch.zeros(support.tasks, dtype=torch.int8, device=plan.expected.device)

    def _made(self) -> tuple[Any, Callable[[], Any]]:
        call = self._of_job("adapt")
        call.tasks = self._tasks
        call.schedule = native.schedule(self._schedule)
        key = (self._tasks, self._rows, None, self._lr.shape, self._schedule, True)
        return call, self._runner(call, "adapt", *key)

    def run(self, xs: Tensor, ys: Tensor) -> Adaptation:
        """Adapt to tasks for which `holds` is true."""
        plan, lr = self.plan, self._lr
        make = lr.new_empty
        found = {name: make(shape) for name, shape in self._made_of}
        status = torch.zeros_like(self._status)
        taken = self._taken()
        call, run = taken
        places = dict(zip(found, map(_pointer, found.values()), strict=True))
        pointers = [*map(_pointer, plan.parameters)]
        call.start = [pointers[i] for i in plan.chain]
        call.rates = native_rates(lr)
        call.support = native.extension().Rows(
            xs.data_ptr(), ys.data_ptr(), rows=self._rows, has_distributions=self._distributions
        )
        results = call.results
        results.adapted = [places.get(plan.names[i], 0) for i in plan.chain]
        results.status = status.data_ptr()
        run()
        self._free.append(taken)
        return Adaptation(found, status)


def prepared_adapt(
    plan: Plan,
    learned: dict[str, Any],
    lr: Tensor,
    schedule: Schedule,
    support: TaskSet,
    data: Sequence[Any],
    note: Any,
) -> PreparedAdapt | None:
    """The call, for others that are like it; None where not all went in as it came.

    Args:
        plan: of the model.
        learned: the learner's own parameters: lr, where that is learnable.
        lr: as `Learner._lr` gives it.
        schedule: how many steps, on which rows.
        support: T tasks, of one size and without weights or offsets.
        data: xs, ys as they were given.
        note: for `PreparedAdapt.note`.
    """
    device = plan.device
    if (
        not (support.plain and support.tasks and plan.dense)
        or plan.lr_order is not None
        or lr.dtype is not plan.expected.dtype
        or dense(lr) is not lr
        or (device is not None and device.capturing())
        or not all(map(as_it_came, data, (support.x, support.y)))
    ):
        return None
    places = [(learned, name) for name in learned]
    watch = plan.watch.and_also(places, [lr] if learned else [], device is not None)
    return PreparedAdapt(plan, Repeat(watch, data, device), lr, schedule, support, note)


class PreparedPredict(_Prepared):
    """Predictions for all query sets of one form, by models of one form.

    Attributes:
        tasks: how many models.
    """

    def __init__(
        self,
        plan: Plan,
        repeat: Repeat,
        own: tuple[str, ...],
        common: tuple[str, ...],
        query: TaskSet,
    ) -> None:
        """Prepare it; use `prepared_predict`."""
        super().__init__(plan, repeat)
        self._names, self.tasks = own, query.tasks
        self._rows, self._shape = query.rows, predicted_shape(plan, query)
        chain = [plan.names[i] for i in plan.chain]
        self._order = [(own + common).index(name) for name in chain]
        self._own = [name in own for name in chain]

    def _made(self) -> tuple[Any, Callable[[], Any]]:
        call = self._of_job("predict")
        call.tasks, call.own_starts = self.tasks, self._own
        return call, self._runner(call, "predict", self.tasks, self._rows, *self._names)

    def run(self, tensors: Sequence[Tensor], xq: Tensor) -> Tensor:
        """The predictions [T, rows, out] for tensors for which `holds` is true."""
        predictions = xq.new_empty(self._shape)
        taken = self._taken()
        call, run = taken
        pointers = [*map(_pointer, tensors)]
        call.start = [pointers[i] for i in self._order]
        call.query = native.extension().Rows(xq.data_ptr(), rows=self._rows)
        call.results.predictions = predictions.data_ptr()
        run()
        self._free.append(taken)
        return predictions


_NOTHING = Watch()


def prepare_predict(
    plan: Plan, stacked: dict[str, Tensor], shared: dict[str, Tensor], query: TaskSet, xq: Any
) -> None:
    """Have the plan keep the call, for others that are like it, where all went in as it came.

    Its kind are the names of the parameters.

    Args:
        plan: of the model.
        stacked: {name: [T, ...]} of which each model has its own.
        shared: {name: [...]} all others.
        query: T tasks.
        xq: what they were made of.
    """
    device, tensors = plan.device, [*stacked.values(), *shared.values()]
    if (
        query.plain
        and query.tasks
        and not (device is not None and device.capturing())
        and as_it_came(xq, query.x)
        and all(as_it_came(t, t) for t in tensors)
    ):
        repeat = Repeat(_NOTHING, [*tensors, xq], device)
        of = (*stacked,), (*shared,)
        plan.predicts.keep(of, (*tensors, xq), PreparedPredict(plan, repeat, *of, query))
