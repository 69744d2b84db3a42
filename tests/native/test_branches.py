"""Branches: natively and on the fallback, as an eager loop over torch's modules has them."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from branched import NETS, made
from helpers import assert_close, assert_promised, loop_meta_loss
from kernels import EXECUTORS, PATHS, same_bits, takes, using
from native_help import check_slope_of_each_parameter
from torch import nn
from torch.nn import functional as F

import pymeta
from pymeta import native
from pymeta.nn import Branches, PerStepBatchNorm, Residual
from pymeta.spec.architecture import read_architecture
from pymeta.spec.network import Description, describe


def learner(net, backend="native", **options):
    return pymeta.MAML(net, **{"loss": "mse", "lr": 0.2, "steps": 2, **options}, backend=backend)


@pytest.mark.parametrize("name", NETS)
def test_every_network_is_native(name):
    net, (xs, *_) = made(name)
    shape = tuple(xs.shape[2:])
    found = describe(net, shape if len(shape) > 1 else None)
    assert isinstance(found, Description), found.reason


@pytest.mark.parametrize("name", NETS)
def test_eager_autograd_agrees(name, backend):
    """Loss and gradients, second order, of both backends."""
    net, data = made(name)
    data[0].requires_grad_()
    inputs = [*net.parameters(), data[0]]
    loss = loop_meta_loss(net, F.mse_loss, 0.2, 2, *data)
    wanted = torch.autograd.grad(loss, inputs, materialize_grads=True)
    out = learner(net, backend)(*data)
    got = torch.autograd.grad(out.loss, inputs, materialize_grads=True)
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-12, atol=1e-14)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def results(net, maml, data):
    out = maml(*data)
    return [out.task_losses, out.predictions], torch.autograd.grad(
        out.loss, list(net.parameters()), materialize_grads=True
    )


OPTIONS = (
    {},
    {"first_order": True},
    {"adapt": "every second", "optimizer": pymeta.SGD(0.1, momentum=0.9), "lr": None},
    {"optimizer": pymeta.Adam(0.05, eps=1.0), "lr": None},
)


SHORT = (
    "rows",
    "nested",
    "images",
    "wide and deep",
    "sequence of GLUs",
    "excited sequence",
)  # 24 layers
COMPARED = (
    "rows", "nested", "traced", "images", "wide and deep", "sequence of GLUs", "gated sequence",
    "excited sequence", "inception of a sequence",
)  # fmt: skip


def compared(net, data, options, isa, executor):
    """A learner that agrees with the reference on a path; None where that does not take it."""
    if "adapt" in options:
        options = {**options, "adapt": [n for n, _ in net.named_parameters()][1::2]}
    maml = learner(net, **options)
    if not takes(executor, maml):
        return None
    wanted, grads = results(net, learner(net, "torch", **options), data)
    with using(isa, executor):
        got, own = results(net, maml, data)
    assert_close(got, wanted)
    assert_close(own, grads)
    return maml


@pytest.mark.parametrize("isa, executor", PATHS)
def test_every_path_agrees_with_the_reference(isa, executor):
    count = 0
    for name, options in itertools.product(COMPARED, OPTIONS):
        if executor != "emulated" or name in SHORT:
            count += compared(*made(name), options, isa, executor) is not None
    assert count >= (16 if executor == "emulated" else 32)


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("name", ["nested", "first of images", "sequence of GLUs"])
def test_finite_differences(name, isa, executor):
    net, data = made(name)
    maml = learner(net)
    with using(isa, executor):
        check_slope_of_each_parameter(maml, data, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ["rows", "traced", "images", "gates", "parts of a sequence",
                                  "excited images", "gated sequence"])  # fmt: skip
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


def kept_models(net, data, backend, folder):
    """A learner, whose adapted models predict alike behind a file, and its predictions."""
    xs, ys, xq, yq = data
    maml = learner(net, backend)
    wanted = maml(xs, ys, xq, yq).predictions.detach()
    models = maml.adapt(xs, ys)
    models.save(folder / "models")
    loaded = pymeta.Adapted.load(folder / "models", copy.deepcopy(net))
    assert_promised([models(xq), loaded(xq)], [wanted, wanted], backend)
    assert_close([models[1](xq[1])], [wanted[1]])
    return maml, wanted


def kept_adapter(maml, data, folder):
    """A learner's adapter behind a file, and what it predicts for the first task."""
    maml.adapter().save(folder / "adapter")
    adapter = pymeta.Adapter.load(folder / "adapter")
    return adapter, adapter.adapt_predict(*(v[0].numpy() for v in data[:3]))


