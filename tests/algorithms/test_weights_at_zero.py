"""Rows of weight 0 whose weight requires grad: they stand beside the rows that count.

No result depends on whether weights require grad. The gradient by a weight of 0 is that of the
row's own loss, normalised by the rows that count; `rows_of` draws sets with such rows, some of
which hold what is not finite.
"""

import numpy as np
import pytest
import torch
from helpers import assert_close
from kernels import CPU_PATHS, PATHS, using
from torch import nn

import pymeta
from pymeta import functional, native
from pymeta.learners import EncodedMAML
from pymeta.nn import PerStepBatchNorm

TASKS, SUPPORT, QUERY = 5, 7, 6
BACKENDS = [("torch", None), *(("native", path) for path in PATHS)]
FEW = [("torch", None), *(("native", (native.isa(), e)) for e in ("rows", "lanes"))]
FEW += [("native", (native.isa(), "emulated"))] * native.emulates()


def name_of(value) -> str:
    return "-".join(value) if isinstance(value, tuple) else str(value)


def on(path):
    """A path, of emulated blocks with a thread each; None: whatever runs."""
    return using(*(path or ()), threads=1 if path and path[1] == "emulated" else None)


def dense(norm: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(3)
    between = [] if norm is None else [norm]
    return nn.Sequential(nn.Linear(3, 8), *between, nn.Tanh(), nn.Linear(8, 2)).double()


def images() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 2),
    ).double()  # fmt: skip


def rows_of(shape=(3,), columns=2, holes=True, labels=False, by_target=False):
    """xs, ys, xq, yq, support and query weights; rows 1 and 4 and more weigh nothing."""
    g = torch.Generator().manual_seed(1)
    xs, xq = (torch.randn(TASKS, n, *shape, generator=g).double() for n in (SUPPORT, QUERY))
    if labels:
        ys, yq = (torch.randint(0, columns, (TASKS, n), generator=g) for n in (SUPPORT, QUERY))
    else:
        ys, yq = (torch.randn(TASKS, n, columns, generator=g).double() for n in (SUPPORT, QUERY))
    each = (columns,) if by_target else ()
    ws, wq = (torch.rand(TASKS, n, *each, generator=g).double() + 0.2 for n in (SUPPORT, QUERY))
    ws[:, [1, 4]], wq[:, 0], wq[1, 5], ws[2, 0] = 0.0, 0.0, 0.0, 0.0
    if holes:
        xs[0, 1], xs[1, 4, ..., 0], xq[1, 5] = torch.nan, torch.inf, torch.nan
        if not labels:
            ys[2, 0, 0] = torch.nan
    return xs, ys, xq, yq, ws, wq


def call(module, data, requires, options=None):
    """The outcome, and gradients by parameters, xs, and weights where these require it."""
    xs, ys, xq, yq, ws, wq = (v.clone() for v in data)
    leaves = [xs.requires_grad_(), xq.requires_grad_()]
    if requires:
        leaves += [ws.requires_grad_(), wq.requires_grad_()]
    else:
        wq = wq.detach()
    weights = {"support_weights": ws}
    if getattr(module, "query_statistics", "own") == "own":
        weights["query_weights"] = wq
    out = module(xs, ys, xq, yq, **weights, **(options or {}))
    by = [*module.parameters(), *leaves]
    found = torch.autograd.grad(out.loss, by, allow_unused=True, materialize_grads=True)
    n = len(by) - 2 * requires
    return out, found[:n], found[n:]


# ---- the oracle ---------------------------------------------------------------------------------


def eager(net, data, lr, steps):
    """The losses of the tasks by a loop of autograd, batch statistics of what weighs something."""
    norm = net[1]
    names, values = zip(*net.named_parameters(), strict=True)

    def outputs(p, x, counts):
        h = x @ p["0.weight"].T + p["0.bias"]
        mean, variance = h[counts].mean(0), h[counts].var(0, unbiased=False)
        h = (h - mean) / (variance + norm.eps).sqrt() * p["1.weight"] + p["1.bias"]
        return h.tanh() @ p["3.weight"].T + p["3.bias"]

    def loss(p, x, y, w):
        value = (outputs(p, x, w.detach() != 0) - y).square().mean(1)
        return (w * value).sum() / w.sum()

    losses = []
    for xs, ys, xq, yq, ws, wq in zip(*data, strict=True):
        theta = list(values)
        for _ in range(steps):
            support = loss(dict(zip(names, theta, strict=True)), xs, ys, ws)
            grads = torch.autograd.grad(support, theta, create_graph=True)
            theta = [p - lr * g for p, g in zip(theta, grads, strict=True)]
        losses.append(loss(dict(zip(names, theta, strict=True)), xq, yq, wq))
    return torch.stack(losses)


