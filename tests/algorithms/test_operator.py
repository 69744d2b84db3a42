"""The inner loop as a differentiable operator: every input's gradient, from every output's.

Random combinations are held to the float64 reference on every path, as test_kernels.py does; small
ones to finite differences, to eager loops and to closed forms.
"""

import itertools

import pytest
import torch
from cases import FACTORED, LIN, Case, cases, compare_problem, is_factored
from flows import OUTPUTS, Flows, OperatorProblem
from helpers import LOSSES, MORE_LOSSES, assert_close, batch, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import EXECUTORS, ISAS, PATHS, PROFILE, same_bits, using
from torch import nn
from torch.func import functional_call

import pymeta
from pymeta.spec.losses import describe_loss

# ---- random combinations ------------------------------------------------------------------------

INPUTS = (
    "xs", "ys", "support_weights", "support_offset", "anchor", "rates", "xq", "yq",
    "query_weights", "query_offset",
)  # fmt: skip


@st.composite
def operator_problems(draw, tasks=(1, 2, 3, 5, 17, 20)):
    case = draw(cases(tasks=tasks, losses=(*LOSSES, *MORE_LOSSES), beside=draw(st.booleans())))
    of_steps = case.steps > 0
    outputs = tuple(o for o in OUTPUTS if draw(st.booleans()) and (of_steps or o != OUTPUTS[-1]))
    outputs = outputs or ("predictions",)
    targets = bool({"loss", "task_losses", "step_losses"} & set(outputs)) or draw(st.booleans())
    rates = case.lr in (None, "network", "layer") and draw(st.booleans())
    step_weights = targets and of_steps and (draw(st.booleans()) or "step_losses" in outputs)
    flows = Flows(outputs, draw(st.booleans()), rates, step_weights, targets)
    return OperatorProblem(case, flows)


def test_random_flows_against_the_reference():
    seen = set()

    @settings(PROFILE, max_examples=60)
    @given(operator_problems())
    def check(problem):
        compare_problem(problem)
        found = problem.results(problem.module(torch.float32))
        seen.update(problem.flows.outputs, (n for n in INPUTS if n in found))
        if problem.support.weights is not None and problem.support.weights.ndim > 2:
            seen.add("elements")
        if problem.measures_some:
            seen.add("some rows measured")

    check()
    assert seen == {*OUTPUTS, *INPUTS, "elements", "some rows measured"}


@pytest.mark.parametrize("outputs", [("predictions",), ("task_losses",), ("loss", "predictions")])
@pytest.mark.parametrize("form", ["uniform", "list"])
def test_flows_through_a_factored_first_layer(outputs, form):
    """A wide first layer is never materialised: neither are its gradients of predictions."""
    case = Case(FACTORED, tasks=9, support=16, query=6, form=form, lr="network", steps=3,
                input_gradients=False, weights=form == "list", seed=2)  # fmt: skip
    problem = OperatorProblem(case, Flows(outputs, targets=outputs != ("predictions",)))
    assert is_factored(problem, 16)
    compare_problem(problem)


@settings(PROFILE, max_examples=15)
@given(operator_problems(tasks=(3, 8, 17, 33)), ISAS)
def test_a_tasks_gradients_are_its_own(problem, isa):
    """Gradients of a task's own start, rate, rows: bitwise the same in any company, on any path."""
    flows = problem.flows
    problem.flows = Flows(
        tuple(o for o in flows.outputs if o != "loss") or ("predictions",),
        True, flows.rates, flows.step_weights, flows.targets,
    )  # fmt: skip
    module = problem.module(torch.float32)
    every = list(range(problem.case.tasks))
    shuffled = torch.randperm(problem.case.tasks).tolist()

    def own(found, tasks):
        parts = [found[n] for n in INPUTS if n in found]
        parts += [v for n, v in found.get("gradients", {}).items() if n != "lr"]
        return [part[t] for part in parts for t in tasks]

    with using(isa, "rows", 1):
        wanted = problem.results(module)
    for executor, threads in itertools.product(EXECUTORS, (1, 3)):
        with using(isa, executor, threads):
            got = problem.results(module)
            permuted = problem.results(module, shuffled)
        assert same_bits(own(got, every), own(wanted, every)), (executor, threads)
        assert same_bits(own(permuted, every), own(wanted, shuffled)), (executor, threads)


