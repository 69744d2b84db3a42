"""pymeta.functional under torch.compile(fullgraph=True): results and gradients are eager ones."""

import pytest
import torch
from helpers import assert_close, batch, mlp, skip_before_torch
from torch import nn

import pymeta
from pymeta import functional as F


def make(net=None, **options):
    net = mlp(2, 4, 2) if net is None else net
    operator = F.Operator(net, **{"loss": "mse", "lr": 0.1, "steps": 2, **options})
    named = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    return operator, named


def leaves(value):
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in leaves(v)]
    if isinstance(value, (list, tuple)):
        return [leaf for v in value for leaf in leaves(v)]
    return [value] if isinstance(value, torch.Tensor) else []


def agree(function, *inputs):
    """Values, and the gradients by all inputs of a sum in which every entry counts differently."""
    skip_before_torch(2, 9, "torch.compile does not trace these calls")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    by, found = [v for v in leaves(inputs) if v.requires_grad], []
    for run in (compiled, function):
        values = leaves(run(*inputs))
        total = sum(
            (v * torch.linspace(0.5, 1.5 + k, v.numel(), dtype=v.dtype).view_as(v)).sum()
            for k, v in enumerate(values)
        )
        grads = ()
        if total.requires_grad:
            grads = torch.autograd.grad(total, by, allow_unused=True, materialize_grads=True)
        found.append([*values, *grads])
    assert_close(*found)
    return len(found[0])


def own(parameters):
    bias = parameters["2.bias"].detach()
    start = bias + torch.randn(3, *bias.shape, dtype=bias.dtype)
    return {**parameters, "2.bias": start.requires_grad_()}


@pytest.mark.parametrize("lists", [False, True])
def test_compile_adapt_and_predict(lists):
    operator, parameters = make()
    xs, ys, xq, _ = batch()
    if lists:
        xs, ys, xq = ([v[t, : t + 2] for t in range(3)] for v in (xs, ys, xq))
    for value in leaves((xs, xq)):
        value.requires_grad_()

    def run(parameters, xs, ys, xq):
        adapted = F.adapt(operator, parameters, xs, ys)
        moved = {n: p + 1 for n, p in adapted.items()}
        return (
            adapted,
            F.predict(operator, moved, xq),
            F.adapt_predict(operator, parameters, xs, ys, xq, steps=1),
        )

    assert agree(run, own(parameters), xs, ys, xq) == (20 if lists else 12)


def test_compile_with_rates():
    operator, parameters = make(lr=pymeta.LearnableLR(0.1, "parameter", per_step=True))
    xs, ys, xq, _ = batch()
    rates = torch.full(operator.rate_shape, 0.1, dtype=torch.float64, requires_grad=True)

    def run(parameters, rates, xs, ys, xq):
        return (
            F.adapt_predict(operator, parameters, xs, ys, xq, rates=rates),
            F.adapt(operator, parameters, xs, ys, rates=rates, anchor=[0.1, 0.2, 0.3]),
        )

    agree(run, own(parameters), rates, xs, ys, xq)


def test_compile_meta_gradients():
    operator, parameters = make()
    data = batch()
    wrt = ("xs", "parameters", "rates", "yq", "anchor", "query_offset")
    anchor = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def run(parameters, *data):
        found = F.meta_gradient(
            operator, parameters, *data, wrt=wrt, step_weights=[0.5, 0.5], anchor=anchor,
            query_offset=data[-1],
        )  # fmt: skip
        return found._asdict()

    detached = {n: p.detach() for n, p in own(parameters).items()}
    assert agree(run, detached, *data) == 4 + len(parameters) + 5


def test_compile_leaves_to_eager_mode_what_is_not_one_operator():
    operator, parameters = make(backend="torch")
    xs, ys, xq, _ = batch()

    def run(parameters):
        return F.adapt_predict(operator, parameters, xs, ys, xq)

    got = torch.compile(run, backend="aot_eager")(parameters)
    assert_close(got, run(parameters))
    assert_close(*(torch.autograd.grad(v.sum(), list(parameters.values()))
                   for v in (got, run(parameters))))  # fmt: skip


def test_compile_images():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    operator, parameters = make(net.double(), backend="native")
    x, y = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64), torch.randn(2, 3, 2).double()

    def run(parameters, x, y):
        return F.adapt_predict(operator, parameters, x, y, x)

    agree(run, parameters, x, y)
