"""Runs of pymeta.FineTune: chunks, streams, the bar, the backends, wrong arguments."""

import copy
import io
import math
import pickle
import sys
import warnings

import pytest
import torch
from finetune_help import SIZES, ragged, tuner
from helpers import assert_promised, batch, mlp
from torch import nn

import pymeta
from pymeta import Adam, FineTune
from pymeta.algorithms import finetune
from pymeta.algorithms import progress as bars

# ---- many tasks ---------------------------------------------------------------------------------


def equal(a, b, backend):
    """As equal as the backend promises (`assert_promised`), history and status included."""
    assert len(a) == len(b) > 0
    assert a.parameters.keys() == b.parameters.keys()
    whole = torch.nan_to_num  # of a task that diverged
    for name, values in a.parameters.items():
        assert_promised(whole(values), whole(b.parameters[name]), backend, 10**6)
    assert torch.equal(a.status, b.status)
    assert (a.history is None) == (b.history is None)
    if a.history is not None:
        mine, its = a.history.values(), b.history.values()
        assert mine.keys() == its.keys()
        for name, values in mine.items():
            if values.is_floating_point():
                assert torch.equal(values.isnan(), its[name].isnan())
                assert_promised(whole(values), whole(its[name]), backend, 10**6)
            else:  # epochs
                assert torch.equal(values, its[name])


def many(backend, net, **options):
    options = {"validation": 0.2, "batch_size": 4, "optimizer": Adam(0.02), **options}
    return tuner(backend, net, loss="cross_entropy", class_weights="balanced", **options)


@pytest.mark.parametrize("form", ["ragged", "padded", "uniform"])
def test_results_do_not_depend_on_the_chunks(form, backend, monkeypatch):
    sizes = [int(n) for n in torch.randint(0, 9, (19,))] if form != "uniform" else [6] * 19
    net, (xs, ys, ws) = mlp(2, 4, 3), ragged("cross_entropy", sizes)
    options = {"task_ids": range(19), "curves": True}
    if form != "ragged":
        xs, ys, ws = (torch.nn.utils.rnn.pad_sequence(v, batch_first=True) for v in (xs, ys, ws))
        options |= {"sizes": sizes} if form == "padded" else {}
    module = many(backend, net, epochs=2)
    whole = module(xs, ys, weights=ws, **options)
    start = {n: p.clone() for n, p in whole.parameters.items()}
    again = module(xs, ys, weights=ws, start=start, validation_data=None, **options)
    monkeypatch.setattr(finetune, "_CHUNK_WORK", 1.0)  # chunks as small as they get
    assert [b - a for a, b in module._chunks(module._current()[0], 19, 99, False)] == [16, 3]
    equal(module(xs, ys, weights=ws, **options), whole, backend)
    equal(module(xs, ys, weights=ws, start=start, **options), again, backend)
    if backend == "native":
        assert "the last call had 19 tasks" in module.explain()


def test_a_tasks_result_does_not_depend_on_its_neighbours(backend):
    net, (xs, ys, _) = mlp(2, 4, 3), ragged("cross_entropy")
    module = many(backend, net)
    whole = module(xs, ys, curves=True)
    order = [3, 0, 5, 2]
    moved = module([xs[t] for t in order], [ys[t] for t in order], curves=True)
    equal(moved, whole[order], backend)
    alone = module(xs[2:3], ys[2:3], curves=True)
    equal(alone, whole[2:3], backend)


