"""How long one small adaptation takes: `python -m pymeta.bench.latency`.

W6: one task, 24-64-64-1 ReLU, binary cross-entropy, 20 rows, 5 steps of gradient descent, then the
prediction of one more row; numpy arrays in, numpy arrays out. Every contestant has a process that
is kept on the last core, with one thread and Python's garbage collector off (for all alike: a
collection is not what is measured); before the clock starts its answers for all tasks are checked
against float64. Then the clock is read before and after each of 100,000 calls: medians and tails,
once with the other cores idle and once with a neighbour on the first core, which multiplies
matrices and copies memory without pause. The reading of the clock itself is reported, not
subtracted.

Writes pymeta-latency.{md,json} in the current folder, or what `--out` says.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymeta.bench.cases import LATENCY, Array, Case, Data

QUANTILES = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9}
WARM_UP = 0.5  # seconds of calls before those that count
LEAST_CALLS = 10_000  # however slow they are: a p99.9 needs some beyond it

Call = Callable[[Array, Array, Array], Array]  # xs [S, in], ys [S, 1], xq [Q, in]


# ---- the contestants, each in its own process ----------------------------------------------------


def pymeta_call(case: Case, data: Data, adapter: Path) -> Call:
    """`Adapter.adapt_predict` of a loaded file, without torch."""
    import pymeta

    loaded = pymeta.Adapter.load(adapter)
    out = np.empty((case.query, case.sizes[-1]), np.float32)

    def call(xs: Array, ys: Array, xq: Array) -> Array:
        loaded.adapt_predict(xs, ys, xq, out=out)
        return out

    call(data.xs[0], data.ys[0], data.xq[0])
    assert "torch" not in sys.modules
    return call


def pymeta_torch_call(case: Case, data: Data, adapter: Path) -> Call:
    """`MAML.adapt` and a call of the adapted model: what the torch side offers."""
    import torch

    import pymeta
    from pymeta.bench.torch_rivals import make_model

    torch.set_num_threads(1)
    model = make_model(case, data)
    maml = pymeta.MAML(model, loss=case.loss, lr=case.lr, steps=case.steps, backend="native")

    def call(xs: Array, ys: Array, xq: Array) -> Array:
        xs_, ys_, xq_ = (torch.from_numpy(a).unsqueeze(0) for a in (xs, ys, xq))
        found: Array = maml.adapt(xs_, ys_)(xq_)[0].numpy()
        return found

    return call


def numpy_call(case: Case, data: Data, adapter: Path) -> Call:
    """Forward and backward pass by hand, every result into an array made before."""
    start = [np.ascontiguousarray(p.T) for p in data.parameters]
    theta = [p.copy() for p in start]
    gradients = [np.empty_like(p) for p in start]
    depth, rows = len(start) // 2, case.support
    hidden = [np.empty((rows, n), np.float32) for n in case.sizes[1:]]
    deltas = [np.empty_like(h) for h in hidden]
    answers = [np.empty((case.query, n), np.float32) for n in case.sizes[1:]]

    def forward(x: Array, into: list[Array]) -> Array:
        for i in range(depth):
            x = np.matmul(x, theta[2 * i], out=into[i])
            x += theta[2 * i + 1]
            if i < depth - 1:
                np.maximum(x, 0, out=x)
        return x

    def call(xs: Array, ys: Array, xq: Array) -> Array:
        for p, p0 in zip(theta, start, strict=True):
            np.copyto(p, p0)
        inputs = [xs, *hidden]
        for _ in range(case.steps):
            z, d = forward(xs, hidden), deltas[-1]
            np.exp(np.negative(z, out=d), out=d)  # delta = (sigmoid(z) - y) / rows
            np.reciprocal(np.add(d, 1, out=d), out=d)
            d -= ys
            d *= 1 / rows
            for i in reversed(range(depth)):
                d = deltas[i]
                np.matmul(inputs[i].T, d, out=gradients[2 * i])
                np.sum(d, axis=0, out=gradients[2 * i + 1])
                if i:
                    below = np.matmul(d, theta[2 * i].T, out=deltas[i - 1])
                    below *= inputs[i] > 0
            for p, g in zip(theta, gradients, strict=True):
                g *= case.lr
                p -= g
        return forward(xq, answers)

    return call


def jax_call(case: Case, data: Data, adapter: Path) -> Call:
    """`jax.jit` of the unrolled loop; weights are its arguments and lie on the device."""
    import jax

    from pymeta.bench.jax_rivals import predictor

    function, layers = predictor(case, data)
    compiled: Any = jax.jit(function)

    def call(xs: Array, ys: Array, xq: Array) -> Array:
        return np.asarray(compiled(layers, xs, ys, xq))

    return call


def torch_call(case: Case, data: Data, adapter: Path) -> Call:
    """Eager torch: autograd.grad and an update, five times."""
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(1)
    start = [torch.from_numpy(p) for p in data.parameters]

    def forward(theta: list[Any], x: Any) -> Any:
        for i in range(0, len(theta) - 2, 2):
            x = F.relu(F.linear(x, theta[i], theta[i + 1]))
        return F.linear(x, theta[-2], theta[-1])

    def call(xs: Array, ys: Array, xq: Array) -> Array:
        x, y, q = torch.from_numpy(xs), torch.from_numpy(ys), torch.from_numpy(xq)
        theta = [p.detach().requires_grad_() for p in start]
        for _ in range(case.steps):
            loss = F.binary_cross_entropy_with_logits(forward(theta, x), y)
            gradients = torch.autograd.grad(loss, theta)
            with torch.no_grad():
                theta = [
                    (p - case.lr * g).requires_grad_()
                    for p, g in zip(theta, gradients, strict=True)
                ]
        with torch.no_grad():
            found: Array = forward(theta, q).numpy()
        return found

    return call


CONTESTANTS: dict[str, Callable[[Case, Data, Path], Call]] = {
    "pymeta Adapter": pymeta_call,
    "pymeta MAML.adapt (torch)": pymeta_torch_call,
    "JAX jit": jax_call,
    "numpy by hand": numpy_call,
    "torch eager": torch_call,
}


def environment() -> dict[str, str]:
    """One thread for every library, and a heap that keeps what it has (as in `contestants`)."""
    from pymeta.bench import contestants

    one = ("OMP", "OPENBLAS", "MKL", "PYMETA")
    return {
        **contestants.environment("jax 1 thread", "cpu"),
        **{f"{name}_NUM_THREADS": "1" for name in one},
    }


def clock_overhead() -> float:
    """Median difference of two readings of the clock, one after the other, ns."""
    now = time.perf_counter_ns
    return float(np.median([-now() + now() for _ in range(10_000)]))


def child(name: str, folder: Path, core: int, calls: int, seconds: float) -> None:
    """Answer every task once (to `folder`/answers.npy), then time the calls (times.npy)."""
    os.sched_setaffinity(0, {core})
    case, data = LATENCY, Data.load(folder / "data.npz")
    call = CONTESTANTS[name](case, data, folder / "adapter.safetensors")
    tasks = list(zip(data.xs, data.ys, data.xq, strict=True))
    np.save(folder / "answers.npy", np.stack([call(*task).copy() for task in tasks]))

    now, warm, end = time.perf_counter_ns, 0, time.perf_counter() + WARM_UP
    while time.perf_counter() < end:
        call(*tasks[warm % len(tasks)])
        warm += 1
    calls = max(min(calls, int(warm * seconds / WARM_UP)), LEAST_CALLS)
    times = np.empty(calls, np.int64)
    gc.collect()
    gc.disable()
    for i in range(calls):
        xs, ys, xq = tasks[i % len(tasks)]
        start = now()
        call(xs, ys, xq)
        times[i] = now() - start
    np.save(folder / "times.npy", times)
    found: dict[str, Any] = {"clock_ns": clock_overhead()}
    if name == "pymeta Adapter":
        from pymeta import native

        lib = native.extension()
        found["fma_peak"] = lib.fma_peak(lib.isa(), 4, 0.2)
    (folder / "found.json").write_text(json.dumps(found))


def make_noise(core: int) -> None:
    """Multiply and add, and stream through memory, until somebody ends this process."""
    os.sched_setaffinity(0, {core})
    rng = np.random.default_rng(0)
    a = rng.random((512, 512), dtype=np.float32)
    b, large = np.empty_like(a), np.ones(2**26, np.float32)  # 256 MiB
    print("ready", flush=True)
    while True:
        for _ in range(20):
            np.matmul(a, a, out=b)
        large *= np.float32(1.0)


# ---- the parent ----------------------------------------------------------------------------------


@contextmanager
def neighbour(core: int | None) -> Iterator[None]:
    """A process that makes noise on that core, or none."""
    if core is None:
        yield
        return
    noise = subprocess.Popen(
        [sys.executable, "-m", "pymeta.bench.latency", "--noise", str(core)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert noise.stdout and noise.stdout.readline() == "ready\n"
        yield
    finally:
        noise.terminate()
        noise.wait()


def measure(name: str, folder: Path, core: int, calls: int, seconds: float) -> dict[str, Any]:
    """Run a contestant's process; its answers [tasks, Q, out], times in ns and what it says."""
    command = ["--child", name, "--folder", str(folder), "--core", str(core)]
    command += ["--calls", str(calls), "--seconds", str(seconds)]
    subprocess.run(
        [sys.executable, "-m", "pymeta.bench.latency", *command],
        check=True,
        env=environment(),
    )
    found = json.loads((folder / "found.json").read_text())
    return {
        **found,
        "answers": np.load(folder / "answers.npy"),
        "times": np.load(folder / "times.npy"),
    }


