"""Embedded categories beside numbers, natively, and as torch's own embedding has them."""

import itertools

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_promised, loop_meta_loss
from kernels import EXECUTORS, PATHS, same_bits, using
from native_help import check_slope_of_each_parameter
from torch import nn
from torch.nn import functional as F

import pymeta
from pymeta.nn import TabularInput

COLUMNS = {  # numbers, categories and widths
    "both": (3, [4, 2, 7], [2, 19, 1]),
    "categories alone": (0, [5], [3]),
    "one category": (1, [1, 3], [2, 2]),
}


class Plain(nn.Module):
    """The same with nn.Embedding, which is given integers."""

    def __init__(self, tabular):
        super().__init__()
        self.numeric = tabular.numeric
        self.tables = nn.ModuleList(
            nn.Embedding.from_pretrained(t.detach().clone(), freeze=False) for t in tabular.tables
        )

    def forward(self, x):
        codes = x[:, self.numeric :].long()
        parts = [table(codes[:, i]) for i, table in enumerate(self.tables)]
        return torch.cat([x[:, : self.numeric], *parts], 1)


def rows(columns, tasks, count, dtype=torch.float64):
    numeric, cardinalities, _ = columns
    codes = [torch.randint(n, (tasks, count, 1)).to(dtype) for n in cardinalities]
    return torch.cat([torch.randn(tasks, count, numeric, dtype=dtype), *codes], 2)


def made(name, tasks=3, act=nn.Tanh):
    numeric, cardinalities, dims = columns = COLUMNS[name]
    torch.manual_seed(4)
    first = TabularInput(numeric=numeric, cardinalities=cardinalities, dims=dims)
    net = nn.Sequential(first, act(), nn.Linear(first.out_features, 5), nn.Tanh(),
                        nn.Linear(5, 2)).double()  # fmt: skip
    xs, xq = rows(columns, tasks, 6), rows(columns, tasks, 4)
    ys, yq = (torch.randn(tasks, n, 2, dtype=torch.float64) for n in (6, 4))
    return net, (xs, ys, xq, yq)


def learner(net, backend="native", **options):
    return pymeta.MAML(net, **{"loss": "mse", "lr": 0.2, "steps": 2, **options}, backend=backend)


@pytest.mark.parametrize("name", COLUMNS)
def test_eager_autograd_agrees(name, backend):
    net, data = made(name)
    data[0].requires_grad_()
    twin = nn.Sequential(Plain(net[0]), *net[1:])
    loss = loop_meta_loss(twin, F.mse_loss, 0.2, 2, *data)
    wanted = torch.autograd.grad(loss, [*twin.parameters(), data[0]])
    out = learner(net, backend)(*data)
    got = torch.autograd.grad(out.loss, [*net.parameters(), data[0]])
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-12, atol=1e-14)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
    assert not got[-1][..., net[0].numeric :].any()


def results(net, maml, data):
    out = maml(*data)
    return [out.task_losses, out.predictions], torch.autograd.grad(out.loss, list(net.parameters()))


OPTIONS = (
    {},
    {"first_order": True},
    {"adapt": ["0.*"], "optimizer": pymeta.SGD(0.1, momentum=0.9), "lr": None},
    {"adapt": ["2.*"]},
    {"optimizer": pymeta.Adam(0.05, eps=1.0), "lr": None},
    {"lr": pymeta.LearnableLR(0.1, per="parameter")},
)


@pytest.mark.parametrize("isa, executor", PATHS)
def test_every_path_agrees_with_the_reference(isa, executor):
    for name, options, tasks in itertools.product(COLUMNS, OPTIONS, (3, 17)):
        net, data = made(name, tasks, nn.ReLU if tasks == 3 else nn.Sigmoid)
        wanted, grads = results(net, learner(net, "torch", **options), data)
        with using(isa, executor):
            got, own = results(net, learner(net, **options), data)
        assert_close(got, wanted)
        assert_close(own, grads)


@pytest.mark.parametrize("isa, executor", PATHS)
def test_finite_differences(isa, executor):
    net, data = made("both")
    maml = learner(net)
    with using(isa, executor):
        check_slope_of_each_parameter(maml, data, rel=1e-5, abs=1e-8)


def test_bits_are_a_tasks_own():
    net, data = made("both", tasks=18)
    with using(executor="rows", threads=1):
        wanted = results(net, learner(net), data)
        alone = learner(net)(*(v[1:2] for v in data)).predictions
    assert same_bits([alone], [wanted[0][1][1:2]])
    for executor, threads in itertools.product(EXECUTORS, (1, 3)):
        with using(executor=executor, threads=threads):
            got = results(net, learner(net), data)
        assert same_bits(got[0], wanted[0])
        if executor == "rows":
            assert same_bits(got[1], wanted[1])


