"""Step sizes from curvature, and tasks that adaptation makes worse."""

import numpy as np
import pytest
import torch
from helpers import assert_close, batch, mlp
from kernels import PATHS, same_bits, using
from torch import nn

import pymeta
from pymeta import MAML, SGD, FineTune

BACKENDS = ["torch", "native"]


# ---- one over the largest curvature -----------------------------------------------------------


def largest_curvature(net, loss_fn, x, y, names=None):
    """The largest eigenvalue of the whole Hessian by absolute value, by autograd."""
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    free = {n: p for n, p in parameters.items() if names is None or n in names}
    flat = torch.cat([p.flatten() for p in free.values()])

    def loss(vector):
        parts = vector.split([p.numel() for p in free.values()])
        own = {n: v.view(p.shape) for (n, p), v in zip(free.items(), parts, strict=True)}
        return loss_fn(torch.func.functional_call(net, {**parameters, **own}, (x,)), y)

    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat)).abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", [None, ["2.weight", "2.bias"]])
def test_it_is_one_over_the_largest_curvature(backend, names):
    net, (xs, ys, *_) = mlp(2, 5, 2), batch(tasks=4)
    found = pymeta.step_size(
        net, xs, ys, loss="mse", adapt=names, largest=100.0, iterations=300, backend=backend
    )
    for t in range(4):
        wanted = 1 / largest_curvature(net, nn.functional.mse_loss, xs[t], ys[t], names)
        # what is left of the other eigenvectors is tiny after so many iterations
        assert abs(found[t] / wanted - 1) < 1e-3
    few = pymeta.step_size(net, xs, ys, loss="mse", adapt=names, largest=100.0, backend=backend)
    assert (few / found - 1).abs().max() < 0.2


def test_of_a_line_it_is_known():
    x = torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0]]).unsqueeze(-1)
    net = nn.Linear(1, 1, bias=False)
    rates = pymeta.step_size(net, x, 2 * x, loss="mse", largest=0.75)
    assert_close(rates, torch.tensor([1 / 25, 0.5, 0.75]))  # a flat loss has the largest
    flat = pymeta.step_size(net, x, 2 * x, loss="l1")
    assert flat.tolist() == [1.0] * 3


def test_ragged_weighted_and_offset_tasks():
    net, (xs, ys, *_) = mlp(2, 5, 2), batch(tasks=3)
    sizes = [5, 2, 4]
    alone = [
        pymeta.step_size(net, xs[t : t + 1, :n], ys[t : t + 1, :n], loss="mse")
        for t, n in enumerate(sizes)
    ]
    assert same_bits([pymeta.step_size(net, xs, ys, loss="mse", sizes=sizes)], [torch.cat(alone)])
    listed = [xs[t, :n] for t, n in enumerate(sizes)], [ys[t, :n] for t, n in enumerate(sizes)]
    assert same_bits([pymeta.step_size(net, *listed, loss="mse")], [torch.cat(alone)])
    known = torch.full_like(ys, 0.5)
    moved = pymeta.step_size(net, xs, ys + known, loss="mse", offset=known)
    assert_close(moved, pymeta.step_size(net, xs, ys, loss="mse"))
    weighed = pymeta.step_size(net, xs, ys, loss="mse", weights=torch.ones(3, 5).double() * 2)
    assert_close(weighed, pymeta.step_size(net, xs, ys, loss="mse"))


def test_the_inner_loop_goes_down_with_it_and_up_with_three_times_as_much():
    net, (xs, ys, *_) = mlp(3, 8, 2), batch(tasks=6, inputs=3)
    scale = torch.tensor([0.1, 1.0, 10.0, 0.3, 3.0, 30.0]).double().view(-1, 1, 1)
    linear = nn.Linear(3, 2, dtype=torch.float64)
    for model, factor, is_down in ((net, 1.0, True), (linear, 1.0, True), (linear, 3.0, False)):
        rates = factor * pymeta.step_size(model, scale * xs, ys, loss="mse", largest=1e6)
        learner = MAML(model, loss="mse", lr=0.1, steps=40)
        before = learner(scale * xs, ys, scale * xs, ys, steps=0).task_losses
        after = learner(scale * xs, ys, scale * xs, ys, lr=rates).task_losses
        assert ((after < before) == is_down).all()


