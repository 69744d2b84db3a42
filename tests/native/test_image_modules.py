"""Modules over sequences and images: which are native, which are not and why, which cannot be."""

import warnings

import images
import pytest
import torch
from helpers import skip_before_torch
from images import episodes
from torch import nn
from torch.nn import functional as F

import pymeta
from pymeta.spec.network import Unsupported, describe

MISSHAPEN = {
    "behind a convolution": (
        (nn.Conv2d(2, 3, 2), nn.LayerNorm((3, 5, 6)), nn.Flatten(), nn.Linear(60, 1)), (2, 5, 6),
        r"layer 1 .LayerNorm. takes rows of shape \[3, 5, 6\], but layer 0 .Conv2d. gives "
        r"\[3, 4, 5\]",
    ),
    "first": (
        (nn.LayerNorm((2, 7)), nn.Flatten(), nn.Linear(12, 1)), (2, 6),
        r"layer 0 .LayerNorm. takes rows of shape \[2, 7\], but a row gives \[2, 6\]",
    ),
    "without parameters": (
        (nn.Conv1d(2, 3, 2), nn.LayerNorm((2, 5), elementwise_affine=False), nn.Flatten(),
         nn.Linear(15, 1)), (2, 6),
        r"layer 1 .LayerNorm. takes rows of shape \[2, 5\], but layer 0 .Conv1d. gives \[3, 5\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSHAPEN)
def test_a_layer_norm_of_another_shape_is_an_error_and_no_fallback(name):
    layers, shape, said = MISSHAPEN[name]
    net = nn.Sequential(*layers)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        net(torch.ones(4, *shape))
    for backend in ("auto", "torch"):
        maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend=backend)
        with warnings.catch_warnings(), pytest.raises(ValueError, match=said):
            warnings.simplefilter("error")
            maml(*(torch.ones(2, 4, *n) for n in (shape, (1,), shape, (1,))))


class Causal(nn.Module):
    """A network of windows as people write it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, dilation=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.conv(F.pad(x, (4, 0))))
        x = F.dropout(x, 0.5, self.training).contiguous()
        return self.head(x.mean(-1))


def test_padding_means_and_dropout_in_a_forward_are_layers():
    net = Causal().eval()
    kinds = [layer[0] for layer in describe(net, (2, 9)).layers]
    assert kinds == [
        "image", "zero_pad", "conv1d", "relu", "global_avg_pool1d", "flatten", "linear"
    ]  # fmt: skip
    data = episodes((2, 9), dtype=torch.float32)
    found = [
        pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=2, backend=backend)(*data).predictions
        for backend in ("torch", "native")
    ]
    torch.testing.assert_close(*found)
    assert "draws random numbers" in describe(net.train(), (2, 9)).reason


class Squeezing(nn.Module):
    """What comes behind a convolution of as many axes as a pooling has, as people write it."""

    def __init__(self, pool, squeeze):
        super().__init__()
        axes = int(type(pool).__name__[-2])
        self.conv, self.pool = images.CONVOLUTIONS[axes - 1](2, 4, 2), pool
        self.head, self.squeeze = nn.Linear(4, 3), squeeze

    def forward(self, x):
        return self.head(self.squeeze(self.pool(self.conv(x))))


SQUEEZES = {
    "method": (nn.AdaptiveAvgPool1d(1), lambda x: x.squeeze(-1)),
    "function": (nn.AdaptiveMaxPool1d(1), lambda x: torch.squeeze(x, 2)),
    "one after the other": (nn.AdaptiveAvgPool2d(1), lambda x: x.squeeze(-1).squeeze(dim=2)),
    "two": (nn.AdaptiveMaxPool2d((1, 1)), lambda x: x.squeeze((2, 3))),
}


@pytest.mark.parametrize("name", SQUEEZES)
def test_a_squeeze_of_the_one_position_that_is_left(name):
    pool, squeeze = SQUEEZES[name]
    net = Squeezing(pool, squeeze).double()
    shape = (2, 5) if isinstance(pool, (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d)) else (2, 4, 5)
    data = episodes(shape)
    found = [
        pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=2, backend=backend)(*data).predictions
        for backend in ("torch", "native")
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "pool, squeeze",
    [
        (nn.AdaptiveAvgPool1d(1), lambda x: x.squeeze()),  # of one row, the rows
        (nn.AdaptiveAvgPool1d(1), lambda x: x.squeeze(1)),  # of one channel, the channels
        (nn.AdaptiveAvgPool1d(2), lambda x: x.squeeze(-1)),
        (nn.AdaptiveAvgPool2d(1), lambda x: x.squeeze(-1)),
        (nn.AvgPool1d(4), lambda x: x.squeeze(-1)),
    ],
)
def test_other_squeezes_are_no_layer(pool, squeeze):
    shape = (2, 4, 5) if isinstance(pool, nn.AdaptiveAvgPool2d) else (2, 5)
    assert isinstance(describe(Squeezing(pool, squeeze), shape), Unsupported)


class Viewing(nn.Module):
    """Rows brought into the shape of a convolution, and out of it, as people write it."""

    def __init__(self, conv, shape, flat):
        super().__init__()
        self.conv, self.shape, self.flat = conv, shape, flat
        self.head = nn.Linear(flat, 3)

    def forward(self, x):
        x = torch.relu(self.conv(self.into(x)))
        return self.head(self.out_of(x))

    def into(self, x):
        return x.view(-1, *self.shape)

    def out_of(self, x):
        return x.view(-1, self.flat)


class ViewingBySize(Viewing):
    def into(self, x):
        return x.reshape((x.size(0), *self.shape))

    def out_of(self, x):
        return torch.reshape(x, shape=(x.shape[0], self.flat))


@pytest.mark.parametrize("kind", [Viewing, ViewingBySize])
@pytest.mark.parametrize("axes", [1, 2])
def test_a_view_gives_each_row_its_shape(kind, axes):
    if kind is ViewingBySize:
        skip_before_torch(2, 9, "traces that hand a size to torch.reshape")
    conv, shape, flat = [(nn.Conv1d(2, 4, 3), (2, 6), 16), (nn.Conv2d(1, 4, 2), (1, 4, 3), 24)][
        axes - 1
    ]
    net = kind(conv, shape, flat).double()
    data = episodes((12,))
    shaped = [x.reshape(*x.shape[:2], *shape) if x.dim() == 3 else x for x in data]
    found = []
    for given in (data, shaped):  # a view takes rows of any shape
        for backend in ("torch", "native"):
            maml = pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=2, backend=backend)
            out = maml(*given)
            out.loss.backward()
            found.append([out.predictions, *(p.grad.clone() for p in net.parameters())])
            maml.zero_grad()
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)
    assert describe(net, (12,)).flattens
    net.shape, before = (12, 1), describe(net, (12,))
    assert not before.watch.is_current()


@pytest.mark.parametrize(
    "conv, shape, flat",
    [
        (nn.Conv1d(2, 4, 3), (2, 6), 8),  # torch makes two rows of each
        (nn.Conv1d(2, 4, 3), (2, 6), 48),  # and one of three
    ],
)
def test_a_view_that_makes_other_rows_is_no_layer(conv, shape, flat):
    net = Viewing(conv, shape, flat)
    assert len(net(torch.ones(6, 12))) in (12, 2)
    assert "another number of features" in describe(net, (12,)).reason


def test_a_view_behind_features_of_another_number_is_no_layer():
    net = Viewing(nn.Conv1d(2, 4, 3), (2, 6), 16)
    assert isinstance(describe(nn.Sequential(nn.Linear(5, 24), net), (5,)), Unsupported)
    assert not isinstance(describe(nn.Sequential(nn.Linear(5, 12), net), (5,)), Unsupported)


class Traced(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_a_forward_that_calls_functions_is_traced():
    found = describe(Traced(), (1, 6, 6))
    kinds = [layer[0] for layer in found.layers]
    assert kinds == [
        "image", "conv2d", "relu", "max_pool2d", "global_avg_pool2d", "flatten", "linear",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "layers, reason",
    [
        ((nn.Conv2d(1, 2, 3, padding_mode="reflect"), nn.Flatten()), "padding_mode"),
        ((nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, ceil_mode=True), nn.Flatten()), "ceil_mode"),
        ((nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d((2, None)), nn.Flatten()), "adaptive pooling"),
        ((nn.Conv2d(1, 2, 3), nn.AdaptiveMaxPool2d(3), nn.Flatten()), "do not divide"),
        ((nn.Conv2d(1, 2, 3), nn.AdaptiveMaxPool2d(2, True), nn.Flatten()), "returns indices"),
        ((nn.Conv2d(1, 2, 3), nn.ZeroPad2d(-2), nn.Flatten()), "does not fit"),
        ((nn.Conv2d(1, 2, 3), images.Part((slice(5, 9),)), nn.Flatten()), "without positions"),
        ((nn.Conv2d(1, 2, 3), images.Part((slice(None), 1)), nn.Flatten()), "column of an image"),
        ((nn.Conv2d(1, 2, 3), nn.ConstantPad2d(1, 2.0), nn.Flatten()), "by 2.0"),
        ((nn.Conv2d(1, 2, 3), nn.LayerNorm((4,)), nn.Flatten()), "layer 1 .LayerNorm. does not"),
        ((nn.Conv2d(1, 2, 3), nn.LayerNorm((4, 4)), nn.Flatten()), "layer 1 .LayerNorm. does not"),
        ((nn.Conv2d(1, 2, 3), nn.Linear(4, 2), nn.Flatten()), "layer 1 .Linear. does not take"),
        ((nn.Conv2d(1, 2, 3),), "flatten it"),
        ((nn.Conv1d(1, 2, 3), nn.Flatten()), "layer 0 .Conv1d. does not take"),
        ((nn.Conv2d(1, 2, 9), nn.Flatten()), "does not fit"),
        ((nn.Conv2d(3, 2, 3), nn.Flatten()), "features"),
        ((nn.Conv2d(1, 2, (1, 300), padding=(0, 300)), nn.Flatten()), "taps"),
    ],
)
def test_what_images_the_core_lacks(layers, reason):
    found = describe(nn.Sequential(*layers), (1, 6, 6))
    assert isinstance(found, Unsupported)
    assert reason in found.reason.replace("(", ".").replace(")", ".") or reason in found.reason
