"""Health, readiness and metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from pymeta.serve.problem import Problem
from pymeta.serve.routes.base import Route, declared, service_of

router = APIRouter(route_class=Route, tags=["operations"])


@declared(router, "GET /healthz", "open", "Whether the process lives")
async def healthz(request: Request) -> Response:
    """It does, if it answers."""
    return Response(b'{"status":"ok"}', media_type="application/json")


@declared(router, "GET /readyz", "open", "Whether it can serve: model and store; else 503")
async def readyz(request: Request) -> Response:
    """The serving version; 503 with the reason where requests would fail."""
    service = service_of(request)
    body = {"status": "ok", "model": service.model.version}
    if service.serving.failure is not None:
        body["last_refused"] = service.serving.failure
    try:
        if not service.ready:
            raise Problem(503, "the service is starting or shutting down")
        if service.kept is not None:
            await service.kept.stored(service.kept.store.ping)
    except Problem as problem:
        body |= {"status": "unavailable", "detail": problem.detail}
        return Response(to_json(body), 503, media_type="application/json")
    return Response(to_json(body), media_type="application/json")


@declared(
    router, "GET /metrics", "read", "Prometheus' text form", answers={"text/plain": {"schema": {}}}
)
async def metrics(request: Request) -> Response:
    """All numbers of the service."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)
