"""pymeta.Reptile on both backends, against loops over torch.optim and closed forms."""

import copy
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers import LOSSES, assert_close, assert_promised, batch, gradients, mlp, torch_loss
from kernels import PATHS, using
from torch import nn

import pymeta
from pymeta import SGD, Adam, Reptile, RMSprop
from pymeta.spec.schedule import permutation

OF_ADAPT = 2**62
MAKERS = {
    "sgd": (SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (
        SGD(0.05, momentum=0.9, nesterov=True, clip_norm=0.4),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    ),
    "adam": (Adam(0.02, betas=(0, 0.999)), lambda p: torch.optim.Adam(p, 0.02, betas=(0.0, 0.999))),
    "adamw": (
        Adam(0.02, weight_decay=0.2, decoupled=True),
        lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.2),
    ),
    "rmsprop": (
        RMSprop(0.02, 0.9, 1e-4, momentum=0.5),
        lambda p: torch.optim.RMSprop(p, 0.02, 0.9, 1e-4, momentum=0.5),
    ),
}


def reptile(backend, net, **options):
    return Reptile(net, backend=backend, **{"loss": "mse", "lr": 0.1, "steps": 3, **options})


def by_hand(net, make, clip, loss, x, y, steps, size=None, seed=0, stream=0, task_id=0):
    """One task by torch.optim: the adapted parameters, and the mean of the steps' losses."""
    net = copy.deepcopy(net)
    optimizer = make(net.parameters())
    count = 1 if size is None or size >= len(x) else math.ceil(len(x) / size)
    losses = []
    for step in range(steps):
        epoch, b = divmod(step, count)
        order = permutation(seed, stream, task_id, epoch, len(x))
        chosen = slice(None) if count == 1 else order[b * size : (b + 1) * size]
        optimizer.zero_grad()
        losses.append(loss(net(x[chosen]), y[chosen]))
        losses[-1].backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return [p.detach() for p in net.parameters()], torch.stack(losses).mean().detach()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_equals_a_loop_over_torch_optim(name, size, loss, backend):
    rule, make = MAKERS[name]
    net, (xs, ys, *_) = mlp(2, 6, 3), batch(loss, support=7, out=3)
    module = reptile(
        backend, net, loss=loss, lr=None, optimizer=rule, steps=5, batch_size=size, seed=4
    )
    for stream in range(2):
        out = module(xs, ys)
        got = gradients(out.loss, *net.parameters())
        each = [
            by_hand(net, make, rule.clip_norm, torch_loss(loss), x, y, 5, size, 4, stream)
            for x, y in zip(xs, ys, strict=True)
        ]
        wanted = [
            p.detach() - torch.stack(found).mean(0)
            for p, *found in zip(net.parameters(), *(weights for weights, _ in each), strict=True)
        ]
        assert_close(got, wanted, terms=10**6)
        assert_close(out.task_losses, torch.stack([mean for _, mean in each]))
        assert_close(out.loss, out.task_losses.mean())
    models = module.adapt(xs, ys)
    for t in range(3):
        wanted, _ = by_hand(
            net, make, rule.clip_norm, torch_loss(loss), xs[t], ys[t], 5, size, 4, OF_ADAPT
        )
        assert_close(list(models[t].parameters()), wanted, terms=10**6)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_steps_are_no_gradient(loss, backend):
    net, (xs, ys, *_) = mlp(2, 4, 3), batch(loss, out=3)
    out = reptile(backend, net, loss=loss, steps=0)(xs, ys)
    assert out.loss.item() == 0 and not out.task_losses.any()
    for g, p in zip(gradients(out.loss, *net.parameters()), net.parameters(), strict=True):
        # the mean of three times the same number may be off by a rounding in torch
        off = 0.0 if backend == "native" else 2 * torch.finfo(p.dtype).eps
        assert (g.abs() <= off * p.detach().abs()).all()


def test_one_step_of_a_linear_model_has_its_closed_form(backend):
    """theta - theta' = lr (2/S) X^T (X w - y), the mean over tasks of it."""
    net = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    xs, ys, *_ = batch(tasks=4, support=6, inputs=3, out=1)
    out = reptile(backend, net, lr=0.05, steps=1)(xs, ys)
    residual = xs @ net.weight.detach()[0].unsqueeze(-1) - ys
    wanted = 0.05 * (2 / 6) * (xs * residual).sum(1).mean(0, keepdim=True)
    assert_close(gradients(out.loss, net.weight), wanted)
    assert_close(out.task_losses, residual.square().mean((1, 2)))