@pytest.mark.parametrize("name", ["traced", "highway", "side by side", "gates"])
def test_models_files_and_adapters(tmp_path, backend, name):
    net, data = made(name)
    maml, wanted = kept_models(net, data, backend, tmp_path)
    adapter, found = kept_adapter(maml, data, tmp_path)
    assert "keep" in str(adapter.architecture)
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
    assert kinds == ["linear", "tanh", "keep", "tanh", "add"]


@pytest.mark.parametrize("layers, reason", [
    ([("keep", 3), ("add", 1)], "no value number 1 is kept"),
    ([("linear", 2, 2, True), ("recall", 0)], "no value number 0 is kept"),
    ([("keep", 0), ("linear", 2, 2, True)], "the first layer needs to know its inputs' shape"),
    ([("keep", 3), ("linear", 3, 2, True), ("multiply", 0)],
     "a branch gives 2 features, and what is multiplied by it 3"),
    ([("image", 2, 0, 5), ("keep", 0), ("global_avg_pool1d",), ("concatenate", 0, True)],
     "channels of 2 features beside those of 1 x 5 x 2"),
    ([("keep", 5), ("channels", 0, 1, 2)], "5 channels in 2 equal parts"),
    ([("keep", 5), ("channels", 3, -2, 0)], "channels 3 to -2 of 5"),
])  # fmt: skip
def test_branches_that_do_not_fit_are_refused(layers, reason):
    with pytest.raises(ValueError, match=f"^layers: {reason}$"):
        native.extension().Network(layers)


def test_sums_of_two_branches_in_files_of_before():
    """They are spelled fork, turn and join there."""
    old = [["fork", 3], ["linear", 3, 2, True], ["tanh"], ["fork", 0], ["linear", 2, 2, True],
           ["turn"], ["join"], ["turn"], ["linear", 3, 2, False], ["join"]]  # fmt: skip
    names = ["a", "b", "c", "d", "e"]
    form = {"layers": old, "names": names, "chain": names, "flattens": False}
    found = read_architecture(form)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g, self.h = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(3, 2, bias=False)

        def forward(self, x):
            z = self.f(x).tanh()
            return z + self.g(z) + self.h(x)

    net = Net().double()
    ours = learner(net).adapter()
    own = {name: getattr(ours, name) for name in ("loss", "optimizer", "schedule")}
    start = dict(zip(names, ours.parameters.values(), strict=True))
    loaded = pymeta.Adapter(found, start, adapted=names, **own)
    xs, ys, xq = (torch.randn(2, 4, n, dtype=torch.float64).numpy() for n in (3, 2, 3))
    assert np.array_equal(loaded.adapt_predict(xs, ys, xq), ours.adapt_predict(xs, ys, xq))


@pytest.mark.parametrize("layers", [[["fork", 3], ["join"]], [["fork", 3], ["turn"], ["turn"]],
                                    [["fork", 3], ["turn", 0]], [["fork"]]])  # fmt: skip
def test_sums_in_files_of_before_that_do_not_close(layers):
    form = {"layers": layers, "names": [], "chain": [], "flattens": False}
    with pytest.raises(ValueError, match=r"^architecture: layer \d"):
        read_architecture(form)


