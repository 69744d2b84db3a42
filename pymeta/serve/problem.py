"""Errors as RFC 9457 has them: application/problem+json, with the field that is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):
    """An answer other than the one that was asked for.

    Args:
        status: of the answer.
        detail: a sentence for whoever sent the request; no features, no paths.
        field: where in the request it is, such as "tasks.0.xs.3".
        headers: of the answer, such as Retry-After.
        more: other members of the body.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        """Keep what the answer will say."""
        super().__init__(detail)
        self.status, self.detail, self.field = int(status), detail, field
        self.headers, self.more = dict(headers or {}), more

    def response(self, request_id: str | None = None) -> Response:
        """The answer."""
        title = HTTPStatus(self.status).phrase
        body = {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail}
        if self.field is not None:
            body["field"] = self.field
        if request_id is not None:
            body["request_id"] = request_id
        headers = {**self.headers, "Cache-Control": "no-store"}
        return Response(to_json({**body, **self.more}), self.status, headers, MEDIA_TYPE)


def invalid(field: str, detail: str, **more: Any) -> Problem:
    """422: the request was understood, but one of its values will not do."""
    return Problem(422, f"{field}: {detail}", field, **more)


def busy(detail: str, seconds: float = 1.0) -> Problem:
    """429: too much at once."""
    return Problem(429, detail, headers={"Retry-After": str(max(1, round(seconds)))})


def unavailable(detail: str, seconds: float = 2.0) -> Problem:
    """503: not now."""
    return Problem(503, detail, headers={"Retry-After": str(max(1, round(seconds)))})


def of_validation(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """422 (400 where it is no JSON at all) of pydantic's errors; what was sent is not repeated."""
    found = [(_place(error["loc"]), error["msg"]) for error in errors]
    if any(error["type"] == "json_invalid" for error in errors):
        return Problem(400, f"the body is not JSON: {found[0][1]}")
    # Where a value may have several forms, the error that lies deepest is that of the form meant.
    place, message = max(found, key=lambda each: each[0].count("."))
    listed = [{"field": place, "detail": message} for place, message in found[:20]]
    return Problem(422, f"{place}: {message}", place, errors=listed)


def _place(loc: Sequence[str | int]) -> str:
    """A place in a body; the names of a union's members, which pydantic puts in, left out."""
    return ".".join(str(p) for p in loc if not (isinstance(p, str) and "[" in p)) or "body"
