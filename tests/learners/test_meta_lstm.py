"""MetaLSTM: the paper's equations task by task, gradient descent by hand-set gates, its slopes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import assert_close, batch, mlp
from kernels import same_bits
from torch import nn

import pymeta
from pymeta.learners import MetaLSTM
from pymeta.nn import PerStepBatchNorm
from pymeta.reference import cell
from pymeta.reference.cell import log_and_sign

F64 = torch.float64


def make(loss="mse", steps=3, **options) -> MetaLSTM:
    """A learner whose cell is not the first one."""
    torch.manual_seed(0)
    learner = MetaLSTM(mlp(2, 4, 2), loss=loss, steps=steps, hidden=3, lr=0.1, **options)
    with torch.no_grad():
        for name, p in learner.named_parameters():
            if "bias" not in name and not name.startswith("maml"):
                p.uniform_(-0.5, 0.5)
    return learner.double()


def cell_by_hand(learner, theta, g, loss, memory):
    """One coordinate after another is the same as all of them, so each line is the equation's."""

    def seen(x):
        small = abs(x) < math.exp(-learner.p)
        return [-1.0, math.exp(learner.p) * x] if small else [
            math.log(abs(x)) / learner.p, math.copysign(1.0, x)]  # fmt: skip

    h, s, f, i = memory
    lstm = learner.lstm
    inputs = torch.tensor([seen(float(v)) + seen(float(loss)) for v in g], dtype=F64)
    gates = inputs @ lstm.weight_ih.T + lstm.bias_ih + h @ lstm.weight_hh.T + lstm.bias_hh
    enter, forget, new, out = gates.chunk(4, dim=1)
    s = forget.sigmoid() * s + enter.sigmoid() * new.tanh()
    h = out.sigmoid() * s.tanh()

    def gate(linear, before):
        w = linear.weight[0]
        return (h @ w[:-2] + w[-2] * theta + w[-1] * before + linear.bias).sigmoid()

    f, i = gate(learner.forget_gate, f), gate(learner.input_gate, i)
    return f * theta - i * g, (h, s, f, i)


