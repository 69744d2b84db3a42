"""Rows of weight 0, or with the ignored label, are left out of their set, whatever they hold.

The native kernels must give the bits that they give without those rows: that is compared on every
executor, with NaN and infinity in what is left out. Every task leaves out as many rows, so that
both calls lay their tasks out alike and sums over tasks have one order.
"""

import pytest
import torch
from helpers import mlp
from kernels import PATHS, same_bits, using
from weightless import (
    CASES,
    IGNORED,
    INPUTS,
    KEPT,
    LEFT_OUT,
    ROWS,
    TASKS,
    make_loss,
    network,
    rows,
    without,
)

import pymeta


def meta(module, support, query, inputs):
    """Everything that a meta-learner's call gives."""
    (xs, ys, ws), (xq, yq, wq) = support, query
    xs, xq = xs.clone().requires_grad_(inputs), xq.clone().requires_grad_(inputs)
    out = module(xs, ys, xq, yq, support_weights=ws, query_weights=wq)
    module.zero_grad()
    out.loss.backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    return out, gradients, [xs.grad, xq.grad] if inputs else []


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}{'-norm' * c[1]}{'-label' * c[2]}")
@pytest.mark.parametrize("inputs", [False, True], ids=["", "input-gradients"])
def test_a_meta_gradient_is_that_of_the_other_rows(path, case, inputs):
    loss, batch_norm, by_label = case
    support, query = rows(loss, 0, by_label=by_label), rows(loss, 1, by_label=by_label)
    module = pymeta.MAML(
        network(batch_norm), loss=make_loss(loss), lr=pymeta.LearnableLR(0.1), steps=2,
        backend="native",
    )  # fmt: skip
    with using(*path):
        got, gradients, of_inputs = meta(module, support, query, inputs)
        wanted, wanted_gradients, wanted_of_inputs = meta(
            module, without(support), without(query), inputs
        )
        assert same_bits(got.task_losses, wanted.task_losses)
        assert got.loss.isfinite()
        assert same_bits(gradients, wanted_gradients)
        assert same_bits(got.predictions[:, KEPT], wanted.predictions)
        for gradient, of_kept in zip(of_inputs, wanted_of_inputs, strict=True):
            assert same_bits(gradient[:, KEPT], of_kept)
            assert not gradient[:, LEFT_OUT].any()
        # Rows that are left out have predictions: this one is a copy of one that is not.
        assert same_bits(got.predictions[:, LEFT_OUT[2]], got.predictions[:, KEPT[0]])
        assert got.predictions[:, LEFT_OUT[0]].isnan().all()


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_adapted_weights_are_those_of_the_other_rows(path, batch_norm, optimizer):
    x, y, weights = rows("mse", 2)
    rule = {"sgd": pymeta.SGD(0.1, momentum=0.5), "adam": pymeta.Adam(0.01)}[optimizer]
    reptile = pymeta.Reptile(
        network(batch_norm), loss="mse", optimizer=rule, steps=3, backend="native"
    )
    kept = without((x, y, weights))
    with using(*path):
        got = reptile.adapt(x, y, support_weights=weights)
        wanted = reptile.adapt(*kept[:2], support_weights=kept[2])
        assert same_bits(list(got.parameters.values()), list(wanted.parameters.values()))
        got = reptile(x, y, support_weights=weights)
        wanted = reptile(*kept[:2], support_weights=kept[2])
        assert same_bits(got.task_losses, wanted.task_losses)


@pytest.mark.parametrize("path", PATHS, ids="-".join)
def test_validation_looks_at_the_other_rows(path):
    """Two thirds to train on and one to validate by, in both calls."""
    x, y, weights = rows("mse", 4)
    tune = pymeta.FineTune(
        network(True), loss="mse", lr=0.1, epochs=4, validation=1 / 3, validation_rows="last",
        backend="native",
    )  # fmt: skip
    kept = without((x, y, weights))
    with using(*path):
        got, wanted = _tuned(tune, x, y, weights), _tuned(tune, *kept)
    assert same_bits(list(got.parameters.values()), list(wanted.parameters.values()))
    assert same_bits(got.history.validation, wanted.history.validation)
    # An epoch's loss is a mean over all rows of its minibatches' losses: rounded in between.
    torch.testing.assert_close(got.history.train, wanted.history.train)


def _tuned(tune, x, y, weights):
    return tune(x, y, weights=weights, curves=True)


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_minibatches_are_drawn_from_all_rows(path, batch_norm):
    """Those of them that weigh nothing add nothing to their batch, which may be a batch of none."""
    x, y, weights = rows("mse", 5)
    finite = x.nan_to_num(2.0, 5.0, -5.0)
    tune = pymeta.FineTune(
        network(batch_norm), loss="mse", lr=0.1, epochs=3, batch_size=3, backend="native"
    )
    with using(*path):
        got = _tuned(tune, x, y, weights)
        same = _tuned(tune, finite, y.nan_to_num(1.0), weights)
        assert same_bits(list(got.parameters.values()), list(same.parameters.values()))
        assert all(p.isfinite().all() for p in got.parameters.values())
        none = _tuned(tune, x, y, torch.zeros_like(weights))
        start = dict(tune.model.named_parameters())
        for name, values in none.parameters.items():
            assert same_bits(values, start[name].detach().expand_as(values))


