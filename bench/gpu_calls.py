"""Calls on a GPU for tools that watch them: compute-sanitizer and Nsight Compute (see gpu.sh).

    python gpu_calls.py all         small calls of every kind, each kernel in both precisions
    python gpu_calls.py all float32 the same in one: half the time, where that is short
    python gpu_calls.py W1 4096     three meta-gradients of that benchmark case with so many tasks
    python gpu_calls.py W3 1024

Nothing is checked here: the tests do that. Random numbers are drawn on the CPU, so that next to
none of torch's own kernels run under the tools.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from torch import nn

import pymeta

DEVICE = torch.device("cuda")


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers on the device."""
    return torch.randn(*shape, dtype=dtype).to(DEVICE)


def plain_calls(dtype: torch.dtype) -> Iterator[str]:
    """Meta-gradients of linear chains by gradient descent, and adapted models."""
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    x, y = normal(70, 10, 1, dtype=dtype), normal(70, 10, 1, dtype=dtype)
    for first_order in (False, True):
        maml = pymeta.MAML(
            net.to(DEVICE, dtype), loss="mse", lr=0.01, steps=3, first_order=first_order,
            backend="native",
        )  # fmt: skip
        maml(x, y, x, y).loss.backward()
    maml.adapt(x, y)(x)
    yield "MAML, both orders, adapted models"


def normalised_calls(dtype: torch.dtype) -> Iterator[str]:
    """Meta-gradients: each form of tasks, of rates, of rules, all normalisations."""
    layers = (nn.Linear(5, 19), nn.LayerNorm(19), nn.GELU(), nn.Linear(19, 33), nn.ReLU())
    classifier = nn.Sequential(*layers, nn.Linear(33, 3)).to(DEVICE, dtype)
    adam = pymeta.Adam(pymeta.LearnableLR(0.1, "parameter", True), eps=0.01, clip_norm=1.0)
    maml = pymeta.MAML(
        classifier, loss="cross_entropy", optimizer=adam, steps=2, backend="native"
    ).to(DEVICE)
    x = normal(5, 7, 5, dtype=dtype)
    y = torch.randint(0, 3, (5, 7)).to(DEVICE)
    weights = torch.rand(5, 7, dtype=dtype).to(DEVICE)
    sizes = [7, 3, 0, 1, 6]
    out = maml(
        x.clone().requires_grad_(), y, x, y, support_sizes=sizes, query_sizes=sizes,
        support_weights=weights,
    )  # fmt: skip
    out.loss.backward()
    yield "MAML, Adam, learnable rates, padded, weighted"

    normalised = nn.Sequential(nn.Linear(70, 18), nn.BatchNorm1d(18), nn.SiLU(), nn.Linear(18, 2))
    maml = pymeta.MAML(
        normalised.to(DEVICE, dtype), loss="huber", optimizer=pymeta.SGD(0.1, momentum=0.9),
        steps=2, backend="native",
    )  # fmt: skip
    many = [normal(n, 70, dtype=dtype) for n in (4, 90, 17)]
    few = [normal(n, 2, dtype=dtype) for n in (4, 90, 17)]
    maml(many, few, many, few).loss.backward()
    yield "MAML, batch normalisation, ragged"


def adapting_calls(dtype: torch.dtype) -> Iterator[str]:
    """Reptile and fine-tuning: minibatches, validation, early stopping."""
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1)).to(DEVICE, dtype)
    x = [normal(n, 6, dtype=dtype) for n in (13, 5, 29, 8)]
    y = [(torch.rand(len(v)) < 0.4).to(DEVICE, dtype) for v in x]
    reptile = pymeta.Reptile(
        net, loss="bce_with_logits", lr=0.1, steps=5, batch_size=4, backend="native"
    )
    reptile(x, y).loss.backward()
    yield "Reptile"
    finetune = pymeta.FineTune(
        net, loss="bce_with_logits", optimizer=pymeta.Adam(0.01, weight_decay=0.1, decoupled=True),
        epochs=3, batch_size=4, validation=0.3, patience=1, anchor=0.1, backend="native",
    )  # fmt: skip
    finetune(x, y, curves=True).predict_proba(x)
    yield "fine-tuning"
    for optimizer in (pymeta.SGD(0.1, momentum=0.9), pymeta.RMSprop(0.01), pymeta.Adam(0.01)):
        plain = pymeta.FineTune(
            net, loss="bce_with_logits", optimizer=optimizer, epochs=2, batch_size=4,
            backend="native",
        )  # fmt: skip
        plain(x, y).predict_proba(x)
    yield "fine-tuning as lists of operations"


