"""What every request goes through: a request id, a count, a line in the log, and problem bodies.

It is plain ASGI, outermost in the app. `Arrivals` knows which requests have begun and not yet come
with their whole body: those that a batch may wait for.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pymeta.serve.logs import LOGGER
from pymeta.serve.metrics import Metrics
from pymeta.serve.problem import Problem

Direct = dict[tuple[str, str], Callable[[Request], Coroutine[Any, Any, Response]]]
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Arrivals:
    """Requests whose body is not all there."""

    def __init__(self) -> None:
        """None."""
        self._since: dict[int, float] = {}  # by id of the scope, in the order of their beginning

    def begin(self, scope: Scope) -> None:
        """A request has begun."""
        self._since[id(scope)] = perf_counter()

    def end(self, scope: Scope) -> None:
        """Its body is there, or nobody wants it."""
        self._since.pop(id(scope), None)

    def fresh(self, seconds: float) -> bool:
        """Whether one began less than so long ago; one that began earlier is slow."""
        if not self._since:
            return False
        return perf_counter() - next(reversed(self._since.values())) < seconds


class _ClientGone(Exception):
    """There is nobody to answer."""


class Gate:
    """ASGI around the app."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, arrivals: Arrivals, direct: Direct | None = None
    ) -> None:
        """Nothing has come yet.

        Args:
            app: what is behind.
            metrics: where the counts go.
            arrivals: told of each request.
            direct: handlers by method and path that are called at once: finding a route costs as
                much as reading a small body.
        """
        self._app, self._metrics, self._arrivals = app, metrics, arrivals
        self._direct = direct or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; an answer that nobody takes is left off."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = perf_counter(), 0
        given = next((v for k, v in scope["headers"] if k == b"x-request-id"), b"")
        name = given if _ID.fullmatch(given) else secrets.token_hex(8).encode()
        scope["pymeta.request_id"] = name.decode()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name)]
            try:
                await send(message)
            except Exception as error:
                raise _ClientGone from error

        self._arrivals.begin(scope)
        self._metrics.in_flight.inc()
        try:
            try:
                handler = self._direct.get((scope["method"], scope["path"]))
                if handler is None:
                    await self._app(scope, receive, answer)
                else:
                    response = await handler(Request(scope, receive))
                    await response(scope, receive, answer)
            except _ClientGone:
                status = 0
            except Exception as error:
                if not isinstance(error, Problem):
                    LOGGER.error("failed", exc_info=error, extra={"fields": _fields(scope)})
                if status:  # the answer is under way: all that is left is to break it off
                    raise
                await _problem_of(error).response(name.decode())(scope, receive, answer)
        finally:
            self._arrivals.end(scope)
            self._metrics.in_flight.dec()
            self._count(scope, status, perf_counter() - begin)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("pymeta.route", "other")
        self._metrics.answered(route, str(status or "broken off"), seconds)
        if LOGGER.isEnabledFor(20):
            timed = {"status": status, "ms": round(1000 * seconds, 3)}
            LOGGER.info("request", extra={"fields": {**_fields(scope), **timed}})


def _fields(scope: Scope) -> dict[str, Any]:
    """What the log says of a request: the route, not the path, which names an entity."""
    fields = {
        "request_id": scope["pymeta.request_id"],
        "method": scope["method"],
        "route": scope.get("pymeta.route", "other"),
    }
    if scope.get("pymeta.token") is not None:
        fields["token"] = scope["pymeta.token"]
    return fields


def _problem_of(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):
        return Problem(error.status_code, str(error.detail), headers=error.headers)
    return Problem(500, "an error of the service; its log has the request id")
