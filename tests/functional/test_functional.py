"""pymeta.functional: the learners' own results, by tensors and by arrays, natively and in torch."""

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import Problem, cases
from helpers import assert_close, batch, mlp, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import OPTIMIZERS, PROFILE, same_bits
from torch import nn

import pymeta
from pymeta import functional as F

BACKENDS = ["native", "torch"]
DATA = ("xs", "ys", "xq", "yq")


def make(net=None, **options):
    """An operator, and the parameters of its network."""
    net = mlp(2, 4, 2) if net is None else net
    operator = F.Operator(net, **{"loss": "mse", "lr": 0.1, "steps": 2, **options})
    return operator, {n: p.detach().clone() for n, p in net.named_parameters()}


def of_tasks(parameters, tasks=3):
    """Values of each task's own."""
    return {n: p + 0.1 * torch.randn(tasks, *p.shape, dtype=p.dtype) for n, p in parameters.items()}


def in_numpy(value):
    if isinstance(value, torch.Tensor):
        return value.detach().numpy()
    if isinstance(value, dict):
        return {n: in_numpy(v) for n, v in value.items()}
    return [in_numpy(v) for v in value] if isinstance(value, (list, tuple)) else value


def flat(value):
    """All arrays of a tree, as tensors."""
    if isinstance(value, dict):
        return [part for v in value.values() for part in flat(v)]
    if isinstance(value, (list, tuple)):
        return [part for v in value for part in flat(v)]
    return [] if value is None else [torch.as_tensor(value)]


def equal(got, wanted, backend="native"):
    got, wanted = flat(got), flat(wanted)
    assert same_bits(got, wanted) if backend == "native" else not assert_close(got, wanted)


# ---- the same as the learners -------------------------------------------------------------------


def as_operator(problem: Problem, module: pymeta.MAML) -> F.Operator:
    case = problem.case
    lr = pymeta.LearnableLR(problem.rate, case.lr, case.per_step) if case.lr else problem.rate
    pull = {"one": {"anchor": 0.75}, "rows": {"anchor_rows": 3.0}}.get(case.anchor, {})
    return F.Operator(
        module.model, **pull, loss=problem.loss, optimizer=OPTIMIZERS[case.optimizer](lr),
        steps=case.steps, first_order=case.first_order, adapt=problem.adapt, backend="native",
    )  # fmt: skip


@settings(PROFILE, max_examples=40)
@given(cases(tasks=(1, 3, 17), beside=True))
def test_random_calls_have_the_learners_bits(case):
    problem = Problem(case)
    module = problem.module(torch.float32)
    wanted = problem.results(module)
    operator = as_operator(problem, module)
    parameters = {n.removeprefix("model."): p.detach() for n, p in module.named_parameters()}
    rates = parameters.pop("lr", None)
    support, query = (s.to(torch.float32) for s in (problem.support, problem.query))
    data, options = problem.arguments(support, query)
    inputs = ["xs", "xq"] * case.input_gradients + ["rates"] * (case.lr is not None)
    for convert in (lambda v: v, in_numpy):
        p, d = convert(parameters), convert(data)
        o = {n: convert(v) for n, v in options.items()}
        found = F.meta_gradient(
            operator, p, *d, **o, rates=convert(rates), wrt=("parameters", *inputs)
        )
        sizes = problem.query.sizes
        equal([found.loss, found.task_losses], [wanted["loss"], wanted["task_losses"]])
        equal([v[:n] for v, n in zip(found.predictions, sizes, strict=True)],
              wanted["predictions"])  # fmt: skip
        equal([found.gradients[n.removeprefix("model.")] for n in wanted["gradients"]],
              wanted["gradients"])  # fmt: skip
        for name in inputs:
            got = found.input_gradients[name]
            if isinstance(got, list):
                side = support if name == "xs" else query
                got = [torch.nn.functional.pad(
                    torch.as_tensor(g), [0, 0] * (side.x.ndim - 2) + [0, side.x.shape[1] - len(g)]
                ) for g in got]  # fmt: skip
                got = torch.stack(got)
            equal(got, wanted["lr" if name == "rates" else name])
        adapt_options = {n: v for n, v in o.items() if not n.startswith("query")}
        adapted = F.adapt(operator, p, *d[:2], rates=convert(rates), **adapt_options)
        equal(adapted, wanted["adapted"])


