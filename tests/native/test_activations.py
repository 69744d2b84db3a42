"""Value, slope and curvature of the native activations against float64, over their whole range."""

import math

import pytest
import torch
from helpers import gradients
from kernels import (
    ACTIVATIONS,
    DTYPES,
    EPS,
    PATHS,
    magnitudes,
    using,
)
from torch import nn

import pymeta


def grid(dtype: torch.dtype) -> torch.Tensor:
    """4096 numbers: dense where functions bend, both tails, zeros, denormals."""
    tiny = torch.finfo(dtype).tiny
    parts = [
        torch.linspace(-12, 12, 2000, dtype=torch.float64),
        torch.linspace(-120, 120, 1000, dtype=torch.float64),
        *(s * torch.logspace(math.log10(tiny) - 2, 1, 500, dtype=torch.float64) for s in (1, -1)),
        torch.tensor([0.0, -0.0, tiny, -tiny], dtype=torch.float64),
    ]
    values = torch.cat(parts).to(dtype)
    return torch.cat([values, torch.full((4096 - len(values),), 0.5, dtype=dtype)])


def wanted_derivatives(name: str, z: torch.Tensor) -> list[torch.Tensor]:
    """Value, slope and curvature in float64: torch's, where those are exact in the tails."""
    z = z.double().clone().requires_grad_()
    f = ACTIVATIONS[name]().double()
    value = f(z)
    slope = torch.autograd.grad(value.sum(), z, create_graph=True)[0]
    curvature = torch.zeros_like(z)
    if slope.requires_grad:
        curvature = torch.autograd.grad(slope.sum(), z)[0]
    if name == "gelu":  # torch's 1 + erf loses the lower tail
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        cdf = 0.5 * torch.special.erfc(-z / math.sqrt(2))
        value, slope, curvature = z * cdf, cdf + z * density, density * (2 - z * z)
    if name == "silu":
        value = z * torch.sigmoid(z)
    if name.startswith("elu"):  # some versions of torch subtract 1 from exp(z)
        value = torch.where(z > 0, z, f.alpha * torch.expm1(z))
    return [v.detach() for v in (value, slope, curvature)]


def native_derivatives(name: str, z: torch.Tensor) -> list[torch.Tensor]:
    """Value, slope and curvature out of a chain of one Linear and the activation.

    4096 tasks of one row each, a power of two. Huber's slope is -delta = -1 for targets far above.
    No steps: predictions are f(z), and the gradient towards xq is -f'(z). One step of lr 1 on the
    bias moves it by f'(z_support); the gradient towards xs is then f''(z_support) times that
    towards xq, whatever the query is.
    """
    net = nn.Sequential(nn.Linear(1, 1), ACTIVATIONS[name]()).to(z.dtype)
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.zero_()
    xs = z.clone().view(-1, 1, 1).requires_grad_()
    y = torch.full_like(xs, 1e30).detach()
    module = pymeta.MAML(net, loss="huber", lr=1.0, steps=1, adapt=["0.bias"], backend="native")
    out = module(xs, y, xs, y, steps=0)
    slope = -gradients(out.loss, xs)[0] * len(z)
    # wherever f' moves it, no activation is flat at a query near 0.25
    xq = torch.full_like(xs, 0.25).detach().requires_grad_()
    second = gradients(module(xs, y, xq, y).loss, xs, xq)
    return [out.predictions.flatten(), slope.flatten(), (second[0] / second[1]).flatten()]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_activations(name, dtype):
    """Within 8 eps of the magnitudes each formula adds up (a few ulp), and 16 of float64's own.

    A sigmoid or an exponential below the smallest normal number may be flushed to zero: `tiny`,
    times what it is multiplied by (z, and in the second derivative a quotient).
    """
    z = grid(dtype)
    wanted = wanted_derivatives(name, z)
    if name == "softplus_3":  # at the threshold the value jumps, and the grid may hit it
        z = torch.where((3 * z.double() - 2).abs() < 1e-5, torch.zeros_like(z), z)
        wanted = wanted_derivatives(name, z)
    scales = magnitudes(name, z.double(), wanted[0])
    factor = 8 if dtype == torch.float32 else 16
    tiny = torch.finfo(dtype).tiny
    for isa, executor in PATHS:
        with using(isa, executor, threads=1):
            got = native_derivatives(name, z)
        for order, (g, w, s) in enumerate(zip(got, wanted, scales, strict=True)):
            excess = (
                (g.double() - w).abs()
                - factor * EPS[dtype] * s
                - (4 + z.double().abs() + 4096 * order) * tiny
            )
            worst = int(excess.argmax())
            ulps = float((g.double() - w).abs()[worst] / EPS[dtype] / s[worst])
            assert excess[worst] <= 0, (
                f"{isa} {executor}: derivative {order} at {float(z[worst])!r} is "
                f"{float(g[worst])!r}, wanted {float(w[worst])!r}: {ulps:.1f} eps"
            )
