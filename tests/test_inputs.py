"""Wrong arguments: an error that names the argument, what was expected and what came, and no work
done; on both backends the same."""

import warnings

import numpy as np
import pytest
import torch
from helpers import assert_promised, batch, mlp
from torch import nn

import pymeta
from pymeta.spec.losses import describe_loss
from pymeta.tasks.checks import Expected
from pymeta.tasks.task_set import SUPPORT, check_task_ids, task_set, tensor_of

OPTIONS = {"loss": "mse", "lr": 0.1, "steps": 1}


@pytest.fixture(params=["native", "torch"])
def backend(request):
    return request.param


def make(backend, loss="mse", net=None, **options):
    net = mlp(2, 4, 3) if net is None else net
    return pymeta.MAML(net, backend=backend, loss=loss, **{"lr": 0.1, "steps": 1, **options})


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
    "no yq": (TypeError, r"yq: expected targets.*got None", lambda d: (*d[:3], None), {}),
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


def as_arrays(value):
    if isinstance(value, (list, tuple)):
        return [as_arrays(v) for v in value]
    return value.detach().numpy().copy()


def test_numpy_arrays_are_as_good_as_tensors(backend):
    xs, ys, xq, yq = batch("cross_entropy", out=3)
    module = make(backend, "cross_entropy")
    weights, sizes = torch.rand(3, 5), torch.tensor([2, 5, 3])
    options = {"support_weights": weights, "query_sizes": sizes - 1}
    wanted = module(xs, ys, xq, yq, **options)
    got = module(*as_arrays((xs, ys, xq, yq)), **{n: as_arrays(v) for n, v in options.items()})
    assert_promised(got.loss, wanted.loss, backend)
    ragged = [[v[t, : sizes[t]] for t in range(3)] for v in (xs, ys, xq, yq)]
    ragged_weights = [weights[t, : sizes[t]] for t in range(3)]
    wanted = module(*ragged, support_weights=ragged_weights)
    got = module(*as_arrays(ragged), support_weights=as_arrays(ragged_weights))
    assert_promised(got.loss, wanted.loss, backend)
    assert_promised(got.predictions[1], wanted.predictions[1], backend)
    models = module.adapt(*as_arrays((xs, ys)))
    assert_promised(models(as_arrays(xq)), module.adapt(xs, ys)(xq), backend)


