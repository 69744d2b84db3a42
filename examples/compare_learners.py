"""All learners on the same tasks, in one table.

    python examples/compare_learners.py --quick
    python examples/compare_learners.py --suite functions --iterations 20000
    python examples/compare_learners.py --suite images --data omniglot28.npz

Two suites. ``functions``: regression to sinusoids, lines, quadratics and cubics mixed
(``_functions.py``), ``--shots`` points with noise, the mean squared error against the function on
50 other points. ``images``: ``--ways`` classes of ``--shots`` images, classes that training never
saw, the accuracy on ten other images of each; of scikit-learn's digits (6 for training, 4 for
testing, 3 ways, each quarter turn of a training digit a class of its own) or, with ``--data``, of
Omniglot's characters (1,200 and 423, 5 ways), shrunk to 14 x 14.

Every learner has the same network (1-40-40-1, or pixels-64-64-ways, ReLU), gets the same
meta-batches in the same order, as many as ``--iterations``, and is tested on the same
``--test-tasks`` tasks. The outer step is Adam's at 1e-3 falling linearly to a fiftieth, with
gradients cut to a norm of 10. The inner steps are five of plain gradient descent, at a step size
of 0.01 for the functions and 0.3 for images, gradients cut to a norm of 10. Neither was tuned for
one learner; implicit MAML has 16 steps, without a cut. RelationalMAML has a gate and a shift for
each number of the functions' small network, and for each unit of the images' one (chosen among the
two on 1,000 mixed functions of five points, from another seed than training's and the test's).
``--quick`` is 400 meta-batches and 200 test tasks.

In the table: the mean over test tasks with its 95 % interval, and the time of a meta-batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import Episodes, accuracies, mean_interval, one_torch_thread
from _functions import Functions
from torch import nn

import pymeta
from pymeta import learners

STEPS, CLIP = 5, 10.0
TEST_AT_ONCE = 50


class Suite(NamedTuple):
    """A problem for all learners.

    Attributes:
        widths: of the network.
        loss: of support and query sets.
        lr: the inner step size.
        draw: gives the next training meta-batch (xs, ys, xq, yq) of so many tasks.
        test: the test tasks.
        score: (predictions, yq) to a number for each task [T].
        unit: what scores are multiplied by and called in the table.
        per: what RelationalMAML's gates and shifts are of.
    """

    widths: tuple[int, ...]
    loss: str
    lr: float
    draw: Callable[[int], Any]
    test: Any
    score: Callable[[torch.Tensor, torch.Tensor], Any]
    unit: tuple[float, str]
    per: str

    def network(self, last: bool = True) -> nn.Sequential:
        """A new network, or what is below its last layer."""
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(self.widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1] if last else layers[:-2])


# ---- problems -----------------------------------------------------------------------------------


def functions(args: argparse.Namespace) -> Suite:
    """Four families of functions."""
    test = Functions("mixed", args.shots, 50, seed=2)(args.test_tasks)
    return Suite(
        (1, 40, 40, 1), "mse", 0.01, Functions("mixed", args.shots, 10, seed=1), test,
        lambda predictions, y: (predictions - y).square().mean((1, 2)).numpy(),
        (1.0, "mean squared error"), "element",
    )  # fmt: skip


def images(args: argparse.Namespace) -> Suite:
    """Digits of scikit-learn, or Omniglot's characters."""
    if args.data:
        from _omniglot import load

        pictures = load(args.data, "grey").reshape(-1, 20, 14, 2, 14, 2).mean((3, 5))
        order = np.random.default_rng(0).permutation(len(pictures))
        train, test = pictures[order[:1200]], pictures[order[1200:]]
        ways, scale, turns = args.ways or 5, 1 / 255, range(4)
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        least = min(int((digits.target == k).sum()) for k in range(10))
        each = np.stack([digits.images[digits.target == k][:least] for k in range(10)])
        order = np.random.default_rng(0).permutation(10)
        train, test = each[order[:6]], each[order[6:]]
        ways, scale, turns = args.ways or 3, 1 / 16, range(4)
    turned = np.stack([np.rot90(train, k, axes=(-2, -1)) for k in turns], axis=1)

    def table(pictures: np.ndarray) -> np.ndarray:
        return pictures.reshape(*pictures.shape[:3], -1).astype(np.uint8)

    shape = {"ways": ways, "shots": args.shots, "queries": 10, "scale": scale}
    draw = Episodes(table(turned), seed=1, **shape)
    held_out = Episodes(table(test[:, None]), seed=2, **shape)
    pixels = int(np.prod(train.shape[2:]))
    return Suite(
        (pixels, 64, 64, ways), "cross_entropy", 0.3, draw, held_out(args.test_tasks),
        accuracies, (100.0, "accuracy %"), "unit",
    )  # fmt: skip


