"""Adapted: T models in one object."""

import copy
import pickle

import pytest
import torch
from helpers import assert_close, batch, mlp, targets
from torch import nn

import pymeta


@pytest.fixture(params=["native", "torch"])
def backend(request):
    return request.param


def make(net, backend, **options):
    return pymeta.MAML(net, backend=backend, **{"loss": "mse", "lr": 0.1, "steps": 2, **options})


def test_predictions_are_those_of_the_call(backend):
    net, (xs, ys, xq, yq) = mlp(2, 4, 2), batch()
    module = make(net, backend)
    for steps in (None, 0, 5):
        models = module.adapt(xs, ys, steps=steps)
        assert_close(models(xq), module(xs, ys, xq, yq, steps=steps).predictions)
    assert len(models) == 3 and models(xq).shape == (3, 4, 2)
    assert not models(xq).requires_grad


def test_backends_agree_with_masks_weights_and_sizes():
    net, (xs, ys, xq, _) = mlp(2, 4, 2), batch()
    options = {"support_sizes": [5, 0, 3], "support_weights": torch.rand(3, 5)}
    for adapt in (None, ["2.*"], []):
        for lr in (0.1, pymeta.LearnableLR(0.1, "parameter", per_step=True)):
            native, wanted = (
                make(net, b, adapt=adapt, lr=lr).adapt(xs, ys, **options)
                for b in ("native", "torch")
            )
            assert list(native.parameters) == [n for n, _ in net.named_parameters()]
            assert_close(list(native.parameters.values()), list(wanted.parameters.values()))
            assert_close(native(xq), wanted(xq))
            sizes = [4, 1, 0]
            assert_close(native(xq, query_sizes=sizes), wanted(xq, query_sizes=sizes))
            lists = [x[:n] for x, n in zip(xq, sizes, strict=True)]
            assert [p.shape for p in native(lists)] == [(n, 2) for n in sizes]
            assert_close(native(lists), wanted(lists))


def test_padding_is_zero(backend):
    xs, ys, xq, _ = batch()
    models = make(mlp(2, 4, 2), backend).adapt(xs, ys)
    got, whole = models(xq, [4, 1, 0]), models(xq)
    for t, n in enumerate((4, 1, 0)):
        assert_close(got[t, :n], whole[t, :n])
        assert not got[t, n:].any()


def test_one_tasks_model(backend):
    net, (xs, ys, xq, _) = mlp(2, 4, 2), batch()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    models = make(net, backend, adapt=["2.*"]).adapt(xs, ys)
    for t, model in enumerate(models):
        assert type(model) is nn.Sequential
        assert_close(model(xq[t]).detach(), models(xq)[t])
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert torch.equal(model[2].weight, models.parameters["2.weight"][t])
    assert_close(models[-1](xq[2]), models[2](xq[2]))
    before = models(xq)
    with torch.no_grad():
        model[2].weight.zero_()
        net[0].weight.zero_()  # neither that copy nor the meta-learned model is this object's
    assert torch.equal(models(xq), before)
    for wrong in (3, -4):
        with pytest.raises(IndexError, match=f"{wrong} is not one of 3 tasks"):
            models[wrong]
    with pytest.raises(TypeError, match="expected an integer, got str"):
        models["0"]


def test_parameters_have_the_layout_of_stack_module_state(backend):
    xs, ys, _, _ = batch()
    net = mlp(2, 4, 2)
    models = make(net, backend, adapt=["0.*"]).adapt(xs, ys)
    stacked, _ = torch.func.stack_module_state(list(models))
    assert list(stacked) == list(models.parameters)
    for name, values in models.parameters.items():
        assert torch.equal(values, stacked[name]) and not values.requires_grad
    assert models.parameters["2.weight"].stride(0) == 0
    assert models.parameters["0.weight"].is_contiguous()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(copier, backend):
    xs, ys, xq, _ = batch()
    net = mlp(2, 4, 2)
    models = make(net, backend, adapt=["0.*"]).adapt(xs, ys)
    twin = copier(models)
    assert torch.equal(twin(xq), models(xq))
    twin.parameters["0.weight"].zero_()
    assert not torch.equal(twin(xq), models(xq))


def test_a_copy_of_a_changed_model_is_refused():
    xs, ys, xq, _ = batch()
    net = mlp(2, 4, 2)
    models = make(net, "native").adapt(xs, ys)
    net.float()
    with pytest.raises(ValueError, match="the model has changed since"):
        copy.deepcopy(models)(xq)
    assert models(xq).dtype == torch.float64


def test_wrong_inputs(backend):
    xs, ys, xq, _ = batch()
    module = make(mlp(2, 4, 2), backend)
    models = module.adapt(xs, ys)
    for error, message, arguments in (
        (ValueError, r"xq: expected 3 tasks, one for each model, got 2", (xq[:2],)),
        (ValueError, r"xq: expected 2 features", (xq[..., :1],)),
        (TypeError, r"xq: expected a tensor", ("xq",)),
        (TypeError, r"xq: expected torch\.float64", (xq.float(),)),
        (ValueError, r"query_sizes.*task 1.*5", (xq, [1, 5, 2])),
        (ValueError, r"query_sizes: expected None where xq is a list", (list(xq), [1, 2, 3])),
    ):
        with pytest.raises(error, match=message):
            models(*arguments)
    with pytest.raises(ValueError, match=r"ys: expected shape"):
        module.adapt(xs, ys[:, 1:])
    with pytest.raises(TypeError, match=r"steps: expected an integer"):
        module.adapt(xs, ys, steps="2")


def test_modules_outside_the_chain():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    net = net.double()
    xs, xq = torch.randn(2, 4, 1, 4, 4).double(), torch.randn(2, 3, 1, 4, 4).double()
    models = make(net, "torch", loss="cross_entropy").adapt(
        xs, targets("cross_entropy", 2, 4, out=3)
    )
    assert models(xq).shape == (2, 3, 3)
    assert_close(models[1](xq[1]).detach(), models(xq)[1])
    assert [p.shape[0] for p in models([xq[0, :2], xq[1]])] == [2, 3]


def test_repr_says_what_it_is(backend):
    models = make(mlp(2, 4, 2), backend).adapt(*batch()[:2])
    assert repr(models) == "Adapted(3 x Sequential)"
