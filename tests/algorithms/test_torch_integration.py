"""MAML inside torch: optimisers, clipping, encoders below it, torch.compile, gradcheck."""

import copy
import subprocess
import sys

import pytest
import torch
from helpers import LOSSES, assert_close, batch, gradients, mlp
from torch import nn

import pymeta


def make(net, **options):
    options = {"loss": "mse", "lr": 0.1, "steps": 2, "backend": "native", **options}
    return pymeta.MAML(net, **options)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_through_the_native_call(loss):
    module = make(mlp(2, 3, 2), loss=loss, lr=pymeta.LearnableLR(0.1, "layer", per_step=True))
    xs, ys, xq, yq = batch(loss, tasks=2, support=3, query=2)

    def outcome(xs, xq, *values):
        for p, v in zip(module.parameters(), values, strict=True):
            p.data = v.detach()
        return Given.apply(module, xs, xq, ys, yq, *values)

    class Given(torch.autograd.Function):
        """The module as a function of values for its parameters."""

        @staticmethod
        def forward(ctx, module, xs, xq, ys, yq, *values):
            with torch.enable_grad():
                xs, xq = (v.detach().requires_grad_() for v in (xs, xq))
                loss = module(xs, ys, xq, yq).loss
            ctx.found = torch.autograd.grad(loss, [xs, xq, *module.parameters()])
            return loss.detach()

        @staticmethod
        def backward(ctx, g):
            gx, gq, *rest = (g * f for f in ctx.found)
            return None, gx, gq, None, None, *rest

    inputs = [xs, xq, *(p.detach().clone() for p in module.parameters())]
    assert torch.autograd.gradcheck(outcome, tuple(v.requires_grad_() for v in inputs))


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_training_with_clipping_learns(optimizer, backend):
    net = mlp(1, 16, 1)
    module = make(net, backend=backend, lr=pymeta.LearnableLR(0.05))
    opt = optimizer(module.parameters(), lr=0.01)
    slope = torch.randn(8, 1, 1).double()
    xs, xq = torch.randn(8, 5, 1).double(), torch.randn(8, 5, 1).double()
    losses = []
    for _ in range(40):
        out = module(xs, slope * xs, xq, slope * xq)
        opt.zero_grad()
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        assert norm.isfinite()
        opt.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert module.lr.item() != 0.05


def test_gradients_accumulate_over_calls():
    net = mlp(2, 4, 2)
    module, one, two = make(net), batch(), batch()
    wanted = [
        a + b
        for a, b in zip(
            gradients(module(*one).loss, *net.parameters()),
            gradients(module(*two).loss, *net.parameters()),
            strict=True,
        )
    ]
    module(*one).loss.backward()
    module(*two).loss.backward()
    assert_close([p.grad for p in net.parameters()], wanted)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_an_encoder_below_learns(backend):
    """Gradients to xs and xq: a head adapted by MAML over an encoder trained by autograd."""
    encoder, head = nn.Linear(4, 2).double(), mlp(2, 3, 1)
    xs, ys, xq, yq = batch(inputs=4, out=1)
    loss = make(head, backend=backend)(encoder(xs), ys, encoder(xq), yq).loss
    found = gradients(loss, *encoder.parameters())
    step = 1e-6
    direction = torch.randn_like(encoder.weight)
    values = []
    for sign in (1, -1):
        moved = nn.functional.linear
        weight = encoder.weight.detach() + sign * step * direction
        values.append(
            make(head, backend=backend)(
                moved(xs, weight, encoder.bias), ys, moved(xq, weight, encoder.bias), yq
            ).loss.item()
        )
    slope = (values[0] - values[1]) / (2 * step)
    assert abs(slope - (found[0] * direction).sum().item()) < 1e-7 * max(1, abs(slope))


