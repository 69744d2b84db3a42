"""The four losses as plain descriptions, and what they mean.

A `Loss` holds numbers only (no tensors), so that it can be hashed, pickled and handed to the
native core. `describe_loss` makes one from a name or from the matching `torch.nn` module;
`task_loss` is the definition of its value for one set of rows:

    mse, huber, bce_with_logits    sum_r w_r mean_o l(r, o) / sum_r w_r
    cross_entropy                  sum_r w_r ce_r / sum_r w_r c[y_r]

with w the weights of the rows (1 when none are given), c the class weights, and ce_r the class
weighted, label smoothed value that torch gives row r. Without row weights these are exactly
torch's reduction="mean". A set without weight (no rows, or all of them of weight 0) has loss 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("mse", "huber", "cross_entropy", "bce_with_logits")


@dataclass(frozen=True)
class Loss:
    """A loss as plain data; `weight` is [C] class weights, or [out] for bce_with_logits."""

    kind: str
    delta: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    weight: tuple[float, ...] = ()
    pos_weight: tuple[float, ...] = ()

    @property
    def takes_classes(self) -> bool:
        """Whether targets are class indices rather than values."""
        return self.kind == "cross_entropy"


def _numbers(name: str, value: Tensor | None) -> tuple[float, ...]:
    if value is None:
        return ()
    if value.ndim > 1:
        raise ValueError(
            f"loss: {name} must have one entry for each output (shape [out]), "
            f"got shape {list(value.shape)}"
        )
    return tuple(float(v) for v in value.detach().reshape(-1).tolist())


def _describe_module(loss: nn.Module) -> Loss:
    if type(loss) is nn.MSELoss:
        return Loss("mse")
    if type(loss) is nn.HuberLoss:
        return Loss("huber", delta=float(loss.delta))
    if type(loss) is nn.CrossEntropyLoss:
        return Loss(
            "cross_entropy",
            label_smoothing=float(loss.label_smoothing),
            ignore_index=int(loss.ignore_index),
            weight=_numbers("weight", loss.weight),
        )
    if type(loss) is nn.BCEWithLogitsLoss:
        return Loss(
            "bce_with_logits",
            weight=_numbers("weight", loss.weight),
            pos_weight=_numbers("pos_weight", loss.pos_weight),
        )
    raise ValueError(
        f"loss: expected one of {', '.join(KINDS)} or the torch.nn module MSELoss, HuberLoss, "
        f"CrossEntropyLoss or BCEWithLogitsLoss, got {type(loss).__name__}"
    )


def describe_loss(loss: Any) -> Loss:
    """The description of a loss given by name or as a `torch.nn` loss module.

    Raises:
        TypeError: `loss` is neither a string nor a module.
        ValueError: an unknown name or module, or a reduction other than "mean".
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in KINDS:
            raise ValueError(f"loss: expected one of {', '.join(KINDS)}, got {loss!r}")
        return Loss(loss)
    if not isinstance(loss, nn.Module):
        raise TypeError(f"loss: expected a name or a torch.nn loss, got {type(loss).__name__}")
    described = _describe_module(loss)
    if loss.reduction != "mean":
        raise ValueError(
            f'loss: expected reduction="mean" (the definition of a task\'s loss), '
            f'got reduction="{loss.reduction}"'
        )
    return described


def check_width(loss: Loss, out_features: int) -> None:
    """Raise ValueError where the loss's weights do not fit a model of `out_features` outputs."""
    for name, values in (("weight", loss.weight), ("pos_weight", loss.pos_weight)):
        broadcasts = len(values) == 1 and not loss.takes_classes
        if values and not broadcasts and len(values) != out_features:
            raise ValueError(
                f"loss: {name} has {len(values)} entries, but the model has {out_features} outputs"
            )


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Values' sum over the sum of `weights`, and 0 where that is 0; all [rows] -> scalar."""
    total = weights.sum()
    empty = total == 0
    return torch.where(empty, 0.0, values.sum() / torch.where(empty, 1.0, total))


def _cross_entropy(loss: Loss, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of logits [rows, C] and class indices [rows]."""
    classes = outputs.shape[-1]
    class_weights = outputs.new_tensor(loss.weight) if loss.weight else outputs.new_ones(classes)
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
        return F.mse_loss(outputs, targets, reduction="none")
    if loss.kind == "huber":
        return F.huber_loss(outputs, targets, reduction="none", delta=loss.delta)
    return F.binary_cross_entropy_with_logits(
        outputs,
        targets,
        weight=outputs.new_tensor(loss.weight) if loss.weight else None,
        pos_weight=outputs.new_tensor(loss.pos_weight) if loss.pos_weight else None,
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
