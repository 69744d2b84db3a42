"""The way of CUDA tensors through pymeta, walked with the emulated device and tensors on the CPU.

What the CUDA executor computes is the business of tests/test_kernels.py, what a GPU makes of it
that of tests/test_cuda.py. Here it is everything between a call in Python and the core's: which
path it takes, memory, streams, what is checked and what is not.
"""

import copy
import math
import os
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from cases import Case, Problem, Wanted, is_kinked, walk
from helpers import assert_close, batch, gradients, mlp
from kernels import DTYPES, EPS, same_bits, using
from torch import Tensor, nn

import pymeta
from pymeta import SGD, Adam, Adapted, FineTune, LearnableLR, Reptile, native
from pymeta.algorithms import finetune
from pymeta.backend.device import Device, unusable
from pymeta.backend.prepared import PreparedCall

pytestmark = pytest.mark.skipif(not native.emulates(), reason="a build without the emulated device")

SIZES = [7, 0, 4, 5, 2, 6]
LIN = "linear"


@pytest.fixture(autouse=True)
def emulated():
    """The emulated device, with few threads: they are the host's."""
    before = native.block_threads(), native.block_bytes()
    with using(executor="emulated"):
        native.set_block_threads(4)
        try:
            yield
        finally:
            native.set_block_threads(before[0])
            native.set_block_bytes(before[1])
            native.set_check_values(False)


@pytest.fixture
def calls(monkeypatch):
    """The names of the core's methods that were called on a device."""
    seen, original = [], Device.run

    def spy(self, method, key, *arguments, **options):
        seen.append(key[0])
        return original(self, method, key, *arguments, **options)

    monkeypatch.setattr(Device, "run", spy)
    return seen


@pytest.fixture
def repeats(monkeypatch):
    """Of every call that could have been a repeat, whether it was."""
    seen, original = [], PreparedCall.again

    def spy(self, *arguments):
        results = original(self, *arguments)
        seen.append(results is not None)
        return results

    monkeypatch.setattr(PreparedCall, "again", spy)
    return seen


class Fakes:
    """What a GPU would say of streams and captures."""

    stream, capturing = 0, False


@pytest.fixture
def gpu(monkeypatch):
    fakes = Fakes()
    monkeypatch.setattr(Device, "stream", lambda self: fakes.stream)
    monkeypatch.setattr(Device, "capturing", lambda self: fakes.capturing)
    return fakes


def make(net=None, **options):
    options = {"loss": "mse", "lr": 0.1, "steps": 2, "backend": "native", **options}
    return pymeta.MAML(mlp(2, 4, 3) if net is None else net, **options)


def ragged(loss="mse", sizes=SIZES, out=3):
    """(xs, ys, weights) as lists."""
    return (
        [torch.randn(n, 2, dtype=torch.float64) for n in sizes],
        [batch(loss, 1, n, 1, out=out)[1][0] for n in sizes],
        [torch.rand(n, dtype=torch.float64) + 0.1 for n in sizes],
    )


def in_dtype(values, dtype):
    """Lists of tensors, or tensors, with floating point ones in `dtype`."""
    if isinstance(values, (list, tuple)):
        return type(values)(in_dtype(v, dtype) for v in values)
    return values.to(dtype) if values.is_floating_point() else values


# ---- right results ----------------------------------------------------------------------------

