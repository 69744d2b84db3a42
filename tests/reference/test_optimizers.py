"""The inner optimisers of the reference against torch.optim, and their exact second order."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from helpers import assert_close, batch, gradients, mlp
from torch import nn

import pymeta
from pymeta import SGD, Adam, RMSprop, reference
from pymeta.spec.anchors import Anchor
from pymeta.spec.losses import Loss
from pymeta.spec.optimizers import rates
from pymeta.spec.schedule import Schedule, permutation
from pymeta.tasks.checks import Expected
from pymeta.tasks.task_set import SUPPORT, task_set

LR = 0.05

# name -> (description, the torch optimiser over some parameters)
RULES = {
    "sgd": (SGD(LR), lambda p: torch.optim.SGD(p, LR)),
    "decay": (SGD(LR, weight_decay=0.1), lambda p: torch.optim.SGD(p, LR, weight_decay=0.1)),
    "momentum": (SGD(LR, momentum=0.9), lambda p: torch.optim.SGD(p, LR, momentum=0.9)),
    "nesterov": (
        SGD(LR, momentum=0.8, nesterov=True, weight_decay=0.2),
        lambda p: torch.optim.SGD(p, LR, momentum=0.8, nesterov=True, weight_decay=0.2),
    ),
    "clip": (SGD(LR, momentum=0.5, clip_norm=0.3), lambda p: torch.optim.SGD(p, LR, momentum=0.5)),
    "adam": (Adam(LR), lambda p: torch.optim.Adam(p, LR)),
    "reptile": (Adam(LR, betas=(0.0, 0.999)), lambda p: torch.optim.Adam(p, LR, (0.0, 0.999))),
    "adam decay": (
        Adam(LR, weight_decay=0.1, eps=1e-3, clip_norm=0.2),
        lambda p: torch.optim.Adam(p, LR, weight_decay=0.1, eps=1e-3),
    ),
    "adamw": (
        Adam(LR, weight_decay=0.1, decoupled=True),
        lambda p: torch.optim.AdamW(p, LR, weight_decay=0.1),
    ),
    "rmsprop": (RMSprop(LR, eps=1e-6), lambda p: torch.optim.RMSprop(p, LR, eps=1e-6)),
    "rmsprop decay": (
        RMSprop(LR, alpha=0.8, eps=1e-3, weight_decay=0.1, momentum=0.5, clip_norm=0.2),
        lambda p: torch.optim.RMSprop(p, LR, 0.8, 1e-3, weight_decay=0.1, momentum=0.5),
    ),
    "rmsprop centered": (
        RMSprop(LR, alpha=0.9, eps=1e-3, centered=True),
        lambda p: torch.optim.RMSprop(p, LR, 0.9, 1e-3, centered=True),
    ),
    "rmsprop all": (
        RMSprop(LR, alpha=0.9, eps=1e-3, weight_decay=0.1, momentum=0.9, centered=True),
        lambda p: torch.optim.RMSprop(p, LR, 0.9, 1e-3, 0.1, momentum=0.9, centered=True),
    ),
}


def supports(x, y, weights=None, loss="mse"):
    expected = Expected(Loss(loss), torch.float64, torch.device("cpu"))
    return task_set(SUPPORT, x, y, None, weights, expected)


def inner_loop(net, rule, schedule, loss="mse", names=None, **options):
    sizes = {n: p.numel() for n, p in net.named_parameters() if names is None or n in names}
    lr = torch.tensor([rule.lr], dtype=torch.float64)
    return reference.InnerLoop(
        Loss(loss), lr, rates("network", sizes), schedule, optimizer=rule, **options
    )


def by_hand(net, make, clip, x, y, schedule, task_id=0, loss=nn.functional.mse_loss):
    """The same by torch.optim on a copy of the model."""
    net = copy.deepcopy(net)
    optimizer = make(net.parameters())
    rows, size = len(x), schedule.batch_size or len(x)
    count = math.ceil(rows / size)
    steps = schedule.steps if schedule.epochs is None else schedule.epochs * count
    for step in range(steps):
        epoch, b = divmod(step, count)
        order = permutation(schedule.seed, schedule.stream, task_id, epoch, rows)
        chosen = order[b * size : (b + 1) * size] if count > 1 else slice(None)
        optimizer.zero_grad()
        loss(net(x[chosen]), y[chosen]).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return dict(net.named_parameters())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "schedule",
    [Schedule(steps=5), Schedule(steps=4, batch_size=3, seed=1), Schedule(epochs=3, batch_size=2)],
    ids=["steps", "minibatches", "epochs"],
)
def test_trajectories_are_those_of_torch_optim(name, schedule):
    rule, make = RULES[name]
    net, (xs, ys, *_) = mlp(2, 6, 2), batch(tasks=3, support=7)
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    inner = inner_loop(net, rule, schedule)
    ids = [0, 5, 2]
    for task_ids in (None, ids):
        done = reference.adapt(
            net, parameters, list(parameters), inner, supports(xs, ys), task_ids=task_ids
        )
        for t in range(3):
            task_id = 0 if task_ids is None else task_ids[t]
            wanted = by_hand(net, make, rule.clip_norm, xs[t], ys[t], schedule, task_id)
            got = [done.parameters[n][t] for n in wanted]
            assert_close(got, list(wanted.values()))
    assert not done.status.any()


def test_a_task_without_rows_is_left_alone():
    rule = Adam(LR, weight_decay=0.1, decoupled=True)
    net, (xs, ys, *_) = mlp(2, 4, 2), batch(tasks=2)
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    names = list(parameters)
    for schedule in (Schedule(steps=3), Schedule(epochs=3, batch_size=2)):
        inner = inner_loop(net, rule, schedule)
        support = supports([xs[0], xs[1, :0]], [ys[0], ys[1, :0]])
        done = reference.adapt(net, parameters, names, inner, support).parameters
        assert all(torch.equal(done[n][1], p) for n, p in parameters.items())
        assert not any(torch.equal(done[n][0], p) for n, p in parameters.items())


def test_the_anchor_is_a_penalty():
    """The gradient of anchor/2 |theta - start|^2, under an optimiser that has a momentum."""
    net, (xs, ys, *_) = mlp(2, 4, 2), batch(tasks=1)
    rule = SGD(LR, momentum=0.9, clip_norm=0.5)
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    inner = inner_loop(net, rule, Schedule(steps=5), anchor=Anchor(0.7))
    done = reference.adapt(net, parameters, list(parameters), inner, supports(xs, ys))
    twin = copy.deepcopy(net)
    optimizer = torch.optim.SGD(twin.parameters(), LR, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        pull = sum((p - parameters[n]).square().sum() for n, p in twin.named_parameters())
        (nn.functional.mse_loss(twin(xs[0]), ys[0]) + 0.7 / 2 * pull).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
    for name, wanted in twin.named_parameters():
        assert_close(done.parameters[name][0], wanted)


# ---- second order -----------------------------------------------------------------------------

# with a large eps, so that the differences below see a smooth function
SMOOTH = {name: rule for name, (rule, _) in RULES.items() if isinstance(rule, SGD)} | {
    "adam": Adam(LR, eps=0.1),
    "reptile": Adam(LR, betas=(0.0, 0.999), eps=0.1),
    "adam decay": Adam(LR, weight_decay=0.1, eps=0.1, clip_norm=0.2),
    "adamw": Adam(LR, weight_decay=0.1, eps=0.1, decoupled=True),
    "rmsprop": RMSprop(LR, 0.8, eps=0.1, weight_decay=0.1, clip_norm=0.2),
    "rmsprop momentum": RMSprop(LR, 0.8, eps=0.1, momentum=0.5),
    "rmsprop all": RMSprop(LR, 0.8, eps=0.1, weight_decay=0.1, momentum=0.5, centered=True),
}
BACKENDS = ["torch", "native"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SMOOTH)
def test_finite_differences_of_the_meta_loss(name, backend):
    """Differences over five points along a random direction in parameters and inputs."""
    net = mlp(2, 4, 3)
    xs, ys, xq, yq = batch("cross_entropy", out=3)
    xs.requires_grad_()
    tensors = [*net.parameters(), xs]
    module = pymeta.MAML(
        net, loss="cross_entropy", optimizer=SMOOTH[name], steps=3, backend=backend
    )
    found = gradients(module(xs, ys, xq, yq).loss, *tensors)
    directions = [torch.randn_like(t) for t in tensors]
    slope = sum((g * d).sum() for g, d in zip(found, directions, strict=True))
    h, values = 1e-3, {}
    kept = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        for k in (-2, -1, 1, 2):
            for t, before, d in zip(tensors, kept, directions, strict=True):
                t.copy_(before + k * h * d)
            values[k] = module(xs, ys, xq, yq).loss
    numeric = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)
    # truncation is h^4 / 30 times a fifth derivative: 3e-14 times what eps makes large, 1 / eps^4
    assert abs(float(numeric - slope)) < 1e-9 * max(1.0, abs(float(slope)))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradients_agree_between_backends(name, first_order):
    rule = copy.copy(RULES[name][0])
    lr = pymeta.LearnableLR(LR, "parameter", per_step=True)
    object.__setattr__(rule, "lr", lr)
    net, data = mlp(2, 5, 2), batch()
    data[0].requires_grad_()
    found = []
    for backend in BACKENDS:
        module = pymeta.MAML(
            net, loss="mse", optimizer=rule, steps=3, first_order=first_order, backend=backend
        )
        out = module(*data)
        found.append([out.loss, *gradients(out.loss, *module.parameters(), data[0])])
    assert_close(found[0][0], found[1][0])
    for got, wanted in zip(*found, strict=True):
        # the others divide by the root of a running mean of squares; an error in a small gradient
        # grows by 1 / (sqrt(s) + eps), which here is below 1e5
        assert_close(got, wanted, terms=1000 if isinstance(rule, SGD) else 10**10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_order_takes_the_gradients_alone_as_constants(backend):
    """One step of theta (1 - lr decay) - lr g: FOMAML's factor is 1 - lr decay."""
    net, data = mlp(2, 4, 2), batch()
    for rule in (SGD(0.1, weight_decay=2.0), SGD(0.1, 0.9, weight_decay=2.0)):
        module = pymeta.MAML(
            net, loss="mse", optimizer=rule, steps=1, first_order=True, backend=backend
        )
        got = gradients(module(*data).loss, *net.parameters())
        models = module.adapt(*data[:2])
        query = [
            gradients(nn.functional.mse_loss(m(x), y), *m.parameters())
            for m, x, y in zip(models, data[2], data[3], strict=True)
        ]
        wanted = [0.8 * torch.stack(each).mean(0) for each in zip(*query, strict=True)]
        assert_close(got, wanted)


