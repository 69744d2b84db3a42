"""Micro-batching: who shares a call changes no bit, no error, and no request waits too long."""

import asyncio
import selectors
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serve_help import SOON, adapter, alone, in_process, task

pytest.importorskip("fastapi")

from pymeta.serve import batching
from pymeta.serve.batching import Batcher
from pymeta.serve.metrics import Metrics
from pymeta.serve.model import Model
from pymeta.serve.problem import Problem
from pymeta.serve.settings import Limits, Settings
from pymeta.serve.wire import Tasks

PATH = "/v1/adapt-predict"


class Some:
    """Requests that are about to arrive, or none."""

    def __init__(self, coming: bool) -> None:
        self.coming = coming

    def fresh(self, seconds: float) -> bool:
        return self.coming


def tasks_of(*given) -> Tasks:
    names = ("xs", "ys", "xq")
    return Tasks(*([np.array(g[n], np.float32) for g in given] for n in names[:2]), None,
                 [np.array(g["xq"], np.float32) for g in given])  # fmt: skip


def make(coming: bool = False, **settings) -> tuple[Batcher, Metrics, ThreadPoolExecutor]:
    metrics, threads = Metrics(), ThreadPoolExecutor(2)
    return Batcher(Settings(**settings), metrics, threads, Some(coming)), metrics, threads


def sizes(metrics: Metrics) -> tuple[int, int]:
    """(calls, tasks) of the native core."""
    (family,) = (m for m in metrics.registry.collect() if m.name == "pymeta_batch_tasks")
    found = {s.name: s.value for s in family.samples if "le" not in s.labels}
    return int(found["pymeta_batch_tasks_count"]), int(found["pymeta_batch_tasks_sum"])


@pytest.mark.parametrize("inline_us", [1e6, 0], ids=["on the loop", "in threads"])
def test_under_load_each_request_has_the_bits_of_a_lone_call(tmp_path, inline_us):
    settings = Settings(inline_us=inline_us)
    given = [[task(31 * i + j, 1 + (7 * i + j) % 20, 1 + i % 3) for j in range(1 + i % 4)]
             for i in range(200)]  # fmt: skip
    with in_process(tmp_path, store=None, settings=settings) as service:
        answers = service.calls([("POST", PATH, {"tasks": tasks}) for tasks in given])
        calls, tasks_run = sizes(service.app.state.service.metrics)
    assert tasks_run == sum(map(len, given)) and calls < len(given) / 4
    for tasks, answer in zip(given, answers, strict=True):
        for one, predicted in zip(tasks, answer.json["predictions"], strict=True):
            assert np.array_equal(np.array(predicted, np.float32), alone(adapter(), one))


def test_a_long_batch_is_one_native_call_and_a_short_one_is_none(monkeypatch):
    """Whatever is estimated, once measured: a batch of much work goes to a thread."""
    seen = []
    for name in ("run", "one_by_one"):
        way = getattr(batching, name)

        def noted(model, requests, way=way, name=name):
            where = threading.current_thread() is threading.main_thread()
            seen.append((name, len(requests), where))
            return way(model, requests)

        monkeypatch.setattr(batching, name, noted)
    batcher, _, threads = make(inline_us=1000)
    model = Model("v", adapter())

    async def together(count):
        batcher._per_row = 1e-6  # as if measured
        return await asyncio.gather(
            *(batcher.submit(model, tasks_of(task())) for _ in range(count))
        )

    asyncio.run(together(20))  # 20 tasks of 9 rows
    asyncio.run(together(200))
    assert seen == [("one_by_one", 20, True), ("run", 200, False)]
    threads.shutdown()


@pytest.mark.parametrize("short", [True, False])
def test_a_wrong_task_fails_alone(short):
    """Its neighbours in the batch get what they get without it."""
    batcher, _, threads = make(inline_us=1e6 if short else 0)
    model = Model("v", adapter(loss="cross_entropy"))
    labels = tasks_of(task())._replace(ys=[np.zeros(7, np.int64)])
    wrong = labels._replace(ys=[np.ones(7, np.int64)])  # a class that the model does not have

    async def together():
        return await asyncio.gather(
            *(batcher.submit(model, t) for t in (labels, wrong, labels)), return_exceptions=True
        )

    first, failed, last = asyncio.run(together())
    assert isinstance(failed, Problem) and failed.status == 422 and "label" in failed.detail
    assert np.array_equal(first.outputs[0], last.outputs[0])
    assert np.array_equal(first.outputs[0], batching.run(model, [(labels, False)])[0].outputs[0])
    threads.shutdown()


def test_models_and_weights_are_not_mixed():
    """A request is answered by the model that was there when it came."""
    batcher, metrics, threads = make()
    old, new = Model("a", adapter(0)), Model("b", adapter(1))
    plain = tasks_of(task())
    weighted = plain._replace(weights=[np.array([0, 1, 1, 1, 1, 1, 1], np.float32)])
    requests = [(old, plain), (new, plain), (old, weighted), (new, weighted)] * 3

    async def together():
        return await asyncio.gather(*(batcher.submit(m, t) for m, t in requests))

    found = asyncio.run(together())
    assert sizes(metrics) == (4, 12)
    for (model, tasks), done in zip(requests, found, strict=True):
        wanted = batching.run(model, [(tasks, False)])[0].outputs[0]
        assert np.array_equal(done.outputs[0], wanted)
    threads.shutdown()


def test_kept_weights_are_those_of_the_task():
    batcher, _, threads = make()
    model, given = Model("v", adapter()), [task(i) for i in range(5)]

    async def together():
        return await asyncio.gather(
            *(batcher.submit(model, tasks_of(g), keeps=True) for g in given)
        )

    for one, done in zip(given, asyncio.run(together()), strict=True):
        assert len(done.models) == 1
        assert np.array_equal(
            done.models([np.array(one["xq"], np.float32)])[0], alone(adapter(), one)
        )
        assert done.models.parameters["0.weight"].base is None  # holds no neighbour's memory
    threads.shutdown()