# ---- finite differences -------------------------------------------------------------------------


def small(loss="mse", tasks=2, out=2, dtype=torch.float64):
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, out)).to(dtype)
    xs, ys, xq, yq = (torch.randn(tasks, n, w, dtype=dtype) for n, w in
                      ((4, 2), (4, out), (3, 2), (3, out)))  # fmt: skip
    if loss == "bce_with_logits":
        ys, yq = ys.sigmoid(), yq.sigmoid()
    columns = () if loss == "bce_with_logits" else (out,)  # of weights: rows', or single targets'
    weights = [0.2 + torch.rand(tasks, n, *columns, dtype=dtype) for n in (4, 3)]
    start = {n: p.detach() + 0.1 * torch.randn(tasks, *p.shape, dtype=dtype)
             for n, p in net.named_parameters()}  # fmt: skip
    rates = 0.1 + 0.2 * torch.rand(tasks, dtype=dtype)
    return net, (xs, ys, xq, yq), weights, start, rates


@pytest.mark.parametrize("executor", [*EXECUTORS, "emulated"])
@pytest.mark.parametrize("loss", ["mse", "bce_with_logits"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_gradcheck_of_every_input(executor, loss, output):
    net, data, (ws, wq), start, rates = small(loss)
    if (None, executor) not in [(None, e) for _, e in PATHS]:
        pytest.skip("this build does not emulate blocks")
    offsets = [torch.randn(2, n, 2, dtype=torch.float64) for n in (4, 3)]
    anchor = torch.tensor([0.5, 1.5], dtype=torch.float64)
    inputs = [*data, ws, wq, *offsets, anchor, rates, *start.values()]
    for value in inputs:
        value.requires_grad_()

    def call(xs, ys, xq, yq, ws, wq, offset, query_offset, anchor, rates, *own):
        named = dict(zip(start, own, strict=True))
        options = {"support_weights": ws, "support_offset": offset, "start": named, "lr": rates,
                   "anchor": anchor}  # fmt: skip
        if output == "adapted":
            return tuple(module.adapt(xs, ys, **options, create_graph=True).values())
        options |= {"query_weights": wq, "query_offset": query_offset}
        if output == "step_losses":
            options["step_weights"] = [0.0, 0.0]
        return getattr(module(xs, ys, xq, yq, **options), output)

    module = pymeta.MAML(net, loss=loss, lr=0.1, steps=2, backend="native")
    with using(executor=executor):
        assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_second_derivative_is_refused(output):
    net, (xs, ys, xq, yq), *_ = small()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="native")
    if output == "adapted":
        value = next(iter(module.adapt(xs, ys, create_graph=True).values())).sum()
    else:
        value = getattr(module(xs, ys, xq, yq, step_weights=[1.0]), output).sum()
    first = torch.autograd.grad(value, list(net.parameters()), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(first[0].sum(), list(net.parameters()), allow_unused=True)


@pytest.mark.parametrize("output", OUTPUTS)
def test_gradgradcheck_is_refused_for_every_input(output):
    """Nobody gets a wrong second derivative: by any input, there is none, in words."""
    net, (xs, ys, xq, yq), (ws, wq), start, rates = small()
    inputs = {"xs": xs, "ys": ys, "support_weights": ws, "lr": rates, "start": start["0.weight"]}
    inputs["support_offset"] = torch.ones_like(ys)
    if output != "adapted":
        inputs |= {"xq": xq, "query_offset": torch.ones_like(yq)}
    if output not in ("adapted", "predictions"):
        inputs |= {"yq": yq, "query_weights": wq}
    options = {"step_weights": [0.5, 0.5]} if output == "step_losses" else {}
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend="native")

    def call(name):
        def run(value):
            given = {**inputs, name: value}
            given["start"] = {"0.weight": given["start"]}
            if output == "adapted":
                return tuple(module.adapt(**given, create_graph=True).values())
            if output == "predictions":
                return module(**given).predictions
            return getattr(module(**given, **options), output)

        return run

    for name, value in inputs.items():
        leaf = value.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.gradgradcheck(call(name), [leaf])


# ---- closed forms -------------------------------------------------------------------------------


def test_one_step_of_a_linear_model():
    """theta' = theta - 2 lr / n X^T (X theta - y): the adapted weights' derivatives by hand."""
    net = nn.Linear(3, 1, bias=False).double()
    xs, ys = torch.randn(1, 5, 3).double(), torch.randn(1, 5, 1).double().requires_grad_()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="native")
    v = torch.randn(1, 1, 3).double()
    adapted = module.adapt(xs, ys, create_graph=True)["weight"]
    by_theta, by_y = torch.autograd.grad((adapted * v).sum(), [net.weight, ys])
    x, scale = xs[0], 2 * 0.1 / 5
    assert_close(by_theta, v[0] - scale * v[0] @ x.T @ x)
    assert_close(by_y[0, :, 0], scale * x @ v[0, 0])


