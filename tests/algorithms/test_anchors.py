"""The pull towards the start: one strength for all tasks, one over their rows, each task's own."""

import copy

import numpy as np
import pytest
import torch
from helpers import assert_close, batch, gradients, mlp
from kernels import PATHS, same_bits, using
from torch import nn

import pymeta
from pymeta import SGD, FineTune, Reptile
from pymeta.models.adapter import Adapter

RULES = {
    "sgd": SGD(0.1),
    "momentum, clipped": SGD(0.1, momentum=0.9, weight_decay=0.1, clip_norm=0.4),
    "adam": pymeta.Adam(0.05, eps=0.1, clip_norm=0.4),
    "rmsprop": pymeta.RMSprop(0.05, 0.9, 0.1, momentum=0.5, centered=True),
}
STEPS = 3
BACKENDS = ["torch", "native"]


def maml(net, backend="native", **options) -> pymeta.MAML:
    rate = {} if "optimizer" in options else {"lr": 0.1}
    return pymeta.MAML(net, loss="mse", steps=STEPS, backend=backend, **{**rate, **options})


# ---- the meta-gradient goes through it --------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first_order", [False, True])
def test_the_meta_gradient_is_that_of_an_eager_loop(backend, first_order):
    """theta and the start both have the pull's derivative; FOMAML's constants are of the loss."""
    net, (xs, ys, xq, yq) = mlp(2, 4, 2), batch()
    anchor = torch.tensor([0.0, 0.7, 2.5], dtype=torch.float64)
    parameters = dict(net.named_parameters())
    losses = []
    for x, y, q, z, strength in zip(xs, ys, xq, yq, anchor, strict=True):
        theta = parameters
        for _ in range(STEPS):
            inner = nn.functional.mse_loss(torch.func.functional_call(net, theta, (x,)), y)
            steps = torch.autograd.grad(inner, list(theta.values()), create_graph=not first_order)
            theta = {
                n: p - 0.1 * (g + strength * (p - parameters[n]))
                for (n, p), g in zip(theta.items(), steps, strict=True)
            }
        losses.append(nn.functional.mse_loss(torch.func.functional_call(net, theta, (q,)), z))
    wanted = gradients(torch.stack(losses).mean(), *parameters.values())
    out = maml(net, backend, first_order=first_order)(xs, ys, xq, yq, anchor=anchor)
    assert_close(out.task_losses, torch.stack(losses).detach())
    assert_close(gradients(out.loss, *parameters.values()), wanted)


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("first_order", [False, True])
def test_every_executor_has_the_references_gradient(path, rule, first_order):
    net, data = mlp(3, 6, 2), batch(tasks=19, inputs=3)
    options = {"optimizer": RULES[rule], "first_order": first_order}
    anchor = torch.linspace(0, 2, 19, dtype=torch.float64)
    wanted = maml(net, "torch", **options)(*data, anchor=anchor)
    with using(*path):
        got = maml(net, **options)(*data, anchor=anchor)
        free = maml(net, **options)(*data)
    assert_close(got.task_losses, wanted.task_losses)
    assert got.task_losses[0] == free.task_losses[0]  # its strength is 0
    assert (got.task_losses[1:] != free.task_losses[1:]).all()
    found, exact = (gradients(o.loss, *net.parameters()) for o in (got, wanted))
    # Adam and RMSprop divide by a root, which is above eps = 0.1
    assert_close(found, exact, terms=10**5)
    assert not torch.equal(found[0], gradients(free.loss, *net.parameters())[0])


# ---- what each task gets ----------------------------------------------------------------------


def everything(kind: str, net, x, y, backend: str, options: dict, call: dict) -> list:
    """What a learner makes of tasks: adapted parameters, and losses where it has some."""
    shared = {"loss": "mse", "optimizer": RULES["momentum, clipped"], "backend": backend}
    if kind == "MAML":
        learner = pymeta.MAML(net, steps=STEPS, **shared, **options)
        return list(learner.adapt(x, y, **call).parameters.values())
    if kind == "Reptile":
        learner = Reptile(net, steps=STEPS, batch_size=2, **shared, **options)
        adapted = list(learner.adapt(x, y, **call).parameters.values())
        return [*adapted, learner(x, y, **call).task_losses]
    learner = FineTune(net, epochs=2, batch_size=2, **shared, **options)
    return list(learner(x, y, **call).parameters.values())


