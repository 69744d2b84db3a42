"""Adapting, Reptile, and predicting: calls that are prepared once, as those of `prepared.py`.

What is prepared is a native call with its parts; each time it is made, the addresses that differ
are put in. Threads may make it at once, so each takes one for itself, and puts it back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pymeta import native
from pymeta.backend.gradients import NOTHING, Extras, Layout, Wanted
from pymeta.backend.inputs import address, native_rates, predicted_shape
from pymeta.backend.node import OfLoss, with_graph
from pymeta.backend.repeat import Repeat, as_it_came
from pymeta.spec import running
from pymeta.spec.inner import Adaptation
from pymeta.spec.once import REPTILE
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


class _OfSupport(_Prepared):
    """Calls of support sets alone, all of one form.

    Attributes:
        note: what `Learner._last` is to say of such a call.
    """

    job: ClassVar[str]

    def __init__(
        self,
        plan: Plan,
        repeat: Repeat,
        lr: Tensor,
        schedule: Schedule,
        support: TaskSet,
        note: Any,
    ) -> None:
        """Prepare it; use `prepared`."""
        super().__init__(plan, repeat)
        self.plan, self.note = plan, note
        self._lr, self._schedule, self._tasks = lr, schedule, support.tasks
        self._rows, self._distributions = support.rows, support.distributions

    def _made(self) -> tuple[Any, Callable[[], Any]]:
        call = self._of_job(self.job)
        call.tasks = self._tasks
        call.schedule = native.schedule(self._schedule)
        return call, self._runner(call, self.job, *self._key())

    def _key(self) -> tuple[Hashable, ...]:
        raise NotImplementedError

    def _filled(self, call: Any, xs: Tensor, ys: Tensor) -> None:
        pointers = [*map(_pointer, self.plan.parameters)]
        call.start = [pointers[i] for i in self.plan.chain]
        call.rates = native_rates(self._lr)
        call.support = native.extension().Rows(
            xs.data_ptr(), ys.data_ptr(), rows=self._rows, has_distributions=self._distributions
        )


class PreparedAdapt(_OfSupport):
    """Adapting to all task sets of one form."""

    job = "adapt"

    def __init__(self, plan: Plan, *how: Any) -> None:
        """Prepare it; use `prepared`."""
        super().__init__(plan, *how)
        named = dict(zip(plan.names, plan.parameters, strict=True))
        self._made_of = [(n, (self._tasks, *named[n].shape)) for n in plan.adapted]
        self._status = torch.zeros(self._tasks, dtype=torch.int8, device=plan.expected.device)

    def _key(self) -> tuple[Hashable, ...]:
        return self._tasks, self._rows, None, self._lr.shape, self._schedule, True

    def run(self, xs: Tensor, ys: Tensor) -> Adaptation:
        """Adapt to tasks for which `holds` is true."""
        plan, make = self.plan, self._lr.new_empty
        found = {name: make(shape) for name, shape in self._made_of}
        status = torch.zeros_like(self._status)
        places = dict(zip(found, map(_pointer, found.values()), strict=True))
        taken = self._taken()
        call, run = taken
        self._filled(call, xs, ys)
        results = call.results
        results.adapted = [places.get(plan.names[i], 0) for i in plan.chain]
        results.status = status.data_ptr()
        run()
        self._free.append(taken)
        return Adaptation(found, status)


class PreparedReptile(_OfSupport):
    """Reptile's direction, or the losses alone, for all task sets of one form."""

    job = "reptile"

    def __init__(
        self, plan: Plan, *how: Any, wanted: bool = False, task_clip: float | None = None
    ) -> None:
        """Prepare it; use `prepared`."""
        super().__init__(plan, *how)
        self._clip = task_clip
        self._wanted: Wanted = (wanted, *NOTHING[1:])
        self._extras = Extras(self._lr, *(None,) * 6)  # type: ignore[arg-type]  # none is read
        self._layout = Layout.of(plan, self._wanted, None, self._extras)

    def _made(self) -> tuple[Any, Callable[[], Any]]:
        call, run = super()._made()
        call.task_clip = self._clip or 0.0
        return call, run

    def _key(self) -> tuple[Hashable, ...]:
        how = self._wanted[0], False, self._clip is not None
        return self._tasks, self._rows, self._schedule, *how

    def run(self, xs: Tensor, ys: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        """The loss [] and the tasks' losses [T], for tasks for which `holds` is true.

        `stream` is that of minibatches.
        """
        plan, layout = self.plan, self._layout
        loss, losses = torch.empty_like(plan.scalar), self._lr.new_empty(self._tasks)
        gradients = None if layout is None else layout.memory()
        statistics = None
        if layout is not None:
            statistics = running.memory(plan.norms, losses, self._tasks)
        taken = self._taken()
        call, run = taken
        self._filled(call, xs, ys)
        if self._schedule.batch_size is not None:
            call.schedule = native.schedule(replace(self._schedule, stream=stream))
        results = call.results
        results.losses, results.mean_loss = losses.data_ptr(), loss.data_ptr()
        results.statistics = address(statistics)
        call.gradients = None if gradients is None else gradients.native
        run()
        self._free.append(taken)
        if statistics is not None:
            running.update(plan.norms, statistics)
        if layout is not None and gradients is not None:
            inputs = layout.inputs(plan.parameters, self._extras)
            (loss,) = with_graph(OfLoss(gradients, layout.idle, inputs, REPTILE), (loss,))
        return loss, losses


Kind = TypeVar("Kind", bound=_OfSupport)


def prepared(
    kind: type[Kind],
    plan: Plan,
    learned: dict[str, Any],
    lr: Tensor,
    schedule: Schedule,
    support: TaskSet,
    data: Sequence[Any],
    note: Any,
    **options: Any,
) -> Kind | None:
    """The call, for others that are like it; None where not all went in as it came.

    Args:
        kind: `PreparedAdapt` or `PreparedReptile`.
        plan: of the model.
        learned: the learner's own parameters: lr, where that is learnable.
        lr: as `Learner._lr` gives it.
        schedule: how many steps, on which rows.
        support: T tasks, of one size and without weights or offsets.
        data: xs, ys as they were given.
        note: for the call's `note`.
        options: of `kind`.
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
    return kind(plan, Repeat(watch, data, device), lr, schedule, support, note, **options)


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