@pytest.mark.parametrize("path", PATHS, ids="-".join)
def test_what_flows_into_the_losses_of_steps(path):
    """Weights of one's own of them: the gradient is that of the same weights as an argument."""
    net, data, *_ = small(tasks=3)
    module = pymeta.MAML(net, loss="mse", lr=pymeta.LearnableLR(0.1), steps=3, backend="native")
    by = list(module.parameters())
    with using(*path):
        out = module(*data, step_weights=[1.0, 1.0, 1.0])
        weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
        own = (weights @ out.step_losses).mean()
        got = torch.autograd.grad(own, [*by, weights], retain_graph=True)
        wanted = module(*data, step_weights=weights.detach())
        assert_close(own, wanted.loss)
        assert_close(got[:-1], torch.autograd.grad(wanted.loss, by))
        assert_close(got[-1], out.step_losses.mean(1))
        both = torch.autograd.grad(out.loss + own, by)
        twice = module(*data, step_weights=weights.detach() + 1).loss
        assert_close(both, torch.autograd.grad(twice, by))


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "quantile", "gaussian_nll"])
def test_weights_of_single_targets_at_0(path, loss):
    """The gradient at 0 is the target's, or 0 where its loss is no number: it is no target then."""
    net = mlp(2, 4, 4)
    columns = describe_loss(loss).target_columns(4)
    xs, xq = torch.randn(3, 5, 2).double(), torch.randn(3, 4, 2).double()
    ys, yq = (torch.rand(3, n, columns).double() for n in (5, 4))
    ws, wq = torch.rand_like(ys) + 0.2, torch.rand_like(yq) + 0.2
    for w, y in ((ws, ys), (wq, yq)):
        w[:, 0], w[:, 1, 0] = 0.0, 0.0
        y[0, 0, 0], y[1, 1, 0] = float("nan"), float("inf")
    ws[2] = 0.0
    options = {"support_weights": ws.requires_grad_(), "query_weights": wq.requires_grad_()}
    found = []
    for backend in ("torch", "native"):
        module = pymeta.MAML(net, loss=loss, lr=0.1, steps=2, backend=backend)
        with using(*path):
            out = module(xs, ys, xq, yq, **options)
            plain = module(xs, ys, xq, yq, support_weights=ws.detach(), query_weights=wq.detach())
            assert_close(out.task_losses, plain.task_losses)
            found.append(torch.autograd.grad(out.loss, [ws, wq]))
    assert_close(*found)
    for grad in found[1]:
        assert grad[0, 0, 0] == 0 and grad[1, 1, 0] == 0
    assert (found[1][1][:, 0] != 0).sum() == 3 * columns - 1


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_gradients_by_no_rows_are_empty(backend):
    net, (xs, ys, xq, yq) = mlp(2, 4, 2), batch()
    none = [v[:, :0].clone().requires_grad_() for v in (xq, yq, yq, yq)]
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend=backend)
    out = module(xs, ys, *none[:2], query_weights=none[2], query_offset=none[3])
    found = torch.autograd.grad(out.loss, [*net.parameters(), *none], materialize_grads=True,
                                allow_unused=True)  # fmt: skip
    assert [g.shape for g in found[-4:]] == [v.shape for v in none]
    assert out.loss == 0 and not any(g.any() for g in found)


