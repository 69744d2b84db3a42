"""pymeta.FineTune on both backends, against loops over torch.optim for each task."""

import copy
import io
import itertools
import math
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_promised, batch, mlp, targets, torch_loss
from torch import nn

import pymeta
from pymeta import SGD, Adam, FineTune
from pymeta.algorithms import finetune
from pymeta.algorithms import progress as bars
from pymeta.algorithms.held_out import held_out_counts
from pymeta.spec.schedule import SPLIT, permutation

SIZES = [7, 0, 12, 5, 1, 9]


@pytest.fixture(params=["native", "torch"])
def backend(request):
    return request.param


def tuner(backend, net, **options):
    options = {"loss": "mse", "lr": 0.1, "epochs": 4, **options}
    if "optimizer" in options:
        options.pop("lr")
    return FineTune(net, backend=backend, **options)


def ragged(loss="mse", sizes=SIZES, inputs=2, out=3):
    """(xs, ys, weights) of tasks of different sizes."""
    xs = [torch.randn(n, inputs, dtype=torch.float64) for n in sizes]
    ys = [targets(loss, n, out=out) for n in sizes]
    return xs, ys, [torch.rand(n, dtype=torch.float64) for n in sizes]


def weighted_loss(name):
    """(outputs, y, weights) -> the weighted mean of the rows' losses, by torch's functions."""
    f = torch_loss(name)

    def loss(outputs, y, weights):
        each = f(outputs, y, reduction="none")
        each = each if each.ndim == 1 else each.mean(1)
        return (each * weights).sum() / weights.sum()

    return loss


class ByHand:
    """One task at a time by torch.optim, with all that FineTune does, written out once more.

    Attributes:
        weights: the adapted parameters.
        train, validation: the curves.
        best: after which epoch the weights were.
    """

    def __init__(
        self, net, make, x, y, weights=None, *, loss="mse", epochs=4, size=None, seed=0,
        task_id=0, anchor=0.0, frozen=(), clip=None, held=None, patience=None,
    ):  # fmt: skip
        net = copy.deepcopy(net)
        start = {n: p.detach().clone() for n, p in net.named_parameters()}
        free = [p for n, p in net.named_parameters() if n not in frozen]
        f = weighted_loss(loss)
        weights = torch.ones(len(x), dtype=torch.float64) if weights is None else weights
        optimizer = make(free)
        self.train, self.validation, self.best = [], [], 0
        self.weights = start
        bad = 0
        if held is not None:
            self.validation.append(f(net(held[0]), held[1], held[2]).item())
        for epoch in range(epochs if len(x) else 0):
            step = size if size is not None and size < len(x) else len(x)
            order = torch.arange(len(x))
            if step < len(x):
                order = torch.from_numpy(permutation(seed, 0, task_id, epoch, len(x)))
            total = 0.0
            for rows in order.split(step):
                optimizer.zero_grad()
                value = f(net(x[rows]), y[rows], weights[rows])
                total += value.item() * len(rows)
                pull = sum((p - start[n]).square().sum() for n, p in net.named_parameters())
                (value + anchor / 2 * pull).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(free, clip)
                optimizer.step()
            self.train.append(total / len(x))
            now = {n: p.detach().clone() for n, p in net.named_parameters()}
            if held is None:
                self.weights, self.best = now, epoch + 1
                continue
            self.validation.append(f(net(held[0]), held[1], held[2]).item())
            bad += 1
            if self.validation[-1] < self.validation[self.best]:
                self.weights, self.best, bad = now, epoch + 1, 0
            if patience is not None and bad >= patience:
                break


def assert_same(models, each):
    """The models are those made by hand, one for each task, and so is their history."""
    assert len(models) == len(each)
    for name, values in models.parameters.items():
        for t, hand in enumerate(each):
            assert_close(values[t], hand.weights[name], terms=10**6)
    history = models.history
    if history is None:
        return
    for t, hand in enumerate(each):
        epochs = len(hand.train)
        assert history.epochs[t] == epochs
        assert history.train[t, epochs:].isnan().all()
        if epochs:
            assert_close(
                history.train[t, :epochs], torch.tensor(hand.train, dtype=torch.float64), 10**6
            )
        if history.validation is not None:
            seen = len(hand.validation)
            assert history.validation[t, seen:].isnan().all()
            assert history.best_epochs[t] == hand.best
            if seen:
                wanted = torch.tensor(hand.validation, dtype=torch.float64)
                assert_close(history.validation[t, :seen], wanted, 10**6)