CASES = {
    "uniform": Case(((LIN, 3, 5, True), ("tanh",), (LIN, 5, 2, True))),
    "first order": Case(
        ((LIN, 2, 4, True), ("silu",), (LIN, 4, 1, True)), first_order=True, steps=3
    ),
    "no steps": Case(((LIN, 2, 3, True),), steps=0),
    "padded, weights, class weights": Case(
        ((LIN, 2, 4, True), ("gelu",), (LIN, 4, 3, True)),
        loss="cross_entropy",
        loss_options=True,
        form="padded",
        weights=True,
        tasks=5,
    ),
    "lists, weights, Meta-SGD, momentum": Case(
        ((LIN, 3, 4, True), ("elu",), (LIN, 4, 2, False)),
        loss="huber",
        form="list",
        weights=True,
        lr="parameter",
        optimizer="nesterov",
    ),
    "rates of layers and steps, adam": Case(
        ((LIN, 2, 4, True), ("softplus",), (LIN, 4, 2, True)),
        loss="bce_with_logits",
        lr="layer",
        per_step=True,
        optimizer="adam",
        steps=3,
    ),
    "one rate, clipped": Case(
        ((LIN, 2, 4, True), ("relu",), (LIN, 4, 2, True)), lr="network", optimizer="clip"
    ),
    "normalised, some adapted": Case(
        (
            (LIN, 2, 4, True),
            ("batch_norm", 4, 4, True),
            ("sigmoid",),
            ("layer_norm", 4, 4, True),
            (LIN, 4, 2, True),
        ),
        mask=1,
        support=6,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_meta_gradients_are_the_references(name, calls):
    """Losses, predictions, gradients of parameters, rates and inputs, and adapted weights."""
    case = CASES[name]
    problem = Problem(case)
    nearest, steepest = walk(problem)
    kinked = is_kinked(case) and nearest < 64 * EPS[torch.float32]
    calls.clear()
    Wanted(problem, steepest).check(DTYPES[1:] if kinked else DTYPES, [(None, "emulated")])
    assert set(calls) == {"meta", "adapt"}


def test_rates_of_parameters_in_another_order_than_the_chains(calls):
    net, data, found = mlp(2, 4, 3), batch(out=3), []
    net[0]._parameters["weight"] = net[0]._parameters.pop("weight")  # after the bias now
    for backend in ("native", "torch"):
        module = make(net, lr=LearnableLR(0.1, "parameter"), backend=backend)
        with torch.no_grad():
            module.lr.copy_(torch.linspace(0.05, 0.2, module.lr.numel()))
        loss = module(*data).loss
        found.append([loss, *gradients(loss, *module.parameters())])
    assert module._current()[0].lr_order is not None and calls == ["meta"]
    assert_close(*found)


def test_torch_compile_knows_rates_of_parameters_in_another_order_than_the_chains(calls):
    net, data = mlp(2, 4, 3), batch(out=3)
    net[0]._parameters["weight"] = net[0]._parameters.pop("weight")
    module = make(net, lr=LearnableLR(0.1, "parameter"))
    with torch.no_grad():
        module.lr.copy_(torch.linspace(0.05, 0.2, module.lr.numel()))
    got = torch.compile(module, backend="aot_eager", fullgraph=True)(*data).loss
    mine = gradients(module(*data).loss, *module.parameters())
    assert_close(gradients(got, *module.parameters()), mine)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["uniform", "ragged", "padded"])
def test_reptile(dtype, form, calls):
    xs, ys, ws = ragged(sizes=[6] * 6 if form == "uniform" else SIZES)
    options = {"support_weights": ws, "task_ids": range(6)}
    if form == "padded":
        xs, ys, ws = (nn.utils.rnn.pad_sequence(v, batch_first=True) for v in (xs, ys, ws))
        options |= {"support_sizes": SIZES, "support_weights": ws}
    net, found = mlp(2, 4, 3), []
    for backend, kind in (("native", dtype), ("torch", torch.float64)):
        rule = Adam(0.02, (0.0, 0.999), 0.1)
        module = Reptile(
            copy.deepcopy(net).to(kind), loss="mse", optimizer=rule, steps=5, batch_size=3,
            backend=backend,
        )  # fmt: skip
        weights = in_dtype(options["support_weights"], kind)
        arguments = (in_dtype(xs, kind), in_dtype(ys, kind))
        out = module(*arguments, **{**options, "support_weights": weights})
        found.append([out.loss, out.task_losses, *gradients(out.loss, *module.parameters())])
    assert calls == ["reptile"]
    assert_close(*found, terms=10**5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_fine_tuning(dtype, form, calls):
    """Held out rows, class weights, minibatches, early stopping, curves, frozen parameters."""
    xs, ys, ws = ragged("cross_entropy")
    options = {"task_ids": range(6), "curves": True}
    if form == "padded":
        xs, ys, ws = (nn.utils.rnn.pad_sequence(v, batch_first=True) for v in (xs, ys, ws))
        options |= {"sizes": SIZES}
    net, found = mlp(2, 4, 3), []
    for backend, kind in (("native", dtype), ("torch", torch.float64)):
        module = FineTune(
            copy.deepcopy(net).to(kind), loss="cross_entropy", optimizer=Adam(0.05, eps=0.1),
            epochs=4, batch_size=3, freeze=["0.bias"], class_weights="balanced", anchor=0.1,
            validation=0.3, patience=2, backend=backend,
        )  # fmt: skip
        weights = in_dtype(ws, kind)
        models = module(in_dtype(xs, kind), in_dtype(ys, kind), weights=weights, **options)
        found.append(models)
    assert calls == ["adapt"]
    mine, wanted = found
    history, other = (m.history.values() for m in found)
    assert_close(mine.parameters.values(), wanted.parameters.values(), terms=10**5)
    assert torch.equal(history.pop("epochs"), other.pop("epochs"))
    assert torch.equal(history.pop("best_epochs"), other.pop("best_epochs"))
    for name, values in history.items():
        assert torch.equal(values.isnan(), other[name].isnan())
        assert_close(values.nan_to_num(), other[name].nan_to_num(), terms=10**5)


def test_fine_tuning_from_starts_of_their_own(calls):
    net, (xs, ys, _) = mlp(2, 4, 3), ragged(sizes=[5] * 4)
    start = {n: torch.randn(4, *p.shape).double() for n, p in net.named_parameters()}
    module = FineTune(net, loss="mse", lr=0.1, epochs=2, backend="native")
    models = module(xs, ys, start=start)
    for t in range(4):
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(start[name][t])
        alone = module(xs[t : t + 1], ys[t : t + 1])
        mine = [p[t] for p in models.parameters.values()]
        assert same_bits(mine, [p[0] for p in alone.parameters.values()])
    again = module(xs, ys, start=models, validation_data=(xs, ys))
    assert calls == ["adapt"] * 6
    assert len(again) == 4


def test_results_do_not_depend_on_the_chunks(calls, monkeypatch):
    xs, ys, ws = ragged("cross_entropy", [int(n) for n in torch.randint(0, 7, (19,))])
    module = FineTune(
        mlp(2, 3, 3), loss="cross_entropy", optimizer=Adam(0.02), epochs=2, batch_size=4,
        class_weights="balanced", validation=0.2, backend="native",
    )  # fmt: skip
    options = {"weights": ws, "task_ids": range(19), "curves": True}
    whole = module(xs, ys, **options)
    monkeypatch.setattr(finetune, "_DEVICE_CHUNK_WORK", 1.0)
    parts = module(xs, ys, **options)
    assert calls == ["adapt"] * 3
    assert "the last call had 19 tasks, 2 epochs" in module.explain()
    streamed = Adapted.concatenate(
        module.stream(zip(xs, ys, ws, strict=True), 7, task_ids=range(19))
    )
    for models in (parts, streamed):
        assert same_bits(models.parameters.values(), whole.parameters.values())


def test_numpy_arrays_and_inputs_in_other_forms(calls):
    module, data = make(), batch(out=3)
    wanted = module(*data)
    changed = [
        [v.numpy() for v in data],
        [v.transpose(0, 1).contiguous().transpose(0, 1) for v in data],
        [list(v) for v in data],
        [torch.complex(v, -v).conj().imag for v in data],
    ]
    for each in changed:
        got = module(*each)
        assert same_bits(got.loss, wanted.loss) and same_bits(got.task_losses, wanted.task_losses)
    assert calls == ["meta"] * 5


def test_no_tasks(calls):
    net = mlp(2, 4, 3)
    xs, ys = torch.zeros(0, 5, 2).double(), torch.zeros(0, 5, 3).double()
    out = make(net)(xs, ys, xs, ys)
    assert out.loss == 0 and out.predictions.shape == (0, 5, 3)
    assert all(not g.any() for g in gradients(out.loss, *net.parameters()))
    models = FineTune(net, loss="mse", lr=0.1, epochs=1, backend="native")(xs, ys, curves=True)
    assert len(models) == 0 and models.history.epochs.shape == (0,)
    assert Reptile(net, loss="mse", lr=0.1, steps=1, backend="native")(xs, ys).loss == 0


# ---- adapted models ---------------------------------------------------------------------------


def test_adapted_models(calls, tmp_path):
    net, (xs, ys, xq, _) = mlp(2, 4, 3), batch("cross_entropy", tasks=4, out=3)
    module = make(net, loss="cross_entropy")
    models = module.adapt(xs, ys)
    outputs = models(xq)
    for t in range(4):
        assert_close(outputs[t], models[t](xq[t]))
    assert_close(models.predict_proba(xq), outputs.softmax(-1))  # both are torch's
    mask = torch.tensor([True, False, True, True])
    for where in (slice(1, 3), [2, 0], mask, mask.numpy(), torch.tensor([3, 1])):
        assert same_bits(models[where](xq[where]), outputs[where])
    listed = models([xq[0, :2], xq[1], xq[2, :0], xq[3]])
    assert same_bits(listed, [outputs[0, :2], outputs[1], outputs[2, :0], outputs[3]])
    padded = models(xq, query_sizes=[2, 4, 0, 4])
    assert same_bits(padded[0, :2], outputs[0, :2]) and not padded[2].any()
    assert set(calls) == {"adapt", "predict"}
    models.save(tmp_path / "models.safetensors")
    loaded = Adapted.load(tmp_path / "models.safetensors", net)
    calls.clear()
    for other in (loaded, pickle.loads(pickle.dumps(models)), Adapted.concatenate([models])):
        assert same_bits(other(xq), outputs)
        assert torch.equal(other.status, models.status)
    assert calls == ["predict"] * 3


def test_an_adapter_of_a_model_on_a_device_runs_on_the_cpu(calls):
    module, (xs, ys, xq, _) = make(), batch(out=3)
    adapter = module.adapter()
    calls.clear()
    outputs = adapter.adapt(xs.numpy(), ys.numpy())(xq.numpy())
    alone = adapter.adapt_predict(xs[0].numpy(), ys[0].numpy(), xq[0].numpy())
    assert calls == []
    wanted = module.adapt(xs, ys)(xq)
    assert calls == ["adapt", "predict"]
    assert_close([torch.from_numpy(outputs), torch.from_numpy(alone)], [wanted, wanted[0]])


# ---- values that cannot be looked at ----------------------------------------------------------


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


# ---- which path runs --------------------------------------------------------------------------


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
    tuner = FineTune(net, loss="mse", lr=0.1, epochs=3, validation=0.3, backend="native")
    tuner(xs, ys)
    assert "the last call had 3 tasks, 3 epochs, 4 threads a task, " in tuner.explain()
    reptile = Reptile(net, loss="mse", lr=0.1, steps=3, backend="native")
    reptile(xs, ys)
    assert "the last call had 3 tasks, 3 steps, 4 threads a task, " in reptile.explain()


def test_what_the_device_cannot_run_falls_back_with_one_warning(calls):
    net, data = mlp(*[2] * 19), batch()
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


# ---- repeats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.1, LearnableLR(0.1, "layer")])
def test_repeats_give_what_a_first_call_gives(lr, repeats, calls):
    net = mlp(2, 4, 3)
    module = make(net, lr=lr)
    for _ in range(3):
        data = batch(out=3)
        got, wanted = module(*data), make(net, lr=lr)(*data)
        for a, b in zip(got, wanted, strict=True):
            assert same_bits(a, b)
        parameters = list(net.parameters())
        assert same_bits(gradients(got.loss, *parameters), gradients(wanted.loss, *parameters))
    assert repeats == [True, True] and calls == ["meta"] * 6
    with torch.no_grad():
        assert not module(*data).loss.requires_grad


def test_threads_repeat_one_module():
    net = mlp(2, 4, 2)
    module, several = make(net), [batch(tasks=t) for t in (1, 2, 3)]
    wanted = [gradients(make(net)(*data).loss, *net.parameters()) for data in several]
    wrong = []

    def work(data, want):
        for _ in range(10):
            found = gradients(module(*data).loss, *net.parameters())
            if not same_bits(found, want):
                wrong.append(found)

    threads = [
        threading.Thread(target=work, args=both) for both in zip(several, wanted, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_uniform_calls_read_no_value(monkeypatch):
    """Reading one would mean to wait for a GPU, and be an error in the capture of a graph."""
    net, data = mlp(2, 4, 3), batch("cross_entropy", out=3)
    options = {"loss": "cross_entropy", "backend": "native"}
    module = make(net, lr=LearnableLR(0.1, "parameter"), **options)
    plain = make(net, optimizer=SGD(0.1, momentum=0.9), **{**options, "lr": None})
    reptile = Reptile(net, lr=0.1, steps=3, batch_size=2, **options)
    weights = {"support_weights": torch.rand(3, 5).double()}
    models = module.adapt(*data[:2])

    def refuse(self, *arguments, **options):
        raise AssertionError("a tensor's values were asked for")

    names = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__")
    for name in (*names, "__index__", "__array__"):
        monkeypatch.setattr(Tensor, name, refuse)
    for _ in range(2):
        for call in (module, plain):
            call(*data).loss.backward()
            call(*data, **weights)
            with torch.no_grad():
                call(*data)
            call.adapt(*data[:2])
        reptile(*data[:2]).loss.backward()
        reptile.adapt(*data[:2])
        models(data[2])
    with pytest.raises(AssertionError, match="values were asked for"):
        FineTune(net, lr=0.1, epochs=1, **options)(*data[:2])  # which is why it is not captured


# ---- memory and streams -----------------------------------------------------------------------


def test_workspaces_are_asked_for_once_and_grow():
    asked, given = [], []

    def method(need, *, device, extra=0):
        ordinal, stream, address, size = device
        assert (ordinal, stream) == (-1, 0)
        if address == 0 or size < need + extra:
            asked.append(size)
        else:
            given.append(size)
        return need + extra

    device = Device.of(torch.device("cpu"))
    for need in (100, 100, 80):
        device.run(method, "one shape", need)
    assert asked == [0] and given == [100, 100, 100]
    device.run(method, "one shape", 300)  # not what its shapes say: nothing was run, ask again
    device.run(method, "one shape", 300)
    assert asked == [0, 100] and given[3:] == [300, 300]
    device.run(method, "another", 0)
    device.run(method, "another", 0, extra=0)
    assert given[5:] == [1, 1]  # an address is needed all the same: 0 means to ask
    for shape in range(200):
        device.run(method, shape, 10)
    assert len(device._needs) <= 64


def test_calls_of_all_sizes_one_after_another():
    net = mlp(2, 4, 3)
    module, sizes = make(net), [(1, 2), (6, 5), (3, 9), (1, 2), (12, 1), (6, 5)]
    several = [batch(tasks=t, support=n, query=n, out=3) for t, n in sizes]
    for data in several:
        got, wanted = module(*data), make(net)(*data)
        assert same_bits(got.task_losses, wanted.task_losses)
        parameters = list(net.parameters())
        assert same_bits(gradients(got.loss, *parameters), gradients(wanted.loss, *parameters))


def flat_address(loss):
    """Where the gradients lie that a loss's graph holds."""
    return loss.grad_fn.lease.gradients.flat.data_ptr()


def test_gradients_memory_is_used_again_on_its_own_stream_only(gpu):
    module, data = make(), batch(out=3)
    gpu.stream = 7
    out = module(*data)
    first = flat_address(out.loss)
    (layout,) = module._current()[0].layouts.values()
    del out
    assert [g.stream for g in layout.idle] == [7]
    out = module(*data)
    assert flat_address(out.loss) == first
    kept = out.loss.grad_fn.lease.gradients  # so that torch's allocator cannot give it out again
    del out
    gpu.stream = 8
    out = module(*data)
    assert flat_address(out.loss) != first and out.loss.grad_fn.lease.gradients is not kept
    del out
    assert {g.stream for g in layout.idle} == {8}


def test_a_step_size_is_made_on_each_stream(gpu, repeats):
    module, data = make(), batch(out=3)
    plan = module._current()[0]
    gpu.stream = 7
    module(*data)
    one = plan.lr_tensor(0.1)
    assert plan.lr_tensor(0.1) is one
    gpu.stream = 8
    module(*data)
    assert plan.lr_tensor(0.1) is not one
    module(*data)
    assert repeats == [False, True]


def test_a_capture_takes_nothing_that_is_kept_and_leaves_nothing(gpu, repeats):
    net, data = mlp(2, 4, 3), batch(out=3)
    module, reptile = make(net), Reptile(net, loss="mse", lr=0.1, steps=1, backend="native")
    gpu.stream = 7
    module(*data), reptile(*data[:2])  # the warm-up
    plan, other = module._current()[0], reptile._current()[0]
    layouts = [*plan.layouts.values(), *other.layouts.values()]
    idle = [list(layout.idle) for layout in layouts]
    lrs = dict(plan.lrs)
    assert len(idle) == 2 and all(len(each) == 1 for each in idle)
    gpu.capturing = True  # on the same stream, and on another as torch.cuda.graph does it
    for gpu.stream in (7, 8):
        captured, also = module(*data), reptile(*data[:2])
        held = [captured.loss.grad_fn.lease.gradients, also.loss.grad_fn.lease.gradients]
        assert all(g.stream is None for g in held)
        assert not any(g in each for each in idle for g in held)
        assert plan.lr_tensor(0.1) is not lrs[(0.1, 7)]
        module.adapt(*data[:2])(data[2])
        del captured, also, held
    gpu.capturing, gpu.stream = False, 7
    assert [list(layout.idle) for layout in layouts] == idle
    assert plan.lrs == lrs and plan.lrs[(0.1, 7)] is lrs[(0.1, 7)]
    assert repeats == [False] * len(repeats)
    wanted = make(net)(*data)
    assert same_bits(module(*data).loss, wanted.loss)


@pytest.mark.parametrize("what", ["sizes", "lists", "task_ids"])
def test_a_capture_refuses_what_each_call_copies_from_the_host(what, gpu):
    net, data = mlp(2, 4, 3), batch(out=3)
    module, reptile = make(net), Reptile(net, loss="mse", lr=0.1, steps=1, backend="native")
    lists = [[v[0], v[1, :2], v[2]] for v in data]
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="cannot be part of a CUDA graph"):
        if what == "sizes":
            module(*data, query_sizes=[1, 2, 3])
        elif what == "lists":
            module(*lists)
        else:
            reptile(*data[:2], task_ids=[0, 1, 2])
    native.set_check_values(True)  # there is nothing to be checked yet: values come by the replay
    module(*data)


def test_a_device_is_what_torch_says_it_is():
    assert Device.of(torch.device("cpu")).name == "emulated"
    there = Device(torch.device("cuda", 2))
    assert (there.ordinal, there.device.index) == (2, 2)
    assert Device.of(torch.device("meta")) is None
    with using(executor="auto"):
        assert Device.of(torch.device("cpu")) is None


def test_why_a_device_cannot_be_used(monkeypatch):
    assert unusable(torch.device("cpu")) is None
    assert "runs on the CPU and on CUDA" in unusable(torch.device("meta"))
    monkeypatch.setattr(native, "cuda_reason", lambda: "the driver is too old")
    said = unusable(torch.device("cuda", 1))
    assert said == "the parameters are on cuda:1, where the native core cannot run: " + (
        "the driver is too old"
    )
    monkeypatch.setattr(native, "cuda_reason", lambda: None)
    monkeypatch.setattr(native, "devices", lambda: [{"capability": c} for c in ("10.0", "7.5")])
    assert unusable(torch.device("cuda", 0)) is None
    assert unusable(torch.device("cuda", 1)).endswith("compute capability 7.5; 8.0 is needed")
    assert Device(torch.device("cuda", 0)).name == "sm_100"