@pytest.mark.parametrize("path", PATHS, ids="-".join)
@pytest.mark.parametrize("kind", ["MAML", "Reptile", "FineTune"])
def test_a_tasks_strength_is_its_own(path, kind):
    """Each task among others has the bits that it has alone under a learner of that strength."""
    net, (xs, ys, *_) = mlp(2, 5, 2), batch(tasks=19)
    anchor = torch.linspace(0, 3, 19, dtype=torch.float64)
    with using(*path):
        together = everything(kind, net, xs, ys, "native", {}, {"anchor": anchor})
        for t in (0, 7, 18):
            options = {"anchor": float(anchor[t])}
            alone = everything(kind, net, xs[t : t + 1], ys[t : t + 1], "native", options, {})
            assert same_bits([v[t] for v in together], [v[0] for v in alone])
    reference = everything(kind, net, xs, ys, "torch", {}, {"anchor": anchor})
    assert_close(together, reference)


@pytest.mark.parametrize(
    "backend, path",
    [("torch", PATHS[0]), *(("native", path) for path in PATHS)],
    ids=["torch", *map("-".join, PATHS)],
)
@pytest.mark.parametrize("kind", ["MAML", "Reptile", "FineTune"])
def test_a_start_that_is_worth_rows(backend, path, kind):
    """anchor_rows=n is a strength of n / rows; of the rows that count, in tasks of any size."""
    net, (x, y, *_) = mlp(2, 5, 2), batch(tasks=5, support=8)
    sizes = [8, 3, 1, 0, 5]
    name = "sizes" if kind == "FineTune" else "support_sizes"
    weights = torch.ones(5, 8, dtype=torch.float64)
    weights[0, 2:5] = weights[4, :5] = 0.0  # the last task has no row that counts
    # At least one row; divided by Python, for torch multiplies by a reciprocal.
    counting, offered = ([2.5 / n for n in rows] for rows in ((5, 3, 1, 1, 1), (8, 3, 1, 1, 5)))
    call = {name: sizes, name.replace("sizes", "weights"): weights}
    with using(*path):
        got = everything(kind, net, x, y, backend, {"anchor_rows": 2.5}, call)
        call["anchor"] = torch.tensor(counting, dtype=torch.float64)
        assert same_bits(got, everything(kind, net, x, y, backend, {}, call))
        call["anchor"] = torch.tensor(offered, dtype=torch.float64)
        assert not same_bits(got, everything(kind, net, x, y, backend, {}, call))


@pytest.mark.parametrize(
    "backend, path",
    [("torch", PATHS[0]), *(("native", path) for path in PATHS)],
    ids=["torch", *map("-".join, PATHS)],
)
@pytest.mark.parametrize("columns", [1, 2])
def test_rows_that_weigh_nothing_do_not_count_where_their_gradient_is_wanted(
    backend, path, columns
):
    """A call's results do not depend on what it is to be differentiated by."""
    net, data = mlp(2, 5, 2), batch(tasks=3, support=8)
    weights = torch.ones(3, 8, dtype=torch.float64)
    if columns == 2:
        weights = torch.ones(3, 8, 2, dtype=torch.float64)
    weights[0, 2:5] = weights[2, :] = 0.0
    if columns == 2:
        weights[1, :4, 1] = 0.0  # these rows weigh something
    counting = torch.tensor([2.5 / n for n in (5, 8, 1)], dtype=torch.float64)
    options = {"backend": backend, "loss": "mse", "lr": 0.1, "steps": STEPS}
    with using(*path):
        constant = pymeta.MAML(net, anchor_rows=2.5, **options)(*data, support_weights=weights)
        asked = weights.clone().requires_grad_()
        got = pymeta.MAML(net, anchor_rows=2.5, **options)(*data, support_weights=asked)
        wanted = pymeta.MAML(net, **options)(*data, support_weights=asked, anchor=counting)
        assert_close(got.task_losses, constant.task_losses)
        assert same_bits(got.task_losses, wanted.task_losses)
        assert same_bits(gradients(got.loss, asked), gradients(wanted.loss, asked))
        learned = pymeta.MAML(net, anchor_rows=pymeta.LearnableAnchor(2.5), **options)
        again, before = (learned(*data, support_weights=w) for w in (asked, weights))
        assert_close(again.task_losses, before.task_losses)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_held_out_do_not_count(backend):
    net, (x, y, *_) = mlp(2, 5, 2), batch(tasks=3, support=8)
    options = {"loss": "mse", "lr": 0.1, "epochs": 3, "validation": 0.5, "backend": backend}
    got = FineTune(net, anchor_rows=2.0, **options)(x, y)
    wanted = FineTune(net, anchor=0.5, **options)(x, y)
    assert same_bits(list(got.parameters.values()), list(wanted.parameters.values()))


