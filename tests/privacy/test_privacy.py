"""pymeta.privacy: clipped sums, noise, samples, epsilon, and what it keeps from an attacker."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_close, batch, mlp
from torch import nn

import pymeta
from pymeta.learners import BayesianHead, EncodedMAML, ProtoNet, RelationalMAML, RidgeHead
from pymeta.privacy import PrivateTraining, epsilon, noise_multiplier_for
from pymeta.privacy.noise import Randomness
from pymeta.privacy.shares import ClippedSum

accounting = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")


def maml(backend="native", lr=0.1):
    return pymeta.MAML(mlp(3, 6, 1), loss="mse", lr=lr, steps=2, backend=backend)


def reptile(backend="native"):
    return pymeta.Reptile(mlp(3, 6, 1), loss="mse", lr=0.1, steps=3, backend=backend)


def ridge():
    return RidgeHead(mlp(3, 6), features=6, outputs=1, loss="mse").double()


LEARNERS = {
    "maml": maml,
    "maml in torch": lambda: maml("torch"),
    "meta-sgd": lambda: maml(lr=pymeta.LearnableLR(0.1)),
    "reptile": reptile,
    "reptile in torch": lambda: reptile("torch"),
    "ridge": ridge,
    "bayesian": lambda: BayesianHead(mlp(3, 6), features=6, outputs=1).double(),
}


def data_for(learner, tasks=7):
    data = batch(tasks=tasks, support=5, query=4, inputs=3, out=1)
    return data[:2] if isinstance(learner, pymeta.Reptile) else data


def training(learner, rate=0.5, clip=1.0, noise=1.0, tasks=7, seed=0, lr=1.0):
    optimizer = torch.optim.SGD(learner.parameters(), lr)
    options = {"clip": clip, "noise_multiplier": noise, "sampling_rate": rate, "tasks": tasks}
    return PrivateTraining(learner, optimizer, **options, seed=seed)


def flat(tensors):
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


# ---- what a task adds -------------------------------------------------------------------------


@pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
def test_the_sum_is_that_of_single_tasks_shares_clipped(make):
    learner = make()
    by = list(learner.parameters())
    data = data_for(learner)
    shares = []
    for t in range(7):
        loss = learner(*(d[t : t + 1] for d in data)).loss
        grads = torch.autograd.grad(loss, by, allow_unused=True, materialize_grads=True)
        shares.append(flat(grads))
    norms = torch.stack([s.norm() for s in shares])
    clip = float(norms.median())
    wanted = sum(s * min(1.0, clip / (float(n) + 1e-6)) for s, n in zip(shares, norms, strict=True))
    assert (norms > clip).any() and (norms < clip).any()
    assert_close(flat(ClippedSum(learner, clip, by)(data, {})), wanted)
    lists = tuple(list(d) for d in data)
    assert_close(flat(ClippedSum(learner, clip, by)(lists, {})), wanted)


@pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
@pytest.mark.parametrize("poison", [math.inf, math.nan, 1e200])
def test_a_task_adds_no_more_than_the_clip_whatever_it_holds(make, poison):
    learner = make()
    by = list(learner.parameters())
    data = [d.clone() for d in data_for(learner)]
    total = ClippedSum(learner, 0.5, by)
    others = flat(total(tuple(d[[0, 1, 3, 4, 5, 6]] for d in data), {}))
    for d in data:
        d[2] = poison
    found = flat(total(tuple(data), {}))
    assert found.isfinite().all() and float((found - others).norm()) <= 0.5 + 1e-9


@pytest.mark.parametrize("head", [RidgeHead, BayesianHead])
def test_a_task_that_a_head_cannot_solve_for_adds_nothing(head):
    """Its features are finite, all alike and large; float32 has no factor of their products."""
    loss = {"loss": "mse"} if head is RidgeHead else {}
    learner = head(nn.Identity(), features=3, outputs=1, **loss)
    by = list(learner.parameters())
    data = [d.float() for d in batch(tasks=7, support=20, query=4, inputs=3, out=1)]
    total = ClippedSum(learner, 0.5, by)
    others = flat(total(tuple(d[[0, 1, 3, 4, 5, 6]] for d in data), {}))
    data[0][2] = 1e10 * (1 + 1e-6 * data[0][2])
    with pytest.raises(ValueError, match="no solution in float32"):
        learner(*data)
    bound = 64 * torch.finfo(torch.float32).eps * 6 * 0.5  # six shares, of other batches
    assert float((flat(total(tuple(data), {})) - others).norm()) <= bound


class Stubborn(torch.autograd.Function):
    """The identity, whose way back looks at a number, which no vectorised one can."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, flow):
        return flow if float(flow.abs().sum()) >= 0 else None


class StubbornLayer(nn.Module):
    def forward(self, x):
        return Stubborn.apply(x)


