"""Adapted: T models in one object."""

import copy
import pickle

import numpy as np
import pytest
import torch
from adapted_help import history, make, random_models
from helpers import assert_close, assert_promised, batch, mlp, targets
from torch import nn

import pymeta


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
    assert_promised(models(xq), before, backend)
    for wrong in (3, -4):
        with pytest.raises(IndexError, match=f"{wrong} is not one of 3 tasks"):
            models[wrong]
    with pytest.raises(TypeError, match=r"expected an integer, a slice, .* got str"):
        models["0"]


NORMS = {
    "batch": lambda: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ELU(), nn.Linear(4, 2)),
    "images": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 1, 2)), nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(8, 2),
    ),
    "instance": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2)), nn.Conv1d(1, 4, 1),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.Flatten(), nn.Linear(8, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
def test_one_tasks_model_computes_the_same_in_both_modes(norm):
    """It has no running statistics, which nothing here would have learned."""
    net, (xs, ys, xq, _) = NORMS[norm]().double(), batch()
    before = copy.deepcopy(net.state_dict())
    models = make(net, "native" if norm == "batch" else "torch").adapt(xs, ys)
    wanted = models(xq)
    for mode in (True, False):
        net.train(mode)
        assert_close(models(xq), wanted)
        for t, model in enumerate(models):
            for own_mode in (True, False):
                assert_close(model.train(own_mode)(xq[t]).detach(), wanted[t])
    assert all(map(torch.equal, net.state_dict().values(), before.values()))


@pytest.mark.filterwarnings("ignore:You are using .torch.load:FutureWarning")  # torch's own pickles
@pytest.mark.filterwarnings("error")
def test_a_model_in_eval_mode_loads_and_predicts(tmp_path):
    net, (xs, ys, xq, _) = NORMS["batch"]().double(), batch()
    models = make(net, "native").adapt(xs, ys)
    models.save(tmp_path / "models")
    wanted = models(xq)
    loaded = pymeta.Adapted.load(tmp_path / "models", net.eval())
    stacked = pymeta.Adapted.from_stacked(net, models.parameters, loss="mse")
    for found in (loaded, stacked, copy.deepcopy(loaded), pickle.loads(pickle.dumps(models))):
        assert torch.equal(found(xq), wanted)


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
    assert_promised(twin(xq), models(xq), backend)
    twin.parameters["0.weight"].zero_()
    assert (twin(xq) - models(xq)).abs().max() > 1e-3


def test_a_pickled_slice_holds_its_own_tasks_alone(backend):
    net = mlp(2, 4, 2)
    models = pymeta.FineTune(net, loss="mse", lr=0.1, epochs=2, freeze=["0.bias"], backend=backend)(
        *batch(tasks=1000)[:2], curves=True
    )
    few = models[5:8]
    text = pickle.dumps(few)
    assert len(text) < len(pickle.dumps(models)) / 10
    for other in (pickle.loads(text), copy.deepcopy(few)):
        assert all(torch.equal(p, few.parameters[n]) for n, p in other.parameters.items())
        assert torch.equal(other.history.train, few.history.train)
        assert other.parameters["0.weight"].untyped_storage().nbytes() == 3 * 8 * 8
    assert few.parameters["0.weight"].data_ptr() == models.parameters["0.weight"][5].data_ptr()


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
    assert repr(models) == "Adapted(3 x Sequential; 22 parameters each; mse)"


# ---- choosing tasks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "tasks"),
    [
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2, 4]),
        (slice(None, None, -2), [4, 2, 0]),
        (slice(3, 1), []),
        ([4, 0, -1, 0], [4, 0, 4, 0]),
        ([], []),
        ([True, False, False, True, False], [0, 3]),
        (torch.tensor([2, 1]), [2, 1]),
        (torch.tensor([False] * 4 + [True]), [4]),
        (np.array([3, -5]), [3, 0]),
        (np.arange(5) > 2, [3, 4]),
        (torch.zeros(0, dtype=torch.int64), []),
    ],
)
def test_some_of_the_tasks(index, tasks):
    models = random_models(mlp(2, 4, 2))
    models.history = history(5, 3)
    xq = torch.randn(5, 3, 2).double()
    some = models[index]
    assert type(some) is pymeta.Adapted and len(some) == len(tasks)
    assert torch.equal(some(xq[tasks]), models(xq)[tasks])
    assert torch.equal(some.history.train, models.history.train[tasks])
    assert torch.equal(some.history.epochs, models.history.epochs[tasks])
    assert some.history.validation is None and some.status.shape == (len(tasks),)
    if tasks:
        assert some.parameters["0.weight"].data_ptr() == models.parameters["0.weight"].data_ptr()


def test_slices_are_views_and_choices_are_copies():
    models = random_models(mlp(2, 4, 2))
    weight = models.parameters["2.weight"]
    models[1:3].parameters["2.weight"].zero_()
    assert not weight[1:3].any() and weight[0].all()
    models[[0]].parameters["2.weight"].zero_()
    assert weight[0].all()