def test_a_task_that_diverges_is_reported_and_harms_no_other(backend):
    net, (xs, ys, _) = mlp(2, 4, 3), ragged(sizes=[5, 6, 7, 6])
    module = tuner(backend, net, batch_size=4)
    clean = module(xs, ys, curves=True)
    xs[1][3, 0], ys[2][1, 1] = math.nan, math.inf
    models = module(xs, ys, curves=True)
    assert models.status.tolist() == [0, 1, 1, 0] and models.status.dtype == torch.int8
    equal(models[[0, 3]], clean[[0, 3]], backend)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_stream_is_one_call(weighted, backend):
    net, (xs, ys, ws) = mlp(2, 4, 3), ragged("cross_entropy", SIZES * 3)
    module = many(backend, net)
    options = {"weights": ws} if weighted else {}
    whole = module(xs, ys, task_ids=range(18), curves=True, **options)
    taken = []

    def tasks():
        for task in zip(xs, ys, ws, strict=True):
            taken.append(task)
            x, y, w = (v.numpy() for v in task)
            yield (x, y, w) if weighted else (x, y)

    parts = []
    for models in module.stream(tasks(), 5, task_ids=iter(range(18)), curves=True):
        parts.append(models)
        assert len(taken) == min(5 * len(parts), 18)  # no more than is at hand
    assert [len(p) for p in parts] == [5, 5, 5, 3]
    equal(pymeta.Adapted.concatenate(parts), whole, backend)
    assert list(module.stream([])) == []


STREAMS = {
    "entries": (TypeError, r"tasks\[1\]: expected \(x, y\) or .*got 1 entry", lambda t: (t[0],)),
    "type": (TypeError, r"tasks\[1\]: expected \(x, y\) or .*got Tensor", lambda t: t[0]),
    "weights": (ValueError, r"tasks\[1\]: expected weights in all", lambda t: (*t, t[0][:, 0])),
    "x": (ValueError, r"xs\[1\]: expected shape", lambda t: (t[0][:, :1], t[1])),
    "y": (ValueError, r"ys: task 1, row 0: label 7", lambda t: (t[0], t[1] * 0 + 7)),
}


@pytest.mark.parametrize("case", STREAMS)
def test_wrong_streams(case, backend):
    error, message, change = STREAMS[case]
    net, (xs, ys, _) = mlp(2, 4, 3), ragged("cross_entropy", [4] * 8)
    module = tuner(backend, net, loss="cross_entropy")
    tasks = list(zip(xs, ys, strict=True))
    tasks[5] = change(tasks[5])
    stream = module.stream(tasks, 4)
    assert len(next(stream)) == 4
    where = r"tasks 4 to 7 of the stream \(numbered from 0 here\)"
    with pytest.raises(error, match=f"{where}: {message}"):
        next(stream)
    with pytest.raises(ValueError, match=r"chunk: expected an integer >= 1, got 0"):
        module.stream(tasks, 0)
    with pytest.raises(ValueError, match=r"task_ids: expected shape \[4\], got \[2\]"):
        next(module.stream(tasks, 4, task_ids=[1, 2]))


def test_no_tasks(backend):
    net = mlp(2, 4, 3)
    models = tuner(backend, net, validation=0.2)(
        torch.zeros(0, 5, 2).double(), torch.zeros(0, 5, 3).double(), curves=True
    )
    assert len(models) == 0 and models.history.train.shape == (0, 4)
    assert models.history.validation.shape == (0, 5)


# ---- the bar, the backends, the module ----------------------------------------------------------


class Terminal(io.StringIO):
    """A stderr that calls itself a terminal."""

    def isatty(self):
        return True


def test_a_bar_shows_when_it_should(backend, monkeypatch):
    net, (xs, ys, _) = mlp(2, 4, 3), ragged()
    module = tuner(backend, net)

    def shown(progress, patience, terminal):
        err = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setattr(bars, "_LONG", patience)
        module(xs, ys, progress=progress)
        once = err.getvalue()
        list(module.stream(zip(xs, ys, strict=True), 2, progress=progress))
        assert bool(once) == bool(err.getvalue().removeprefix(once))
        return once

    assert "6/6" in shown(True, 2.0, False)
    assert "6/6" in shown(None, -1.0, True)
    assert shown(None, 2.0, True) == "" == shown(None, -1.0, False) == shown(False, -1.0, True)


