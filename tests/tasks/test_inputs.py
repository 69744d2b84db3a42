"""Wrong arguments: an error that names the argument, what was expected and what came, and no work
done; on both backends the same."""

import numpy as np
import pytest
import torch
from helpers import batch, mlp
from inputs_help import OPTIONS, make
from torch import nn

import pymeta

CONSTRUCTION = {
    "model": (TypeError, r"model: expected a torch\.nn\.Module, got str", {"model": "net"}),
    "loss name": (ValueError, r"loss: expected one of mse, .*got 'mae'", {"loss": "mae"}),
    "loss type": (TypeError, r"loss: expected one of mse, .*got int", {"loss": 3}),
    "loss class": (TypeError, r"loss: .*an instance, MSELoss\(...\), got", {"loss": nn.MSELoss}),
    "reduction": (ValueError, r'reduction="mean".*"sum"', {"loss": nn.MSELoss(reduction="sum")}),
    "class weights": (
        ValueError,
        r"loss: weight has 2 entries, but the model has 3 outputs",
        {"loss": nn.CrossEntropyLoss(weight=torch.ones(2))},
    ),
    "lr nan": (ValueError, r"lr: expected a finite number >= 0, got nan", {"lr": float("nan")}),
    "lr inf": (ValueError, r"lr: .*got inf", {"lr": float("inf")}),
    "lr negative": (ValueError, r"lr: .*got -0\.1", {"lr": -0.1}),
    "lr type": (
        TypeError,
        r"lr: expected a finite.*LearnableLR, got str",
        {"lr": "0.1"},
    ),
    "lr missing": (ValueError, r"lr, optimizer: .*got neither", {"lr": None}),
    "lr twice": (ValueError, r"lr, optimizer: .*got both", {"optimizer": pymeta.SGD(0.1)}),
    "optimizer": (
        TypeError,
        r"optimizer: expected pymeta\.SGD, pymeta\.Adam or pymeta\.RMSprop, got float",
        {"lr": None, "optimizer": 0.1},
    ),
    "optimizer by name": (
        TypeError,
        r"optimizer: expected pymeta\.SGD.*, got 'adam'",
        {"lr": None, "optimizer": "adam"},
    ),
    "optimizer of torch": (
        TypeError,
        r"optimizer: expected pymeta\.SGD.*, got the class torch\.optim\.Adam",
        {"lr": None, "optimizer": torch.optim.Adam},
    ),
    "optimizer of torch, made": (
        TypeError,
        r"optimizer: expected pymeta\.SGD.*, got torch\.optim\.SGD",
        {"lr": None, "optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)},
    ),
    "steps negative": (ValueError, r"steps: expected an integer >= 0, got -1", {"steps": -1}),
    "steps float": (TypeError, r"steps: .*got float", {"steps": 1.0}),
    "steps bool": (TypeError, r"steps: .*got bool", {"steps": True}),
    "first_order": (TypeError, r"first_order: expected a bool, got int", {"first_order": 1}),
    "adapt string": (TypeError, r"adapt: expected a list of patterns.*got str", {"adapt": "2.*"}),
    "adapt nothing": (
        ValueError,
        r"adapt: the pattern '7\.\*' matches no parameter; there are 0\.weight",
        {"adapt": ["2.*", "7.*"]},
    ),
    "backend": (ValueError, r"backend: expected one of .*got 'gpu'", {"backend": "gpu"}),
    "complex": (
        TypeError,
        r"model: parameter 0\.weight is torch\.complex",
        {"model": nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64))},
    ),
    "lazy": (
        ValueError,
        r"model: parameter weight is not initialised",
        {"model": nn.LazyLinear(2)},
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case):
    error, message, changed = CONSTRUCTION[case]
    options = {"model": mlp(2, 4, 3), **OPTIONS, **changed}
    with pytest.raises(error, match=message):
        pymeta.MAML(options.pop("model"), **options)


def test_sgd_checks_its_lr():
    with pytest.raises(ValueError, match=r"SGD\.lr: expected a finite number >= 0, got -1"):
        pymeta.SGD(-1)


def listed(data):
    return tuple(list(v) for v in data)


