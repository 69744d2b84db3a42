"""How `fit` learns what groups share: pooled training, or meta-batches of a method's losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pymeta.sklearn.episodes import Rows
from pymeta.sklearn.network import Form
from pymeta.sklearn.parameters import Parameters, count
from pymeta.spec.show import counted

if TYPE_CHECKING:
    import torch

_PRIOR = 10.0  # times the step size, of a head's prior
_HELD_OUT, _PATIENCE = 0.1, 5


def pooled(
    settings: Parameters,
    form: Form,
    network: torch.nn.Sequential,
    rows: Rows,
    epochs: int,
    seed: int,
    stops_early: bool = False,
) -> list[float]:
    """Ordinary training on all rows as one task, by minibatches of Adam; the loss curve.

    Where it `stops_early`, a tenth of the rows is held out, the last ones where their order means
    something, and the best epoch's weights are kept.
    """
    import torch

    import pymeta

    train = pymeta.FineTune(
        network,
        loss=form.loss,
        optimizer=pymeta.Adam(
            float(settings.meta_lr), weight_decay=float(settings.weight_decay), decoupled=True
        ),
        epochs=epochs,
        batch_size=count(settings.batch_size),
        validation=_HELD_OUT if stops_early and len(rows.x) >= 1 / _HELD_OUT else 0.0,
        validation_rows="random" if settings.is_shuffled else "last",
        patience=_PATIENCE if stops_early and len(rows.x) >= 1 / _HELD_OUT else None,
        seed=seed,
    )
    one = rows.lists([np.arange(len(rows.x))])
    options = {"weights": one.weights, "offset": one.offsets, "progress": bool(settings.verbose)}
    models = train(one.xs, one.ys, curves=True, **options)
    curve: list[float] = models.history.train[0, : int(models.history.epochs[0])].tolist()
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(models.parameters[name][0])
    for epoch, loss in enumerate(curve, start=1):
        _tell(settings, "pooled", epoch, loss)
    say(settings, f"pooled: {counted(len(curve), 'epoch')}, loss {curve[0]:.4f} -> {curve[-1]:.4f}")
    return curve


def meta_train(
    settings: Parameters,
    name: str,
    learned: torch.nn.Module,
    loss_of_batch: Callable[[], torch.Tensor],
) -> list[float]:
    """Train by one meta-batch after another; the loss of each, from which was learnt.

    The outer step is AdamW's, its size falling linearly to a hundredth. What a head has besides its
    encoder, logarithms most of it, goes ten times as fast and does not decay; nor do step sizes
    that are learned too, which go ten times as fast in units of their first value, and stay above a
    hundredth of it.
    """
    import torch

    lr, prior = float(settings.meta_lr), []
    if hasattr(learned, "encoder"):
        prior = [p for n, p in learned.named_parameters() if not n.startswith("encoder.")]
    others = [p for p in learned.parameters() if all(p is not q for q in prior)]
    groups: list[dict[str, Any]] = [
        {"params": others},
        {"params": prior, "lr": _PRIOR * lr, "weight_decay": 0.0},
    ]
    rates: torch.nn.Parameter | None = getattr(loss_of_batch, "rates", None)
    pulls = getattr(loss_of_batch, "pulls", None)
    if pulls is not None:  # a logarithm, too
        prior = [*prior, *pulls.parameters()]
        groups[1]["params"] = prior
    least = 0.0
    if rates is not None:
        first = float(rates.detach().max())
        groups.append({"params": [rates], "lr": _PRIOR * lr * first, "weight_decay": 0.0})
        least = first / 100
    outer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr, weight_decay=float(settings.weight_decay)
    )
    decay = torch.optim.lr_scheduler.LinearLR(outer, 1.0, 0.01, total_iters=settings.iterations)
    curve = []
    begun = time.monotonic()
    with torch.enable_grad():
        for i in range(settings.iterations):
            loss = loss_of_batch()
            outer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            outer.step()
            if rates is not None:
                with torch.no_grad():
                    rates.clamp_(min=least)
            curve.append(loss.item())
            _tell(settings, name, i + 1, curve[-1])
            if not math.isfinite(curve[-1]):
                break  # and so is what has been learnt, which `fit` refuses
            decay.step()
            if (i + 1) % max(settings.iterations // 10, 1) == 0:
                left = (time.monotonic() - begun) / (i + 1) * (settings.iterations - i - 1)
                say(
                    settings,
                    f"{name}: iteration {i + 1} of {settings.iterations}, loss {curve[-1]:.4f}, "
                    f"{left:.0f} s to go",
                )
    return curve


def _tell(settings: Parameters, stage: str, iteration: int, loss: float) -> None:
    if settings.callback is not None:
        settings.callback(stage, iteration, loss)


def say(settings: Parameters, line: str) -> None:
    """Print a line of how training goes, where that is asked for."""
    if settings.verbose:
        print(f"[{type(settings).__name__}] {line}", flush=True)
