"""uvicorn with a socket of our own and patience with nobody.

A connection that has not sent a request's head in time, or whose peer takes no more of an answer
for as long, is closed: the first by the protocol below, the second by the kernel, where it can.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_GRACE_SECONDS = 30


class Protocol(HttpToolsProtocol):
    """Closes a connection whose next request does not get as far as its head in time."""

    patience = 30.0  # seconds
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._head = self.loop.call_later(self.patience, self._too_slow)

    def on_message_begin(self) -> None:
        """A further request on the same connection."""
        super().on_message_begin()
        if self._head is None:
            self._head = self.loop.call_later(self.patience, self._too_slow)

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """There is nothing to wait for."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _too_slow(self) -> None:
        """A loop that was busy may not have looked at what came in time: let it look."""
        self._head = self.loop.call_later(0.1, self.transport.close)


def bind(host: str, port: int, patience: float) -> socket.socket:
    """A listening socket; OSError where the address is taken or not this machine's.

    Args:
        host: an address, or a name of one.
        port: 0 for a free one.
        patience: seconds after which a peer that takes nothing is given up.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # accepted connections inherit it
            milliseconds = round(1000 * patience)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        listener.bind((host, port))
        listener.listen(2048)  # from now on a client that connects waits until it is served
    except BaseException:
        listener.close()
        raise
    return listener


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach an address; a name is looked up."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
        return all(ipaddress.ip_address(str(a).split("%")[0]).is_loopback for a in found)
    except OSError:
        return False


def serve(app: Any, listener: socket.socket, patience: float) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted."""
    config = uvicorn.Config(
        app,
        http=type("Patient", (Protocol,), {"patience": patience}),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        lifespan="on",
    )
    uvicorn.Server(config).run(sockets=[listener])
