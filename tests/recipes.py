"""Random and fixed adaptations: recipes, drawn by hypothesis or fixed, and what they give."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from kernels import (
    OPTIMIZERS,
    chains,
    make_layer,
)
from torch import nn

from pymeta import reference
from pymeta.backend import adapt as native_adapt
from pymeta.backend.plan import Plan
from pymeta.spec.anchors import Anchor
from pymeta.spec.losses import describe_loss
from pymeta.spec.schedule import Schedule
from pymeta.tasks.checks import Names
from pymeta.tasks.task_set import SUPPORT, task_set

VALIDATION = Names("xv", "yv", "validation_sizes", "validation_weights")


@dataclass(frozen=True)
class Recipe:
    """One adaptation; everything random in it comes from `seed`."""

    chain: tuple[tuple, ...]
    loss: str = "mse"
    optimizer: str = "plain"
    steps: int | None = None
    epochs: int | None = 3
    batch_size: int | None = None
    anchor: float = 0.0
    anchor_rows: float = 0.0
    own_anchors: bool = False
    frozen: int = 0  # of the parameters, from the first on
    own_starts: int = 0  # of the parameters, from the last on
    tasks: int = 5
    rows: int = 9
    weights: bool = False
    validates: bool = False
    patience: int | None = None
    own_shuffles: bool = False
    seed: int = 0

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.steps, self.epochs, self.batch_size, seed=self.seed, stream=3)


def rows_of(recipe: Recipe, inputs: int, out: int) -> list[tuple]:
    """(x, y, weights) of each task, with any number of rows up to the recipe's."""
    batch_norm = any(layer[0] == "batch_norm" for layer in recipe.chain)
    found = []
    for rows in torch.randint(0, recipe.rows + 1, (recipe.tasks,)).tolist():
        rows = recipe.rows if batch_norm else rows
        y = torch.randn(rows, out)
        if recipe.loss == "cross_entropy":
            y = torch.randint(0, out, (rows,))
        elif recipe.loss == "bce_with_logits":
            y = (y > 0).float()
        weights = torch.rand(rows) if recipe.weights else None
        found.append((torch.randn(rows, inputs), y, weights))
    return found


class Adaptations:
    """A recipe made concrete, to be followed by either twin in either dtype."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.net = nn.Sequential(*map(make_layer, recipe.chain))
        sizes = [layer for layer in recipe.chain if len(layer) > 2]
        inputs, out = sizes[0][1], sizes[-1][2]
        self.support = rows_of(recipe, inputs, out)
        self.validation = rows_of(recipe, inputs, out) if recipe.validates else None
        named = dict(self.net.named_parameters())
        last = list(named)[::-1][: recipe.own_starts]
        self.start = {n: torch.randn(recipe.tasks, *named[n].shape) / 2 for n in last}
        names = list(named)
        self.adapted = names[min(recipe.frozen, len(names) - 1) :] if names else []
        self.ids = torch.randint(0, 2**40, (recipe.tasks,))
        self.anchors = 2 * torch.rand(recipe.tasks)

    def follow(self, twin, dtype: torch.dtype, tasks: list[int] | None = None) -> dict:
        """All that the adaptation of these tasks gives, as {name: value}."""
        recipe = self.recipe
        tasks = list(range(recipe.tasks)) if tasks is None else tasks
        self.net.to(dtype)  # its values were made in float32, so nothing is lost on the way
        loss, rule = describe_loss(recipe.loss), OPTIMIZERS[recipe.optimizer](0.1)
        pull = Anchor(recipe.anchor, recipe.anchor_rows)
        plan = Plan(self.net, loss, self.adapted or None, "network", rule, pull)
        if twin is native_adapt:
            assert plan.reason is None, plan.reason

        def packed(names, rows):
            def column(i):
                values = [rows[t][i] for t in tasks]
                if values[0] is None:
                    return None
                return [v.to(dtype) if v.is_floating_point() else v for v in values]

            return task_set(names, column(0), column(1), None, column(2), plan.expected)

        inner = reference.InnerLoop(
            loss, plan.lr_tensor(0.1), plan.rates, recipe.schedule, False, rule, pull
        )
        support = packed(SUPPORT, self.support)
        ids = self.ids[tasks] if recipe.own_shuffles else None
        options = {
            "start": {n: v[tasks].to(dtype) for n, v in self.start.items()},
            "validation": packed(VALIDATION, self.validation) if recipe.validates else None,
            "patience": recipe.patience,
            "curves": recipe.epochs is not None,
            "anchors": self.anchors[tasks].to(dtype) if recipe.own_anchors else None,
            "task_ids": ids,
        }
        parameters = [p.detach() for p in plan.parameters]
        named = dict(zip(plan.names, parameters, strict=True))
        if twin is native_adapt:
            done = native_adapt.adapt(plan, parameters, inner.lr, inner, support, **options)
        else:
            done = reference.adapt(self.net, named, plan.adapted, inner, support, **options)
        results = {"weights": [done.parameters[n] for n in plan.adapted], "status": done.status}
        if recipe.epochs is not None:
            results |= {"train": done.history.train, "epochs": done.history.epochs}
            if recipe.validates:
                results |= {"validation": done.history.validation}
                results |= {"best": done.history.best_epochs}
        elif not self.start:
            with torch.enable_grad():
                if twin is native_adapt:
                    made = native_adapt.reptile(
                        plan, plan.parameters, inner.lr, inner, support, ids, options["anchors"]
                    )
                else:
                    named = dict(zip(plan.names, plan.parameters, strict=True))
                    made = reference.reptile(
                        self.net, named, plan.adapted, inner, support, ids, options["anchors"]
                    )
                results["losses"] = made[1]
                results["differences"] = torch.autograd.grad(made[0], plan.parameters)
        return results


ANCHORS = [{}, {}, {"anchor": 0.5}, {"anchor_rows": 2.0}, {"own_anchors": True}]


@st.composite
def recipes(draw):
    chain = draw(chains(max_layers=3))
    if not any(layer[0] == "linear" for layer in chain):
        chain = (("linear", chain[0][1], chain[0][1], True), *chain)
    batch_norm = any(layer[0] == "batch_norm" for layer in chain)
    by_epochs = draw(st.booleans())
    validates = by_epochs and draw(st.booleans())
    return Recipe(
        chain=chain,
        loss=draw(st.sampled_from(["mse", "huber", "cross_entropy", "bce_with_logits"])),
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        steps=None if by_epochs else draw(st.integers(0, 7)),
        epochs=draw(st.integers(0, 4)) if by_epochs else None,
        # no minibatch of one row where BatchNorm would have to normalise it
        batch_size=draw(st.sampled_from([None, 3] if batch_norm else [None, 1, 2, 3, 4, 20])),
        **draw(st.sampled_from(ANCHORS)),
        frozen=draw(st.sampled_from([0, 0, 0, 1, 2, 3])),
        own_starts=draw(st.sampled_from([0, 0, 1, 2, 9])),
        tasks=draw(st.sampled_from([1, 2, 5, 17, 20, 40])),
        rows=draw(st.sampled_from([6, 9])) if batch_norm else draw(st.integers(1, 9)),
        weights=draw(st.booleans()),
        validates=validates,
        patience=draw(st.sampled_from([None, 1, 2])) if validates else None,
        own_shuffles=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
