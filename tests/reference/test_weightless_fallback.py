"""Rows that do not count, in the torch fallback: as in the native kernels, and for any module.

`test_weightless_rows.py` has the same of the native kernels, whose sets these are.
"""

import pytest
import torch
from helpers import assert_close, gradients
from torch import nn
from weightless import CASES, KEPT, LEFT_OUT, make_loss, network, rows, without

import pymeta


def doubled(side):
    return tuple(v.double() if v.is_floating_point() else v for v in side)


class Crosswise(nn.Module):
    """Each row sees all other rows."""

    def forward(self, x):
        return x + torch.softmax(x @ x.T, dim=-1) @ x


NETS = {
    "chain": lambda: network(False),
    "batch norm": lambda: network(True),
    "images": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.BatchNorm1d(4), nn.Flatten(),
        nn.Linear(8, 2),
    ),
    "rows that see each other": lambda: nn.Sequential(
        nn.Linear(3, 4), Crosswise(), nn.Linear(4, 2)
    ),
}  # fmt: skip


def meta(module, support, query):
    (xs, ys, ws), (xq, yq, wq) = support, query
    xs, xq = xs.clone().requires_grad_(), xq.clone().requires_grad_()
    out = module(xs, ys, xq, yq, support_weights=ws, query_weights=wq)
    return out, gradients(out.loss, *module.parameters()), gradients(out.loss, xs, xq)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}{'-norm' * c[1]}{'-label' * c[2]}")
@pytest.mark.parametrize("first_order", [False, True])
def test_a_meta_gradient_is_that_of_the_other_rows(net, case, first_order):
    loss, _, by_label = case
    support, query = (doubled(rows(loss, seed, by_label=by_label)) for seed in (0, 1))
    module = pymeta.MAML(
        NETS[net]().double(), loss=make_loss(loss), lr=pymeta.LearnableLR(0.1), steps=2,
        first_order=first_order, backend="torch",
    )  # fmt: skip
    got, found, of_inputs = meta(module, support, query)
    wanted, wanted_gradients, wanted_of_inputs = meta(module, without(support), without(query))
    assert_close(got.task_losses, wanted.task_losses)
    assert_close(found, wanted_gradients)
    assert_close(got.predictions[:, KEPT], wanted.predictions)
    for gradient, of_kept in zip(of_inputs, wanted_of_inputs, strict=True):
        assert_close(gradient[:, KEPT], of_kept)
        assert not gradient[:, LEFT_OUT].any()
    if net != "rows that see each other":
        assert_close(got.predictions[:, LEFT_OUT[2]], got.predictions[:, KEPT[0]])
    assert got.predictions[:, LEFT_OUT[0]].isnan().all()


@pytest.mark.parametrize("net", ["chain", "batch norm"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}{'-norm' * c[1]}{'-label' * c[2]}")
@pytest.mark.parametrize("size", [None, 3])
def test_backends_agree(net, case, size):
    """Sets of which all, some or none of the rows count; minibatches of one that counts, too."""
    loss, _, by_label = case
    x, y, weights = doubled(rows(loss, 2, by_label=by_label))
    xq, yq, query_weights = doubled(rows(loss, 3, by_label=by_label))
    if not by_label:
        weights[0], query_weights[0, 3:5] = 0.0, 0.0
        weights[1, KEPT[:2]] = 0.0
    rule = pymeta.SGD(0.1, momentum=0.5, weight_decay=0.1)
    options = {"loss": make_loss(loss), "optimizer": rule}
    results = []
    for backend in ("native", "torch"):
        module = network(net == "batch norm").double()
        maml = pymeta.MAML(module, steps=2, backend=backend, **options)
        out = maml(x, y, xq, yq, support_weights=weights, query_weights=query_weights)
        tune = pymeta.FineTune(
            module, epochs=3, batch_size=size, validation=0.4, validation_rows="last",
            backend=backend, **options,
        )  # fmt: skip
        models = tune(x, y, weights=weights, curves=True)
        reptile = pymeta.Reptile(module, steps=4, batch_size=size, backend=backend, **options)
        moved = reptile(x, y, support_weights=weights)
        curves = [v.double() for v in models.history.values().values()]
        results.append(
            [
                out.task_losses,
                out.predictions[:, KEPT],
                out.predictions[:, LEFT_OUT[2]],
                *gradients(out.loss, *module.parameters()),
                *models.parameters.values(),
                *(c.nan_to_num(-1.0) for c in curves),
                moved.task_losses,
                *gradients(moved.loss, *module.parameters()),
            ]
        )
    assert_close(*reversed(results))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_predictions_of_a_set_of_which_nothing_counts(backend):
    """There are no statistics to normalise by."""
    x, y, weights = doubled(rows("mse", 4))
    x, y = x.nan_to_num(0.5, 0.5), y.nan_to_num(0.5)
    for batch_norm in (False, True):
        net = network(batch_norm).double()
        maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend=backend)
        out = maml(x, y, x, y, support_weights=weights, query_weights=torch.zeros(5, 9))
        assert not out.task_losses.any()
        assert all(not g.any() for g in gradients(out.loss, *net.parameters()))
        assert bool(out.predictions.isnan().all()) == batch_norm


def test_weights_that_require_grad_leave_nothing_out():
    """The gradient by a weight at 0 is that of its row's loss."""
    x, y, weights = doubled(rows("mse", 5))
    x, y = x.nan_to_num(0.5, 0.5, 0.5), y.nan_to_num(0.5)
    net = network(False).double()
    maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="torch")
    weights.requires_grad_()
    out = maml(x, y, x, y, query_weights=weights)
    (found,) = gradients(out.loss, weights)
    errors = (out.predictions - y).square().mean(-1)
    means = out.task_losses.unsqueeze(-1)
    wanted = (errors - means) / weights.detach().sum(1, keepdim=True) / len(x)
    assert found[:, LEFT_OUT].all()
    assert_close(found, wanted)


