"""pymeta.MAML through both backends: one must be the other, in every form a call can take."""

import copy
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import LOSSES, assert_close, batch, gradients, mlp
from torch import nn

import pymeta


def both(net, **options):
    """The same MAML on the two backends."""
    options = {"loss": "mse", "lr": 0.1, "steps": 2, **options}
    return [pymeta.MAML(net, backend=b, **options) for b in ("native", "torch")]


def assert_same(net, data, modules, *inputs, **options):
    """Loss, task losses, predictions and all gradients agree; returns the native outcome."""
    native, wanted = (m(*data, **options) for m in modules)
    assert_close(native.loss, wanted.loss)
    assert_close(native.task_losses, wanted.task_losses)
    assert_close(native.predictions, wanted.predictions)
    extras = [[m.lr, *inputs] if isinstance(m.lr, nn.Parameter) else inputs for m in modules]
    found = [
        gradients(out.loss, *(p for p in net.parameters() if p.requires_grad), *extra)
        for out, extra in zip((native, wanted), extras, strict=True)
    ]
    assert_close(*found)
    assert any(g.any() for g in found[0])
    return native


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backends_agree(loss, first_order, dtype):
    net = mlp(2, 6, 3, dtype=dtype)
    data = batch(loss, out=3, dtype=dtype)
    data[0].requires_grad_()
    data[2].requires_grad_()
    modules = both(net, loss=loss, first_order=first_order)
    assert_same(net, data, modules, data[0], data[2])


@pytest.mark.parametrize("per", ["network", "layer", "parameter"])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("adapt", [None, ["2.*"], ["*.bias"]])
def test_learnable_lr_and_masks(per, per_step, adapt):
    net, data = mlp(2, 4, 2), batch()
    modules = both(net, lr=pymeta.LearnableLR(0.1, per, per_step), adapt=adapt)
    with torch.no_grad():
        modules[0].lr.uniform_(0.05, 0.2)
        modules[1].lr.copy_(modules[0].lr)
    assert_same(net, data, modules)
    assert_same(net, data, modules, steps=4)
    assert modules[0].lr.shape[-1] == sum(1 for _ in modules[0].lr.flatten()) // (
        2 - (not per_step)
    )


@pytest.mark.parametrize("form", ["list", "equal list", "padded"])
def test_ragged_forms(form):
    net = mlp(2, 6, 3)
    xs, ys, xq, yq = batch("cross_entropy", tasks=4, out=3)
    ws, wq = torch.rand(4, 5).double(), torch.rand(4, 4).double()
    xs.requires_grad_()
    xq.requires_grad_()
    modules = both(net, loss="cross_entropy")
    sizes, query_sizes = [5, 0, 2, 3], [1, 4, 0, 2]
    if form == "padded":
        out = assert_same(
            net, (xs, ys, xq, yq), modules, xs, xq, support_sizes=sizes, query_sizes=query_sizes,
            support_weights=ws, query_weights=wq,
        )  # fmt: skip
        assert out.predictions.shape == (4, 4, 3)
        return
    if form == "equal list":
        sizes, query_sizes = [5] * 4, [4] * 4

    def cut(values, lengths):
        return [v[:n] for v, n in zip(values, lengths, strict=True)]

    data = cut(xs, sizes), cut(ys, sizes), cut(xq, query_sizes), cut(yq, query_sizes)
    out = assert_same(
        net, data, modules, xs, xq,
        support_weights=cut(ws, sizes), query_weights=cut(wq, query_sizes),
    )  # fmt: skip
    assert [p.shape[0] for p in out.predictions] == query_sizes


def test_flat_targets_and_flattened_inputs():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    xs, ys, xq, yq = batch(inputs=4, out=1)
    wanted = assert_same(net, (xs, ys, xq, yq), both(net))
    square = (xs.view(3, 5, 2, 2), ys[..., 0], xq.view(3, 4, 2, 2), yq[..., 0])
    got = assert_same(net, square, both(net))
    assert torch.equal(got.loss, wanted.loss)


def test_batch_norm_on_both():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    assert_same(net, batch(), both(net))
    net.eval()
    before = copy.deepcopy(net.state_dict())
    assert_same(net, batch(), both(net))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_chain_used_in_another_order_than_its_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)))

    net = Odd().double()
    for per in ("network", "layer", "parameter"):
        modules = both(net, lr=pymeta.LearnableLR(0.1, per, per_step=True))
        with torch.no_grad():
            modules[0].lr.uniform_(0.05, 0.2)
            modules[1].lr.copy_(modules[0].lr)
        assert_same(net, batch(), modules)


