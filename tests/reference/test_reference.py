"""The torch backend against things that know nothing of it: closed forms, finite differences,
gradcheck, torch's own losses, and a plain autograd loop."""

import pytest
import torch
from helpers import LOSSES, assert_close, batch, gradients, loop_meta_loss, mlp, targets, torch_loss
from torch import nn

import pymeta
from pymeta import reference
from pymeta.reference.loss import task_loss
from pymeta.spec.anchors import Anchor
from pymeta.spec.losses import Loss, describe_loss
from pymeta.spec.optimizers import rates
from pymeta.spec.schedule import Schedule
from pymeta.tasks.checks import Expected
from pymeta.tasks.task_set import SUPPORT, task_set


def maml(net, **options):
    options = {"loss": "mse", "lr": 0.1, "steps": 2, **options}
    return pymeta.MAML(net, backend="torch", **options)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_equals_a_plain_autograd_loop(loss, steps, first_order):
    net = mlp(2, 5, 3)
    data = batch(loss, out=3)
    got = maml(net, loss=loss, steps=steps, first_order=first_order)(*data).loss
    wanted = loop_meta_loss(net, torch_loss(loss), 0.1, steps, *data, first_order=first_order)
    parameters = list(net.parameters())
    assert_close(got, wanted)
    assert_close(gradients(got, *parameters), gradients(wanted, *parameters))


def test_second_order_differs_from_first_order():
    net, data = mlp(2, 5, 2), batch()
    exact, first = (maml(net, first_order=f)(*data).loss for f in (False, True))
    assert_close(exact, first)
    weight = net[0].weight
    difference = gradients(exact, weight)[0] - gradients(first, weight)[0]
    assert difference.abs().max() > 1e-3


def test_linear_model_has_its_closed_form():
    """One step on mean squares: W' = W - lr (2/S) R^T X, and the meta-gradient by hand."""
    lr, rows = 0.05, 6
    net = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    xs, ys, xq, yq = batch(tasks=4, support=rows, query=rows, inputs=3, out=1)
    out = maml(net, lr=lr, steps=1)(xs, ys, xq, yq)
    w = net.weight.detach()[0]
    gram = xs.transpose(1, 2) @ xs * (2 / rows)
    adapted = w - lr * (gram @ w - (xs * ys).sum(1) * (2 / rows))
    residual = (xq @ adapted.unsqueeze(-1)) - yq
    query_gradient = (xq * residual).sum(1) * (2 / rows)
    identity = torch.eye(3, dtype=torch.float64)
    wanted = ((identity - lr * gram) @ query_gradient.unsqueeze(-1)).mean(0).T
    assert_close(out.task_losses, residual.square().mean((1, 2)))
    assert_close(gradients(out.loss, net.weight), wanted)


@pytest.mark.parametrize("options", [{"steps": 0}, {"lr": 0.0}])
def test_without_adaptation_it_is_the_mean_query_loss(options):
    net, (xs, ys, xq, yq) = mlp(2, 5, 2), batch()
    out = maml(net, **options)(xs, ys, xq, yq)
    wanted = nn.functional.mse_loss(net(xq), yq)
    assert_close(out.loss, wanted)
    assert_close(out.predictions, net(xq).detach())
    assert_close(gradients(out.loss, *net.parameters()), gradients(wanted, *net.parameters()))


@pytest.mark.parametrize("loss", LOSSES)
def test_finite_differences(loss):
    """Central differences in float64 along random directions, in parameters and inputs."""
    net = mlp(2, 4, 3)
    xs, ys, xq, yq = batch(loss, out=3)
    xs.requires_grad_()
    xq.requires_grad_()
    tensors = [*net.parameters(), xs, xq]
    module = maml(net, loss=loss)
    found = gradients(module(xs, ys, xq, yq).loss, *tensors)
    step = 1e-5
    for _ in range(3):
        directions = [torch.randn_like(t) for t in tensors]
        slope = sum((g * d).sum() for g, d in zip(found, directions, strict=True))
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                for t, d in zip(tensors, directions, strict=True):
                    t += sign * step * d
            values.append(module(xs, ys, xq, yq).loss.detach())
        with torch.no_grad():
            for t, d in zip(tensors, directions, strict=True):
                t += step * d
        numeric = (values[0] - values[1]) / (2 * step)
        # truncation is step^2 times a third derivative, rounding eps / step: both about 1e-10
        assert abs(float(numeric - slope)) < 1e-7 * max(1.0, abs(float(slope)))


