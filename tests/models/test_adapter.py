"""Adapter: to the last bit what the learners do, without torch."""

import copy
import itertools
import pickle
import re
import tracemalloc

import numpy as np
import pytest
import torch
from adapter_help import XQ, XS, YS, arrays, make
from helpers import LOSSES, batch, mlp
from torch import nn

import pymeta


class Odd(nn.Module):
    """A chain that is used in another order than its parameters have."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


NETS = {
    "mlp": lambda: mlp(2, 5, 2),
    "deep": lambda: mlp(2, 17, 9, 2, act=nn.ReLU),
    "odd order": lambda: Odd().double(),
    "norms": lambda: nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.LayerNorm(4), nn.Linear(4, 2)
    ).double(),
}


RULES = {
    "sgd": {"lr": 0.1},
    "momentum": {
        "optimizer": pymeta.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1, clip_norm=0.5)
    },
    "adam": {"optimizer": pymeta.Adam(0.05, betas=(0.5, 0.9))},
    "adamw": {"optimizer": pymeta.Adam(0.05, weight_decay=0.1, decoupled=True, clip_norm=1.0)},
    "rmsprop": {
        "optimizer": pymeta.RMSprop(0.05, 0.8, 1e-3, momentum=0.5, centered=True, clip_norm=1.0)
    },
    **{
        f"per {per}{' and step' if per_step else ''}": {
            "lr": pymeta.LearnableLR(0.1, per, per_step=per_step)
        }
        for per, per_step in itertools.product(("network", "layer", "parameter"), (False, True))
    },
    "learned adam": {"optimizer": pymeta.Adam(pymeta.LearnableLR(0.05, "parameter", True))},
}


def agree(learner, adapter, models, xs, ys, xq, **options) -> None:
    """Every way through the adapter gives bitwise what the learner's `models` are."""
    xs, ys, xq = arrays(xs, ys, xq)
    got = adapter.adapt(xs, ys, **options)
    assert list(got.parameters) == list(models.parameters)
    for name, value in models.parameters.items():
        assert np.array_equal(got.parameters[name], value.numpy(), equal_nan=True), name
    outputs = got(xq)
    assert np.array_equal(outputs, models(torch.from_numpy(xq)).numpy(), equal_nan=True)
    assert np.array_equal(got.status, models.status.numpy())
    if not options:
        many = adapter.adapt_predict(xs, ys, xq)
        assert np.array_equal(many, outputs, equal_nan=True)
        for t in range(len(xs)):
            one = adapter.adapt_predict(xs[t], ys[t], xq[t])
            assert np.array_equal(one, outputs[t], equal_nan=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("net", NETS)
def test_it_does_bitwise_what_maml_does(net, rule):
    data = batch(tasks=5)[:3]
    for adapt in (None, ["*bias"]):
        maml = make(NETS[net](), adapt=adapt, **RULES[rule])
        adapter = maml.adapter()
        agree(maml, adapter, maml.adapt(*data[:2]), *data)
        for steps in (0, 5):
            agree(maml, adapter, maml.adapt(*data[:2], steps=steps), *data, steps=steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_dtypes(loss, dtype):
    xs, ys, xq, _ = batch(loss, tasks=4, out=3, dtype=dtype)
    maml = make(mlp(2, 8, 3, dtype=dtype), loss=loss)
    adapter = maml.adapter()
    assert adapter.dtype == xs.numpy().dtype
    agree(maml, adapter, maml.adapt(xs, ys), xs, ys, xq)
    weights = torch.rand(4, 5, dtype=dtype)
    got = adapter.adapt(*arrays(xs, ys), weights=weights.numpy())(xq.numpy())
    assert np.array_equal(got, maml.adapt(xs, ys, support_weights=weights)(xq).numpy())
    one = adapter.adapt_predict(*(a[2] for a in arrays(xs, ys, xq)), weights=weights[2].numpy())
    assert np.array_equal(one, got[2])


def test_a_learned_loss_module_comes_along():
    weight = torch.tensor([1.0, 3.0, 0.5]).double()
    loss = nn.CrossEntropyLoss(weight, label_smoothing=0.1, ignore_index=1)
    xs, ys, xq, _ = batch("cross_entropy", out=3)
    maml = make(mlp(2, 8, 3), loss=loss)
    agree(maml, maml.adapter(), maml.adapt(xs, ys), xs, ys, xq)


def test_frozen_parameters_stay():
    net = mlp(2, 5, 5, 2)
    net[0].weight.requires_grad_(False)
    xs, ys, xq, _ = batch()
    maml = make(net, lr=pymeta.LearnableLR(0.1, "layer"))
    adapter = maml.adapter()
    assert adapter.adapted == ("0.bias", "2.weight", "2.bias", "4.weight", "4.bias")
    agree(maml, adapter, maml.adapt(xs, ys), xs, ys, xq)
    shared = adapter.adapt(*arrays(xs, ys)).parameters["0.weight"]
    assert shared.strides[0] == 0 and np.array_equal(shared[1], net[0].weight.numpy())


def test_images_are_flattened():
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    xs, xq = torch.randn(3, 5, 2, 3).double(), torch.randn(3, 4, 2, 3).double()
    ys = torch.randn(3, 5, 2).double()
    maml = make(net)
    adapter, models = maml.adapter(), maml.adapt(xs, ys)
    wanted = models(xq).numpy()
    assert np.array_equal(adapter.adapt_predict(*arrays(xs, ys, xq)), wanted)
    listed = adapter.adapt_predict(*map(list, arrays(xs, ys, xq)))
    assert np.array_equal(listed, wanted)
    one = adapter.adapt_predict(*arrays(xs[1].flatten(1), ys[1], xq[1].flatten(1)))
    assert np.array_equal(one, wanted[1])


def test_ragged_tasks():
    xs, ys, xq, _ = batch(tasks=4)
    maml = make(mlp(2, 5, 2))
    adapter = maml.adapter()
    sizes, queries = (5, 0, 3, 1), (4, 2, 0, 3)
    cut = [x[:n] for x, n in zip(xs, sizes, strict=True)]
    cut_y = [y[:n] for y, n in zip(ys, sizes, strict=True)]
    cut_q = [q[:n] for q, n in zip(xq, queries, strict=True)]
    weights = [torch.rand(n).double() for n in sizes]
    wanted = maml.adapt(cut, cut_y)(cut_q)
    got = adapter.adapt_predict(arrays(*cut), arrays(*cut_y), arrays(*cut_q))
    weighted = maml.adapt(cut, cut_y, support_weights=weights)(cut_q)
    got_weighted = adapter.adapt_predict(
        arrays(*cut), arrays(*cut_y), arrays(*cut_q), weights=arrays(*weights)
    )
    for t in range(4):
        assert np.array_equal(got[t], wanted[t].numpy()) and got[t].shape == (queries[t], 2)
        assert np.array_equal(got_weighted[t], weighted[t].numpy())
        one = adapter.adapt_predict(*arrays(cut[t], cut_y[t], cut_q[t]))
        assert np.array_equal(one, got[t])
    models = adapter.adapt(arrays(*cut), arrays(*cut_y))
    assert np.array_equal(models(xq.numpy()), maml.adapt(cut, cut_y)(xq).numpy())


def test_no_tasks():
    adapter = make(mlp(2, 5, 2)).adapter()
    models = adapter.adapt(np.zeros((0, 5, 2)), np.zeros((0, 5, 2)))
    assert len(models) == 0 and models(np.zeros((0, 4, 2))).shape == (0, 4, 2)
    assert models.parameters["0.weight"].shape == (0, 5, 2) and models.status.shape == (0,)


def test_one_dimensional_targets_and_other_integers():
    xs, ys, xq, _ = batch(out=1)
    adapter = make(mlp(2, 5, 1)).adapter()
    wanted = adapter.adapt_predict(*arrays(xs, ys, xq))
    assert np.array_equal(adapter.adapt_predict(*arrays(xs, ys[..., 0], xq)), wanted)
    assert np.array_equal(adapter.adapt_predict(*arrays(xs[0], ys[0, :, 0], xq[0])), wanted[0])
    xs, ys, xq, _ = batch("cross_entropy", out=3)
    adapter = make(mlp(2, 5, 3), loss="cross_entropy").adapter()
    wanted = adapter.adapt_predict(*arrays(xs, ys, xq))
    for dtype in (np.int32, np.uint8):
        narrow = ys.numpy().astype(dtype)
        assert np.array_equal(adapter.adapt_predict(xs.numpy(), narrow, xq.numpy()), wanted)
        one = adapter.adapt_predict(xs[1].numpy(), narrow[1], xq[1].numpy())
        assert np.array_equal(one, wanted[1])


def test_a_task_that_diverges_is_told_apart():
    xs, ys, _, _ = batch()
    ys[1] = 1e200
    xs[1] = 1e200
    models = make(mlp(2, 5, 2)).adapter().adapt(*arrays(xs, ys))
    assert models.status.tolist() == [0, 1, 0]


def test_arrays_that_lie_otherwise_in_memory():
    xs, ys, xq, _ = batch()
    adapter = make(mlp(2, 5, 2)).adapter()
    wanted = adapter.adapt_predict(*arrays(xs, ys, xq))

    def strided(a):
        wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]))
        wide[..., ::2] = a
        return wide[..., ::2]

    def misaligned(a):
        raw = np.zeros(a.nbytes + 1, np.uint8)
        raw[1:] = np.frombuffer(a.tobytes(), np.uint8)
        return raw[1:].view(a.dtype).reshape(a.shape)

    weights = np.ones(5)
    for change in (strided, misaligned, np.asfortranarray):
        xs_, ys_, xq_ = (change(a) for a in arrays(xs, ys, xq))
        assert np.array_equal(adapter.adapt_predict(xs_, ys_, xq_), wanted)
        one = [change(a[1]) for a in arrays(xs, ys, xq)]
        out = np.zeros((4, 2))
        assert adapter.adapt_predict(*one, out, weights=strided(weights)) is out
        assert np.array_equal(out, wanted[1])
    read_only = arrays(xs[1].clone(), ys[1].clone(), xq[1].clone())
    for a in read_only:
        a.flags.writeable = False
    assert np.array_equal(adapter.adapt_predict(*read_only), wanted[1])


