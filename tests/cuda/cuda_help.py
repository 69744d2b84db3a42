"""Cases on a device, for the tests of the CUDA executor."""

import copy

import pytest
import torch
from cases import Case, Problem
from helpers import batch, mlp

import pymeta
from pymeta import native

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
if native.cuda_reason() is not None:
    pytest.skip(f"no CUDA executor: {native.cuda_reason()}", allow_module_level=True)


DEVICE = torch.device("cuda", 0)


def on(device: torch.device, value):
    """Tensors, alone or in dictionaries and sequences, on a device."""
    if isinstance(value, dict):
        return {name: on(device, v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [on(device, v) for v in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def moved(problem: Problem, device: torch.device = DEVICE) -> Problem:
    """The same problem with its tasks on a device."""
    problem = copy.copy(problem)
    for name in ("support", "query"):
        side = getattr(problem, name)
        parts = [on(device, v) for v in (side.x, side.y, side.weights)]
        anchors = None if side.anchors is None else on(device, side.anchors)
        setattr(problem, name, type(side)(*parts, side.sizes, anchors))
    return problem


def module_of(problem: Problem, dtype: torch.dtype, device: torch.device = DEVICE) -> pymeta.MAML:
    return problem.module(dtype, "auto").to(device)


def results(problem: Problem, module: pymeta.MAML, tasks: list[int] | None = None) -> dict:
    """What a call gives for these tasks, on the CPU."""
    device = next(module.parameters()).device
    return on(torch.device("cpu"), moved(problem, device).results(module, tasks))


def runs_natively(module) -> bool:
    """Whether the executor takes the model; where it does not, it has to say why."""
    said = module.explain()
    if said.startswith("native-cuda"):
        return True
    assert said.startswith("torch: ") and "CUDA executor takes" in said, said
    return False


LAYERS = (("linear", 24, 64, True), ("relu",), ("linear", 64, 64, True), ("relu",))


WORKLOADS = {
    "W1": Case(
        (("linear", 1, 40, True), ("relu",), ("linear", 40, 40, True), ("relu",),
         ("linear", 40, 1, True)), tasks=33, support=10, query=10, steps=5,
    ),
    "W2": Case(
        (("linear", 784, 256, True), ("relu",), ("linear", 256, 128, True), ("relu",),
         ("linear", 128, 64, True), ("relu",), ("linear", 64, 64, True), ("relu",),
         ("linear", 64, 5, True)), "cross_entropy", tasks=8, support=5, query=25, steps=1,
    ),
    "W3": Case((*LAYERS, ("linear", 64, 1, True)), "bce_with_logits", tasks=20, support=32,
               query=32, steps=5),
}  # fmt: skip


ODD = Case(
    (("linear", 5, 33, True), ("layer_norm", 33, 33, True), ("tanh",), ("linear", 33, 17, True),
     ("relu",), ("linear", 17, 3, True)), "cross_entropy", tasks=21, form="list", weights=True,
    support=9, query=11, steps=3, lr="parameter", per_step=True, optimizer="nesterov", seed=2,
)  # fmt: skip


def classes(tasks: int = 6, loss="cross_entropy") -> tuple[pymeta.MAML, list[torch.Tensor]]:
    net = mlp(3, 20, 4, dtype=torch.float32)
    module = pymeta.MAML(net, loss=loss, lr=0.1, steps=2, backend="native").to(DEVICE)
    data = batch("cross_entropy", tasks, inputs=3, out=4, dtype=torch.float32)
    return module, on(DEVICE, data)
