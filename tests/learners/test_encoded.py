"""EncodedMAML: a plain loop of autograd, MAML of the whole chain, frozen and kept features."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from helpers import assert_close
from torch import nn

import pymeta
from pymeta.data import Ragged
from pymeta.learners import EncodedMAML
from pymeta.learners.features import blocks

F64 = torch.float64
SIZES, ASKED = [4, 2, 5], [3, 1, 2]


class Words(nn.Module):
    """Texts of three words [N, 3] to features [N, 4]; counts the rows it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.rows = 0

    def forward(self, x):
        self.rows += len(x)
        h = self.table(x).mean(1)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return h


def make(**options) -> EncodedMAML:
    torch.manual_seed(0)
    options = {"loss": "cross_entropy", "lr": 0.4, "steps": 3, **options}
    head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return EncodedMAML(Words(), head, **options).double()


def lists(sizes, seed=1):
    torch.manual_seed(seed)
    return ([torch.randint(0, 20, (n, 3)) for n in sizes],
            [torch.randint(0, 3, (n,)) for n in sizes])  # fmt: skip


def by_hand(learner, x, y, xq, yq, w):
    """The query loss and logits of one task, by a loop of autograd."""
    call, own = torch.func.functional_call, dict(learner.head.named_parameters())
    fs, fq = learner.encoder(x), learner.encoder(xq)
    for _ in range(learner.maml.steps):
        each = nn.functional.cross_entropy(call(learner.head, own, (fs,)), y, reduction="none")
        loss = (w * each).sum() / w.sum()
        slopes = torch.autograd.grad(loss, list(own.values()), create_graph=True)
        own = {n: p - 0.4 * g for (n, p), g in zip(own.items(), slopes, strict=True)}
    logits = call(learner.head, own, (fq,))
    return nn.functional.cross_entropy(logits, yq), logits


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_it_is_a_loop_of_autograd(backend):
    learner = make(backend=backend)
    xs, ys = lists(SIZES)
    xq, yq = lists(ASKED, seed=2)
    ws = [torch.rand(n, dtype=F64) + 0.1 for n in SIZES]
    out = learner(xs, ys, xq, yq, support_weights=ws)
    each = [by_hand(learner, *one) for one in zip(xs, ys, xq, yq, ws, strict=True)]
    for t, (loss, logits) in enumerate(each):
        assert torch.allclose(out.task_losses[t], loss, rtol=0, atol=1e-10)
        assert torch.allclose(out.predictions[t], logits, rtol=0, atol=1e-10)
    parameters = list(learner.parameters())
    got = torch.autograd.grad(out.loss, parameters)
    wanted = torch.autograd.grad(torch.stack([loss for loss, _ in each]).mean(), parameters)
    for g, w in zip(got, wanted, strict=True):
        assert w.abs().max() > 0 and torch.allclose(g, w, rtol=0, atol=1e-10)


def test_it_is_maml_of_the_chain_with_the_head_adapted():
    torch.manual_seed(0)
    encoder, head = nn.Sequential(nn.Linear(2, 6), nn.Tanh()), nn.Linear(6, 2)
    learner = EncodedMAML(encoder, head, loss="mse", lr=0.2, steps=3).double()
    maml = pymeta.MAML(nn.Sequential(encoder, head), loss="mse", lr=0.2, steps=3, adapt=["1.*"])
    data = [torch.randn(4, 5, 2, dtype=F64) for _ in range(4)]
    ours, theirs = learner(*data), maml(*data)
    assert_close(ours.predictions, theirs.predictions)
    parameters = list(maml.parameters())
    assert_close(
        torch.autograd.grad(ours.loss, parameters), torch.autograd.grad(theirs.loss, parameters)
    )
    assert "native" in learner.explain() and "the encoder, trained" in learner.explain()


def padded(values, rows, fill):
    out = values[0].new_full((len(values), rows, *values[0].shape[1:]), fill)
    for t, v in enumerate(values):
        out[t, : len(v)] = v
    return out


