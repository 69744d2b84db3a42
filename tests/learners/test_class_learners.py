"""ProtoNet, MatchingNet, RelationNet: their papers' equations task by task, and all forms alike."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close
from torch import nn

from pymeta.data import Ragged
from pymeta.learners import MatchingNet, ProtoNet, RelationNet

F64 = torch.float64
KINDS = ["euclidean", "cosine", "matching", "context", "relation", "relation classes"]
LABELS = [[0, 1, 2, 0], [1, 0], [2, 2, 1, 0, 1, 0, 2], [0, 1, 1]]  # two of the tasks have no 2
ASKED = [[2, 0, 1], [1], [0, 1, 2, 2, 1], [0, 1]]


def encoder():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))


def make(kind: str, net: nn.Module | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    net = encoder() if net is None else net
    if kind in ("euclidean", "cosine"):
        learner = ProtoNet(net, distance=kind, temperature=0.7, **options)
    elif kind in ("matching", "context"):
        options = {"learn_temperature": True, "reads": 3, **options}
        learner = MatchingNet(net, context=4 if kind == "context" else None, temperature=0.3,
                              **options)  # fmt: skip
    else:
        judge = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
        loss = "mse" if kind == "relation" else "cross_entropy"
        learner = RelationNet(net, judge, loss=loss, **options)
    return learner.to(F64)


def lists(labels=LABELS, seed=1):
    torch.manual_seed(seed)
    return ([torch.randn(len(y), 3, dtype=F64) for y in labels],
            [torch.tensor(y, dtype=torch.int64) for y in labels])  # fmt: skip


# ---- the equations, one row at a time ------------------------------------------------------------


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


def prototype_logits(learner, s, y, w, q, classes):
    t = learner.log_temperature.exp()
    for k in range(classes):
        members = [i for i in range(len(y)) if y[i] == k]
        if not members:
            yield torch.tensor(-math.inf, dtype=F64)
            continue
        mean = sum(w[i] * s[i] for i in members) / sum(w[i] for i in members)
        alike = cosine(q, mean) if learner.distance == "cosine" else -(q - mean).square().sum()
        yield alike / t


def in_context(learner, s):
    """The support's features by a bidirectional LSTM, cell by cell."""
    out = list(s)
    for suffix, order in (("", range(len(s))), ("_reverse", reversed(range(len(s))))):
        cell = nn.LSTMCell(4, 4).to(F64)
        parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        cell.load_state_dict({n: getattr(learner.writer, f"{n}_l0{suffix}") for n in parts})
        h = c = torch.zeros(1, 4, dtype=F64)
        for i in order:
            h, c = cell(s[i][None], (h, c))
            out[i] = out[i] + h[0]
    return out


def read(learner, q, g, w):
    """The query's features after so many reads."""
    h = c = r = torch.zeros(1, 4, dtype=F64)
    for _ in range(learner.reads):
        h, c = learner.reader(torch.cat([q[None], r], 1), (h, c))
        h = h + q
        a = torch.stack([w[i] * (h[0] @ g[i]).exp() for i in range(len(g))])
        r = (a / a.sum() @ torch.stack(g))[None]
    return h[0]


def matching_logits(learner, s, y, w, q, classes):
    t = learner.log_temperature.exp()
    g = in_context(learner, s) if learner.context else list(s)
    q = read(learner, q, g, w) if learner.context else q
    a = torch.stack([w[i] * (cosine(q, g[i]) / t).exp() for i in range(len(g))])
    for k in range(classes):
        yield (
            sum((a[i] for i in range(len(g)) if y[i] == k), torch.zeros((), dtype=F64))
            .div(a.sum())
            .log()
        )


def relation_logits(learner, s, y, w, q, classes):
    for k in range(classes):
        members = [i for i in range(len(y)) if y[i] == k]
        if not members:
            yield torch.tensor(-math.inf, dtype=F64)
            continue
        total = sum(w[i] * s[i] for i in members)
        total = total / sum(w[i] for i in members) if learner.average else total
        yield learner.relation(torch.cat([total, q])[None])[0, 0]


def by_hand(learner, xs, ys, ws, xq, classes=3):
    rule = {ProtoNet: prototype_logits, MatchingNet: matching_logits, RelationNet: relation_logits}
    out = []
    for x, y, w, q in zip(xs, ys, ws, xq, strict=True):
        s, f = learner.encoder(x), learner.encoder(q)
        rows = [torch.stack(list(rule[type(learner)](learner, s, y, w, row, classes))) for row in f]
        out.append(torch.stack(rows))
    return out


