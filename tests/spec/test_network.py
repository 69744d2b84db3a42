"""describe: which modules are chains, which are not and why, and when it must look again."""

import math
import re
import warnings

import pytest
import torch
from helpers import skip_before_torch
from torch import nn
from torch.nn import functional as F

import pymeta
from pymeta.spec.network import Description, Unsupported, describe

KNOWN = [
    (nn.ReLU(), ("relu",)),
    (nn.ReLU(inplace=True), ("relu",)),
    (nn.LeakyReLU(0.2), ("leaky_relu", 0.2)),
    (nn.ELU(0.7), ("elu", 0.7)),
    (nn.Tanh(), ("tanh",)),
    (nn.Sigmoid(), ("sigmoid",)),
    (nn.SiLU(), ("silu",)),
    (nn.GELU(), ("gelu",)),
    (nn.GELU("tanh"), ("gelu_tanh",)),
    (nn.Softplus(2.0, 10.0), ("softplus", 2.0, 10.0)),
    (nn.Linear(3, 3, bias=False), ("linear", 3, 3, False)),
    (nn.LayerNorm(3, eps=1e-3), ("layer_norm", 3, 1e-3, True, True)),
    (nn.LayerNorm(3, bias=False), ("layer_norm", 3, 1e-5, True, False)),
    (nn.LayerNorm(3, elementwise_affine=False), ("layer_norm", 3, 1e-5, False, False)),
    (nn.BatchNorm1d(3), ("batch_norm", 3, 1e-5, True, True)),
    (nn.BatchNorm1d(3, affine=False, eps=0.1), ("batch_norm", 3, 0.1, False, False)),
]


@pytest.mark.parametrize("module, layer", KNOWN, ids=lambda v: str(v)[:20])
def test_every_known_layer(module, layer):
    found = describe(nn.Sequential(nn.Linear(2, 3), module))
    assert isinstance(found, Description)
    assert found.layers == (("linear", 2, 3, True), layer)
    own = [f"1.{n}" for n, _ in module.named_parameters()]
    assert list(found.names) == ["0.weight", "0.bias", *own]
    assert (found.in_features, found.out_features) == (2, 3)
    assert found.batch_norm == (layer[0] == "batch_norm")


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_norm_over_positions_is_two_layers(bias):
    for shape in ((3, 5), (3, 4, 5)):
        norm = nn.LayerNorm(shape, eps=1e-3, bias=bias)
        found = describe(nn.Sequential(norm, nn.Flatten(), nn.Linear(math.prod(shape), 2)), shape)
        sizes = shape[1:] if len(shape) == 3 else (0, *shape[1:])
        assert found.layers[:3] == (
            ("image", 3, *sizes),
            ("group_norm", 3, 1, 1e-3, False, False),
            ("elementwise_affine", 3, *sizes, True, bias),
        )
        shapes = [tuple(s) for s in found.network.parameter_shapes]
        assert shapes[0] == shape and found.names[0] == "0.weight"


def test_nested_chains_and_layers_that_do_nothing():
    net = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Identity(), nn.Linear(2, 3), nn.Sequential(nn.Tanh(), nn.Dropout(0.0))),
        nn.Dropout(0.5).eval(),
        nn.Linear(3, 4),
    )
    found = describe(net)
    assert found.layers == (("linear", 2, 3, True), ("tanh",), ("linear", 3, 4, True))
    assert found.names == ("1.1.weight", "1.1.bias", "3.weight", "3.bias")
    assert found.flattens
    assert not describe(net[1]).flattens
    assert describe(nn.Linear(2, 1)).names == ("weight", "bias")


class Written(nn.Module):
    """A chain as people write it."""

    def __init__(self, deep=True):
        super().__init__()
        self.out = nn.Linear(4, 2)
        self.body = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
        self.deep = deep

    def forward(self, x):
        x = x.view(x.size(0), -1)
        x = F.leaky_relu(self.body(x), 0.2)
        x = torch.tanh(x).sigmoid()
        if self.deep:
            x = F.gelu(F.elu(x, alpha=0.5), approximate="tanh")
        return self.out(x)


def test_a_forward_that_is_a_chain():
    net = Written()
    found = describe(net)
    names = [layer[0] for layer in found.layers]
    assert names == [
        "linear", "layer_norm", "leaky_relu", "tanh", "sigmoid", "elu", "gelu_tanh", "linear"
    ]  # fmt: skip
    assert found.layers[2] == ("leaky_relu", 0.2) and found.layers[5] == ("elu", 0.5)
    assert found.names[0] == "body.0.weight" and found.names[-1] == "out.bias"
    assert found.flattens and found.in_features == 6
    assert found.watch.is_current()
    net.deep = False
    assert not found.watch.is_current()
    assert len(describe(net).layers) == 6
    nested = nn.Sequential(net, nn.ReLU())
    assert describe(nested).names[0] == "0.body.0.weight"


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, 1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.view(x.size()[0], -1),
    ],
)
def test_ways_to_flatten(flatten):
    class Net(Written):
        def forward(self, x):
            return self.out(self.body(flatten(x)))

    found = describe(Net())
    assert isinstance(found, Description) and found.flattens


