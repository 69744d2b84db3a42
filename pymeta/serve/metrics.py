"""What `/metrics` shows, in Prometheus' text form."""

from __future__ import annotations

from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (
    *(20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3),
    *(20e-3, 50e-3, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
STAGES = ("body", "decode", "store", "queue", "native", "explain", "encode")


class Timed:
    """Adds the time of a block to a histogram; lighter than a generator's context."""

    __slots__ = ("_begin", "_histogram")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram

    def __enter__(self) -> None:
        self._begin = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._histogram.observe(perf_counter() - self._begin)


class Metrics:
    """The numbers of one service; each app has its own, so that two may live in a process."""

    def __init__(self) -> None:
        """Make all of them, at 0."""
        self.registry = r = CollectorRegistry()
        stage = Histogram(
            "pymeta_stage_seconds", "Time by stage", ["stage"], buckets=_SECONDS, registry=r
        )
        self.stages = {name: stage.labels(name) for name in STAGES}
        self.request = Histogram(
            "pymeta_request_seconds",
            "Time from a request's head to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=r,
        )
        self.answers = Counter("pymeta_answers", "Answers", ["route", "status"], registry=r)
        self._answered: dict[tuple[str, str], tuple[Histogram, Counter]] = {}
        self.batch = Histogram("pymeta_batch_tasks", "Tasks of a batch", buckets=_SIZES, registry=r)
        self.adaptations = Counter("pymeta_adaptations", "Tasks adapted", registry=r)
        self.diverged = Counter(
            "pymeta_diverged", "Tasks with a prediction that is not finite", registry=r
        )
        self.hits = Counter(
            "pymeta_cache_hits", "Predictions by adapted weights that were kept", registry=r
        )
        self.misses = Counter(
            "pymeta_cache_misses", "Predictions that had to adapt first", registry=r
        )
        self.cached = Gauge("pymeta_cached_entities", "Entities in the cache", registry=r)
        self.queue = Gauge("pymeta_queue_tasks", "Tasks that wait for a native call", registry=r)
        self.in_flight = Gauge("pymeta_requests_in_flight", "Requests being answered", registry=r)
        self.appended = Counter("pymeta_rows_appended", "Rows stored", registry=r)
        self.loads = Counter(
            "pymeta_model_loads", "Attempts to load a model", ["outcome"], registry=r
        )
        self.model = Gauge("pymeta_model", "1 for the version that serves", ["version"], registry=r)

    def stage(self, name: str) -> Timed:
        """A context that adds the time of its block to a stage."""
        return Timed(self.stages[name])

    def answered(self, route: str, status: str, seconds: float) -> None:
        """Count an answer."""
        counted = self._answered.get((route, status))
        if counted is None:  # finding them by their labels takes longer than counting
            counted = self.request.labels(route), self.answers.labels(route, status)
            self._answered[route, status] = counted
        counted[0].observe(seconds)
        counted[1].inc()

    def serving(self, version: str) -> None:
        """Say which version serves."""
        self.model.clear()
        self.model.labels(version).set(1)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)