@pytest.mark.parametrize("kind", [*KINDS, "average"])
@pytest.mark.parametrize("weighted", [False, True])
def test_they_are_their_equations(kind, weighted):
    learner = make("relation", average=True) if kind == "average" else make(kind)
    xs, ys = lists()
    xq, yq = lists(ASKED, seed=2)
    ws = [torch.rand(len(y), dtype=F64) + 0.2 if weighted else torch.ones(len(y), dtype=F64)
          for y in ys]  # fmt: skip
    options = {"support_weights": ws} if weighted else {}
    out = learner(xs, ys, xq, yq, **options)
    wanted = by_hand(learner, xs, ys, ws, xq)
    for t, (got, right) in enumerate(zip(out.predictions, wanted, strict=True)):
        assert torch.equal(got.isinf(), right.isinf())
        assert torch.allclose(got, right, rtol=0, atol=1e-10)
        if kind in ("relation", "average"):
            one = nn.functional.one_hot(yq[t], 3).to(F64)
            there = right[0].isfinite()  # the task's classes
            loss = (right.sigmoid() - one)[:, there].square().mean()
        else:
            loss = nn.functional.cross_entropy(right, yq[t])
        assert torch.allclose(out.task_losses[t], loss, rtol=0, atol=1e-10)


def test_one_shot_is_the_nearest_neighbour():
    for kind in ("euclidean", "cosine", "matching"):
        learner = make(kind)
        torch.manual_seed(4)
        xs, xq = torch.randn(6, 5, 3, dtype=F64), torch.randn(6, 9, 3, dtype=F64)
        ys = torch.stack([torch.randperm(5) for _ in range(6)])
        found = learner.adapt(xs, ys)(xq).argmax(-1)
        s, q = learner.encoder(xs), learner.encoder(xq)
        if kind != "euclidean":
            s, q = (nn.functional.normalize(v, dim=-1) for v in (s, q))
        nearest = torch.cdist(q, s).argmin(-1)
        assert torch.equal(found, ys.gather(1, nearest))


def test_distances_do_not_depend_on_where_zero_is():
    """Features near 10,000, as numbers that nobody has scaled; their squares round by 8."""
    torch.manual_seed(4)
    x, y = torch.randn(3, 12, 4), torch.arange(3).repeat(3, 4)
    y[0] = y[0].clamp(max=1)  # a class that is not there
    far = (x + 10_000).requires_grad_()  # rounded here, once
    learner = ProtoNet(nn.Identity(), ways=3)
    out = learner(far, y, far, y)
    out.loss.backward()
    exact = far.detach().double().requires_grad_()
    wanted = learner.double()(exact, y, exact, y)
    wanted.loss.backward()
    kept = wanted.predictions.isfinite()
    assert (out.predictions.double() - wanted.predictions)[kept].abs().max() < 0.05
    assert (far.grad.double() - exact.grad).abs().max() < 0.01
    assert 0 < wanted.loss < 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ways", [None, 7])
def test_a_task_of_fewer_classes_is_what_it_is_alone(kind, ways):
    learner = make(kind)
    torch.manual_seed(4)
    labels = [torch.tensor([0, 1, 0]), torch.arange(5), torch.zeros(2, dtype=torch.int64)]
    xs = [torch.randn(len(y), 3, dtype=F64) for y in labels]
    alone = [learner(x[None], y[None], x[None], y[None]) for x, y in zip(xs, labels, strict=True)]
    learner.ways = ways
    beside = learner(xs, labels, xs, labels)
    assert_close(beside.task_losses, torch.cat([out.task_losses for out in alone]))
    for out, got, y in zip(alone, beside.predictions, labels, strict=True):
        classes = int(y.max()) + 1
        assert_close(got[:, :classes], out.predictions[0])
        assert (got[:, classes:] == -math.inf).all()


# ---- gradients and forms ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind):
    learner = make(kind)
    xs, ys = lists()
    xq, yq = lists(ASKED, seed=2)
    sizes = [len(y) for y in ys]
    values = torch.cat(xs).requires_grad_()
    ws = [torch.rand(n, dtype=F64) + 0.1 for n in sizes]

    def loss():
        return learner(Ragged(values, sizes), ys, xq, yq, support_weights=ws).loss

    loss().backward()
    torch.manual_seed(2)
    for name, p in [*learner.named_parameters(), ("xs", values)]:
        direction = torch.randn(p.shape, dtype=F64)
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-5 * direction
                found.append(loss().item())
                p -= sign * 1e-5 * direction
        slope = (p.grad * direction).sum().item()
        difference = (found[0] - found[1]) / 2e-5
        # the differences' own error: 1e-10 of third derivatives, and 1e-16 / 1e-5 of rounding
        assert abs(slope - difference) < 1e-7 + 1e-6 * abs(slope), (name, slope, difference)


