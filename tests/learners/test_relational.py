"""RelationalMAML: its equations task by task, MAML with one prototype, slopes, what it is told."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close, batch, mlp
from torch import nn

import pymeta
from pymeta.learners import RelationalMAML

F64 = torch.float64


def make(loss="mse", per="unit", prototypes=3, **options) -> RelationalMAML:
    """A learner whose tasks have different starts."""
    torch.manual_seed(0)
    options = {"lr": 0.1, "steps": 2, "features": 2, "targets": 2, **options}
    learner = RelationalMAML(
        mlp(2, 4, 2), loss=loss, prototypes=prototypes, width=5, per=per, **options
    )
    with torch.no_grad():
        for p in learner.modulation[-1].parameters():
            p.uniform_(-0.5, 0.5)
    return learner.double()


def relations_by_hand(learner, x, y, w):
    """Of one task: x [rows, 2], targets as columns [rows, 2], weights [rows]."""
    total = sum(w[r] * learner.row(torch.cat([x[r], y[r]])) for r in range(len(x)))
    e = learner.after(total / w.sum())
    width = learner.width
    scores = [-((e - v) @ (e - v)) / (width * learner.log_temperature.exp())
              for v in learner.prototypes]  # fmt: skip
    exp = torch.stack(scores).exp()
    return exp / exp.sum()


def start_by_hand(learner, r):
    """Of one task with relations r."""
    v, edge = learner.prototypes, learner.edge
    seen = []
    for p in range(len(v)):
        a = torch.stack([torch.sigmoid(edge.weight[0] @ (v[p] - q).abs() + edge.bias[0])
                         for q in v])  # fmt: skip
        mixed = sum(a[q] / a.sum() * v[q] for q in range(len(v)))
        seen.append(v[p] + torch.tanh(learner.exchange.weight @ mixed))
    change = learner.modulation(sum(r[p] * seen[p] for p in range(len(v))))
    start, at = {}, 0
    for name, p in learner.model.named_parameters():
        if learner.per == "unit" and p.ndim == 2:
            gates, shifts = change[at : at + len(p)][:, None], 0.0
            at += len(p)
        else:
            gates = change[at : at + p.numel()].view(p.shape)
            shifts = change[at + p.numel() : at + 2 * p.numel()].view(p.shape)
            at += 2 * p.numel()
        start[name] = p * (1 + gates.tanh()) + shifts
    assert at == len(change)
    return start


def by_hand(learner, x, y, xq, yq, w, loss_fn, columns):
    """Query loss, predictions and relations of one task."""
    r = relations_by_hand(learner, x, columns, w)
    own = start_by_hand(learner, r)
    call = torch.func.functional_call
    for _ in range(learner.maml.steps):
        each = loss_fn(call(learner.model, own, (x,)), y, reduction="none")
        each = each if each.ndim == 1 else each.mean(1)
        loss = (w * each).sum() / w.sum()
        slopes = torch.autograd.grad(loss, list(own.values()), create_graph=True)
        own = {n: p - 0.1 * g for (n, p), g in zip(own.items(), slopes, strict=True)}
    predictions = call(learner.model, own, (xq,))
    return loss_fn(predictions, yq), predictions, r


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("per", ["unit", "element"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_it_is_its_equations(loss, per, backend):
    learner = make(loss, per, backend=backend)
    torch.manual_seed(1)
    data = batch(loss)
    weights = torch.rand(3, 5, dtype=F64) + 0.2
    out = learner(*data, support_weights=weights)
    loss_fn = nn.functional.mse_loss if loss == "mse" else nn.functional.cross_entropy
    each = []
    for t in range(3):
        own = [v[t] for v in data]
        columns = own[1] if loss == "mse" else nn.functional.one_hot(own[1], 2).to(F64)
        each.append(by_hand(learner, *own, weights[t], loss_fn, columns))
        for got, wanted in zip(
            (out.task_losses[t], out.predictions[t], out.relations[t]), each[-1], strict=True
        ):
            assert torch.allclose(got, wanted, rtol=0, atol=1e-10)
    parameters = list(learner.parameters())
    got = torch.autograd.grad(out.loss, parameters)
    wanted = torch.autograd.grad(torch.stack([v for v, *_ in each]).mean(), parameters)
    for g, w in zip(got, wanted, strict=True):
        assert w.abs().max() > 0 and torch.allclose(g, w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("per", ["unit", "element"])
def test_one_prototype_is_maml(per):
    """From the one start that all tasks then have; at first that is the model's own."""
    torch.manual_seed(1)
    data = batch(tasks=4)
    learner = make(per=per, prototypes=1)
    out = learner(*data)
    assert torch.equal(out.relations, torch.ones(4, 1, dtype=F64))
    start = learner.start(torch.ones(1, 1, dtype=F64))
    model = mlp(2, 4, 2)
    model.load_state_dict({name: value[0].detach() for name, value in start.items()})
    assert_close(out.task_losses, pymeta.MAML(model, loss="mse", lr=0.1, steps=2)(*data)[1])

    new = RelationalMAML(
        mlp(2, 4, 2), loss="mse", lr=0.1, steps=2, features=2, targets=2, prototypes=1, per=per
    ).double()
    maml = pymeta.MAML(new.model, loss="mse", lr=0.1, steps=2)
    ours, theirs = new(*data).loss, maml(*data).loss
    assert_close(ours, theirs)
    parameters = list(new.model.parameters())
    assert_close(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters))


