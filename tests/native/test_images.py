"""Convolutions, poolings and what belongs to them: natively, as torch computes them.

The reference itself is held to eager autograd here, task by task; the kernels are held to the
reference on networks drawn at random (images.py), as those of features are in test_kernels.py.
"""

import collections
import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import IMAGES, cases, compare
from hypothesis import given, settings
from hypothesis import strategies as st
from images import episodes, image_chains
from kernels import DTYPES, EXECUTORS, ISAS, PATHS, PROFILE, same_bits, using
from native_help import (
    POISONS,
    check_bits,
    check_isolation,
    check_slope_of_each_parameter,
)
from torch import nn
from torch.nn import functional as F

import pymeta
from pymeta import native
from pymeta.spec.architecture import Architecture, read_architecture
from pymeta.spec.network import Description, Unshaped, describe

IMAGE_CASES = cases(tasks=(1, 2, 3, 17), chain=image_chains()).map(
    # pixels that are alike, where a pooling is the first to see them
    lambda case: replace(case, ties=case.chain[1][0].endswith("max_pool"))
)


def small(case):
    """A case with few steps and rows, which the reference would take its time for."""
    return replace(
        case, steps=min(case.steps, 2), support=min(case.support, 4), query=min(case.query, 4),
        tasks=min(case.tasks, 3) if case.form != "uniform" else case.tasks,
    )  # fmt: skip


def test_random_images_against_the_reference():
    counts = collections.Counter()

    @settings(PROFILE, max_examples=40)
    @given(IMAGE_CASES)
    def check(case):
        counts.update(compare(small(case)))

    check()
    assert counts[torch.float64] >= 40
    assert counts[torch.float32] >= 25  # the cases that a kink rules out are the exception


@pytest.mark.parametrize("name", IMAGES)
def test_fixed_images_against_the_reference(name):
    compare(IMAGES[name])


@settings(PROFILE, max_examples=20)
@given(IMAGE_CASES, st.sampled_from(DTYPES), ISAS)
def test_the_bits_of_an_images_task_are_its_own(case, dtype, isa):
    check_bits(small(case), dtype, isa)


@settings(PROFILE, max_examples=20)
@given(IMAGE_CASES, st.sampled_from(sorted(POISONS)), st.sampled_from(["xs", "ys", "xq"]),
       st.sampled_from(DTYPES), ISAS)  # fmt: skip
def test_a_diverged_images_task_is_its_own_affair(case, poison, where, dtype, isa):
    check_isolation(small(case), poison, where, dtype, isa, threads=(1,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", native.isas())
def test_the_bits_of_transformed_convolutions_are_a_tasks_own(isa, dtype):
    """Of tasks of 0 to 6 images, some of them in one vector: blocks of tiles are theirs."""
    case = replace(IMAGES["3x3 without padding and with more"], support=6)
    check_bits(case, dtype, isa)


@pytest.mark.parametrize("isa, executor", PATHS)
def test_a_nan_reaches_the_outputs_that_see_its_pixel(isa, executor):
    """And no other: each output's sum has the inputs under its own taps only."""
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Flatten())
    xs = torch.randn(1, 8, 16, 9, 9)
    ys = torch.zeros(1, 8, 16 * 81)
    for row in range(1, 8):
        xs[0, row, 3, row, 8 - row] = math.nan  # at each place of a tile
    maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=0, backend="native")
    with using(isa, executor):
        got = maml(xs, ys, xs, ys).predictions
    torch.testing.assert_close(got, net(xs[0])[None], equal_nan=True)
    assert got.isnan().sum() == 7 * 16 * 9


@pytest.mark.parametrize("executor", EXECUTORS)
def test_adapted_convolutions_are_the_calls_own(executor):
    """A gradient of many blocks of positions: whether it is stored or not, in bits."""
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Conv2d(5, 4, 3), nn.Flatten(),
                        nn.Linear(4 * 81, 3))  # fmt: skip
    xs, ys, xq, yq = episodes((2, 13, 13), support=5, dtype=torch.float32)
    lr = pymeta.LearnableLR(0.1)
    maml = pymeta.MAML(net, loss="cross_entropy", lr=lr, steps=3, backend="native")
    with using(executor=executor):
        assert same_bits(maml.adapt(xs, ys)(xq), maml(xs, ys, xq, yq).predictions)