def test_gradients_of_chosen_tensors_only():
    net, data = mlp(2, 4, 2), batch()
    module = make(net)
    everything = gradients(module(*data).loss, *net.parameters())
    (bias,) = torch.autograd.grad(module(*data).loss, [net[2].bias])
    assert torch.equal(bias, everything[3])
    module(*data).loss.backward(inputs=[net[0].weight])
    assert net[0].bias.grad is None
    assert torch.equal(net[0].weight.grad, everything[0])


def test_hooks_on_parameters_run():
    net, data = mlp(2, 4, 2), batch()
    seen = []
    net[0].weight.register_hook(lambda g: seen.append(g.clone()))
    make(net)(*data).loss.backward()
    assert len(seen) == 1 and torch.equal(seen[0], net[0].weight.grad)


def test_hooks_on_layers_make_it_fall_back():
    net, data, seen = mlp(2, 4, 2), batch(), []
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=1)
    wanted = module(*data).loss
    handle = net[1].register_forward_hook(lambda *a: seen.append(1))
    with pytest.warns(UserWarning, match=r"layer 1 \(Tanh\) has hooks"):
        assert_close(module(*data).loss, wanted)
    assert seen
    handle.remove()
    assert module.explain().startswith("native-cpu")


def test_parametrizations_fall_back_and_are_right():
    net, data = mlp(2, 4, 2), batch()
    torch.nn.utils.parametrizations.weight_norm(net[0])
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=1)
    with pytest.warns(UserWarning, match="layer 0 .*has no native kernel"):
        loss = module(*data).loss
    assert all(g.any() for g in gradients(loss, *net.parameters()))


# ---- torch.compile ----------------------------------------------------------------------------


def compiled_agrees(module, *data, inputs=(), **options):
    """The results of a compiled call and the gradients of each are those of an eager one."""
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    tensors = [*(p for p in module.parameters() if p.requires_grad), *inputs]
    names = ["predictions", "loss", "task_losses", "step_losses"]
    names = [n for n in names if getattr(module(*data, **options), n) is not None]
    for some in (*([name] for name in names), names):
        found = []
        for run in (compiled, module):  # a compiled backward may be gone through only once
            out = run(*data, **options)
            values = [getattr(out, name) for name in some]
            of_all = sum(k * total(value) for k, value in enumerate(values, 1))
            found.append([*flattened(values), *once_back(of_all, tensors)])
        assert_close(*found)


def flattened(values):
    return [v for value in values for v in (value if isinstance(value, list) else [value])]


def once_back(value, tensors):
    return torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)


def total(value):
    """A sum in which every entry counts differently."""
    parts = value if isinstance(value, list) else [value]
    return sum((p * torch.arange(1.0, p.numel() + 1, dtype=p.dtype).view_as(p)).sum()
               for p in parts)  # fmt: skip


@pytest.mark.parametrize("lr", [0.1, pymeta.LearnableLR(0.1, "parameter", per_step=True)])
def test_compile_a_uniform_call(lr):
    xs, ys, xq, yq = batch("cross_entropy", out=3)
    xs.requires_grad_()
    xq.requires_grad_()
    net = mlp(2, 4, 3)
    net[0].bias.requires_grad_(False)
    module = make(net, loss="cross_entropy", lr=lr)
    compiled_agrees(module, xs, ys, xq, yq, inputs=(xs, xq), query_weights=torch.rand(3, 4))
    compiled_agrees(module, xs, ys, xq, yq, inputs=(xs, xq), support_sizes=[1, 5, 0], steps=3)


def test_compile_gradients_of_every_input():
    xs, ys, xq, yq = batch()
    weights, of_targets = torch.rand(3, 5).double(), torch.rand_like(yq)
    offsets = {"support_offset": torch.randn_like(ys), "query_offset": torch.randn_like(yq)}
    anchor = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    inputs = (xs, ys, xq, yq, weights, of_targets, anchor, *offsets.values())
    for value in inputs:
        value.requires_grad_()
    module = make(mlp(2, 4, 2))
    compiled_agrees(
        module, xs, ys, xq, yq, inputs=inputs, support_weights=weights, query_weights=of_targets,
        anchor=anchor, **offsets,
    )  # fmt: skip
    compiled_agrees(module, xs, ys, xq, inputs=(xs, ys, xq, weights), support_weights=weights)