@pytest.mark.parametrize("per", ["network", "layer", "parameter"])
@pytest.mark.parametrize("per_step", [False, True])
def test_gradcheck_with_a_learnable_lr(per, per_step):
    net = mlp(2, 3, 1)
    module = maml(net, lr=pymeta.LearnableLR(0.1, per=per, per_step=per_step))
    xs, ys, xq, yq = batch(tasks=2, support=3, query=2, out=1)

    def loss(*values):
        names = [n for n, _ in module.named_parameters()]
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, given, (xs, ys, xq, yq)).loss

    inputs = tuple(p.detach().clone().requires_grad_() for p in module.parameters())
    columns = {"network": 1, "layer": 2, "parameter": 13}[per]
    assert module.lr.shape == ((2, columns) if per_step else (columns,))
    assert torch.autograd.gradcheck(loss, inputs, nondet_tol=1e-12)  # torch's roundings


def test_learnable_lr_forms_agree_where_their_values_do():
    net, data = mlp(2, 4, 2), batch()
    plain = maml(net)(*data).loss
    for per in ("network", "layer", "parameter"):
        for per_step in (False, True):
            module = maml(net, lr=pymeta.LearnableLR(0.1, per, per_step))
            assert_close(module(*data).loss, plain)
            assert gradients(module(*data).loss, module.lr)[0].abs().max() > 0


def test_layers_and_steps_take_their_own_lr():
    net, (xs, ys, xq, yq) = mlp(2, 4, 2), batch(tasks=1)
    module = maml(net, lr=pymeta.LearnableLR(0.1, "layer", per_step=True))
    rates = torch.tensor([[0.1, 0.2], [0.3, 0.05]], dtype=torch.float64)
    with torch.no_grad():
        module.lr.copy_(rates)
    fast = {n: p.detach().requires_grad_() for n, p in net.named_parameters()}
    for step in (0, 1, 1, 1):  # the last row serves the third and fourth step
        loss = nn.functional.mse_loss(torch.func.functional_call(net, fast, (xs[0],)), ys[0])
        found = torch.autograd.grad(loss, list(fast.values()))
        fast = {
            n: (p - rates[step, 0 if n.startswith("0") else 1] * g).detach().requires_grad_()
            for (n, p), g in zip(fast.items(), found, strict=True)
        }
    wanted = torch.func.functional_call(net, fast, (xq[0],)).detach()
    assert_close(module(xs, ys, xq, yq, steps=4).predictions[0], wanted)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", ["list", "padded"])
def test_ragged_tasks_are_the_tasks_one_by_one(loss, form):
    net = mlp(2, 5, 3)
    xs, ys, xq, yq = batch(loss, tasks=4, support=5, query=4, out=3)
    ws, wq = torch.rand(4, 5).double(), torch.rand(4, 4).double()
    sizes, query_sizes = [5, 0, 2, 3], [1, 4, 0, 2]
    module = maml(net, loss=loss)

    def cut(values, lengths):
        return [v[:n] for v, n in zip(values, lengths, strict=True)]

    if form == "list":
        out = module(
            cut(xs, sizes), cut(ys, sizes), cut(xq, query_sizes), cut(yq, query_sizes),
            support_weights=cut(ws, sizes), query_weights=cut(wq, query_sizes),
        )  # fmt: skip
    else:
        out = module(
            xs, ys, xq, yq, support_sizes=sizes, query_sizes=torch.tensor(query_sizes),
            support_weights=ws, query_weights=wq,
        )  # fmt: skip
    losses, predictions = [], []
    for t, (s, q) in enumerate(zip(sizes, query_sizes, strict=True)):
        one = slice(t, t + 1)
        alone = module(
            xs[one, :s], ys[one, :s], xq[one, :q], yq[one, :q],
            support_weights=ws[one, :s], query_weights=wq[one, :q],
        )  # fmt: skip
        losses.append(alone.loss)
        predictions.append(alone.predictions[0])
    wanted = torch.stack(losses).mean()
    assert_close(out.task_losses, torch.stack(losses).detach())
    assert_close(gradients(out.loss, *net.parameters()), gradients(wanted, *net.parameters()))
    for t, q in enumerate(query_sizes):
        got = out.predictions[t]
        assert_close(got[:q], predictions[t])
        assert got.shape[0] == (q if form == "list" else 4)
        assert torch.equal(got[q:], torch.zeros_like(got[q:]))


