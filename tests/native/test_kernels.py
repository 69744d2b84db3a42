"""The native kernels: every executor, instruction set and dtype against the float64 reference.

What a kernel must be is said in three ways here. Close to `pymeta.reference` in float64, on
networks, losses and options drawn by hypothesis (cases.py). Bitwise equal wherever the project
promises it (test_bits.py). And right by itself: closed forms, finite differences, gradcheck.
"""

import collections
import math
from dataclasses import replace

import pytest
import torch
from cases import (
    FACTORED,
    FIXED,
    LIN,
    SMOOTH,
    Case,
    Problem,
    Wanted,
    cases,
    compare,
    factored_cases,
    is_factored,
    of_tasks,
)
from helpers import assert_close, batch, gradients, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import (
    ACTIVATIONS,
    DTYPES,
    EPS,
    EXECUTORS,
    ISAS,
    PATHS,
    PROFILE,
    same_bits,
    using,
)
from native_help import POISONS, check_isolation, check_slope
from torch import nn

import pymeta
from pymeta import native


def test_random_cases_against_the_reference():
    counts = collections.Counter()

    @settings(PROFILE, max_examples=100)
    @given(cases())
    def check(case):
        counts.update(compare(case))
        counts["measures some"] += Problem(case).measures_some

    check()
    assert counts[torch.float64] >= 100 and counts["measures some"] > 0
    assert counts[torch.float32] >= 80  # the cases that a kink rules out are the exception


def test_the_comparison_can_fail():
    """The other order of gradient, a step missing, an lr a little off: all are out of bounds."""
    case = Case((("linear", 3, 8, True), ("tanh",), ("linear", 8, 2, True)), seed=4)
    wanted = Wanted(Problem(case))
    for change in ({"first_order": True}, {"steps": 1}):
        other = Problem(replace(case, **change))
        got = other.results(other.module(torch.float32))
        assert wanted.differences(got, torch.float32)
    slower = Problem(case)
    slower.rate *= 1 - 1e-3
    assert wanted.differences(slower.results(slower.module(torch.float32)), torch.float32)
    slower.rate = wanted.problem.rate * (1 - 1e-12)
    assert wanted.differences(slower.results(slower.module(torch.float64)), torch.float64)


@pytest.mark.parametrize("name", FIXED)
def test_fixed_cases_against_the_reference(name):
    compare(FIXED[name])


@pytest.mark.parametrize("isa, executor", PATHS)
def test_no_tasks(isa, executor):
    """The mean over nothing is 0 here, and so is its gradient."""
    with using(isa, executor):
        for chain in (FIXED["one row"].chain, FACTORED):
            problem = Problem(Case(chain, tasks=0, lr="network"))
            got = problem.results(problem.module(torch.float32))
            assert got["loss"] == 0 and got["task_losses"].shape == (0,)
            assert all(v.shape[0] == 0 for v in got["adapted"].values())
            assert not any(g.any() for g in got["gradients"].values())
            models = problem.module(torch.float32).adapt(problem.support.x, problem.support.y)
            assert models(problem.query.x).shape == (0, problem.case.query, problem.case.out)


# ---- the factored first layer -------------------------------------------------------------------


@settings(PROFILE, max_examples=25)
@given(factored_cases())
def test_factored_first_layer_against_the_reference(case):
    compare(case)


def test_factored_and_unfactored_tasks_in_one_call():
    """4 * rows <= inputs decides, task by task."""
    case = Case(FACTORED, tasks=24, support=40, query=6, form="list", lr="network", steps=3,
                input_gradients=False, loss="cross_entropy", seed=5)  # fmt: skip
    problem = Problem(case)
    few = [4 * n <= 70 for n in problem.support.sizes]
    assert any(few) and not all(few) and is_factored(problem, 40)
    Wanted(problem).check()


def test_factored_tasks_in_several_waves():
    """Thousands of query rows overflow the memory that the tasks of one wave share."""
    case = Case(((LIN, 64, 256, True), ("tanh",), (LIN, 256, 1, True)), tasks=20, support=9,
                query=2000, steps=1, input_gradients=False)  # fmt: skip
    problem = Problem(case)
    assert is_factored(problem, 9)
    Wanted(problem).check(dtypes=(torch.float32,), paths=[(native.isas()[-1], "rows")])


