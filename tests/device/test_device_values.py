"""On a device: values that nobody looks at, what is checked, and which path runs."""

import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from device_help import make
from helpers import assert_close, batch, gradients, mlp
from kernels import same_bits, using
from torch import nn

from pymeta import FineTune, Reptile, native

pytestmark = pytest.mark.skipif(not native.emulates(), reason="a build without the emulated device")


# ---- values that cannot be looked at ------------------------------------------------------------


def spoil_label(ys, ws, value=3):
    ys[1, 2] = value


def spoil_weight(ys, ws, value=-1.0):
    ws[1, 2] = value


SPOILT = {
    "label too large": (spoil_label, 3, "label 3 is not in 0..2"),
    "label negative": (spoil_label, -5, "label -5 is not in 0..2"),
    "weight negative": (spoil_weight, -1.0, "weight -1.0"),
    "weight infinite": (spoil_weight, math.inf, "weight inf"),
    "weight nan": (spoil_weight, math.nan, "weight nan"),
}


@pytest.mark.parametrize("side", ["support", "query"])
@pytest.mark.parametrize("name", SPOILT)
def test_a_wrong_value_makes_its_task_nan_and_no_other(name, side):
    spoil, value, message = SPOILT[name]
    net = mlp(2, 4, 3)
    module = make(net, loss="cross_entropy")
    xs, ys, xq, yq = batch("cross_entropy", tasks=4, out=3)
    ws, wq = torch.rand(4, 5).double() + 0.1, torch.rand(4, 4).double() + 0.1
    options = {"support_weights": ws, "query_weights": wq}
    wanted = module(xs, ys, xq, yq, **options)
    spoil(*((ys, ws) if side == "support" else (yq, wq)), value)
    got = module(xs, ys, xq, yq, **options)
    assert got.task_losses[1].isnan() and got.loss.isnan()
    assert all(g.isnan().all() for g in gradients(got.loss, net[2].bias))
    others = [0, 2, 3]
    assert same_bits(got.task_losses[others], wanted.task_losses[others])
    assert same_bits(got.predictions[others], wanted.predictions[others])
    if side == "support":
        models = module.adapt(xs, ys, support_weights=ws)
        assert models.status.tolist() == [0, 1, 0, 0]
    native.set_check_values(True)
    with pytest.raises(ValueError, match=f"(ys|yq|weights): task 1, row 2: {message}"):
        module(xs, ys, xq, yq, **options)
    if side == "support":
        for call in (module.adapt, Reptile(net, loss="cross_entropy", lr=0.1, steps=1)):
            with pytest.raises(ValueError, match=f"task 1, row 2: {message}"):
                call(xs, ys, support_weights=ws)


@pytest.mark.parametrize("side", ["support", "query"])
@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_a_wrong_label_is_of_no_class(label, side):
    """Gradients of row weights, which ask for the weight of each row's class."""
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    module, (xs, ys, xq, yq) = make(loss=loss), batch("cross_entropy", tasks=4, out=3)
    weights = [torch.ones(4, n, dtype=torch.float64, requires_grad=True) for n in (5, 4)]

    def found():
        out = module(xs, ys, xq, yq, support_weights=weights[0], query_weights=weights[1])
        return torch.autograd.grad(out.loss, weights)

    wanted = found()
    (ys if side == "support" else yq)[1, 2] = label
    got = found()
    for after, before in zip(got, wanted, strict=True):
        assert after[1].isnan().any()
        assert same_bits(after[[0, 2, 3]], before[[0, 2, 3]])


def test_what_only_pads_may_hold_anything():
    module, (xs, ys, xq, yq) = make(loss="cross_entropy"), batch("cross_entropy", out=3)
    sizes = {"support_sizes": [3, 5, 4], "query_sizes": [4, 2, 4]}
    wanted = module(xs, ys, xq, yq, **sizes)
    xs[0, 3:], ys[0, 3:], xq[1, 2:], yq[1, 2:] = math.nan, 99, math.inf, -1
    for check in (False, True):
        native.set_check_values(check)
        got = module(xs, ys, xq, yq, **sizes)
        assert same_bits(got.loss, wanted.loss)
        assert not got.predictions[1, 2:].any()


