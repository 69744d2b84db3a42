"""An adapter's network as a torch module again, and MAML on it; for `pymeta retrain` alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import pymeta
from pymeta.models.adapter import Adapter
from pymeta.serve.evaluate import Task
from pymeta.serve.retrain import names_of, with_start
from pymeta.spec.architecture import Architecture

Layer = tuple[Any, ...]


def _normalised(kind: Any, size: int, eps: float, weight: bool, bias: bool) -> nn.Module:
    made: nn.Module = kind(size, eps)
    for name, there in (("weight", weight), ("bias", bias)):
        if not there:
            made.register_parameter(name, None)
    return made


_MODULES: dict[str, Callable[..., nn.Module]] = {
    "linear": nn.Linear,
    "layer_norm": lambda *form: _normalised(nn.LayerNorm, *form),
    "batch_norm": lambda *form: _normalised(_BatchNorm, *form),
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "softplus": nn.Softplus,
}


def _BatchNorm(size: int, eps: float) -> nn.Module:
    return nn.BatchNorm1d(size, eps, track_running_stats=False)


def network(architecture: Architecture, start: dict[str, Any]) -> nn.Sequential:
    """A chain with these parameters; ValueError where a layer has no module here."""
    modules = []
    for layer in architecture.layers:
        if layer[0] not in _MODULES:
            raise ValueError(f"retrain: the layer {layer[0]} cannot be trained by maml here")
        modules.append(_MODULES[layer[0]](*layer[1:]))
    net = nn.Sequential(*modules)
    names = chain_of(net)
    state = {n: torch.tensor(start[o]) for n, o in zip(names, architecture.chain, strict=True)}
    net.to(next(iter(state.values())).dtype).load_state_dict(state)
    return net


def chain_of(net: nn.Sequential) -> list[str]:
    """The names of its parameters layer by layer, weight before bias."""
    return [name for name, _ in net.named_parameters()]


def maml(adapter: Adapter, episodes: int, lr: float, draw: Callable[[], Sequence[Task]]) -> Adapter:
    """The adapter after so many meta-gradient steps of Adam; learned step sizes move as well."""
    net = network(adapter.architecture, dict(adapter.parameters))
    own = dict(zip(adapter.architecture.chain, chain_of(net), strict=True))
    loss: Any = adapter.loss  # a description is taken, too
    learner = pymeta.MAML(
        net,
        loss=loss,
        optimizer=adapter.optimizer,
        anchor=adapter.anchor,
        anchor_rows=adapter.anchor_rows,
        steps=adapter.schedule.steps or 0,
        adapt=[own[name] for name in adapter.adapted],
        query_statistics="own" if adapter.predicting is None else "support",
        # by the statistics of support sets, tasks of different sizes run in torch
        backend="native" if adapter.predicting is None else "auto",
    )
    if isinstance(learner.lr, nn.Parameter):
        with torch.no_grad():
            learner.lr.copy_(torch.tensor(adapter.lr))
    outer = torch.optim.Adam(learner.parameters(), lr=lr)
    for _ in range(episodes):
        tasks = draw()
        support = [names_of(tasks, name) for name in ("xs", "ys", "ws")]
        query = [names_of(tasks, name) for name in ("xq", "yq", "wq")]
        outcome = learner(
            *support[:2],
            *query[:2],
            support_weights=support[2],
            query_weights=query[2],
        )
        outer.zero_grad()
        outcome.loss.backward()
        if torch.isfinite(outcome.loss):
            outer.step()
    found = dict(net.named_parameters())
    start = {name: found[own[name]].detach().numpy() for name in adapter.architecture.names}
    learned = learner.lr.detach().numpy() if isinstance(learner.lr, nn.Parameter) else None
    return with_start(adapter, start, learned)