@settings(PROFILE, max_examples=25)
@given(cases(tasks=(1, 3, 17), beside=True), st.sampled_from(["predictions", "adapted"]))
def test_random_products_have_autograds_bits(case, flows):
    """Without a graph, by tensors and by arrays: what autograd finds through the same functions."""
    problem = Problem(case)
    module = problem.module(torch.float32)
    operator = as_operator(problem, module)
    parameters = {n.removeprefix("model."): p.detach() for n, p in module.named_parameters()}
    rates = parameters.pop("lr", None)
    if case.seed % 2:
        parameters = {n: p + 0.1 * torch.randn(case.tasks, *p.shape)
                      for n, p in parameters.items()}  # fmt: skip
    support, query = (s.to(torch.float32) for s in (problem.support, problem.query))
    arguments, options = problem.arguments(support, query)
    data, options = arguments[:3], {n: v for n, v in options.items() if n != "query_weights"}
    if flows == "adapted":
        data = data[:2]
        options = {n: v for n, v in options.items() if not n.startswith("query")}
    leaves = {n: p.clone().requires_grad_() for n, p in parameters.items()}
    run = F.adapt_predict if flows == "predictions" else F.adapt
    made = run(operator, leaves, *data, **options, rates=rates)
    values = flat(made)
    into = [torch.randn_like(v) for v in values]
    wanted = torch.autograd.grad(values, list(leaves.values()), into, allow_unused=True,
                                 materialize_grads=True)  # fmt: skip
    flow = dict(zip(made, into, strict=True)) if isinstance(made, dict) else into
    flow = into[0] if isinstance(made, torch.Tensor) else flow
    for convert in (lambda v: v, in_numpy):
        found = F.vjp(
            operator, convert(parameters), *map(convert, data), rates=convert(rates),
            **{n: convert(v) for n, v in options.items()}, **{flows: convert(flow)},
        )  # fmt: skip
        equal(found.gradients, list(wanted))


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_functions_agree_with_each_other(backend, arrays):
    operator, shared = make(backend=backend, loss="cross_entropy")
    xs, ys, xq, _ = batch("cross_entropy")
    own = {"0.weight": of_tasks(shared)["0.weight"]}
    offset, lr = torch.randn(3, 4, 2).double(), torch.tensor([0.1, 0.2, 0.3]).double()
    convert = in_numpy if arrays else lambda v: v
    parameters = convert({**shared, **own})
    xs, ys, xq, offset, lr = map(convert, (xs, ys, xq, offset, lr))
    adapted = F.adapt(operator, parameters, xs, ys, lr=lr)
    assert {n: tuple(v.shape) for n, v in adapted.items()} == {
        n: (3, *s) for n, s in operator.shapes.items()
    }
    got = F.predict(operator, {**parameters, **adapted}, xq, query_offset=offset)
    wanted = F.adapt_predict(operator, parameters, xs, ys, xq, lr=lr, query_offset=offset)
    assert type(got) is type(wanted) is (np.ndarray if arrays else torch.Tensor)
    equal(got, wanted, backend)
    equal(F.predict(operator, parameters, list(xq)),
          list(F.adapt_predict(operator, parameters, xs, ys, xq, steps=0)), backend)  # fmt: skip
    ragged = [xq[0], xq[1][:2], xq[2][:0]]
    equal(F.predict(operator, {**parameters, **adapted}, ragged),
          F.adapt_predict(operator, parameters, xs, ys, ragged, lr=lr), backend)  # fmt: skip


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["uniform", "padded", "list"])
def test_vjp_is_autograds(form, backend, arrays):
    operator, shared = make(backend=backend)
    data, options = list(batch()), {}
    parameters = {**shared, "2.bias": of_tasks(shared)["2.bias"]}
    weights, lr = 0.2 + torch.rand(3, 5).double(), 0.1 + torch.rand(3).double()
    flow, losses = torch.randn(3, 4, 2).double(), torch.randn(3).double()
    sizes = [4, 2, 3]
    if form == "list":
        data = [[v[t, :n] for t, n in enumerate(sizes)] for v in data]
        weights, flow = ([v[t, :n] for t, n in enumerate(sizes)] for v in (weights, flow))
    elif form == "padded":
        options = {"support_sizes": sizes, "query_sizes": sizes}
        flow = flow * (torch.arange(4) < torch.tensor(sizes)[:, None])[..., None]
    into = {"0.weight": torch.randn(3, 4, 2).double()}
    offset = [torch.randn_like(v) for v in data[3]] if form == "list" else torch.randn_like(data[3])
    anchor, steps = torch.rand(3).double(), torch.randn(2, 3).double()
    names = (*DATA, "support_weights", "lr", "query_offset", "anchor")
    convert = in_numpy if arrays else lambda v: v
    got = F.vjp(
        operator, *(convert(v) for v in (parameters, *data)), **options,
        support_weights=convert(weights), lr=convert(lr), task_losses=convert(losses),
        predictions=convert(flow), adapted=convert(into), wrt=("parameters", *names),
        step_weights=convert(steps[:, 0]), step_losses=convert(steps), query_offset=convert(offset),
        anchor=convert(anchor),
    )  # fmt: skip

    every = [*flat(parameters), *flat(data), *flat(weights), lr, *flat(offset), anchor]
    for value in every:
        value.requires_grad_()
    net = mlp(2, 4, 2)
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend="torch")
    shared_left = {n: p for n, p in parameters.items() if n != "2.bias"}
    for n, p in shared_left.items():
        net.get_parameter(n).data.copy_(p.detach())
    start = {n: p if n == "2.bias" else p.expand(3, *p.shape) for n, p in parameters.items()}
    both = {"support_weights": weights, "lr": lr, "start": start, "anchor": anchor}
    out = module(*data, **options, **both, step_weights=steps[:, 0], query_offset=offset)
    supports = {n: v for n, v in options.items() if n.startswith("support")}
    adapted = module.adapt(*data[:2], **supports, **both, create_graph=True)
    total = (out.step_losses * steps).sum()
    total += (out.task_losses * losses).sum() + (adapted["0.weight"] * into["0.weight"]).sum()
    total = total + sum((p * f).sum() for p, f in zip(out.predictions, flow, strict=True))
    wanted = torch.autograd.grad(total, every)
    assert_close(flat([got.gradients, [got.input_gradients[n] for n in names]]), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    operator, shared = make(mlp(2, 3, 1), backend=backend)
    xs, ys, xq, _ = batch(tasks=2, out=1)
    parameters = {**shared, "0.weight": of_tasks(shared, 2)["0.weight"]}
    inputs = [xs, ys, xq, *parameters.values()]
    for value in inputs:
        value.requires_grad_()

    def predictions(xs, ys, xq, *values):
        named = dict(zip(parameters, values, strict=True))
        adapted = F.adapt(operator, named, xs, ys)
        return (
            F.adapt_predict(operator, named, xs, ys, xq),
            F.predict(operator, {**named, **adapted}, xq),
            *adapted.values(),
        )

    assert torch.autograd.gradcheck(predictions, inputs)
    if backend == "native":
        value = F.adapt_predict(operator, parameters, xs, ys, xq).sum()
        first = torch.autograd.grad(value, inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(first[0].sum(), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_0_whose_gradient_is_wanted_count(backend):
    operator, parameters = make(backend=backend)
    data, weights = batch(), torch.rand(3, 5).double()
    weights[:, 1] = 0
    for convert in (lambda v: v, in_numpy):
        found = F.meta_gradient(operator, convert(parameters), *map(convert, data),
                                support_weights=convert(weights),
                                wrt=["support_weights"])  # fmt: skip
        assert torch.as_tensor(found.input_gradients["support_weights"])[:, 1].abs().min() > 0
        assert found.gradients == {}


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clip_is_of_meta_gradients_alone(backend, arrays):
    operator, shared = make(backend=backend, task_clip=1e-3)
    plain, _ = make(mlp(2, 4, 2), backend=backend)
    convert = in_numpy if arrays else lambda v: v
    own = {"0.bias": of_tasks(shared)["0.bias"]}
    parameters, data = convert({**shared, **own}), [convert(v) for v in batch()]
    found = F.meta_gradient(operator, parameters, *data, wrt=("parameters", "xs"))
    free = F.meta_gradient(plain, parameters, *data, wrt=("parameters", "xs"))
    clipped = torch.cat([v.flatten() for v in flat({n: found.gradients[n] for n in shared
                                                     if n not in own})])  # fmt: skip
    assert 0 < clipped.norm() <= 1e-3
    # what is a task's own is nobody else's business
    equal(found.gradients["0.bias"], free.gradients["0.bias"], backend)
    equal(found.input_gradients["xs"], free.input_gradients["xs"], backend)
    options = {"task_losses": convert(torch.ones(3).double())}
    equal(F.vjp(operator, parameters, *data, **options).gradients,
          F.vjp(plain, parameters, *data, **options).gradients, backend)  # fmt: skip


def test_no_tasks_and_no_steps():
    operator, parameters = make()
    data = [v[:0] for v in batch()]
    for convert in (lambda v: v, in_numpy):
        found = F.meta_gradient(operator, convert(parameters), *map(convert, data))
        assert float(found.loss) == 0 and found.predictions.shape == (0, 4, 2)
        assert all(not torch.as_tensor(g).any() for g in found.gradients.values())
        adapted = F.adapt(operator, convert(parameters), *map(convert, data[:2]))
        assert adapted["0.weight"].shape == (0, 4, 2)
        assert F.predict(operator, convert(parameters), convert(data[2])).shape == (0, 4, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [(), (2,)])
def test_no_tasks_have_no_step_sizes_of_their_own(backend, columns):
    operator, parameters = make(lr=pymeta.LearnableLR(0.1, "layer"), backend=backend)
    data, lr = [v[:0] for v in batch()], batch()[0].new_zeros(0, *columns)
    for convert in (lambda v: v, in_numpy):
        given = (operator, convert(parameters), *map(convert, data))
        found = F.meta_gradient(*given, lr=convert(lr), wrt=["lr"])
        assert found.input_gradients["lr"].shape == lr.shape
        assert float(found.loss) == 0


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions_after_rows_of_no_weight(backend, arrays):
    operator, parameters = make(backend=backend)
    (xs, ys, xq, _), convert = batch(), in_numpy if arrays else lambda v: v
    weights = torch.ones(xs.shape[:2], dtype=xs.dtype)
    weights[:, 0] = 0
    given = [convert(v) for v in (parameters, xs, ys, xq)]
    found = F.adapt_predict(operator, *given, support_weights=convert(weights))
    given = [convert(v) for v in (parameters, xs[:, 1:], ys[:, 1:], xq)]
    assert_close(flat(found), flat(F.adapt_predict(operator, *given)))


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_that_exclude_each_other(backend, arrays):
    operator, parameters = make(backend=backend)
    convert = in_numpy if arrays else lambda v: v
    parameters, (xs, ys, xq, yq) = convert(parameters), [convert(v) for v in batch()]
    both = {"lr": convert(torch.ones(3).double()), "rates": convert(torch.ones(1).double())}
    for call in (
        lambda: F.adapt(operator, parameters, xs, ys, **both),
        lambda: F.adapt_predict(operator, parameters, xs, ys, xq, **both),
        lambda: F.meta_gradient(operator, parameters, xs, ys, xq, yq, **both),
    ):
        with pytest.raises(ValueError, match="lr, rates: expected one of them"):
            call()
    with pytest.raises(ValueError, match=r"task_losses, predictions, adapted, .*: expected at"):
        F.vjp(operator, parameters, xs, ys, adapted={})
    flow = convert(torch.ones(2, 3).double())
    with pytest.raises(ValueError, match="step_losses: expected None, for the call has no step_w"):
        F.vjp(operator, parameters, xs, ys, xq, yq, step_losses=flow)
    with pytest.raises(ValueError, match="wrt: anchor: the call has none"):
        F.meta_gradient(operator, parameters, xs, ys, xq, yq, wrt=["anchor"])


def test_copies_of_an_operator_do_the_same():
    operator, parameters = make(lr=pymeta.LearnableLR(0.1, "parameter", per_step=True))
    data = batch()
    wanted = F.meta_gradient(operator, parameters, *data, wrt=["rates"])
    for other in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        for convert in (lambda v: v, in_numpy):
            got = F.meta_gradient(other, convert(parameters), *map(convert, data), wrt=["rates"])
            equal(got.input_gradients, wanted.input_gradients)


# ---- networks that the native core lacks, images ------------------------------------------------


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        return self.layer(x) + x.sum(-1, keepdim=True)


@pytest.mark.parametrize("arrays", [False, True])
def test_other_networks_run_in_torch(arrays):
    net = Odd().double()
    operator, parameters = make(net, loss="cross_entropy")
    data = batch("cross_entropy", out=3)
    convert = in_numpy if arrays else lambda v: v
    with pytest.warns(UserWarning, match=r"pymeta.functional runs in torch") as caught:
        found = F.meta_gradient(operator, convert(parameters), *map(convert, data))
    assert caught[0].filename == __file__
    module = pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=2, backend="torch")
    out = module(*data)
    assert_close(flat(found.gradients), torch.autograd.grad(out.loss, list(net.parameters())))
    assert_close(torch.as_tensor(F.predict(operator, convert(parameters), convert(data[2]))),
                 torch.stack([net(x) for x in data[2]]))  # fmt: skip
    with pytest.raises(ValueError, match='backend="native": Odd: sum has no native'):
        F.Operator(net, loss="mse", lr=0.1, steps=1, backend="native")


@pytest.mark.parametrize("arrays", [False, True])
def test_images_of_any_size(arrays):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(3, 2))  # fmt: skip
    operator, parameters = make(net, backend="native")
    convert = in_numpy if arrays else lambda v: v
    for side in (6, 9):
        x, y = torch.randn(2, 4, 1, side, side), torch.randn(2, 4, 2)
        found = F.meta_gradient(operator, convert(parameters), *map(convert, (x, y, x, y)))
        out = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend="native")(x, y, x, y)
        equal(found.gradients, torch.autograd.grad(out.loss, list(net.parameters())))


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_running_statistics_are_the_modules_and_stay(arrays, train):
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    net.train(train)
    operator, parameters = make(net, backend="native")
    data, convert = batch(), in_numpy if arrays else lambda v: v
    out = pymeta.MAML(copy.deepcopy(net), loss="mse", lr=0.1, steps=2, backend="native")(*data)
    for _ in range(2):
        found = F.meta_gradient(operator, convert(parameters), *map(convert, data))
        equal(found.task_losses, out.task_losses)
    equal(F.adapt_predict(operator, convert(parameters), *map(convert, data[:3])), out.predictions)


