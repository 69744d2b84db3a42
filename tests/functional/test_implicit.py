"""Implicit MAML: against dense solves of eager autograd, closed forms and unrolled steps."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from helpers import assert_close, assert_promised, batch, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import EXECUTORS, PATHS, PROFILE, same_bits, using
from torch import nn
from torch.func import functional_call

import pymeta
from pymeta import functional as F
from pymeta.functional import implicit as solver

BACKENDS = ["native", "torch"]


def in_numpy(value):
    if isinstance(value, dict):
        return {n: v.numpy() for n, v in value.items()}
    return value.numpy()


def make(net, backend="native", strength=2.0, cg_steps=60, steps=6, **options):
    how = pymeta.Implicit(strength, cg_steps, tolerance=0.0)
    options = {"loss": "mse", "lr": 0.1, **options}
    return pymeta.MAML(net, steps=steps, implicit=how, backend=backend, **options)


def weighted_mse(outputs, y, weights=None):
    each = (outputs - y).square().mean(-1)
    return each.mean() if weights is None else (each * weights).sum() / weights.sum()


def dense(net, adapted, phi, support, query, strengths):
    """The implicit gradients of the mean query loss, by eager autograd and a dense solve.

    Returns:
        {name: gradient} by the shared parameters (adapted or not), and [T] each by xs, ys, weights
        and strength.
    """
    shared = dict(net.named_parameters())
    tasks = len(strengths)
    found = {n: torch.zeros_like(p) for n, p in shared.items()}
    rows = []
    for t in range(tasks):
        sizes = [phi[n][t].numel() for n in adapted]
        x, y, w = (v[t].detach().requires_grad_() for v in support)
        at = torch.cat([phi[n][t].flatten() for n in adapted]).detach().requires_grad_()
        fixed = {n: p.detach().clone().requires_grad_() for n, p in shared.items()
                 if n not in adapted}  # fmt: skip

        def theta(flat, t=t, sizes=sizes, fixed=fixed):
            parts = flat.split(sizes)
            return {**fixed, **{n: p.view_as(phi[n][t])
                                for n, p in zip(adapted, parts, strict=True)}}  # fmt: skip

        def loss(flat, x=x, y=y, w=w, theta=theta):
            return weighted_mse(functional_call(net, theta(flat), (x,)), y, w)

        judged = weighted_mse(functional_call(net, theta(at), (query[0][t],)), query[1][t])
        v, *by_fixed = torch.autograd.grad(judged / tasks, [at, *fixed.values()])
        hessian = torch.autograd.functional.hessian(loss, at)
        eye = torch.eye(len(at), dtype=at.dtype)
        solved = torch.linalg.solve(eye + hessian / strengths[t], v)
        (g,) = torch.autograd.grad(loss(at), at, create_graph=True)
        line = -(g * solved).sum() / strengths[t]
        by = [*fixed.values(), x, y, w]
        mixed = torch.autograd.grad(line, by, allow_unused=True, materialize_grads=True)
        for n, part in zip(adapted, solved.split(sizes), strict=True):
            found[n] += part.view_as(found[n])
        for n, direct, through in zip(fixed, by_fixed, mixed, strict=False):
            found[n] += direct + through
        start = torch.cat([shared[n].flatten() for n in adapted])
        strength = -(solved * (at - start)).sum() / strengths[t]
        rows.append([*mixed[len(fixed) :], strength])
    return found, [torch.stack(values) for values in zip(*rows, strict=True)]


def problem(tasks=3):
    support = (*batch(tasks=tasks)[:2], 0.2 + torch.rand(tasks, 5).double())
    return support, batch(tasks=tasks)[2:]


@pytest.mark.parametrize("executor", [*EXECUTORS, "emulated"])
@pytest.mark.parametrize("adapt", [None, ["2.*"], ["0.bias", "2.weight"]])
def test_gradients_of_every_input_are_those_of_a_dense_solve(executor, adapt):
    if executor not in {e for _, e in PATHS}:
        pytest.skip("this build does not emulate blocks")
    net, (support, query) = mlp(2, 3, 2), problem()
    strengths = torch.tensor([3.0, 4.0, 9.0]).double().requires_grad_()
    for value in support:
        value.requires_grad_()
    for backend in BACKENDS if executor == "rows" else ["native"]:
        module = make(net, backend, adapt=adapt)
        xs, ys, ws = support
        with using(executor=executor):
            out = module(xs, ys, *query, support_weights=ws, anchor=strengths)
            by = [*net.parameters(), *support, strengths]
            got = torch.autograd.grad(out.loss, by)
        phi = module.adapt(xs.detach(), ys.detach(), support_weights=ws.detach(),
                           anchor=strengths.detach()).parameters  # fmt: skip
        names = module._plan.adapted
        shared, rows = dense(net, names, phi, support, query, strengths.detach())
        assert_close(got, [*shared.values(), *rows], terms=10**5)  # a solve, of condition < 20


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_operator_has_the_learners_implicit_gradients(backend, arrays):
    net, (support, (xq, yq)) = mlp(2, 3, 2), problem()
    module, (xs, ys, ws) = make(net, backend), support
    operator = F.Operator(
        net, loss="mse", lr=0.1, steps=6, implicit=module.implicit, backend=backend
    )
    strengths, offset = torch.tensor([3.0, 4.0, 9.0]).double(), torch.randn_like(ys)
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    convert = in_numpy if arrays else lambda v: v
    data = [convert(v.clone()) for v in (xs, ys, xq)]
    inputs = {"support_weights": ws, "support_offset": offset, "anchor": strengths}
    given = {n: convert(v.clone()) for n, v in inputs.items()}
    names = ("xs", *inputs)
    found = F.meta_gradient(
        operator, convert(parameters), *data, convert(yq), **given, wrt=("parameters", *names)
    )
    into = {n: torch.randn(3, *p.shape).double() for n, p in parameters.items()}
    product = F.vjp(operator, convert(parameters), *data[:2], **given, adapted=convert(into))
    for value in (xs, *inputs.values()):
        value.requires_grad_()
    out = module(xs, ys, xq, yq, **inputs)
    wanted = torch.autograd.grad(out.loss, [*net.parameters(), xs, *inputs.values()])
    got = [*found.gradients.values(), *(found.input_gradients[n] for n in names)]
    assert_promised([torch.as_tensor(g) for g in got], wanted, backend)
    phi = module.adapt(xs, ys, **inputs, create_graph=True)
    wanted = torch.autograd.grad(list(phi.values()), list(net.parameters()), list(into.values()))
    assert_promised([torch.as_tensor(g) for g in product.gradients.values()], wanted, backend)
    adapted = F.adapt(operator, convert(parameters), *data[:2], **given)
    outputs = F.predict(operator, {**convert(parameters), **adapted}, data[2])
    assert_promised(torch.as_tensor(outputs), out.predictions.detach(), backend)


def test_what_an_operator_with_implicit_gradients_is_not_made_of():
    how = {"loss": "mse", "lr": 0.1, "steps": 2, "implicit": pymeta.Implicit(2.0)}
    with pytest.raises(ValueError, match="implicit: expected a torch"):
        F.Operator([("linear", 2, 1, True)], **how)
    with pytest.raises(ValueError, match="anchor: expected none with implicit"):
        F.Operator(mlp(2, 3, 1), **how, anchor=1.0)
    operator = F.Operator(mlp(2, 3, 2), **how)
    parameters = {n: p.detach() for n, p in mlp(2, 3, 2).named_parameters()}
    with pytest.raises(ValueError, match="rates: expected constants with implicit"):
        F.meta_gradient(operator, parameters, *batch(), wrt=["rates"])
    with pytest.raises(ValueError, match="step_weights: expected none with implicit"):
        F.meta_gradient(operator, parameters, *batch(), step_weights=[0.5, 0.5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_what_unrolled_steps_converge_to(backend):
    net, (support, query) = mlp(2, 3, 2), problem()
    module = make(net, backend, steps=400, lr=0.2)
    unrolled = pymeta.MAML(net, loss="mse", lr=0.2, steps=400, anchor=2.0, backend="native")
    own = {"0.weight": (net[0].weight + 0.1 * torch.randn(3, 3, 2).double()).detach()}
    found = []
    for maml in (module, unrolled):
        start = {"0.weight": own["0.weight"].clone().requires_grad_()}
        adapted = maml.adapt(*support[:2], start=start, create_graph=True)
        out = maml(*support[:2], *query, start=start)
        total = out.predictions.square().sum() + (out.task_losses * torch.arange(3)).sum()
        total = total + sum(p.sin().sum() for p in adapted.values())
        by = [start["0.weight"], net[0].bias, net[2].weight]
        found.append(torch.autograd.grad(total, by))
    # both have converged: gradient descent by 0.2 times the pull of 2 in each step
    assert_close(*found, terms=10**5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ridge_regression_has_its_closed_form(backend):
    """phi = (2/n X'X + s)^-1 (2/n X'y + s theta), so that dphi/dtheta = s (2/n X'X + s)^-1."""
    net = nn.Linear(3, 1, bias=False).double()
    xs, ys = torch.randn(2, 6, 3).double(), torch.randn(2, 6, 1).double()
    module = make(net, backend, strength=1.5, cg_steps=3, steps=800)
    adapted = module.adapt(xs, ys, create_graph=True)["weight"]
    flow = torch.randn(2, 1, 3).double()
    (got,) = torch.autograd.grad((adapted * flow).sum(), [net.weight])
    wanted = torch.zeros(3).double()
    for t in range(2):
        matrix = 2 / 6 * xs[t].T @ xs[t] + 1.5 * torch.eye(3).double()
        right = 2 / 6 * xs[t].T @ ys[t, :, 0] + 1.5 * net.weight[0]
        assert_close(adapted[t, 0], torch.linalg.solve(matrix, right), terms=10**4)
        wanted += 1.5 * torch.linalg.solve(matrix, flow[t, 0])
    assert_close(got[0], wanted, terms=10**4)


@st.composite
def calls(draw):
    form = draw(st.sampled_from(["uniform", "padded", "list"]))
    return {
        "form": form,
        "tasks": draw(st.sampled_from([1, 2, 5, 17])),
        "adapt": draw(st.sampled_from([None, ["2.*"], ["*.bias"]])),
        "optimizer": draw(st.sampled_from([
            pymeta.SGD(0.1), pymeta.SGD(0.05, momentum=0.9), pymeta.Adam(0.02),
            pymeta.SGD(0.1, clip_norm=0.5),
        ])),
        "loss": draw(st.sampled_from(["mse", "cross_entropy", "huber"])),
        "act": draw(st.sampled_from([nn.Tanh, nn.ReLU, nn.Softplus])),
        "output": draw(st.sampled_from(["loss", "task_losses", "predictions", "adapted"])),
        "own": draw(st.booleans()),
        "anchor": draw(st.booleans()),
        "weights": draw(st.booleans()),
        "inputs": draw(st.booleans()),
        "cg_steps": draw(st.sampled_from([1, 2, 5])),
        "seed": draw(st.integers(0, 2**31)),
    }  # fmt: skip


@settings(PROFILE, max_examples=40)
@given(calls())
def test_random_calls_are_the_references(call):
    torch.manual_seed(call["seed"])
    tasks, out = call["tasks"], 2
    net = mlp(3, 4, out, act=call["act"])
    data = batch(call["loss"], tasks=tasks, inputs=3, out=out)
    weights, options = 0.1 + torch.rand(tasks, 5).double(), {}
    sizes = torch.randint(1, 6, (tasks,)).tolist(), torch.randint(1, 5, (tasks,)).tolist()
    if call["inputs"]:
        for value in (data[0], data[2], weights):
            value.requires_grad_()
    leaves = [v for v in (data[0], data[2]) if v.requires_grad]
    if call["weights"]:
        options["support_weights"] = weights
        leaves += [weights] * weights.requires_grad
    args = list(data)
    if call["form"] == "padded":
        options |= {"support_sizes": sizes[0], "query_sizes": sizes[1]}
    elif call["form"] == "list":
        cut = lambda v, s: [v[t, :n] for t, n in enumerate(s)]  # noqa: E731
        args = [cut(v, sizes[k // 2]) for k, v in enumerate(data)]
        if call["weights"]:
            options["support_weights"] = cut(weights, sizes[0])
    if call["own"]:
        start = net[0].weight.detach() + 0.1 * torch.randn(tasks, 4, 3).double()
        options["start"] = {"0.weight": start.requires_grad_()}
        leaves.append(start)
    if call["anchor"]:
        options["anchor"] = (1 + torch.rand(tasks).double()).requires_grad_()
        leaves.append(options["anchor"])
    flow = {}
    found = []
    for backend in BACKENDS:
        how = pymeta.Implicit(3.0, call["cg_steps"], tolerance=0.0)
        module = pymeta.MAML(net, loss=call["loss"], optimizer=call["optimizer"], steps=3,
                             adapt=call["adapt"], implicit=how, backend=backend)  # fmt: skip
        supports = {n: v for n, v in options.items() if not n.startswith("query")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if call["output"] == "adapted":
                values = list(module.adapt(*args[:2], **supports, create_graph=True).values())
            else:
                values = getattr(module(*args, **options), call["output"])
                values = values if isinstance(values, list) else [values]
            total = sum((v * flow.setdefault(k, torch.randn_like(v))).sum()
                        for k, v in enumerate(values))  # fmt: skip
            by = [*net.parameters(), *leaves]
            grads = torch.autograd.grad(total, by, allow_unused=True, materialize_grads=True)
        found.append([*values, *grads])
    # CG's products amplify a rounding by the condition of the system, which is below 100 here
    assert_close(*found, terms=10**6)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_tasks_gradient_is_its_own(executor, monkeypatch):
    """The same bits in any company: no sum of the solver goes over tasks."""
    net, (support, query) = mlp(2, 5, 2).float(), problem(tasks=50)
    support, query = ([v.float() for v in side] for side in (support, query))
    start = {n: (p + 0.1 * torch.randn(50, *p.shape)).detach() for n, p in net.named_parameters()}
    module = make(net, cg_steps=4)

    def own(tasks):
        mine = {n: p[tasks].requires_grad_() for n, p in start.items()}
        out = module(*(v[tasks] for v in (*support[:2], *query)), start=mine)
        return torch.autograd.grad(out.task_losses.sum(), list(mine.values()))

    with using(executor=executor, threads=1):
        wanted = own(list(range(50)))
    monkeypatch.setattr(solver, "_BLOCK", 1)  # blocks as small as can be: 32 tasks a thread
    for tasks, threads in itertools.product(([4], [47, 2, 40], list(range(50))), (1, 3)):
        with using(executor=executor, threads=threads):
            got = own(tasks)
        assert same_bits(got, [w[tasks] for w in wanted]), (tasks, threads)


def test_tasks_are_done_at_their_own_time():
    """Each stops where its residual is small enough, whatever the others still have to do."""
    matrices = torch.stack([torch.eye(6), torch.diag(torch.arange(1.0, 7)), torch.eye(6) * 3])
    matrices, v, calls = matrices.double(), torch.randn(3, 6).double(), []

    def product(u):
        calls.append(u)
        return [torch.einsum("tij,tj->ti", matrices, u[0])]

    x, one = torch.empty_like(v), torch.empty_like(v)
    solver.Solver(pymeta.Implicit(1.0, 20, tolerance=1e-12))(product, [v], [x])
    assert_close(x, torch.linalg.solve(matrices, v))
    assert 6 <= len(calls) <= 8
    solver.Solver(pymeta.Implicit(1.0, 1))(product, [v], [one])
    assert_close(one[[0, 2]], torch.linalg.solve(matrices, v)[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_minimum_is_told(backend):
    """A loss that curves downwards by more than the pull: a gradient of first order, and a word."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh()).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    xs, ys = torch.ones(2, 3, 1).double(), torch.full((2, 3, 1), -50.0).double()
    xs[1], ys[1] = 0.1, 0.1
    how = pymeta.Implicit(0.5, 3)
    module = pymeta.MAML(net, loss="mse", lr=1e-9, steps=1, implicit=how, backend=backend)
    start = {"0.weight": torch.ones(2, 1, 1).double().requires_grad_()}
    adapted = module.adapt(xs, ys, start=start, create_graph=True)["0.weight"]
    with pytest.warns(UserWarning, match="implicit: the loss of 1 of 2 tasks, .* curves downwards"):
        (grad,) = torch.autograd.grad(adapted.sum(), [start["0.weight"]])
    assert float(grad[0]) == 1.0 and 0 < float(grad[1]) != 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tasks_no_rows_no_grad(backend):
    net, data = mlp(2, 3, 2), batch()
    module = make(net, backend)
    out = module(*(v[:0] for v in data))
    out.loss.backward()
    assert float(out.loss) == 0 and not any(p.grad.any() for p in net.parameters())
    xs, ys, xq, yq = data
    still = module(xs[:, :0], ys[:, :0], xq, yq)
    plain = pymeta.MAML(net, loss="mse", lr=0.1, steps=0, backend=backend)(xs, ys, xq, yq)
    for mine, other in zip(*(torch.autograd.grad(o.loss, list(net.parameters()))
                             for o in (still, plain)), strict=True):  # fmt: skip
        assert_close(mine, other)
    with torch.no_grad():
        assert not module(*data).loss.requires_grad
    assert module(xs, ys, xq).loss is None


def test_accumulating_copying_and_compiling():
    net, data = mlp(2, 3, 2), batch()
    module = make(net)
    wanted = torch.autograd.grad(module(*data).loss, list(net.parameters()))
    module.accumulate_grad(*data)
    assert_close([p.grad for p in net.parameters()], wanted)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)),
                  torch.compile(module, backend="aot_eager")):  # fmt: skip
        assert other.implicit == module.implicit
        by = list(other.parameters())
        assert_close(torch.autograd.grad(other(*data).loss, by), wanted)
    first = torch.autograd.grad(module(*data).loss, list(net.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(first[0].sum(), list(net.parameters()))
    assert module.adapter().anchor == 2.0 and "Implicit" in repr(module)


def test_a_parameter_changed_in_place_does_not_matter_but_an_input_does():
    net, data = mlp(2, 3, 2), batch()
    module = make(net)
    wanted = torch.autograd.grad(module(*data).task_losses.sum(), list(net.parameters()))
    out = module(*data)
    with torch.no_grad():  # the solution depends on what was adapted to alone
        net[0].weight.mul_(0.5)
    assert_close(torch.autograd.grad(out.loss * 3, list(net.parameters())), wanted)
    out = module(*data)
    data[0].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place after the call"):
        out.loss.backward()


REFUSED = {
    "first order": ("first_order: expected none with implicit", {"first_order": True}),
    "clip": ("task_clip: expected none with implicit", {"task_clip": 1.0}),
    "anchor": ("anchor: expected none with implicit", {"anchor": 1.0}),
    "anchor rows": ("anchor_rows: expected none with implicit", {"anchor_rows": 5.0}),
    "learnable": ("lr: expected a number with implicit", {"lr": pymeta.LearnableLR(0.1)}),
    "decay": ("optimizer: expected no weight_decay with implicit",
              {"lr": None, "optimizer": pymeta.SGD(0.1, weight_decay=0.1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_it_is_refused(name):
    message, options = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make(mlp(2, 3, 2), **options)


def test_normalisations_that_do_not_go_with_it_are_refused():
    norm, data = nn.BatchNorm1d(3), batch()
    net = nn.Sequential(nn.Linear(2, 3), norm, nn.Tanh(), nn.Linear(3, 2)).double()
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="expected no batch normalisation that tracks"):
            make(net, backend)(*data)
    found = []
    for backend in BACKENDS:
        module = make(net.eval(), backend, cg_steps=3)
        found.append(torch.autograd.grad(module(*data).loss, list(net.parameters())))
    assert_close(*found, terms=10**6)


def test_what_a_call_cannot_have_is_refused():
    net, data = mlp(2, 3, 2), batch()
    for backend in BACKENDS:
        module = make(net, backend)
        for message, options in (
            ("step_weights: expected none with implicit", {"step_weights": [0.5] * 6}),
            ("lr: expected constants with implicit", {"lr": torch.ones(3, requires_grad=True)}),
            ("anchor: task 1: expected a number > 0", {"anchor": torch.tensor([1.0, 0.0, 1.0])}),
            ("anchor: task 2: expected a finite", {"anchor": torch.tensor([1.0, 1.0, -1.0])}),
        ):
            with pytest.raises(ValueError, match=message):
                module(*data, **options)
        module.task_clip = 1.0
        with pytest.raises(ValueError, match="task_clip: expected none with implicit"):
            module(*data)
    with pytest.raises(AttributeError, match="implicit cannot be set"):
        module.implicit = None
    with pytest.raises(TypeError, match=r"implicit: expected a pymeta.Implicit, got float"):
        pymeta.MAML(net, loss="mse", lr=0.1, steps=1, implicit=2.0)
    for wrong, error in ((0.0, ValueError), (-1.0, ValueError), ("2", TypeError)):
        with pytest.raises(error, match=r"Implicit.strength: expected a finite number > 0"):
            pymeta.Implicit(wrong)
    with pytest.raises(ValueError, match=r"Implicit.cg_steps: expected an integer >= 1"):
        pymeta.Implicit(1.0, 0)
