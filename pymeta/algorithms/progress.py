"""A progress bar that is there when a run turns out to be long."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

Callback: TypeAlias = Callable[[int, "int | None"], object]

_LONG = 2.0  # seconds after which a run is long


def check_progress(progress: Any) -> None:
    """TypeError unless `progress` is a bool or None."""
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"progress: expected a bool or None, got {type(progress).__name__}")


def check_callback(callback: Any) -> None:
    """TypeError unless `callback` can be called, or is None."""
    if callback is not None and not callable(callback):
        raise TypeError(
            f"callback: expected a function of (done, tasks) or None, got {type(callback).__name__}"
        )


class Bar:
    """A tqdm bar that counts tasks; shown from the beginning, after a while, or not at all.

    `callback(done, total)` is told of each advance, whether the bar is shown or not.
    """

    def __init__(
        self, total: int | None, progress: bool | None, callback: Callback | None = None
    ) -> None:
        check_progress(progress)
        check_callback(callback)
        self._callback = callback
        self._total, self._wanted, self._done = total, progress, 0
        self._began = time.monotonic()
        self._bar: Any = None
        if progress:
            self._show()

    def _show(self) -> None:
        from tqdm import tqdm

        # disable=None: not where stderr is no terminal
        quiet = None if self._wanted is None else False
        self._bar = tqdm(total=self._total, unit="task", disable=quiet, initial=self._done)

    def advance(self, tasks: int) -> None:
        """So many more are done."""
        self._done += tasks
        if self._bar is not None:
            self._bar.update(tasks)
        elif self._wanted is None and time.monotonic() - self._began > _LONG:
            self._show()
        if self._callback is not None:
            self._callback(self._done, self._total)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