def test_ragged_is_padded_is_one_by_one():
    learner = make()
    xs, ys = lists(SIZES)
    xq, yq = lists(ASKED, seed=2)
    wanted = learner(xs, ys, xq, yq)
    form = learner(
        padded(xs, 5, 7), padded(ys, 5, 1), padded(xq, 3, 7), padded(yq, 3, 1),
        support_sizes=SIZES, query_sizes=ASKED,
    )  # fmt: skip
    assert_close(form.task_losses, wanted.task_losses)
    packed = learner(
        Ragged(torch.cat(xs), SIZES), Ragged(torch.cat(ys), SIZES), Ragged(torch.cat(xq), ASKED)
    )
    models = learner.adapt(xs, ys)
    in_form = learner.adapt(padded(xs, 5, 7), padded(ys, 5, 1), support_sizes=SIZES)
    for t, n in enumerate(ASKED):
        own = (v[t][None] for v in (xs, ys, xq, yq))
        one = learner(*own)
        assert_close(one.loss, wanted.task_losses[t])
        for got in (one.predictions[0], form.predictions[t, :n], packed.predictions[t],
                    models(xq)[t], models[t](xq[t]), models[t : t + 1](xq[t][None])[0],
                    in_form(padded(xq, 3, 7), ASKED)[t, :n]):  # fmt: skip
            assert_close(got, wanted.predictions[t])
        assert_close(models.predict_proba(xq)[t], wanted.predictions[t].softmax(-1))
    assert len(models) == 3 and models.status.tolist() == [0, 0, 0]
    assert models.parameters["0.weight"].shape == (3, 5, 4)