def test_chunks_take_their_own_strengths(monkeypatch):
    monkeypatch.setattr("pymeta.algorithms.finetune._LARGEST_CHUNK", 16)
    net, (x, y, *_) = mlp(2, 5, 2), batch(tasks=40)
    anchor = torch.linspace(0, 3, 40, dtype=torch.float64)
    tune = FineTune(net, loss="mse", lr=0.1, epochs=2, backend="native")
    got = tune(x, y, anchor=anchor).parameters
    monkeypatch.undo()
    wanted = tune(x, y, anchor=anchor).parameters
    assert same_bits(list(got.values()), list(wanted.values()))
    assert tune.anchor == 0 and tune.anchor_rows is None


def test_a_start_worth_many_rows_is_kept_and_one_worth_none_is_not():
    net, (x, y, *_) = mlp(2, 5, 2), batch(tasks=2, support=20)
    starts = {n: p.detach() for n, p in net.named_parameters()}

    def moved(**options):
        tune = FineTune(net, loss="mse", lr=1e-3, epochs=50, backend="native", **options)
        found = tune(x, y).parameters
        return sum(float((v - starts[n]).square().sum()) for n, v in found.items())

    far, near = moved(), moved(anchor_rows=20 * 1000.0)  # lr * anchor is 1
    assert near < 1e-3 * far


# ---- forms, messages --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [list, tuple, np.float32, torch.tensor, np.array], ids=lambda make: make.__name__
)
def test_forms_of_the_strengths(make):
    net, data = mlp(2, 4, 2), batch()
    given = [0.5, 0.25, 2.0]
    anchor = np.array(given, np.float32) if make is np.float32 else make(given)
    wanted = maml(net)(*data, anchor=torch.tensor(given, dtype=torch.float64))
    assert torch.equal(maml(net)(*data, anchor=anchor).task_losses, wanted.task_losses)
    strided = torch.tensor([0.5, 9, 0.25, 9, 2, 9], dtype=torch.float64)[::2]
    assert torch.equal(maml(net)(*data, anchor=strided).task_losses, wanted.task_losses)


def test_a_repeated_call_has_the_strengths_that_it_is_given():
    net, data = mlp(2, 4, 2), batch()
    module = maml(net)
    free = module(*data).task_losses
    for anchor in (torch.ones(3), torch.zeros(3), torch.ones(3) * 2):
        got = module(*data, anchor=anchor.double()).task_losses
        assert torch.equal(got, free) == (not anchor.any())
        assert torch.equal(module(*data).task_losses, free)