def test_the_last_step_alone_is_the_default():
    net, data, *_ = small()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=3, backend="native")
    plain, weighed = module(*data), module(*data, step_weights=[0.0, 0.0, 1.0])
    assert_close(weighed.task_losses, plain.task_losses)
    assert same_bits(weighed.step_losses[2], plain.task_losses)
    with torch.no_grad():
        for k in range(3):
            alone = module(*data, steps=k + 1).task_losses
            assert same_bits(weighed.step_losses[k], alone)
            assert same_bits(module(*data, step_weights=[0.2, 0.3, 0.5]).step_losses[k], alone)


@pytest.mark.parametrize("lr", [0.1, pymeta.LearnableLR(0.1), pymeta.LearnableLR(0.1, "parameter")])
@pytest.mark.parametrize("executor", [e for _, e in PATHS if e])
def test_task_clip_is_the_mean_of_clipped_gradients(lr, executor):
    net, data, *_ = small(tasks=5)
    options = {"loss": "mse", "lr": lr, "steps": 2}
    each = []
    single = pymeta.MAML(net, **options, backend="torch")
    by = list(single.parameters())
    for t in range(5):
        out = single(*(d[t : t + 1] for d in data))
        each.append(torch.autograd.grad(out.loss, by))
    norms = [torch.stack([g.square().sum() for g in gs]).sum().sqrt() for gs in each]
    clip = float(torch.stack(norms).median())
    wanted = [
        sum(gs[i] * min(1.0, clip / (float(n) + 1e-6)) for gs, n in zip(each, norms, strict=True))
        / 5
        for i in range(len(by))
    ]
    for backend in ("native", "torch"):
        module = pymeta.MAML(net, **options, task_clip=clip, backend=backend)
        with using(executor=executor):
            got = torch.autograd.grad(module(*data).loss, list(module.parameters()))
        assert_close(got, wanted)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_task_clip_leaves_what_is_a_tasks_own_alone(backend):
    """Gradients by a task's own start, rate and rows are not summed over tasks, nor clipped."""
    net, (xs, ys, xq, yq), (ws, wq), start, rates = small(tasks=3)
    own = [xs, ys, xq, yq, ws, wq, rates, start["0.weight"]]
    for value in own:
        value.requires_grad_()
    options = {"start": {"0.weight": own[-1]}, "lr": rates, "support_weights": ws,
               "query_weights": wq}  # fmt: skip
    found = []
    for clip in (None, 1e-3):
        module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, task_clip=clip, backend=backend)
        out = module(xs, ys, xq, yq, **options)
        found.append(torch.autograd.grad(out.loss, [*own, net[0].bias]))
    (*free, free_bias), (*got, bias) = found
    assert_close(got, free)
    assert 0 < bias.norm() <= 1e-3 < free_bias.norm()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_task_clip_is_of_the_loss_alone(backend):
    """What flows through other results would go around it, so it is refused."""
    net, (xs, ys, xq, yq), *_ = small(tasks=3)
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, task_clip=0.1, backend=backend)
    weights = torch.ones(2, dtype=xs.dtype)
    out = module(xs, ys, xq, yq, step_weights=weights)
    for result in (
        out.task_losses,
        out.predictions,
        out.step_losses,
        out.loss + out.task_losses[0],
    ):
        with pytest.raises(ValueError, match=r"^task_clip: limits tasks' shares"):
            torch.autograd.grad(result.sum(), net[0].weight, retain_graph=True)
    assert torch.autograd.grad(out.loss, net[0].weight)[0].norm() <= 0.1
    ragged = module(list(xs), list(ys), list(xq), list(yq)).predictions
    with pytest.raises(ValueError, match=r"^task_clip: limits"):
        ragged[0].sum().backward()
    adapted = module.adapt(xs, ys, create_graph=True)
    with pytest.raises(ValueError, match=r"^task_clip: limits"):
        adapted["0.weight"].sum().backward()
    module.task_clip = None
    module(xs, ys, xq, yq).task_losses.sum().backward()
    module.adapt(xs, ys, create_graph=True)["0.weight"].sum().backward()


# ---- patterns -----------------------------------------------------------------------------------


