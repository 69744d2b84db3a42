"""MAML++ on Omniglot: how to train your MAML (Antoniou, Edwards, Storkey 2019, arXiv:1810.09502).

    python examples/maml_plus_plus.py --data omniglot28.npz --shots 1

All of the paper's parts, each of which is an option of pymeta:

- multi-step loss: the query loss counts after every inner step, with weights that go over from
  1/K each to the last step alone (``step_weights``);
- step sizes of each layer and each step, meta-learned (``LearnableLR(per="layer",
  per_step=True)``);
- derivative-order annealing: first order for the first iterations (``maml.first_order``);
- per-step batch normalisation: statistics, scale and shift of each inner step, none of which the
  inner loop adapts (``pymeta.nn.PerStepBatchNorm``, ``adapt=``);
- Adam whose step size falls along a cosine;
- testing with the mean of the probabilities of the five learners that did best on validation tasks.

The network is conv4: four times a 3x3 convolution of 64 channels, batch normalisation, ReLU and
2x2 max pooling, then a linear layer. The data, its split (1,100 characters and their turns for
training, 100 for validation, 423 for testing) and the choice of the iteration by validation tasks
are those of ``omniglot.py``, which says how to make the data file. The loss is the mean cross-
entropy over a task's query rows, weighed over the steps.

The test accuracy is given twice: with query sets normalised by their own statistics, as the paper
and its code have it, where the query drawings of a task see each other; and with the running
statistics of the steps, where each drawing is classified by itself.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from _common import Checkpoint, Episodes, mean_interval, one_torch_thread
from _omniglot import CHANNELS, TEST_QUERIES, Best, evaluate_together, load, split
from torch import Tensor, nn
from tqdm import tqdm

import pymeta
from pymeta.nn import PerStepBatchNorm

LEAST_SHARE = 0.03  # of 1/K: the smallest weight of a step while the weights are annealed


def network(ways: int, steps: int, channels: int = CHANNELS) -> nn.Sequential:
    """conv4 with per-step batch normalisation; the convolutions need no bias before it."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    for inputs in (1, channels, channels, channels):
        layers += [
            nn.Conv2d(inputs, channels, 3, padding=1, bias=False),
            PerStepBatchNorm(channels, steps),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, ways))


def step_weights(steps: int, progress: float) -> Tensor:
    """[steps]: from 1/K each at progress 0 to nearly the last alone at progress 1."""
    even = 1.0 / steps
    other = max(even * (1 - progress), LEAST_SHARE * even)
    weights = torch.full((steps,), other)
    weights[-1] = 1 - (steps - 1) * other
    return weights


def adapted_names(net: nn.Sequential) -> list[str]:
    """What the inner loop adapts: everything but the normalisations."""
    norms = {f"{i}." for i, layer in enumerate(net) if isinstance(layer, PerStepBatchNorm)}
    return [n for n, _ in net.named_parameters() if not any(n.startswith(p) for p in norms)]


def learner(args: argparse.Namespace) -> pymeta.MAML:
    """The MAML module that the options describe."""
    net = network(args.ways, args.steps, args.channels)
    lr = pymeta.LearnableLR(args.inner_lr, per="layer", per_step=True)
    return pymeta.MAML(net, loss="cross_entropy", lr=lr, steps=args.steps, adapt=adapted_names(net))


