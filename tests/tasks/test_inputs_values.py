"""Values of inputs: task ids, labels, padding; rows under BatchNorm; models that do not fit."""

import numpy as np
import pytest
import torch
from helpers import assert_promised, batch, mlp
from inputs_help import OPTIONS, make
from torch import nn

import pymeta
from pymeta.tasks.task_set import check_task_ids

TASK_IDS = {
    "length": (ValueError, r"task_ids: expected shape \[3\], got \[2\]", [1, 2]),
    "negative": (ValueError, r"task_ids: expected integers >= 0, got -1", [0, -1, 2]),
    "large": (ValueError, r"task_ids: expected integers below 2\^63", [0, 2**63, 1]),
    "floats": (TypeError, r"task_ids: expected integers, got torch\.float32", torch.ones(3)),
    "type": (TypeError, r"task_ids: expected integers \[T\], got str", "abc"),
    "in it": (TypeError, r"task_ids: expected integers \[T\], got a float in it", [0, 1.0, 2]),
}


@pytest.mark.parametrize("case", TASK_IDS)
def test_task_ids(case):
    error, message, ids = TASK_IDS[case]
    with pytest.raises(error, match=message):
        check_task_ids(ids, 3)


def test_good_task_ids():
    assert check_task_ids(None, 3) is None
    for ids in (range(3), [0, 1, 2], np.arange(3, dtype=np.int32), torch.arange(3)):
        assert torch.equal(check_task_ids(ids, 3), torch.tensor([0, 1, 2]))


def with_label(task, row, label):
    at = torch.tensor(task), torch.tensor(row)
    return lambda y: y.index_put(at, torch.tensor(label))


CLASSES = {
    "float": (TypeError, r"ys: expected class indices.*got torch\.float64", lambda y: y.double()),
    "bool": (TypeError, r"ys: expected class indices.*got torch\.bool", lambda y: y.bool()),
    "axes": (ValueError, r"ys: .*shape \[tasks, rows\]", lambda y: y[..., None]),
    "big": (ValueError, r"ys: task 2, row 3: label 7 is not in 0\.\.2", with_label(2, 3, 7)),
    "negative": (ValueError, r"ys: task 0, row 4: label -1 is not in 0\.\.2", with_label(0, 4, -1)),
}


@pytest.mark.parametrize("case", CLASSES)
def test_class_labels(case, backend):
    error, message, change = CLASSES[case]
    xs, ys, xq, yq = batch("cross_entropy", out=3)
    with pytest.raises(error, match=message):
        make(backend, "cross_entropy")(xs, change(ys), xq, yq)


def test_a_wrong_label_in_a_list_is_found(backend):
    xs, ys, xq, yq = batch("cross_entropy", out=3)
    yq[2, 1] = 3
    data = ([xs[0], xs[1, :0], xs[2, :3]], [ys[0], ys[1, :0], ys[2, :3]])
    with pytest.raises(ValueError, match=r"yq: task 2, row 1: label 3 is not in 0\.\.2"):
        make(backend, "cross_entropy")(*data, xq, yq)
    ys[2, 0] = 5
    with pytest.raises(ValueError, match=r"ys: task 2, row 0: label 5 is not in 0\.\.2"):
        make(backend, "cross_entropy")(*data, xq, yq)


def test_padding_may_hold_anything(backend):
    xs, ys, xq, yq = batch("cross_entropy", out=3)
    module = make(backend, "cross_entropy")
    weights = torch.ones(3, 5)
    options = {"support_sizes": [3, 5, 0], "support_weights": weights}
    wanted = module(xs, ys, xq, yq, **options)
    xs[0, 3:] = float("nan")
    ys[0, 3:] = 99
    weights[0, 3:] = -1
    got = module(xs, ys, xq, yq, **options)
    assert_promised(got.task_losses, wanted.task_losses, backend)


