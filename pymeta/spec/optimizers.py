"""Inner-loop optimisers and learnable step sizes, as plain descriptions.

`SGD(...)`, `Adam(...)`, `RMSprop(...)` and `LearnableLR(...)` only say what is meant;
`pymeta/reference` defines what the optimisers do. `Rates` is the layout of the lr values they stand
for: a row for each step (the last row is reused by all later steps), and in a row one value for the
whole network, for each layer, or for each element of the adapted parameters.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any, TypeAlias

from pymeta import native

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pymeta.spec.anchors import Anchor
    from pymeta.spec.fields import Fields

_PER = ("network", "layer", "parameter")


def check_number(name: str, value: Any, above: bool = False, or_a: str = "") -> float:
    """`value` as a float; TypeError or ValueError unless it is a finite number as wanted.

    That is >= 0, or > 0 where `above`; `or_a` names what else the message may offer.
    """
    wanted = f"a finite number {'>' if above else '>='} 0"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {wanted}{or_a}, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or (above and value == 0):
        raise ValueError(f"{name}: expected {wanted}, got {value}")
    return float(value)


def check_lr(name: str, value: Any) -> float:
    """`value`, a step size, as a float; TypeError or ValueError unless it is finite and >= 0."""
    return check_number(name, value, or_a=" or a pymeta.LearnableLR")


def _keep_floats(description: Any, *names: str) -> None:
    """Turn checked numbers of a frozen description into plain floats, whatever they came as."""
    for name in names:
        value = getattr(description, name)
        if isinstance(value, numbers.Real):
            object.__setattr__(description, name, float(value))


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
        _keep_floats(self, "initial")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def _check_decay(name: str, value: Any, expected: str = "a number") -> None:
    check_number(name, value)
    if value >= 1:
        raise ValueError(f"{name}: expected {expected} >= 0 and < 1, got {value}")


def _check_betas(name: str, betas: Any) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{name}: expected two numbers (beta1, beta2), got {betas!r}")
    for beta in betas:
        _check_decay(name, beta, "numbers")


def _check_common(kind: str, lr: Any, weight_decay: Any, clip_norm: Any) -> None:
    if not isinstance(lr, LearnableLR):
        check_lr(f"{kind}.lr", lr)
    check_number(f"{kind}.weight_decay", weight_decay)
    if clip_norm is not None:
        check_number(f"{kind}.clip_norm", clip_norm, above=True)


@dataclass(frozen=True)
class SGD:
    """Gradient descent, as `torch.optim.SGD` does it.

    Args:
        lr: step size, a number or a `LearnableLR`.
        momentum: m <- momentum * m + gradient, and the step is along m.
        nesterov: the step is along gradient + momentum * m instead.
        weight_decay: L2 penalty; weight_decay * theta is added to the gradient.
        clip_norm: gradients of a larger norm (over all that is adapted, per task) are scaled to
            this one, as by `torch.nn.utils.clip_grad_norm_`; before the weight decay.

    Raises:
        TypeError, ValueError: a value is out of its range, or nesterov without momentum.
    """

    lr: float | LearnableLR
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_common("SGD", self.lr, self.weight_decay, self.clip_norm)
        check_number("SGD.momentum", self.momentum)
        _check_flag("SGD.nesterov", self.nesterov)
        if self.nesterov and self.momentum == 0:
            raise ValueError("SGD.nesterov: expected momentum > 0 with it, got momentum 0")
        _keep_floats(self, "lr", "momentum", "weight_decay", "clip_norm")


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma, Ba 2015, arXiv:1412.6980, algorithm 1), as `torch.optim.Adam` does it.

    Args:
        lr: step size, a number or a `LearnableLR`.
        betas: decay of the running means of gradients and of their squares.
        eps: added to the denominator.
        weight_decay: L2 penalty; weight_decay * theta is added to the gradient.
        decoupled: take the weight decay as a part of the step instead, as `torch.optim.AdamW`
            (Loshchilov, Hutter 2019, arXiv:1711.05101).
        clip_norm: as for `SGD`.

    Raises:
        TypeError, ValueError: a value is out of its range.
    """

    lr: float | LearnableLR
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_common("Adam", self.lr, self.weight_decay, self.clip_norm)
        _check_betas("Adam.betas", self.betas)
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))  # of a list, too
        check_number("Adam.eps", self.eps)
        _check_flag("Adam.decoupled", self.decoupled)
        _keep_floats(self, "lr", "eps", "weight_decay", "clip_norm")


