"""Reptile on sinusoids: the demonstration published with the algorithm, one native call per task.

    python examples/reptile_sine.py            # a table, and a figure in examples/out/

Nichol, Achiam, Schulman 2018 (arXiv:1803.02999, section 4.1), with the settings of the authors'
published script: a 1-64-64-1 network with tanh learns to fit ``a sin(x + p)``, a in [0.1, 5], p in
[0, 2 pi]. Training: 30,000 iterations of one task each. A task's 50 points are evenly spaced on
[-5, 5]; the inner loop is one epoch over them in shuffled batches of ten, by gradient descent with
step size 0.02; the outer step size falls linearly from 0.1 to 0. Test: ten of a new sinusoid's 50
points (drawn with replacement), 32 steps with the same step size on all ten, mean squared error on
all 50.

Three starting points for the same network:

- Reptile: trained as above.
- pooled: trained in the ordinary way (Adam) on points of all sinusoids together.
- random: not trained; several draws of the weights.

Errors grow with the square of the amplitude, so the large sinusoids dominate the means; medians
are printed as well.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _common import mean_interval, one_torch_thread
from _plots import starts_figure
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

import pymeta

OUT = Path(__file__).parent / "out" / "reptile_sine.png"
POINTS = torch.linspace(-5, 5, 50)
SHOTS = 10  # points to adapt to, and rows of a batch in training
INNER_RATE, OUTER_RATE = 0.02, 0.1
EPOCH = len(POINTS) // SHOTS  # steps
TEST_STEPS = 32
STEPS = (0, 1, 8, TEST_STEPS)
REPTILE, POOLED, RANDOM = "Reptile", "pooled", "random"


class Tasks(NamedTuple):
    """T sinusoids: ten of their points, and all fifty."""

    xs: torch.Tensor  # [T, 10, 1]
    ys: torch.Tensor  # [T, 10, 1]
    xq: torch.Tensor  # [T, 50, 1]
    yq: torch.Tensor  # [T, 50, 1]


def network() -> nn.Sequential:
    """1-64-64-1 with tanh."""
    return nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )


def sinusoids(rng: np.random.Generator, tasks: int) -> torch.Tensor:
    """Values at the fifty points, [T, 50, 1]."""
    amplitude = rng.uniform(0.1, 5.0, (tasks, 1))
    phase = rng.uniform(0.0, 2 * np.pi, (tasks, 1))
    return torch.from_numpy(amplitude * np.sin(POINTS.numpy() + phase)).float().unsqueeze(-1)


def draw(rng: np.random.Generator, tasks: int) -> Tasks:
    """New tasks to be tested on."""
    yq = sinusoids(rng, tasks)
    chosen = torch.from_numpy(rng.integers(len(POINTS), size=(tasks, SHOTS)))
    xs, ys = POINTS[chosen].unsqueeze(-1), yq[..., 0].gather(1, chosen).unsqueeze(-1)
    return Tasks(xs, ys, POINTS.view(1, -1, 1).repeat(tasks, 1, 1), yq)


def learner(net: nn.Module) -> pymeta.Reptile:
    """One epoch of batches of ten over a task; on ten rows, as many steps as one asks for."""
    return pymeta.Reptile(net, loss="mse", lr=INNER_RATE, steps=EPOCH, batch_size=SHOTS)


def train(reptile: pymeta.Reptile, iterations: int, seed: int, quiet: bool) -> float:
    """The outer loop, one task an iteration; the seconds it took."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.SGD(reptile.parameters(), OUTER_RATE)
    anneal = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=iterations)
    xs, values = POINTS.view(1, -1, 1), sinusoids(rng, iterations)
    start = time.perf_counter()
    for ys in tqdm(values.split(1), "Reptile", unit="task", disable=quiet, mininterval=0.2):
        optimizer.zero_grad()
        reptile(xs, ys).loss.backward()
        optimizer.step()
        anneal.step()
    return time.perf_counter() - start


