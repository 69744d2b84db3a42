"""The forms that inputs may come in: tensors, numpy arrays, tables; what says their cure."""

import warnings

import numpy as np
import pytest
import torch
from helpers import assert_promised, batch, mlp
from inputs_help import make

import pymeta
from pymeta.spec.losses import describe_loss
from pymeta.tasks.checks import Expected
from pymeta.tasks.task_set import SUPPORT, task_set, tensor_of


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
