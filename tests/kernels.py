"""What the tests of the kernels share: networks drawn at random, native options, bits."""

import itertools
import math
from contextlib import contextmanager

import torch
from draws import one_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from rounding import ALIKE, ROUNDED, OtherRounding
from torch import nn

import pymeta
from pymeta import native

DTYPES = (torch.float32, torch.float64)
EXECUTORS = ("rows", "lanes")
CPU_PATHS = list(itertools.product(native.isas(), EXECUTORS))
# and the CUDA executor's own code, its blocks emulated by threads of the host
PATHS = CPU_PATHS + [(native.isa(), "emulated")] * native.emulates()
ISAS = one_of(native.isas())
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}

settings.register_profile(
    "kernels",
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
PROFILE = settings.get_profile("kernels")


def takes(executor: str, learner) -> bool:
    """Whether an executor can run a learner's model: blocks take no more than 24 layers."""
    plan, _ = learner._current()
    if plan.unshaped:  # the first call tells
        return True
    return executor != "emulated" or plan.problem.unfit_for_device() is None


@contextmanager
def using(isa=None, executor=None, threads=None):
    """The native options of a block; they belong to the whole process and are put back.

    `threads` are those of a call on the CPU's executors, and those of a task on the emulated one.
    """
    before = native.isa(), native.executor(), native.num_threads(), native.block_threads()
    try:
        native.set_isa(isa or before[0])
        native.set_executor(executor or before[1])
        native.set_num_threads(threads or before[2])
        native.set_block_threads(threads or before[3])
        yield
    finally:
        native.set_isa(before[0])
        native.set_executor(before[1])
        native.set_num_threads(before[2])
        native.set_block_threads(before[3])


# Inner optimisers, all of them, and each of their options with something to do. Adam and RMSprop
# divide by sqrt(s) + eps: with a small eps that is a sign function of gradients near 0, which no
# rounding survives, so eps is large where results are compared through it.
OPTIMIZERS = {
    "plain": pymeta.SGD,
    "decay": lambda lr: pymeta.SGD(lr, weight_decay=0.1),
    "clip": lambda lr: pymeta.SGD(lr, clip_norm=0.3),
    "momentum": lambda lr: pymeta.SGD(lr, momentum=0.9, weight_decay=0.05),
    "nesterov": lambda lr: pymeta.SGD(lr, momentum=0.7, nesterov=True, clip_norm=0.5),
    "adam": lambda lr: pymeta.Adam(lr, eps=0.05),
    "adam, decay": lambda lr: pymeta.Adam(lr, (0.8, 0.9), 0.1, weight_decay=0.2, clip_norm=0.4),
    "adam without momentum": lambda lr: pymeta.Adam(lr, (0.0, 0.999), 0.1),
    "adamw": lambda lr: pymeta.Adam(lr, (0.9, 0.95), 0.1, weight_decay=0.2, decoupled=True),
    "rmsprop": lambda lr: pymeta.RMSprop(lr, 0.9, 0.1, weight_decay=0.1, clip_norm=0.4),
    "rmsprop, momentum": lambda lr: pymeta.RMSprop(lr, 0.95, 0.1, momentum=0.7),
    "rmsprop, centered": lambda lr: pymeta.RMSprop(lr, 0.8, 0.1, momentum=0.5, centered=True),
}

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.25),
    "leaky_relu_0": lambda: nn.LeakyReLU(0.0),
    "elu": nn.ELU,
    "elu_2": lambda: nn.ELU(2.0),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "softplus": nn.Softplus,
    "softplus_3": lambda: nn.Softplus(beta=3.0, threshold=2.0),
}


# Beyond it sigmoid and the normal distribution are 0 or 1 to the last bit of both dtypes.
CAP = 80.0


def gelu_tanh_inner(z):
    k, c = math.sqrt(2 / math.pi), 0.044715
    h = z.clamp(-20, 20)
    return h, k * (1 + 3 * c * h * h), 6 * c * k * h


