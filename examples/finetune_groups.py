"""A network for each group of your table: one for all first, then each trained on its own rows.

    python examples/finetune_groups.py payments.csv --group merchant --target fraud

The target is 0 or 1. A fifth of each group's rows (the last ones) is held out: it stops each
group's training where it no longer helps, and tells what it gained. That flatters a little, for
the same rows chose the epoch. The models are saved, to predict with by

    pymeta predict models.safetensors new.csv --entity merchant --preprocessor prep.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

import pymeta
from pymeta.data import Panel


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """The groups' mean held-out loss, before and after training on their own rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table")
    parser.add_argument("--group", required=True, help="the column that says whose a row is")
    parser.add_argument("--target", required=True, help="the column to predict: 0 or 1")
    parser.add_argument("--epochs", type=int, default=50)
    options = parser.parse_args(argv)
    panel = Panel(options.table, entity=options.group, target=options.target)
    prep = panel.preprocessor().fit(panel)
    xs, ys = prep(panel).tasks()[:2]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(xs[0].shape[-1], 32), nn.ReLU(), nn.Linear(32, 1))
    recipe = {"loss": "bce_with_logits", "optimizer": pymeta.Adam(3e-3), "batch_size": 32}
    own = {"validation": 0.2, "validation_rows": "last", "patience": 5, "anchor_rows": 20}
    kept = [x[: len(x) - len(x) // 5] for x in xs], [y[: len(y) - len(y) // 5] for y in ys]
    rows = [torch.cat([torch.as_tensor(v) for v in values])[None] for values in kept]
    pooled = pymeta.FineTune(network, epochs=10, **recipe)(*rows)  # one task: ordinary training
    network.load_state_dict(pooled.state_dict(0))
    tune = pymeta.FineTune(network, epochs=options.epochs, **own, **recipe)
    models = tune(xs, ys, curves=True)
    losses = models.history.validation
    best = losses.gather(1, models.history.best_epochs[:, None])
    print(models)
    print(f"held-out log-loss, mean of {len(models)} groups: {losses[:, 0].mean():.4f} for all")
    print(f"by one network, {best.mean():.4f} with one each; trained {models.history}")
    models.save("models.safetensors", entities=panel.entities)
    prep.save("prep.safetensors")
    return losses[:, 0].mean().item(), best.mean().item()


if __name__ == "__main__":
    main()
