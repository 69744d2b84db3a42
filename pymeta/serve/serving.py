"""Which model serves: loaded from the registry, swapped between batches, watched for changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from pymeta.serve.metrics import Metrics
from pymeta.serve.model import Model
from pymeta.serve.registry import Refused, Registry, check_shape

_log = logging.getLogger("pymeta.serve")


class Serving:
    """The serving model. A request keeps the one that was there when it came.

    `model` is replaced as a whole; who holds the old one finishes with it.
    """

    def __init__(self, registry: Registry, source: Path | None, metrics: Metrics) -> None:
        """Load the model that the folder names, or make one of `source`.

        Raises:
            Refused: there is none, or it will not do.
            OSError: a file cannot be read or written.
        """
        self.registry, self._source, self._metrics = registry, source, metrics
        self._lock = threading.Lock()  # one change at a time
        self._seen: object = None
        self.failure: str | None = None  # why the last reload was refused
        if source is not None:
            version = registry.import_source(source)
            if version is not None:
                registry.load(version.name)  # before it replaces one that works
                registry.promote(version.name)
                registry.imported(version)
        name = registry.manifest().serving
        if name is None:
            raise Refused(f"{registry.folder}: no version serves; give an adapter's file")
        self.model: Model = registry.load(name)
        metrics.serving(name)
        self._seen = self._signature()

    def reload(self) -> tuple[str, str]:
        """Import the source where it has changed, and serve what the folder says.

        Returns:
            The name of the version that serves now, and of the one that did.

        Raises:
            Refused: the new one will not do; the old one serves on.
        """
        with self._lock:
            self.failure = None
            try:
                return self._counted(self._reload)
            except Refused as refused:
                self.failure = str(refused)
                raise

    def promote(self, name: str) -> tuple[str, str]:
        """Serve a version of the folder; as `reload`."""
        with self._lock:
            return self._counted(lambda: self._promote(name))

    def roll_back(self) -> tuple[str, str]:
        """Serve the version that served before; as `reload`."""
        with self._lock:
            return self._counted(self._roll_back)

    async def watch(self, seconds: float) -> None:
        """Reload whenever the source or the folder has changed; until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            seen = await asyncio.to_thread(self._signature)
            if seen == self._seen:
                continue
            with contextlib.suppress(Refused):
                await asyncio.to_thread(self.reload)
            self._seen = seen

    def _counted(self, change: Callable[[], None]) -> tuple[str, str]:
        before = self.model.version
        try:
            change()
        except (Refused, OSError) as error:
            reason = str(error) if isinstance(error, Refused) else "a file cannot be read"
            self._metrics.loads.labels("refused").inc()
            _log.warning("model refused", extra={"fields": {"reason": reason, "serving": before}})
            raise Refused(reason) from None
        self._seen = self._signature()
        return self.model.version, before

    def _reload(self) -> None:
        if self._source is not None:
            version = self.registry.import_source(self._source)
            if version is not None:
                self._promote(version.name)
                self.registry.imported(version)
                return
        name = self.registry.manifest().serving
        if name is not None and name != self.model.version:
            self._swap(self._acceptable(name))

    def _promote(self, name: str) -> None:
        model = self._acceptable(name)
        self.registry.promote(name)
        self._swap(model)

    def _roll_back(self) -> None:
        served = self.registry.manifest().served
        if len(served) < 2:
            raise Refused("no version served before this one")
        model = self._acceptable(served[-2])
        self.registry.roll_back()
        self._swap(model)

    def _acceptable(self, name: str) -> Model:
        model = self.registry.load(name)
        check_shape(self.model.shape, model.shape)
        return model

    def _swap(self, model: Model) -> None:
        before, self.model = self.model.version, model
        self._metrics.loads.labels("loaded").inc()
        self._metrics.serving(model.version)
        _log.info("model serves", extra={"fields": {"version": model.version, "before": before}})

    def _signature(self) -> object:
        """What changes when a file does."""
        found = []
        for path in (self._source, self.registry.folder / "versions.json"):
            try:
                stat = None if path is None else path.stat()
            except OSError:
                stat = None
            found.append(stat and (stat.st_mtime_ns, stat.st_size, stat.st_ino))
        return tuple(found)
