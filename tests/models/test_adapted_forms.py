"""Adapted models in other forms: torch.func's layout, state dicts, probabilities, files."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from adapted_help import history, make, random_models
from helpers import assert_close, batch, mlp, torch_loss
from torch import nn

import pymeta

# ---- torch.func's layout, state dicts -----------------------------------------------------------


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


# ---- probabilities ------------------------------------------------------------------------------


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


# ---- files --------------------------------------------------------------------------------------


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