DEAD = ["momentum", "clip", "adam", "adam decay", "rmsprop", "rmsprop decay", "rmsprop all"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DEAD)
def test_dead_units_and_zero_gradients_have_finite_derivatives(name, backend):
    net = mlp(2, 4, 2, act=nn.ReLU)
    with torch.no_grad():
        net[0].bias[1] = -100  # this unit is 0 for every input, and so are its gradients
    xs, ys, xq, yq = batch()
    ys[1] = net(xs[1]).detach()  # this task has no gradient at all
    module = pymeta.MAML(net, loss="mse", optimizer=RULES[name][0], steps=3, backend=backend)
    out = module(xs, ys, xq, yq)
    found = gradients(out.loss, *net.parameters())
    assert all(g.isfinite().all() for g in found)
    assert any(g.any() for g in found)
    decays = RULES[name][0].weight_decay > 0
    assert torch.equal(
        module.adapt(xs, ys).parameters["0.bias"][:, 1] == -100, ~torch.full((3,), decays)
    )


def test_under_torch_compile():
    net, data = mlp(2, 4, 2), batch()
    module = pymeta.MAML(net, loss="mse", optimizer=Adam(LR, clip_norm=0.3), steps=2)
    wanted = gradients(module(*data).loss, *net.parameters())
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    loss = compiled(*data).loss
    assert_close(torch.autograd.grad(loss, list(net.parameters())), wanted)  # keeps no graph