def test_float32_and_float64_of_one_operator():
    operator, parameters = make()
    xs, ys, xq, _ = batch()
    single = {n: p.float() for n, p in parameters.items()}
    got = F.adapt_predict(operator, single, xs.float(), ys.float(), xq.float())
    assert_close(got, F.adapt_predict(operator, parameters, xs, ys, xq))


# ---- what is said of mistakes -------------------------------------------------------------------

BAD = {
    "no mapping": (TypeError, r"parameters: expected \{name: array\}, got list",
                   {"parameters": lambda p: list(p.values())}),
    "missing": (ValueError, r"parameters: '0.weight' is missing",
                {"parameters": lambda p: {n: v for n, v in p.items() if n != "0.weight"}}),
    "unknown": (ValueError, r"parameters: there is no 'w'",
                {"parameters": lambda p: {**p, "w": p["0.bias"]}}),
    "shape": (ValueError, r"parameters\['0.bias'\]: expected shape \[4\], or \[3, 4\] where",
              {"parameters": lambda p: {**p, "0.bias": p["0.bias"][:2]}}),
    "wrt": (ValueError, "wrt: expected some of parameters", {"wrt": ["zs"]}),
    "wrt text": (TypeError, "wrt: expected a list of names, got str", {"wrt": "xs"}),
    "wrt absent": (ValueError, "wrt: query_weights: the call has none",
                   {"wrt": ["query_weights"]}),
    "wrt lr": (ValueError, "wrt: lr: the call has none", {"wrt": ["lr"]}),
    "rates": (ValueError, r"rates: expected shape \[1\], got \[2\]",
              {"rates": torch.ones(2).double()}),
    "lr": (ValueError, r"lr: expected shape \[3\] or \[3, 1\]", {"lr": torch.ones(2).double()}),
    "steps": (ValueError, "steps: expected an integer >= 0", {"steps": -1}),
    "step weights": (ValueError, r"step_weights: expected shape \[2\]", {"step_weights": [1.0]}),
    "no targets": (ValueError, "yq: expected query targets", {"yq": None}),
    "tasks": (ValueError, "xq: expected 3 tasks", {"xq": torch.randn(2, 4, 2).double(),
                                                   "yq": torch.randn(2, 4, 2).double()}),
}  # fmt: skip


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name, arrays):
    error, message, wrong = BAD[name]
    operator, parameters = make()
    convert = in_numpy if arrays else lambda v: v
    changed = wrong.get("parameters", lambda p: p)(convert(parameters))
    data = {n: convert(v) for n, v in zip(DATA, batch(), strict=True)}
    data |= {n: convert(v) for n, v in wrong.items() if n != "parameters"}
    with pytest.raises(error, match=message):
        F.meta_gradient(operator, changed, **data)


