"""POST /v1/adapt-predict: tasks in, predictions out, nothing kept."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pymeta.models.arrays import AdaptedArrays
from pymeta.serve import explain, schemas, wire
from pymeta.serve.routes.base import (
    EXPLAIN,
    PROBABILITIES,
    Route,
    declared,
    service_of,
)
from pymeta.serve.service import Service, flag

router = APIRouter(route_class=Route, tags=["predictions"])


@declared(
    router,
    "POST /v1/adapt-predict",
    "read",
    "Adapt to each task's support rows and predict its query rows",
    schemas.Predictions,
    schemas.AdaptPredict,
    binary=(wire.NPZ, wire.ARROW),
    parameters=(EXPLAIN, PROBABILITIES),
)
async def adapt_predict(request: Request) -> Response:
    """One or many tasks, each with its own number of rows."""
    service = service_of(request)
    kind = wire.kind_of(request.headers.get("content-type"))
    explains, probabilities = flag(request, "explain"), flag(request, "probabilities")
    body = await service.body(request)
    model = service.model
    with service.metrics.stage("decode"):
        tasks = wire.read_tasks(kind, body, model, service.settings.limits)
        if explains:
            limit = service.settings.limits.explained_values
            explain.check_cost(model.adapter.architecture, tasks.xq, limit)
    done = await service.batcher.submit(model, tasks, keeps=explains)
    answer = wire.Answer(model.version, done.outputs, done.status)
    if probabilities:
        answer.probabilities = model.probabilities(done.outputs)
    if not explains:
        with service.metrics.stage("encode"):
            return wire.respond(kind, answer)
    means = [explain.mean_of(x, model.adapter.architecture) for x in tasks.xs]
    return await explained(service, kind, answer, done.models, means, tasks.xq)


async def explained(
    service: Service,
    kind: str,
    answer: wire.Answer,
    models: AdaptedArrays | None,
    means: Sequence[np.ndarray],
    xq: Sequence[np.ndarray],
) -> Response:
    """The answer with attributions and reasons; computed in a thread."""
    assert models is not None

    def work() -> Response:
        with service.metrics.stage("explain"):
            found = explain.attributions(models, means, xq)
            answer.attributions, answer.explained = list(found.values), list(found.outputs)
            described = explain.described(found, service.features)
        with service.metrics.stage("encode"):
            return wire.respond(kind, answer, described, explain.METHOD)

    return await asyncio.get_running_loop().run_in_executor(service.threads, work)
