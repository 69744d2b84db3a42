"""Whatever is changed between calls, a learner that has made calls is as one that is made anew.

A random sequence of changes of the model, the learner and the tensors; after each of them the same
calls twice, the second of which may be a repeat: forward and backward, with query targets and
without, `accumulate_grad`, `adapt` and predictions. What a new learner of the same model gives, bit
for bit, the old one gives, too: by the same path, with the same error, for the same reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import pymeta

SOME = 3  # columns of inputs, hidden units, and outputs: so that layers can be exchanged and tied


class Own(nn.Module):
    """A chain that is found by tracing, or none, as its settings say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(SOME, SOME), nn.ELU(), nn.Linear(SOME, SOME)
        self.squashes, self.options, self.cuts = False, {"odd": False}, [1.0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        if self.squashes:
            x = torch.tanh(x)
        if self.options["odd"]:
            x = torch.erfinv(0.5 * torch.tanh(x))
        return self.last(x) if self.cuts[0] else x + self.last(x)


def chain() -> nn.Module:
    norm = nn.BatchNorm1d(SOME)
    return nn.Sequential(nn.Linear(SOME, SOME), norm, nn.ELU(), nn.Linear(SOME, SOME))


class State:
    """A model, a learner of it that stays, and how calls are made."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        self.model, self.kind, self.learns = model, kind, kind == "MAML, learned rates"
        turns = "epochs" if kind == "FineTune" else "steps"
        self.settings: dict[str, Any] = {"loss": "mse", turns: 2, "lr": 0.1}
        self.learner = self.made()
        self.tasks, self.rows, self.how = 2, 4, "plain"
        self.dtype = torch.float32
        self.undo: list[Callable[[], Any]] = []
        self.seed = 0

    def made(self) -> Any:
        given = dict(self.settings)
        if "adapted_patterns" in given:
            given["adapt"] = given.pop("adapted_patterns")
        if self.learns:
            given["lr"] = pymeta.LearnableLR(given["lr"], per="layer")
        made = LEARNERS[self.kind](self.model, **given)
        if self.learns and "learner" in vars(self):
            made.lr = nn.Parameter(self.learner.lr.detach().clone(), self.learner.lr.requires_grad)
        return made

    def set(self, name: str, value: Any) -> None:
        if name in type(self.learner)._checks:
            self.settings[name] = value
            setattr(self.learner, name, value)

    def linear(self) -> nn.Module:
        return next(m for m in self.model.modules() if isinstance(m, nn.Linear))

    def second(self) -> nn.Module:
        return [m for m in self.model.modules() if isinstance(m, nn.Linear)][-1]

    def last(self) -> str:
        return "last.*" if isinstance(self.model, Own) else "3.*"

    def act(self) -> nn.Module:
        return next(m for m in self.model.modules() if isinstance(m, nn.ELU))

    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(self.seed)
        self.seed += 1
        shape = self.tasks, self.rows, SOME
        xs, ys, xq, yq = (torch.randn(shape, generator=drawn).to(self.dtype) for _ in range(4))
        if self.how == "strided":
            xs = xs.transpose(0, 1).contiguous().transpose(0, 1)
        if self.how == "negated":
            yq = torch._neg_view(yq)
        if self.how == "expanded":
            ys = ys[:, :1].expand(shape)
        if self.how == "one for two":
            xq, yq = xs, ys
        if self.how == "differentiated":
            xs.requires_grad_()
        if self.how == "integers":
            ys = ys.long()
        return xs, ys, xq, yq


LEARNERS = {
    "MAML": pymeta.MAML,
    "MAML, learned rates": pymeta.MAML,
    "Reptile": pymeta.Reptile,
    "FineTune": pymeta.FineTune,
}


def patch(module: nn.Module) -> Callable[[], Any]:
    """Give a module a forward of its own; what takes it away again."""
    own = type(module).forward
    module.forward = lambda x: own(module, x)  # type: ignore[method-assign]
    return lambda: module.__dict__.pop("forward", None)


def reparametrize(s: State) -> None:
    layer = s.linear()
    if not parametrize.is_parametrized(layer):
        parametrizations.weight_norm(layer)
        s.undo.append(lambda: parametrize.remove_parametrizations(layer, "weight"))


def more(module: nn.Module, name: str, what: Any) -> Callable[[], Any]:
    setattr(module, name, what)
    return lambda: delattr(module, name) if hasattr(module, name) else None


def tie(s: State) -> None:
    first, last = s.linear(), s.second()
    if first is last or "weight" not in first._parameters or "weight" not in last._parameters:
        return
    last.weight = first.weight
    own = nn.Parameter(torch.randn(SOME, SOME).to(first.weight))
    s.undo.append(lambda: setattr(last, "weight", own))


def transposed(s: State) -> None:
    weight = s.second().weight
    weight.data = weight.data.t().contiguous().t()


def exchange(s: State) -> None:
    """Another activation in the place of the first one."""
    other: list[nn.Module] = [nn.Tanh(), nn.Softmax(-1), nn.ELU(0.3)]
    chosen = other[s.seed % 3]
    if isinstance(s.model, Own):
        s.model.act = chosen
    else:
        s.model[2] = chosen  # type: ignore[index]


def cast(s: State, dtype: torch.dtype) -> None:
    s.dtype = dtype
    s.learner.to(dtype)


def learn(s: State) -> None:
    if s.learns:
        with torch.no_grad():
            s.learner.lr.mul_(0.5)


def freeze_rates(s: State) -> None:
    if s.learns:
        s.learner.lr.requires_grad_(not s.learner.lr.requires_grad)


def own_setting(s: State, change: Callable[[Own], Any]) -> None:
    if isinstance(s.model, Own):
        change(s.model)


CHANGES: dict[str, Callable[[State], Any]] = {
    "nothing": lambda s: None,
    "undo": lambda s: s.undo.pop()() if s.undo else None,
    "undo all": lambda s: [s.undo.pop()() for _ in list(s.undo)],
    # the model
    "a value": lambda s: s.linear().bias.data.add_(0.5),
    "another parameter": lambda s: setattr(
        s.second(), "bias", nn.Parameter(torch.ones(SOME, dtype=s.dtype))
    ),
    "no bias": lambda s: setattr(s.second(), "bias", None),
    "frozen": lambda s: s.second().requires_grad_(False),
    "thawed": lambda s: s.model.requires_grad_(True),
    "strides": transposed,
    "a setting": lambda s: setattr(s.act(), "alpha", 0.5),
    "a layer": exchange,
    "eval": lambda s: s.model.eval(),
    "train": lambda s: s.model.train(),
    "a hook": lambda s: s.undo.append(s.act().register_forward_hook(lambda *_: None).remove),
    "an outer hook": lambda s: s.undo.append(
        s.model.register_forward_pre_hook(lambda *_: None).remove
    ),
    "a forward": lambda s: s.undo.append(patch(s.linear())),
    "an outer forward": lambda s: s.undo.append(patch(s.model)),
    "parametrized": reparametrize,
    "tied": tie,
    "a parameter more": lambda s: s.undo.append(
        more(s.model, "extra", nn.Parameter(torch.ones(1, dtype=s.dtype)))
    ),
    "a parameter more in a layer": lambda s: s.undo.append(
        more(s.act(), "extra", nn.Parameter(torch.ones(1, dtype=s.dtype)))
    ),
    "a child more in a layer": lambda s: s.undo.append(
        more(s.act(), "child", nn.Linear(1, 1, dtype=s.dtype))
    ),
    "a flag": lambda s: own_setting(s, lambda m: setattr(m, "squashes", not m.squashes)),
    "an option": lambda s: own_setting(s, lambda m: m.options.update(odd=not m.options["odd"])),
    "an entry": lambda s: own_setting(s, lambda m: m.cuts.__setitem__(0, 1.0 - m.cuts[0])),
    "double": lambda s: cast(s, torch.float64),
    "float": lambda s: cast(s, torch.float32),
    # the learner
    "lr": lambda s: learn(s) if s.learns else s.set("lr", 0.2),
    "rates": freeze_rates,
    "steps": lambda s: [s.set(name, 1 + s.seed % 3) for name in ("steps", "epochs")],
    "first order": lambda s: s.set("first_order", s.seed % 2 == 0),
    "loss": lambda s: s.set("loss", nn.HuberLoss(delta=0.3 + 0.1 * (s.seed % 5))),
    "query loss": lambda s: s.set("query_loss", [None, "l1", "mse"][s.seed % 3]),
    "clip": lambda s: s.set("task_clip", [None, 0.1][s.seed % 2]),
    "ANIL": lambda s: s.set("adapted_patterns", [s.last()]) if s.kind in ("MAML", "Reptile") else 0,
    "torch": lambda s: s.set("backend", "torch"),
    "auto": lambda s: s.set("backend", "auto"),
    # the tensors
    "tasks": lambda s: setattr(s, "tasks", 1 + s.tasks % 3),
    "rows": lambda s: setattr(s, "rows", 2 + s.rows % 4),
    **{
        how: lambda s, how=how: setattr(s, "how", how)
        for how in ("plain", "strided", "negated", "expanded", "one for two", "differentiated",
                    "integers")
    },
}  # fmt: skip


def grads(s: State, learner: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The gradients of all parameters, and of inputs, which are gone then."""
    every = dict.fromkeys([*s.model.parameters(), *learner.parameters(), *inputs])
    found = [p.grad for p in every if p.requires_grad]
    for p in every:
        p.grad = None
    return [torch.zeros(()) if g is None else g for g in found]


def results(s: State, learner: Any, data: tuple[Tensor, ...]) -> list[Tensor]:
    """All that the calls give."""
    xs, ys, xq, _ = data
    if s.kind == "FineTune":
        tuned = learner(xs, ys)
        return [*tuned.parameters.values(), tuned(xq)]
    found = []
    for sides in ((xs, ys),) if s.kind == "Reptile" else (data, data[:3]):
        with torch.no_grad():
            found += [v for v in learner(*sides)[:3] if v is not None]
        out = [v for v in learner(*sides)[:3] if v is not None]
        if out[0].requires_grad:
            out[0].square().sum().backward()
        found += [*out, *grads(s, learner, xs)]
    if s.kind != "Reptile":
        found += [*learner.accumulate_grad(*data)[:3], *grads(s, learner, xs)]
    adapted = learner.adapt(xs, ys)
    return [*found, *adapted.parameters.values(), adapted(xq)]


def called(s: State, learner: Any, data: tuple[Tensor, ...]) -> tuple[str, Any]:
    """How calls end: the path, or the error; and what they give."""
    try:
        found = results(s, learner, data)
    except Exception as error:
        grads(s, learner, *data)
        return f"{type(error).__name__}: {error}", []
    return str(learner._current(data[0])[0].reason), [t.detach() for t in found]


def check(s: State, before: list[str]) -> None:
    for _ in range(2):
        data = s.data()
        path, found = called(s, s.learner, data)
        if "a learnable lr was made for the adapted parameters" in path:
            continue  # which are others now: a new learner would have others
        try:
            new = s.made()
        except Exception as error:
            assert path.endswith(str(error)), (before, path, error)
            continue
        wanted_path, wanted = called(s, new, data)
        assert path == wanted_path, before
        if path == "None" and s.learner.backend != "torch":
            assert same_bits(found, wanted), before
        elif found:
            assert_close(found, wanted)


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("model", [chain, Own])
@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(st.sampled_from(sorted(CHANGES)), min_size=6, max_size=6))
def test_random_changes(model, kind, changes):
    torch.manual_seed(0)
    s = State(model(), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check(s, [])
        for k, name in enumerate(changes):
            CHANGES[name](s)
            check(s, changes[: k + 1])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model", [chain, Own])
def test_each_change_and_back(model, change, repeats):
    s = State(model(), "MAML")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check(s, [])
        assert True in repeats
        for names in ([change], [change, "undo all"]):
            CHANGES[names[-1]](s)
            check(s, names)
