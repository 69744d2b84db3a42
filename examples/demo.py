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
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from _common import Batch, Episodes, accuracies, mean_interval, one_torch_thread
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import pymeta

OUT = Path(__file__).parent / "out" / "demo.png"
STEPS = (0, 1, 5, 10, 100)
WAYS, SHOTS = 3, (1, 5)
HELD_OUT = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 4, 1))  # every digit at least once
LARGEST_TURN = 60  # degrees
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
OUTER_RATE = 3e-3
SINUSOID_RATES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
MAML, PRETRAINED, SCRATCH = "MAML", "pre-trained, fine-tuned", "from scratch"

Scores = dict[str, dict[int, NDArray[np.float64]]]  # method -> steps -> one score for each task


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


# ---- learners, the same for both problems -------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What the two problems differ in."""

    loss: str  # of the inner and outer loop
    score: Callable[[torch.Tensor, torch.Tensor], NDArray[np.float64]]  # predictions, targets: [T]
    higher_is_better: bool
    rates: Sequence[float]  # among which step sizes are chosen


def meta_train(
    maml: pymeta.MAML, draw: Callable[[], Batch], iterations: int, what: str, quiet: bool
) -> None:
    """Adam on the meta-gradient, its step size going down to a hundredth."""
    optimizer = torch.optim.Adam(maml.parameters(), OUTER_RATE, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=iterations)
    bar = tqdm(range(iterations), what, unit="meta-batch", disable=quiet, mininterval=0.2)
    for iteration in bar:
        loss = maml(*draw()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if iteration % 100 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


def pre_train(
    network: nn.Module,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    draw: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    iterations: int,
    what: str,
    quiet: bool,
) -> None:
    """Adam on the plain loss of ordinary batches."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    for _ in tqdm(range(iterations), what, unit="batch", disable=quiet, mininterval=0.2):
        x, y = draw()
        optimizer.zero_grad()
        loss(network(x), y).backward()
        optimizer.step()


def scores_after(
    network: nn.Module, problem: Problem, tasks: Batch, rate: float, steps: int
) -> NDArray[np.float64]:
    """Adapt ``network`` to every task by ``steps`` steps of size ``rate``; one score each."""
    maml = pymeta.MAML(network, loss=problem.loss, lr=rate, steps=1)
    models = maml.adapt(tasks.xs, tasks.ys, steps=steps)
    return problem.score(models(tasks.xq), tasks.yq)


def shared_scores(
    networks: Sequence[nn.Module], problem: Problem, tasks: Batch, rate: float, steps: int
) -> NDArray[np.float64]:
    """One score for each task; several networks (random draws) share out the tasks."""
    ends = np.linspace(0, len(tasks.xs), len(networks) + 1).astype(int)
    parts = zip(networks, ends[:-1], ends[1:], strict=True)
    return np.concatenate(
        [scores_after(n, problem, tasks.part(a, b), rate, steps) for n, a, b in parts]
    )


def best_rate(networks: Sequence[nn.Module], problem: Problem, tuning: Batch, steps: int) -> float:
    """The step size with the best mean score on the tuning tasks after so many steps."""
    sign = 1 if problem.higher_is_better else -1
    means = [
        sign * shared_scores(networks, problem, tuning, rate, steps).mean()
        for rate in problem.rates
    ]
    # A diverged run scores NaN, which must not win.
    return problem.rates[int(np.argmax(np.nan_to_num(means, nan=-np.inf)))]


def tuned_scores(
    networks: Sequence[nn.Module], problem: Problem, tuning: Batch, tasks: Batch
) -> dict[int, NDArray[np.float64]]:
    """Scores with, for each number of steps, the step size that is best on the tuning tasks."""

    def tuned(steps: int) -> NDArray[np.float64]:
        rate = best_rate(networks, problem, tuning, steps) if steps else problem.rates[0]
        return shared_scores(networks, problem, tasks, rate, steps)

    return {steps: tuned(steps) for steps in STEPS}


# ---- digits -------------------------------------------------------------------------------------

DIGITS = Problem("cross_entropy", lambda p, y: 100 * accuracies(p, y), True, RATES)
DIGITS_RATE = 1.0  # the inner step size in training


def digit_drawings() -> NDArray[np.float32]:
    """[10, drawings, 8, 8], as many drawings of each digit as there are of the rarest."""
    digits = load_digits()
    fewest = np.bincount(digits.target).min()
    return np.stack([digits.images[digits.target == d][:fewest] for d in range(10)]).astype("f4")


def mixtures(drawings: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """The classes themselves and their mixtures: n classes become n + 2 n (n - 1).

    [n, drawings, 8, 8]: a mixture has the upper half of one class over the lower half of another,
    or the left half of one beside the right half of another, of drawings paired at random.
    """
    rng = np.random.default_rng(seed)
    mixed = list(drawings)
    for one, other in itertools.permutations(drawings, 2):
        other = other[rng.permutation(len(other))]
        mixed.append(np.concatenate([one[:, :4], other[:, 4:]], axis=1))
        mixed.append(np.concatenate([one[:, :, :4], other[:, :, 4:]], axis=2))
    return np.stack(mixed)


def turned(drawings: NDArray[np.float32], copies: int, seed: int) -> NDArray[np.uint8]:
    """``copies`` of each drawing, each turned by its own random angle.

    [digits, drawings, 8, 8] -> image table [digits, 1, drawings * copies, 64], 0..255.
    """
    classes = len(drawings)
    images = np.repeat(drawings.reshape(-1, 8, 8), copies, axis=0)
    angle = np.random.default_rng(seed).uniform(-1, 1, (len(images), 1, 1)) * LARGEST_TURN
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    row, column = np.mgrid[:8, :8] - 3.5
    where = np.broadcast_arrays(
        np.arange(len(images)).reshape(-1, 1, 1),
        cos * row - sin * column + 3.5,
        sin * row + cos * column + 3.5,
    )
    pixels = map_coordinates(images, where, order=1, mode="constant") * (255 / 16)
    return pixels.round().astype(np.uint8).reshape(classes, 1, -1, 64)


def digits_network(outputs: int) -> nn.Sequential:
    """64-128-64-outputs."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, outputs)
    )