@pytest.mark.parametrize(("backend", "path"), BACKENDS, ids=name_of)
def test_it_is_a_loop_of_autograd(backend, path):
    net = dense(nn.BatchNorm1d(8, track_running_stats=False))
    data = rows_of(holes=False)
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend=backend)
    with using(*(path or ())):
        out, *found = call(module, data, True)
    leaves = [v.clone().requires_grad_() for v in data]
    wanted = eager(net, leaves, 0.1, 2)
    by = [*net.parameters(), leaves[0], leaves[2], *leaves[4:]]
    assert_close(out.task_losses, wanted)
    assert_close([g for part in found for g in part], torch.autograd.grad(wanted.mean(), by))
    by_weights = found[1]
    assert all((g[w == 0] != 0).all() for g, w in zip(by_weights, data[4:], strict=True))


@pytest.mark.parametrize(("backend", "path"), FEW, ids=name_of)
def test_without_normalisation_it_is_the_slope_to_the_right(backend, path):
    net, data, step = dense(), rows_of(holes=False), 1e-6
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2, backend=backend)
    with on(path):
        out, _, (by_support, by_query) = call(module, data, True)
        for side, grad in ((4, by_support), (5, by_query)):
            moved = list(data)
            moved[side] = data[side].clone()
            moved[side][3, (1, 0)[side - 4]] += step
            slope = (call(module, moved, False)[0].loss - out.loss) / step
            assert abs(float(slope - grad[3, (1, 0)[side - 4]])) <= 1e-4 * float(abs(slope))


# ---- nothing else depends on it -----------------------------------------------------------------

NETWORKS = {
    "plain": lambda: dense(),
    "batch norm": lambda: dense(nn.BatchNorm1d(8)),
    "of each step": lambda: dense(PerStepBatchNorm(8, steps=2)),
    "images": images,
}
OPTIONS = {
    "as it is": ({}, {}),
    "momentum": ({"optimizer": pymeta.SGD(0.1, momentum=0.9)}, {}),
    "a loss after each step": ({}, {"step_weights": [0.4, 0.6]}),
    "by support": ({"query_statistics": "support"}, {}),
    "padded": ({}, {"support_sizes": [7, 6, 7, 5, 7], "query_sizes": [6, 6, 5, 4, 6]}),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("backend", "path"), FEW, ids=name_of)
def test_no_result_depends_on_whether_weights_require_grad(backend, path, network, options):
    data = rows_of((1, 4, 4) if network == "images" else (3,))
    if options == "by support":  # which has no weights of query rows
        data[2].nan_to_num_()
    if path and path[1] == "emulated" and options not in ("as it is", "by support"):
        pytest.skip("emulated blocks take their time")
    of_learner, of_call = OPTIONS[options]
    found, statistics = [], []
    for requires in (False, True):
        net = NETWORKS[network]()
        how = {"lr": 0.1} if "optimizer" not in of_learner else {}
        module = pymeta.MAML(net, loss="mse", steps=2, backend=backend, **how, **of_learner)
        with on(path):
            found.append(call(module, data, requires, of_call))
        statistics.append([b.double() for b in net.buffers()])
    (plain, plain_grads, _), (out, grads, by_weights) = found
    assert_close(out.task_losses, plain.task_losses)
    known = ~plain.predictions.isnan()
    assert torch.equal(known, ~out.predictions.isnan())
    assert known.sum() >= known.numel() - 2  # one row is of no numbers
    assert_close(out.predictions[known], plain.predictions[known])
    assert_close(grads, plain_grads)
    if statistics[0]:
        assert_close(*statistics)
    assert all(g.isfinite().all() for g in by_weights)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("by_target", [False, True])
@pytest.mark.parametrize("path", CPU_PATHS + PATHS[len(CPU_PATHS) :], ids="-".join)
def test_backends_agree(path, network, by_target):
    """Gradients by weights of predictions and losses too; 0 where a row is not finite."""
    data = rows_of((1, 4, 4) if network == "images" else (3,), by_target=by_target)
    flow = torch.randn(TASKS, QUERY, 2, generator=torch.Generator().manual_seed(5)).double()
    flow[1, 5] = 0.0  # whose prediction is no number
    found = []
    for backend in ("torch", "native"):
        module = pymeta.MAML(NETWORKS[network](), loss="mse", lr=0.1, steps=2, backend=backend)
        ws, wq = (w.clone().requires_grad_() for w in data[4:])
        with on(path):
            out = module(*data[:4], support_weights=ws, query_weights=wq)
            total = (out.predictions.nan_to_num() * flow).sum() + out.task_losses.sum()
            found.append(torch.autograd.grad(total, [*module.parameters(), ws, wq]))
    assert_close(*found)
    by_support, by_query = found[1][-2:]
    assert not by_support[0, 1].any() and not by_support[1, 4].any() and not by_query[1, 5].any()
    assert by_support[3, 1].any() and by_query[0, 0].any()


