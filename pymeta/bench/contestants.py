"""Who is measured: pymeta's forms and its rivals, on the CPU and on a CUDA device.

A contestant is a name, the packages that it needs, and a function that prepares a case in the
contestant's own process (`worker.py`). It may have several variants (threads, ways of writing it),
each a row of the table.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymeta.bench import ours
from pymeta.bench.cases import Array, Case, Data
from pymeta.bench.devices import Device, host_burst, nothing, timed
from pymeta.spec.show import counted


@dataclass
class Prepared:
    """A variant of a contestant, ready to be called.

    Attributes:
        run: asks for the case's result.
        read: of what `run` returned: loss or None, and the results, wherever they lie.
        wait: until what `run` returned is there.
        burst: seconds a call of so many calls, one after another.
        compile_s: what the first call took beyond a later one.
        note: what was chosen: executor, threads, form.
        threads: how many of the CPU's cores it may use.
        scale: times are multiplied by this, where only some tasks are run.
        clock: what `burst` reads.
    """

    run: Callable[[], Any]
    read: ours.Read
    wait: Callable[[Any], None] = nothing
    burst: Callable[[Callable[[], Any], int], float] = host_burst
    compile_s: float = 0.0
    note: str = ""
    threads: int = 1
    scale: float = 1.0
    clock: str = "host clock"


Variants = dict[str, Prepared | str]  # or why there is none


@dataclass
class Options:
    """What a request says beyond the case: numbers of threads of a CUDA block to try, if any."""

    block_threads: list[int] = field(default_factory=list)


Maker = Callable[[Case, Data, Device, Options], Variants]


@dataclass(frozen=True)
class Contestant:
    """See the module.

    Attributes:
        name: what `--only` and `--without` call it.
        packages: what it imports.
        make: prepares a case.
        rival: whether pymeta's time is compared with its time.
        slow: it compiles for tens of seconds a case.
        jobs: of what cases it has any.
    """

    name: str
    packages: tuple[str, ...]
    make: Maker
    rival: bool = True
    slow: bool = False
    jobs: tuple[str, ...] = ("maml", "reptile", "finetune")

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def cores() -> int:
    """The cores that the benchmark may use."""
    told = int(os.environ.get("PYMETA_BENCH_CORES", 0))
    if told:
        return told
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def on_host(value: Any, tasks: NDArray[np.int64] | None = None) -> Array:
    """An array of torch, JAX or numpy as numpy's; of some tasks only, if told so."""
    if hasattr(value, "detach"):
        import torch

        value = value.detach()
        if tasks is not None:
            value = value[torch.from_numpy(tasks).to(value.device)]
        found: Array = value.cpu().numpy()
        return found
    return np.asarray(value if tasks is None else value[tasks])


def fastest(candidates: Mapping[str, Callable[[], Prepared]], cached: bool = False) -> Prepared:
    """Prepare every candidate, call each a few times, keep the fastest; say which in `note`.

    `cached`: what one candidate compiled, the next one finds ready.
    """
    best: Prepared | None = None
    least, longest = float("inf"), 0.0
    for note, prepare in candidates.items():
        start = time.perf_counter()
        candidate = prepare()
        candidate.wait(candidate.run())
        first = time.perf_counter() - start
        trial = min(timed(candidate.run, 0.2, calls=2, wait=candidate.wait))
        candidate.note, candidate.compile_s = note, max(first - trial, 0.0)
        longest = max(longest, candidate.compile_s)
        if best is None or trial < least:
            best, least = candidate, trial
    assert best is not None
    if cached:
        best.compile_s = longest
    return best


def _first_call(prepared: Prepared) -> Prepared:
    """Call it once more than needed; what the first call took beyond the second is compilation."""
    start = time.perf_counter()
    prepared.wait(prepared.run())
    first = time.perf_counter() - start
    second = timed(prepared.run, 0.0, wait=prepared.wait)[0]
    prepared.compile_s = max(first - second, 0.0)
    return prepared


# ---- on the CPU ----------------------------------------------------------------------------------


