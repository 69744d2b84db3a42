"""The service under load: python bench/serve.py [--seconds 5] [--rounds 3] [--out NAME]

Real server processes and client processes of their own, on loopback. Each request is one task of
W6's network (24-64-64-1 ReLU, binary cross-entropy, 20 support rows, 5 steps, 1 query) as JSON,
over connections that are kept open; each client sends the next request when its answer is there.

    batching      the service as it is
    one by one    the same with --batch-tasks 1: each request by itself
    one call      the same with --inline-us 0: each batch one native call, in a thread
    torch loop    the same app with a loop over torch.autograd in the place of the native call

The servers take turns, round by round, so that a neighbour on the machine disturbs all of them
alike; what is reported is the median of the rounds, and the ratio to the torch loop as the median
of the ratios in a round. Before it is timed, each server's answers are compared: bitwise with a
lone call of the adapter, the torch loop's up to rounding. CPU times are the kernel's, of the whole
processes. A stage's share is its part of the server's CPU time; the rest is HTTP and the framework.

    python bench/serve.py --soak 1800    steady load on one server; memory at first and at the end
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import pymeta

SIZES, SUPPORT, STEPS, LR = (24, 64, 64, 1), 20, 5, 0.1
CLIENTS = (1, 8, 64)
BODIES = 64  # different tasks
SERVERS = {
    "batching": [],
    "one by one": ["--batch-tasks", "1"],
    "one call": ["--inline-us", "0"],
    "torch loop": [],
}
STAGES = ("body", "decode", "native", "encode")
TICK = os.sysconf("SC_CLK_TCK")


# ---- the work -----------------------------------------------------------------------------------


def adapter() -> pymeta.Adapter:
    """W6's network with weights as torch would draw them, and its recipe."""
    from pymeta.spec.architecture import Architecture
    from pymeta.spec.losses import Loss

    random = np.random.default_rng(0)
    layers: list[tuple[Any, ...]] = []
    start: dict[str, np.ndarray] = {}
    for i, (n, m) in enumerate(pairwise(SIZES)):
        bound = 1 / np.sqrt(n)
        start[f"{2 * i}.weight"] = random.uniform(-bound, bound, (m, n)).astype(np.float32)
        start[f"{2 * i}.bias"] = random.uniform(-bound, bound, m).astype(np.float32)
        layers += [("linear", n, m, True), ("relu",)]
    names = tuple(start)
    chain = Architecture(tuple(layers[:-1]), names, names, False)
    return pymeta.Adapter(
        chain,
        start,
        adapted=names,
        loss=Loss("bce_with_logits"),
        optimizer=pymeta.SGD(LR),
        schedule=pymeta.Schedule(steps=STEPS),
    )


def tasks() -> list[dict[str, Any]]:
    """Bodies' tasks; four digits, as a client would send."""
    random = np.random.default_rng(1)
    return [
        {
            "xs": random.normal(size=(SUPPORT, SIZES[0])).round(4).tolist(),
            "ys": (random.random(SUPPORT) < 0.3).astype(int).tolist(),
            "xq": random.normal(size=(1, SIZES[0])).round(4).tolist(),
        }
        for _ in range(BODIES)
    ]


def torch_run(model: Any, requests: list[Any]) -> list[Any]:
    """What `pymeta.serve.batching.run` does, by a loop over torch.autograd."""
    import torch
    from torch.nn import functional as F

    from pymeta.serve.batching import Done

    def forward(weights: list[Any], x: Any) -> Any:
        for i in range(0, len(weights), 2):
            x = F.linear(x, weights[i], weights[i + 1])
            x = x if i + 2 == len(weights) else torch.relu(x)
        return x

    start = [torch.tensor(p) for p in model.adapter.parameters.values()]
    done = []
    for given, _ in requests:
        outputs = []
        for x, y, q in zip(given.xs, given.ys, given.xq, strict=True):
            weights = [p.clone().requires_grad_() for p in start]
            x, y = torch.from_numpy(x), torch.from_numpy(y)
            for _ in range(STEPS):
                loss = F.binary_cross_entropy_with_logits(forward(weights, x), y)
                grads = torch.autograd.grad(loss, weights)
                weights = [
                    (w - LR * g).detach().requires_grad_()
                    for w, g in zip(weights, grads, strict=True)
                ]
            with torch.no_grad():
                outputs.append(forward(weights, torch.from_numpy(q)).numpy())
        done.append(Done(outputs, [0] * len(outputs), None))
    return done