# ---- independent of the reference ---------------------------------------------------------------


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(
    "loss, optimizer",
    [
        ("mse", "plain"), ("cross_entropy", "plain"), ("bce_with_logits", "plain"),
        ("mse", "nesterov"), ("cross_entropy", "adam, decay"), ("bce_with_logits", "adamw"),
        ("mse", "rmsprop"), ("mse", "rmsprop, centered"),
    ],
)  # fmt: skip
def test_finite_differences_of_the_native_loss(isa, executor, name, loss, optimizer):
    """The loss along a random line through parameters, lr and inputs."""
    case = Case(SMOOTH[name], loss=loss, loss_options=True, tasks=5, form="list", lr="parameter",
                per_step=True, steps=3, weights=True, optimizer=optimizer, anchor="own",
                seed=3)  # fmt: skip
    problem = Problem(case)
    check_slope(problem, isa, executor)


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_regression_has_its_closed_form(isa, executor, dtype):
    """w' = w - lr A'(A w - y) 2/n, K times; its Jacobian is (1 - lr 2/n A'A)^K."""
    tasks, rows, width, lr, steps = 20, 6, 5, 0.125, 3
    xs, ys, xq, yq = batch(tasks=tasks, support=rows, query=8, inputs=width, out=1, dtype=dtype)
    net = nn.Linear(width, 1, bias=False).to(dtype)
    module = pymeta.MAML(nn.Sequential(net), loss="mse", lr=lr, steps=steps, backend="native")
    with using(isa, executor):
        out = module(xs, ys, xq, yq)
        got = gradients(out.loss, net.weight)[0]
        adapted = module.adapt(xs, ys).parameters["0.weight"]
    a, y, b, z = (v.double() for v in (xs, ys, xq, yq))
    w = net.weight.detach().double().T.expand(tasks, width, 1)
    for _ in range(steps):
        w = w - lr * 2 / rows * a.mT @ (a @ w - y)
    shrink = torch.eye(width, dtype=torch.float64) - lr * 2 / rows * a.mT @ a
    wanted = torch.linalg.matrix_power(shrink, steps).mT @ (2 / 8 * b.mT @ (b @ w - z))
    assert_close(adapted, w.mT, terms=width * rows)
    assert_close(got, wanted.mean(0).T, terms=width * rows * tasks)
    assert_close(out.task_losses, (b @ w - z).square().mean((1, 2)), terms=width * rows)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradcheck(executor):
    net = mlp(2, 3, 2)
    xs, ys, xq, yq = batch("cross_entropy", tasks=2, support=3, query=2)
    rate = pymeta.LearnableLR(0.1, "layer", per_step=True)
    module = pymeta.MAML(net, loss="cross_entropy", lr=rate, steps=2, backend="native")
    inputs = (*module.parameters(), xs.requires_grad_(), xq.requires_grad_())
    with using(executor=executor):
        assert torch.autograd.gradcheck(lambda *_: module(xs, ys, xq, yq).loss, inputs)


# ---- NaN, infinity, huge numbers ----------------------------------------------------------------


@settings(PROFILE)
@given(
    cases(tasks=(2, 5, 17, 33)),
    st.sampled_from(sorted(POISONS)),
    st.sampled_from(["xs", "ys", "xq"]),
    st.sampled_from(DTYPES),
    ISAS,
)
def test_a_diverged_task_is_its_own_affair(case, poison, where, dtype, isa):
    check_isolation(case, poison, where, dtype, isa)


