"""The loss of a task: the definition of what `pymeta.spec.losses` describes, in torch operations.

    cross_entropy    sum_r w_r ce_r / sum_r w_r c[y_r]  of labels
                     sum_r w_r ce_r / sum_r w_r         of distributions over the classes
    all others       sum_r w_r mean_j l(r, j) / sum_r w_r
                     sum_rj w_rj l(r, j) / sum_rj w_rj  where each target has its weight

with w the weights of the rows (1 when none are given), c the class weights, ce_r the class
weighted, label smoothed value that torch gives row r, and l(r, j) the loss of target t = t[r, j]
and what the model has for it: an output y, K of them for K levels of quantile, or an output y and
a log scale s. A target of weight 0 contributes nothing, whatever it is.

    mse, huber, l1, bce_with_logits    as torch has them
    poisson_nll      e^y - t y: torch's of a log rate, without the term of t alone
    qlike            y + t e^-y: log h + t / h of a predicted variance h = e^y (Patton 2011)
    quantile         mean over levels q of q max(t - y_q, 0) + (1 - q) max(y_q - t, 0)
    gaussian_nll     s + z^2 / 2 + log(2 pi) / 2  with  z = (y - t) e^-s
    student_t_nll    s + (v + 1) / 2 log(1 + z^2 / v) + log B(1/2, v / 2) + log(v) / 2

Without row weights those that torch has are exactly its reduction="mean". A set without weight (no
rows, or all of them of weight 0) has loss 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pymeta.spec.losses import Loss, OwnLoss


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Values' sum over the sum of `weights`, and 0 where that is 0; all [rows] -> scalar."""
    total = weights.sum()
    empty = total == 0
    return torch.where(empty, 0.0, values.sum() / torch.where(empty, 1.0, total))


