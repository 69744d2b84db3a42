"""What a service is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for, and how much may wait.

    Args:
        body_bytes: of a request's body; more is answered 413.
        body_seconds: for the whole body to arrive; longer is answered 408.
        tasks: of a request; more is answered 422.
        rows: of one task's support, or of its queries; more is answered 422.
        queue_tasks: waiting to be adapted, all requests together; more is answered 429.
        explained_values: inputs on the paths of an explanation: its rows times features times 32.
        kept_rows: of an entity; the oldest beyond them are deleted.
        cached_entities: whose adapted weights are kept in memory.

    Raises:
        ValueError: one is not > 0.
    """

    body_bytes: int = 32 * 2**20
    body_seconds: float = 30.0
    tasks: int = 4096
    rows: int = 10_000
    queue_tasks: int = 8192
    explained_values: int = 50_000_000
    kept_rows: int = 10_000
    cached_entities: int = 10_000

    def __post_init__(self) -> None:
        """Check the fields."""
        for each in fields(self):
            if not getattr(self, each.name) > 0:
                raise ValueError(f"{each.name}: expected > 0, got {getattr(self, each.name)}")


@dataclass(frozen=True)
class Settings:
    """How a service runs.

    Args:
        batch_wait_us: how long a request may wait for others, in microseconds; 0 for never.
        batch_tasks: of a batch at most.
        inline_us: batches that are expected to take less run on the event loop, task after task; a
            thread costs more. 0: every batch is one native call in a thread.
        threads: for native calls that take longer, and as many for the store.
        window_rows: how many of an entity's newest rows it is adapted to.
        window_days: how many days before its newest row they may lie; None for any.
        watch_seconds: how often files are looked at for changes; 0 for never.
        limits: what a request may ask for.

    Raises:
        ValueError: one is out of range.
    """

    batch_wait_us: float = 200.0
    batch_tasks: int = 512
    inline_us: float = 2000.0
    threads: int = 4
    window_rows: int = 200
    window_days: float | None = None
    watch_seconds: float = 1.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Check the fields."""
        least = {"batch_wait_us": 0, "inline_us": 0, "watch_seconds": 0}
        least |= {"batch_tasks": 1, "threads": 1, "window_rows": 1}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name}: expected >= {bound}, got {getattr(self, name)}")
        if self.batch_wait_us > 1e6:
            raise ValueError(f"batch_wait_us: expected at most a second, got {self.batch_wait_us}")
        if self.window_days is not None and not self.window_days > 0:
            raise ValueError(f"window_days: expected > 0, got {self.window_days}")
