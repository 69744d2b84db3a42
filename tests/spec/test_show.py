"""`repr` of results: shapes and figures; `History.to_pandas`."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import pymeta
from pymeta.spec.history import History
from pymeta.spec.show import brief, counted, shape, spread


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


X, Y = torch.linspace(-1, 1, 5 * 6 * 2).view(5, 6, 2), torch.ones(5, 6, 1)


def test_an_outcome_shows_figures_and_shapes():
    maml = pymeta.MAML(net(), loss="mse", lr=0.1, steps=2)
    out = maml(X, Y, X, Y)
    losses = out.task_losses.detach()
    wanted = f"Outcome(loss={out.loss.item():.4g}; task_losses=[5] {losses.min().item():.4g}.."
    assert repr(out).startswith(wanted)
    assert repr(out).endswith("; predictions=[5, 6, 1])")
    only = repr(maml(X, Y, X))
    assert only == "Outcome(predictions=[5, 6, 1])"
    ragged = maml([X[0], X[1, :3]], [Y[0], Y[1, :3]], [X[0], X[1, :3]], [Y[0], Y[1, :3]])
    assert "predictions=2 of [3..6, 1]" in repr(ragged)
    steps = pymeta.MAML(net(), loss="mse", lr=0.1, steps=2)
    assert "step_losses=[2, 5]" in repr(steps(X, Y, X, Y, step_weights=[0.5, 0.5]))
    assert len(repr(out)) < 200


def test_an_outcome_still_unpacks_and_compares():
    loss, task_losses, predictions, step_losses = pymeta.MAML(net(), loss="mse", lr=0.1, steps=1)(
        X, Y, X, Y
    )
    assert loss.ndim == 0 and task_losses.shape == (5,) and predictions.shape == (5, 6, 1)
    assert step_losses is None


def test_an_outcome_without_values_shows_shapes():
    """Under a transform of torch.func a tensor has no numbers to show."""
    shown = []

    def look(x):
        shown.append(repr(pymeta.Outcome(x.sum(), x, x)))
        return x

    torch.func.vmap(look)(torch.ones(3, 4))
    assert shown == ["Outcome(loss=[]; task_losses=[4]; predictions=[4])"]


def test_what_reptile_returns():
    out = pymeta.Reptile(net(), loss="mse", lr=0.1, steps=2)(X, Y)
    assert re.match(r"ReptileOutcome\(loss=[\d.]+; task_losses=\[5\] [\d.]+\.\.", repr(out))


def test_what_other_learners_return():
    from pymeta.learners import ProtoNet, RelationalMAML

    labels = torch.arange(6).remainder(2).repeat(5, 1)
    proto = ProtoNet(nn.Linear(2, 4))(X, labels, X, labels)
    assert re.match(
        r"Outcome\(loss=[\d.]+; task_losses=\[5\] .*; predictions=\[5, 6, ", repr(proto)
    )
    sizes = {"features": 2, "targets": 1}
    related = RelationalMAML(net(), loss="mse", lr=0.1, steps=1, **sizes)(X, Y, X, Y)
    assert re.match(r"RelationalOutcome\(loss=.*; relations=\[5, \d+\]\)", repr(related))


def test_models_and_their_history():
    tune = pymeta.FineTune(net(), loss="mse", lr=0.1, epochs=4, validation=0.34, freeze=["0.*"])
    models = tune(X, Y, curves=True)
    said = "5 x Sequential; 17 parameters each, 5 of them adapted; mse"
    assert repr(models).startswith(f"Adapted({said}") and "with history" in repr(models)
    assert repr(models.history).startswith("History(5 tasks, 4 epochs; train ")
    assert "validation " in repr(models.history) and "best epochs " in repr(models.history)
    bad = X.clone()
    bad[1] = float("nan")
    wrong = pymeta.FineTune(net(), loss="mse", lr=0.1, epochs=1)(bad, Y)
    assert int((wrong.status != 0).sum()) == 1 and "; 1 not finite" in repr(wrong)


def test_models_whose_loss_grew_are_told_apart():
    models = pymeta.FineTune(net(), loss="mse", lr=0.1, epochs=1)(X, Y)
    models._status = torch.tensor([0, 2, 1, 2, 0], dtype=torch.int8)
    assert repr(models).endswith("mse; 1 not finite; 2 of a loss that grew)")


def test_histories_in_figures():
    nan = float("nan")
    train = np.array([[4.0, 2.0, nan], [2.0, 1.0, 0.5], [nan, nan, nan]])
    history = History(train, None, None, np.array([2, 3, 0]))
    assert repr(history) == "History(3 tasks, 3 epochs; train 3 -> 1.25)"
    empty = History(np.empty((0, 3)), None, None, np.empty(0, np.int64))
    assert repr(empty) == "History(0 tasks, 3 epochs; train none finite)"


@pytest.mark.parametrize("form", [np.asarray, torch.as_tensor])
def test_a_history_as_a_table(form):
    pytest.importorskip("pandas")
    nan = float("nan")
    history = History(
        form(np.array([[4.0, 2.0], [3.0, nan]])),
        form(np.array([[9.0, 5.0, 6.0], [8.0, 7.0, nan]])),
        form(np.array([1, 1])),
        form(np.array([2, 1])),
    )
    table = history.to_pandas()
    assert list(table.columns) == ["task", "epoch", "train", "validation", "best"]
    assert table["task"].tolist() == [0, 0, 0, 1, 1] and table["epoch"].tolist() == [0, 1, 2, 0, 1]
    assert np.isnan(table["train"][0]) and table["train"].tolist()[1:3] == [4.0, 2.0]
    assert table["validation"].tolist() == [9.0, 5.0, 6.0, 8.0, 7.0]
    assert table["best"].tolist() == [False, True, False, False, True]
    plain = History(history.train, None, None, history.epochs).to_pandas()
    assert list(plain.columns) == ["task", "epoch", "train"]
    assert plain["epoch"].tolist() == [1, 2, 1] and plain["train"].tolist() == [4.0, 2.0, 3.0]


def test_pieces():
    assert shape(None) == "None" and shape([]) == "0 of [0]"
    assert spread(np.array([1.0, np.inf, 3.0])) == "[3] 1..3, mean 2, 1 not finite"
    assert spread(torch.ones(2, dtype=torch.bfloat16)) == "[2] 1..1, mean 1"
    assert spread(np.empty(0)) == "[0]" and spread(np.array([np.nan])) == "[1] none finite"
    assert brief(pymeta.SGD(0.1)) == "SGD(lr=0.1)"
    assert brief(pymeta.SGD(0.1, momentum=0.9)) == "SGD(lr=0.1, momentum=0.9)"


@pytest.mark.parametrize(
    ("count", "one", "wanted"),
    [(1, "row", "1 row"), (0, "row", "0 rows"), (2, "class", "2 classes"), (1, "class", "1 class"),
     (3, "entry", "3 entries"), (2, "axis", "2 axes"), (4, "day", "4 days"),
     (2, "batch", "2 batches"), (2, "epoch", "2 epochs")],
)  # fmt: skip
def test_numbers_and_their_nouns(count, one, wanted):
    assert counted(count, one) == wanted


def test_numbers_with_a_verb_or_a_form():
    assert counted(1, "row is", "rows are") == "1 row is"
    assert counted(2, "row is", "rows are") == "2 rows are"
    assert counted(1234, "model", form=",") == "1,234 models"


def test_one_of_a_kind_is_said_in_the_singular():
    net = torch.nn.Linear(1, 1)
    learner = pymeta.MAML(net, loss="mse", lr=0.1, steps=1)
    x = torch.ones(1, 1, 1)
    models = learner.adapt(x, x)
    assert ", 1 step, " in learner.explain() and "had 1 task," in learner.explain()
    assert "1 steps" not in f"{learner.adapter()!r}" and "1 step" in f"{learner.adapter()!r}"
    with pytest.raises(ValueError, match=r"xq: expected 1 task, one for each model, got 2$"):
        models(torch.ones(2, 1, 1))
    with pytest.raises(ValueError, match=r"^xs: expected 1 feature, which is what the model"):
        learner.adapt(torch.ones(1, 1, 2), x)