@pytest.mark.parametrize("stubborn", [False, True])
def test_tasks_of_a_head_are_computed_together(stubborn):
    """Forty tasks are three calls; where a layer forbids it, one for each, and the same sum."""
    learner, data = ridge(), batch(tasks=40, support=5, query=4, inputs=3, out=1)
    by = list(learner.parameters())
    wanted = flat(ClippedSum(learner, 0.1, by)._one_by_one(data, {}))
    if stubborn:
        learner.encoder = nn.Sequential(learner.encoder, StubbornLayer())
    calls = []
    learner.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    assert_close(flat(ClippedSum(learner, 0.1, by)(data, {})), wanted)
    assert calls == ([16] + [1] * 40 if stubborn else [16, 16, 8])


OTHERS = {
    "implicit": lambda: pymeta.MAML(
        mlp(3, 6, 1), loss="mse", lr=0.1, steps=5, implicit=pymeta.Implicit(1.0)
    ),
    "bayesian": lambda: BayesianHead(mlp(3, 6), features=6, outputs=1),
    "protonet": lambda: ProtoNet(mlp(3, 6)),
    "relational": lambda: RelationalMAML(
        mlp(3, 6, 1), loss="mse", features=3, targets=1, lr=0.1, steps=2
    ),
    "encoded": lambda: EncodedMAML(mlp(3, 6), mlp(6, 1), loss="mse", lr=0.1, steps=2),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_learners_are_taken(make):
    learner = make().double()
    data = batch(tasks=3, inputs=3, out=1)
    if isinstance(learner, ProtoNet):
        data = batch("cross_entropy", tasks=3, inputs=3, out=2)
        data[1][:, :2] = torch.tensor([0, 1])
    by = list(learner.parameters())
    found = ClippedSum(learner, 0.01, by)(tuple(data), {})
    assert 0 < float(flat(found).norm()) <= 0.03


def test_options_and_ragged_tasks_go_to_their_tasks():
    learner = maml()
    by = list(learner.parameters())
    xs, ys, xq, yq = batch(tasks=4, support=5, query=4, inputs=3, out=1)
    weights = torch.rand(4, 5).double()
    total = ClippedSum(learner, 0.5, by)
    whole = flat(total((xs, ys, xq, yq), {"support_weights": weights}))
    xq[1] = math.nan  # which makes it halve the batch
    parts = flat(total((xs, ys, xq, yq), {"support_weights": weights}))
    keep = [0, 2, 3]
    without = {"support_weights": weights[keep]}
    wanted = flat(total((xs[keep], ys[keep], xq[keep], yq[keep]), without))
    assert_close(parts, wanted)
    assert float((whole - parts).norm()) <= 0.5 + 1e-9 and not torch.equal(whole, parts)


def test_running_statistics_are_refused():
    """They would keep what the tasks show them as it is."""
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()
    options = {"loss": "mse", "lr": 0.1, "steps": 1}
    for kind in (pymeta.MAML, pymeta.Reptile):
        with pytest.raises(ValueError, match="running statistics"):
            training(kind(net, **options))
    fixed = pymeta.MAML(net.eval(), **options)
    private = training(fixed)
    some = private.sample()
    net.train()
    with pytest.raises(ValueError, match="running statistics"):
        private.step(*(d[some] for d in data_for(fixed)))
    plain = nn.BatchNorm1d(6, track_running_stats=False)
    own = nn.Sequential(nn.Linear(3, 6), plain, nn.Linear(6, 1)).double()
    training(pymeta.MAML(own, **options))


def test_a_module_that_lets_tasks_see_each_other_is_refused():
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)).double()
    with pytest.raises(ValueError, match="running statistics"):
        training(RidgeHead(net, features=6, outputs=1, loss="mse").double())
    plain = nn.BatchNorm1d(6, track_running_stats=False)
    net = nn.Sequential(nn.Linear(3, 6), plain).double()
    with pytest.raises(ValueError, match="see each other"):
        training(RidgeHead(net, features=6, outputs=1, loss="mse").double())
    with pytest.raises(TypeError, match="learner: expected"):
        training(pymeta.FineTune(mlp(3, 1), loss="mse", lr=0.1, epochs=1))
    with pytest.raises(TypeError, match="learner: expected"):
        training(nn.Linear(3, 1))

    class Mine(pymeta.MAML):
        def forward(self, *data, **options):
            return super().forward(*data, **options)

    with pytest.raises(TypeError, match="learner: expected"):  # who knows what it does
        training(Mine(mlp(3, 1), loss="mse", lr=0.1, steps=1))