@pytest.mark.parametrize("lr", [0.1, pymeta.LearnableLR(0.1, "layer")])
def test_compile_what_tasks_have_of_their_own(lr):
    net, data = mlp(2, 4, 2), batch()
    module = make(net, lr=lr)
    own = {"2.bias": torch.randn(3, 2, dtype=torch.float64, requires_grad=True)}
    rates = torch.full([3], 0.2, dtype=torch.float64, requires_grad=True)
    options = {"start": own, "lr": rates, "anchor": [0.1, 0.2, 0.3],
               "support_offset": torch.randn(3, 5, 2).double()}  # fmt: skip
    inputs = (own["2.bias"], rates)
    compiled_agrees(module, *data, inputs=inputs, step_weights=[0.3, 0.7], **options)
    compiled_agrees(module, *data[:3], inputs=inputs, query_offset=torch.randn(3, 4, 2).double(),
                    **options)  # fmt: skip


@pytest.mark.parametrize("columns", [(), (2,)])
def test_compile_gradients_by_weights_that_are_0(columns):
    module = pymeta.MAML(mlp(2, 4, 2), loss="mse", lr=0.1, steps=2)
    data = batch()
    weights = [torch.rand(3, rows, *columns, dtype=torch.float64) for rows in (5, 4)]
    for w in weights:
        w[0, 1] = w[2, 3] = 0
        w.requires_grad_()
    given = {"support_weights": weights[0], "query_weights": weights[1]}
    compiled_agrees(module, *data, inputs=weights, **given)
    compiled_agrees(module, *data, inputs=weights, support_sizes=[1, 5, 4], **given)
    lists = {name: list(w) for name, w in given.items()}
    compiled_agrees(module, *map(list, data), inputs=weights, **lists)


def test_compile_goes_back_natively_only_where_something_flows(monkeypatch):
    from pymeta.backend.prepared import PreparedCall

    calls, original = [], PreparedCall.vjp
    monkeypatch.setattr(PreparedCall, "vjp",
                        lambda *a, **k: (calls.append(1), original(*a, **k))[1])  # fmt: skip
    module = make(mlp(2, 4, 2))
    compiled, data = torch.compile(module, fullgraph=True, backend="aot_eager"), batch()
    compiled(*data).loss.backward()
    assert calls == []
    out = compiled(*data)
    (out.predictions.sum() + out.task_losses.sum()).backward()
    assert calls == [1]


@pytest.mark.parametrize("train", [False, True])
def test_compile_running_statistics(train):
    """Those that are used are constants, and those that are tracked move as in an eager call."""
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    net.train(train)
    before = net[1].running_mean.clone()
    other = copy.deepcopy(net)
    compiled_agrees(make(net), *batch())
    assert torch.equal(net[1].running_mean, before) != train
    compiled, data = torch.compile(make(other), fullgraph=True, backend="aot_eager"), batch()
    moved = copy.deepcopy(other)
    compiled(*data)
    make(moved)(*data)
    assert_close([other[1].running_mean, other[1].running_var],
                 [moved[1].running_mean, moved[1].running_var])  # fmt: skip


def test_compile_a_ragged_call():
    xs, ys, xq, yq = batch()
    data = ([xs[0], xs[1, :2], xs[2, :4]], [ys[0], ys[1, :2], ys[2, :4]], list(xq), list(yq))
    compiled_agrees(make(mlp(2, 4, 2)), *data)


