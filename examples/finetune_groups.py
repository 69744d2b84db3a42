"""A network for each group of your table: one for all first, then each trained on its own rows.

    python examples/finetune_groups.py payments.csv --group merchant --target fraud

The target is 0 or 1. The last fifth of each group's rows tells what both are worth; of the rows
before, the last fifth stops each group's training where it no longer helps. Then the groups are
trained again, on all of their rows, and these models are saved, to predict with by

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
    """The log-loss of later rows, by one network and by one for each group."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table")
    parser.add_argument("--group", required=True, help="the column that says whose a row is")
    parser.add_argument("--target", required=True, help="the column to predict: 0 or 1")
    parser.add_argument("--epochs", type=int, default=50)
    options = parser.parse_args(argv)
    panel = Panel(options.table, entity=options.group, target=options.target)
    prep = panel.preprocessor().fit(panel)
    xs, ys = ([torch.as_tensor(v) for v in values] for values in prep(panel).tasks()[:2])
    cut = [len(y) - len(y) // 5 for y in ys]  # the last fifth of a group's rows judges
    past = [[v[:n] for v, n in zip(values, cut, strict=True)] for values in (xs, ys)]
    later_x, later_y = ([v[n:] for v, n in zip(values, cut, strict=True)] for values in (xs, ys))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(xs[0].shape[-1], 32), nn.ReLU(), nn.Linear(32, 1))
    recipe = {"loss": "bce_with_logits", "optimizer": pymeta.Adam(3e-3), "batch_size": 32}
    own = {"validation": 0.2, "validation_rows": "last", "patience": 5, "anchor_rows": 20}
    rows = [torch.cat(values)[None] for values in past]
    pooled = pymeta.FineTune(network, epochs=10, **recipe)(*rows)  # one task: ordinary training
    network.load_state_dict(pooled.state_dict(0))
    tune = pymeta.FineTune(network, epochs=options.epochs, **own, **recipe)
    truth = torch.cat(later_y)
    with torch.no_grad():
        before, after = (
            nn.functional.binary_cross_entropy_with_logits(logits[:, 0], truth).item()
            for logits in (network(torch.cat(later_x)), torch.cat(list(tune(*past)(later_x))))
        )
    print(f"log-loss of {len(truth):,} later rows: {before:.4f} by one network for all groups,")
    print(f"{after:.4f} by one for each")
    models = tune(xs, ys)
    print(models)
    models.save("models.safetensors", entities=panel.entities)
    prep.save("prep.safetensors")
    return before, after


if __name__ == "__main__":
    main()
