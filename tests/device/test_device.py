"""The way of CUDA tensors through pymeta, walked with the emulated device and tensors on the CPU.

What the CUDA executor computes is the business of test_kernels.py, what a GPU makes of it that of
test_cuda.py. Here it is everything between a call in Python and the core's.
"""

import copy
import pickle

import pytest
import torch
from cases import Case, Problem, Wanted, is_kinked, walk
from device_help import make
from helpers import assert_close, batch, gradients, mlp
from kernels import DTYPES, EPS, same_bits
from torch import nn

from pymeta import Adam, Adapted, FineTune, LearnableLR, Reptile, native
from pymeta.algorithms import finetune
from pymeta.backend.device import Device

pytestmark = pytest.mark.skipif(not native.emulates(), reason="a build without the emulated device")


SIZES = [7, 0, 4, 5, 2, 6]


LIN = "linear"


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


# ---- right results ------------------------------------------------------------------------------


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
    # once: after other compiled calls of the process, torch keeps no graph of this one
    assert_close(torch.autograd.grad(got, list(module.parameters())), mine)


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


# ---- adapted models -----------------------------------------------------------------------------


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


# ---- copies to a GPU ----------------------------------------------------------------------------


class OfTheHost:
    """A tensor of so many bytes that notes down what is done with it."""

    def __init__(self, nbytes):
        self.nbytes, self.done = nbytes, []

    def pin_memory(self):
        self.done.append("pinned")
        return self

    def to(self, device, non_blocking):
        self.done.append((device.type, non_blocking))
        return self


@pytest.mark.parametrize("nbytes, pinned", [(65536, []), (65544, ["pinned"])])
def test_large_copies_are_made_from_pinned_memory(nbytes, pinned, gpu):
    """From any other the driver waits for the stream where there are more than 64 KiB."""
    tensor = OfTheHost(nbytes)
    Device(torch.device("cuda", 0)).upload("sizes", tensor)
    assert tensor.done == [*pinned, ("cuda", True)]
