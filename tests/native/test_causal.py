"""Causal convolutions in all the ways in which people write them: native, and one layer each."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from helpers import skip_before_torch
from images import episodes
from kernels import DTYPES, PATHS, same_bits, using
from torch import nn
from torch.nn import functional as F

import pymeta
from pymeta.spec.network import Description, Unsupported, describe

REACH = 4  # of three taps, two apart


class Chomp(nn.Module):
    """As in locuslab/TCN."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x[:, :, : -self.size].contiguous()


class Padding(nn.Conv1d):
    """A convolution that pads its own input."""

    def forward(self, x):
        return super().forward(F.pad(x, (REACH, 0)))


class Cutting(nn.Conv1d):
    """One that cuts off from its own output."""

    def forward(self, x):
        return super().forward(x)[..., : -self.padding[0]]


class Functional(nn.Conv1d):
    """One that calls the function with parameters that it holds."""

    def forward(self, x):
        x = F.pad(input=x, pad=(REACH, 0), mode="constant", value=0.0)
        return F.conv1d(x, self.weight, bias=self.bias, dilation=self.dilation)


def conv(padding, kind=nn.Conv1d):
    """A convolution whose window reaches REACH back."""
    return kind(2, 5, 3, dilation=2, padding=padding)


FORMS = {
    "constant": lambda: (nn.ConstantPad1d((REACH, 0), 0.0), conv(0)),
    "zeros": lambda: (nn.ZeroPad1d((REACH, 0)), conv(0)),
    "in two places": lambda: (nn.ZeroPad1d((2, -2)), conv(2)),
    "negative padding": lambda: (conv(REACH), nn.ZeroPad1d((0, -REACH))),
    "chomp": lambda: (conv(REACH), Chomp(REACH)),
    "chomp behind its activation": lambda: (conv(REACH), nn.ReLU(), Chomp(REACH)),
    "padding itself": lambda: (conv(0, Padding),),
    "cutting itself": lambda: (conv(REACH, Cutting),),
    "functional": lambda: (conv(0, Functional),),
}


def adapted(net, backend, dtype, steps=2):
    """Predictions of adapted networks, and the gradient of the start, second order."""
    maml = pymeta.MAML(net, loss="cross_entropy", lr=0.3, steps=steps, backend=backend)
    out = maml(*episodes((2, 9), dtype=dtype))
    return [out.predictions, *torch.autograd.grad(out.loss, list(net.parameters()))]


