"""On a device: repeated calls, memory, streams and captures."""

import pytest
import torch
from device_help import make
from helpers import batch, gradients, in_threads, mlp
from kernels import same_bits, using
from torch import Tensor

from pymeta import SGD, FineTune, LearnableLR, Reptile, native
from pymeta.backend.device import Device, unusable

pytestmark = pytest.mark.skipif(not native.emulates(), reason="a build without the emulated device")


# ---- repeats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.1, LearnableLR(0.1, "layer")])
def test_repeats_give_what_a_first_call_gives(lr, repeats, calls):
    net = mlp(2, 4, 3)
    module = make(net, lr=lr)
    for _ in range(3):
        data = batch(out=3)
        got, wanted = module(*data), make(net, lr=lr)(*data)
        for a, b in zip(got[:3], wanted[:3], strict=True):
            assert same_bits(a, b)
        parameters = list(net.parameters())
        assert same_bits(gradients(got.loss, *parameters), gradients(wanted.loss, *parameters))
    assert repeats == [True, True] and calls == ["meta"] * 6
    with torch.no_grad():
        assert not module(*data).loss.requires_grad


@pytest.mark.parametrize("lr", [0.1, LearnableLR(0.1, "layer")])
def test_adapting_and_predicting_again(lr, gpu, repeats, calls):
    net = mlp(2, 4, 3)
    module = make(net, lr=lr)
    for k in range(3):
        xs, ys, xq, _ = batch(out=3)
        models = module.adapt(xs, ys)
        got = [*models.parameters.values(), models(xq)]
        assert repeats == [True, True] * (k > 0)
        wanted = make(net, lr=lr).adapt(xs, ys)
        assert same_bits(got, [*wanted.parameters.values(), wanted(xq)])
        repeats.clear()
    assert set(calls) == {"adapt", "predict"} and len(calls) == 12
    gpu.stream = 7  # what was kept is of another one
    assert same_bits(module.adapt(xs, ys)(xq), got[-1]) and repeats == [False, False]
    gpu.capturing = True
    assert same_bits(module.adapt(xs, ys)(xq), got[-1]) and repeats[2:] == [False, False]
    gpu.capturing = False
    assert same_bits(module.adapt(xs, ys)(xq), got[-1]) and repeats[4:] == [True, True]
    native.set_check_values(True)
    assert same_bits(module.adapt(xs, ys)(xq), got[-1]) and repeats[6:] == [False] * 2


def test_threads_repeat_one_module():
    net = mlp(2, 4, 2)
    module, several = make(net), [batch(tasks=t) for t in (1, 2, 3)]
    wanted = [gradients(make(net)(*data).loss, *net.parameters()) for data in several]
    wrong = []

    def work(data, want):
        for _ in range(10):
            found = gradients(module(*data).loss, *net.parameters())
            if not same_bits(found, want):
                wrong.append(found)

    in_threads(work, zip(several, wanted, strict=True))
    assert not wrong


def test_uniform_calls_read_no_value(monkeypatch):
    """Reading one would mean to wait for a GPU, and be an error in the capture of a graph."""
    net, data = mlp(2, 4, 3), batch("cross_entropy", out=3)
    options = {"loss": "cross_entropy", "backend": "native"}
    module = make(net, lr=LearnableLR(0.1, "parameter"), **options)
    plain = make(net, optimizer=SGD(0.1, momentum=0.9), **{**options, "lr": None})
    reptile = Reptile(net, lr=0.1, steps=3, batch_size=2, **options)
    weights = {"support_weights": torch.rand(3, 5).double()}
    models = module.adapt(*data[:2])

    def refuse(self, *arguments, **options):
        raise AssertionError("a tensor's values were asked for")

    names = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__")
    for name in (*names, "__index__", "__array__"):
        monkeypatch.setattr(Tensor, name, refuse)
    for _ in range(2):
        for call in (module, plain):
            call(*data).loss.backward()
            call(*data, **weights)
            with torch.no_grad():
                call(*data)
            call.adapt(*data[:2])
        reptile(*data[:2]).loss.backward()
        reptile.adapt(*data[:2])
        models(data[2])
    with pytest.raises(AssertionError, match="values were asked for"):
        FineTune(net, lr=0.1, epochs=1, **options)(*data[:2])  # which is why it is not captured


# ---- memory and streams -------------------------------------------------------------------------


def test_workspaces_are_asked_for_once_and_grow():
    asked, given = [], []

    def method(need, *, device, extra=0):
        ordinal, stream, address, size = device
        assert (ordinal, stream) == (-1, 0)
        if address == 0 or size < need + extra:
            asked.append(size)
        else:
            given.append(size)
        return need + extra

    device = Device.of(torch.device("cpu"))
    for need in (100, 100, 80):
        device.run(method, "one shape", need)
    assert asked == [0] and given == [100, 100, 100]
    device.run(method, "one shape", 300)  # not what its shapes say: nothing was run, ask again
    device.run(method, "one shape", 300)
    assert asked == [0, 100] and given[3:] == [300, 300]
    device.run(method, "another", 0)
    device.run(method, "another", 0, extra=0)
    assert given[5:] == [1, 1]  # an address is needed all the same: 0 means to ask
    for shape in range(200):
        device.run(method, shape, 10)
    assert len(device._needs) <= 64


