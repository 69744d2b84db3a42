"""What learners with a shared encoder have in common: an encoder, and something exact on top.

All tasks' rows go through the encoder in one batch. What is fitted to a task's support set is a
closed form of its features, differentiated by autograd, so `loss.backward()` trains the encoder and
what else there is to learn, end to end. There is no loop over tasks.

A learner says how it is fitted (`_fit`) and what it then predicts (`_predict`); shapes, ragged and
padded tasks, weights, losses and adapted models are here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymeta.algorithms.outcome import told_outcome
from pymeta.learners.rows import Flat, encoded, flat, merged, shaped
from pymeta.learners.sets import row_set
from pymeta.spec.losses import Loss, describe_loss
from pymeta.spec.show import counted
from pymeta.tasks.checks import Expected
from pymeta.tasks.task_set import (
    QUERY,
    SUPPORT,
    Rows,
    Sizes,
    TaskSet,
    check_same_tasks,
)

State: TypeAlias = dict[str, Tensor]  # of the adapted tasks, each [T, ...]
_WITHOUT_TARGETS = QUERY._replace(y="", weights="")
_ADAPTED = _WITHOUT_TARGETS._replace(offset="offset")


class Outcome(NamedTuple):
    """What a call returns.

    Attributes:
        loss: [], the mean over tasks of `task_losses`; None where no yq came.
        task_losses: [T], each task's (weighted) mean query loss; None likewise.
        predictions: [T, rows, out], the raw outputs on the query set; a list of [rows_t, out]
            where xq came as one; rows beyond a task's query size are 0.
        variances: of the predictions, in the same form, where the learner knows them, or None.
    """

    loss: Tensor | None
    task_losses: Tensor | None
    predictions: Tensor | list[Tensor]
    variances: Tensor | list[Tensor] | None = None

    def __repr__(self) -> str:
        """The losses in figures, the rest as shapes."""
        return told_outcome(self)


def row_losses(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each row: outputs [N, out], targets [N] or [N, out] -> [N]."""
    if loss.takes_classes:
        return F.cross_entropy(outputs, targets, reduction="none")
    targets = targets.reshape(outputs.shape)
    if loss.kind == "bce_with_logits":
        each = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    else:
        each = (outputs - targets).square()
    return each.mean(dim=-1)


def check_loss(loss: Any, kinds: tuple[str, ...]) -> Loss:
    """The description of a loss; ValueError unless it is a plain one of these kinds."""
    described = describe_loss(loss)
    if described.kind not in kinds or described != Loss(described.kind):
        raise ValueError(f"loss: expected {' or '.join(kinds)}, without options, got {described}")
    return described


def has_batch_norm(module: nn.Module) -> bool:
    """Whether rows are normalised by each other's statistics anywhere in a module."""
    kinds = nn.modules.batchnorm._BatchNorm
    return any(isinstance(each, kinds) for each in module.modules())


