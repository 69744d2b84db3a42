"""How a path is declared, once: its method, the scope it needs, and how OpenAPI describes it.

A handler takes the request and returns the answer. FastAPI's own reading of bodies is left out,
since ours is bounded and knows three formats; its OpenAPI page is made of what `declared` says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from pymeta.serve.auth import SCOPES
from pymeta.serve.problem import MEDIA_TYPE
from pymeta.serve.service import Service

Handler = Callable[[Request], Awaitable[Response]]
H = TypeVar("H", bound=Handler)

_ID = r"1 to 200 letters, digits and . _ : @ -"


class Route(APIRoute):
    """A path whose handler is called as it is, once the request has been let in."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """Let in, then handle; a handler that does not say what it needs cannot be declared."""
        handler, template = self.endpoint, self.path
        wanted: str = handler.needs  # type: ignore[attr-defined]

        async def handle(request: Request) -> Response:
            request.scope["pymeta.route"] = template
            if wanted != "open":
                guard = service_of(request).guard
                request.scope["pymeta.token"] = guard.admit(request.scope, wanted)
            answer: Response = await handler(request)
            return answer

        return handle


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    service: Service = request.app.state.service
    return service


def declared(
    router: APIRouter,
    request: str,
    scope: str,
    summary: str,
    answer: type[BaseModel] | None = None,
    body: type[BaseModel] | None = None,
    *,
    binary: Sequence[str] = (),
    parameters: Sequence[dict[str, Any]] = (),
    status: int = 200,
    answers: dict[str, Any] | None = None,
) -> Callable[[H], H]:
    """Declare a path: what it is called by, whom it lets in, and what OpenAPI shows of it.

    Args:
        router: of which it becomes a part.
        request: a method and a path, as in "GET /healthz".
        scope: that its token needs; "open" for none, and no token either.
        summary: a line.
        answer: what is answered as JSON.
        body: what is sent as JSON.
        binary: other content types that are read.
        parameters: of the path, the query and the headers.
        status: of a good answer.
        answers: content of the good answer where it is no JSON.
    """
    extra: dict[str, Any] = {"parameters": list(parameters)}
    content: dict[str, Any] = {}
    if body is not None:
        reference = {"$ref": f"#/components/schemas/{body.__name__}"}
        content["application/json"] = {"schema": reference}
        content["application/json"] |= _example(body)
    content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in binary}
    if content:
        extra["requestBody"] = {"required": True, "content": content}
    problem = {"$ref": "#/components/schemas/ProblemBody"}
    responses: dict[int | str, Any] = {
        "default": {"description": "a problem", "content": {MEDIA_TYPE: {"schema": problem}}}
    }
    if answers is not None:
        responses[status] = {"content": answers}
    method, _, path = request.partition(" ")
    options: dict[str, Any] = {
        "summary": summary,
        "response_model": answer,
        "responses": responses,
        "openapi_extra": extra,
        "status_code": status,
    }
    assert scope in (*SCOPES, "open")

    def declare(handler: H) -> H:
        handler.needs = scope  # type: ignore[attr-defined]
        router.add_api_route(path, handler, methods=[method], **options)
        return handler

    return declare


def _example(body: type[BaseModel]) -> dict[str, Any]:
    extra: Any = body.model_config.get("json_schema_extra") or {}
    return {"example": extra["examples"][0]} if "examples" in extra else {}


def parameter(name: str, place: str, description: str, **schema: Any) -> dict[str, Any]:
    """A parameter, for OpenAPI."""
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "description": description,
        "schema": {"type": "string", **schema},
    }


ENTITY = parameter("id", "path", f"the entity: {_ID}", pattern=r"^[\w.:@-]{1,200}$")
KEY = parameter("Idempotency-Key", "header", "the same key again, with the same rows, adds nothing")
EXPLAIN = parameter("explain", "query", "whether to attribute predictions", type="boolean")
PROBABILITIES = parameter("probabilities", "query", "whether to add them", type="boolean")