def _constants(values: tuple[float, ...], like: Tensor) -> Tensor:
    """A tensor of numbers. (Not `new_tensor`, which torch.func.grad of torch 2.4 cannot do.)"""
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _cross_entropy(loss: Loss, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of logits [rows, C] and class indices [rows], or distributions [rows, C]."""
    classes = outputs.shape[-1]
    class_weights = _constants(loss.weight, outputs) if loss.weight else outputs.new_ones(classes)
    log_p = F.log_softmax(outputs, dim=-1)
    if targets.is_floating_point():
        e = loss.label_smoothing
        q = class_weights * ((1 - e) * targets + e / classes)
        value = -torch.where(q == 0, 0.0, q * log_p).sum(-1)
        return _weighted_mean(weights * value, weights)
    kept = targets != loss.ignore_index
    labels = torch.where(kept, targets, 0).unsqueeze(-1)
    row_class_weight = class_weights.expand(outputs.shape).gather(-1, labels).squeeze(-1)
    value = -row_class_weight * log_p.gather(-1, labels).squeeze(-1)
    if loss.label_smoothing:
        uniform = -(log_p * class_weights).sum(-1) / classes
        value = (1 - loss.label_smoothing) * value + loss.label_smoothing * uniform
    weights = weights * kept
    return _weighted_mean(weights * torch.where(kept, value, 0.0), weights * row_class_weight)


def _quantile(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The quantile loss of targets [rows, columns], of which outputs [rows, K * columns] are."""
    each = outputs.chunk(len(loss.levels), dim=1) if len(loss.levels) > 1 else (outputs,)
    # relu, whose slope at 0 is 0
    parts = [
        level * (targets - y).relu() + (1 - level) * (y - targets).relu()
        for level, y in zip(loss.levels, each, strict=True)
    ]
    return torch.stack(parts).mean(0)


def _location_scale(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The negative log likelihood of targets [rows, columns]."""
    location, log_scale = outputs.chunk(2, dim=1)
    z = (location - targets) * (-log_scale).exp()
    if loss.kind == "gaussian_nll":
        return log_scale + z.square() / 2 + math.log(2 * math.pi) / 2
    v = loss.dof
    constant = math.lgamma(v / 2) - math.lgamma((v + 1) / 2) + math.log(v * math.pi) / 2
    return log_scale + (v + 1) / 2 * (z.square() / v).log1p() + constant


def _of_targets(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each target, in the shape of `targets` [rows, ...]."""
    if loss.kind == "quantile":
        return _quantile(loss, outputs, targets)
    if loss.kind in ("gaussian_nll", "student_t_nll"):
        return _location_scale(loss, outputs, targets)
    if loss.kind == "l1":
        return (outputs - targets).abs()
    if loss.kind == "poisson_nll":
        return outputs.exp() - targets * outputs
    if loss.kind == "qlike":
        return outputs + targets * (-outputs).exp()
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


def _fitting(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Targets with the axis of columns; ValueError where outputs are not for such targets."""
    each = loss.outputs_per_target
    if targets.ndim == 1 and outputs.ndim == 2 and outputs.shape[1] == each:
        targets = targets.unsqueeze(-1)
    fits = outputs.shape == targets.shape
    if each > 1:
        fits = outputs.ndim == targets.ndim == 2 and outputs.shape[1] == each * targets.shape[1]
    if not fits:
        of_each = f" (it has {each} outputs for each target)" if each > 1 else ""
        raise ValueError(
            f"model: outputs of shape {list(outputs.shape)} do not fit "
            f"targets of shape {list(targets.shape)} of {loss.kind}{of_each}"
        )
    return targets


def _weighted_by_target(loss: Loss, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The mean over single targets [rows, columns], by weights of the same shape."""
    with torch.no_grad():  # a target of weight 0 whose loss is no number is no target at all
        masked = (weights == 0) & ~_of_targets(loss, outputs, targets).isfinite()
    targets = torch.where(masked, 0.0, targets)
    outputs = torch.where(masked.repeat(1, loss.outputs_per_target), 0.0, outputs)
    weights = torch.where(masked, 0.0, weights)
    return _weighted_mean(weights * _of_targets(loss, outputs, targets), weights)


def shifted(outputs: Tensor, offset: Tensor | None) -> Tensor:
    """Outputs with an offset of as many numbers added to them; ValueError where they are not."""
    if offset is None:
        return outputs
    if offset.numel() != outputs.numel():
        raise ValueError(
            f"model: outputs of shape {list(outputs.shape)} do not fit an offset of shape "
            f"{list(offset.shape)}"
        )
    return outputs + offset.view(outputs.shape)


def _own(
    loss: OwnLoss,
    outputs: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    counting: int | None,
) -> Tensor:
    """A function's loss of a set; one number for all of it has no place for row weights.

    Nor for rows beside those that count: those have no loss of their own.
    """
    assert loss.function is not None
    value = loss.function(outputs[:counting], targets[:counting])
    rows = outputs[:counting].shape[0]
    if not isinstance(value, Tensor) or value.shape not in ((), (rows,)):
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss: expected {loss.name} to give one number [] or one for each row [{rows}], "
            f"got {got}"
        )
    if value.ndim:
        if counting is not None:
            value = torch.cat([value, loss.function(outputs, targets)[counting:]])
        return _weighted_mean(
            value if weights is None else weights * value,
            torch.ones_like(value) if weights is None else weights,
        )
    if weights is not None and not bool((weights[:counting] == 1).all()):
        raise ValueError(
            f"loss: {loss.name} gives one number for a set, which row weights other than 0 and 1 "
            f"cannot weigh; let it give one for each row"
        )
    return value if rows else torch.zeros_like(value)


def task_loss(
    loss: Loss,
    outputs: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    counting: int | None = None,
) -> Tensor:
    """The loss of one set of rows: the definition, in differentiable torch operations.

    Args:
        loss: the loss.
        outputs: [rows, out] (or [rows], or [rows, ...] where every row's mean is meant, for a
            loss of one output for each target).
        targets: [rows] class indices for cross_entropy, or [rows, classes] distributions;
            otherwise outputs' shape, or [rows, columns] where a target has more outputs than one;
            or [rows] for one column.
        weights: [rows], [rows, columns] of single targets, or None for all ones.
        counting: how many of the first rows count, where others stand behind them whose weights
            are 0 and have a gradient; None: all of them.

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
    if isinstance(loss, OwnLoss):
        return _own(loss, outputs, targets, weights, counting)
    if weights is None:
        weights = torch.ones(rows, dtype=outputs.dtype, device=outputs.device)
    if loss.takes_classes:
        if outputs.ndim != 2:
            raise ValueError(
                f"model: cross_entropy expects outputs of shape [rows, classes], "
                f"got {list(outputs.shape)}"
            )
        return _cross_entropy(loss, outputs, targets, weights)
    targets = _fitting(loss, outputs, targets)
    if weights.ndim > 1 and weights.shape[1] == 1:  # one column of weights is one of rows
        weights = weights[:, 0]
    if weights.ndim > 1:
        return _weighted_by_target(loss, outputs, targets, weights)
    values = _of_targets(loss, outputs, targets)
    row_values = values.flatten(1).mean(-1) if values.ndim > 1 else values
    return _weighted_mean(weights * row_values, weights)