def test_compile_in_a_larger_graph_and_without_grad():
    encoder, module, data = nn.Linear(2, 2).double(), make(mlp(2, 4, 2)), batch()

    def step(xs, ys, xq, yq):
        out = module(encoder(xs).relu(), ys, encoder(xq).relu(), yq)
        return out.loss * 2 + encoder.weight.square().sum(), out.task_losses

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    parameters = [*encoder.parameters(), *module.parameters()]
    assert_close(*(once_back(run(*data)[0], parameters) for run in (compiled, step)))
    with torch.no_grad():
        got = compiled(*data)
    assert not got[0].requires_grad
    assert_close(got, [v.detach() for v in step(*data)])


def test_compile_sees_new_weights_and_leaves_the_fallback_to_eager_mode():
    net, data = mlp(2, 4, 2), batch()
    module = make(net)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(*data)
    with torch.no_grad():
        net[0].weight.mul_(2)
    assert_close(compiled(*data).loss, module(*data).loss)
    slow = make(net, backend="torch")
    assert_close(torch.compile(slow, backend="aot_eager")(*data).loss, slow(*data).loss)


def test_compile_a_chain_used_in_another_order_than_its_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)))

    module = make(Odd().double(), lr=pymeta.LearnableLR(0.1, "parameter"))
    with torch.no_grad():
        module.lr.uniform_(0.05, 0.2)
    compiled_agrees(module, *batch())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", ["backward", "grad"])
def test_compile_does_not_differentiate_twice(way, backend):
    net, data = mlp(2, 4, 2), batch()
    parameters = list(net.parameters())
    loss = torch.compile(make(net), fullgraph=True, backend=backend)(*data).loss
    found = torch.autograd.grad(loss, parameters, create_graph=True)
    assert_close([f.detach() for f in found], gradients(make(net)(*data).loss, *parameters))
    total = loss + sum(f.square().sum() for f in found)
    # AOTAutograd, which inductor is behind, has words of its own
    message = "cannot be differentiated again|not currently support double backward"
    with pytest.raises(RuntimeError, match=message):
        total.backward() if way == "backward" else torch.autograd.grad(total, parameters)


