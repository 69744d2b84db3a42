"""Implicit gradients under torch.compile(fullgraph=True): results and gradients are eager ones."""

import pytest
import torch
from helpers import assert_close, batch, mlp, skip_before_torch
from torch import nn

import pymeta
from pymeta import functional as F

HOW = pymeta.Implicit(2.0, 4, tolerance=0.0)


def make(net, **options):
    return pymeta.MAML(net, loss="mse", lr=0.1, steps=5, implicit=HOW, **options)


def weighed(value):
    return (value * torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).view_as(value)).sum()


def agree(call, inputs, **options):
    """Values, and the gradients by `inputs` of results whose entries count differently."""
    skip_before_torch(2, 9, "torch.compile does not trace these calls")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, call):
        values = run(**options)
        grads = torch.autograd.grad(sum(map(weighed, values)), inputs, allow_unused=True)
        assert sum(g is not None for g in grads) == len(inputs)
        found.append([*values, *grads])
    assert_close(*found)


@pytest.mark.parametrize("form", ["equal", "padded", "lists"])
def test_a_call_with_all_its_inputs(form):
    net, data = mlp(2, 4, 2), batch()
    module = make(net, adapt=["2.*"])
    weights, anchor = torch.rand(3, 5).double(), 1 + torch.rand(3).double()
    offset, bias = torch.randn(3, 5, 2).double(), torch.randn(3, 2).double()
    weights[0, 1] = 0
    inputs = [*(p for n, p in net.named_parameters() if n != "2.bias"), weights, anchor, offset,
              bias, *data]  # fmt: skip
    for value in inputs:
        value.requires_grad_()
    options = {"support_weights": weights, "support_offset": offset, "anchor": anchor,
               "start": {"2.bias": bias}}  # fmt: skip
    if form == "padded":
        options["support_sizes"] = [2, 5, 3]
    if form == "lists":
        options |= {n: list(options[n]) for n in ("support_weights", "support_offset")}
        data = [list(side) for side in data]

    def call(**options):
        out = module(*data, **options)
        predictions = out.predictions if form == "lists" else [out.predictions]
        return [out.loss, out.task_losses, *predictions]

    agree(call, inputs, **options)


def test_a_call_in_training_and_its_steps():
    skip_before_torch(2, 9, "torch.compile does not trace these calls")
    net, data = mlp(2, 4, 2), batch()
    module = make(net)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    parameters = list(net.parameters())
    for steps in (None, 2):
        for _ in range(2):
            found = [torch.autograd.grad(way(*data, steps=steps).loss, parameters)
                     for way in (compiled, module)]  # fmt: skip
            assert_close(*found)
            with torch.no_grad():
                for p, g in zip(parameters, found[0], strict=True):
                    p -= 0.1 * g


def test_an_operator():
    net, (xs, ys, xq, _) = mlp(2, 4, 2), batch()
    operator = F.Operator(net, loss="mse", lr=0.1, steps=5, implicit=HOW)
    named = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    own = {**named, "2.bias": torch.randn(3, 2).double().requires_grad_()}
    for value in (xs, xq):
        value.requires_grad_()
    for parameters in (named, own):
        by = [*parameters.values(), xs]
        agree(lambda p: list(F.adapt(operator, p, xs, ys).values()), by, p=parameters)
        agree(lambda p: [F.adapt_predict(operator, p, xs, ys, xq)], [*by, xq], p=parameters)
    agree(lambda p: [F.predict(operator, p, xq)], [*own.values(), xq], p=own)


def test_what_is_refused_is_refused_in_eager_words():
    net, data = mlp(2, 4, 2), batch()
    rates = torch.ones(3, dtype=torch.float64, requires_grad=True)
    refused = {"step_weights": [0.2] * 5}, {"lr": rates}
    for options in refused:
        compiled = torch.compile(make(net), backend="aot_eager")
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected .* with implicit"):
            compiled(*data, **options)
    tracks = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match="running statistics with implicit"):
        torch.compile(make(tracks), backend="aot_eager")(*data)


@pytest.mark.parametrize("name", ["minimum", "minimum_vjp"])
@pytest.mark.parametrize("own", [False, True])
def test_opcheck(name, own):
    module = make(mlp(2, 3, 2))
    xs, ys, _, _ = batch()
    xs.requires_grad_()
    parameters = list(module.model.parameters())
    if own:
        parameters[1] = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    anchor = 1 + torch.rand(3, dtype=torch.float64)
    anchor.requires_grad_()
    wanted = [True] * 4 + [False, True] + [False] * 5 + [True, False, False]
    arguments = [
        module._handle, parameters, None, xs, ys, *[None] * 8, anchor, None,
        ["0.bias"] if own else [], [False, False, False, True], 5, 2, wanted,
    ]  # fmt: skip
    if name.endswith("vjp"):  # which cannot be differentiated
        shapes = [p.shape for p in module.model.parameters()]
        arguments += [[torch.randn(3, *shape).double() for shape in shapes] for _ in range(2)]
        arguments = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
    from pymeta.functional import minimum_ops  # noqa: F401 - which defines them

    torch.library.opcheck(getattr(torch.ops.pymeta, name).default, tuple(arguments))