def forward_as(function):
    """A module with two layers and this forward."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return function(self, x)

    net = Net()
    if function.__code__.co_names.count("scale") == 0:
        del net.scale
    return net


REFUSED = {
    "conv": (
        nn.Sequential(nn.ConvTranspose1d(1, 2, 3)),
        r"layer 0 \(ConvTranspose1d\) has no native kernel",
    ),
    "prelu": (nn.Sequential(nn.Linear(2, 2), nn.PReLU()), r"layer 1 \(PReLU\)"),
    "dropout": (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), r"layer 1 .*training mode"),
    "slope": (nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(-1)), r"negative_slope -1"),
    "elu": (nn.Sequential(nn.Linear(2, 2), nn.ELU(0)), r"ELU with alpha 0"),
    "softplus": (nn.Sequential(nn.Linear(2, 2), nn.Softplus(-1)), r"Softplus with beta -1"),
    "norm shape": (nn.Sequential(nn.LayerNorm((2, 3, 4, 5))), r"LayerNorm over the shape \(2, "),
    "flatten": (nn.Sequential(nn.Flatten(0), nn.Linear(2, 2)), r"Flatten from dimension 0"),
    "lstm": (nn.LSTM(2, 2), r"LSTM has no native kernel"),
    "no layer": (nn.Sequential(nn.ReLU()), r"the first layer must be linear or a normalisation"),
    "skip": (forward_as(lambda s, x: torch.stack([s.b(s.a(x)), x], 1)[:, 0]), r"not a chain"),
    "unread": (forward_as(lambda s, x: (s.a(x).cos(), s.b(x))[1]), r"cos has no native"),
    "scaled sum": (
        forward_as(lambda s, x: torch.add(s.b(s.a(x)), x, alpha=s.scale)),
        r"uses scale directly",
    ),
    "fork": (forward_as(lambda s, x: s.b(x)), r"parameter a\.weight is not part of the chain"),
    "twice": (forward_as(lambda s, x: s.b(s.a(s.a(x)))), r"parameter a\.weight is used more"),
    "direct": (forward_as(lambda s, x: s.b(s.a(x / s.scale))), r"uses scale directly"),
    "written over": (forward_as(lambda s, x: s.b(s.a(s.scale.mul_(x)))), r"uses scale directly"),
    "function": (forward_as(lambda s, x: s.b(torch.cos(s.a(x)))), r"cos has no native kernel"),
    "branch": (forward_as(lambda s, x: s.a(s.b(x)) if x.sum() > 0 else x), r"cannot be traced"),
    "row": (forward_as(lambda s, x: s.b(s.a(x))[0]), r"a part of the rows"),
    "view": (forward_as(lambda s, x: s.b(s.a(x).view(3, -1))), r"neither a flattening"),
    "wider": (forward_as(lambda s, x: s.b(s.a(x).view(-1, 6))), r"another number of features"),
    "squeeze": (forward_as(lambda s, x: s.b(s.a(x)).squeeze(-1)), r"leave outputs \[rows, 1\]"),
    "argument": (
        forward_as(lambda s, x: s.b(F.gelu(s.a(x), approximate="tanh", foo=1))),
        r"cannot be traced|arguments",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_why(case):
    if case == "scaled sum":
        skip_before_torch(2, 9, "traces that hand a parameter to alpha")
    module, reason = REFUSED[case]
    found = describe(module)
    assert isinstance(found, Unsupported)
    assert re.search(reason, found.reason), found.reason
    assert found.watch.is_current()


MISFITS = {
    "linear": (
        nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(4, 2)),
        r"model: layer 2 \(Linear\) takes 4 features, but layer 0 \(Linear\) gives 3",
    ),
    "behind a flatten": (
        nn.Sequential(nn.Linear(2, 3), nn.Flatten(), nn.Linear(4, 2)),
        r"model: layer 2 \(Linear\) takes 4 features, but layer 0 \(Linear\) gives 3",
    ),
    "nested": (
        nn.Sequential(nn.Sequential(nn.Linear(2, 1)), nn.LayerNorm(5), nn.Linear(5, 1)),
        r"model: layer 1 \(LayerNorm\) takes 5 features, but layer 0\.0 \(Linear\) gives 1",
    ),
    "one": (
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(1, 2)),
        r"model: layer 2 \(Linear\) takes 1 feature, but layer 1 \(BatchNorm1d\) gives 3",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_layers_that_do_not_fit_are_an_error_and_no_fallback(case):
    module, said = MISFITS[case]
    with pytest.raises(ValueError, match=f"^{said}$"):
        describe(module)
    for backend in ("auto", "torch"):
        with warnings.catch_warnings(), pytest.raises(ValueError, match=f"^{said}$"):
            warnings.simplefilter("error")
            pymeta.MAML(module, loss="mse", lr=0.1, steps=1, backend=backend)
    with pytest.raises(RuntimeError):  # which torch finds out when it runs
        module.eval()(torch.ones(4, 2))


def test_a_layer_behind_images_that_does_not_fit_is_an_error_with_the_first_call():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7, 1))
    said = r"^xs: .* layer 3 \(Linear\) takes 7 features, but layer 0 \(Conv2d\) gives 8; "
    maml = pymeta.MAML(module, loss="mse", lr=0.1, steps=1)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=said):
        warnings.simplefilter("error")
        maml.adapt(torch.ones(2, 5, 1, 4, 4), torch.ones(2, 5, 1))
    convolutions = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(3, 2, 1), nn.Flatten())
    found = describe(convolutions, (1, 4, 4))
    assert isinstance(found, Unsupported) and found.misfit is not None
    assert re.search(r"layer 1 .Conv2d. takes rows of shape \[3, .*layer 0 .* gives", found.misfit)


def test_a_linear_layer_on_the_last_axis_of_positions_is_no_misfit():
    module = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Linear(5, 2), nn.Flatten())
    assert module(torch.ones(4, 2, 5)).shape == (4, 6)
    assert isinstance(describe(module, (2, 5)), Unsupported)


class Named(nn.BatchNorm1d):
    """A class that adds a name, its own defaults and a method."""

    label: str = "mine"

    def __init__(self, features):
        super().__init__(features, eps=0.1)
        self.own = "note"

    def extra_repr(self):
        return "mine"

    def helper(self):
        return self.own


class Switched(Named):
    def train(self, mode=True):
        return super().train(False)


class Mixed(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.more = nn.Parameter(torch.ones(2))


def test_a_subclass_without_a_forward_of_its_own_is_its_base():
    net = nn.Sequential(nn.Linear(2, 3), Named(3), nn.Linear(3, 1))
    found = describe(net)
    assert found.layers[1] == ("batch_norm", 3, 0.1, True, True)
    assert found.names[2] == "1.weight" and found.norms == (net[1],)
    net[1].eval()
    assert not found.watch.is_current()
    assert [layer[0] for layer in describe(net).layers[1:3]] == ["fixed_norm", "scale_shift"]

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(2, 3), Named(3)

        def forward(self, x):
            return self.norm(self.a(x))

    assert describe(Inside()).layers[1][0] == "batch_norm"
    assert isinstance(describe(nn.Sequential(nn.Linear(2, 3), Switched(3))), Unsupported)
    reason = describe(nn.Sequential(Mixed(2, 2))).reason
    assert reason == "parameter 0.more is not part of the chain"

    class Gate(nn.GLU):
        pass

    kinds = [layer[0] for layer in describe(nn.Sequential(nn.Linear(2, 4), Gate())).layers]
    assert kinds[-1] == "multiply"


def test_subclasses_and_exchanged_forwards_are_not_taken_for_known_layers():
    class Mine(nn.Linear):
        def forward(self, x):
            return torch.cos(super().forward(x))

    assert isinstance(describe(nn.Sequential(Mine(2, 2))), Unsupported)

    class Computed(nn.Linear):  # as torch's parametrizations are made
        @property
        def weight(self):
            return 2 * self._parameters["weight"]

    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].__class__ = Computed
    assert isinstance(describe(net), Unsupported)
    parametrized = nn.Linear(2, 2)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    assert isinstance(describe(nn.Sequential(parametrized)), Unsupported)

    class Bent(nn.Sequential):
        def forward(self, x):
            return torch.cos(super().forward(x))

    assert isinstance(describe(Bent(nn.Linear(2, 2))), Unsupported)
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].forward = lambda x: x
    assert "forward of its own" in describe(net).reason


def test_tied_weights_are_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    assert "used more than once" in describe(net).reason


def test_running_statistics_are_part_of_the_chain_in_eval_mode():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    net.append(nn.BatchNorm1d(2))
    kinds = ["linear", "batch_norm", "batch_norm"]
    assert [layer[0] for layer in describe(net).layers] == kinds
    found = describe(net.eval())
    assert [layer[0] for layer in found.layers] == [*kinds[:2], "fixed_norm", "scale_shift"]
    assert found.names[-4:] == ("2.running_var", "2.running_mean", "2.weight", "2.bias")
    named = describe(net.train(), fixed=frozenset({"2"}))
    assert named.layers == found.layers and describe(net).layers != found.layers
    net[2].running_mean = torch.zeros(2)
    assert not named.watch.is_current()


def test_what_makes_a_description_stale():
    def fresh():
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.LeakyReLU()))

    changes = {
        "exchange": lambda n: n.__setitem__(1, nn.LayerNorm(3)),
        "append": lambda n: n.append(nn.Linear(3, 1)),
        "nested": lambda n: n[2].__setitem__(0, nn.Tanh()),
        "remove": lambda n: n.__delitem__(2),
        "eval": lambda n: n.eval(),
        "hook": lambda n: n[0].register_forward_hook(lambda *a: None),
        "outer hook": lambda n: n.register_forward_pre_hook(lambda *a: None),
        "setting": lambda n: setattr(n[2][0], "negative_slope", 0.5),
        "eps": lambda n: setattr(n[1], "eps", 0.5),
        "bias": lambda n: n[0].register_parameter("bias", None),
        "forward": lambda n: setattr(n[0], "forward", torch.relu),
        "parameter": lambda n: setattr(n, "extra", nn.Parameter(torch.ones(1))),
        "layer's parameter": lambda n: setattr(n[2][0], "extra", nn.Parameter(torch.ones(1))),
        "layer's child": lambda n: setattr(n[2][0], "child", nn.Linear(1, 1)),
    }
    for name, change in changes.items():
        net = fresh()
        found = describe(net)
        assert found.watch.is_current(), name
        change(net)
        assert not found.watch.is_current(), name


class Set(nn.Module):
    """A chain, or none, as its settings say."""

    def __init__(self):
        super().__init__()
        self.layer, self.odd, self.options, self.entries = nn.Linear(3, 3), False, {}, [False]

    def forward(self, x):
        x = self.layer(x)
        return torch.erfinv(x) if self.odd or self.options or self.entries[0] else x


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


def refused(model=None, **attributes):
    net = nn.Sequential(nn.Linear(3, 3), nn.ELU(), Set()) if model is None else model
    for name, value in attributes.items():
        setattr(net[-1] if name in vars(net[-1]) else net[0], name, value)
    return net


AGAIN = {
    "eval": (lambda: refused(tied()[:1].append(nn.Dropout(0.5))), lambda n: n.eval()),
    "no dropout": (
        lambda: refused(tied()[:1].append(nn.Dropout(0.5))),
        lambda n: setattr(n[1], "p", 0.0),
    ),
    "forward": (lambda: refused(forward=torch.relu), lambda n: delattr(n[0], "forward")),
    "flag": (lambda: refused(odd=True), lambda n: setattr(n[-1], "odd", False)),
    "entry": (lambda: refused(entries=[True]), lambda n: n[-1].entries.__setitem__(0, False)),
    "option": (lambda: refused(options={"odd": 1}), lambda n: n[-1].options.clear()),
    "untied": (tied, lambda n: setattr(n[1], "weight", nn.Parameter(torch.ones(3, 3)))),
    "parameter": (
        lambda: refused(extra=nn.Parameter(torch.ones(1))),
        lambda n: delattr(n[0], "extra"),
    ),
    "child": (lambda: refused(child=nn.Linear(1, 1)), lambda n: delattr(n[0], "child")),
}


@pytest.mark.parametrize("case", AGAIN)
def test_an_unsupported_model_is_looked_at_again_when_it_changes(case):
    make, change = AGAIN[case]
    net = make()
    found = describe(net)
    assert not isinstance(found, Description) and found.watch.is_current()
    change(net)
    assert not found.watch.is_current()
    assert isinstance(describe(net), Description)


def test_another_child_of_a_known_layer_is_seen_in_a_model_that_runs_in_torch():
    net = refused(child=nn.Linear(1, 1))
    found = describe(net)
    net[0].child = nn.Linear(1, 1)
    assert not found.watch.is_current()


def test_what_torchs_own_modules_keep_is_no_change():
    """Recurrent layers have a new list of their weights with each call."""
    net = nn.Sequential(nn.Flatten(), nn.GRU(3, 3))
    found = describe(net)
    net[1]._flat_weights = [*net[1]._flat_weights]
    assert not isinstance(found, Description) and found.watch.is_current()


def test_looking_at_a_model_leaves_it_as_it_was():
    """Tracing runs the forward, with what it assigns and counts."""

    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(2, 2), 0
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x):
            self.calls += 1
            self.count += 1
            self.mean = x.mean(0)
            self.last = x
            return self.layer(x)

    model = Noting()
    mean = model.mean
    describe(model)
    assert model.calls == 0 and model.count == 0 and model.mean is mean
    assert not hasattr(model, "last")
