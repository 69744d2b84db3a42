"""Who may do what: bearer tokens, of which the file holds SHA-256 alone.

    {"tokens": [{"name": "risk", "sha256": "9f86d0...", "scopes": ["read", "write"],
                 "per_second": 100, "expires": "2027-01-01T00:00:00Z"}]}

A token is 256 random bits (`pymeta token` makes one), so that a plain hash is enough: there is
nothing to guess. It is compared with every entry in constant time. The file is read again when it
changes; a file that is damaged then leaves the tokens as they were.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import Any

from pymeta.serve.problem import Problem, busy

SCOPES = ("read", "write", "admin")
_NAME = re.compile(r"[\w.-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger("pymeta.serve")


@dataclass
class Token:
    """An entry of the file, and how much of its rate is left."""

    name: str
    sha256: str
    scopes: frozenset[str]
    per_second: float | None
    expires: datetime | None
    left: float = field(default=0.0, compare=False)
    since: float = field(default=0.0, compare=False)

    def take(self, now: float) -> float:
        """Take one request from a bucket that holds a second's worth; the seconds to wait, or 0."""
        if self.per_second is None:
            return 0.0
        most = max(1.0, self.per_second)
        self.left = min(most, self.left + (now - self.since) * self.per_second)
        self.since = now
        if self.left >= 1:
            self.left -= 1
            return 0.0
        return (1 - self.left) / self.per_second


def read_tokens(path: Path) -> list[Token]:
    """The tokens of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file; the message says where, and repeats no hash.
    """
    try:
        given = json.loads(path.read_bytes())
        entries = given["tokens"]
        return [_token(f"{path.name}: token {i}", entry) for i, entry in enumerate(entries)]
    except (TypeError, KeyError, json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f'{path.name}: expected {{"tokens": [...]}}') from None


def _token(what: str, entry: Any) -> Token:
    known = {"name", "sha256", "scopes", "per_second", "expires"}
    if not isinstance(entry, dict) or not {"name", "sha256", "scopes"} <= set(entry) <= known:
        raise ValueError(f"{what}: expected name, sha256, scopes, and maybe per_second, expires")
    if not isinstance(entry["name"], str) or not _NAME.fullmatch(entry["name"]):
        raise ValueError(f"{what}: name: expected letters, digits, dots and dashes, at most 64")
    if not isinstance(entry["sha256"], str) or not _HASH.fullmatch(entry["sha256"]):
        raise ValueError(f"{what}: sha256: expected 64 hexadecimal digits")
    scopes = entry["scopes"]
    if not isinstance(scopes, list) or not scopes or not set(scopes) <= set(SCOPES):
        raise ValueError(f"{what}: scopes: expected some of {', '.join(SCOPES)}")
    rate = entry.get("per_second")
    if rate is not None and not (type(rate) in (int, float) and 0 < rate < 1e9):
        raise ValueError(f"{what}: per_second: expected a number > 0")
    expires = entry.get("expires")
    if expires is not None:
        expires = _moment(what, expires)
    first = 0.0 if rate is None else max(1.0, rate)
    return Token(entry["name"], entry["sha256"], frozenset(scopes), rate, expires, left=first)


def _moment(what: str, text: Any) -> datetime:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except (AttributeError, ValueError):
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError(f"{what}: expires: expected a time with a zone, as 2027-01-01T00:00:00Z")
    return moment


def new_token(
    name: str, scopes: list[str], per_second: float | None, expires: str | None
) -> tuple[str, dict[str, Any]]:
    """A fresh token, and its entry for the file; ValueError where an argument will not do."""
    token = f"pm_{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(token.encode()).hexdigest()
    entry: dict[str, Any] = {"name": name, "sha256": digest, "scopes": scopes}
    entry |= {} if per_second is None else {"per_second": per_second}
    entry |= {} if expires is None else {"expires": expires}
    _token("token", entry)
    return token, entry


class Guard:
    """Lets a request in, or raises.

    Args:
        path: of the token file; None for no tokens, where only loopback is served.
        open_beyond_loopback: serve other addresses without tokens all the same.
        now: the time of day, for tests.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        open_beyond_loopback: bool = False,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        """Read the file; OSError, ValueError where that cannot be."""
        self._path, self._open, self._now = path, open_beyond_loopback, now
        self._seen: Any = None
        self._tokens: list[Token] = []
        if path is not None:
            self._seen = self._signature()
            self._tokens = read_tokens(path)

    def admit(self, scope: Any, wanted: str) -> str | None:
        """The name of the token that a request came with; None where there are no tokens.

        Args:
            scope: of ASGI.
            wanted: what it asks for: "read", "write" or "admin".

        Raises:
            Problem: 401 without a good token, 403 with one of other scopes, or from beyond
                loopback without tokens; 429 where its rate is used up.
        """
        if self._path is None:
            self._check_loopback(scope)
            return None
        token = self._find(_header(scope, b"authorization"))
        if token is None:
            raise _unauthorized("expected a valid token, as in Authorization: Bearer TOKEN")
        if token.expires is not None and self._now() >= token.expires:
            raise _unauthorized("the token has expired")
        if wanted not in token.scopes:
            raise Problem(403, f"this needs the scope {wanted}, which the token does not have")
        seconds = token.take(monotonic())
        if seconds:
            raise busy(f"at most {token.per_second:g} requests a second", seconds)
        return token.name

    def refresh(self) -> None:
        """Read the file again if it has changed; a damaged one changes nothing."""
        seen = self._signature()
        if self._path is None or seen == self._seen:
            return
        self._seen = seen
        try:
            found = read_tokens(self._path)
        except (OSError, ValueError) as error:
            _log.warning("tokens not read", extra={"fields": {"reason": str(error)}})
            return
        kept = {token.sha256: token for token in self._tokens}
        for token in found:
            if token.sha256 in kept:
                token.left, token.since = kept[token.sha256].left, kept[token.sha256].since
        self._tokens = found

    def _find(self, header: bytes | None) -> Token | None:
        """The token of a header; all are looked at, whichever it is."""
        kind, _, value = (header or b"").partition(b" ")
        digest = hashlib.sha256(value.strip()).hexdigest()
        found = None
        for token in self._tokens:
            if hmac.compare_digest(token.sha256, digest):
                found = token
        return found if kind.lower() == b"bearer" else None

    def _check_loopback(self, scope: Any) -> None:
        """A Problem beyond loopback: by the address it came to, and by the name it was called."""
        if self._open:
            return
        host = (_header(scope, b"host") or b"localhost").decode("latin-1")
        name = re.sub(r":\d+$", "", host).strip("[]")
        server = (scope.get("server") or (None,))[0]
        if not _is_loopback(name) or (server and _is_address(server) and not _is_loopback(server)):
            raise Problem(403, "without tokens this service is for its own machine alone")

    def _signature(self) -> Any:
        try:
            stat = self._path.stat() if self._path else None
        except OSError:
            return None
        return stat and (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _unauthorized(detail: str) -> Problem:
    return Problem(401, detail, headers={"WWW-Authenticate": "Bearer"})


def _header(scope: Any, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


@lru_cache(256)
def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@lru_cache(256)
def _is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