def test_values_are_checked_where_that_is_asked_for(repeats):
    module, (xs, ys, xq, yq) = make(loss="cross_entropy"), batch("cross_entropy", out=3)
    module(xs, ys, xq, yq)
    module(xs, ys, xq, yq)
    yq[2, 1] = 3
    assert module(xs, ys, xq, yq).task_losses.isnan().tolist() == [False, False, True]
    assert repeats == [True, True]
    native.set_check_values(True)
    with pytest.raises(ValueError, match=r"yq: task 2, row 1: label 3 is not in 0\.\.2"):
        module(xs, ys, xq, yq)
    assert repeats == [True, True, False]
    yq[2, 1] = 2
    assert module(xs, ys, xq, yq).loss.isfinite()
    with pytest.raises(TypeError, match="check: expected a bool, got int"):
        native.set_check_values(1)


def test_fine_tuning_checks_its_values_always():
    xs, ys, _, _ = batch("cross_entropy", out=3)
    ys[1, 2] = 3
    module = FineTune(mlp(2, 3), loss="cross_entropy", lr=0.1, epochs=1, backend="native")
    with pytest.raises(ValueError, match=r"ys: task 1, row 2: label 3 is not in 0\.\.2"):
        module(xs, ys)


@pytest.mark.parametrize("job", ["call", "adapt", "reptile", "predict"])
def test_sizes_are_always_checked(job):
    net = mlp(2, 4, 3)
    xs, ys, xq, yq = batch(out=3)
    module = make(net)
    work = {
        "call": lambda sizes: module(xs, ys, xq, yq, support_sizes=sizes),
        "adapt": lambda sizes: module.adapt(xs, ys, support_sizes=sizes),
        "reptile": lambda sizes: Reptile(net, loss="mse", lr=0.1, steps=1, backend="native")(
            xs, ys, support_sizes=sizes
        ),
        "predict": lambda sizes: module.adapt(xs, ys)(xs, query_sizes=sizes),
    }[job]
    work([5, 0, 3])
    for wrong in ([5, 6, 3], [5, -1, 3]):
        with pytest.raises(ValueError, match=rf"_sizes: task 1: size {wrong[1]} is not in 0\.\.5"):
            work(wrong)


def test_single_rows_under_batch_normalisation_are_refused():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    xs, ys, xq, yq = batch(out=3)
    with pytest.raises(ValueError, match="xs: task 2 has one row"):
        make(net)(xs, ys, xq, yq, support_sizes=[5, 0, 1])
    with pytest.raises(ValueError, match="xq: task 0 has one row"):
        make(net)(xs, ys, xq[:, :1], yq[:, :1])
    with pytest.raises(ValueError, match="batch_size: 4 leaves a minibatch of one row"):
        Reptile(net, loss="mse", lr=0.1, steps=2, batch_size=4, backend="native")(xs, ys)


def test_the_environment_sets_what_there_is_to_set():
    code = (
        "from pymeta import native; "
        "print(native.emulating, native.checking_values, native.block_threads())"
    )
    settings = {"PYMETA_EXECUTOR": "emulated", "PYMETA_CHECK_VALUES": "1"}

    def run(**environment):
        environment = {**os.environ, **settings, **environment}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )

    done = run(PYMETA_BLOCK_THREADS="8")
    assert done.stdout.split() == ["True", "True", "8"], done.stderr
    wrong = {"PYMETA_CHECK_VALUES": "yes", "PYMETA_BLOCK_THREADS": "-1", "PYMETA_EXECUTOR": "gpu"}
    for name, value in wrong.items():
        done = run(**{name: value})
        assert f"ValueError: {name}: " in done.stderr


# ---- which path runs ----------------------------------------------------------------------------


def test_explain_names_the_device():
    net, (xs, ys, xq, yq) = mlp(2, 4, 3), batch(out=3)
    module = make(net)
    assert module.explain() == "native-cuda emulated block: linear tanh linear"
    module(xs, ys, xq, yq)
    said = module.explain()
    assert said.startswith(
        "native-cuda emulated block: linear tanh linear; the last call had 3 tasks, 2 steps, "
        "4 threads a task, "
    )
    assert " blocks at once, " in said and said.endswith(" bytes of workspace")
    assert "idle" not in said
    module(xs[:1], ys[:1], xq[:1], yq[:1])
    idle = "1 block at once (1 of 2 multiprocessors idle: call with more tasks), "
    assert idle in module.explain()
    tuner = FineTune(net, loss="mse", lr=0.1, epochs=3, validation=0.3, backend="native")
    tuner(xs, ys)
    assert "the last call had 3 tasks, 3 epochs, 4 threads a task, " in tuner.explain()
    reptile = Reptile(net, loss="mse", lr=0.1, steps=3, backend="native")
    reptile(xs, ys)
    assert "the last call had 3 tasks, 3 steps, 4 threads a task, " in reptile.explain()


