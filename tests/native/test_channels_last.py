"""What stands between two permutations: natively and on the fallback, as eager autograd has it."""

import collections
import itertools

import numpy as np
import pytest
import torch
from cases import cases, compare
from channels_last import NETS, Between, ConvNeXt, LayerNorm2d, images, made, sequences
from helpers import assert_close, loop_meta_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from images import channels_last_chains
from kernels import DTYPES, ISAS, PATHS, PROFILE, takes, using
from native_help import check_bits, check_slope_of_each_parameter
from test_branches import OPTIONS, compared, kept_adapter, kept_models, learner
from test_images import small
from torch import nn
from torch.nn import functional as F

from pymeta import native
from pymeta.spec.network import Description, Unshaped, Unsupported, describe


@pytest.mark.parametrize("name", NETS)
def test_every_network_is_native(name):
    net, (xs, *_) = made(name)
    assert isinstance(describe(net), Unshaped)
    found = describe(net, tuple(xs.shape[2:]))
    assert isinstance(found, Description), found.reason
    parameters = dict(net.named_parameters())
    shapes = [tuple(parameters[n].shape) for n in found.names]
    assert [tuple(s) for s in found.network.parameter_shapes] == shapes


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_eager_autograd_agrees(name, first_order, backend):
    net, data = made(name)
    data[0].requires_grad_()
    inputs = [*net.parameters(), data[0]]
    maml = learner(net, backend, first_order=first_order)
    out = maml(*data)
    got = torch.autograd.grad(out.loss, inputs, materialize_grads=True)
    loss = loop_meta_loss(net, F.mse_loss, 0.2, 2, *data, first_order=first_order)
    wanted = torch.autograd.grad(loss, inputs, materialize_grads=True)
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-12, atol=1e-14)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


# for blocks, whose emulation takes its time
SHORT = ("LayerNorm2d", "width first", "moved", "torchvision's block", "sequence of products")
COMPARED = (*SHORT, "ConvNeXt", "between permutes by name", "mixed sequence")


@pytest.mark.parametrize("isa, executor", PATHS)
def test_every_path_agrees_with_the_reference(isa, executor):
    count = 0
    for name, options in itertools.product(COMPARED, OPTIONS):
        if executor != "emulated" or name in SHORT:
            maml = compared(*made(name), options, isa, executor)
            assert maml is not None and takes(executor, maml), name
            count += 1
    assert count == len(SHORT if executor == "emulated" else COMPARED) * len(OPTIONS)


@pytest.mark.parametrize("isa, executor", PATHS)
def test_finite_differences(isa, executor):
    net, data = made("torchvision's block")
    with using(isa, executor):
        check_slope_of_each_parameter(learner(net), data, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ["ConvNeXt", "mixed sequence"])
def test_models_files_and_adapters(tmp_path, backend, name):
    net, data = made(name)
    maml, wanted = kept_models(net, data, backend, tmp_path)
    if backend == "native":
        _, found = kept_adapter(maml, data, tmp_path)
        assert np.array_equal(found, wanted[0].numpy())


CASES = cases(tasks=(1, 2, 3, 17), chain=channels_last_chains()).map(small)


def test_random_networks_against_the_reference():
    counts = collections.Counter()

    @settings(PROFILE, max_examples=30)
    @given(CASES)
    def check(case):
        counts.update(compare(case))

    check()
    assert counts[torch.float64] >= 30
    assert counts[torch.float32] >= 20  # the cases that a kink rules out are the exception


@settings(PROFILE, max_examples=10)
@given(CASES, st.sampled_from(DTYPES), ISAS)
def test_the_bits_of_a_task_are_its_own(case, dtype, isa):
    check_bits(case, dtype, isa)


def test_a_layer_norm_over_channels_is_one_layer():
    net = nn.Sequential(nn.Conv2d(2, 3, 2), LayerNorm2d(3, eps=1e-3), nn.Flatten())
    kinds = [layer[0] for layer in describe(net, (2, 4, 5)).layers]
    assert kinds == ["image", "conv2d", "layer_norm", "flatten"]
    block = nn.Sequential(nn.Conv2d(2, 3, 2), ConvNeXt(3), nn.Flatten())
    kinds = [layer[0] for layer in describe(block, (2, 4, 5)).layers]
    assert kinds == ["image", "conv2d", "keep", "conv2d", "layer_norm", "linear", "gelu", "linear",
                     "scale_shift", "add", "flatten"]  # fmt: skip