def test_an_index_of_one_task_is_a_module():
    models = random_models(mlp(2, 4, 2))
    for one in (3, -2, np.int64(3), torch.tensor(3)):
        assert torch.equal(models[one][2].weight, models.parameters["2.weight"][3])


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (5, IndexError, "5 is not one of 5 tasks"),
        ([0, -6], IndexError, "-6 is not one of 5 tasks"),
        ([True, False], IndexError, "a mask of 2 bools for 5 tasks"),
        (1.0, TypeError, "got float"),
        ([0.5], TypeError, "got float64 of shape"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "got int64 of shape .2, 2."),
        ([[1], [2, 3]], TypeError, "got list"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_is_no_index(index, error, message):
    with pytest.raises(error, match=f"task: .*{message}"):
        random_models(mlp(2, 4, 2))[index]


def test_status_is_that_of_the_weights():
    models = random_models(mlp(2, 4, 2))
    models.parameters["2.bias"][1, 0] = torch.nan
    models.parameters["0.bias"][4, 1] = torch.inf
    assert models.status.tolist() == [0, 1, 0, 0, 1] and models.status.dtype == torch.int8
    assert models[3:].status.tolist() == [0, 1]
    assert not random_models(mlp(2, 4, 2), tasks=0).status.numel()


# ---- putting objects together -------------------------------------------------------------------


def test_concatenation(backend):
    net, (xs, ys, xq, _) = mlp(2, 4, 2), batch(tasks=5)
    module = make(net, backend, adapt=["2.*"])
    whole = module.adapt(xs, ys)
    parts = [module.adapt(xs[:2], ys[:2]), module.adapt(xs[2:2], ys[2:2]), whole[2:]]
    joined = pymeta.Adapted.concatenate(parts)
    assert len(joined) == 5
    for name, value in joined.parameters.items():
        assert_promised(value, whole.parameters[name], backend)
    assert joined.parameters["0.weight"].stride(0) == 0
    assert_promised(joined(xq), whole(xq), backend)
    assert torch.equal(joined.status, whole.status)
    again = pymeta.Adapted.concatenate(joined[t : t + 1] for t in range(5))
    assert_promised(again(xq), whole(xq), backend)


def test_what_is_shared_no_longer_is_each_tasks_own():
    net = mlp(2, 4, 2)
    a, b = random_models(net, 2), random_models(net, 3)
    joined = pymeta.Adapted.concatenate([a, b])
    weight = joined.parameters["0.weight"]
    assert weight.is_contiguous()
    assert torch.equal(weight, torch.cat([m.parameters["0.weight"] for m in (a, b)]))
    xq = torch.randn(5, 3, 2).double()
    assert torch.equal(joined(xq), torch.cat([a(xq[:2]), b(xq[2:])]))


def test_histories_are_joined_where_all_have_one():
    net = mlp(2, 4, 2)
    a, b, c = random_models(net, 2), random_models(net, 3), random_models(net, 1)
    a.history, b.history = history(2, 3), history(3, 5)
    joined = pymeta.Adapted.concatenate([a, b]).history
    assert torch.equal(joined.train[:2, :3], a.history.train) and joined.train.shape == (5, 5)
    assert joined.train[:2, 3:].isnan().all() and torch.equal(joined.train[2:], b.history.train)
    assert joined.epochs.tolist() == [3, 3, 5, 5, 5] and joined.validation is None
    assert pymeta.Adapted.concatenate([a, b, c]).history is None
    b.history = history(3, 5, validation=torch.rand(3, 6), best_epochs=torch.arange(3))
    assert pymeta.Adapted.concatenate([a, b]).history is None
    assert pymeta.Adapted.concatenate([b, b]).history.validation.shape == (6, 6)


@pytest.mark.parametrize(
    ("other", "loss", "message"),
    [
        (mlp(2, 4, 3), "mse", "its model is linear 2 4, tanh, linear 4 3"),
        (mlp(2, 4, 2, act=nn.ReLU), "mse", "its model is linear 2 4, relu, linear 4 2"),
        (mlp(2, 4, 2), "huber", "its loss is .*huber"),
        (mlp(2, 4, 2).float(), "mse", "0.weight is torch.float32"),
        (nn.Sequential(nn.Conv1d(2, 4, 1)).double(), "mse", "its model is Sequential"),
    ],
)
@pytest.mark.filterwarnings("ignore:pymeta.Adapted runs in torch")
def test_models_that_do_not_fit_each_other(other, loss, message):
    models, others = random_models(mlp(2, 4, 2)), random_models(other, loss=loss)
    with pytest.raises(ValueError, match=rf"models\[1\]: {message}"):
        pymeta.Adapted.concatenate([models, others])


def test_concatenating_nothing_or_something_else():
    with pytest.raises(ValueError, match="models: expected at least one"):
        pymeta.Adapted.concatenate([])
    with pytest.raises(TypeError, match=r"models\[1\]: expected a pymeta.Adapted, got int"):
        pymeta.Adapted.concatenate([random_models(mlp(2, 4, 2)), 3])
