"""Adapted: T models in one object."""

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_promised, batch, mlp, targets, torch_loss
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
    assert repr(models) == "Adapted(3 x Sequential)"


# ---- choosing tasks ---------------------------------------------------------------------------


def history(tasks: int, epochs: int, **more) -> pymeta.History:
    return pymeta.History(
        **{
            "train": torch.rand(tasks, epochs),
            "validation": None,
            "best_epochs": None,
            "epochs": torch.full((tasks,), epochs),
            **more,
        }
    )


def random_models(net, tasks: int = 5, shared=("0.weight",), **options) -> pymeta.Adapted:
    """Models of random weights, of which those named are shared."""
    parameters = {
        n: torch.randn(p.shape, dtype=p.dtype).expand(tasks, *p.shape)
        if n in shared
        else torch.randn(tasks, *p.shape, dtype=p.dtype)
        for n, p in net.named_parameters()
    }
    return pymeta.Adapted.from_stacked(net, parameters, **{"loss": "mse", **options})


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


# ---- putting objects together -----------------------------------------------------------------


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


# ---- torch.func's layout, state dicts ----------------------------------------------------------


def test_functional_call_under_vmap_and_back(backend):
    xs, ys, xq, _ = batch()
    net = mlp(2, 4, 2)
    models = make(net, backend, adapt=["2.*"]).adapt(xs, ys)

    def one(parameters, x):
        return torch.func.functional_call(net, parameters, (x,))

    stacked = models.parameters
    assert_close(torch.func.vmap(one)(stacked, xq), models(xq))
    again = pymeta.Adapted.from_stacked(net, stacked, loss=models.loss)
    assert_close(again(xq), models(xq))
    assert again.loss == models.loss
    for name, value in again.parameters.items():
        assert value.data_ptr() == stacked[name].data_ptr()
        assert value.stride() == stacked[name].stride()
    ensemble, _ = torch.func.stack_module_state(list(models))
    assert_close(pymeta.Adapted.from_stacked(net, ensemble, loss="mse")(xq), models(xq))


def test_from_stacked_checks_what_it_gets():
    net = mlp(2, 4, 2)
    good = random_models(net).parameters
    bias = good["2.bias"]
    missing = {n: v for n, v in good.items() if n != "2.bias"}
    bad = [
        (TypeError, "model: expected a torch.nn.Module", 3, good),
        (TypeError, "parameters: expected a dictionary", net, list(good)),
        (ValueError, "missing or unknown: 2.bias", net, missing),
        (ValueError, "missing or unknown: more", net, {**good, "more": bias}),
        (TypeError, "2.bias: expected a tensor, got list", net, {**good, "2.bias": [1.0]}),
        (ValueError, r"2.bias: expected shape \[5, 2\]", net, {**good, "2.bias": bias[:2]}),
        (ValueError, r"0.weight: expected shape \[T, 4, 2\]", net, {**good, "0.weight": bias}),
        (ValueError, "2.bias: expected torch.float64", net, {**good, "2.bias": bias.float()}),
    ]  # fmt: skip
    for error, message, model, parameters in bad:
        with pytest.raises(error, match=message):
            pymeta.Adapted.from_stacked(model, parameters, loss="mse")
    with pytest.raises(ValueError, match="loss: expected one of"):
        pymeta.Adapted.from_stacked(net, good, loss="mae")


def test_state_dicts_load_strictly():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    models = random_models(net)
    fresh = copy.deepcopy(net)
    fresh.load_state_dict(models.state_dict(-1))
    for name, p in fresh.named_parameters():
        assert torch.equal(p, models.parameters[name][4])
    models.state_dict(0)["2.bias"].zero_()
    assert models.parameters["2.bias"][0].all()
    with pytest.raises(TypeError, match="task: expected an integer, got slice"):
        models.state_dict(slice(0, 1))
    with pytest.raises(IndexError, match="5 is not one of 5"):
        models.state_dict(5)


