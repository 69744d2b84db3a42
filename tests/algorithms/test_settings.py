"""What is set on a learner after its construction: honoured by the next call, or an error."""

import copy
import re

import pytest
import torch
from helpers import assert_promised, batch, gradients, mlp
from torch import nn

import pymeta
from pymeta import SGD, Adam, FineTune, LearnableLR, Reptile


def everything(learner, net, data):
    """All numbers of a call."""
    xs, ys = data[:2]
    if isinstance(learner, FineTune):
        models = learner(xs, ys, curves=True, task_ids=[1, 2, 3])
        curves = [values.double() for values in models.history.values().values()]
        return [*models.parameters.values(), *curves]
    out = learner(*data) if isinstance(learner, pymeta.MAML) else learner(xs, ys)
    models = learner.adapt(xs, ys)
    found = gradients(out.loss, *net.parameters())
    return [out.loss.detach(), *found, *models.parameters.values()]


def apart(a, b) -> bool:
    """Whether two results differ by more than rounding ever makes them."""
    a, b = a.nan_to_num(), b.nan_to_num()
    return a.shape != b.shape or bool(((a - b).abs() > 1e-6 * b.abs().max()).any())


MAML = {"loss": "mse", "lr": 0.1, "steps": 2}
REPTILE = {**MAML, "batch_size": 3}
FINETUNE = {"loss": "bce_with_logits", "lr": 0.1, "epochs": 3, "batch_size": 2, "validation": 0.3}
KINDS = {
    "MAML": (pymeta.MAML, MAML),
    "Reptile": (Reptile, REPTILE),
    "FineTune": (FineTune, FINETUNE),
}
SETTINGS = [
    ("MAML", "loss", "huber"),
    ("MAML", "loss", nn.HuberLoss(delta=0.3)),
    ("MAML", "lr", 0.2),
    ("MAML", "steps", 3),
    ("MAML", "first_order", True),
    ("MAML", "adapt", ["2.*"]),
    ("Reptile", "loss", "huber"),
    ("Reptile", "lr", 0.2),
    ("Reptile", "steps", 4),
    ("Reptile", "batch_size", None),
    ("Reptile", "seed", 5),
    ("FineTune", "loss", "mse"),
    ("FineTune", "lr", 0.2),
    ("FineTune", "epochs", 2),
    ("FineTune", "batch_size", 3),
    ("FineTune", "freeze", ["0.*"]),
    ("FineTune", "class_weights", [1.0, 4.0]),
    ("FineTune", "validation", 0.5),
    ("FineTune", "validation_rows", "last"),
    ("FineTune", "patience", 1),
    ("FineTune", "seed", 5),
]
ATTRIBUTES = {"adapt": "adapted_patterns"}


@pytest.mark.parametrize("kind, name, value", SETTINGS)
def test_the_next_call_has_it(kind, name, value, backend):
    make, options = KINDS[kind]
    net, data = mlp(2, 4, 1), batch("bce_with_logits", support=7, out=1)
    learner = make(net, backend=backend, **options)
    before = everything(learner, net, data)
    setattr(learner, ATTRIBUTES.get(name, name), value)
    fresh = make(net, backend=backend, **{**options, name: value})
    if kind == "Reptile":  # each call draws anew
        fresh._stream = learner._stream
    got, wanted = everything(learner, net, data), everything(fresh, net, data)
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted, strict=True):
        assert_promised(g.nan_to_num(), w.nan_to_num(), backend, 10**6)
    if name != "patience":  # which need not change a run this short
        assert len(got) != len(before) or any(map(apart, got, before))
    assert repr(learner) == repr(fresh) or name == "adapt"


@pytest.mark.parametrize("kind", KINDS)
def test_another_model(kind, backend):
    make, options = KINDS[kind]
    data = batch("bce_with_logits", support=7, out=1)
    learner = make(mlp(2, 4, 1), backend=backend, **options)
    if kind != "Reptile":
        everything(learner, learner.model, data)
    other = mlp(2, 5, 5, 1)
    learner.model = other
    wanted = everything(make(other, backend=backend, **options), other, data)
    for g, w in zip(everything(learner, other, data), wanted, strict=True):
        assert_promised(g.nan_to_num(), w.nan_to_num(), backend)
    assert [id(p) for p in learner.parameters()] == [id(p) for p in other.parameters()]


def test_another_backend():
    net, data = mlp(2, 4, 2), batch()
    maml = pymeta.MAML(net, **MAML)
    maml(*data)
    maml.backend = "torch"
    assert maml.explain().startswith("torch: ")
    net.append(nn.PReLU())
    maml.backend = "native"
    with pytest.raises(ValueError, match=r'backend="native": layer 3 \(PReLU\)'):
        maml(*data)


