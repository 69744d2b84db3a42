"""pymeta.explain.influence, against finite differences and retraining without a row."""

import numpy as np
import pytest
import torch
from explain_help import SIZES, adapted
from helpers import assert_close, batch, mlp
from torch import nn

import pymeta
from pymeta.explain import influence


def predictions(maml, xs, ys, xq, weights):
    return maml.adapt(xs, ys, support_weights=weights)(xq)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_it_is_the_slope_of_predictions_by_weights(backend):
    maml, _, xs, ys, xq = adapted(backend=backend)
    weights = torch.rand(4, 8).double() + 0.5
    found = influence(maml, xs, ys, xq, weights=weights, output=1)
    assert found.shape == (4, 6, 8)
    step = 1e-5
    for s in range(8):
        bump = torch.zeros_like(weights)
        bump[:, s] = step
        up, down = (
            predictions(maml, xs, ys, xq, w)[..., 1] for w in (weights + bump, weights - bump)
        )
        slope = (up - down) / (2 * step)
        # the error of a central difference is of order step^2, that of rounding of eps / step
        assert np.abs(found[:, :, s] - slope.numpy()).max() < 1e-9
    assert np.abs(found).max() > 1e-3


class Doubled(nn.Linear):
    """A layer that the native core lacks."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.filterwarnings("ignore:pymeta runs")
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rows", [3.0, pymeta.LearnableAnchor(3.0)])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_rows_of_no_weight_do_not_count_for_anchor_rows(native, rows, loss):
    net = mlp(5, 7, 3) if native else nn.Sequential(Doubled(5, 3)).double()
    backend = "native" if native else "torch"
    maml = pymeta.MAML(net, loss=loss, lr=0.1, steps=3, anchor_rows=rows, backend=backend)
    xs, ys, xq, _ = batch(tasks=4, support=8, query=6, inputs=5, out=3)
    if loss == "cross_entropy":
        ys = ys.argmax(-1)
        ys[:, 4] = -100
    weights = torch.rand(4, 8).double() + 0.5
    weights[:, :3] = 0
    found = influence(maml, xs, ys, xq, weights=weights, output=1)
    kept = influence(maml, xs[:, 3:], ys[:, 3:], xq, weights=weights[:, 3:], output=1)
    assert np.abs(kept).max() > 1e-3
    assert_close(torch.from_numpy(found[..., 3:]), torch.from_numpy(kept))


@pytest.mark.parametrize("optimizer", [pymeta.SGD(0.1, momentum=0.9), pymeta.Adam(0.05)])
def test_backends_and_learners_agree(optimizer):
    net = mlp(5, 7, 2)
    xs, ys, xq, _ = batch(tasks=4, support=8, query=6, inputs=5)
    options = {"loss": "mse", "optimizer": optimizer}
    maml = pymeta.MAML(net, steps=3, **options, backend="native")
    wanted = influence(pymeta.MAML(net, steps=3, **options, backend="torch"), xs, ys, xq)
    for learner in (
        maml,
        maml.adapter(),
        pymeta.Reptile(net, steps=3, **options),
        pymeta.FineTune(net, epochs=3, **options),
    ):
        assert_close(torch.from_numpy(influence(learner, xs, ys, xq)), torch.from_numpy(wanted))


def test_ragged_tasks_are_those_of_single_ones():
    maml, _, xs, ys, xq = adapted("cross_entropy", 3)
    xs, ys, xq = ([v[:n] for v, n in zip(vs, SIZES, strict=True)] for vs in (xs, ys, xq))
    found = influence(maml, xs, ys, xq)
    assert [f.shape for f in found] == [(n, n) for n in SIZES]
    for t, own in enumerate(found):
        alone = influence(maml, xs[t][None], ys[t][None], xq[t][None])[0]
        assert_close(torch.from_numpy(own), torch.from_numpy(alone))


def test_a_weighted_means_influences_add_up_to_nothing():
    maml, _, xs, ys, xq = adapted()
    weights = torch.rand(4, 8).double()
    weights[:, 0] = 0
    found = influence(maml, xs, ys, xq, weights=weights)
    total = (found * weights.numpy()[:, None]).sum(2)
    assert np.abs(total).max() < 1e-13 and np.abs(found[:, :, 0]).min() > 1e-9


def test_class_weights_count():
    net = mlp(5, 7, 3)
    xs, ys, xq, _ = batch("cross_entropy", tasks=2, support=9, query=2, inputs=5, out=3)
    weighted = {"loss": "cross_entropy", "lr": 0.1}
    tuned = pymeta.FineTune(net, epochs=2, class_weights=[1.0, 2.0, 5.0], **weighted)
    found = influence(tuned, xs, ys, xq, output=0)
    factors = torch.tensor([1.0, 2.0, 5.0]).double()[ys]
    maml = pymeta.MAML(net, steps=2, **weighted, backend="native")
    by_rows = influence(maml, xs, ys, xq, weights=factors, output=0) * factors.numpy()[:, None]
    assert_close(torch.from_numpy(found), torch.from_numpy(by_rows))


def test_it_tells_what_leaving_a_row_out_does():
    """Retrained without each row in turn: nearly the same amounts."""
    torch.manual_seed(0)
    net = mlp(3, 8, 1)
    maml = pymeta.MAML(net, loss="mse", lr=0.1, steps=5, backend="native")
    xs, ys, xq, _ = batch(tasks=3, support=40, query=4, inputs=3, out=1)
    found = influence(maml, xs, ys, xq)
    whole = maml.adapt(xs, ys)(xq)[..., 0].numpy()
    keep = [[i for i in range(40) if i != s] for s in range(40)]
    without = np.stack(
        [maml.adapt(xs[:, k], ys[:, k])(xq)[..., 0].numpy() for k in keep], -1
    )  # [3, 4, 40]
    moved = whole[..., None] - without
    for f, m in zip(found.reshape(-1, 40), moved.reshape(-1, 40), strict=True):
        assert np.corrcoef(f, m)[0, 1] > 0.99
    assert np.abs(found - moved).max() < 0.2 * np.abs(moved).max()


def test_a_module_that_is_no_chain():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain, self.b = mlp(5, 7, 2), nn.Parameter(torch.zeros(2).double())

        def forward(self, x):
            return self.chain(x) + self.b.sin()

    with pytest.warns(UserWarning, match="runs in torch"):
        maml = pymeta.MAML(Sum(), loss="mse", lr=0.1, steps=2)
        xs, ys, xq, _ = batch(tasks=2, support=4, query=3, inputs=5)
        found = influence(maml, xs, ys, xq)
        weights = [torch.ones(4).double()] * 2
        lists = influence(maml, list(xs), list(ys), list(xq), weights=weights)
    plain = pymeta.MAML(Sum(), loss="mse", lr=0.1, steps=2, backend="torch")
    plain.load_state_dict(maml.state_dict())
    assert found.shape == (2, 3, 4) and np.abs(found).max() > 1e-4
    assert_close(torch.from_numpy(np.stack(lists)), torch.from_numpy(found))


def test_wrong_arguments_are_refused_by_name():
    maml, _, xs, ys, xq = adapted()
    small = pymeta.Reptile(maml.model, loss="mse", lr=0.1, steps=2, batch_size=2)
    for kind, message, call in [
        (TypeError, "learner: expected", lambda: influence(maml.model, xs, ys, xq)),
        (ValueError, "batch_size=2", lambda: influence(small, xs, ys, xq)),
        (ValueError, "xq: expected 4 tasks", lambda: influence(maml, xs, ys, xq[:2])),
        (ValueError, "output", lambda: influence(maml, xs, ys, xq, output=5)),
        (ValueError, "weights", lambda: influence(maml, xs, ys, xq, weights=xs)),
        (
            ValueError,
            "not for each target",
            lambda: influence(maml, xs, ys, xq, weights=torch.ones_like(ys)),
        ),
    ]:
        with pytest.raises(kind, match=message):
            call()
    torch_only = pymeta.Reptile(
        nn.Sequential(nn.Linear(5, 2), nn.Hardtanh()).double(),
        loss=lambda o, y: (o - y).square().mean(), lr=0.1, steps=1, backend="torch",
    )  # fmt: skip
    with pytest.raises(ValueError, match="learner: "):
        influence(torch_only, xs, ys, xq)