class EncodedLearner(nn.Module, ABC):
    """The base; not for use by itself.

    Args:
        encoder: maps rows [N, ...] to features [N, d].
        loss: what the query set is judged by.
    """

    loss: Loss
    _any_features: ClassVar[bool] = False  # or [N, d] alone

    def __init__(self, encoder: nn.Module, loss: Loss) -> None:
        """Keep the encoder and the loss."""
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: expected a torch.nn.Module, got {type(encoder).__name__}")
        self.encoder = encoder
        self.loss = loss

    # ---- what a learner says ------------------------------------------------------------------

    @abstractmethod
    def _fit(self, features: Tensor, support: Flat) -> State:
        """What the support sets tell: features [N, d] of its rows that count -> [T, ...] each."""

    @abstractmethod
    def _predict(
        self, state: State, features: Tensor, task: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs [N, out] of rows of the tasks `task` [N], and their variances or None."""

    def _row_losses(self, outputs: Tensor, variances: Tensor | None, targets: Tensor) -> Tensor:
        return row_losses(self.loss, outputs, targets)

    def _check_query(self, state: State, rows: Flat) -> None:
        """Raise where the query's targets do not go with what was fitted."""

    def _probabilities(self, outputs: Tensor) -> Tensor:
        """Of classes or of 1, from the raw outputs."""
        if self.loss.takes_classes:
            return outputs.softmax(-1)
        return outputs.sigmoid()

    def _out_features(self) -> int | None:
        """How many outputs there are, where that is known before a call."""
        return None

    # ---- calls --------------------------------------------------------------------------------

    def forward(
        self,
        xs: Rows,
        ys: Rows,
        xq: Rows,
        yq: Rows | None = None,
        *,
        support_sizes: Sizes = None,
        query_sizes: Sizes = None,
        support_weights: Rows | None = None,
        query_weights: Rows | None = None,
        support_offset: Rows | None = None,
        query_offset: Rows | None = None,
    ) -> Outcome:
        """Fit to every task's support set and evaluate on its query set.

        Args:
            xs: support inputs [T, rows, ...], or a list of T tensors [rows_t, ...]; numpy arrays
                and `pymeta.data.Ragged` as well.
            ys: support targets: class indices [T, rows] for cross_entropy, otherwise
                [T, rows, out], or [T, rows] where out is 1; a list where xs is one.
            xq: query inputs, like xs, with their own number of rows.
            yq: query targets, like ys; None for predictions alone.
            support_sizes: [T], how many of its rows each task uses, where xs is padded.
            query_sizes: [T], likewise for xq.
            support_weights: [T, rows] (or a list) weights of the rows; one of weight 0 is as good
                as absent.
            query_weights: likewise for the query rows' losses.
            support_offset: [T, rows, out] (or [T, rows] where out is 1, or a list), added to the
                outputs, which are then fitted to what it leaves: a pooled model's logits, say.
            query_offset: likewise for the query rows, in their predictions.

        Returns:
            The `Outcome`; its tensors carry the graph.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: a wrong shape or device, or a label, size or weight out of range.
        """
        support = self._set(SUPPORT, xs, ys, support_sizes, support_weights, support_offset)
        names = QUERY if yq is not None else _WITHOUT_TARGETS
        if yq is None and query_weights is not None:
            raise ValueError("query_weights: expected None, because there are no yq to weigh")
        query = self._set(names, xq, yq, query_sizes, query_weights, query_offset)
        check_same_tasks(support, query)
        s, q = flat(support).that_count(), flat(query)
        if s.x.shape[1:] != q.x.shape[1:]:
            raise ValueError(
                f"xq: expected rows of shape {list(s.x.shape[1:])} as xs has, got "
                f"{list(q.x.shape[1:])}"
            )
        counting = q.that_count()
        both = self._features(torch.cat([s.x, counting.x]))
        state = self._fit(both[: len(s.x)], s)
        outputs, variances = self._outputs(state, both[len(s.x) :], counting)
        loss, losses = None, None
        if yq is not None:
            self._check_query(state, counting)
            losses = self._task_losses(outputs, variances, counting)
            loss = losses.mean()
        if len(counting.x) < len(q.x):
            outputs, variances = self._with_others(state, outputs, variances, q)
        found = None if variances is None else shaped(variances, q, query)
        return Outcome(loss, losses, shaped(outputs, q, query), found)

    def _outputs(self, state: State, features: Tensor, rows: Flat) -> tuple[Tensor, Tensor | None]:
        """What is predicted for rows, with their offset."""
        outputs, variances = self._predict(state, features, rows.task)
        return outputs if rows.offset is None else outputs + rows.offset, variances

    def _with_others(
        self, state: State, outputs: Tensor, variances: Tensor | None, q: Flat
    ) -> tuple[Tensor, Tensor | None]:
        """Predictions of the rows of weight 0 as well, which no gradient sees."""
        assert q.weights is not None
        kept = q.weights != 0
        others = q.where(~kept)
        with torch.no_grad():
            more, spread = self._outputs(state, self._features(others.x), others)
        outputs = merged(kept, outputs, more)
        if variances is None or spread is None:
            return outputs, None
        return outputs, merged(kept, variances, spread)

    def adapt(
        self,
        xs: Rows,
        ys: Rows,
        *,
        support_sizes: Sizes = None,
        support_weights: Rows | None = None,
        support_offset: Rows | None = None,
    ) -> AdaptedTasks:
        """The T tasks' models, without any graph.

        Args:
            xs: support inputs, as in a call.
            ys: support targets, as in a call.
            support_sizes: as in a call.
            support_weights: as in a call.
            support_offset: as in a call.

        Raises:
            TypeError, ValueError: as a call.
        """
        with torch.no_grad():
            support = self._set(SUPPORT, xs, ys, support_sizes, support_weights, support_offset)
            rows = flat(support).that_count()
            state = self._fit(self._features(rows.x), rows)
        return AdaptedTasks(self, state, support.tasks)

    def explain(self) -> str:
        """Where a call runs."""
        return (
            f"torch: a {type(self).__name__} takes all tasks' rows through its encoder at once, "
            f"and fits all tasks at once"
        )

    # ---- what all of them do ------------------------------------------------------------------

    def _expected(self) -> Expected:
        like = next(iter(self.parameters()))
        return Expected(self.loss, like.dtype, like.device, None, self._out_features())

    def _set(
        self, names: Any, x: Any, y: Any, sizes: Any, weights: Any, offset: Any = None
    ) -> TaskSet:
        return row_set(names, x, y, sizes, weights, offset, self._expected())

    def _features(self, x: Tensor) -> Tensor:
        features = encoded(self.encoder, x)
        axes = "d, ..." if self._any_features else "d"
        fits = isinstance(features, Tensor) and features.ndim >= 2
        if not fits or (features.ndim > 2 and not self._any_features) or len(features) != len(x):
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"encoder: expected features of shape [{len(x)}, {axes}], got {got}")
        found: Tensor = features
        return found

    def _task_losses(self, outputs: Tensor, variances: Tensor | None, rows: Flat) -> Tensor:
        """Weighted means over rows that count; 0 where a task has none."""
        assert rows.y is not None
        w = rows.row_weights(outputs)
        losses = self._row_losses(outputs, variances, rows.y)
        total = rows.sums(w)
        return rows.sums(w * losses) / torch.where(total > 0, total, 1.0)


