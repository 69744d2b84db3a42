"""What the routes of one app share."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from pymeta.serve.auth import Guard
from pymeta.serve.batching import Batcher
from pymeta.serve.entities import Entities
from pymeta.serve.gate import Arrivals
from pymeta.serve.metrics import Metrics
from pymeta.serve.model import Model
from pymeta.serve.problem import Problem
from pymeta.serve.retraining import Retraining
from pymeta.serve.serving import Serving
from pymeta.serve.settings import Settings

T = TypeVar("T")


@dataclass
class Service:
    """The parts of a service.

    Attributes:
        features: the names of the features, for reasons; None where nobody gave them.
        tables: one thread for all Parquet files, since Arrow keeps memory for each that it runs in.
        ready: whether requests are wanted: not before the start, not during the end.
    """

    settings: Settings
    serving: Serving
    guard: Guard
    metrics: Metrics
    arrivals: Arrivals
    batcher: Batcher
    kept: Entities | None
    retraining: Retraining | None
    threads: ThreadPoolExecutor
    features: Sequence[str] | None
    tables: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "pymeta-parquet")
    )
    ready: bool = False
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def model(self) -> Model:
        """The model that serves now."""
        return self.serving.model

    @property
    def entities(self) -> Entities:
        """What is kept; 404 where the service has no store."""
        if self.kept is None:
            raise Problem(404, "this service was started without a store")
        return self.kept

    def start(self) -> None:
        """Begin to watch files; on the event loop."""
        if self.settings.watch_seconds:
            create = asyncio.get_running_loop().create_task
            self._tasks.append(create(self.serving.watch(self.settings.watch_seconds)))
            self._tasks.append(create(self._refresh_tokens()))
        if self.retraining is not None:
            self.retraining.start()
        self.ready = True

    async def stop(self) -> None:
        """Finish what was accepted, and let everything go."""
        self.ready = False
        if self.retraining is not None:
            await self.retraining.stop()
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.batcher.close()
        self.threads.shutdown(wait=True)
        self.tables.shutdown(wait=True)
        if self.kept is not None:
            self.kept.store.close()

    async def of_tables(self, stage: str, function: Callable[..., T], *args: Any) -> T:
        """A call that reads or writes a Parquet file, in the thread for them."""
        with self.metrics.stage(stage):
            return await asyncio.get_running_loop().run_in_executor(self.tables, function, *args)

    async def _refresh_tokens(self) -> None:
        while True:
            await asyncio.sleep(self.settings.watch_seconds)
            await asyncio.to_thread(self.guard.refresh)

    async def body(self, request: Request) -> bytes:
        """The whole body; a Problem where it is too long, too slow or broken off."""
        limits = self.settings.limits
        length = request.headers.get("content-length")
        if length is not None and length.isdigit() and int(length) > limits.body_bytes:
            raise _too_long(limits.body_bytes)
        with self.metrics.stage("body"):
            try:
                return await _within(limits.body_seconds, _gathered(request, limits.body_bytes))
            except asyncio.TimeoutError:
                raise Problem(
                    408,
                    f"the body did not arrive within {limits.body_seconds:g} seconds",
                    headers={"Connection": "close"},
                ) from None
            except ClientDisconnect:
                raise Problem(400, "the body was broken off") from None
            finally:
                self.arrivals.end(request.scope)


async def _within(seconds: float, reading: Coroutine[Any, Any, bytes]) -> bytes:
    """The result, or TimeoutError."""
    if sys.version_info >= (3, 11):  # unlike wait_for, it needs no task of its own
        async with asyncio.timeout(seconds):
            return await reading
    return await asyncio.wait_for(reading, seconds)


async def _gathered(request: Request, limit: int) -> bytes:
    chunks: list[bytes] = []
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > limit:
            raise _too_long(limit)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_long(limit: int) -> Problem:
    headers = {"Connection": "close"}
    return Problem(413, f"the body has more than {limit} bytes", "body", headers=headers)


def flag(request: Request, name: str) -> bool:
    """A query parameter that is true or false; false where it is left out."""
    if not request.scope["query_string"]:
        return False
    given: Any = request.query_params.get(name, "false")
    if given not in ("true", "false", "1", "0"):
        raise Problem(422, f"{name}: expected true or false", name)
    return given in ("true", "1")
