"""precision="tf32x3": products of linear layers on tensor cores, in three parts.

Emulated blocks put together what the lanes of a warp hold, by the layout that PTX gives it, so the
way of each number is the GPU's. What a product alone makes of its numbers is
csrc/tests/fragments_test.cpp's.
"""

import copy
import pickle

import pytest
import torch
from cases import Problem
from device_help import make
from helpers import batch, gradients, mlp
from kernels import EPS, largest, same_bits, using
from tf32 import CASES, F32, GROWTH, check_near, with_tf32x3

import pymeta
from pymeta import FineTune, Reptile, functional, native
from pymeta.learners import RelationalMAML

pytestmark = pytest.mark.skipif(not native.emulates(), reason="a build without the emulated device")

HAS, HAS_NOT = "16 inputs and outputs in 3xTF32", "; products in float32, because"


def net32(*widths: int):
    return mlp(*widths, dtype=F32)


# ---- right results ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_meta_gradients_are_the_references(name):
    problem = Problem(CASES[name])
    module = with_tf32x3(problem)
    check_near(problem, module, problem.results)
    assert HAS in module.explain()


# ---- the same bits ------------------------------------------------------------------------------


def call(module, data):
    out = module(*data)
    own = [p for p in module.parameters() if p.requires_grad]
    return [out.loss.detach(), out.task_losses.detach(), out.predictions.detach()], gradients(
        out.loss, *own
    )


def test_bits_do_not_depend_on_threads_or_memory():
    module = make(net32(20, 40, 24, 2), precision="tf32x3")
    data = batch(tasks=3, support=11, query=18, inputs=20, out=2, dtype=F32)
    wanted, slopes = call(module, data)
    assert HAS in module.explain()
    before = native.block_bytes()
    for threads, size in ((1, 0), (3, 0), (32, 0), (2, 30_000)):
        with using(threads=threads):
            native.set_block_bytes(size)
            found, own = call(module, data)
            native.set_block_bytes(before)
        for a, b in zip([*found, *own], [*wanted, *slopes], strict=True):
            assert same_bits(a, b), (threads, size)


def test_a_task_has_its_bits_among_others():
    """Of other sizes, too; and a NaN or an infinity in another task is not seen."""
    module = make(net32(16, 20, 2), precision="tf32x3")
    sizes = [18, 1, 7, 40]
    xs = [torch.randn(n, 16) for n in sizes]
    ys = [torch.randn(n, 2) for n in sizes]
    whole = module(xs, ys, xs, ys)
    assert HAS in module.explain()
    for t in range(4):
        alone = module(xs[t : t + 1], ys[t : t + 1], xs[t : t + 1], ys[t : t + 1])
        assert same_bits(alone.task_losses[0], whole.task_losses[t])
        assert same_bits(alone.predictions[0], whole.predictions[t])
    for wrong in (float("nan"), float("inf")):
        xs[2] = xs[2].index_fill(0, torch.tensor([3]), wrong)
        found = module(xs, ys, xs, ys)
        usual = make(module.model)(xs, ys, xs, ys)
        for t in (0, 1, 3):
            assert same_bits(found.task_losses[t], whole.task_losses[t])
        lost = [m.task_losses[2].isnan().item() for m in (found, usual)]
        assert not found.task_losses[2].isfinite() and lost[0] == lost[1]


def test_what_is_not_on_a_device_is_in_float32():
    """On the CPU, in torch, and where layers are narrow: the bits of the usual precision."""
    wide, narrow = batch(tasks=2, inputs=20, out=2, dtype=F32), batch(tasks=2, out=3, dtype=F32)
    net, thin, found = net32(20, 20, 2), net32(2, 15, 40, 3), []
    for precision in ("float32", "tf32x3"):
        with using(executor="rows"):
            on_cpu = make(net, precision=precision)
            results = [*call(on_cpu, wide)]
        in_torch = make(net, precision=precision, backend="torch")
        small = make(thin, precision=precision)
        results += [*call(in_torch, wide), *call(small, narrow)]
        said = [small.explain(), in_torch.explain()]
        with using(executor="rows"):
            said.append(on_cpu.explain())
        found.append([t for part in results for t in part])
    assert HAS_NOT in said[0] and said[1].startswith("torch: ")
    assert said[2].endswith('products in float32, because "tf32x3" is for CUDA')
    for a, b in zip(*found, strict=True):
        assert same_bits(a, b)