def test_non_contiguous_and_expanded_tensors():
    net = mlp(2, 4, 2)
    net[0].weight = nn.Parameter(torch.randn(2, 4).double().t())
    xs, ys, _, yq = batch()
    data = (
        xs.transpose(0, 1).contiguous().transpose(0, 1),
        ys[:1].expand(3, 5, 2),
        torch.randn(3, 4, 4).double()[..., ::2],
        yq.flip(1),
    )
    assert not any(v.is_contiguous() for v in data[:3])
    data[2].requires_grad_()
    got = assert_same(net, data, both(net), data[2])
    clean = both(net)[0](*(v.detach().clone(memory_format=torch.contiguous_format) for v in data))
    assert torch.equal(got.loss, clean.loss)


def test_gradients_are_scaled_accumulated_and_kept():
    net, data = mlp(2, 4, 2), batch()
    module = both(net)[0]
    out = module(*data)
    once = gradients(out.loss, *net.parameters())
    (3 * out.loss).backward(retain_graph=True)
    assert_close([p.grad for p in net.parameters()], [3 * g for g in once])
    out.loss.backward()
    assert_close([p.grad for p in net.parameters()], [4 * g for g in once])
    # gradients are their own memory: changing one changes no other, nor the next call's
    net[0].weight.grad.zero_()
    assert_close(gradients(out.loss, *net.parameters()), once)


def square_of_gradient(loss, parameters):
    """A loss with the norm of its gradient, as a penalty on sharpness has it."""
    found = torch.autograd.grad(loss, parameters, create_graph=True)
    return loss + 0.5 * sum(g.square().sum() for g in found)


SECOND_DIFFERENTIATIONS = {
    "backward": lambda total, p, w: total.backward(),
    "backward to some": lambda total, p, w: total.backward(inputs=[p[0]]),
    "grad": lambda total, p, w: torch.autograd.grad(total, p),
    "grad of one": lambda total, p, w: torch.autograd.grad(total, p[-1]),
    "grad by a factor": lambda total, p, w: torch.autograd.grad(total, w),
}


@pytest.mark.parametrize("way", SECOND_DIFFERENTIATIONS)
@pytest.mark.parametrize("width", [4, 300])  # the gradients of large layers are scaled in numpy
def test_a_second_differentiation_raises(way, width):
    net, data = mlp(2, width, 300, 2), batch()
    parameters = list(net.parameters())
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = both(net)[0](*data).loss
    (first,) = torch.autograd.grad(loss, [net[0].weight], create_graph=True)
    assert_close(first.detach(), gradients(loss, net[0].weight)[0])
    total = square_of_gradient(factor * loss, parameters)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        SECOND_DIFFERENTIATIONS[way](total, parameters, factor)


