"""Batch normalisation by running statistics and by step: natively, and as torch computes it.

The oracle is an eager loop over torch's own modules, task by task; both backends are held to it.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_promised
from kernels import EXECUTORS, PATHS, same_bits, using
from native_help import check_slope_of_each_parameter
from torch import nn
from torch.nn import functional as F

import pymeta
import pymeta.functional
from pymeta.nn import PerStepBatchNorm, at_step


def shaken(net):
    """A network in float64 whose normalisations have statistics and parameters of their own."""
    torch.manual_seed(5)
    net = net.double()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
            for p in module.parameters():
                nn.init.normal_(p, 0.8, 0.4)
    return net


def rows_net(norm):
    return shaken(nn.Sequential(nn.Linear(2, 19), norm(19), nn.Tanh(), nn.Linear(19, 3)))


def image_net(norm):
    return shaken(nn.Sequential(
        nn.Conv2d(2, 3, 2), norm(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.Flatten(),
        nn.Linear(4, 3),
    ))  # fmt: skip


def conv4():
    """Eighteen layers of the core in eval mode: a normalisation is two."""
    blocks = [
        layer
        for channels in (2, 3, 3, 3)
        for layer in (
            nn.Conv2d(channels, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)
        )
    ]  # fmt: skip
    return shaken(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(3, 3)))


def instance(n):
    return nn.InstanceNorm2d(n, affine=True, track_running_stats=True)


def partly(n):
    """Without a shift."""
    norm = nn.BatchNorm1d(n)
    norm.bias = None
    return norm


FIXED = {
    "rows": lambda: rows_net(nn.BatchNorm1d).eval(),
    "first": lambda: shaken(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))).eval(),
    "without a shift": lambda: rows_net(partly).eval(),
    "without parameters": lambda: rows_net(lambda n: nn.BatchNorm1d(n, affine=False)).eval(),
    "images": lambda: image_net(nn.BatchNorm2d).eval(),
    "instances": lambda: image_net(instance).eval(),
    "conv4": lambda: conv4().eval(),
    "steps": lambda: rows_net(lambda n: PerStepBatchNorm(n, 2)).eval(),
}
BY_STEP = {
    "rows": lambda: rows_net(lambda n: PerStepBatchNorm(n, 3)),
    "fewer rows than steps": lambda: rows_net(lambda n: PerStepBatchNorm(n, 2)),
    "images": lambda: image_net(lambda n: PerStepBatchNorm(n, 3)),
    "first": lambda: shaken(nn.Sequential(PerStepBatchNorm(2, 3), nn.Linear(2, 3))),
}
STEPS = 3


def shape_of(net):
    poolings = sum(isinstance(m, nn.MaxPool2d) for m in net.modules())
    return (2,) if poolings == 0 else (2, 6, 6) if poolings == 1 else (2, 16, 16)


def episodes(shape, tasks=3, support=5, query=4):
    torch.manual_seed(7)
    xs, xq = (torch.randn(tasks, n, *shape, dtype=torch.float64) for n in (support, query))
    ys, yq = (torch.randint(0, 3, (tasks, n)) for n in (support, query))
    return xs, ys, xq, yq


def eager(net, data, lr=0.3, step_weights=None):
    """Losses [T]: a loop over torch's own modules, each pass on a copy of the buffers."""
    names = [n for n, _ in net.named_parameters()]
    found = []
    for x, y, q, t in zip(*data, strict=True):
        theta = dict(net.named_parameters())

        def loss(theta, rows, labels, step):
            buffers = {n: b.clone() for n, b in net.named_buffers()}
            with at_step(net, step):
                out = torch.func.functional_call(net, {**theta, **buffers}, (rows,))
            return F.cross_entropy(out, labels)

        total = 0.0
        for k in range(STEPS):
            grads = torch.autograd.grad(loss(theta, x, y, k), list(theta.values()),
                                        create_graph=True)  # fmt: skip
            theta = {n: theta[n] - lr * g for n, g in zip(names, grads, strict=True)}
            if step_weights is not None:
                total = total + step_weights[k] * loss(theta, q, t, k)
        found.append(loss(theta, q, t, None) if step_weights is None else total)
    return torch.stack(found)


def learner(net, backend="native", **options):
    options = {"loss": "cross_entropy", "lr": 0.3, "steps": STEPS, **options}
    return pymeta.MAML(net, backend=backend, **options)


