"""Into which `.grad` `accumulate_grad` adds, and how: what `loss.backward()` does, bit for bit.

The core adds where the tensors are ordinary ones, torch elsewhere.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import batch, mlp
from kernels import same_bits
from torch import nn

import pymeta
from pymeta.backend import into_grad
from pymeta.spec import watch


@pytest.fixture
def by_core(monkeypatch):
    """How many tensors the core has added to, of each time that it did."""
    counts: list[int] = []
    original = into_grad._count_changes

    def spy(tensors):
        counts.append(len(tensors))
        original(tensors)

    monkeypatch.setattr(into_grad, "_count_changes", spy)
    return counts


def prepared(net, data, **options):
    """A learner whose next `accumulate_grad` is a repeat; all `.grad` are None."""
    module = pymeta.MAML(net, loss="mse", steps=2, backend="native", **{"lr": 0.1, **options})
    module.accumulate_grad(*data)
    module.zero_grad()
    return module


def by_backward(module, data):
    """What autograd does; a learner that is made anew repeats nothing."""
    module(*data).loss.backward()


def random_grads(net):
    for p in net.parameters():
        p.grad = torch.randn_like(p)


def one_for_two(net):
    random_grads(net)
    net[0].bias.grad = net[2].bias.grad = torch.randn(6, dtype=net[0].bias.dtype)


def overlapping(net):
    random_grads(net)
    memory = torch.randn(9, dtype=net[0].bias.dtype)
    net[0].bias.grad, net[2].bias.grad = memory[:6], memory[3:]


def of_the_parameter(net):
    random_grads(net)
    net[0].weight.grad = net[0].weight.detach()


def part_of_a_buffer(net):
    random_grads(net)
    net[0].weight.grad = torch.randn(40, dtype=net[0].weight.dtype)[1:13].view(6, 2)


def transposed(net):
    random_grads(net)
    net[2].weight.grad = torch.randn_like(net[2].weight).t()


def that_requires_grad(net):
    random_grads(net)
    net[2].weight.grad.requires_grad_()


def with_a_graph(net):
    random_grads(net)
    net[2].weight.grad = 2 * torch.ones_like(net[2].weight).requires_grad_()


def some_none(net):
    random_grads(net)
    net[2].weight.grad = None


# What is there, and whether the core adds to it.
THERE: dict[str, tuple[Callable[[nn.Module], None], bool]] = {
    "none": (lambda net: None, False),
    "others": (random_grads, True),
    "one for two": (one_for_two, False),
    "overlapping": (overlapping, True),
    "the parameter's own memory": (of_the_parameter, True),
    "part of a buffer": (part_of_a_buffer, True),
    "transposed": (transposed, False),
    "one that requires grad": (that_requires_grad, False),
    "one with a graph": (with_a_graph, False),
    "some none": (some_none, False),
}


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", THERE)
def test_what_is_there_gets_what_backward_adds(name, dtype, by_core, repeats):
    make, is_cores = THERE[name]
    net, data = mlp(2, 6, 6, 2, dtype=dtype), batch(dtype=dtype)
    twin = copy.deepcopy(net)
    module, other = prepared(net, data), prepared(twin, data)
    by_core.clear(), repeats.clear()
    for model in (net, twin):
        torch.manual_seed(1)
        make(model)
    before = [p.grad for p in net.parameters()]
    versions = [g if g is None else g._version for g in before]
    module.accumulate_grad(*data)
    assert repeats == [True]
    assert by_core == ([6] if is_cores else [])
    by_backward(other, data)
    for p, q, grad, version in zip(
        net.parameters(), twin.parameters(), before, versions, strict=True
    ):
        assert same_bits(p.grad.detach(), q.grad.detach())
        assert same_bits(p.detach(), q.detach())
        assert grad is None or (p.grad is grad and grad._version > version)
        assert grad is not None or not p.grad.requires_grad


class Backwards(nn.Module):
    """Its parameters are not in the order in which its layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.act, self.first = nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: mlp(2, 6, 2),
    "in another order": Backwards,
    "large": lambda: mlp(2, 130, 180, 180, 2),  # more than is added without letting go of the GIL
}


@pytest.mark.parametrize("per", [None, "layer", "parameter"])
@pytest.mark.parametrize("name", MODELS)
def test_of_any_model_and_learned_rates(name, per, by_core):
    lr = 0.1 if per is None else pymeta.LearnableLR(0.1, per=per)
    net, data = MODELS[name]().float(), batch(dtype=torch.float32)
    module = prepared(net, data, lr=lr)
    other = copy.deepcopy(module)
    for _ in range(3):  # none are there, then some
        module.accumulate_grad(*data)
        by_backward(other, data)
        for p, q in zip(module.parameters(), other.parameters(), strict=True):
            assert same_bits(p.grad, q.grad)
    # Where each element has a rate of its own, those of the others are not repeated, or too large.
    assert (by_core != []) == (name == "plain" or per != "parameter")


