"""Query sets normalised by their support sets' statistics, which gradients go through."""

import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_promised
from kernels import EXECUTORS, PATHS, same_bits, using
from torch import nn
from torch.nn import functional as F

import pymeta
from pymeta.nn import PerStepBatchNorm, at_step


class Counting(nn.Module):
    """A batch normalisation by its first `count` rows alone, written out."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.count, self.step = norm, None, None

    def forward(self, x):
        axes = (0, *range(2, x.ndim))
        counting = x[: self.count]
        mean = counting.mean(axes, keepdim=True)
        var = (counting - mean).square().mean(axes, keepdim=True)
        weight, bias = self.norm.weight, self.norm.bias
        if isinstance(self.norm, PerStepBatchNorm):
            step = self.norm.step
            row = self.norm.steps - 1 if step is None else min(step, self.norm.steps - 1)
            weight, bias = weight[row], bias[row]
        shape = (1, -1, *[1] * (x.ndim - 2))
        h = (x - mean) / torch.sqrt(var + self.norm.eps)
        return h * weight.reshape(shape) + bias.reshape(shape)


NETS = {
    "rows": lambda: (nn.Linear(2, 19), nn.BatchNorm1d(19), nn.Tanh(), nn.Linear(19, 3)),
    "first": lambda: (nn.BatchNorm1d(2), nn.Linear(2, 3)),
    "pooled images": lambda: (nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2),
                              nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
                              nn.Linear(4, 3)),
    "steps": lambda: (nn.Linear(2, 5), PerStepBatchNorm(5, 2), nn.Tanh(), nn.Linear(5, 4),
                      PerStepBatchNorm(4, 2), nn.Tanh(), nn.Linear(4, 3)),
}  # fmt: skip
STEPS, LR = 2, 0.3


def made(name, loss="cross_entropy", tasks=3):
    torch.manual_seed(4)
    net = nn.Sequential(*NETS[name]()).double()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for p in module.parameters():
                nn.init.normal_(p, 0.8, 0.4)
    shape = (2, 6, 6) if "images" in name else (2,)
    xs, xq = (torch.randn(tasks, n, *shape, dtype=torch.float64) for n in (5, 4))
    if loss == "cross_entropy":
        ys, yq = (torch.randint(0, 3, (tasks, n)) for n in (5, 4))
    else:
        ys, yq = (torch.rand(tasks, n, 3, dtype=torch.float64) * 0.8 + 0.1 for n in (5, 4))
    return net, (xs, ys, xq, yq)


def learner(net, backend="native", **options):
    options = {"loss": "cross_entropy", "lr": LR, "steps": STEPS, **options}
    return pymeta.MAML(net, query_statistics="support", backend=backend, **options)


def eager(net, data, step_weights=None):
    """(losses [T], predictions): a loop in plain autograd, support and query rows together."""
    twin = nn.Sequential(*[
        Counting(m) if isinstance(m, nn.modules.batchnorm._NormBase) else m for m in net
    ])  # fmt: skip
    losses, outputs = [], []
    for x, y, q, t in zip(*data, strict=True):
        theta = dict(twin.named_parameters())

        def run(theta, rows, count, step):
            for module in twin.modules():
                if isinstance(module, Counting):
                    module.count = count
            with at_step(twin, step):
                return torch.func.functional_call(twin, theta, (rows,))

        def query(theta, step, x=x, q=q):
            return run(theta, torch.cat([x, q]), len(x), step)[len(x) :]

        total = 0.0
        for k in range(STEPS):
            loss = F.cross_entropy(run(theta, x, None, k), y)
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {n: p - LR * g for (n, p), g in zip(theta.items(), grads, strict=True)}
            if step_weights is not None:
                total = total + step_weights[k] * F.cross_entropy(query(theta, k), t)
        outputs.append(query(theta, None))
        losses.append(F.cross_entropy(outputs[-1], t) if step_weights is None else total)
    return torch.stack(losses), torch.stack(outputs)


@pytest.mark.parametrize("weighs_steps", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_eager_autograd_agrees(name, weighs_steps, backend):
    """Losses, predictions and gradients, second order, through the statistics."""
    net, data = made(name)
    data[0].requires_grad_()
    data[2].requires_grad_()
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64) if weighs_steps else None
    losses, outputs = eager(net, data, weights)
    inputs = [*net.parameters(), data[0], data[2]]
    wanted = torch.autograd.grad(losses.mean(), inputs)
    out = learner(net, backend)(*data, step_weights=weights)
    got = torch.autograd.grad(out.loss, inputs)
    torch.testing.assert_close(out.task_losses.detach(), losses.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(out.predictions.detach(), outputs.detach(), rtol=1e-11, atol=1e-12)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-11)


LOSSES = ("mse", "bce_with_logits", "poisson_nll", "qlike")


@pytest.mark.parametrize("isa, executor", PATHS)
def test_every_path_agrees_with_the_reference(isa, executor):
    for name, loss in (*((n, "cross_entropy") for n in NETS), *(("rows", n) for n in LOSSES)):
        for tasks in (1, 17):
            net, data = made(name, loss, tasks)
            found = []
            for backend in ("torch", "native"):
                other = copy.deepcopy(net)
                with using(isa, executor):
                    out = learner(other, backend, loss=loss)(*data)
                grads = torch.autograd.grad(out.loss, list(other.parameters()))
                found.append([out.task_losses, out.predictions, *grads])
            assert_close(found[1], found[0])


def test_bits_are_a_tasks_own():
    net, data = made("pooled images", tasks=18)
    with using(executor="rows", threads=1):
        wanted = learner(net)(*data).predictions
        alone = learner(net)(*(v[1:2] for v in data)).predictions
    assert same_bits([alone], [wanted[1:2]])
    for executor, threads in itertools.product(EXECUTORS, (1, 3)):
        with using(executor=executor, threads=threads):
            assert same_bits([learner(net)(*data).predictions], [wanted])


@pytest.mark.parametrize("name", NETS)
def test_rows_are_predicted_by_themselves(name, backend, tmp_path):
    """Alone or with others, in the call or by adapted models, also from a file."""
    net, (xs, ys, xq, yq) = made(name)
    maml = learner(net, backend)
    with torch.no_grad():
        wanted = maml(xs, ys, xq, yq).predictions
        assert_close([maml(xs, ys, xq[:, 2:3], yq[:, 2:3]).predictions], [wanted[:, 2:3]])
        assert_close([maml(xs, ys, xq).predictions], [wanted])
        models = maml.adapt(xs, ys)
        assert_close([models(xq)], [wanted])
        assert_close([models(xq[:, :1])], [wanted[:, :1]])
        models.save(tmp_path / "models")
        assert_promised([pymeta.Adapted.load(tmp_path / "models", net)(xq)], [models(xq)], backend)
        for t in range(3):
            assert_close([models[t](xq[t])], [wanted[t]])
        own = pymeta.MAML(net, loss="cross_entropy", lr=LR, steps=STEPS, backend=backend)
        assert not torch.allclose(own(xs, ys, xq, yq).predictions, wanted)


def test_ragged_tasks_and_weights_run_in_torch():
    net, (xs, ys, xq, yq) = made("rows")
    maml = learner(net, "auto")
    sizes, weights = [5, 2, 3], torch.ones(3, 4, dtype=torch.float64)
    weights[1, 2] = 0
    with pytest.warns(UserWarning, match=r"query_statistics=\"support\" with tasks of different"):
        got = maml(xs, ys, xq, yq, support_sizes=sizes)
    for t, n in enumerate(sizes):
        one = [v[t : t + 1] for v in (xs[:, :n], ys[:, :n], xq, yq)]
        assert_close([got.task_losses[t]], [learner(net)(*one).task_losses[0]])
    xq[1, 2] = float("nan")
    got = maml(xs, ys, xq, yq, query_weights=weights)
    kept = [0, 1, 3]
    wanted = learner(net)(xs[1:2], ys[1:2], xq[1:2, kept], yq[1:2, kept])
    assert_close([got.task_losses[1]], [wanted.task_losses[0]])
    assert_close([got.predictions[1][kept]], [wanted.predictions[0]])
    assert got.predictions[1][2].isnan().all()


def test_ignored_labels_have_predictions_by_the_support_set(backend):
    net, (xs, ys, xq, yq) = made("rows")
    wanted = learner(net, backend)(xs, ys, xq, yq).predictions
    yq[0, 1] = -100
    got = learner(net, backend)(xs, ys, xq, yq)
    assert_close([got.predictions], [wanted])
    kept = [0, 2, 3]
    one = learner(net, backend)(xs[:1], ys[:1], xq[:1, kept], yq[:1, kept])
    assert_close([got.task_losses[0]], [one.task_losses[0]])


def test_without_statistics_of_sets_it_is_the_same_call(backend):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 3)).double()
    _, data = made("rows")
    own = pymeta.MAML(net, loss="cross_entropy", lr=LR, steps=STEPS, backend=backend)
    got, wanted = learner(net, backend)(*data), own(*data)
    assert_promised([got.predictions.detach()], [wanted.predictions.detach()], backend)


def test_settings_and_what_cannot_be_kept():
    net, (xs, ys, *_) = made("rows")
    with pytest.raises(ValueError, match=r'query_statistics: expected "own" or "support"'):
        pymeta.MAML(net, loss="mse", lr=0.1, steps=1, query_statistics="running")
    free = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, track_running_stats=False),
                         nn.Linear(4, 3)).double()  # fmt: skip
    for call in (lambda: learner(free).adapt(xs, ys), learner(free).adapter):
        with pytest.raises(ValueError, match=r"layer 1 has none: make it with track_running_stats"):
            call()


@pytest.mark.parametrize("name", NETS)
def test_an_adapter_has_what_the_learner_has(name, tmp_path):
    """All tasks, one, single rows, lists, from a file and from a copy: in bits."""
    net, (xs, ys, xq, _) = made(name)
    maml = learner(net)
    models = maml.adapt(xs, ys)
    wanted = models(xq).numpy()
    maml.adapter().save(tmp_path / "adapter")
    x, y, q = (v.numpy() for v in (xs, ys, xq))
    loaded = pymeta.Adapter.load(tmp_path / "adapter")
    for adapter in (maml.adapter(), loaded, copy.deepcopy(loaded)):
        made_there = adapter.adapt(x, y)
        assert np.array_equal(made_there(q), wanted)
        assert np.array_equal(made_there(q[:, 1:2]), wanted[:, 1:2])
        assert np.array_equal(adapter.adapt_predict(x, y, q), wanted)
        out = np.empty_like(wanted[1])
        assert adapter.adapt_predict(x[1], y[1], q[1], out) is out
        assert np.array_equal(out, wanted[1])
        assert np.array_equal(adapter.adapt_predict(x[1], y[1], q[1, :1]), wanted[1, :1])
        ragged = adapter.adapt([x[0], x[1][:3]], [y[0], y[1][:3]])
        assert np.array_equal(ragged(q[:2])[0], wanted[0])
        alone = maml.adapt(xs[1:2, :3], ys[1:2, :3])
        assert np.array_equal(ragged(q[:2])[1], alone(xq[1:2]).numpy()[0])
        made_there.save(tmp_path / "models")
        assert np.array_equal(pymeta.AdaptedArrays.load(tmp_path / "models")(q), wanted)
        assert torch.equal(pymeta.Adapted.load(tmp_path / "models", net)(xq), models(xq))


def test_an_adapter_whose_two_chains_differ_is_refused():
    maml = learner(made("rows")[0])
    parts = maml.adapter().__getstate__()
    own = pymeta.MAML(maml.model, loss="cross_entropy", lr=LR, steps=STEPS, backend="native")
    for predicting in (parts["architecture"], own.adapter().architecture):
        with pytest.raises(ValueError, match=r"predicting: expected the same layers"):
            pymeta.Adapter(**{**parts, "predicting": predicting})
