"""Networks over sequences and images, drawn at random: chains for `cases.Case`.

A layer is a tuple as in `kernels.py`; its second and third values, where it has as many, are how
many terms its sums have and how many outputs, as those of a linear layer are.
"""

from __future__ import annotations

import math

import torch
from blocks import JOINS, branches, normalisation, residual
from channels_last import ConvNeXt, last
from hypothesis import strategies as st
from kernels import ACTIVATIONS, SOMETIMES
from torch import nn

CHANNELS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 24, 33)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
POOLS = ((nn.MaxPool1d, nn.MaxPool2d), (nn.AvgPool1d, nn.AvgPool2d))
GLOBAL = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
ADAPTIVE = {
    "adaptive_max_pool": (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    "adaptive_avg_pool": GLOBAL,
}
PADS = (nn.ZeroPad1d, nn.ZeroPad2d)
KINDS = (
    "conv", "max_pool", "avg_pool", "global_pool", "batch_norm_image", "group_norm", "flatten",
    "layer_norm_image", "zeros", "part", "layer_norm_last", "conv_norm_block", *ADAPTIVE,
)  # fmt: skip


class Part(nn.Module):
    """Some positions, by an index for each axis of theirs."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, x):
        return x[(slice(None), slice(None), *self.index)].contiguous()


def conv(inputs, outputs, kernel, stride=1, padding=0, dilation=1, groups=1, bias=True):
    """A convolution of as many axes as the kernel has."""
    terms = inputs // groups * math.prod(kernel)
    return ("conv", terms, outputs, inputs, kernel, stride, padding, dilation, groups, bias)


WINOGRAD = 16  # channels, at least, on both sides of what csrc/cpu/winograd.h may do


def may_transform(layer: tuple) -> bool:
    """Whether a layer is of a kind that Winograd's transforms are used for."""
    if layer[0] != "conv" or layer[4] != (3, 3) or min(layer[2], layer[3]) < WINOGRAD:
        return False
    _, _, _, _, _, stride, _, dilation, groups, _ = layer
    return all(v in (1, (1, 1)) for v in (stride, dilation)) and groups == 1


def layer_norm(shape, weight=True, bias=True):
    """A LayerNorm over rows of a shape."""
    return ("layer_norm_image", math.prod(shape), 1, weight, bias, tuple(shape))


def layer_norm_last(channels, axes, weight=True, bias=True):
    """A LayerNorm over the channels of each position, between two permutations."""
    return ("layer_norm_last", channels, channels, weight, bias, axes)


def conv_norm_block(channels, axes, kernel, scaled, activation):
    """ConvNeXt's block."""
    terms = max(4 * channels, kernel**axes)
    return ("conv_norm_block", terms, channels, True, channels, axes, kernel, scaled, activation)


def make_image_layer(layer: tuple) -> nn.Module:
    """The module of a layer whose kind is in KINDS."""
    kind, *values = layer
    if kind == "conv":
        _, outputs, inputs, kernel, stride, padding, dilation, groups, bias = values
        return CONVOLUTIONS[len(kernel) - 1](
            inputs, outputs, kernel, stride, padding, dilation, groups, bias
        )
    if kind == "max_pool":
        axes, kernel, stride, padding, dilation = values
        return POOLS[0][axes - 1](kernel, stride, padding, dilation)
    if kind == "avg_pool":
        axes, kernel, stride, padding, counts = values
        return POOLS[1][axes - 1](kernel, stride, padding, count_include_pad=counts)
    if kind == "global_pool":
        return GLOBAL[values[0] - 1](1)
    if kind == "batch_norm_image":
        return NORMS[values[2] - 1](values[0], affine=values[3])
    if kind == "group_norm":
        return nn.GroupNorm(values[2], values[0], affine=values[3])
    if kind == "layer_norm_image":
        _, _, weight, bias, shape = values
        return nn.LayerNorm(shape, elementwise_affine=weight, bias=bias)
    if kind == "layer_norm_last":
        channels, _, weight, bias, axes = values
        return last(axes, nn.LayerNorm(channels, elementwise_affine=weight, bias=bias))
    if kind == "conv_norm_block":
        _, _, _, channels, axes, kernel, scaled, activation = values
        convolution = CONVOLUTIONS[axes - 1]
        return ConvNeXt(channels, kernel, scaled, ACTIVATIONS[activation], convolution)
    if kind == "zeros":
        axes, sides = values
        return PADS[axes - 1](sides)
    if kind == "part":
        return Part(tuple(slice(*ends) for ends in values[1]))
    if kind in ADAPTIVE:
        axes, sizes = values
        return ADAPTIVE[kind][axes - 1](sizes)
    return nn.Flatten()


def _left(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _divisors(a: int, b: int) -> list[int]:
    return [n for n in range(1, min(a, b) + 1) if a % n == 0 and b % n == 0]


class _Growing:
    """A chain while it is drawn: what its last layer gives."""

    def __init__(self, draw, axes: int) -> None:
        sizes = st.integers(1, 8 if axes == 2 else 14)
        self.draw, self.axes = draw, axes
        self.channels = draw(st.sampled_from(CHANNELS))
        self.sizes = [draw(sizes) for _ in range(axes)]
        self.chain = [("rows", (self.channels, *self.sizes))]

    def convolve(self) -> None:
        draw = self.draw
        outputs = draw(st.sampled_from(CHANNELS))
        groups = draw(st.sampled_from([1, 1, *_divisors(self.channels, outputs)]))
        kernel, sizes, settings = [], [], []
        same = draw(st.integers(0, 4)) == 0
        for size in self.sizes:
            k, s, d = (draw(st.integers(1, n)) for n in (3, 3, 2))
            p = draw(st.integers(0, 2))
            if same:
                kernel, sizes = [*kernel, k], [*sizes, size]
                settings.append((1, 0, d))
                continue
            while _left(size, k, s, p, d) < 1:
                k -= 1
            kernel, sizes = [*kernel, k], [*sizes, _left(size, k, s, p, d)]
            settings.append((s, p, d))
        stride, padding, dilation = zip(*settings, strict=True)
        self.chain.append(
            conv(
                self.channels, outputs, tuple(kernel), stride, "same" if same else padding,
                dilation, groups, draw(st.booleans()),
            )
        )  # fmt: skip
        self.channels, self.sizes = outputs, sizes

    def surround(self) -> None:
        """Zeros around it, such as those of a causal convolution, or fewer positions."""
        sides: list[int] = []
        for size in reversed(self.sizes):  # torch begins with the last axis
            least = -2 if size > 5 else 0  # so that some is left on each side
            sides += self.draw(st.lists(st.integers(least, 2), min_size=2, max_size=2))
        self.chain.append(("zeros", self.axes, tuple(sides)))
        pairs = [sum(sides[i : i + 2]) for i in range(0, len(sides), 2)]
        self.sizes = [n + more for n, more in zip(self.sizes, reversed(pairs), strict=True)]

    def take(self) -> None:
        """Some of the positions."""
        ends, sizes = [], []
        for size in self.sizes:
            first = self.draw(st.sampled_from([None, 0, size // 2, -1, -size]))
            last = self.draw(st.sampled_from([None, size, -1 if size > 1 else None]))
            step = self.draw(st.sampled_from([None, 1, 2, 3]))
            left = len(range(size)[slice(first, last, step)])
            if left == 0:
                last, left = None, len(range(size)[slice(first, None, step)])
            ends.append((first, last, step))
            sizes.append(left)
        self.chain.append(("part", self.axes, tuple(ends)))
        self.sizes = sizes

    def adapt(self) -> None:
        """A pooling to sizes that divide those there are."""
        sizes = [self.draw(st.sampled_from(_divisors(n, n))) for n in self.sizes]
        self.chain.append((self.draw(st.sampled_from(sorted(ADAPTIVE))), self.axes, tuple(sizes)))
        self.sizes = sizes

    def pool(self) -> None:
        draw = self.draw
        if draw(st.integers(0, 5)) == 0:
            return self.adapt()
        k, s = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        p = draw(st.integers(0, k // 2))
        kind, last = draw(st.sampled_from(["max_pool", "max_pool", "avg_pool"])), 1
        if kind == "max_pool":
            last = draw(st.integers(1, 2))
            # torch 2.13 writes past the end where a window sees padding only
            p = p if last == 1 else 0
        else:
            last = draw(st.booleans())
        sizes = [_left(n, k, s, p, last if kind == "max_pool" else 1) for n in self.sizes]
        if min(sizes) < 1:
            return
        self.chain.append((kind, self.axes, k, s, p, last))
        self.sizes = sizes

    def normalise(self) -> None:
        affine = self.draw(st.booleans())
        many = math.prod(self.sizes) > 1  # of one value torch takes no statistics
        kind = self.draw(st.integers(0, 5))
        if many and kind == 5:
            bias = affine and self.draw(st.booleans())
            self.chain.append(layer_norm((self.channels, *self.sizes), affine, bias))
            return
        if many and kind == 0:
            groups = self.draw(st.sampled_from(_divisors(self.channels, self.channels)))
            self.chain.append(("group_norm", self.channels, self.channels, groups, affine))
            return
        if 2 < kind < 5:
            kinds = ("fixed_norm", "step_norm", *["instance_norm"] * many)
            self.chain.append(normalisation(self.draw, kinds, self.channels, self.axes))
            return
        self.chain.append(("batch_norm_image", self.channels, self.channels, self.axes, affine))

    def activate(self) -> None:
        self.chain.append((self.draw(st.sampled_from(sorted(ACTIVATIONS))),))

    def branch(self) -> None:
        """A residual block of convolutions that keep the sizes, with a projection or without."""
        draw, inputs = self.draw, self.channels
        inner, outputs = draw(st.sampled_from(CHANNELS)), inputs
        shortcut = None
        if draw(st.booleans()):
            outputs = draw(st.sampled_from(CHANNELS))
            shortcut = [conv(inputs, outputs, (1,) * self.axes, bias=draw(st.booleans()))]
            if draw(SOMETIMES):
                shortcut.append(("batch_norm_image", outputs, outputs, self.axes, True))
        layers = [
            conv(inputs, inner, (3,) * self.axes, padding="same", bias=False),
            ("batch_norm_image", inner, inner, self.axes, True),
            (draw(st.sampled_from(sorted(ACTIVATIONS))),),
            conv(inner, outputs, (draw(st.integers(1, 3)),) * self.axes, padding="same"),
        ]
        self.chain.append(residual(inputs, outputs, layers, shortcut))
        self.channels = outputs

    def join(self) -> None:
        """Convolutions side by side, or channels weighed by what their means give."""
        draw, inputs, one = self.draw, self.channels, (1,) * self.axes
        if draw(SOMETIMES):
            weights = [("global_pool", self.axes), conv(inputs, inputs, one), ("sigmoid",)]
            self.chain.append(branches(inputs, inputs, "multiply", [(), weights]))
            return
        join, outputs = draw(st.sampled_from(JOINS)), draw(st.sampled_from(CHANNELS))
        widths = [draw(st.sampled_from(CHANNELS)) for _ in range(draw(st.integers(2, 3)))]
        if join != "concatenate":
            widths = [outputs] * len(widths)
        chains = [
            [conv(inputs, width, (draw(st.integers(1, 3)),) * self.axes, padding="same"),
             (draw(st.sampled_from(["tanh", "sigmoid", "silu"])),)]
            for width in widths
        ]  # fmt: skip
        self.channels = sum(widths) if join == "concatenate" else outputs
        self.chain.append(branches(inputs, self.channels, join, chains))
        if self.channels % 2 == 0 and draw(SOMETIMES):
            self.channels //= 2
            self.chain.append(("glu", 2 * self.channels, self.channels))


@st.composite
def image_chains(draw):
    """Convolutions, poolings, normalisations and activations, then a linear layer."""
    growing = _Growing(draw, draw(st.sampled_from([1, 2, 2])))
    for i in range(draw(st.integers(1, 3))):
        if i == 0 and draw(SOMETIMES):
            growing.pool()
        if draw(SOMETIMES):
            growing.surround()
        if draw(SOMETIMES):
            growing.take()
        kind = draw(st.integers(0, 5)) if i > 0 else 0
        if kind == 5:
            growing.branch()
        elif kind == 4:
            growing.join()
        elif i == 0 or draw(st.integers(0, 3)):
            growing.convolve()
        if draw(SOMETIMES):
            growing.take()
        for step in (growing.normalise, growing.activate, growing.pool):
            if draw(st.booleans()):
                step()
    features = growing.channels
    if draw(st.integers(0, 3)) == 0:
        growing.chain.append(("global_pool", growing.axes))
    else:
        features *= math.prod(growing.sizes)
    growing.chain.append(("flatten",))
    if draw(st.booleans()):
        growing.activate()
    growing.chain.append(("linear", features, draw(st.sampled_from([1, 3, 5])), True))
    return tuple(growing.chain)


@st.composite
def channels_last_chains(draw):
    """Convolutions, and what is done while the channels are last, then a linear layer."""
    growing = _Growing(draw, draw(st.sampled_from([1, 2, 2])))
    axes, affine = growing.axes, draw(st.booleans())
    for i in range(draw(st.integers(1, 3))):
        if i == 0 or draw(SOMETIMES):
            growing.convolve()
        if draw(st.booleans()):
            bias = affine and draw(st.booleans())
            growing.chain.append(layer_norm_last(growing.channels, axes, affine, bias))
        if draw(st.booleans()):
            growing.activate()
        if draw(st.booleans()):
            kernel, activation = (
                draw(st.sampled_from([1, 3, 5])),
                draw(st.sampled_from(sorted(ACTIVATIONS))),
            )
            scaled = draw(st.booleans())
            growing.chain.append(
                conv_norm_block(growing.channels, axes, kernel, scaled, activation)
            )
    features = growing.channels * math.prod(growing.sizes)
    growing.chain += [("flatten",), ("linear", features, draw(st.sampled_from([1, 3, 5])), True)]
    return tuple(growing.chain)


def episodes(shape, tasks=2, support=4, query=3, dtype=torch.float64):
    """xs, ys, xq, yq of rows of a shape, of three classes."""
    torch.manual_seed(7)
    xs, xq = (torch.randn(tasks, n, *shape, dtype=dtype) for n in (support, query))
    ys, yq = (torch.randint(0, 3, (tasks, n)) for n in (support, query))
    return xs, ys, xq, yq
