"""Kernels of single calls on a GPU: the bits of the kernel of all calls."""

import warnings

import pytest
import torch
from cuda_help import DEVICE, on
from helpers import batch, gradients, mlp
from kernels import same_bits
from torch import nn

import pymeta
from pymeta import native, specialise

pytestmark = pytest.mark.skipif(
    not specialise.finds_device_compiler(), reason="neither NVRTC nor nvcc"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYMETA_CACHE", str(tmp_path))
    native.extension().forget_special_kernels()
    yield tmp_path
    native.set_specialise(False)
    native.extension().forget_special_kernels()


def results(maml, data):
    out = maml(*data)
    return on(torch.device("cpu"), [
        out.loss, out.task_losses, out.predictions, *gradients(out.loss, *maml.parameters())
    ])  # fmt: skip


# No elementary functions: those are the compiler's, which may be another version than the build's.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1, 40, 40, 1), (24, 64, 64, 3)])
def test_the_same_bits(sizes, dtype, cache):
    net = mlp(*sizes, act=nn.ReLU, dtype=dtype)
    maml = pymeta.MAML(net, loss="mse", lr=0.01, steps=2, backend="native").to(DEVICE)
    data = on(DEVICE, batch("mse", 40, 10, 12, sizes[0], sizes[-1], dtype))
    general = results(maml, data)
    native.set_specialise(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        special = results(maml, data)
    assert len(list(cache.glob("*.cubin"))) == 1
    assert same_bits(general, special)


def test_in_a_graph(cache):
    net = mlp(2, 16, 1, act=nn.ReLU, dtype=torch.float32)
    maml = pymeta.MAML(net, loss="mse", lr=0.01, steps=1, backend="native").to(DEVICE)
    data = on(DEVICE, batch("mse", 9, 5, 5, 2, 1, torch.float32))
    native.set_specialise(True)
    wanted = results(maml, data)
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                maml(*data)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = maml(*data)
        graph.replay()
        torch.cuda.synchronize()
    assert same_bits([out.task_losses.cpu()], wanted[1:2])
