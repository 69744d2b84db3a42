"""How `fit` learns the shared start: pooled training, MAML, Reptile; all changes the network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pymeta.sklearn.episodes import Draw, Rows
from pymeta.sklearn.network import Form, inner_optimizer, pull
from pymeta.sklearn.parameters import Parameters

if TYPE_CHECKING:
    import torch


def count(value: Any) -> int | None:
    """A number as a plain int; None stays."""
    return None if value is None else int(value)


def pooled(
    settings: Parameters,
    form: Form,
    network: torch.nn.Sequential,
    rows: Rows,
    epochs: int,
    seed: int,
) -> list[float]:
    """Ordinary training on all rows as one task, by minibatches of Adam; the loss curve."""
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
        seed=seed,
    )
    xs, ys, ws = rows.lists([np.arange(len(rows.x))])
    models = train(xs, ys, weights=ws, curves=True, progress=bool(settings.verbose))
    curve: list[float] = models.history.train[0].tolist()
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(models.parameters[name][0])
    say(settings, f"pooled: {epochs} epochs, loss {curve[0]:.4f} -> {curve[-1]:.4f}")
    return curve


def meta_train(
    settings: Parameters, form: Form, network: torch.nn.Sequential, draw: Draw, seed: int
) -> list[float]:
    """MAML or Reptile; the loss of every iteration, from which the network learnt.

    The outer step is AdamW's, its size falling linearly to a hundredth.
    """
    import torch

    make = _maml if settings.method == "maml" else _reptile
    one = make(settings, form, network, draw, seed)
    outer = torch.optim.AdamW(
        network.parameters(), float(settings.meta_lr), weight_decay=float(settings.weight_decay)
    )
    decay = torch.optim.lr_scheduler.LinearLR(outer, 1.0, 0.01, total_iters=settings.iterations)
    curve = []
    with torch.enable_grad():
        for i in range(settings.iterations):
            loss = one()
            outer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            outer.step()
            curve.append(loss.item())
            if not math.isfinite(curve[-1]):
                break  # and so is what has been learnt, which `_fit` refuses
            decay.step()
            if (i + 1) % max(settings.iterations // 10, 1) == 0:
                say(settings, f"{settings.method}: iteration {i + 1}, loss {curve[-1]:.4f}")
    return curve


def _maml(
    settings: Parameters, form: Form, network: torch.nn.Sequential, draw: Draw, seed: int
) -> Callable[[], torch.Tensor]:
    import pymeta

    maml = pymeta.MAML(
        network,
        loss=form.loss,
        optimizer=inner_optimizer(settings.inner_optimizer, settings.inner_lr),
        **pull(settings),
        steps=int(settings.inner_steps),
        first_order=bool(settings.first_order),
        adapt=[n for n, _ in network.named_parameters() if form.adapts(n)],
    )

    def loss() -> torch.Tensor:
        support, query = draw.episode()
        xs, ys, ws = draw.rows.lists(support)
        xq, yq, wq = draw.rows.lists(query)
        outcome: pymeta.Outcome = maml(xs, ys, xq, yq, support_weights=ws, query_weights=wq)
        return outcome.loss

    return loss


def _reptile(
    settings: Parameters, form: Form, network: torch.nn.Sequential, draw: Draw, seed: int
) -> Callable[[], torch.Tensor]:
    import pymeta

    reptile = pymeta.Reptile(
        network,
        loss=form.loss,
        optimizer=inner_optimizer(settings.inner_optimizer, settings.inner_lr),
        **pull(settings),
        steps=int(settings.inner_steps),
        batch_size=count(settings.inner_batch_size),
        adapt=[n for n, _ in network.named_parameters() if form.adapts(n)],
        seed=seed,
    )

    def loss() -> torch.Tensor:
        xs, ys, ws = draw.rows.lists(draw.groups())
        outcome: pymeta.ReptileOutcome = reptile(xs, ys, support_weights=ws)
        return outcome.loss

    return loss


def say(settings: Parameters, line: str) -> None:
    """Print a line of how training goes, where that is asked for."""
    if settings.verbose:
        print(f"[{type(settings).__name__}] {line}", flush=True)
