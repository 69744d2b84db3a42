"""What targets may come with: distributions over classes, a weight for each, an offset of outputs.

Oracles are torch's own functions in plain loops, the rows that are left out, and the reference.
"""

import collections
import math

import numpy as np
import pytest
import torch
from cases import SMOOTH, Case, Problem, cases, compare, of_tasks
from helpers import LOSSES, MORE_LOSSES, assert_close, assert_promised, batch, gradients, mlp
from hypothesis import given, settings
from kernels import DTYPES, EXECUTORS, PATHS, PROFILE, same_bits, using
from torch import nn

import pymeta
from pymeta import MAML, Adapter, FineTune, QuantileLoss, Reptile, native

BACKENDS = ("native", "torch")


def distributions(*lead, out=3, dtype=torch.float64):
    return torch.randn(*lead, out, dtype=dtype).softmax(-1)


def meta_loop(net, loss, lr, steps, tasks):
    """The mean over tasks of the loss after adaptation; a task is (x, xq, of support, of query).

    The last two are what `loss(outputs, of)` takes beside outputs.
    """
    total = []
    for x, xq, support, query in tasks:
        theta = dict(net.named_parameters())
        for _ in range(steps):
            inner = loss(torch.func.functional_call(net, theta, (x,)), support)
            found = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
            theta = {n: p - lr * g for (n, p), g in zip(theta.items(), found, strict=True)}
        total.append(loss(torch.func.functional_call(net, theta, (xq,)), query))
    return torch.stack(total).mean()


def masked_mse(outputs, of):
    y, w, offset = of
    return (w * (outputs + offset - y).square()).sum() / w.sum()


# ---- against the reference ---------------------------------------------------------------------


OTHERS = tuple(loss for loss in (*LOSSES, *MORE_LOSSES) if loss != "cross_entropy")


@pytest.mark.parametrize("losses, examples", [(("cross_entropy",), 15), (OTHERS, 30)])
def test_random_cases_against_the_reference(losses, examples):
    counts = collections.Counter()

    @settings(PROFILE, max_examples=examples)
    @given(cases(losses=losses, beside=True))
    def check(case):
        compare(case)
        counts.update(case.beside)

    check()
    assert counts["offset"] > 3 and counts["soft"] + counts["elements"] > 3


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "quantile", "student_t_nll"])
def test_a_tasks_bits_are_its_own(loss):
    beside = ("elements", "offset")
    case = Case(SMOOTH["mlp"], loss=loss, tasks=19, form="list", beside=beside)
    soft = Case(SMOOTH["mlp"], loss="cross_entropy", loss_options=True, tasks=19, form="list",
                weights=True, beside=("soft", "offset"))  # fmt: skip
    for problem in (Problem(case), Problem(soft)):
        for dtype in DTYPES:
            module = problem.module(dtype)
            for isa in native.isas():
                got = []
                for executor in EXECUTORS:
                    with using(isa, executor):
                        got.append(problem.results(module))
                        alone = problem.results(module, [7])
                    assert same_bits(of_tasks(got[-1], [7]), of_tasks(alone, [0])), executor
                assert same_bits(*(of_tasks(g, range(19)) for g in got)), isa


# ---- distributions over classes ----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.tensor([0.5, 2, 1]).double())]
)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_labels_are_torchs(backend, loss, smoothing):
    loss.label_smoothing = smoothing
    net, (xs, _, xq, _) = mlp(2, 5, 3), batch()
    ys, yq = distributions(3, 5), distributions(3, 4)
    got = MAML(net, loss=loss, lr=0.1, steps=2, backend=backend)(xs, ys, xq, yq)
    wanted = meta_loop(net, loss, 0.1, 2, list(zip(xs, xq, ys, yq, strict=True)))
    assert_close(got.loss, wanted)
    parameters = list(net.parameters())
    assert_close(gradients(got.loss, *parameters), gradients(wanted, *parameters))


