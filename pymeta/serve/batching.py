"""Micro-batching: the tasks of concurrent requests in one native call.

A task's bits do not depend on its neighbours, so that who is in a batch changes nothing but the
time. The first request of a batch sets the latest moment at which it starts, `wait` seconds later;
the batch starts sooner where it is full, or where no other request has begun to arrive: a lone
client never waits. That moment is watched by turns of the event loop rather than by a
timer, whose grain of a millisecond is coarser than the wait.

A batch that is expected to be long is one native call, which spreads its tasks over the cores; it
runs in a thread, and the loop goes on meanwhile. A short one (`inline_us`) runs on the event loop,
since a thread's way there and back would cost more, and there task after task goes through the
adapter's engine, which keeps its memory: on one core that takes two thirds of the time of a call
for many (19 against 28 us a task for 24-64-64-1, 20 rows, 5 steps). The estimate is the recent time
for each row. A batch that fails as a whole is run again request by request, so that an error
reaches the one that caused it and no other.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from pymeta.models.arrays import AdaptedArrays
from pymeta.serve.gate import Arrivals
from pymeta.serve.metrics import Metrics
from pymeta.serve.model import Model
from pymeta.serve.problem import Problem, busy, unavailable
from pymeta.serve.settings import Settings
from pymeta.serve.wire import Tasks
from pymeta.spec.show import counted

_FIRST_SECONDS_PER_ROW = 20e-6  # until there is a measurement


@dataclass
class Done:
    """What a request gets back."""

    outputs: list[np.ndarray]  # of each task [rows, out]
    status: list[int]  # of each task, 1 where a prediction is not finite
    models: AdaptedArrays | None  # the adapted weights, where they were asked for


@dataclass
class _Item:
    model: Model
    tasks: Tasks
    keeps: bool  # whether the adapted weights are wanted
    done: asyncio.Future[Done]
    since: float

    @property
    def key(self) -> tuple[int, tuple[int, ...]]:
        """What items of one native call have in common."""
        return id(self.model), self.tasks.form


class Batcher:
    """Collects tasks and runs them; one for each service, used on its event loop alone."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        executor: Executor,
        arrivals: Arrivals,
    ) -> None:
        """Nothing runs yet.

        Args:
            settings: how long to wait, and for how many.
            metrics: where batch sizes and times go.
            executor: for longer calls.
            arrivals: knows of requests that are about to join.
        """
        self._wait = settings.batch_wait_us * 1e-6
        self._most = settings.batch_tasks
        self._inline = settings.inline_us * 1e-6
        self._limit = settings.limits.queue_tasks
        self._metrics, self._executor, self._arrivals = metrics, executor, arrivals
        self._waiting: list[_Item] = []
        self._tasks = 0  # of those waiting
        self._held = 0  # tasks that wait or run
        self._deadline = 0.0
        self._ticking = False
        self._closed = False
        self._running: set[asyncio.Task[None]] = set()
        self._per_row = _FIRST_SECONDS_PER_ROW

    async def submit(self, model: Model, tasks: Tasks, *, keeps: bool = False) -> Done:
        """Adapt to tasks and predict; with whoever else asks at the same time.

        Raises:
            Problem: 429 where too much waits already, 422 where the tasks will not do, 503 where
                the service is closing.
        """
        count = len(tasks.xs)
        if self._closed:
            raise unavailable("the service is shutting down")
        if self._held and self._held + count > self._limit:
            raise busy(
                f"{counted(self._held, 'task is', 'tasks are')} waiting or running; "
                f"at most {self._limit} may"
            )
        loop = asyncio.get_running_loop()
        item = _Item(model, tasks, keeps, loop.create_future(), perf_counter())
        if not self._waiting:
            self._deadline = loop.time() + self._wait
        self._waiting.append(item)
        self._tasks += count
        self._held += count
        self._metrics.queue.set(self._held)
        try:
            if self._tasks >= self._most:
                self._start()
            elif not self._ticking:
                self._ticking = True
                loop.call_soon(self._tick, loop)
            return await item.done
        finally:
            self._held -= count
            self._metrics.queue.set(self._held)

    async def close(self) -> None:
        """Run what was accepted, and accept no more."""
        self._closed = True
        self._start()
        while self._running:
            await asyncio.gather(*self._running, return_exceptions=True)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """A turn of the loop later: start, or look again next turn."""
        late = loop.time() >= self._deadline
        if self._waiting and not late and self._arrivals.fresh(self._wait):
            loop.call_soon(self._tick, loop)
            return
        self._ticking = False
        self._start()

    def _start(self) -> None:
        """Run all that waits, a native call for each model and form of tasks."""
        waiting, self._waiting, self._tasks = self._waiting, [], 0
        groups: dict[tuple[int, tuple[int, ...]], list[_Item]] = {}
        for item in waiting:
            groups.setdefault(item.key, []).append(item)
        for items in groups.values():
            rows = sum(item.tasks.rows for item in items)
            if rows * self._per_row <= self._inline:
                self._settle(items, _outcomes(items, short=True), rows)
                continue
            running = asyncio.get_running_loop().create_task(self._in_thread(items, rows))
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    async def _in_thread(self, items: list[_Item], rows: int) -> None:
        loop = asyncio.get_running_loop()
        self._settle(items, await loop.run_in_executor(self._executor, _outcomes, items), rows)

    def _settle(self, items: list[_Item], found: _Found, rows: int) -> None:
        """Hand out results, and count."""
        tasks = sum(len(item.tasks.xs) for item in items)
        self._metrics.batch.observe(tasks)
        self._metrics.adaptations.inc(tasks)
        self._metrics.stages["native"].observe(found.seconds)
        if rows:
            self._per_row += 0.1 * (found.seconds / rows - self._per_row)
        for item, outcome in zip(items, found.outcomes, strict=True):
            self._metrics.stages["queue"].observe(max(0.0, found.began - item.since))
            if item.done.done():  # whoever asked is gone
                continue
            if isinstance(outcome, Exception):
                item.done.set_exception(outcome)
            else:
                self._metrics.diverged.inc(sum(outcome.status))
                item.done.set_result(outcome)


