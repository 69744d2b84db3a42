"""`pymeta retrain`: meta-train on a store's entities, and promote what is not worse.

A moment cuts the rows of all entities in two, earlier and later, and some entities are held out.
Training sees the earlier rows of the others alone. Both models, the serving one and the new one,
then adapt to each entity's earlier rows and predict its later ones; the new one is promoted if its
mean loss is not larger, neither on the entities held out nor on those that were trained on.

    maml       the exact meta-gradient, where the recipe is a number of steps on all rows; needs
               torch (trainers.py)
    reptile    the start moves towards the adapted weights, for every recipe; needs no torch
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pymeta.models.adapter import Adapter
from pymeta.serve.entities import suited
from pymeta.serve.evaluate import Task, losses
from pymeta.serve.model import Model
from pymeta.serve.registry import Refused, Registry
from pymeta.serve.store import Labelled, Store

_LEAST_ENTITIES = 4
_QUERY_ROWS = 50

Episodes = Callable[[], list[Task]]


@dataclass(frozen=True)
class Recipe:
    """How to retrain.

    Args:
        episodes: steps of meta-training.
        tasks: entities of a step.
        lr: of the outer optimiser: Adam for maml, the step towards the mean for reptile.
        seed: of all draws.
        held_out: share of the entities that are held out.
        later: share of the rows that are later than the cut.
        window: rows that an entity is adapted to.
        method: "maml", "reptile", or "auto": maml where the recipe allows it.

    Raises:
        ValueError: one is out of range.
    """

    episodes: int = 1000
    tasks: int = 32
    lr: float = 1e-3
    seed: int = 0
    held_out: float = 0.25
    later: float = 0.25
    window: int = 200
    method: str = "auto"

    def __post_init__(self) -> None:
        """Check the fields."""
        for name, least in (("episodes", 0), ("tasks", 1), ("window", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected >= {least}, got {getattr(self, name)}")
        for name in ("held_out", "later"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: expected between 0 and 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected > 0, got {self.lr}")
        if self.method not in ("auto", "maml", "reptile"):
            raise ValueError(f"method: expected auto, maml or reptile, got {self.method}")


@dataclass(frozen=True)
class Split:
    """Entities by name, with the moment that cuts their rows."""

    trained: dict[str, Labelled]
    held_out: dict[str, Labelled]
    cut: int


def retrain_once(url: str, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Train, compare, and promote or not; what was found.

    Args:
        url: of the store.
        folder: of the versions.
        recipe: how.

    Raises:
        ValueError: too little is stored, or no version serves.
        ImportError: the recipe needs torch, which is not installed.
        Problem: the database cannot be reached.
    """
    registry = Registry(folder)
    name = registry.manifest().serving
    if name is None:
        raise Refused(f"{folder}: no version serves")
    serving = registry.load(name)
    store = Store(url)
    try:
        entities = {n: rows for n, rows in store.each() if _suits(serving, rows)}
    finally:
        store.close()
    split = split_entities(entities, recipe)
    random = np.random.default_rng(recipe.seed)
    method = chosen_method(serving.adapter, recipe.method)
    new = _train(method, serving.adapter, recipe, _episodes(serving, split, recipe, random))
    report = compare(serving, Model("new", new), split, recipe)
    report |= {"before": name, "method": method, "episodes": recipe.episodes}
    if report["promoted"]:
        report["version"] = _add(registry, new, report)
        registry.promote(report["version"])
    return report


def split_entities(entities: dict[str, Labelled], recipe: Recipe) -> Split:
    """Cut by time and by entity.

    Raises:
        ValueError: too few entities, or no rows on one side of the cut.
    """
    if len(entities) < _LEAST_ENTITIES:
        raise ValueError(
            f"store: expected at least {_LEAST_ENTITIES} entities whose rows suit the serving "
            f"model, got {len(entities)}"
        )
    moments = np.sort(np.concatenate([rows.at for rows in entities.values()]))
    cut = int(moments[int((1 - recipe.later) * len(moments))])
    both = {n: r for n, r in entities.items() if (r.at < cut).any() and (r.at >= cut).any()}
    names = sorted(both)
    count = max(1, round(recipe.held_out * len(names)))
    if len(names) - count < 1:
        raise ValueError(
            "store: expected entities with rows both before and after one moment, got "
            f"{len(names)}; rows that were stored without `at` have the time of their arrival"
        )
    order = np.random.default_rng(recipe.seed).permutation(len(names))
    held = {names[i] for i in order[:count]}
    trained = {n: r for n, r in entities.items() if n not in held and (r.at < cut).sum() >= 2}
    if not trained:
        raise ValueError("store: expected entities with two rows before the cut, got none")
    return Split(trained, {n: entities[n] for n in sorted(held)}, cut)