def _pymeta_cpu(case: Case, data: Data, device: Device, options: Options) -> Variants:
    """Whole round trips in Python, and the bare native call, on one thread and on all cores.

    MAML's also by `accumulate_grad`, which leaves autograd out.

    Without torch the round trip of fine-tuning is `Adapter.adapt`; other jobs have none.
    """
    import pymeta
    from pymeta.bench.verify import has_torch

    makers: dict[str, Callable[[], tuple[ours.Run, ours.Read]]] = {}
    if has_torch():
        import torch

        torch.set_num_threads(1)  # pymeta has its own
        makers[""] = lambda: ours.round_trip(case, data, device)[:2]
        if case.job == "maml":
            makers[" accumulate_grad"] = lambda: ours.without_autograd(case, data, device)
    if case.job == "finetune":
        makers[" adapter"] = lambda: ours.adapter_trip(case, data)
    makers[" kernel"] = lambda: ours.kernel(case, data)
    made: dict[str, Prepared] = {}
    for threads in sorted({1, cores()}):
        for kind, make in makers.items():
            call, read = make()

            def run(call: ours.Run = call, threads: int = threads) -> Any:
                if pymeta.num_threads() != threads:
                    pymeta.set_num_threads(threads)
                return call()

            made[f"pymeta{kind} {threads}t"] = Prepared(run, read, threads=threads)
    note = ours.executor(case)
    for prepared in made.values():
        prepared.run()
        prepared.note = note
    return {**made}


def _as_it_is(out: Any) -> tuple[Any, list[Any]]:
    loss, results = out
    return loss, results


def _torch_cpu(kind: str) -> Maker:
    """A torch rival, with as many threads as serve it best."""

    def make(case: Case, data: Data, device: Device, options: Options) -> Variants:
        import torch

        from pymeta.bench import torch_rivals

        def candidate(threads: int) -> Prepared:
            torch.set_num_threads(threads)
            run = getattr(torch_rivals, kind)(case, data)
            return Prepared(run, _as_it_is, threads=threads)

        counts = sorted({1, cores()})
        tried = {counted(n, "thread"): partial(candidate, n) for n in counts}
        best = fastest(tried, cached=kind == "compiled")
        torch.set_num_threads(best.threads)
        return {kind if kind == "higher" else f"torch {kind}": best}

    return make


def _jax_cpu(kind: str) -> Maker:
    """JAX, written in the way that is fastest for the case."""

    def make(case: Case, data: Data, device: Device, options: Options) -> Variants:
        from pymeta.bench import jax_rivals

        shard = kind == "shard_map"
        if shard and case.tasks < 2:
            return {}  # nothing to split
        threads = 1 if kind == "1 thread" else cores()

        def candidate(form: dict[str, Any]) -> Prepared:
            run, read = jax_rivals.make(case, data, shard, **form)
            return Prepared(run, read, wait=jax_rivals.wait, threads=threads)

        forms = jax_rivals.forms(case, shard)
        tried = {n: partial(candidate, form) for n, form in forms.items()}
        return {f"jax {kind}": fastest(tried)}

    return make


def _sklearn(case: Case, data: Data, device: Device, options: Options) -> Variants:
    """scikit-learn's own network, for the job that it has."""
    from pymeta.bench import sklearn_rival

    return {
        "scikit-learn": fastest(
            {"MLPClassifier": lambda: Prepared(*sklearn_rival.loop(case, data), threads=cores())}
        )
    }


# ---- on a CUDA device ----------------------------------------------------------------------------


def _on_device(prepared: Prepared, device: Device) -> Prepared:
    """With the device's wait and clock; called, so that it is ready."""
    prepared.wait, prepared.burst = device.wait, device.burst
    prepared.clock = "CUDA events" if device.kind == "cuda" else "host clock"
    return _first_call(prepared)


def _pymeta_cuda(name: str, make: Callable[[Case, Data, Device], Any]) -> Maker:
    """As the planner has it, and with other numbers of threads a block if told so."""

    def prepare(case: Case, data: Data, device: Device, options: Options) -> Variants:
        variants: Variants = {}
        for count in [0, *options.block_threads]:
            if options.block_threads:
                ours.set_block_threads(count)
            run, read, note = make(case, data, device)

            def call(run: ours.Run = run, count: int = count) -> Any:
                if options.block_threads:
                    ours.set_block_threads(count)
                return run()

            shown = f"{name}, {count} threads" if count else name
            variants[shown] = _on_device(Prepared(call, read, note=note), device)
        return variants

    return prepare


_tf32x3 = partial(ours.round_trip, precision="tf32x3")


def _torch_vmap_cuda(graph: bool) -> Maker:
    """Eager `torch.func`, by itself or in a CUDA graph."""

    def make(case: Case, data: Data, device: Device, options: Options) -> Variants:
        from pymeta.bench import torch_rivals

        run = torch_rivals.vmap(case, data, device)
        if graph:
            run = torch_rivals.captured(run, device)
        name = "torch vmap graph" if graph else "torch vmap"
        return {name: _on_device(Prepared(run, _as_it_is), device)}

    return make