def test_out_is_what_is_returned():
    xs, ys, xq = arrays(*batch()[:3])
    adapter = make(mlp(2, 5, 2)).adapter()
    wanted = adapter.adapt_predict(xs, ys, xq)
    out = np.full((3, 4, 2), np.nan)
    assert adapter.adapt_predict(xs, ys, xq, out) is out and np.array_equal(out, wanted)
    one = np.full((4, 2), np.nan)
    assert adapter.adapt_predict(xs[1], ys[1], xq[1], out=one) is one
    assert np.array_equal(one, wanted[1])


def test_no_memory_is_taken_where_out_is_given():
    xs, ys, xq = (a[0] for a in arrays(*batch(query=5000)[:3]))
    adapter = make(mlp(2, 5, 2)).adapter()
    out = np.empty((5000, 2))
    adapter.adapt_predict(xs, ys, xq, out)
    tracemalloc.start()
    try:
        adapter.adapt_predict(xs, ys, xq, out)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(100):
            adapter.adapt_predict(xs, ys, xq, out)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # a bound method and the like; the outputs alone are 80,000 bytes
    assert now - before < 1000 and peak - before < 1000


# ---- wrong inputs -------------------------------------------------------------------------------


F4 = np.float32


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        # one task
        (TypeError, "xs: expected float64, got", (XS[0].astype(F4), YS[0], XQ[0])),
        (TypeError, "ys: expected float64, got", (XS[0], YS[0].astype(F4), XQ[0])),
        (TypeError, "xq: expected float64, got", (XS[0], YS[0], XQ[0].astype(F4))),
        (TypeError, "xs: expected float64, got", (XS[0].astype(int), YS[0], XQ[0])),
        (TypeError, "ys: expected a numpy array, got list", (XS[0], YS[0].tolist(), XQ[0])),
        (TypeError, "xq: expected a numpy array, got list", (XS[0], YS[0], XQ[0].tolist())),
        (TypeError, "xq: expected a numpy array, got NoneType", (XS[0], YS[0], None)),
        (TypeError, "xs: expected an array without a mask", (np.ma.array(XS[0]), YS[0], XQ[0])),
        (TypeError, "ys: expected an array without a mask", (XS[0], np.ma.array(YS[0]), XQ[0])),
        (TypeError, "xq: expected an array without a mask", (XS[0], YS[0], np.ma.array(XQ[0]))),
        (ValueError, r"xs: expected shape \[rows, 2\], got \[5, 1\]", (XS[0, :, :1], YS[0], XQ[0])),
        (ValueError, "ys: expected shape", (XS[0], YS[0, :4], XQ[0])),
        (ValueError, "ys: expected shape", (XS[0], YS[0, :, 0], XQ[0])),
        (ValueError, "xq: expected shape", (XS[0], YS[0], XQ[0, 0])),
        (ValueError, "xq: expected shape", (XS[0], YS[0], np.array(3.0))),
        (ValueError, "xq: expected shape", (XS[0], YS[0], XQ[0, :, :1])),
        (ValueError, "out: expected shape", (XS[0], YS[0], XQ[0], np.zeros((3, 2)))),
        (TypeError, "out: expected float64", (XS[0], YS[0], XQ[0], np.zeros((4, 2), F4))),
        (TypeError, "out: expected a numpy array", (XS[0], YS[0], XQ[0], [0])),
        (ValueError, "out: .*contiguous", (XS[0], YS[0], XQ[0], np.zeros((4, 4))[:, ::2])),
        # many
        (TypeError, "xs: expected float64 as the weights", (XS.astype(F4), YS, XQ)),
        (TypeError, "ys: expected float64 values for mse", (XS, YS.astype(F4), XQ)),
        (TypeError, "xq: expected float64 as the weights", (XS, YS, XQ.astype(F4))),
        (TypeError, "xs: expected a numpy array, got Tensor", (torch.zeros(3, 5, 2), YS, XQ)),
        (TypeError, "xs: expected an array without a mask", (np.ma.masked_array(XS), YS, XQ)),
        (TypeError, "xs: expected a numpy array, got NoneType", (None, YS, XQ)),
        (TypeError, r"xs\[1\]: expected a numpy array, got list", ([XS[0], [1]], [YS[0]], XQ)),
        (ValueError, r"xs: expected shape .*, got \[5\]", (XS[0, :, 0], YS, XQ)),
        (ValueError, r"xs: expected 2 features.*\(shape \[3, 5, 1\]\)", (XS[..., :1], YS, XQ)),
        (ValueError, "xs: expected one axis of features", (np.zeros((3, 5, 1, 2)), YS, XQ)),
        (ValueError, r"ys: expected shape .*, got \[3, 5, 1\]", (XS, YS[..., :1], XQ)),
        (ValueError, "xq: expected 3 tasks, as xs has, got 2", (XS, YS, XQ[:2])),
        (ValueError, r"out: expected a contiguous.*\[3, 4, 2\]", (XS, YS, XQ, np.zeros((3, 4)))),
        (TypeError, "out: expected float64, got float32", (XS, YS, XQ, np.zeros((3, 4, 2), F4))),
        (ValueError, "out: expected None where", (XS, YS, list(XQ), np.zeros((3, 4, 2)))),
        (TypeError, "ys: expected a list of 3 arrays because xs is one", (list(XS), YS, XQ)),
        (TypeError, "ys: expected a numpy array, got list", (XS, list(YS), XQ)),
        (ValueError, "ys: expected 3 arrays as xs, got 2", (list(XS), list(YS[:2]), XQ)),
        (ValueError, r"ys\[1\]: expected 5 rows", ([*XS], [YS[0], YS[1, :4], YS[2]], XQ)),
        (ValueError, r"xs\[1\]: expected shape \[rows, 2\]", ([XS[0], XS[1, :, :1]], [], XQ)),
        (TypeError, r"xs\[1\]: expected float64 as", ([XS[0], XS[1].astype(F4)], [*YS[:2]], XQ)),
        (ValueError, "xs: expected one array for each task, got an empty list", ([], [], [])),
    ],
)  # fmt: skip
def test_wrong_inputs(error, message, arguments):
    adapter = make(mlp(2, 5, 2)).adapter()
    with pytest.raises(error, match=f"^{message}"):
        adapter.adapt_predict(*arguments)