@pytest.mark.parametrize("weighs_steps", [False, True])
@pytest.mark.parametrize(
    "make", [*FIXED.values(), *BY_STEP.values()],
    ids=[*(f"fixed {n}" for n in FIXED), *(f"by step {n}" for n in BY_STEP)],
)  # fmt: skip
def test_eager_autograd_agrees(make, weighs_steps, backend):
    """Loss and gradients, second order, of both backends."""
    net = make()
    data = episodes(shape_of(net))
    data[0].requires_grad_()
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64) if weighs_steps else None
    losses = eager(net, data, step_weights=weights)
    inputs = [*net.parameters(), data[0]]
    wanted = torch.autograd.grad(losses.mean(), inputs)
    out = learner(net, backend)(*data, step_weights=weights)
    got = torch.autograd.grad(out.loss, inputs)
    torch.testing.assert_close(out.task_losses, losses.detach(), rtol=1e-12, atol=1e-14)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("isa, executor", PATHS)
@pytest.mark.parametrize("make", [FIXED["rows"], FIXED["images"], BY_STEP["rows"]])
def test_finite_differences(make, isa, executor):
    net = make()
    data = episodes(shape_of(net), tasks=2)
    maml = learner(net)
    with using(isa, executor):
        check_slope_of_each_parameter(maml, data, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("optimizer", [pymeta.SGD(0.1, momentum=0.9), pymeta.Adam(0.1, eps=1.0)])
def test_rows_of_other_steps_have_no_gradient(optimizer, backend):
    """What an optimiser keeps of them is of zeros; steps below an adapted layer differ, too."""
    for adapt in (None, ["3.*"], ["1.*"]):
        net = BY_STEP["rows"]()
        options = {"lr": None, "optimizer": optimizer, "adapt": adapt}
        data = episodes((2,))
        found = learner(net, backend, **options)(*data).loss
        wanted = learner(net, "torch", **options)(*data).loss
        parameters = list(net.parameters())
        assert_close([found], [wanted])
        assert_close(
            torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters)
        )


@pytest.mark.parametrize("isa, executor", PATHS)
def test_every_path_agrees_with_the_reference(isa, executor):
    for make in (*FIXED.values(), *BY_STEP.values()):
        for tasks in (1, 17):
            net = make()
            data = episodes(shape_of(net), tasks)
            other = copy.deepcopy(net)
            wanted, grads = results(other, learner(other, "torch"), data)
            with using(isa, executor):
                got, own = results(net, learner(net), data)
            assert_close(got, wanted)
            assert_close(own, grads)


def results(net, maml, data):
    out = maml(*data)
    grads = torch.autograd.grad(out.loss, list(net.parameters()))
    return [out.task_losses, out.predictions, *(b.double() for b in net.buffers())], grads


@pytest.mark.parametrize("make", [FIXED["rows"], BY_STEP["images"]])
def test_bits_are_a_tasks_own(make):
    net = make()
    state = copy.deepcopy(net.state_dict())
    data = episodes(shape_of(net), 18)
    with using(executor="rows", threads=1):
        wanted = results(net, learner(net), data)
    for executor, threads in itertools.product(EXECUTORS, (1, 3)):
        net.load_state_dict(state)
        with using(executor=executor, threads=threads):
            got = results(net, learner(net), data)
        assert same_bits(got[0], wanted[0]), executor
        if executor == "rows":
            assert same_bits(got[1], wanted[1])


# ---- running statistics, updated ---------------------------------------------------------------


def measured(net, data, counts=None, lr=0.3):
    """[T, steps] of {module: (mean, unbiased variance)} of the support sets, by torch's modules."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    tasks = []
    for i, (x, y) in enumerate(zip(*data[:2], strict=True)):
        x, y = (v if counts is None else v[: counts[i]] for v in (x, y))
        theta, steps = dict(net.named_parameters()), []
        for k in range(STEPS if len(x) else 0):
            found = {}

            def take(module, inputs, found=found):
                v = inputs[0].detach().transpose(0, 1).flatten(1)
                found[module] = (v.mean(1), v.var(1))

            hooks = [m.register_forward_pre_hook(take) for m in norms]
            values = {**theta, **{n: b.clone() for n, b in net.named_buffers()}}
            with at_step(net, k):
                loss = F.cross_entropy(torch.func.functional_call(net, values, (x,)), y)
            for hook in hooks:
                hook.remove()
            grads = torch.autograd.grad(loss, list(theta.values()))
            theta = {n: p - lr * g for (n, p), g in zip(theta.items(), grads, strict=True)}
            steps.append(found)
        tasks.append(steps)
    return tasks


def expected(module, tasks, momentum):
    """The running statistics after one call, of a module's rows."""
    rows = module.steps if isinstance(module, PerStepBatchNorm) else 1
    updated = []
    for before, j in ((module.running_mean, 0), (module.running_var, 1)):
        old = before.reshape(rows, -1)
        new = [
            torch.stack([
                torch.stack([s[module][j] for k, s in enumerate(steps) if min(k, rows - 1) == row])
                .mean(0)
                for steps in tasks if steps
            ]).mean(0)
            for row in range(rows)
        ]  # fmt: skip
        updated.append(((1 - momentum) * old + momentum * torch.stack(new)).reshape(before.shape))
    return updated


