"""Rows that do not fit a model: a ValueError that names them, on every path, and leaves no trace.

What torch runs, and the native core does not, goes on falling back.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pymeta
from pymeta import functional
from pymeta.spec.network import describe


def image_net():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 1))


def sequence_net(channels=3):
    return nn.Sequential(nn.Conv1d(channels, 3, 3, padding=1), nn.Flatten(), nn.Linear(3 * 8, 1))


class Written(nn.Module):
    """The image net with functions for layers."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 2, 3, 3))
        self.head = nn.Linear(27, 1)

    def forward(self, x):
        return self.head(F.conv2d(x, self.kernel).flatten(1))


class Dropping(nn.Module):
    """Draws random numbers, so that no native layers are found in its forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 3, 3, padding=1), nn.Linear(24, 1)

    def forward(self, x):
        return self.head(F.dropout(self.conv(x), 0.5, self.training).flatten(1))


def sets(*row, tasks=2, rows=4):
    x, y = torch.randn(tasks, rows, *row), torch.randn(tasks, rows, 1)
    return x, y, x.clone(), y.clone()


IMAGE = r"layer 0 \(Conv2d\) takes rows of shape \[2, height >= 3, width >= 3\], but a row gives "
SEQUENCE = r"layer 0 \(Conv1d\) takes rows of shape \[3, length\], but a row gives \[8\]"
REFUSED = {
    "channels": (image_net, (3, 5, 5), IMAGE + r"\[3, 5, 5\]; give rows of 2 channels, or a "),
    "channels last": (image_net, (5, 5, 2), r"x\.movedim\(-1, -3\) puts channels first"),
    "too small": (image_net, (2, 5, 2), IMAGE + r"\[2, 5, 2\]; give larger rows"),
    "no channels": (image_net, (5, 5), IMAGE + r"\[5, 5\]; each row has to have 3 axes"),
    "flat": (image_net, (50,), IMAGE + r"\[50\]; each row has to have 3 axes"),
    "more axes": (image_net, (2, 5, 5, 1), IMAGE + r"\[2, 5, 5, 1\]; each row has to have 3 axes"),
    "flattened": (
        image_net, (2, 6, 6),
        r"layer 2 \(Linear\) takes 27 features, but layer 0 \(Conv2d\) gives 48; .* for 48 ",
    ),
    "functions": (Written, (2, 6, 6), r"layer head \(Linear\) takes 27 features, but a row gives"),
    "a function": (Written, (1, 6, 6), r"Written: .*to have 2 channels, but got 1"),
    "one channel": (
        lambda: sequence_net(1), (8,), r"x\.unsqueeze\(-2\) puts in the axis of channels",
    ),
    "rows as channels": (sequence_net, (8,), SEQUENCE),
    "in training": (lambda: nn.Sequential(sequence_net()[:2], nn.Dropout(), nn.Linear(24, 1)),
                    (8,), r"layer 0\.0 \(Conv1d\) takes rows of shape \[3, length\]"),
    "traced": (Dropping, (8,), r"layer conv \(Conv1d\) takes rows of shape \[3, length\]"),
    "behind a linear layer": (
        lambda: nn.Sequential(nn.Linear(8, 8), sequence_net()), (8,),
        r"layer 1\.0 \(Conv1d\) takes rows of shape \[3, length\]",
    ),
    "a norm over rows": (
        lambda: nn.Sequential(nn.LayerNorm((3, 8)), nn.Flatten(), nn.Linear(24, 1)), (8,),
        r"layer 0 \(LayerNorm\) takes rows of shape \[3, 8\], but a row gives \[8\]",
    ),
    "a norm of either": (
        lambda: nn.Sequential(nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(24, 1)), (3,),
        r"layer 2 \(Linear\) takes 24 features, but layer 0 \(GroupNorm\) gives 3",
    ),
    "pooled": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 1), nn.MaxPool1d(9), nn.Flatten(), nn.Linear(3, 1)),
        (1, 8), r"layer 1 \(MaxPool1d\) takes rows of shape \[channels, length >= 9\], but layer 0 "
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_torch_refuses_are_an_error_that_names_them(name):
    make, row, said = REFUSED[name]
    net = make()
    data = sets(*row, rows=3)  # as many as the sequence has channels
    shape = ", ".join(map(str, row))
    said = rf"^xs: the model does not take rows of shape \[{shape}\]: .*{said}"
    for backend in ("auto", "torch"):
        kept = copy.deepcopy(net.state_dict())
        random = torch.get_rng_state()
        maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend=backend)
        reptile = pymeta.Reptile(net, loss="mse", lr=0.1, steps=1, backend=backend)
        tune = pymeta.FineTune(net, loss="mse", lr=0.1, epochs=1, backend=backend)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for call in (
                lambda m=maml: m(*data),
                lambda m=maml: m.adapt(*data[:2]),
                lambda m=maml: m.adapt(*data[:2], create_graph=True),
                lambda m=maml: m.accumulate_grad(*data),
                lambda m=reptile: m(*data[:2]),
                lambda m=reptile: m.adapt(*data[:2]),
                lambda m=tune: m([*data[0]], [*data[1]]),
            ):
                with pytest.raises(ValueError, match=said):
                    call()
        assert torch.equal(torch.get_rng_state(), random)
        for key, value in net.state_dict().items():
            assert torch.equal(value, kept[key])


@pytest.mark.parametrize("backend", ["auto", "native", "torch"])
def test_refused_rows_leave_no_trace(backend):
    net = image_net()
    maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend=backend)
    data = sets(2, 5, 5)
    wanted = maml(*data)
    models = maml.adapt(*data[:2])
    told, predicted = maml.explain(), models(data[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in ((3, 5, 5), (2, 2, 5), (5, 5), (2, 6, 6)):
            with pytest.raises(ValueError, match=r"^xs: the model does not take rows of"):
                maml(*sets(*row))
            assert maml.explain() == told
            with pytest.raises(ValueError, match=r"^xq: the model does not take rows of"):
                models(sets(*row)[0])
            # a query of another shape than its support set
            with pytest.raises(ValueError, match=r"^xq: expected rows of shape "):
                maml(*data[:2], *sets(*row)[2:])
        assert torch.equal(models(data[2]), predicted)
        assert torch.equal(maml(*data).loss, wanted.loss)
        assert "ran in torch" not in maml.explain()
        adapter = maml.adapter()
    assert adapter.architecture.row_shape == (2, 5, 5)
    for row in ((3, 5, 5), (5, 5), (50,)):
        x, y = (v.numpy() for v in sets(*row)[:2])
        with pytest.raises(ValueError, match=r"^xs: expected rows of shape \[2, 5, 5\], got"):
            adapter.adapt(x, y)


def test_operators_refuse_rows_alike():
    net = image_net()
    operator = functional.Operator(net, loss="mse", lr=0.1, steps=1)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    xs, ys, xq, _ = sets(2, 5, 5)
    wanted = functional.adapt_predict(operator, parameters, xs, ys, xq)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in ((3, 5, 5), (2, 2, 2), (5, 5), (2, 6, 6)):
            x, y = sets(*row)[:2]
            said = rf"^xs: the model does not take rows of shape \[{', '.join(map(str, row))}\]"
            with pytest.raises(ValueError, match=said):
                functional.adapt(operator, parameters, x, y)
            with pytest.raises(ValueError, match=said):
                functional.adapt_predict(operator, parameters, x, y, x)
            with pytest.raises(ValueError, match=r"^xq: the model does not take rows"):
                functional.predict(operator, parameters, x)
    assert torch.equal(functional.adapt_predict(operator, parameters, xs, ys, xq), wanted)


ACCEPTED = {
    "pooling of features": (lambda: nn.Sequential(nn.MaxPool1d(2), nn.Linear(4, 1)), (8,)),
    "linear along the last axis": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Conv1d(3, 2, 3), nn.Flatten(), nn.Linear(4, 1)),
        (3, 5),
    ),
    "linear along the last axis of all": (
        lambda: nn.Sequential(nn.Linear(5, 3), nn.Flatten(), nn.Linear(12, 1)),
        (4, 5),
    ),
    "behind a convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.Linear(5, 2), nn.Flatten(), nn.Linear(6, 1)),
        (2, 5),
    ),
    "norm along the last axis": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.LayerNorm(5), nn.Flatten(), nn.Linear(15, 1)),
        (2, 5),
    ),
    "one axis put in": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 3, 8), nn.Flatten(),
                              nn.Linear(3, 1)), (8,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_rows_that_torch_takes_are_still_taken(name):
    make, row = ACCEPTED[name]
    net = make()
    data = sets(*row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = pymeta.MAML(net, loss="mse", lr=0.1, steps=1)(*data)
        again = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="torch")(*data)
    assert torch.isfinite(out.loss)
    torch.testing.assert_close(out.loss, again.loss)


class Folding(nn.Module):
    """Makes one row of two, and two of one, which takes an even number of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(6, 6)

    def forward(self, x):
        return self.b(self.a(x).view(-1, 6)).view(-1, 3)