def magnitudes(name: str, z: torch.Tensor, value: torch.Tensor) -> tuple:
    """For value, slope and curvature: the sum of the magnitudes that the formula adds up.

    This is what its rounding is relative to. Where the formula only multiplies, it is the result
    itself; a rounded exponent x makes exp(x) err by |x| eps.
    """
    one = torch.ones_like(z)
    sigmoid = torch.sigmoid(z)
    if name == "tanh":
        return value.abs(), one, 4 * one
    if name == "sigmoid":
        return value, one, 3 * one
    if name in ("elu", "elu_2"):
        alpha = 2.0 if name == "elu_2" else 1.0
        return value.abs(), alpha * one, alpha * one
    if name == "silu":
        reach = z.abs().clamp(max=CAP)
        return value.abs(), sigmoid * (1 + reach), sigmoid * (2 + reach)
    if name == "gelu":
        square = (z * z).clamp(max=CAP * 20)
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        cdf = 0.5 * torch.special.erfc(-z / math.sqrt(2))
        tail = torch.where(z < 0, 1 + square, one)
        first = cdf * tail + z.abs() * density * (1 + square)
        return value.abs() * tail, first, density * (2 + square) * (1 + square)
    if name == "gelu_tanh":
        h, du, ddu = gelu_tanh_inner(z)
        return z.abs(), 1 + h.abs() * du, du + h.abs() * (ddu.abs() + 2 * du * du) / 2
    if name in ("softplus", "softplus_3"):
        beta = 3.0 if name == "softplus_3" else 1.0
        exponent = 1 + (beta * z).abs() if beta != 1 else one  # 3 z is rounded, z is not
        slope = torch.sigmoid(beta * z) * exponent
        return value.abs() * exponent, slope, beta * slope
    return value.abs(), one, one  # relu, leaky_relu


def make_layer(layer: tuple) -> nn.Module:
    kind = layer[0]
    if kind == "linear":
        return nn.Linear(layer[1], layer[2], bias=layer[3])
    if kind == "batch_norm":
        return nn.BatchNorm1d(layer[1], affine=layer[3])
    if kind == "layer_norm":
        return nn.LayerNorm(layer[1], elementwise_affine=layer[3])
    return ACTIVATIONS[kind]()


WIDTHS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40])
SOMETIMES = st.sampled_from([False, False, True])


@st.composite
def chains(draw, max_layers=4):
    """Random chains: normalisations anywhere, stacked activations, one layer or several."""
    width, chain = draw(WIDTHS), []
    norms = st.sampled_from([None, None, None, "batch_norm", "layer_norm"])

    def normalise():
        kind = draw(norms)
        if kind:
            chain.append((kind, width, width, draw(st.booleans())))

    layers = draw(st.integers(1, max_layers))
    for i in range(layers):
        normalise()
        if not chain or draw(st.integers(0, 9)):
            out = draw(WIDTHS)
            chain.append(("linear", width, out, draw(st.sampled_from([True, True, False]))))
            width = out
        normalise()
        count = draw(st.sampled_from([0, 1, 1, 1, 2] if i + 1 < layers else [0, 0, 1]))
        chain.extend((draw(st.sampled_from(sorted(ACTIVATIONS))),) for _ in range(count))
    return tuple(chain)


def shaken() -> OtherRounding:
    """A block in which every result of torch is off by up to a machine epsilon at random.

    This takes luck out of what a calculation in float32 shows of rounding: a sum of terms that
    cancel may come out as 0 in one order and as a rounding in another, and rows that are alike are
    all rounded alike.
    """
    return OtherRounding(ROUNDED | ALIKE)


def flat(value) -> torch.Tensor:
    """A result, or a group of results, as one float64 vector."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return torch.cat([v.detach().double().flatten() for v in value] or [torch.zeros(0)])
    return value.detach().double().flatten()


def largest(value) -> float:
    v = flat(value)
    return float(v.abs().max()) if v.numel() else 0.0


def lost(name: str, single: dict, wanted: dict) -> float:
    """How much a calculation in float32 lost of a result, in epsilons of float32."""
    error = torch.nan_to_num(flat(single[name]) - flat(wanted[name]))
    return largest(error) / EPS[torch.float32]


def bits(v: torch.Tensor) -> torch.Tensor:
    return v.detach().contiguous().view(torch.int32 if v.dtype == torch.float32 else torch.int64)


def same_bits(a, b) -> bool:
    a, b = ([v] if isinstance(v, torch.Tensor) else list(v) for v in (a, b))
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True)
    )