def test_it_begins_as_maml_with_many_prototypes_too():
    torch.manual_seed(1)
    data = batch(tasks=4)
    new = RelationalMAML(
        mlp(2, 4, 2), loss="mse", lr=0.1, steps=2, features=2, targets=2, prototypes=6
    ).double()
    maml = pymeta.MAML(new.model, loss="mse", lr=0.1, steps=2)
    assert_close(new(*data).task_losses, maml(*data).task_losses)


@pytest.mark.parametrize("per", ["unit", "element"])
def test_gradients_by_finite_differences(per):
    learner = make(per=per, lr=pymeta.LearnableLR(0.1, "layer"))
    torch.manual_seed(1)
    xs, ys, xq, yq = batch()
    inputs = {"xs": xs.requires_grad_(), "ys": ys.requires_grad_()}
    learner(xs, ys, xq, yq).loss.backward()
    torch.manual_seed(2)
    for name, p in [*learner.named_parameters(), *inputs.items()]:
        direction = torch.randn_like(p)
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-5 * direction
                found.append(learner(xs, ys, xq, yq).loss.item())
                p -= sign * 1e-5 * direction
        slope = (p.grad * direction).sum().item()
        difference = (found[0] - found[1]) / 2e-5
        # the differences' own error: 1e-10 of third derivatives, and 1e-16 / 1e-5 of rounding
        assert abs(slope - difference) < 1e-7 + 1e-6 * abs(slope), (name, slope, difference)


def test_the_order_of_rows_does_not_matter_and_a_task_without_rows_has_relations():
    learner = make()
    torch.manual_seed(1)
    xs, ys, *_ = batch()
    turned = learner.relations(xs.flip(1), ys.flip(1))
    assert_close(turned, learner.relations(xs, ys))
    none = learner.relations([xs[0], xs[0][:0]], [ys[0], ys[0][:0]])
    assert_close(none.sum(-1), torch.ones(2, dtype=F64))


def test_relations_that_tell_kinds_of_tasks_apart_pay():
    """Lines that rise and lines that fall: one start cannot be near both.

    The embedding is first taught which is which: whether the query loss alone finds that out
    hangs on where it begins.
    """
    torch.manual_seed(0)
    nets = [mlp(1, 8, 1) for _ in range(2)]
    learner = RelationalMAML(
        nets[0], loss="mse", lr=0.01, steps=1, features=1, targets=1, prototypes=2, width=8
    ).double()
    maml = pymeta.MAML(nets[1], loss="mse", lr=0.01, steps=1)

    def tasks():
        signs = torch.tensor([1.0, -1.0], dtype=F64).repeat(6).view(12, 1, 1)
        x = torch.rand(12, 12, 1, dtype=F64) * 2 - 1
        y = 2 * signs * x
        return (x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]), signs.flatten()

    def unlikely():
        (xs, ys, *_), signs = tasks()
        relations = learner.relations(xs, ys)
        return -torch.where(signs > 0, relations[:, 0], relations[:, 1]).log().mean()

    def train(parameters, loss, steps):
        adam = torch.optim.Adam(parameters, 0.01)
        for _ in range(steps):
            adam.zero_grad()
            loss().backward()
            adam.step()

    train(learner.parameters(), unlikely, 100)
    train(learner.parameters(), lambda: learner(*tasks()[0]).loss, 160)
    train(maml.parameters(), lambda: maml(*tasks()[0]).loss, 160)
    data, signs = tasks()
    out = learner(*data)
    assert out.task_losses.median() < 0.3 * maml(*data).task_losses.median()
    rising, falling = out.relations[signs > 0].mean(0), out.relations[signs < 0].mean(0)
    assert (rising - falling).abs().max() > 0.5
    assert_close(learner.graph().sum(-1), torch.ones(2, dtype=F64))


def test_an_encoder_for_the_embedding():
    torch.manual_seed(0)
    learner = RelationalMAML(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), loss="mse", lr=0.1, steps=1, features=3,
        targets=2, encoder=nn.Sequential(nn.Flatten(), nn.Linear(4, 3)),
    ).double()  # fmt: skip
    xs, ys = torch.randn(2, 3, 2, 2, dtype=F64), torch.randn(2, 3, 2, dtype=F64)
    out = learner(xs, ys, xs, ys)
    out.loss.backward()
    assert out.relations.shape == (2, 8)
    wrong = RelationalMAML(learner.model, loss="mse", lr=0.1, steps=1, features=3, targets=2)
    with pytest.raises(ValueError, match="xs: expected rows of 3 features, got"):
        wrong(xs, ys, xs, ys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prototypes": 0}, "prototypes: expected a whole number >= 1, got 0"),
        ({"features": 0}, "features: expected a whole number >= 1, got 0"),
        ({"targets": 1.5}, r"targets: expected a whole number >= 1, got 1\.5"),
        ({"per": "layer"}, "per: expected 'unit' or 'element', got 'layer'"),
    ],
)
def test_arguments_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_calls_that_are_refused():
    learner = make()
    xs, ys, xq, yq = batch()
    with pytest.raises(ValueError, match="support_weights: expected a weight for each row"):
        learner(xs, ys, xq, yq, support_weights=torch.ones_like(ys))
    with pytest.raises(TypeError, match=r"encoder: expected a torch\.nn\.Module or None"):
        make(encoder="x")
    bad = math.nan
    assert not learner.relations(xs * bad, ys).isfinite().any()  # and no error: NaN as torch has it
