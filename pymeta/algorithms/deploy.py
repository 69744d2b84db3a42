"""From a learner to what is deployed of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pymeta.backend.plan import Plan
from pymeta.models.adapted import architecture
from pymeta.models.adapter import Adapter
from pymeta.spec import running
from pymeta.spec.architecture import Architecture
from pymeta.spec.optimizers import LearnableLR
from pymeta.tasks.task_set import dense

if TYPE_CHECKING:
    from pymeta.algorithms.learner import Learner


def from_learner(learner: Learner) -> Adapter:
    """The adapter of a MAML, Reptile or FineTune; its parameters are a copy of those of now.

    Raises:
        ValueError: the native core cannot run the model (the message says why), or the recipe
            has what an adapter lacks (held out rows).
    """
    if getattr(learner, "validation", 0):
        raise ValueError(
            "adapter: expected validation=0, because an adapter holds no rows out; find the "
            "number of epochs with a FineTune that does, and deploy one with that number"
        )
    plan, tensors = learner._current()
    if plan.unshaped:
        raise ValueError(
            "adapter: the shape of the model's rows is known with the first call of the learner: "
            "call it, or its adapt, once"
        )
    if plan.core_reason is not None:  # an adapter runs on the CPU, wherever the learner does
        raise ValueError(f"adapter: the native core cannot run this learner: {plan.core_reason}")
    chain = architecture(plan)
    assert chain is not None

    def array(tensor: torch.Tensor) -> np.ndarray:
        return dense(tensor.detach().to("cpu", plan.expected.dtype)).numpy()

    optimizer = learner.optimizer
    learned = isinstance(optimizer.lr, LearnableLR)
    return Adapter(
        chain,
        {name: array(p) for name, p in zip(plan.names, tensors, strict=True)},
        adapted=plan.adapted,
        loss=learner.loss,
        optimizer=optimizer,
        schedule=learner.schedule,
        lr=array(learner._lr(plan)) if learned else None,
        anchor=learner.anchor,
        anchor_rows=learner.anchor_rows,
        class_weights=getattr(learner, "class_weights", None),
        predicting=_predicting(learner, plan),
    )


def _predicting(learner: Learner, plan: Plan) -> Architecture | None:
    """The chain of models that go by the statistics of their support sets; None for others."""
    if getattr(learner, "query_statistics", "own") == "own" or not plan.normalises:
        return None
    fixed = running.fixed_by(learner.model, plan.set_norms)
    own = Plan(
        learner.model, plan.expected.loss, None, "network", row_shape=plan.row_shape,
        fixed=fixed | plan.fixed,
    )  # fmt: skip
    return architecture(own)