def test_no_support_rows_is_no_adaptation_and_no_query_rows_is_no_loss():
    net, (xs, ys, xq, yq) = mlp(2, 5, 2), batch()
    module = maml(net)
    out = module(xs[:, :0], ys[:, :0], xq, yq)
    assert_close(out.predictions, net(xq).detach())
    out = module(xs, ys, xq[:, :0], yq[:, :0])
    assert out.loss.item() == 0 and out.predictions.shape == (3, 0, 2)
    assert all(not g.any() for g in gradients(out.loss, *net.parameters()))


def test_weights_of_zero_are_rows_that_are_not_there():
    net, (xs, ys, xq, yq) = mlp(2, 5, 2), batch()
    module = maml(net)
    weights = torch.ones(3, 5)
    weights[:, 3:] = 0
    got = module(xs, ys, xq, yq, support_weights=weights).loss
    wanted = module(xs[:, :3], ys[:, :3], xq, yq).loss
    assert_close(gradients(got, *net.parameters()), gradients(wanted, *net.parameters()))
    nothing = module(xs, ys, xq, yq, query_weights=torch.zeros(3, 4)).loss
    assert nothing.item() == 0
    assert all(not g.any() for g in gradients(nothing, *net.parameters()))


def test_whole_weights_are_repeated_rows():
    net, (xs, ys, xq, yq) = mlp(2, 5, 2), batch()
    module = maml(net)
    got = module(xs, ys, xq, yq, support_weights=torch.tensor([[2.0, 1, 1, 3, 1]] * 3)).loss
    index = torch.tensor([0, 0, 1, 2, 3, 3, 3, 4])
    wanted = module(xs[:, index], ys[:, index], xq, yq).loss
    assert_close(gradients(got, *net.parameters()), gradients(wanted, *net.parameters()))


@pytest.mark.parametrize(
    "module",
    [
        nn.MSELoss(),
        nn.HuberLoss(delta=0.3),
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double(), label_smoothing=0.1),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(ignore_index=1, weight=torch.tensor([0.2, 1.0, 3.0]).double()),
        nn.BCEWithLogitsLoss(),
        nn.BCEWithLogitsLoss(
            weight=torch.tensor([0.5, 1.0, 2.0]).double(),
            pos_weight=torch.tensor([3.0, 1.0, 0.1]).double(),
        ),
    ],
    ids=lambda m: type(m).__name__,
)
def test_task_loss_is_torchs_mean_reduction(module):
    spec = describe_loss(module)
    outputs = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    y = targets(spec.kind, 7, out=3)
    got, wanted = task_loss(spec, outputs, y, None), module(outputs, y)
    assert_close(got, wanted)
    assert_close(gradients(got, outputs), gradients(wanted, outputs))
    assert torch.autograd.gradgradcheck(
        lambda o: task_loss(spec, o, y, None), (outputs,), nondet_tol=1e-12
    )


def test_row_weights_of_cross_entropy_multiply_class_weights():
    spec = describe_loss(nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0])))
    outputs, y = torch.randn(4, 2).double(), torch.tensor([0, 1, 1, 0])
    weights = torch.tensor([1.0, 0.0, 3.0, 2.0]).double()
    per_row = -outputs.log_softmax(-1)[range(4), y]
    both = weights * torch.tensor([0.5, 2.0, 2.0, 0.5])
    assert_close(task_loss(spec, outputs, y, weights), (both * per_row).sum() / both.sum())


@pytest.mark.parametrize("patterns", [["2.*"], ["*.bias"], ["0.weight", "2.b*"], []])
def test_adapt_masks(patterns):
    from fnmatch import fnmatch

    net, (xs, ys, xq, yq) = mlp(2, 4, 2), batch()
    got = maml(net, adapt=patterns, steps=1)(xs, ys, xq, yq)
    names = [n for n, _ in net.named_parameters()]
    chosen = [n for n in names if any(fnmatch(n, p) for p in patterns)]
    losses = []
    for t in range(3):
        fast = dict(net.named_parameters())
        inner = nn.functional.mse_loss(net(xs[t]), ys[t])
        if chosen:
            found = torch.autograd.grad(inner, [fast[n] for n in chosen], create_graph=True)
            fast |= {n: fast[n] - 0.1 * g for n, g in zip(chosen, found, strict=True)}
        outputs = torch.func.functional_call(net, fast, (xq[t],))
        losses.append(nn.functional.mse_loss(outputs, yq[t]))
    wanted = torch.stack(losses).mean()
    assert_close(gradients(got.loss, *net.parameters()), gradients(wanted, *net.parameters()))


