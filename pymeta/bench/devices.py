"""Where contestants run and how their time is taken: the CPU, a CUDA device, and a rehearsal.

Two figures for every contestant:

    wall    one call and the wait for its result, by the host's clock: what a user waits for
    burst   calls one after another and one wait at the end, divided by their number: what the
            device takes where the host does not hold it up. On a CUDA device torch's contestants
            have it from two CUDA events around the burst, JAX (whose streams torch's events do
            not see) from the host's clock.

The rehearsal is the CUDA benchmark on the CPU: every line but those of `Cuda` runs, and no figure
means anything. The tests use it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from pymeta.bench.cases import Array

Run = Callable[[], Any]
KINDS = ("cpu", "cuda", "rehearsal")
LARGEST_BURST = 1000


def nothing(_result: Any) -> None:
    """The wait for a result that is there."""


def timed(
    run: Run, seconds: float, calls: int = 1, wait: Callable[[Any], None] = nothing
) -> list[float]:
    """The times of single calls, for so long and at least so many."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < calls or time.perf_counter() < end:
        start = time.perf_counter()
        wait(run())
        times.append(time.perf_counter() - start)
    return times


def host_burst(run: Run, calls: int, wait: Callable[[Any], None] = nothing) -> float:
    """Seconds a call of so many, one after another, by the host's clock."""
    start = time.perf_counter()
    for _ in range(calls - 1):
        run()
    wait(run())
    return (time.perf_counter() - start) / calls


class Device(Protocol):
    """A place for tensors, and its clock."""

    kind: str

    def tensor(self, array: Array) -> torch.Tensor:
        """The array on the device."""

    def wait(self, result: Any) -> None:
        """Until everything that was asked of the device is done."""

    def burst(self, run: Run, calls: int) -> float:
        """Seconds a call, see above."""

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, result): `run`'s work, done again by `replay()` into the same result."""

    def empty(self) -> None:
        """Give memory back that nobody uses."""


class Cpu:
    """The host itself; "capture" calls the function and copies its result."""

    kind = "cpu"

    def tensor(self, array: Array) -> torch.Tensor:
        """A tensor that shares the array's memory."""
        import torch

        return torch.from_numpy(array)

    def wait(self, result: Any) -> None:
        """Nothing runs behind one's back."""

    def burst(self, run: Run, calls: int) -> float:
        """By the host's clock."""
        return host_burst(run, calls)

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Stands in for a graph: a replay is a call, its result copied into the first one's."""
        from torch.utils import _pytree

        result = run()
        static, _ = _pytree.tree_flatten(result)

        def replay() -> None:
            found, _ = _pytree.tree_flatten(run())
            for there, here in zip(static, found, strict=True):
                if there is not None:
                    there.copy_(here)

        return replay, result

    def empty(self) -> None:
        """The allocator keeps freed memory on purpose, see `contestants.environment`."""


class Rehearsal(Cpu):
    """The CPU in place of a CUDA device."""

    kind = "rehearsal"


class Cuda:
    """The current CUDA device of torch."""

    kind = "cuda"

    def __init__(self) -> None:
        """Make a context; RuntimeError where there is no device."""
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]
        self.device = torch.device("cuda", torch.cuda.current_device())

    def tensor(self, array: Array) -> torch.Tensor:
        """A copy on the device."""
        import torch

        return torch.from_numpy(array).to(self.device)

    def wait(self, result: Any) -> None:
        """Wait for all streams."""
        import torch

        torch.cuda.synchronize(self.device)

    def burst(self, run: Run, calls: int) -> float:
        """By two events on the current stream, on which `run` queues its work."""
        import torch

        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / calls

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A CUDA graph of one call, after three calls on a side stream.

        The first calls allocate, compile and set up what cannot be captured.
        """
        import torch

        stream: Any = torch.cuda.Stream
        here, side = torch.cuda.current_stream(self.device), stream(self.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        here.wait_stream(side)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            result = run()
        torch.cuda.synchronize(self.device)
        graph.replay()
        return graph.replay, result

    def empty(self) -> None:
        """Give the allocator's unused blocks back to the driver."""
        import torch

        torch.cuda.empty_cache()


def make(kind: str) -> Device:
    """The device of that kind, one of `KINDS`."""
    makers: dict[str, Callable[[], Device]] = {"cpu": Cpu, "cuda": Cuda, "rehearsal": Rehearsal}
    return makers[kind]()


def burst_length(seconds_a_call: float, seconds: float) -> int:
    """How many calls fill so many seconds: at least 2, at most `LARGEST_BURST`."""
    return max(2, min(LARGEST_BURST, int(seconds / max(seconds_a_call, 1e-9))))


# ---- what the device could do --------------------------------------------------------------------


def why_no_cuda() -> str | None:
    """Why torch has no CUDA device here; None where it has one."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def measured_peaks(device: Device) -> dict[str, float]:
    """What the device reaches in this run, by torch: its ceilings for the roofline.

    "matmul_flops": FLOP/s of a square float32 matrix product of "matmul_size", IEEE float32, no
        TF32: what a library gets out of the float32 units, not their peak.
    "copy_bytes": bytes per second of a copy on the device, read and written bytes both counted.
    """
    import torch

    small = device.kind == "rehearsal"
    n, size = (512, 2**22) if small else (8192, 2**30)
    like = device.tensor(torch.zeros(1).numpy())
    a, b = (torch.randn(n, n, device=like.device) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    source = torch.ones(size // 4, device=like.device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    best = {"matmul_size": float(n)}
    for name, run, work in (
        ("matmul_flops", product, 2.0 * n**3),
        ("copy_bytes", copy, 2.0 * size),
    ):
        device.burst(run, 3)
        best[name] = work / min(device.burst(run, 5) for _ in range(5))
    return best


def _asked(query: str) -> list[str]:
    """What nvidia-smi says of the first device, [] where it cannot be asked."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    lines = done.stdout.splitlines()
    return [field.strip() for field in lines[0].split(",")] if lines else []


def data_sheet_flops(capability: tuple[int, int], multiprocessors: int, mhz: float) -> float | None:
    """Float32 peak of a device from its clock: multiprocessors x lanes x 2 x clock.

    Lanes of a multiprocessor by CUDA's table of arithmetic throughput: 128 from compute
    capability 8.6 on, 64 for 7.x and 8.0. An H200: 132 x 128 x 2 x 1.98 GHz = 67 TFLOP/s.
    """
    if capability < (7, 0) or mhz <= 0:
        return None
    lanes = 64 if capability <= (8, 0) else 128
    return multiprocessors * lanes * 2 * mhz * 1e6


def facts(device: Device) -> dict[str, Any]:
    """The device by name, and its peak by its data sheet where the clock is known."""
    if device.kind != "cuda":
        return {"name": "the CPU in place of a GPU", "peak_flops": None}
    import torch

    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    told = _asked("driver_version,clocks.max.sm")
    mhz = float(told[1]) if len(told) == 2 and told[1].replace(".", "").isdigit() else 0.0
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "cuda": torch.version.cuda,
        "driver": told[0] if told else None,
        "max_mhz": mhz or None,
        "peak_flops": data_sheet_flops((p.major, p.minor), p.multi_processor_count, mhz),
    }
