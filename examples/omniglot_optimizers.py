"""What should take the inner steps? MetaLSTM, MAML and plain fine-tuning on the same characters.

    python examples/omniglot_optimizers.py --data omniglot28.npz --shots 1

5-way tasks of Omniglot; data, split and network (784-256-128-64-64-5 with batch normalisation and
ReLU) are those of ``omniglot.py``, the drawings its grey ones. Each method trains for the same
``--seconds`` of processor time, on one thread, without the time of validation:

    sgd        the network learns to tell all training characters apart, 256 drawings a batch, by
               Adam; each task gets a new last layer of zeros and gradient descent on all layers
    maml       a start for gradient descent, as in ``omniglot.py``: one step of 0.5 in training
    meta_lstm  a start, and an LSTM that takes the steps (Ravi, Larochelle 2017), ``--steps`` of
               them, all that it has learned to take

Adam's step size falls linearly to a hundredth with the time. Tasks of the validation characters
choose the best state, the number of test steps of sgd and maml (``--test-steps``) and the step
size of sgd (``--rates``). Each method is then tested once, on the same ``--test-tasks`` tasks from
the test characters, 15 query drawings of each class, which are normalised together.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Batch, Episodes, accuracies, mean_interval, one_torch_thread
from _omniglot import TEST_QUERIES, load, network, split
from numpy.typing import NDArray
from torch import nn

import pymeta
from pymeta.learners import MetaLSTM

METHODS = ("sgd", "maml", "meta_lstm")
AT_ONCE = 20  # tasks of an evaluation in one call
WAYS = 5

Choice = dict[str, Any]  # of a method's settings in testing
Make = Callable[[Choice], Callable[..., Any]]  # what adapts with them, from its supports


@torch.no_grad()
def evaluate(adapt: Callable[..., Any], tasks: Batch) -> NDArray[np.float64]:
    """Accuracy of each task, [T]; `adapt` takes support sets to models."""
    parts = []
    for start in range(0, len(tasks.xs), AT_ONCE):
        part = tasks.part(start, start + AT_ONCE)
        parts.append(accuracies(adapt(part.xs, part.ys)(part.xq), part.yq))
    return np.concatenate(parts)


class Training:
    """The clock of a training, its curve, and the best of what validation has seen.

    Iterate over it for the steps of training; with each comes how much of the time is over.
    """

    def __init__(self, module: nn.Module, make: Make, choices: list[Choice], looked_at: Batch,
                 args: argparse.Namespace) -> None:  # fmt: skip
        self.module, self.make, self.choices = module, make, choices
        self.looked_at, self.args = looked_at, args
        self.best, self.state, self.choice = -1.0, module.state_dict(), choices[0]
        self.curve: list[tuple[int, float, float]] = []
        self.adam = torch.optim.Adam(module.parameters(), args.lr)

    def __iter__(self) -> Iterator[int]:
        spent, start, looks = 0.0, time.process_time(), 1
        for step in itertools.count(1):
            self.adam.param_groups[0]["lr"] = self.args.lr * (1 - 0.99 * spent / self.args.seconds)
            yield step
            spent += time.process_time() - start
            if spent >= self.args.seconds * looks / self.args.looks:
                self._look(step, spent)
                looks += 1
            if spent >= self.args.seconds:
                return
            start = time.process_time()

    def _look(self, step: int, spent: float) -> None:
        found = [float(evaluate(self.make(c), self.looked_at).mean()) for c in self.choices]
        at = int(np.argmax(found))
        self.curve.append((step, found[at], spent))
        print(f"{step:6d}  validation {100 * found[at]:.2f} %  {self.choices[at]}  {spent:.0f} s",
              flush=True)  # fmt: skip
        if found[at] > self.best:
            self.best, self.choice = found[at], self.choices[at]
            self.state = copy.deepcopy(self.module.state_dict())

    def step(self, loss: torch.Tensor) -> None:
        """One of Adam's."""
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()

    def done(self) -> Callable[..., Any]:
        """What adapts as the best one did."""
        self.module.load_state_dict(self.state)
        return self.make(self.choice)