def test_a_callback_is_told_of_each_chunk(backend, monkeypatch):
    net, (xs, ys, _) = mlp(2, 4, 3), ragged()
    module = tuner(backend, net)
    monkeypatch.setattr(type(module), "_chunks", lambda *_: iter([(0, 4), (4, 6)]))
    told = []
    models = module(xs, ys, callback=lambda *numbers: told.append(numbers))
    assert told == [(4, 6), (6, 6)] and len(models) == 6
    monkeypatch.undo()
    told.clear()
    stream = module.stream(zip(xs, ys, strict=True), 4, callback=lambda *n: told.append(n))
    assert [len(part) for part in stream] == [4, 2] and told == [(4, None), (6, None)]
    with pytest.raises(TypeError, match=r"callback: expected a function of \(done, tasks\)"):
        module.stream([], callback="print")

    def stop(done, tasks):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        module(xs, ys, callback=stop)


def test_the_model_stays_as_it_is(backend):
    net, (xs, ys, _) = mlp(2, 4, 3), ragged()
    before = copy.deepcopy(net.state_dict())
    module = tuner(backend, net)
    models = module(xs, ys)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert not any(p.requires_grad for p in models.parameters.values())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        equal(twin(xs, ys), models, backend)
    with torch.no_grad():
        net[0].weight.zero_()
    assert models[1][0].weight.any()


def test_numpy_in(backend):
    net, (xs, ys, ws) = mlp(2, 4, 3), ragged()
    module = tuner(backend, net)
    wanted = module(xs, ys, weights=ws, validation_data=(xs, ys))
    x, y, w = ([v.numpy() for v in values] for values in (xs, ys, ws))
    equal(module(x, y, weights=w, validation_data=(x, y)), wanted, backend)


def test_a_model_that_is_no_chain_runs_in_torch():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, x):
            return self.last(torch.logaddexp(x, self.first(x)))

    net, (xs, ys, _) = Skip().double(), ragged("cross_entropy")
    module = FineTune(net, loss="cross_entropy", lr=0.1, epochs=3, class_weights="balanced")
    with pytest.warns(UserWarning, match=r"pymeta\.FineTune runs in torch") as caught:
        models = module(xs, ys, curves=True)
    assert caught[0].filename == __file__
    assert models.history.train[0, 0] > models.history.train[0, 2]
    with pytest.warns(UserWarning, match="runs in torch") as caught:
        twin = FineTune(net, loss="cross_entropy", lr=0.1, epochs=3)
        next(twin.stream(zip(xs, ys, strict=True)))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(xs, ys)
    ys[2][1] = 3
    with pytest.raises(ValueError, match=r"ys: task 2, row 1: label 3 is not in 0\.\.2"):
        module(xs, ys)
    with pytest.raises(ValueError, match='backend="native": '):
        FineTune(net, loss="cross_entropy", lr=0.1, epochs=3, backend="native")


def test_under_torch_compile(backend):
    net, (xs, ys, *_) = mlp(2, 4, 2), batch()
    module = tuner(backend, net, batch_size=2)
    compiled = torch.compile(module, backend="eager")
    equal(compiled(xs, ys, curves=True), module(xs, ys, curves=True), backend)


def test_explain_and_repr():
    net, (xs, ys, _) = mlp(2, 4, 3), ragged()
    module = tuner("native", net, optimizer=Adam(0.1), epochs=7, validation=0.3)
    assert "epochs=7" in repr(module) and "optimizer=Adam" in repr(module)
    module(xs, ys)
    assert "the last call had 6 tasks, 7 epochs" in module.explain()
    assert "bytes of workspace each" in module.explain()


def test_batch_norm(backend):
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    xs, ys, _ = ragged(sizes=[7, 8])
    assert not tuner(backend, net)(xs, ys).status.any()
    with pytest.raises(ValueError, match=r"batch_size: 3 leaves .* 7 rows of task 0"):
        tuner(backend, net, batch_size=3)(xs, ys)
    message = r"validation: of the 7 rows of task 0, 1 would be held out"
    with pytest.raises(ValueError, match=message):
        tuner(backend, net, validation=0.2)(xs, ys)
    assert not tuner(backend, net, validation=0.4)(xs, ys).status.any()
    module = tuner(backend, net, batch_size=3)
    module.eval()  # by running statistics, for which one row is enough
    assert not module(xs, ys).status.any()


