"""pymeta's own forms: the whole Python round trip, and the bare native call under it."""

from __future__ import annotations

from collections.abc import Callable

import torch

import pymeta
from bench.cases import Case, Data
from bench.torch_rivals import make_model, tensors
from pymeta import native
from pymeta.network import Description, describe


def _maml(case: Case, data: Data) -> pymeta.MAML:
    return pymeta.MAML(
        make_model(case, data),
        loss=case.loss,
        lr=case.lr,
        steps=case.steps,
        first_order=case.first_order,
        backend="native",
    )


def _read(out: tuple[torch.Tensor, list[torch.Tensor]]) -> tuple:
    loss, gradients = out
    return loss.item(), [g.numpy() for g in gradients]


def round_trip(case: Case, data: Data) -> tuple[Callable, Callable]:
    """maml(...), backward(), and the gradients dropped as an optimiser's zero_grad does."""
    maml = _maml(case, data)
    parameters = list(maml.parameters())
    arguments = tensors(data)

    def run() -> tuple:
        for p in parameters:
            p.grad = None
        out = maml(*arguments)
        out.loss.backward()
        return out.loss.detach(), [p.grad for p in parameters]

    return run, _read


def kernel(case: Case, data: Data) -> tuple[Callable, Callable]:
    """`Problem.meta_gradient` with ready-made buffers: what the native code takes."""
    lib = native.extension()
    model = make_model(case, data)
    chain = describe(model)
    assert isinstance(chain, Description), chain
    values = dict(model.named_parameters())
    parameters = [values[name].detach() for name in chain.names]
    problem = lib.Problem(
        lib.Network(chain.layers),
        lib.Loss(case.loss),
        [True] * len(parameters),
        [0] * len(parameters),
    )
    xs, ys, xq, yq = tensors(data)
    lr = torch.tensor([case.lr])
    losses = torch.empty(case.tasks)
    predictions = torch.empty(case.tasks, case.query, case.sizes[-1])
    gradients = [torch.empty_like(p) for p in parameters]
    # the tensors are default arguments so that they live as long as the function
    arguments = (
        4,
        [p.data_ptr() for p in parameters],
        lr.data_ptr(),
        1,
        1,
        case.steps,
        case.first_order,
        case.tasks,
        (xs.data_ptr(), ys.data_ptr(), 0, case.support, 0, 0),
        (xq.data_ptr(), yq.data_ptr(), 0, case.query, 0, 0),
        losses.data_ptr(),
        predictions.data_ptr(),
        [g.data_ptr() for g in gradients],
    )
    alive = (parameters, xs, ys, xq, yq, lr, losses, predictions)

    def run(alive: tuple = alive) -> tuple:
        problem.meta_gradient(*arguments)
        return losses, gradients

    return run, lambda out: _read((out[0].mean(), out[1]))


def executor(case: Case, data: Data) -> str:
    """Which executor and instruction set the planner chooses, e.g. "lanes avx512"."""
    lib = native.extension()
    chain = describe(make_model(case, data))
    assert isinstance(chain, Description), chain
    count = len(chain.names)
    problem = lib.Problem(
        lib.Network(chain.layers), lib.Loss(case.loss), [True] * count, [0] * count
    )
    p = problem.plan(4, case.steps, case.tasks, case.support, case.query, not case.first_order)
    return f"{p['executor']} {p['isa']}"


def peak(seconds: float) -> float:
    """FLOP/s of one core by fused multiply-adds in float32, in the instruction set in use."""
    lib = native.extension()
    return lib.fma_peak(lib.isa(), 4, seconds)
