"""Entities: append rows, predict from what is stored, look, erase; import and export by Parquet."""

from __future__ import annotations

import re

import numpy as np
from fastapi import APIRouter
from pydantic_core import to_json
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from pymeta.serve import explain, parquet, schemas, wire
from pymeta.serve.entities import arrived
from pymeta.serve.problem import Problem, invalid
from pymeta.serve.routes.base import (
    ENTITY,
    EXPLAIN,
    KEY,
    PROBABILITIES,
    Route,
    declared,
    service_of,
)
from pymeta.serve.routes.stateless import explained
from pymeta.serve.service import flag
from pymeta.serve.store import Labelled, Window, microseconds
from pymeta.spec.show import counted

router = APIRouter(route_class=Route, tags=["entities"])
_NAME = re.compile(r"[\w.:@-]{1,200}", re.ASCII)
_KEY = re.compile(r"[\x21-\x7e]{1,200}")
_PARQUET = {parquet.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}


def check_name(name: str, field: str = "id") -> str:
    """The name of an entity; a Problem where it is none."""
    if not _NAME.fullmatch(name):
        raise invalid(field, "expected 1 to 200 letters, digits and . _ : @ -")
    return name


@declared(
    router,
    "PUT /v1/entities/{id}/rows",
    "write",
    "Append labelled rows",
    schemas.Appended,
    schemas.Rows,
    binary=(wire.NPZ, wire.ARROW),
    parameters=(ENTITY, KEY),
)
async def append(request: Request) -> Response:
    """Acknowledged once the rows are on the disk. The first append makes the entity."""
    service = service_of(request)
    name = check_name(request.path_params["id"])
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise invalid("idempotency-key", "expected 1 to 200 visible characters")
    kind = wire.kind_of(request.headers.get("content-type"))
    entities, body = service.entities, await service.body(request)
    with service.metrics.stage("decode"):
        x, y, w, given = wire.read_rows(kind, body, service.model, service.settings.limits)
    at = arrived(len(x)) if given.at is None else _moments(given.at)
    weights = np.ones(len(x)) if w is None else w.astype(np.float64)
    rows = Labelled(x.astype(np.float64), y.astype(np.float64), weights, at)
    window = given.window and Window(given.window.rows, given.window.days)
    answer = await entities.append(name, rows, key=key, window=window, timed=given.at is not None)
    return _json(answer)


def _moments(at: object) -> np.ndarray:
    """Time stamps as int64 microseconds; a Problem where one has no time zone."""
    found = []
    for i, moment in enumerate(at):  # type: ignore[arg-type,var-annotated]
        if moment is None or moment.tzinfo is None:
            raise invalid(f"at.{i}", "expected a time with a time zone")
        found.append(microseconds(moment))
    return np.array(found, np.int64)


@declared(
    router,
    "POST /v1/entities/{id}/predict",
    "read",
    "Adapt to the entity's rows and predict",
    schemas.EntityPredictions,
    schemas.Queries,
    binary=(wire.NPZ, wire.ARROW),
    parameters=(ENTITY, EXPLAIN, PROBABILITIES),
)
async def predict(request: Request) -> Response:
    """The adapted weights are kept until rows are appended or the model changes."""
    service = service_of(request)
    name = check_name(request.path_params["id"])
    kind = wire.kind_of(request.headers.get("content-type"))
    explains, probabilities = flag(request, "explain"), flag(request, "probabilities")
    entities, body = service.entities, await service.body(request)
    model = service.model
    with service.metrics.stage("decode"):
        xq = wire.read_queries(kind, body, model, service.settings.limits)
        if explains:
            limit = service.settings.limits.explained_values
            explain.check_cost(model.adapter.architecture, [xq], limit)
    adapted, cached = await entities.adapted(model, name)
    with service.metrics.stage("native"):
        (output,) = adapted.models([xq])
    status = [int(not np.isfinite(output).all())]
    answer = wire.Answer(model.version, [output], status)
    answer.more = {"cached": cached, "revision": adapted.revision, "rows": adapted.rows}
    if probabilities:
        answer.probabilities = model.probabilities([output])
    if not explains:
        with service.metrics.stage("encode"):
            return wire.respond(kind, answer)
    return await explained(service, kind, answer, adapted.models, [adapted.mean], [xq])


@declared(
    router,
    "GET /v1/entities/{id}",
    "read",
    "What is stored",
    schemas.EntityState,
    parameters=(ENTITY,),
)
async def look(request: Request) -> Response:
    """How many rows, from when to when, and the window; not the rows."""
    entities = service_of(request).entities
    name = check_name(request.path_params["id"])
    entity, count, oldest, newest = await entities.stored(entities.store.extent, name)
    window = {"rows": entity.window.rows, "days": entity.window.days}
    body = {"id": name, "rows": count, "revision": entity.revision, "window": window}
    return _json({**body, "oldest": oldest, "newest": newest})


@declared(router, "DELETE /v1/entities/{id}", "write", "Erase", status=204, parameters=(ENTITY,))
async def erase(request: Request) -> Response:
    """Rows, remembered keys and adapted weights are gone; 404 where there was nothing."""
    name = check_name(request.path_params["id"])
    if not await service_of(request).entities.erase(name):
        raise Problem(404, "there is no such entity", "id")
    return Response(status_code=204)


@declared(
    router,
    "POST /v1/entities:import",
    "write",
    "Append the rows of a Parquet file",
    schemas.Imported,
    binary=(parquet.MEDIA_TYPE,),
)
async def import_(request: Request) -> Response:
    """Columns: entity, x (list), y (number or list), and maybe at (timestamp) and weight.

    All rows are checked before any is stored. Then each entity's are one transaction; where one
    fails, the answer names how many were stored, and the same file may be sent again: it is known
    by its bytes, and what was stored is not stored twice.
    """
    service = service_of(request)
    entities, body = service.entities, await service.body(request)
    if request.headers.get("content-type", "").partition(";")[0] != parquet.MEDIA_TYPE:
        raise Problem(415, f"content-type: expected {parquet.MEDIA_TYPE}")

    given = body, service.model, service.settings.limits, check_name
    found, timed = await service.of_tables("decode", parquet.read, *given)
    key = parquet.key_of(body)
    done = 0
    for name, rows in found:
        try:
            await entities.append(name, rows, key=key, timed=timed)
        except Problem as problem:
            raise Problem(
                problem.status,
                f"after {done} of {counted(len(found), 'entity')}: {problem.detail}",
                problem.field,
                problem.headers,
                stored=done,
            ) from None
        done += 1
    return _json({"entities": done, "rows": sum(len(rows) for _, rows in found)})


@declared(
    router,
    "GET /v1/entities:export",
    "admin",
    "All rows of all entities as a Parquet file",
    answers=_PARQUET,
)
async def export(request: Request) -> Response:
    """Written to a temporary file first, so that a slow reader holds no connection."""
    service = service_of(request)
    path = await service.of_tables("store", parquet.write, service.entities.store.each)
    return FileResponse(
        path, media_type=parquet.MEDIA_TYPE, background=BackgroundTask(path.unlink, True)
    )


def _json(body: object) -> Response:
    return Response(to_json(body), media_type="application/json")