@pytest.mark.parametrize("eps", [1.0, 0.25])
def test_an_outer_sgd_step_moves_towards_the_mean(eps, backend):
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    module = reptile(backend, net)
    before = [p.detach().clone() for p in net.parameters()]
    adapted = [p.mean(0) for p in module.adapt(xs, ys).parameters.values()]
    optimizer = torch.optim.SGD(module.parameters(), lr=eps)
    module(xs, ys).loss.backward()
    optimizer.step()
    wanted = [p + eps * (mean - p) for p, mean in zip(before, adapted, strict=True)]
    assert_close(list(net.parameters()), wanted)


def test_gradients_are_scaled_and_accumulated(backend):
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    module = reptile(backend, net)
    once = gradients(module(xs, ys).loss, *net.parameters())
    (3 * module(xs, ys).loss).backward()
    module(xs, ys).loss.backward()
    assert_close([p.grad for p in net.parameters()], [4 * g for g in once])


@pytest.mark.parametrize("way", ["backward", "grad"])
def test_the_direction_cannot_be_differentiated(way, backend):
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    parameters = list(net.parameters())
    loss = reptile(backend, net)(xs, ys).loss
    found = torch.autograd.grad(loss, parameters, create_graph=True)
    total = loss + sum(f.square().sum() for f in found)
    with pytest.raises(RuntimeError, match="Reptile's direction cannot be differentiated"):
        total.backward() if way == "backward" else torch.autograd.grad(total, parameters)


def test_frozen_and_unadapted_parameters_stay(backend):
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    net[0].bias.requires_grad_(False)
    module = reptile(backend, net, adapt=["2.*", "0.bias"])
    module(xs, ys).loss.backward()
    assert net[0].bias.grad is None
    assert not net[0].weight.grad.any() and net[2].weight.grad.any()
    models = module.adapt(xs, ys)
    assert torch.equal(models.parameters["0.weight"][1], net[0].weight)
    assert not torch.equal(models.parameters["2.weight"][1], net[2].weight)


@pytest.mark.parametrize("form", ["list", "padded"])
def test_ragged_tasks_are_the_tasks_one_by_one(form, backend):
    net, (xs, ys, *_) = mlp(2, 4, 2), batch(tasks=4, support=6)
    weights, sizes = torch.rand(4, 6).double(), [6, 0, 2, 5]
    module = reptile(backend, net, lr=None, optimizer=Adam(0.02), batch_size=4)
    cut = [[v[:n] for v, n in zip(whole, sizes, strict=True)] for whole in (xs, ys, weights)]
    with torch.no_grad():
        if form == "list":
            models = module.adapt(*cut[:2], support_weights=cut[2])
            losses = module(*cut[:2], support_weights=cut[2]).task_losses
        else:
            options = {"support_sizes": sizes, "support_weights": weights}
            models, losses = module.adapt(xs, ys, **options), module(xs, ys, **options).task_losses
        for t in range(4):
            x, y, w = (v[t].unsqueeze(0) for v in cut)
            alone = module.adapt(x, y, support_weights=w)
            for name, values in models.parameters.items():
                assert_promised(alone.parameters[name][0], values[t], backend, 10**6)
            assert_close(module(x, y, support_weights=w).loss, losses[t])
    assert torch.equal(models.parameters["0.weight"][1], net[0].weight)
    assert losses[1] == 0


def test_steps_of_a_call(backend):
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    longer, module = reptile(backend, net, steps=6), reptile(backend, net)
    assert_promised(module(xs, ys, steps=6).loss, longer(xs, ys).loss, backend)
    got, wanted = module.adapt(xs, ys, steps=6), longer.adapt(xs, ys)
    assert_promised(got.parameters["0.bias"], wanted.parameters["0.bias"], backend)
    fewer = module.adapt(xs, ys).parameters["0.bias"]
    assert (fewer - wanted.parameters["0.bias"]).abs().max() > 1e-3


def test_training_calls_draw_anew_and_others_do_not(backend):
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    module = reptile(backend, net, batch_size=2)
    losses = torch.stack([module(xs, ys).loss.detach() for _ in range(3)])
    assert all(apart(a, b) for a, b in itertools.combinations(losses, 2))
    with torch.no_grad():
        quiet = [module(xs, ys).loss for _ in range(2)]
        assert_promised(quiet[0], quiet[1], backend)
        assert not module(xs, ys).loss.requires_grad
    assert_promised(*(module.adapt(xs, ys).parameters["0.bias"] for _ in range(2)), backend)
    again = reptile(backend, net, batch_size=2)
    assert_promised(torch.stack([again(xs, ys).loss for _ in range(3)]), losses, backend)
    other = reptile(backend, net, batch_size=2, seed=1)(xs, ys).loss.detach()
    assert all(apart(other, loss) for loss in losses)


