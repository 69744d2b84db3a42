"""The short way through a repeated call: taken where it may be, left where anything differs."""

import gc
import weakref

import pytest
import torch
from helpers import assert_close, batch, gradients, in_threads, mlp
from torch import nn

import pymeta


def make(net, backend="native", **options):
    return pymeta.MAML(net, backend=backend, **{"loss": "mse", "lr": 0.1, "steps": 2, **options})


def same_as_new(module, data, *inputs, **options):
    """A call gives what a module that never was called before gives."""
    got = module(*data)
    lr = module.lr if isinstance(module.lr, float) else pymeta.LearnableLR(0.1)
    wanted = make(module.model, lr=lr, **options)(*data)
    for a, b in zip(got[:3], wanted[:3], strict=True):
        assert torch.equal(a, b)
    parameters = [p for p in module.model.parameters() if p.requires_grad]
    assert_close(
        gradients(got.loss, *parameters, *inputs), gradients(wanted.loss, *parameters, *inputs)
    )


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("lr", [0.1, pymeta.LearnableLR(0.1)])
def test_other_values_are_a_repeat(loss, lr, repeats):
    net = mlp(2, 4, 3)
    module = make(net, loss=loss, lr=lr)
    for _ in range(3):
        same_as_new(module, batch(loss, out=3), loss=loss)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(0.9 if p is not module.lr else 1)
    assert repeats == [True, True]
    with torch.no_grad():
        for _ in range(2):
            assert not module(*batch(loss, out=3)).loss.requires_grad
    same_as_new(module, batch(loss, out=3), loss=loss)
    assert repeats == [True] * 4  # grad enabled or not: each has its own


def test_gradients_of_inputs_and_flattened_inputs(repeats):
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    module = make(net)
    for _ in range(3):
        xs, ys, xq, yq = batch(inputs=4)
        same_as_new(module, (xs.view(3, 5, 2, 2), ys, xq.view(3, 4, 2, 2), yq))
    assert repeats == [True, True]
    for _ in range(3):
        xs, ys, xq, yq = batch(inputs=4)
        same_as_new(module, (xs.requires_grad_(), ys, xq, yq), xs)
    assert repeats == [True, True, False, True, True]


def test_predictions_alone_are_a_repeat_of_their_own(repeats):
    module, flow = make(mlp(2, 4, 3)), torch.randn(3, 4, 3, dtype=torch.float64)
    parameters = list(module.model.parameters())

    def predict(learner, xs, ys, xq):
        predictions = learner(xs, ys, xq).predictions
        return predictions, *torch.autograd.grad(predictions, parameters, flow)

    for _ in range(3):
        data = batch(out=3)
        for got, wanted in zip(
            predict(module, *data[:3]), predict(make(module.model), *data[:3]), strict=True
        ):
            assert torch.equal(got, wanted)
        with torch.no_grad():
            parameters[0].mul_(0.9)
    assert repeats == [True, True]
    for _ in range(2):
        same_as_new(module, data)
        with torch.no_grad():
            assert not module(*data[:3]).predictions.requires_grad
    assert repeats == [True] * 4
    predict(module, *data[:3])
    assert repeats == [True] * 5  # targets and grad make others, which leave this one alone
    assert module(data[0], data[1], data[2][:, :3].contiguous()).predictions.shape == (3, 3, 3)
    assert repeats == [True] * 5 + [False]


def no_memory(like):
    """Zeros as autograd makes them where a derivative is known to vanish: their pointer is null."""
    return torch._efficientzerotensor(like.shape, dtype=like.dtype)


