"""`ProtoNet`: a query row belongs to the class whose mean is nearest.

Snell, Swersky, Zemel 2017, "Prototypical networks for few-shot learning" (arXiv:1703.05175):

    c_k = sum_r w_r f_r / sum_r w_r    over the support rows of class k
    logit_k = -|f - c_k|^2 / t         or  cos(f, c_k) / t

with features f of a network and a temperature t, which may be learned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pymeta.learners.base import State
from pymeta.learners.classes import ClassLearner, class_sums, hidden
from pymeta.learners.rows import Flat, times_own


def check_temperature(value: float) -> float:
    """The temperature; ValueError unless it is a number > 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"temperature: expected a number > 0, got {value!r}")
    return float(value)


class ProtoNet(ClassLearner):
    """Prototypical networks.

    Args:
        encoder: maps rows [N, ...] to features [N, d].
        ways: how many classes there are; None for one more than the largest label of a call.
        distance: "euclidean" (squared) or "cosine".
        temperature: what distances are divided by, at the beginning.
        learn_temperature: whether it is learned.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import torch
        >>> from pymeta.learners import ProtoNet
        >>> net = ProtoNet(torch.nn.Identity())
        >>> x, y = torch.tensor([[[0.0], [1.0], [5.0]]]), torch.tensor([[0, 0, 1]])
        >>> net.adapt(x, y)(torch.tensor([[[2.0]]]))        # 1.5 from one mean, 3 from the other
        tensor([[[-2.2500, -9.0000]]])
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        ways: int | None = None,
        distance: str = "euclidean",
        temperature: float = 1.0,
        learn_temperature: bool = True,
    ) -> None:
        """Check the arguments."""
        super().__init__(encoder, ways)
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f"distance: expected 'euclidean' or 'cosine', got {distance!r}")
        self.distance = distance
        log = torch.tensor(math.log(check_temperature(temperature)))
        self.log_temperature = nn.Parameter(log, bool(learn_temperature))

    def _fit(self, features: Tensor, support: Flat) -> State:
        sums, weights = class_sums(features, support, self._classes(support))
        present = weights > 0
        means = sums / torch.where(present, weights, 1.0).unsqueeze(-1)
        if self.distance == "cosine":
            means = nn.functional.normalize(means, dim=-1)
        return {"prototypes": means, "present": present}

    def _predict(self, state: State, features: Tensor, task: Tensor) -> tuple[Tensor, None]:
        means = state["prototypes"]
        if self.distance == "cosine":
            logits = times_own(nn.functional.normalize(features, dim=-1), means.mT, task)
        else:
            # About their middle, which changes no distance: products of what is far from 0 round.
            there = state["present"].unsqueeze(-1)
            middle = (means * there).sum(1) / there.sum(1).clamp(min=1)  # [T, d]
            middle = middle.detach()
            means, features = means - middle.unsqueeze(1), features - middle[task]
            logits = 2 * times_own(features, means.mT, task) - means.square().sum(-1)[task]
            logits = logits - features.square().sum(-1, keepdim=True)
        logits = logits * (-self.log_temperature).exp()
        return hidden(logits, state["present"][task]), None