def operator_calls(dtype: torch.dtype) -> Iterator[str]:
    """What else is differentiated: results, starts, rates, targets and weights of each task."""
    net = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 2)).to(DEVICE, dtype)
    maml = pymeta.MAML(net, loss="mse", lr=0.05, steps=2, backend="native")
    x, y = normal(6, 9, 3, dtype=dtype), normal(6, 9, 2, dtype=dtype).requires_grad_()
    weights = torch.rand(6, 9, dtype=dtype).to(DEVICE).requires_grad_()
    rates = torch.full((6,), 0.1, dtype=dtype).to(DEVICE).requires_grad_()
    first = net[0].weight.detach().expand(6, 20, 3).clone().requires_grad_()
    out = maml(
        x, y, x, y, support_weights=weights, start={"0.weight": first}, lr=rates,
        step_weights=[0.3, 0.7],
    )  # fmt: skip
    (out.predictions.sin().sum() + out.task_losses.square().sum()).backward()
    adapted = maml.adapt(x, y.detach(), create_graph=True)
    sum(v.square().sum() for v in adapted.values()).backward()
    yield "MAML, cotangents of predictions, losses and adapted parameters"

    clipped = pymeta.MAML(net, loss="mse", lr=0.05, steps=2, task_clip=1.0, backend="native")
    clipped(x, y, x, y).loss.backward()
    yield "MAML, tasks' shares clipped"

    adam = pymeta.Adam(pymeta.LearnableLR(0.1, "parameter", True), eps=0.01, clip_norm=0.1)
    learned = pymeta.MAML(
        net, loss="mse", optimizer=adam, steps=2, anchor=0.1, backend="native"
    ).to(DEVICE)
    learned(x, y, x, y, query_weights=weights).loss.backward()
    yield "MAML, Adam, learnable rates, a clip and an anchor"


def image_calls(dtype: torch.dtype) -> Iterator[str]:
    """Convolutions, pools and what normalises positions."""
    layers = (nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5, track_running_stats=False))
    net = nn.Sequential(
        *layers, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 6, 3), nn.GroupNorm(2, 6),
        nn.LayerNorm((6, 2, 2)), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    maml = pymeta.MAML(
        net.to(DEVICE, dtype), loss="cross_entropy", lr=0.1, steps=2, backend="native"
    )
    x = torch.randn(4, 5, 2, 9, 9, dtype=dtype).to(DEVICE)
    y = torch.randint(0, 3, (4, 5)).to(DEVICE)
    maml(x, y, x, y).loss.backward()
    yield "MAML, images"


def every_call(dtypes: tuple[torch.dtype, ...]) -> None:
    """Every call once; those of the smallest kernel first, which tools are quickest with."""
    kinds = (plain_calls, operator_calls, adapting_calls, normalised_calls, image_calls)
    for dtype in dtypes:
        for calls in kinds:
            for what in calls(dtype):
                torch.cuda.synchronize()
                print(f"{dtype} {what}", flush=True)
    print("gpu_calls: all calls made", flush=True)


def case(name: str, tasks: int) -> None:
    """Three calls of W1 (one step) or W3 (five steps) as the benchmark has them."""
    widths, loss, rows, lr, steps = {
        "W1": ((1, 40, 40, 1), "mse", 10, 0.01, 1),
        "W3": ((24, 64, 64, 1), "bce_with_logits", 32, 0.1, 5),
    }[name]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    net = nn.Sequential(*layers[:-1]).to(DEVICE)
    maml = pymeta.MAML(net, loss=loss, lr=lr, steps=steps, backend="native")
    x = normal(tasks, rows, widths[0], dtype=torch.float32)
    y = torch.rand(tasks, rows, 1).round().to(DEVICE)
    for _ in range(3):
        maml(x, y, x, y).loss.backward()
    torch.cuda.synchronize()


def main(arguments: list[str]) -> int:
    """Make the calls; the exit code."""
    torch.manual_seed(0)
    if arguments == ["all"]:
        every_call((torch.float32, torch.float64))
    elif arguments == ["all", "float32"]:
        every_call((torch.float32,))
    elif len(arguments) == 2 and arguments[0] in ("W1", "W3"):
        case(arguments[0], int(arguments[1]))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