def test_a_second_differentiation_by_what_is_below_raises():
    """Parameters and inputs may be made of other tensors, which are differentiated by."""
    encoder, data = nn.Linear(2, 2).double(), batch()
    xs, ys, xq, yq = data
    loss = both(mlp(2, 4, 2))[0](encoder(xs), ys, encoder(xq), yq).loss
    total = square_of_gradient(loss, list(encoder.parameters()))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(total, encoder.weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_derivatives_are_left_to_torch():
    net, (xs, ys, xq, yq) = mlp(2, 4, 2), batch()
    native, _ = both(net)
    native(xs, ys, xq, yq)  # which the next call would repeat
    direction, step = torch.randn_like(xs), 1e-6
    values = [native(xs + s * step * direction, ys, xq, yq).loss.item() for s in (1, -1)]
    with torch.autograd.forward_ad.dual_level():
        native(xs, ys, xq, yq)  # no tangent, no fallback
        dual = torch.autograd.forward_ad.make_dual(xs, direction)
        with pytest.raises(ValueError, match='backend="native": forward-mode derivatives'):
            native(dual, ys, xq, yq)
        native.backend = "auto"
        with pytest.warns(UserWarning, match="forward-mode derivatives"):
            loss = native(dual, ys, xq, yq).loss
        found = torch.autograd.forward_ad.unpack_dual(loss).tangent.item()
    # truncation is step^2 times a third derivative, rounding eps / step: both below 1e-9
    assert abs((values[0] - values[1]) / (2 * step) - found) < 1e-7 * max(1, abs(found))


def test_torch_differentiates_again():
    """What the native backend refuses: against finite differences of the first gradient."""
    net, data = mlp(2, 3, 2), batch()
    weight, parameters = net[0].weight, list(net.parameters())
    module = both(net)[1]
    (found,) = torch.autograd.grad(square_of_gradient(module(*data).loss, parameters), weight)
    direction, step, values = torch.randn_like(weight), 1e-6, []
    for sign in (1, -2):
        with torch.no_grad():
            weight += sign * step * direction
        values.append(square_of_gradient(module(*data).loss, parameters).item())
    slope = (values[0] - values[1]) / (2 * step)
    # truncation is step^2 times a third derivative, rounding eps / step: both below 1e-9
    assert abs(slope - (found * direction).sum().item()) < 1e-7 * max(1, abs(slope))


def test_the_results_carry_a_graph_and_under_no_grad_none():
    net, data = mlp(2, 4, 2), batch()
    for module in both(net):
        out = module(*data)
        assert all(result.requires_grad for result in out[:3])
        assert_close(out.loss, out.task_losses.mean())
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                quiet = module(*data)
            assert not quiet.loss.requires_grad
            assert_close(quiet.loss, out.loss)
        net.requires_grad_(False)
        assert not module(*data).loss.requires_grad
        net.requires_grad_(True)


def test_frozen_parameters():
    net, data = mlp(2, 4, 2), batch()
    net[0].bias.requires_grad_(False)
    modules = both(net)
    assert_same(net, data, modules)
    modules[0](*data).loss.backward()
    assert net[0].bias.grad is None
    net.requires_grad_(False)
    xs = data[0].requires_grad_()
    # with nothing to adapt, the loss does not depend on the support set
    assert not gradients(modules[0](*data).loss, xs)[0].any()


def test_no_tasks():
    net, data = mlp(2, 4, 2), batch(tasks=0)
    for module in both(net):
        out = module(*data)
        assert out.loss.item() == 0 and out.predictions.shape == (0, 4, 2)
        assert not any(g.any() for g in gradients(out.loss, *net.parameters()))
        assert len(module.adapt(*data[:2])) == 0


def test_a_tasks_result_does_not_depend_on_its_neighbours():
    net, data = mlp(2, 4, 2), batch(tasks=5)
    module = both(net)[0]
    out = module(*data)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = module(*(v[order] for v in data))
    assert torch.equal(shuffled.task_losses, out.task_losses[order])
    assert torch.equal(shuffled.predictions, out.predictions[order])
    alone = module(*(v[2:3] for v in data))
    assert torch.equal(alone.predictions[0], out.predictions[2])


def test_the_model_may_change_between_calls():
    """Weights, freezing, dtype, exchanged layers and settings are all seen by the next call."""
    net, data = mlp(2, 4, 2, act=nn.LeakyReLU), batch()
    modules = both(net)
    changes = [
        lambda: net[0].weight.data.mul_(2),
        lambda: setattr(net[0], "weight", nn.Parameter(torch.randn(4, 2).double())),
        lambda: net[0].weight.requires_grad_(False),
        lambda: net.__setitem__(1, nn.Tanh()),
        lambda: net.append(nn.Linear(2, 2).double()),
        lambda: net.__setitem__(1, nn.LeakyReLU(0.5)),
        lambda: setattr(net[1], "negative_slope", 0.7),
        lambda: net.__setitem__(1, nn.LayerNorm(4).double()),
    ]
    seen = {modules[0](*data).loss.item()}
    for change in changes:
        change()
        seen.add(assert_same(net, data, modules).loss.item())
    assert len(seen) == len(changes) + 1  # every one of them changed the loss
    net.float()
    assert modules[0](*(v.float() for v in data)).loss.dtype == torch.float32


def test_a_learnable_lr_needs_the_parameters_it_was_made_for():
    net, data = mlp(2, 4, 2), batch()
    module = both(net, lr=pymeta.LearnableLR(0.1, "parameter"))[0]
    net[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="learnable lr was made for"):
        module(*data)


def test_parameters_are_the_models_own():
    net = mlp(2, 4, 2)
    plain, learnable = both(net)[0], both(net, lr=pymeta.LearnableLR(0.1))[0]
    assert list(plain.parameters()) == list(net.parameters())
    assert {id(p) for p in learnable.parameters()} == {id(p) for p in net.parameters()} | {
        id(learnable.lr)
    }
    assert plain.lr == 0.1
    module = pymeta.MAML(net, loss="mse", optimizer=pymeta.SGD(0.1), steps=2)
    assert torch.equal(module(*batch()).loss.isfinite(), torch.tensor(True))
    assert module.lr == 0.1


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(copier):
    net, data = mlp(2, 4, 2), batch()
    module = both(net, lr=pymeta.LearnableLR(0.1, "layer"))[0]
    wanted = module(*data)
    twin = copier(module)
    got = twin(*data)
    assert torch.equal(got.loss, wanted.loss)
    got.loss.backward()
    assert net[0].weight.grad is None and module.lr.grad is None
    assert twin.lr.grad is not None
    with torch.no_grad():
        twin.model[0].weight.zero_()
    assert torch.equal(module(*data).loss, wanted.loss)


def test_state_dict():
    data = batch()
    one, other = (both(mlp(2, 4, 2), lr=pymeta.LearnableLR(lr, "layer"))[0] for lr in (0.1, 0.3))
    assert not torch.equal(one(*data).loss, other(*data).loss)
    assert set(one.state_dict()) == {"lr", *(f"model.{k}" for k in one.model.state_dict())}
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(*data).loss, other(*data).loss)