def _torch_compiled_cuda(case: Case, data: Data, device: Device, options: Options) -> Variants:
    """`torch.compile`, by itself and in a CUDA graph: one compilation, one process."""
    from pymeta.bench import torch_rivals

    run = torch_rivals.compiled(case, data, device)
    plain = _on_device(Prepared(run, _as_it_is), device)
    variants: Variants = {"torch compiled": plain}
    try:
        replay = torch_rivals.captured(run, device)
        graph = _on_device(Prepared(replay, _as_it_is), device)
        graph.compile_s = plain.compile_s
        variants["torch compiled graph"] = graph
    except RuntimeError as error:  # the rest of the row stands
        variants["torch compiled graph"] = f"not captured: {error}"
    return variants


def _jax_cuda(case: Case, data: Data, device: Device, options: Options) -> Variants:
    """JAX with the inner steps unrolled, and with a scan over them."""
    from pymeta.bench import jax_rivals

    variants: Variants = {}
    for scan in (False, True) if case.steps > 1 else (False,):
        name = "jax scanned steps" if scan else "jax vmap"
        try:
            run, read = jax_rivals.make(case, data, False, scan, None)
            prepared = _first_call(Prepared(run, read, wait=jax_rivals.wait))
        except RuntimeError as error:  # no memory, say: the other form may need less
            variants[name] = f"{type(error).__name__}: {error}"
            continue
        prepared.burst = lambda call, calls: host_burst(call, calls, jax_rivals.wait)
        variants[name] = prepared
    return variants


# ---- the lists -----------------------------------------------------------------------------------

_TORCH = ("torch",)
_META = ("maml",)

CPU: tuple[Contestant, ...] = (
    Contestant("pymeta", (), _pymeta_cpu, rival=False),
    Contestant("torch vmap", _TORCH, _torch_cpu("vmap")),
    Contestant("torch compiled", _TORCH, _torch_cpu("compiled"), slow=True),
    Contestant("torch loop", _TORCH, _torch_cpu("loop")),
    Contestant("higher", ("torch", "higher"), _torch_cpu("higher"), jobs=_META),
    Contestant("jax 1 thread", ("jax",), _jax_cpu("1 thread")),
    Contestant("jax all threads", ("jax",), _jax_cpu("all threads")),
    Contestant("jax shard_map", ("jax",), _jax_cpu("shard_map")),
    Contestant("scikit-learn", ("sklearn",), _sklearn, jobs=("finetune",)),
)

CUDA: tuple[Contestant, ...] = (
    Contestant("pymeta", _TORCH, _pymeta_cuda("pymeta", ours.round_trip), rival=False),
    Contestant("pymeta graph", _TORCH, _pymeta_cuda("pymeta graph", ours.captured), rival=False),
    Contestant("pymeta tf32x3", _TORCH, _pymeta_cuda("pymeta tf32x3", _tf32x3), rival=False),
    Contestant("torch vmap", _TORCH, _torch_vmap_cuda(False)),
    Contestant("torch vmap graph", _TORCH, _torch_vmap_cuda(True)),
    Contestant("jax", ("jax",), _jax_cuda, slow=True),
    Contestant("torch compiled", _TORCH, _torch_compiled_cuda, slow=True),
)

QUICK = ("pymeta", "torch vmap", "jax all threads", "scikit-learn")
QUICK_CUDA = ("pymeta", "pymeta graph", "torch vmap", "torch vmap graph", "jax")
SWEEP = ("pymeta", "torch vmap", "jax all threads")
SWEEP_CUDA = ("pymeta", "pymeta graph", "torch vmap graph", "jax")


def of(kind: str) -> dict[str, Contestant]:
    """{name: contestant} on that kind of device."""
    return {c.name: c for c in (CPU if kind == "cpu" else CUDA)}


def environment(name: str, kind: str) -> dict[str, str]:
    """The environment variables that a contestant's process starts with."""
    extra = {"PYMETA_BENCH_CORES": str(cores())}
    # Let the allocator keep what is freed. Otherwise XLA and torch give their temporaries back to
    # the system at each call and have them zeroed again: half their time on large cases, in some
    # virtual machines, and no merit of ours.
    extra |= {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**34),
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
        "MALLOC_TOP_PAD_": str(2**26),
    }
    if kind == "cuda":
        extra |= {
            # several processes share the device's memory
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            # IEEE float32 for everyone, which is torch's default and not XLA's
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "JAX_PLATFORMS": "cuda",
            # several of them compile at once
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, cores() // 8)),
        }
        return {**os.environ, **extra}
    extra["JAX_PLATFORMS"] = "cpu"
    flags = {
        "jax 1 thread": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        "jax shard_map": f"--xla_force_host_platform_device_count={cores()}",
    }
    if name in flags:
        extra["XLA_FLAGS"] = flags[name]
    if name == "jax 1 thread":
        extra["NPROC"] = "1"
    return {**os.environ, **extra}