@pytest.mark.parametrize("isa, executor", PATHS)
def test_certain_distributions_are_labels(isa, executor):
    """Of either side: labels here and distributions there go together."""
    net, (xs, ys, xq, yq) = mlp(2, 5, 3), batch("cross_entropy", out=3)
    module = MAML(net, loss="cross_entropy", lr=0.1, steps=2, backend="native")
    of = nn.functional.one_hot
    with using(isa, executor):
        wanted = module(xs, ys, xq, yq)
        for support in (ys, of(ys, 3).double()):
            for query in (yq, of(yq, 3).double()):
                got = module(xs, support, xq, query)
                assert_close(got.task_losses, wanted.task_losses)
                assert_close(
                    gradients(got.loss, *net.parameters()),
                    gradients(wanted.loss, *net.parameters()),
                )


def test_soft_labels_can_be_learnt():
    """Their gradient, in torch: the loop's, through the inner steps and the query loss."""
    net, (xs, _, xq, _) = mlp(2, 5, 3), batch()
    ys, yq = distributions(3, 5).requires_grad_(), distributions(3, 4).requires_grad_()
    loss = nn.CrossEntropyLoss()
    got = MAML(net, loss=loss, lr=0.1, steps=2, backend="torch")(xs, ys, xq, yq)
    wanted = meta_loop(net, loss, 0.1, 2, list(zip(xs, xq, ys, yq, strict=True)))
    assert_close(gradients(got.loss, ys, yq), gradients(wanted, ys, yq))


# ---- a weight for each target ------------------------------------------------------------------


def masked(backend="native", **options):
    """Data with weights of single targets, offsets, and the module."""
    xs, ys, xq, yq = batch()
    ws, wq = torch.rand_like(ys), torch.rand_like(yq)
    ws[torch.rand_like(ys) < 0.4], wq[torch.rand_like(yq) < 0.4] = 0.0, 0.0
    shifts = torch.randn_like(ys), torch.randn_like(yq)
    module = MAML(mlp(2, 5, 2), loss="mse", lr=0.1, steps=2, backend=backend, **options)
    return module, (xs, ys, xq, yq), (ws, wq), shifts


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_targets_and_offsets_are_the_loops(backend):
    module, (xs, ys, xq, yq), (ws, wq), (os, oq) = masked(backend)
    got = module(xs, ys, xq, yq, support_weights=ws, query_weights=wq,
                 support_offset=os, query_offset=oq)  # fmt: skip
    support, query = zip(ys, ws, os, strict=True), zip(yq, wq, oq, strict=True)
    tasks = list(zip(xs, xq, support, query, strict=True))
    wanted = meta_loop(module.model, masked_mse, 0.1, 2, tasks)
    assert_close(got.loss, wanted)
    parameters = list(module.model.parameters())
    assert_close(gradients(got.loss, *parameters), gradients(wanted, *parameters))


