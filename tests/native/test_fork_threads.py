"""Calls from forked processes (DataLoader workers) and from many threads at once."""

import multiprocessing
import sys
import threading

import pytest
import torch
from helpers import assert_promised, batch, gradients, mlp
from torch import nn
from torch.utils.data import DataLoader, Dataset

import pymeta
from pymeta.spec.network import describe


class AdaptedTasks(Dataset):
    """Item i: the loss and a gradient of a call made in the worker that fetches it."""

    def __init__(self, module, data):
        self.module, self.data = module, data

    def __len__(self):
        return 6

    def __getitem__(self, index):
        loss = self.module(*(v + index for v in self.data)).loss
        return torch.cat([loss.detach().view(1), *(g.flatten() for g in self.gradients(loss))])

    def gradients(self, loss):
        return torch.autograd.grad(loss, list(self.module.parameters()))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_data_loader_workers(backend):
    """The pool of the parent has threads that a fork does not copy; workers make their own."""
    net = mlp(2, 8, 2)
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend=backend)
    items = AdaptedTasks(module, batch(tasks=64))
    wanted = [items[i] for i in range(6)]  # the parent has used its pool before it forks
    fork = multiprocessing.get_context("fork")
    loader = DataLoader(items, num_workers=2, batch_size=None, multiprocessing_context=fork)
    assert_promised(list(loader), wanted, backend)
    assert_promised(items[3], wanted[3], backend)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_concurrent_threads_share_a_module(backend):
    net = mlp(2, 8, 2)
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend=backend)
    many = [batch(tasks=3 + i) for i in range(4)]
    parameters = list(net.parameters())  # while torch calls the net, others may be in their place

    def result(data):
        out = module(*data)
        return [out.loss.detach(), out.predictions, *gradients(out.loss, *parameters)]

    wanted = [result(data) for data in many]
    wrong, start = [], threading.Barrier(4)

    def work(i):
        try:
            start.wait()
            for _ in range(20 if backend == "native" else 3):
                assert_promised(result(many[i]), wanted[i], backend)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(p is q for p, q in zip(module.parameters(), parameters, strict=True))


class Traced(nn.Module):
    """No nn.Sequential: torch.fx looks at its forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.child = nn.Sequential(nn.Tanh(), nn.Linear(2, 2))

    def forward(self, x):
        return self.child(self.layer(x))


def run_at_once(*functions):
    """Each in a thread of its own, with many changes between them."""
    threads = [threading.Thread(target=function) for function in functions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)


def test_other_threads_call_modules_while_one_is_traced():
    net, plain, x = Traced(), mlp(2, 8, 2), torch.randn(3, 2)
    wrong, done = [], threading.Event()

    def look():
        for _ in range(20):
            if describe(net).in_features != 2:
                wrong.append("what was found")
        done.set()

    def call():
        try:
            while not done.is_set():
                plain(x.double())
                net(x)
        except Exception as error:
            wrong.append(error)

    run_at_once(look, call, call)
    assert not wrong


def test_threads_may_look_at_one_model_at_once():
    net, untouched = Traced(), (nn.Module.__call__, nn.Module.__getattr__)
    learners = []

    def make():
        for _ in range(10):
            learners.append(pymeta.FineTune(net, loss="mse", lr=0.1, epochs=1, backend="native"))

    run_at_once(make, make, make, make)
    assert len(learners) == 40
    assert (nn.Module.__call__, nn.Module.__getattr__) == untouched


def test_a_thread_may_change_the_model_of_another_module():
    """Modules do not share anything: one trains while the other is called."""
    one, other = (pymeta.MAML(mlp(2, 8, 2), loss="mse", lr=0.1, steps=1) for _ in range(2))
    data = batch()
    wanted = other(*data).loss.detach()
    stop = threading.Event()

    def train():
        opt = torch.optim.SGD(one.parameters(), lr=0.1)
        while not stop.is_set():
            opt.zero_grad()
            one(*data).loss.backward()
            opt.step()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        assert all(torch.equal(other(*data).loss, wanted) for _ in range(50))
    finally:
        stop.set()
        thread.join()
