"""Threads, memory, cores and interrupts of native calls."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import batch, gradients, mlp
from kernels import same_bits, using

import pymeta
from pymeta import native

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# ---- which executor, on how many threads --------------------------------------------------------


def meta_learner(**options):
    torch.manual_seed(0)
    net = mlp(2, 16, 16, 2, dtype=torch.float32)
    return pymeta.MAML(net, loss="mse", steps=2, backend="native", **{"lr": 0.1, **options})


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("rows", [-1, 2**30 + 1, 2**31 - 1])
def test_plans_of_sets_that_nobody_has_are_refused(rows, place):
    """Found by fuzzing: the sizes that follow from so many rows overflow."""
    lib = native.extension()
    network = lib.Network([("linear", 1, 1, True), ("relu",), ("linear", 1, 1, True)])
    problem = lib.Problem(network, lib.Loss("mse"), [True] * 4)
    rows_of_sets = [3, 3, 0]
    rows_of_sets[place] = rows
    with pytest.raises(ValueError, match=f"at most 2\\^30, got {rows}"):
        problem.plan(4, "meta", lib.Schedule(1), 2, *rows_of_sets)


@pytest.mark.parametrize("tasks", [-1, 2**40 + 1, 2**63 - 1])
def test_plans_of_more_tasks_than_there_are_are_refused(tasks):
    """Found by fuzzing, as above."""
    lib = native.extension()
    problem = lib.Problem(lib.Network([("linear", 1, 1, True)]), lib.Loss("mse"), [True] * 2)
    plan = problem.plan(4, "meta", lib.Schedule(1), 2**40, 3, 3)
    assert plan["threads"] >= 1
    with pytest.raises(ValueError, match=f"tasks: .* at most 2\\^40, got {tasks}"):
        problem.plan(4, "meta", lib.Schedule(1), tasks, 3, 3)


def test_the_planner_looks_at_the_threads():
    """64 tasks are four vectors of sixteen: on many threads single tasks are faster."""
    module, data = meta_learner(), batch(tasks=64, dtype=torch.float32)
    with using(executor="auto", threads=32):
        module(*data).loss.backward()
        assert " rows: " in module.explain() and " 32 threads" in module.explain()
    with using(executor="auto", threads=1):
        module(*data).loss.backward()
        assert " lanes: " in module.explain()


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("tasks", [5, 16, 37, 64, 300])
@pytest.mark.parametrize("rates", ["number", "layer", "element"])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_meta_gradient_has_the_bits_of_one_thread(isa, tasks, rates, ragged):
    lr = 0.1 if rates == "number" else pymeta.LearnableLR(0.1, per=RATES[rates])
    module = meta_learner(lr=lr)
    data = batch(tasks=tasks, dtype=torch.float32)
    sizes = [1 + (3 * t) % 5 for t in range(tasks)] if ragged else None
    parameters = [p for p in module.parameters() if p.requires_grad]

    def results(threads):
        with using(isa=isa, executor="auto", threads=threads):
            out = module(*data, support_sizes=sizes)
            return [out.loss.detach(), out.task_losses, *gradients(out.loss, *parameters)]

    wanted = results(1)
    for threads in (2, 7, 32):
        assert same_bits(results(threads), wanted), threads


RATES = {"layer": "layer", "element": "parameter"}


@pytest.mark.parametrize("per", ["network", "layer", "parameter"])
def test_explain_names_the_executor_that_ran(per):
    """A rate that many weights share sums its gradient in an order of the executor's own."""
    module = meta_learner(lr=pymeta.LearnableLR(0.1, per))
    data = batch(tasks=64, dtype=torch.float32)

    def rate_gradient():
        module._prepared.clear()
        return gradients(module(*data).loss, module.lr)

    with using(threads=32):
        found = rate_gradient()
        said = module.explain()
        with torch.no_grad():
            module(*data)
        assert "rows: " in module.explain()  # nothing is summed, and single tasks are faster
    bits = {}
    for executor in ("rows", "lanes"):
        with using(executor=executor):
            bits[executor] = rate_gradient()
    assert not same_bits(bits["rows"], bits["lanes"])
    assert same_bits(found, bits["lanes"])  # whose order `rows` can keep for rates of elements
    assert ("rows: " if per == "parameter" else "lanes: ") in said


def test_reptile_has_the_bits_of_one_thread():
    torch.manual_seed(0)
    net = mlp(2, 16, 16, 2, dtype=torch.float32)
    xs, ys, _, _ = batch(tasks=64, dtype=torch.float32)

    def results(threads):
        with using(executor="auto", threads=threads):
            module = pymeta.Reptile(net, loss="mse", lr=0.1, steps=3, backend="native")
            out = module(xs, ys)
            return [out.task_losses, *gradients(out.loss, *net.parameters())]

    wanted = results(1)
    for threads in (2, 7, 32):
        assert same_bits(results(threads), wanted), threads