def pretrained_digits(table: NDArray[np.uint8], size: Size, what: str, quiet: bool) -> nn.Module:
    """A classifier of the training classes, its last layer replaced by zeros for three new ones."""
    network = digits_network(len(table))
    x = torch.from_numpy(table.reshape(-1, 64).astype(np.float32) / 255)
    y = torch.arange(len(table)).repeat_interleave(len(x) // len(table))

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(x), (256,))
        return x[rows], y[rows]

    pre_train(network, nn.functional.cross_entropy, draw, size.digit_pretraining, what, quiet)
    network[-1] = nn.Linear(64, WAYS)
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    return network


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
    plain = pretrained_digits(table, size, "  ordinary pre-training", quiet)
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


def squared_errors(predictions: torch.Tensor, targets: torch.Tensor) -> NDArray[np.float64]:
    """Mean squared error of each task, [T]."""
    return (predictions - targets).double().square().mean((-2, -1)).numpy()


SINUSOIDS = Problem("mse", squared_errors, False, SINUSOID_RATES)
SINUSOID_RATE = 0.01


class Sinusoids:
    """Draws tasks; support and query rows are [T, rows, 1]."""

    def __init__(self, shots: int, queries: int, seed: int) -> None:
        self.shots, self.queries = shots, queries
        self.rng = np.random.default_rng(seed)
        self.amplitude = self.phase = np.empty(0)

    def __call__(self, tasks: int) -> Batch:
        """The next ``tasks`` tasks; their amplitudes and phases are kept for a plot."""
        self.amplitude = self.rng.uniform(0.1, 5.0, (tasks, 1, 1))
        self.phase = self.rng.uniform(0.0, np.pi, (tasks, 1, 1))
        x = self.rng.uniform(-5.0, 5.0, (tasks, self.shots + self.queries, 1))
        y = self.amplitude * np.sin(x - self.phase)
        x, y = torch.from_numpy(x).float(), torch.from_numpy(y).float()
        support, query = slice(None, self.shots), slice(self.shots, None)
        return Batch(*(v[:, s].contiguous() for s in (support, query) for v in (x, y)))


def sinusoid_network() -> nn.Sequential:
    """1-40-40-1."""
    return nn.Sequential(
        nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    )


@dataclass
class Curves:
    """A few held-out sinusoids and what the networks make of their ten points."""

    x: NDArray[np.float64]  # [points]
    truth: NDArray[np.float64]  # [tasks, points]
    support: Batch
    fits: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # label -> [tasks, points]


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


