"""The loss of a task: the definition of what `pymeta.spec.losses` describes, in torch operations.

    mse, huber, bce_with_logits    sum_r w_r mean_o l(r, o) / sum_r w_r
    cross_entropy                  sum_r w_r ce_r / sum_r w_r c[y_r]

with w the weights of the rows (1 when none are given), c the class weights, and ce_r the class
weighted, label smoothed value that torch gives row r. Without row weights these are exactly
torch's reduction="mean". A set without weight (no rows, or all of them of weight 0) has loss 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pymeta.spec.losses import Loss


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Values' sum over the sum of `weights`, and 0 where that is 0; all [rows] -> scalar."""
    total = weights.sum()
    empty = total == 0
    return torch.where(empty, 0.0, values.sum() / torch.where(empty, 1.0, total))


def _constants(values: tuple[float, ...], like: Tensor) -> Tensor:
    """A tensor of numbers. (Not `new_tensor`, which torch.func.grad of torch 2.4 cannot do.)"""
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _cross_entropy(loss: Loss, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of logits [rows, C] and class indices [rows]."""
    classes = outputs.shape[-1]
    class_weights = _constants(loss.weight, outputs) if loss.weight else outputs.new_ones(classes)
    log_p = F.log_softmax(outputs, dim=-1)
    kept = targets != loss.ignore_index
    labels = torch.where(kept, targets, 0).unsqueeze(-1)
    row_class_weight = class_weights.expand(outputs.shape).gather(-1, labels).squeeze(-1)
    value = -row_class_weight * log_p.gather(-1, labels).squeeze(-1)
    if loss.label_smoothing:
        uniform = -(log_p * class_weights).sum(-1) / classes
        value = (1 - loss.label_smoothing) * value + loss.label_smoothing * uniform
    weights = weights * kept
    return _weighted_mean(weights * torch.where(kept, value, 0.0), weights * row_class_weight)


def _elementwise(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each element, in the shape of `outputs` [rows, ...]."""
    if loss.kind == "mse":
        return (outputs - targets).square()  # mse_loss has no bfloat16 up to torch 2.5
    if loss.kind == "huber":
        return F.huber_loss(outputs, targets, reduction="none", delta=loss.delta)
    return F.binary_cross_entropy_with_logits(
        outputs,
        targets,
        weight=_constants(loss.weight, outputs) if loss.weight else None,
        pos_weight=_constants(loss.pos_weight, outputs) if loss.pos_weight else None,
        reduction="none",
    )


def task_loss(loss: Loss, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """The loss of one set of rows: the definition, in differentiable torch operations.

    Args:
        loss: the loss.
        outputs: [rows, out] (or [rows], or [rows, ...] where every row's mean is meant).
        targets: [rows] class indices for cross_entropy; otherwise outputs' shape, or [rows]
            where out is 1.
        weights: [rows], or None for all ones.

    Returns:
        A scalar.

    Raises:
        ValueError: outputs and targets do not fit each other.
    """
    rows = targets.shape[0]
    if outputs.ndim == 0 or outputs.shape[0] != rows:
        raise ValueError(
            f"model: expected one output row for each of {rows} input rows, "
            f"got an output of shape {list(outputs.shape)}"
        )
    if weights is None:
        weights = torch.ones(rows, dtype=outputs.dtype, device=outputs.device)
    if loss.takes_classes:
        if outputs.ndim != 2:
            raise ValueError(
                f"model: cross_entropy expects outputs of shape [rows, classes], "
                f"got {list(outputs.shape)}"
            )
        return _cross_entropy(loss, outputs, targets, weights)
    if targets.ndim == 1 and outputs.ndim == 2 and outputs.shape[1] == 1:
        targets = targets.unsqueeze(-1)
    if targets.shape != outputs.shape:
        raise ValueError(
            f"model: outputs of shape {list(outputs.shape)} do not fit "
            f"targets of shape {list(targets.shape)}"
        )
    values = _elementwise(loss, outputs, targets)
    row_values = values.flatten(1).mean(-1) if values.ndim > 1 else values
    return _weighted_mean(weights * row_values, weights)