WRONG_CALLS = {
    "shape": (ValueError, r"anchor: expected shape \[3\], got \[2\]", torch.ones(2)),
    "axes": (ValueError, r"anchor: expected shape \[3\], got \[3, 1\]", torch.ones(3, 1)),
    "a number": (TypeError, r"anchor: expected a strength for each task, \[T\], got float", 0.5),
    "strings": (TypeError, "anchor: expected real numbers", ["a", "b", "c"]),
    "bools": (TypeError, "anchor: expected real numbers", torch.ones(3, dtype=torch.bool)),
    "complex": (TypeError, "anchor: expected real numbers", torch.ones(3, dtype=torch.complex64)),
    "negative": (ValueError, r"anchor: task 1: .* >= 0, got -0\.5", torch.tensor([1, -0.5, 1])),
    "nan": (ValueError, "anchor: task 2: .* got nan", torch.tensor([1, 1, torch.nan])),
    "infinite": (ValueError, "anchor: task 0: .* got inf", torch.tensor([torch.inf, 1, 1])),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_strengths(backend, case):
    error, message, anchor = WRONG_CALLS[case]
    net, data = mlp(2, 4, 2), batch()
    module = maml(net, backend)
    reptile = Reptile(net, loss="mse", lr=0.1, steps=2, backend=backend)
    tune = FineTune(net, loss="mse", lr=0.1, epochs=2, backend=backend)
    calls = [
        lambda: module(*data, anchor=anchor),
        *(lambda c=call: c(*data[:2], anchor=anchor) for call in (module.adapt, reptile, tune)),
        lambda: reptile.adapt(*data[:2], anchor=anchor),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def test_wrong_strengths_on_a_device(monkeypatch):
    net, data = mlp(2, 4, 2), batch()
    anchor = torch.tensor([1.0, torch.nan, 1.0])
    with using(*next(p for p in PATHS if p[1] == "emulated")):
        losses = maml(net)(*data, anchor=anchor).task_losses
        assert losses.isnan().tolist() == [False, True, False]
        monkeypatch.setattr("pymeta.native.checking_values", True)
        with pytest.raises(ValueError, match="anchor: task 1: expected a finite number >= 0"):
            maml(net)(*data, anchor=anchor)


WRONG = {
    "negative": (ValueError, "anchor: expected a finite number >= 0, got -1", {"anchor": -1}),
    "per task": (TypeError, r"goes into the call, as anchor=\[T\]", {"anchor": torch.ones(3)}),
    "rows": (ValueError, "anchor_rows: expected a finite number > 0, got 0", {"anchor_rows": 0}),
    "rows type": (TypeError, "anchor_rows: .* got str", {"anchor_rows": "20"}),
    "both": (
        ValueError,
        "anchor, anchor_rows: expected one of them, got 0.5 and 20",
        {"anchor": 0.5, "anchor_rows": 20},
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings(case):
    error, message, options = WRONG[case]
    shared = {"loss": "mse", "lr": 0.1, **options}
    for make, own in ((pymeta.MAML, "steps"), (Reptile, "steps"), (FineTune, "epochs")):
        with pytest.raises(error, match=message):
            make(mlp(2, 4, 2), **shared, **{own: 2})


def test_settings_are_fixed():
    for module in (maml(mlp(2, 4, 2), anchor_rows=20), maml(mlp(2, 4, 2), anchor=0.5)):
        for one in (module, copy.deepcopy(module)):
            for name in ("anchor", "anchor_rows"):
                with pytest.raises(AttributeError, match=f"{name} cannot be set"):
                    setattr(one, name, 0.1)
    assert maml(mlp(2, 4, 2), anchor_rows=20).anchor_rows == 20


def test_explain_knows_of_them():
    """Steps with a pull keep the gradient, which plain ones do not."""
    net, (xs, ys, xq, yq) = mlp(2, 4, 2), batch()
    module = maml(net)
    said = set()
    for call in (lambda **o: module(xs, ys, xq, yq, **o), lambda **o: module.adapt(xs, ys, **o)):
        for options in ({}, {"anchor": torch.ones(3)}):
            call(**options)
            said.add(module.explain())
            module._forget()
            module._plan.last = None
    assert len(said) == 4


def test_under_torch_compile():
    """A call with strengths of its own is left to eager mode; it is not without them."""
    net, data = mlp(2, 4, 2), batch()
    module = maml(net, anchor=0.5)
    compiled = torch.compile(module, backend="aot_eager")
    assert_close(compiled(*data).task_losses, module(*data).task_losses)
    anchor = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    got, wanted = compiled(*data, anchor=anchor), module(*data, anchor=anchor)
    assert_close(got.task_losses, wanted.task_losses)
    assert not torch.allclose(got.task_losses, module(*data).task_losses)


# ---- adapters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"anchor": 0.5}, {"anchor_rows": 3.0}, {}], ids=str)
@pytest.mark.parametrize("kind", ["MAML", "FineTune"])
def test_adapters_and_their_files(kind, options, tmp_path):
    net, (x, y, xq, _) = mlp(2, 4, 2), batch(tasks=4, support=7)
    sizes = [7, 2, 5, 3]
    if kind == "MAML":
        learner = maml(net, **options)
        wanted = learner.adapt(x, y, support_sizes=sizes)
    else:
        shared = {"loss": "mse", "lr": 0.1, "backend": "native", **options}
        learner = FineTune(net, epochs=2, batch_size=3, **shared)
        wanted = learner(x, y, sizes=sizes)
    learner.adapter().save(tmp_path / "adapter")
    for adapter in (learner.adapter(), Adapter.load(tmp_path / "adapter")):
        assert adapter.anchor_rows == options.get("anchor_rows")
        lists = [[v[t, :n].numpy() for t, n in enumerate(sizes)] for v in (x, y)]
        models = adapter.adapt(*lists)
        for name, value in models.parameters.items():
            assert (value == wanted.parameters[name].numpy()).all()
        for t, n in enumerate(sizes):
            one = adapter.adapt_predict(x[t, :n].numpy(), y[t, :n].numpy(), xq[t].numpy())
            assert_close(torch.from_numpy(one), wanted[t](xq[t]).detach())
