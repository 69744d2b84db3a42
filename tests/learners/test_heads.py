"""Closed-form heads: direct equations, finite differences, and all forms of tasks alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import assert_close
from torch import nn

from pymeta.data import Ragged
from pymeta.learners import BayesianHead, RidgeHead

SIZES = [4, 1, 9, 2]
F64 = torch.float64
KINDS = ["mse", "ridge classes", "ridge logits", "cross_entropy", "bce_with_logits", "bayesian"]
WIDE = 12  # features, more than there are rows: the dual


def encoder(inputs=3, features=4):
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, features))


def make(kind: str, features=4, outputs=2, **options) -> nn.Module:
    """A head with a prior that is not the first one."""
    torch.manual_seed(0)
    common = {"features": features, "outputs": outputs, **options}
    if kind == "bayesian":
        head = BayesianHead(encoder(features=features), **common)
    else:
        solver = "ridge" if kind.startswith("ridge") else None
        loss = {"ridge classes": "cross_entropy", "ridge logits": "bce_with_logits"}.get(kind, kind)
        head = RidgeHead(encoder(features=features), loss=loss, solver=solver, **common)
    head = head.to(F64)
    with torch.no_grad():
        for name, p in head.named_parameters():
            if not name.startswith("encoder"):
                p += 0.3 * torch.randn(p.shape, dtype=F64)
    return head


def same(head, got, wanted) -> None:
    """Equal up to rounding; minima by Newton's method up to where it stops, eps^0.75."""
    if getattr(head, "solver", "") != "newton":
        assert_close(got, wanted)
        return
    got, wanted = ([v] if isinstance(v, torch.Tensor) else list(v) for v in (got, wanted))
    assert len(got) == len(wanted) > 0
    for g, w in zip(got, wanted, strict=True):
        assert torch.allclose(g, w, rtol=0, atol=1e-10)


def targets(head, rows: int, outputs=2):
    if head.loss.takes_classes:
        return torch.randint(0, outputs, (rows,))
    y = torch.randn(rows, outputs, dtype=F64)
    return (y > 0).to(F64) if head.loss.kind == "bce_with_logits" else y


def lists(head, sizes=SIZES, inputs=3):
    torch.manual_seed(1)
    return [torch.randn(n, inputs, dtype=F64) for n in sizes], [targets(head, n) for n in sizes]


# ---- against the equations, task by task ---------------------------------------------------------


def features_of(head, x):
    f = head.encoder(x)
    return torch.cat([f, f.new_ones(len(f), 1)], 1) if head.bias else f


def weights_by_hand(head, x, y, w):
    """The minimum, by the normal equations or by LBFGS."""
    f, p, w0 = features_of(head, x), head.log_precision.exp(), head.prior_mean
    if head.solver == "ridge":
        if head.loss.takes_classes:
            y = 2 * nn.functional.one_hot(y, w0.shape[1]).to(F64) - 1
        elif head.loss.kind != "mse":
            y = 2 * y - 1
        left = f.T @ (w[:, None] * f) + torch.diag(p)
        return torch.linalg.solve(left, f.T @ (w[:, None] * y) + p[:, None] * w0)
    v = w0.detach().clone().requires_grad_()
    options = {"max_iter": 500, "tolerance_grad": 1e-13, "tolerance_change": 1e-16}
    search = torch.optim.LBFGS([v], line_search_fn="strong_wolfe", **options)

    def cost():
        search.zero_grad()
        if head.loss.takes_classes:
            each = nn.functional.cross_entropy(f @ v, y, reduction="none")
        else:
            z = f @ v
            each = nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none").sum(-1)
        total = (w * each).sum() + (p[:, None] * (v - w0).square()).sum() / 2
        total.backward(inputs=[v])
        return total

    search.step(cost)
    return v.detach()


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_ridge_head_is_the_minimum_of_its_problem(kind):
    head = make(kind)
    xs, ys = lists(head)
    xq, _ = lists(head, [3, 5, 1, 2])
    ws = [torch.rand(n, dtype=F64) + 0.1 for n in SIZES]
    got = head(xs, ys, xq, support_weights=ws).predictions
    for t in range(len(SIZES)):
        with torch.no_grad():
            f = features_of(head, xq[t])
        own = weights_by_hand(head, xs[t].detach(), ys[t], ws[t]).detach()
        wanted = f @ own
        if hasattr(head, "scale"):
            wanted = (head.scale * wanted + head.shift).detach()
        tolerance = 1e-10 if head.solver == "ridge" else 1e-6  # LBFGS stops there
        assert torch.allclose(got[t], wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["mse", "bce_with_logits"])