# ---- learners -----------------------------------------------------------------------------------


def sgd(suite: Suite) -> pymeta.SGD:
    """The inner optimiser of all that have one."""
    return pymeta.SGD(suite.lr, clip_norm=CLIP)


def maml(suite: Suite, **options: Any) -> pymeta.MAML:
    """MAML with other options."""
    options = {"optimizer": sgd(suite), **options}
    return pymeta.MAML(suite.network(), loss=suite.loss, steps=STEPS, **options)


def with_learned_rates(suite: Suite) -> pymeta.MAML:
    """A step size for each layer and step, as in MAML++ (Antoniou et al. 2019)."""
    rate = pymeta.LearnableLR(suite.lr, per="layer", per_step=True)
    return maml(suite, optimizer=pymeta.SGD(rate, clip_norm=CLIP))


def implicit(suite: Suite) -> pymeta.MAML:
    """The gradient of the inner minimum; 16 steps and the strength are those of the paper."""
    return pymeta.MAML(
        suite.network(), loss=suite.loss, lr=suite.lr, steps=16, implicit=pymeta.Implicit(2.0)
    )


def relational(suite: Suite) -> nn.Module:
    """A start for each task."""
    return learners.RelationalMAML(
        suite.network(), loss=suite.loss, features=suite.widths[0], targets=suite.widths[-1],
        optimizer=sgd(suite), steps=STEPS, per=suite.per,
    )  # fmt: skip


def encoded(suite: Suite) -> nn.Module:
    """The last layer adapts, on features of the others."""
    return learners.EncodedMAML(
        suite.network(last=False), nn.Linear(suite.widths[-2], suite.widths[-1]), loss=suite.loss,
        optimizer=sgd(suite), steps=STEPS,
    )  # fmt: skip


def head(suite: Suite, kind: type, **options: Any) -> nn.Module:
    """A closed form in the place of the last layer."""
    size = {"features": suite.widths[-2], "outputs": suite.widths[-1]}
    return kind(suite.network(last=False), **size, **options)


def relation(suite: Suite) -> nn.Module:
    """A relation network with a judge of two layers."""
    width = suite.widths[-2]
    judge = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))
    return learners.RelationNet(suite.network(last=False), judge, average=True)


BOTH: dict[str, Callable[[Suite], nn.Module]] = {
    "MAML": maml,
    "MAML, first order": lambda suite: maml(suite, first_order=True),
    "MAML, learned step sizes": with_learned_rates,
    "MAML, implicit": implicit,
    "Reptile": lambda suite: pymeta.Reptile(
        suite.network(), loss=suite.loss, optimizer=sgd(suite), steps=STEPS
    ),
    "EncodedMAML": encoded,
    "MetaLSTM": lambda suite: learners.MetaLSTM(
        suite.network(), loss=suite.loss, steps=STEPS, lr=suite.lr
    ),
    "RelationalMAML": relational,
}
OF: dict[str, dict[str, Callable[[Suite], nn.Module]]] = {
    "functions": {
        **BOTH,
        "RidgeHead": lambda suite: head(suite, learners.RidgeHead, loss="mse"),
        "BayesianHead": lambda suite: head(suite, learners.BayesianHead),
    },
    "images": {
        **BOTH,
        "RidgeHead": lambda suite: head(
            suite, learners.RidgeHead, loss="cross_entropy", solver="ridge"
        ),
        "ProtoNet": lambda suite: learners.ProtoNet(suite.network(last=False)),
        "MatchingNet": lambda suite: learners.MatchingNet(
            suite.network(last=False), temperature=0.1, learn_temperature=True
        ),
        "RelationNet": relation,
    },
}