@dataclass
class _Found:
    outcomes: list[Done | Exception]
    began: float
    seconds: float


def _outcomes(items: list[_Item], short: bool = False) -> _Found:
    """Run items that have a key in common; never raises."""
    began = perf_counter()
    outcomes: list[Done | Exception]
    try:
        requests = [(i.tasks, i.keeps) for i in items]
        together = not short or any(i.keeps for i in items)
        outcomes = list((run if together else one_by_one)(items[0].model, requests))
    except Exception as error:
        if len(items) == 1:
            outcomes = [_explained(error)]
        else:
            outcomes = [_outcomes([item]).outcomes[0] for item in items]
    return _Found(outcomes, began, perf_counter() - began)


def _explained(error: Exception) -> Exception:
    """What the request is told: the adapter's own words where they are about its values."""
    if isinstance(error, (ValueError, TypeError)) and not isinstance(error, UnicodeError):
        return Problem(422, f"tasks: {error}", "tasks")
    if isinstance(error, MemoryError):
        return unavailable("not enough memory for this call now")
    return error


def run(model: Model, requests: list[tuple[Tasks, bool]]) -> list[Done]:
    """One native call for the tasks of several requests, all of one form.

    Raises:
        TypeError, ValueError: the adapter refuses a value.
    """
    xs = joined([x for tasks, _ in requests for x in tasks.xs])
    ys = joined([y for tasks, _ in requests for y in tasks.ys])
    xq = joined([q for tasks, _ in requests for q in tasks.xq])
    weights, offset, query_offset = (
        joined([value for tasks, _ in requests for value in getattr(tasks, name) or ()])
        for name in ("weights", "offset", "query_offset")
    )
    models = None
    if any(keeps for _, keeps in requests):
        models = model.adapter.adapt(xs, ys, weights=weights, offset=offset)
        outputs = models(xq, offset=query_offset)
    else:
        besides = {"weights": weights, "offset": offset, "query_offset": query_offset}
        outputs = model.adapter.adapt_predict(xs, ys, xq, **besides)
    status = statuses(outputs)
    done, first = [], 0
    for tasks, keeps in requests:
        end = first + len(tasks.xs)
        own = models[list(range(first, end))] if models is not None and keeps else None  # a copy
        done.append(Done(list(outputs[first:end]), status[first:end], own))
        first = end
    return done


def joined(arrays: list[np.ndarray]) -> Any:
    """[T, ...] where all have one shape, which costs less to look at; else the list.

    None where there are none.
    """
    if not arrays:
        return None
    first = arrays[0].shape
    return np.stack(arrays) if all(a.shape == first for a in arrays) else arrays


def statuses(outputs: Any) -> list[int]:
    """Of outputs [T, rows, out], or a list of [rows, out]: 1 where a task has one not finite."""
    if isinstance(outputs, np.ndarray):
        finite: Any = np.isfinite(outputs).all((1, 2))
        return [int(not all_of_it) for all_of_it in finite.tolist()]
    return [_status(output) for output in outputs]


def one_by_one(model: Model, requests: list[tuple[Tasks, bool]]) -> list[Done]:
    """As `run`, task after task, where nobody wants the adapted weights."""
    predict, done = model.adapter.adapt_predict, []
    for tasks, _ in requests:
        none: Any = [None] * len(tasks.xs)
        parts = (tasks.weights or none, tasks.offset or none, tasks.query_offset or none)
        each = zip(tasks.xs, tasks.ys, tasks.xq, *parts, strict=True)
        outputs = [
            predict(x, y, q, weights=w, offset=o, query_offset=p) for x, y, q, w, o, p in each
        ]
        done.append(Done(outputs, [_status(output) for output in outputs], None))
    return done


def _status(output: np.ndarray) -> int:
    return int(not np.isfinite(output).all())