# ---- wrong arguments ----------------------------------------------------------------------------


CONSTRUCTION = {
    "model": (TypeError, r"model: expected a torch\.nn\.Module, got str", {"model": "net"}),
    "loss": (ValueError, r"loss: expected one of", {"loss": "mae"}),
    "lr": (ValueError, r"lr: expected a finite number >= 0, got -1", {"lr": -1}),
    "neither": (ValueError, r"lr, optimizer: .*neither", {"lr": None}),
    "learnable": (TypeError, r"lr: expected a number, got a Learn", {"lr": pymeta.LearnableLR(1)}),
    "epochs": (ValueError, r"epochs: expected an integer >= 0, got -1", {"epochs": -1}),
    "epochs type": (TypeError, r"epochs: .*got float", {"epochs": 2.0}),
    "batch_size": (ValueError, r"batch_size: expected an integer >= 1, got 0", {"batch_size": 0}),
    "anchor": (ValueError, r"anchor: expected a finite number >= 0, got -1", {"anchor": -1}),
    "anchor type": (TypeError, r"anchor: .*got str", {"anchor": "strong"}),
    "freeze": (TypeError, r"freeze: expected a list of patterns.*got str", {"freeze": "0.*"}),
    "freeze type": (TypeError, r"freeze: .*got int", {"freeze": 3}),
    "freeze nothing": (
        ValueError,
        r"freeze: the pattern '7\.\*' matches no parameter; there are 0\.weight",
        {"freeze": ["0.*", "7.*"]},
    ),
    "class_weights": (ValueError, r'class_weights: expected "balanced"', {"class_weights": "even"}),
    "class_weights type": (TypeError, r"class_weights: .*got int", {"class_weights": 3}),
    "class_weights count": (
        ValueError,
        r"class_weights: expected 3 numbers, got 2",
        {"class_weights": [1, 2]},
    ),
    "class_weights negative": (
        ValueError,
        r"class_weights: expected a finite number >= 0, got -1",
        {"class_weights": [1, 2, -1]},
    ),
    "class_weights loss": (
        ValueError,
        r"class_weights: expected None for the loss mse",
        {"class_weights": "balanced", "loss": "mse"},
    ),
    "class_weights outputs": (
        ValueError,
        r"class_weights: expected None for bce_with_logits with 3 outputs",
        {"class_weights": "balanced", "loss": "bce_with_logits"},
    ),
    "validation": (ValueError, r"validation: expected a fraction .* got 1", {"validation": 1}),
    "validation low": (ValueError, r"validation: .*got -0\.1", {"validation": -0.1}),
    "validation type": (TypeError, r"validation: .*got str", {"validation": "20%"}),
    "rows": (
        ValueError,
        r'validation_rows: expected "random" or "last", got \'first\'',
        {"validation_rows": "first"},
    ),
    "patience": (ValueError, r"patience: expected an integer >= 1, got 0", {"patience": 0}),
    "patience large": (ValueError, r"patience: .*<= 2147483647, got", {"patience": 2**31}),
    "patience type": (TypeError, r"patience: .*got float", {"patience": 1.5}),
    "seed": (ValueError, r"seed: .*got -1", {"seed": -1}),
    "backend": (ValueError, r"backend: expected one of", {"backend": "gpu"}),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case):
    error, message, changed = CONSTRUCTION[case]
    options = {"model": mlp(2, 4, 3), "loss": "cross_entropy", "lr": 0.1, "epochs": 2, **changed}
    with pytest.raises(error, match=message):
        FineTune(options.pop("model"), **options)


def start_of(tasks=3, dtype=torch.float64, name="0.bias"):
    return {"start": {name: torch.zeros(tasks, 4, dtype=dtype)}}


X, Y = torch.ones(3, 5, 2).double(), torch.zeros(3, 5, dtype=torch.int64)