def test_what_is_wrong_with_a_step_size_is_said():
    net, (xs, ys, *_) = mlp(2, 5, 2), batch()
    with pytest.raises(ValueError, match=r"^largest: expected a finite number > 0"):
        pymeta.step_size(net, xs, ys, loss="mse", largest=0)
    with pytest.raises(ValueError, match=r"^iterations: "):
        pymeta.step_size(net, xs, ys, loss="mse", iterations=0)
    assert pymeta.step_size(net, xs[:0], ys[:0], loss="mse").shape == (0,)


# ---- tasks that get worse ---------------------------------------------------------------------


def lines(tasks=5):
    """Tasks of which those of odd number diverge at a step size of 0.1, but stay finite."""
    x = torch.randn(tasks, 8, 1, generator=torch.Generator().manual_seed(0)).double()
    x = x * torch.where(torch.arange(tasks) % 2 == 1, 8.0, 1.0).view(-1, 1, 1)
    return x, 2 * x


def everything(kind, reaction, backend="native", **options):
    """The models of tasks of which some diverge, and their losses before and after."""
    torch.manual_seed(0)
    net = nn.Linear(1, 1, dtype=torch.float64)
    x, y = lines()
    if kind == "MAML":
        learner = MAML(net, loss="mse", lr=0.1, steps=6, backend=backend)
        models = learner.adapt(x, y, on_divergence=reaction, **options)
    else:
        learner = FineTune(
            net, loss="mse", lr=0.1, epochs=6, on_divergence=reaction, backend=backend
        )
        models = learner(x, y, **options)
    losses = (models(x) - y).square().mean((1, 2))
    return net, models, losses, (net(x) - y).square().mean((1, 2)).detach()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["MAML", "FineTune"])
def test_tasks_that_get_worse_return_to_the_start(kind, backend):
    net, models, _, _ = everything(kind, "start", backend)
    _, loose, after, before = everything(kind, None, backend)
    odd = torch.arange(5) % 2 == 1
    assert (after[odd] > before[odd]).all() and (after[~odd] < before[~odd]).all()
    assert loose.status.tolist() == [0] * 5 and models.status.tolist() == [0, 2, 0, 2, 0]
    for name, p in net.named_parameters():
        assert torch.equal(models.parameters[name][odd], p.detach().expand(2, *p.shape))
        assert torch.equal(models.parameters[name][~odd], loose.parameters[name][~odd])
    _, kept, _, _ = everything(kind, "keep", backend)
    assert kept.status.tolist() == [0, 2, 0, 2, 0]
    assert same_bits(list(kept.parameters.values()), list(loose.parameters.values()))
    with pytest.raises(ArithmeticError, match=r"^task 1: adaptation diverged: its loss went from"):
        everything(kind, "raise", backend)
    with pytest.raises(ValueError, match=r"^on_divergence: expected one of 'start'"):
        everything(kind, "stop", backend)


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("kind", ["MAML", "FineTune"])
def test_every_executor_sees_them(path, kind):
    with using(*path):
        assert everything(kind, "start")[1].status.tolist() == [0, 2, 0, 2, 0]


def test_they_return_to_their_own_start():
    own = {"weight": torch.arange(5.0).double().view(5, 1, 1) / 5}
    for kind in ("MAML", "FineTune"):
        net, models, _, _ = everything(kind, "start", start=own)
        assert models.status.tolist() == [0, 2, 0, 2, 0]
        assert torch.equal(models.parameters["weight"][1::2], own["weight"][1::2])
        assert torch.equal(models.parameters["bias"][1], net.bias.detach())


