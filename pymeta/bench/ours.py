"""pymeta's own forms: the whole Python round trip, and the bare native call under it.

Torch is imported only by the round trips that take tensors: the native call and `Adapter.adapt`
run on numpy arrays, with or without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pymeta import native
from pymeta.bench.cases import Array, Case, Data
from pymeta.spec.architecture import Architecture
from pymeta.spec.losses import Loss, native_loss
from pymeta.spec.optimizers import SGD, Adam, native_optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pymeta.bench.devices import Device

Run = Callable[[], Any]
# of what `run` returned: the mean loss or None, and the results in the order of `Data.parameters`,
# wherever they lie (`contestants.on_host` fetches them)
Read = Callable[[Any], tuple[Any, list[Any]]]


def inner_optimizer(case: Case) -> SGD | Adam:
    """The optimiser of a case's inner loop as pymeta describes it."""
    return Adam(case.lr) if case.optimizer == "adam" else SGD(case.lr)


# ---- without torch -------------------------------------------------------------------------------


def _two(case: Case, sizes: tuple[int, ...], first: int) -> tuple[int, int]:
    """Along height and width; a sequence has `first` as its height's."""
    return (first, sizes[-1]) if len(case.image) == 1 else (sizes[0], sizes[-1])


def architecture(case: Case) -> Architecture:
    """The case's network as the native core takes it, its parameters in the order of `Data`."""
    layers: list[tuple[Any, ...]] = []
    names: list[str] = []
    if case.image:
        layers.append(("image", case.sizes[0], *_two(case, case.image, 1)))
    for i, (inputs, outputs) in enumerate(case.layers):
        if i == len(case.layers) - 1 and case.image:
            layers.append(("flatten",))
        names += [f"{len(layers)}.weight", f"{len(layers)}.bias"]
        if i == len(case.layers) - 1 or not case.image:
            layers.append(("linear", *case.products[i], True))
        else:
            # kernel, stride, paddings, dilation
            padding = _two(case, (1,), 0)
            sides = [side for side in padding for _ in range(2)]
            window = (*_two(case, (3,), 1), 1, 1, *sides, 1, 1)
            layers.append((f"conv{len(case.image)}d", inputs, outputs, *window, 1, True))
        if i < len(case.layers) - 1:
            if case.batch_norm:
                names += [f"{len(layers)}.weight", f"{len(layers)}.bias"]
                layers.append(("batch_norm", outputs, 1e-5, True, True))
            layers.append((case.activation,))
            if case.image:
                pairs = _two(case, (2,), 1)
                layers.append((f"max_pool{len(case.image)}d", *pairs, *pairs, 0, 0, 0, 0, 1, 1))
    return Architecture(tuple(layers), tuple(names), tuple(names), False)


def _problem(case: Case) -> Any:
    network = architecture(case).network()
    count = len(network.parameter_sizes)
    return native.extension().Problem(
        network,
        native_loss(Loss(case.loss)),
        [True] * count,
        [0] * count,
        native_optimizer(inner_optimizer(case)),
    )


def _pointer(array: Array) -> int:
    return array.ctypes.data


def kernel(case: Case, data: Data) -> tuple[Run, Read]:
    """One call of the native code with ready-made buffers: what the kernels take."""
    problem = _problem(case)
    lr, mean = np.array([case.lr], np.float32), np.empty(1, np.float32)
    losses = np.empty(case.tasks, np.float32)
    predictions = np.empty((case.tasks, case.query, case.sizes[-1]), np.float32)
    stacked = (case.tasks,) if case.job == "finetune" else ()
    results = [np.empty((*stacked, *p.shape), np.float32) for p in data.parameters]
    pointers, made = [_pointer(p) for p in data.parameters], [_pointer(r) for r in results]
    lib = native.extension()
    call = lib.Call(problem, 4, {"maml": "meta", "finetune": "adapt"}.get(case.job, case.job))
    call.tasks, call.start, call.first_order = case.tasks, pointers, case.first_order
    call.rates, call.schedule = lib.Rates(_pointer(lr)), lib.Schedule(steps=case.steps)
    call.support = lib.Rows(_pointer(data.xs), _pointer(data.ys), rows=case.support)
    call.query = lib.Rows(_pointer(data.xq), _pointer(data.yq), rows=case.query)
    if case.job == "finetune":
        call.results.adapted = made
    else:
        call.results.losses, call.results.mean_loss = _pointer(losses), _pointer(mean)
        call.gradients = lib.Gradients(made)
    if case.job == "maml":
        call.results.predictions = _pointer(predictions)
    # the arrays are a default argument so that they live as long as the function
    alive = (data, lr, losses, mean, predictions)

    def run(alive: tuple[Any, ...] = alive) -> tuple[Array | None, list[Array]]:
        call.run()
        return None if case.job == "finetune" else mean, results

    return run, _as_it_is