@dataclass(frozen=True)
class RMSprop:
    """RMSprop (Hinton 2012; centered by Graves 2013, arXiv:1308.0850), as `torch.optim.RMSprop`.

    Args:
        lr: step size, a number or a `LearnableLR`.
        alpha: decay of the running mean of the gradients' squares.
        eps: added to the denominator, which is the root of that mean.
        weight_decay: L2 penalty; weight_decay * theta is added to the gradient.
        momentum: m <- momentum * m + gradient / denominator, and the step is along m.
        centered: the denominator is the root of a running variance of the gradient instead. Where
            a gradient hardly changes, that may round to below 0, which makes NaN, as in torch.
        clip_norm: as for `SGD`.

    Raises:
        TypeError, ValueError: a value is out of its range.
    """

    lr: float | LearnableLR
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_common("RMSprop", self.lr, self.weight_decay, self.clip_norm)
        _check_decay("RMSprop.alpha", self.alpha)
        check_number("RMSprop.eps", self.eps)
        check_number("RMSprop.momentum", self.momentum)
        _check_flag("RMSprop.centered", self.centered)
        _keep_floats(self, "lr", "alpha", "eps", "weight_decay", "momentum", "clip_norm")


Optimizer: TypeAlias = SGD | Adam | RMSprop

# by the names of the native core and of files
OPTIMIZERS: Mapping[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "rmsprop": RMSprop}


def _kind_of(optimizer: Optimizer) -> str:
    return next(kind for kind, rule in OPTIMIZERS.items() if type(optimizer) is rule)


def native_optimizer(description: Optimizer, anchor: Anchor | None = None) -> Any:
    """The native twin of an inner optimiser (its lr goes along with each call)."""
    settings = asdict(description)
    del settings["lr"]
    if "betas" in settings:
        settings["beta1"], settings["beta2"] = settings.pop("betas")
    settings["clip_norm"] = description.clip_norm or 0.0
    if anchor is not None:
        settings |= {"anchor": anchor.strength, "anchor_rows": anchor.rows}
    return native.extension().Optimizer(_kind_of(description), **settings)


def described_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """As JSON."""
    return {"kind": _kind_of(optimizer), **asdict(optimizer)}


def read_optimizer(fields: Fields) -> Optimizer:
    """The optimiser that `described_optimizer` made JSON of; ValueError where it is none."""
    kind = fields.text("kind")
    if kind not in OPTIMIZERS:
        raise ValueError(f"{fields.what}: unknown kind {kind[:60]!r}")
    readers = {
        "lr": lambda name: _read_lr(fields),
        "clip_norm": lambda name: None if fields.is_null(name) else fields.number(name),
        "betas": fields.numbers,
        "nesterov": fields.boolean,
        "decoupled": fields.boolean,
        "centered": fields.boolean,
    }
    names = [field.name for field in dataclass_fields(OPTIMIZERS[kind])]
    options: dict[str, Any] = {name: readers.get(name, fields.number)(name) for name in names}
    fields.end()
    return OPTIMIZERS[kind](**options)


def _read_lr(fields: Fields) -> float | LearnableLR:
    if not fields.is_a("lr", dict):
        return fields.number("lr")
    lr = fields.object("lr")
    found = LearnableLR(lr.number("initial"), lr.text("per"), lr.boolean("per_step"))
    lr.end()
    return found


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
