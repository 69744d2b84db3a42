"""Services to test: in this process without a socket, or as a process with one. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import pymeta
from pymeta.spec.architecture import Architecture
from pymeta.spec.losses import describe_loss

SOON = 120.0  # seconds after which a test gives up; a loaded machine may need many of them
STALLED, BROKEN_OFF = object(), object()  # in the place of a chunk of a body
LAYERS = (("linear", 3, 5, True), ("tanh",), ("linear", 5, 1, True))


def adapter(seed: int = 0, layers=LAYERS, loss="mse", dtype=np.float32, **options):
    """A small adapter with random weights."""
    kinds = {"linear": ("weight", "bias"), "embedding": ("tables.0",)}
    names = tuple(
        f"{i}.{kind}" for i, layer in enumerate(layers) for kind in kinds.get(layer[0], ())
    )
    chain = Architecture(layers, names, names, False)
    random = np.random.default_rng(seed)
    start = {n: random.normal(size=s).astype(dtype) for n, s in chain.shapes().items()}
    recipe = {"optimizer": pymeta.SGD(0.1), "schedule": pymeta.Schedule(steps=3), **options}
    return pymeta.Adapter(chain, start, adapted=names, loss=describe_loss(loss), **recipe)


def wide_adapter(seed: int = 0, **options):
    """Another shape: four features."""
    return adapter(seed, (("linear", 4, 5, True), ("tanh",), ("linear", 5, 1, True)), **options)


def task(seed: int = 0, rows: int = 7, queries: int = 2, features: int = 3) -> dict[str, Any]:
    """A task as JSON has it."""
    random = np.random.default_rng(seed)
    return {
        "xs": random.normal(size=(rows, features)).round(3).tolist(),
        "ys": random.normal(size=rows).round(3).tolist(),
        "xq": random.normal(size=(queries, features)).round(3).tolist(),
    }


def alone(model: pymeta.Adapter, given: dict[str, Any]) -> np.ndarray:
    """What a lone call of the adapter predicts for such a task."""
    weights = given.get("weights")
    return model.adapt_predict(
        np.array(given["xs"], model.dtype).reshape(-1, model.in_features),
        np.array(given["ys"], model.dtype),
        np.array(given["xq"], model.dtype).reshape(-1, model.in_features),
        weights=None if weights is None else np.array(weights, model.dtype),
    )


class Answer(NamedTuple):
    """Of an HTTP request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


# ---- in this process ----------------------------------------------------------------------------


class InProcess:
    """An app on an event loop in a thread of its own; `call` is a request."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._context = app.router.lifespan_context(app)
        self.run(self._context.__aenter__())

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(SOON)

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        return self.run(self.request(method, path, body, **options))

    def calls(self, requests: list[tuple[str, str, Any]]) -> list[Answer]:
        """All at once."""

        async def together() -> list[Answer]:
            return await asyncio.gather(*(self.request(*each) for each in requests))

        return self.run(together())

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        chunks: list[Any] | None = None,
        server: str = "127.0.0.1",
        gone: bool = False,
    ) -> Answer:
        data = body if isinstance(body, bytes) else b"" if body is None else _dumped(body)
        given = {"host": "localhost", "content-type": "application/json", **(headers or {})}
        path, _, query = path.partition("?")
        left = [data] if chunks is None else list(chunks)
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "",
            "query_string": query.encode(), "server": (server, 80), "client": ("127.0.0.1", 1),
            "headers": [(k.lower().encode(), v.encode()) for k, v in given.items()],
        }  # fmt: skip
        sent: list[Any] = []

        async def receive() -> Any:
            if sent and gone:
                return {"type": "http.disconnect"}
            if not left or left[0] is STALLED:
                await asyncio.Event().wait()
            chunk = left.pop(0)
            if chunk is BROKEN_OFF:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": chunk, "more_body": bool(left)}

        async def send(message: Any) -> None:
            sent.append(message)
            if gone:
                raise RuntimeError("the handle is closed")

        await self.app(scope, receive, send)
        if gone:
            return Answer(0, {}, b"")
        found = {k.decode().lower(): v.decode() for k, v in sent[0]["headers"]}
        return Answer(sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:]))

    def close(self) -> None:
        self.run(self._context.__aexit__(None, None, None))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(SOON)
        self.loop.close()


def _dumped(body: Any) -> bytes:
    return json.dumps(body).encode()


@contextlib.contextmanager
def in_process(folder: Path, model: Any = None, **options: Any) -> Iterator[InProcess]:
    """A service of an adapter, with a store in the folder."""
    from pymeta.serve import create_app

    path = folder / "adapter.safetensors"
    if model is not None or not path.exists():
        (model or adapter()).save(path)
    options = {"store": f"sqlite:///{folder / 'rows.db'}", **options}
    running = InProcess(create_app(path, **options))
    try:
        yield running
    finally:
        running.close()


# ---- a process of its own -----------------------------------------------------------------------


class Process:
    """`pymeta serve` on a free port."""

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "pymeta", "serve", "adapter.safetensors", "--port", "0"]
        self._log, self._said = (folder / "log.jsonl").open("ab"), (folder / "said").open("wb")
        self.start_of_log = self._log.tell()
        self.process = subprocess.Popen(
            [*command, *options],
            cwd=folder,
            stdout=self._said,
            stderr=self._log,
            env={**os.environ, "PYMETA_NUM_THREADS": "1", **environment},
        )
        self.port = 0

    def lines(self) -> list[dict[str, Any]]:
        data = (self.folder / "log.jsonl").read_bytes()[self.start_of_log :]
        whole = data[: data.rfind(b"\n") + 1].decode().splitlines()
        return [json.loads(line) for line in whole if line.startswith("{")]

    def wait(self) -> Process:
        """Until it is ready."""

        def ready() -> bool:
            assert self.process.poll() is None, (self.folder / "log.jsonl").read_text()
            said = (self.folder / "said").read_text()
            if said.endswith("\n"):
                self.port = int(json.loads(said)["url"].rpartition(":")[2])
            with contextlib.suppress(OSError, http.client.HTTPException):
                return bool(self.port) and self.call("GET", "/readyz").status == 200
            return False

        until(ready)
        return self

    def connection(self, timeout: float = SOON) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        connection = self.connection()
        try:
            data = body if isinstance(body, bytes) or body is None else _dumped(body)
            given = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, data, given)
            got = connection.getresponse()
            return Answer(got.status, {k.lower(): v for k, v in got.getheaders()}, got.read())
        finally:
            connection.close()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(SOON)
        self._close()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(SOON)
        finally:
            self.process.kill()
            self._close()

    def _close(self) -> None:
        self._log.close()
        self._said.close()


@contextlib.contextmanager
def served(folder: Path, *options: str, model: Any = None, **environment: str) -> Iterator[Process]:
    """A service that is stopped at the end."""
    if model is not None or not (folder / "adapter.safetensors").exists():
        (model or adapter()).save(folder / "adapter.safetensors")
    process = Process(folder, *options, **environment)
    try:
        yield process.wait()
    finally:
        process.stop()


def until(condition: Any, seconds: float = SOON) -> None:
    """Wait for something to be so; fail where it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