def apart(a, b) -> bool:
    """Whether two numbers differ by more than rounding ever makes them."""
    return bool((a - b).abs().max() > 1e-6 * b.abs().max())


def test_task_ids_set_shuffles_apart(backend):
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    xs, ys = xs[:1].expand(3, -1, -1), ys[:1].expand(3, -1, -1)
    module = reptile(backend, net, batch_size=2)
    alike = module.adapt(xs, ys).parameters["0.weight"]
    assert_promised(alike[0], alike[1], backend)
    moved = module.adapt(xs, ys, task_ids=[0, 7, 0]).parameters["0.weight"]
    assert_promised(moved[[0, 2]], alike[[0, 2]], backend)
    assert apart(moved[1], alike[0])
    with torch.no_grad():
        losses = module(xs, ys, task_ids=np.array([0, 7, 0])).task_losses
    assert_promised(losses[0], losses[2], backend)
    assert apart(losses[1], losses[0])


def test_a_resumed_run_goes_on_as_it_would_have(backend, tmp_path):
    (xs, ys, *_), first = batch(), mlp(2, 4, 2)
    one = reptile(backend, first, batch_size=2, seed=3)
    for _ in range(2):
        one(xs, ys)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other = reptile(backend, mlp(2, 4, 2), batch_size=2, seed=3)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    twins = [other, copy.deepcopy(one), pickle.loads(pickle.dumps(one))]
    wanted = [one(xs, ys).loss for _ in range(2)]
    for twin in twins:
        assert_promised([twin(xs, ys).loss for _ in range(2)], wanted, backend)
    with pytest.raises(ValueError, match=r"state: expected the stream"):
        one.set_extra_state({})
    with pytest.raises(ValueError, match=r"stream: expected an integer >= 0, got -1"):
        one.set_extra_state({"stream": -1})


def test_backends_agree():
    """In all that only one of them would do: minibatches, weights, padding, clipping."""
    net, (xs, ys, *_) = mlp(2, 5, 3), batch("cross_entropy", tasks=5, support=9, out=3)
    options = {
        "support_sizes": [9, 0, 5, 3, 1],
        "support_weights": torch.rand(5, 9),
        "task_ids": range(5),
    }
    for rule, _ in MAKERS.values():
        found = []
        for backend in ("native", "torch"):
            module = reptile(
                backend, net, loss="cross_entropy", lr=None, optimizer=rule, batch_size=4, steps=7
            )
            out = module(xs, ys, **options)
            models = module.adapt(xs, ys, **options).parameters.values()
            found.append([out.loss, out.task_losses, *gradients(out.loss, *net.parameters())])
            found[-1] += list(models)
        for got, wanted in zip(*found, strict=True):
            assert_close(got, wanted, terms=10**6)


def test_no_tasks(backend):
    net, (xs, ys, *_) = mlp(2, 4, 2), batch(tasks=0)
    module = reptile(backend, net)
    out = module(xs, ys)
    assert out.loss.item() == 0 and out.task_losses.shape == (0,)
    assert not any(g.any() for g in gradients(out.loss, *net.parameters()))
    assert len(module.adapt(xs, ys)) == 0


def test_a_task_that_diverges_is_reported(backend):
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    module = reptile(backend, net)
    clean = module.adapt(xs, ys)
    xs[1, 2, 0] = float("nan")
    models = module.adapt(xs, ys)
    assert models.status.tolist() == [0, 1, 0] and not clean.status.any()
    for name, values in models.parameters.items():
        assert_promised(values[[0, 2]], clean.parameters[name][[0, 2]], backend)
    losses = module(xs, ys).task_losses
    assert losses.isnan().tolist() == [False, True, False]


def test_a_fallback_warns_once_and_says_why():
    net = nn.Sequential(nn.Linear(2, 4), nn.PReLU(), nn.Linear(4, 2)).double()
    module = Reptile(net, loss="mse", lr=0.1, steps=2)
    xs, ys, *_ = batch()
    with pytest.warns(UserWarning, match=r"pymeta\.Reptile runs in torch.*PReLU") as caught:
        module(xs, ys)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.adapt(xs, ys)
    with pytest.warns(UserWarning, match="PReLU") as caught:
        Reptile(net, loss="mse", lr=0.1, steps=2).adapt(xs, ys)
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match=r'backend="native": layer 1 \(PReLU\)'):
        Reptile(net, loss="mse", lr=0.1, steps=2, backend="native")


