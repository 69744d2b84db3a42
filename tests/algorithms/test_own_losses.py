"""Another loss for query sets, and losses that are functions of the caller's."""

import copy

import pytest
import torch
from cases import SMOOTH, Case, Problem, Wanted
from helpers import assert_close, batch, gradients, loop_meta_loss, mlp, targets
from kernels import CPU_PATHS, PATHS, same_bits, using
from torch import nn

from pymeta import MAML, FineTune, QuantileLoss, Reptile
from pymeta.spec.losses import OwnLoss

F = nn.functional
BACKENDS = ("native", "torch")


def two_losses(net, inner, outer, lr, steps, xs, ys, xq, yq):
    """MAML by plain autograd, with a loss for each side."""
    total = []
    for x, y, qx, qy in zip(xs, ys, xq, yq, strict=True):
        theta = dict(net.named_parameters())
        for _ in range(steps):
            loss = inner(torch.func.functional_call(net, theta, (x,)), y)
            found = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {n: p - lr * g for (n, p), g in zip(theta.items(), found, strict=True)}
        total.append(outer(torch.func.functional_call(net, theta, (qx,)), qy))
    return torch.stack(total).mean()


def pinball(outputs, y):
    error = y - outputs
    return torch.where(error > 0, 0.9 * error, -0.1 * error).mean()


def cut(outputs, labels):
    """The cross-entropy of the first two of the outputs."""
    return F.cross_entropy(outputs, labels)


# name: inner loss, that in torch, query loss, that in torch, targets of both sides
PAIRS = {
    "mse, quantile": ("mse", F.mse_loss, QuantileLoss(0.9), pinball, ("mse", "mse")),
    "cross-entropy, its smoothed kin": (
        nn.CrossEntropyLoss(label_smoothing=0.3), nn.CrossEntropyLoss(label_smoothing=0.3),
        "cross_entropy", F.cross_entropy, ("cross_entropy", "cross_entropy"),
    ),
    "huber, labels": ("huber", F.huber_loss, "cross_entropy", cut, ("mse", "cross_entropy")),
    "labels, weighted logits": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3]).double()),
        nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3]).double()),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 1, 2]).double()),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 1, 2]).double()),
        ("cross_entropy", "bce_with_logits"),
    ),
}  # fmt: skip


def pair(name):
    inner, f, outer, g, kinds = PAIRS[name]
    xs, _, xq, _ = batch()
    ys, yq = (targets(k, *x.shape[:2], out=3) for k, x in zip(kinds, (xs, xq), strict=True))
    return inner, f, outer, g, (xs, ys, xq, yq)


@pytest.mark.parametrize("isa, executor", [*PATHS, (None, None)])
@pytest.mark.parametrize("name", PAIRS)
def test_a_query_loss_of_its_own(name, isa, executor):
    """Every path, and torch: where there is no executor."""
    inner, f, outer, g, data = pair(name)
    net = mlp(2, 5, 3)
    module = MAML(net, loss=inner, query_loss=outer, lr=0.1, steps=2,
                  backend="native" if executor else "torch")  # fmt: skip
    with using(isa, executor):
        got = module(*data)
        slopes = gradients(got.loss, *net.parameters())
    wanted = two_losses(net, f, g, 0.1, 2, *data)
    assert_close(got.loss, wanted)
    assert_close(slopes, gradients(wanted, *net.parameters()))


@pytest.mark.parametrize("isa, executor", CPU_PATHS)
def test_the_same_query_loss_has_the_same_bits(isa, executor):
    case = Case(SMOOTH["mlp"], loss="bce_with_logits", loss_options=True, tasks=5, weights=True)
    problem = Problem(case)
    module = problem.module(torch.float32)
    twin = copy.deepcopy(module)
    twin.query_loss = problem.loss
    with using(isa, executor):
        a, b = problem.results(module), problem.results(twin)
    for name in ("task_losses", "gradients"):
        x, y = (list(r[name].values()) if name == "gradients" else r[name] for r in (a, b))
        assert same_bits(x, y)


def test_a_query_loss_may_be_set_and_asks_for_its_own_targets():
    module = MAML(mlp(2, 4), loss="mse", lr=0.1, steps=1, backend="native")
    xs, ys, xq, yq = batch(out=4)
    first = module(xs, ys, xq, yq).loss
    module.query_loss = "gaussian_nll"
    with pytest.raises(ValueError, match=r"yq: expected shape \[tasks, rows, 2\] \(gaussian_nll h"):
        module(xs, ys, xq, yq)
    assert module(xs, ys, xq, yq[..., :2]).loss != first
    module.query_loss = "poisson_nll"
    with pytest.raises(ValueError, match="yq: task 0, row 0: target -1 is below 0; poisson_nll"):
        module(xs, ys, xq, -torch.ones_like(yq))
    module.query_loss = None
    assert torch.equal(module(xs, ys, xq, yq).loss, first)
    restored = copy.deepcopy(module)
    restored.query_loss = "l1"
    wanted = two_losses(module.model, F.mse_loss, F.l1_loss, 0.1, 1, xs, ys, xq, yq)
    assert_close(restored(xs, ys, xq, yq).loss, wanted)