# What is done to images [rows, 3, 4, 4], and why it is not native: all their sizes are alike but
# for the channels.
REFUSED = {
    "layer norm of the width": (
        lambda x: F.layer_norm(x, (4,)), "layer_norm does not take rows with 2 axes of positions"),
    "layer norm of a module, of the width": (
        nn.LayerNorm(4), "layer 1 (LayerNorm) does not take rows with 2 axes"),
    "layer norm of height and width": (
        nn.LayerNorm((4, 4)), "layer 1 (LayerNorm) does not take rows with 2 axes"),
    "layer norm of width and channels": (
        images(nn.LayerNorm((4, 3))), "(LayerNorm) of rows with the axes [rows, height, width, "
        "channels]"),
    "layer norm of height, width and channels": (
        images(nn.LayerNorm((4, 4, 3))), "(LayerNorm) of rows with the axes [rows, height, "),
    "layer norm of the height": (
        Between(lambda x: x.transpose(2, 3), lambda x: x.transpose(2, 3), nn.LayerNorm(4)),
        "(LayerNorm) of rows with the axes [rows, channels, width, height]"),
    "linear layer of the width": (
        nn.Linear(4, 4), "(Linear) does not take rows with 2 axes"),
    "flattened as it lies": (
        lambda x: x.permute(0, 2, 3, 1), "(Flatten) of rows with the axes [rows, height, "),
    "viewed as it lies": (
        lambda x: x.permute(0, 2, 3, 1).reshape(-1, 48), "flatten of rows with the axes"),
    "back to front": (
        lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (3,)).permute(0, 3, 2, 1),
        "(Flatten) of rows with the axes [rows, channels, width, height]"),
    "convolution": (images(nn.Conv2d(4, 4, 1)), "inner.0 (Conv2d) of rows with the axes"),
    "batch norm": (images(nn.BatchNorm2d(4)), "inner.0 (BatchNorm2d) of rows with the axes"),
    "fixed batch norm": (images(nn.BatchNorm2d(4).eval()), "(BatchNorm2d) of rows with the ax"),
    "group norm": (images(nn.GroupNorm(2, 4)), "inner.0 (GroupNorm) of rows with the axes"),
    "pooling": (images(nn.AvgPool2d(1)), "inner.0 (AvgPool2d) of rows with the axes"),
    "mean": (lambda x: x.permute(0, 2, 3, 1).mean((-2, -1)), "global_avg_pool2d of rows with the"),
    "part": (lambda x: x.permute(0, 2, 3, 1)[..., :2], "part of rows with the axes"),
    "pad": (lambda x: F.pad(x.transpose(1, 3), (1, 0)).transpose(1, 3), "zero_pad of rows with"),
    "parts of the height": (
        lambda x: x.permute(0, 2, 3, 1).chunk(2, 1)[0].permute(0, 3, 1, 2),
        "a part along dimension 1"),
    "GLU of the width": (lambda x: F.glu(x), "a part along dimension -1"),
    "concatenation of heights": (
        lambda x: torch.cat([x.permute(0, 2, 3, 1)] * 2, 1).permute(0, 3, 1, 2),
        "a concatenation along dimension 1"),
    "two orders": (
        lambda x: x + x.transpose(2, 3), "values whose axes are permuted in two ways are joined"),
    "of rows": (
        lambda x: x.transpose(0, 1).transpose(0, 1), "transpose moves the axis of the rows"),
    "no such axis": (
        lambda x: x.transpose(1, 2).flatten(2).transpose(1, 2), "Flatten from dimension 2"),
    "other function": (lambda x: x.permute(0, 2, 3, 1).cos().permute(0, 3, 1, 2), "cos has no nat"),
}  # fmt: skip


class As(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_the_same_in_any_order_is_left_to_torch(case):
    inner, reason = REFUSED[case]
    inner = inner if isinstance(inner, nn.Module) else As(inner)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), inner, nn.Flatten()).double()
    found = describe(net, (2, 4, 4))
    assert isinstance(found, Unsupported)
    assert reason in found.reason, found.reason
    out = net(torch.ones(1, 2, 4, 4).double()).shape[1]  # torch has it, and so has the fallback
    data = [torch.randn(2, n, *s).double() for n, s in ((3, (2, 4, 4)), (3, (out,))) * 2]
    if case != "of rows":  # under vmap
        got = learner(net, "torch")(*data)
        assert_close([got.loss], [loop_meta_loss(net, F.mse_loss, 0.2, 2, *data)])


class Scaled(nn.Module):
    """A value times a parameter of some shape."""

    def __init__(self, *shape, last=False):
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.randn(shape)), last

    def forward(self, x):
        return (x.transpose(1, -1) * self.scale).transpose(1, -1) if self.last else x * self.scale