RULES = {
    "sgd": (SGD(0.1), lambda p: torch.optim.SGD(p, 0.1), None),
    "momentum": (
        SGD(0.05, momentum=0.9, weight_decay=0.1, clip_norm=0.5),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
        0.5,
    ),
    "adam": (Adam(0.02), lambda p: torch.optim.Adam(p, 0.02), None),
    "adamw": (
        Adam(0.02, weight_decay=0.3, decoupled=True),
        lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.3),
        None,
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_equals_a_loop_over_torch_optim(name, size, loss, backend):
    rule, make, clip = RULES[name]
    net, (xs, ys, ws) = mlp(2, 5, 3), ragged(loss)
    ids = [0, 3, 0, 1, 2, 7]
    module = tuner(backend, net, loss=loss, optimizer=rule, batch_size=size, seed=5, epochs=3)
    models = module(xs, ys, weights=ws, task_ids=ids, curves=True)
    each = [
        ByHand(net, make, x, y, w, loss=loss, epochs=3, size=size, seed=5, task_id=i, clip=clip)
        for x, y, w, i in zip(xs, ys, ws, ids, strict=True)
    ]
    assert_same(models, each)
    assert models.history.validation is None and models.history.best_epochs is None
    assert not models.status.any()
    # without rows there are neither steps nor losses
    assert torch.equal(models.parameters["0.weight"][1], net[0].weight)
    assert models.history.epochs[1] == 0
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("anchor", [0.5, 3.0])
def test_freeze_and_anchor(anchor, backend):
    rule, make, clip = RULES["momentum"]
    net, (xs, ys, _) = mlp(2, 5, 3), ragged(sizes=[6, 8])
    net[2].bias.requires_grad_(False)
    module = tuner(backend, net, optimizer=rule, anchor=anchor, freeze=["0.*"])
    frozen = ["0.weight", "0.bias", "2.bias"]
    each = [
        ByHand(net, make, x, y, anchor=anchor, frozen=frozen, clip=clip)
        for x, y in zip(xs, ys, strict=True)
    ]
    models = module(xs, ys)
    assert_same(models, each)
    assert models.history is None
    assert models.parameters["0.weight"].stride(0) == 0  # kept once
    for name in frozen:
        assert torch.equal(models.parameters[name][1], net.get_parameter(name))


def test_a_strong_anchor_keeps_the_start(backend):
    """With lr * anchor = 1 and gradients of at most g, no weight goes further than lr * g."""
    net, (xs, ys, _) = mlp(2, 5, 3), ragged(sizes=[6, 8])
    free = tuner(backend, net, lr=1e-3, epochs=100)(xs, ys).parameters
    held = tuner(backend, net, lr=1e-3, anchor=1e3, epochs=100)(xs, ys).parameters
    for name, start in net.named_parameters():
        moved, kept = (float((p[name] - start.detach()).abs().max()) for p in (free, held))
        assert kept < 0.1 * moved


def test_freezing_everything_changes_nothing(backend):
    net, (xs, ys, _) = mlp(2, 5, 3), ragged()
    models = tuner(backend, net, freeze=["*"])(xs, ys, curves=True)
    for name, p in net.named_parameters():
        assert all(torch.equal(p, value) for value in models.parameters[name])
    assert models.history.epochs.tolist() == [4, 0, 4, 4, 4, 4]


def split(x, y, w, fraction, last, seed=0, task_id=0):
    """The rows to train on and those held out, each (x, y, weights)."""
    held = math.floor(fraction * len(x))
    chosen = np.arange(len(x) - held, len(x))
    if not last:
        chosen = np.sort(permutation(seed, 0, task_id, 0, len(x), SPLIT)[:held])
    rest = np.setdiff1d(np.arange(len(x)), chosen)
    return [tuple(v[torch.from_numpy(rows)] for v in (x, y, w)) for rows in (rest, chosen)]


@pytest.mark.parametrize("form", ["ragged", "padded", "uniform"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("patience", [None, 2])
def test_validation_and_early_stopping(form, last, size, patience, backend):
    sizes = SIZES if form != "uniform" else [10] * 4
    net, (xs, ys, ws) = mlp(2, 5, 3), ragged("cross_entropy", sizes)
    options = {"validation": 0.3, "validation_rows": "last" if last else "random"}
    rule, make, clip = SGD(0.7, momentum=0.9), lambda p: torch.optim.SGD(p, 0.7, 0.9), None
    module = tuner(
        backend, net, loss="cross_entropy", optimizer=rule, batch_size=size, seed=9, epochs=12,
        patience=patience, **options,
    )  # fmt: skip
    ids = list(range(3, 3 + len(sizes)))
    if form == "ragged":
        models = module(xs, ys, weights=ws, task_ids=ids, curves=True)
    else:
        x, y, w = (torch.nn.utils.rnn.pad_sequence(v, batch_first=True) for v in (xs, ys, ws))
        given = {"sizes": sizes} if form == "padded" else {}
        models = module(x, y, weights=w, task_ids=ids, curves=True, **given)
    each = []
    for x, y, w, i in zip(xs, ys, ws, ids, strict=True):
        rows, held = split(x, y, w, 0.3, last, 9, i)
        each.append(
            ByHand(
                net, make, *rows, loss="cross_entropy", size=size, seed=9, task_id=i, clip=clip,
                held=held if len(held[0]) else None, patience=patience, epochs=12,
            )
        )  # fmt: skip
    assert_same(models, each)
    # the case is worth something: tasks stop at different epochs, and not all at the last one
    stopped = {hand.best for hand in each if hand.validation}
    assert len(stopped) > 1 and stopped != {12}
    if patience is not None:
        assert any(len(hand.train) < 12 for hand in each)


@pytest.mark.parametrize("sizes", [[3, 3, 3], [3, 2, 0]])
def test_a_fraction_of_no_row_holds_nothing_out(sizes, backend):
    net, (xs, ys, _) = mlp(2, 5, 3), ragged(sizes=sizes)
    models = tuner(backend, net, validation=0.2, patience=1)(xs, ys, curves=True)
    plain = tuner(backend, net)(xs, ys, curves=True)
    assert_promised(models.parameters.values(), plain.parameters.values(), backend)
    assert models.history.validation.isnan().all()
    assert torch.equal(models.history.best_epochs, plain.history.epochs)


def test_fractions_are_rounded_down():
    sizes = torch.tensor([100, 10, 9, 3, 0])
    assert held_out_counts(sizes, 0.29).tolist() == [29, 2, 2, 0, 0]
    assert held_out_counts(sizes, 0.999).tolist() == [99, 9, 8, 2, 0]


def test_validation_drops_nothing():
    """Without a step the curve is the loss of the start in eval mode, whatever training draws."""
    net = nn.Sequential(
        nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)
    ).double()
    net[2].eval()  # a mode of one layer alone is kept, too
    xs, ys, xq, yq = batch(out=3)
    module = tuner("torch", net, lr=0.0)
    calm = module(xs, ys, validation_data=(xq, yq), curves=True).history
    net[2].train()
    models = module(xs, ys, validation_data=(xq, yq), curves=True)
    assert all(m.training for m in net.modules())
    assert_close(models.history.validation, calm.validation)
    assert_close(calm.validation, calm.validation[:, :1].expand(3, 5))
    assert (models.history.train.std(1) > 0.01).all()  # training does drop


def test_validation_data(backend):
    net, (xs, ys, _), (xv, yv, wv) = mlp(2, 5, 3), ragged(), ragged(sizes=[3, 4, 0, 5, 2, 1])
    module = tuner(backend, net, lr=0.4, epochs=10, patience=1)
    models = module(xs, ys, validation_data=(xv, yv, wv), curves=True)
    each = [
        ByHand(
            net, lambda p: torch.optim.SGD(p, 0.4), x, y, epochs=10, patience=1,
            held=held if len(held[0]) else None,
        )
        for x, y, *held in zip(xs, ys, xv, yv, wv, strict=True)
    ]  # fmt: skip
    assert_same(models, each)
    assert models.history.epochs[2] == 10  # nothing to validate on
    plain = tuner(backend, net, lr=0.4, epochs=10)(xs, ys)
    for name, values in models.parameters.items():
        assert_promised(values[2], plain.parameters[name][2], backend)


def test_a_validation_loss_of_nan_is_never_the_best(backend):
    net, (xs, ys, _) = mlp(2, 5, 3), ragged(sizes=[6, 6, 6])
    xv, yv, _ = ragged(sizes=[4, 4, 4])
    xv[1][2] = math.nan
    module = tuner(backend, net, lr=0.01, epochs=5)
    models = module(xs, ys, validation_data=(xv, yv), curves=True)
    assert models.history.best_epochs[1] == 0
    assert torch.equal(models.parameters["0.weight"][1], net[0].weight)
    assert not models.status.any()
    # a task that diverges keeps what it had before
    ys[2][0, 0] = math.inf
    models = module(xs, ys, validation_data=(xv, yv), curves=True)
    assert models.status.tolist() == [0, 0, 0]
    assert torch.equal(models.parameters["0.weight"][2], net[0].weight)
    assert models.history.validation[2, 1:].isnan().all()


def test_random_rows_depend_on_seed_and_task_id(backend):
    net, (xs, ys, _) = mlp(2, 5, 3), ragged(sizes=[10])
    xs, ys = xs * 3, ys * 3

    def first_losses(**options):
        module = tuner(backend, net, validation=0.4, epochs=1, seed=options.pop("seed", 0))
        return list(module(xs, ys, curves=True, **options).history.validation[:, 0])

    alike = first_losses()
    assert_promised(alike[1:], [alike[0], alike[0]], backend)
    own = first_losses(task_ids=[0, 1, 2])
    assert_promised(own[0], alike[0], backend)
    other = [*own, first_losses(seed=1)[0]]
    assert all(abs(a - b) > 1e-6 * b for a, b in itertools.combinations(other, 2))


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits"])
@pytest.mark.parametrize("form", ["ragged", "padded"])
@pytest.mark.parametrize("balanced", [False, True])
def test_class_weights(loss, form, balanced, backend):
    out = 3 if loss == "cross_entropy" else 1
    net, (xs, ys, ws) = mlp(2, 5, out), ragged(loss, out=out)
    per_class = "balanced" if balanced else ([0.5, 2.0, 4.0] if out == 3 else np.array([0.5, 3.0]))
    module = tuner(backend, net, loss=loss, class_weights=per_class, validation=0.25, epochs=6)
    if form == "ragged":
        models = module(xs, ys, weights=ws, curves=True)
    else:
        x, y, w = (torch.nn.utils.rnn.pad_sequence(v, batch_first=True) for v in (xs, ys, ws))
        models = module(x, y, weights=w, sizes=SIZES, curves=True)
    each = []
    for x, y, w in zip(xs, ys, ws, strict=True):
        classes = y.reshape(-1).long()
        found, counts = classes.unique(return_counts=True)
        table = torch.ones(3, dtype=torch.float64)
        table[found] = len(y) / (len(found) * counts.double())
        if not balanced:
            table = torch.tensor(list(per_class), dtype=torch.float64)
        rows, held = split(x, y, w * table[classes], 0.25, last=False)
        held = held if len(held[0]) else None
        each.append(
            ByHand(net, lambda p: torch.optim.SGD(p, 0.1), *rows, loss=loss, held=held, epochs=6)
        )
    assert_same(models, each)


def test_balanced_weights_are_scikit_learns():
    from pymeta.spec.class_weights import class_table

    utils = pytest.importorskip("sklearn.utils.class_weight")
    _, ys, _ = ragged("cross_entropy", sizes=[40, 30])
    task = np.repeat([0, 1], [40, 30])
    table = class_table(torch.cat(ys).numpy(), task, 2, "balanced", 3)
    for t, y in enumerate(y.numpy() for y in ys):
        wanted = utils.compute_class_weight("balanced", classes=np.unique(y), y=y)
        assert len(wanted) == 3
        np.testing.assert_allclose(table[t], wanted, rtol=1e-15)


def test_ignored_labels_have_no_class(backend):
    net, (xs, ys, _) = mlp(2, 5, 3), ragged("cross_entropy", sizes=[8, 8])
    loss = nn.CrossEntropyLoss(ignore_index=-1)
    module = tuner(backend, net, loss=loss, class_weights="balanced")
    wanted = module([x[2:] for x in xs], [y[2:] for y in ys])
    for y in ys:
        y[:2] = -1
    got = module(xs, ys)
    for name, values in wanted.parameters.items():
        assert_close(got.parameters[name], values)


# ---- starts -----------------------------------------------------------------------------------


def test_starts_of_their_own(backend):
    net, (xs, ys, _) = mlp(2, 5, 3), ragged(sizes=[6, 4, 8])
    module = tuner(backend, net, anchor=0.3, freeze=["0.weight"])
    starts = [mlp(2, 5, 3) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(starts)
    stacked = {n: p.detach() for n, p in stacked.items()}
    make = lambda p: torch.optim.SGD(p, 0.1)  # noqa: E731
    each = [
        ByHand(start, make, x, y, anchor=0.3, frozen=["0.weight"])
        for start, x, y in zip(starts, xs, ys, strict=True)
    ]
    assert_same(module(xs, ys, start=stacked), each)
    assert_same(module(xs, ys, start={n: p.numpy() for n, p in stacked.items()}), each)
    some = {n: stacked[n] for n in ("0.weight", "2.bias")}
    mixed = [copy.deepcopy(net) for _ in starts]
    for own, start in zip(mixed, starts, strict=True):
        own[0].weight, own[2].bias = start[0].weight, start[2].bias
    each = [
        ByHand(start, make, x, y, anchor=0.3, frozen=["0.weight"])
        for start, x, y in zip(mixed, xs, ys, strict=True)
    ]
    models = module(xs, ys, start=some)
    some["0.weight"].zero_()  # the result holds a copy
    assert_same(models, each)


def test_going_on_from_an_earlier_result(backend):
    """Two epochs and two more are four, for an optimiser that remembers nothing."""
    net, (xs, ys, _) = mlp(2, 5, 3), ragged()
    half, whole = (tuner(backend, net, epochs=n, freeze=["0.*"]) for n in (2, 4))
    wanted = whole(xs, ys)
    half_way = half(xs, ys)
    with torch.no_grad():
        net[0].weight.zero_()  # of no importance: the frozen ones come from the start as well
    got = half(xs, ys, start=half_way)
    for name, values in wanted.parameters.items():
        assert_promised(got.parameters[name], values, backend)
        assert got.parameters[name].stride(0) == values.stride(0)


# ---- many tasks -------------------------------------------------------------------------------


def equal(a, b, backend):
    """As equal as the backend promises (`assert_promised`), history and status included."""
    assert len(a) == len(b) > 0
    assert a.parameters.keys() == b.parameters.keys()
    whole = torch.nan_to_num  # of a task that diverged
    for name, values in a.parameters.items():
        assert_promised(whole(values), whole(b.parameters[name]), backend, 10**6)
    assert torch.equal(a.status, b.status)
    assert (a.history is None) == (b.history is None)
    if a.history is not None:
        mine, its = a.history.values(), b.history.values()
        assert mine.keys() == its.keys()
        for name, values in mine.items():
            if values.is_floating_point():
                assert torch.equal(values.isnan(), its[name].isnan())
                assert_promised(whole(values), whole(its[name]), backend, 10**6)
            else:  # epochs
                assert torch.equal(values, its[name])


def many(backend, net, **options):
    options = {"validation": 0.2, "batch_size": 4, "optimizer": Adam(0.02), **options}
    return tuner(backend, net, loss="cross_entropy", class_weights="balanced", **options)


@pytest.mark.parametrize("form", ["ragged", "padded", "uniform"])
def test_results_do_not_depend_on_the_chunks(form, backend, monkeypatch):
    sizes = [int(n) for n in torch.randint(0, 9, (19,))] if form != "uniform" else [6] * 19
    net, (xs, ys, ws) = mlp(2, 4, 3), ragged("cross_entropy", sizes)
    options = {"task_ids": range(19), "curves": True}
    if form != "ragged":
        xs, ys, ws = (torch.nn.utils.rnn.pad_sequence(v, batch_first=True) for v in (xs, ys, ws))
        options |= {"sizes": sizes} if form == "padded" else {}
    module = many(backend, net, epochs=2)
    whole = module(xs, ys, weights=ws, **options)
    start = {n: p.clone() for n, p in whole.parameters.items()}
    again = module(xs, ys, weights=ws, start=start, validation_data=None, **options)
    monkeypatch.setattr(finetune, "_CHUNK_WORK", 1.0)  # chunks as small as they get
    assert [b - a for a, b in module._chunks(module._current()[0], 19, 99, False)] == [16, 3]
    equal(module(xs, ys, weights=ws, **options), whole, backend)
    equal(module(xs, ys, weights=ws, start=start, **options), again, backend)
    if backend == "native":
        assert "the last call had 19 tasks" in module.explain()


def test_a_tasks_result_does_not_depend_on_its_neighbours(backend):
    net, (xs, ys, _) = mlp(2, 4, 3), ragged("cross_entropy")
    module = many(backend, net)
    whole = module(xs, ys, curves=True)
    order = [3, 0, 5, 2]
    moved = module([xs[t] for t in order], [ys[t] for t in order], curves=True)
    equal(moved, whole[order], backend)
    alone = module(xs[2:3], ys[2:3], curves=True)
    equal(alone, whole[2:3], backend)


def test_a_task_that_diverges_is_reported_and_harms_no_other(backend):
    net, (xs, ys, _) = mlp(2, 4, 3), ragged(sizes=[5, 6, 7, 6])
    module = tuner(backend, net, batch_size=4)
    clean = module(xs, ys, curves=True)
    xs[1][3, 0], ys[2][1, 1] = math.nan, math.inf
    models = module(xs, ys, curves=True)
    assert models.status.tolist() == [0, 1, 1, 0] and models.status.dtype == torch.int8
    equal(models[[0, 3]], clean[[0, 3]], backend)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_stream_is_one_call(weighted, backend):
    net, (xs, ys, ws) = mlp(2, 4, 3), ragged("cross_entropy", SIZES * 3)
    module = many(backend, net)
    options = {"weights": ws} if weighted else {}
    whole = module(xs, ys, task_ids=range(18), curves=True, **options)
    taken = []

    def tasks():
        for task in zip(xs, ys, ws, strict=True):
            taken.append(task)
            x, y, w = (v.numpy() for v in task)
            yield (x, y, w) if weighted else (x, y)

    parts = []
    for models in module.stream(tasks(), 5, task_ids=iter(range(18)), curves=True):
        parts.append(models)
        assert len(taken) == min(5 * len(parts), 18)  # no more than is at hand
    assert [len(p) for p in parts] == [5, 5, 5, 3]
    equal(pymeta.Adapted.concatenate(parts), whole, backend)
    assert list(module.stream([])) == []


STREAMS = {
    "entries": (TypeError, r"tasks\[1\]: expected \(x, y\) or .*got 1 entries", lambda t: (t[0],)),
    "type": (TypeError, r"tasks\[1\]: expected \(x, y\) or .*got Tensor", lambda t: t[0]),
    "weights": (ValueError, r"tasks\[1\]: expected weights in all", lambda t: (*t, t[0][:, 0])),
    "x": (ValueError, r"xs\[1\]: expected shape", lambda t: (t[0][:, :1], t[1])),
    "y": (ValueError, r"ys: task 1, row 0: label 7", lambda t: (t[0], t[1] * 0 + 7)),
}


@pytest.mark.parametrize("case", STREAMS)
def test_wrong_streams(case, backend):
    error, message, change = STREAMS[case]
    net, (xs, ys, _) = mlp(2, 4, 3), ragged("cross_entropy", [4] * 8)
    module = tuner(backend, net, loss="cross_entropy")
    tasks = list(zip(xs, ys, strict=True))
    tasks[5] = change(tasks[5])
    stream = module.stream(tasks, 4)
    assert len(next(stream)) == 4
    where = r"tasks 4 to 7 of the stream \(numbered from 0 here\)"
    with pytest.raises(error, match=f"{where}: {message}"):
        next(stream)
    with pytest.raises(ValueError, match=r"chunk: expected an integer >= 1, got 0"):
        module.stream(tasks, 0)
    with pytest.raises(ValueError, match=r"task_ids: expected shape \[4\], got \[2\]"):
        next(module.stream(tasks, 4, task_ids=[1, 2]))


def test_no_tasks(backend):
    net = mlp(2, 4, 3)
    models = tuner(backend, net, validation=0.2)(
        torch.zeros(0, 5, 2).double(), torch.zeros(0, 5, 3).double(), curves=True
    )
    assert len(models) == 0 and models.history.train.shape == (0, 4)
    assert models.history.validation.shape == (0, 5)


# ---- the bar, the backends, the module --------------------------------------------------------


class Terminal(io.StringIO):
    """A stderr that calls itself a terminal."""

    def isatty(self):
        return True


def test_a_bar_shows_when_it_should(backend, monkeypatch):
    net, (xs, ys, _) = mlp(2, 4, 3), ragged()
    module = tuner(backend, net)

    def shown(progress, patience, terminal):
        err = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setattr(bars, "_LONG", patience)
        module(xs, ys, progress=progress)
        once = err.getvalue()
        list(module.stream(zip(xs, ys, strict=True), 2, progress=progress))
        assert bool(once) == bool(err.getvalue().removeprefix(once))
        return once

    assert "6/6" in shown(True, 2.0, False)
    assert "6/6" in shown(None, -1.0, True)
    assert shown(None, 2.0, True) == "" == shown(None, -1.0, False) == shown(False, -1.0, True)


def test_the_model_stays_as_it_is(backend):
    net, (xs, ys, _) = mlp(2, 4, 3), ragged()
    before = copy.deepcopy(net.state_dict())
    module = tuner(backend, net)
    models = module(xs, ys)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert not any(p.requires_grad for p in models.parameters.values())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        equal(twin(xs, ys), models, backend)
    with torch.no_grad():
        net[0].weight.zero_()
    assert models[1][0].weight.any()


def test_numpy_in(backend):
    net, (xs, ys, ws) = mlp(2, 4, 3), ragged()
    module = tuner(backend, net)
    wanted = module(xs, ys, weights=ws, validation_data=(xs, ys))
    x, y, w = ([v.numpy() for v in values] for values in (xs, ys, ws))
    equal(module(x, y, weights=w, validation_data=(x, y)), wanted, backend)


def test_a_model_that_is_no_chain_runs_in_torch():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, x):
            return self.last(x + self.first(x).tanh())

    net, (xs, ys, _) = Skip().double(), ragged("cross_entropy")
    module = FineTune(net, loss="cross_entropy", lr=0.1, epochs=3, class_weights="balanced")
    with pytest.warns(UserWarning, match=r"pymeta\.FineTune runs in torch") as caught:
        models = module(xs, ys, curves=True)
    assert caught[0].filename == __file__
    assert models.history.train[0, 0] > models.history.train[0, 2]
    with pytest.warns(UserWarning, match="runs in torch") as caught:
        twin = FineTune(net, loss="cross_entropy", lr=0.1, epochs=3)
        next(twin.stream(zip(xs, ys, strict=True)))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(xs, ys)
    ys[2][1] = 3
    with pytest.raises(ValueError, match=r"ys: task 2, row 1: label 3 is not in 0\.\.2"):
        module(xs, ys)
    with pytest.raises(ValueError, match='backend="native": '):
        FineTune(net, loss="cross_entropy", lr=0.1, epochs=3, backend="native")


def test_under_torch_compile(backend):
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    module = tuner(backend, net, batch_size=2)
    compiled = torch.compile(module, backend="eager")
    equal(compiled(xs, ys, curves=True), module(xs, ys, curves=True), backend)


def test_explain_and_repr():
    net, (xs, ys, _) = mlp(2, 4, 3), ragged()
    module = tuner("native", net, optimizer=Adam(0.1), epochs=7, validation=0.3)
    assert "epochs=7" in repr(module) and "optimizer=Adam" in repr(module)
    module(xs, ys)
    assert "the last call had 6 tasks, 7 epochs" in module.explain()
    assert "bytes of workspace each" in module.explain()


def test_batch_norm(backend):
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    xs, ys, _ = ragged(sizes=[7, 8])
    assert not tuner(backend, net)(xs, ys).status.any()
    with pytest.raises(ValueError, match=r"batch_size: 3 leaves .* 7 rows of task 0"):
        tuner(backend, net, batch_size=3)(xs, ys)
    message = r"validation: of the 7 rows of task 0, 1 would be held out"
    with pytest.raises(ValueError, match=message):
        tuner(backend, net, validation=0.2)(xs, ys)
    assert not tuner(backend, net, validation=0.4)(xs, ys).status.any()
    module = tuner(backend, net)
    module.eval()
    with pytest.raises(ValueError, match=r"model: 1 is in eval mode"):
        module(xs, ys)


# ---- wrong arguments --------------------------------------------------------------------------

CONSTRUCTION = {
    "model": (TypeError, r"model: expected a torch\.nn\.Module, got str", {"model": "net"}),
    "loss": (ValueError, r"loss: expected one of", {"loss": "mae"}),
    "lr": (ValueError, r"lr: expected a finite number >= 0, got -1", {"lr": -1}),
    "neither": (ValueError, r"lr, optimizer: .*neither", {"lr": None}),
    "learnable": (TypeError, r"lr: expected a number, got a Learn", {"lr": pymeta.LearnableLR(1)}),
    "epochs": (ValueError, r"epochs: expected an integer >= 0, got -1", {"epochs": -1}),
    "epochs type": (TypeError, r"epochs: .*got float", {"epochs": 2.0}),
    "batch_size": (ValueError, r"batch_size: expected an integer >= 1, got 0", {"batch_size": 0}),
    "anchor": (ValueError, r"anchor: expected a finite number >= 0, got -1", {"anchor": -1}),
    "anchor type": (TypeError, r"anchor: .*got str", {"anchor": "strong"}),
    "freeze": (TypeError, r"freeze: expected a list of patterns.*got str", {"freeze": "0.*"}),
    "freeze type": (TypeError, r"freeze: .*got int", {"freeze": 3}),
    "freeze nothing": (
        ValueError,
        r"freeze: the pattern '7\.\*' matches no parameter; there are 0\.weight",
        {"freeze": ["0.*", "7.*"]},
    ),
    "class_weights": (ValueError, r'class_weights: expected "balanced"', {"class_weights": "even"}),
    "class_weights type": (TypeError, r"class_weights: .*got int", {"class_weights": 3}),
    "class_weights count": (
        ValueError,
        r"class_weights: expected 3 numbers, got 2",
        {"class_weights": [1, 2]},
    ),
    "class_weights negative": (
        ValueError,
        r"class_weights: expected a finite number >= 0, got -1",
        {"class_weights": [1, 2, -1]},
    ),
    "class_weights loss": (
        ValueError,
        r"class_weights: expected None for the loss mse",
        {"class_weights": "balanced", "loss": "mse"},
    ),
    "class_weights outputs": (
        ValueError,
        r"class_weights: expected None for bce_with_logits with 3 outputs",
        {"class_weights": "balanced", "loss": "bce_with_logits"},
    ),
    "validation": (ValueError, r"validation: expected a fraction .* got 1", {"validation": 1}),
    "validation low": (ValueError, r"validation: .*got -0\.1", {"validation": -0.1}),
    "validation type": (TypeError, r"validation: .*got str", {"validation": "20%"}),
    "rows": (
        ValueError,
        r'validation_rows: expected "random" or "last", got \'first\'',
        {"validation_rows": "first"},
    ),
    "patience": (ValueError, r"patience: expected an integer >= 1, got 0", {"patience": 0}),
    "patience large": (ValueError, r"patience: .*<= 2147483647, got", {"patience": 2**31}),
    "patience type": (TypeError, r"patience: .*got float", {"patience": 1.5}),
    "seed": (ValueError, r"seed: .*got -1", {"seed": -1}),
    "backend": (ValueError, r"backend: expected one of", {"backend": "gpu"}),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case):
    error, message, changed = CONSTRUCTION[case]
    options = {"model": mlp(2, 4, 3), "loss": "cross_entropy", "lr": 0.1, "epochs": 2, **changed}
    with pytest.raises(error, match=message):
        FineTune(options.pop("model"), **options)


def start_of(tasks=3, dtype=torch.float64, name="0.bias"):
    return {"start": {name: torch.zeros(tasks, 4, dtype=dtype)}}


X, Y = torch.ones(3, 5, 2).double(), torch.zeros(3, 5, dtype=torch.int64)
CALLS = {
    "xs": (ValueError, r"xs: expected 2 features", {"xs": X[..., :1]}),
    "xs dtype": (TypeError, r"xs: expected torch\.float64", {"xs": X.float()}),
    "ys": (ValueError, r"ys: expected shape", {"ys": Y[:2]}),
    "ys none": (TypeError, r"ys: expected targets.*got None", {"ys": None}),
    "labels": (ValueError, r"ys: task 0, row 0: label 4 is not in 0\.\.2", {"ys": Y + 4}),
    "sizes": (ValueError, r"sizes: task 1: size 9 is not in 0\.\.5", {"sizes": [5, 9, 2]}),
    "sizes type": (TypeError, r"sizes: expected integers", {"sizes": 5}),
    "weights": (
        ValueError,
        r"weights: task 0, row 0: weight -1\.0 is not",
        {"weights": -torch.ones(3, 5)},
    ),
    "weights shape": (ValueError, r"weights: expected", {"weights": torch.ones(3)}),
    "start type": (TypeError, r"start: expected a pymeta\.Adapted.*got int", {"start": 3}),
    "start name": (
        ValueError,
        r"start: the model has no parameter '9\.bias'",
        start_of(name="9.bias"),
    ),
    "start shape": (ValueError, r"start\['0\.bias'\]: expected shape \[3, 4\]", start_of(tasks=2)),
    "start dtype": (
        TypeError,
        r"start\['0\.bias'\]: expected torch\.float64",
        start_of(dtype=torch.float32),
    ),
    "start value": (TypeError, r"start\['0\.bias'\]: .*got list", {"start": {"0.bias": [1]}}),
    "validation type": (
        TypeError,
        r"validation_data: expected \(x, y\) or .*got Tensor",
        {"validation_data": X},
    ),
    "validation entries": (
        TypeError,
        r"validation_data: .*got 1 entries",
        {"validation_data": (X,)},
    ),
    "validation tasks": (
        ValueError,
        r"validation_data\[0\]: expected 3 tasks as xs has, got 2",
        {"validation_data": (X[:2], Y[:2])},
    ),
    "validation labels": (
        ValueError,
        r"validation_data\[1\]: task 0, row 0: label 9",
        {"validation_data": (X, Y + 9)},
    ),
    "validation weights": (
        ValueError,
        r"validation_data\[2\]: task 0, row 0: weight nan",
        {"validation_data": (X, Y, X[..., 0] * math.nan)},
    ),
    "task_ids": (ValueError, r"task_ids: expected integers >= 0", {"task_ids": [0, -1, 2]}),
    "curves": (TypeError, r"curves: expected a bool, got int", {"curves": 1}),
    "progress": (TypeError, r"progress: expected a bool or None, got str", {"progress": "bar"}),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case, backend):
    error, message, changed = CALLS[case]
    module = tuner(backend, mlp(2, 4, 3), loss="cross_entropy")
    options = {"xs": X, "ys": Y, **changed}
    with pytest.raises(error, match=message):
        module(options.pop("xs"), options.pop("ys"), **options)
    assert len(module(X, Y)) == 3


def test_arguments_that_need_or_exclude_each_other(backend):
    net = mlp(2, 4, 3)
    with pytest.raises(ValueError, match=r"validation_data: expected None where a fraction"):
        tuner(backend, net, loss="cross_entropy", validation=0.2)(X, Y, validation_data=(X, Y))
    with pytest.raises(ValueError, match=r"patience: expected validation > 0 or validation_data"):
        tuner(backend, net, loss="cross_entropy", patience=2)(X, Y)
    one = mlp(2, 4, 1)
    module = tuner(backend, one, loss="bce_with_logits", class_weights="balanced")
    y = torch.zeros(3, 5, dtype=torch.float64)
    y[2, 3] = 0.5
    with pytest.raises(ValueError, match=r"ys: task 2, row 3: expected 0 or 1 with class_weights"):
        module(X, y)
    with pytest.raises(ValueError, match=r"validation_data\[1\]: task 2, row 3: expected 0 or 1"):
        module(X, y.round(), validation_data=(X, y))
