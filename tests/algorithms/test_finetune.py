"""pymeta.FineTune on both backends, against loops over torch.optim for each task."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from finetune_help import SIZES, ragged, tuner
from helpers import assert_close, assert_promised, batch, mlp, torch_loss
from torch import nn

from pymeta import SGD, Adam
from pymeta.algorithms.held_out import held_out_counts
from pymeta.spec.schedule import SPLIT, permutation


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


# ---- starts -------------------------------------------------------------------------------------


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
