"""The losses beside the four: what they mean, native against the reference, descriptions, files.

`csrc/tests/losses_test.cpp` holds the derivatives of every loss to finite differences.
"""

import collections
import math
import pickle

import numpy as np
import pytest
import torch
from cases import LIN, SMOOTH, Case, Problem, Wanted, cases, compare, make_loss, of_tasks
from helpers import (
    LOSSES,
    MORE_LOSSES,
    assert_close,
    assert_promised,
    batch,
    gradients,
    loop_meta_loss,
    mlp,
    targets,
)
from hypothesis import given, settings
from kernels import DTYPES, EXECUTORS, PATHS, PROFILE, same_bits, using
from native_help import check_slope
from torch import nn

import pymeta
from pymeta import MAML, Adapter, FineTune, QuantileLoss, Reptile, StudentTNLLLoss, native
from pymeta.reference.loss import task_loss
from pymeta.spec.losses import Loss, describe_loss
from pymeta.spec.measure import mean_loss

BACKENDS = ("native", "torch")


def normal_nll(outputs, target):
    mean, log_scale = outputs.chunk(2, -1)
    return -torch.distributions.Normal(mean, log_scale.exp()).log_prob(target).mean()


def student_nll(outputs, target, dof=4.0):
    place, log_scale = outputs.chunk(2, -1)
    return -torch.distributions.StudentT(dof, place, log_scale.exp()).log_prob(target).mean()


def qlike(outputs, target):
    h = outputs.exp()
    return (h.log() + target / h).mean()


def pinball(levels):
    def loss(outputs, target):
        parts = [
            torch.where(target > y, q * (target - y), (1 - q) * (y - target)).mean()
            for q, y in zip(levels, outputs.chunk(len(levels), -1), strict=True)
        ]
        return torch.stack(parts).mean()

    return loss


# name: what is given as loss=, outputs per target, the same in torch, its name's targets
TWINS = {
    "l1": ("l1", 1, nn.functional.l1_loss),
    "L1Loss": (nn.L1Loss(), 1, nn.functional.l1_loss),
    "quantile": ("quantile", 1, lambda y, t: nn.functional.l1_loss(y, t) / 2),
    "quantile 0.9": (QuantileLoss(0.9), 1, pinball([0.9])),
    "quantiles": (QuantileLoss([0.1, 0.5, 0.75]), 3, pinball([0.1, 0.5, 0.75])),
    "poisson_nll": ("poisson_nll", 1, nn.functional.poisson_nll_loss),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(), 1, nn.functional.poisson_nll_loss),
    "qlike": ("qlike", 1, qlike),
    "gaussian_nll": ("gaussian_nll", 2, normal_nll),
    "student_t_nll": ("student_t_nll", 2, student_nll),
    "student_t_nll, dof 1": (StudentTNLLLoss(1), 2, lambda y, t: student_nll(y, t, 1.0)),
}


def twin(name, columns=2, **options):
    """A network for `columns` targets, their data, and torch's loss."""
    loss, each, same = TWINS[name]
    kind = describe_loss(loss).kind
    net = mlp(2, 5, each * columns)
    xs, _, xq, _ = batch(inputs=2)
    ys, yq = (targets(kind, *x.shape[:2], out=columns) for x in (xs, xq))
    return net, loss, (xs, ys, xq, yq), same


# ---- what they mean ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TWINS)
def test_maml_is_the_loop_over_torchs_own_loss(name, backend):
    net, loss, data, same = twin(name)
    got = MAML(net, loss=loss, lr=0.05, steps=2, backend=backend)(*data)
    wanted = loop_meta_loss(net, same, 0.05, 2, *data)
    assert_close(got.loss, wanted)
    parameters = list(net.parameters())
    assert_close(gradients(got.loss, *parameters), gradients(wanted, *parameters))


