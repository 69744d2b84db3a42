"""One contestant in a process of its own: `python -m bench.worker NAME`, driven by JSON lines.

Thread counts, XLA's flags and a core to stay on can be set only before a library starts, and two
libraries' thread pools in one process disturb each other: so each contestant has its process, and
`bench/__main__.py` asks them in turn. Requests on standard input, one answer line each:

    {"do": "prepare", "case": NAME, "data": PATH of an .npz, "folder": PATH}
        -> {"variants": {VARIANT: {"compile_s", "note", "loss", "gradients": PATH of an .npz}}}
    {"do": "time", "variant": VARIANT, "seconds": S}   -> {"times": [seconds of each call]}
    {"do": "peak", "seconds": S}                       -> {"flops": FLOP/s of one core} (pymeta)
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import CASES, Case, Data

Runs = dict[str, dict[str, Any]]  # variant -> {"run", "read", "compile_s", "note"}


def timed(run: Callable[[], Any], seconds: float, calls: int = 1) -> list[float]:
    """The times of single calls, for so long and at least so many."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < calls or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def fastest(candidates: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Prepare every candidate, call each a few times, keep the fastest; say which in `note`."""
    best: dict[str, Any] | None = None
    longest = 0.0
    for note, prepare in candidates.items():
        start = time.perf_counter()
        candidate = prepare()
        candidate["run"]()
        first = time.perf_counter() - start
        trial = min(timed(candidate["run"], 0.2, calls=2))
        candidate.update(note=note, trial=trial, compile_s=max(first - trial, 0.0))
        longest = max(longest, candidate["compile_s"])
        if best is None or trial < best["trial"]:
            best = candidate
    assert best is not None
    if best.get("caches"):  # what one candidate compiled, the next one found ready
        best["compile_s"] = longest
    return best


# ---- the contestants ------------------------------------------------------------------------


def pymeta_runs(case: Case, data: Data) -> Runs:
    """Whole round trips in Python, and the bare native call, on one thread and on all cores."""
    import pymeta
    from bench import native_calls

    runs: Runs = {}
    for threads in sorted({1, cores()}):
        for kind, make in (("", native_calls.round_trip), (" kernel", native_calls.kernel)):
            call, read = make(case, data)

            def run(call: Callable = call, threads: int = threads) -> Any:
                if pymeta.num_threads() != threads:
                    pymeta.set_num_threads(threads)
                return call()

            runs[f"pymeta{kind} {threads}t"] = {"run": run, "read": read, "compile_s": 0.0}
    note = native_calls.executor(case, data)
    for entry in runs.values():
        entry["run"]()
        entry["note"] = note
    return runs


def torch_runs(kind: str) -> Callable[[Case, Data], Runs]:
    """A torch rival, with as many threads as serve it best."""

    def make(case: Case, data: Data) -> Runs:
        import torch

        from bench import torch_rivals

        if kind == "higher" and case.job != "maml":
            return {}  # it is a library for meta-gradients

        def candidate(threads: int) -> dict[str, Any]:
            torch.set_num_threads(threads)
            return {
                "run": getattr(torch_rivals, kind)(case, data),
                "threads": threads,
                "caches": kind == "compiled",
            }

        counts = sorted({1, cores()})
        best = fastest({f"{n} threads": lambda n=n: candidate(n) for n in counts})
        torch.set_num_threads(best["threads"])
        best["read"] = lambda out: (out[0], [g.detach().numpy() for g in out[1]])
        return {f"torch {kind}" if kind != "higher" else kind: best}

    return make


def jax_runs(kind: str) -> Callable[[Case, Data], Runs]:
    """JAX, written in the way that is fastest for the case."""

    def make(case: Case, data: Data) -> Runs:
        from bench import jax_rivals

        shard = kind == "shard_map"
        if shard and case.tasks < 2:
            return {}  # nothing to split

        def candidate(form: dict) -> dict[str, Any]:
            run, read = jax_rivals.make(case, data, shard, **form)
            return {"run": run, "read": read}

        forms = jax_rivals.forms(case, shard)
        return {f"jax {kind}": fastest({n: lambda f=f: candidate(f) for n, f in forms.items()})}

    return make


