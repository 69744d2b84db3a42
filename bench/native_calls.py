"""pymeta's own forms: the whole Python round trip, and the bare native call under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import pymeta
from bench.cases import Case, Data
from bench.torch_rivals import inner_optimizer, make_model, tensors
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


def _read(out: tuple[torch.Tensor | None, list[torch.Tensor]]) -> tuple:
    loss, gradients = out
    return None if loss is None else loss.item(), [g.numpy() for g in gradients]


def round_trip(case: Case, data: Data) -> tuple[Callable, Callable]:
    """What a user runs, from tensors to tensors."""
    makers = {"maml": _maml_trip, "reptile": _reptile_trip, "finetune": _finetune_trip}
    return makers[case.job](case, data)


def _training_trip(learner: nn.Module, arguments: tuple) -> tuple[Callable, Callable]:
    """learner(...), backward(), and the gradients dropped as an optimiser's zero_grad does."""
    parameters = list(learner.parameters())

    def run() -> tuple:
        for p in parameters:
            p.grad = None
        out = learner(*arguments)
        out.loss.backward()
        return out.loss.detach(), [p.grad for p in parameters]

    return run, _read


def _maml_trip(case: Case, data: Data) -> tuple[Callable, Callable]:
    return _training_trip(_maml(case, data), tensors(data))


def _reptile_trip(case: Case, data: Data) -> tuple[Callable, Callable]:
    reptile = pymeta.Reptile(
        make_model(case, data),
        loss=case.loss,
        optimizer=inner_optimizer(case),
        steps=case.steps,
        backend="native",
    )
    return _training_trip(reptile, tensors(data)[:2])


def _finetune_trip(case: Case, data: Data) -> tuple[Callable, Callable]:
    tune = pymeta.FineTune(
        make_model(case, data),
        loss=case.loss,
        optimizer=inner_optimizer(case),
        epochs=case.steps,
        backend="native",
    )
    xs, ys, *_ = tensors(data)
    return lambda: tune(xs, ys), _read_adapted


def _read_adapted(models: pymeta.Adapted) -> tuple[None, list[np.ndarray]]:
    return None, [p.numpy() for p in models.parameters.values()]


def _problem(case: Case, data: Data) -> tuple[Any, list[torch.Tensor]]:
    """The native problem of a case, and its parameters in the chain's order."""
    lib = native.extension()
    model = make_model(case, data)
    chain = describe(model)
    assert isinstance(chain, Description), chain
    values = dict(model.named_parameters())
    problem = lib.Problem(
        lib.Network(chain.layers),
        lib.Loss(case.loss),
        [True] * len(chain.names),
        [0] * len(chain.names),
        native.optimizer(inner_optimizer(case)),
    )
    return problem, [values[name].detach() for name in chain.names]


def kernel(case: Case, data: Data) -> tuple[Callable, Callable]:
    """One call of the native code with ready-made buffers: what the kernels take."""
    problem, parameters = _problem(case, data)
    xs, ys, xq, yq = tensors(data)
    lr = torch.tensor([case.lr])
    losses, mean = torch.empty(case.tasks), torch.empty(())
    predictions = torch.empty(case.tasks, case.query, case.sizes[-1])
    stacked = (case.tasks,) if case.job == "finetune" else ()
    results = [p.new_empty(*stacked, *p.shape) for p in parameters]
    pointers, made = [p.data_ptr() for p in parameters], [r.data_ptr() for r in results]
    support = (xs.data_ptr(), ys.data_ptr(), 0, case.support, 0, 0)
    query = (xq.data_ptr(), yq.data_ptr(), 0, case.query, 0, 0)
    rate, schedule = (lr.data_ptr(), 1, 1), (case.steps, -1, 0, 0, 0, 0)
    calls: dict[str, tuple[Callable, tuple]] = {
        "maml": (
            problem.meta_gradient,
            (4, pointers, *rate, case.steps, case.first_order, case.tasks, support, query)
            + (losses.data_ptr(), predictions.data_ptr(), made, 0, 0, 0, mean.data_ptr()),
        ),
        "reptile": (
            problem.reptile,
            (4, pointers, *rate, schedule, case.tasks, support, losses.data_ptr(), mean.data_ptr())
            + (made,),
        ),
        "finetune": (
            problem.adapt,
            (4, pointers, [False] * len(pointers), *rate, schedule, case.tasks, support, made),
        ),
    }
    function, arguments = calls[case.job]
    # the tensors are a default argument so that they live as long as the function
    alive = (parameters, xs, ys, xq, yq, lr, losses, mean, predictions)

    def run(alive: tuple = alive) -> tuple:
        function(*arguments)
        return None if case.job == "finetune" else mean, results

    return run, _read


def executor(case: Case, data: Data) -> str:
    """Which executor and instruction set the planner chooses, e.g. "lanes avx512"."""
    problem, _ = _problem(case, data)
    job = {"maml": "meta", "reptile": "reptile", "finetune": "adapt"}[case.job]
    schedule = (case.steps, -1, 0, 0, 0, 0)
    exact = case.job == "maml" and not case.first_order
    p = problem.plan(4, job, schedule, case.tasks, case.support, case.query, second_order=exact)
    return f"{p['executor']} {p['isa']}"


def peak(seconds: float) -> float:
    """FLOP/s of one core by fused multiply-adds in float32, in the instruction set in use."""
    lib = native.extension()
    return lib.fma_peak(lib.isa(), 4, seconds)
