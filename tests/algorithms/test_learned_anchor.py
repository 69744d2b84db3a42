"""Gradients to the strengths of the pull, and a strength that is meta-learned."""

import copy
import math
import pickle

import pytest
import torch
from helpers import assert_close, batch, gradients, mlp
from kernels import PATHS, same_bits, using
from test_anchors import BACKENDS, RULES, maml

import pymeta
from pymeta import LearnableAnchor


def strengths(tasks=3, high=2.0):
    return torch.linspace(0, high, tasks, dtype=torch.float64).requires_grad_()


# ---- gradients to the strengths of tasks ------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_is_the_slope(backend, rule):
    net, data = mlp(2, 4, 2), batch()
    learner = maml(net, backend, optimizer=RULES[rule])
    anchor = torch.tensor([0.3, 0.7, 2.5], dtype=torch.float64, requires_grad=True)
    (slope,) = gradients(learner(*data, anchor=anchor).loss, anchor)
    step = 1e-5
    for t in range(3):
        moved = torch.zeros(3, dtype=torch.float64)
        moved[t] = step
        ends = [learner(*data, anchor=(anchor + s * moved).detach()).loss for s in (1, -1)]
        # truncation is step^2 times a third derivative, rounding eps / step: both below 1e-10
        assert abs((ends[0] - ends[1]) / (2 * step) - slope[t]) < 1e-8


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("first_order", [False, True])
def test_every_executor_has_the_references(path, rule, first_order):
    net, data = mlp(3, 6, 2), batch(tasks=19, inputs=3)
    options = {"optimizer": RULES[rule], "first_order": first_order}
    anchor = strengths(19)
    by = [anchor, *net.parameters()]
    exact = gradients(maml(net, "torch", **options)(*data, anchor=anchor).loss, *by)
    with using(*path):
        found = gradients(maml(net, **options)(*data, anchor=anchor).loss, *by)
        without = gradients(maml(net, **options)(*data, anchor=anchor.detach()).loss, *by[1:])
    assert exact[0].abs().min() > 0
    # Adam and RMSprop divide by a root, which is above eps = 0.1
    assert_close(found, exact, terms=10**5)
    assert same_bits(found[1:], without)  # the others' bits do not know of it


def results(out, adapted, weights):
    """A number of the losses, the predictions and the adapted parameters."""
    total = (out.task_losses * weights).sum() + out.predictions.sin().sum()
    return total + sum(p.cos().sum() for p in adapted.values())


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("case", ["ragged", "own starts", "per element", "step weights", "clip"])
def test_whatever_else_a_call_has(path, case):
    net = mlp(2, 5, 2)
    xs, ys, xq, yq = batch(tasks=5)
    options, call = {"optimizer": RULES["momentum, clipped"]}, {}
    if case == "ragged":
        weights = torch.rand(xs.shape[:2], generator=torch.Generator().manual_seed(0)).double()
        weights[2] = 0
        call = {"support_sizes": [1, 2, 2, 1, 2], "support_weights": weights}
    elif case == "own starts":
        generator = torch.Generator().manual_seed(1)
        start = torch.randn(5, 5, 2, dtype=torch.float64, generator=generator)
        call = {"start": {"0.weight": start.requires_grad_()}}
    elif case == "per element":
        rate = pymeta.LearnableLR(0.1, per="parameter", per_step=True)
        options = {"optimizer": pymeta.SGD(rate, momentum=0.5)}
    elif case == "step weights":
        call = {"step_weights": [0.2, 0.3, 0.5]}
    else:
        options["task_clip"] = 1e-3
    anchor = strengths(5)
    weights = torch.arange(1.0, 6, dtype=torch.float64)

    def slope(backend):
        learner = maml(net, backend, **options)
        out = learner(xs, ys, xq, yq, anchor=anchor, **call)
        if case == "clip":  # which is of what tasks share in the loss's gradient
            return gradients(out.loss, anchor)
        support = {n: v for n, v in call.items() if n != "step_weights"}
        adapted = learner.adapt(xs, ys, anchor=anchor, create_graph=True, **support)
        return gradients(results(out, adapted, weights), anchor, *call.get("start", {}).values())

    exact = slope("torch")
    with using(*path):
        found = slope("native")
    assert exact[0][:2].abs().max() > 0
    if case != "clip":
        assert_close(found, exact, terms=10**5)
    else:  # the reference clips the strength's gradient with the rest; ours is the task's own
        free = gradients(
            maml(net, "native", optimizer=RULES["momentum, clipped"])(
                xs, ys, xq, yq, anchor=anchor
            ).loss,
            anchor,
        )
        assert_close(found, free)


def test_bits_do_not_depend_on_neighbours_or_threads():
    net, (xs, ys, xq, yq) = mlp(3, 6, 2), batch(tasks=37, inputs=3)
    anchor = strengths(37)
    weights = torch.linspace(1, 2, 37, dtype=torch.float64)

    def slope(learner, some):
        out = learner(xs[some], ys[some], xq[some], yq[some], anchor=anchor[some])
        return gradients((out.task_losses * weights[some]).sum(), anchor)[0][some]

    for executor in ("rows", "lanes"):
        with using(executor=executor, threads=1):
            alone = slope(maml(net), slice(None))
        with using(executor=executor, threads=2):
            assert same_bits(slope(maml(net), slice(None)), alone)
            assert same_bits(slope(maml(net), slice(7, 9)), alone[7:9])