def test_frozen_parameters_get_none(by_core):
    net, data = mlp(2, 6, 6, 2), batch()
    net[2].weight.requires_grad_(False)
    module = prepared(net, data)
    for _ in range(2):
        module.accumulate_grad(*data)
    assert net[2].weight.grad is None
    assert by_core == [5]


def check_two_calls(net, data):
    """Two calls leave the gradients that two of `backward` leave."""
    module = prepared(net, data)
    other = copy.deepcopy(module)
    for _ in range(2):
        module.accumulate_grad(*data)
        by_backward(other, data)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert same_bits(p.grad, q.grad)


def test_tensors_large_enough_for_torchs_threads_are_torchs(by_core):
    net, data = mlp(2, 200, 200, 2), batch()
    check_two_calls(net, data)
    assert by_core == []


def test_grads_are_the_callers_own():
    """Those of a call are not the next one's, nor memory that the core writes to again."""
    net, data = mlp(2, 6, 2), batch()
    module = prepared(net, data)
    kept = []
    for _ in range(3):
        module.zero_grad()
        module.accumulate_grad(*data)
        kept += [p.grad for p in net.parameters()]
    wanted = [g.clone() for g in kept]
    for p in net.parameters():
        p.grad.zero_()
    module.accumulate_grad(*batch())
    assert len({g.untyped_storage().data_ptr() for g in kept}) == 12
    assert same_bits(kept[:8], wanted[:8])


@pytest.mark.parametrize("way", ["in place", "to another", "to none", "data"])
def test_what_happens_to_grads_between_calls(way, by_core):
    net, data = mlp(2, 6, 2), batch()
    module = prepared(net, data)
    other = copy.deepcopy(module)
    for _ in range(3):
        for model in (module, other):
            for p in model.parameters():
                if p.grad is None or way == "to none":
                    p.grad = None
                elif way == "in place":
                    p.grad.zero_()
                elif way == "to another":
                    p.grad = torch.full_like(p, 0.5)
                else:
                    p.grad.data = torch.full_like(p, 0.5)  # the same tensor, other memory
        module.accumulate_grad(*data)
        by_backward(other, data)
        for p, q in zip(module.parameters(), other.parameters(), strict=True):
            assert same_bits(p.grad, q.grad)
    assert by_core == ([] if way == "to none" else [4, 4])


def test_autograd_knows_of_the_change():
    net, data = mlp(2, 6, 2), batch()
    module = prepared(net, data)
    module.accumulate_grad(*data)
    grad = net[0].weight.grad
    scale = torch.ones_like(grad).requires_grad_()
    product = (scale * grad).sum()
    module.accumulate_grad(*data)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_grad_of_inference_mode_is_refused_as_by_torch():
    net, data = mlp(2, 6, 2), batch()
    module = prepared(net, data)
    module.accumulate_grad(*data)
    with torch.inference_mode():
        inference = torch.zeros_like(net[0].weight)
    with torch.no_grad():
        net[0].weight.grad = inference
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        module.accumulate_grad(*data)


def test_a_torch_that_counts_changes_one_at_a_time(monkeypatch):
    of_this_torch = into_grad.increment_version

    def one(tensor):
        if not isinstance(tensor, torch.Tensor):
            raise RuntimeError("increment_version expect a Tensor as input")
        of_this_torch(tensor)

    monkeypatch.setattr(into_grad, "increment_version", one)
    count = into_grad._counter()
    tensors = [torch.zeros(2), torch.zeros(3)]
    count(tensors)
    assert [t._version for t in tensors] == [1, 1]


def test_a_torch_without_guards_adds_by_itself(monkeypatch, by_core):
    monkeypatch.setattr(into_grad, "exactly_like", lambda tensors: watch._never)
    net, data = mlp(2, 6, 2), batch()
    check_two_calls(net, data)
    assert by_core == []


def test_what_the_native_split_refuses():
    from pymeta import native

    split = native.extension().Split
    for arguments, words in (
        ((2, [1]), r"dtype: expected 4 \(float32\) or 8 \(float64\), got 2"),
        ((4, [-1]), "sizes: expected at least 0"),
        ((4, [2**60, 1]), "sizes: .* a sum of at most 2\\^60"),
    ):
        with pytest.raises(ValueError, match=words):
            split(*arguments)
    with pytest.raises(ValueError, match="arrays: expected 2 addresses, got 1"):
        split(4, [1, 2]).copy_to([0], 0)
    leaf = nn.Parameter(torch.ones(1))
    leaf.grad = torch.ones(1)
    with pytest.raises(ValueError, match="arrays: expected 2 addresses, got 1"):
        split(4, [1, 2]).add_to_grads([leaf], lambda *_: True, 0)
    assert split(4, [1]).add_to_grads([leaf], lambda *_: False, 0) is None