# ---- the reference, held to eager autograd -----------------------------------------------------


def eager(net, xs, ys, xq, yq, lr, steps):
    """MAML's loss written out over torch's own modules, one task after another."""
    losses = []
    for x, y, q, t in zip(xs, ys, xq, yq, strict=True):
        theta = dict(net.named_parameters())
        for _ in range(steps):
            loss = F.cross_entropy(torch.func.functional_call(net, theta, (x,)), y)
            found = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {n: p - lr * g for (n, p), g in zip(theta.items(), found, strict=True)}
        losses.append(F.cross_entropy(torch.func.functional_call(net, theta, (q,)), t))
    return torch.stack(losses)


def block(inputs, outputs):
    norm = nn.BatchNorm2d(outputs, track_running_stats=False)
    return nn.Conv2d(inputs, outputs, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)


NETS = {
    "conv4": ((2, 9, 11), lambda: (*block(2, 4), *block(4, 3), nn.Flatten(), nn.Linear(12, 3))),
    "overlapping": (
        (3, 8, 7),
        lambda: (
            nn.Conv2d(3, 6, (2, 3), stride=(1, 2), padding=(0, 1), groups=3), nn.Tanh(),
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(6, 4, 2, dilation=(2, 1), bias=False), nn.SiLU(),
            nn.AvgPool2d((2, 1), 1, (1, 0), count_include_pad=False), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(4, 3),
        ),
    ),
    "sequences": (
        (2, 15),
        lambda: (
            nn.Conv1d(2, 5, 3, padding="same"), nn.BatchNorm1d(5, track_running_stats=False),
            nn.ReLU(), nn.MaxPool1d(3, 2, 1), nn.Conv1d(5, 6, 2, stride=2), nn.AvgPool1d(2),
            nn.Flatten(), nn.Linear(12, 3),
        ),
    ),
    "layer norms": (
        (2, 5, 6),
        lambda: (
            nn.LayerNorm((2, 5, 6)), nn.ZeroPad2d((1, 0, 2, 0)), nn.Conv2d(2, 4, 2), nn.SiLU(),
            nn.LayerNorm((4, 6, 6), bias=False), nn.AdaptiveAvgPool2d((3, 2)), nn.Conv2d(4, 3, 2),
            nn.LayerNorm((3, 2, 1), elementwise_affine=False), nn.Flatten(), nn.Linear(6, 3),
        ),
    ),
    "causal": (
        (2, 9),
        lambda: (
            nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(2, 5, 3), nn.LayerNorm((5, 9)), nn.ReLU(),
            nn.AdaptiveMaxPool1d(3), nn.Flatten(), nn.Linear(15, 3),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_eager_autograd_agrees(name, backend):
    """Loss and gradients, second order, of both backends."""
    shape, layers = NETS[name]
    torch.manual_seed(3)
    net = nn.Sequential(*layers()).double()
    xs, ys, xq, yq = episodes(shape)
    xs.requires_grad_()
    losses = eager(net, xs, ys, xq, yq, 0.3, 2)
    wanted = torch.autograd.grad(losses.mean(), [*net.parameters(), xs])
    maml = pymeta.MAML(net, loss="cross_entropy", lr=0.3, steps=2, backend=backend)
    out = maml(xs, ys, xq, yq)
    got = torch.autograd.grad(out.loss, [*net.parameters(), xs])
    torch.testing.assert_close(out.task_losses, losses.detach(), rtol=1e-12, atol=1e-14)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


SMOOTH = {
    "batch norm": lambda: (
        nn.Conv2d(2, 3, 2, stride=2, padding=1), nn.BatchNorm2d(3, track_running_stats=False),
        nn.Softplus(), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(4, 3),
    ),
    "layer norm": lambda: (
        nn.Conv2d(2, 3, 2), nn.LayerNorm((3, 4, 4)), nn.Tanh(), nn.ZeroPad2d((0, 1, 0, 0)),
        nn.Conv2d(3, 2, (4, 2)), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(4, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("isa, executor", PATHS)
def test_finite_differences_of_an_images_loss(isa, executor, name):
    """No formula of ours or torch's: the loss itself, a little to both sides."""
    net = nn.Sequential(*SMOOTH[name]()).double()
    data = episodes((2, 5, 5))
    maml = pymeta.MAML(net, loss="cross_entropy", lr=0.2, steps=2, backend="native")
    with using(isa, executor):
        check_slope_of_each_parameter(maml, data, rel=1e-6, abs=1e-9)


# ---- as torch has it ---------------------------------------------------------------------------


@pytest.mark.parametrize("isa, executor", PATHS)
def test_ties_and_nans_go_where_torch_lets_them(isa, executor):
    """The first of equals is the maximum; a NaN is, whatever else there is."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.MaxPool2d(2, 1, 1), nn.Flatten(), nn.Linear(2 * 36, 2)
    )
    x = torch.tensor([0.0, 1.0])[torch.randint(0, 2, (3, 4, 1, 5, 5))]
    x[0, 0, 0, 2, 3] = math.nan
    x[1, 1, 0, 0, 0] = math.inf
    y = torch.randn(3, 4, 2)
    found = {}
    for backend in ("torch", "native"):
        own = copy.deepcopy(net)
        xq = x.clone().requires_grad_()
        maml = pymeta.MAML(own, loss="mse", lr=0.01, steps=1, backend=backend)
        with using(isa, executor):
            out = maml(x[:1].expand(3, -1, -1, -1, -1).nan_to_num(), y, xq, y)
        (gradient,) = torch.autograd.grad(out.loss, xq)
        found[backend] = out.predictions, out.task_losses, gradient[2]
    for got, wanted in zip(found["native"], found["torch"], strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert found["native"][0][0].isnan().any() and not found["native"][0][2].isnan().any()


def test_one_image_suffices_for_batch_norm():
    """Its positions are many; of one position there must be two rows."""
    net = nn.Sequential(*block(1, 3), nn.Flatten(), nn.Linear(12, 3)).double()
    xs, ys, xq, yq = episodes((1, 4, 4), support=1, query=1)
    found = [
        pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=1, backend=b)(
            xs, ys, xq, yq
        ).task_losses
        for b in ("torch", "native")
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    point = nn.Sequential(nn.Conv2d(1, 3, 4), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 3))
    for backend in ("torch", "native"):
        maml = pymeta.MAML(point.double(), loss="cross_entropy", lr=0.1, steps=1, backend=backend)
        with pytest.raises(ValueError, match=r"one row|one value per channel"):
            maml(xs, ys, xq, yq)


SHAPES = [(2, 3), (5, 40), (16, 16), (3, 17), (17, 3, 5), (33, 5), (1, 4, 5), (20, 1, 1)]


@pytest.mark.parametrize("isa, executor", PATHS)
def test_rows_come_out_of_positions_as_they_were(isa, executor):
    """Numbers that are moved alone: to positions and back, whole vectors of them or not."""
    for shape in SHAPES:
        features = math.prod(shape)
        moved = nn.ZeroPad1d(0) if len(shape) == 2 else nn.ZeroPad2d(0)
        net = nn.Sequential(moved, nn.Flatten(), nn.Linear(features, features))
        nn.init.eye_(net[2].weight)
        nn.init.zeros_(net[2].bias)
        x = torch.randn(3, 3, *shape, requires_grad=True)
        y = torch.zeros(3, 3, features)
        maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=0, backend="native")
        with using(isa, executor):
            out = maml(x[:, :2].detach(), y[:, :2], x, y)
            (gradient,) = torch.autograd.grad(out.loss, x)
        assert torch.equal(out.predictions, x.detach().flatten(2)), shape
        torch.testing.assert_close(gradient, 2 * x.detach() / y.numel(), msg=str(shape))


# ---- learners ----------------------------------------------------------------------------------


def conv_net(dtype=torch.float32, channels=1):
    torch.manual_seed(5)
    return nn.Sequential(*block(channels, 8), nn.Flatten(), nn.Linear(8 * 4, 3)).to(dtype)


def test_the_shape_of_rows_is_known_with_the_first_call():
    net = conv_net()
    assert isinstance(describe(net), Unshaped)
    assert isinstance(describe(net, (1, 5, 4)), Description)
    maml = pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=1, backend="native")
    assert "first call" in maml.explain()
    with pytest.raises(ValueError, match="first call"):
        maml.adapter()
    xs, ys, xq, yq = episodes((1, 5, 4), dtype=torch.float32)
    out = maml(xs, ys, xq, yq)
    assert out.predictions.shape == (2, 3, 3)
    assert "image conv2d batch_norm relu max_pool2d flatten linear" in maml.explain()
    wider = maml(*episodes((1, 4, 5), dtype=torch.float32))  # the same number of features
    assert torch.isfinite(wider.loss)
    assert torch.equal(maml(xs, ys, xq, yq).predictions, out.predictions)
    with pytest.raises(ValueError, match=r"xq: expected rows of shape .*, got \[1, 4, 4\]"):
        maml(xs, ys, xq[..., :4, :], yq)
    with pytest.raises(ValueError, match=r"^xs: .*rows of shape \[1, height, width\]"):
        maml(xs.flatten(2), ys, xq.flatten(2), yq)
    assert torch.equal(maml(xs, ys, xq, yq).predictions, out.predictions)  # and goes on


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_learner_runs_images_natively(dtype):
    """Reptile, FineTune and adapt: lists too, minibatches, and the fallback's results."""
    xs, ys, xq, _ = episodes((1, 5, 4), tasks=3, support=6, dtype=dtype)
    lists = [x[: 6 - t] for t, x in enumerate(xs)], [y[: 6 - t] for t, y in enumerate(ys)]
    found = {}
    for backend in ("torch", "native"):
        net = conv_net(dtype)
        maml = pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=2, backend=backend)
        adapted = maml.adapt(*lists)
        reptile = pymeta.Reptile(
            net, loss="cross_entropy", optimizer=pymeta.Adam(0.01, eps=0.1), steps=3, batch_size=3,
            backend=backend,
        )  # fmt: skip
        reptile(xs, ys).loss.backward()
        tune = pymeta.FineTune(
            net, loss="cross_entropy", lr=0.05, epochs=2, batch_size=4, backend=backend
        )
        tuned = tune(*lists)
        found[backend] = [
            adapted(xq), *adapted.parameters.values(), *(p.grad for p in net.parameters()),
            tuned(xq), *tuned.parameters.values(),
        ]  # fmt: skip
    scale = 1e-4 if dtype == torch.float32 else 1e-11
    for got, wanted in zip(found["native"], found["torch"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=scale, atol=scale)


def test_adapters_and_files_of_images(tmp_path):
    net = conv_net()
    xs, ys, xq, _ = episodes((1, 5, 4), dtype=torch.float32)
    maml = pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=2, backend="native")
    models = maml.adapt(xs, ys)
    wanted = models(xq)
    models.save(tmp_path / "models.safetensors")
    loaded = pymeta.Adapted.load(tmp_path / "models.safetensors", net)
    assert torch.equal(loaded(xq), wanted)
    alone = nn.functional.softmax(models[1].eval()(xq[1]), -1)
    torch.testing.assert_close(models.predict_proba(xq)[1], alone, rtol=1e-4, atol=1e-5)
    maml.adapter().save(tmp_path / "adapter.safetensors")
    adapter = pymeta.Adapter.load(tmp_path / "adapter.safetensors")
    assert adapter.architecture.row_shape == (1, 5, 4)
    got = adapter.adapt(xs.numpy(), ys.numpy())(xq.numpy())
    assert np.array_equal(got, wanted.numpy())
    assert np.array_equal(adapter.adapt_predict(xs.numpy(), ys.numpy(), xq.numpy()), got)
    one = adapter.adapt_predict(xs[0].numpy(), ys[0].numpy(), xq[0].numpy())
    assert np.array_equal(one, got[0])
    with pytest.raises(ValueError, match=r"xs: expected rows of shape \[1, 5, 4\]"):
        adapter.adapt(xs.numpy()[..., :3], ys.numpy())


@pytest.mark.parametrize("shape", [(1, 5, 4), (2, 10)])
def test_unflatten_makes_images_of_rows(shape, tmp_path):
    """Then nothing has to be known of the rows but how many features they have."""
    torch.manual_seed(5)
    conv = (nn.Conv1d, nn.Conv2d)[len(shape) - 2](shape[0], 4, 2)
    behind = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    behind(torch.randn(1, *shape))
    net = nn.Sequential(nn.Unflatten(1, shape), behind)
    xs, ys, xq, yq = episodes(shape, dtype=torch.float32)
    options = {"loss": "cross_entropy", "lr": 0.1, "steps": 2, "backend": "native"}
    maml = pymeta.MAML(net, **options)
    adapter = maml.adapter()
    assert "unflatten conv" in maml.explain()
    got = maml(xs.flatten(2), ys, xq.flatten(2), yq)
    wanted = pymeta.MAML(behind, **options)(xs, ys, xq, yq)
    assert same_bits(got.predictions, wanted.predictions)
    adapter.save(tmp_path / "adapter.safetensors")
    loaded = pymeta.Adapter.load(tmp_path / "adapter.safetensors")
    flat = [v.flatten(1).numpy() if v.ndim > 1 else v.numpy() for v in (xs[0], ys[0], xq[0])]
    assert np.array_equal(loaded.adapt_predict(*flat), got.predictions[0].detach().numpy())


def test_an_adapter_of_sequences_knows_their_shape(tmp_path):
    """Whatever their layers: normalisations do not tell sequences from images of one row."""
    for layer in (nn.InstanceNorm1d(3, affine=True), nn.LayerNorm((3, 8)), nn.GroupNorm(1, 3)):
        net = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))
        data = episodes((3, 8), dtype=torch.float32)
        maml = pymeta.MAML(net, loss="cross_entropy", lr=0.1, steps=2, backend="native")
        wanted = maml(*data).predictions.detach().numpy()
        maml.adapter().save(tmp_path / "adapter.safetensors")
        adapter = pymeta.Adapter.load(tmp_path / "adapter.safetensors")
        assert adapter.architecture.row_shape == (3, 8)
        assert np.array_equal(adapter.adapt_predict(*(v.numpy() for v in data[:3])), wanted)
        images = tuple(v[:, :, :, None] if v.ndim == 4 else v for v in data)
        if isinstance(layer, nn.GroupNorm):  # which takes either
            maml(*images)
            assert maml.adapter().architecture.row_shape == (3, 1, 8)


def test_files_that_say_a_sequence_has_a_height_of_one_are_read():
    """As those do that were written before sequences were told from images of one row."""
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 1))
    found = describe(net, (2, 6))
    made = Architecture(found.layers, found.names, found.names, found.flattens)
    described = made.described()
    assert described["layers"][0] == ["image", 2, 0, 6] and made.row_shape == (2, 6)
    described["layers"][0][2] = 1
    assert read_architecture(described).row_shape == (2, 6)


@pytest.mark.parametrize("isa, executor", PATHS)
def test_a_few_vectors_of_channels(isa, executor):
    """More channels than a panel of products has columns, and as many taps."""
    net = nn.Sequential(
        nn.Conv2d(70, 90, (3, 2), padding=1), nn.GELU(), nn.Conv2d(90, 70, 1), nn.Flatten(),
        nn.Linear(70 * 4 * 4, 3),
    ).double()  # fmt: skip
    data = episodes((70, 4, 3))
    found = []
    for backend in ("torch", "native"):
        maml = pymeta.MAML(net, loss="cross_entropy", lr=0.05, steps=1, backend=backend)
        with using(isa, executor):
            out = maml(*data)
            found.append([out.task_losses, *torch.autograd.grad(out.loss, [*net.parameters()])])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
