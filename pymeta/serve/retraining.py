"""Retraining from inside the service: `pymeta retrain` in a process of its own, now or on schedule.

torch stays out of the serving process. What the other process promotes is found by the watch on
the models' folder. One retraining runs at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.cron import CronTrigger

from pymeta.serve.logs import LOGGER


class Retraining:
    """Starts and waits for the other process; used on the event loop alone."""

    def __init__(
        self, store: str, models: Path, options: Sequence[str] = (), schedule: str | None = None
    ) -> None:
        """Nothing runs yet.

        Args:
            store: the URL of the store.
            models: the folder of versions.
            options: of `pymeta retrain`, besides these two.
            schedule: five fields as cron has them, in UTC; None for by request alone.

        Raises:
            ValueError: the schedule is none.
        """
        self._command = [sys.executable, "-m", "pymeta", "retrain", "--models", str(models)]
        self._command += options
        self._store = store
        self._running: asyncio.Task[None] | None = None
        self._scheduler: AsyncIOScheduler | None = None
        try:
            self._trigger = schedule and CronTrigger.from_crontab(schedule, timezone="UTC")
        except ValueError as error:
            raise ValueError(f"retrain: expected five fields as cron has them: {error}") from None

    def start(self) -> None:
        """Begin the schedule, where there is one."""
        if self._trigger:
            self._scheduler = AsyncIOScheduler(timezone="UTC")
            self._scheduler.add_job(self.begin, self._trigger, coalesce=True, max_instances=1)
            self._scheduler.start()

    def begin(self) -> bool:
        """Start the other process, unless one runs; whether it was started."""
        if self._running is not None and not self._running.done():
            return False
        self._running = asyncio.get_running_loop().create_task(self._run())
        return True

    async def stop(self) -> None:
        """End the schedule, and the process if one runs."""
        if self._scheduler is not None:
            self._scheduler.shutdown(wait=False)
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running

    async def _run(self) -> None:
        """The URL goes through a pipe: a command line, which may hold a password, is public."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            "--store-from-stdin",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            said, errors = await process.communicate(self._store.encode())
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
            raise
        lines = (said or errors).decode(errors="replace").strip().splitlines()
        fields = {"status": process.returncode, "said": lines[-1] if lines else ""}
        LOGGER.info("retrained", extra={"fields": fields})
