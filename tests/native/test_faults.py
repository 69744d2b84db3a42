"""What happens when things go wrong outside: no memory, killed children, signals, exits.

Each case is a process of its own, with a time limit, because what is tested may kill it. A case
prints "good" at its end; anything else, and any exit status but 0, is a failure.
"""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PLACES = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE)))
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PLACES}
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and mprotect")
# AddressSanitizer maps terabytes for itself, and has its own word for a fault.
limits = pytest.mark.skipif(
    sys.platform != "linux" or "asan" in os.environ.get("LD_PRELOAD", ""),
    reason="needs RLIMIT_AS and signals as they are",
)

COMMON = """
import os, resource, signal, sys, threading, time
import numpy as np
import pymeta
from pymeta import native
from fault_tasks import adapter, data

def same(a, b):
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()

def limit_memory(extra):
    with open("/proc/self/status") as status:
        used = next(int(l.split()[1]) * 1024 for l in status if l.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))

def unlimited():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def run(code: str, *, timeout: float = 600, returncode: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + textwrap.dedent(code)],
        env=ENV, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == returncode, done.stdout + done.stderr
    assert done.stdout.endswith("good\n") or returncode, done.stdout + done.stderr
    return done.stdout


def test_a_case_can_fail():
    with pytest.raises(AssertionError):
        run("assert False")
    with pytest.raises(AssertionError):
        run("print('bad')")
    with pytest.raises(AssertionError):
        run("os.abort()")


# ---- memory -----------------------------------------------------------------------------------


@limits
@pytest.mark.parametrize("threads", [1, 3])
def test_no_memory_for_many_tasks(threads):
    """MemoryError each time, nothing leaks, and then the same bits as before."""
    run(f"""
    native.set_num_threads({threads})
    small, many = adapter(3, 8, 2), adapter(3, 2000, 2, steps=1)
    x, y, q = data(40, 5, 3, 2)
    wanted = small.adapt_predict(x, y, q)
    xs, ys, qs = data(4, 5000, 3, 2)  # 40 MB of activations for each array of a task's
    limit_memory(32 << 20)
    for _ in range(20):
        try:
            many.adapt(xs, ys)
            raise SystemExit("there was enough memory")
        except MemoryError:
            pass
        assert same(small.adapt_predict(x, y, q), wanted)
    unlimited()
    assert len(many.adapt(xs, ys)) == 4
    print("good")
    """)


@limits
def test_no_memory_for_an_engine():
    run("""
    one = adapter(3, 2000, 2, steps=1)
    x, y, q = (a[0] for a in data(1, 5, 3, 2))
    wanted = one.adapt_predict(x, y, q)
    xs, ys, qs = (a[0] for a in data(1, 5000, 3, 2))
    limit_memory(32 << 20)
    for _ in range(20):
        try:
            one.adapt_predict(xs, ys, qs)
            raise SystemExit("there was enough memory")
        except MemoryError:
            pass
        assert same(one.adapt_predict(x, y, q), wanted)
    unlimited()
    one.adapt_predict(xs, ys, qs)
    print("good")
    """)


@limits
def test_no_memory_for_a_meta_gradient():
    """The tape of many steps: through torch, with parameters left as they were."""
    pytest.importorskip("torch")
    run("""
    import torch
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    maml = pymeta.MAML(net, loss="mse", lr=0.01, steps=2, backend="native")
    tasks = [torch.randn(4, 5, n) for n in (3, 1, 3, 1)]
    maml(*tasks).loss.backward()
    wanted = [p.grad.clone() for p in net.parameters()]
    limit_memory(64 << 20)
    for _ in range(5):
        try:
            maml(*tasks, steps=200_000)
            raise SystemExit("there was enough memory")
        except MemoryError:
            pass
        net.zero_grad()
        maml(*tasks).loss.backward()
        assert all(torch.equal(p.grad, w) for p, w in zip(net.parameters(), wanted))
    print("good")
    """)


@limits
def test_no_memory_for_another_thread():
    """A thread of the pool that cannot be had: the call is made by those there are."""
    run("""
    many = adapter(3, 8, 2)
    x, y, q = data(200, 5, 3, 2)
    native.set_num_threads(1)
    wanted = many.adapt_predict(x, y, q)
    out = np.empty_like(wanted)
    native.set_num_threads(30)
    threading.stack_size(1 << 20)
    limit_memory(4 << 20)  # a thread's stack is 8 MB
    assert same(many.adapt_predict(x, y, q, out), wanted)
    unlimited()
    assert same(many.adapt_predict(x, y, q, out), wanted)
    print("good")
    """)


# ---- processes --------------------------------------------------------------------------------


def test_a_killed_child_is_nothing_to_its_parent():
    """A child forked while other threads are in calls works; killed in a call, it is no loss."""
    run("""
    native.set_num_threads(3)
    one = adapter(3, 40, 2)
    x, y, q = data(100, 10, 3, 2)
    wanted = one.adapt_predict(x, y, q)
    stop, wrong = threading.Event(), []

    def work():
        while not stop.is_set():
            if not same(one.adapt_predict(x, y, q), wanted):
                wrong.append("a thread of the parent")

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            good = same(one.adapt_predict(x, y, q), wanted)
            os.write(told, b"1" if good else b"0")
            while True:
                one.adapt_predict(x, y, q)
        assert os.read(ready, 1) == b"1"
        time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(ready), os.close(told)
        if not same(one.adapt_predict(x, y, q), wanted):
            wrong.append("the parent")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    print("good")
    """)


def test_an_exit_while_other_threads_are_in_calls():
    """Daemon threads in the middle of calls: the interpreter ends, and its status is 0."""
    for _ in range(3):
        run("""
        native.set_num_threads(2)
        one = adapter(3, 60, 2, steps=20)
        x, y, q = data(300, 10, 3, 2)
        out = np.empty((300, 10, 2), np.float32)
        begun = threading.Barrier(4)

        def work():
            begun.wait()
            while True:
                one.adapt_predict(x, y, q)

        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        begun.wait()
        time.sleep(0.2)
        print("good")
        """)


def test_an_exit_while_the_pool_waits():
    run("""
    native.set_num_threads(4)
    many = adapter(3, 60, 2)
    many.adapt(*data(300, 10, 3, 2)[:2])
    print("good")
    """)


# ---- signals ----------------------------------------------------------------------------------


def test_an_interrupt_during_an_adapters_call():
    """KeyboardInterrupt ends a call that would take hours, and all works as before."""
    run("""
    one = adapter(3, 8, 2)
    x, y, q = data(40, 5, 3, 2)
    wanted = one.adapt_predict(x, y, q)
    # a process that was started in the background inherits that it ignores SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    slow, (xs, ys, _) = adapter(3, 100, 2, steps=10**7), data(100, 50, 3, 2)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        slow.adapt(xs, ys)
        raise SystemExit("it was not interrupted")
    except KeyboardInterrupt:
        pass
    assert same(one.adapt_predict(x, y, q), wanted)
    print("good")
    """)


# ---- exceptions among threads -----------------------------------------------------------------


def test_an_exception_in_one_thread_while_others_run():
    """Bad labels in one thread, over and over; the other threads' results keep their bits."""
    run("""
    native.set_num_threads(3)
    one = adapter(3, 20, 4, loss="cross_entropy")
    sets = [data(30 + 7 * i, 6, 3, 4, classes=True) for i in range(4)]
    wanted = [one.adapt_predict(*s) for s in sets]
    bad = data(50, 6, 3, 4, classes=True)
    bad[1][31, 2] = 4
    wrong, refused = [], []
    stop = threading.Event()

    def fail():
        while not stop.is_set():
            for arguments in (bad, [a[31] for a in bad]):  # tasks, and one task's engine
                try:
                    one.adapt_predict(*arguments)
                    wrong.append("not refused")
                except ValueError as error:
                    refused.append(str(error))

    def work(i):
        try:
            for _ in range(60):
                if not same(one.adapt_predict(*sets[i]), wanted[i]):
                    wrong.append(i)
        except BaseException as error:
            wrong.append(error)

    failing = threading.Thread(target=fail)
    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in [failing, *workers]:
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    failing.join()
    assert not wrong, wrong
    assert len(refused) >= 2 and all("label 4 is not in 0..3" in r for r in refused)
    print("good")
    """)


# ---- the ends of the caller's arrays ----------------------------------------------------------


def guarded(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(HERE / "fault_guarded.py"), *map(str, arguments)],
        env=ENV, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@linux
def test_nothing_past_the_ends_of_arrays_is_touched():
    """Inputs and results between pages without access, inputs on pages that cannot be written."""
    done = guarded(0, 40)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stdout.endswith("calls survived\n")


@limits
def test_a_read_past_the_end_of_an_array_would_be_seen():
    assert guarded(0, 1, "planted").returncode in (-signal.SIGSEGV, -signal.SIGBUS)
