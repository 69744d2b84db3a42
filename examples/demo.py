"""pymeta's demonstration: few-shot digits and few-point sinusoids, against the usual alternatives.

    python examples/demo.py            # a minute or two; a table, and a figure in examples/out/

**Digits.** scikit-learn's 8 x 8 handwritten digits, each drawing rotated by a random angle, so
that two drawings of a digit can be far apart in pixels and a learner has to know what a rotation
does. Tasks are 3-way: three digits, with one or five drawings of each to learn from and fifteen
of each to be tested on. Digits are held out three at a time: a learner trained on seven of them
is tested on the other three, which it has never seen. Seven classes are too few for learning to
learn, so the training classes are the seven and their mixtures (one digit's upper or left half
joined to another's lower or right half), 91 in all. Scores are accuracies in percent.

**Sinusoids.** Finn, Abbeel, Levine 2017 (arXiv:1703.03400, section 5.1): ten points of
``a sin(x - p)``, a in [0.1, 5], p in [0, pi], x in [-5, 5]; the mean squared error is measured on
a hundred other points.

Three starting points for the same network, from which it is adapted to each held-out task by
plain gradient descent:

- MAML: meta-trained by pymeta, with one inner step.
- pre-trained: trained in the ordinary way on the same data (classification of the 91 classes, the
  last layer then replaced by zeros for the new ones; regression on all sinusoids together).
- random: training from scratch (several draws of the weights).

For every number of steps, each of the three gets the step size that did best on other tasks from
the training classes, so every column shows the best it could do with that many steps.

The recipe for the digits (mixtures, network, step sizes in training) was tuned on two other
choices of held-out digits, 2 5 7 and 0 4 8; with only ten digits, that is a weak separation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _common import Episodes, accuracies, one_torch_thread
from _digits import digit_drawings, digits_network, mixtures, pretrained_digits, turned
from _plots import MAML, NOTE, PRETRAINED, SCRATCH, WAYS, Curves, figure, table
from _sinusoids import SINUSOID_RATE, SINUSOIDS, Sinusoids, curves, sinusoid_network
from _starts import STEPS, Problem, Scores, meta_train, pre_train, tuned_scores
from numpy.typing import NDArray
from torch import nn

import pymeta

OUT = Path(__file__).parent / "out" / "demo.png"
SHOTS = (1, 5)
HELD_OUT = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 4, 1))  # every digit at least once
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Size:
    """How much of everything; ``quick`` is for the tests."""

    digit_splits: int = len(HELD_OUT)
    digit_iterations: int = 3000
    digit_tasks: int = 200  # held-out tasks in each split
    copies: int = 4  # turned copies of each training drawing
    digit_pretraining: int = 3000  # batches
    sinusoid_pretraining: int = 10_000
    sinusoid_iterations: int = 30_000
    sinusoid_tasks: int = 1000
    tuning_tasks: int = 100
    scratch_networks: int = 5


QUICK = Size(
    digit_splits=1,
    digit_iterations=100,
    digit_tasks=60,
    copies=1,
    digit_pretraining=60,
    sinusoid_pretraining=60,
    sinusoid_iterations=300,
    sinusoid_tasks=60,
    tuning_tasks=20,
    scratch_networks=2,
)


# ---- digits -------------------------------------------------------------------------------------

DIGITS = Problem("cross_entropy", lambda p, y: 100 * accuracies(p, y), True, RATES)
DIGITS_RATE = 1.0  # the inner step size in training


def run_digits_split(held: Sequence[int], size: Size, quiet: bool) -> dict[int, Scores]:
    """Meta-train on seven digits and their mixtures, compare on the three digits held out.

    There is one meta-training, on 1-shot tasks; its network is measured with each of ``SHOTS``.
    """
    drawings = digit_drawings()
    seen = [digit for digit in range(10) if digit not in held]
    table = turned(mixtures(drawings[seen], seed=1), size.copies, seed=2)
    held_out = turned(drawings[list(held)], copies=1, seed=3)
    options = {"ways": WAYS, "scale": 1 / 255}
    episodes = Episodes(table, shots=1, queries=5, seed=4, **options)

    name = f"digits {', '.join(map(str, held))} held out"
    network = digits_network(WAYS)
    maml = pymeta.MAML(network, loss=DIGITS.loss, lr=DIGITS_RATE, steps=1)
    meta_train(maml, lambda: episodes(32), size.digit_iterations, name, quiet)
    plain = pretrained_digits(table, size.digit_pretraining, "  ordinary pre-training", quiet)
    random = [digits_network(WAYS) for _ in range(size.scratch_networks)]

    def compare(shots: int) -> Scores:
        options.update(shots=shots, queries=15)
        tuning = Episodes(table, seed=5, **options)(size.tuning_tasks)
        tasks = Episodes(held_out, seed=6, **options)(size.digit_tasks)
        starts = {MAML: [network], PRETRAINED: [plain], SCRATCH: random}
        return {name: tuned_scores(n, DIGITS, tuning, tasks) for name, n in starts.items()}

    return {shots: compare(shots) for shots in SHOTS}


def run_digits(size: Size, quiet: bool) -> dict[str, Scores]:
    """All splits together; an interval is over tasks, of these splits."""
    splits = [run_digits_split(held, size, quiet) for held in HELD_OUT[: size.digit_splits]]

    def joined(shots: int, method: str) -> dict[int, NDArray[np.float64]]:
        return {k: np.concatenate([split[shots][method][k] for split in splits]) for k in STEPS}

    return {
        f"digits, {WAYS}-way {shots}-shot: accuracy, %": {
            method: joined(shots, method) for method in (MAML, PRETRAINED, SCRATCH)
        }
        for shots in SHOTS
    }


# ---- sinusoids ----------------------------------------------------------------------------------


def run_sinusoids(size: Size, quiet: bool) -> tuple[Scores, Curves]:
    """Meta-train, compare all methods, and draw some curves."""
    draw = Sinusoids(10, 10, seed=11)
    tuning = Sinusoids(10, 100, seed=12)(size.tuning_tasks)
    tasks = Sinusoids(10, 100, seed=13)(size.sinusoid_tasks)
    network, plain = sinusoid_network(), sinusoid_network()
    maml = pymeta.MAML(network, loss=SINUSOIDS.loss, lr=SINUSOID_RATE, steps=1)
    meta_train(maml, lambda: draw(25), size.sinusoid_iterations, "sinusoids", quiet)

    def rows() -> tuple[torch.Tensor, torch.Tensor]:
        batch = draw(25)
        return batch.xq.flatten(0, 1), batch.yq.flatten(0, 1)

    pre_train(
        plain,
        nn.functional.mse_loss,
        rows,
        size.sinusoid_pretraining,
        "  ordinary pre-training",
        quiet,
    )
    random = [sinusoid_network() for _ in range(size.scratch_networks)]
    starts = {MAML: [network], PRETRAINED: [plain], SCRATCH: random}
    scores = {name: tuned_scores(n, SINUSOIDS, tuning, tasks) for name, n in starts.items()}
    return scores, curves(network, plain, tuning)


def run(size: Size, path: Path, quiet: bool = False) -> dict[str, Scores]:
    """Everything: train, compare, print the table, write the figure."""
    start = time.perf_counter()
    torch.manual_seed(0)
    results = run_digits(size, quiet)
    results["sinusoids, 10 points: mean squared error"], shown = run_sinusoids(size, quiet)
    figure(results, shown, path)
    print(table(results))
    seconds = time.perf_counter() - start
    print(f"\n{NOTE}\n{seconds:.0f} s in all; figure in {path}")
    return results


def main(argv: Iterable[str] | None = None) -> dict[str, Scores]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the figure")
    parser.add_argument("--quick", action="store_true", help="seconds, and no meaningful numbers")
    args = parser.parse_args(argv if argv is None else list(argv))
    one_torch_thread()
    print(f"pymeta runs this on: {where()}")
    return run(QUICK if args.quick else Size(), args.out, quiet=args.quick)


def where() -> str:
    """Which of pymeta's backends runs the sinusoid network."""
    return pymeta.MAML(sinusoid_network(), loss="mse", lr=SINUSOID_RATE, steps=1).explain()


if __name__ == "__main__":
    main()