def test_a_wrong_query_loss_is_refused():
    for wrong, error, message in (
        ("mae", ValueError, r"^query_loss: expected one of mse, .*got 'mae'"),
        (3, TypeError, r"^query_loss: expected one of mse, .*got int"),
        ("gaussian_nll", ValueError, r"^query_loss: gaussian_nll asks for 2 outputs for each"),
    ):
        with pytest.raises(error, match=message):
            MAML(mlp(2, 3), loss="mse", query_loss=wrong, lr=0.1, steps=1)


class Sum(nn.Module):
    """No chain: two layers side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3).double(), nn.Linear(2, 3).double()

    def forward(self, x):
        return self.a(x) + self.b(x).tanh()


@pytest.mark.parametrize("make", [Sum, lambda: mlp(2, 3)])
def test_labels_of_the_query_set_are_checked(make):
    """By the query loss, also where the width of the outputs has to be found out."""
    xs, ys, xq, _ = batch(out=3)
    yq = torch.randint(0, 3, (3, 4))
    module = MAML(make(), loss="mse", query_loss="cross_entropy", lr=0.1, steps=1, backend="torch")
    wanted = two_losses(module.model, F.mse_loss, F.cross_entropy, 0.1, 1, xs, ys, xq, yq)
    assert_close(module(xs, ys, xq, yq).loss, wanted)
    yq[1, 2] = 3
    with pytest.raises(ValueError, match=r"yq: task 1, row 2: label 3 is not in 0\.\.2"):
        module(xs, ys, xq, yq)


# ---- functions ---------------------------------------------------------------------------------


def of_rows(outputs, y):
    return (outputs - y).abs().pow(1.5).mean(-1)


def of_a_set(outputs, y):
    return of_rows(outputs, y).mean()


def correlation(outputs, y):
    """Minus the correlation over the rows of a set, which is no mean of theirs."""
    a, b = outputs[:, 0] - outputs[:, 0].mean(), y[:, 0] - y[:, 0].mean()
    return -(a * b).sum() / (a.square().sum() * b.square().sum() + 1e-9).sqrt()


@pytest.mark.parametrize("loss", [of_rows, of_a_set, correlation, nn.SmoothL1Loss()])
@pytest.mark.parametrize("side", ["both", "query"])
def test_a_function_is_a_loss(loss, side):
    net, data = mlp(2, 5, 2), batch()
    losses = {"loss": loss} if side == "both" else {"loss": "mse", "query_loss": loss}
    module = MAML(net, **losses, lr=0.1, steps=2, backend="torch")
    got = module(*data)

    def outer(outputs, y):
        return loss(outputs, y).mean()

    wanted = two_losses(net, outer if side == "both" else F.mse_loss, outer, 0.1, 2, *data)
    assert_close(got.loss, wanted)
    assert_close(gradients(got.loss, *net.parameters()), gradients(wanted, *net.parameters()))


def test_where_a_function_runs_is_said():
    net, data = mlp(2, 5, 2), batch()
    for losses in ({"loss": of_rows}, {"loss": "mse", "query_loss": of_rows}):
        name = list(losses)[-1]
        module = MAML(net, **losses, lr=0.1, steps=1)
        with pytest.warns(UserWarning, match=f"{name}: of_rows is a function, which runs in torch"):
            module(*data)
        assert "of_rows is a function" in module.explain()
        with pytest.raises(ValueError, match=f"{name}: of_rows is a function"):
            MAML(net, **losses, lr=0.1, steps=1, backend="native")(*data)
    with pytest.raises(ValueError, match="of_rows is a function"):
        MAML(net, loss=of_rows, lr=0.1, steps=1, backend="torch").adapter()
    assert "loss=of_rows" in repr(module) or "loss=mse" in repr(module)


@pytest.mark.parametrize("learner", [FineTune, Reptile])
def test_the_other_learners_take_functions(learner):
    xs, ys, _, _ = batch()
    net = mlp(2, 5, 2)
    turns = {"epochs": 2} if learner is FineTune else {"steps": 2}
    module = learner(net, loss=of_a_set, lr=0.1, backend="torch", **turns)
    models = module(xs, ys) if learner is FineTune else module.adapt(xs, ys)
    for t in range(3):
        theta = dict(net.named_parameters())
        for _ in range(2):
            loss = of_a_set(torch.func.functional_call(net, theta, (xs[t],)), ys[t])
            found = torch.autograd.grad(loss, list(theta.values()))
            theta = {n: p - 0.1 * g for (n, p), g in zip(theta.items(), found, strict=True)}
        assert_close([v[t] for v in models.parameters.values()], list(theta.values()))


def test_row_weights_and_functions():
    """They weigh losses of rows; of one number for the set, rows of weight 0 are left out."""
    net, (xs, ys, xq, yq) = mlp(2, 5, 2), batch()
    mask = torch.ones(3, 5).double()
    mask[:, 1] = 0
    kept = [0, 2, 3, 4]
    for loss in (of_rows, of_a_set):
        module = MAML(net, loss=loss, lr=0.1, steps=2, backend="torch")
        got = module(xs, ys, xq, yq, support_weights=mask)
        assert_close(got.loss, module(xs[:, kept], ys[:, kept], xq, yq).loss)
    with pytest.raises(ValueError, match="of_a_set gives one number for a set, which row weights"):
        module(xs, ys, xq, yq, support_weights=mask + 1)
    weights = torch.rand(3, 5).double()
    got = MAML(net, loss=of_rows, lr=0.1, steps=0, backend="torch")(
        xs, ys, xs, ys, query_weights=weights
    )
    each = [of_rows(net(x), y) for x, y in zip(xs, ys, strict=True)]
    wanted = [(w * e).sum() / w.sum() for w, e in zip(weights, each, strict=True)]
    assert_close(got.task_losses, torch.stack(wanted))


def test_what_a_function_may_give():
    net, data = mlp(2, 5, 2), batch()
    for loss, message in (
        (
            lambda o, y: (o - y).square(),
            r"to give one number \[\] or one for each row \[5\], got",
        ),
        (lambda o, y: 0.0, "got float"),
    ):
        with pytest.raises(ValueError, match=message):
            MAML(net, loss=loss, lr=0.1, steps=1, backend="torch")(*data)
    none = MAML(net, loss=of_a_set, lr=0.1, steps=1, backend="torch")(
        data[0][:, :0], data[1][:, :0], *data[2:]
    )
    assert none.loss.isfinite()  # a set without rows has loss 0, whatever the function makes of it


def test_functions_take_any_targets():
    """Integers, other dtypes, more axes: whatever goes with the rows."""
    net, (xs, _, xq, _) = mlp(2, 5, 3), batch()
    ys, yq = torch.randint(0, 3, (3, 5)), torch.randint(0, 3, (3, 4))
    got = MAML(net, loss=F.cross_entropy, lr=0.1, steps=2, backend="torch")(xs, ys, xq, yq)
    assert_close(got.loss, loop_meta_loss(net, F.cross_entropy, 0.1, 2, xs, ys, xq, yq))


def test_a_function_is_in_no_file(tmp_path):
    models = MAML(mlp(2, 2), loss=of_rows, lr=0.1, steps=1, backend="torch").adapt(*batch()[:2])
    assert models.loss == OwnLoss(function=of_rows)
    with pytest.raises(ValueError, match="no file can hold a function, of_rows"):
        models.save(tmp_path / "models")


def test_random_cases_with_a_query_loss():
    """Ragged, weighted, in both dtypes, within the bounds of cases.py."""
    for seed, (inner, outer) in enumerate(
        [("mse", nn.HuberLoss()), ("bce_with_logits", nn.BCEWithLogitsLoss(
            pos_weight=torch.tensor([2.0, 0.5]))), ("poisson_nll", "qlike")]
    ):  # fmt: skip
        case = Case(SMOOTH["mlp"], loss=inner, tasks=17, form="list", weights=True, seed=seed,
                    steps=2, lr="layer")  # fmt: skip
        problem = Problem(case)
        make = problem.module

        def module(dtype, backend="native", make=make, outer=outer):
            made = make(dtype, backend)
            made.query_loss = outer
            return made

        problem.module = module
        Wanted(problem).check()


def test_adapted_models_are_of_the_inner_loss():
    module = MAML(mlp(2, 3), loss="cross_entropy", query_loss="mse", lr=0.1, steps=1,
                  backend="native")  # fmt: skip
    xs, ys, xq, _ = batch("cross_entropy", out=3)
    models = module.adapt(xs, ys)
    assert models.predict_proba(xq).shape == (3, 4, 3)
    assert module.adapter().loss == module.loss != module.query_loss
