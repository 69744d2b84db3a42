"""Networks with branches, as practitioners write them, for test_branches.py."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from pymeta.nn import Branches, Residual


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


class WaveNet(nn.Module):
    """Gated causal convolutions (van den Oord et al. 2016); the sum of what all blocks skip to."""

    def __init__(self, channels, blocks, chunks=False):
        super().__init__()
        self.chunks = chunks
        wide = channels * (2 if chunks else 1)
        self.filters = nn.ModuleList(
            nn.Conv1d(channels, wide, 2, dilation=2**i) for i in range(blocks)
        )
        self.gates = nn.ModuleList(
            nn.Conv1d(channels, channels, 2, dilation=2**i) for i in range(0 if chunks else blocks)
        )
        self.residuals = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(blocks))
        self.skips = nn.ModuleList(nn.Conv1d(channels, channels + 1, 1) for _ in range(blocks))

    def forward(self, x):
        skips = []
        for i, (residual, skip) in enumerate(zip(self.residuals, self.skips, strict=True)):
            padded = F.pad(x, (2**i, 0))
            if self.chunks:
                a, b = self.filters[i](padded).chunk(2, dim=1)
            else:
                a, b = self.filters[i](padded), self.gates[i](padded)
            z = torch.tanh(a) * torch.sigmoid(b)
            skips.append(skip(z))
            x = (x + residual(z)) * math.sqrt(0.5)
        return torch.tanh(sum(skips))


class Excited(nn.Module):
    """Channels weighed by what a small network makes of their means (Hu et al. 2018)."""

    def __init__(self, channels, axes):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1d(1) if axes == 1 else nn.AdaptiveAvgPool2d(1)
        self.axes = axes
        self.fc = nn.Sequential(
            nn.Linear(channels, 2), nn.SiLU(), nn.Linear(2, channels), nn.Sigmoid()
        )

    def forward(self, x):
        n, c, *_ = (x.size(i) for i in range(2))
        weights = self.fc(self.pool(x).view(n, c))
        if self.axes == 1:
            return x * weights.unsqueeze(-1)
        return x * weights.view(n, c, 1, 1).expand_as(x)


class Inception(nn.Module):
    """A module of InceptionTime (Fawaz et al. 2020)."""

    def __init__(self, channels, width):
        super().__init__()
        self.bottleneck = nn.Conv1d(channels, width, 1, bias=False)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, k, padding="same", bias=False) for k in (5, 3, 2)
        )
        self.pool = nn.Sequential(nn.MaxPool1d(3, 1, 1), nn.Conv1d(channels, width, 1, bias=False))
        self.norm = nn.BatchNorm1d(4 * width, track_running_stats=False)

    def forward(self, x):
        z = self.bottleneck(x)
        branches = [convolution(z) for convolution in self.convolutions]
        return F.softplus(self.norm(torch.cat([*branches, self.pool(x)], dim=1)))


class Dense(nn.Module):
    """Each layer sees what all before it gave (Huang et al. 2017)."""

    def __init__(self, channels, growth, layers):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(layers)
        )

    def forward(self, x):
        found = [x]
        for layer in self.layers:
            found.append(torch.tanh(layer(torch.cat(found, 1))))
        return torch.cat(found, 1)


class Highway(nn.Module):
    """t h(x) + (1 - t) x (Srivastava et al. 2015)."""

    def __init__(self, width):
        super().__init__()
        self.h, self.t = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        t = torch.sigmoid(self.t(x))
        return t * torch.tanh(self.h(x)) + (1 - t) * x


class WideAndDeep(nn.Module):
    """Raw features beside what a network made of them, and a linear head of their own."""

    def __init__(self, features, width, outputs):
        super().__init__()
        self.deep = nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, width))
        self.wide = nn.Linear(features, outputs)
        self.head = nn.Linear(features + width, outputs)

    def forward(self, x):
        return self.head(torch.cat((x, self.deep(x)), dim=-1)) - 0.5 * self.wide(x)


class Parts(nn.Module):
    """Channels taken apart, exchanged, and a value joined to itself."""

    def __init__(self, channels):
        super().__init__()
        self.mix = nn.Conv1d(channels, channels, 3, padding="same")

    def forward(self, x):
        a, b, c = torch.split(self.mix(x), [2, 1, 3], dim=1)
        z = torch.cat([c, a[:, :, :], b, x[:, -2:]], 1)
        return z * z + torch.cat([z, z], 1)[:, 3:11]


def dense(width, *behind):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), *behind)


def gate(inputs, outputs):
    return Branches(
        [nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh()),
         nn.Sequential(nn.Linear(inputs, outputs), nn.Sigmoid())], "multiply",
    )  # fmt: skip


def pooled(channels, outputs=3):
    return nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, outputs)


# Of rows of 2 features, sequences [2, 7] where "sequence" is in the name, or images [2, 5, 5].
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
    "gates": lambda: (gate(2, 18), nn.Linear(18, 10), nn.GLU(), gate(5, 3)),
    "highway": lambda: (Highway(2), nn.Linear(2, 20), Highway(20), nn.Linear(20, 3)),
    "wide and deep": lambda: (WideAndDeep(2, 17, 3),),
    "side by side": lambda: (
        Branches([nn.Identity(), nn.Linear(2, 16), gate(2, 16), nn.Linear(2, 1)], "concatenate"),
        Branches([nn.Linear(35, 3), nn.Linear(35, 3), nn.Sequential(nn.Tanh(), nn.Linear(35, 3))]),
    ),
    "gated sequence": lambda: (nn.Conv1d(2, 4, 1), WaveNet(4, 3), *pooled(5)),
    "sequence of chunks": lambda: (nn.Conv1d(2, 4, 1), WaveNet(4, 2, True), *pooled(5)),
    "sequence of GLUs": lambda: (nn.Conv1d(2, 34, 3, padding=1), nn.GLU(1), *pooled(17)),
    "excited sequence": lambda: (nn.Conv1d(2, 17, 3), Excited(17, 1), nn.Tanh(), *pooled(17)),
    "excited images": lambda: (nn.Conv2d(2, 5, 3), nn.Tanh(), Excited(5, 2), nn.Flatten(),
                               nn.Linear(45, 3)),
    "inception of a sequence": lambda: (
        Inception(2, 3), Residual(Inception(12, 4), nn.Conv1d(12, 16, 1)), *pooled(16),
    ),
    "dense images": lambda: (Dense(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(11, 3)),
    "parts of a sequence": lambda: (nn.Conv1d(2, 6, 2), Parts(6), *pooled(8)),
}  # fmt: skip


def made(name):
    """A network in double, and xs, ys, xq, yq of three tasks."""
    torch.manual_seed(2)
    net = nn.Sequential(*NETS[name]()).double()
    shape = (2, 5, 5) if "images" in name else (2, 7) if "sequence" in name else (2,)
    xs, xq = (torch.randn(3, n, *shape, dtype=torch.float64) for n in (5, 4))
    out = net(xs[0]).shape[1]
    ys, yq = (torch.randn(3, n, out, dtype=torch.float64) for n in (5, 4))
    return net, (xs, ys, xq, yq)