# name -> (error, message, change of (xs, ys, xq, yq), options)
CALLS = {
    "xs no tensor": (TypeError, r"xs: expected a tensor .*got str", lambda d: ("x", *d[1:]), {}),
    "xs numpy dtype": (
        TypeError,
        r"xs: expected torch\.float64 .*got torch\.float32",
        lambda d: (d[0].float().numpy(), *d[1:]),
        {},
    ),
    "xs numpy objects": (
        TypeError,
        r"xs: expected an array of numbers, got dtype object",
        lambda d: (d[0].numpy().astype(object), *d[1:]),
        {},
    ),
    "ys numpy longdouble": (
        TypeError,
        r"ys: expected an array of numbers, got dtype (longdouble|float128)",
        lambda d: (d[0], d[1].numpy().astype(np.longdouble), *d[2:]),
        {},
    ),
    "xs numpy mask": (
        TypeError,
        r"xs: expected an array without a mask, got a MaskedArray",
        lambda d: (np.ma.masked_array(d[0].numpy(), mask=d[0] > 1), *d[1:]),
        {},
    ),
    "xq numpy strings in a list": (
        TypeError,
        r"xq\[1\]: expected an array of numbers, got dtype <U",
        lambda d: (*d[:2], [d[2][0].numpy(), np.array([["a"]]), d[2][2].numpy()], list(d[3])),
        {},
    ),
    "xs flat": (
        ValueError,
        r"xs: expected shape \[tasks, rows, features\], got \[5, 2\] \(2 dimensions\)",
        lambda d: (d[0][0], *d[1:]),
        {},
    ),
    "xs features": (
        ValueError,
        r"xs: expected 2 features.*got 1 \(shape \[3, 5, 1\]\)",
        lambda d: (d[0][..., :1], *d[1:]),
        {},
    ),
    "xs dtype": (
        TypeError,
        r"xs: expected torch\.float64 .*got torch\.float32",
        lambda d: (d[0].float(), *d[1:]),
        {},
    ),
    "xs complex": (
        TypeError,
        r"xs: expected real",
        lambda d: (d[0].to(torch.complex128), *d[1:]),
        {},
    ),
    "xs sparse": (TypeError, r"xs: .*layout", lambda d: (d[0].to_sparse(), *d[1:]), {}),
    "xs device": (
        ValueError,
        r"xs: expected a tensor on cpu.*got meta",
        lambda d: (d[0].to("meta"), *d[1:]),
        {},
    ),
    "yq device": (
        ValueError,
        r"yq: expected a tensor on cpu.*got meta",
        lambda d: (*d[:3], d[3].to("meta")),
        {},
    ),
    "no ys": (TypeError, r"ys: expected targets.*got None", lambda d: (d[0], None, *d[2:]), {}),
    "ys tasks": (
        ValueError,
        r"ys: expected shape \[3, 5, \.\.\.\] to match xs, got \[2, 5, 3\]",
        lambda d: (d[0], d[1][:2], *d[2:]),
        {},
    ),
    "ys rows": (ValueError, r"ys: .*got \[3, 4, 3\]", lambda d: (d[0], d[1][:, 1:], *d[2:]), {}),
    "ys outputs": (
        ValueError,
        r"ys: expected shape \[tasks, rows, 3\], got \[3, 5, 2\]",
        lambda d: (d[0], d[1][..., :2], *d[2:]),
        {},
    ),
    "yq flat": (
        ValueError,
        r"yq: expected shape .*got \[3, 4\]",
        lambda d: (*d[:3], d[3][..., 0]),
        {},
    ),
    "ys dtype": (
        TypeError,
        r"ys: expected torch\.float64 values for mse, got torch\.int64",
        lambda d: (d[0], d[1].long(), *d[2:]),
        {},
    ),
    "different T": (
        ValueError,
        r"xq: expected 3 tasks as xs has, got 2",
        lambda d: (*d[:2], d[2][:2], d[3][:2]),
        {},
    ),
    "steps": (ValueError, r"steps: expected an integer >= 0, got -2", lambda d: d, {"steps": -2}),
    "sizes type": (
        TypeError,
        r"support_sizes: expected integers",
        lambda d: d,
        {"support_sizes": [1, 2.5, 3]},
    ),
    "sizes dtype": (
        TypeError,
        r"query_sizes: expected integers, got torch\.float32",
        lambda d: d,
        {"query_sizes": torch.ones(3)},
    ),
    "sizes length": (
        ValueError,
        r"support_sizes: expected shape \[3\], got \[2\]",
        lambda d: d,
        {"support_sizes": [1, 2]},
    ),
    "sizes too big": (
        ValueError,
        r"support_sizes.*task 1.*6",
        lambda d: d,
        {"support_sizes": [1, 6, 3]},
    ),
    "sizes negative": (
        ValueError,
        r"query_sizes.*task 2.*-1",
        lambda d: d,
        {"query_sizes": [1, 4, -1]},
    ),
    "weights shape": (
        ValueError,
        r"support_weights: expected shape \[3, 5.*got \[5\]",
        lambda d: d,
        {"support_weights": torch.ones(5)},
    ),
    "weights axes": (
        ValueError,
        r"query_weights: expected one weight for each row.*got \[3, 4, 1\]",
        lambda d: d,
        {"query_weights": torch.ones(3, 4, 1)},
    ),
    "weights negative": (
        ValueError,
        r"support_weights.*task 1, row 2.*-1",
        lambda d: d,
        {"support_weights": torch.tensor([[1.0] * 5, [1, 1, -1, 1, 1], [1] * 5])},
    ),
    "weights nan": (
        ValueError,
        r"query_weights.*task 0, row 0.*nan",
        lambda d: d,
        {"query_weights": torch.full((3, 4), float("nan"))},
    ),
    "weights inf": (
        ValueError,
        r"query_weights.*task 0, row 0.*inf",
        lambda d: d,
        {"query_weights": torch.full((3, 4), float("inf"))},
    ),
    "weights complex": (
        TypeError,
        r"support_weights: expected real",
        lambda d: d,
        {"support_weights": torch.ones(3, 5, dtype=torch.complex64)},
    ),
    "list and tensor": (
        TypeError,
        r"ys: expected a list of 3 tensors because xs is one, got Tensor",
        lambda d: (list(d[0]), *d[1:]),
        {},
    ),
    "list empty": (
        ValueError,
        r"xs: .*got an empty list",
        lambda d: ([], [], list(d[2]), list(d[3])),
        {},
    ),
    "list length": (
        ValueError,
        r"ys: expected 3 tensors as xs, got 2",
        lambda d: (list(d[0]), list(d[1])[:2], *d[2:]),
        {},
    ),
    "list rows": (
        ValueError,
        r"ys\[1\]: expected 5 rows as xs\[1\], got 4",
        lambda d: (list(d[0]), [d[1][0], d[1][1, :4], d[1][2]], *d[2:]),
        {},
    ),
    "list features": (
        ValueError,
        r"xs\[2\]: expected shape \[rows, 2\] as xs\[0\] has, got \[5, 1\]",
        lambda d: ([d[0][0], d[0][1], d[0][2, :, :1]], list(d[1]), *d[2:]),
        {},
    ),
    "list dtypes": (
        TypeError,
        r"xs\[1\]: expected torch\.float64 as xs\[0\], got torch\.float32",
        lambda d: ([d[0][0], d[0][1].float(), d[0][2]], list(d[1]), *d[2:]),
        {},
    ),
    "list entry": (
        TypeError,
        r"xs\[1\]: expected a tensor or array, got int",
        lambda d: ([d[0][0], 1, d[0][2]], list(d[1]), *d[2:]),
        {},
    ),
    "list entry flat": (
        ValueError,
        r"xs\[0\]: expected shape \[rows, features\], got \[5\]",
        lambda d: (list(d[0][..., 0]), list(d[1]), *d[2:]),
        {},
    ),
    "list with sizes": (
        ValueError,
        r"support_sizes: expected None where xs is a list",
        listed,
        {"support_sizes": [1, 2, 3]},
    ),
    "list with weights": (
        TypeError,
        r"query_weights: expected a list of 3 tensors",
        listed,
        {"query_weights": torch.ones(3, 4)},
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case, backend):
    error, message, change, options = CALLS[case]
    net = mlp(2, 4, 3)
    data = change(batch(out=3))
    with pytest.raises(error, match=message):
        make(backend, net=net)(*data, **options)
    assert net[0].weight.grad is None


@pytest.mark.parametrize("freed", ["xs", "xq", "parameter 0"])
@pytest.mark.parametrize("calls", [0, 2], ids=["first", "repeated"])
def test_freed_storage(freed, calls):
    """Its shape says that there are numbers, its address is 0."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    maml = pymeta.MAML(model, loss="mse", lr=0.1, steps=1, backend="native")
    data = [torch.randn(3, 5, width) for width in (2, 1, 2, 1)]
    for _ in range(calls):
        maml(*data)
    tensor = {"xs": data[0], "xq": data[2], "parameter 0": model[0].weight}[freed]
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{freed}: its storage has been freed"):
        maml(*data)