def train(maml: pymeta.MAML, episodes: Episodes, best: Best, args: argparse.Namespace) -> list:
    """Meta-train; the learning curve [(iteration, loss, validation accuracy, seconds)]."""
    optimizer = torch.optim.Adam(maml.parameters(), args.outer_lr, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations, args.final_lr)
    parts = {"maml": maml, "optimizer": optimizer, "cosine": cosine, "episodes": episodes}
    checkpoint = Checkpoint(args.checkpoint, vars(args), best=best, **parts)
    curve: list[tuple[int, float, float, float]] = checkpoint.load().get("curve", [])
    done, _, _, before = curve[-1] if curve else (0, 0.0, 0.0, 0.0)
    start, loss_sum, since = time.perf_counter() - before, 0.0, 0
    left = range(done + 1, args.iterations + 1)
    for iteration in tqdm(left, disable=args.quiet, mininterval=5.0):
        maml.first_order = iteration <= args.first_order_until
        weights = None
        if iteration <= args.multi_step_until:
            weights = step_weights(args.steps, (iteration - 1) / args.multi_step_until)
        optimizer.zero_grad()
        loss = maml(*episodes(args.tasks), step_weights=weights).loss
        loss.backward()
        optimizer.step()
        cosine.step()
        loss_sum, since = loss_sum + loss.item(), since + 1
        if iteration % args.validate_every == 0 or iteration == args.iterations:
            accuracy = best.look(iteration)
            seconds = time.perf_counter() - start
            curve.append((iteration, loss_sum / since, accuracy, seconds))
            print(
                f"{iteration:7d}  loss {loss_sum / since:.4f}  validation {100 * accuracy:.2f} %"
                f"  {seconds:.0f} s", flush=True,
            )  # fmt: skip
            loss_sum, since = 0.0, 0
            checkpoint.save(curve=curve)
    maml.load_state_dict(best.state)
    return curve


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="the .npz described at the head of omniglot.py")
    add("--form", choices=["bits", "grey"], default="bits", help="which of its arrays")
    add("--ways", type=int, default=5, help="classes in a task")
    add("--shots", type=int, default=1, help="drawings of each class in the support set")
    add("--queries", type=int, default=3, help="drawings of each class in training's query sets")
    add("--mirrored", action="store_true", help="mirror images of training's characters, too")
    add(
        "--shift", type=int, default=0, help="pixels that training's drawings are moved by, at most"
    )
    add("--tasks", type=int, default=8, help="tasks in a meta-batch")
    add("--steps", type=int, default=5, help="inner steps, in training and testing")
    add("--channels", type=int, default=CHANNELS, help="of each convolution")
    add("--iterations", type=int, default=30_000, help="meta-batches")
    add("--multi-step-until", type=int, default=6_000, help="iterations with a multi-step loss")
    add("--first-order-until", type=int, default=0, help="iterations of first order")
    add("--inner-lr", type=float, default=0.3, help="where the step sizes begin")
    add("--outer-lr", type=float, default=1e-3, help="Adam's step size")
    add("--final-lr", type=float, default=1e-5, help="what it falls to")
    add("--train-classes", type=int, default=1100)
    add("--validation-classes", type=int, default=100)
    add("--validation-tasks", type=int, default=300)
    add("--validate-every", type=int, default=1000, help="iterations")
    add("--test-tasks", type=int, default=600)
    add("--ensemble", type=int, default=5, help="learners that testing takes the mean of")
    add("--seed", type=int, default=0)
    add("--checkpoint", type=Path, help="write all here at each validation; go on from it")
    add("--json", type=Path, help="also write the result here")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Train, choose on validation, test; prints and returns the result."""
    args = arguments(argv)
    one_torch_thread()
    torch.manual_seed(args.seed)
    images = load(args.data, args.form)
    parts = split(images, args.train_classes, args.validation_classes, 0, args.mirrored)
    shape = {"ways": args.ways, "shots": args.shots, "scale": 1 / parts.train.max()}
    draws = {"queries": args.queries, "seed": [args.seed, 1], "shift": args.shift}
    episodes = Episodes(parts.train, **draws, **shape)
    held_out = {"queries": TEST_QUERIES, **shape}
    validation = Episodes(parts.validation, seed=2, **held_out)(args.validation_tasks)
    test = Episodes(parts.test, seed=3, **held_out)(args.test_tasks)

    maml = learner(args)
    print(f"pymeta runs this on: {maml.explain()}")
    best = Best(maml, validation, [args.steps], args.ensemble)
    curve = train(maml, episodes, best, args)
    tested: dict[str, tuple[float, float]] = {}
    for name, own in (("accuracy", True), ("accuracy_by_running_statistics", False)):
        maml.train(own)
        for end, learners in (("", best.found), ("_of_one", best.found[:1])):
            states = [state for _, _, state in learners]
            each = evaluate_together(maml, states, test, args.steps)
            mean, half = tested[name + end] = mean_interval(each)
            print(f"{args.ways}-way {args.shots}-shot, {args.test_tasks} test tasks, learners: "
                  f"{len(states)}, statistics: {'own' if own else 'running'}: "
                  f"{100 * mean:.2f} +- {100 * half:.2f} %")  # fmt: skip
    result = tested | {
        "chosen_iterations": [iteration for _, iteration, _ in best.found],
        "validation_accuracy": best.accuracy,
        "step_sizes": maml.lr.detach().tolist(),
        "curve": curve,
        "recipe": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