def test_a_scale_is_along_the_last_axis():
    net = nn.Sequential(nn.Linear(3, 4), Scaled(4), nn.Linear(4, 2)).double()
    found = describe(net)
    assert found.layers[1] == ("scale_shift", 4, True, False, 0) and found.names[2] == "1.scale"
    data = [torch.randn(2, 5, n).double() for n in (3, 2, 3, 2)]
    inputs = list(net.parameters())
    loss = loop_meta_loss(net, F.mse_loss, 0.2, 2, *data)
    out = learner(net)(*data)
    assert_close([out.loss], [loss])
    assert_close(torch.autograd.grad(out.loss, inputs), torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("scale, reason", [
    (Scaled(4), "scale does not take rows with 2 axes of positions"),
    (Scaled(3, 1, 1), "a factor scale of shape [3, 1, 1]"),
    (Scaled(), "a factor scale of shape []"),
    (Scaled(1, last=True), "takes 4 x 4 x 1 features"),
])  # fmt: skip
def test_other_scales_are_left_to_torch(scale, reason):
    net = nn.Sequential(nn.Conv2d(2, 3, 1), scale, nn.Flatten())
    assert net(torch.ones(1, 2, 4, 4)).shape == (1, 48)
    found = describe(net, (2, 4, 4))
    assert isinstance(found, Unsupported) and reason in found.reason, found.reason


def test_a_permuted_value_that_is_written_over_is_left_to_torch():
    class Net(nn.Module):
        def __init__(self, reads):
            super().__init__()
            self.conv, self.reads = nn.Conv2d(2, 3, 1), reads

        def forward(self, x):
            x = self.conv(x)
            y = x.permute(0, 2, 3, 1).tanh_().permute(0, 3, 1, 2)
            return (y + x if self.reads else y).flatten(1)

    assert "reads conv, which tanh_ has written over" in describe(Net(True), (2, 4, 4)).reason
    assert isinstance(describe(Net(False), (2, 4, 4)), Description)


def test_linear_layers_of_files_take_channels_of_positions():
    """As they do rows of features; what comes out has to be flattened all the same."""
    network = native.extension().Network
    image = ("image", 2, 3, 4)
    found = network([image, ("linear", 2, 5, True), ("flatten",)])
    assert found.out_features == 60
    assert [tuple(s) for s in found.parameter_shapes] == [(5, 2), (5,)]
    for layers, reason in (
        ([image, ("linear", 2, 5, True)], "flatten it"),
        ([image, ("linear", 24, 5, True)], "takes 24 features, the one before it gives 3 x 4 x 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            network(layers)


def test_sequences_too_whose_channels_are_first_again_in_between():
    net = nn.Sequential(
        nn.Conv1d(2, 3, 1), sequences(nn.LayerNorm(3)), nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4),
        sequences(nn.Linear(4, 4), nn.ReLU()), nn.AdaptiveMaxPool1d(1), nn.Flatten(),
    )  # fmt: skip
    assert isinstance(describe(net, (2, 6)), Description)


class OverRows(nn.Module):
    """What the rows of a set, always five, are mixed by."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(5, 5)

    def forward(self, x):
        return self.mix(x.transpose(-1, -2)).transpose(-1, -2)


def test_rows_that_torch_mixes_are_no_rows_without_an_axis():
    net = nn.Sequential(OverRows(), nn.Linear(3, 2)).double()
    found = describe(net, (3,))
    assert isinstance(found, Unsupported) and found.misfit is None
    data = [torch.randn(2, 5, n).double() for n in (3, 2, 3, 2)]
    got = learner(net, "torch")(*data)
    assert_close([got.loss], [loop_meta_loss(net, F.mse_loss, 0.2, 2, *data)])


def test_other_channels_are_an_error_that_names_the_layer():
    net = nn.Sequential(nn.Conv2d(2, 3, 1), images(nn.LayerNorm(5)), nn.Flatten(), nn.Linear(48, 1))
    data = [torch.randn(2, 3, *s) for s in ((2, 4, 4), (1,)) * 2]
    said = r"1\.inner\.0 \(LayerNorm\) takes 5 features along the last axis, .*\[4, 4, 3\]"
    with pytest.raises(ValueError, match=said):
        learner(net, "auto")(*data)
    net[1] = LayerNorm2d(5)
    with pytest.raises(ValueError, match=r"layer 1 \(LayerNorm2d\): "):
        learner(net, "auto")(*data)