def test_explain_and_repr():
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    module = reptile("native", net, lr=None, optimizer=Adam(0.1), batch_size=2)
    assert "optimizer=Adam(lr=0.1" in repr(module) and "batch_size=2" in repr(module)
    assert module.explain().endswith("linear tanh linear")
    module(xs, ys)
    assert "the last call had 3 tasks, 3 steps" in module.explain()
    module.adapt(xs[:2], ys[:2], steps=4)
    assert "the last call had 2 tasks, 4 steps" in module.explain()
    assert reptile("torch", net).explain() == 'torch: backend="torch" was asked for'


def test_under_torch_compile(backend):
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    module = reptile(backend, net, batch_size=2)
    wanted = gradients(reptile(backend, net, batch_size=2)(xs, ys).loss, *net.parameters())

    @torch.compile(backend="eager")
    def step(x, y):
        return module(x * 1.0, y).loss

    assert_close(gradients(step(xs, ys), *net.parameters()), wanted)


def test_batch_norm_needs_two_rows_in_each_minibatch(backend):
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    xs, ys, *_ = batch(tasks=2, support=7)
    module = reptile(backend, net, batch_size=3)
    message = r"batch_size: 3 leaves a minibatch of one row of the 7 rows of task 0"
    for call in (module, module.adapt):
        with pytest.raises(ValueError, match=message):
            call(xs, ys)
    assert module(xs[:, :5], ys[:, :5]).loss.isfinite()
    assert module(xs[:, :2], ys[:, :2]).loss.isfinite()
    with pytest.raises(ValueError, match=r"xs.*task 0.*one row"):
        module(xs[:, :1], ys[:, :1])
    module.eval()  # by running statistics, for which one row is enough
    assert module(xs, ys).loss.isfinite() and module(xs[:, :1], ys[:, :1]).loss.isfinite()


CONSTRUCTION = {
    "model": (TypeError, r"model: expected a torch\.nn\.Module, got str", {"model": "net"}),
    "loss": (ValueError, r"loss: expected one of", {"loss": "mae"}),
    "lr": (ValueError, r"lr: expected a finite number >= 0, got nan", {"lr": math.nan}),
    "neither": (ValueError, r"lr, optimizer: .*neither", {"lr": None}),
    "both": (ValueError, r"lr, optimizer: .*both", {"optimizer": SGD(0.1)}),
    "learnable": (
        TypeError,
        r"lr: expected a number, got a LearnableLR, which only MAML can learn",
        {"lr": pymeta.LearnableLR(0.1)},
    ),
    "learnable inside": (
        TypeError,
        r"optimizer\.lr: expected a number, got a LearnableLR",
        {"lr": None, "optimizer": Adam(pymeta.LearnableLR(0.1))},
    ),
    "optimizer": (
        TypeError,
        r"optimizer: expected pymeta\.SGD, pymeta\.Adam or pymeta\.RMSprop, got",
        {"lr": None, "optimizer": torch.optim.Adam},
    ),
    "steps": (ValueError, r"steps: expected an integer >= 0, got -1", {"steps": -1}),
    "steps large": (ValueError, r"steps: .*<= 2147483647, got", {"steps": np.int64(2**31)}),
    "steps type": (TypeError, r"steps: .*got float", {"steps": 1.5}),
    "batch_size": (ValueError, r"batch_size: expected an integer >= 1, got 0", {"batch_size": 0}),
    "batch_size type": (TypeError, r"batch_size: .*got str", {"batch_size": "all"}),
    "adapt": (TypeError, r"adapt: expected a list of patterns", {"adapt": "2.*"}),
    "adapt type": (TypeError, r"adapt: expected a list of patterns.*got int", {"adapt": 2}),
    "adapt nothing": (ValueError, r"adapt: the pattern '7\.\*' matches no", {"adapt": ["7.*"]}),
    "seed": (ValueError, r"seed: expected an integer >= 0, got -3", {"seed": -3}),
    "backend": (ValueError, r"backend: expected one of", {"backend": "gpu"}),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case):
    error, message, changed = CONSTRUCTION[case]
    options = {"model": mlp(2, 4, 3), "loss": "mse", "lr": 0.1, "steps": 2, **changed}
    with pytest.raises(error, match=message):
        Reptile(options.pop("model"), **options)


