"""Logs: a line of JSON each. No feature, target or token is ever in one, and no entity's name."""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import datetime, timezone

from pydantic_core import to_json

LOGGER = logging.getLogger("pymeta.serve")


class JsonLines(logging.Formatter):
    """A record and its `fields` as JSON.

    Of an exception the type and the places in the code are given, not its message, which may
    repeat what a request held.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])
            line["at"] = [f"{frame.filename}:{frame.lineno}" for frame in frames[-8:]]
        return to_json(line).decode()


def to_stderr(level: str) -> None:
    """Send the service's lines, and uvicorn's, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("pymeta.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.error").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether uvicorn says what we do not know: we leave an answer off when its client is gone."""
    return not record.getMessage().startswith("ASGI callable returned without")