@pytest.mark.parametrize("isa, executor", PATHS)
def test_a_factored_task_that_diverges_is_its_own_affair(isa, executor):
    problem = Problem(Case(FACTORED, tasks=9, input_gradients=False))
    module, others = problem.module(torch.float32), [0, 1, 2, 3, 4, 6, 7, 8]
    with using(isa, executor):
        wanted = problem.results(module)
        problem.support.x[5, 2] = math.nan
        got = problem.results(module)
    assert same_bits(of_tasks(got, others), of_tasks(wanted, others))
    assert got["task_losses"][5].isnan() and got["gradients"]["model.0.weight"].isnan().all()


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_of_nan_and_infinity_are_torchs(isa, executor, dtype, name):
    """Values and slopes, behind a linear layer (whose store does the ReLU) and behind another.

    One output alone: the sum over a row would be NaN for infinities of both signs.
    """
    numbers = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30, 1.0, -1.0]
    for extra in ([], [ACTIVATIONS[name]()]):
        net = nn.Sequential(nn.Linear(1, 1), ACTIVATIONS[name](), *extra).to(dtype)
        with torch.no_grad():
            net[0].weight.fill_(1.0)
            net[0].bias.zero_()
        x = torch.tensor(numbers, dtype=dtype).view(-1, 1, 1).requires_grad_()
        y = torch.full_like(x, -3e38)  # huber's slope is 1 here whatever the output
        module = pymeta.MAML(net, loss="huber", lr=0.1, steps=0, backend="native")
        with using(isa, executor):
            out = module(x, y, x, y)
        wanted = net.double()(x.detach().double())  # in float32 torch's own GELU(inf) is NaN
        assert torch.equal(out.predictions.isnan(), wanted.isnan())
        usable = ~wanted.isnan()
        assert torch.allclose(
            out.predictions[usable].double(), wanted[usable], rtol=16 * EPS[dtype]
        )


@pytest.mark.parametrize("isa", native.isas())
def test_infinity_is_the_same_on_both_executors(isa):
    """Predictions of infinite rows are torch's: what only pads a vector adds no 0 * infinity."""
    net = mlp(3, 5, 2, act=nn.ReLU, dtype=torch.float32)
    with torch.no_grad():
        for p in net.parameters():
            p.abs_()
    xs, ys, xq, yq = batch(inputs=3, dtype=torch.float32)
    xq[1] = math.inf
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=0, backend="native")
    for executor in EXECUTORS:
        with using(isa, executor):
            got = module(xs, ys, xq, yq).predictions
        assert torch.equal(got[1], net(xq[1])) and (got[1] == math.inf).all(), executor


LACKING = {
    # over the zeros of a row that is not there: 1 / sqrt(0)
    "LayerNorm without eps": lambda net, data: setattr(net[1], "eps", 0.0),
    # the square of an error there would overflow
    "large outputs": lambda net, data: [v.add_(1e25) for v in (net[-1].bias, data[1], data[3])],
    # a task that has diverged, and no query rows
    "diverged": lambda net, data: data[0][1].fill_(math.nan),
}  # fmt: skip


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("name", LACKING)
def test_rows_that_a_shorter_task_lacks_are_not_there(isa, executor, name):
    """Whatever a network makes of them: nothing of it reaches a loss or a gradient."""
    net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2))
    data = batch(tasks=4, inputs=3, dtype=torch.float32)
    with torch.no_grad():
        LACKING[name](net, data)
    sizes, spoiled = (
        {"support_sizes": [5, 2, 0, 3], "query_sizes": [4, 0, 3, 2]},
        name == "diverged",
    )
    rate = 0.0 if name == "large outputs" else 0.1
    modules = [
        pymeta.MAML(net, loss="mse", lr=rate, steps=1, backend=b) for b in ("native", "torch")
    ]
    with using(isa, executor):
        got = modules[0](*data, **sizes)
        found = gradients(got.loss, *net.parameters())
    wanted = modules[1](*data, **sizes)
    assert got.task_losses[1] == 0 and wanted.task_losses[1] == 0
    assert got.task_losses.isfinite().all()
    assert torch.allclose(got.task_losses, wanted.task_losses, rtol=1e-3)
    if not spoiled:
        assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("isa, executor", PATHS)
def test_relu_of_nan_is_nan(isa, executor):
    for net in (
        mlp(3, 20, 20, 7, act=nn.ReLU),
        nn.Sequential(nn.Linear(3, 18), nn.ReLU()).double(),
    ):
        module = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="native")
        xs, ys, xq, yq = batch(tasks=3, inputs=3, out=net[-1].out_features if len(net) > 2 else 18)
        xq[1, 2, 0] = math.nan
        with using(isa, executor):
            out = module(xs, ys, xq, yq)
        assert out.predictions[1, 2].isnan().all() and out.task_losses[1].isnan()
        assert out.predictions[1, [0, 1, 3]].isfinite().all()
        assert out.predictions[[0, 2]].isfinite().all()