# ---- waiting ------------------------------------------------------------------------------------


class Turns(asyncio.SelectorEventLoop):
    """A loop on which each turn takes a microsecond, and waiting takes the time it says."""

    def __init__(self) -> None:
        self.now = 0.0
        loop = self

        class Selector(selectors.DefaultSelector):
            def select(self, timeout=None):
                found = super().select(0)
                loop.now += 1e-6 if found or not timeout else timeout
                return found

        super().__init__(Selector())

    def time(self) -> float:
        return self.now


def started(monkeypatch, loop: Turns) -> list[tuple[float, int]]:
    """(when, how many requests) of each batch from now on."""
    calls: list[tuple[float, int]] = []
    outcomes = batching._outcomes

    def noted(items, short=False):
        calls.append((loop.now, len(items)))
        return outcomes(items, short)

    monkeypatch.setattr(batching, "_outcomes", noted)
    return calls


def submitting(batcher: Batcher, loop: Turns, at: list[float]):
    """Submit a task at each of some moments; the moments when the answers came."""
    model = Model("v", adapter())

    async def one(moment: float) -> float:
        await asyncio.sleep(moment)
        await batcher.submit(model, tasks_of(task()))
        return loop.now

    async def all_of_them() -> list[float]:
        return await asyncio.gather(*map(one, at))

    try:
        return loop.run_until_complete(all_of_them())
    finally:
        loop.close()


def test_no_request_waits_longer_than_the_set_time(monkeypatch):
    """Others keep arriving, so that a wait that began anew with each would never end."""
    loop = Turns()
    batcher, _, threads = make(coming=True, batch_wait_us=200, inline_us=1e9)
    calls = started(monkeypatch, loop)
    moments = [i * 50e-6 for i in range(100)]
    answered = submitting(batcher, loop, moments)
    waits = [b - a for a, b in zip(moments, answered, strict=True)]
    assert max(waits) <= 200e-6 + 50e-6  # turns of the loop take a microsecond each
    assert len(calls) < len(moments) / 2 and sum(n for _, n in calls) == len(moments)
    threads.shutdown()


def test_a_lone_request_does_not_wait(monkeypatch):
    loop = Turns()
    batcher, _, threads = make(coming=False, batch_wait_us=1e6, inline_us=1e9)
    started(monkeypatch, loop)
    (answered,) = submitting(batcher, loop, [0.0])
    assert answered < 50e-6
    threads.shutdown()


def test_a_full_batch_does_not_wait(monkeypatch):
    loop = Turns()
    batcher, _, threads = make(coming=True, batch_wait_us=1e6, batch_tasks=3, inline_us=1e9)
    calls = started(monkeypatch, loop)
    answered = submitting(batcher, loop, [0.0] * 6)
    assert max(answered) < 100e-6 and [n for _, n in calls] == [3, 3]
    threads.shutdown()


def test_without_a_wait_requests_of_one_turn_still_share_a_call(monkeypatch):
    loop = Turns()
    batcher, _, threads = make(coming=True, batch_wait_us=0, inline_us=1e9)
    calls = started(monkeypatch, loop)
    submitting(batcher, loop, [0.0] * 6)
    assert [n for _, n in calls] == [6]
    threads.shutdown()


# ---- too much, and the end ----------------------------------------------------------------------


def test_a_full_queue_is_429(tmp_path):
    settings = Settings(inline_us=0, limits=Limits(queue_tasks=10))
    with in_process(tmp_path, store=None, settings=settings) as service:
        requests = [("POST", PATH, {"tasks": [task(i)] * 4}) for i in range(8)]
        answers = service.calls(requests)
        statuses = {a.status for a in answers}
        assert statuses == {200, 429}, statuses
        refused = next(a for a in answers if a.status == 429)
        assert refused.headers["retry-after"] == "1" and "at most 10" in refused.json["detail"]
        assert service.call(*requests[0]).status == 200  # there is room again
        # a request that is larger than the queue by itself is run when nothing else waits
        assert service.call("POST", PATH, {"tasks": [task()] * 20}).status == 200


def test_what_was_accepted_is_finished_before_the_end(monkeypatch):
    batcher, _, threads = make(inline_us=0)
    model, held, entered = Model("v", adapter()), threading.Event(), threading.Event()
    run = batching.run

    def slow(model, requests):
        entered.set()
        assert held.wait(SOON)
        return run(model, requests)

    monkeypatch.setattr(batching, "run", slow)

    async def main():
        first = asyncio.create_task(batcher.submit(model, tasks_of(task(0))))
        await asyncio.to_thread(entered.wait, SOON)
        second = asyncio.create_task(batcher.submit(model, tasks_of(task(1))))
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Problem) as refused:
            await batcher.submit(model, tasks_of(task(2)))
        assert refused.value.status == 503
        held.set()
        await closing
        return await asyncio.gather(first, second)

    for i, done in enumerate(asyncio.run(main())):
        assert np.array_equal(done.outputs[0], alone(adapter(), task(i)))
    threads.shutdown()


def test_a_request_that_was_given_up_does_no_harm():
    batcher, _, threads = make()
    model = Model("v", adapter())

    async def main():
        gone = asyncio.create_task(batcher.submit(model, tasks_of(task(0))))
        stays = asyncio.create_task(batcher.submit(model, tasks_of(task(1))))
        await asyncio.sleep(0)
        gone.cancel()
        return await stays

    assert np.array_equal(asyncio.run(main()).outputs[0], alone(adapter(), task(1)))
    threads.shutdown()