def serve_torch(words: list[str]) -> None:
    """The torch loop's server process."""
    import torch

    from pymeta import cli
    from pymeta.serve import batching

    torch.set_num_threads(1)
    batching.run = batching.one_by_one = torch_run
    sys.exit(cli.main(["serve", *words]))


# ---- servers ------------------------------------------------------------------------------------


class Server:
    """A server process, its port, its CPU time."""

    def __init__(self, kind: str, folder: Path, *more: str) -> None:
        words = [
            "adapter.safetensors",
            "--port",
            "0",
            "--models",
            f"models-{kind.replace(' ', '-')}",
        ]
        words += ["--log-level", "warning", *SERVERS[kind], *(more or ("--store", "none"))]
        program = ["-m", "pymeta", "serve"]
        if kind == "torch loop":
            program = [str(Path(__file__).resolve()), "--torch-server"]
        self.process = subprocess.Popen(
            [sys.executable, *program, *words], cwd=folder, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(json.loads(self.process.stdout.readline())["url"].rpartition(":")[2])

    def call(self, method: str, path: str, body: Any = None) -> bytes:
        """An answer; AssertionError unless it is a good one."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found = answer.read()
        connection.close()
        assert answer.status == 200, found
        return found

    def stages(self) -> dict[str, float]:
        """Seconds by stage so far, and the sums of batches."""
        text = self.call("GET", "/metrics").decode()
        found = re.findall(r'^pymeta_stage_seconds_sum\{stage="(\w+)"\} (\S+)', text, re.MULTILINE)
        stages = {name: float(value) for name, value in found}
        for part in ("sum", "count"):
            (value,) = re.findall(rf"^pymeta_batch_tasks_{part} (\S+)", text, re.MULTILINE)
            stages[f"batch {part}"] = float(value)
        return stages

    def cpu(self) -> float:
        """Seconds of CPU time so far."""
        return cpu_of(self.process.pid)

    def memory(self) -> float:
        """Resident MiB."""
        with open(f"/proc/{self.process.pid}/status") as file:
            (found,) = re.findall(r"VmRSS:\s+(\d+) kB", file.read())
        return int(found) / 1024

    def close(self) -> None:
        """Stop it."""
        self.process.terminate()
        self.process.wait(60)


def cpu_of(pid: int) -> float:
    """User and system seconds of a process."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def check(kind: str, server: Server, given: list[dict[str, Any]]) -> None:
    """Compare a server's answers with a lone call of the adapter."""
    model = adapter()
    answers = json.loads(server.call("POST", "/v1/adapt-predict", {"tasks": given}))["predictions"]
    for task, found in zip(given, answers, strict=True):
        arrays = [np.array(task[name], np.float32) for name in ("xs", "ys", "xq")]
        wanted = model.adapt_predict(*arrays)
        if kind == "torch loop":  # sums of at most 64 products, through five steps
            assert np.allclose(np.float32(found), wanted, rtol=1e-4, atol=1e-5), (found, wanted)
        else:
            assert np.array_equal(np.float32(found), wanted), (found, wanted)


# ---- clients ------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """A connection that sends the next request when the last one's answer is there."""

    def __init__(self, requests: list[bytes], first: int, times: list[float]) -> None:
        self.requests, self.next, self.times = requests, first, times
        self.buffer, self.stopped, self.begin = b"", False, 0.0
        self.idle = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        """Send the first request."""
        self.transport = transport
        self._send()

    def _send(self) -> None:
        self.begin = time.perf_counter()
        self.transport.write(self.requests[self.next % len(self.requests)])
        self.next += 1

    def data_received(self, data: bytes) -> None:
        """Look for the end of the answer."""
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found or len(body) < int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]):
            return
        assert head.startswith(b"HTTP/1.1 200"), self.buffer
        self.times.append(time.perf_counter() - self.begin)
        self.buffer = b""
        if self.stopped:
            self.idle.set_result(None)
        else:
            self._send()


