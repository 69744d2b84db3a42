"""The four losses as plain descriptions, without torch.

A `Loss` holds numbers only (no tensors), so that it can be hashed, pickled, written to a file and
handed to the native core. `describe_loss` makes one from a name or from the matching `torch.nn`
module. What each of them means is defined in `pymeta/reference/loss.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymeta import native

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pymeta.spec.fields import Fields

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


def _is_module(value: Any) -> bool:
    """Whether this is a torch.nn.Module; where torch was never imported, nothing is one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _describe_module(loss: nn.Module) -> Loss:
    from torch import nn

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
    if not _is_module(loss):
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


def native_loss(description: Loss) -> Any:
    """The native twin of a loss."""
    return native.extension().Loss(
        description.kind,
        delta=description.delta,
        label_smoothing=description.label_smoothing,
        ignore_index=description.ignore_index,
        weight=description.weight,
        pos_weight=description.pos_weight,
    )


def read_loss(fields: Fields) -> Loss:
    """The loss that `dataclasses.asdict` made JSON of; ValueError where it is none.

    Its widths are for `check_width` to judge.
    """
    loss = Loss(
        kind=fields.text("kind"),
        delta=fields.number("delta"),
        label_smoothing=fields.number("label_smoothing"),
        ignore_index=fields.integer("ignore_index", -(2**63)),
        weight=fields.numbers("weight"),
        pos_weight=fields.numbers("pos_weight"),
    )
    fields.end()
    if loss.kind not in KINDS:
        raise ValueError(
            f"{fields.what}: expected one of {', '.join(KINDS)}, got {loss.kind[:60]!r}"
        )
    weighs = ("cross_entropy", "bce_with_logits")
    if (loss.weight and loss.kind not in weighs) or (loss.pos_weight and loss.kind != weighs[1]):
        raise ValueError(f"{fields.what}: {loss.kind} has no such weights")
    if not loss.delta > 0 or not 0 <= loss.label_smoothing <= 1:
        raise ValueError(
            f"{fields.what}: delta {loss.delta} is not > 0, "
            f"or label_smoothing {loss.label_smoothing} not in 0..1"
        )
    return loss