def import_times(adapter: Path, repeats: int) -> dict[str, float]:
    """Seconds that imports take in a fresh process, medians; the files are in the page cache."""
    load = f"import pymeta; pymeta.Adapter.load({str(adapter)!r})"
    statements = {
        "import pymeta; pymeta.Adapter.load(...)": load,
        "import numpy (part of it)": "import numpy",
        "import torch": "import torch",
        "import jax": "import jax",
    }
    found = {}
    for what, statement in statements.items():
        code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        runs = [
            float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                 check=True, env=environment()).stdout)
            for _ in range(repeats + 1)
        ]  # fmt: skip
        found[what] = float(np.median(runs[1:]))  # the first one filled the page cache
    return found


def summary(times: NDArray[np.int64]) -> dict[str, float]:
    """Quantiles in microseconds, and how many calls they are of."""
    found = {name: float(np.percentile(times, q)) / 1e3 for name, q in QUANTILES.items()}
    return {"calls": len(times), **found, "max": float(times.max()) / 1e3}


def write(path: Path, result: dict[str, Any]) -> str:
    """Write `path`.json and `path`.md; the latter's text."""
    from pymeta.bench import report

    head = ["", "calls", *QUANTILES, "max", "p50 in flop limits", "error / tolerance"]
    limit = result["flop_limit_us"]

    def line(name: str, row: dict[str, float]) -> list[str]:
        figures = [report.figure(row[k]) for k in (*QUANTILES, "max")]
        error = f"{result['errors'][name]:.2g}"
        return [name, f"{row['calls']:,}", *figures, f"{row['p50'] / limit:.2f}", error]

    tables = [
        f"{what}:\n\n" + report.table(head, [line(n, row) for n, row in rows.items()])
        for what, rows in result["times_us"].items()
    ]
    imports = report.table(
        ["in a fresh process", "ms"],
        [[what, f"{1e3 * s:.0f}"] for what, s in result["imports_s"].items()],
    )
    found = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v)
    text = f"""# Latency

{found["cpu"]}, {found["cores"]} cores. Python {found["python"]}, {versions}.
W6: microseconds for one call of `adapt_predict` and its like, from numpy to numpy, on one core;
Python's garbage collector is off for all. A call has {result["flops"] / 1e6:.2f} MFLOP, which at
this core's FMA peak of {result["fma_peak"] / 1e9:.0f} GFLOP/s is {limit:.1f} us, the flop limit.
Reading the clock takes {result["clock_ns"]:.0f} ns, which is in every figure.

{(chr(10) * 2).join(tables)}

Imports, medians:

{imports}
"""
    path.with_suffix(".md").write_text(text)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return text