def test_not_finite_is_status_1_and_returns_too():
    net = nn.Linear(1, 1)
    x, y = (v.float() for v in lines())
    tune = FineTune(net, loss="mse", lr=0.1, epochs=300, on_divergence="start")
    models = tune(x, y)
    assert set(models.status.tolist()) == {0, 1}
    assert all(p.isfinite().all() for p in models.parameters.values())


def test_rows_held_out_weights_and_chunks(monkeypatch):
    monkeypatch.setattr("pymeta.algorithms.finetune._CHUNK_WORK", 1.0)  # 16 tasks at a time
    x, y = lines(40)
    net = nn.Linear(1, 1, dtype=torch.float64)
    options = {"loss": "mse", "lr": 0.1, "epochs": 6, "on_divergence": "start"}
    assert FineTune(net, **options)(x, y).status.tolist() == [0, 2] * 20
    # what weighs nothing diverges from nothing, and the best epoch is never worse than the start
    weights = torch.ones(40, 8).double()
    weights[1] = 0
    status = FineTune(net, **options)(x, y, weights=weights).status
    assert status.tolist() == [0, 0] + [0, 2] * 19
    held = FineTune(net, **options, validation=0.25)(x, y)
    after = (held(x) - y).square().mean((1, 2))
    assert (after[1::2] <= (net(x) - y).square().mean((1, 2))[1::2] + 1e-9).all()
    with pytest.raises(ArithmeticError, match=r"^task 1: "):
        FineTune(net, **{**options, "on_divergence": "raise"})(x, y)


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("per", ["network", "layer", "parameter"])
def test_maml_reports_the_losses_of_its_steps(path, per):
    net, (xs, ys, *_) = mlp(2, 5, 2), batch(tasks=5)
    rate = pymeta.LearnableLR(0.1, per=per, per_step=True)
    learner = MAML(net, loss="mse", optimizer=SGD(rate, momentum=0.5), steps=4)
    with torch.no_grad():  # no two steps alike
        learner.lr.mul_(torch.linspace(0.5, 2, 4, dtype=torch.float64).view(-1, 1))
    with using(*path):
        plain, watched = learner.adapt(xs, ys), learner.adapt(xs, ys, curves=True)
        assert plain.history is None
        assert same_bits(list(plain.parameters.values()), list(watched.parameters.values()))
        for k in range(4):
            models = learner.adapt(xs, ys, steps=k)
            assert_close(watched.history.train[:, k], (models(xs) - ys).square().mean((1, 2)))


# ---- a step size for each layer ---------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_have_step_sizes_of_their_own(backend):
    net, (xs, ys, *_) = mlp(2, 5, 2), batch(tasks=3)
    rates = [0.3, 0.02]
    learner = MAML(net, loss="mse", lr=pymeta.LearnableLR(0.1, per="layer"), steps=4)
    with torch.no_grad():
        learner.lr.copy_(torch.tensor(rates, dtype=torch.float64))
    wanted = learner.adapt(xs, ys)
    tune = FineTune(net, loss="mse", lr=0.1, epochs=4, layer_lr=rates, backend=backend)
    found = tune(xs, ys)
    for name, value in wanted.parameters.items():
        assert_close(found.parameters[name], value)
    assert tune.layer_lr.tolist() == rates
    adapted = tune.adapter().adapt(xs.numpy(), ys.numpy())
    for name, value in found.parameters.items():
        assert_close(torch.from_numpy(np.array(adapted.parameters[name])), value)


def test_step_sizes_of_layers_are_checked():
    net = mlp(2, 5, 2)
    make = {"loss": "mse", "lr": 0.1, "epochs": 1}
    with pytest.raises(ValueError, match=r"^layer_lr: expected 2, one for each layer .*, got 3"):
        FineTune(net, **make, layer_lr=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"^layer_lr: expected a finite number >= 0"):
        FineTune(net, **make, layer_lr=[0.1, -0.2])
    with pytest.raises(ValueError, match=r"^layer_lr: expected numbers \[layers\]"):
        FineTune(net, **make, layer_lr=0.1)
    assert FineTune(net, **make, layer_lr=[0.1], freeze=["0.*"]).layer_lr.tolist() == [0.1]
