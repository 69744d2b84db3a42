"""The losses as plain descriptions, without torch.

A `Loss` holds numbers only (no tensors), so that it can be hashed, pickled, written to a file and
handed to the native core. `describe_loss` makes one from a name, from the matching `torch.nn`
module, or from one of the descriptions below, which stand for losses that torch has no module of.
What each of them means is defined in `pymeta/reference/loss.py`.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pymeta import native
from pymeta.spec.show import counted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pymeta.spec.fields import Fields


class _Kind(NamedTuple):
    """What is true of all losses of a kind.

    Attributes:
        targets: what they are: any "values", "probabilities" in 0..1, "amounts" of at least 0,
            or class "labels"; "anything" that a function of the caller's takes.
        outputs: of the model for each target; 0: one for each level of the loss.
        of_which: what those are, for messages.
    """

    targets: str = "values"
    outputs: int = 1
    of_which: str = ""


_LOCATION_SCALE = _Kind(outputs=2, of_which="a location and a log scale")
_KINDS = {
    "mse": _Kind(),
    "huber": _Kind(),
    "l1": _Kind(),
    "quantile": _Kind(outputs=0, of_which="one for each level"),
    "poisson_nll": _Kind("amounts"),
    "qlike": _Kind("amounts"),
    "gaussian_nll": _LOCATION_SCALE,
    "student_t_nll": _LOCATION_SCALE,
    "cross_entropy": _Kind("labels"),
    "bce_with_logits": _Kind("probabilities"),
}
KINDS = tuple(_KINDS)
_OWN = "a function"
_KINDS[_OWN] = _Kind("anything")
_OLD_FIELDS = ("kind", "delta", "label_smoothing", "ignore_index", "weight", "pos_weight")
_MEDIAN = (0.5,)
_DOF = 4.0


@dataclass(frozen=True)
class Loss:
    """A loss as plain data; `weight` is [C] class weights, or [out] for bce_with_logits."""

    kind: str
    delta: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    weight: tuple[float, ...] = ()
    pos_weight: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()  # of quantile
    dof: float = _DOF  # of student_t_nll

    @property
    def takes_classes(self) -> bool:
        """Whether targets are class indices rather than values."""
        return self.targets == "labels"

    @property
    def targets(self) -> str:
        """What targets are, as `_Kind` has it."""
        return _KINDS[self.kind].targets

    @property
    def name(self) -> str:
        """How it is called in messages."""
        return self.kind

    @property
    def outputs_per_target(self) -> int:
        """How many outputs a model has for each target."""
        return _KINDS[self.kind].outputs or len(self.levels)

    def target_columns(self, out_features: int) -> int:
        """How many columns targets have for a model of so many outputs; of values, not labels."""
        return out_features // self.outputs_per_target


@dataclass(frozen=True)
class OwnLoss(Loss):
    """A function of the caller's, which torch alone can run.

    `function(outputs, targets)` of one set gives the losses of its rows [rows], or one number [].
    """

    kind: str = _OWN
    function: Callable[[Tensor, Any], Tensor] | None = None

    @property
    def name(self) -> str:
        """That of the function, or of its class."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))


@dataclass(frozen=True)
class QuantileLoss:
    """The quantile (pinball) loss, for `loss=`; without arguments it is named "quantile".

    A target t and the prediction y of its quantile q cost q (t - y) where t is above y and
    (1 - q) (y - t) where it is below (Koenker and Bassett 1978). A loss of several levels is the
    mean of theirs, and the model has an output for each level and target, level after level:
    the quantiles of T targets at K levels are outputs [K * T].

    Args:
        level: a number in (0, 1), or several.

    Raises:
        TypeError: `level` is neither a number nor several.
        ValueError: a level is not in (0, 1).

    Example:
        >>> from pymeta import QuantileLoss
        >>> QuantileLoss([0.05, 0.5, 0.95])
        QuantileLoss(level=(0.05, 0.5, 0.95))
    """

    level: float | Sequence[float] = 0.5

    def __post_init__(self) -> None:
        """Keep plain numbers."""
        given: Any = self.level
        if hasattr(given, "tolist"):  # an array or a tensor
            given = given.tolist()
        one = not isinstance(given, (list, tuple))
        levels = tuple(_level(v) for v in ([given] if one else given))
        if not levels:
            raise ValueError("QuantileLoss.level: expected a number in (0, 1) or some, got none")
        object.__setattr__(self, "level", levels[0] if one else levels)

    def described(self) -> Loss:
        """As a `Loss`."""
        levels: Any = self.level if isinstance(self.level, tuple) else (self.level,)
        return Loss("quantile", levels=levels)


@dataclass(frozen=True)
class StudentTNLLLoss:
    """The negative log likelihood of Student's t distribution, for `loss=`.

    The model predicts a location and the logarithm of a scale for each target: all locations,
    then all log scales. With z = (t - location) / scale and v degrees of freedom a target costs
    log scale + (v + 1) / 2 log(1 + z^2 / v) + log Gamma(v / 2) - log Gamma((v + 1) / 2)
    + log(pi v) / 2. Without arguments it is named "student_t_nll".

    Args:
        dof: the degrees of freedom, above 0; outliers weigh the less the fewer they are.

    Raises:
        TypeError: `dof` is no number.
        ValueError: `dof` is not finite and above 0.
    """

    dof: float = _DOF

    def __post_init__(self) -> None:
        """Keep a plain number."""
        from pymeta.spec.optimizers import check_number

        object.__setattr__(self, "dof", check_number("StudentTNLLLoss.dof", self.dof, above=True))

    def described(self) -> Loss:
        """As a `Loss`."""
        return Loss("student_t_nll", dof=self.dof)