@pytest.mark.parametrize("inputs", [INPUTS, 80], ids=["narrow", "factored"])
def test_an_adapter_and_a_wide_first_layer(inputs):
    x, y, weights = rows("mse", 6, inputs)
    torch.manual_seed(0)
    net = mlp(inputs, 24, 2, dtype=torch.float32)
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=3, backend="native")
    adapter = module.adapter()
    xq = torch.randn(4, inputs)
    for task in range(TASKS):
        every = [v[task].numpy() for v in (x, y, weights)]
        kept = [v[task, KEPT].numpy() for v in (x, y, weights)]
        got = adapter.adapt_predict(*every[:2], xq.numpy(), weights=every[2])
        wanted = adapter.adapt_predict(*kept[:2], xq.numpy(), weights=kept[2])
        if inputs == INPUTS:
            assert (got == wanted).all()
        # A task that leaves rows out has its first layer as it is, with other roundings.
        torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(wanted))
    got = meta(module, (x, y, weights), rows("mse", 7, inputs), False)
    kept = meta(module, without((x, y, weights)), without(rows("mse", 7, inputs)), False)
    torch.testing.assert_close(got[0].task_losses, kept[0].task_losses)
    torch.testing.assert_close(got[1], kept[1])


def test_a_wide_task_without_such_rows_keeps_its_bits_beside_one_with_them():
    x, y, weights = rows("mse", 8, 80)
    x, y = x.nan_to_num(0.5, 0.5, 0.5), y.nan_to_num(0.5)
    weights[1:] = 1.0
    net = mlp(80, 24, 2, dtype=torch.float32)
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=3, backend="native")
    beside = module(x, y, x, y, support_weights=weights).task_losses[1:]
    alone = module(x[1:], y[1:], x[1:], y[1:], support_weights=weights[1:]).task_losses
    assert same_bits(beside, alone)


def test_batch_norm_needs_two_rows_that_count():
    x, y, weights = rows("mse", 9)
    weights[3, 1:] = 0.0
    module = pymeta.MAML(network(True), loss="mse", lr=0.1, steps=1, backend="native")
    with pytest.raises(ValueError, match="xs: task 3 has one row that counts, and BatchNorm1d"):
        module(x, y, *without(rows("mse", 9))[:2], support_weights=weights)


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("by_label", [False, True], ids=["weight", "label"])
def test_one_row_that_does_not_count_is_no_row_under_batch_norm(path, by_label):
    """Of tasks with one row each: nothing to adapt to, and a query loss of 0."""
    loss = "cross_entropy" if by_label else "mse"
    x, y, weights = (v[:, LEFT_OUT[:1]] for v in rows(loss, 11, by_label=by_label))
    kept = [v[:, KEPT].contiguous() for v in rows(loss, 12, by_label=by_label)]
    module = pymeta.MAML(network(True), loss=make_loss(loss), lr=0.1, steps=2, backend="native")
    with using(*path):
        got = module(x, y, *kept[:2], support_weights=weights)
        start = module(*kept[:2], *kept[:2], steps=0)
        assert same_bits(got.task_losses, start.task_losses)
        nothing = module(*kept[:2], x, y, query_weights=weights)
        assert nothing.task_losses.tolist() == [0.0] * TASKS
        if by_label:
            y = torch.zeros_like(y)
        else:
            weights = torch.ones_like(weights)
        with pytest.raises(ValueError, match="xs: task 0 has one row, "):
            module(x.nan_to_num(), y, *kept[:2], support_weights=weights)


@pytest.mark.parametrize("by_label", [False, True], ids=["weight", "label"])
def test_one_of_several_rows_that_counts_makes_nan_on_a_device(by_label):
    """Values are not looked at before: what the CPU refuses is no loss there."""
    loss = "cross_entropy" if by_label else "mse"
    x, y, weights = (v[:, KEPT].contiguous() for v in rows(loss, 13, by_label=by_label))
    if by_label:
        y[3, 1:] = IGNORED
    else:
        weights[3, 1:] = 0.0
    module = pymeta.MAML(network(True), loss=make_loss(loss), lr=0.1, steps=2, backend="native")
    with using(*next(p for p in PATHS if p[1] == "emulated")):
        losses = module(x, y, x, y, query_weights=weights).task_losses
        assert losses.isnan().tolist() == [False, False, False, True, False]
        losses = module(x, y, x, y, support_weights=weights).task_losses
        assert losses.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("path", PATHS, ids="-".join)
def test_targets_of_bce_are_probabilities(path):
    x, y, _ = rows("mse", 10)
    x, y = x.nan_to_num(0.5, 0.5, 0.5), y.nan_to_num(0.5).clamp(0.0, 1.0)
    module = pymeta.MAML(network(False), loss="bce_with_logits", lr=0.1, steps=1, backend="native")
    y[2, 4, 1] = -1.0
    weights = torch.ones(TASKS, ROWS)
    weights[2, 4] = 0.0
    with using(*path):
        if path[1] == "emulated":  # as for labels, nobody reads values before
            losses = module(x, y, x, y).task_losses
            assert losses.isnan().tolist() == [False, False, True, False, False]
        else:
            with pytest.raises(ValueError, match=r"ys: task 2, row 4: target -1 is not in 0\.\.1"):
                module(x, y, x[:, :4], y[:, :4])
            with pytest.raises(ValueError, match=r"yq: task 2, row 4: target -1 is not in 0\.\.1"):
                module(x[:, :4], y[:, :4], x, y)
        out = module(x, y, x, y, support_weights=weights, query_weights=weights)
        assert out.task_losses.isfinite().all()
