"""precision="tf32x3" on a GPU: what its tensor cores make of it. Skipped where there is none."""

import pytest
import torch
from cases import Problem
from cuda_help import DEVICE, on, results
from helpers import batch, gradients, mlp
from kernels import same_bits
from tf32 import CASES, F32, check_near, with_tf32x3

import pymeta
from pymeta import native

HAS = "16 inputs and outputs in 3xTF32"


@pytest.mark.parametrize("name", CASES)
def test_meta_gradients_are_the_references(name):
    problem = Problem(CASES[name])
    module = with_tf32x3(problem).to(DEVICE)
    check_near(problem, module, lambda module: results(problem, module))
    assert HAS in module.explain()


def test_bits_do_not_depend_on_threads_or_other_tasks():
    net = mlp(24, 64, 64, 2, dtype=F32).to(DEVICE)
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=5, precision="tf32x3")
    data = on(DEVICE, batch(tasks=300, support=32, query=32, inputs=24, out=2, dtype=F32))
    wanted = module(*data)
    slopes = gradients(wanted.loss, *net.parameters())
    assert HAS in module.explain()
    before = native.block_threads()
    for threads in (32, 64, 128, 256):
        native.set_block_threads(threads)
        found = module(*data)
        own = gradients(found.loss, *net.parameters())
        native.set_block_threads(before)
        assert same_bits(found.task_losses, wanted.task_losses), threads
        assert all(same_bits(a, b) for a, b in zip(own, slopes, strict=True)), threads
    for t in (0, 7, 299):
        alone = module(*(v[t : t + 1] for v in data))
        assert same_bits(alone.task_losses[0], wanted.task_losses[t])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 3.4e38])
def test_what_is_not_finite_is_as_in_float32(wrong):
    net = mlp(24, 64, 1, act=torch.nn.ReLU, dtype=F32).to(DEVICE)
    data = on(DEVICE, batch(tasks=4, support=20, query=20, inputs=24, out=1, dtype=F32))
    modules = [
        pymeta.MAML(net, loss="mse", lr=0.0, steps=1, precision=precision)
        for precision in ("float32", "tf32x3")
    ]
    wanted = modules[1](*data).task_losses
    data[2][1, 3, 5] = wrong
    found = [m(*data).predictions for m in modules]
    assert HAS in modules[1].explain()
    assert torch.equal(*(f[1, 3].isnan() for f in found))
    assert torch.equal(*(f[1, 3].isinf() for f in found))
    assert same_bits(modules[1](*data).task_losses[[0, 2, 3]], wanted[[0, 2, 3]])
