"""`adapt` and predictions once more: the short way, and when it is not taken."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers import batch, in_threads, mlp
from kernels import same_bits
from torch import nn

import pymeta
from pymeta import SGD, LearnableLR

MAKERS = {
    "MAML": lambda net: pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend="native"),
    "learned rates": lambda net: pymeta.MAML(
        net, loss="mse", lr=LearnableLR(0.1, per="layer"), steps=2, backend="native"
    ),
    "ANIL": lambda net: pymeta.MAML(
        net, loss="mse", lr=0.1, steps=2, adapt=["2.*"], backend="native"
    ),
    "Reptile": lambda net: pymeta.Reptile(
        net, loss="mse", optimizer=SGD(0.1), steps=3, batch_size=2, backend="native"
    ),
}


def values(models, xq):
    return [*models.parameters.values(), models.status.double(), models(xq)]


@pytest.mark.parametrize("maker", MAKERS)
def test_other_values_are_a_repeat(maker, repeats):
    net = mlp(2, 4, 2)
    learner = MAKERS[maker](net)
    for k in range(3):
        xs, ys, xq, _ = batch()
        got = values(learner.adapt(xs, ys), xq)
        assert repeats == [True, True] * (k > 0)
        new = MAKERS[maker](net)
        if maker == "learned rates":
            new.lr.data.copy_(learner.lr)
        assert same_bits(got, values(new.adapt(xs, ys), xq))
        assert "step" in learner.explain()
        with torch.no_grad():
            for p in learner.parameters():
                p.mul_(0.9)
        repeats.clear()


def test_settings_options_and_other_forms_are_none(repeats):
    net = mlp(2, 4, 2)
    learner, (xs, ys, xq, _) = MAKERS["MAML"](net), batch()
    learner.adapt(xs, ys)(xq)
    options = [
        {"steps": 1}, {"support_sizes": [5, 2, 3]}, {"support_weights": torch.ones(3, 5).double()},
        {"support_offset": torch.ones(3, 5, 2).double()}, {"anchor": torch.ones(3).double()},
        {"start": {"0.bias": torch.ones(3, 4).double()}}, {"lr": torch.ones(3).double()},
        {"curves": True}, {"on_divergence": "keep"},
    ]  # fmt: skip
    for option in options:
        learner.adapt(xs, ys, **option)
    assert not repeats
    changed = [(xs[:2], ys[:2]), (xs[:, :3].contiguous(), ys[:, :3].contiguous())]
    changed += [(list(xs), list(ys)), (xs.numpy(), ys.numpy())]
    for x, y in changed:
        learner.adapt(xs, ys)
        del repeats[:]
        got = learner.adapt(x, y)
        assert True not in repeats
        wanted = MAKERS["MAML"](net).adapt(x, y)
        assert same_bits(got.parameters.values(), wanted.parameters.values())
    learner.adapt(xs, ys)
    learner.steps = 1
    del repeats[:]
    assert same_bits(
        learner.adapt(xs, ys).parameters.values(),
        learner.adapt(xs, ys, steps=1).parameters.values(),
    )
    assert True not in repeats


def test_wrong_labels_are_found_in_a_repeat(repeats):
    net = mlp(2, 4, 3)
    learner = pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=2, backend="native")
    xs, ys, _, _ = batch("cross_entropy", out=3)
    learner.adapt(xs, ys)
    ys[1, 2] = 3
    with pytest.raises(ValueError, match=r"ys: task 1, row 2: label 3 is not in 0\.\.2"):
        learner.adapt(xs, ys)
    ys[1, 2] = 0
    learner.adapt(xs, ys)
    assert repeats == [True, True]


def test_predictions_of_models_in_another_order_of_parameters(repeats):
    """Layers of one shape, so that nothing but the names tells them apart."""
    net = mlp(3, 3, 3, 3)
    xs, ys, xq, _ = batch(inputs=3, out=3)
    models = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, adapt=["0.*"]).adapt(xs, ys)
    wanted = models(xq)
    models._shared = dict(reversed(models._shared.items()))
    assert same_bits(models(xq), wanted)
    models._stacked = dict(reversed(models._stacked.items()))
    assert same_bits(models(xq), wanted)
    assert not repeats
    assert same_bits(models(xq), wanted) and repeats == [True]


def test_predictions_of_other_models_and_rows(repeats):
    net = mlp(2, 4, 2)
    learner, (xs, ys, xq, _) = MAKERS["ANIL"](net), batch()
    models = learner.adapt(xs, ys)
    whole = models(xq)
    assert same_bits(models[1:3](xq[1:3]), whole[1:3]) and True not in repeats
    assert same_bits(models(xq[:, :2].contiguous()), whole[:, :2])
    assert True not in repeats
    assert same_bits(models(xq), whole) and repeats.pop()  # what came before that
    models.parameters["2.bias"].add_(1)
    assert same_bits(models(xq), pymeta.Adapted.from_stacked(
        net, models.parameters, loss="mse")(xq))  # fmt: skip
    assert repeats.pop()
    with pytest.raises(ValueError, match="xq: expected 3 tasks"):
        models(xq[:2])
    with pytest.raises(TypeError, match=r"xq: expected torch\.float64"):
        models(xq.float())
    assert models(xq.requires_grad_()).requires_grad is False
    shifted = models(xq.detach())
    assert same_bits(models(list(xq.detach())), list(shifted))
    assert same_bits(models(xq.detach().numpy()), shifted)


def test_modes_of_autograd_change_nothing(repeats):
    net = mlp(2, 4, 2)
    learner, (xs, ys, xq, _) = MAKERS["MAML"](net), batch()
    wanted = values(learner.adapt(xs, ys), xq)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            found = values(learner.adapt(xs, ys), xq)
        assert same_bits(found, wanted) and not any(v.requires_grad for v in found)
        assert repeats == [True, True]
        repeats.clear()


def test_threads_repeat_one_learner():
    learner, several = MAKERS["MAML"](mlp(2, 4, 2)), [batch() for _ in range(4)]
    wanted = [values(learner.adapt(*data[:2]), data[2]) for data in several]
    wrong = []

    def work(data, want):
        for _ in range(100):
            found = values(learner.adapt(*data[:2]), data[2])
            if not same_bits(found, want):
                wrong.append(found)

    in_threads(work, zip(several, wanted, strict=True))
    assert not wrong


def test_nothing_is_held_in_a_circle():
    net, (xs, ys, xq, _) = mlp(2, 4, 2), batch()
    learner = MAKERS["learned rates"](net)
    for _ in range(2):
        models = learner.adapt(xs, ys)
        models(xq)
    held = (learner, net, net[0].weight, learner.lr, models, models.parameters["0.weight"])
    gone = [weakref.ref(value) for value in held]
    gc.collect()
    gc.disable()
    try:
        del learner, net, models, held
        assert [ref() for ref in gone] == [None] * 6
    finally:
        gc.enable()


def test_flattened_rows(repeats):
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    learner = MAKERS["MAML"](net)
    for k in range(2):
        xs, ys, xq, _ = batch(inputs=4)
        wanted = values(MAKERS["MAML"](net).adapt(xs, ys), xq)
        del repeats[:]
        got = values(learner.adapt(xs.view(3, 5, 2, 2), ys), xq.view(3, 4, 2, 2))
        assert same_bits(got, wanted) and repeats == [True, True] * k


def test_calls_of_several_shapes_take_turns(repeats):
    """Training and held-out tasks, say; more shapes than are kept are prepared anew."""
    net = mlp(2, 4, 2)
    learner, sizes = MAKERS["MAML"](net), (1, 2, 3)
    several = [batch(tasks=t) for t in sizes]

    def all_of(learner, data):
        out = learner(*data)
        grads = torch.autograd.grad(out.loss, list(net.parameters()))
        models = learner.adapt(*data[:2])
        accumulated = learner.accumulate_grad(*data)
        net.zero_grad()
        return [*out[:3], *grads, *accumulated[:3], *values(models, data[2])]

    for data in (*several, *several):
        all_of(learner, data)
    repeats.clear()
    for data in (*several, several[0], several[2]):
        found = all_of(learner, data)
        assert repeats == [False, True] * 4
        repeats.clear()
        assert same_bits(found, all_of(MAKERS["MAML"](net), data))
        repeats.clear()
    many = [batch(tasks=1, support=n) for n in range(2, 14)]
    for data in (*many, *many):
        found = learner.adapt(*data[:2]).parameters.values()
        assert same_bits(found, MAKERS["MAML"](net).adapt(*data[:2]).parameters.values())
    assert all(len(calls) <= 8 for calls in learner._prepared._others.values())


def test_models_that_share_all_parameters_are_as_many_as_they_are():
    net = mlp(2, 4, 2).requires_grad_(False)
    net[0].bias.requires_grad_(True)
    learner, (xs, ys, xq, _) = MAKERS["MAML"](net), batch()
    models = learner.adapt(xs, ys)
    parts = {n: p.detach() for n, p in net.named_parameters()}
    made = models._like({}, parts, 3, None, None)
    other = models._like({}, parts, 2, None, None)
    for _ in range(2):
        assert made(xq).shape == (3, 4, 2)
        with pytest.raises(ValueError, match="xq: expected 2 tasks"):
            other(xq)


def test_copies_prepare_their_own_calls():
    """Also those of learners that an earlier version pickled, with a dictionary or nothing."""
    learner, (xs, ys, xq, yq) = MAKERS["MAML"](mlp(2, 4, 2)), batch()
    wanted = values(learner.adapt(xs, ys), xq)
    learner(xs, ys, xq, yq)
    old = object.__new__(pymeta.MAML)
    old.__setstate__({**learner.__getstate__(), "_prepared": {}})
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner)), old):
        assert other._prepared is not learner._prepared
        for _ in range(2):
            other(xs, ys, xq, yq).loss.backward()
            assert same_bits(values(other.adapt(xs, ys), xq), wanted)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("size", [None, 2])
def test_reptile_with_the_streams_of_its_calls(clip, size, repeats):
    """Each call of training draws other minibatches, and moves the running statistics."""
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    options = {"loss": "mse", "lr": 0.1, "steps": 3, "batch_size": size, "task_clip": clip}
    learner = pymeta.Reptile(net, backend="native", **options)

    def called(learner, data):
        net.load_state_dict(start)
        with torch.no_grad():
            looked = learner(*data)
        out = learner(*data)
        grads = torch.autograd.grad(out.loss, list(net.parameters()))
        return [*looked, *out, *grads, net[1].running_mean.clone(), net[1].running_var.clone()]

    start, found = copy.deepcopy(net.state_dict()), []
    for k in range(4):
        data = batch(support=6)[:2]
        new = pymeta.Reptile(net, backend="native", **options)
        new.set_extra_state(learner.get_extra_state())
        wanted = called(new, data)
        repeats.clear()
        found.append(called(learner, data))
        assert same_bits(found[-1], wanted) and repeats == [True, True] * (k > 0)
        assert learner.get_extra_state() == {"stream": k + 1}
    same = [called(learner, data)[2:4] for _ in range(2)]
    assert (size is None) == same_bits(*same)  # other minibatches
    assert "3 steps" in learner.explain()


def test_wrong_labels_are_found_in_a_repeat_of_reptile(repeats):
    net = mlp(2, 4, 3)
    learner = pymeta.Reptile(net, loss="cross_entropy", lr=0.1, steps=2, backend="native")
    xs, ys, _, _ = batch("cross_entropy", out=3)
    learner(xs, ys)
    ys[1, 2] = 3
    with pytest.raises(ValueError, match=r"ys: task 1, row 2: label 3 is not in 0\.\.2"):
        learner(xs, ys)
    ys[1, 2] = 0
    learner(xs, ys).loss.backward()
    assert repeats == [True, True] and learner.get_extra_state() == {"stream": 2}