@pytest.mark.parametrize("name", ["evaluate", "evaluate_vjp", "adapt", "adapt_vjp"])
@pytest.mark.parametrize("own", [False, True])
def test_opcheck(name, own):
    module = make(mlp(2, 3, 2), lr=pymeta.LearnableLR(0.1, "layer"))
    xs, ys, xq, yq = batch()
    xs.requires_grad_()
    parameters, weights = list(module.model.parameters()), torch.rand(3, 4)
    lr = module.lr
    if own:
        parameters[1] = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
        lr = torch.rand(3, dtype=torch.float64, requires_grad=True)
    query = (xq, yq, weights, torch.tensor([4, 2, 0]), None)
    if name.startswith("adapt"):
        query = (None,) * 5
    anchor = torch.rand(3, dtype=torch.float64, requires_grad=True)
    step_weights = None if name.startswith("adapt") else torch.tensor([0.25, 0.75]).double()
    wanted = [True] * 6 + [False] * 5 + [True, False, False]  # by parameters, lr, xs and anchor
    arguments = [
        module._handle, parameters, lr, xs, ys, None, None, None, *query, anchor, step_weights,
        ["0.bias"] if own else [], [False, False, own, True], 2, 2, wanted,
    ]  # fmt: skip
    if name == "evaluate_vjp":
        flat = torch.randn(sum(p.numel() for p in (*parameters, lr, xs, anchor))).double()
        flows = torch.ones(()), torch.randn(3), torch.randn(3, 4, 2), torch.randn(2, 3)
        arguments += [flat, *(flow.double() for flow in flows)]
    if name == "adapt_vjp":
        arguments.append([torch.randn(3, *p.shape).double() for p in module.model.parameters()])
    if name.endswith("vjp"):  # which cannot be differentiated
        arguments = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
    from pymeta.functional import ops  # noqa: F401 - which defines them

    torch.library.opcheck(getattr(torch.ops.pymeta, name).default, tuple(arguments))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_was_made_in_inference_mode_outlives_it(backend):
    net, data = mlp(2, 4, 2), batch()
    wanted = gradients(make(net, backend=backend)(*data).loss, *net.parameters())
    with torch.inference_mode():
        module = make(net, backend=backend)
        module(*data)
        reptile = pymeta.Reptile(net, loss="mse", lr=0.1, steps=2, backend=backend)
        reptile(*data[:2])
    assert_close(gradients(module(*data).loss, *net.parameters()), wanted)
    reptile(*data[:2]).loss.backward()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_another_default_device(backend, tmp_path):
    """What pymeta makes for itself lies on the CPU, as the model does; meta stands for a GPU."""
    net, sizes = mlp(2, 4, 2), [5, 0, 3]
    xs, ys, xq, yq = batch("bce_with_logits")
    net[2] = nn.Linear(4, 1).double()
    ys, yq = ys[..., :1], yq[..., :1]
    lists = [[v[:n] for v, n in zip(side, sizes, strict=True)] for side in (xs, ys)]

    def everything():
        options = {"loss": "bce_with_logits", "lr": 0.1, "backend": backend}
        rate = pymeta.LearnableLR(0.1, per_step=True)
        maml = pymeta.MAML(net, **{**options, "lr": rate}, steps=2)
        meta = maml(xs, ys, xq, yq, support_sizes=sizes)
        reptile = pymeta.Reptile(net, **options, steps=3, batch_size=2)
        finetune = pymeta.FineTune(
            net, **options, epochs=2, batch_size=2, class_weights="balanced", validation=0.4
        )
        models = finetune(*lists, curves=True, task_ids=[1, 2, 3])
        models.save(tmp_path / "models")
        loaded = pymeta.Adapted.load(tmp_path / "models", net)
        joined = pymeta.Adapted.concatenate([loaded, models[[True, False, True]]])
        return [
            *gradients(meta.loss, *maml.parameters()),
            *gradients(reptile(*lists).loss, *net.parameters()),
            *models.history.values().values(),
            *joined.parameters.values(),
            joined.status,
            joined[:3].predict_proba(xq, query_sizes=[4, 0, 3]),
            *joined[:3](lists[0]),
        ]

    wanted = everything()
    torch.set_default_device("meta")
    try:
        found = everything()
    finally:
        torch.set_default_device(None)
    for f, w in zip(found, wanted, strict=True):
        assert f.device.type == "cpu" and torch.equal(f.isnan(), w.isnan())
        if f.is_floating_point():
            assert_close(f.nan_to_num(), w.nan_to_num())
        else:
            assert torch.equal(f, w)


FRESH = """
import sys, torch, pymeta
from pymeta import functional

net = torch.nn.Linear(2, 1).double()
x = torch.randn(3, 4, 2).double()
y = x.sum(2, keepdim=True)
options = {"loss": "mse", "lr": 0.1}
operator = functional.Operator(net, steps=1, **options)
parameters = {n: p.detach() for n, p in net.named_parameters()}
calls = {
    "maml": (pymeta.MAML(net, steps=1, **options), lambda f: f(x, y, x, y).loss),
    "reptile": (pymeta.Reptile(net, steps=1, **options), lambda f: f(x, y).loss),
    "finetune": (pymeta.FineTune(net, epochs=1, **options), lambda f: f(x, y).parameters["bias"]),
    "functional": (functional.adapt, lambda f: f(operator, parameters, x, y)["bias"]),
}
function, result = calls[sys.argv[1]]
wanted = result(function)
wanted.requires_grad and wanted.sum().backward()
assert "torch._dynamo" not in sys.modules, "torch's compiler takes seconds to load"
got = result(torch.compile(function, backend="eager"))
assert torch.equal(got, wanted), (got, wanted)
"""


@pytest.mark.parametrize("name", ["maml", "reptile", "finetune", "functional"])
def test_the_compiler_is_loaded_where_it_is_used(name):
    """In a process of its own: what only torch.compile needs is imported while it traces."""
    command = [sys.executable, "-c", FRESH, name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
