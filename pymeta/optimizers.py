"""Inner-loop optimisers and learnable step sizes, as plain descriptions.

`SGD(lr)` and `LearnableLR(...)` only say what is meant; `Rates` is the layout of the lr values
they stand for: a row for each step (the last row is reused by all later steps), and in a row one
value for the whole network, for each layer, or for each element of the adapted parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

_PER = ("network", "layer", "parameter")


def check_lr(name: str, value: Any) -> float:
    """`value` as a float; TypeError or ValueError unless it is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}: expected a number or a pymeta.LearnableLR, got {type(value).__name__}"
        )
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return float(value)


@dataclass(frozen=True)
class LearnableLR:
    """A step size that is meta-learned with the parameters.

    per="parameter" is Meta-SGD (Li et al. 2017, arXiv:1707.09835, equation 2); per="layer" with
    per_step=True is the LSLR of MAML++ (Antoniou et al. 2019, arXiv:1810.09502, section 4).

    Args:
        initial: the value all entries begin with.
        per: one value for the "network", one for each "layer" (module that owns adapted
            parameters), or one for each element of each adapted "parameter".
        per_step: whether every inner step has its own values; steps beyond those trained
            reuse the last one's.

    Raises:
        TypeError, ValueError: `initial` is no finite number >= 0, or `per` is unknown.
    """

    initial: float
    per: str = "network"
    per_step: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        check_lr("LearnableLR.initial", self.initial)
        if self.per not in _PER:
            raise ValueError(
                f"LearnableLR.per: expected one of {', '.join(_PER)}, got {self.per!r}"
            )
        if not isinstance(self.per_step, bool):
            raise TypeError(
                f"LearnableLR.per_step: expected a bool, got {type(self.per_step).__name__}"
            )


@dataclass(frozen=True)
class SGD:
    """Plain gradient descent in the inner loop: theta <- theta - lr * gradient."""

    lr: float | LearnableLR

    def __post_init__(self) -> None:
        """Check the step size."""
        if not isinstance(self.lr, LearnableLR):
            check_lr("SGD.lr", self.lr)


@dataclass(frozen=True)
class Rates:
    """Where each adapted parameter's lr stands in a row of lr values.

    Attributes:
        groups: adapted parameter's name -> column; None when every element has its own value.
        spans: adapted parameter's name -> (first column, end) when every element has its own.
        columns: the length of a row.
    """

    groups: Mapping[str, int] | None
    spans: Mapping[str, tuple[int, int]]
    columns: int

    def of(self, lr: torch.Tensor, step: int, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The lr of one parameter at one step: a scalar, or a tensor of the parameter's shape.

        Args:
            lr: [columns] or [steps, columns].
            step: counted from 0; the last row serves all steps beyond it.
            name: an adapted parameter's name.
            shape: its shape.
        """
        row = lr if lr.ndim == 1 else lr[min(step, lr.shape[0] - 1)]
        if self.groups is not None:
            return row[self.groups[name]]
        first, end = self.spans[name]
        return row[first:end].reshape(tuple(shape))


def rates(per: str, adapted: Mapping[str, int]) -> Rates:
    """The layout for the adapted parameters, given as {name: number of elements} in order."""
    if per == "network":
        return Rates(dict.fromkeys(adapted, 0), {}, 1)
    if per == "layer":
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name in adapted))
        groups = {name: owners.index(name.rpartition(".")[0]) for name in adapted}
        return Rates(groups, {}, len(owners))
    spans, end = {}, 0
    for name, size in adapted.items():
        spans[name] = (end, end + size)
        end += size
    return Rates(None, spans, end)