@pytest.mark.parametrize("wrong", [2.0, -1.0, 0.5, float("nan"), float("inf")])
def test_what_is_no_category_is_refused_by_name(wrong, backend):
    net, (xs, ys, xq, yq) = made("both")
    maml = learner(net, backend)
    with torch.no_grad():
        maml(xs, ys, xq, yq)  # and so in the call that repeats it
        for sets, name in ((xs, "xs"), (xq, "xq")):
            sets = sets.clone()
            sets[1, 2, 4] = wrong
            message = (
                rf"{name}: task 1, row 2, column 4: \S+ is not a category, an integer in 0\.\.1"
            )
            with pytest.raises(ValueError, match=message):
                maml(*((sets, ys, xq, yq) if name == "xs" else (xs, ys, sets, yq)))
        models = maml.adapt(xs, ys)
        with pytest.raises(ValueError, match=r"xq: task 1, row 2, column 4"):
            models(sets)
        with pytest.raises(ValueError, match=r"xs: task 1, row 2, column 4"):
            maml.adapt(sets, yq)


def test_a_row_that_does_not_count_may_hold_anything(backend):
    net, (xs, ys, xq, yq) = made("both")
    weights = torch.ones(3, 6, dtype=torch.float64)
    weights[0, 5] = 0
    wanted = learner(net, backend)(xs, ys, xq, yq, support_weights=weights).loss
    xs[0, 5] = 99
    got = learner(net, backend)(xs, ys, xq, yq, support_weights=weights).loss
    assert_promised([got.detach()], [wanted.detach()], backend)
    with pytest.raises(ValueError, match=r"xs: task 0, row 5, column 3"):
        learner(net, backend)(xs, ys, xq, yq)


def test_a_task_of_no_rows_that_count(backend):
    """It is not adapted; torch's own F.embedding has no second derivative of no rows."""
    net, (xs, ys, xq, yq) = made("both")
    weights = torch.ones(3, 6, dtype=torch.float64)
    weights[1] = 0
    out = learner(net, backend)(xs, ys, xq, yq, support_weights=weights)
    grads = torch.autograd.grad(out.loss, list(net.parameters()))
    assert all(g.isfinite().all() for g in grads) and grads[0].any()
    assert_close([out.predictions[1]], [net(xq[1])])


def test_models_files_and_adapters(tmp_path):
    net, (xs, ys, xq, yq) = made("both")
    maml = learner(net)
    wanted = maml(xs, ys, xq, yq).predictions.detach()
    models = maml.adapt(xs, ys)
    models.save(tmp_path / "models")
    assert torch.equal(pymeta.Adapted.load(tmp_path / "models", net)(xq), wanted)
    assert_close([models[1](xq[1])], [wanted[1]])
    maml.adapter().save(tmp_path / "adapter")
    adapter = pymeta.Adapter.load(tmp_path / "adapter")
    own = [v[0].numpy() for v in (xs, ys, xq)]
    assert np.array_equal(adapter.adapt_predict(*own), wanted[0].numpy())
    assert np.array_equal(adapter.adapt(xs.numpy(), ys.numpy())(xq.numpy()), wanted.numpy())
    own[0][3, 5] = 7
    with pytest.raises(ValueError, match=r"xs: task 0, row 3, column 5: 7 is not a category"):
        adapter.adapt_predict(*own)


def test_somewhere_else_than_first_it_runs_in_torch():
    first = TabularInput(numeric=1, cardinalities=[3], dims=[2])
    net = nn.Sequential(nn.Identity(), nn.ReLU(), first, nn.Linear(3, 1))
    assert "layers: the first layer must be linear" in learner(net, "auto").explain()
    two = nn.Sequential(nn.Linear(2, 2), *net[2:])
    assert "looks up a column of the input" in learner(two, "auto").explain()


def test_arguments_are_checked():
    for wrong, error, message in (
        ({"numeric": -1}, ValueError, r"numeric: expected an integer of at least 0, got -1"),
        ({"cardinalities": [0]}, ValueError, r"cardinalities: expected integers .* got 0"),
        ({"cardinalities": 3}, TypeError, r"cardinalities: expected a list of integers, got int"),
        ({"dims": [1, 2]}, ValueError, r"dims: expected 1, one for each of cardinalities, got 2"),
        ({"cardinalities": [], "dims": []}, ValueError, r"at least one column of categories"),
    ):
        with pytest.raises(error, match=message):
            TabularInput(**{"numeric": 2, "cardinalities": [3], "dims": [2], **wrong})
    with pytest.raises(ValueError, match=r"input: expected \[rows, 3\] \(2 numbers and 1"):
        TabularInput(numeric=2, cardinalities=[3], dims=[2])(torch.zeros(4, 2))