@pytest.mark.parametrize("features", [2, 20])
def test_both_forms_are_one(kind, features):
    """More rows than features, and fewer: the normal equations and their dual."""
    head = make(kind, features=features)
    xs, ys = lists(head, [6, 3])
    models, w = head.adapt(xs, ys), [torch.rand(n, dtype=F64) for n in (6, 3)]
    weighted = head.adapt(xs, ys, support_weights=w)
    for t in range(2):
        one = torch.ones(len(xs[t]), dtype=F64)
        tolerance = 1e-10 if kind == "mse" else 1e-6  # LBFGS stops there
        for got, weights in ((models, one), (weighted, w[t])):
            wanted = weights_by_hand(head, xs[t], ys[t], weights)
            assert torch.allclose(got.state["weights"][t], wanted, rtol=0, atol=tolerance)


def test_a_task_of_few_rows_is_as_exact_beside_one_of_many():
    """By the normal equations, which its neighbour needs, it would lose digits as 1 / precision."""
    torch.manual_seed(1)
    xs = [torch.randn(n, 64) for n in (100, 5, 80)]
    ys = [x @ torch.linspace(-1, 1, 64).unsqueeze(1) for x in xs]
    found = []
    for dtype in (torch.float32, F64):
        head = RidgeHead(nn.Identity(), features=64, outputs=1, loss="mse", precision=1e-4)
        x, y = [v.to(dtype) for v in xs], [v.to(dtype) for v in ys]
        weights = [torch.ones(len(v)) for v in x]
        weights[1][2] = 0  # a gap among its rows
        head = head.to(dtype)
        beside = head(x, y, x, support_weights=weights).predictions[1]
        alone = head(x[1:2], y[1:2], x[1:2], support_weights=weights[1:2]).predictions[0]
        found += [beside.detach().double(), alone.detach().double()]
    # five rows' products of 64 terms, whose smallest and largest eigenvalues are 5 apart
    bound = 5 * 5 * 64 * torch.finfo(torch.float32).eps * float(found[-1].abs().max())
    for got in found[:3]:
        assert (got - found[-1]).abs().max() < bound < 0.01


def test_equations_without_a_solution_name_the_cure():
    x = torch.randn(1, 3, 20, generator=torch.Generator().manual_seed(0))
    head = BayesianHead(nn.Identity(), features=20, outputs=1, precision=1e-9, bias=False)
    with pytest.raises(ValueError, match=r"xs: .*no solution in float32: .*larger precision="):
        head(x, x[..., :1], x)
    assert head.double()(x.double(), x[..., :1].double(), x.double()).predictions.isfinite().all()


def test_a_bayesian_head_is_gaussian_conditioning():
    """The joint normal of all rows of a task, conditioned on the support rows."""
    head = make("bayesian")
    xs, ys = lists(head)
    xq, yq = lists(head, [3, 5, 1, 2])
    out = head(xs, ys, xq, yq)
    cov_of_weights = torch.linalg.inv(head.prior_precision())
    losses = []
    for t, n in enumerate(SIZES):
        f = features_of(head, torch.cat([xs[t], xq[t]]))
        kernel = f @ cov_of_weights @ f.T + torch.eye(len(f), dtype=F64)
        prior = f @ head.prior_mean
        gain = kernel[n:, :n] @ torch.linalg.inv(kernel[:n, :n])
        mean = prior[n:] + gain @ (ys[t] - prior[:n])
        spread = torch.diag(kernel[n:, n:] - gain @ kernel[:n, n:])
        variance = spread[:, None] * head.log_noise.exp()
        assert torch.allclose(out.predictions[t], mean, rtol=0, atol=1e-10)
        assert torch.allclose(out.variances[t], variance, rtol=0, atol=1e-10)
        normal = torch.distributions.Normal(mean, variance.sqrt())
        losses.append(-normal.log_prob(yq[t]).mean())
    assert torch.allclose(out.task_losses, torch.stack(losses), rtol=0, atol=1e-10)
    assert torch.allclose(out.loss, torch.stack(losses).mean(), rtol=0, atol=1e-10)


