"""Few-shot learning of handwritten characters by comparison, with the convolutional network.

    python examples/omniglot_metric.py --data omniglot28.npz
    python examples/omniglot_metric.py --data omniglot28.npz --learner matching --bf16

Prototypical networks (Snell, Swersky, Zemel 2017, arXiv:1703.05175), matching networks (Vinyals et
al. 2016, arXiv:1606.04080) and relation networks (Sung et al. 2018, arXiv:1711.06025) on the same
encoder: four times a 3x3 convolution of 64 channels, batch normalisation, ReLU and 2x2 max pooling.
The data file and the split into 1,100, 100 and 423 characters are those of ``omniglot.py``; in
training each rotation of a character is a class of its own.

As in Snell et al., training tasks have more classes than the tasks that are tested
(``--train-ways``), and Adam's step size begins at 1e-3; here it falls linearly to a hundredth, by
whichever of ``--iterations`` and ``--seconds`` is nearer to its end. Every so often the learner is
looked at on tasks of the validation characters, and the best state is kept. It is tested once for
each of ``--test``: that many ways and shots, 15 query drawings of each class, in float32 whatever
the training was in.

``--bf16`` computes the encoder's convolutions in bfloat16 while training, which on a processor that
has it is about twice as fast.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from _common import Batch, Checkpoint, Episodes, accuracies, mean_interval, one_torch_thread
from _omniglot import TEST_QUERIES, Kept, load, split
from numpy.typing import NDArray
from torch import nn

from pymeta.learners import EncodedLearner, MatchingNet, ProtoNet, RelationNet

AT_ONCE = 20  # tasks of an evaluation in one call


class Conv4(nn.Module):
    """The encoder: rows [N, 784] to features [N, channels], or to maps [N, channels, 3, 3].

    ``pools`` is how many of the four blocks end with a pooling; with two, 28 x 28 pixels are a map
    of 7 x 7, which the third and fourth block keep.
    """

    def __init__(self, channels: int, pools: int, bf16: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
        for block, fan_in in enumerate((1, channels, channels, channels)):
            layers += [
                nn.Conv2d(fan_in, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            if block < pools:
                layers.append(nn.MaxPool2d(2))
        if pools == 4:
            layers.append(nn.Flatten())
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.bf16 = bf16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of rows."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16 and self.training):
            features: torch.Tensor = self.layers(x)
        return features.float()


def judge(channels: int) -> nn.Sequential:
    """What relates two maps of 7 x 7: two blocks of convolutions and two linear layers."""
    layers: list[nn.Module] = []
    for fan_in in (2 * channels, channels):
        layers += [
            nn.Conv2d(fan_in, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    layers += [nn.Flatten(), nn.Linear(channels, 8), nn.ReLU(), nn.Linear(8, 1)]
    return nn.Sequential(*layers)


def learner(kind: str, channels: int, bf16: bool) -> EncodedLearner:
    """The learner that an option names."""
    if kind == "relation":
        # Of one shot the mean is the paper's sum; of more, it is what was seen in training.
        return RelationNet(Conv4(channels, 2, bf16), judge(channels), average=True)
    encoder = Conv4(channels, 4, bf16)
    if kind == "matching":
        return MatchingNet(encoder, temperature=0.1, learn_temperature=True)
    return ProtoNet(encoder, learn_temperature=False)


@torch.no_grad()
def evaluate(net: EncodedLearner, tasks: Batch) -> NDArray[np.float64]:
    """Accuracy of each task, [T]."""
    net.eval()
    parts = []
    for start in range(0, len(tasks.xs), AT_ONCE):
        part = tasks.part(start, start + AT_ONCE)
        parts.append(accuracies(net(part.xs, part.ys, part.xq).predictions, part.yq))
    net.train()
    return np.concatenate(parts)


def train(net: EncodedLearner, episodes: Episodes, validation: Batch, args: argparse.Namespace):
    """Train; the best state is loaded. The curve: [(iteration, loss, accuracy, seconds)]."""
    adam = torch.optim.Adam(net.parameters(), args.lr)
    kept, losses = Kept(net), []
    parts = {"net": net, "adam": adam, "episodes": episodes, "best": kept}
    checkpoint = Checkpoint(args.checkpoint, vars(args), free=("iterations", "seconds"), **parts)
    curve: list[tuple[int, float, float, float]] = checkpoint.load().get("curve", [])
    iteration, _, _, before = curve[-1] if curve else (0, 0.0, 0.0, 0.0)

    def share_done() -> float:
        share = iteration / args.iterations if args.iterations else 1.0
        return max(share, before / args.seconds)

    start, progress = time.perf_counter(), share_done()
    while progress < 1:
        adam.param_groups[0]["lr"] = args.lr * (1 - 0.99 * progress)
        loss = net(*episodes(1)).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
        iteration += 1
        before, start = before + time.perf_counter() - start, time.perf_counter()
        progress = share_done()
        if iteration % args.validate_every == 0 or progress >= 1:
            accuracy = float(evaluate(net, validation).mean())
            curve.append((iteration, float(np.mean(losses)), accuracy, before))
            print(
                f"{iteration:6d}  loss {curve[-1][1]:.4f}  validation {100 * accuracy:.2f} %  "
                f"{before:.0f} s",
                flush=True,
            )
            kept.offer(accuracy, iteration)
            checkpoint.save(curve=curve)
            losses, start = [], time.perf_counter()
    net.load_state_dict(kept.state)
    return curve


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="the .npz described at the head of _omniglot.py")
    add("--form", choices=["bits", "grey"], default="grey", help="which of its arrays")
    add("--learner", choices=["protonet", "matching", "relation"], default="protonet")
    add("--channels", type=int, default=64)
    add("--train-ways", type=int, default=60, help="classes in a training task")
    add("--shots", type=int, default=1, help="drawings of each class in a support set")
    add("--queries", type=int, default=5, help="drawings of each class in a query set")
    add("--iterations", type=int, default=20_000, help="training tasks; 0: test a checkpoint")
    add("--seconds", type=float, default=math.inf, help="stop training after so many, if sooner")
    add("--lr", type=float, default=1e-3, help="Adam's step size")
    add("--bf16", action="store_true", help="convolutions in bfloat16 while training")
    add("--train-classes", type=int, default=1100)
    add("--validation-classes", type=int, default=100)
    add("--validation-tasks", type=int, default=200)
    add("--validate-every", type=int, default=500, help="iterations")
    add("--test-tasks", type=int, default=600)
    add(
        "--test",
        nargs="+",
        default=["5x1", "5x5", "20x1", "20x5"],
        metavar="WAYSxSHOTS",
        help="what is tested",
    )
    add("--seed", type=int, default=0)
    add("--checkpoint", type=Path, help="write all here at each validation; go on from it")
    add("--json", type=Path, help="also write the result here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Train, choose on validation, test once; prints and returns the result."""
    args = arguments(argv)
    one_torch_thread()
    torch.manual_seed(args.seed)
    parts = split(load(args.data, args.form), args.train_classes, args.validation_classes, seed=0)
    scale = 1 / parts.train.max()
    episodes = Episodes(
        parts.train,
        ways=args.train_ways,
        shots=args.shots,
        queries=args.queries,
        scale=scale,
        seed=[args.seed, 1],
    )
    held_out = {"queries": TEST_QUERIES, "scale": scale}
    ways, shots = (int(v) for v in args.test[0].split("x"))
    looked_at = Episodes(parts.validation, ways=ways, shots=shots, seed=2, **held_out)
    net = learner(args.learner, args.channels, args.bf16)
    curve = train(net, episodes, looked_at(args.validation_tasks), args)
    found = {}
    for form in args.test:
        ways, shots = (int(v) for v in form.split("x"))
        draw = Episodes(parts.test, ways=ways, shots=shots, seed=3, **held_out)
        groups = (
            draw(min(AT_ONCE, args.test_tasks - n)) for n in range(0, args.test_tasks, AT_ONCE)
        )
        found[form] = mean_interval(np.concatenate([evaluate(net, tasks) for tasks in groups]))
        mean, half = found[form]
        print(
            f"{args.learner}, {ways}-way {shots}-shot, {args.test_tasks} test tasks: "
            f"{100 * mean:.2f} +- {100 * half:.2f} %",
            flush=True,
        )
    recipe = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    result = {"accuracy": found, "curve": curve, "recipe": recipe}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