# ---- memory -------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def large_call():
    """One that works in some 100 MB."""
    torch.manual_seed(0)
    net = mlp(64, 512, 512, 1, dtype=torch.float32)
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=20, backend="native")
    with using(executor="rows", threads=1):
        module(*batch(tasks=2, support=300, inputs=64, out=1, dtype=torch.float32)).loss.backward()


@LINUX
def test_memory_is_given_back():
    large_call()
    before = resident()
    freed = pymeta.free_memory()
    assert freed > 50_000_000
    assert before - resident() > freed / 2
    assert pymeta.free_memory() == 0
    large_call()


def test_what_is_kept_is_bounded():
    before = native.kept_bytes()
    try:
        native.set_kept_bytes(1_000_000)
        large_call()
        assert pymeta.free_memory() <= 1_000_000
        native.set_kept_bytes(1 << 30)
        large_call()
        native.set_kept_bytes(0)
        assert pymeta.free_memory() == 0
    finally:
        native.set_kept_bytes(before)


@pytest.mark.parametrize(("n", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_the_bound_is_a_number_of_bytes(n, error):
    with pytest.raises(error, match="n: expected an integer >= 0"):
        native.set_kept_bytes(n)


# ---- the pool -----------------------------------------------------------------------------------


def run(code: str, **environment: str) -> str:
    """What a program of its own prints; it has the modules of tests/."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(code)], capture_output=True, text=True,
        timeout=300, env={**os.environ, **environment}, cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PREAMBLE = """
import os, signal, threading, time
import numpy as np, torch, pymeta
from pathlib import Path
from pymeta import native
from helpers import batch, mlp
torch.set_num_threads(1)
torch.manual_seed(0)
"""


@LINUX
def test_a_call_wakes_the_threads_it_uses():
    """A thread that nobody wakes does not switch to and from the processor."""
    run("""
    module = pymeta.MAML(mlp(2, 30, 30, 2), loss="mse", lr=0.1, steps=5, backend="native")
    data = batch(tasks=64)
    native.set_executor("rows")
    before = set(os.listdir("/proc/self/task"))
    native.set_num_threads(16)
    for _ in range(20):
        module(*data)
    pool = set(os.listdir("/proc/self/task")) - before
    assert len(pool) == 15, pool

    def switches(thread):
        lines = Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

    native.set_num_threads(3)
    module(*data)
    counts = None
    while counts != (now := {thread: switches(thread) for thread in pool}):
        counts = now
        time.sleep(0.3)  # until nobody spins any more, on however busy a machine
    for _ in range(30):
        module(*data)
        time.sleep(0.002)
    woken = [thread for thread in pool if switches(thread) != counts[thread]]
    assert len(woken) <= 2, woken
    """)


# ---- cores --------------------------------------------------------------------------------------

QUOTAS = {
    "none": ({}, 0),
    "version 2, unlimited": ({"cpu.max": "max 100000"}, 0),
    "version 2": ({"cpu.max": "150000 100000"}, 2),
    "version 2, the group around it": (
        {"cpu.max": "300000 100000", "../cpu.max": "100000 100000"},
        1,
    ),
    "version 1, unlimited": ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 0),
    "version 1": ({"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}, 1),
    "version 1, many": ({"cpu.cfs_quota_us": "800000", "cpu.cfs_period_us": "100000"}, 8),
}  # fmt: skip


@pytest.mark.parametrize("case", QUOTAS)
@pytest.mark.parametrize("inside", [False, True], ids=["host", "container"])
def test_cpu_quotas(case, inside, tmp_path):
    """As the kernel shows them: the whole hierarchy, or a container's part of it as its root."""
    files, wanted = QUOTAS[case]
    version2 = "1" not in case.split(",")[0]
    point = "/sys/fs/cgroup" + ("" if version2 else "/cpu,cpuacct")
    group, root = "/outer/inner", "/outer" if inside else "/"
    kind = "cgroup2 cgroup2 rw" if version2 else "cgroup cgroup rw,cpu,cpuacct"
    process = tmp_path / "proc" / "self"
    process.mkdir(parents=True)
    (process / "cgroup").write_text(
        f"0::{group}\n" if version2 else f"7:memory:/other\n4:cpu,cpuacct:{group}\n"
    )
    (process / "mountinfo").write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"30 22 0:26 {root} {point} rw,nosuid shared:4 - {kind}\n"
    )
    folder = tmp_path / (point + (group.removeprefix("/outer") if inside else group)).lstrip("/")
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).resolve().write_text(text + "\n")
    assert native.extension().cpu_quota(str(tmp_path)) == wanted