def test_frozen_parameters_are_neither_adapted_nor_given_gradients():
    net, data = mlp(2, 4, 2), batch()
    net[0].weight.requires_grad_(False)
    module = maml(net)
    module(*data).loss.backward()
    assert net[0].weight.grad is None and net[2].weight.grad.abs().max() > 0
    models = module.adapt(*data[:2])
    assert torch.equal(models.parameters["0.weight"][1], net[0].weight)
    assert not torch.equal(models.parameters["0.bias"][1], net[0].bias)


def test_batch_norm_uses_each_sets_own_statistics():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    free = nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU(), nn.Linear(4, 2)
    ).double()
    free.load_state_dict(net.state_dict(), strict=False)
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" not in k}
    data = batch()
    out = maml(net)(*data)
    wanted = loop_meta_loss(free, nn.functional.mse_loss, 0.1, 2, *data)
    assert_close(gradients(out.loss, *net.parameters()), gradients(wanted, *free.parameters()))
    assert net[1].running_mean is not None
    kept = {k: v for k, v in before.items() if "num_batches" not in k}
    assert all(torch.equal(net.state_dict()[k], v) for k, v in kept.items())


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Branching(nn.Module):
    """A forward that looks at values, which vmap refuses."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        y = self.layer(x)
        return y if bool(x.sum() > 0) else 2 * y


class Skip(nn.Module):
    """A residual block: no chain."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return x + self.layer(x).tanh()


@pytest.mark.parametrize("kind", [Tied, Branching, Skip])
def test_modules_outside_the_chain(kind):
    net, data = kind().double(), batch(tasks=6)
    got = maml(net)(*data).loss
    wanted = loop_meta_loss(net, nn.functional.mse_loss, 0.1, 2, *data)
    assert_close(gradients(got, *net.parameters()), gradients(wanted, *net.parameters()))


class Attention(nn.Module):
    """Three heads of attention over the rows."""

    def forward(self, x):
        q, k, v = x.reshape(1, -1, 1, 2, 4).expand(3, -1, -1, -1, -1).transpose(2, 3)
        mixed = nn.functional.scaled_dot_product_attention(q, k * 0.5, v)
        return x + mixed.reshape(x.shape)


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(8),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.GroupNorm(2, 8),
        nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()),
        nn.Sequential(nn.Unflatten(1, (2, 4)), nn.BatchNorm1d(2, affine=False), nn.Flatten()),
        Attention(),
    ],
    ids=["layer", "layer-plain", "group", "instance", "batch-3d", "attention"],
)
def test_layers_with_a_double_backward_of_their_own(layer):
    """torch's fused normalisations have a wrong double backward under vmap; ours must not."""
    net = nn.Sequential(nn.Linear(2, 8), layer, nn.Tanh(), nn.Linear(8, 2)).double()
    data = batch()
    got = maml(net)(*data).loss
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        wanted = loop_meta_loss(net, nn.functional.mse_loss, 0.1, 2, *data)
    assert_close(gradients(got, *net.parameters()), gradients(wanted, *net.parameters()))


def test_a_convolutional_net():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 3),
    ).double()  # fmt: skip
    xs, xq = torch.randn(2, 4, 1, 4, 4).double(), torch.randn(2, 4, 1, 4, 4).double()
    ys, yq = targets("cross_entropy", 2, 4, out=3), targets("cross_entropy", 2, 4, out=3)
    got = maml(net, loss="cross_entropy")(xs, ys, xq, yq)
    wanted = loop_meta_loss(net, nn.functional.cross_entropy, 0.1, 2, xs, ys, xq, yq)
    assert got.predictions.shape == (2, 4, 3)
    assert_close(gradients(got.loss, *net.parameters()), gradients(wanted, *net.parameters()))
    with pytest.raises(ValueError, match=r"yq: task 1, row 2: label 3 is not in 0\.\.2"):
        yq[1, 2] = 3
        maml(net, loss="cross_entropy")(xs, ys, xq, yq)