def curves(network: nn.Module, plain: nn.Module, tuning: Batch) -> Curves:
    """Three held-out sinusoids, before and after adaptation, with the step sizes of the table."""
    sinusoids = Sinusoids(10, 1, seed=14)
    support = sinusoids(3)
    x = np.linspace(-5, 5, 201)
    truth = sinusoids.amplitude[..., 0] * np.sin(x - sinusoids.phase[..., 0])
    shown = Curves(x, truth, support)
    grid = torch.from_numpy(x).float().view(1, -1, 1).repeat(3, 1, 1)

    def fit(label: str, start: nn.Module, steps: int) -> None:
        rate = best_rate([start], SINUSOIDS, tuning, steps)
        maml = pymeta.MAML(start, loss="mse", lr=rate, steps=1)
        fitted = maml.adapt(support.xs, support.ys, steps=steps)(grid)
        shown.fits[label] = fitted[..., 0].numpy()

    fit("MAML before", network, 0)
    fit("MAML, 1 step", network, 1)
    fit("MAML, 10 steps", network, 10)
    fit("pre-trained, 10 steps", plain, 10)
    return shown


# ---- what is shown ------------------------------------------------------------------------------


def table(results: dict[str, Scores]) -> str:
    """One table: mean and 95 % confidence interval for each problem, method and number of steps."""
    heads = ["before" if k == 0 else f"{k} step{'s' * (k > 1)}" for k in STEPS]
    lines = [f"{'':28}" + "".join(f"{head:>15}" for head in heads)]
    for problem, methods in results.items():
        d = 2 if "error" in problem else 1
        lines += ["", problem]
        for method, scores in methods.items():
            cells = ["{:.{d}f} ± {:.{d}f}".format(*mean_interval(scores[k]), d=d) for k in STEPS]
            lines.append(f"  {method:26}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


NOTE = """Mean and 95 % confidence interval over held-out tasks. Every entry has the step size
that was best for it on other tasks, of the training classes."""
COLORS = {MAML: "#0072b2", PRETRAINED: "#d55e00", SCRATCH: "#7f7f7f"}


def figure(results: dict[str, Scores], shown: Curves, path: Path) -> None:
    """Above, adapted sinusoids; below, every column of the table against the number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with pyplot.rc_context(style):
        drawn, axes = pyplot.subplots(2, 3, figsize=(13, 8), layout="constrained")
        drawn.get_layout_engine().set(w_pad=0.1, h_pad=0.12)
        for task, axis in enumerate(axes[0]):
            draw_curves(axis, shown, task)
        axes[0, 0].set_ylabel("y")
        drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
        for axis, (problem, methods) in zip(axes[1], results.items(), strict=True):
            draw_scores(axis, problem, methods)
        axes[1, 1].legend(loc="lower right", bbox_to_anchor=(1.0, 0.12))
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=150)
        pyplot.close(drawn)


def draw_curves(axis, shown: Curves, task: int) -> None:
    """One held-out sinusoid: the truth, its ten points, and the fits."""
    axis.plot(shown.x, shown.truth[task], color="black", lw=3, alpha=0.18, label="truth")
    looks = {
        "MAML before": {"color": COLORS[MAML], "ls": ":", "lw": 1.2},
        "MAML, 1 step": {"color": "#56b4e9", "ls": "--", "lw": 1.6},
        "MAML, 10 steps": {"color": COLORS[MAML], "ls": "-", "lw": 2.0},
        "pre-trained, 10 steps": {"color": COLORS[PRETRAINED], "ls": "-", "lw": 1.4},
    }
    for label, look in looks.items():
        axis.plot(shown.x, shown.fits[label][task], label=label, **look)
    x, y = shown.support.xs[task, :, 0], shown.support.ys[task, :, 0]
    axis.plot(x, y, "o", color="black", ms=5, label="the ten points", zorder=5)
    axis.set(xlabel="x", xlim=(-5, 5), title=f"held-out sinusoid {task + 1}")


def draw_scores(axis, problem: str, methods: Scores) -> None:
    """Mean and confidence interval against the number of inner steps."""
    for method, scores in methods.items():
        means, halves = np.transpose([mean_interval(scores[k]) for k in STEPS])
        axis.errorbar(
            STEPS, means, halves, label=method, color=COLORS[method], marker="o", ms=4, capsize=3
        )
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xticks(STEPS, [str(k) for k in STEPS])
    axis.minorticks_off()
    title, unit = problem.split(": ")
    axis.set(title=title, ylabel=unit, xlabel="steps of gradient descent on the new task")
    axis.grid(axis="y", alpha=0.25)
    if "error" in problem:
        axis.set_ylim(0, None)
    else:
        axis.set_ylim(25, 100)
        axis.axhline(100 / WAYS, color="black", lw=0.8, ls=":")
        axis.text(STEPS[-1], 100 / WAYS - 1, "chance", ha="right", va="top", fontsize=9)


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
