"""The networks of an estimator: their form as plain data, in torch, and as adapted arrays."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from pymeta.models.arrays import AdaptedArrays
from pymeta.sklearn.parameters import ACTIVATIONS, Parameters
from pymeta.spec.anchors import LearnableAnchor
from pymeta.spec.architecture import Architecture
from pymeta.spec.losses import describe_loss
from pymeta.tasks.groups import Array

if TYPE_CHECKING:
    import torch

    from pymeta.sklearn.episodes import Lists


class Form(NamedTuple):
    """What the networks of a fitted estimator are, whatever its parameters are set to later."""

    widths: tuple[int, ...]  # of the input, the hidden layers and the output
    activation: str
    dtype: str
    loss: Any  # a name, or a description of pymeta.spec.losses
    head_only: bool
    is_remainder: bool = False  # of a pooled model, so that the last layer begins with zeros
    lr: float = 0.05  # the inner step size that training begins with

    def initial(self, rng: Any) -> dict[str, Array]:
        """What `torch.nn.Linear` starts with, drawn by `rng`: uniform within 1 / sqrt(inputs)."""
        start = {}
        for i, (n_in, n_out) in enumerate(itertools.pairwise(self.widths)):
            bound = 1 / math.sqrt(n_in)
            start[f"{2 * i}.weight"] = rng.uniform(-bound, bound, (n_out, n_in)).astype(self.dtype)
            start[f"{2 * i}.bias"] = rng.uniform(-bound, bound, n_out).astype(self.dtype)
        if self.is_remainder:
            for p in (start[f"{2 * i}.weight"], start[f"{2 * i}.bias"]):
                p[:] = 0
        return start

    def network(self, parameters: dict[str, Array]) -> torch.nn.Sequential:
        """The torch network with these parameters, in memory of its own."""
        import torch
        from torch import nn

        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(self.widths):
            dtype = getattr(torch, self.dtype)
            linear: nn.Module = nn.utils.skip_init(  # type: ignore[no-untyped-call]
                nn.Linear, n_in, n_out, dtype=dtype
            )
            layers += [linear, getattr(nn, ACTIVATIONS[self.activation])()]
        network = nn.Sequential(*layers[:-1])
        network.load_state_dict({n: torch.from_numpy(p) for n, p in parameters.items()})
        return network

    def encoder(self, network: torch.nn.Sequential) -> torch.nn.Sequential:
        """The same modules below the network's last layer; where hidden is (), none."""
        from torch import nn

        return nn.Sequential(*list(network)[:-1])

    def architecture(self) -> Architecture:
        """The network as plain data."""
        layers: list[tuple[Any, ...]] = []
        for n_in, n_out in itertools.pairwise(self.widths):
            layers += [("linear", n_in, n_out, True), (self.activation,)]
        names = [f"{2 * i}.{p}" for i in range(len(self.widths) - 1) for p in ("weight", "bias")]
        return Architecture(tuple(layers[:-1]), tuple(names), tuple(names), False)

    def adapts(self, name: str) -> bool:
        """Whether groups have this parameter of their own."""
        return not self.head_only or name.startswith(f"{2 * (len(self.widths) - 2)}.")

    def models(self, own: dict[str, Array], shared: dict[str, Array]) -> AdaptedArrays:
        """The models with parameters of their `own` [T, ...]; all others are `shared`."""
        tasks = len(next(iter(own.values())))
        return AdaptedArrays(self.architecture(), describe_loss(self.loss), own, shared, tasks)


MOMENTUM = 0.9
_ADAPTIVE_LR = 0.01  # of Adam and RMSprop, whose steps do not know of curvature


def start_lr(settings: Parameters, form: Form, network: torch.nn.Module, support: Lists) -> float:
    """The inner step size to begin with: as it is set, or from the curvature of support sets."""
    if not isinstance(settings.inner_lr, str):
        return float(settings.inner_lr)
    if settings.inner_optimizer in ("adam", "rmsprop"):
        return _ADAPTIVE_LR
    import pymeta

    rates = pymeta.step_size(
        network, support.xs, support.ys, loss=form.loss, weights=support.weights,
        offset=support.offsets, adapt=[n for n, _ in network.named_parameters() if form.adapts(n)],
    )  # fmt: skip
    rates = rates[rates.isfinite()]
    lr = float(rates.min()) if len(rates) else 1.0
    return lr * (1 - MOMENTUM) if settings.inner_optimizer == "momentum" else lr


def parameters_of(module: torch.nn.Module) -> dict[str, Array]:
    """Copies of a module's parameters, by name."""
    return {n: p.detach().numpy().copy() for n, p in module.named_parameters()}


def inner_optimizer(settings: Parameters, lr: Any) -> Any:
    """The optimiser of the inner loop that the parameters name; lr is a number or learnable."""
    import pymeta

    name, clip = settings.inner_optimizer, settings.clip_norm
    clip = None if clip is None else float(clip)
    if name == "adam":
        return pymeta.Adam(lr, clip_norm=clip)
    if name == "rmsprop":
        return pymeta.RMSprop(lr, clip_norm=clip)
    return pymeta.SGD(lr, momentum=MOMENTUM if name == "momentum" else 0.0, clip_norm=clip)


def rows_of(settings: Parameters) -> float | None:
    """How many rows the start is worth, or begins to be; None where that is open, or it is none."""
    rows = settings.anchor_rows
    if isinstance(rows, LearnableAnchor):
        return rows.initial
    return None if rows is None or isinstance(rows, str) else float(rows)


def pull(settings: Parameters) -> dict[str, Any]:
    """A learner's options of the pull to the start."""
    learned = isinstance(settings.anchor_rows, LearnableAnchor)
    rows = settings.anchor_rows if learned else rows_of(settings)
    return {"anchor": float(settings.anchor), "anchor_rows": rows}