def sklearn_runs(case: Case, data: Data) -> Runs:
    """scikit-learn's own network, for the job that it has."""
    if case.job != "finetune":
        return {}
    from bench import sklearn_rival

    def candidate() -> dict[str, Any]:
        run, read = sklearn_rival.loop(case, data)
        return {"run": run, "read": read}

    return {"scikit-learn": fastest({"MLPClassifier": candidate})}


def cores() -> int:
    """The cores that the benchmark may use."""
    return int(os.environ.get("BENCH_CORES", 0)) or len(os.sched_getaffinity(0))


CONTESTANTS: dict[str, Callable[[Case, Data], Runs]] = {
    "pymeta": pymeta_runs,
    "torch vmap": torch_runs("vmap"),
    "torch compiled": torch_runs("compiled"),
    "torch loop": torch_runs("loop"),
    "higher": torch_runs("higher"),
    "jax 1 thread": jax_runs("1 thread"),
    "jax all threads": jax_runs("all threads"),
    "jax shard_map": jax_runs("shard_map"),
    "scikit-learn": sklearn_runs,
}


def environment(name: str) -> dict[str, str]:
    """The environment variables that a contestant's process starts with."""
    flags = {
        "jax 1 thread": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        "jax shard_map": f"--xla_force_host_platform_device_count={cores()}",
    }
    extra = {"JAX_PLATFORMS": "cpu", "BENCH_CORES": str(cores())}
    # Let the allocator keep what is freed. Otherwise XLA and torch give their temporaries back to
    # the system at each call and have them zeroed again: half their time on large cases, in some
    # virtual machines, and no merit of ours.
    extra |= {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**34),
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
        "MALLOC_TOP_PAD_": str(2**26),
    }
    if name in flags:
        extra["XLA_FLAGS"] = flags[name]
    if name == "jax 1 thread":
        extra["NPROC"] = "1"
    return {**os.environ, **extra}


# ---- the process ----------------------------------------------------------------------------


def prepare(name: str, case: Case, data: Data, folder: Path) -> tuple[Runs, dict[str, Any]]:
    """A case's runs, each called once, and what to answer."""
    runs = CONTESTANTS[name](case, data)
    variants = {}
    for i, (variant, entry) in enumerate(runs.items()):
        loss, gradients = entry["read"](entry["run"]())
        if case.job == "finetune" and len(gradients[0]) < case.tasks:  # a loop, see torch_rivals
            entry["scale"] = case.tasks / len(gradients[0])
            entry["note"] += f", {len(gradients[0])} of {case.tasks} tasks, scaled"
        path = folder / f"{name.replace(' ', '_')}_{i}.npz"
        np.savez(path, *gradients)
        variants[variant] = {
            "compile_s": entry["compile_s"],
            "note": entry["note"],
            "loss": None if loss is None else float(loss),
            "gradients": str(path),
        }
    return runs, {"variants": variants}


def serve(name: str) -> None:
    """Answer requests until standard input ends."""
    # a compiler's own cache would make the second benchmark's compile times short
    cache = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not pass for an answer
    runs: Runs = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "prepare":
                runs = {}
                gc.collect()
                case = CASES[request["case"]]
                data = Data.load(Path(request["data"]))
                runs, answer = prepare(name, case, data, Path(request["folder"]))
            elif request["do"] == "time":
                gc.collect()
                entry = runs[request["variant"]]
                scale = entry.get("scale", 1.0)
                answer = {"times": [scale * t for t in timed(entry["run"], request["seconds"])]}
            else:
                from bench import native_calls

                answer = {"flops": native_calls.peak(request["seconds"])}
        except Exception as error:  # reported in the table; the other contestants go on
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    serve(sys.argv[1])