def test_values_of_rows_that_do_not_count_are_not_checked():
    x, y, weights = rows("cross_entropy", 6)
    options = {"lr": 0.1, "steps": 1, "backend": "torch"}
    module = pymeta.MAML(network(True), loss="cross_entropy", **options)
    assert module(x, y, x, y, support_weights=weights, query_weights=weights).loss.isfinite()
    with pytest.raises(ValueError, match=r"ys: task 0, row 1: label 12 is not in 0\.\.1"):
        module(x, y, x, y, query_weights=weights)
    weights[3, 1:] = 0.0
    with pytest.raises(ValueError, match="xs: task 3 has one row that counts, which batch norm"):
        module(x, y, *without(rows("cross_entropy", 6))[:2], support_weights=weights)
    with pytest.raises(ValueError, match="xs: task 3 has one row that counts, which batch norm"):
        module(list(x[:, :8]) + [x[0]], list(y[:, :8]) + [y[0]], list(x[:, :8]) + [x[0]],
               list(y[:, :8]) + [y[0]], support_weights=list(weights[:, :8]) + [weights[0]],
               query_weights=list(weights[:, :8]) + [weights[0]])  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_split_of_validation_leaves_more_than_one_row_that_counts(backend):
    x, y, weights = (v.double() for v in rows("mse", 6))
    tune = pymeta.FineTune(
        network(True).double(), loss="mse", lr=0.1, epochs=1, validation=0.4,
        validation_rows="last", backend=backend,
    )  # fmt: skip
    weights[3, 8] = 0.0
    with pytest.raises(ValueError, match="validation: task 3 has one row that counts to validate"):
        tune(x, y, weights=weights)
    weights[2, :5] = 0.0
    with pytest.raises(ValueError, match="validation: task 2 has one row that counts to train on"):
        tune(x, y, weights=weights)


@pytest.mark.parametrize("form", ["uniform", "padded", "list", "one output"])
def test_targets_of_bce_are_probabilities(form):
    x, y, _ = rows("bce_with_logits", 7)
    x, y = x.nan_to_num(0.5, 0.5, 0.5), y.nan_to_num(0.5).clamp(0.0, 1.0)
    y[0, 0, 0], y[2, 4, 1] = float("nan"), -1.0
    weights, sizes = torch.ones(5, 9), None
    net = network(False)
    if form == "one output":
        net, y = nn.Sequential(net, nn.Linear(2, 1)), y[..., 1].contiguous()
    module = pymeta.MAML(net, loss="bce_with_logits", lr=0.1, steps=1, backend="torch")
    message = r"s: task 2, row 4: target -1 is not in 0\.\.1; .*\(y \+ 1\) / 2"
    ragged = [9, 8, 7, 6, 9]
    clean = (x[:, :4], y[:, :4])
    if form == "list":
        x, y, weights = ([v[:n] for v, n in zip(s, ragged, strict=True)] for s in (x, y, weights))
    if form == "padded":
        sizes = ragged
    with pytest.raises(ValueError, match="y" + message):
        module(x, y, *clean, support_sizes=sizes)
    weights[2][4] = 0.0
    out = module(x, y, *clean, support_weights=weights, support_sizes=sizes)
    assert out.task_losses.isnan().tolist() == [form != "one output", False, False, False, False]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("weights", ["balanced", [1.0, 3.0]])
def test_class_weights_do_not_look_at_rows_left_out(backend, weights):
    x, y, w = rows("bce_with_logits", 8)
    net, y = nn.Sequential(network(False), nn.Linear(2, 1)), y[..., 0]
    kept = without((x, y, w))
    tune = pymeta.FineTune(
        net, loss="bce_with_logits", lr=0.1, epochs=2, class_weights=weights, backend=backend
    )
    got, wanted = tune(x, y, weights=w), tune(*kept[:2], weights=kept[2])
    assert_close(list(got.parameters.values()), list(wanted.parameters.values()))
    if backend == "native":
        adapter = tune.adapter()
        one = adapter.adapt(x.numpy(), y.numpy(), weights=w.numpy())
        values = [torch.from_numpy(v) for v in one.parameters.values()]
        assert_close(values, list(wanted.parameters.values()))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_single_row_that_does_not_count_is_no_set_of_one_row(backend):
    x, y, _ = rows("mse", 6)
    module = pymeta.MAML(network(True), loss="mse", lr=0.1, steps=1, backend=backend)
    query = without(rows("mse", 7))[:2]
    found = module(x[:, :1], y[:, :1], *query, support_weights=torch.zeros(len(x), 1))
    start = module(x[:, :0], y[:, :0], *query)
    torch.testing.assert_close(found.task_losses, start.task_losses, rtol=1e-5, atol=1e-6)
    tune = pymeta.FineTune(network(True), loss="mse", lr=0.1, epochs=1, backend=backend)
    adapted = tune(x[:, :1], y[:, :1], weights=torch.zeros(len(x), 1)).parameters
    for name, start in tune.model.named_parameters():
        assert torch.equal(adapted[name], start.detach().expand_as(adapted[name]))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_predictions_without_query_targets(backend):
    x, y, weights = rows("mse", 6)
    xq = without(rows("mse", 7))[0]
    kept_x, kept_y, kept_weights = without((x, y, weights))
    module = pymeta.MAML(network(False), loss="mse", lr=0.1, steps=2, backend=backend)
    found = module(x, y, xq, support_weights=weights).predictions
    wanted = module(kept_x, kept_y, xq, support_weights=kept_weights).predictions
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