# ---- a strength that is learned ---------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_rows", [False, True])
def test_a_learned_strength_is_a_strength(backend, of_rows):
    net, (xs, ys, xq, yq) = mlp(2, 4, 2), batch(tasks=4)
    rows, sizes = xs.shape[1], torch.tensor([1, 2, 2, 1])
    learned = {"anchor_rows" if of_rows else "anchor": LearnableAnchor(3.0)}
    learner = maml(net, backend, **learned)
    out = learner(xs, ys, xq, yq, support_sizes=sizes)
    log = learner.learned_anchor.log
    assert dict(learner.named_parameters())["learned_anchor.log"] is log
    assert rows > 1 and abs(float(log.detach()) - math.log(3)) < 1e-6
    value = log.exp().detach().double()
    anchor = (value / sizes if of_rows else value.expand(4)).clone().requires_grad_()
    wanted = maml(net, backend)(xs, ys, xq, yq, support_sizes=sizes, anchor=anchor)
    assert_close(out.task_losses, wanted.task_losses)
    (by_log,) = gradients(out.loss, log)
    (by_each,) = gradients(wanted.loss, anchor)
    assert_close(by_log, (by_each * anchor).sum().detach())
    models = learner.adapt(xs, ys, support_sizes=sizes)
    same = maml(net, backend).adapt(xs, ys, support_sizes=sizes, anchor=anchor.detach())
    for name, value in models.parameters.items():
        assert_close(value, same.parameters[name])
    given = maml(net, backend)(xs, ys, xq, yq, anchor=[0.0, 1, 2, 3])
    own = learner(xs, ys, xq, yq, anchor=[0.0, 1, 2, 3])  # what a call says comes first
    assert_close(own.task_losses, given.task_losses)


def test_it_is_learned_and_stays_positive():
    """Tasks are all the same, and a row of support misleads: the pull grows and grows."""
    torch.manual_seed(0)
    net = torch.nn.Linear(1, 1, dtype=torch.float64)
    learner = pymeta.MAML(net, loss="mse", lr=0.2, steps=5, anchor_rows=LearnableAnchor(0.2))
    outer = torch.optim.Adam(learner.parameters(), 0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        x = torch.randn(32, 12, 1, generator=generator, dtype=torch.float64)
        y = 2 * x + 1.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        outer.zero_grad()
        learner.accumulate_grad(x[:, :2], y[:, :2], x[:, 2:], y[:, 2:])
        outer.step()
    assert learner.anchor_rows > 0.4 and learner.anchor == 0


def test_the_same_bits_from_accumulate_grad_and_backward_call_after_call():
    net, data = mlp(2, 4, 2), batch(tasks=4)
    learner = maml(net, anchor=LearnableAnchor(0.7))
    for _ in range(3):
        learner.zero_grad()
        learner(*data).loss.backward()
        wanted = [p.grad.clone() for p in learner.parameters()]
        learner.zero_grad()
        learner.accumulate_grad(*data)
        assert same_bits([p.grad for p in learner.parameters()], wanted)
        with torch.no_grad():
            for p, grad in zip(learner.parameters(), wanted, strict=True):
                p -= 0.5 * grad


def test_copies_states_and_adapters_have_it():
    net, (xs, ys, *_) = mlp(2, 4, 2), batch(tasks=4)
    learner = maml(net, anchor_rows=LearnableAnchor(3.0))
    with torch.no_grad():
        learner.learned_anchor.log.fill_(1.0)
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert other.anchor_rows == learner.anchor_rows == math.exp(1.0)
    fresh = maml(mlp(2, 4, 2), anchor_rows=LearnableAnchor(9.0))
    fresh.load_state_dict(learner.state_dict())
    assert fresh.anchor_rows == math.exp(1.0)
    adapter = learner.adapter()
    assert adapter.anchor_rows == math.exp(1.0)
    wanted = learner.adapt(xs, ys).parameters
    for name, value in adapter.adapt(xs.numpy(), ys.numpy()).parameters.items():
        assert_close(torch.from_numpy(value.copy()), wanted[name])


def test_torch_compile_leaves_it_to_eager_mode():
    net, data = mlp(2, 4, 2), batch(tasks=4)
    learner = maml(net, anchor=LearnableAnchor(0.7))
    compiled = torch.compile(lambda *args: learner(*args).loss, backend="eager")
    by = list(learner.parameters())
    assert same_bits(gradients(compiled(*data), *by), gradients(learner(*data).loss, *by))


def test_what_it_may_be():
    net = mlp(2, 4, 2)
    for wrong, error in ((0, ValueError), (-1.0, ValueError), ("1", TypeError)):
        with pytest.raises(error, match=r"^LearnableAnchor.initial: expected a finite number > 0"):
            LearnableAnchor(wrong)
    for both in ({"anchor": LearnableAnchor(1), "anchor_rows": 2.0},
                 {"anchor": 1.0, "anchor_rows": LearnableAnchor(1)}):  # fmt: skip
        with pytest.raises(ValueError, match=r"^anchor, anchor_rows: expected one of them"):
            maml(net, **both)
    clipped = maml(net, anchor=LearnableAnchor(1), task_clip=1.0)
    with pytest.raises(ValueError, match=r"^task_clip: a LearnableAnchor's share"):
        clipped(*batch())
    with pytest.raises(TypeError, match=r"^anchor: .* got a LearnableAnchor, which only MAML"):
        pymeta.FineTune(net, loss="mse", lr=0.1, epochs=1, anchor=LearnableAnchor(1))
    with pytest.raises(TypeError, match=r"^anchor_rows: .* which only MAML can learn"):
        pymeta.Reptile(net, loss="mse", lr=0.1, steps=1, anchor_rows=LearnableAnchor(1))
