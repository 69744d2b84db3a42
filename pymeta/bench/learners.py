"""All tasks at once against one by one: `python -m pymeta.bench.learners`.

32 tasks of 5-way 5-shot with 15 query rows of each class, on features of width 64 (20-64-64 ReLU):
loss and gradient of the learners of `pymeta.learners`, for all tasks in one call, and in a loop of
torch over tasks, which is the same learner called with each task. Before the clock starts the
losses of both are compared. Both take turns, on one thread; medians. MetaLSTM and RelationalMAML
have a network 20-8-5 and five inner steps; EncodedMAML's row has the share of its head, which is
native, in the time of all tasks at once. MetaLSTM, whose gradients and cell are native one by one
as well, has a third contestant: a loop over tasks without pymeta, of autograd and nn.LSTMCell.
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


def meta_lstm_in_torch(learner: Any, xs: Any, ys: Any, xq: Any, yq: Any) -> Any:
    """The loss of one task by plain torch: x [rows, in] and y [rows] of both sets."""
    import torch
    from torch.func import functional_call
    from torch.nn.functional import cross_entropy

    from pymeta.reference.cell import log_and_sign

    shapes = {name: p.shape for name, p in learner.model.named_parameters()}
    theta = torch.cat([p.flatten() for p in learner.model.parameters()])
    hidden = s = theta.new_zeros(len(theta), learner.lstm.hidden_size)
    forget = step = theta.new_zeros(len(theta), 1)

    def loss_at(flat: Any, x: Any, y: Any) -> Any:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        own = {n: v.view(shapes[n]) for n, v in zip(shapes, parts, strict=True)}
        return cross_entropy(functional_call(learner.model, own, (x,)), y)

    for _ in range(learner.steps):
        at = theta.detach().requires_grad_()
        loss = loss_at(at, xs, ys)
        (slopes,) = torch.autograd.grad(loss, at)
        both = log_and_sign(slopes, learner.p), log_and_sign(loss.detach(), learner.p)
        seen = torch.stack([*both[0], *(v.expand_as(slopes) for v in both[1])], 1)
        hidden, s = learner.lstm(seen, (hidden, s))
        before = torch.cat([hidden, theta.unsqueeze(1)], 1)
        forget = learner.forget_gate(torch.cat([before, forget], 1)).sigmoid()
        step = learner.input_gate(torch.cat([before, step], 1)).sigmoid()
        theta = forget[:, 0] * theta - step[:, 0] * slopes
    return loss_at(theta, xq, yq)


def measure(learner: Any, rounds: int) -> dict[str, float]:
    """Medians in microseconds, and their ratios."""
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

    def in_torch() -> float:
        learner.zero_grad()
        total = 0.0
        for t in range(TASKS):
            loss = meta_lstm_in_torch(learner, *(v[t] for v in batch)) / TASKS
            loss.backward()
            total += float(loss.detach())
        return total

    ways: dict[str, Callable[[], float]] = {"together": together, "loop": one_by_one}
    if type(learner).__name__ == "MetaLSTM":
        ways["torch"] = in_torch
    losses = {name: run() for name, run in ways.items()}
    for name, loss in losses.items():
        right = abs(loss - losses["together"]) <= 1e-4 * abs(loss)
        assert right, f"{name}: {loss} is not {losses['together']}"
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    found = {f"{name}_us": 1e6 * statistics.median(t) for name, t in times.items()}
    found["ratio"] = found["loop_us"] / found["together_us"]
    if "torch" in ways:
        found["torch_ratio"] = found["torch_us"] / found["together_us"]
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
    parser.add_argument("--learners", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--out", type=Path, default=Path("pymeta-learners.json"), metavar="FILE")
    options = parser.parse_args()

    import torch

    from pymeta.bench import report

    torch.set_num_threads(1)
    torch.manual_seed(0)
    chosen = learners()
    unknown = sorted({*(options.learners or ())} - {*chosen})
    if unknown:
        parser.error(f"--learners: there is no {unknown[0]!r}: {', '.join(chosen)}")
    rows = {
        name: measure(learner, options.rounds)
        for name, learner in chosen.items()
        if not options.learners or name in options.learners
    }
    head = ["learner", "all at once, us", "one by one, us", "ratio", "a loop of torch", "ratio",
            "tasks per second", "native"]  # fmt: skip
    body = [
        [
            name,
            f"{r['together_us']:.0f}",
            f"{r['loop_us']:.0f}",
            f"{r['ratio']:.1f}",
            f"{r['torch_us']:.0f}" if "torch_us" in r else "",
            f"{r['torch_ratio']:.1f}" if "torch_ratio" in r else "",
            f"{1e6 * TASKS / r['together_us']:,.0f}",
            f"{100 * r['native_share']:.0f} %" if "native_share" in r else "",
        ]
        for name, r in rows.items()
    ]
    report.write_one(options.out, "Learners, all tasks at once", __doc__, head, body, rows)


if __name__ == "__main__":
    main()