def test_what_the_device_cannot_run_falls_back_with_one_warning(calls):
    net, data = mlp(*[2] * 27), batch()
    with pytest.warns(UserWarning, match="runs in torch, which is slower: .*layers"):
        module = make(net, backend="auto")
        out = module(*data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(*data)
        models = module.adapt(*data[:2])
    assert calls == []
    assert module.explain().startswith("torch: ") and "layers" in module.explain()
    with pytest.raises(ValueError, match=r'backend="native": .*layers'):
        make(net)
    with using(executor="auto"):  # the CPU's own executors take more
        assert module.explain().startswith("native-cpu")
        assert_close(module(*data).loss, out.loss)
        wanted = module.adapter().adapt(data[0].numpy(), data[1].numpy())
    adapter = module.adapter()  # so does an adapter, wherever its learner runs
    got = adapter.adapt(data[0].numpy(), data[1].numpy())
    for name, values in got.parameters.items():
        assert np.array_equal(values, wanted.parameters[name])
        assert_close(models.parameters[name], torch.from_numpy(values))


def test_the_executor_may_be_changed_between_calls(calls, repeats):
    module, data = make(), batch(out=3)
    there = [module(*data) for _ in range(2)]
    with using(executor="rows"):
        here = [module(*data) for _ in range(2)]
        assert module.explain().startswith("native-cpu")
    again = module(*data)
    assert calls == ["meta"] * 3
    assert repeats == [True, False, True, False]
    assert same_bits(there[0].loss, there[1].loss) and same_bits(there[0].loss, again.loss)
    assert same_bits(here[0].loss, here[1].loss)
    assert_close(here[0].loss, again.loss)


def test_how_a_block_is_made_may_be_changed_between_calls():
    """The bytes of workspace that were remembered may be too few then."""
    net, data = mlp(2, 6, 3), batch(tasks=5, out=3)
    module = make(net)
    found, workspaces = [], set()
    for threads, size in ((1, 0), (8, 0), (8, 1), (2, 1 << 14), (16, 4096), (0, 0)):
        native.set_block_threads(threads)
        native.set_block_bytes(size)
        found.append(gradients(module(*data).loss, *net.parameters()))
        workspaces.add(module.explain().split(", ")[-1])
    assert len(workspaces) > 1
    for each in found[1:]:
        assert_close(each, found[0])
    with pytest.raises(TypeError, match=r"n: expected an integer in 0\.\.256, got str"):
        native.set_block_threads("8")
    for wrong in (-1, 257):
        with pytest.raises(ValueError, match=r"expected 0 .* 256, got"):
            native.set_block_threads(wrong)
    with pytest.raises(TypeError, match="n: expected an integer >= 0, got float"):
        native.set_block_bytes(1.0)


@pytest.mark.parametrize("steps, second", [(1, True), (3, True), (2, False)])
def test_all_kernels_that_hold_a_call_have_the_same_bits(steps, second):
    """The first family that holds it runs it; here those behind it are made to."""
    extension = native.extension()
    families, found = extension.block_families(), []
    assert families == ["plain", "chains", "every"]
    net, data = mlp(2, 40, 3), batch(tasks=5, out=3)
    module = make(net, steps=steps, first_order=not second)
    try:
        for first in range(len(families)):
            extension.set_block_family(first)
            loss = module(*data).loss
            found.append([loss, *gradients(loss, *net.parameters())])
        with pytest.raises(ValueError, match="block_family: expected 0 to 2, got 3"):
            extension.set_block_family(len(families))
    finally:
        extension.set_block_family(0)
    for each in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(each, found[0], strict=True))


def test_torch_compile_makes_one_graph(calls):
    net, data = mlp(2, 4, 3), batch(out=3)
    module = make(net)
    wanted = module(*data)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    calls.clear()
    got = compiled(*data)
    assert calls == ["meta"]
    assert same_bits(got.loss, wanted.loss)
    assert_close(gradients(got.loss, *net.parameters()), gradients(wanted.loss, *net.parameters()))