def test_dropout_draws_for_every_task_and_none_in_eval_mode():
    net = nn.Sequential(nn.Linear(2, 64), nn.Dropout(0.5), nn.Linear(64, 2)).double()
    xs, ys, xq, yq = (v[:1].expand(2, *v.shape[1:]) for v in batch())
    losses = maml(net)(xs, ys, xq, yq).task_losses
    assert losses[0] != losses[1]
    net.eval()
    losses = maml(net)(xs, ys, xq, yq).task_losses
    assert_close(losses[0], losses[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype):
    net = mlp(2, 4, 2, dtype=torch.float64)
    data = batch()
    wanted = maml(net)(*data).loss
    got = maml(net.to(dtype))(*(v.to(dtype) for v in data)).loss
    assert got.dtype == dtype
    # rounding of a hundred or so sums of entries of size one
    assert abs(got.item() - wanted.item()) < 100 * torch.finfo(dtype).eps


def test_nan_stays_in_its_task():
    net, (xs, ys, xq, yq) = mlp(2, 4, 2), batch(tasks=3)
    clean = maml(net)(xs, ys, xq, yq).task_losses
    xs[1, 0, 0] = float("nan")
    losses = maml(net)(xs, ys, xq, yq).task_losses
    assert losses.isnan().tolist() == [False, True, False]
    assert_close(losses[[0, 2]], clean[[0, 2]])


def test_learnable_lr_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"LearnableLR\.per.*'tensor'"):
        pymeta.LearnableLR(0.1, per="tensor")
    with pytest.raises(ValueError, match=r"LearnableLR\.initial.*nan"):
        pymeta.LearnableLR(float("nan"))
    with pytest.raises(TypeError, match=r"LearnableLR\.per_step"):
        pymeta.LearnableLR(0.1, per_step=2)


def inner_loop(net, schedule, names, **options):
    sizes = {n: net.get_parameter(n).numel() for n in names}
    lr = torch.tensor([0.1], dtype=torch.float64)
    rule = pymeta.SGD(0.1, momentum=0.9)
    layout = rates("network", sizes)
    return reference.InnerLoop(Loss("mse"), lr, layout, schedule, optimizer=rule, **options)


def support_of(xs, ys):
    return task_set(
        SUPPORT, xs, ys, None, None, Expected(Loss("mse"), torch.float64, torch.device("cpu"))
    )


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("names", [["0.weight", "2.bias"], []])
def test_adapting_all_tasks_at_once_is_one_by_one(size, names):
    """Equal tasks go through vmap, with their curves and starts; those with ids do not."""
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    inner = inner_loop(net, Schedule(epochs=3, batch_size=size, seed=1), names, anchor=Anchor(0.1))
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    own = {n: torch.randn(3, *parameters[n].shape).double() for n in ("0.weight", "0.bias")}

    def adapt(**options):
        support = support_of(xs, ys)
        return reference.adapt(
            net, parameters, names, inner, support, start=own, curves=True, **options
        )

    together, apart = adapt(), adapt(task_ids=[0, 0, 0])
    assert together.parameters.keys() == apart.parameters.keys() == {*names, *own}
    for name, values in apart.parameters.items():
        assert_close(together.parameters[name], values)
    assert torch.equal(together.parameters["0.bias"], own["0.bias"])
    assert_close(together.history.train, apart.history.train)
    assert together.history.epochs.tolist() == [3, 3, 3]
    assert together.history.validation is None and together.history.best_epochs is None
    assert not together.status.any()


def test_reptiles_gradient_is_the_way_to_the_mean():
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    named, names = dict(net.named_parameters()), ["0.weight", "2.bias"]
    inner = inner_loop(net, Schedule(steps=3), names)
    loss, losses, _ = reference.reptile(net, named, names, inner, support_of(xs, ys))
    found = gradients(3 * loss, *named.values())
    with torch.no_grad():
        adapted = reference.adapt(net, named, names, inner, support_of(xs, ys)).parameters
    for name, got in zip(named, found, strict=True):
        moved = named[name] - adapted[name].mean(0) if name in names else torch.zeros_like(got)
        assert_close(got, 3 * moved)
    assert_close(loss, losses.mean())
    assert not losses.requires_grad


def test_status_counts_what_is_not_finite():
    values = torch.ones(4, 2, 2)
    values[1, 0, 1], values[3, 1, 1] = float("nan"), float("-inf")
    assert reference.not_finite([torch.ones(4), values], 4).tolist() == [0, 1, 0, 1]
    assert reference.not_finite([values[:0]], 0).tolist() == []