def by_sgd(table: NDArray[np.uint8], scale: float, looked_at: Batch, args: Any) -> Training:
    """Pre-train on all characters and their turns as classes."""
    net = network(WAYS)
    images = table.reshape(-1, *table.shape[2:])  # [classes, drawings, pixels]
    whole = nn.Sequential(*net[:-1], nn.Linear(net[-1].in_features, len(images)))
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    choices = [{"lr": r, "steps": s} for r in args.rates for s in args.test_steps]

    def make(choice: Choice) -> Callable[..., Any]:
        return pymeta.MAML(net, loss="cross_entropy", **choice).adapt

    rng = np.random.default_rng([args.seed, 1])
    training = Training(whole, make, choices, looked_at, args)
    for _ in training:
        classes = rng.integers(len(images), size=256)
        drawn = images[classes, rng.integers(images.shape[1], size=256)]
        x = torch.from_numpy(drawn.astype(np.float32) * np.float32(scale))
        training.step(nn.functional.cross_entropy(whole(x), torch.from_numpy(classes)))
    return training


def by_episodes(method: str, draw: Episodes, looked_at: Batch, args: Any) -> Training:
    """Meta-train `maml` or `meta_lstm`."""
    if method == "maml":
        learner: nn.Module = pymeta.MAML(network(WAYS), loss="cross_entropy", lr=0.5, steps=1)
        tasks, choices = args.tasks, [{"steps": s} for s in args.test_steps]
    else:
        learner = MetaLSTM(
            network(WAYS), loss="cross_entropy", steps=args.steps, lr=args.inner_lr,
            hidden=args.hidden,
        )  # fmt: skip
        tasks, choices = args.lstm_tasks, [{}]

    def make(choice: Choice) -> Callable[..., Any]:
        return lambda xs, ys: learner.adapt(xs, ys, **choice)

    training = Training(learner, make, choices, looked_at, args)
    for _ in training:
        training.step(learner(*draw(tasks)).loss)
    return training


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="the .npz described at the head of _omniglot.py")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--shots", type=int, default=1, help="drawings of each class in a support set")
    add("--seconds", type=float, default=100.0, help="of training, for each method")
    add("--looks", type=int, default=6, help="at the validation tasks while training")
    add("--lr", type=float, default=3e-3, help="Adam's step size")
    add("--tasks", type=int, default=16, help="tasks in a meta-batch of maml")
    add("--lstm-tasks", type=int, default=4, help="and of meta_lstm")
    add("--queries", type=int, default=5, help="drawings of each class in a query set")
    add("--hidden", type=int, default=8, help="width of the LSTM")
    add("--steps", type=int, default=3, help="that the LSTM takes")
    add("--inner-lr", type=float, default=0.5, help="the LSTM's step size at the beginning")
    add("--test-steps", type=int, nargs="+", default=[1, 3, 5, 10])
    add("--rates", type=float, nargs="+", default=[0.05, 0.15, 0.5], help="of sgd")
    add("--train-classes", type=int, default=1100)
    add("--validation-classes", type=int, default=100)
    add("--validation-tasks", type=int, default=200)
    add("--test-tasks", type=int, default=600)
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="also write the result here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Train and test each method; prints and returns the result."""
    args = arguments(argv)
    one_torch_thread()
    parts = split(load(args.data, "grey"), args.train_classes, args.validation_classes, seed=0)
    form = {"ways": WAYS, "shots": args.shots, "scale": 1 / parts.train.max()}
    looked_at = Episodes(parts.validation, queries=TEST_QUERIES, seed=2, **form)(
        args.validation_tasks
    )
    tested = Episodes(parts.test, queries=TEST_QUERIES, seed=3, **form)(args.test_tasks)
    found: dict[str, Any] = {}
    for method in args.methods:
        torch.manual_seed(args.seed)
        start = time.perf_counter()
        if method == "sgd":
            training = by_sgd(parts.train, form["scale"], looked_at, args)
        else:
            draw = Episodes(parts.train, queries=args.queries, seed=[args.seed, 1], **form)
            training = by_episodes(method, draw, looked_at, args)
        wall = time.perf_counter() - start
        mean, half = mean_interval(evaluate(training.done(), tested))
        found[method] = {
            "accuracy": (mean, half), "choice": training.choice, "curve": training.curve,
            "wall": wall,
        }  # fmt: skip
        print(
            f"{method}, {WAYS}-way {args.shots}-shot, {args.test_tasks} test tasks: "
            f"{100 * mean:.2f} +- {100 * half:.2f} %  ({wall:.0f} s)",
            flush=True,
        )
    recipe = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    result = {"result": found, "recipe": recipe}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