def test_wrong_queries_for_models():
    models = make(mlp(2, 5, 2)).adapter().adapt(XS, YS)
    with pytest.raises(ValueError, match=r"^xq: expected 3 tasks, one for each model, got 2"):
        models(XQ[:2])
    with pytest.raises(TypeError, match=r"^xq: expected float64 as the weights are, got float32"):
        models(XQ.astype(F4))


def test_wrong_values_and_options():
    adapter = make(mlp(2, 5, 3), loss="cross_entropy").adapter()
    labels = np.zeros((3, 5), np.int64)
    labels[1, 2] = 3
    weights = np.ones((3, 5))
    weights[2, 1] = np.nan
    good = np.zeros((3, 5), np.int64)
    for error, message, arguments, options in (
        (ValueError, r"ys: task 1, row 2: label 3", (XS, labels), {}),
        (
            TypeError,
            r"ys: expected class indices .* float64",
            (XS, YS[..., 0]),
            {},
        ),
        (ValueError, r"weights: task 2, row 1: weight", (XS, good), {"weights": weights}),
        (ValueError, r"weights: expected shape \[3, 5", (XS, good), {"weights": weights[:, :4]}),
        (TypeError, r"weights: expected float64", (XS, good), {"weights": weights.astype(F4)}),
        (TypeError, r"steps: expected an integer", (XS, good), {"steps": 1.5}),
        (ValueError, r"steps: expected an integer >= 0", (XS, good), {"steps": -1}),
        (ValueError, r"task_ids: expected 3 integers, got shape", (XS, good), {"task_ids": [1]}),
        (TypeError, r"task_ids: expected 3 integers, got", (XS, good), {"task_ids": [0.5, 1, 2]}),
        (ValueError, r"task_ids: expected integers in", (XS, good), {"task_ids": [0, -1, 2]}),
    ):
        with pytest.raises(error, match=f"^{message}"):
            adapter.adapt(*arguments, **options)
    with pytest.raises(ValueError, match=r"^ys: task 0, row 2: label 3"):
        adapter.adapt_predict(XS[1], labels[1], XQ[1])
    with pytest.raises(TypeError, match=r"^ys: expected class indices"):
        adapter.adapt_predict(XS[1], YS[1, :, 0], XQ[1])
    with pytest.raises(ValueError, match=r"^weights: task 0, row 1: weight"):
        adapter.adapt_predict(XS[1], good[1], XQ[1], weights=weights[2])
    with pytest.raises(ValueError, match=r"^weights: expected shape"):
        adapter.adapt_predict(XS[1], good[1], XQ[1], weights=weights[1, :4])