def _level(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"QuantileLoss.level: expected a number in (0, 1) or some, got {type(value).__name__}"
        )
    level = float(value)
    if not 0 < level < 1:
        raise ValueError(f"QuantileLoss.level: expected numbers in (0, 1), got {value}")
    return level


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
    if type(loss) is nn.L1Loss:
        return Loss("l1")
    if type(loss) is nn.PoissonNLLLoss:
        if not loss.log_input or loss.full:
            raise ValueError(
                f"loss: expected PoissonNLLLoss(log_input=True, full=False), got "
                f"log_input={loss.log_input}, full={loss.full}"
            )
        return Loss("poisson_nll")
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
    if type(loss) is nn.GaussianNLLLoss:
        raise ValueError(
            'loss: GaussianNLLLoss takes variances as a third argument; "gaussian_nll" is that '
            "likelihood for a model with two outputs for each target, a mean and a log scale"
        )
    return OwnLoss(function=loss)


_NAMES = (
    "a pymeta.QuantileLoss or StudentTNLLLoss, a torch.nn loss, or a function of outputs and "
    "targets"
)


def describe_loss(loss: Any) -> Loss:
    """The description of a loss given by name, as a `torch.nn` module or one of the classes above.

    What else can be called with outputs and targets is an `OwnLoss`.

    Raises:
        TypeError: `loss` is none of these.
        ValueError: an unknown name or module, or a reduction other than "mean".
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, (QuantileLoss, StudentTNLLLoss)):
        return loss.described()
    if isinstance(loss, str):
        if loss not in KINDS:
            raise ValueError(f"loss: expected one of {', '.join(KINDS)}, got {loss!r}")
        return Loss(loss, levels=_MEDIAN if loss == "quantile" else ())
    if isinstance(loss, type):
        raise TypeError(f"loss: expected an instance, {loss.__name__}(...), got the class")
    if not callable(loss):
        raise TypeError(
            f"loss: expected one of {', '.join(KINDS)}, {_NAMES}, got {type(loss).__name__}"
        )
    described = _describe_module(loss) if _is_module(loss) else OwnLoss(function=loss)
    if not isinstance(described, OwnLoss) and loss.reduction != "mean":
        raise ValueError(
            f'loss: expected reduction="mean" (the definition of a task\'s loss), '
            f'got reduction="{loss.reduction}"'
        )
    return described


def check_width(loss: Loss, out_features: int) -> None:
    """Raise ValueError where the loss does not fit a model of `out_features` outputs."""
    each = loss.outputs_per_target
    if out_features % each:
        raise ValueError(
            f"loss: {loss.kind} asks for {counted(each, 'output')} for each target "
            f"({_KINDS[loss.kind].of_which}), but the model has {counted(out_features, 'output')}"
        )
    for name, values in (("weight", loss.weight), ("pos_weight", loss.pos_weight)):
        broadcasts = len(values) == 1 and not loss.takes_classes
        if values and not broadcasts and len(values) != out_features:
            raise ValueError(
                f"loss: {name} has {counted(len(values), 'entry')}, but the model has "
                f"{counted(out_features, 'output')}"
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
        levels=description.levels,
        dof=description.dof,
    )


def loss_fields(loss: Loss) -> dict[str, Any]:
    """What `read_loss` reads: what a loss of its kind has, and all that version 0.1 wrote.

    Raises:
        ValueError: it is a function, which no file can hold.
    """
    if isinstance(loss, OwnLoss):
        raise ValueError(f"loss: no file can hold a function, {loss.name}")
    has = {"quantile": "levels", "student_t_nll": "dof"}.get(loss.kind)
    return {n: v for n, v in asdict(loss).items() if n in _OLD_FIELDS or n == has}


def read_loss(fields: Fields) -> Loss:
    """The loss that `loss_fields` made JSON of; ValueError where it is none.

    Its widths are for `check_width` to judge.
    """
    kind = fields.text("kind")
    if kind not in KINDS:
        raise ValueError(f"{fields.what}: expected one of {', '.join(KINDS)}, got {kind[:60]!r}")
    loss = Loss(
        kind=kind,
        delta=fields.number("delta"),
        label_smoothing=fields.number("label_smoothing"),
        ignore_index=fields.integer("ignore_index", -(2**63)),
        weight=fields.numbers("weight"),
        pos_weight=fields.numbers("pos_weight"),
        levels=fields.numbers("levels") if kind == "quantile" else (),
        dof=fields.number("dof") if kind == "student_t_nll" else _DOF,
    )
    fields.end()
    if kind == "quantile" and not (loss.levels and all(0 < q < 1 for q in loss.levels)):
        raise ValueError(f"{fields.what}: levels {list(loss.levels)} are not some in (0, 1)")
    if not loss.dof > 0:
        raise ValueError(f"{fields.what}: dof {loss.dof} is not > 0")
    weighs = ("cross_entropy", "bce_with_logits")
    if (loss.weight and loss.kind not in weighs) or (loss.pos_weight and loss.kind != weighs[1]):
        raise ValueError(f"{fields.what}: {loss.kind} has no such weights")
    if not loss.delta > 0 or not 0 <= loss.label_smoothing <= 1:
        raise ValueError(
            f"{fields.what}: delta {loss.delta} is not > 0, "
            f"or label_smoothing {loss.label_smoothing} not in 0..1"
        )
    return loss
