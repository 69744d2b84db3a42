"""Starting points, and how demo.py compares them: train, adapt, choose a step size, score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from _common import Batch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

import pymeta

STEPS = (0, 1, 5, 10, 100)
OUTER_RATE = 3e-3

Scores = dict[str, dict[int, NDArray[np.float64]]]  # method -> steps -> one score for each task


@dataclass(frozen=True)
class Problem:
    """What the two problems differ in."""

    loss: str  # of the inner and outer loop
    score: Callable[[torch.Tensor, torch.Tensor], NDArray[np.float64]]  # predictions, targets: [T]
    higher_is_better: bool
    rates: Sequence[float]  # among which step sizes are chosen


def meta_train(
    maml: pymeta.MAML, draw: Callable[[], Batch], iterations: int, what: str, quiet: bool
) -> None:
    """Adam on the meta-gradient, its step size going down to a hundredth."""
    optimizer = torch.optim.Adam(maml.parameters(), OUTER_RATE, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=iterations)
    bar = tqdm(range(iterations), what, unit="meta-batch", disable=quiet, mininterval=0.2)
    for iteration in bar:
        loss = maml(*draw()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if iteration % 100 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


def pre_train(
    network: nn.Module,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    draw: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    iterations: int,
    what: str,
    quiet: bool,
) -> None:
    """Adam on the plain loss of ordinary batches."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    for _ in tqdm(range(iterations), what, unit="batch", disable=quiet, mininterval=0.2):
        x, y = draw()
        optimizer.zero_grad()
        loss(network(x), y).backward()
        optimizer.step()


def scores_after(
    network: nn.Module, problem: Problem, tasks: Batch, rate: float, steps: int
) -> NDArray[np.float64]:
    """Adapt ``network`` to every task by ``steps`` steps of size ``rate``; one score each."""
    maml = pymeta.MAML(network, loss=problem.loss, lr=rate, steps=1)
    models = maml.adapt(tasks.xs, tasks.ys, steps=steps)
    return problem.score(models(tasks.xq), tasks.yq)


def shared_scores(
    networks: Sequence[nn.Module], problem: Problem, tasks: Batch, rate: float, steps: int
) -> NDArray[np.float64]:
    """One score for each task; several networks (random draws) share out the tasks."""
    ends = np.linspace(0, len(tasks.xs), len(networks) + 1).astype(int)
    parts = zip(networks, ends[:-1], ends[1:], strict=True)
    return np.concatenate(
        [scores_after(n, problem, tasks.part(a, b), rate, steps) for n, a, b in parts]
    )


def best_rate(networks: Sequence[nn.Module], problem: Problem, tuning: Batch, steps: int) -> float:
    """The step size with the best mean score on the tuning tasks after so many steps."""
    sign = 1 if problem.higher_is_better else -1
    means = [
        sign * shared_scores(networks, problem, tuning, rate, steps).mean()
        for rate in problem.rates
    ]
    # A diverged run scores NaN, which must not win.
    return problem.rates[int(np.argmax(np.nan_to_num(means, nan=-np.inf)))]


def tuned_scores(
    networks: Sequence[nn.Module], problem: Problem, tuning: Batch, tasks: Batch
) -> dict[int, NDArray[np.float64]]:
    """Scores with, for each number of steps, the step size that is best on the tuning tasks."""

    def tuned(steps: int) -> NDArray[np.float64]:
        rate = best_rate(networks, problem, tuning, steps) if steps else problem.rates[0]
        return shared_scores(networks, problem, tasks, rate, steps)

    return {steps: tuned(steps) for steps in STEPS}
