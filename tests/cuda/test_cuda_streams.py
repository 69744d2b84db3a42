"""What only a GPU has: streams, graphs, a host that runs ahead, memory that runs out."""

import collections
import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import Case, Problem
from cuda_help import DEVICE, WORKLOADS, classes, module_of, moved, on, runs_natively
from helpers import batch, mlp
from hypothesis import given, settings
from kernels import (
    PROFILE,
    chains,
    same_bits,
)
from torch import nn

import pymeta
from pymeta import native

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
if native.cuda_reason() is not None:
    pytest.skip(f"no CUDA executor: {native.cuda_reason()}", allow_module_level=True)


# ---- streams and graphs -------------------------------------------------------------------------


class Sines:
    """A small MAML, and as many different meta-batches for it as are wanted."""

    def __init__(self, tasks: int = 25, dtype: torch.dtype = torch.float32) -> None:
        net = mlp(1, 40, 40, 1, act=nn.ReLU, dtype=dtype)
        self.maml = pymeta.MAML(net, loss="mse", lr=0.01, steps=2, backend="native").to(DEVICE)
        self.tasks, self.dtype = tasks, dtype

    def data(self, seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return on(DEVICE, batch("mse", self.tasks, 10, 10, 1, 1, self.dtype))

    def step(self, data) -> list[torch.Tensor]:
        """Loss, losses, predictions and meta-gradient of a call."""
        out = self.maml(*data)
        return [out.loss.detach(), out.task_losses, out.predictions] + list(
            torch.autograd.grad(out.loss, list(self.maml.parameters()))
        )

    def captured(self, static) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
        """A graph of `step`, and its results."""
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                self.step(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self.step(static)
        return graph, found


def copies(tensors) -> list[torch.Tensor]:
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("tasks", [1, 25, 3000])
def test_a_replayed_graph_equals_an_eager_call(tasks):
    sines = Sines(tasks)
    wanted = {seed: copies(sines.step(sines.data(seed))) for seed in range(3)}
    static = sines.data(0)
    graph, found = sines.captured(static)
    for seed in (0, 1, 2, 0):
        for place, value in zip(static, sines.data(seed), strict=True):
            place.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(found, wanted[seed])


def test_a_graph_follows_the_parameters():
    """A training step in a graph: the call, its gradient and torch's update."""
    sines, other = Sines(), Sines()
    other.maml.load_state_dict(sines.maml.state_dict())
    batches = [sines.data(seed) for seed in range(4)]

    def train(s: Sines, data) -> torch.Tensor:
        loss = s.maml(*data).loss
        found = torch.autograd.grad(loss, list(s.maml.parameters()))
        with torch.no_grad():
            for p, g in zip(s.maml.parameters(), found, strict=True):
                p.sub_(g, alpha=0.1)
        return loss.detach()

    static = copies(batches[0])
    start = copies(other.maml.parameters())
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            train(other, static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train(other, static)
    with torch.no_grad():
        for p, s in zip(other.maml.parameters(), start, strict=True):
            p.copy_(s)
    for data in batches:
        for place, value in zip(static, data, strict=True):
            place.copy_(value)
        graph.replay()
        assert same_bits(loss.clone(), train(sines, data))
    assert same_bits(list(other.maml.parameters()), list(sines.maml.parameters()))


def test_a_replay_between_a_call_and_its_backward_changes_nothing():
    """The graph's gradients lie in memory that no other call has, before the capture or after."""
    sines = Sines()
    data, static = sines.data(1), sines.data(2)
    wanted = copies(sines.step(data))
    graph, found = sines.captured(static)
    graph.replay()
    graphs = copies(found)
    out = sines.maml(*data)
    graph.replay()
    got = torch.autograd.grad(out.loss, list(sines.maml.parameters()))
    assert same_bits(got, wanted[3:])
    graph.replay()
    assert same_bits(found, graphs)


def test_adapting_and_predicting_in_a_graph():
    sines = Sines()
    finetune = pymeta.FineTune(
        sines.maml.model, loss="mse", optimizer=pymeta.Adam(0.01), epochs=3, batch_size=4,
        backend="native",
    ).to(DEVICE)  # fmt: skip

    def adapt(data):
        found = []
        for models in (sines.maml.adapt(*data[:2]), finetune(*data[:2])):
            found += [*models.parameters.values(), models(data[2])]
        return found

    wanted = {seed: copies(adapt(sines.data(seed))) for seed in range(2)}
    static = sines.data(0)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        adapt(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = adapt(static)
    for seed in (1, 0):
        for place, value in zip(static, sines.data(seed), strict=True):
            place.copy_(value)
        graph.replay()
        assert same_bits(found, wanted[seed])


def test_side_streams():
    """Calls on streams of their own, in flight together, do not disturb each other."""
    sines = Sines(300)
    batches = [sines.data(seed) for seed in range(6)]
    wanted = [copies(sines.step(data)) for data in batches]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for i, data in enumerate(batches):
            with torch.cuda.stream(streams[i % 3]):
                torch.cuda._sleep(2_000_000 * (3 - i % 3))
                found.append(sines.step(data))
        torch.cuda.synchronize()
        for got, right in zip(found, wanted, strict=True):
            assert same_bits(got, right)


def test_a_call_waits_for_what_its_stream_does_before():
    sines = Sines()
    wanted = copies(sines.step(sines.data(1)))
    values, places = sines.data(1), sines.data(2)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for place, value in zip(places, values, strict=True):
            place.copy_(value, non_blocking=True)
        got = sines.step(places)
    stream.synchronize()
    assert same_bits(got, wanted)


def ahead(kind: str):
    """A call of a kind, to be made again and again."""
    sines = Sines()
    model, data = sines.maml.model, sines.data(0)
    sizes = [10, 4, 7, 1, 9] * 5
    finetune = pymeta.FineTune(
        model, loss="mse", optimizer=pymeta.Adam(0.01), epochs=2, backend="native"
    )
    reptile = pymeta.Reptile(model, loss="mse", lr=0.01, steps=3, backend="native")
    return {
        "meta": lambda: sines.step(data),
        "padded": lambda: sines.maml(*data, support_sizes=sizes, query_sizes=sizes),
        "adapt": lambda: sines.maml.adapt(*data[:2])(data[2]),
        "finetune": lambda: finetune(*data[:2]),
        "reptile": lambda: torch.autograd.grad(reptile(*data[:2]).loss, list(model.parameters())),
    }[kind]


@pytest.mark.parametrize("kind", ["meta", "padded", "adapt", "finetune", "reptile"])
def test_the_host_runs_ahead(kind):
    """No call waits for the device, nor does anything around it that torch would call a wait."""
    call = ahead(kind)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # about half a second
        kept = call()
        done.record()
        waited = done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert kept is not None and not waited


def test_memory_is_steady():
    sines = Sines(1000)
    data = sines.data(0)
    for _ in range(5):
        sines.step(data)
        sines.maml.adapt(*data[:2])(data[2])
    torch.cuda.synchronize()

    def state():
        stats = torch.cuda.memory_stats(DEVICE)
        return torch.cuda.memory_allocated(DEVICE), stats["segment.all.allocated"]

    before = state()
    for _ in range(30):
        sines.step(data)
        sines.maml.adapt(*data[:2])(data[2])
    torch.cuda.synchronize()
    assert state() == before


# ---- memory that runs out, devices, errors ------------------------------------------------------


@pytest.mark.parametrize("what", ["results", "workspace"])
def test_out_of_memory_is_torchs_error_and_leaves_all_usable(what):
    name, tasks = ("W1", 65536) if what == "results" else ("W2", 512)
    problem = Problem(replace(WORKLOADS[name], tasks=tasks, input_gradients=False))
    module, there = module_of(problem, torch.float32), moved(problem)
    support, query = there.support.to(torch.float32), there.query.to(torch.float32)
    small = [v[:4] for v in (support.x, support.y, query.x, query.y)]
    wanted = module(*small).task_losses.clone()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    room = torch.cuda.memory_reserved(DEVICE) + (32 << 20)
    torch.cuda.set_per_process_memory_fraction(room / total, DEVICE)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            if what == "results":
                module.adapt(support.x, support.y)
            else:
                module(support.x, support.y, query.x, query.y)
        assert same_bits(module(*small).task_losses, wanted)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    whole = module(support.x, support.y, query.x, query.y)
    assert same_bits(whole.task_losses[:4], wanted)


def test_tensors_of_another_device_are_refused():
    module, data = classes()
    with pytest.raises(ValueError, match=r"xs: .*cuda:0.*cpu"):
        module(data[0].cpu(), *data[1:])
    with pytest.raises(ValueError, match=r"yq: .*cuda:0.*cpu"):
        module(*data[:3], data[3].cpu())


def test_what_the_executor_cannot_run_says_so():
    deep = mlp(*[3] * 28, dtype=torch.float32).to(DEVICE)
    with pytest.raises(ValueError, match=r'backend="native": .*layers'):
        module = pymeta.MAML(deep, loss="mse", lr=0.1, steps=1, backend="native")
        module(*on(DEVICE, batch(inputs=3, out=3, dtype=torch.float32)))


def test_a_driver_error_names_the_device():
    """An illegal address ends a CUDA context, so this is for another process."""
    program = """
import torch, pymeta
net = torch.nn.Sequential(torch.nn.Linear(3, 4)).cuda()
maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="native")
x, y = torch.randn(2, 5, 3).cuda(), torch.randn(2, 5, 4).cuda()
maml(x, y, x, y)
torch.cuda.synchronize()
plan = maml._plan
memory = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
for _ in range(3):
    try:
        call = plan.call("predict")
        call.tasks, call.start = 2, [8, 8]
        call.query = pymeta.native.extension().Rows(x=8, rows=5)
        call.results.predictions = 8
        call.run(device=(0, 0, memory.data_ptr(), memory.numel()))
    except RuntimeError as error:
        print(error, flush=True)
        break
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        pass  # the illegal address; from now on the driver refuses everything
import os
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600
    )
    assert done.stdout.startswith("cuda:0: "), done.stdout + done.stderr


def test_explain_and_info_name_the_device():
    module, data = classes()
    assert module.explain().startswith("native-cuda sm_")
    module(*data)
    said = module.explain()
    assert said.startswith("native-cuda sm_") and "6 tasks" in said, said
    done = subprocess.run(
        [sys.executable, "-m", "pymeta.info"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert torch.cuda.get_device_name(0) in done.stdout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_every_device_has_the_same_results():
    sines = Sines()
    wanted = copies(sines.step(sines.data(0)))
    for ordinal in range(1, torch.cuda.device_count()):
        other = torch.device("cuda", ordinal)
        maml = copy.deepcopy(sines.maml).to(other)
        out = maml(*on(other, sines.data(0)))  # while cuda:0 is torch's current device
        found = torch.autograd.grad(out.loss, list(maml.parameters()))
        assert torch.cuda.current_device() == 0
        got = on(DEVICE, [out.loss.detach(), out.task_losses, out.predictions, *found])
        if torch.cuda.get_device_capability(other) == torch.cuda.get_device_capability(0):
            assert same_bits(got, wanted)


def test_most_networks_that_are_drawn_fit():
    """The strategies are shared: were they to grow past the executor, the counts would show it."""
    fits = collections.Counter()

    @settings(PROFILE, max_examples=40)
    @given(chains())
    def check(chain):
        problem = Problem(Case(chain if len(chain[0]) > 2 else (("linear", 2, 2, True), *chain)))
        fits[runs_natively(module_of(problem, torch.float32))] += 1

    check()
    assert fits[True] >= 30, fits
