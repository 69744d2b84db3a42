"""Inputs and step sizes far from 1: no intermediate result leaves the range where torch's do not.

With inputs s x, a first weight w / s and a step size lr / s^2, and this weight alone adapted, the
inner loop does what it does with s = 1: its gradients by that weight are s times as large, those by
inputs 1 / s times, that of the step size s^2 times. Every number on torch's way to them is within
the range of a float32. H v is not, before it is multiplied by the step size.
"""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import assert_close, batch, gradients
from kernels import PATHS, using
from torch import nn

import pymeta
from pymeta import native

# H v is s^3, here 10^43 and 10^-43
SCALES = {"large inputs": 2.0**48, "small inputs": 2.0**-48}


class Net:
    """A network whose first layer is scaled, and inputs for it."""

    def __init__(self, first: nn.Module, *others: nn.Module, inputs: int, support: int = 5) -> None:
        """Tasks of `support` rows of `inputs` numbers."""
        self.model = nn.Sequential(first, *others)
        outputs = [m for m in self.model if isinstance(m, nn.Linear)][-1].out_features
        self.data = batch(
            support=support, inputs=inputs, out=outputs, tasks=18, dtype=torch.float32
        )

    def found(
        self,
        scale: float,
        dtype: torch.dtype,
        backend: str,
        *,
        rates: Sequence[float] = (0.05, 0.05, 0.05),
        of_all: bool = True,
        clip: float | None = None,
        **options: Any,
    ) -> list[torch.Tensor]:
        """Its meta-gradients, scaled back: of parameters, and `of_all` step sizes, inputs, targets.

        Without the latter and without options a call is a plain one. `rates` are those of its
        steps and `clip` that of a task's share before they are scaled.
        """
        net = copy.deepcopy(self.model).to(dtype)
        name, first = next(net.named_parameters())
        with torch.no_grad():
            first.div_(scale)
        xs, ys, xq, yq = (v.to(dtype) for v in self.data)
        xs, xq = scale * xs, scale * xq
        maml = pymeta.MAML(
            net, loss="mse", lr=pymeta.LearnableLR(1.0, per_step=True), steps=len(rates),
            adapt=[name], backend=backend, task_clip=None if clip is None else clip * scale,
        )  # fmt: skip
        with torch.no_grad():
            maml.lr.copy_(torch.tensor(rates, dtype=torch.float64)[:, None] / scale**2)
        for given in (xs, ys, maml.lr):
            given.requires_grad_(of_all)
        loss = maml(xs, ys, xq, yq, **options).loss
        more = [maml.lr, xs, ys] if of_all else []
        by_first, *rest = (g.double() for g in gradients(loss, *net.parameters(), *more))
        others = len(list(net.parameters())) - 1
        scales = [1.0] * others + [1 / scale**2, scale, 1.0][: len(more)]
        return [by_first / scale, *(g * by for g, by in zip(rest, scales, strict=True))]


NETS = {
    "linear": lambda: Net(nn.Linear(16, 1, bias=False), inputs=16),
    # of which only a part fits into an emulated block's memory
    "wide": lambda: Net(nn.Linear(300, 40, bias=False), nn.Tanh(), nn.Linear(40, 2), inputs=300),
    "images": lambda: Net(
        nn.Unflatten(1, (2, 8)), nn.Conv1d(2, 4, 3, bias=False), nn.Tanh(), nn.Flatten(),
        nn.Linear(24, 2), inputs=16,
    ),
}  # fmt: skip


def check(net: Net, path, scale: float, dtype: torch.dtype = torch.float32, **options) -> None:
    """What is found with a scale is what torch finds in float64 without."""
    wanted = net.found(1.0, torch.float64, "torch", **options)
    with using(*path):
        found = net.found(scale, dtype, "native", **options)
    for g, w in zip(found, wanted, strict=True):
        assert_close(g.to(dtype), w)
    assert max(float(w.abs().max()) for w in wanted) > 0.1


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("name", NETS)
def test_a_step_size_far_from_one(path, scale, name):
    check(NETS[name](), path, scale)


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("name", NETS)
def test_gradients_of_parameters_alone(path, scale, name):
    check(NETS[name](), path, scale, of_all=False)


