"""Residual blocks: natively and on the fallback, as an eager loop over torch's modules has them."""

import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_promised, loop_meta_loss
from kernels import EXECUTORS, PATHS, same_bits, takes, using
from native_help import check_slope_of_each_parameter
from torch import nn
from torch.nn import functional as F

import pymeta
from pymeta.nn import PerStepBatchNorm, Residual
from pymeta.spec.network import Description, describe


class Block(nn.Module):
    """As torchvision's, in a forward of its own, with `+=` and functions."""

    def __init__(self, channels, outputs):
        super().__init__()
        self.first = nn.Conv2d(channels, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs, track_running_stats=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.project = nn.Sequential(nn.Conv2d(channels, outputs, 1), nn.GroupNorm(1, outputs))

    def forward(self, x):
        out = torch.tanh(self.norm(self.first(x)))
        out = self.second(out)
        out += self.project(x)
        return F.silu(out)


class Twice(nn.Module):
    """Sums within sums, and one value in three of them."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        inner = x + self.a(x).sigmoid()
        return torch.add(self.b(inner).tanh(), inner + self.c(inner)) + x


def dense(width, *behind):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), *behind)


NETS = {
    "rows": lambda: (nn.Linear(2, 19), Residual(dense(19)), nn.SiLU(), nn.Linear(19, 3)),
    "first": lambda: (Residual(nn.Sequential(nn.Linear(2, 5), nn.Tanh()), nn.Linear(2, 5)),
                      nn.Linear(5, 3)),
    "first, x itself": lambda: (Residual(nn.Linear(2, 2)), nn.Linear(2, 3)),
    "last": lambda: (nn.Linear(2, 3), Residual(nn.Sequential(nn.Tanh(), nn.Linear(3, 3)))),
    "narrow": lambda: (nn.Linear(2, 17), Residual(dense(17), nn.Identity()), nn.Linear(17, 3)),
    "an activation first": lambda: (nn.Linear(2, 6), nn.Tanh(),
                                    Residual(nn.Sequential(nn.Sigmoid(), nn.Linear(6, 6)))),
    "nested": lambda: (nn.Linear(2, 6), Residual(Residual(dense(6)), Residual(nn.Tanh())),
                       nn.Linear(6, 3)),
    "normalised": lambda: (
        nn.Linear(2, 6),
        Residual(nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(),
                               nn.Linear(6, 6))),
        nn.LayerNorm(6), nn.Linear(6, 3),
    ),
    "traced": lambda: (nn.Linear(2, 4), Twice(4), nn.Linear(4, 3)),
    "images": lambda: (nn.Conv2d(2, 3, 3, padding=1), Block(3, 5), nn.AvgPool2d(2),
                       Residual(nn.Conv2d(5, 5, 3, padding=1)), nn.AdaptiveAvgPool2d(1),
                       nn.Flatten(), nn.Linear(5, 3)),
    "first of images": lambda: (Residual(nn.Conv2d(2, 2, 1)), nn.Flatten(), nn.Linear(50, 3)),
}  # fmt: skip


def made(name):
    torch.manual_seed(2)
    net = nn.Sequential(*NETS[name]()).double()
    shape = (2, 5, 5) if "images" in name else (2,)
    xs, xq = (torch.randn(3, n, *shape, dtype=torch.float64) for n in (5, 4))
    out = net(xs[0]).shape[1]
    ys, yq = (torch.randn(3, n, out, dtype=torch.float64) for n in (5, 4))
    return net, (xs, ys, xq, yq)


def learner(net, backend="native", **options):
    return pymeta.MAML(net, **{"loss": "mse", "lr": 0.2, "steps": 2, **options}, backend=backend)


@pytest.mark.parametrize("name", NETS)
def test_eager_autograd_agrees(name, backend):
    """Loss and gradients, second order, of both backends."""
    net, data = made(name)
    data[0].requires_grad_()
    inputs = [*net.parameters(), data[0]]
    loss = loop_meta_loss(net, F.mse_loss, 0.2, 2, *data)
    wanted = torch.autograd.grad(loss, inputs)
    out = learner(net, backend)(*data)
    got = torch.autograd.grad(out.loss, inputs)
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-12, atol=1e-14)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def results(net, maml, data):
    out = maml(*data)
    return [out.task_losses, out.predictions], torch.autograd.grad(out.loss, list(net.parameters()))


OPTIONS = (
    {},
    {"first_order": True},
    {"adapt": ["1.*"], "optimizer": pymeta.SGD(0.1, momentum=0.9), "lr": None},
    {"optimizer": pymeta.Adam(0.05, eps=1.0), "lr": None},
)


@pytest.mark.parametrize("isa, executor", PATHS)
def test_every_path_agrees_with_the_reference(isa, executor):
    count = 0
    for name, options in itertools.product(("rows", "nested", "traced", "images"), OPTIONS):
        net, data = made(name)
        maml = learner(net, **options)
        if not takes(executor, maml) or (executor == "emulated" and name == "images"):
            continue  # more than 16 layers
        wanted, grads = results(net, learner(net, "torch", **options), data)
        with using(isa, executor):
            got, own = results(net, maml, data)
        assert_close(got, wanted)
        assert_close(own, grads)
        count += 1
    assert count >= 8


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("name", ["nested", "first of images"])
def test_finite_differences(name, isa, executor):
    net, data = made(name)
    maml = learner(net)
    with using(isa, executor):
        check_slope_of_each_parameter(maml, data, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ["rows", "traced", "images"])
def test_bits_are_a_tasks_own(name):
    net, data = made(name)
    with using(executor="rows", threads=1):
        wanted = results(net, learner(net), data)
        alone = learner(net)(*(v[1:2] for v in data)).predictions
    assert same_bits([alone], [wanted[0][1][1:2]])
    for executor, threads in itertools.product(EXECUTORS, (1, 3)):
        with using(executor=executor, threads=threads):
            got = results(net, learner(net), data)
        assert same_bits(got[0], wanted[0])
        if executor == "rows":
            assert same_bits(got[1], wanted[1])


def test_rows_of_single_tasks_differ_in_number(backend):
    """Shorter tasks of a vector are masked in each branch."""
    net, (xs, ys, xq, yq) = made("normalised")
    sizes = [5, 2, 3]
    got = learner(net, backend)(xs, ys, xq, yq, support_sizes=sizes, query_sizes=[4, 3, 2])
    for t, n in enumerate(sizes):
        own = [v[t : t + 1] for v in (xs[:, :n], ys[:, :n], xq[:, : 4 - t], yq[:, : 4 - t])]
        assert_promised([got.task_losses[t]], [learner(net, backend)(*own).task_losses[0]], backend)


def test_models_files_and_adapters(tmp_path, backend):
    net, (xs, ys, xq, yq) = made("traced")
    maml = learner(net, backend)
    wanted = maml(xs, ys, xq, yq).predictions.detach()
    models = maml.adapt(xs, ys)
    models.save(tmp_path / "models")
    loaded = pymeta.Adapted.load(tmp_path / "models", copy.deepcopy(net))
    assert_promised([models(xq), loaded(xq)], [wanted, wanted], backend)
    assert_close([models[1](xq[1])], [wanted[1]])
    maml.adapter().save(tmp_path / "adapter")
    adapter = pymeta.Adapter.load(tmp_path / "adapter")
    assert "fork" in str(adapter.architecture)
    found = adapter.adapt_predict(xs[0].numpy(), ys[0].numpy(), xq[0].numpy())
    assert np.allclose(found, wanted[0].numpy(), rtol=1e-12)


def test_per_step_norms_and_running_statistics_in_branches(backend):
    net = nn.Sequential(
        nn.Linear(2, 4), Residual(nn.Sequential(PerStepBatchNorm(4, 2), nn.Tanh()),
                                  nn.BatchNorm1d(4)), nn.Linear(4, 3),
    ).double()  # fmt: skip
    other = copy.deepcopy(net)
    data = [torch.randn(3, n, w, dtype=torch.float64) for n, w in ((5, 2), (5, 3), (4, 2), (4, 3))]
    got, wanted = learner(net, backend)(*data), learner(other, "torch")(*data)
    assert_close([got.task_losses], [wanted.task_losses])
    assert_close([b.double() for b in net.buffers()], [b.double() for b in other.buffers()])


def test_what_is_no_residual_block_says_why():
    reason = describe(nn.Sequential(Residual(nn.Linear(2, 3)))).reason
    assert reason == "layers: a branch gives 3 features, and what is added to it 2"
    with pytest.raises(TypeError, match=r"f: expected a torch.nn.Module, got function"):
        Residual(lambda x: x)
    with pytest.raises(TypeError, match=r"shortcut: expected a torch.nn.Module or None, got int"):
        Residual(nn.Tanh(), 3)


def test_a_shared_activation_is_no_branch():
    """One value read twice joins up again, or is no chain."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act = nn.Linear(3, 3), nn.Tanh()

        def forward(self, x):
            h = self.act(self.a(x))
            return self.act(h) + h

    found = describe(Net())
    assert isinstance(found, Description)
    kinds = [layer[0] for layer in found.layers]
    assert kinds == ["linear", "tanh", "fork", "tanh", "turn", "join"]


@pytest.mark.parametrize("layers", [
    [("fork", 3), ("join",)], [("fork", 3), ("turn",)], [("fork", 3), ("turn",), ("turn",)],
    [("linear", 2, 2, True), ("turn",)], [("fork", 0), ("turn",), ("join",)],
])  # fmt: skip
def test_branches_that_do_not_close_are_refused(layers):
    from pymeta import native

    with pytest.raises(ValueError, match=r"layers: "):
        native.extension().Network(layers)
