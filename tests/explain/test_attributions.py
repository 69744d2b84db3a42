"""pymeta.explain's attributions, against autograd on single models, captum, and closed forms."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from explain_help import SIZES, adapted, by_autograd, ragged, tensors
from helpers import assert_close
from kernels import PATHS, using
from torch import nn

import pymeta
from pymeta.explain import (
    Attributions,
    default_outputs,
    input_gradients,
    integrated_gradients,
    support_means,
)
from pymeta.nn import TabularInput
from pymeta.spec.losses import describe_loss

LOSSES = [("mse", 2), ("cross_entropy", 3), ("bce_with_logits", 1)]


def arrays_of(maml, xs, ys):
    return maml.adapter().adapt(xs.numpy(), ys.numpy())


# ---- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(("loss", "out"), LOSSES)
def test_gradients_are_those_of_single_models(loss, out, backend):
    _, models, _, _, xq = adapted(loss, out, backend=backend)
    for rows in (xq, ragged(xq)):
        found = input_gradients(models, rows)
        wanted = by_autograd(models, rows, found.outputs)
        assert_close(tensors(found.values), wanted)
        predicted = [m[torch.arange(len(m)), c] for m, c in zip(
            tensors(models(rows)), tensors(found.outputs), strict=True
        )]  # fmt: skip
        assert_close(tensors(found.predictions), predicted)
        assert isinstance(found.values, np.ndarray) == isinstance(rows, torch.Tensor)


@pytest.mark.parametrize("executor", [e for _, e in PATHS if e])
def test_gradients_on_every_executor(executor):
    _, models, _, _, xq = adapted("cross_entropy", 3)
    models = pymeta.Adapted.from_stacked(models._model, models.parameters, loss="cross_entropy")
    with using(executor=executor):
        for rows in (xq, ragged(xq)):
            found = input_gradients(models, rows)
            assert_close(tensors(found.values), by_autograd(models, rows, found.outputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrays_have_the_bits_of_tensors(dtype):
    maml, models, xs, ys, xq = adapted(dtype=dtype)
    arrays = arrays_of(maml, xs, ys)
    for rows in (xq, ragged(xq)):
        plain = rows.numpy() if isinstance(rows, torch.Tensor) else [r.numpy() for r in rows]
        a, b = integrated_gradients(models, rows), integrated_gradients(arrays, plain)
        assert all(np.array_equal(x, y) for x, y in zip(a.values, b.values, strict=True))
        flows = torch.ones_like(models(xq))
        both = (
            models.input_gradients(xq, flows),
            arrays.input_gradients(xq.numpy(), flows.numpy()),
        )
        assert np.array_equal(both[0].numpy(), both[1])


def test_a_models_attributions_are_its_own():
    _, models, _, _, xq = adapted()
    population = torch.randn(7, 5).double()
    together = integrated_gradients(models, xq, population=population).values
    for t in range(4):
        alone = integrated_gradients(models[t : t + 1], xq[t : t + 1], population=population)
        assert np.array_equal(alone.values[0], together[t])


def test_images_and_flattened_rows_keep_their_shape():
    for net in (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 2)),
        nn.Sequential(nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 2)),
    ):
        maml = pymeta.MAML(net.double(), loss="mse", lr=0.1, steps=1, backend="native")
        xs, ys = torch.randn(2, 4, 3, 2, 2).double(), torch.randn(2, 4, 2).double()
        xq = torch.randn(2, 3, 3, 2, 2).double()
        models = maml.adapt(xs, ys)
        found = input_gradients(models, xq)
        assert found.values.shape == (2, 3, 3, 2, 2)
        assert_close(tensors(found.values), by_autograd(models, xq, found.outputs))
        lists = models.input_gradients(list(xq), list(torch.ones(2, 3, 2).double()))
        whole = models.input_gradients(xq, torch.ones(2, 3, 2).double())
        assert [tuple(g.shape) for g in lists] == [(3, 3, 2, 2)] * 2
        assert torch.equal(torch.stack(lists), whole)
        arrays = arrays_of(maml, xs, ys).input_gradients(xq.numpy(), np.ones((2, 3, 2)))
        assert np.array_equal(arrays, whole.numpy())


def test_a_module_that_is_no_chain_is_differentiated_in_torch():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x):
            return torch.logaddexp(self.a(x), self.b(x))

    with pytest.warns(UserWarning, match="runs in torch"):
        maml = pymeta.MAML(Joined().double(), loss="mse", lr=0.1, steps=1)
        models = maml.adapt(torch.randn(4, 5, 5).double(), torch.randn(4, 5, 2).double())
    xq = torch.randn(4, 6, 5).double()
    for rows in (xq, ragged(xq)):
        found = input_gradients(models, rows, output=1)
        assert_close(tensors(found.values), by_autograd(models, rows, found.outputs))


# ---- integrated gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("rows", [lambda x: x, ragged])
def test_attributions_are_complete(rows):
    """They add up to prediction - baseline: for a smooth network up to the last bits."""
    _, models, xs, _, xq = adapted()
    population = torch.randn(5, 5).double()
    for given in ({}, {"baseline": population[0]}, {"baseline": support_means(xs)},
                  {"population": population}):  # fmt: skip
        found = integrated_gradients(models, rows(xq), steps=24, **given)
        for values, gap, f, b in zip(found.values, found.gap, found.predictions, found.baselines,
                                     strict=True):  # fmt: skip
            assert np.abs(gap).max() < 1e-10
            assert np.abs(f - b - values.sum(1)).max() < 1e-10
            assert np.abs(f - b).max() > 1e-3


def test_a_linear_models_attributions_are_weights_times_distances():
    net = nn.Linear(5, 1).double()
    maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend="native")
    models = maml.adapt(torch.randn(4, 6, 5).double(), torch.randn(4, 6, 1).double())
    xq, base = torch.randn(4, 3, 5).double(), torch.randn(5).double()
    weight = models.parameters["weight"]  # [4, 1, 5]
    found = integrated_gradients(models, xq, baseline=base, steps=1)
    assert_close(torch.from_numpy(found.values), weight * (xq - base))
    others = torch.randn(7, 5).double()
    found = integrated_gradients(models, xq, population=others, steps=1)
    assert_close(torch.from_numpy(found.values), weight * (xq - others.mean(0)))
    assert_close(torch.from_numpy(input_gradients(models, xq).values), weight.expand(4, 3, 5))


def test_a_population_is_the_mean_over_its_baselines():
    _, models, _, _, xq = adapted(act=nn.ReLU)
    population = torch.randn(3, 5).double()
    each = [integrated_gradients(models, xq, baseline=b, steps=8) for b in population]
    together = integrated_gradients(models, xq, population=population, steps=8)
    mean = np.mean([e.values for e in each], 0)
    assert_close(torch.from_numpy(together.values), torch.from_numpy(mean))
    mean = np.mean([e.baselines for e in each], 0)
    assert_close(torch.from_numpy(together.baselines), torch.from_numpy(mean))


def test_many_points_in_several_calls_are_as_in_one(monkeypatch):
    _, models, _, _, xq = adapted()
    population = torch.randn(4, 5).double()
    whole = integrated_gradients(models, xq, population=population, steps=6)
    import pymeta.explain.attributions as module

    for numbers in (1, 700):  # a point at a time, and chunks that do not divide
        monkeypatch.setattr(module, "_NUMBERS", numbers)
        parts = integrated_gradients(models, xq, population=population, steps=6)
        assert np.array_equal(parts.values, whole.values)
        assert np.array_equal(parts.baselines, whole.baselines)


def test_captum_agrees():
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    _, models, _, _, xq = adapted("cross_entropy", 3)
    base = torch.randn(1, 5).double()
    ours = integrated_gradients(models, xq, baseline=base[0], steps=16)
    plain = input_gradients(models, xq)
    for t in range(4):
        target = torch.from_numpy(ours.outputs[t])
        rule = {"n_steps": 16, "method": "gausslegendre"}
        theirs = captum.IntegratedGradients(models[t]).attribute(xq[t], base, target=target, **rule)
        # it rounds the weights of points to float32
        error = (torch.from_numpy(ours.values[t]) - theirs).abs().max()
        assert error <= torch.finfo(torch.float32).eps * theirs.abs().max()
        theirs = captum.Saliency(models[t]).attribute(xq[t], target=target, abs=False)
        assert_close(torch.from_numpy(plain.values[t]), theirs)


# ---- which output -----------------------------------------------------------------------------


def test_the_output_is_the_one_asked_for():
    _, models, _, _, xq = adapted("cross_entropy", 3)
    largest = models(xq).argmax(-1).numpy()
    assert np.array_equal(input_gradients(models, xq).outputs, largest)
    mixed = np.arange(24).reshape(4, 6) % 3
    found = input_gradients(models, xq, output=mixed)
    assert np.array_equal(found.outputs, mixed)
    assert_close(tensors(found.values), by_autograd(models, xq, mixed))
    few = [m[:n] for m, n in zip(mixed, SIZES, strict=True)]
    found = input_gradients(models, ragged(xq), output=few)
    assert all(np.array_equal(o, f) for o, f in zip(found.outputs, few, strict=True))


def test_quantiles_are_explained_by_their_median():
    outputs = np.array([[5.0, 1.0, 3.0]])
    loss = describe_loss(pymeta.QuantileLoss((0.1, 0.5, 0.9)))
    assert default_outputs(loss, outputs).tolist() == [1]


# ---- inputs -----------------------------------------------------------------------------------


def test_no_tasks_and_no_rows():
    _, models, _, _, xq = adapted()
    found = integrated_gradients(models[:0], xq[:0])
    assert found.values.shape == (0, 6, 5) and found.predictions.shape == (0, 6)
    found = integrated_gradients(models, [x[: n % 3] for x, n in zip(xq, SIZES, strict=True)])
    assert [v.shape for v in found.values] == [(0, 5), (1, 5), (0, 5), (1, 5)]
    assert np.array_equal(support_means([np.zeros((0, 2)), np.ones((3, 2))]), [[0, 0], [1, 1]])


def test_wrong_arguments_are_refused_by_name():
    _, models, _, _, xq = adapted()
    refused = [
        (TypeError, "models: expected", lambda: input_gradients(nn.Linear(5, 1), xq)),
        (ValueError, "xq: expected 4 tasks", lambda: input_gradients(models, xq[:2])),
        (TypeError, "xq: expected torch.float64", lambda: input_gradients(models, xq.float())),
        (ValueError, "xq: expected shape", lambda: input_gradients(models, xq[0])),
        (ValueError, r"xq\[1\]", lambda: input_gradients(models, [xq[0], xq[1][:, :2]])),
        (ValueError, "output: expected numbers", lambda: input_gradients(models, xq, output=2)),
        (ValueError, "output: expected one", lambda: input_gradients(models, xq, output=[0, 1, 0])),
        (TypeError, "output: expected", lambda: input_gradients(models, xq, output=0.5)),
        (ValueError, "steps", lambda: integrated_gradients(models, xq, steps=0)),
        (TypeError, "steps", lambda: integrated_gradients(models, xq, steps=1.5)),
        (ValueError, "baseline", lambda: integrated_gradients(models, xq, baseline=xq[0, 0, :2])),
        (ValueError, "population", lambda: integrated_gradients(models, xq, population=xq[0, :0])),
        (
            ValueError,
            r"population: expected \[rows, 5\]",
            lambda: integrated_gradients(models, xq, population=xq),
        ),
        (
            ValueError,
            "population: expected None",
            lambda: integrated_gradients(models, xq, baseline=xq[0, 0], population=xq[0]),
        ),
        (ValueError, "gap", lambda: input_gradients(models, xq).gap),
        (ValueError, "cotangents: expected", lambda: models.input_gradients(xq, xq)),
        (TypeError, "cotangents: expected", lambda: models.input_gradients(xq, None)),
    ]
    for kind, message, call in refused:
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize("kind", ["torch", "arrays"])
def test_batch_normalisation_is_refused(kind):
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=1, backend="native")
    xs, ys = torch.randn(2, 4, 5).double(), torch.randn(2, 4, 1).double()
    models = maml.adapt(xs, ys) if kind == "torch" else arrays_of(maml, xs, ys)
    assert models.mixes_rows
    rows = xs if kind == "torch" else xs.numpy()
    with pytest.raises(ValueError, match="batch normalisation"):
        input_gradients(models, rows)


def test_a_batch_norm_of_images_is_refused_and_one_in_eval_mode_is_not():
    norm = nn.BatchNorm2d(2)
    net = nn.Sequential(nn.Conv2d(3, 2, 2), norm, nn.ReLU(), nn.Flatten(), nn.Linear(2, 1)).double()
    x, y = torch.randn(2, 4, 3, 2, 2).double(), torch.randn(2, 4, 1).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    for mixes in (True, False):
        net.train(mixes)
        maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=1)
        with torch.no_grad():
            models, arrays = maml.adapt(x, y), arrays_of(maml, x, y)
        assert models.mixes_rows == arrays.mixes_rows == mixes
        if mixes:
            with pytest.raises(ValueError, match="batch normalisation"):
                input_gradients(arrays, x.numpy())
            continue
        found = input_gradients(models, x)
        assert_close(tensors(found.values), by_autograd(models, x, found.outputs))


def test_categories_have_no_plain_gradient():
    _, models, x = tabular()
    with pytest.raises(ValueError, match="categories have no gradient"):
        input_gradients(models, x)


def tabular(adapt=None):
    """A network that embeds two columns of categories: (arrays, models, x)."""
    torch.manual_seed(3)
    table = TabularInput(numeric=2, cardinalities=[4, 3], dims=[3, 1])
    net = nn.Sequential(table, nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    maml = pymeta.MAML(net, loss="mse", lr=0.3, steps=2, adapt=adapt)
    codes = [torch.randint(0, n, (3, 5, 1)) for n in (4, 3)]
    x = torch.cat([torch.randn(3, 5, 2), *codes], -1).double()
    y = torch.randn(3, 5, 2).double()
    return arrays_of(maml, x, y), maml.adapt(x, y), x


def path(model, wide, start):
    """Attributions [wide] behind the first layer, by autograd at many points of one path."""
    rest = model[1:]
    points = (torch.arange(2000, dtype=torch.float64) + 0.5)[:, None] / 2000
    at = (start + points * (wide - start)).requires_grad_()
    (grad,) = torch.autograd.grad(rest(at)[:, 0].sum(), at)
    return (grad.mean(0) * (wide - start)).detach()


@pytest.mark.parametrize("adapt", [None, ["1.weight", "1.bias"]])
@pytest.mark.parametrize("start", ["none", "row", "population"])
def test_categories_are_explained_by_their_embeddings(adapt, start):
    arrays, models, x = tabular(adapt)
    rows = torch.tensor([[0.5, -1.0, 2.0, 1.0], [0.0, 0.3, 1.0, 0.0]]).double()
    given = {
        "none": {},
        "row": {"baseline": rows[0]},
        "population": {"population": rows},
    }[start]
    found = integrated_gradients(models, x, output=0, steps=24, **given)
    assert found.values.shape == x.shape
    wanted = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(3):
        model = models[t]
        first, tables = model[0], list(model[0].tables)
        if start == "none":
            means = torch.cat([torch.zeros(2, dtype=torch.float64), *(p.mean(0) for p in tables)])
            starts = [means.detach()]
        else:
            starts = list(first(rows[: 1 if start == "row" else 2]).detach())
        for r in range(5):
            wide = first(x[t, r : r + 1])[0].detach()
            each = torch.stack([path(model, wide, s) for s in starts]).mean(0)
            wanted[t, r] = torch.stack([each[0], each[1], each[2:5].sum(), each[5]])
    # the midpoint rule's error on 2,000 points of a smooth path, and that of the quadrature
    np.testing.assert_allclose(found.values, wanted.numpy(), rtol=0, atol=2e-6)
    assert float(np.abs(found.gap).max()) < 1e-9
    again = integrated_gradients(arrays, x.numpy(), output=0, steps=24, **given)
    assert np.array_equal(again.values, found.values)


def test_categories_out_of_range_and_in_modules_of_your_own_are_refused():
    _, models, x = tabular()
    with pytest.raises(ValueError, match=r"^baseline: column 3: expected a category, .* 0 to 2"):
        integrated_gradients(models, x, baseline=torch.tensor([0.0, 0.0, 1.0, 3.0]))
    bad = x.clone()
    bad[1, 2, 2] = 0.5
    with pytest.raises(ValueError, match=r"^xq: column 2: expected a category, .* got 0.5"):
        integrated_gradients(models, bad)
    with pytest.raises(ValueError, match=r"^xq: expected 3 tasks of rows \[rows, 4\]"):
        integrated_gradients(models, x[:, :, :3])

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Embedding(4, 3), nn.Linear(3, 1)

        def forward(self, x):
            return self.last(self.table(x[:, 0].long()))

    maml = pymeta.MAML(Own(), loss="mse", lr=0.1, steps=1, backend="torch")
    rows = torch.randint(0, 4, (2, 4, 1)).float()
    with pytest.raises(ValueError, match=r"no chain of known layers"):
        integrated_gradients(maml.adapt(rows, torch.randn(2, 4, 1)), rows)


def test_torch_is_not_imported():
    code = (
        "import sys, pymeta.explain as e, numpy as np\n"
        "from pymeta.models.arrays import AdaptedArrays\n"
        "print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert Attributions._fields == ("values", "outputs", "predictions", "baselines")