async def load(port: int, clients: int, seconds: float) -> dict[str, Any]:
    """Closed-loop load; times of the requests after the first fifth."""
    head = (
        "POST /v1/adapt-predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    )
    bodies = [json.dumps({"tasks": [task]}).encode() for task in tasks()]
    requests = [f"{head}Content-Length: {len(b)}\r\n\r\n".encode() + b for b in bodies]
    loop, times = asyncio.get_running_loop(), []  # type: ignore[var-annotated]
    made = [
        (await loop.create_connection(lambda i=i: Client(requests, i, times), "127.0.0.1", port))[1]
        for i in range(clients)
    ]
    await asyncio.sleep(seconds / 5)
    times.clear()
    begin, cpu = time.perf_counter(), time.process_time()
    await asyncio.sleep(seconds)
    count, elapsed = len(times), time.perf_counter() - begin
    cpu = time.process_time() - cpu
    found = np.array(times[:count])
    for client in made:
        client.stopped = True
    await asyncio.gather(*(client.idle for client in made))
    for client in made:
        client.transport.close()
    return {
        "rate": count / elapsed,
        "p50": float(np.percentile(found, 50)),
        "p99": float(np.percentile(found, 99)),
        "client cpu": cpu / count,
    }


def client_main(port: int, clients: int, seconds: float) -> None:
    """The client process."""
    with contextlib.suppress(ImportError):
        import uvloop

        print(json.dumps(uvloop.run(load(port, clients, seconds))))
        return
    print(json.dumps(asyncio.run(load(port, clients, seconds))))


def measure(server: Server, clients: int, seconds: float) -> dict[str, float]:
    """One round against one server."""
    before, cpu = server.stages(), server.cpu()
    command = [sys.executable, __file__, "--client", str(server.port), str(clients), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    used, after = server.cpu() - cpu, server.stages()
    count = after["batch sum"] - before["batch sum"]
    found["server cpu"] = used / count
    found["batch"] = count / (after["batch count"] - before["batch count"])
    for stage in STAGES:
        found[stage] = (after[stage] - before[stage]) / used
    return found


# ---- the tables ---------------------------------------------------------------------------------


@contextlib.contextmanager
def all_servers() -> Iterator[dict[str, Server]]:
    """One of each kind, checked."""
    with tempfile.TemporaryDirectory() as folder:
        adapter().save(Path(folder) / "adapter.safetensors")
        servers: dict[str, Server] = {}
        try:
            for kind in SERVERS:
                servers[kind] = Server(kind, Path(folder))
                check(kind, servers[kind], tasks())
            yield servers
        finally:
            for server in servers.values():
                server.close()


def compare(seconds: float, rounds: int) -> dict[str, Any]:
    """All numbers: by number of clients, by server, the median of the rounds."""
    found: dict[str, Any] = {}
    with all_servers() as servers:
        for clients in CLIENTS:
            each: dict[str, list[dict[str, float]]] = {kind: [] for kind in servers}
            for _ in range(rounds):
                for kind, server in servers.items():
                    each[kind].append(measure(server, clients, seconds))
            loops = [each["torch loop"][r]["rate"] for r in range(rounds)]
            found[str(clients)] = {
                kind: {
                    **{name: median(r[name] for r in all_of) for name in all_of[0]},
                    "ratio": median(r["rate"] / s for r, s in zip(all_of, loops, strict=True)),
                    "rates": [r["rate"] for r in all_of],
                }
                for kind, all_of in each.items()
            }
            print(table(found, [str(clients)]), flush=True)
    return found


def table(found: dict[str, Any], clients: list[str]) -> str:
    """Markdown."""
    lines = [
        "| clients | server | requests/s | to the torch loop | p50 ms | p99 ms | tasks/call "
        "| server CPU us | client CPU us |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for number in clients:
        for kind, m in found[number].items():
            lines.append(
                f"| {number} | {kind} | {m['rate']:,.0f} | {m['ratio']:.1f} | {1e3 * m['p50']:.2f} "
                f"| {1e3 * m['p99']:.2f} | {m['batch']:.1f} | {1e6 * m['server cpu']:.0f} "
                f"| {1e6 * m['client cpu']:.0f} |"
            )
    return "\n".join(lines)


def shares(found: dict[str, Any]) -> str:
    """Markdown: where the server's CPU time goes."""
    names = ("clients", "server", *STAGES, "the rest")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for number, kinds in found.items():
        for kind, m in kinds.items():
            parts = [m[stage] for stage in STAGES]
            shown = " | ".join(f"{100 * p:.0f} %" for p in (*parts, max(0.0, 1 - sum(parts))))
            lines.append(f"| {number} | {kind} | {shown} |")
    return "\n".join(lines)


def report(found: dict[str, Any], seconds: float, rounds: int) -> str:
    """The page."""
    from pymeta import native

    return "\n".join(
        [
            "# The service under load",
            "",
            f"pymeta {pymeta.__version__}, {native.isa()}, {os.cpu_count()} cores shared by server "
            f"and clients; {rounds} rounds of {seconds:g} s, medians. Made by bench/serve.py.",
            "",
            table(found, list(found)),
            "",
            "Shares of the server's CPU time; the rest is HTTP, the framework and its bookkeeping:",
            "",
            shares(found),
            "",
        ]
    )


# ---- soak ---------------------------------------------------------------------------------------


def soak(seconds: float) -> int:
    """Load on every kind of path, a turn each 5 seconds; 1 if memory grew by over 5 % in the end.

    What counts is the growth from a third of the time on. Before, the store is filled up to the
    rows that it keeps.
    """
    with tempfile.TemporaryDirectory() as folder:
        adapter().save(Path(folder) / "adapter.safetensors")
        words = ("--store", "sqlite:///rows.db", "--kept-rows", "500")
        server = Server("batching", Path(folder), *words)
        given, samples, begin, turn = tasks(), [], time.monotonic(), 0
        try:
            for i in range(50):
                rows = {name: given[i][name] * 25 for name in ("xs", "ys")}
                server.call("PUT", f"/v1/entities/e{i}/rows", rows)
            while (now := time.monotonic() - begin) < seconds:
                measure(server, 8, 1.0)
                for i in range(20):
                    name, task = f"e{(turn + i) % 50}", given[i]
                    rows = {"xs": task["xs"], "ys": task["ys"]}
                    server.call("PUT", f"/v1/entities/{name}/rows", rows)
                    server.call("POST", f"/v1/entities/{name}/predict", {"xq": task["xq"]})
                server.call("POST", "/v1/adapt-predict?explain=true", {"tasks": given[:4]})
                server.call("POST", "/v1/models/reload")
                server.call("GET", "/v1/entities:export")
                turn += 1
                time.sleep(max(0.0, begin + 5 * turn - time.monotonic()))
                samples.append((now, server.memory()))
        finally:
            server.close()
    first = next(m for t, m in samples if t >= seconds / 3)
    last = median(m for _, m in samples[-5:])
    tenths = [samples[len(samples) * i // 10][1] for i in range(10)]
    print(f"{seconds:g} s, {turn} turns; MiB at each tenth:", *(f"{m:.0f}" for m in tenths))
    print(f"{first:.1f} MiB after a third, {last:.1f} at the end")
    return int(last > 1.05 * first)


def main() -> int:
    """What the command line says."""
    if sys.argv[1:2] == ["--torch-server"]:
        serve_torch(sys.argv[2:])
    if sys.argv[1:2] == ["--client"]:
        client_main(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("pymeta-serve"), help="without a suffix")
    parser.add_argument("--soak", type=float, metavar="SECONDS")
    options = parser.parse_args()
    if options.soak:
        return soak(options.soak)
    found = compare(options.seconds, options.rounds)
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    options.out.with_suffix(".md").write_text(report(found, options.seconds, options.rounds))
    print(shares(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
