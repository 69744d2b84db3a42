"""A credit model for every state and every 3-digit zip code: does it beat one model for all?

    python examples/lending_club.py --data lendingclub_2007_2011.csv.gz     # some minutes
    python examples/lending_club.py --data ... --quick                      # less of everything

The data are 42,535 LendingClub loans from 2007 to 2011, 15 % of which defaulted (`credit_data.py`
describes the file, and which columns a lender knows at the time of the decision). A *task* is a
state (50) or a 3-digit zip code (837): a model learns from, or is adapted to, the task's past and
is scored on its future.

**Time.** The past is everything issued before 2011, the future is 2011. Preprocessing is fitted on
the past. Settings (step sizes, regularisation ...) are chosen on the second half of 2010, with
models that have seen only loans issued before that. All methods are given the final outcome of
every past loan, although at the cut-off the outcome of recent loans is not known yet: the numbers
compare methods; they do not predict what a lender would have achieved.

**Tasks.** The groups are split into folds. A start (MAML, Reptile, the pooled network) is learnt
from the past of the groups in the other folds; it is then adapted to each held-out group's own
past, and the group's future is scored. So each group is scored once, from a start that has never
seen it. Settings are chosen in the same way within the other folds. The baselines that need no
start get more data, not less: they learn from the past of all groups at once, or of the one group.

Scores: area under the ROC curve (AUC), Kolmogorov-Smirnov distance (KS), Brier score, log-loss.
*Macro* is the mean over the groups with enough future loans of both outcomes; *micro* treats all
future loans as one set.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import credit_data
import numpy as np
import pandas as pd
from _common import one_torch_thread
from _credit_report import HEAD, Result, figure, scored, table
from _credit_rivals import EACH, regressions, rivals
from _credit_starts import (
    MAML,
    REPTILE,
    SEED,
    TUNED,
    Learner,
    Problem,
    Size,
    adapted_to,
    fitted,
    with_starts,
)
from threadpoolctl import threadpool_limits

import pymeta

# what `fit` would choose and look after by itself is what this comparison varies
PLAIN = {"method": "maml", "anchor_rows": None, "gate": False, "clip_inputs": False}
PLAIN |= {"inner_lr": 0.05, "learn_lr": False, "clip_norm": None}
NET = {**PLAIN, "hidden": (32,), "weight_decay": 1.0, "random_state": SEED}
META = {**NET, "tasks_per_batch": 4, "task_rows": 64, "draw": "rows"}
NETS = [{**NET, "hidden": hidden, "epochs": e} for hidden in ((16,), (32,)) for e in (4, 8)]
METAS = [
    {**META, "hidden": hidden, "inner_lr": lr, "iterations": iterations}
    for hidden, lr, iterations in (
        ((32,), 0.05, 600),
        ((16,), 0.05, 1200),
        ((32,), 0.05, 1200),
        ((32,), 0.2, 1200),
    )
]
ADAPTATIONS = [
    {"adapt_lr": lr, "adapt_epochs": epochs}
    for lr, epochs in ((0.05, 1), (0.05, 5), (0.2, 5), (0.1, 20), (0.2, 20))
]
FULL = Size(
    folds=5,
    validations=3,
    learners=(
        Learner(MAML, METAS, ADAPTATIONS),
        Learner(REPTILE, [{**fit, "method": "reptile"} for fit in METAS], ADAPTATIONS),
        Learner(TUNED, [{**fit, "method": "pooled"} for fit in NETS], ADAPTATIONS),
    ),
    penalties=(0.001, 0.003, 0.01, 0.03, 0.1, 1.0),
    trees=tuple(
        {"max_iter": trees, "max_leaf_nodes": leaves}
        for trees in (50, 100, 200)
        for leaves in (7, 15)
    ),
)
QUICK = Size(
    folds=3,
    validations=1,
    learners=tuple(Learner(n, fits[:1], settings[1:4:2]) for n, fits, settings in FULL.learners),
    penalties=(0.001, 0.01, 0.1),
    trees=({"max_iter": 100, "max_leaf_nodes": 7},),
)


def seconds(call: Callable[[], Any], times: int = 3) -> float:
    """The shortest of some runs."""
    best = np.inf
    for _ in range(times):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def timed(problem: Problem, penalty: float) -> dict[str, Any]:
    """What it takes to adapt to the past of all groups at once, and to fit them one by one."""
    X, past = problem.features(problem.past), problem.past
    model = fitted(problem, X, past, {**META, "iterations": 1})
    times = {}
    for settings in ({"adapt_lr": 0.05, "adapt_epochs": 5}, {"adapt_lr": 0.2, "adapt_epochs": 20}):
        name = f"pymeta, {settings['adapt_epochs']} steps"
        times[name] = seconds(lambda s=settings: adapted_to(model, problem, X, past, s))
    times[EACH] = seconds(lambda: regressions(problem, X, past, penalty), 1)
    groups = len(np.unique(problem.groups[past]))
    return {"groups": groups, "threads": pymeta.num_threads(), "seconds": times}


def run(loans: pd.DataFrame, grouping: str, size: Size, say: Callable[[str], None]) -> Result:
    """All methods on one grouping."""
    problem = Problem(loans, credit_data.GROUPS[grouping])

    def tell(line: str) -> None:
        say(f"[{grouping}] {line}")

    found = with_starts(problem, size, tell)
    others, settings = rivals(problem, size, tell)
    tasks, micro = scored(problem, {**found, **others})
    return Result(grouping, tasks, micro, timed(problem, settings[EACH]))


def as_json(results: Sequence[Result], size: Size) -> str:
    """Everything but the groups' own scores."""
    found = {
        r.grouping: {
            "groups": r.groups,
            "macro": {m: r.macro(m) for m in r.micro},
            "micro": r.micro,
            "gain": {m: r.gain(m) for m in r.micro},
            "timing": r.timing,
        }
        for r in results
    }
    return json.dumps({"size": asdict(size), "results": found}, indent=1, default=str)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the loans, CSV or CSV.gz")
    parser.add_argument("--quick", action="store_true", help="fewer folds and settings")
    parser.add_argument("--grouping", choices=credit_data.GROUPS, action="append", default=None)
    parser.add_argument("--out", type=Path, help="write the tables: .md, or .json")
    parser.add_argument("--tasks", type=Path, help="write every group's scores, CSV")
    parser.add_argument("--figure", type=Path, help="write the figure, PNG")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, size: Size | None = None, quiet: bool = False):
    """Run what the arguments say; returns the results, one for each grouping."""
    args = arguments(argv)
    one_torch_thread()
    size = size or (QUICK if args.quick else FULL)
    loans = credit_data.load(args.data)
    begin = time.perf_counter()

    def say(line: str) -> None:
        if not quiet:
            print(f"{time.perf_counter() - begin:5.0f} s  {line}", flush=True)

    groupings = args.grouping or list(credit_data.GROUPS)
    with threadpool_limits(1, user_api="blas"):  # as for torch: the products here are small
        results = [run(loans, grouping, size, say) for grouping in groupings]
    text = "\n\n".join(map(table, results)) + "\n"
    if not quiet:
        print(f"\n{text}")
    if args.out:
        markdown = f"{HEAD}\n{text}"
        args.out.write_text(as_json(results, size) if args.out.suffix == ".json" else markdown)
    if args.tasks:
        parts = {r.grouping: r.tasks for r in results}
        pd.concat(parts, names=["grouping"]).reset_index("grouping").to_csv(args.tasks, index=False)
    if args.figure:
        figure(results, args.figure)
    return results


if __name__ == "__main__":
    main()