# ---- a step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
def test_a_step_is_the_noisy_sum_over_the_expected_number(make):
    learner = make()
    data = data_for(learner)
    before = flat(learner.parameters())
    private = training(learner, clip=0.3, noise=0.8)
    some = private.sample()
    assert 0 < len(some) < 7
    expected = ClippedSum(learner, 0.3, list(learner.parameters()))(
        tuple(d[some] for d in data), {}
    )
    again = Randomness(0)
    again.uniform(7)
    noise = np.concatenate([again.normal(s.numel()) for s in expected]) * 0.8 * 0.3
    private.step(*(d[some] for d in data))
    wanted = before - (flat(expected) + torch.from_numpy(noise)) / 3.5
    assert_close(flat(learner.parameters()), wanted)
    assert private.steps == 1 and all(p.grad is None for p in learner.parameters())


def test_an_empty_sample_makes_a_step_of_noise():
    learner = maml()
    before = flat(learner.parameters())
    private = training(learner, rate=1e-9)
    assert len(private.sample()) == 0
    private.step()
    moved = flat(learner.parameters()) - before
    assert private.steps == 1 and float(moved.abs().min()) > 0
    private.sample()
    private.step(*(d[:0] for d in data_for(learner)))
    assert private.steps == 2


def test_steps_take_what_was_drawn_and_nothing_else():
    learner = maml()
    data = data_for(learner)
    private = training(learner)
    with pytest.raises(RuntimeError, match="sample"):
        private.step(*data)
    some = private.sample()
    with pytest.raises(RuntimeError, match="choose among samples"):
        private.sample()
    with pytest.raises(ValueError, match=f"xs: expected the {len(some)} tasks"):
        private.step(*data)
    with pytest.raises(TypeError, match="step_weights"):
        private.step(*(d[some] for d in data), step_weights=[1.0])
    learner.task_clip = 5.0
    with pytest.raises(RuntimeError, match="task_clip"):
        private.step(*(d[some] for d in data))


def test_an_optimiser_of_other_parameters_is_refused():
    learner = maml()
    other = torch.optim.SGD([*learner.parameters(), nn.Parameter(torch.zeros(1))], 0.1)
    options = {"tasks": 5, "sampling_rate": 0.5, "clip": 1.0, "noise_multiplier": 1.0}
    with pytest.raises(ValueError, match="optimizer: expected the learner's parameters"):
        PrivateTraining(learner, other, **options)
    mine = torch.optim.SGD(learner.parameters(), 0.1)
    for name, value, kind in [
        ("tasks", 0, ValueError),
        ("tasks", 2.0, TypeError),
        ("sampling_rate", 0.0, ValueError),
        ("sampling_rate", 1.5, ValueError),
        ("clip", 0.0, ValueError),
        ("clip", math.inf, ValueError),
        ("noise_multiplier", -1.0, ValueError),
        ("noise_multiplier", "1", TypeError),
        ("seed", -1, ValueError),
        ("seed", 0.5, TypeError),
    ]:
        with pytest.raises(kind, match=name):
            PrivateTraining(learner, mine, **{**options, name: value})
    with pytest.raises(TypeError, match="optimizer"):
        PrivateTraining(learner, None, **options)


def test_a_training_goes_on_where_it_was_saved():
    runs = []
    for stops in (False, True):
        torch.manual_seed(0)
        learner = maml()
        data = data_for(learner)
        private = training(learner)
        for step in range(6):
            if stops and step == 3:
                state = private.state_dict()
                private = training(learner, seed=99)
                private.load_state_dict(state)
            some = private.sample()
            private.step(*(d[some] for d in data))
        assert private.steps == 6
        runs.append(flat(learner.parameters()))
    assert torch.equal(*runs)
    with pytest.raises(ValueError, match="same kind"):
        training(learner, seed=None).load_state_dict(state)


# ---- random numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 0])
def test_random_numbers_are_uniform_and_normal(seed):
    """Kolmogorov and Smirnov's distance of 200,000: above 4e-3 once in 10 million times."""
    n = 200_000
    some = Randomness(seed)
    for values, cdf in (
        (some.uniform(n), lambda x: x),
        (some.normal(n), lambda x: 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))),
    ):
        values = np.sort(values)
        assert values.shape == (n,) and np.isfinite(values).all()
        distance = np.abs(cdf(values) - (np.arange(n) + 0.5) / n).max()
        assert distance < 6.5e-3
    same = np.array_equal(Randomness(seed).normal(9), Randomness(seed).normal(9))
    assert same == (seed is not None)


def test_samples_are_poissons():
    """Each of 50 tasks is drawn independently: the counts are binomial."""
    private = training(maml(), rate=0.3, tasks=50)
    drawn = np.zeros((400, 50))
    for row in drawn:
        some = private.sample()
        row[some] = 1
        private._drawn = None
        assert np.array_equal(some, np.unique(some))
    # 400 * 50 draws: the mean is within 6 standard deviations; so is the variance of the sizes
    assert abs(drawn.mean() - 0.3) < 6 * math.sqrt(0.21 / drawn.size)
    assert abs(drawn.sum(1).var() / (50 * 0.21) - 1) < 6 * math.sqrt(2 / 400)