class Plain(nn.Module):
    """Rows of numbers [N, 2] to features [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        return torch.tanh(self.layer(x))


def test_weight_zero_is_absence_for_the_encoder_too():
    torch.manual_seed(0)
    learner = EncodedMAML(Plain(), nn.Linear(3, 1), loss="mse", lr=0.1, steps=2).double()
    x, y, xq, yq = (torch.randn(2, 4, n, dtype=F64) for n in (2, 1, 2, 1))
    plain = learner(x, y, xq, yq)
    plain.loss.backward()
    slopes = [p.grad.clone() for p in learner.parameters()]
    learner.zero_grad()
    nan = torch.full((2, 1, 2), math.nan, dtype=F64)
    more, asked = torch.cat([x[:, :2], nan, x[:, 2:]], 1), torch.cat([nan, xq], 1)
    w, wq = torch.tensor([[1.0, 1, 0, 1, 1]] * 2), torch.tensor([[0.0, 1, 1, 1, 1]] * 2)
    ys, yqs = torch.cat([y[:, :2], y[:, :1], y[:, 2:]], 1), torch.cat([y[:, :1], yq], 1)
    out = learner(more, ys, asked, yqs, support_weights=w, query_weights=wq)
    out.loss.backward()
    assert_close(out.task_losses, plain.task_losses)
    assert_close([p.grad for p in learner.parameters()], slopes)
    assert out.predictions[:, 0].isnan().all()
    assert_close(out.predictions[:, 1:], plain.predictions)
    graph = w.to(F64).requires_grad_()
    finite = torch.where(more.isnan(), 0.5, more)
    out = learner(finite, ys, xq, yq, support_weights=graph)
    (slope,) = torch.autograd.grad(out.loss, graph)
    assert (slope[:, 2] != 0).all()  # where weights are differentiated, that at 0 is too


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        (True, ["table", "layers.0", "layers.1", "layers.2"]),
        (False, []),
        (1, ["layers.2"]),
        (2, ["layers.1", "layers.2"]),
        (["table.*", "layers.1.bias"], ["table", "layers.1"]),
    ],
)
def test_what_is_trained_of_the_encoder(train, trained):
    learner = make(train=train)
    assert blocks(learner.encoder) == ["layers.0", "layers.1", "layers.2"]
    learner(*lists(SIZES), *lists(ASKED, 2)).loss.backward()
    found = {n.rpartition(".")[0] for n, p in learner.encoder.named_parameters()
             if p.grad is not None and p.grad.any()}  # fmt: skip
    assert sorted(found) == sorted(trained)
    assert learner.is_frozen == (train is False)
    learner.train()
    assert learner.encoder.training == bool(trained)
    if isinstance(train, list):
        assert learner.encoder.layers[1].weight.grad is None


def test_flags_that_are_set_already_stay():
    """As `peft` leaves them: what requires grad is trained, whatever it is called."""
    encoder = Words()
    encoder.requires_grad_(False)
    encoder.layers[0].bias.requires_grad_(True)
    learner = EncodedMAML(encoder, nn.Linear(4, 3), loss="cross_entropy", lr=0.1, steps=1,
                          train=None)  # fmt: skip
    assert [n for n, p in learner.encoder.named_parameters() if p.requires_grad] == [
        "layers.0.bias"
    ]


def test_kept_features_are_computed_once():
    kept, plain = make(train=False, keep=True), make(train=False)
    data = (*lists(SIZES), *lists(ASKED, 2))
    unique = len({tuple(row.tolist()) for row in torch.cat([*data[0], *data[2]])})
    for _ in range(3):
        ours, theirs = kept(*data), plain(*data)
        assert_close(ours.task_losses, theirs.task_losses)
    assert kept.encoder.rows == unique == len(kept.features)
    assert plain.encoder.rows == 3 * (sum(SIZES) + sum(ASKED))
    more = (*lists([2, 2, 2], 5), *lists([1, 1, 1], 6))
    assert_close(kept(*more).task_losses, plain(*more).task_losses)
    assert f"{len(kept.features)} rows are kept" in kept.explain()
    for copied in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert len(copied.features) == 0
        assert_close(copied(*data).task_losses, ours.task_losses)
    with torch.no_grad():  # another encoder's features are others
        for learner in (kept, plain):
            learner.encoder.layers[0].weight.add_(0.3)
    assert (kept(*data).task_losses - ours.task_losses).abs().min() > 0
    assert_close(kept(*data).task_losses, plain(*data).task_losses)
    assert kept.state_dict().keys() == plain.state_dict().keys()


def test_batches_of_the_encoder():
    whole, parts = make(), make(rows_at_once=4)
    data = (*lists(SIZES), *lists(ASKED, 2))
    ours, theirs = parts(*data).loss, whole(*data).loss
    assert_close(ours, theirs)
    assert_close(
        torch.autograd.grad(ours, list(parts.parameters())),
        torch.autograd.grad(theirs, list(whole.parameters())),
    )
    widest = []
    parts.encoder.register_forward_hook(lambda module, x, y: widest.append(len(y)))
    parts(*data)
    assert max(widest) == 4 and sum(widest) == sum(SIZES) + sum(ASKED)


def test_images_to_a_convolutional_encoder_and_predictions_alone():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten())
    learner = EncodedMAML(encoder, nn.Linear(12, 2), loss="cross_entropy", lr=0.1, steps=2)
    x, y = torch.randn(3, 4, 1, 4, 4), torch.randint(0, 2, (3, 4))
    out = learner(x, y, x)
    assert out.loss is None and out.predictions.shape == (3, 4, 2)
    out.predictions.square().sum().backward()
    assert encoder[0].weight.grad.any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train": 4}, ValueError, "train: expected 1 to 3 layers, got 4"),
        ({"train": "table"}, TypeError, "train: expected a bool, a number of layers or a list"),
        ({"train": ["x*"]}, ValueError, r"the pattern 'x\*' matches no parameter of the encoder"),
        ({"keep": True}, ValueError, "keep: expected train=False"),
        ({"rows_at_once": 0}, ValueError, "rows_at_once: expected a whole number >= 1 or None"),
    ],
)
def test_arguments_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_calls_that_are_refused():
    with pytest.raises(TypeError, match=r"encoder: expected a torch\.nn\.Module, got str"):
        EncodedMAML("x", nn.Linear(2, 2), loss="mse", lr=0.1, steps=1)
    with pytest.raises(ValueError, match="there is no nn"):
        EncodedMAML(Plain(), nn.Linear(3, 2), loss="mse", lr=0.1, steps=1, train=1)
    learner = make()
    xs, ys = lists(SIZES)
    with pytest.raises(ValueError, match="xq: expected 3 tasks as xs has, got 2"):
        learner(xs, ys, xs[:2], ys[:2])
    with pytest.raises(TypeError, match=r"xq: expected torch\.int64 as xs has, got torch\.int32"):
        learner(xs, ys, [x.int() for x in xs], ys)
    with pytest.raises(ValueError, match="label 7"):
        learner(xs, [y + 7 for y in ys], xs, ys)
    flat = EncodedMAML(nn.Identity(), nn.Linear(3, 2), loss="mse", lr=0.1, steps=1)
    with pytest.raises(ValueError, match=r"encoder: expected features of shape \[8, d\], got"):
        flat(torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 2), torch.zeros(2, 2, 3, 3))
