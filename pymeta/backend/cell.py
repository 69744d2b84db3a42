"""The cell of a learned optimiser on the native core; `reference/cell.py` has its equations.

A step of all coordinates of all tasks is one call, and so is the way back through all steps, which
takes them again panel by panel: nothing is kept but the gradients and losses that they saw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pymeta import native

# Of tasks' coordinates [T, P]: the gradients [T, P] and the losses [T], without a graph.
GradientsAt: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


def runs(theta: Tensor) -> bool:
    """Whether the core's cell takes steps of these coordinates."""
    known = theta.dtype in (torch.float32, torch.float64)
    return native.missing() is None and theta.device.type == "cpu" and known


def take_steps(
    weights: Tensor, gates: Tensor, p: float, gradients_at: GradientsAt, theta: Tensor, steps: int
) -> Tensor:
    """The coordinates [T, P] of tasks after so many steps, >= 1.

    Differentiable, once, by theta and by the cell's weights [4 H, 5 + H] and gates [2, 4 + H].
    """
    if theta.numel() == 0 or steps == 0:
        return theta
    found: Tensor = _Steps.apply(weights, gates, p, gradients_at, theta, steps)  # type: ignore[no-untyped-call]
    return found


def _cell(weights: Tensor, gates: Tensor, p: float, theta: Tensor) -> Any:
    return native.extension().Cell(
        theta.element_size(), len(weights) // 4, len(theta), theta.numel(), p,
        weights.data_ptr(), gates.data_ptr(),
    )  # fmt: skip


class _Steps(torch.autograd.Function):
    """All steps; each asks for gradients where the one before has led."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        gates: Tensor,
        p: float,
        gradients_at: GradientsAt,
        theta: Tensor,
        steps: int,
    ) -> Tensor:
        weights, gates, theta = weights.contiguous(), gates.contiguous(), theta.contiguous()
        cell = _cell(weights, gates, p, theta)
        keeps = any(ctx.needs_input_grad)
        gradients = theta.new_empty(steps if keeps else 1, *theta.shape)
        losses = theta.new_empty(len(gradients), len(theta))
        state, now = theta.new_zeros(cell.state_size), theta.clone()
        for k in range(steps):
            of_step = gradients[k if keeps else 0], losses[k if keeps else 0]
            for to, found in zip(of_step, gradients_at(now), strict=True):
                to.copy_(found)
            seen = (v.data_ptr() for v in of_step)
            cell.step(*seen, now.data_ptr(), state.data_ptr(), now.data_ptr())
        if keeps:
            ctx.save_for_backward(weights, gates, theta, gradients, losses)
            ctx.p = p
        return now

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flows: Tensor) -> tuple[Tensor | None, ...]:
        weights, gates, theta, gradients, losses = ctx.saved_tensors
        flows = flows.contiguous()
        to = torch.empty_like(weights), torch.empty_like(gates), torch.empty_like(theta)
        _cell(weights, gates, ctx.p, theta).back(
            len(gradients), gradients.data_ptr(), losses.data_ptr(), theta.data_ptr(),
            flows.data_ptr(), to_weights=to[0].data_ptr(), to_gates=to[1].data_ptr(),
            to_theta=to[2].data_ptr(),
        )  # fmt: skip
        return to[0], to[1], None, None, to[2], None