@pytest.mark.parametrize("isa, executor", PATHS)
def test_what_a_masked_target_holds_is_nobodys_concern(isa, executor):
    for loss in ("mse", "bce_with_logits", "poisson_nll"):
        module, (xs, ys, xq, yq), (ws, wq), _ = masked()
        module.loss = loss
        ys, yq = (y.abs().clamp(max=1.0) for y in (ys, yq))
        options = {"support_weights": ws, "query_weights": wq}
        with using(isa, executor):
            wanted = module(xs, ys, xq, yq, **options)
            slopes = gradients(wanted.loss, *module.parameters())
            for poison in (math.nan, math.inf, -7.0):
                bad = [torch.where(w == 0, poison, y) for w, y in ((ws, ys), (wq, yq))]
                got = module(xs, bad[0], xq, bad[1], **options)
                assert torch.equal(got.task_losses, wanted.task_losses), (loss, poison)
                assert same_bits(gradients(got.loss, *module.parameters()), slopes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_any_target_is_left_out(backend):
    """It is as good as absent: batch statistics do not have it, and its inputs may be anything."""
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    module = MAML(net, loss="mse", lr=0.1, steps=2, backend=backend)
    _, (xs, ys, xq, yq), _, _ = masked()
    ws = torch.rand_like(ys)
    ws[:, 2] = 0
    kept = [0, 1, 3, 4]
    xs[:, 2], ys[:, 2] = math.nan, math.nan
    got = module(xs, ys, xq, yq, support_weights=ws)
    wanted = module(xs[:, kept], ys[:, kept], xq, yq, support_weights=ws[:, kept])
    assert_promised(got.loss.detach(), wanted.loss.detach(), backend)
    none = module(xs, ys, xq, yq, query_weights=torch.zeros_like(yq), support_weights=ws)
    assert none.loss == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_targets_that_require_grad_have_one(backend):
    module, (xs, ys, xq, yq), (ws, wq), (os, oq) = masked(backend)
    ws.requires_grad_(), os.requires_grad_()
    got = module(xs, ys, xq, yq, support_weights=ws, query_weights=wq,
                 support_offset=os, query_offset=oq)  # fmt: skip
    support, query = zip(ys, ws, os, strict=True), zip(yq, wq, oq, strict=True)
    tasks = list(zip(xs, xq, support, query, strict=True))
    wanted = meta_loop(module.model, masked_mse, 0.1, 2, tasks)
    assert_close(gradients(got.loss, ws, os), gradients(wanted, ws, os))


def test_one_column_of_weights_is_one_of_rows():
    xs, ys, xq, yq = batch(out=1)
    module = MAML(mlp(2, 4, 1), loss="mse", lr=0.1, steps=1, backend="native")
    weights = torch.rand(3, 5).double()
    got = module(xs, ys, xq, yq, support_weights=weights.unsqueeze(-1))
    assert torch.equal(got.loss, module(xs, ys, xq, yq, support_weights=weights).loss)


# ---- the other learners ------------------------------------------------------------------------

SIZES = [5, 3, 6, 4, 5]


def ragged(soft: bool):
    """Lists of x, y, weights and offsets of tasks of SIZES rows, and a loss for them."""
    xs = [torch.randn(n, 2).double() for n in SIZES]
    offset = [torch.randn(n, 3).double() for n in SIZES]
    if soft:
        weights = [torch.rand(n).double() for n in SIZES]
        return xs, [distributions(n) for n in SIZES], weights, offset, "cross_entropy"
    ys = [torch.randn(n, 3).double() for n in SIZES]
    weights = [torch.rand(n, 3).double() for n in SIZES]
    for y, w in zip(ys, weights, strict=True):
        y[1, 2], w[1, 2] = math.nan, 0.0
    return xs, ys, weights, offset, "huber"


@pytest.mark.parametrize("executor", [*EXECUTORS, *["emulated"] * native.emulates()])
@pytest.mark.parametrize("soft", [False, True])
def test_fine_tuning_and_reptile(executor, soft):
    """Minibatches and validation; native as in torch."""
    xs, ys, ws, os, loss = ragged(soft)
    validation = (xs, ys, ws, os)
    options = {"loss": loss, "optimizer": pymeta.Adam(0.05, eps=0.1), "batch_size": 2, "seed": 3}
    net = mlp(2, 4, 3)
    tuned, reptile = {}, {}
    for backend in BACKENDS:
        with using(executor=executor):
            tuner = FineTune(net, epochs=3, backend=backend, **options)
            tuned[backend] = tuner(xs, ys, weights=ws, offset=os, validation_data=validation,
                                   curves=True)  # fmt: skip
            out = Reptile(net, steps=3, backend=backend, **options)(
                xs, ys, support_weights=ws, support_offset=os
            )
            reptile[backend] = [out.loss.detach(), *gradients(out.loss, *net.parameters())]
    assert_close(*([*m.parameters.values()] for m in tuned.values()))
    histories = [tuned[b].history for b in BACKENDS]
    assert_close(histories[0].train, histories[1].train)
    assert_close(histories[0].validation, histories[1].validation)
    assert_close(*reptile.values())


def test_a_stream_has_offsets():
    xs, ys, ws, os, loss = ragged(soft=False)
    tuner = FineTune(mlp(2, 4, 3), loss=loss, lr=0.1, epochs=2, backend="native")
    for weights in (ws, None):
        wanted = tuner(xs, ys if weights else [y.nan_to_num() for y in ys], weights=weights,
                       offset=os)  # fmt: skip
        given = (xs, ys if weights else [y.nan_to_num() for y in ys], weights or [None] * 5, os)
        parts = list(tuner.stream(zip(*given, strict=True), 2))
        for name, values in wanted.parameters.items():
            assert torch.equal(torch.cat([p.parameters[name] for p in parts]), values)
    with pytest.raises(TypeError, match="expected a tensor or array, got NoneType"):
        list(tuner.stream([(xs[0], ys[0], ws[0], os[0]), (xs[1], ys[1], ws[1], None)]))


@pytest.mark.parametrize("soft", [False, True])
def test_rows_held_out_keep_what_they_come_with(soft):
    xs, ys, ws, os, loss = ragged(soft)
    made, net = [], mlp(2, 4, 3)
    for backend in BACKENDS:
        tuner = FineTune(net, loss=loss, lr=0.05, epochs=3, validation=0.34, seed=1,
                         backend=backend)  # fmt: skip
        made.append(tuner(xs, ys, weights=ws, offset=os, curves=True))
    assert_close(*(m.history.validation for m in made))
    assert_close(*([*m.parameters.values()] for m in made))


@pytest.mark.parametrize("soft", [False, True])
def test_adapted_models_and_adapters_take_them(soft, tmp_path):
    xs, ys, ws, os, loss = ragged(soft)
    module = MAML(mlp(2, 4, 3), loss=loss, lr=0.1, steps=2, backend="native")
    models = module.adapt(xs, ys, support_weights=ws, support_offset=os)
    wanted = module(xs, ys, xs, ys, support_weights=ws, support_offset=os, query_weights=ws,
                    query_offset=os).predictions  # fmt: skip
    wanted = [p.detach() for p in wanted]
    outputs = models(xs, offset=os)
    module.adapter().save(tmp_path / "adapter")
    adapter = Adapter.load(tmp_path / "adapter")
    a, b, c, d = ([v.numpy() for v in values] for values in (xs, ys, ws, os))
    arrays = adapter.adapt(a, b, weights=c, offset=d)
    many = adapter.adapt_predict(a, b, a, weights=c, offset=d, query_offset=d)
    for t in range(len(SIZES)):
        one = adapter.adapt_predict(a[t], b[t], a[t], weights=c[t], offset=d[t], query_offset=d[t])
        for got in (outputs[t].numpy(), arrays(a, offset=d)[t], many[t], one):
            assert np.array_equal(got, wanted[t].numpy())
        plain = adapter.adapt_predict(a[t], b[t], a[t], weights=c[t], offset=d[t])
        assert np.array_equal(plain, models(xs)[t].numpy())
        again = adapter.adapt_predict(a[t], b[t], a[t], None, weights=c[t], query_offset=d[t])
        assert not np.array_equal(again, one)
    in_torch = MAML(module.model, loss=loss, lr=0.1, steps=2, backend="torch").adapt(
        xs, ys, support_weights=ws, support_offset=os
    )
    assert_close(in_torch(xs, offset=os), outputs)
    if soft:
        p = models.predict_proba(xs, offset=os)
        assert_close(p, [o.softmax(-1) for o in outputs])
        assert np.allclose(arrays.predict_proba(a, offset=d)[0], p[0].numpy())


@pytest.mark.parametrize("isa, executor", [*PATHS, (None, None)])
def test_rows_that_do_not_count_are_predicted_with_their_offsets(isa, executor):
    """In the call that learns as by the adapted models; in torch where there is no executor."""
    module, (xs, ys, xq, yq), (_, wq), (os, oq) = masked("native" if executor else "torch")
    wq[0, 1], wq[2] = 0.0, 0.0
    with using(isa, executor):
        got = module(xs, ys, xq, yq, support_offset=os, query_offset=oq, query_weights=wq)
        wanted = module.adapt(xs, ys, support_offset=os)(xq, offset=oq)
    assert_close(got.predictions, wanted)
    assert got.task_losses[2] == 0 and got.task_losses[0] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_tasks_of_equal_sizes_have_offsets_of_one_axis(backend):
    xs, ys, xq, yq = batch(out=1)
    module = MAML(mlp(2, 4, 1), loss="mse", lr=0.1, steps=1, backend=backend)
    os, oq = torch.randn(3, 5).double(), torch.randn(3, 4).double()
    got = module(xs, ys, xq, yq, support_offset=os, query_offset=oq)
    flat = module(xs, ys - os.unsqueeze(-1), xq, yq - oq.unsqueeze(-1))
    assert_close(got.loss, flat.loss)
    assert_close(got.predictions, flat.predictions + oq.unsqueeze(-1))
    assert_close(module.adapt(xs, ys, support_offset=os)(xq, offset=oq), got.predictions)


def test_a_compiled_call_leaves_offsets_to_eager_mode():
    module, (xs, ys, xq, yq), (ws, _), (os, _) = masked()
    call = torch.compile(lambda *a, **k: module(*a, **k).loss, backend="eager")
    for options in ({"support_offset": os}, {"support_weights": ws}):
        assert torch.equal(call(xs, ys, xq, yq, **options), module(xs, ys, xq, yq, **options).loss)


# ---- refused -----------------------------------------------------------------------------------

REFUSED = {
    "weights of classes": ("cross_entropy", lambda d: {"support_weights": torch.ones(3, 5, 3)},
                           r"support_weights: expected one weight for each row, shape \[tasks, r"),
    "columns": ("mse", lambda d: {"support_weights": torch.ones(3, 5, 2)},
                r"or for each target, \[tasks, rows, 3\], got \[3, 5, 2\]"),
    "negative": ("mse", lambda d: {"support_weights": -torch.ones(3, 5, 3)},
                 r"support_weights: task 0, row 0: weight -1(\.0+)? is not a finite number >= 0"),
    "offset": ("mse", lambda d: {"query_offset": torch.zeros(3, 4, 2)},
               r"query_offset: expected a number for each output, shape \[tasks, rows, 3\], got"),
    "offset rows": ("mse", lambda d: {"query_offset": torch.zeros(3, 5, 3)},
                    r"query_offset: expected shape \[3, 4, \.\.\.\] to match xq"),
    "classes": ("cross_entropy", lambda d: d.update(ys=torch.rand(3, 5, 4)),
                r"ys: expected distributions over 3 classes, shape \[tasks, rows, 3\], got \[3, "),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name, backend):
    loss, change, message = REFUSED[name]
    data = dict(zip(("xs", "ys", "xq", "yq"), batch(loss, out=3, dtype=torch.float32), strict=True))
    options = change(data)
    module = MAML(mlp(2, 3, dtype=torch.float32), loss=loss, lr=0.1, steps=1, backend=backend)
    with pytest.raises(ValueError, match=message):
        module(*data.values(), **(options or {}))


def test_floats_that_are_no_distributions_are_refused():
    xs, ys, xq, yq = batch("cross_entropy", out=3)
    module = MAML(mlp(2, 3), loss="cross_entropy", lr=0.1, steps=1, backend="native")
    for wrong in (ys.double(), distributions(3, 5, dtype=torch.float32)):
        with pytest.raises(TypeError, match=r"ys: expected class indices \(integers\) for"):
            module(xs, wrong, xq, yq)
    tuner = FineTune(mlp(2, 3), loss="cross_entropy", lr=0.1, epochs=1, class_weights="balanced")
    with pytest.raises(ValueError, match="class_weights: expected None where ys are distribution"):
        tuner(xs, distributions(3, 5))
    adapter = tuner.adapter()
    with pytest.raises(ValueError, match="class_weights: expected None where ys are distribution"):
        adapter.adapt_predict(xs[0].numpy(), distributions(5).numpy(), xq[0].numpy())


def test_adapters_say_what_does_not_fit():
    adapter = MAML(mlp(2, 2), loss="mse", lr=0.1, steps=1, backend="native").adapter()
    x, y = np.zeros((4, 2)), np.zeros((4, 2))
    wrong = {
        "offset": (np.zeros((3, 2)), r"offset: expected shape \[4, 2\], got \[3, 2\]"),
        "query_offset": (np.zeros((4, 1)), r"query_offset: expected shape \[4, 2\], got \[4, 1\]"),
        "weights": (np.zeros((4, 3)), r"weights: expected shape \[4, 2\], got \[4, 3\]"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            adapter.adapt_predict(x, y, x, **{name: value})
    with pytest.raises(TypeError, match=r"offset: expected float64, got .*; cast it, as by"):
        adapter.adapt_predict(x, y, x, offset=np.zeros((4, 2), np.float32))


def test_quantiles_and_masks_go_together():
    """A weight belongs to a target, whichever outputs predict it."""
    xs, ys, xq, yq = batch(out=2)
    net, ws = mlp(2, 4, 6), torch.ones_like(ys)
    ws[..., 1] = 0
    module = MAML(net, loss=QuantileLoss([0.1, 0.5, 0.9]), lr=0.1, steps=1, backend="native")
    got = module(xs, ys, xq, yq, support_weights=ws, query_weights=torch.ones_like(yq)[..., :2])
    slopes = module.adapt(xs, ys, support_weights=ws).parameters["2.bias"] - net[2].bias
    assert (slopes.abs().reshape(3, 3, 2)[..., 1] == 0).all()
    assert (slopes.abs().reshape(3, 3, 2)[..., 0] > 0).all() and got.loss.isfinite()


# ---- on a device -------------------------------------------------------------------------------

on_device = pytest.mark.skipif(not native.emulates(), reason="a build without the emulated device")


@on_device
def test_calls_of_one_form_with_and_without_them_take_turns():
    """What a device needs room for changes from call to call, and back."""
    module, (xs, ys, xq, yq), (ws, wq), (os, oq) = masked()
    all_options = {"support_weights": ws, "query_weights": wq}, {"query_offset": oq}, {}
    all_options += ({"support_offset": os, "query_offset": oq, "support_weights": ws},)
    wanted = [module(xs, ys, xq, yq, **options).task_losses for options in all_options]
    with using(executor="emulated"):
        for _ in range(2):
            for options, losses in zip(all_options, wanted, strict=True):
                assert_close(module(xs, ys, xq, yq, **options).task_losses, losses)


@on_device
def test_a_wrong_value_makes_its_task_nan_where_nobody_looks():
    module, (xs, ys, xq, yq), (ws, _), _ = masked()
    with using(executor="emulated"):
        for wrong in (-1.0, math.inf, math.nan):
            bad = ws.clone()
            bad[1, 2, 0] = wrong
            losses = module(xs, ys, xq, yq, support_weights=bad).task_losses
            assert losses.isnan().tolist() == [False, True, False]
        module.loss = "qlike"
        amounts = ys.abs()
        assert module(xs, amounts, xq, yq.abs()).loss.isfinite()
        amounts[2, 0, 1] = -0.5
        losses = module(xs, amounts, xq, yq.abs()).task_losses
        assert losses.isnan().tolist() == [False, False, True]
        weights = torch.ones_like(ys)
        weights[2, 0, 1] = 0  # then nobody minds
        assert module(xs, amounts, xq, yq.abs(), support_weights=weights).loss.isfinite()


# ---- gradients by targets ---------------------------------------------------------------------


@pytest.mark.parametrize("losses", [("cross_entropy",) * 2, ("mse", "cross_entropy")])
def test_gradients_by_distributions_are_torchs(losses):
    """The core has none: the call says so and runs in torch; a compiled one is left to that."""
    torch.manual_seed(3)
    net = mlp(2, 4, 3)
    x, xq = torch.randn(2, 3, 5, 2, dtype=torch.float64)
    y, yq = (distributions(3, 5).requires_grad_() for _ in range(2))

    def learner(backend):
        how = {"loss": losses[0], "query_loss": losses[1], "lr": 0.1, "steps": 2}
        return MAML(net, **how, backend=backend)

    with pytest.warns(UserWarning, match="distributions over classes, by which gradients"):
        found = gradients(learner("auto")(x, y, xq, yq).loss, y, yq)
    f = nn.functional
    total = []
    for t in range(3):
        theta = dict(net.named_parameters())
        for _ in range(2):
            outputs = torch.func.functional_call(net, theta, (x[t],))
            inner = f.mse_loss if losses[0] == "mse" else f.cross_entropy
            by = torch.autograd.grad(inner(outputs, y[t]), list(theta.values()), create_graph=True)
            theta = {n: p - 0.1 * g for (n, p), g in zip(theta.items(), by, strict=True)}
        outputs = torch.func.functional_call(net, theta, (xq[t],))
        total.append(f.cross_entropy(outputs, yq[t]))
    wanted = gradients(torch.stack(total).mean(), y, yq)
    assert_close(found, wanted)
    with pytest.raises(ValueError, match=r'^backend="native": y.* distributions'):
        learner("native")(x, y, xq, yq)
    with pytest.warns(UserWarning, match="distributions over classes"):
        compiled = torch.compile(learner("auto"), backend="eager")(x, y, xq, yq)
    assert_close(gradients(compiled.loss, y, yq), wanted)


def test_gradients_by_query_targets_beside_labels():
    """The query loss alone says whether query targets have a gradient."""
    torch.manual_seed(4)
    net, labels = mlp(2, 4, 3), torch.randint(0, 3, (3, 5))
    x, xq = torch.randn(2, 3, 5, 2, dtype=torch.float64)
    yq = torch.randn(3, 5, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for backend in BACKENDS:
        how = {"loss": "cross_entropy", "query_loss": "mse", "lr": 0.1, "steps": 2}
        found.append(gradients(MAML(net, **how, backend=backend)(x, labels, xq, yq).loss, yq))
    assert_close(*found)
    assert float(found[0][0].abs().max()) > 0


@pytest.mark.parametrize("form", ["list", "uniform"])
def test_query_sets_without_any_row(form):
    """There are query targets, if none to hold anything against: losses and gradients are 0."""
    net, (x, y, xq, yq) = mlp(2, 4, 2), batch()
    xq, yq = xq[:, :0], yq[:, :0].clone().requires_grad_()
    wq = torch.ones(3, 0, dtype=torch.float64, requires_grad=True)
    data = (x, y, xq, yq)
    by = [*net.parameters(), yq, wq]
    if form == "list":
        data, wq = tuple(list(v) for v in data), list(wq)
    for backend in BACKENDS:
        module = MAML(net, loss="mse", lr=0.1, steps=2, backend=backend)
        out = module(*data, query_weights=wq, step_weights=[0.5, 0.5])
        assert out.loss == 0 and not out.task_losses.any() and not out.step_losses.any()
        for loss in (out.loss, out.task_losses.sum(), out.step_losses.sum()):
            assert not any(g.any() for g in gradients(loss, *by))