# ---- Vasicek ------------------------------------------------------------------------------------


def betas(tasks=40, rows=25, seed=0):
    """Returns of stocks on the market's: betas N(1, 0.3^2), noise of variance 0.5."""
    rng = np.random.default_rng(seed)
    beta = 1 + 0.3 * rng.normal(size=tasks)
    market = rng.normal(size=(tasks, rows))
    returns = beta[:, None] * market + math.sqrt(0.5) * rng.normal(size=market.shape)
    return torch.tensor(market)[..., None], torch.tensor(returns)[..., None], beta


@pytest.mark.parametrize("kind", ["ridge", "bayesian"])
def test_identity_features_are_vasiceks_betas(kind):
    """beta = (b / s^2 + m / t^2) / (1 / s^2 + 1 / t^2), b the OLS beta and s its standard error."""
    x, y, _ = betas()
    mean, tau2, sigma2 = 1.0, 0.09, 0.5
    options = {"features": 1, "outputs": 1, "precision": sigma2 / tau2, "bias": False}
    if kind == "ridge":
        head = RidgeHead(nn.Identity(), loss="mse", **options).to(F64)
    else:
        head = BayesianHead(nn.Identity(), noise=sigma2, **options).to(F64)
    with torch.no_grad():
        head.prior_mean.fill_(mean)
    models = head.adapt(x, y)
    xx, xy = x.square().sum((1, 2)), (x * y).sum((1, 2))
    ols, error = xy / xx, sigma2 / xx
    wanted = (ols / error + mean / tau2) / (1 / error + 1 / tau2)
    # the head's precision is stored as a float32 logarithm
    assert torch.allclose(models.state["weights"].flatten(), wanted, rtol=1e-6)
    if kind == "bayesian":
        xq = torch.full((40, 1, 1), 2.0, dtype=F64)
        posterior = 1 / (1 / error + 1 / tau2)
        assert torch.allclose(models.variances(xq).flatten(), sigma2 + 4 * posterior, rtol=1e-6)


def test_the_prior_is_learned_from_tasks():
    """Empirical Bayes: mean, spread and noise of the betas, by the likelihood of query rows."""
    x, y, beta = betas(tasks=600, rows=12)
    head = BayesianHead(nn.Identity(), features=1, outputs=1, bias=False).to(F64)
    search = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        loss = head(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]).loss
        loss.backward()
        return loss

    search.step(closure)
    noise = head.log_noise.exp().item()
    tau2 = noise / head.prior_precision().item()
    assert abs(head.prior_mean.item() - beta.mean()) < 0.05
    assert 0.45 < noise < 0.55 and 0.05 < tau2 < 0.14  # of 0.5 and 0.09
    error = head.adapt(x, y).state["weights"].flatten().numpy() - beta
    xx, xy = x.square().sum((1, 2)), (x * y).sum((1, 2))
    ols = (xy / xx).numpy() - beta
    assert (error**2).mean() < 0.8 * (ols**2).mean()


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("weighted", "features"), [(False, 4), (True, 4), (True, WIDE)])
def test_gradients_by_finite_differences(kind, weighted, features):
    """To every parameter and to the inputs, through the minimum."""
    head = make(kind, features=features)
    xs, ys = lists(head)
    xq, yq = lists(head, [3, 5, 1, 2])
    values = torch.cat(xs).requires_grad_()
    options = {}
    if weighted:
        options = {"support_weights": [torch.rand(n, dtype=F64) for n in SIZES],
                   "query_weights": [torch.rand(n, dtype=F64) for n in (3, 5, 1, 2)]}  # fmt: skip

    def loss():
        return head(Ragged(values, SIZES), ys, xq, yq, **options).loss

    loss().backward()
    torch.manual_seed(2)
    # Newton's minimum is found to eps^0.75 = 2e-12; differences over 2e-5 see a tenth of it
    step = 1e-5
    for name, p in [*head.named_parameters(), ("xs", values)]:
        direction = torch.randn(p.shape, dtype=F64)
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * step * direction
                found.append(float(loss()))
                p -= sign * step * direction
        slope = float((p.grad * direction).sum())
        difference = (found[0] - found[1]) / (2 * step)
        assert abs(slope - difference) < 1e-7 + 1e-6 * abs(slope), (name, slope, difference)
        assert name == "xs" or slope != 0