# ---- epsilon ----------------------------------------------------------------------------------


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def delta_of_gaussian(eps, sigma):
    """Balle, Wang 2018, theorem 8: the exact delta of one Gaussian mechanism."""
    a, b = 1 / (2 * sigma), eps * sigma
    return normal_cdf(a - b) - math.exp(eps) * normal_cdf(-a - b)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (2.0, 4), (5.0, 30)])
def test_without_sampling_epsilon_is_the_gaussian_mechanisms(noise, steps):
    found = epsilon(delta=1e-5, noise_multiplier=noise, sampling_rate=1.0, steps=steps)
    exact = delta_of_gaussian(found, noise / math.sqrt(steps))  # k steps are one of sigma/sqrt(k)
    assert 0.97e-5 < exact <= 1e-5 * (1 + 1e-6)


def test_epsilon_grows_with_steps_and_falls_with_noise():
    how = {"delta": 1e-5, "sampling_rate": 0.05}
    base = epsilon(noise_multiplier=1.1, steps=300, **how)
    assert epsilon(noise_multiplier=1.1, steps=600, **how) > base
    assert epsilon(noise_multiplier=2.2, steps=300, **how) < base
    assert epsilon(noise_multiplier=1.1, steps=300, accountant="rdp", **how) > base
    assert epsilon(noise_multiplier=1.1, steps=0, **how) == 0.0
    assert epsilon(noise_multiplier=0.0, steps=1, **how) == math.inf


def test_the_noise_for_an_epsilon_gives_it():
    how = {"delta": 1e-5, "sampling_rate": 0.1, "steps": 200}
    noise = noise_multiplier_for(epsilon=3.0, **how)
    found = epsilon(noise_multiplier=noise, **how)
    assert 2.95 < found <= 3.0 + 1e-6
    learner = maml()
    private = training(learner, rate=0.1, noise=noise)
    private.load_state_dict({**private.state_dict(), "steps": 200})
    assert private.epsilon(1e-5) == found


def test_numpys_numbers_are_numbers():
    plain = epsilon(delta=1e-5, noise_multiplier=1.5, sampling_rate=0.25, steps=10)
    numbers = {"noise_multiplier": np.float32(1.5), "sampling_rate": np.float64(0.25)}
    assert epsilon(delta=1e-5, steps=np.int64(10), **numbers) == plain
    learner = maml()
    private = training(learner, tasks=np.int64(7), seed=np.int64(0))
    data = data_for(learner)
    some = private.sample()
    anchor = np.full(7, 0.1)[some]
    private.step(*(d[some] for d in data), anchor=anchor)
    assert private.steps == 1


def test_wrong_arguments_of_epsilon_are_refused_by_name():
    good = {"delta": 1e-5, "noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 10}
    for name, value, kind in [
        ("delta", 0.0, ValueError),
        ("delta", 1.0, ValueError),
        ("noise_multiplier", math.nan, ValueError),
        ("sampling_rate", 2.0, ValueError),
        ("steps", -1, ValueError),
        ("steps", 1.0, TypeError),
        ("accountant", "moments", ValueError),
    ]:
        with pytest.raises(kind, match=name):
            epsilon(**{**good, name: value})
    with pytest.raises(ValueError, match="steps"):
        noise_multiplier_for(epsilon=1.0, delta=1e-5, sampling_rate=0.1, steps=0)


# ---- an attack --------------------------------------------------------------------------------


def attacked(noise):
    """How well an attacker tells members from others, by the loss of their own tasks: the AUC.

    Targets are coin flips, so that to do well on a task is to remember it.
    """
    torch.manual_seed(0)
    net = mlp(6, 64, 1, dtype=torch.float32)
    learner = pymeta.MAML(net, loss="mse", lr=0.05, steps=1, backend="native")
    xs, xq = torch.randn(2, 150, 4, 6)
    ys, yq = torch.randn(2, 150, 4, 1).sign()
    members = slice(0, 30)
    optimizer = torch.optim.Adam(learner.parameters(), 0.01)
    private = PrivateTraining(
        learner, optimizer, tasks=30, sampling_rate=0.5, clip=1.0, noise_multiplier=noise, seed=1
    )
    mine = [d[members] for d in (xs, ys, xq, yq)]
    for some in private.samples(400):
        private.step(*(d[some] for d in mine))
    with torch.no_grad():
        losses = learner(xs, ys, xq, yq).task_losses
    return float((losses[:30, None] < losses[30:]).double().mean())


def test_an_attacker_finds_members_without_noise_and_not_with_it():
    """Of 30 members and 120 others, chance has an AUC of 0.5 with a deviation of 0.06."""
    assert attacked(0.0) > 0.95
    assert attacked(40.0) < 0.65
