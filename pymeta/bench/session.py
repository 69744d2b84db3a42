"""A benchmark's run: worker processes, checks, rounds of timing; one row of results for each case.

For each case everyone prepares (compiles), everyone's numbers are checked against float64, and only
then rounds of timing begin, in which everyone has a turn, so that a slow moment of the machine hits
all of them alike. Nothing runs while a contestant is timed.

On a CUDA device compilers would take most of a short lease. So it goes through the cases some at a
time: first without the contestants that compile (`Contestant.slow`), which get ready side by side;
then these compile for all of the cases side by side, and are timed when all of them are done,
together with pymeta once more.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from pymeta.bench import contestants, verify
from pymeta.bench.cases import Case

SLOW = 0.5  # seconds: calls slower than this get three rounds only

Row = dict[str, Any]


def say(text: str) -> None:
    """Tell the terminal; standard output is for the tables."""
    print(text, file=sys.stderr, flush=True)


class Worker:
    """A contestant's process."""

    def __init__(self, name: str, kind: str, log: IO[str], folder: Path) -> None:
        """Start it; it imports its library at the first request."""
        self.name, self.folder = name, folder
        folder.mkdir(parents=True, exist_ok=True)
        environment = contestants.environment(name, kind)
        # a compiler's cache of its own: the second benchmark's compile times would be short
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pymeta.bench.worker", name, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._late = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def send(self, **request: Any) -> None:
        """A request; `receive` gets the answer."""
        assert self._process.stdin
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except (BrokenPipeError, ValueError):
            self._answers.put("")

    def receive(self, patience: float | None = None) -> dict[str, Any]:
        """The answer; {"error": ...} where the process is gone, or needs longer, and is ended."""
        if self._late:  # what it may have said before it was ended is no answer to this
            return {"error": "the process ended"}
        try:
            line = self._answers.get(timeout=patience)
        except queue.Empty:
            self._late = True
            self.close(at_once=True)
            return {"error": f"not ready after {patience:.0f} s"}
        if not line:
            return {"error": "the process ended"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, patience: float | None = None, **request: Any) -> dict[str, Any]:
        """A request and its answer."""
        self.send(**request)
        return self.receive(patience)

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def close(self, at_once: bool = False) -> None:
        """End it."""
        assert self._process.stdin
        if at_once:
            self._process.kill()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass
class Settings:
    """How a run measures.

    Attributes:
        kind: the kind of device.
        names: contestants, in the order of the table.
        rounds, seconds: how many turns everyone has, and how long each is.
        patience: seconds that a contestant may take to prepare a case; None for any time.
        budget: seconds after which no contestant that compiles is begun (CUDA); None for any time.
        block_threads: numbers of threads of a CUDA block to try.
        last_start: CPU: seconds after which no further case begins; None for any time.
    """

    kind: str
    names: list[str]
    rounds: int
    seconds: float
    patience: float | None = None
    budget: float | None = None
    block_threads: list[int] = field(default_factory=list)
    last_start: float | None = None


