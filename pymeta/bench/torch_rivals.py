"""The same jobs by torch: torch.func with vmap (eager and compiled), loops over tasks.

Every maker takes a case and its data and returns a function of no arguments that computes
(mean loss, gradients in the order of `Data.parameters`), for fine-tuning (None, adapted
parameters), as `Case.job` says.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymeta.bench import devices
from pymeta.bench.cases import LOOP_TASKS, Case, Data

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
Result = tuple[Tensor | None, list[Tensor]]
Params = dict[str, Tensor]
Job = tuple[Callable[..., tuple[Params, Tensor]], tuple[Any, ...]]


def make_model(case: Case, data: Data, device: devices.Device | None = None) -> nn.Sequential:
    """The case's network as a torch module, in the dtype of the data, on the device."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(case.layers):
        if i == len(case.layers) - 1:
            layers += [nn.Flatten()] * bool(case.image)
            layers.append(nn.Linear(*case.products[i]))
            break
        if case.image:
            convolution = nn.Conv1d if len(case.image) == 1 else nn.Conv2d
            layers.append(convolution(inputs, outputs, 3, padding=1))
        else:
            layers.append(nn.Linear(inputs, outputs))
        if case.batch_norm:
            norm = nn.BatchNorm2d if len(case.image) == 2 else nn.BatchNorm1d
            layers.append(norm(outputs, track_running_stats=False))
        layers.append(ACTIVATIONS[case.activation]())
        pool = nn.MaxPool1d if len(case.image) == 1 else nn.MaxPool2d
        layers += [pool(2)] * bool(case.image)
    model = nn.Sequential(*layers).to(torch.from_numpy(data.xs).dtype)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), data.parameters, strict=True):
            parameter.copy_(torch.from_numpy(value))
    like = (device or devices.Cpu()).tensor(data.parameters[0])
    return model.to(like.device)


def tensors(
    data: Data, device: devices.Device | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """xs, ys, xq, yq as tensors; on the CPU they share the arrays' memory."""
    here = device or devices.Cpu()
    return (
        here.tensor(data.xs),
        here.tensor(data.ys),
        here.tensor(data.xq),
        here.tensor(data.yq),
    )


def _meta_gradient(case: Case, data: Data, device: devices.Device | None) -> Job:
    """f(parameters, xs, ys, xq, yq) -> (gradients, loss) in torch.func, and its arguments."""
    model = make_model(case, data, device)
    loss_of = LOSSES[case.loss]
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, params, (x,)), y)

    def task(params: Params, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        for _ in range(case.steps):
            step = torch.func.grad(loss)(params, xs, ys)
            if case.first_order:
                step = {name: g.detach() for name, g in step.items()}
            params = {name: p - case.lr * step[name] for name, p in params.items()}
        return loss(params, xq, yq)

    def mean_loss(params: Params, *sets: Tensor) -> Tensor:
        return torch.func.vmap(task, in_dims=(None, 0, 0, 0, 0))(params, *sets).mean()

    return torch.func.grad_and_value(mean_loss), (parameters, *tensors(data, device))


def _adaptation(case: Case, data: Data, device: devices.Device | None) -> Job:
    """f(parameters, xs, ys) -> (result by name, mean loss) for the jobs of first order."""
    model = make_model(case, data, device)
    loss_of = LOSSES[case.loss]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    b1, b2, eps = 0.9, 0.999, 1e-8

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, params, (x,)), y)

    def task(params: Params, xs: Tensor, ys: Tensor) -> tuple[Params, Tensor]:
        first = {name: torch.zeros_like(p) for name, p in params.items()}
        second, values = first, []
        for t in range(1, case.steps + 1):
            g, value = torch.func.grad_and_value(loss)(params, xs, ys)
            values.append(value)
            if case.optimizer == "adam":
                first = {n: b1 * m + (1 - b1) * g[n] for n, m in first.items()}
                second = {n: b2 * s + (1 - b2) * g[n] * g[n] for n, s in second.items()}
                rate, root = 1 / (1 - b1**t), (1 - b2**t) ** -0.5
                g = {n: rate * first[n] / (second[n].sqrt() * root + eps) for n in g}
            params = {n: p - case.lr * g[n] for n, p in params.items()}
        return params, torch.stack(values).mean()

    def function(params: Params, xs: Tensor, ys: Tensor) -> tuple[Params, Tensor]:
        ends, values = torch.func.vmap(task, in_dims=(None, 0, 0))(params, xs, ys)
        if case.job == "reptile":
            ends = {n: params[n] - end.mean(0) for n, end in ends.items()}
        return ends, values.mean()

    return function, (parameters, *tensors(data, device)[:2])