def test_other_integers_are_labels_too(backend):
    xs, ys, xq, yq = batch("cross_entropy", out=3)
    module = make(backend, "cross_entropy")
    wanted = module(xs, ys, xq, yq).loss
    assert_promised(module(xs, ys.to(torch.uint8), xq, yq.int()).loss, wanted, backend)
    arrays = ys.numpy().astype(np.uint16), yq.numpy().astype(np.uint64)
    assert_promised(module(xs, arrays[0], xq, arrays[1]).loss, wanted, backend)


def test_ignored_labels_weigh_nothing(backend):
    xs, ys, xq, yq = batch("cross_entropy", out=3)
    module = make(backend, nn.CrossEntropyLoss(ignore_index=-1))
    ys[:, 3:] = -1
    got = module(xs, ys, xq, yq)
    wanted = module(xs[:, :3], ys[:, :3], xq, yq)
    torch.testing.assert_close(got.task_losses, wanted.task_losses)
    ys[0] = -1
    untouched = module.model(xq[0]).detach()
    torch.testing.assert_close(module(xs, ys, xq, yq).predictions[0], untouched)


def test_batch_norm_needs_two_rows(backend):
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    xs, ys, xq, yq = batch(out=3)
    module = make(backend, net=net)
    with pytest.raises(ValueError, match=r"xs.*task 1.*one row"):
        module(xs, ys, xq, yq, support_sizes=[2, 1, 3])
    with pytest.raises(ValueError, match=r"xq.*task 0.*one row"):
        module(xs, ys, xq[:, :1], yq[:, :1])
    with pytest.raises(ValueError, match=r"xs.*task 0.*one row"):
        module.adapt(xs[:, :1], ys[:, :1])
    assert module(xs, ys, xq, yq, support_sizes=[2, 0, 3]).loss.isfinite()


def test_one_row_is_enough_where_running_statistics_are_used(backend):
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    module = make(backend, net=net.eval())
    data = [v[:, :1] for v in batch(out=3)]
    assert module(*data).loss.isfinite()
    assert module.adapt(*data[:2])(data[2]).isfinite().all()
    module.train()
    with pytest.raises(ValueError, match=r"task 0.*one row"):
        module(*data)
    own = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, track_running_stats=False)).double()
    with pytest.raises(ValueError, match=r"task 0.*one row"):
        make(backend, net=own.eval())(*[v[:, :1] for v in batch(out=4)])


def test_parameters_on_two_devices():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"model: expected all parameters on one device.*meta"):
        pymeta.MAML(net, **OPTIONS)


def test_other_devices_and_dtypes_are_no_native_business():
    for net, message in (
        (nn.Linear(2, 2, device="meta"), "the parameters are on meta"),
        (nn.Linear(2, 2, dtype=torch.float16), "parameter weight is torch.float16"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "different dtypes"),
    ):
        with pytest.raises(ValueError, match=message):
            pymeta.MAML(net, backend="native", **OPTIONS)
    half = mlp(2, 4, 3, dtype=torch.bfloat16)
    module = pymeta.MAML(half, **OPTIONS)
    with pytest.warns(UserWarning, match="bfloat16"):
        out = module(*batch(out=3, dtype=torch.bfloat16))
    assert out.loss.dtype == torch.bfloat16


def test_more_feature_axes_run_in_torch():
    net = mlp(2, 4, 3)
    module = pymeta.MAML(net, **OPTIONS)
    xs, ys = torch.randn(2, 3, 5, 2).double(), torch.randn(2, 3, 5, 3).double()
    with pytest.warns(UserWarning, match="xs has more than one feature axis"):
        out = module(xs, ys, xs, ys)
    assert out.predictions.shape == (2, 3, 5, 3)


def test_a_model_whose_output_does_not_fit():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x).mean(0, keepdim=True)

    module = pymeta.MAML(Pooled().double(), backend="torch", **OPTIONS)
    with pytest.raises(ValueError, match=r"model: expected one output row for each of 5 input"):
        module(*batch(out=3))
    with pytest.raises(ValueError, match=r"outputs of shape \[5, 3\] do not fit targets of shape"):
        skip = nn.Sequential(nn.Linear(2, 3), nn.Softmax(-1)).double()
        pymeta.MAML(skip, backend="torch", **OPTIONS)(*batch(out=2))