@LINUX
def test_a_process_uses_the_cores_that_it_may():
    run("""
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    assert native.num_threads() == 1
    """, PYMETA_NUM_THREADS="")  # fmt: skip


# ---- interrupts ---------------------------------------------------------------------------------

ENDLESS = """
# a process that was started in the background inherits that it ignores SIGINT
signal.signal(signal.SIGINT, signal.default_int_handler)

def endless(kind):
    if kind == "steps of one task":
        net = mlp(8, 64, 64, 1)
        tune = pymeta.FineTune(net, loss="mse", lr=1e-6, epochs=10**6, backend="native")
        x = torch.randn(1, 20_000, 8).double()
        return lambda: tune(x, x[..., :1])
    if kind == "minibatches":
        net = mlp(4, 8, 1)
        tune = pymeta.FineTune(net, loss="mse", lr=1e-6, epochs=10**5, batch_size=8)
        x = torch.randn(40, 100, 4).double()
        return lambda: tune(x, x[..., :1])
    if kind.startswith("a cell"):
        one = kind == "a cell's step"
        hidden, steps, n = (1024, 1, 40_000) if one else (200, 200, 10_000)
        weights, gates = torch.zeros(4 * hidden, 5 + hidden), torch.zeros(2, 4 + hidden)
        cell = native.extension().Cell(4, hidden, 1, n, 10.0, weights.data_ptr(), gates.data_ptr())
        slopes, losses, theta = torch.randn(steps, n), torch.ones(steps), torch.zeros(n)
        state = torch.zeros(cell.state_size if one else 0)
        seen = [v.data_ptr() for v in (slopes, losses, theta)]
        held = weights, gates, slopes, losses, theta, state, torch.empty_like(weights)

        def call():
            if one:
                return cell.step(*seen, state.data_ptr(), held[4].data_ptr())
            to = theta, torch.empty_like(theta), held[6], torch.empty_like(gates)
            return cell.back(steps, *seen, *(v.data_ptr() for v in to))

        return call
    net = mlp(4, 8, 1)
    maml = pymeta.MAML(net, loss="mse", lr=1e-6, steps=10**6, first_order=True, backend="native")
    x = torch.randn(10**4, 5, 4).double()
    return lambda: maml(x, x[..., :1], x, x[..., :1]).loss.backward()

def interrupt_after(seconds, number=signal.SIGINT):
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
"""


KINDS = ["steps of one task", "minibatches", "many tasks", "a cell's step", "a cell's way back"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupt_ends_a_call(kind, threads):
    """Calls that would take hours, a cell's seconds; afterwards all works, with the bits it had."""
    run(
        ENDLESS
        + f"""
    native.set_num_threads({threads})
    maml = pymeta.MAML(mlp(2, 8, 2), loss="mse", lr=0.1, steps=2, backend="native")
    from pymeta.learners import MetaLSTM
    lstm = MetaLSTM(mlp(2, 8, 2), loss="mse", steps=2, backend="native")
    data = batch(tasks=40)
    wanted = [learner(*data).task_losses for learner in (maml, lstm)]
    call = endless({kind!r})
    for _ in range(2):
        try:
            interrupt_after(0.1 if "cell" in {kind!r} else 0.3)
            call()
            raise SystemExit("it ended by itself")
        except KeyboardInterrupt:
            pass
        for learner, losses in zip((maml, lstm), wanted, strict=True):
            assert torch.equal(learner(*data).task_losses, losses)
    """.replace("\n    ", "\n")
    )


def test_a_handler_that_raises_nothing_ends_nothing():
    """It runs during the call, and may make calls of its own; the call goes on to its result."""
    run(
        ENDLESS
        + """
    maml = pymeta.MAML(mlp(2, 8, 2), loss="mse", lr=0.1, steps=2, backend="native")
    data = batch(tasks=40)
    wanted, seen = maml(*data).task_losses, []
    native.set_num_threads(2)

    def handler(*_):
        seen.append(torch.equal(maml(*data).task_losses, wanted))

    signal.signal(signal.SIGUSR1, handler)
    tune = pymeta.FineTune(mlp(8, 64, 1), loss="mse", lr=1e-3, epochs=400, backend="native")
    x = torch.randn(2, 2_000, 8).double()
    without = tune(x, x[..., :1])
    interrupt_after(0.05, signal.SIGUSR1)
    models = tune(x, x[..., :1])
    while not seen:  # a very fast machine: the signal comes after the call
        time.sleep(0.01)
    assert seen == [True], seen
    for name, values in models.parameters.items():
        assert torch.equal(values, without.parameters[name])
    """.replace("\n    ", "\n")
    )