def eager(net, start, xs, ys, xq, lr, steps):
    """One task by hand: the outputs on xq after some steps of gradient descent."""
    theta = start
    for _ in range(steps):
        loss = nn.functional.mse_loss(functional_call(net, theta, (xs,)), ys)
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta = {n: p - lr * g for (n, p), g in zip(theta.items(), grads, strict=True)}
    return functional_call(net, theta, (xq,))


def test_a_learned_map_in_front_of_the_inner_loop():
    """DoubleAdapt (Zhao et al. 2023): features and targets are mapped before the inner loop."""
    net, (xs, ys, xq, yq), *_ = small(tasks=3, out=1)
    feature, target = nn.Linear(2, 2).double(), nn.Linear(1, 1).double()
    by = [*net.parameters(), *feature.parameters(), *target.parameters()]
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend="native")
    predictions = module(feature(xs), target(ys), feature(xq)).predictions
    inverse = (predictions - target.bias) / target.weight
    got = torch.autograd.grad((inverse - yq).square().mean(), by)
    named = dict(net.named_parameters())
    wanted = torch.stack([
        eager(net, named, feature(xs[t]), target(ys[t]), feature(xq[t]), 0.1, 2) for t in range(3)
    ])  # fmt: skip
    wanted = (wanted - target.bias) / target.weight
    assert_close(got, torch.autograd.grad((wanted - yq).square().mean(), by))


def test_a_start_made_by_a_network():
    """A hypernetwork: each task's start is the shared one plus what a network makes of the task."""
    net, (xs, ys, xq, yq), *_ = small(tasks=3, out=1)
    sizes = {n: p.numel() for n, p in net.named_parameters()}
    hyper = nn.Linear(2, sum(sizes.values())).double()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend="native")
    by = [*net.parameters(), *hyper.parameters()]

    def starts():
        parts = hyper(xs.mean(1)).split(list(sizes.values()), dim=1)
        return {
            n: p + 0.1 * part.view(3, *p.shape)
            for (n, p), part in zip(net.named_parameters(), parts, strict=True)
        }

    got = torch.autograd.grad(module(xs, ys, xq, yq, start=starts()).loss, by)
    own = starts()
    losses = [
        nn.functional.mse_loss(
            eager(net, {n: v[t] for n, v in own.items()}, xs[t], ys[t], xq[t], 0.1, 2), yq[t]
        )
        for t in range(3)
    ]
    assert_close(got, torch.autograd.grad(torch.stack(losses).mean(), by))


def test_the_worst_tasks_alone():
    """CVaR over tasks: the mean of the losses beyond a quantile."""
    net, data, *_ = small(tasks=6)
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend="native")
    losses = module(*data).task_losses
    worst = losses.detach().topk(2).indices
    got = torch.autograd.grad(losses[worst].mean(), list(net.parameters()))
    alone = module(*(d[worst] for d in data)).loss
    assert_close(got, torch.autograd.grad(alone, list(net.parameters())))


# ---- what is said of mistakes -------------------------------------------------------------------

BAD = {
    "start no mapping": (TypeError, r"start: expected \{name: tensor", {"start": [1.0]}),
    "start unknown": (ValueError, r"start: there is no parameter 'w'",
                      {"start": {"w": torch.ones(2)}}),
    "start shape": (ValueError, r"start\['0.bias'\]: expected shape \[2, 3\]",
                    {"start": {"0.bias": torch.ones(3)}}),
    "start type": (TypeError, r"start\['0.bias'\]: expected a tensor", {"start": {"0.bias": 1.0}}),
    "lr shape": (ValueError, r"lr: expected shape \[2\] or \[2, 1\]", {"lr": torch.ones(3)}),
    "lr type": (TypeError, r"lr: expected a tensor", {"lr": "high"}),
    "step weights": (ValueError, r"step_weights: expected shape \[2\]", {"step_weights": [1.0]}),
    "step weights not finite": (ValueError, "step_weights: expected finite numbers, got",
                                {"step_weights": [1.0, float("nan")]}),
    "learned step weights": (ValueError, r"step_weights: expected constants",
                             {"step_weights": torch.ones(2, requires_grad=True)}),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name, backend):
    net, data, *_ = small()
    error, message, options = BAD[name]
    with pytest.raises(error, match=message):
        pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend=backend)(*data, **options)


