"""What the service does with entities: store, adapt once, predict, erase."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from time import time_ns
from typing import Any, TypeVar

import numpy as np

from pymeta.serve import explain
from pymeta.serve.batching import Batcher
from pymeta.serve.cache import Adapted, Cache
from pymeta.serve.metrics import Metrics
from pymeta.serve.model import Model
from pymeta.serve.problem import Problem
from pymeta.serve.store import Labelled, Store
from pymeta.serve.wire import Tasks

T = TypeVar("T")


class Entities:
    """Entities of one service; used on its event loop, the store in threads."""

    def __init__(
        self, store: Store, batcher: Batcher, cache: Cache, metrics: Metrics, threads: Executor
    ) -> None:
        """Nothing is read yet."""
        self.store, self._batcher, self._cache = store, batcher, cache
        self._metrics, self._threads = metrics, threads
        self._coming: dict[int, asyncio.Task[Adapted]] = {}  # being adapted, by entity

    async def stored(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """A call of the store, in a thread."""
        with self._metrics.stage("store"):
            call = partial(function, *args, **options)
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def append(self, name: str, rows: Labelled, **options: Any) -> dict[str, Any]:
        """As `Store.append`."""
        answer = await self.stored(self.store.append, name, rows, **options)
        if not answer["replayed"]:
            self._metrics.appended.inc(len(rows))
        return answer

    async def adapted(self, model: Model, name: str) -> tuple[Adapted, bool]:
        """The weights adapted to what is stored, and whether they were there already.

        Raises:
            Problem: 404 where there is no such entity; 409 where its rows do not suit the model.
        """
        entity = await self.stored(self.store.entity, name)
        found = self._cache.get(entity.id, entity.revision, model)
        if found is not None:
            self._metrics.hits.inc()
            return found, True
        self._metrics.misses.inc()
        coming = self._coming.get(entity.id)
        if coming is None:  # the first who asks; others wait for the same
            coming = asyncio.create_task(self._adapt(model, name, entity.id))
            self._coming[entity.id] = coming
            coming.add_done_callback(partial(self._keep, entity.id))
        made = await asyncio.shield(coming)
        if made.model is not model or made.revision < entity.revision:
            made = await self._adapt(model, name, entity.id)
        return made, False

    async def erase(self, name: str) -> bool:
        """Erase an entity, its cached weights included; whether there was one."""
        erased = await self.stored(self.store.delete, name)
        if erased is None:
            return False
        self._coming.pop(erased, None)  # what is on its way is not kept
        self._cache.drop(erased)
        self._metrics.cached.set(len(self._cache))
        return True

    def _keep(self, entity: int, coming: asyncio.Task[Adapted]) -> None:
        """Cache what has been adapted, unless the entity was erased meanwhile."""
        if self._coming.get(entity) is not coming:
            return
        del self._coming[entity]
        if not coming.cancelled() and coming.exception() is None:
            self._cache.put(entity, coming.result())
            self._metrics.cached.set(len(self._cache))

    async def _adapt(self, model: Model, name: str, entity: int) -> Adapted:
        found, rows = await self.stored(self.store.rows, name)
        if found.id != entity:
            raise Problem(404, "there is no such entity", "id")
        tasks = suited(model, rows)
        done = await self._batcher.submit(model, tasks, keeps=True)
        assert done.models is not None
        mean = explain.mean_of(tasks.xs[0], model.adapter.architecture)
        return Adapted(model, found.revision, done.models, mean, len(rows))


def suited(model: Model, rows: Labelled) -> Tasks:
    """Stored rows as a task of the model; 409 where they do not suit it."""
    count = len(rows)
    y = rows.y.reshape(-1) if rows.y.shape[1] == 1 else rows.y
    try:
        x = model.rows("xs", rows.x)
        y = model.targets("ys", y, count)
        weights = model.weights("weights", rows.weights, count)
    except Problem as problem:
        raise Problem(
            409, f"the stored rows do not suit the model {model.version}: {problem.detail}", "id"
        ) from None
    no_queries = np.empty((0, model.adapter.in_features), model.adapter.dtype)
    # rows that all weigh 1 are computed as if nobody had spoken of weights
    given = None if (rows.weights == 1).all() else [weights]
    return Tasks([x], [y], given, [no_queries])


def arrived(count: int) -> np.ndarray:
    """The time now, for so many rows: int64 microseconds since 1970, UTC."""
    return np.full(count, time_ns() // 1000, np.int64)
