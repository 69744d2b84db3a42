"""The same meta-gradient by torch: torch.func with vmap (eager and compiled), loops over tasks.

Every maker takes a case and its data and returns a function of no arguments that computes
(mean query loss, gradients in the order of `Data.parameters`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cases import Case, Data

LOSSES = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}
Result = tuple[Tensor, list[Tensor]]


def make_model(case: Case, data: Data) -> nn.Sequential:
    """The case's network as a torch module, in the dtype of the data."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(case.layers):
        layers.append(nn.Linear(inputs, outputs))
        if i < len(case.layers) - 1:
            if case.batch_norm:
                layers.append(nn.BatchNorm1d(outputs, track_running_stats=False))
            layers.append(nn.ReLU())
    model = nn.Sequential(*layers).to(torch.from_numpy(data.xs).dtype)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), data.parameters, strict=True):
            parameter.copy_(torch.from_numpy(value))
    return model


def tensors(data: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """xs, ys, xq, yq as tensors that share the arrays' memory."""
    return tuple(torch.from_numpy(a) for a in (data.xs, data.ys, data.xq, data.yq))  # type: ignore


def _meta_gradient(case: Case, data: Data) -> tuple[Callable, tuple]:
    """f(parameters, xs, ys, xq, yq) -> (gradients, loss) in torch.func, and its arguments."""
    model = make_model(case, data)
    loss_of = LOSSES[case.loss]
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, params, (x,)), y)

    def task(params: dict, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        for _ in range(case.steps):
            step = torch.func.grad(loss)(params, xs, ys)
            if case.first_order:
                step = {name: g.detach() for name, g in step.items()}
            params = {name: p - case.lr * step[name] for name, p in params.items()}
        return loss(params, xq, yq)

    def mean_loss(params: dict, *sets: Tensor) -> Tensor:
        return torch.func.vmap(task, in_dims=(None, 0, 0, 0, 0))(params, *sets).mean()

    return torch.func.grad_and_value(mean_loss), (parameters, *tensors(data))


def _runner(function: Callable, arguments: tuple) -> Callable[[], Result]:
    def run() -> Result:
        gradients, loss = function(*arguments)
        return loss, list(gradients.values())

    return run


def vmap(case: Case, data: Data) -> Callable[[], Result]:
    """Eager torch.func: vmap over tasks, grad of grad."""
    return _runner(*_meta_gradient(case, data))


def compiled(case: Case, data: Data) -> Callable[[], Result]:
    """torch.compile of `vmap`'s function as one graph, for these shapes."""
    torch._dynamo.reset()
    # Loops ask for their threads at run time: both counts that are tried share one compilation.
    torch._inductor.config.cpp.dynamic_threads = True
    function, arguments = _meta_gradient(case, data)
    return _runner(torch.compile(function, fullgraph=True, dynamic=False), arguments)


def loop(case: Case, data: Data) -> Callable[[], Result]:
    """A plain loop over tasks with torch.autograd, as most meta-learning libraries do it."""
    model = make_model(case, data)
    loss_of = LOSSES[case.loss]
    names = [name for name, _ in model.named_parameters()]
    tasks = list(zip(*tensors(data), strict=True))

    def forward(values: list[Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    def run() -> Result:
        for p in model.parameters():
            p.grad = None
        total = torch.zeros(())
        for xs, ys, xq, yq in tasks:
            values = list(model.parameters())
            for _ in range(case.steps):
                inner = loss_of(forward(values, xs), ys)
                step = torch.autograd.grad(inner, values, create_graph=not case.first_order)
                values = [v - case.lr * g for v, g in zip(values, step, strict=True)]
            outer = loss_of(forward(values, xq), yq) / case.tasks
            outer.backward()  # adds up in .grad, and frees this task's graph
            total += outer.detach()
        return total, [p.grad for p in model.parameters()]

    return run


def higher(case: Case, data: Data) -> Callable[[], Result]:
    """The `higher` library (Grefenstette et al. 2019), its loop over tasks as its README has it."""
    from higher import innerloop_ctx

    model = make_model(case, data)
    loss_of = LOSSES[case.loss]
    optimizer = torch.optim.SGD(model.parameters(), case.lr)
    tasks = list(zip(*tensors(data), strict=True))
    options = {"copy_initial_weights": False, "track_higher_grads": not case.first_order}

    def run() -> Result:
        for p in model.parameters():
            p.grad = None
        total = torch.zeros(())
        for xs, ys, xq, yq in tasks:
            with innerloop_ctx(model, optimizer, **options) as (fast, inner):
                for _ in range(case.steps):
                    inner.step(loss_of(fast(xs), ys))
                outer = loss_of(fast(xq), yq) / case.tasks
                if case.first_order:  # an untracked copy keeps its gradients to itself
                    found = torch.autograd.grad(outer, list(fast.parameters()))
                    for p, g in zip(model.parameters(), found, strict=True):
                        p.grad = g if p.grad is None else p.grad + g
                else:
                    outer.backward()
                total += outer.detach()
        return total, [p.grad for p in model.parameters()]

    return run