def adapter_trip(case: Case, data: Data) -> tuple[Run, Read]:
    """Fine-tuning without torch: `Adapter.adapt`, from numpy to numpy."""
    import pymeta

    chain = architecture(case)
    adapter = pymeta.Adapter(
        chain,
        dict(zip(chain.names, data.parameters, strict=True)),
        adapted=chain.names,
        loss=Loss(case.loss),
        optimizer=inner_optimizer(case),
        schedule=pymeta.Schedule(epochs=case.steps),
    )

    return lambda: adapter.adapt(data.xs, data.ys), _read_adapted


def executor(case: Case) -> str:
    """Which executor and instruction set the planner chooses, e.g. "lanes avx512"."""
    job = {"maml": "meta", "reptile": "reptile", "finetune": "adapt"}[case.job]
    schedule = native.extension().Schedule(steps=case.steps)
    exact = case.job == "maml" and not case.first_order
    p = _problem(case).plan(
        4, job, schedule, case.tasks, case.support, case.query, second_order=exact, is_plain=True
    )
    return f"{p['executor']} {p['isa']}"


def peak(seconds: float) -> float:
    """FLOP/s of one core by fused multiply-adds in float32, in the instruction set in use."""
    lib = native.extension()
    return float(lib.fma_peak(lib.isa(), 4, seconds))


# ---- with torch ----------------------------------------------------------------------------------


def learner(case: Case, model: nn.Module, backend: str, precision: str = "float32") -> Any:
    """The case's job as a user writes it: a `MAML`, `Reptile` or `FineTune` of the model."""
    import pymeta

    how: dict[str, Any] = {
        "loss": case.loss,
        "optimizer": inner_optimizer(case),
        "backend": backend,
        "precision": precision,
    }
    if case.job == "maml":
        return pymeta.MAML(model, steps=case.steps, first_order=case.first_order, **how)
    if case.job == "reptile":
        return pymeta.Reptile(model, steps=case.steps, **how)
    return pymeta.FineTune(model, epochs=case.steps, **how)


def round_trip(
    case: Case, data: Data, device: Device, precision: str = "float32"
) -> tuple[Run, Read, str]:
    """What a user runs, from tensors to tensors; and which path it takes.

    learner(...), backward(), and the gradients dropped as an optimiser's zero_grad does;
    fine-tuning is one call.
    """
    from pymeta.bench.torch_rivals import make_model, tensors

    made = learner(case, make_model(case, data, device), "native", precision)
    sets = tensors(data, device)[: 4 if case.job == "maml" else 2]
    if case.job == "finetune":
        made(*sets, progress=False)
        return lambda: made(*sets, progress=False), _read_adapted, _path(made)

    def step() -> torch.Tensor:
        out = made(*sets)
        out.loss.backward()
        loss: torch.Tensor = out.loss.detach()
        return loss

    run = _from_no_grad(made, step)
    run()
    return run, _as_it_is, _path(made)


def without_autograd(case: Case, data: Data, device: Device) -> tuple[Run, Read]:
    """The same of MAML by `accumulate_grad`."""
    from pymeta.bench.torch_rivals import make_model, tensors

    made = learner(case, make_model(case, data, device), "native")
    sets = tensors(data, device)
    return _from_no_grad(made, lambda: made.accumulate_grad(*sets).loss), _as_it_is


def _from_no_grad(made: Any, step: Callable[[], torch.Tensor]) -> Run:
    """A step that gives the loss, after `.grad` was dropped; with the gradients that it leaves."""
    parameters = list(made.parameters())

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        for p in parameters:
            p.grad = None
        return step(), [p.grad for p in parameters if p.grad is not None]

    return run


def captured(case: Case, data: Data, device: Device) -> tuple[Run, Read, str]:
    """The same in a graph that the device replays: the meta-gradient by `torch.autograd.grad`."""
    import torch

    from pymeta.bench.torch_rivals import make_model, tensors

    made = learner(case, make_model(case, data, device), "native")
    sets = tensors(data, device)[: 4 if case.job == "maml" else 2]
    parameters = list(made.parameters())

    def once() -> tuple[Any, list[torch.Tensor]]:
        if case.job == "finetune":
            return None, list(made(*sets, progress=False).parameters.values())
        out = made(*sets)
        return out.loss.detach(), list(torch.autograd.grad(out.loss, parameters))

    replay, result = device.capture(once)

    def run() -> Any:
        replay()
        return result

    return run, _as_it_is, _path(made)


def _path(learner: Any) -> str:
    """What ran the last call, e.g. "native-cpu avx512 lanes"."""
    return str(learner.explain()).split(":")[0]


def _as_it_is(out: Any) -> tuple[Any, list[Any]]:
    loss, results = out
    return loss, results


def _read_adapted(models: Any) -> tuple[None, list[Any]]:
    return None, list(models.parameters.values())


def set_block_threads(count: int) -> None:
    """Threads of a block of the CUDA executor; 0 leaves it to the planner.

    Raises:
        RuntimeError: this build has no such executor.
    """
    lib = native.extension()
    if not hasattr(lib, "set_block_threads"):
        raise RuntimeError("this build of pymeta has no block executor")
    lib.set_block_threads(count)
