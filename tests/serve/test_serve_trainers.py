"""`pymeta retrain` by MAML: the new adapter is what MAML makes of the old one's recipe."""

import numpy as np
import pytest
import serve_help
import torch

import pymeta
from pymeta.serve.evaluate import Task
from pymeta.serve.retrain import chosen_method
from pymeta.serve.trainers import maml
from pymeta.spec.losses import KINDS, describe_loss

LAYERS = (("linear", 3, 5, True), ("tanh",), ("linear", 5, 2, True))


def tasks(loss, count=3):
    random = np.random.default_rng(0)

    def side(rows):
        x = random.normal(size=(rows, 3))
        if describe_loss(loss).takes_classes:
            y = random.integers(0, 2, rows)
        else:
            y = random.random((rows, 2 // describe_loss(loss).outputs_per_target))
        return x, y, random.random(rows)

    return [Task(*side(6 + t), *side(4 + t)) for t in range(count)]


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("pull", [{}, {"anchor": 2.0}, {"anchor_rows": 30.0}], ids=str)
def test_the_recipe_is_the_adapters(loss, pull):
    """One step of Adam from a start moves each weight by lr against its gradient's sign."""
    old = serve_help.adapter(0, LAYERS, loss, np.float64, optimizer=pymeta.SGD(0.02), **pull)
    assert chosen_method(old, "auto") == "maml"
    given = tasks(loss)
    new = maml(old, 1, 0.01, lambda: given)
    assert (new.loss, new.anchor, new.anchor_rows) == (old.loss, old.anchor, old.anchor_rows)

    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    net.double().load_state_dict({n: torch.tensor(v) for n, v in old.parameters.items()})
    learner = pymeta.MAML(
        net, loss=describe_loss(loss), optimizer=old.optimizer, steps=3, backend="torch", **pull
    )
    columns = {n: [torch.tensor(getattr(t, n)) for t in given] for n in ("xs", "ys", "xq", "yq")}
    weights = [[torch.tensor(getattr(t, n)) for t in given] for n in ("ws", "wq")]
    out = learner(*columns.values(), support_weights=weights[0], query_weights=weights[1])
    out.loss.backward()
    for name, parameter in net.named_parameters():
        moved = torch.tensor(new.parameters[name] - old.parameters[name])
        # Adam's step is lr g / (|g| + 1e-8): lr to 1e-5 of it where |g| is above 1e-3
        clear = parameter.grad.abs() > 1e-3
        assert clear.any()
        assert ((moved + 0.01 * parameter.grad.sign())[clear].abs() < 1e-6).all()
