"""What the steps of a call keep of convolutions, and what they share, repeat or write over."""

import pytest
import torch
from images import episodes
from kernels import DTYPES, PATHS, same_bits, using
from torch import nn

import pymeta


def network(channels, kind="norm"):
    between = {
        "norm": (nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)),
        "relu": (nn.ReLU(), nn.MaxPool2d(2)),
        "tanh": (nn.Tanh(), nn.MaxPool2d(2)),
    }[kind]
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), *between, nn.Flatten(), nn.Linear(400, 3)
    )


def workspace(net, steps, **wants):
    """Bytes of a call with a second-order gradient."""
    maml = pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=steps, backend="native")
    channels = net[0].in_channels
    xs, ys, xq, yq = episodes((channels, 10, 10), 1, 24, 4, torch.float32)
    maml(xs.requires_grad_(wants.get("inputs", False)), ys, xq, yq)
    said = maml.explain()
    return int(said.split(" bytes of workspace")[0].split()[-1])


def growth(*args, **wants):
    """Bytes of one step more."""
    net = network(*args)
    few, many = (workspace(net, steps, **wants) for steps in (3, 5))
    return (many - few) / 2


@pytest.fixture
def by_rows():
    """With vectors of 16 numbers or fewer, so that 16 channels have no padding."""
    with using(executor="rows"):
        yield


OUTPUT = 24 * 10 * 10 * 16 * 4  # bytes of the first convolution's
WEIGHTS = 8 * 9 * 16 * 4  # what a channel more may cost: a weight, its gradient, and so on


def test_steps_do_not_keep_an_output_that_is_cheap_to_make_again(by_rows):
    """Three channels' nine taps are; four channels' are not, and nothing else is different."""
    more = growth(4) - growth(3)
    assert 0.95 * OUTPUT < more < 1.05 * OUTPUT + WEIGHTS


def test_steps_do_not_keep_a_delta_that_nobody_reads(by_rows):
    """The lowest one, where no gradient to the inputs is wanted."""
    assert growth(3, "norm", inputs=True) - growth(3) > 0.95 * OUTPUT


def test_steps_do_not_keep_what_a_pooling_has_read(by_rows):
    """Of a convolution with ReLU, which is done behind the pooling.

    With Tanh in its place the output and the delta behind its slope are kept, each four times what
    the pooling gives; of that the delta is written over the output where it has no ReLU.
    """
    less = growth(4, "tanh") - growth(4, "relu")
    assert 1.7 * OUTPUT < less < 1.8 * OUTPUT


def gradients(net, backend, head_alone=False, **call):
    dtype, adapt = net[0].weight.dtype, [f"{len(net) - 1}.*"] if head_alone else None
    maml = pymeta.MAML(net, loss="cross_entropy", lr=0.2, steps=3, backend=backend, adapt=adapt)
    xs, ys, xq, yq = episodes((net[0].in_channels, 10, 10), 3, 6, 4, dtype)
    out = maml(xs, ys, xq, yq, **call)
    return [out.predictions, *torch.autograd.grad(out.loss, list(net.parameters()))]


SETTINGS = {
    "all": {},
    "the head alone": {"head_alone": True},
    "after every step": {"step_weights": [0.2, 0.3, 0.5]},
}


@pytest.mark.parametrize("kind", ["norm", "relu"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("isa, executor", PATHS)
def test_shared_and_repeated_arrays_change_no_result(isa, executor, name, channels, kind):
    """In second order over several steps, against the reference."""
    net = network(channels, kind).double()
    with using(isa, executor):
        found = gradients(net, "native", **SETTINGS[name])
    for g, w in zip(found, gradients(net, "torch", **SETTINGS[name]), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa, executor", PATHS)
def test_bits_do_not_depend_on_what_is_kept(isa, executor, dtype):
    """With a gradient to the inputs, deltas are kept that are shared otherwise."""
    net = network(3).to(dtype)
    maml = pymeta.MAML(net, loss="cross_entropy", lr=0.2, steps=3, backend="native")
    xs, *rest = episodes((3, 10, 10), 3, 6, 4, dtype)
    found = []
    with using(isa, executor):
        for wanted in (False, True):
            out = maml(xs.clone().requires_grad_(wanted), *rest)
            found.append(torch.autograd.grad(out.loss, list(net.parameters())))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
