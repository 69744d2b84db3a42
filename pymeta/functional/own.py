"""What tasks have of their own, and weights of steps, as arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pymeta.backend.plan import Plan
from pymeta.backend.recipe import Recipe
from pymeta.tasks.task_set import dense, tensor_of

Starts: TypeAlias = Mapping[str, Tensor | np.ndarray] | None
OwnRates: TypeAlias = Tensor | np.ndarray | Sequence[float] | None
StepWeights: TypeAlias = Tensor | np.ndarray | Sequence[float] | None


class Own(NamedTuple):
    """What the tasks of a call have of their own, checked; T of each."""

    anchors: Tensor | None  # [T]
    start: dict[str, Tensor]  # {name: [T, ...]}
    rates: Tensor | None  # [T, 1, columns]
    step_weights: Tensor | None  # [steps]; all tasks'

    def operands(self, plan: Plan, parameters: list[Tensor]) -> list[Tensor]:
        """The parameters in order, or the tasks' own in their place."""
        if not self.start:
            return parameters
        pairs = zip(plan.names, parameters, strict=True)
        return [self.start.get(name, parameter) for name, parameter in pairs]

    def recipe(self, maml: Recipes, steps: int) -> Recipe:
        """How the native call adapts."""
        return Recipe(
            steps,
            maml.first_order,
            self.anchors,
            self.step_weights,
            maml.task_clip or 0.0,
            tuple(self.start),
            self.rates is not None,
        )


class Recipes(Protocol):
    """What is asked of a learner."""

    first_order: bool
    task_clip: float | None


def _real_tensor(name: str, value: Any, plan: Plan, shape: str) -> Tensor:
    """`value` as a tensor of the parameters' dtype and device; TypeError where it is none."""
    if isinstance(value, (list, tuple)):
        value = np.asarray(value)
    value = tensor_of(name, value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name}: expected real numbers {shape}, got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    return value.to(plan.expected.device, plan.expected.dtype)


def start_of(start: Any, tasks: int, plan: Plan) -> dict[str, Tensor]:
    """`start` as {name: [T, ...]}; empty where it is None.

    Raises:
        TypeError: it is no mapping of names to tensors of real numbers.
        ValueError: there is no such parameter, or a shape is not [T, ...].
    """
    if start is None:
        return {}
    if not isinstance(start, Mapping):
        raise TypeError(f"start: expected {{name: tensor [T, ...]}}, got {type(start).__name__}")
    named = zip(plan.names, plan.parameters, strict=True)
    shapes = {n: tuple(p.shape) for n, p in named if n not in plan.constants}
    found = {}
    for name, value in start.items():
        if name not in shapes:
            there = ", ".join(shapes) or "none"
            raise ValueError(f"start: there is no parameter {name!r}; there are {there}")
        wanted = (tasks, *shapes[name])
        tensor = _real_tensor(f"start[{name!r}]", value, plan, str(list(wanted)))
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"start[{name!r}]: expected shape {list(wanted)}, a value for each task, "
                f"got {list(tensor.shape)}"
            )
        found[name] = dense(tensor)
    return found


def rates_of(lr: Any, tasks: int, plan: Plan) -> Tensor | None:
    """`lr` of each task as [T, 1, columns], in the order that the core expects; None where it is.

    Raises:
        TypeError: it is no tensor of real numbers.
        ValueError: its shape is neither [T] nor [T, columns], or every element has its own rate.
    """
    if lr is None:
        return None
    columns = plan.rates.columns
    if plan.rates.groups is None:
        raise ValueError(
            "lr: the learnable rates are of each element, and a task's own are of each layer or of "
            "the network; use LearnableLR(per='layer') or a plain lr"
        )
    shape = f"[{tasks}] or [{tasks}, {columns}]"
    rates = _real_tensor("lr", lr, plan, shape)
    if tuple(rates.shape) not in ((tasks,), (tasks, columns)):
        raise ValueError(
            f"lr: expected shape {shape}, a rate for each task, got {list(rates.shape)}"
        )
    rates = (rates if rates.ndim == 2 else rates[:, None])[:, None].expand(tasks, 1, columns)
    return dense(rates)


def step_weights_of(step_weights: Any, steps: int, plan: Plan) -> Tensor | None:
    """`step_weights` as a dense tensor [steps]; None where it is None.

    Raises:
        TypeError: it is no tensor, array or list of real numbers.
        ValueError: its shape is not [steps], there are no steps, one is not finite (not asked on
            a device), or it requires grad.
    """
    if step_weights is None:
        return None
    weights = _real_tensor("step_weights", step_weights, plan, f"[{steps}]")
    if steps == 0:
        raise ValueError("step_weights: expected at least one inner step, got steps=0")
    if tuple(weights.shape) != (steps,):
        raise ValueError(
            f"step_weights: expected shape [{steps}], a weight for each inner step, "
            f"got {list(weights.shape)}"
        )
    if weights.is_cpu and not bool(weights.isfinite().all()):
        raise ValueError(f"step_weights: expected finite numbers, got {weights.tolist()}")
    if weights.requires_grad:
        raise ValueError(
            "step_weights: expected constants, got a tensor that requires grad; "
            "(weights @ out.step_losses).mean() is a loss that can be differentiated by weights"
        )
    return dense(weights)


def own_of(
    plan: Plan,
    tasks: int,
    steps: int,
    anchors: Tensor | None,
    start: Any,
    lr: Any,
    step_weights: Any = None,
) -> Own:
    """All that T tasks have of their own; TypeError or ValueError as the parts of it."""
    return Own(
        anchors,
        start_of(start, tasks, plan),
        rates_of(lr, tasks, plan),
        step_weights_of(step_weights, steps, plan),
    )