CALLS = {
    "xs": (ValueError, r"xs: expected 2 features", {"xs": X[..., :1]}),
    "xs dtype": (TypeError, r"xs: expected torch\.float64", {"xs": X.float()}),
    "ys": (ValueError, r"ys: expected shape", {"ys": Y[:2]}),
    "ys none": (TypeError, r"ys: expected targets.*got None", {"ys": None}),
    "labels": (ValueError, r"ys: task 0, row 0: label 4 is not in 0\.\.2", {"ys": Y + 4}),
    "sizes": (ValueError, r"sizes: task 1: size 9 is not in 0\.\.5", {"sizes": [5, 9, 2]}),
    "sizes type": (TypeError, r"sizes: expected integers", {"sizes": 5}),
    "weights": (
        ValueError,
        r"weights: task 0, row 0: weight -1\.0 is not",
        {"weights": -torch.ones(3, 5)},
    ),
    "weights shape": (ValueError, r"weights: expected", {"weights": torch.ones(3)}),
    "start type": (TypeError, r"start: expected a pymeta\.Adapted.*got int", {"start": 3}),
    "start name": (
        ValueError,
        r"start: the model has no parameter '9\.bias'",
        start_of(name="9.bias"),
    ),
    "start shape": (ValueError, r"start\['0\.bias'\]: expected shape \[3, 4\]", start_of(tasks=2)),
    "start dtype": (
        TypeError,
        r"start\['0\.bias'\]: expected torch\.float64",
        start_of(dtype=torch.float32),
    ),
    "start value": (TypeError, r"start\['0\.bias'\]: .*got list", {"start": {"0.bias": [1]}}),
    "validation type": (
        TypeError,
        r"validation_data: expected \(x, y\) or .*got Tensor",
        {"validation_data": X},
    ),
    "validation entries": (
        TypeError,
        r"validation_data: .*got 1 entry",
        {"validation_data": (X,)},
    ),
    "validation tasks": (
        ValueError,
        r"validation_data\[0\]: expected 3 tasks as xs has, got 2",
        {"validation_data": (X[:2], Y[:2])},
    ),
    "validation labels": (
        ValueError,
        r"validation_data\[1\]: task 0, row 0: label 9",
        {"validation_data": (X, Y + 9)},
    ),
    "validation weights": (
        ValueError,
        r"validation_data\[2\]: task 0, row 0: weight nan",
        {"validation_data": (X, Y, X[..., 0] * math.nan)},
    ),
    "task_ids": (ValueError, r"task_ids: expected integers >= 0", {"task_ids": [0, -1, 2]}),
    "curves": (TypeError, r"curves: expected a bool, got int", {"curves": 1}),
    "progress": (TypeError, r"progress: expected a bool or None, got str", {"progress": "bar"}),
    "callback": (TypeError, r"callback: expected a function of .* got int", {"callback": 3}),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case, backend):
    error, message, changed = CALLS[case]
    module = tuner(backend, mlp(2, 4, 3), loss="cross_entropy")
    options = {"xs": X, "ys": Y, **changed}
    with pytest.raises(error, match=message):
        module(options.pop("xs"), options.pop("ys"), **options)
    assert len(module(X, Y)) == 3


def test_arguments_that_need_or_exclude_each_other(backend):
    net = mlp(2, 4, 3)
    with pytest.raises(ValueError, match=r"validation_data: expected None where a fraction"):
        tuner(backend, net, loss="cross_entropy", validation=0.2)(X, Y, validation_data=(X, Y))
    with pytest.raises(ValueError, match=r"patience: expected validation > 0 or validation_data"):
        tuner(backend, net, loss="cross_entropy", patience=2)(X, Y)
    one = mlp(2, 4, 1)
    module = tuner(backend, one, loss="bce_with_logits", class_weights="balanced")
    y = torch.zeros(3, 5, dtype=torch.float64)
    y[2, 3] = 0.5
    with pytest.raises(ValueError, match=r"ys: task 2, row 3: expected 0 or 1 with class_weights"):
        module(X, y)
    with pytest.raises(ValueError, match=r"validation_data\[1\]: task 2, row 3: expected 0 or 1"):
        module(X, y.round(), validation_data=(X, y))