TRACKED = {
    "rows": lambda: rows_net(nn.BatchNorm1d),
    "pooled images": lambda: image_net(nn.BatchNorm2d),
    "steps": BY_STEP["rows"],
    "steps of images": BY_STEP["images"],
    "cumulative": lambda: rows_net(lambda n: nn.BatchNorm1d(n, momentum=None)),
    "beside an untracked one": lambda: shaken(nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU(), nn.Linear(4, 4),
        nn.BatchNorm1d(4), nn.Linear(4, 3),
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", TRACKED)
@pytest.mark.parametrize("ragged", [False, True])
def test_training_moves_the_running_statistics(name, ragged, backend):
    """By the mean over tasks and steps of the support sets' own; query sets have no part in it."""
    net = TRACKED[name]()
    xs, ys, xq, yq = data = episodes(shape_of(net), support=6)
    counts = [6, 0, 3] if ragged else None
    for module in net.modules():
        if getattr(module, "momentum", 0.1) is None:
            module.num_batches_tracked.fill_(3)
    tasks = measured(net, data, counts)
    norms = [m for m in net.modules() if getattr(m, "running_mean", None) is not None]
    wanted = [expected(m, tasks, 0.25 if m.momentum is None else m.momentum) for m in norms]
    before = [int(m.num_batches_tracked) for m in norms]
    learner(net, backend)(xs, ys, xq * 100, yq, support_sizes=counts)
    for module, (mean, var), calls in zip(norms, wanted, before, strict=True):
        assert_close([module.running_mean, module.running_var], [mean, var])
        assert int(module.num_batches_tracked) == calls + getattr(module, "steps", 1)


class WithUnused(nn.Module):
    """A network that goes by the middle one of three normalisations."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.last = nn.BatchNorm1d(3), PerStepBatchNorm(2, STEPS)
        self.net = nn.Sequential(nn.Linear(2, 4), norm, nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("job", ["maml", "accumulate", "reptile"])
def test_layers_that_do_not_run_keep_their_statistics(norm, job):
    """Such a model runs in torch; the layer that does run moves as it does without the others."""
    net = shaken(WithUnused(norm(4)))
    alone = shaken(WithUnused(nn.BatchNorm1d(4))).net
    alone.load_state_dict(net.net.state_dict())
    before, data = copy.deepcopy(net.state_dict()), episodes((2,))
    for model in (net, alone):
        if job == "reptile":
            pymeta.Reptile(model, loss="cross_entropy", lr=0.3, steps=STEPS, backend="torch")(
                *data[:2]
            )
        else:
            maml = learner(model, "torch")
            (maml if job == "maml" else maml.accumulate_grad)(*data)
    after = net.state_dict()
    assert_close(
        [after["net.1.running_mean"], after["net.1.running_var"]],
        [alone[1].running_mean, alone[1].running_var],
    )
    assert int(after["net.1.num_batches_tracked"]) == 1
    unused = [name for name in after if name.startswith(("first.", "last."))]
    assert len(unused) == 10 and all(torch.equal(after[n], before[n]) for n in unused)


def test_rows_of_weight_0_are_in_no_statistics(backend):
    net = TRACKED["rows"]()
    nets = [net, copy.deepcopy(net)]
    xs, ys, xq, yq = episodes((2,))
    weights = torch.ones(3, 5, dtype=torch.float64)
    weights[:, 3:] = 0
    learner(nets[0], backend)(xs, ys, xq, yq, support_weights=weights)
    learner(nets[1], backend)(xs[:, :3], ys[:, :3], xq, yq)
    got, wanted = ([n[1].running_mean, n[1].running_var] for n in nets)
    assert_promised(got, wanted, backend)


def test_repeated_and_accumulated_calls_move_them_again(backend):
    net, data = TRACKED["rows"](), episodes((2,))
    maml, means = learner(net, backend), [net[1].running_mean.clone()]
    for call in (maml, maml, maml.accumulate_grad, maml.accumulate_grad):
        call(*data)
        means.append(net[1].running_mean.clone())
    assert int(net[1].num_batches_tracked) == 4
    distances = [float((a - b).norm()) for a, b in itertools.pairwise(means)]
    assert all(b == pytest.approx(0.9 * a) for a, b in itertools.pairwise(distances))


def test_what_moves_no_statistics(backend):
    """Adaptation, gradients of the results, predictions; a module in eval mode."""
    net, data = TRACKED["rows"](), episodes((2,))
    maml = learner(net, backend)
    out = maml(*data)
    before = copy.deepcopy(net.state_dict())
    out.predictions.square().sum().backward()
    maml.adapt(*data[:2])(data[2])
    maml.adapt(*data[:2], create_graph=True)
    pymeta.FineTune(net, loss="cross_entropy", lr=0.1, epochs=2, backend=backend)(*data[:2])
    with torch.no_grad():
        maml(*data)
        pymeta.Reptile(net, loss="cross_entropy", lr=0.3, steps=1, backend=backend)(*data[:2])
    net[1].eval()
    maml(*data)
    assert all(map(torch.equal, net.state_dict().values(), before.values()))


def test_reptile_moves_them_too(backend):
    net, (xs, ys, _, _) = TRACKED["rows"](), episodes((2,))
    tasks = measured(net, (xs, ys), lr=0.3)
    wanted = expected(net[1], tasks, 0.1)
    pymeta.Reptile(net, loss="cross_entropy", lr=0.3, steps=STEPS, backend=backend)(xs, ys)
    assert_close([net[1].running_mean, net[1].running_var], wanted)


def test_eval_after_training_is_near_the_sets_own_statistics(backend):
    """What the running statistics are for: one row alone can be predicted."""
    net, data = TRACKED["rows"](), episodes((2,), tasks=40, support=50, query=50)
    maml = learner(net, backend, lr=0.01)
    for _ in range(60):
        maml(*data)
    with torch.no_grad():
        own = maml(*data).predictions
        maml.eval()
        fixed = maml(*data).predictions
        single = maml(data[0], data[1], data[2][:, :1]).predictions
    assert float((own - fixed).abs().mean()) < 0.3 * float(own.std())
    assert_close([single], [fixed[:, :1]])


# ---- models and files --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [FIXED["rows"], FIXED["images"], FIXED["steps"]])
def test_adapted_models_keep_the_statistics_they_were_adapted_with(make, backend, tmp_path):
    net = make()
    xs, ys, xq, _ = data = episodes(shape_of(net))
    maml = learner(net, backend)
    wanted = maml(*data).predictions.detach()
    models = maml.adapt(xs, ys)
    names = sorted(models.constants)
    assert names == [f"1.running_{k}" for k in ("mean", "var")]
    models.save(tmp_path / "models")
    for module in net.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.add_(1)
    for found in (
        models, pymeta.Adapted.load(tmp_path / "models", net.train()), models[:],
        pymeta.Adapted.from_stacked(net, models.parameters, loss="cross_entropy"),
    ):  # fmt: skip
        assert_promised([found(xq)], [wanted], backend)
    for t in range(3):
        assert_close([models[t](xq[t])], [wanted[t]])
        other = copy.deepcopy(net).eval()
        other.load_state_dict(models.state_dict(t))
        assert_close([other(xq[t])], [wanted[t]])


def test_adapters_take_running_statistics_along(tmp_path):
    net = FIXED["rows"]()
    xs, ys, xq, _ = data = episodes((2,))
    maml = learner(net)
    wanted = maml(*data).predictions.detach().numpy()
    maml.adapter().save(tmp_path / "adapter")
    adapter = pymeta.Adapter.load(tmp_path / "adapter")
    assert "1.running_var" in adapter.parameters and "1.running_var" not in adapter.adapted
    for t in range(3):
        found = adapter.adapt_predict(xs[t].numpy(), ys[t].numpy(), xq[t].numpy())
        assert np.array_equal(found, wanted[t])
    models = adapter.adapt(xs.numpy(), ys.numpy())
    assert np.array_equal(models(xq.numpy()), wanted)


def test_the_mode_is_noticed_from_call_to_call(backend):
    net, data = TRACKED["rows"](), episodes((2,))
    maml = learner(net, backend)
    with torch.no_grad():
        first = maml(*data).predictions
        net.eval()
        fixed = maml(*data).predictions
        net[1].running_mean.add_(0.5)
        moved = maml(*data).predictions
        net.train()
        again = maml(*data).predictions
    assert not torch.allclose(first, fixed) and not torch.allclose(fixed, moved)
    assert_promised([again], [first], backend)


def test_a_warm_start_of_models_adapted_in_eval_mode(backend):
    net, (xs, ys, xq, _) = FIXED["rows"](), episodes((2,))
    tune = pymeta.FineTune(net, loss="cross_entropy", lr=0.1, epochs=1, backend=backend)
    first = tune(xs, ys)
    again = tune(xs, ys, start=first)
    assert again.constants == first.constants
    net.train()
    assert not tune(xs, ys, start=first).constants
    assert again(xq).isfinite().all()


def test_too_few_steps_for_the_rows_are_refused(backend):
    net, data = BY_STEP["rows"](), episodes((2,))
    maml = learner(net, backend)
    message = r"steps: expected at least the 3 inner steps that .*PerStepBatchNorm.*, got 2"
    with pytest.raises(ValueError, match=message):
        maml(*data, steps=2)
    with pytest.raises(ValueError, match=message):
        maml.adapt(*data[:2], steps=2)
    assert maml(*data, steps=4).loss.isfinite()
    tune = pymeta.FineTune(net, loss="cross_entropy", lr=0.1, epochs=2, backend=backend)
    with pytest.raises(ValueError, match=r"epochs: expected at least the 3 inner steps"):
        tune(*data[:2])


# ---- beside eager learners ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows", "steps"])
def test_torch_compile_has_the_statistics_of_either_mode(name):
    net, data = TRACKED[name](), episodes((2,))
    other = copy.deepcopy(net)
    for training in (True, False):
        pair = [learner(n.train(training)) for n in (net, other)]
        compiled = torch.compile(pair[0], fullgraph=True, backend="aot_eager")
        got, wanted = compiled(*data).loss, pair[1](*data).loss
        assert torch.equal(got, wanted)
        assert_close(
            torch.autograd.grad(got, list(net.parameters())),
            torch.autograd.grad(wanted, list(other.parameters())),
        )
        assert all(map(torch.equal, net.buffers(), other.buffers()))


@pytest.mark.parametrize("training", [True, False])
def test_functional_calls_leave_statistics_alone(training, backend):
    """They use those that the module had when the operator was made."""
    net, data = TRACKED["rows"]().train(training), episodes((2,))
    before = copy.deepcopy(net.state_dict())
    wanted = learner(copy.deepcopy(net), backend)(*data)
    options = {"loss": "cross_entropy", "lr": 0.3, "steps": STEPS, "backend": backend}
    operator = pymeta.functional.Operator(net, **options)
    parameters = dict(net.named_parameters())
    found = pymeta.functional.meta_gradient(operator, parameters, *data)
    assert_close([found.loss.detach()], [wanted.loss.detach()])
    arrays = {n: p.detach().numpy() for n, p in parameters.items()}
    from_arrays = pymeta.functional.meta_gradient(operator, arrays, *(v.numpy() for v in data))
    assert_close([torch.as_tensor(from_arrays.loss)], [wanted.loss.detach()])
    assert all(map(torch.equal, net.state_dict().values(), before.values()))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_row_of_nan_stays_in_the_running_statistics_unless_it_weighs_nothing(backend):
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    maml = pymeta.MAML(net, loss="mse", lr=0.05, steps=2, backend=backend)
    xs, ys, xq, yq = (torch.randn(3, 5, width) for width in (2, 1, 2, 1))
    odd, weights = xs.clone(), torch.ones(3, 5)
    odd[1, 2, 0], weights[1, 2] = torch.nan, 0
    maml(odd, ys, xq, yq, support_weights=weights)
    assert net[1].running_mean.isfinite().all()
    for inputs in (odd, xs):
        maml(inputs, ys, xq, yq)
        assert net[1].running_mean.isnan().all()
    net[1].reset_running_stats()
    maml(xs, ys, xq, yq)
    assert net[1].running_mean.isfinite().all() and net[1].running_var.isfinite().all()
