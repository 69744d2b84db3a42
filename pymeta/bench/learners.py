"""All tasks at once against one by one: `python -m pymeta.bench.learners`.

32 tasks of 5-way 5-shot with 15 query rows of each class, on features of width 64 (20-64-64 ReLU):
loss and gradient of the learners of `pymeta.learners`, for all tasks in one call, and in a loop of
torch over tasks, which is the same learner called with each task. Before the clock starts the
losses of both are compared. Both take turns, on one thread; medians. MetaLSTM and RelationalMAML
have a network 20-8-5 and five inner steps; EncodedMAML's row has the share of its head, which is
native, in the time of all tasks at once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASKS, WAYS, SHOTS, QUERY, INPUTS, WIDTH = 32, 5, 5, 15, 20, 64


def learners() -> dict[str, Any]:
    """One of each, on encoders of their own."""
    from torch import nn

    from pymeta.learners import (
        BayesianHead,
        EncodedMAML,
        MatchingNet,
        MetaLSTM,
        ProtoNet,
        RelationalMAML,
        RelationNet,
        RidgeHead,
    )

    def encoder() -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, WAYS))

    inner: dict[str, Any] = {"loss": "cross_entropy", "lr": 0.1, "steps": 5}
    judge = nn.Sequential(nn.Linear(2 * WIDTH, 8), nn.ReLU(), nn.Linear(8, 1))
    size: dict[str, Any] = {"features": WIDTH, "outputs": WAYS}
    return {
        "ProtoNet": ProtoNet(encoder(), ways=WAYS),
        "MatchingNet": MatchingNet(encoder(), ways=WAYS),
        "RelationNet": RelationNet(encoder(), judge, ways=WAYS),
        "RidgeHead, ridge": RidgeHead(encoder(), loss="cross_entropy", solver="ridge", **size),
        "RidgeHead, newton": RidgeHead(encoder(), loss="bce_with_logits", **size),
        "BayesianHead": BayesianHead(encoder(), **size),
        "MetaLSTM": MetaLSTM(network(), **inner),
        "RelationalMAML": RelationalMAML(network(), features=INPUTS, targets=WAYS, **inner),
        "EncodedMAML": EncodedMAML(encoder(), nn.Linear(WIDTH, WAYS), **inner),
    }


def make_batch(takes_classes: bool) -> tuple[Any, ...]:
    """(xs, ys, xq, yq): classes, or their indicators."""
    import torch

    rows = WAYS * (SHOTS + QUERY)
    y = torch.arange(WAYS).repeat(TASKS, SHOTS + QUERY)
    centres = torch.randn(TASKS, WAYS, INPUTS)
    x = centres.gather(1, y.unsqueeze(-1).expand(-1, -1, INPUTS)) + torch.randn(TASKS, rows, INPUTS)
    if not takes_classes:
        y = torch.nn.functional.one_hot(y, WAYS).float()
    cut = WAYS * SHOTS
    return x[:, :cut], y[:, :cut], x[:, cut:], y[:, cut:]


def measure(learner: Any, rounds: int) -> dict[str, float]:
    """Medians in microseconds, and their ratio."""
    has_inner = hasattr(learner, "maml")
    loss = learner.maml.loss if has_inner else learner.loss
    batch = make_batch(loss.takes_classes)

    def together() -> float:
        learner.zero_grad()
        loss = learner(*batch).loss
        loss.backward()
        return float(loss.detach())

    def one_by_one() -> float:
        learner.zero_grad()
        total = 0.0
        for t in range(TASKS):
            loss = learner(*(v[t : t + 1] for v in batch)).loss / TASKS
            loss.backward()
            total += float(loss.detach())
        return total

    first, second = together(), one_by_one()
    assert abs(first - second) <= 1e-4 * abs(second), f"{first} is not {second}"
    times: dict[str, list[float]] = {"together": [], "loop": []}
    ways: dict[str, Callable[[], float]] = {"together": together, "loop": one_by_one}
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    found = {f"{name}_us": 1e6 * statistics.median(t) for name, t in times.items()}
    found["ratio"] = found["loop_us"] / found["together_us"]
    if type(learner).__name__ == "EncodedMAML":
        found["native_share"] = head_alone(learner, batch, rounds) / found["together_us"]
    return found


def head_alone(learner: Any, batch: tuple[Any, ...], rounds: int) -> float:
    """The median time of an EncodedMAML's head, on features, with the gradient to them; in us."""
    xs, ys, xq, yq = batch
    fs, fq = (
        learner.encoder(x.flatten(0, 1)).detach().view(*x.shape[:2], -1).requires_grad_()
        for x in (xs, xq)
    )
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        learner.maml(fs, ys, fq, yq).loss.backward()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    """Measure all learners and write them."""
    parser = argparse.ArgumentParser(prog="python -m pymeta.bench.learners", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("pymeta-learners.json"), metavar="FILE")
    options = parser.parse_args()

    import torch

    from pymeta.bench import report

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = {name: measure(learner, options.rounds) for name, learner in learners().items()}
    head = ["learner", "all at once, us", "one by one, us", "ratio", "tasks per second", "native"]
    body = [
        [
            name,
            f"{r['together_us']:.0f}",
            f"{r['loop_us']:.0f}",
            f"{r['ratio']:.1f}",
            f"{1e6 * TASKS / r['together_us']:,.0f}",
            f"{100 * r['native_share']:.0f} %" if "native_share" in r else "",
        ]
        for name, r in rows.items()
    ]
    report.write_one(options.out, "Learners, all tasks at once", __doc__, head, body, rows)


if __name__ == "__main__":
    main()