def chosen_method(adapter: Adapter, method: str) -> str:
    """The method that suits an adapter's recipe; ValueError where the one asked for does not."""
    plain = (
        adapter.schedule.steps is not None
        and adapter.schedule.batch_size is None
        and adapter.class_weights is None
    )
    if method == "maml" and not plain:
        raise ValueError(
            "method: maml is for recipes of a number of steps on all rows, without class weights; "
            "expected reptile"
        )
    if method != "auto":
        return method
    return "maml" if plain else "reptile"


def compare(serving: Model, new: Model, split: Split, recipe: Recipe) -> dict[str, Any]:
    """Mean losses of both on later rows, and whether the new one is to be promoted."""
    report: dict[str, Any] = {"promoted": True, "loss": {}}
    groups = {"held_out": split.held_out, "trained": split.trained}
    for name, entities in groups.items():
        tasks = [_later(serving, rows, split.cut, recipe) for rows in entities.values()]
        tasks = [task for task in tasks if len(task.xq) and len(task.xs)]
        if not tasks:
            continue
        before, after = losses(serving.adapter, tasks), losses(new.adapter, tasks)
        report["loss"][name] = {
            "entities": len(tasks),
            "serving": _number(before.mean()),
            "new": _number(after.mean()),
        }
        report["promoted"] &= bool(after.mean() <= before.mean())
    return report


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _suits(model: Model, rows: Labelled) -> bool:
    """Whether an entity's rows are of the model's shape, and labelled as it wants."""
    from pymeta.serve.problem import Problem

    try:
        suited(model, rows)
    except Problem:
        return False
    return len(rows) > 0


def _task(model: Model, rows: Labelled, support: Any, query: Any) -> Task:
    """Two sets of an entity's rows as the adapter wants them."""
    parts: list[np.ndarray] = []
    for where in (support, query):
        some = Labelled(rows.x[where], rows.y[where], rows.weights[where], rows.at[where])
        tasks = suited(model, some)
        weights = some.weights.astype(model.adapter.dtype)
        parts += [tasks.xs[0], tasks.ys[0], weights]
    return Task(*parts)


def _later(model: Model, rows: Labelled, cut: int, recipe: Recipe) -> Task:
    """The newest rows before the cut, and all after it."""
    before = np.flatnonzero(rows.at < cut)[-recipe.window :]
    return _task(model, rows, before, np.flatnonzero(rows.at >= cut))


def _episodes(model: Model, split: Split, recipe: Recipe, random: np.random.Generator) -> Episodes:
    """Draws a step's tasks: some entities, each cut at a moment of its own before the cut."""
    entities = [(rows, int((rows.at < split.cut).sum())) for rows in split.trained.values()]

    def draw() -> list[Task]:
        tasks = []
        for i in random.integers(0, len(entities), recipe.tasks):
            rows, count = entities[i]
            middle = int(random.integers(1, count))
            support = slice(max(0, middle - recipe.window), middle)
            query = slice(middle, min(count, middle + _QUERY_ROWS))
            tasks.append(_task(model, rows, support, query))
        return tasks

    return draw


def _train(method: str, adapter: Adapter, recipe: Recipe, draw: Episodes) -> Adapter:
    if method == "reptile":
        return _reptile(adapter, recipe, draw)
    try:
        from pymeta.serve.trainers import maml
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            'retrain: maml needs torch: pip install "pymeta-kernels[torch]", '
            "or say --method reptile"
        ) from None
    return maml(adapter, recipe.episodes, recipe.lr, draw)


def _reptile(adapter: Adapter, recipe: Recipe, draw: Episodes) -> Adapter:
    """Reptile (Nichol et al. 2018): theta += lr * mean over tasks of (theta_t - theta)."""
    for _ in range(recipe.episodes):
        tasks = draw()
        xs, ys, ws = ([getattr(t, n) for t in tasks] for n in ("xs", "ys", "ws"))
        models = adapter.adapt(xs, ys, weights=ws)
        fine = models.status == 0
        if not fine.any():
            continue
        start = dict(adapter.parameters)
        for name in adapter.adapted:
            mean = models.parameters[name][fine].mean(0, dtype=np.float64)
            start[name] = (start[name] + recipe.lr * (mean - start[name])).astype(adapter.dtype)
        adapter = with_start(adapter, start)
    return adapter


def with_start(adapter: Adapter, start: dict[str, np.ndarray], lr: Any = None) -> Adapter:
    """The adapter with another start, and other learned step sizes where there are any."""
    own = adapter.__getstate__()
    return Adapter(**{**own, "parameters": start, "lr": own["lr"] if lr is None else lr})


def _add(registry: Registry, adapter: Adapter, report: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new.safetensors"
        adapter.save(path)
        return registry.add_file(path, "retrain", report).name


def names_of(tasks: Sequence[Task], name: str) -> list[np.ndarray]:
    """One field of every task."""
    return [getattr(task, name) for task in tasks]