def prepare(folder: Path) -> tuple[Array, Array]:
    """Write data and adapter; the right predictions [tasks, Q, out], and what they may err by."""
    import pymeta
    from pymeta.bench import verify
    from pymeta.bench.torch_rivals import make_model

    data = verify.make_data(LATENCY)
    data.save(folder / "data.npz")
    maml = pymeta.MAML(
        make_model(LATENCY, data), loss=LATENCY.loss, lr=LATENCY.lr, steps=LATENCY.steps
    )
    maml.adapter().save(folder / "adapter.safetensors")
    return verify.predictions(LATENCY, data)


def main() -> None:
    """Measure the contestants, or be one of the processes that this takes."""
    parser = argparse.ArgumentParser(prog="python -m pymeta.bench.latency", description=__doc__)
    add = parser.add_argument
    add("--calls", type=int, default=100_000)
    add("--seconds", type=float, default=30.0, help="at most, of slow contestants; 10,000 calls")
    add("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    add("--imports", type=int, default=10, help="fresh processes for each import")
    add(
        "--out",
        type=Path,
        default=Path("pymeta-latency.json"),
        metavar="FILE",
        help="Markdown goes beside it",
    )
    add("--child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    add("--noise", type=int, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--core", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder, options.core, options.calls, options.seconds)
        return
    if options.noise is not None:
        make_noise(options.noise)

    from pymeta.bench import report

    cores = sorted(os.sched_getaffinity(0))
    conditions: dict[str, int | None] = {"The other cores idle": None}
    if len(cores) > 1:
        conditions["A noisy neighbour on another core"] = cores[0]
    result: dict[str, Any] = {
        "machine": report.machine(),
        "flops": LATENCY.flops(),
        "errors": {},
        "times_us": {what: {} for what in conditions},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        right, scales = prepare(folder)
        for what, core in conditions.items():
            with neighbour(core):
                for contestant in options.only:
                    found = measure(contestant, folder, cores[-1], options.calls, options.seconds)
                    error = np.max(np.abs(found["answers"] - right) / scales) / LATENCY.margin
                    allowed = 1.0 if contestant.startswith("pymeta") else 4.0
                    if not error <= allowed:
                        sys.exit(f"{contestant}: off by {error:.3g} tolerances, {allowed} allowed")
                    result["errors"][contestant] = float(error)
                    result["times_us"][what][contestant] = summary(found["times"])
                    result["clock_ns"] = found["clock_ns"]
                    if "fma_peak" in found:
                        peak = max(result.get("fma_peak", 0.0), found["fma_peak"])
                        result.update(fma_peak=peak, flop_limit_us=1e6 * LATENCY.flops() / peak)
                    print(what, contestant, summary(found["times"]), file=sys.stderr, flush=True)
        result["imports_s"] = import_times(folder / "adapter.safetensors", options.imports)
    print(write(options.out, result))


if __name__ == "__main__":
    main()