def padded(values, rows, fill):
    out = values[0].new_full((len(values), rows, *values[0].shape[1:]), fill)
    for t, v in enumerate(values):
        out[t, : len(v)] = v
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_is_padded_is_one_by_one(kind):
    learner = make(kind, ways=3)
    xs, ys = lists()
    xq, yq = lists(ASKED, seed=2)
    sizes, asked = ([len(y) for y in side] for side in (ys, yq))
    ws = [torch.rand(n, dtype=F64) + 0.1 for n in sizes]
    wanted = learner(xs, ys, xq, yq, support_weights=ws)
    form = learner(
        padded(xs, 7, 9), padded(ys, 7, 1), padded(xq, 5, 9), padded(yq, 5, 1),
        support_sizes=sizes, query_sizes=asked, support_weights=padded(ws, 7, 5),
    )  # fmt: skip
    assert_close(form.task_losses, wanted.task_losses)
    packed = learner(Ragged(torch.cat(xs), sizes), Ragged(torch.cat(ys), sizes),
                     Ragged(torch.cat(xq), asked), support_weights=ws)  # fmt: skip
    models = learner.adapt(xs, ys, support_weights=ws)
    for t, n in enumerate(asked):
        right = wanted.predictions[t].exp()  # probabilities, or what is finite
        own = (v[t][None] for v in (xs, ys, xq, yq))
        one = learner(*own, support_weights=ws[t][None])
        assert_close(one.loss, wanted.task_losses[t])
        for got in (one.predictions[0], form.predictions[t, :n], packed.predictions[t],
                    models(xq)[t], models[t](xq[t][None])[0]):  # fmt: skip
            assert_close(got.exp(), right)
    probabilities = models.predict_proba(xq)
    assert all(torch.allclose(p.sum(-1), torch.ones((), dtype=F64)) for p in probabilities)
    assert [p.argmax(-1).tolist() for p in probabilities] == [
        p.argmax(-1).tolist() for p in wanted.predictions
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_weight_zero_is_absence(kind):
    learner = make(kind)
    xs, ys = lists()
    xq, yq = lists(ASKED, seed=2)
    plain = learner(xs, ys, xq, yq)
    nan = torch.full((1, 3), math.nan, dtype=F64)
    more = [torch.cat([x[:1], nan, x[1:]]) for x in xs]  # in the middle: a context has an order
    labels = [torch.cat([y[:1], y[:1], y[1:]]) for y in ys]
    ws = [torch.ones(len(y), dtype=F64) for y in labels]
    for w in ws:
        w[1] = 0
    got = learner(more, labels, xq, yq, support_weights=ws)
    assert_close(got.task_losses, plain.task_losses)
    got.loss.backward()
    assert all(p.grad.isfinite().all() for p in learner.parameters() if p.grad is not None)


def test_maps_of_features():
    """A convolutional encoder's maps go into the relation as maps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU())
    judge = nn.Sequential(nn.Conv2d(6, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    learner = RelationNet(net, judge).to(F64)
    xs, ys = torch.randn(2, 4, 1, 4, 4, dtype=F64), torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    out = learner(xs, ys, xs[:, :2], ys[:, :2])
    features = net(xs[1])
    total = features[2] + features[3]
    wanted = judge(torch.cat([total, features[0]])[None])[0, 0]
    assert torch.allclose(out.predictions[1, 0, 0], wanted, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"encoder: expected features of shape \[6, d\]"):
        ProtoNet(net).to(F64)(xs[:1], ys[:1], xs[:1, :2], ys[:1, :2])


@pytest.mark.parametrize("kind", KINDS)
def test_training_tells_classes_apart(kind):
    learner = make(kind)
    torch.manual_seed(5)
    adam = torch.optim.Adam(learner.parameters(), 0.03)

    def batch():
        centres = torch.randn(8, 3, 3, dtype=F64)
        y = torch.arange(3).repeat(8, 4)
        x = centres.gather(1, y.unsqueeze(-1).expand(-1, -1, 3)) + 0.3 * torch.randn(
            8, 12, 3, dtype=F64
        )
        return x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]

    losses = []
    for _ in range(80):
        adam.zero_grad()
        out = learner(*batch())
        out.loss.backward()
        adam.step()
        losses.append(out.loss.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    x, y, xq, yq = batch()
    assert (learner.adapt(x, y)(xq).argmax(-1) == yq).double().mean() > 0.5


def test_no_work_grows_with_the_number_of_tasks_in_python():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    for kind in ("euclidean", "cosine", "matching", "relation"):
        learner = make(kind)
        counts = []
        for tasks in (2, 2, 200):  # the first call may make more
            labels = [[0, 1, 2, 0, 1], [2, 1, 0]] * (tasks // 2)
            xs, ys = lists(labels)
            sizes = [len(y) for y in labels]
            x, y = Ragged(torch.cat(xs), sizes), Ragged(torch.cat(ys), sizes)
            with Count() as count:
                learner(x, y, x, y).loss.backward()
            counts.append(count.calls)
        assert counts[1] == counts[2]


# ---- what is refused ----------------------------------------------------------------------------


def test_calls_that_are_refused():
    learner = make("euclidean")
    xs, ys = lists()
    xq, yq = lists(ASKED, seed=2)
    with pytest.raises(ValueError, match="yq: task 1: label 2 has no support rows there"):
        learner(xs, ys, xq, [y * 0 + 2 for y in yq])
    with pytest.raises(ValueError, match="xs: task 2 has no rows that count"):
        weights = [torch.ones(len(y)) for y in ys]
        weights[2][:] = 0
        learner(xs, ys, xq, support_weights=weights)
    with pytest.raises(ValueError, match=r"label 2 is not in 0\.\.1"):
        make("euclidean", ways=2)(xs, ys, xq)
    with pytest.raises(ValueError, match="ys: expected class indices, got shares of classes"):
        learner(xs, [torch.full((len(y), 3), 1 / 3, dtype=F64) for y in ys], xq)
    with pytest.raises(ValueError, match="ys: expected class indices >= 0, got -1"):
        learner(xs, [y - 1 for y in ys], xq)


@pytest.mark.parametrize(
    ("make_it", "error", "says"),
    [
        (lambda: ProtoNet(encoder(), distance="l1"), ValueError, "distance: expected 'euclidean'"),
        (lambda: ProtoNet(encoder(), temperature=0), ValueError, "temperature: expected a number"),
        (lambda: ProtoNet(encoder(), ways=0), ValueError, "ways: expected a whole number >= 1"),
        (lambda: ProtoNet("net"), TypeError, "encoder: expected a torch"),
        (lambda: MatchingNet(encoder(), context=0), ValueError, "context: expected a whole number"),
        (lambda: MatchingNet(encoder(), reads=0), ValueError, "reads: expected a whole number"),
        (lambda: RelationNet(encoder(), None), TypeError, "relation: expected a torch"),
        (lambda: RelationNet(encoder(), encoder(), loss="l1"), ValueError, "loss: expected 'mse'"),
    ],
)
def test_constructors(make_it, error, says):
    with pytest.raises(error, match=says):
        make_it()


def test_modules_of_other_widths_are_refused():
    xs, ys = lists()
    with pytest.raises(ValueError, match="encoder: expected 5 features, got 4"):
        MatchingNet(encoder(), context=5).to(F64)(xs, ys, xs)
    with pytest.raises(ValueError, match=r"relation: expected scores of shape \[48, 1\]"):
        RelationNet(encoder(), nn.Linear(8, 2)).to(F64)(xs, ys, xs)


@pytest.mark.parametrize(
    ("judge", "features"),
    [
        (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), encoder()),  # 4, not 2 * 4
        (nn.Conv2d(8, 1, 3), encoder()),  # of maps, where there are none
        (nn.Linear(8, 1), nn.Sequential(encoder(), nn.Unflatten(1, (4, 1, 1)))),  # the reverse
    ],
)
def test_a_judge_that_does_not_fit_the_encoder_is_refused(judge, features):
    learner = RelationNet(features, judge).to(F64)
    xs, ys = lists()
    message = (
        r"relation: expected a network of inputs \[pairs, 8.*4 features of a class.*failed with"
    )
    with pytest.raises(ValueError, match=message):
        learner(xs, ys, xs, ys)
    with pytest.raises(ValueError, match=message):
        learner.adapt(xs, ys)(xs)