def test_another_learnable_rate():
    net, data = mlp(2, 4, 2), batch()
    maml = pymeta.MAML(net, **{**MAML, "lr": LearnableLR(0.1, "layer")})
    maml.lr = nn.Parameter(torch.full((2,), 0.2, dtype=torch.float64))
    wanted = pymeta.MAML(net, **{**MAML, "lr": 0.2})(*data).loss
    assert torch.equal(maml(*data).loss, wanted)
    with pytest.raises(ValueError, match=r"lr: expected shape \[2\], got \[3\]"):
        maml.lr = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"lr: expected a torch.nn.Parameter.*lr.fill_"):
        maml.lr = 0.1


WRONG = [
    ("MAML", "model", "net", TypeError),
    ("MAML", "loss", "hubert", ValueError),
    ("MAML", "lr", "0.1", TypeError),
    ("MAML", "lr", -0.1, ValueError),
    ("MAML", "lr", LearnableLR(0.1), TypeError),
    ("MAML", "lr", nn.Parameter(torch.ones(1)), TypeError),
    ("MAML", "steps", -1, ValueError),
    ("MAML", "steps", 2.0, TypeError),
    ("MAML", "first_order", 1, TypeError),
    ("MAML", "backend", "natve", ValueError),
    ("Reptile", "batch_size", 0, ValueError),
    ("Reptile", "seed", -1, ValueError),
    ("FineTune", "epochs", None, TypeError),
    ("FineTune", "freeze", "0.*", TypeError),
    ("FineTune", "class_weights", "balance", ValueError),
    ("FineTune", "validation", 1.0, ValueError),
    ("FineTune", "validation_rows", "first", ValueError),
    ("FineTune", "patience", 0, ValueError),
]


@pytest.mark.parametrize("kind, name, value, error", WRONG)
def test_wrong_settings_are_named_and_change_nothing(kind, name, value, error):
    make, options = KINDS[kind]
    learner = make(mlp(2, 4, 1), **options)
    before = getattr(learner, name)
    with pytest.raises(error, match=rf"^{re.escape(name)}: "):
        setattr(learner, name, value)
    assert getattr(learner, name) is before


@pytest.mark.parametrize(
    "name, value",
    [
        ("optimizer", Adam(0.1)),
        ("anchor", 0.1),
        ("schedule", 0.1),
        ("adapted_patterns", ["0.*"]),
        ("adapt", ["0.*"]),
    ],
)
def test_what_cannot_be_set_raises(name, value):
    tuner = FineTune(mlp(2, 4, 1), **FINETUNE)
    for learner in (tuner, copy.deepcopy(tuner)):
        with pytest.raises(AttributeError, match=name):
            setattr(learner, name, value)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_cannot_be_deleted(kind):
    make, options = KINDS[kind]
    learner = make(mlp(2, 4, 1), **options)
    learner.note = "kept"
    for name in [*learner._checks, "anchor", "optimizer"]:
        before = getattr(learner, name)
        with pytest.raises(AttributeError, match=f"^{name} cannot be deleted: a {make.__name__} "):
            delattr(learner, name)
        assert getattr(learner, name) == before
    del learner.note  # which is nobody's setting
    with pytest.raises(AttributeError, match="note"):
        learner.note  # noqa: B018


def test_a_learnable_rate_cannot_be_deleted():
    learner = pymeta.MAML(mlp(2, 4, 2), loss="mse", lr=pymeta.LearnableLR(0.1), steps=1)
    with pytest.raises(
        AttributeError, match="lr cannot be deleted: a MAML has no calls without it"
    ):
        del learner.lr
    assert isinstance(learner.lr, torch.nn.Parameter)


def test_the_method_adapt_is_not_hidden_by_patterns():
    learner = pymeta.MAML(mlp(2, 4, 2), loss="mse", lr=0.1, steps=1)
    with pytest.raises(AttributeError, match="set adapted_patterns"):
        learner.adapt = ["2.*"]
    assert callable(learner.adapt)


def test_settings_that_do_not_go_together_raise_at_the_next_call():
    xs, ys, *_ = batch("bce_with_logits", support=7, out=1)
    tuner = FineTune(mlp(2, 4, 1), **FINETUNE)
    tuner.class_weights = "balanced"
    tuner.loss = "mse"
    with pytest.raises(ValueError, match="class_weights: expected None for the loss mse"):
        tuner(xs, ys)
    tuner.class_weights, tuner.validation, tuner.patience = None, 0, 2
    with pytest.raises(ValueError, match="patience: expected validation > 0"):
        tuner(xs, ys)
    tuner.patience, tuner.freeze = None, ["9.*"]
    with pytest.raises(ValueError, match=r"freeze: .*9\.\*"):
        tuner(xs, ys)


def test_an_adapter_does_not_change():
    adapter = pymeta.MAML(mlp(2, 4, 2), loss="mse", optimizer=SGD(0.1), steps=1).adapter()
    for name in ("loss", "lr", "schedule", "parameters"):
        for one in (adapter, copy.deepcopy(adapter)):
            with pytest.raises(AttributeError, match=f"{name}: an Adapter does not change"):
                setattr(one, name, None)