@pytest.mark.parametrize("kind", ["read-only", "byte order", "reversed", "strided", "mapped"])
def test_numpy_arrays_of_every_kind(kind, backend, tmp_path):
    xs, ys, xq, yq = batch(out=3)
    module = make(backend)
    wanted = module(xs, ys, xq, yq).loss
    array = as_arrays(xs)
    if kind == "read-only":
        array.flags.writeable = False
    elif kind == "byte order":
        array = array.astype(array.dtype.newbyteorder())
    elif kind == "reversed":
        array = array[:, ::-1].copy()[:, ::-1]
    elif kind == "strided":
        array = np.repeat(array, 2, axis=1)[:, ::2]
    else:
        np.save(tmp_path / "xs.npy", array)
        array = np.load(tmp_path / "xs.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_promised(module(array, ys, xq, yq).loss, wanted, backend)


def test_numpy_arrays_are_not_copied():
    array = np.random.rand(3, 4, 2)
    for given in (array, array[1:], array[:, ::2]):
        assert tensor_of("xs", given).data_ptr() == given.ctypes.data
    array.flags.writeable = False
    tensor = tensor_of("xs", array)
    assert tensor.data_ptr() == array.ctypes.data
    wanted = array.copy()
    del array  # the tensor keeps the memory
    assert torch.equal(tensor, torch.from_numpy(wanted))


def test_parts_of_task_sets():
    xs, ys, *_ = batch(tasks=4)
    expected = Expected(describe_loss("mse"), torch.float64, torch.device("cpu"))
    weights, sizes, offset = torch.rand(4, 5).double(), [5, 0, 2, 3], torch.rand_like(ys)
    whole = (xs, ys, weights, offset)
    lists = [[v[:n] for v, n in zip(values, sizes, strict=True)] for values in whole]
    sets = [
        task_set(SUPPORT, xs, ys, None, weights, expected, offset),
        task_set(SUPPORT, xs, ys, sizes, weights, expected, offset),
        task_set(SUPPORT, lists[0], lists[1], None, lists[2], expected, lists[3]),
    ]
    for s in sets:
        for first, last in ((0, 4), (1, 3), (2, 4), (1, 1)):
            part = s.part(first, last)
            assert part.tasks == last - first and part.counts == s.counts[first:last]
            for t in range(part.tasks):
                for got, wanted in zip(part.of_task(t), s.of_task(first + t), strict=True):
                    assert torch.equal(got, wanted)


def tables(value):
    """Arrays of two dimensions as pandas DataFrames, of one as Series."""
    pd = pytest.importorskip("pandas")
    if isinstance(value, (list, tuple)):
        return [tables(v) for v in value]
    array = as_arrays(value)
    return pd.DataFrame(array) if array.ndim == 2 else pd.Series(array)


def test_tables_of_pandas_are_as_good_as_arrays(backend):
    xs, ys, xq, yq = batch("cross_entropy", out=3)
    module = make(backend, "cross_entropy")
    weights, sizes = torch.rand(3, 5), torch.tensor([2, 5, 3])
    lists = [list(v) for v in (xs, ys, xq, yq)]
    wanted = module(*lists, support_weights=list(weights)).loss
    got = module(*tables(lists), support_weights=tables(list(weights))).loss
    assert_promised(got, wanted, backend)
    wanted = module(xs, ys, xq, yq, support_sizes=sizes).loss
    got = module(xs, tables(ys), xq, tables(yq), support_sizes=tables(sizes)).loss
    assert_promised(got, wanted, backend)
    tuner = pymeta.FineTune(module.model, loss="cross_entropy", lr=0.1, epochs=2, backend=backend)
    wanted, got = tuner(*lists[:2])(xq), tuner(*tables(lists[:2]))(tables(lists[2]))
    assert_promised(torch.stack(got), wanted, backend)


def test_tables_of_pandas_for_an_adapter():
    pd = pytest.importorskip("pandas")
    xs, ys, xq, _ = (as_arrays(v) for v in batch(out=3))
    adapter = make("native").adapter()
    wanted = adapter.adapt_predict(xs[0], ys[0], xq[0])
    frames = [pd.DataFrame(v[0], columns=list("abc")[: v.shape[2]]) for v in (xs, ys, xq)]
    assert np.array_equal(adapter.adapt_predict(*frames), wanted)
    lists = [[pd.DataFrame(v) for v in values] for values in (xs, ys, xq)]
    got = adapter.adapt_predict(*lists, weights=[pd.Series(np.ones(5))] * 3)
    assert np.array_equal(got[0], wanted)


WRONG_TABLES = {
    "strings": (lambda pd, a: pd.DataFrame(a).assign(c="x"), "got a DataFrame of dtype object"),
    "missing": (lambda pd, a: pd.DataFrame(a).astype("Float64").mask(a > 0), "DataFrame of dtype"),
    "dtype": (lambda pd, a: pd.DataFrame(a.astype(np.float32)), r"\.astype\(np\.float64\)"),
}


@pytest.mark.parametrize("case", WRONG_TABLES)
def test_wrong_tables_say_the_cure(case, backend):
    pd = pytest.importorskip("pandas")
    xs, ys, xq, yq = batch(out=3)
    make_table, message = WRONG_TABLES[case]
    table = make_table(pd, as_arrays(xs[0]))
    with pytest.raises(TypeError, match=rf"^xs(\[0\])?: expected .*{message}"):
        make(backend)([table], [ys[0]], [xq[0]], [yq[0]])
    adapter = make("native").adapter()
    with pytest.raises(TypeError, match=rf"^xs(\[0\])?: expected .*{message}"):
        adapter.adapt([table], [as_arrays(ys[0])])
    with pytest.raises(TypeError, match=rf"^xs: expected .*{message}"):
        adapter.adapt_predict(table, as_arrays(ys[0]), as_arrays(xq[0]))


def test_a_wrong_dtype_says_the_cure(backend):
    module = make(backend, net=mlp(2, 4, 3, dtype=torch.float32))
    xs, ys, xq, yq = batch(out=3)
    with pytest.raises(TypeError, match=r"^xs: .*cast it, as by \.to\(torch\.float32\)$"):
        module(xs, ys, xq, yq)
    with pytest.raises(TypeError, match=r"^ys: .*cast it, as by \.astype\(np\.float32\)$"):
        module(xs.float(), as_arrays(ys), xq, yq)
    adapter = make("native", net=mlp(2, 4, 3, dtype=torch.float32)).adapter()
    arrays = as_arrays((xs, ys, xq))
    for given in (arrays, [a[0] for a in arrays], [list(a) for a in arrays]):
        with pytest.raises(TypeError, match=r"^xs.*, as by \.astype\(np\.float32\)$"):
            adapter.adapt_predict(*given)


@pytest.mark.parametrize("kind", [tuple, list])
def test_several_inputs_are_refused_by_name(kind, backend):
    xs, ys, xq, yq = batch(out=3)
    context = torch.randint(0, 4, (3, 5))
    message = (
        r"^xs: expected one input, got 2, each of shape \[3, 5, \.\.\.\] as ys: several inputs"
    )
    with pytest.raises(TypeError, match=message):
        make(backend)(kind((xs, context)), ys, kind((xq, context[:, :4])), yq)
    with pytest.raises(TypeError, match=r"^xs: expected one input"):
        make(backend).adapt(as_arrays(kind((xs, context))), as_arrays(ys))


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


def test_running_statistics_are_refused(backend):
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    module = make(backend, net=net)
    module.eval()
    message = r"model: 1 is in eval mode and would use running statistics.*\.train\(\)"
    with pytest.raises(ValueError, match=message):
        module(*batch(out=3))
    with pytest.raises(ValueError, match=message):
        module.adapt(*batch(out=3)[:2])
    module.train()
    assert module(*batch(out=3)).loss.isfinite()
    own = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, track_running_stats=False)).double()
    assert make(backend, net=own.eval())(*batch(out=4)).loss.isfinite()


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