CHANGES = {
    "tasks": lambda d: tuple(v[:2] for v in d),
    "rows": lambda d: (*d[:2], d[2][:, :3].contiguous(), d[3][:, :3].contiguous()),
    "strides": lambda d: (d[0].transpose(0, 1).contiguous().transpose(0, 1), *d[1:]),
    "targets as lists": lambda d: tuple(list(v) for v in d),
    "a subclass": lambda d: (nn.Parameter(d[0], requires_grad=False), *d[1:]),
    "expanded": lambda d: (d[0], d[1][:1].expand(3, 5, 2), *d[2:]),
    "negated": lambda d: (torch.complex(d[0], d[0]).conj().imag, *d[1:]),
    "negated but contiguous": lambda d: (torch._neg_view(d[0]), *d[1:]),
    "negated targets": lambda d: (*d[:3], torch._neg_view(d[3])),
    "zeros without memory": lambda d: (no_memory(d[0]), *d[1:]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_other_forms_are_none(case, repeats):
    module, data = make(mlp(2, 4, 2)), batch()
    module(*data)
    changed = CHANGES[case](data)
    got = module(*changed)
    assert not any(repeats)
    wanted = make(module.model)(*changed)
    assert_close(got.loss, wanted.loss)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "xs: expected torch.float64", lambda d: (d[0].float(), *d[1:])),
        (TypeError, "xs: .*layout", lambda d: (d[0].to_sparse(), *d[1:])),
        (TypeError, "xs: .*layout", lambda d: (d[0][0].to_sparse_csr(), *d[1:])),
        (TypeError, "xs: expected a tensor", lambda d: (d[0].tolist()[0][0][0], *d[1:])),
        (ValueError, "xs: .*got meta", lambda d: (d[0].to("meta"), *d[1:])),
        (ValueError, "yq: expected shape", lambda d: (*d[:3], d[3][..., :1])),
    ],
)
def test_wrong_arguments_raise_after_right_ones(error, message, change):
    module, data = make(mlp(2, 4, 2)), batch()
    module(*data)
    with pytest.raises(error, match=message):
        module(*change(data))
    module(*data)


def test_wrong_labels_are_found_in_a_repeat(repeats):
    module, (xs, ys, xq, yq) = make(mlp(2, 4, 3), loss="cross_entropy"), batch("cross_entropy")
    module(xs, ys, xq, yq)
    yq[1, 2] = 3
    with pytest.raises(ValueError, match=r"yq: task 1, row 2: label 3 is not in 0\.\.2"):
        module(xs, ys, xq, yq)
    yq[1, 2] = 0
    same_as_new(module, (xs, ys, xq, yq), loss="cross_entropy")
    assert repeats == [True, True]  # the one that raised, too


def test_a_changed_model_is_none(repeats):
    net = nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.ELU(), nn.Linear(4, 2)
    ).double()
    module, data = make(net), batch()
    hooks = net[2]._forward_hooks
    changes = {
        "replaced": lambda: setattr(net[0], "weight", nn.Parameter(torch.randn(4, 2).double())),
        "frozen": lambda: net[0].weight.requires_grad_(False),
        "in place transposed": lambda: setattr(
            net[0].weight, "data", net[0].weight.data.t().contiguous().t()
        ),
        "in place negated": lambda: setattr(
            net[0].weight, "data", torch._neg_view(net[0].weight.data)
        ),
        "setting": lambda: setattr(net[2], "alpha", 0.5),
        "training": lambda: net.eval(),
        "layer": lambda: net.__setitem__(2, nn.Tanh()),
        "class": lambda: setattr(net[2], "__class__", nn.Sigmoid),
        "one more": lambda: net.append(nn.Linear(2, 2).double()),
    }
    module(*data)
    for name, change in changes.items():
        module(*data)
        assert repeats[-1], name
        change()
        count = len(repeats)
        same_as_new(module, data)
        assert repeats[count:] == [False], name
    module(*data)
    net[0]._forward_hooks = type(hooks)()  # in which a hook is seen, too
    module(*data)
    assert repeats[-1]
    with pytest.raises(ValueError, match="has hooks"):
        net[0].register_forward_hook(lambda *a: None)
        module(*data)


def test_changed_settings_are_none(repeats):
    module, data = make(mlp(2, 4, 2)), batch()
    for name, value in (("lr", 0.2), ("steps", 3), ("first_order", True)):
        module(*data)
        setattr(module, name, value)
        options = {"steps": module.steps, "first_order": module.first_order}
        count = len(repeats)
        same_as_new(module, data, **options)
        assert True not in repeats[count:]
        same_as_new(module, data, **options)
        assert repeats[-1]
    module.backend = "torch"
    count = len(repeats)
    module(*data)
    assert True not in repeats[count:]


def test_a_tensor_of_one_element_that_is_negated():
    net, one = mlp(1, 3, 1), [torch.randn(1, 1, 1).double() for _ in range(4)]
    module = make(net)
    module(*one)
    assert_close(module(*one).loss, make(net)(*one).loss)
    negated = (torch._neg_view(one[0]), *one[1:])
    assert_close(module(*negated).loss, make(net)(-one[0], *one[1:]).loss)