class Overwriting(nn.Module):
    """Reads a value that a call has written over, or does not."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.act = kind, nn.Linear(3, 3), nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Linear(3, 3))

    def forward(self, x):
        h = self.a(x)
        if self.kind == "sum":
            z = h
            z += x
            return z + h
        if self.kind == "module":
            return self.act(h) + h
        if self.kind == "block":
            return self.block(h) + h
        if self.kind == "function":
            return F.silu(h.flatten(1), inplace=True) * h
        if self.kind == "torch's function":
            return torch.sigmoid_(h) + h
        if self.kind == "function by its name":
            return F.elu_(h[:, :], alpha=0.5) + h
        if self.kind == "in place":
            h.relu_()
            return h
        if self.kind == "method":
            h.mul_(2)
            return h
        return self.act(h) + x


@pytest.mark.parametrize("kind", ["sum", "module", "block", "function", "method", "in place",
                                  "torch's function", "function by its name"])  # fmt: skip
def test_values_that_are_written_over_are_left_to_torch(kind):
    net = Overwriting(kind).double()
    if kind != "block":
        del net.block
    found = describe(net)
    assert not isinstance(found, Description) and "has written over" in found.reason
    data = [torch.randn(2, 4, 3, dtype=torch.float64) for _ in range(4)]
    got = learner(net, "torch")(*data)
    torch.testing.assert_close(got.loss, loop_meta_loss(net, F.mse_loss, 0.2, 2, *data))


def test_values_that_nobody_reads_behind_are_written_over_natively():
    net = Overwriting("none").double()
    del net.block
    assert isinstance(describe(net), Description)


IN_PLACE = {
    "relu_": (lambda x: x.relu_(), ("relu",)),
    "tanh_": (lambda x: x.tanh_(), ("tanh",)),
    "sigmoid_": (lambda x: x.sigmoid_(), ("sigmoid",)),
    "torch.relu_": (torch.relu_, ("relu",)),
    "F.relu_": (lambda x: F.relu_(x), ("relu",)),
    "torch.tanh_": (torch.tanh_, ("tanh",)),
    "torch.sigmoid_": (torch.sigmoid_, ("sigmoid",)),
    "F.leaky_relu_": (lambda x: F.leaky_relu_(x, 0.2), ("leaky_relu", 0.2)),
    "F.elu_": (lambda x: F.elu_(x, alpha=0.5), ("elu", 0.5)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_activations_in_place_are_layers(name, backend):
    function, layer = IN_PLACE[name]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(function(self.a(x)))

    net = Net().double()
    assert describe(net).layers[1] == layer
    data = [torch.randn(2, 4, 3, dtype=torch.float64) for _ in range(4)]
    assert_close([learner(net, backend)(*data).loss],
                 [loop_meta_loss(net, F.mse_loss, 0.2, 2, *data)])  # fmt: skip


def test_an_activation_in_place_with_more_arguments_is_left_to_torch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return F.elu_(self.a(x), 1.0, 2.0)

    assert "with arguments the native core lacks" in describe(Net()).reason


REFUSED = {
    "along positions": (lambda x: torch.cat([x, x], 2), "a concatenation along dimension 2"),
    "of rows": (lambda x: torch.cat([x, x]), "a concatenation along dimension 0"),
    "positions in chunks": (lambda x: x.chunk(2, -1)[0], "a part along dimension -1"),
    "every second channel": (lambda x: x[:, ::2], "not one after the other"),
    "one channel": (lambda x: x[:, 0], "of the channels 0"),
    "features beside positions": (lambda x: x * x.mean(-1), "axes of positions are joined"),
    "single channels": (lambda x: x * x[:, :1], "a branch gives 1 x 6 x 1 features"),
    "power": (lambda x: x**2, "pow has no native kernel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_joined_natively_says_why(case):
    function, reason = REFUSED[case]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv1d(2, 4, 1)

        def forward(self, x):
            return function(self.a(x)).flatten(1)

    net = Net().double()
    found = describe(net, (2, 6))
    assert not isinstance(found, Description) and reason in found.reason


def test_branches_are_plain_torch(backend):
    x = torch.randn(4, 3, dtype=torch.float64)
    a, b = nn.Linear(3, 3).double(), nn.Tanh()
    for join, wanted in (("add", a(x) + b(x)), ("multiply", a(x) * b(x)),
                         ("concatenate", torch.cat([a(x), b(x)], 1))):  # fmt: skip
        net = Branches([a, b], join)
        assert torch.equal(net(x), wanted) and join in repr(net)
        assert learner(net, backend).explain()
    assert torch.equal(Branches((a,))(x), a(x))


def test_what_is_no_branch_is_an_error():
    with pytest.raises(TypeError, match=r"^branches: expected torch.nn.Modules, got int at 1$"):
        Branches([nn.Tanh(), 3])
    with pytest.raises(ValueError, match=r"^branches: expected at least one$"):
        Branches([])
    expected = r"^join: expected one of add, multiply, concatenate, got 'sum'$"
    with pytest.raises(ValueError, match=expected):
        Branches([nn.Tanh()], "sum")


@pytest.mark.parametrize("old", [False, True])
def test_weight_norm_is_left_to_torch(old):
    """Its direction and length are what is adapted."""
    wrap = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old one is deprecated
        net = nn.Sequential(wrap(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)).double()
    assert not isinstance(describe(net), Description)
    data = [torch.randn(2, 4, 3, dtype=torch.float64) for _ in range(4)]
    loss = loop_meta_loss(net, F.mse_loss, 0.2, 2, *data)
    out = learner(net, "torch")(*data)
    torch.testing.assert_close(out.loss, loss)
    got, wanted = (torch.autograd.grad(v, list(net.parameters())) for v in (out.loss, loss))
    assert_close(got, wanted)
