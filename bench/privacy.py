"""What task-level privacy costs in accuracy: credit default, adapted to 3-digit zip codes.

    python bench/privacy.py --data lendingclub_2007_2011.csv.gz [--seeds 3] [--steps 400]

The tasks of training are 70 % of the zip codes, with their loans from before 2011. The others are
held out: a model is adapted to each one's loans from before 2011 and scored on those of 2011. Each
row of the table is trained with another epsilon (delta 1e-4), by the same steps and step sizes. Its
intervals are 95 % ones over zip codes (bootstrap) and seeds together. The preprocessor is fitted
on the training loans as it is; its medians and categories are not part of what epsilon counts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import pymeta
from pymeta.data import Panel
from pymeta.privacy import PrivateTraining, noise_multiplier_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import credit_data

RATE, CLIP, DELTA = 0.1, 0.05, 1e-4
LEAST_ROWS, MOST_ROWS = 20, 60
NOT_PRIVATE, CLIPPED = "no clip, no noise", "clip alone"
EPSILONS: list[float | str] = [NOT_PRIVATE, CLIPPED, 8.0, 3.0, 1.0]


def tensors(panel, prep):
    """Each zip code's loans: (x [rows, features], y [rows])."""
    tasks = prep(panel).tasks()
    pairs = zip(panel.entities, tasks.xs, tasks.ys, strict=True)
    return {e: (torch.tensor(np.array(x)), torch.tensor(np.array(y))) for e, x, y in pairs}


def halves(task, generator):
    """Support and query rows, drawn anew."""
    x, y = task
    order = torch.randperm(len(x), generator=generator)[:MOST_ROWS]
    middle = len(order) // 2
    support, query = order[:middle], order[middle:]
    return x[support], y[support], x[query], y[query]


def trained(tasks, features, epsilon, steps, seed):
    """A MAML, trained with that epsilon."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Linear(features, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    )
    maml = pymeta.MAML(net, loss="bce_with_logits", lr=0.05, steps=3)
    adam = torch.optim.Adam(maml.parameters(), 0.01)
    noise = 0.0
    if isinstance(epsilon, float):
        how = {"delta": DELTA, "sampling_rate": RATE, "steps": steps}
        noise = noise_multiplier_for(epsilon=epsilon, **how)
    private = PrivateTraining(
        maml,
        adam,
        tasks=len(tasks),
        sampling_rate=RATE,
        clip=1e6 if epsilon == NOT_PRIVATE else CLIP,
        noise_multiplier=noise,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    for some in private.samples(steps):
        drawn = [halves(tasks[t], generator) for t in some]
        private.step(*map(list, zip(*drawn, strict=True)))
    return maml, noise


def scores(maml, past, future):
    """For each held-out zip code: its labels, and its probabilities of default."""
    names = [e for e in future if e in past]
    models = maml.adapt([past[e][0] for e in names], [past[e][1] for e in names])
    found = models.predict_proba([future[e][0] for e in names])
    return [(future[e][1].numpy(), p[:, 0].numpy()) for e, p in zip(names, found, strict=True)]


def measured(parts):
    """(log loss, AUC) of zip codes' rows together."""
    y = np.concatenate([p[0] for p in parts])
    p = np.concatenate([p[1] for p in parts]).clip(1e-7, 1 - 1e-7)
    loss = -np.mean(np.where(y > 0, np.log(p), np.log1p(-p)))
    rank = p.argsort().argsort() + 1.0
    ones = y > 0
    n, m = ones.sum(), (~ones).sum()
    return loss, (rank[ones].sum() - n * (n + 1) / 2) / (n * m)


def interval(runs):
    """Mean and 95 % interval of both scores over bootstrapped zip codes and seeds: [2, 3]."""
    random = np.random.default_rng(0)
    resampled = []
    for _ in range(300):
        run = runs[random.integers(len(runs))]
        some = random.integers(len(run), size=len(run))
        resampled.append(measured([run[i] for i in some]))
    mean = np.mean([measured(run) for run in runs], 0)
    return np.column_stack([mean, *np.quantile(resampled, [0.025, 0.975], axis=0)])


def main() -> None:
    """Train, score, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loans = credit_data.load(options.data)
    loans = loans[[*credit_data.FEATURES, "zip_code", "issued", "default"]]
    panel = Panel(loans, entity="zip_code", time="issued", target="default")
    past, future = panel.split_time("2011-01")
    train, _ = past.split_entities(0.3, seed=0)
    prep = train.preprocessor(min_rows=50).fit(train)
    before, after = tensors(past, prep), tensors(future, prep)
    members = set(train.entities)
    tasks = [before[e] for e in train.entities if len(before[e][0]) >= LEAST_ROWS]
    held_out = {e: t for e, t in after.items() if e not in members}
    print(f"{len(tasks)} tasks to train on, {len(held_out)} held out", file=sys.stderr)
    print("| epsilon | noise multiplier | log loss | AUC |\n|---|---|---|---|")
    for epsilon in EPSILONS:
        runs, noise = [], 0.0
        for seed in range(options.seeds):
            maml, noise = trained(tasks, len(prep.features), epsilon, options.steps, seed)
            runs.append(scores(maml, before, held_out))
        (loss, *around), (auc, *near) = interval(runs)
        print(
            f"| {epsilon} | {noise:.2f} | {loss:.4f} ({around[0]:.4f} to {around[1]:.4f}) "
            f"| {auc:.3f} ({near[0]:.3f} to {near[1]:.3f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