CALLS = {
    "xs": (ValueError, r"xs: expected 2 features", lambda x, y: (x[..., :1], y), {}),
    "xs dtype": (TypeError, r"xs: expected torch\.float64", lambda x, y: (x.float(), y), {}),
    "ys": (ValueError, r"ys: expected shape", lambda x, y: (x, y[:2]), {}),
    "labels": (ValueError, r"ys: task 0, row 0: label 9 is not in", lambda x, y: (x, y + 9), {}),
    "ys missing": (TypeError, r"ys: expected targets.*got None", lambda x, y: (x, None), {}),
    "steps": (TypeError, r"steps: .*got float", lambda x, y: (x, y), {"steps": 1.0}),
    "sizes": (
        ValueError,
        r"support_sizes.*task 1.*9",
        lambda x, y: (x, y),
        {"support_sizes": [1, 9, 2]},
    ),
    "weights": (
        ValueError,
        r"support_weights.*task 0, row 0.*-1",
        lambda x, y: (x, y),
        {"support_weights": -torch.ones(3, 5)},
    ),
    "task_ids": (
        ValueError,
        r"task_ids: expected shape \[3\], got \[2\]",
        lambda x, y: (x, y),
        {"task_ids": [1, 2]},
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case, backend):
    error, message, change, options = CALLS[case]
    net, (xs, ys, *_) = mlp(2, 4, 3), batch("cross_entropy", out=3)
    ys.zero_()
    module = reptile(backend, net, loss="cross_entropy", batch_size=2)
    for call in (module, module.adapt):
        with pytest.raises(error, match=message):
            call(*change(xs, ys), **options)
    assert net[0].weight.grad is None and module.get_extra_state() == {"stream": 0}


def test_parameters_that_are_not_contiguous():
    """They are copied for the core, and the copies live as long as it reads them."""
    net = mlp(2, 200, 2)
    wide = nn.Sequential(nn.Linear(200, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    for model in (net, wide):
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
        assert not model[0].weight.is_contiguous()
        features = model[0].in_features
        xs, ys = torch.randn(3, 5, features).double(), torch.randn(3, 5, 2).double()
        by = list(model.parameters())
        found = []
        for backend in ("native", "torch"):
            loss = reptile(backend, model, loss="mse", lr=0.05, steps=3)(xs, ys).loss
            found.append(gradients(loss, *by))
            tuned = pymeta.FineTune(model, loss="mse", lr=0.05, epochs=2, backend=backend)(xs, ys)
            found[-1] += list(tuned.parameters.values())
        assert_close(*found)


@pytest.mark.parametrize("executor", [e for _, e in PATHS if e])
def test_task_clip_is_the_mean_of_clipped_ways(executor):
    net = mlp(2, 5, 2)
    xs, ys, _, _ = batch(tasks=19)  # more than the lanes of one register
    single = reptile("torch", net)
    by = list(net.parameters())
    ways = []
    for t in range(19):
        grads = torch.autograd.grad(single(xs[t : t + 1], ys[t : t + 1]).loss, by)
        ways.append(torch.cat([g.reshape(-1) for g in grads]))
    norms = torch.stack([w.norm() for w in ways])
    clip = float(norms.median())
    factors = (clip / (norms + 1e-6)).clamp(max=1.0)
    wanted = sum(f * w for f, w in zip(factors, ways, strict=True)) / 19
    for backend in ("native", "torch"):
        module = reptile(backend, net, task_clip=clip)
        with using(executor=executor):
            got = torch.autograd.grad(module(xs, ys).loss, by)
        assert_close(torch.cat([g.reshape(-1) for g in got]), wanted)
    with using(executor=executor):
        loose = torch.autograd.grad(reptile("native", net, task_clip=1e9)(xs, ys).loss, by)
        plain = torch.autograd.grad(reptile("native", net)(xs, ys).loss, by)
    assert all(torch.equal(a, b) for a, b in zip(loose, plain, strict=True))


def test_task_clip_is_checked_as_mamls():
    for value, kind in [(0.0, ValueError), (math.inf, ValueError), ("1", TypeError)]:
        with pytest.raises(kind, match="task_clip"):
            reptile("auto", mlp(2, 2), task_clip=value)
    learner = reptile("native", mlp(2, 2))
    learner.task_clip = 0.5
    assert learner.task_clip == 0.5 and copy.deepcopy(learner).task_clip == 0.5
