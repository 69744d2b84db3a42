"""The rules of the inner optimisers: from a task's gradient to the direction of its step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from pymeta.reference.modules import Parameters
from pymeta.spec.optimizers import SGD, Adam, Optimizer, RMSprop

State: TypeAlias = tuple[Parameters, ...]  # what a rule remembers: running means, momentum


def _root(square: Tensor) -> Tensor:
    """The square root, whose derivative at 0 is taken as 0.

    A dead unit's gradients are exactly 0, where autograd alone would make NaN of it.
    """
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _clipped(gradient: Parameters, norm: float | None) -> Parameters:
    """As `torch.nn.utils.clip_grad_norm_`."""
    if norm is None or not gradient:
        return gradient
    total = _root(torch.stack([g.square().sum() for g in gradient.values()]).sum())
    factor = (norm / (total + 1e-6)).clamp(max=1.0)
    return {name: g * factor for name, g in gradient.items()}


def _sgd(rule: SGD, step: int, g: Tensor, momentum: Tensor) -> tuple[Tensor, ...]:
    if not rule.momentum:
        return g, momentum
    momentum = rule.momentum * momentum + g
    return (g + rule.momentum * momentum if rule.nesterov else momentum), momentum


def _adam(rule: Adam, step: int, g: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    beta1, beta2 = rule.betas
    first = beta1 * first + (1 - beta1) * g
    second = beta2 * second + (1 - beta2) * g.square()
    unbias1, unbias2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
    return first / unbias1 / (_root(second) / math.sqrt(unbias2) + rule.eps), first, second


def _rmsprop(
    rule: RMSprop, step: int, g: Tensor, square: Tensor, momentum: Tensor, mean: Tensor
) -> tuple[Tensor, ...]:
    square = rule.alpha * square + (1 - rule.alpha) * g.square()
    spread = square
    if rule.centered:
        mean = rule.alpha * mean + (1 - rule.alpha) * g
        spread = square - mean.square()
    d = g / (_root(spread) + rule.eps)
    if rule.momentum:
        d = momentum = rule.momentum * momentum + d
    return d, square, momentum, mean


# rule -> (how much state it has, (rule, step, g, *state) of one tensor -> (d, *state after it))
_RULES: dict[type, tuple[int, Callable[..., tuple[Tensor, ...]]]] = {
    SGD: (1, _sgd),
    Adam: (2, _adam),
    RMSprop: (3, _rmsprop),
}


def first_state(rule: Optimizer, start: Parameters) -> State:
    """The state before the first step: zeros."""
    states, _ = _RULES[type(rule)]
    zeros = {name: torch.zeros_like(p) for name, p in start.items()}
    return (zeros,) * states


def direction(
    rule: Optimizer, step: int, theta: Parameters, gradient: Parameters, state: State
) -> tuple[Parameters, State]:
    """The direction d of theta <- theta - lr d, as torch.optim's classes have it.

    Args:
        rule: which of them.
        step: counted from 0.
        theta: the parameters before the step.
        gradient: of the loss (and of the anchor's penalty).
        state: what the step before left.

    Returns:
        d, and the state after the step.
    """
    _, one = _RULES[type(rule)]
    g = _clipped(gradient, rule.clip_norm)
    decoupled = isinstance(rule, Adam) and rule.decoupled
    if rule.weight_decay and not decoupled:
        g = {n: g[n] + rule.weight_decay * p for n, p in theta.items()}
    each = {n: one(rule, step, g[n], *(s[n] for s in state)) for n in theta}
    after = tuple({n: results[1 + i] for n, results in each.items()} for i in range(len(state)))
    d = {n: results[0] for n, results in each.items()}
    if decoupled:
        d = {n: d[n] + rule.weight_decay * p for n, p in theta.items()}
    return d, after
