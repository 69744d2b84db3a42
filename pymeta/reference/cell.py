"""The cell of a learned optimiser in plain torch: oracle and fallback of `backend/cell.py`.

An LSTM of H numbers takes a step on each coordinate by itself (Ravi, Larochelle 2017, section 3):

    enter, stay, new, leave = W [1, x, h_(k-1)]       sigmoids, but tanh of new
    s_k = stay s_(k-1) + enter new,   h_k = leave tanh(s_k)
    f_k, i_k = sigmoid(V [theta_(k-1), f_(k-1), i_(k-1), 1, h_k])
    theta_k = f_k theta_(k-1) - i_k g_k

with x the logarithms and signs of the coordinate's gradient g and of its task's loss, both of which
are constants for the way back, and h, s, f, i zero before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Of tasks' coordinates [T, P]: the gradients [T, P] and the losses [T], without a graph.
GradientsAt: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]

_AT_ONCE = 8192  # coordinates: 80 gates of them are 2.6 MB


class Cell(NamedTuple):
    """The weights that all coordinates share.

    Attributes:
        weights: W [4 H, 5 + H].
        gates: V [2, 4 + H].
        p: numbers below exp(-p) are small.
    """

    weights: Tensor
    gates: Tensor
    p: float

    @property
    def hidden(self) -> int:
        """H."""
        return len(self.weights) // 4


class _Memory(NamedTuple):
    """What the cell keeps of N coordinates from one step to the next."""

    h: Tensor  # [H, N]: what is done to each number goes along memory
    s: Tensor  # [H, N]
    forget: Tensor  # [N]
    step: Tensor  # [N]


def log_and_sign(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Numbers as two of similar size each, whatever theirs (section 3.3).

    (log |x| / p, sign x) where |x| >= exp(-p), and (-1, exp(p) x) below.
    """
    size = x.abs()
    large = size >= math.exp(-p)
    first = torch.where(large, torch.where(large, size, 1.0).log() / p, -1.0)
    return first, torch.where(large, x.sign(), math.exp(p) * x)


def take_steps(cell: Cell, gradients_at: GradientsAt, theta: Tensor, steps: int) -> Tensor:
    """The coordinates [T, P] of tasks after so many steps, differentiable by cell and theta.

    Coordinates go so many at a time as a cache holds; of many only theta and what the cell keeps
    in mind is kept for the way back.
    """
    parts = range(0, max(theta.numel(), 1), _AT_ONCE)  # one part of none, as torch.split has it
    memories = [_empty(cell, theta, min(_AT_ONCE, theta.numel() - first)) for first in parts]
    for _ in range(steps):
        gradients, losses = gradients_at(theta)
        columns = (theta, gradients, losses.unsqueeze(1).expand_as(theta))
        pieces = zip(*(torch.split(v.reshape(-1), _AT_ONCE) for v in columns), strict=True)
        found = [
            _part(cell, values, slopes, seen, memory)
            for (values, slopes, seen), memory in zip(pieces, memories, strict=True)
        ]
        memories = [memory for _, memory in found]
        theta = torch.cat([values for values, _ in found]).view_as(theta)
    return theta


def _empty(cell: Cell, like: Tensor, n: int) -> _Memory:
    """What the cell has in mind before the first step."""
    wide, one = like.new_zeros(cell.hidden, n), like.new_zeros(n)
    return _Memory(wide, wide, one, one)


def _part(
    cell: Cell, theta: Tensor, gradients: Tensor, losses: Tensor, memory: _Memory
) -> tuple[Tensor, _Memory]:
    """A step of some coordinates; of many, what is between is computed anew on the way back."""
    if len(theta) < _AT_ONCE or not torch.is_grad_enabled():
        return _step(cell, theta, gradients, losses, memory)
    found: tuple[Tensor, _Memory] = checkpoint(
        _step, cell, theta, gradients, losses, memory, use_reentrant=False,
        preserve_rng_state=False,
    )  # fmt: skip
    return found


def _step(
    cell: Cell, theta: Tensor, gradients: Tensor, losses: Tensor, memory: _Memory
) -> tuple[Tensor, _Memory]:
    """One step, each [N]: the coordinates after it, and what the cell keeps in mind."""
    seen = torch.stack([*log_and_sign(gradients, cell.p), *log_and_sign(losses, cell.p)])
    w = cell.weights
    logits = torch.addmm(torch.addmm(w[:, :1], w[:, 1:5], seen), w[:, 5:], memory.h)
    enter, stay, new, leave = logits.chunk(4)
    s = stay.sigmoid() * memory.s + enter.sigmoid() * new.tanh()
    h = leave.sigmoid() * s.tanh()

    def gate(v: Tensor) -> Tensor:
        before = v[1] * memory.forget + v[2] * memory.step
        return (v[4:] @ h + v[0] * theta + before + v[3]).sigmoid()

    forget, step = gate(cell.gates[0]), gate(cell.gates[1])
    return forget * theta - step * gradients, _Memory(h, s, forget, step)
