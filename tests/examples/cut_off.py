"""Training that is cut off, as tests of checkpoints need it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def cut_off(episodes: type, tasks: int, at: int) -> Iterator[None]:
    """What runs inside ends with InterruptedError, at its `at`-th draw of so many tasks."""
    draw: Any = episodes.__call__
    drawn: list[int] = []

    def stopping(self: Any, wanted: int) -> Any:
        drawn.append(wanted)
        if drawn.count(tasks) == at:
            raise InterruptedError
        return draw(self, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes, "__call__", stopping)
        with pytest.raises(InterruptedError):
            yield
