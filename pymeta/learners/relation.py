"""`RelationNet`: a network judges how a query row relates to each class.

Sung et al. 2018, "Learning to compare: relation network for few-shot learning" (arXiv:1711.06025):

    score_k = relation([sum of the features of class k's support rows, f])

with the features joined along their first axis, so that those of a convolutional network stay maps.
The paper fits sigmoid(score) to 1 for the right class and 0 for all others by the squared error,
here the mean over the task's classes; the cross-entropy of the scores is the alternative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pymeta.learners.base import State
from pymeta.learners.classes import ClassLearner, class_sums, hidden
from pymeta.learners.rows import Flat


class RelationNet(ClassLearner):
    """Relation networks; `out.predictions` are the scores before the sigmoid.

    Args:
        encoder: maps rows [N, ...] to features [N, d] or maps [N, d, ...].
        relation: maps pairs [M, 2 d] (or [M, 2 d, ...]) to scores [M, 1]; a call raises ValueError
            where it takes no such pairs, or gives other scores.
        ways: how many classes there are; None for one more than the largest label of a call.
        loss: "mse", of the sigmoids, as in the paper, or "cross_entropy".
        average: whether a class is the mean of its rows' features instead of their sum.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    _any_features = True

    def __init__(
        self,
        encoder: nn.Module,
        relation: nn.Module,
        *,
        ways: int | None = None,
        loss: str = "mse",
        average: bool = False,
    ) -> None:
        """Check the arguments."""
        super().__init__(encoder, ways)
        if not isinstance(relation, nn.Module):
            raise TypeError(f"relation: expected a torch.nn.Module, got {type(relation).__name__}")
        if loss not in ("mse", "cross_entropy"):
            raise ValueError(f"loss: expected 'mse' or 'cross_entropy', got {loss!r}")
        self.relation = relation
        self.squared, self.average = loss == "mse", bool(average)

    def _fit(self, features: Tensor, support: Flat) -> State:
        sums, weights = class_sums(features, support, self._classes(support))
        present = weights > 0
        if self.average:
            safe = torch.where(present, weights, 1.0)
            sums = sums / safe.view(*safe.shape, *[1] * (sums.ndim - 2))
        return {"classes": sums, "present": present}

    def _predict(self, state: State, features: Tensor, task: Tensor) -> tuple[Tensor, None]:
        classes = state["classes"][task]  # [N, C, d, ...]
        n, c = classes.shape[:2]
        query = features.unsqueeze(1).expand(n, c, *features.shape[1:])
        pairs = torch.cat([classes, query], dim=2).flatten(0, 1)
        scores = self._judged(pairs)
        if scores.shape != (n * c, 1):
            raise ValueError(
                f"relation: expected scores of shape [{n * c}, 1], got {list(scores.shape)}"
            )
        return hidden(scores.view(n, c), state["present"][task]), None

    def _judged(self, pairs: Tensor) -> Tensor:
        try:
            scores: Tensor = self.relation(pairs)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            shape = ", ".join(map(str, pairs.shape[1:]))
            raise ValueError(
                f"relation: expected a network of inputs [pairs, {shape}], which are the encoder's "
                f"{pairs.shape[1] // 2} features of a class and those of a query row, joined; it "
                f"failed with: {error}"
            ) from error
        return scores

    def _row_losses(self, outputs: Tensor, variances: Tensor | None, targets: Tensor) -> Tensor:
        if not self.squared:
            return super()._row_losses(outputs, variances, targets)
        right = nn.functional.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
        classes = (outputs != -math.inf).sum(-1)  # of the task, whatever others have
        return (outputs.sigmoid() - right).square().sum(-1) / classes

    def _probabilities(self, outputs: Tensor) -> Tensor:
        """The scores' sigmoids, to add up to 1; or their softmax."""
        if not self.squared:
            return super()._probabilities(outputs)
        scores = outputs.sigmoid()
        return scores / scores.sum(-1, keepdim=True)