def causal(form, dtype):
    torch.manual_seed(1)
    return nn.Sequential(*FORMS[form](), nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa, executor", PATHS)
def test_all_forms_are_one_layer(isa, executor, dtype):
    """The same products in the same order, as bits say."""
    with using(isa, executor):
        forms = {
            form: adapted(causal(form, dtype), "native", dtype)
            for form in FORMS if form != "in two places"
        }  # fmt: skip
    wanted = forms.pop("constant")
    for found in forms.values():
        assert all(same_bits(g, w) for g, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_they_are_what_torch_computes(form):
    """Eager, task by task, is what the fallback is held to elsewhere; here both are."""
    net = causal(form, torch.float64)
    found, wanted = (adapted(net, backend, torch.float64) for backend in ("native", "torch"))
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
    x = torch.randn(3, 2, 9, dtype=torch.float64)
    later = x.clone()
    later[:, :, 5:] = torch.randn(3, 2, 4, dtype=torch.float64)
    if form != "in two places":  # which sees the future, too
        assert torch.equal(net[:-2](x)[:, :, :5], net[:-2](later)[:, :, :5])


class Block(nn.Module):
    """A block of a temporal convolutional network (Bai, Kolter, Koltun 2018)."""

    def __init__(self, inputs, outputs, dilation):
        super().__init__()
        layers = []
        for fan_in in (inputs, outputs):
            layers += [nn.Conv1d(fan_in, outputs, 2, padding=dilation, dilation=dilation)]
            layers += [Chomp(dilation), nn.ReLU(), nn.Dropout(0.0)]
        self.net, self.relu = nn.Sequential(*layers), nn.ReLU()
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.net(x) + shortcut)


class Temporal(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.blocks = nn.Sequential(Block(2, 4, 1), Block(4, 4, 2), Block(4, 4, 4))
        self.head, self.last = nn.Linear(4, 3), last

    def forward(self, x):
        return self.head(self.last(self.blocks(x)))


LAST = {
    "index": lambda x: x[:, :, -1],
    "ellipsis": lambda x: x[..., -1],
    "select": lambda x: x.select(-1, -1),
    "slice": lambda x: x[:, :, -1:].squeeze(-1),
    "another": lambda x: x[:, :, 5],
    "the later half": lambda x: x[..., 4:9].mean(-1),
    "every third": lambda x: x[:, :, 2::3].mean(-1),
    "the largest": lambda x: x.max(-1)[0],
    "the largest by name": lambda x: torch.max(x, dim=2, keepdim=True).values.flatten(1),
    "pooled by its size": lambda x: F.max_pool1d(x, x.size(2)).squeeze(2),
    "pooled by its shape": lambda x: F.avg_pool1d(x, kernel_size=x.shape[-1]).squeeze(-1),
    "pooled by its sizes": lambda x: F.max_pool1d(x, x.shape[2:]).flatten(1),
}


@pytest.mark.parametrize("last", LAST)
def test_a_temporal_convolutional_network(last):
    if last == "pooled by its shape":
        skip_before_torch(2, 9, "traces that hand a size to avg_pool1d")
    net = Temporal(LAST[last]).double()
    found, wanted = (adapted(net, backend, torch.float64) for backend in ("native", "torch"))
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


IMAGES = {
    "rows": lambda x: x[:, :, 1:-1].flatten(1),
    "every second": lambda x: x[:, :, ::2, ::2].flatten(1),
    "a row": lambda x: F.max_pool1d(x[:, :, 2], 2).flatten(1),
    "a pixel": lambda x: x[:, :, -1, 0],
    "behind an ellipsis": lambda x: x[:, ..., 1:3, :].flatten(1),
    "padding of one axis": lambda x: F.pad(x, (1, 0)).mean((2, 3)),
    "padding of both": lambda x: F.pad(x, (1, 0, -1, 2)).mean((2, 3)),
    "pooled by its sizes": lambda x: F.avg_pool2d(x, x.size()[2:]).flatten(1),
    "pooled by its shape": lambda x: F.max_pool2d(x, x.shape[-2:]).flatten(1),
}


class Cropped(nn.Module):
    def __init__(self, part, features):
        super().__init__()
        self.conv, self.part, self.head = nn.Conv2d(2, 3, 2), part, nn.Linear(features, 3)

    def forward(self, x):
        return self.head(self.part(torch.tanh(self.conv(x))))


@pytest.mark.parametrize("name", IMAGES)
def test_parts_of_images(name):
    if name == "pooled by its sizes":
        skip_before_torch(2, 9, "traces that hand sizes to avg_pool2d")
    part = IMAGES[name]
    net = Cropped(part, part(torch.ones(1, 3, 5, 4)).shape[1]).double()
    data = episodes((2, 6, 5))
    found = []
    for backend in ("native", "torch"):
        maml = pymeta.MAML(net, loss="cross_entropy", lr=0.3, steps=2, backend=backend)
        out = maml(*data)
        found.append([out.predictions, *torch.autograd.grad(out.loss, list(net.parameters()))])
    for g, w in zip(*found, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


OTHERS = {
    "channels": (lambda x: x[:, ::2].mean(-1), "not one after the other"),
    "rows": (lambda x: x[1:].mean(-1), "part of the rows"),
    "channels behind an ellipsis": (lambda x: x[..., 1, :].mean(-1), "of the channels"),
    "channels by name": (lambda x: x.narrow(1, 0, 3).mean(-1), "its length is exact"),
    "exact": (lambda x: torch.narrow(x, 2, -1, 1).flatten(1), "its length is exact"),
    "an axis in front": (lambda x: x[:, None].mean(-1), "index that is a NoneType"),
    "an axis between": (lambda x: x[:, :, None].mean(-1), "an axis put in"),
    "too many": (lambda x: x[:, :, :, 0], "index of 4 axes"),
    "unknown dimension": (lambda x: x.select(3, 0), "dimension 3 of a value with 3"),
    "where the largest is": (lambda x: x.max(-1)[1].float(), "max has no native kernel"),
    "the largest of channels": (lambda x: x.max(1)[0], "maximum over dimension 1"),
    "a window of half": (lambda x: F.max_pool1d(x, x.size(2) // 2).flatten(1), "not a chain|lacks"),
    "a window of channels": (lambda x: F.avg_pool1d(x, x.size(1)).flatten(1), "lacks"),
    "by its size": (lambda x: x[:, :, : x.size(2) // 2].mean(-1), "not a chain"),
    "all four sides": (lambda x: F.pad(x, (1, 1, 1, 1)).mean(-1), "one axis|1 axis"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_parts_say_why_not(name):
    if name == "a window of channels":
        skip_before_torch(2, 9, "traces that hand a size to avg_pool1d")
    part, reason = OTHERS[name]
    found = describe(Temporal(part), (2, 9))
    assert isinstance(found, Unsupported)
    assert any(text in found.reason for text in reason.split("|")), found.reason


def test_a_weight_that_is_computed_or_used_twice_is_refused():
    class Standardised(nn.Conv1d):
        def forward(self, x):
            return F.conv1d(x, self.weight - self.weight.mean(), self.bias)

    class Twice(nn.Conv1d):
        def forward(self, x):
            return F.conv1d(F.conv1d(x, self.weight), self.weight)

    class Constant(nn.Conv1d):
        def forward(self, x):
            return F.conv1d(x, self.kernel)

    Constant.kernel = torch.ones(2, 2, 2)  # no parameter, and no buffer

    class Buffered(nn.Conv1d):
        def forward(self, x):
            return F.conv1d(super().forward(x), self.kernel)

    reasons = {
        Standardised: "uses weight directly", Twice: "more than once", Constant: "no parameter",
        Buffered: "no parameter",
    }  # fmt: skip
    for kind, reason in reasons.items():
        net = nn.Sequential(kind(2, 2, 2), nn.Flatten())
        if kind is Buffered:
            net[0].register_buffer("kernel", torch.ones(2, 2, 2))
        assert reason in describe(net, (2, 9)).reason


def test_what_a_convolution_of_ones_own_depends_on_is_watched():
    changes = {
        "dilation": lambda m: setattr(m, "dilation", (1,)),
        "weight": lambda m: setattr(m, "weight", nn.Parameter(torch.ones(5, 2, 2))),
        "bias": lambda m: setattr(m, "bias", None),
    }
    for change in changes.values():
        layer = conv(0, Functional)
        found = describe(nn.Sequential(layer, nn.Flatten()), (2, 9))
        assert isinstance(found, Description) and found.names == ("0.weight", "0.bias")
        assert found.watch.is_current()
        change(layer)
        assert not found.watch.is_current()


class Cut(nn.Module):
    """A network whose forward cuts off what a function of its attribute says."""

    def __init__(self, of, kept):
        super().__init__()
        self.conv, self.head, self.of, self.kept = nn.Conv1d(2, 3, 2), nn.Linear(3, 3), of, kept

    def forward(self, x):
        return self.head(self.conv(x)[..., : -self.of(self.kept)].mean(-1))


@dataclass
class Sizes:
    last: int


class Settings:
    def __init__(self, last):
        self.last = last


def another(net, kept):
    net.kept = kept


ATTRIBUTES = {
    "an entry of a list": (lambda k: k[0], [1], lambda net: net.kept.__setitem__(0, 3)),
    "one more in a list": (len, [9], lambda net: net.kept.extend([9, 9])),
    "one in a list of a list": (lambda k: k[0][1], [[2, 1]], lambda net: net.kept[0].reverse()),
    "another list": (lambda k: k[0], [1], lambda net: another(net, [3])),
    "a value of a dictionary": (lambda k: k["a"], {"a": 1}, lambda net: net.kept.update(a=3)),
    "a key of a dictionary": (len, {"a": 1}, lambda net: net.kept.update(b=1, c=1)),
    "more tensors": (len, [torch.ones(2)], lambda net: net.kept.extend(torch.ones(2, 2))),
    "a list in a tuple": (lambda k: k[0][0], ([1],), lambda net: net.kept[0].insert(0, 3)),
    "a slice": (lambda k: k.stop, slice(0, 1), lambda net: another(net, slice(0, 3))),
    "a function": (lambda k: k(), lambda: 1, lambda net: another(net, lambda: 3)),
    "a namespace": (lambda k: k.a, SimpleNamespace(a=1), lambda net: setattr(net.kept, "a", 3)),
    "a dataclass": (lambda k: k.last, Sizes(1), lambda net: setattr(net.kept, "last", 3)),
    "an object": (lambda k: k.last, Settings(1), lambda net: setattr(net.kept, "last", 3)),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_change_of_what_a_forward_reads_is_seen(name):
    """The traced numbers are those of then."""
    of, kept, change = ATTRIBUTES[name]
    torch.manual_seed(1)
    net, data = Cut(of, copy.deepcopy(kept)).double(), episodes((2, 9))
    maml = pymeta.MAML(net, loss="cross_entropy", lr=0.3, steps=2, backend="native")
    before = [maml(*data).predictions for _ in range(2)][-1]
    change(net)
    for _ in range(2):
        found = maml(*data).predictions
        wanted = pymeta.MAML(net, loss="cross_entropy", lr=0.3, steps=2, backend="native")(*data)
        assert same_bits(found, wanted.predictions) and not same_bits(found, before)


def test_large_attributes_and_those_that_hold_themselves():
    kept = {"large": [0] * 5000, "tensors": [torch.ones(2)], "itself": []}
    kept["itself"].append(kept)
    layer = conv(0, Functional)
    layer.kept = kept
    found = describe(nn.Sequential(layer, nn.Flatten()), (2, 9)).watch
    assert found.is_current()
    kept["tensors"][0] = torch.zeros(2)  # only their number counts
    kept["large"][0] = 1
    assert found.is_current()
    kept["large"].append(0)
    assert not found.is_current()


@pytest.mark.parametrize("sides", [(-8, 30), (-4, -4), (30, -8)])
def test_no_more_is_cut_off_than_there_is(sides):
    """As torch has it: what is cut off is not made up for by zeros on the other side."""
    net = Temporal(lambda x: F.pad(x, sides).mean(-1)).double()
    for backend in ("native", "torch"):
        maml = pymeta.MAML(net, loss="cross_entropy", lr=0.3, steps=1, backend=backend)
        with pytest.raises((ValueError, RuntimeError), match=r"cuts off more|negative"):
            maml(*episodes((2, 7)))