def test_calls_that_are_not_plain_are_in_float32():
    """Those with offsets, say. `explain` speaks of the last call."""
    module, usual = (make(net32(20, 20, 2), precision=p) for p in ("tf32x3", "float32"))
    usual.model.load_state_dict(module.model.state_dict())
    data = batch(tasks=2, inputs=20, out=2, dtype=F32)
    offset = torch.rand(data[1].shape)
    assert module.explain().endswith('"tf32x3" where a call has it')
    module(*data)
    assert HAS in module.explain()
    found = [m(*data, support_offset=offset).task_losses for m in (module, usual)]
    assert same_bits(*found) and HAS_NOT in module.explain() and "TF32" not in usual.explain()


# ---- every learner ------------------------------------------------------------------------------


def test_other_learners_and_operators_have_it():
    net, (xs, ys, *_) = net32(16, 24, 2), batch(tasks=2, inputs=16, out=2, dtype=F32)
    found = {}
    for precision in ("float32", "tf32x3"):
        how = {"loss": "mse", "lr": 0.1, "backend": "native", "precision": precision}
        tuned = FineTune(net, epochs=2, **how)
        reptile = Reptile(net, steps=2, **how)
        operator = functional.Operator(net, steps=2, **how)
        named = {n: p.detach() for n, p in net.named_parameters()}
        found[precision] = [
            tuned(xs, ys).parameters["0.weight"],
            reptile.adapt(xs, ys).parameters["0.weight"],
            functional.adapt(operator, named, xs, ys)["0.weight"],
        ]
        said = [tuned.explain(), reptile.explain()]
    for usual, own in zip(*found.values(), strict=True):
        assert not same_bits(usual, own)
        assert largest(usual - own) <= GROWTH * 100 * EPS[F32] * largest(usual)
    assert all(HAS in s for s in said)
    learner = RelationalMAML(
        net, loss="mse", features=16, targets=2, lr=0.1, steps=1, precision="tf32x3"
    )
    assert learner.maml.precision == "tf32x3"


def test_adapted_models_predict_in_float32():
    """So a copy of them, which knows of no precision, has the same predictions."""
    net = net32(16, 24, 2)
    xs, ys, xq, _ = batch(tasks=2, inputs=16, out=2, dtype=F32)
    module = make(net, precision="tf32x3")
    models = module.adapt(xs, ys)
    again = pymeta.Adapted.from_stacked(net, models.parameters, loss="mse")
    assert same_bits(models(xq), again(xq)) and same_bits(models(xq), copy.deepcopy(models)(xq))
    assert HAS in module.explain()


# ---- the setting --------------------------------------------------------------------------------


def test_precision_is_checked():
    net = net32(16, 16, 2)
    for learner in (make, lambda n, **o: functional.Operator(n, loss="mse", lr=0.1, steps=1, **o)):
        with pytest.raises(ValueError, match=r'precision: expected "float32" or "tf32x3", got 16'):
            learner(net, precision=16)
        with pytest.raises(ValueError, match=r"models in float32, and this one is in float64"):
            learner(mlp(16, 16, 2), precision="tf32x3")
    module = make(net, precision="tf32x3")
    with pytest.raises(ValueError, match=r"got 'tf32'"):
        module.precision = "tf32"
    net.double()
    with pytest.raises(ValueError, match=r"expected \"float32\", .* or a model after \.float\(\)"):
        module.adapt(*batch(tasks=1, inputs=16, out=2)[:2])
    operator = functional.Operator(
        functional.chain([("linear", 16, 16, True)]), loss="mse", lr=0.1, steps=1,
        precision="tf32x3",
    )  # fmt: skip
    arrays = {n: torch.zeros(s).double().numpy() for n, s in operator.shapes.items()}
    data = [torch.zeros(1, 2, 16).double().numpy()] * 2
    with pytest.raises(ValueError, match=r"and this one is in float64"):
        functional.adapt(operator, arrays, *data)


def test_copies_keep_it_and_old_states_have_float32():
    module = make(net32(16, 16, 2), precision="tf32x3")
    assert "precision=tf32x3" in repr(module) and "precision" not in repr(make(net32(2, 2)))
    assert pickle.loads(pickle.dumps(module)).precision == "tf32x3"
    assert copy.deepcopy(module).precision == "tf32x3"
    state = module.__getstate__()
    del state["precision"]
    old = pymeta.MAML.__new__(pymeta.MAML)
    old.__setstate__(state)
    assert old.precision == "float32"
    operator = functional.Operator(
        net32(16, 16, 2), loss="mse", lr=0.1, steps=1, precision="tf32x3"
    )
    assert pickle.loads(pickle.dumps(operator)).precision == "tf32x3"
    state = operator.__getstate__()
    del state["precision"]
    old_operator = functional.Operator.__new__(functional.Operator)
    old_operator.__setstate__(state)
    assert old_operator.precision == "float32"