def test_calls_of_all_sizes_one_after_another():
    net = mlp(2, 4, 3)
    module, sizes = make(net), [(1, 2), (6, 5), (3, 9), (1, 2), (12, 1), (6, 5)]
    several = [batch(tasks=t, support=n, query=n, out=3) for t, n in sizes]
    for data in several:
        got, wanted = module(*data), make(net)(*data)
        assert same_bits(got.task_losses, wanted.task_losses)
        parameters = list(net.parameters())
        assert same_bits(gradients(got.loss, *parameters), gradients(wanted.loss, *parameters))


def flat_address(loss):
    """Where the gradients lie that a loss's graph holds."""
    return loss.grad_fn.call.gradients.flat.data_ptr()


def test_gradients_memory_is_used_again_on_its_own_stream_only(gpu):
    module, data = make(), batch(out=3)
    gpu.stream = 7
    out = module(*data)
    first = flat_address(out.loss)
    (layout,) = module._current()[0].layouts.values()
    del out
    assert [g.stream for g in layout.idle] == [7]
    out = module(*data)
    assert flat_address(out.loss) == first
    kept = out.loss.grad_fn.call.gradients  # so that it is not given out again
    del out
    gpu.stream = 8
    out = module(*data)
    assert flat_address(out.loss) != first and out.loss.grad_fn.call.gradients is not kept
    del out
    assert {g.stream for g in layout.idle} == {8}


def test_a_step_size_is_made_on_each_stream(gpu, repeats):
    module, data = make(), batch(out=3)
    plan = module._current()[0]
    gpu.stream = 7
    module(*data)
    one = plan.lr_tensor(0.1)
    assert plan.lr_tensor(0.1) is one
    gpu.stream = 8
    module(*data)
    assert plan.lr_tensor(0.1) is not one
    module(*data)
    assert repeats == [False, True]


def test_a_capture_takes_nothing_that_is_kept_and_leaves_nothing(gpu, repeats):
    net, data = mlp(2, 4, 3), batch(out=3)
    module, reptile = make(net), Reptile(net, loss="mse", lr=0.1, steps=1, backend="native")
    gpu.stream = 7
    module(*data), reptile(*data[:2])  # the warm-up
    plan, other = module._current()[0], reptile._current()[0]
    layouts = [*plan.layouts.values(), *other.layouts.values()]
    idle = [list(layout.idle) for layout in layouts]
    lrs = dict(plan.lrs)
    assert len(idle) == 2 and all(len(each) == 1 for each in idle)
    gpu.capturing = True  # on the same stream, and on another as torch.cuda.graph does it
    for gpu.stream in (7, 8):
        captured, also = module(*data), reptile(*data[:2])
        held = [captured.loss.grad_fn.call.gradients, also.loss.grad_fn.call.gradients]
        assert all(g.stream is None for g in held)
        assert not any(g in each for each in idle for g in held)
        assert plan.lr_tensor(0.1) is not lrs[(0.1, 7)]
        module.adapt(*data[:2])(data[2])
        del captured, also, held
    gpu.capturing, gpu.stream = False, 7
    assert [list(layout.idle) for layout in layouts] == idle
    assert plan.lrs == lrs and plan.lrs[(0.1, 7)] is lrs[(0.1, 7)]
    assert repeats == [False] * len(repeats)
    wanted = make(net)(*data)
    assert same_bits(module(*data).loss, wanted.loss)


@pytest.mark.parametrize("what", ["sizes", "lists", "task_ids"])
def test_a_capture_refuses_what_each_call_copies_from_the_host(what, gpu):
    net, data = mlp(2, 4, 3), batch(out=3)
    module, reptile = make(net), Reptile(net, loss="mse", lr=0.1, steps=1, backend="native")
    lists = [[v[0], v[1, :2], v[2]] for v in data]
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="cannot be part of a CUDA graph"):
        if what == "sizes":
            module(*data, query_sizes=[1, 2, 3])
        elif what == "lists":
            module(*lists)
        else:
            reptile(*data[:2], task_ids=[0, 1, 2])
    native.set_check_values(True)  # there is nothing to be checked yet: values come by the replay
    module(*data)


def test_a_device_is_what_torch_says_it_is():
    assert Device.of(torch.device("cpu")).name == "emulated"
    there = Device(torch.device("cuda", 2))
    assert (there.ordinal, there.device.index) == (2, 2)
    assert Device.of(torch.device("meta")) is None
    with using(executor="auto"):
        assert Device.of(torch.device("cpu")) is None


def test_why_a_device_cannot_be_used(monkeypatch):
    assert unusable(torch.device("cpu")) is None
    assert "runs on the CPU and on CUDA" in unusable(torch.device("meta"))
    monkeypatch.setattr(native, "cuda_reason", lambda: "the driver is too old")
    said = unusable(torch.device("cuda", 1))
    assert said == "the parameters are on cuda:1, where the native core cannot run: " + (
        "the driver is too old"
    )
    monkeypatch.setattr(native, "cuda_reason", lambda: None)
    monkeypatch.setattr(native, "devices", lambda: [{"capability": c} for c in ("10.0", "7.5")])
    assert unusable(torch.device("cuda", 0)) is None
    assert unusable(torch.device("cuda", 1)).endswith("compute capability 7.5; 8.0 is needed")
    assert Device(torch.device("cuda", 0)).name == "sm_100"
