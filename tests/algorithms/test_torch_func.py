"""Learners under transforms of torch.func, which the native core lacks: what runs, what says so."""

import pytest
import torch
from helpers import assert_close, batch, gradients, mlp
from torch.func import functional_call, grad, hessian, vmap

import pymeta

LACKS = r"a transform of torch.func .* is at work, which the native core lacks; out\.loss\.backward"


def learner(backend="auto"):
    return pymeta.MAML(mlp(2, 4, 2), loss="mse", lr=0.1, steps=2, backend=backend)


def test_gradients_are_those_of_backward():
    maml, (xs, ys, xq, yq) = learner(), batch()
    xs.requires_grad_()
    *wanted, wanted_xs = gradients(maml(xs, ys, xq, yq).loss, *maml.parameters(), xs)
    xs = xs.detach()

    def loss_of(values):
        return functional_call(maml, values, (xs, ys, xq, yq)).loss

    with pytest.warns(UserWarning, match=LACKS):
        found = grad(loss_of)(dict(maml.named_parameters()))
    assert_close(list(found.values()), wanted)
    assert_close(grad(lambda x: maml(x, ys, xq, yq).loss)(xs), wanted_xs)
    assert maml(xs, ys, xq, yq).loss.grad_fn is not None  # native as before
    assert maml.explain().startswith("native")


@pytest.mark.filterwarnings(f"ignore:.*{LACKS}")
def test_second_derivatives_and_batches_of_calls():
    maml, (xs, ys, xq, yq) = learner(), batch(tasks=1, support=2, query=1)

    def loss(x):
        return maml(xs, ys, x, yq).loss

    step = 1e-4
    slopes = []
    for sign in (1, -1):
        x = xq.clone()
        x[0, 0, 0] += sign * step
        x.requires_grad_()
        slopes += gradients(loss(x), x)
    # truncation is step^2 times a fourth derivative, rounding eps / step: both below 1e-7
    wanted = (slopes[0] - slopes[1]) / (2 * step)
    assert (hessian(loss)(xq)[0, 0, 0] - wanted).abs().max() < 1e-6
    both = torch.stack([xq, xq + 1])
    with torch.no_grad():
        assert_close(vmap(loss)(both), torch.stack([loss(x) for x in both]))


@pytest.mark.filterwarnings(f"ignore:.*{LACKS}")
def test_adapted_models():
    maml, (xs, ys, xq, _) = learner(), batch()
    models = maml.adapt(xs, ys)
    both = torch.stack([xq, xq + 1])
    assert_close(vmap(models)(both), torch.stack([models(x) for x in both]))
    in_it = grad(lambda x: maml.adapt(xs, ys)(x).sum())(xq)  # which carry no graph
    assert in_it.shape == xq.shape


def test_messages_name_what_to_use():
    xs, ys, xq, yq = batch()
    maml = learner("native")
    with pytest.raises(ValueError, match=f'backend="native": {LACKS}'):
        grad(lambda x: maml(x, ys, xq, yq).loss)(xs)
    tune = pymeta.FineTune(mlp(2, 4, 2), loss="mse", lr=0.1, epochs=2, backend="native")
    with pytest.raises(ValueError, match=f'backend="native": {LACKS}'):
        vmap(lambda x: tune(x, ys)(xq))(torch.stack([xs, xs]))
    for backend in ("native", "torch"):
        reptile = pymeta.Reptile(mlp(2, 4, 2), loss="mse", lr=0.1, steps=2, backend=backend)
        with pytest.raises(RuntimeError, match=r"cannot derive: use out\.loss\.backward\(\)"):
            grad(lambda x, r=reptile: r(x, ys).loss)(xs)


def test_a_plan_made_in_a_transform_is_not_kept():
    maml, (xs, ys, xq, yq) = learner("torch"), batch()
    maml.model = mlp(2, 3, 2)
    grad(lambda x: maml(x, ys, xq, yq).loss)(xs)
    maml.backend = "native"
    loss = maml(xs, ys, xq, yq).loss
    maml.backend = "torch"
    assert_close(loss, maml(xs, ys, xq, yq).loss)