def test_models_that_only_torch_runs_have_no_adapter():
    net = nn.Sequential(nn.ConvTranspose1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 2))
    maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="torch")
    with pytest.raises(ValueError, match=r"adapter: the native core .*layer 0 .ConvTranspose1d"):
        maml.adapter()
    chain = pymeta.MAML(mlp(2, 5, 2), loss="mse", lr=0.1, steps=1, backend="torch")
    assert chain.adapter().out_features == 2


# ---- Reptile, FineTune --------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 2, 5])
def test_reptiles_adapter(batch_size):
    xs, ys, xq, _ = batch()
    reptile = pymeta.Reptile(
        mlp(2, 5, 2),
        loss="mse",
        optimizer=pymeta.Adam(0.02, betas=(0.0, 0.999)),
        steps=7,
        batch_size=batch_size,
        seed=3,
        backend="native",
    )
    adapter = reptile.adapter()
    agree(reptile, adapter, reptile.adapt(xs, ys), xs, ys, xq)
    reptile(xs, ys).loss.backward()  # a training call, which has a stream of its own
    agree(reptile, adapter, reptile.adapt(xs, ys), xs, ys, xq)
    agree(reptile, adapter, reptile.adapt(xs, ys, steps=4), xs, ys, xq, steps=4)
    ids = [5, 0, 2**40]
    agree(reptile, adapter, reptile.adapt(xs, ys, task_ids=ids), xs, ys, xq, task_ids=ids)


