"""From your own table to a model for each entity, tested on entities that training never saw.

    python examples/own_csv.py sales.csv --entity shop --target sales --time day

The table is CSV, Parquet or Feather; every other column is a feature. A target of numbers is
predicted with a squared error, one of text as classes. A quarter of the entities is held out: a
start is meta-trained on the others, adapted to the first half of each held-out entity's rows and
judged on the second. Adapter and preprocessor are saved for `pymeta adapt`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

import pymeta
from pymeta.data import Panel


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """The error on the held-out entities, before and after adaptation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table")
    parser.add_argument("--entity", required=True, help="the column that says whose a row is")
    parser.add_argument("--target", required=True, help="the column to predict: numbers, or text")
    parser.add_argument("--time", help="the column that orders an entity's rows")
    parser.add_argument("--batches", type=int, default=500, help="of meta-training")
    options = parser.parse_args(argv)
    panel = Panel(options.table, entity=options.entity, target=options.target, time=options.time)
    train, test = panel.split_entities(0.25, seed=0)
    prep = train.preprocessor().fit(train)  # imputes, clips, scales, encodes
    torch.manual_seed(0)
    loss, out = ("mse", 1) if panel.classes is None else ("cross_entropy", len(panel.classes))
    network = nn.Sequential(nn.Linear(len(prep.features), 32), nn.Tanh(), nn.Linear(32, out))
    maml = pymeta.MAML(network, loss=loss, lr=pymeta.LearnableLR(0.05), steps=5)
    outer = torch.optim.Adam(maml.parameters(), 0.005)
    few = max(int(np.quantile(train.sizes, 0.25)), 4)  # entities of fewer are not trained on
    rows = {"support": (max(few // 4, 1), few // 2), "query": few // 2}
    for batch in prep(train).episodes(tasks=16, **rows, batches=options.batches, seed=0):
        outer.zero_grad()
        maml(*batch).loss.backward()
        outer.step()
    xs, ys = prep(test).tasks()[:2]
    support = [x[: len(x) // 2] for x in xs], [y[: len(y) // 2] for y in ys]
    query = [x[len(x) // 2 :] for x in xs], [y[len(y) // 2 :] for y in ys]
    before = maml.adapt(*support, steps=0)(query[0])
    after = maml.adapt(*support)(query[0])
    truth = torch.cat([torch.as_tensor(y).reshape(-1) for y in query[1]])
    if panel.classes is None:
        what, plain = "mean squared error", truth.var(correction=0).item()
        errors = [(torch.cat(p)[:, 0] - truth).square().mean().item() for p in (before, after)]
    else:
        what, plain = "share of wrong classes", 1 - truth.bincount().max().item() / len(truth)
        errors = [(torch.cat(p).argmax(1) != truth).float().mean().item() for p in (before, after)]
    print(f"{len(test.entities)} held-out entities: {what} {errors[0]:.4g} before adaptation,")
    print(f"{errors[1]:.4g} after it ({plain:.4g} for the best constant)")
    maml.adapter().save("adapter.safetensors")
    prep.save("preprocessor.safetensors")
    return errors[0], errors[1]


if __name__ == "__main__":
    main()
