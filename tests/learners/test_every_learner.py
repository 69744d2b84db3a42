"""What every learner promises: forms of tasks, weights, copies, state_dict, DDP, words."""

from __future__ import annotations

import copy
import inspect
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import every_learner
import pytest
import torch
from every_learner import MAKERS, OUTPUTS, gradients, make, tasks
from helpers import assert_close
from torch import nn

from pymeta import learners

HERE = Path(__file__).resolve().parent
KINDS = list(MAKERS)


def test_they_are_all_here():
    """What is a learner of pymeta.learners is in the table."""
    bases = {learners.EncodedLearner}
    public = {v for v in vars(learners).values() if inspect.isclass(v) and issubclass(v, nn.Module)}
    assert {type(make(kind)) for kind in KINDS} == public - bases


def close(kind, got, wanted):
    """Equal up to rounding; Newton's minima up to where they stop, eps^0.75."""
    if kind != "newton":
        assert_close(got, wanted)
        return
    pairs = zip(*([v] if isinstance(v, torch.Tensor) else list(v) for v in (got, wanted)),
                strict=True)  # fmt: skip
    assert all(torch.allclose(g, w, rtol=0, atol=1e-9) for g, w in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_is_padded_is_one_by_one(kind):
    learner = make(kind)
    whole = tasks(kind)
    sizes, asked = [6, 4, 5, 3], [3, 2, 3, 2]
    cut = [[v[t, :n] for t, n in enumerate(ns)]
           for v, ns in zip(whole, (sizes, sizes, asked, asked), strict=True)]  # fmt: skip
    ws = torch.rand(4, 6, dtype=torch.float64) + 0.2
    wl = [ws[t, :n] for t, n in enumerate(sizes)]
    wanted = learner(*cut, support_weights=wl)
    form = {"support_sizes": sizes, "query_sizes": asked, "support_weights": ws}
    padded = learner(*whole, **form)
    close(kind, padded.task_losses, wanted.task_losses)
    close(kind, wanted.loss, wanted.task_losses.mean())
    models = learner.adapt(*cut[:2], support_weights=wl)
    again = learner.adapt(*whole[:2], support_sizes=sizes, support_weights=ws)
    without = learner(*cut[:3], support_weights=wl)
    assert without.loss is None and without.task_losses is None
    for t, n in enumerate(asked):
        one = learner(*(v[t][None] for v in cut), support_weights=wl[t][None])
        close(kind, one.loss, wanted.task_losses[t])
        for got in (padded.predictions[t, :n], one.predictions[0], models(cut[2])[t],
                    again(whole[2], asked)[t, :n], without.predictions[t],
                    models[t : t + 1](cut[2][t][None])[0]):  # fmt: skip
            close(kind, got, wanted.predictions[t])
    assert len(models) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_weight_zero_is_absent(kind):
    learner, (xs, ys, xq, yq) = make(kind), tasks(kind)
    plain = learner(xs, ys, xq, yq)
    plain.loss.backward()
    slopes = [p.grad.clone() for p in learner.parameters()]
    learner.zero_grad()
    nan = torch.full((4, 1, 3), math.nan, dtype=torch.float64)
    more, labels = torch.cat([nan, xs], 1), torch.cat([ys[:, :1], ys], 1)
    weights = torch.ones(4, 7)
    weights[:, 0] = 0
    out = learner(more, labels, xq, yq, support_weights=weights)
    out.loss.backward()
    close(kind, out.task_losses, plain.task_losses)
    close(kind, [p.grad for p in learner.parameters()], slopes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["xs", "ys", "xq"])
def test_a_task_that_is_not_finite_is_its_own_affair(kind, bad, place):
    learner, data = make(kind), dict(zip(["xs", "ys", "xq", "yq"], tasks(kind), strict=True))
    if not data[place].is_floating_point():
        place = "xs"  # labels are always finite
    wanted = learner(**data)
    data[place][1, 0, 0] = bad
    models = learner.adapt(data["xs"], data["ys"])
    out = learner(**data)
    others = [0, 2, 3]
    close(kind, out.task_losses[others], wanted.task_losses[others])
    close(kind, out.predictions[others], wanted.predictions[others])
    close(kind, models(data["xq"])[others], wanted.predictions[others])
    assert math.isinf(bad) or out.task_losses[1].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_state_dicts(kind):
    learner, data = make(kind), tasks(kind)
    out = learner(*data)
    other = MAKERS[kind]().double()
    other.load_state_dict(learner.state_dict())
    with torch.no_grad():
        for p in learner.parameters():
            p.add_(0.1)
    assert (learner(*data).task_losses - out.task_losses).abs().max() > 0
    for same in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        close(kind, same(*data).task_losses, out.task_losses)
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_learned_has_a_gradient(kind):
    learner, data = make(kind), tasks(kind)
    found = gradients(learner, data)
    assert found and all(g is not None and g.isfinite().all() for g in found.values())
    # scores are shifted alike by the last bias of a judge that is compared by a softmax
    assert sum(bool(g.any()) for g in found.values()) >= len(found) - 1
    with torch.no_grad():
        quiet = learner(*data)
    assert not quiet.loss.requires_grad
    close(kind, quiet.loss, learner(*data).loss)


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_where_it_runs_and_refuses_other_tasks(kind):
    learner, (xs, ys, xq, yq) = make(kind), tasks(kind)
    learner(xs, ys, xq, yq)
    assert ("native: the cell" if kind == "meta_lstm" else "torch") in learner.explain()
    if hasattr(learner, "maml"):
        assert learner.explain().startswith("native-cpu")
    with pytest.raises(ValueError, match="expected 4 tasks as xs has, got 3"):
        learner(xs, ys, xq[:3], yq[:3])
    with pytest.raises(TypeError, match="ys: expected"):
        learner(xs, None, xq, yq)
    with pytest.raises((TypeError, ValueError), match="xs: expected"):
        learner(None, ys, xq, yq)
    with pytest.raises((TypeError, ValueError), match="xs: expected"):
        learner.adapt(xs[0, 0], ys)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_a_network_does_not_take_are_refused(kind):
    learner, (xs, ys, xq, yq) = make(kind), tasks(kind)
    wide = torch.cat([xs, xs], 2), ys, torch.cat([xq, xq], 2), yq
    single = [v.float() if v.is_floating_point() else v for v in (xs, ys, xq, yq)]
    for given, says in ((wide, "expected .*(, got|rows of 3 features)"), (single, "float32")):
        with pytest.raises((TypeError, ValueError), match=says):
            learner(*given)
        with pytest.raises((TypeError, ValueError), match=says):
            learner.adapt(*given[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_no_tasks_at_all(kind):
    learner, data = make(kind), tasks(kind)
    outputs = 1 if getattr(learner, "ways", OUTPUTS) is None else OUTPUTS  # no labels, one class
    out = learner(*(v[:0] for v in data))
    assert out.predictions.shape == (0, 3, outputs) and out.task_losses.shape == (0,)
    assert learner.adapt(data[0][:0], data[1][:0])(data[2][:0]).shape == (0, 3, outputs)


def test_two_processes_give_the_gradients_of_one(tmp_path):
    """DistributedDataParallel, each process with half of the tasks."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        every_learner.__file__, str(tmp_path / "gradients"),
    ]  # fmt: skip
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"gradients.{rank}") for rank in range(2)]
    for kind in KINDS:
        wanted = gradients(make(kind), tasks(kind))
        for found in ranks:
            assert found[kind].keys() == wanted.keys()
            close(kind, list(found[kind].values()), list(wanted.values()))