def test_rates_of_elements_are_not_those_of_tasks():
    net, data, *_ = small()
    lr = pymeta.LearnableLR(0.1, "parameter")
    module = pymeta.MAML(net, loss="mse", lr=lr, steps=2, backend="native")
    with pytest.raises(ValueError, match=r"lr: the learnable rates are of each element"):
        module(*data, lr=torch.ones(2))


def test_weights_without_targets_are_refused():
    net, (xs, ys, xq, _), (_, wq), *_ = small()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend="native")
    with pytest.raises(ValueError, match="query_weights: expected None where yq is"):
        module(xs, ys, xq, query_weights=wq)
    with pytest.raises(ValueError, match="step_weights: expected None where yq is"):
        module(xs, ys, xq, step_weights=[0.5, 0.5])


def test_a_parameter_changed_in_place_is_noticed():
    net, data, *_ = small()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend="native")
    out = module(*data)
    with torch.no_grad():
        net[0].weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="changed in place after the call"):
        out.predictions.sum().backward()


def test_predictions_alone_have_no_loss():
    net, (xs, ys, xq, yq), *_ = small()
    for backend in ("native", "torch"):
        module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend=backend)
        out = module(xs, ys, xq)
        assert out.loss is None and out.task_losses is None
        assert_close(out.predictions, module(xs, ys, xq, yq).predictions)


def test_both_ways_of_one_call_may_be_gone():
    """The loss first, then the predictions, with one graph."""
    net, data = mlp(2, 6, 2), batch()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2)
    by = list(net.parameters())
    out = module(*data)
    first = torch.autograd.grad(out.loss, by, retain_graph=True)
    both = torch.autograd.grad(out.loss + out.predictions.sum(), by, retain_graph=True)
    second = torch.autograd.grad(out.predictions.sum(), by)
    assert_close(both, [a + b for a, b in zip(first, second, strict=True)])


def test_a_linear_network_and_no_steps():
    """theta stays: the gradient of the adapted parameters is the cotangent itself."""
    case = Case(((LIN, 3, 2, True),), steps=0, tasks=4)
    problem = OperatorProblem(case, Flows(("adapted",), start=True))
    with using(executor="rows"):
        found = problem.results(problem.module(torch.float64))
    for name, gradient in found["gradients"].items():
        assert same_bits(gradient, problem.flow_adapted[name].double())


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("lr", [0.1, pymeta.LearnableLR(0.1)])
def test_accumulated_gradients_are_those_of_the_loss(backend, lr):
    net, data = mlp(2, 6, 2), batch()
    module = pymeta.MAML(net, loss="mse", lr=lr, steps=2, backend=backend)
    by = list(module.parameters())
    wanted = torch.autograd.grad(module(*data).loss, by)
    for times in range(1, 5):  # the first call, repeats, and sums
        out = module.accumulate_grad(*data)
        assert not any(result.requires_grad for result in out[:3])
        assert_close([p.grad for p in by], [times * g for g in wanted])
    for p in by:
        p.grad = None
    module.accumulate_grad(*data)
    assert_close([p.grad for p in by], wanted)
    assert_close(out.loss, module(*data).loss)
    with pytest.raises(ValueError, match="yq: expected query targets, got None"):
        module.accumulate_grad(*data[:3], None)
    with pytest.raises(TypeError, match="start: accumulate_grad adds to the gradients"):
        module.accumulate_grad(*data, start={})


def test_many_gradients_at_once_are_refused_in_words():
    net, data = mlp(2, 6, 2), batch()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="native")
    out = module(*data)
    flows = torch.ones(2, *out.predictions.shape).double()
    with pytest.raises(RuntimeError, match="one gradient of the results at a time"):
        torch.autograd.grad(
            out.predictions, list(net.parameters()), grad_outputs=flows, is_grads_batched=True
        )


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_strengths_out_of_range_are_refused(backend, create_graph):
    net, (xs, ys, *_) = mlp(2, 6, 2), batch()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend=backend)
    with pytest.raises(ValueError, match="anchor: task 1: expected a finite number >= 0"):
        module.adapt(xs, ys, anchor=[1.0, -1.0, 0.0], create_graph=create_graph)