def test_what_depends_on_the_number_of_rows_is_left_to_torch():
    found = describe(Folding(), (3,))
    assert found.misfit is None and "another number of features" in found.reason
    x = torch.randn(2, 4, 3)
    with pytest.warns(UserWarning, match="another number of features"):
        pymeta.MAML(Folding(), loss="mse", lr=0.1, steps=1)(x, x, x, x)


class Looked(nn.Module):
    """Looks things up, and is no chain."""

    def __init__(self, padding=None):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 3, padding_idx=padding), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.cat([x[:, :1], self.table(x[:, 1].detach().long())], 1))


@pytest.mark.filterwarnings("ignore:.*runs in torch")
def test_what_only_torch_runs_has_its_rows_named_too():
    maml = pymeta.MAML(Looked(), loss="mse", lr=0.1, steps=1)
    xs, ys, xq, yq = sets(2)
    xs[..., 1], xq[..., 1] = 1, 2
    wanted = maml(xs, ys, xq, yq)
    models = maml.adapt(xs, ys)
    odd = xq.clone()
    odd[1, 2, 1] = 7
    said = (
        r"the rows of task 1, of shape \[2\]: layer table \(Embedding\) takes indices from 0 to 4"
    )
    for call, name in (
        (lambda: maml(xs, ys, odd, yq), "xq"),
        (lambda: maml(odd, ys, xq, yq), "xs"),
        (lambda: maml.adapt([*odd], [*ys]), "xs"),
        (lambda: models(odd), "xq"),
        (lambda: pymeta.Reptile(Looked(), loss="mse", lr=0.1, steps=1)(odd, ys), "xs"),
        (lambda: pymeta.FineTune(Looked(), loss="mse", lr=0.1, epochs=1)(odd, ys), "xs"),
        (lambda: pymeta.FineTune(Looked(), loss="mse", lr=0.1, epochs=1)(
            xs, ys, validation_data=(odd, yq)), r"validation_data\[0\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}.*: the model does not take {said}") as info:
            call()
        assert isinstance(info.value.__cause__, IndexError)
    wide = torch.randn(2, 4, 1)
    with pytest.raises(ValueError, match=r"^xs: .* task 0, of shape \[1\]: Looked: index 1 is out"):
        maml(wide, ys, wide, yq)
    assert torch.equal(maml(xs, ys, xq, yq).loss, wanted.loss)


class Stubborn(nn.Module):
    """Fails in its own ways."""

    def __init__(self, error):
        super().__init__()
        self.error, self.head = error, nn.Linear(2, 1)

    def forward(self, x):
        if self.error is not None and x.sum() != 0:
            raise self.error
        return self.head(x)


@pytest.mark.filterwarnings("ignore:.*runs in torch")
@pytest.mark.parametrize(
    "error",
    [E("mine") for E in (ValueError, IndexError, RuntimeError, KeyError, NotImplementedError)],
)
def test_errors_that_are_not_of_torch_are_left_alone(error):
    maml = pymeta.MAML(Stubborn(error), loss="mse", lr=0.1, steps=1)
    with pytest.raises(type(error), match="mine") as info:
        maml(*sets(2))
    assert info.value is error


def test_a_loss_that_fails_is_not_the_rows_fault():
    def loss(outputs, targets):
        raise RuntimeError("the loss's own")

    maml = pymeta.MAML(nn.Linear(2, 1), loss=loss, lr=0.1, steps=1, backend="torch")
    with pytest.raises(RuntimeError, match="the loss's own"):
        maml(*sets(2))