FINE = {
    "optimizer": pymeta.Adam(0.05),
    "epochs": 3,
    "batch_size": 2,
    "seed": 1,
    "backend": "native",
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": None},
        {"anchor": 0.5, "freeze": ["0.*"]},
        {"optimizer": pymeta.SGD(0.1, momentum=0.9, clip_norm=0.1), "epochs": 2},
        {"class_weights": "balanced"},
        {"class_weights": [0.5, 2.0, 1.0]},
    ],
)
def test_fine_tunings_adapter(options):
    xs, ys, xq, _ = batch("cross_entropy", tasks=4, out=3)
    finetune = pymeta.FineTune(mlp(2, 5, 3), loss="cross_entropy", **{**FINE, **options})
    adapter = finetune.adapter()
    agree(finetune, adapter, finetune(xs, ys), xs, ys, xq)
    ids = [5, 0, 2**40, 1]
    agree(finetune, adapter, finetune(xs, ys, task_ids=ids), xs, ys, xq, task_ids=ids)
    weights = torch.rand(4, 5).double()
    wanted = finetune(xs, ys, weights=weights)
    agree(finetune, adapter, wanted, xs, ys, xq, weights=weights.numpy())
    sizes = (5, 0, 3, 1)
    cut, cut_y = ([v[:n] for v, n in zip(all_, sizes, strict=True)] for all_ in (xs, ys))
    got = adapter.adapt(arrays(*cut), arrays(*cut_y))
    for name, value in finetune(cut, cut_y).parameters.items():
        assert np.array_equal(got.parameters[name], value.numpy())
    with pytest.raises(ValueError, match="steps: expected None, because the recipe counts epochs"):
        adapter.adapt(*arrays(xs, ys), steps=3)