def train_pooled(net: nn.Module, batches: int, seed: int, quiet: bool) -> None:
    """Adam on the mean squared error of fifty points, each of another sinusoid."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    for _ in tqdm(range(batches), "pooled", unit="batch", disable=quiet, mininterval=0.2):
        y = sinusoids(rng, len(POINTS))[:, :, 0].diagonal().unsqueeze(-1)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(POINTS.unsqueeze(-1)), y).backward()
        optimizer.step()


def fits(net: nn.Module, tasks: Tasks, steps: int) -> torch.Tensor:
    """What the network makes of the fifty points after so many steps, [T, 50, 1]."""
    return learner(net).adapt(tasks.xs, tasks.ys, steps=steps)(tasks.xq)


def errors(nets: Sequence[nn.Module], tasks: Tasks, steps: int) -> NDArray[np.float64]:
    """Mean squared error of each task, [T]; several networks share out the tasks."""
    ends = np.linspace(0, len(tasks.xs), len(nets) + 1).astype(int)
    parts = []
    for net, a, b in zip(nets, ends[:-1], ends[1:], strict=True):
        part = Tasks(*(t[a:b] for t in tasks))
        parts.append((fits(net, part, steps) - part.yq).double().square().mean((1, 2)).numpy())
    return np.concatenate(parts)


def table(scores: dict[str, dict[int, NDArray[np.float64]]]) -> str:
    """Mean with its 95 % interval and median, for each start and number of steps."""
    heads = ["before" if k == 0 else f"{k} step{'s' * (k > 1)}" for k in STEPS]
    lines = [f"{'':10}" + "".join(f"{head:>25}" for head in heads)]
    for name, by_steps in scores.items():
        cells = [
            "{:.3g} ± {:.2g} ({:.3g})".format(*mean_interval(e), np.median(e))
            for e in (by_steps[k] for k in STEPS)
        ]
        lines.append(f"{name:10}" + "".join(f"{cell:>25}" for cell in cells))
    return "\n".join(lines)


def main(argv: Iterable[str] | None = None) -> dict:
    """Train, compare, print the table and draw the figure; the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the figure")
    parser.add_argument("--quick", action="store_true", help="seconds, and no meaningful numbers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args(argv if argv is None else list(argv))
    iterations, batches, tests, draws = (5000, 200, 100, 2) if args.quick else (
        30_000, 10_000, 1000, 10
    )  # fmt: skip
    one_torch_thread()
    torch.manual_seed(args.seed)
    net, pooled = network(), network()
    reptile = learner(net)
    print(f"pymeta runs this on: {reptile.explain()}")
    seconds = train(reptile, iterations, args.seed, args.quick)
    train_pooled(pooled, batches, args.seed + 1, args.quick)
    starts = {REPTILE: [net], POOLED: [pooled], RANDOM: [network() for _ in range(draws)]}
    tasks = draw(np.random.default_rng(args.seed + 2), tests)
    scores = {n: {k: errors(nets, tasks, k) for k in STEPS} for n, nets in starts.items()}
    shown = draw(np.random.default_rng(args.seed + 3), 3)
    curves = {
        n: tuple(fits(nets[0], shown, k) for k in (0, TEST_STEPS)) for n, nets in starts.items()
    }
    starts_figure(curves, POINTS.numpy(), shown, TEST_STEPS, args.out)
    print(
        f"\nmean squared error on all fifty points, {tests:,} new sinusoids: mean ± 95 % (median)\n"
        f"{table(scores)}\n\n"
        f"{iterations:,} iterations of Reptile in {seconds:.1f} s; figure in {args.out}"
    )
    result = {
        "iterations": iterations,
        "seconds": seconds,
        "mean": {n: {k: mean_interval(e) for k, e in s.items()} for n, s in scores.items()},
        "median": {n: {k: float(np.median(e)) for k, e in s.items()} for n, s in scores.items()},
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