def test_a_fallback_warns_once_and_says_why():
    net = nn.Sequential(nn.Linear(2, 4), nn.PReLU(), nn.Linear(4, 2)).double()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=1)
    data = batch()
    with pytest.warns(UserWarning, match=r"runs in torch.*layer 1 \(PReLU\)") as caught:
        module(*data)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(*data)
        module.adapt(*data[:2])
        pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="torch")(*data)
    assert module.explain() == "torch: layer 1 (PReLU) has no native kernel"
    with pytest.warns(UserWarning, match="PReLU") as caught:
        pymeta.MAML(net, loss="mse", lr=0.1, steps=1).adapt(*data[:2])
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match=r'backend="native": layer 1 \(PReLU\)'):
        pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="native")


def test_calls_that_only_torch_can_take():
    """A call may run in torch where the model is native; what it computes is the same."""
    net, (xs, ys, xq, yq) = mlp(2, 4, 2), batch()
    offset = torch.zeros(3, 5, 2).double().requires_grad_()
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=1)
    expected = gradients(module(xs, ys, xq, yq, support_offset=offset).loss, offset)[0]

    def loss(learner, support_offset):
        return learner(xs, ys, xq, yq, support_offset=support_offset).loss

    assert "ran in torch" not in module.explain()
    with pytest.warns(UserWarning, match="a transform of torch.func"):
        found = torch.func.grad(lambda o: loss(module, o))(offset.detach())
    assert_close(found, expected)
    assert "some calls ran in torch: a transform of torch.func" in module.explain()
    with pytest.raises(ValueError, match=r'backend="native": a transform of torch\.func'):
        torch.func.grad(lambda o: loss(both(net)[0], o))(offset.detach())


def test_explain_names_the_path():
    net, data = mlp(2, 4, 2), batch()
    native, in_torch = both(net)
    assert native.explain().startswith("native-cpu ")
    assert native.explain().endswith("linear tanh linear")
    native(*data)
    assert "the last call had 3 tasks, 2 steps" in native.explain()
    assert in_torch.explain() == 'torch: backend="torch" was asked for'
    half = pymeta.MAML(mlp(2, 4, 2, dtype=torch.bfloat16), loss="mse", lr=0.1, steps=1)
    assert "bfloat16" in half.explain()


def test_the_backend_can_be_forced(monkeypatch):
    net = mlp(2, 4, 2)
    options = {"loss": "mse", "lr": 0.1, "steps": 1}
    monkeypatch.setenv("PYMETA_BACKEND", "torch")
    assert pymeta.MAML(net, **options).backend == "torch"
    assert pymeta.MAML(net, backend="native", **options).backend == "native"
    monkeypatch.setenv("PYMETA_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"PYMETA_BACKEND.*'cuda'"):
        pymeta.MAML(net, **options)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_import_does_not_import_torch():
    code = "import sys, pymeta, pymeta.native; dir(pymeta); assert 'torch' not in sys.modules"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert set(pymeta.__all__) <= set(dir(pymeta))
    with pytest.raises(AttributeError, match="no attribute 'Mammal'"):
        pymeta.Mammal  # noqa: B018


def test_packages_are_there_when_they_are_used():
    code = (
        "import sys, pymeta; pymeta.nn.Residual, pymeta.data.Panel, pymeta.native.kept_bytes; "
        "assert {'nn', 'data', 'learners'} <= set(dir(pymeta)); "
        "assert 'pymeta.learners' not in sys.modules; pymeta.learners.ProtoNet"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_environment_options():
    code = "from pymeta import native; print(native.num_threads(), native.executor())"
    done = run_python(code, PYMETA_NUM_THREADS="1", PYMETA_EXECUTOR="rows")
    assert done.stdout.split() == ["1", "rows"], done.stderr
    for name in ("PYMETA_ISA", "PYMETA_EXECUTOR", "PYMETA_NUM_THREADS"):
        done = run_python("import pymeta.native", **{name: "nonsense"})
        assert done.returncode != 0 and f"ValueError: {name}" in done.stderr


def test_threads_option():
    before = pymeta.num_threads()
    try:
        pymeta.set_num_threads(1)
        assert pymeta.num_threads() == 1
        with pytest.raises(ValueError, match=r"n: .*>= 1, got 0"):
            pymeta.set_num_threads(0)
        with pytest.raises(TypeError, match=r"n: .*float"):
            pymeta.set_num_threads(1.5)
    finally:
        pymeta.set_num_threads(before)