@pytest.mark.parametrize("kind", ["cross_entropy", "bce_with_logits"])
def test_a_minimum_by_newton_is_not_differentiated_twice(kind):
    """Its last step has the first derivative of the minimum, and no other."""
    head = make(kind)
    xs, ys = lists(head)
    (slope,) = torch.autograd.grad(head(xs, ys, xs, ys).loss, head.prior_mean, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()
    twice = make("mse")
    xs, ys = lists(twice)
    (slope,) = torch.autograd.grad(twice(xs, ys, xs, ys).loss, twice.prior_mean, create_graph=True)
    slope.square().sum().backward()
    assert twice.log_precision.grad.abs().sum() > 0


# ---- forms --------------------------------------------------------------------------------------


def padded(values, rows, fill=7):
    out = values[0].new_full((len(values), rows, *values[0].shape[1:]), fill)
    for t, v in enumerate(values):
        out[t, : len(v)] = v
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_is_padded_is_one_by_one(kind):
    head = make(kind)
    query_sizes = [3, 5, 1, 2]
    xs, ys = lists(head)
    xq, yq = lists(head, query_sizes)
    ws = [torch.rand(n, dtype=F64) + 0.1 for n in SIZES]
    wanted = head(xs, ys, xq, yq, support_weights=ws)
    fill = 1 if head.loss.targets != "values" else 7  # what fills up has to be a label
    form = head(
        padded(xs, 9), padded(ys, 9, fill), padded(xq, 5), padded(yq, 5, fill),
        support_sizes=SIZES, query_sizes=query_sizes, support_weights=padded(ws, 9),
    )  # fmt: skip
    same(head, form.task_losses, wanted.task_losses)
    assert form.predictions.shape == (4, 5, 2) and not form.predictions[2, 1:].any()
    cut = [form.predictions[t, :n] for t, n in enumerate(query_sizes)]
    same(head, cut, wanted.predictions)
    packed = head(
        Ragged(torch.cat(xs), SIZES), Ragged(torch.cat(ys), SIZES),
        Ragged(torch.cat(xq).numpy(), query_sizes), Ragged(torch.cat(yq).numpy(), query_sizes),
        support_weights=ws,
    )  # fmt: skip
    same(head, packed.predictions, wanted.predictions)
    models = head.adapt(xs, ys, support_weights=ws)
    same(head, models(xq), wanted.predictions)
    for t in range(4):
        one = head(xs[t][None], ys[t][None], xq[t][None], yq[t][None], support_weights=ws[t][None])
        same(head, one.loss, wanted.task_losses[t])
        same(head, one.predictions[0], wanted.predictions[t])
        same(head, models[t](xq[t][None])[0], wanted.predictions[t])
        same(head, models[t - 4](xq[t][None])[0], wanted.predictions[t])
    assert len(models[1:3]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_repetitions_and_weight_zero_is_absence(kind):
    head = make(kind)
    xs, ys = lists(head)
    xq, yq = lists(head, [3, 5, 1, 2])
    twice = head([torch.cat([x, x[:1]]) for x in xs], [torch.cat([y, y[:1]]) for y in ys], xq, yq)
    weights = [torch.tensor([2.0] + [1.0] * (n - 1), dtype=F64) for n in SIZES]
    same(head, head(xs, ys, xq, yq, support_weights=weights).task_losses, twice.task_losses)

    nan = torch.full((1, 3), math.nan, dtype=F64)

    def more(values, rows):
        return [torch.cat([v, rows]) for v in values]

    def ones(values):
        return [torch.tensor([1.0] * (len(v) - 1) + [0.0], dtype=F64) for v in values]

    bad_s, bad_q = more(xs, nan), more(xq, nan)
    y_s, y_q = ([torch.cat([y, y[:1]]) for y in side] for side in (ys, yq))
    plain = head(xs, ys, xq, yq)
    plain.loss.backward()
    wanted = [p.grad.clone() for p in head.parameters() if p.grad is not None]
    head.zero_grad()
    out = head(bad_s, y_s, bad_q, y_q, support_weights=ones(bad_s), query_weights=ones(bad_q))
    out.loss.backward()
    same(head, out.task_losses, plain.task_losses)
    same(head, [p.grad for p in head.parameters() if p.grad is not None], wanted)
    assert out.predictions[0][-1].isnan().all()
    same(head, [p[:-1] for p in out.predictions], plain.predictions)


@pytest.mark.parametrize("kind", ["mse", "cross_entropy", "bce_with_logits", "bayesian"])
def test_an_offset_is_a_feature_whose_weight_is_one(kind):
    """A feature more, of which the prior says 1 for sure, is the same."""
    outputs = 1
    head = make(kind, outputs=2 if kind == "cross_entropy" else outputs)
    outputs = head.outputs
    torch.manual_seed(3)
    sizes, query_sizes = SIZES, [3, 5, 1, 2]
    xs, _ = lists(head)
    xq, _ = lists(head, query_sizes)
    ys, yq = ([targets(head, n, outputs) for n in each] for each in (sizes, query_sizes))
    given, asked = (
        [torch.randn(n, outputs, dtype=F64) for n in each] for each in (sizes, query_sizes)
    )

    class More(nn.Module):
        """The encoder's features, and the offset, which comes as further columns of x."""

        def forward(self, x):
            return torch.cat([head.encoder(x[:, :3]), x.new_ones(len(x), 1), x[:, 3:]], 1)

    more = type(head)(More(), features=5 + outputs, outputs=outputs, bias=False,
                      **({} if kind == "bayesian" else {"loss": kind})).to(F64)  # fmt: skip
    with torch.no_grad():
        more.prior_mean[:5], more.prior_mean[5:] = head.prior_mean, torch.eye(outputs)
        if kind == "bayesian":
            more.log_noise.copy_(head.log_noise)
            more.prior_root.copy_(torch.block_diag(head.prior_root, 9 * torch.eye(outputs)))
        else:
            more.log_precision[:5], more.log_precision[5:] = head.log_precision, 18.0
    joined = [[torch.cat([x, o], 1) for x, o in zip(*side, strict=True)]
              for side in ((xs, given), (xq, asked))]  # fmt: skip
    wanted = more(joined[0], ys, joined[1], yq)
    got = head(xs, ys, xq, yq, support_offset=given, query_offset=asked)
    # a precision of e^18 lets the weight leave 1 by some e-8
    assert torch.allclose(got.task_losses, wanted.task_losses, rtol=0, atol=1e-5)
    assert not torch.allclose(got.task_losses, head(xs, ys, xq, yq).task_losses, rtol=0, atol=1e-2)
    models = head.adapt(xs, ys, support_offset=given)
    same(head, models(xq, offset=asked), got.predictions)
    plain = models(xq)
    same(head, [p + o for p, o in zip(plain, asked, strict=True)], got.predictions)


def test_soft_labels():
    head = make("cross_entropy")
    xs, ys = lists(head)
    soft = [nn.functional.one_hot(y, 2).to(F64) for y in ys]
    same(head, head(xs, soft, xs, soft).task_losses, head(xs, ys, xs, ys).task_losses)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_without_rows_is_at_the_prior(kind):
    head = make(kind)
    xs, ys = lists(head, [0, 4])
    xq, yq = lists(head, [3, 2])
    out = head(xs, ys, xq, yq)
    wanted = features_of(head, xq[0]) @ head.prior_mean
    if hasattr(head, "scale"):
        wanted = head.scale * wanted + head.shift
    same(head, out.predictions[0], wanted)
    empty, labels = lists(head, [0, 0])
    same(head, head(empty, labels, xq).predictions[0], wanted)
    assert head(xs, ys, *lists(head, [0, 2])).task_losses[0] == 0
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_states_go_through_files(kind, tmp_path):
    head = make(kind)
    xs, ys = lists(head, [8] * 4)
    xq, yq = lists(head, [8] * 4)
    adam = torch.optim.Adam(head.parameters(), 0.01)
    losses = []
    for _ in range(40):
        adam.zero_grad()
        out = head(xs, ys, xq, yq)
        out.loss.backward()
        adam.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]
    torch.save(head.state_dict(), tmp_path / "head.pt")
    twin = make(kind)
    twin.load_state_dict(torch.load(tmp_path / "head.pt"))
    same(head, twin(xs, ys, xq, yq).loss, head(xs, ys, xq, yq).loss)
    assert head.explain().startswith("torch: a ")


def test_separable_classes_have_a_minimum():
    """Far from the start Newton's method overshoots; it still ends at the minimum."""
    head = RidgeHead(nn.Identity(), features=1, outputs=1, loss="bce_with_logits", precision=1e-4,
                     bias=False).to(F64)  # fmt: skip
    x = torch.linspace(-5, 5, 10, dtype=F64).reshape(1, 10, 1)
    v = float(head.adapt(x, (x > 0).to(F64)).state["weights"])
    z = v * x
    slope = ((z.sigmoid() - (x > 0).to(F64)) * x).sum() + 1e-4 * v
    assert v > 3 and abs(float(slope)) < 1e-9


def test_probabilities():
    head = make("cross_entropy")
    xs, ys = lists(head)
    assert all(torch.allclose(p.sum(-1), torch.ones(len(p), dtype=F64))
               for p in head.adapt(xs, ys).predict_proba(xs))  # fmt: skip
    two = make("bce_with_logits")
    xs, ys = lists(two)
    models = two.adapt(xs, ys)
    same(two, models.predict_proba(xs), [z.sigmoid() for z in models(xs)])
    with pytest.raises(TypeError, match="predict_proba: the loss mse knows no probabilities"):
        make("mse").adapt(*lists(make("mse"))).predict_proba(xs)
    with pytest.raises(TypeError, match="variances: a RidgeHead knows none"):
        models.variances(xs)


def test_no_work_grows_with_the_number_of_tasks_in_python():
    """A call makes as many calls of torch for 200 tasks as for 2."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    for kind in ("mse", "bayesian", "ridge classes"):
        head = make(kind)
        counts = []
        for tasks in (2, 2, 200):  # the first call may make more
            sizes = [3, 5] * (tasks // 2)
            xs, ys = lists(head, sizes)
            x, y = Ragged(torch.cat(xs), sizes), Ragged(torch.cat(ys), sizes)
            with Count() as count:
                head(x, y, x, y).loss.backward()
            counts.append(count.calls)
        assert counts[1] == counts[2]


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"loss": "huber"}, ValueError, "loss: expected mse or bce_with_logits or cross_entropy"),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, ValueError, "without options"),
        ({"solver": "adam"}, ValueError, "solver: expected 'ridge', 'newton' or None"),
        ({"solver": "newton"}, ValueError, "solver: expected 'ridge' with mse"),
        ({"precision": 0}, ValueError, "precision: expected a number > 0"),
        ({"features": 0}, ValueError, "features: expected a whole number >= 1"),
        ({"encoder": None}, TypeError, r"encoder: expected a torch\.nn\.Module, got NoneType"),
    ],
)
def test_constructors(changes, error, says):
    arguments = {"encoder": encoder(), "features": 4, "outputs": 2, "loss": "mse", **changes}
    with pytest.raises(error, match=says):
        RidgeHead(arguments.pop("encoder"), **arguments)


def test_calls():
    head = make("cross_entropy")
    xs, ys = lists(head)
    with pytest.raises(ValueError, match=r"ys: task 0, row 0: label 5 is not in 0\.\.1"):
        head(xs, [y * 0 + 5 for y in ys], xs, ys)
    with pytest.raises(TypeError, match=r"xs: expected torch\.float64 .*, got torch\.float32"):
        head([x.float() for x in xs], ys, xs, ys)
    with pytest.raises(ValueError, match="xq: expected 4 tasks as xs has, got 3"):
        head(xs, ys, xs[:3], ys[:3])
    with pytest.raises(ValueError, match="query_weights: expected None"):
        head(xs, ys, xs, query_weights=[torch.ones(n) for n in SIZES])
    with pytest.raises(ValueError, match="encoder: expected 4 features, got 5"):
        RidgeHead(encoder(features=5), features=4, outputs=1, loss="mse").to(F64)(
            xs, [torch.zeros(n, 1, dtype=F64) for n in SIZES], xs
        )
    with pytest.raises(ValueError, match="support_weights: expected a weight for each row"):
        values = make("mse")
        _, numbers = lists(values)
        values(xs, numbers, xs, support_weights=[torch.ones(n, 2) for n in SIZES])
    with pytest.raises(ValueError, match="support_offset: expected None with solver='ridge'"):
        make("ridge classes")(xs, ys, xs, support_offset=[torch.zeros(n, 2) for n in SIZES])
    models = head.adapt(xs, ys)
    with pytest.raises(ValueError, match="xq: expected 4 tasks, got 2"):
        models(xs[:2])
    with pytest.raises(IndexError, match="index 4 is out of range for 4 tasks"):
        models[4]