@pytest.mark.parametrize(("backend", "path"), FEW, ids=name_of)
def test_labels(backend, path):
    """Ignored ones, and weights of classes; a wrong one beside those that count is refused."""
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5]), ignore_index=-7)
    data = rows_of(labels=True)
    for y in (data[1], data[3]):
        y[:, 2] = -7
    module = pymeta.MAML(dense(nn.BatchNorm1d(8)), loss=loss, lr=0.1, steps=2, backend=backend)
    with on(path):
        (plain, wanted, _), (out, grads, (by_support, by_query)) = (
            call(module, data, requires) for requires in (False, True)
        )
        assert_close([out.task_losses, *grads], [plain.task_losses, *wanted])
        assert not by_support[:, 2].any() and not by_query[:, 2].any()
        assert by_support[3, 1] != 0 and by_query[0, 0] != 0
        data[1][3, 1] = 9
        assert_close(call(module, data, False)[0].task_losses, plain.task_losses)
        if path is None or path[1] != "emulated":  # which looks at no value
            with pytest.raises(ValueError, match="ys: task 3, row 1: label 9"):
                call(module, data, True)


@pytest.mark.parametrize(("backend", "path"), FEW, ids=name_of)
def test_where_no_row_counts_nothing_has_a_gradient(backend, path):
    data = rows_of(holes=False)
    data[4][3], data[5][2] = 0.0, 0.0
    module = pymeta.MAML(dense(nn.BatchNorm1d(8)), loss="mse", lr=0.1, steps=2, backend=backend)
    with on(path):
        (plain, wanted, _), (out, grads, (by_support, by_query)) = (
            call(module, data, requires) for requires in (False, True)
        )
    assert_close([out.task_losses, *grads], [plain.task_losses, *wanted])
    assert out.task_losses[2] == 0 and not by_query[2].any() and not by_support[2].any()
    assert not by_support[3].any() and by_query[3].all()


@pytest.mark.parametrize(("backend", "path"), FEW, ids=name_of)
@pytest.mark.parametrize("requires", [False, True])
def test_one_row_that_counts_cannot_be_normalised(backend, path, requires):
    data = rows_of(holes=False)
    data[4][3, 1:] = 0.0
    module = pymeta.MAML(dense(nn.BatchNorm1d(8)), loss="mse", lr=0.1, steps=1, backend=backend)
    with on(path):
        if path is not None and path[1] == "emulated":
            losses = call(module, data, requires)[0].task_losses
            assert losses[3].isnan() and losses.isfinite().sum() == TASKS - 1
            return
        with pytest.raises(ValueError, match="xs: task 3 has one row that counts"):
            call(module, data, requires)


# ---- elsewhere ----------------------------------------------------------------------------------


class Attends(nn.Module):
    """Every row sees the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = self.first(x)
        return self.last((h @ h.T).softmax(-1) @ h)


def huber_of_rows(outputs, targets):
    return nn.functional.huber_loss(outputs, targets, reduction="none").mean(1)


def spread(outputs, targets):
    """One number for a set."""
    return (outputs - targets).square().mean() + outputs.std()


@pytest.mark.parametrize("loss", ["mse", huber_of_rows, spread])
def test_modules_and_losses_that_mix_rows(loss):
    """What runs in torch alone. A set's one number has no place for weights but 0 and 1."""
    torch.manual_seed(3)
    data = rows_of(holes=False)
    if loss is spread:
        data = (*data[:4], *(w.ceil().clamp(max=1) for w in data[4:]))
    module = pymeta.MAML(Attends().double(), loss=loss, lr=0.1, steps=2, backend="torch")
    (plain, wanted, _), (out, grads, by_weights) = (
        call(module, data, requires) for requires in (False, True)
    )
    assert_close([out.predictions, out.task_losses], [plain.predictions, plain.task_losses])
    assert_close(grads, wanted)
    assert by_weights[0][3, 1].any() == (loss is not spread)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_arrays_have_the_tensors_gradients(batch_norm):
    net, data = dense(nn.BatchNorm1d(8) if batch_norm else None), rows_of()
    operator = functional.Operator(net, loss="mse", steps=2, lr=0.1)
    by = ("support_weights", "query_weights", "parameters")
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    found = []
    for of in (lambda v: v, lambda v: np.ascontiguousarray(v.numpy())):
        *rows, ws, wq = (of(v) for v in data)
        own = {n: of(p) for n, p in parameters.items()}
        out = functional.meta_gradient(
            operator, own, *rows, support_weights=ws, query_weights=wq, wrt=by
        )
        values = [*out.input_gradients.values(), *out.gradients.values(), out.task_losses]
        found.append([torch.as_tensor(v) for v in values])
    assert_close(*found)
    module = pymeta.MAML(net, loss="mse", lr=0.1, steps=2)
    out, _, by_weights = call(module, data, True)
    assert_close(found[0][:2], by_weights)


def test_an_encoder_does_not_see_them():
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    learner = EncodedMAML(encoder, nn.Linear(4, 2).double(), loss="mse", lr=0.1, steps=2)
    data = rows_of(holes=False)
    (plain, wanted, _), (out, grads, by_weights) = (
        call(learner, data, requires) for requires in (False, True)
    )
    assert_close([out.task_losses, *grads], [plain.task_losses, *wanted])
    assert by_weights[0][3, 1] != 0 and by_weights[1][0, 0] != 0