def _job(case: Case, data: Data, device: devices.Device | None) -> Job:
    return (_meta_gradient if case.job == "maml" else _adaptation)(case, data, device)


def _runner(
    case: Case, function: Callable[..., tuple[Params, Tensor]], arguments: tuple[Any, ...]
) -> Callable[[], Result]:
    def run() -> Result:
        found, loss = function(*arguments)
        return None if case.job == "finetune" else loss, list(found.values())

    return run


def vmap(case: Case, data: Data, device: devices.Device | None = None) -> Callable[[], Result]:
    """Eager torch.func: vmap over tasks; for meta-gradients, grad of grad."""
    return _runner(case, *_job(case, data, device))


def compiled(case: Case, data: Data, device: devices.Device | None = None) -> Callable[[], Result]:
    """torch.compile of `vmap`'s function as one graph, for these shapes."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    # Loops ask for their threads at run time: both counts that are tried share one compilation.
    inductor.cpp.dynamic_threads = True
    function, arguments = _job(case, data, device)
    return _runner(case, torch.compile(function, fullgraph=True, dynamic=False), arguments)


def captured(run: Callable[[], Result], device: devices.Device) -> Callable[[], Result]:
    """The same work in a graph that the device replays."""
    replay, result = device.capture(run)

    def again() -> Result:
        replay()
        found: Result = result
        return found

    return again


def loop(case: Case, data: Data) -> Callable[[], Result]:
    """A plain loop over tasks with torch.autograd, as most libraries do it."""
    return (_meta_gradient_loop if case.job == "maml" else _optimizer_loop)(case, data)


def _optimizer_loop(case: Case, data: Data) -> Callable[[], Result]:
    """For each task: the start's values into the model, a new torch.optim, `case.steps` steps."""
    model = make_model(case, data)
    loss_of = LOSSES[case.loss]
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    count = case.tasks if case.job == "reptile" else LOOP_TASKS
    xs, ys, *_ = tensors(data)
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[case.optimizer]

    def run() -> Result:
        ends = [p.new_empty(count, *p.shape) for p in start]
        total = torch.zeros(())
        for t in range(count):
            with torch.no_grad():
                for p, value in zip(parameters, start, strict=True):
                    p.copy_(value)
            optimizer = make(parameters, case.lr, fused=True)
            for _ in range(case.steps):
                optimizer.zero_grad()
                loss: Any = loss_of(model(xs[t]), ys[t])
                loss.backward()
                optimizer.step()
                total += loss.detach()
            for end, p in zip(ends, parameters, strict=True):
                end[t] = p.detach()
        if case.job == "finetune":
            return None, ends
        moved = [p - end.mean(0) for p, end in zip(start, ends, strict=True)]
        return total / (count * case.steps), moved

    return run


def _meta_gradient_loop(case: Case, data: Data) -> Callable[[], Result]:
    model = make_model(case, data)
    loss_of = LOSSES[case.loss]
    names = [name for name, _ in model.named_parameters()]
    tasks = list(zip(*tensors(data), strict=True))

    def forward(values: list[Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    def run() -> Result:
        for p in model.parameters():
            p.grad = None
        total = torch.zeros(())
        for xs, ys, xq, yq in tasks:
            values: list[Tensor] = list(model.parameters())
            for _ in range(case.steps):
                inner = loss_of(forward(values, xs), ys)
                step = torch.autograd.grad(inner, values, create_graph=not case.first_order)
                values = [v - case.lr * g for v, g in zip(values, step, strict=True)]
            outer: Any = loss_of(forward(values, xq), yq) / case.tasks
            outer.backward()  # adds up in .grad, and frees this task's graph
            total += outer.detach()
        return total, [p.grad for p in model.parameters() if p.grad is not None]

    return run


def higher(case: Case, data: Data) -> Callable[[], Result]:
    """The `higher` library (Grefenstette et al. 2019), its loop over tasks as its README has it."""
    innerloop_ctx: Any = import_module("higher").innerloop_ctx

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
                outer: Any = loss_of(fast(xq), yq) / case.tasks
                if case.first_order:  # an untracked copy keeps its gradients to itself
                    found = torch.autograd.grad(outer, list(fast.parameters()))
                    for p, g in zip(model.parameters(), found, strict=True):
                        p.grad = g if p.grad is None else p.grad + g
                else:
                    outer.backward()
                total += outer.detach()
        return total, [p.grad for p in model.parameters() if p.grad is not None]

    return run