class Tied(nn.Module):
    """A layer in two places, a weight in two layers, and a state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.again = self.a
        self.b = nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.same = self.scale

    def forward(self, x):
        return self.b(torch.sin(self.again(self.a(x)))) * self.scale * self.same

    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.filterwarnings("ignore:pymeta")
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("ragged", [False, True])
def test_tied_parameters(loss, ragged, tmp_path):
    net, (xs, ys, xq, _) = Tied().double(), batch(loss)
    if ragged:
        xs, ys = [*xs[:2], xs[2, :3]], [*ys[:2], ys[2, :3]]
    held = dict(net.named_parameters(remove_duplicate=False))
    models = pymeta.MAML(net, loss=loss, lr=0.1, steps=2).adapt(xs, ys)
    now = dict(net.named_parameters(remove_duplicate=False))
    assert now.keys() == held.keys() and all(now[n] is p for n, p in held.items())

    models.save(tmp_path / "models")
    loaded = pymeta.Adapted.load(tmp_path / "models", net)
    predictions = models(xq)
    for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
        by_hand, fresh = copy.deepcopy(net), copy.deepcopy(net)
        optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            torch_loss(loss)(by_hand(x), y).backward()
            optimizer.step()
        state = models.state_dict(t)
        fresh.load_state_dict(state)
        assert fresh.extra == state.pop("_extra_state") == {"seen": 3}
        called = torch.func.functional_call(fresh, state, (xq[t],))
        for outputs in (predictions[t], fresh(xq[t]), models[t](xq[t]), loaded(xq)[t], called):
            assert_close(outputs, by_hand(xq[t]))


# ---- probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits"])
def test_probabilities(loss, backend):
    xs, ys, xq, _ = batch(loss, out=3)
    models = make(mlp(2, 4, 3), backend, loss=loss).adapt(xs, ys)
    z, p = models(xq), models.predict_proba(xq)
    wanted = z.softmax(-1) if loss == "cross_entropy" else 1 / (1 + (-z).exp())
    assert_close(p, wanted)
    padded = models.predict_proba(xq, [4, 1, 0])
    assert_close([padded[0], padded[1, :1]], [p[0], p[1, :1]])  # torch's softmax on both paths
    assert not padded[1, 1:].any() and not padded[2].any()
    listed = models.predict_proba([xq[0], xq[1, :2], xq[2, :0]])
    assert [tuple(v.shape) for v in listed] == [(4, 3), (2, 3), (0, 3)]
    assert_close(listed[1], p[1, :2])


def test_probabilities_do_not_overflow():
    net = nn.Linear(1, 2)
    for loss in ("cross_entropy", "bce_with_logits"):
        weight, bias = torch.tensor([[[1e4], [-1e4]]]), torch.zeros(1, 2)
        models = pymeta.Adapted.from_stacked(net, {"weight": weight, "bias": bias}, loss=loss)
        assert models.predict_proba(torch.ones(1, 1, 1)).tolist() == [[[1.0, 0.0]]]


def test_no_probabilities_of_a_regression():
    with pytest.raises(TypeError, match="cross_entropy or bce_with_logits, these are of mse"):
        random_models(mlp(2, 4, 2)).predict_proba(torch.zeros(5, 1, 2).double())


# ---- files ------------------------------------------------------------------------------------


def test_a_file_gives_the_same_models_back(backend, tmp_path):
    xs, ys, xq, _ = batch("cross_entropy", out=3)
    net = mlp(2, 4, 3)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)
    models = make(net, backend, loss=loss, adapt=["2.*"]).adapt(xs, ys)
    models.history = history(3, 2, best_epochs=torch.tensor([0, 1, 2]), validation=torch.rand(3, 3))
    path = tmp_path / "models.safetensors"
    models.save(path)
    again = pymeta.Adapted.load(path, mlp(2, 4, 3), verify=True)
    assert again.loss == models.loss and len(again) == 3
    assert torch.equal(again.status, models.status)
    for name, value in models.parameters.items():
        assert torch.equal(again.parameters[name], value)
        assert again.parameters[name].stride() == value.stride()
    for name, value in models.history.values().items():
        assert torch.equal(getattr(again.history, name), value)
    assert_close(again(xq), models(xq))
    again[1:].save(path)  # over the file that is mapped
    assert torch.equal(
        pymeta.Adapted.load(path, net).parameters["2.bias"], models.parameters["2.bias"][1:]
    )
    assert torch.equal(again.parameters["2.bias"], models.parameters["2.bias"])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_writing_to_loaded_parameters_leaves_the_file_alone(tmp_path):
    path = tmp_path / "models.safetensors"
    net = mlp(2, 4, 2)
    random_models(net).save(path)
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models = pymeta.Adapted.load(path, net)
    models.parameters["2.weight"].zero_()
    assert not models.parameters["2.weight"].any()
    del models
    assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore:pymeta.Adapted runs in torch")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_files_of_any_structure_and_dtype(dtype, tmp_path):
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 2)).to(dtype)
    models = random_models(net, shared=("2.weight",))
    models.save(tmp_path / "m.safetensors")
    again = pymeta.Adapted.load(tmp_path / "m.safetensors", net)
    for name, value in models.parameters.items():
        assert torch.equal(again.parameters[name], value)
    with pytest.raises(ValueError, match=r"not a chain of layers; load it with pymeta\.Adapted"):
        pymeta.AdaptedArrays.load(tmp_path / "m.safetensors")


def test_no_tasks_and_scalar_parameters_survive_a_file(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.factor * x

    with pytest.warns(UserWarning, match="pymeta.Adapted runs in torch"):
        models = pymeta.Adapted.from_stacked(
            Scaled(), {"factor": torch.tensor([1.0, torch.nan])}, loss="mse"
        )
    assert models.status.tolist() == [0, 1]
    for chosen in (models, models[:0]):
        chosen.save(tmp_path / "m")
        with pytest.warns(UserWarning, match="pymeta.Adapted runs in torch"):
            again = pymeta.Adapted.load(tmp_path / "m", Scaled())
        assert torch.equal(again.parameters["factor"], chosen.parameters["factor"]) or len(chosen)
        assert again.status.tolist() == chosen.status.tolist()


def test_a_file_of_another_structure_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    random_models(mlp(2, 4, 2)).save(path)
    for model, message in (
        (mlp(2, 4, 4, 2), "which are not the model's"),
        (mlp(2, 5, 2), r"0.weight has the shape \[4, 2\] in the file, \[5, 2\] in the model"),
        (mlp(2, 4, 2).float(), "is torch.float64 in the file, torch.float32 in the model"),
        (mlp(2, 4, 2, act=nn.ReLU), "the file is of linear 2 4, tanh, .* the model is .* relu"),
    ):
        with pytest.raises(ValueError, match=f"{path}: model: .*{message}"):
            pymeta.Adapted.load(path, model)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        pymeta.Adapted.load(path, "mlp")


RESIDENT = """
import sys, torch, pymeta

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