class AdaptedTasks:
    """T tasks' models: `models(xq)` predicts, `models[t]` is one of them.

    Attributes:
        state: {name: [T, ...]}, what was fitted.
    """

    def __init__(self, learner: EncodedLearner, state: Mapping[str, Tensor], tasks: int) -> None:
        """Made by `adapt`."""
        self._learner, self.state, self._tasks = learner, dict(state), tasks

    def __len__(self) -> int:
        return self._tasks

    def __getitem__(self, index: int | slice) -> AdaptedTasks:
        """Some of the tasks; of an index, a model whose call takes rows [rows, ...] alone too."""
        if isinstance(index, int):
            if not -self._tasks <= index < self._tasks:
                raise IndexError(
                    f"index {index} is out of range for {counted(self._tasks, 'task')}"
                )
            index = slice(index % self._tasks, index % self._tasks + 1)
        state = {name: value[index] for name, value in self.state.items()}
        return AdaptedTasks(self._learner, state, len(range(*index.indices(self._tasks))))

    @torch.no_grad()
    def _outputs(self, xq: Rows, sizes: Sizes, offset: Rows | None) -> tuple[Any, Any]:
        learner = self._learner
        query = learner._set(_ADAPTED, xq, None, sizes, None, offset)
        if query.tasks != self._tasks:
            raise ValueError(f"xq: expected {counted(self._tasks, 'task')}, got {query.tasks}")
        rows = flat(query)
        outputs, variances = learner._outputs(self.state, learner._features(rows.x), rows)
        found = None if variances is None else shaped(variances, rows, query)
        return shaped(outputs, rows, query), found

    def __call__(self, xq: Rows, query_sizes: Sizes = None, *, offset: Rows | None = None) -> Any:
        """The raw outputs of every task's model on its own rows.

        Args:
            xq: [T, rows, ...], or a list of T tensors [rows_t, ...].
            query_sizes: [T], how many of its rows each task uses, where xq is padded.
            offset: [T, rows, out], [T, rows] where out is 1, or a list: added to the outputs.

        Returns:
            [T, rows, out], or a list where xq is one.
        """
        return self._outputs(xq, query_sizes, offset)[0]

    @property
    def loss(self) -> Loss:
        """What the learner's query sets are judged by."""
        return self._learner.loss

    @property
    def mixes_rows(self) -> bool:
        """Whether a prediction depends on the other rows of its call, as with batch norm."""
        return has_batch_norm(self._learner)

    def input_gradients(self, xq: Rows, cotangents: Rows) -> Any:
        """The gradient of every model's sum(cotangents * outputs) by its rows, by autograd.

        Args:
            xq: as for a call.
            cotangents: in the shape of a call's result.

        Returns:
            In the shape of xq; a list where that is one.

        Raises:
            TypeError, ValueError: as a call.
        """
        learner, names = self._learner, _ADAPTED._replace(offset="cotangents")
        query = learner._set(names, xq, None, None, None, cotangents)  # of the outputs' shape
        if query.tasks != self._tasks:
            raise ValueError(f"xq: expected {counted(self._tasks, 'task')}, got {query.tasks}")
        rows = flat(query)
        flows, rows.offset = rows.offset, None
        if flows is None:
            raise TypeError("cotangents: expected a number for each output, got None")
        with torch.enable_grad():
            x = rows.x.detach().requires_grad_()
            outputs, _ = learner._outputs(self.state, learner._features(x), rows)
            (found,) = torch.autograd.grad(outputs, x, flows.reshape(outputs.shape))
        return shaped(found, rows, query)

    def variances(self, xq: Rows, query_sizes: Sizes = None) -> Any:
        """The predictions' variances, in the form of a call.

        Raises:
            TypeError: the learner knows none.
        """
        found = self._outputs(xq, query_sizes, None)[1]
        if found is None:
            raise TypeError(f"variances: a {type(self._learner).__name__} knows none")
        return found

    def predict_proba(
        self, xq: Rows, query_sizes: Sizes = None, *, offset: Rows | None = None
    ) -> Any:
        """The probabilities: the outputs' softmax, or their sigmoid for bce_with_logits.

        Raises:
            TypeError: the learner's loss knows no probabilities.
        """
        kind = self._learner.loss.kind
        if kind not in ("cross_entropy", "bce_with_logits"):
            raise TypeError(f"predict_proba: the loss {kind} knows no probabilities")
        outputs = self(xq, query_sizes, offset=offset)
        if isinstance(outputs, list):
            return [self._learner._probabilities(o) for o in outputs]
        return self._learner._probabilities(outputs)