def train(learner: nn.Module, suite: Suite, iterations: int, tasks: int) -> float:
    """Meta-train; the seconds it took."""
    adam = torch.optim.Adam(learner.parameters(), 1e-3)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.02, total_iters=max(iterations, 1))
    start = time.perf_counter()
    for _ in range(iterations):
        xs, ys, xq, yq = suite.draw(tasks)
        if isinstance(learner, pymeta.Reptile):  # which has no query sets
            loss = learner(torch.cat([xs, xq], 1), torch.cat([ys, yq], 1)).loss
        else:
            loss = learner(xs, ys, xq, yq).loss
        adam.zero_grad()
        loss.backward()
        if not isinstance(learner, pymeta.Reptile):  # whose gradient is a difference of weights
            nn.utils.clip_grad_norm_(learner.parameters(), CLIP)
        adam.step()
        decay.step()
    return time.perf_counter() - start


@torch.no_grad()
def tested(learner: nn.Module, suite: Suite) -> tuple[float, float]:
    """The mean score over the test tasks and the half width of its interval."""
    scores = []
    for start in range(0, len(suite.test[0]), TEST_AT_ONCE):
        xs, ys, xq, yq = (v[start : start + TEST_AT_ONCE] for v in suite.test)
        scores.append(suite.score(learner.adapt(xs, ys)(xq), yq))
    return mean_interval(suite.unit[0] * np.concatenate(scores))


def compare(suite: Suite, chosen: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Train and test all learners, each in its turn, and print the table's rows."""
    print(f"| {'learner':25s} | {suite.unit[1]:>20s} | ms a meta-batch |\n|---|---:|---:|")
    state = suite.draw.random.get_state() if isinstance(suite.draw, Functions) else None
    bits = None if state is not None else suite.draw.rng.bit_generator.state
    rows = {}
    for name, make in chosen.items():
        if state is not None:
            suite.draw.random.set_state(state)
        else:
            suite.draw.rng.bit_generator.state = bits
        torch.manual_seed(args.seed)
        learner = make(suite)
        seconds = train(learner, suite, args.iterations, args.tasks)
        mean, half = tested(learner, suite)
        each = 1e3 * seconds / max(args.iterations, 1)
        rows[name] = {"mean": mean, "interval": half, "ms": each}
        digits = 1 if suite.unit[0] == 100 else 3
        score = f"{mean:.{digits}f} ± {half:.{digits}f}"
        print(f"| {name:25s} | {score:>20s} | {each:15.1f} |", flush=True)
    return rows


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=[*OF, "both"], default="both")
    add("--data", help="the .npz described at the head of _omniglot.py, in place of digits")
    add("--quick", action="store_true", help="400 meta-batches, 200 test tasks")
    add("--learners", nargs="+", metavar="NAME", help="these alone")
    add("--iterations", type=int, default=10_000, help="meta-batches")
    add("--tasks", type=int, default=16, help="tasks in a meta-batch")
    add("--shots", type=int, help="rows of each class, or of a function; default 1 and 10")
    add("--ways", type=int, help="classes in a task; default 3 of digits, 5 of characters")
    add("--test-tasks", type=int, default=1000)
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="also write the result here")
    args = parser.parse_args(argv)
    if args.quick:
        args.iterations, args.test_tasks = 400, 200
    return args


def main(argv: list[str] | None = None) -> dict:
    """Compare on one suite or on both; prints the tables and returns them."""
    args = arguments(argv)
    one_torch_thread()
    warnings.filterwarnings("ignore", "implicit: the loss of")  # its strength is the paper's
    found = {}
    for name in OF if args.suite == "both" else [args.suite]:
        chosen = OF[name]
        unknown = sorted(set(args.learners or ()) - set(itertools.chain(*OF.values())))
        if unknown:
            raise SystemExit(f"--learners: there is no {unknown[0]!r}: {', '.join(chosen)}")
        if args.learners:
            chosen = {n: make for n, make in chosen.items() if n in args.learners}
        default = {"functions": 10, "images": 1}[name]
        these = argparse.Namespace(**{**vars(args), "shots": args.shots or default})
        suite = {"functions": functions, "images": images}[name](these)
        print(f"\n{name}, {these.shots} shots, {args.iterations} meta-batches of {args.tasks}\n")
        found[name] = compare(suite, chosen, these)
    if args.json:
        args.json.write_text(json.dumps({"result": found, "recipe": vars(args)}, default=str))
    return found


if __name__ == "__main__":
    main()