@pytest.mark.parametrize("name", TWINS)
def test_reptile_and_fine_tuning_are_the_loop_too(name):
    net, loss, (xs, ys, _, _), same = twin(name)
    adapted = []
    for x, y in zip(xs, ys, strict=True):
        theta = dict(net.named_parameters())
        for _ in range(3):
            found = torch.autograd.grad(
                same(torch.func.functional_call(net, theta, (x,)), y), list(theta.values())
            )
            theta = {n: p - 0.05 * g for (n, p), g in zip(theta.items(), found, strict=True)}
        adapted.append(theta)
    mean = [torch.stack([t[n] for t in adapted]).mean(0) for n in adapted[0]]
    tuned = FineTune(net, loss=loss, lr=0.05, epochs=3, backend="native")(xs, ys)
    for n, values in tuned.parameters.items():
        assert_close(values, torch.stack([t[n] for t in adapted]))
    out = Reptile(net, loss=loss, lr=0.05, steps=3, backend="native")(xs, ys)
    parameters = list(net.parameters())
    found = gradients(out.loss, *parameters)
    assert_close(found, [p - m for p, m in zip(parameters, mean, strict=True)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quantile_is_what_minimises_its_loss(backend):
    """The bias of a constant model goes to the quantile of the targets, for each level its own."""
    y = torch.arange(1.0, 101).view(1, 100, 1)
    tuner = FineTune(
        mlp(1, 3, dtype=torch.float32), loss=QuantileLoss([0.1, 0.5, 0.9]), lr=3.0, epochs=400,
        freeze=["0.weight"], backend=backend,
    )  # fmt: skip
    got = tuner(torch.zeros(1, 100, 1), y)(torch.zeros(1, 1, 1))[0, 0]
    assert (got - torch.tensor([10.5, 50.5, 90.5])).abs().max() < 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_likelihood_finds_location_and_scale(backend):
    """A normal distribution's are the mean and standard deviation of the targets."""
    torch.manual_seed(3)
    y = 2 + 0.5 * torch.randn(1, 500, 1, dtype=torch.float64)
    tuner = FineTune(
        mlp(1, 2), loss="gaussian_nll", lr=0.1, epochs=300, freeze=["0.weight"], backend=backend
    )
    mean, log_scale = tuner(torch.zeros_like(y), y)(torch.zeros(1, 1, 1).double())[0, 0]
    assert abs(float(mean - y.mean())) < 1e-6
    assert abs(float(log_scale.exp() - y.std(unbiased=False))) < 1e-6


def test_the_poisson_and_the_qlike_model_of_constants_is_the_mean():
    """Both links are log: e^bias is the mean of counts, or of variances."""
    y = torch.tensor([0.0, 1.0, 4.0, 3.0]).double().view(1, 4, 1)
    for loss in ("poisson_nll", "qlike"):
        tuner = FineTune(
            mlp(1, 1), loss=loss, lr=0.2, epochs=400, freeze=["0.weight"], backend="native"
        )
        got = tuner(torch.zeros_like(y), y)(torch.zeros(1, 1, 1).double())
        assert abs(float(got.exp()) - 2.0) < 1e-6, loss


@pytest.mark.parametrize("name", TWINS)
def test_row_weights_are_repetitions(name):
    """A row of weight 2 counts as two rows."""
    loss, each, _ = TWINS[name]
    loss = describe_loss(loss)
    y, t = torch.randn(4, 2 * each).double(), targets(loss.kind, 4, out=2)
    weights = torch.tensor([1.0, 2.0, 0.0, 3.0]).double()
    often = torch.tensor([0, 1, 1, 3, 3, 3])
    assert_close(task_loss(loss, y, t, weights), task_loss(loss, y[often], t[often], None))


# ---- native against the reference --------------------------------------------------------------


def test_random_cases_against_the_reference():
    counts = collections.Counter()

    @settings(PROFILE, max_examples=40)
    @given(cases(losses=MORE_LOSSES))
    def check(case):
        compare(case)
        counts[case.loss] += 1

    check()
    assert sorted(counts) == sorted(MORE_LOSSES)


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("loss", ["poisson_nll", "qlike", "gaussian_nll", "student_t_nll"])
def test_finite_differences_of_the_native_loss(isa, executor, loss):
    """Along a random line, as test_kernels.py has it for the others."""
    case = Case(SMOOTH["mlp"], loss=loss, loss_options=True, tasks=5, form="list", lr="parameter",
                per_step=True, steps=3, weights=True, seed=5)  # fmt: skip
    problem = Problem(case)
    check_slope(problem, isa, executor)


@pytest.mark.parametrize("loss", MORE_LOSSES)
def test_both_executors_have_the_same_bits(loss):
    """A task's, on every instruction set; and those of the task alone."""
    case = Case(SMOOTH["mlp"], loss=loss, loss_options=True, tasks=19, form="list", weights=True)
    problem, every = Problem(case), range(19)
    for dtype in DTYPES:
        module = problem.module(dtype)
        for isa in native.isas():
            got = []
            for executor in EXECUTORS:
                with using(isa, executor):
                    got.append(problem.results(module))
                    alone = problem.results(module, [7])
                assert same_bits(of_tasks(got[-1], [7]), of_tasks(alone, [0])), (isa, executor)
            assert same_bits(*(of_tasks(g, every) for g in got)), isa


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("loss", ["l1", "quantile"])
def test_at_the_kink_the_slope_is_zero(isa, executor, loss):
    net = nn.Sequential(nn.Linear(1, 1))
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    x, y = torch.ones(1, 3, 1), torch.zeros(1, 3, 1)
    module = MAML(net, loss=loss, lr=0.1, steps=0, backend="native")
    with using(isa, executor):
        out = module(x, y, x, y)
        assert out.loss == 0
        assert not any(g.any() for g in gradients(out.loss, *net.parameters()))


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("loss", MORE_LOSSES)
def test_a_nan_is_nan_and_its_own_affair(isa, executor, loss):
    net = mlp(2, 4, 2)
    xs, _, xq, _ = batch()
    columns = describe_loss(loss).target_columns(2)
    ys, yq = (targets(loss, *x.shape[:2], out=columns) for x in (xs, xq))
    module = MAML(net, loss=loss, lr=0.1, steps=1, backend="native")
    with using(isa, executor):
        before = module(xs, ys, xq, yq).task_losses
        yq[1, 2] = math.nan
        after = module(xs, ys, xq, yq)
        found = gradients(after.loss, *net.parameters())
    assert after.task_losses[1].isnan() and all(g.isnan().any() for g in found)
    assert torch.equal(after.task_losses[[0, 2]], before[[0, 2]])


# ---- descriptions ------------------------------------------------------------------------------


def test_descriptions_are_plain_values():
    assert QuantileLoss(np.float32(0.5)) == QuantileLoss() == QuantileLoss(level=0.5)
    levels = QuantileLoss(torch.tensor([0.25, 0.75]))
    assert levels == QuantileLoss([0.25, 0.75]) and hash(levels) == hash(QuantileLoss((0.25, 0.75)))
    for described in (levels, StudentTNLLLoss(3), Loss("qlike")):
        assert pickle.loads(pickle.dumps(described)) == described
    assert describe_loss("quantile") == describe_loss(QuantileLoss(0.5))
    assert describe_loss("student_t_nll") == describe_loss(StudentTNLLLoss())
    assert describe_loss(levels).outputs_per_target == 2


BAD = {
    "level 0": (lambda: QuantileLoss(0), ValueError, r"level: expected numbers in \(0, 1\), got 0"),
    "level 1": (lambda: QuantileLoss([0.5, 1.0]), ValueError, "got 1.0"),
    "level nan": (lambda: QuantileLoss(math.nan), ValueError, "got nan"),
    "no level": (lambda: QuantileLoss([]), ValueError, "or some, got none"),
    "level text": (lambda: QuantileLoss("0.5"), TypeError, "got str"),
    "level bool": (lambda: QuantileLoss([True]), TypeError, "got bool"),
    "dof 0": (lambda: StudentTNLLLoss(0), ValueError, "dof: expected a finite number > 0, got 0"),
    "dof text": (lambda: StudentTNLLLoss("3"), TypeError, "got str"),
    "class": (lambda: describe_loss(QuantileLoss), TypeError, r"an instance, QuantileLoss\("),
    "full": (lambda: describe_loss(nn.PoissonNLLLoss(full=True)), ValueError, "full=True"),
    "rate": (lambda: describe_loss(nn.PoissonNLLLoss(log_input=False)), ValueError, "log_input=F"),
    "gaussian": (lambda: describe_loss(nn.GaussianNLLLoss()), ValueError, '"gaussian_nll" is that'),
    "sum": (lambda: describe_loss(nn.L1Loss(reduction="sum")), ValueError, 'reduction="mean"'),
    "odd": (lambda: MAML(mlp(2, 3), loss="gaussian_nll", lr=0.1, steps=1), ValueError,
            r"2 outputs for each target \(a location and a log scale\), but the model has 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_loss_is_refused(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_have_their_own_columns(backend):
    x, y = torch.randn(2, 5, 2), torch.randn(2, 5, 2)
    module = MAML(mlp(2, 2, dtype=torch.float32), loss="gaussian_nll", lr=0.1, steps=1,
                  backend=backend)  # fmt: skip
    wrong = r"ys: expected shape \[tasks, rows, 1\] or \[tasks, rows\] \(gaussian_nll has 2 outputs"
    with pytest.raises(ValueError, match=wrong):
        module(x, y, x, y)
    assert module(x, y[..., :1], x, y[..., :1]).predictions.shape == (2, 5, 2)
    flat = module(x, y[..., 0], x, y[..., 0]).loss.detach()
    assert_promised(module(x, y[..., :1], x, y[..., :1]).loss.detach(), flat, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["poisson_nll", "qlike"])
def test_amounts_are_not_negative(backend, loss):
    x, y = torch.randn(2, 5, 2), torch.ones(2, 5, 1)
    y[1, 3] = -0.25
    module = MAML(mlp(2, 1, dtype=torch.float32), loss=loss, lr=0.1, steps=1, backend=backend)
    message = f"ys: task 1, row 3: target -0.25 is below 0; {loss} takes numbers of at least 0"
    with pytest.raises(ValueError, match=message):
        module(x, y, x, y.abs())
    weights = torch.ones(2, 5)
    weights[1, 3] = 0  # what a row of weight 0 holds is nobody's concern
    assert module(x, y, x, y.abs(), support_weights=weights).loss.isfinite()


class TwoHeads(nn.Module):
    """No chain: a location and a log scale from two layers."""

    def __init__(self):
        super().__init__()
        self.mean, self.log_scale = nn.Linear(2, 1).double(), nn.Linear(2, 1).double()

    def forward(self, x):
        return torch.column_stack([self.mean(x), self.log_scale(x)])


def test_a_model_that_is_no_chain_has_them_too():
    net, (xs, ys, xq, yq) = TwoHeads(), batch(out=1)
    got = MAML(net, loss="gaussian_nll", lr=0.1, steps=2, backend="torch")(xs, ys, xq, yq)
    assert_close(got.loss, loop_meta_loss(net, normal_nll, 0.1, 2, xs, ys, xq, yq))
    wrong = r"do not fit targets of shape \[5, 2\] of gaussian_nll \(it has 2 outputs for each"
    module = MAML(net, loss="gaussian_nll", lr=0.1, steps=2, backend="torch")
    with pytest.raises(ValueError, match=wrong):
        module(*batch(out=2))


# ---- adapters and files ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWINS)
def test_an_adapter_and_its_file_do_the_same(name, tmp_path):
    net, loss, (xs, ys, xq, _), _ = twin(name)
    module = MAML(net, loss=loss, lr=0.05, steps=2, backend="native")
    wanted = module.adapt(xs, ys)(xq)
    module.adapter().save(tmp_path / "adapter")
    adapter = Adapter.load(tmp_path / "adapter")
    assert adapter.loss == describe_loss(loss)
    one = adapter.adapt_predict(xs[1].numpy(), ys[1].numpy(), xq[1].numpy())
    assert np.array_equal(one, wanted[1].numpy())
    models = adapter.adapt(xs.numpy(), ys.numpy())
    models.save(tmp_path / "models")
    loaded = pymeta.AdaptedArrays.load(tmp_path / "models")
    assert loaded.loss == adapter.loss
    assert np.array_equal(loaded(xq.numpy()), wanted.numpy())


def test_a_file_has_what_a_loss_of_its_kind_has(tmp_path):
    """So the files of the four losses are what they were."""
    from pymeta.spec.fields import Fields
    from pymeta.spec.losses import loss_fields, read_loss

    old = {"kind", "delta", "label_smoothing", "ignore_index", "weight", "pos_weight"}
    assert set(loss_fields(Loss("mse"))) == old
    for loss in (QuantileLoss([0.1, 0.9]).described(), StudentTNLLLoss(2).described(), Loss("l1")):
        fields = {n: list(v) if type(v) is tuple else v for n, v in loss_fields(loss).items()}
        assert read_loss(Fields("loss", fields)) == loss
    quantile = {**loss_fields(Loss("quantile")), "weight": [], "pos_weight": []}
    for wrong in ([], [0.0], [1.5]):
        with pytest.raises(ValueError, match=r"loss: levels .* are not some in \(0, 1\)"):
            read_loss(Fields("loss", {**quantile, "levels": wrong}))
    student = {**loss_fields(Loss("student_t_nll")), "weight": [], "pos_weight": [], "dof": -1.0}
    with pytest.raises(ValueError, match=r"loss: dof -1\.0 is not > 0"):
        read_loss(Fields("loss", student))
    with pytest.raises(ValueError, match="loss: unknown entry 'levels'"):
        read_loss(Fields("loss", {**quantile, "kind": "mse", "levels": [0.5]}))


@pytest.mark.parametrize("isa, executor", PATHS)
def test_many_levels(isa, executor):
    """More outputs than a vector is wide, whose losses have few targets."""
    case = Case(((LIN, 3, 40, True),), loss="quantile", loss_options=True, tasks=3)
    problem = Problem(case)
    Wanted(problem).check(paths=[(isa, executor)])


# ---- in numpy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*LOSSES, *MORE_LOSSES, "soft"])
@pytest.mark.parametrize("options", [False, True])
def test_the_twin_in_numpy(kind, options):
    """Of rows, weighted rows and weighted targets, of which some hold anything."""
    name = "cross_entropy" if kind == "soft" else kind
    case = Case(((LIN, 2, 4, True),), loss=name, loss_options=options)
    loss = describe_loss(make_loss(case))
    columns = 4 if loss.takes_classes else loss.target_columns(4)
    z, y = torch.randn(9, 4).double() * 3, targets(name, 9, out=columns)
    if kind == "soft":
        y = torch.rand(9, 4).double()
    rows, single = torch.rand(9).double(), torch.rand(9, columns).double()
    rows[3] = 0
    for w in (None, rows, torch.zeros(9).double(), *[single] * (not loss.takes_classes)):
        if w is single:
            y, single[2, 0] = y.clone(), 0.0
            y[2, 0] = math.nan
        wanted = task_loss(loss, z, y, w)
        got = mean_loss(loss, z.numpy(), y.numpy(), None if w is None else w.numpy())
        assert_close(torch.tensor(got, dtype=torch.float64), wanted)
    if loss.takes_classes and kind != "soft" and options:
        y[4] = loss.ignore_index
        got = torch.tensor(mean_loss(loss, z.numpy(), y.numpy(), None), dtype=torch.float64)
        assert_close(got, task_loss(loss, z, y, None))
