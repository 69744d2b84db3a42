"""Networks whose channels are last for a while, as practitioners write them."""

import torch
from torch import nn
from torch.nn import functional as F


class LayerNorm2d(nn.LayerNorm):
    """As torchvision has it."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Between(nn.Module):
    """Modules, one after the other, between what is done to the axes and what undoes it."""

    def __init__(self, there, back, *inner):
        super().__init__()
        self.there, self.back, self.inner = there, back, nn.Sequential(*inner)

    def forward(self, x):
        return self.back(self.inner(self.there(x)))


class Permute(nn.Module):
    """As torchvision.ops has it."""

    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return torch.permute(x, self.dims)


class Functional(nn.Module):
    """The normalisation and the product by their functions, with or without what is learned."""

    def __init__(self, channels, outputs, weight=True, bias=True):
        super().__init__()
        self.norm = nn.LayerNorm(channels, 1e-3, weight, weight and bias)
        self.mix = nn.Linear(channels, outputs, bias)

    def forward(self, x):
        x = torch.transpose(x, 1, -1)
        x = F.layer_norm(x, list(self.norm.normalized_shape), self.norm.weight,
                         eps=self.norm.eps, bias=self.norm.bias)  # fmt: skip
        x = F.linear(x, self.mix.weight, self.mix.bias)
        return x.transpose(1, -1)


class ConvNeXt(nn.Module):
    """A block as Liu et al. 2022 wrote it: its last scale is a parameter of its own."""

    def __init__(self, channels, kernel=7, scaled=True, act=nn.GELU, conv=nn.Conv2d):
        super().__init__()
        self.dwconv = conv(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = act()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(0.5 * torch.randn(channels)) if scaled else None

    def forward(self, x):
        given = x
        x = self.dwconv(x)
        x = x.movedim(1, -1)  # (N, C, H, W) -> (N, H, W, C), or (N, C, L) -> (N, L, C)
        x = self.norm(x)
        x = self.pwconv1(x)
        x = self.act(x)
        x = self.pwconv2(x)
        if self.gamma is not None:
            x = self.gamma * x
        x = x.movedim(-1, 1)
        return given + x


class CNBlock(nn.Module):
    """The same as torchvision has it, less its scale: modules in a row, the permutations too."""

    def __init__(self, channels):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(channels),
            nn.Linear(channels, 3 * channels),
            nn.GELU(),
            nn.Linear(3 * channels, channels, bias=False),
            Permute([0, 3, 1, 2]),
        )

    def forward(self, x):
        result = self.block(x)
        result += x
        return result


class Mixer(nn.Module):
    """Sums, gates, parts and concatenations of sequences while their channels are last."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.wide = nn.LayerNorm(channels), nn.Linear(channels, 4 * channels)
        self.narrow, self.scale = (
            nn.Linear(2 * channels, channels),
            nn.Parameter(torch.ones(channels)),
        )
        self.gate, self.join = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x):
        x = x.movedim(1, -1).contiguous()
        a, b = self.wide(self.norm(x)).chunk(2, -1)
        x = x + self.narrow(torch.tanh(a) * b.sigmoid()) * self.scale
        x = torch.cat([torch.sigmoid_(1 - x), F.glu(self.gate(x))], dim=2)
        return self.join(x).swapaxes(2, 1)


def images(*inner):
    """Between the usual permutations."""
    return Between(lambda x: x.permute(0, 2, 3, 1), lambda x: x.permute(0, 3, 1, 2), *inner)


def sequences(*inner):
    """Between the usual transpositions."""
    return Between(lambda x: x.transpose(1, 2), lambda x: torch.transpose(x, -1, -2), *inner)


def last(axes, *inner):
    """Either, for so many axes of positions."""
    return (sequences, images)[axes - 1](*inner)


def pooled(channels, axes):
    return (
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[axes - 1](1),
        nn.Flatten(),
        nn.Linear(channels, 3),
    )


# Of sequences [2, 7] where "sequence" is in the name, else of images [2, 5, 4].
NETS = {
    "LayerNorm2d": lambda: (
        nn.Conv2d(2, 17, 3), LayerNorm2d(17, eps=1e-4), nn.SiLU(), *pooled(17, 2),
    ),
    "first": lambda: (
        LayerNorm2d(2, elementwise_affine=False), nn.Conv2d(2, 3, 3), nn.Flatten(),
        nn.Linear(18, 3),
    ),
    "between permutes": lambda: (
        nn.Conv2d(2, 5, 2),
        images(nn.LayerNorm(5, bias=False), nn.Tanh(), nn.Linear(5, 6), nn.Dropout().eval()),
        nn.Conv2d(6, 3, 2), nn.Flatten(), nn.Linear(18, 3),
    ),
    "between permutes by name": lambda: (
        Between(
            lambda x: x.permute(dims=(0, -2, -1, -3)).contiguous(),
            lambda x: torch.permute(x, dims=[0, 3, 1, 2]), nn.Linear(2, 18), nn.LayerNorm(18),
        ),
        nn.Conv2d(18, 3, (5, 4)), nn.Flatten(),
    ),
    "width first": lambda: (
        nn.Conv2d(2, 3, (2, 1)), Functional(3, 4), Functional(4, 4, bias=False),
        Functional(4, 2, False), nn.Conv2d(2, 2, (2, 1)), nn.Flatten(), nn.Linear(24, 3),
    ),
    "moved": lambda: (
        Between(
            lambda x: torch.movedim(x, (2, 3), (1, 2)), lambda x: torch.moveaxis(x, 3, 1),
            nn.LayerNorm(2), nn.GELU(),
        ),
        nn.Flatten(), nn.Linear(40, 3),
    ),
    "there in two steps": lambda: (
        nn.Conv2d(2, 4, 1),
        Between(
            lambda x: x.swapdims(1, 2).sigmoid().transpose(2, 3),
            lambda x: x.permute(0, 3, 1, 2), nn.LayerNorm(4),
        ),
        nn.Flatten(), nn.Linear(80, 3),
    ),
    "ConvNeXt": lambda: (
        nn.Conv2d(2, 4, 1), ConvNeXt(4), LayerNorm2d(4), ConvNeXt(4, 3, False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3),
    ),
    "torchvision's block": lambda: (nn.Conv2d(2, 4, 1), CNBlock(4), *pooled(4, 2)),
    "sequence": lambda: (
        nn.Conv1d(2, 17, 2), sequences(nn.LayerNorm(17), nn.SiLU()), *pooled(17, 1),
    ),
    "sequence of products": lambda: (
        sequences(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)), nn.Flatten(),
        nn.Linear(14, 3),
    ),
    "sequence by functions": lambda: (nn.Conv1d(2, 3, 2), Functional(3, 5), *pooled(5, 1)),
    "mixed sequence": lambda: (nn.Conv1d(2, 3, 2), Mixer(3), *pooled(3, 1)),
}  # fmt: skip


def made(name):
    """A network in double, and xs, ys, xq, yq of three tasks."""
    torch.manual_seed(4)
    net = nn.Sequential(*NETS[name]()).double()
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            for p in module.parameters():
                nn.init.normal_(p, mean=0.5)
    shape = (2, 7) if "sequence" in name else (2, 5, 4)
    xs, xq = (torch.randn(3, n, *shape, dtype=torch.float64) for n in (5, 4))
    out = net(xs[0]).shape[1]
    ys, yq = (torch.randn(3, n, out, dtype=torch.float64) for n in (5, 4))
    return net, (xs, ys, xq, yq)