net = torch.nn.Linear(50, 1)
small = {"weight": torch.zeros(3, 1, 50), "bias": torch.zeros(3, 1)}
pymeta.Adapted.from_stacked(net, small, loss="mse")(torch.zeros(3, 1, 50))
before = resident()
models = pymeta.Adapted.load(sys.argv[1], net)
some = models[500_000:500_010]
assert some(torch.ones(10, 1, 50)).shape == (10, 1, 1)
assert torch.equal(some.parameters["bias"], torch.full((10, 1), 7.0))
print(len(models), resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux's way to tell memory")
def test_a_large_file_is_mapped_and_not_read(tmp_path):
    path = tmp_path / "large.safetensors"
    net = nn.Linear(50, 1)
    weight = torch.zeros(1_000_000, 1, 50)
    pymeta.Adapted.from_stacked(
        net, {"weight": weight, "bias": torch.full((1_000_000, 1), 7.0)}, loss="mse"
    ).save(path)
    assert path.stat().st_size > 200_000_000
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    tasks, grown = map(int, done.stdout.split())
    assert tasks == 1_000_000
    assert grown < 10_000_000, f"{grown} bytes were read of {path.stat().st_size}"


def test_what_is_shared_is_stored_once(tmp_path):
    net = mlp(100, 100, 1)
    path = tmp_path / "m.safetensors"
    models = random_models(net, tasks=100, shared=("0.weight", "0.bias"))
    models.save(path)
    own = 100 * (100 + 1) * 8  # 100 tasks' 2.weight and 2.bias
    assert path.stat().st_size < own + 10_100 * 8 + 4096
    again = pymeta.Adapted.load(path, net)
    assert again.parameters["0.weight"].stride(0) == 0
    assert torch.equal(again.parameters["0.weight"], models.parameters["0.weight"])