VJP = {
    "nothing": (ValueError, "step_losses: expected at least one", {}),
    "no yq": (ValueError, "task_losses: expected None, for the call has no yq",
              {"task_losses": torch.ones(3)}),
    "losses": (ValueError, r"task_losses: expected shape \[3\]",
               {"task_losses": torch.ones(2).double(), "yq": torch.randn(3, 4, 2).double()}),
    "predictions": (ValueError, r"predictions: expected shape \[3, 4, 2\]",
                    {"predictions": torch.ones(3, 4).double()}),
    "adapted": (ValueError, r"adapted: 'w' is not adapted", {"adapted": {"w": torch.ones(3)}}),
    "adapted shape": (ValueError, r"adapted\['0.bias'\]: expected shape \[3, 4\]",
                      {"adapted": {"0.bias": torch.ones(4).double()}}),
}  # fmt: skip


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("name", VJP)
def test_bad_flows_are_named(name, arrays):
    error, message, wrong = VJP[name]
    operator, parameters = make()
    convert = in_numpy if arrays else lambda v: v
    data = [convert(v) for v in batch()[:3]]
    with pytest.raises(error, match=message):
        F.vjp(operator, convert(parameters), *data, **{n: convert(v) for n, v in wrong.items()})


def test_what_an_operator_is_made_of_is_checked():
    options = {"loss": "mse", "lr": 0.1, "steps": 1}
    layers = [("linear", 2, 3, True), ("tanh",)]
    for error, message, network, more in (
        (TypeError, "network: expected a torch.nn.Module", 3, {}),
        (TypeError, "layers: 1: expected a tuple", [*layers[:1], "tanh"], {}),
        (ValueError, "layers: 0: expected one of linear", [("lineal", 2, 3)], {}),
        (ValueError, "layers: 0: .* 3 settings after 'linear', got 2", [("linear", 2, 3)], {}),
        (ValueError, "layers", [*layers, ("linear", 4, 1, True)], {}),
        (ValueError, "loss: .* is a function, which needs a torch module", layers,
         {"loss": lambda o, t: (o - t).square().mean()}),
        (ValueError, "backend: expected a torch.nn.Module", layers, {"backend": "torch"}),
        (ValueError, "adapt: the pattern '9' matches no parameter", layers, {"adapt": ["9"]}),
        (ValueError, "lr, optimizer: expected exactly one of them", layers, {"lr": None}),
        (ValueError, "steps: expected an integer >= 0", layers, {"steps": -1}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            F.Operator(network, **{**options, **more})
    with pytest.raises(TypeError, match="parameters: expected numpy arrays; make the operator"):
        F.predict(
            F.Operator(layers, **options), {"0.weight": torch.ones(3, 2)}, torch.ones(1, 1, 2)
        )
    with pytest.raises(TypeError, match=r"operator: expected a pymeta.functional.Operator"):
        F.predict(mlp(2, 3), {}, torch.ones(1, 1, 2))


def test_labels_have_no_gradient():
    operator, parameters = make(loss="cross_entropy")
    xs, _, xq, _ = batch()
    ys, yq = (targets("cross_entropy", 3, n, out=2) for n in (5, 4))
    for convert in (lambda v: v, in_numpy):
        data = [convert(v) for v in (parameters, xs, ys, xq, yq)]
        with pytest.raises(ValueError, match=r"wrt: ys are .*int64, which have no gradient"):
            F.meta_gradient(operator, *data, wrt=["ys"])