def test_negated_sizes_and_learnable_rates_are_read_as_they_are():
    net, data = mlp(2, 4, 2), batch()
    sizes, module = torch.tensor([5, 0, 3]), make(net, lr=pymeta.LearnableLR(0.1))
    wanted = module(*data, support_sizes=sizes).loss
    module.lr.data = torch._neg_view(-module.lr.data)
    assert_close(module(*data, support_sizes=torch._neg_view(-sizes)).loss, wanted)


def test_a_learner_and_its_model_go_when_nothing_refers_to_them():
    """Without a circle of references, so that their memory does not wait for the collector."""
    net, data = mlp(2, 4, 2), batch()
    module = make(net, lr=pymeta.LearnableLR(0.1))
    for _ in range(2):
        module(*data).loss.backward()
        with torch.no_grad():
            module(*data)
    gone = [weakref.ref(held) for held in (module, net, net[0].weight, module.lr)]
    gc.collect()
    gc.disable()
    try:
        del module, net
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()


def test_graphs_do_not_share_memory():
    net = mlp(2, 4, 2)
    module, several = make(net), [batch() for _ in range(4)]
    wanted = [gradients(make(net)(*data).loss, *net.parameters()) for data in several]
    outcomes = [module(*data) for data in several]
    for _ in range(2):
        for out, want in zip(outcomes, wanted, strict=True):
            assert_close(gradients(out.loss, *net.parameters()), want)
    first = gradients(outcomes[0].loss, *net.parameters())
    outcomes.clear()
    for data in several:  # memory of graphs that are gone is used again, but none that was given
        found = gradients(module(*data).loss, *net.parameters())
    assert_close(first, wanted[0])
    assert_close(found, wanted[3])


def test_threads_repeat_one_module():
    net = mlp(2, 4, 2)
    module, several = make(net), [batch() for _ in range(4)]
    wanted = [gradients(make(net)(*data).loss, *net.parameters()) for data in several]
    wrong = []

    def work(data, want):
        for _ in range(100):
            found = gradients(module(*data).loss, *net.parameters())
            if not all(map(torch.equal, found, want)):
                wrong.append(found)

    in_threads(work, zip(several, wanted, strict=True))
    assert not wrong


def test_batched_backward_and_default_devices():
    net = mlp(2, 4, 2)
    module, data = make(net), batch()
    for _ in range(2):
        with torch.device("meta"):
            loss = module(*data).loss
            adapted = module.adapt(*data[:2])(data[2])
        assert loss.device.type == adapted.device.type == "cpu"
    once = gradients(loss, *net.parameters())
    parameters, scales = list(net.parameters()), torch.tensor([1.0, 2.0]).double()
    found = torch.autograd.grad(loss, parameters, scales, is_grads_batched=True)
    assert_close([f[1] for f in found], [2 * g for g in once])


def test_transforms_of_torch_func_are_refused():
    module, data = make(mlp(2, 4, 2)), batch()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a transform of torch\.func"):
            torch.func.vmap(lambda s: module(*data).loss * s)(torch.ones(2))
        module(*data)


class Blocked(torch.autograd.Function):
    """The identity, from which no gradient comes back."""

    @staticmethod
    def forward(ctx, *values):
        return tuple(v.clone() for v in values)

    @staticmethod
    def backward(ctx, *_):
        return None, None


@pytest.mark.parametrize(
    "results",
    [
        lambda m, xs, ys, xq, yq: m(xs, ys, xq, yq)[:2],
        lambda m, xs, ys, xq, yq: (m(xs, ys, xq).predictions,) * 2,
        lambda m, xs, ys, xq, yq: list(m.adapt(xs, ys, create_graph=True).values())[:2],
    ],
)
@pytest.mark.parametrize("implicit", [None, pymeta.Implicit(strength=2.0, cg_steps=1)])
def test_no_gradient_is_the_gradient_of_nothing(results, implicit):
    net = mlp(2, 4, 2)
    blocked = Blocked.apply(*results(make(net, implicit=implicit), *batch()))
    grads = torch.autograd.grad(blocked[0].sum(), net.parameters(), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_no_gradient_of_reptile_is_that_of_nothing():
    net = mlp(2, 4, 2)
    module = pymeta.Reptile(net, loss="mse", optimizer=pymeta.SGD(0.1), steps=1, backend="native")
    loss = module(*batch()[:2]).loss
    blocked = Blocked.apply(loss, loss)[0]
    assert set(torch.autograd.grad(blocked, net.parameters(), allow_unused=True)) == {None}