@pytest.mark.parametrize("weights", ["balanced", (0.25, 4.0)])
def test_class_weights_of_one_logit(weights):
    xs, ys, xq, _ = batch("bce_with_logits", tasks=4, out=1)
    finetune = pymeta.FineTune(
        mlp(2, 5, 1), loss="bce_with_logits", **{**FINE, "class_weights": weights}
    )
    adapter = finetune.adapter()
    agree(finetune, adapter, finetune(xs, ys), xs, ys, xq)
    ys[2, 3] = 0.5
    with pytest.raises(ValueError, match=r"ys: task 2, row 3: expected 0 or 1 .* got 0\.5"):
        adapter.adapt(*arrays(xs, ys))


def test_recipes_that_an_adapter_lacks():
    finetune = pymeta.FineTune(mlp(2, 5, 2), loss="mse", lr=0.1, epochs=2, validation=0.2)
    with pytest.raises(ValueError, match="adapter: expected validation=0"):
        finetune.adapter()


def test_minibatches_that_cannot_be_normalised():
    finetune = pymeta.FineTune(NETS["norms"](), loss="mse", lr=0.1, epochs=2, batch_size=4)
    adapter = finetune.adapter()
    for arguments in ((XS, YS), (XS[0], YS[0], XQ[0]), (list(XS), list(YS), XQ)):
        with pytest.raises(
            ValueError, match="batch_size: 4 leaves a minibatch of one row of the 5"
        ):
            (adapter.adapt if len(arguments) == 2 else adapter.adapt_predict)(*arguments)
    assert adapter.adapt_predict(XS[0, :4], YS[0, :4], XQ[0]).shape == (4, 2)


# ---- copies -------------------------------------------------------------------------------------


def test_it_is_a_copy_of_the_learner():
    xs, ys, xq = arrays(*batch()[:3])
    maml = make(mlp(2, 5, 2), lr=pymeta.LearnableLR(0.1, "parameter"))
    adapter = maml.adapter()
    before = adapter.adapt_predict(xs, ys, xq)
    one = adapter.adapt_predict(xs[0], ys[0], xq[0])
    with torch.no_grad():
        for p in maml.parameters():
            p.zero_()
    assert np.array_equal(adapter.adapt_predict(xs, ys, xq), before)
    assert np.array_equal(adapter.adapt_predict(xs[0], ys[0], xq[0]), one)
    assert not np.array_equal(maml.adapter().adapt_predict(xs, ys, xq), before)
    with pytest.raises(ValueError, match="read-only"):
        adapter.parameters["0.weight"][:] = 0


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_and_pickles(copier):
    xs, ys, xq = arrays(*batch()[:3])
    adapter = make(Odd().double(), lr=pymeta.LearnableLR(0.1, "layer", per_step=True)).adapter()
    twin = copier(adapter)
    assert repr(twin) == repr(adapter)
    assert np.array_equal(twin.adapt_predict(xs, ys, xq), adapter.adapt_predict(xs, ys, xq))
    assert np.array_equal(
        twin.adapt_predict(xs[0], ys[0], xq[0]), twin.adapt_predict(xs, ys, xq)[0]
    )
    models = adapter.adapt(xs, ys)
    again = copier(models)
    assert np.array_equal(again(xq), models(xq))
    again.parameters["first.weight"][:] = 0
    assert not np.array_equal(again(xq), models(xq))


def test_what_it_says_of_itself(tmp_path):
    adapter = make(mlp(2, 5, 2), optimizer=pymeta.Adam(0.5)).adapter()
    adapter.save(tmp_path / "a")
    for each in (adapter, pymeta.Adapter.load(tmp_path / "a")):
        assert (each.in_features, each.out_features) == (2, 2)
        assert each.dtype == np.float64 and each.loss.kind == "mse"
        assert each.optimizer == pymeta.Adam(0.5) and each.lr.tolist() == [0.5]
        assert each.schedule == pymeta.Schedule(steps=3)
        assert re.match(
            r"Adapter\(linear 2 5, tanh, linear 5 2; 27 parameters, .*; mse, Adam\(.*, 3 steps\)",
            repr(each),
        )
    assert repr(adapter.adapt(XS, YS)) == (
        "AdaptedArrays(3 x linear 2 5, tanh, linear 5 2; 27 parameters each; mse)"
    )
