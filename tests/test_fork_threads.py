"""Calls from forked processes (DataLoader workers) and from many threads at once."""

import multiprocessing
import threading

import pytest
import torch
from helpers import batch, gradients, mlp
from torch.utils.data import DataLoader, Dataset

import pymeta


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
    assert all(torch.equal(a, b) for a, b in zip(loader, wanted, strict=True))
    assert torch.equal(items[3], wanted[3])


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
                got = result(many[i])
                if not all(torch.equal(a, b) for a, b in zip(got, wanted[i], strict=True)):
                    wrong.append(i)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(p is q for p, q in zip(module.parameters(), parameters, strict=True))


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