def by_hand(learner, x, y, xq, yq, loss_fn):
    """The query loss and predictions of one task."""
    names = [n for n, _ in learner.model.named_parameters()]
    shapes = [p.shape for p in learner.model.parameters()]
    theta = torch.cat([p.reshape(-1) for p in learner.model.parameters()])
    n = len(theta)
    memory = tuple(torch.zeros(n, 3, dtype=F64) for _ in range(2)) + tuple(
        torch.zeros(n, dtype=F64) for _ in range(2)
    )

    def outputs(flat, rows):
        parts = flat.split([s.numel() for s in shapes])
        own = {k: v.view(s) for k, v, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(learner.model, own, (rows,))

    for _ in range(learner.steps):
        at = theta.detach().requires_grad_()
        loss = loss_fn(outputs(at, x), y)
        (g,) = torch.autograd.grad(loss, at)
        theta, memory = cell_by_hand(learner, theta, g, loss.detach(), memory)
    predictions = outputs(theta, xq)
    return loss_fn(predictions, yq), predictions


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_it_is_its_equations(loss, backend):
    learner = make(loss, backend=backend)
    torch.manual_seed(1)
    data = batch(loss)
    loss_fn = nn.functional.mse_loss if loss == "mse" else nn.functional.cross_entropy
    out = learner(*data)
    each = [by_hand(learner, *(v[t] for v in data), loss_fn) for t in range(3)]
    for t, (wanted, predictions) in enumerate(each):
        assert torch.allclose(out.task_losses[t], wanted, rtol=0, atol=1e-10)
        assert torch.allclose(out.predictions[t], predictions, rtol=0, atol=1e-10)
    parameters = list(learner.parameters())
    got = torch.autograd.grad(out.loss, parameters)
    wanted = torch.autograd.grad(torch.stack([v for v, _ in each]).mean(), parameters)
    for g, w in zip(got, wanted, strict=True):
        assert w.abs().max() > 0 and torch.allclose(g, w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
def test_hand_set_gates_are_gradient_descent(loss):
    learner = make(loss, steps=4)
    with torch.no_grad():
        for gate, logit in ((learner.forget_gate, 60.0), (learner.input_gate, math.log(0.25))):
            gate.weight.zero_()
            gate.bias.fill_(logit)  # sigmoids 1, up to 1e-26, and 0.2
    torch.manual_seed(1)
    data = batch(loss, tasks=5)
    sgd = pymeta.MAML(learner.model, loss=loss, lr=0.2, steps=4)
    assert_close(learner(*data).task_losses, sgd(*data).task_losses)
    got, wanted = learner.adapt(*data[:2]), sgd.adapt(*data[:2])
    for name, value in wanted.parameters.items():
        assert_close(got.parameters[name], value)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_as_mamls(backend, momentum):
    """By the support sets at the parameters before each step, once in a differentiated call."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Tanh(),
                        nn.Linear(4, 2)).double()  # fmt: skip
    learner = MetaLSTM(net, loss="mse", steps=3, backend=backend)
    with torch.no_grad():
        for gate, logit in ((learner.forget_gate, 60.0), (learner.input_gate, math.log(0.25))):
            gate.weight.zero_()
            gate.bias.fill_(logit)
    twin = copy.deepcopy(net)
    maml = pymeta.MAML(twin, loss="mse", lr=0.2, steps=3, backend=backend)
    data, sizes = batch(tasks=5), [5, 3, 4, 5, 2]
    assert data[0].shape[1] == 5
    for _ in range(2):
        learner(*data, support_sizes=sizes)
        maml(*data, support_sizes=sizes)
    with torch.no_grad():
        learner(*data)
        learner.adapt(*data[:2])
    assert int(net[1].num_batches_tracked) == 2
    for name in ("running_mean", "running_var"):
        got, wanted = getattr(net[1], name), getattr(twin[1], name)
        assert_close(got, wanted)
        assert (got - getattr(nn.BatchNorm1d(4), name)).abs().max() > 0.01
    learner.eval(), maml.eval()
    assert_close(learner(*data).task_losses, maml(*data).task_losses)


def test_slopes_of_the_cell_by_finite_differences():
    """After one step, whose gradient no gate can change, they are those of the loss."""
    learner = make(steps=1)
    torch.manual_seed(1)
    data = batch()
    learner(*data).loss.backward()
    torch.manual_seed(2)
    for name, p in learner.named_parameters():
        if name.startswith("maml") or name == "lstm.weight_hh" or name == "forget_gate.bias":
            continue
        direction = torch.randn_like(p)
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-5 * direction
                found.append(learner(*data).loss.item())
                p -= sign * 1e-5 * direction
        slope = (p.grad * direction).sum().item()
        difference = (found[0] - found[1]) / 2e-5
        # the differences' own error: 1e-10 of third derivatives, and 1e-16 / 1e-5 of rounding
        assert abs(slope - difference) < 1e-8 + 1e-6 * abs(slope), (name, slope, difference)
        assert slope != 0


def test_what_the_cell_sees():
    x = torch.tensor([0.0, 1.0, -1.0, math.e, -math.exp(-2), 1e-3], dtype=F64)
    wanted = [[-1, 0], [0, 1], [0, -1], [0.5, 1], [-1, -1], [-1, 1e-3 * math.exp(2)]]
    got = torch.stack(log_and_sign(x, 2.0), dim=1)
    assert torch.allclose(got, torch.tensor(wanted, dtype=F64), rtol=0, atol=1e-14)


def test_it_begins_as_gradient_descent_nearly():
    """Small weights, a forget gate that keeps, an input gate at lr."""
    torch.manual_seed(0)
    learner = MetaLSTM(mlp(2, 4, 2), loss="mse", steps=1, lr=0.05, keep=0.999)
    data = batch()
    got = learner.adapt(*data[:2])
    sgd = pymeta.MAML(learner.model, loss="mse", lr=0.05, steps=1).adapt(*data[:2])
    for name, start in learner.model.named_parameters():
        step = (sgd.parameters[name] - start).abs()
        # weights of 0.01 on what is below 1 move the gates' logits by less than 0.1
        bound = 0.1 * step + 1.2e-3 * start.abs()
        assert ((got.parameters[name] - sgd.parameters[name]).abs() <= bound + 1e-12).all()


def test_training_makes_a_better_optimizer_of_it():
    torch.manual_seed(0)
    learner = MetaLSTM(mlp(1, 8, 1), loss="mse", steps=3, lr=0.1, hidden=8).double()
    adam = torch.optim.Adam(learner.parameters(), 0.02)
    losses = []
    for _ in range(60):
        slope = torch.randn(8, 1, 1, dtype=F64)
        x = torch.rand(8, 12, 1, dtype=F64) * 2 - 1
        y = slope * x
        adam.zero_grad()
        loss = learner(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]).loss
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_many_coordinates_go_in_parts(monkeypatch):
    """What is computed anew for the meta-gradient is what was there."""
    learner, data = make(backend="torch"), batch(tasks=4)
    out = learner(*data)
    wanted = torch.autograd.grad(out.loss, list(learner.parameters()))
    monkeypatch.setattr(cell, "_AT_ONCE", 10)  # of 4 x 22
    parts = learner(*data)
    assert_close(parts.predictions, out.predictions)
    assert_close(torch.autograd.grad(parts.loss, list(learner.parameters())), wanted)
    assert_close(learner.adapt(*data[:2])(data[2]), out.predictions)


def test_it_says_where_its_cell_runs():
    assert "native: the cell" in make(backend="native").explain()
    assert "torch: the cell" in make(backend="torch").explain()


def test_only_what_is_adapted_takes_steps():
    learner = make(adapt=["2.*"])
    data = batch()
    models = learner.adapt(*data[:2])
    start = dict(learner.model.named_parameters())
    for name, value in models.parameters.items():
        same = torch.equal(value, start[name].expand_as(value))
        assert same == name.startswith("0")
    learner(*data).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in learner.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"hidden": 0}, "hidden: expected at least 1, got 0"),
        ({"lr": 1.0}, "lr: expected a number between 0 and 1, got 1.0"),
        ({"keep": 0}, "keep: expected a number between 0 and 1, got 0"),
        ({"p": 0}, "p: expected a number between 0 and 80, got 0"),
        ({"adapt": ["9.*"]}, "matches no parameter"),
    ],
)
def test_arguments_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MetaLSTM(mlp(2, 2), loss="mse", **options)
    with pytest.raises(ValueError, match="model: a PerStepBatchNorm counts the steps of gradient"):
        MetaLSTM(nn.Sequential(nn.Linear(2, 2), PerStepBatchNorm(2, steps=3)), loss="mse")
    with pytest.raises(ValueError, match="yq: expected"):
        make()(*batch()[:3], batch()[3][:, :2])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("form", ["uniform", "ragged", "padded"])
def test_a_tasks_bits_are_its_own(form, loss, dtype):
    """Alone, in a batch of any size, beside any others; seven are no power of two."""
    learner = make(loss, backend="native").to(dtype)
    random = torch.Generator().manual_seed(3)
    sizes = [5] * 7 if form == "uniform" else [5, 3, 6, 4, 2, 6, 5]
    x = [torch.randn(n, 2, generator=random, dtype=dtype) for n in sizes]
    w = [torch.rand(n, generator=random, dtype=dtype) + 0.1 for n in sizes]
    y = [torch.randn(n, 2, generator=random, dtype=dtype) for n in sizes]
    if loss == "cross_entropy":
        y = [(v[:, 0] > 0).long() for v in y]

    def results(chosen):
        """Losses, predictions and parameters of each of these tasks."""
        xs, ys, ws = ([v[t] for t in chosen] for v in (x, y, w))
        given = {"support_weights": ws}
        if form != "ragged":
            most = max(sizes) + (form == "padded")
            xs, ys, ws = (
                torch.stack([nn.functional.pad(v, (0, 0) * (v.ndim - 1) + (0, most - len(v)))
                             for v in vs]) for vs in (xs, ys, ws)
            )  # fmt: skip
            given = {"support_weights": ws, "support_sizes": [sizes[t] for t in chosen]}
        queried = {"query_sizes": given["support_sizes"]} if form != "ragged" else {}
        out = learner(xs, ys, xs, ys, **given, **queried)
        adapted = learner.adapt(xs, ys, **given).parameters
        return {
            t: [out.task_losses[k], out.predictions[k][: sizes[t]],
                *(adapted[name][k] for name in sorted(adapted))]
            for k, t in enumerate(chosen)
        }  # fmt: skip

    wanted = results(range(7))
    for chosen in ([3], [0], [6, 2, 1], [4, 3, 2, 1, 0]):
        for t, found in results(chosen).items():
            assert same_bits(found, wanted[t]), (t, chosen)