class Session:
    """Measures cases. The workers live as long as it does."""

    def __init__(self, settings: Settings, folder: Path, log: IO[str]) -> None:
        """`folder` is for what workers and session exchange; `log` for what workers print."""
        self.settings, self.folder, self.log = settings, folder, log
        self.known = contestants.of(settings.kind)
        self.began = time.monotonic()
        self._workers: dict[str, Worker] = {}
        self._answers: dict[Case, tuple[Path, verify.Reference]] = {}

    # ---- workers ---------------------------------------------------------------------------------

    def _start(self, name: str, key: str) -> Worker:
        folder = self.folder / key.replace(" ", "_").replace("/", "_")
        return Worker(name, self.settings.kind, self.log, folder)

    def worker(self, name: str, key: str | None = None) -> Worker:
        """The contestant's process, started again where it ended; another one for another key."""
        key = key or name
        worker = self._workers.get(key)
        if worker is None or not worker.alive:
            worker = self._workers[key] = self._start(name, key)
        return worker

    def close(self, *keys: str) -> None:
        """End these workers; all of them if none is named."""
        for key in keys or tuple(self._workers):
            worker = self._workers.pop(key, None)
            if worker is not None:
                worker.close()

    def left(self) -> float | None:
        """Seconds of the budget that are left."""
        budget = self.settings.budget
        return None if budget is None else budget - (time.monotonic() - self.began)

    def _is_late(self) -> bool:
        end = self.settings.last_start
        return end is not None and time.monotonic() - self.began > end

    def _patience(self) -> float | None:
        known = [s for s in (self.settings.patience, self.left()) if s is not None]
        return max(min(known), 1.0) if known else None

    # ---- a case ----------------------------------------------------------------------------------

    def right(self, case: Case) -> tuple[Path, verify.Reference]:
        """The file of the case's data, and the right answer for what is compared."""
        base = case.base
        key = Case.read({**base.as_json(), "name": ""})
        if key not in self._answers:
            data = verify.make_data(base)
            path = self.folder / f"data_{len(self._answers)}.npz"
            data.save(path)
            self._answers[key] = path, verify.make_reference(base, data)
        path, reference = self._answers[key]
        if case.distinct and case.job == "finetune":
            reference = reference.of(case.order()[verify.sample(case)])
        return path, reference

    def ask_to_prepare(self, case: Case, worker: Worker) -> None:
        """Send the request."""
        path, _ = self.right(case)
        worker.send(
            do="prepare",
            case=case.as_json(),
            data=str(path),
            folder=str(worker.folder),
            block_threads=self.settings.block_threads,
        )

    def checked(self, case: Case, worker: Worker, seconds: float | None) -> Row:
        """{variant: its entry, not yet timed} of the answer, every number compared with float64."""
        answer = worker.receive(seconds)
        if "error" in answer:
            say(f"  {case.name}, {worker.name}: {answer['error'].splitlines()[0]}")
            if self.settings.kind != "cpu":  # a capture that failed may spoil what comes after it
                worker.close(at_once=True)
            return {worker.name: {"error": answer["error"]}}
        _, reference = self.right(case)
        entries: Row = {}
        for variant, found in answer["variants"].items():
            if "error" not in found:
                with np.load(found.pop("gradients")) as stored:
                    gradients = [stored[key] for key in stored.files]
                found = self._judged(case, reference, variant, found, gradients)
            if "error" in found:
                say(f"  {case.name}, {variant}: {found['error'].splitlines()[0]}")
            entries[variant] = {**found, "worker": worker.name}
        return entries

    def _judged(
        self,
        case: Case,
        reference: verify.Reference,
        variant: str,
        found: Row,
        gradients: list[Any],
    ) -> Row:
        try:
            error = verify.check(case, reference, variant, found["loss"], gradients)
        except verify.WrongAnswer as wrong:
            return {"error": f"WRONG: {wrong}", "wrong": True}
        relative = error * verify.tolerance(case)
        return {**found, "error_in_tolerances": error, "relative_error": relative}

    def time(self, entries: Row, workers: dict[str, Worker]) -> float | None:
        """Rounds of turns for all entries that are right, into them; the CPU's FMA peak, if any."""
        right = {variant: e for variant, e in entries.items() if "error" not in e}
        peaks = []
        for e in right.values():
            e.update(rounds_s=[], bursts_s=[], min_s=float("inf"))
        for turn in range(self.settings.rounds):
            if self.settings.kind == "cpu" and "pymeta" in workers:
                asked = workers["pymeta"].ask(do="peak", seconds=0.05)
                peaks.append(float(asked.get("flops", 0.0)))
            for variant, e in right.items():
                if "error" not in e and not (turn >= 3 and min(e["rounds_s"]) > SLOW):
                    self._turn(variant, e, workers[e["worker"]])
        for e in right.values():
            if "error" not in e:
                e["median_s"] = float(np.median(e["rounds_s"]))
                bursts = e.pop("bursts_s")
                if bursts:
                    e["device_s"] = float(np.median(bursts))
                    e["device_rounds_s"] = bursts
        return max(peaks, default=0.0) or None

    def _turn(self, variant: str, e: Row, worker: Worker) -> None:
        answer = worker.ask(do="time", variant=variant, seconds=self.settings.seconds)
        if "error" in answer:
            say(f"  {variant}: {answer['error'].splitlines()[0]}")
            e["error"] = answer["error"]
            return
        e["rounds_s"].append(float(np.median(answer["times"])))
        e["min_s"] = min(e["min_s"], *answer["times"])
        if "burst" in answer:
            e["bursts_s"].append(answer["burst"])
        time.sleep(0.01)  # thread pools that spin after their work come to rest

    def measure(self, case: Case, names: Sequence[str]) -> Row:
        """Prepare, check and time one case; its row of the results."""
        names = [name for name in names if case.job in self.known[name].jobs]
        workers = {name: self.worker(name) for name in names}
        entries: Row = {}
        # On a CPU a preparation tries forms by the clock, and so has the machine to itself.
        at_once = 1 if self.settings.kind == "cpu" else max(len(names), 1)
        for start in range(0, len(names), at_once):
            some = [workers[name] for name in names[start : start + at_once]]
            for worker in some:
                self.ask_to_prepare(case, worker)
            for worker in some:
                entries |= self.checked(case, worker, self.settings.patience)
        peak = self.time(entries, workers)
        if self.settings.kind != "cpu":  # all share the device's memory, and compilers come next
            for worker in workers.values():
                worker.ask(self.settings.patience, do="forget")
        return {
            "case": case.name,
            "described": case.describe(),
            "definition": case.as_json(),
            "tasks": case.tasks,
            "flops_per_task": case.flops(),
            "bytes": case.bytes_moved(),
            "fma_peak": peak,
            "tolerance": verify.tolerance(case),
            "contestants": entries,
        }

    # ---- all cases -------------------------------------------------------------------------------

    def device(self) -> dict[str, Any]:
        """Facts and measured ceilings of the CUDA device; {} on a CPU."""
        if self.settings.kind == "cpu":
            return {}
        return self.worker("pymeta").ask(self.settings.patience, do="device")

    def rows(self, cases: Sequence[Case]) -> Iterator[Row]:
        """A row for each case, as soon as there is one; on a device some come a second time."""
        names = self.settings.names
        if self.settings.kind == "cpu":
            for done, case in enumerate(cases):
                if self._is_late() and done:
                    left = ", ".join(c.name for c in cases[done:])
                    say(f"after {self.settings.last_start:.0f} s no case begins; left out: {left}")
                    return
                yield self.measure(case, names)
            return
        quick = [n for n in names if not self.known[n].slow]
        slow = [n for n in names if self.known[n].slow]
        again = [n for n in quick if not self.known[n].rival]
        at_once = max(1, contestants.cores() // (2 * max(len(slow), 1)))
        for start in range(0, len(cases), at_once):
            some, rows = cases[start : start + at_once], {}
            for case in some:
                rows[case.name] = row = self.measure(case, quick)
                yield row
            if slow:
                yield from self._compiled(some, slow, again, rows)

    def _compiled(
        self, cases: Sequence[Case], slow: list[str], again: list[str], rows: dict[str, Row]
    ) -> Iterator[Row]:
        """The second pass for some of the cases: compile side by side, then time one by one."""
        left = self.left()
        if left is not None and left <= 0:
            for case in cases:
                for name in slow:
                    why = f"left out: the budget of {self.settings.budget:.0f} s was spent"
                    rows[case.name]["contestants"][name] = {"error": why}
                yield rows[case.name]
            return
        keys = {(case.name, name): f"{name} {case.name}" for case in cases for name in slow}
        for case in cases:
            for name in slow:
                self.ask_to_prepare(case, self.worker(name, keys[case.name, name]))
        patience = self._patience()
        end = None if patience is None else time.monotonic() + patience
        compiled: dict[str, Row] = {case.name: {} for case in cases}
        for case in cases:
            for name in slow:
                wait = None if end is None else max(end - time.monotonic(), 0.1)
                worker = self._workers[keys[case.name, name]]
                compiled[case.name] |= self.checked(case, worker, wait)
        for case in cases:
            workers = {name: self._workers[keys[case.name, name]] for name in slow}
            entries = dict(compiled[case.name])
            for name in again:
                workers[name] = self.worker(name)
                self.ask_to_prepare(case, workers[name])
                entries |= self.checked(case, workers[name], self.settings.patience)
            self.time(entries, workers)
            rows[case.name]["contestants"] |= entries
            self.close(*(keys[case.name, name] for name in slow))
            yield rows[case.name]


@contextmanager
def session(settings: Settings, folder: Path, log: IO[str]) -> Iterator[Session]:
    """A session whose workers are ended whatever happens."""
    found = Session(settings, folder, log)
    try:
        yield found
    finally:
        found.close()
