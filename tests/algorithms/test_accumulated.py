"""`accumulate_grad` where autograd does more: hooks of parameters, modes without grad."""

import pytest
import torch
from helpers import batch, mlp
from kernels import same_bits

import pymeta


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_accumulated_gradients_pass_the_hooks_of_parameters(kind, backend):
    """As those of backward do, in the first call and in repeated ones."""
    net, data = mlp(2, 6, 2), batch()
    module = pymeta.MAML(net, loss="mse", lr=pymeta.LearnableLR(0.1), steps=2, backend=backend)
    hooked = [net[0].weight, module.lr]

    def gradients(call):
        module.zero_grad()
        call()
        return [p.grad.clone() for p in module.parameters()]

    calls = {
        "backward": lambda: module(*data).loss.backward(),
        "first": lambda: module.accumulate_grad(*data),
        "repeated": lambda: module.accumulate_grad(*data),
    }
    plain = gradients(calls["backward"])
    before = gradients(calls["first"]), gradients(calls["repeated"])

    def triple(given):
        if kind == "register_hook":
            return 3 * given
        given.grad.mul_(3)

    handles = [getattr(p, kind)(triple) for p in hooked]
    for name, call in calls.items():
        for p, found, wanted in zip(module.parameters(), gradients(call), plain, strict=True):
            wanted = 3 * wanted if any(p is h for h in hooked) else wanted
            assert same_bits(found, wanted), name
    for handle in handles:
        handle.remove()
    for found in (*before, gradients(calls["repeated"])):
        assert all(same_bits(f, w) for f, w in zip(found, plain, strict=True))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_grad_do_not_change_what_is_accumulated(mode, backend):
    net, data = mlp(2, 6, 2), batch()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend=backend)
    module(*data).loss.backward()
    wanted = [p.grad for p in net.parameters()]
    module.zero_grad()
    for times in range(1, 4):  # the first call, and repeats
        with mode():
            module.accumulate_grad(*data)
        for p, gradient in zip(net.parameters(), wanted, strict=True):
            assert not p.grad.is_inference()
            torch.testing.assert_close(p.grad, times * gradient)
    module.accumulate_grad(*data)  # adds to what was made in the mode


def test_inputs_get_no_gradient_after_calls_of_which_they_wanted_one():
    """A call that could not be prepared took what was prepared of another one for its own."""
    net, (xs, *rest) = mlp(2, 6, 2), batch()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend="native")
    module(xs.requires_grad_(), *rest)
    module.accumulate_grad(xs.detach().transpose(0, 1).contiguous().transpose(0, 1), *rest)
    for _ in range(2):
        module.accumulate_grad(xs, *rest)
    assert xs.grad is None