def test_it_is_what_torch_does():
    for scale in SCALES.values():
        net = NETS["linear"]()
        wanted = net.found(1.0, torch.float64, "torch")
        for g, w in zip(net.found(scale, torch.float32, "torch"), wanted, strict=True):
            assert_close(g.float(), w)


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("scale", [2.0**350, 2.0**-350], ids=SCALES)
@pytest.mark.parametrize("of_all", [True, False])
def test_float64(path, scale, of_all):
    check(NETS["linear"](), path, scale, torch.float64, of_all=of_all)


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("of_all", [True, False])
def test_a_loss_after_each_step(path, scale, of_all):
    weights = torch.tensor([0.2, 0.3, 0.5])
    check(NETS["linear"](), path, scale, of_all=of_all, step_weights=weights)


@pytest.mark.parametrize("path", PATHS, ids="-".join)
def test_a_clip_of_each_task(path):
    """Which is multiplied by when all steps are reversed."""
    check(NETS["linear"](), path, SCALES["large inputs"], of_all=False, clip=2.0)


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("rates", [(0.05, 0.1, 0.05), (0.1, 0.05, 0.1)])
@pytest.mark.parametrize("of_all", [True, False])
def test_some_steps_far_from_one(path, rates, of_all):
    """Of inputs of 2^14 a step size of 0.05 / 2^28 is below 2^-32, and one of 0.1 / 2^28 is not."""
    check(NETS["wide"](), path, 2.0**14, rates=rates, of_all=of_all)


@pytest.mark.parametrize("isa", native.isas())
def test_a_first_layer_is_factored_with_ordinary_step_sizes_alone(isa):
    """Products of its inputs, x x^T, are not multiplied by the step size first."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(128, 16, bias=False), nn.Tanh(), nn.Linear(16, 2))
    xs, ys, xq, yq = batch(tasks=4, inputs=128, dtype=torch.float32)
    results = []
    with using(isa, "rows"):
        for scale in (1.0, 2.0**61):
            net = copy.deepcopy(start)
            with torch.no_grad():
                net[0].weight.div_(scale)
            learner = pymeta.MAML(
                net, loss="mse", lr=0.1 / scale**2, steps=3, adapt=["0.*"], backend="native"
            )
            learner(scale * xs, ys, scale * xq, yq).loss.backward()
            results.append([net[0].weight.grad / scale, net[2].weight.grad])
        schedule = native.extension().Schedule(steps=3)
        plan = learner._plan.problem.plan(4, "meta", schedule, 4, 5, 4, second_order=True)
        assert plan["factored"]  # as far as the network and the tasks say
    for g, w in zip(*results[::-1], strict=True):
        assert_close(g, w)


@pytest.mark.parametrize("isa", native.isas())
def test_a_factored_first_layer_is_not_kept_where_the_step_size_moves_away(isa):
    """A call that is made again is planned anew when its step size leaves the range, and back."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(128, 16, bias=False), nn.Tanh(), nn.Linear(16, 2))
    xs, ys, xq, yq = batch(tasks=4, inputs=128, dtype=torch.float32)

    def learner() -> tuple[nn.Module, pymeta.MAML]:
        rate = pymeta.LearnableLR(0.1)
        net = copy.deepcopy(start)
        return net, pymeta.MAML(net, loss="mse", lr=rate, steps=3, adapt=["0.*"], backend="native")

    def found(net: nn.Module, maml: pymeta.MAML, scale: float) -> list[torch.Tensor]:
        with torch.no_grad():
            net[0].weight.copy_(start[0].weight / scale)
            maml.lr.fill_(0.1 / scale**2)
        return gradients(maml(scale * xs, ys, scale * xq, yq).loss, *maml.parameters())

    with using(isa, "rows"):
        again = learner()
        for scale in (1.0, 1.0, 2.0**61, 2.0**61, 1.0):
            wanted = found(*learner(), scale)
            assert all(torch.isfinite(w).all() for w in wanted)
            for g, w in zip(found(*again, scale), wanted, strict=True):
                assert torch.equal(g, w)