# ---- descriptions -----------------------------------------------------------------------------

BAD = {
    "lr": (ValueError, r"Adam\.lr: expected a finite number >= 0, got -1", Adam, {"lr": -1}),
    "lr type": (TypeError, r"SGD\.lr: expected a finite number >= 0 or", SGD, {"lr": "0.1"}),
    "momentum": (ValueError, r"SGD\.momentum: .*>= 0, got -0\.9", SGD, {"momentum": -0.9}),
    "momentum nan": (ValueError, r"SGD\.momentum: .*nan", SGD, {"momentum": math.nan}),
    "momentum type": (TypeError, r"SGD\.momentum: .*got bool", SGD, {"momentum": True}),
    "nesterov": (ValueError, r"SGD\.nesterov: expected momentum > 0", SGD, {"nesterov": True}),
    "nesterov type": (
        TypeError,
        r"SGD\.nesterov: expected a bool, got int",
        SGD,
        {"momentum": 0.9, "nesterov": 1},
    ),
    "decay": (ValueError, r"SGD\.weight_decay: .*got inf", SGD, {"weight_decay": math.inf}),
    "adam decay": (ValueError, r"Adam\.weight_decay: .*got -1", Adam, {"weight_decay": -1}),
    "clip": (ValueError, r"SGD\.clip_norm: .*> 0, got 0", SGD, {"clip_norm": 0.0}),
    "adam clip": (ValueError, r"Adam\.clip_norm: .*got inf", Adam, {"clip_norm": math.inf}),
    "betas": (ValueError, r"Adam\.betas: expected numbers >= 0 and < 1", Adam, {"betas": (0.9, 1)}),
    "beta": (ValueError, r"Adam\.betas: .*got -0\.1", Adam, {"betas": (-0.1, 0.9)}),
    "betas type": (TypeError, r"Adam\.betas: expected two numbers", Adam, {"betas": 0.9}),
    "betas length": (TypeError, r"Adam\.betas: expected two numbers", Adam, {"betas": (0.9,)}),
    "beta type": (TypeError, r"Adam\.betas: .*got str", Adam, {"betas": ("a", 0.9)}),
    "eps": (ValueError, r"Adam\.eps: .*got -1e-08", Adam, {"eps": -1e-8}),
    "decoupled": (TypeError, r"Adam\.decoupled: expected a bool", Adam, {"decoupled": 1}),
    "alpha": (ValueError, r"RMSprop\.alpha: .*>= 0 and < 1, got 1", RMSprop, {"alpha": 1}),
    "alpha type": (TypeError, r"RMSprop\.alpha: .*got str", RMSprop, {"alpha": "0.9"}),
    "rmsprop eps": (ValueError, r"RMSprop\.eps: .*got -1", RMSprop, {"eps": -1}),
    "rmsprop momentum": (ValueError, r"RMSprop\.momentum: .*nan", RMSprop, {"momentum": math.nan}),
    "rmsprop lr": (ValueError, r"RMSprop\.lr: .*got -1", RMSprop, {"lr": -1}),
    "rmsprop clip": (ValueError, r"RMSprop\.clip_norm: .*> 0, got 0", RMSprop, {"clip_norm": 0.0}),
    "centered": (TypeError, r"RMSprop\.centered: expected a bool", RMSprop, {"centered": 1}),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_descriptions_are_refused(case):
    error, message, kind, options = BAD[case]
    with pytest.raises(error, match=message):
        kind(**{"lr": 0.1, **options})


def test_descriptions_are_values():
    assert Adam(0.1, betas=[0, 0.9]) == Adam(0.1, betas=(0.0, 0.9))
    assert hash(Adam(0.1, betas=[0, 0.9])) == hash(Adam(0.1, (0.0, 0.9)))
    assert SGD(pymeta.LearnableLR(0.1), clip_norm=1) == SGD(pymeta.LearnableLR(0.1), clip_norm=1.0)


def test_numbers_of_numpy_are_numbers():
    sgd = pymeta.SGD(np.float32(0.5), momentum=np.float32(0.25), clip_norm=np.int64(2))
    assert sgd == pymeta.SGD(0.5, momentum=0.25, clip_norm=2.0)
    adam = pymeta.Adam(np.float64(0.5), eps=np.float32(0.125), weight_decay=np.float16(1))
    rmsprop = pymeta.RMSprop(np.float32(0.5), np.float32(0.25), np.float16(1), momentum=np.int8(1))
    assert rmsprop == pymeta.RMSprop(0.5, alpha=0.25, eps=1.0, momentum=1.0)
    assert json.dumps([*vars(sgd).values(), *vars(adam).values(), *vars(rmsprop).values()])
    assert type(pymeta.LearnableLR(np.float32(0.5)).initial) is float
