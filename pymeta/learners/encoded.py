"""`EncodedMAML`: a head that adapts to each task, on the features of an encoder that all share.

    f = encoder(rows of all tasks, in one batch)           torch
    out = MAML(head)(f of xs, ys, f of xq, yq)             native

The encoder can be any torch module, such as a pretrained transformer or a convolutional network.
Only the head has inner steps; the meta-gradient reaches the encoder through the features of both
sets, exact to second order, from one native call. That is ANIL (Raghu et al. 2020, "Rapid learning
or feature reuse?") with the shared part on its own side of the call, so that it may be of any kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pymeta.algorithms.maml import MAML
from pymeta.algorithms.outcome import Outcome
from pymeta.learners.base import has_batch_norm
from pymeta.learners.features import Features, choose
from pymeta.learners.rows import Flat, encoded, flat, merged, shaped
from pymeta.models.adapted import Adapted
from pymeta.spec.history import History
from pymeta.spec.losses import Loss
from pymeta.spec.optimizers import LearnableLR, Optimizer
from pymeta.spec.show import counted
from pymeta.tasks.checks import Expected
from pymeta.tasks.ragged import Ragged
from pymeta.tasks.task_set import QUERY, SUPPORT, Rows, Sizes, TaskSet, check_same_tasks, task_set

_WITHOUT_TARGETS = QUERY._replace(y="", weights="")
_ADAPTED = _WITHOUT_TARGETS._replace(offset="offset")


def _counting(rows: Flat) -> Tensor | None:
    """Which rows [N] count; None where all do."""
    if rows.weights is None:
        return None
    counts = rows.weights != 0
    return counts if counts.ndim == 1 else counts.any(-1)


def _as_it_came(features: Tensor, rows: Flat, s: TaskSet) -> Tensor | Ragged:
    """Features of rows [N, d] in the form of a set's inputs."""
    return rows.padded(features) if s.lengths is None else Ragged(features, s.lengths)


class EncodedMAML(nn.Module):
    """MAML of `head` on the features of `encoder`.

    Args:
        encoder: maps rows [N, ...], of any dtype, to features [N, d]. It should treat each row by
            itself; batch normalisation of its own sees the rows of all tasks.
        head: maps features [rows, d] to [rows, out]; what a task adapts. See `MAML`.
        loss: as for `MAML`.
        lr: as for `MAML`.
        steps: as for `MAML`.
        train: which of the encoder's parameters are trained: True for all, False for none, a
            number for that many of its last layers (the last children of its longest
            nn.ModuleList or nn.Sequential), a list of fnmatch patterns of their names, or None for
            those that require grad already, as `peft` leaves LoRA's factors.
        keep: whether to keep the features of rows that were seen, where no parameter of the
            encoder is trained.
        rows_at_once: the most rows that the encoder gets in a batch; None for all of a call.
        adapt: as for `MAML`, of the head's parameters.
        optimizer: as for `MAML`.
        first_order: as for `MAML`.
        anchor: as for `MAML`.
        anchor_rows: as for `MAML`.
        backend: as for `MAML`, of the head.
        precision: as for `MAML`, of the head.

    An encoder without trained parameters stays in eval mode and runs without a graph.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import torch
        >>> from pymeta.learners import EncodedMAML
        >>> encoder = torch.nn.Sequential(torch.nn.EmbeddingBag(100, 16), torch.nn.ReLU())
        >>> head = torch.nn.Linear(16, 2)
        >>> learner = EncodedMAML(encoder, head, loss="cross_entropy", lr=0.5, steps=5)
        >>> words = torch.arange(48).reshape(2, 4, 6)          # 2 tasks of 4 texts of 6 words
        >>> labels = torch.tensor([[0, 1, 0, 1]] * 2)
        >>> learner(words, labels, words, labels).loss.backward()
        >>> learner.adapt(words, labels)(words).shape
        torch.Size([2, 4, 2])
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        *,
        loss: Any,
        lr: float | LearnableLR | None = None,
        steps: int,
        train: bool | int | Sequence[str] | None = True,
        keep: bool = False,
        rows_at_once: int | None = None,
        adapt: Sequence[str] | None = None,
        optimizer: Optimizer | None = None,
        first_order: bool = False,
        anchor: float = 0.0,
        anchor_rows: float | None = None,
        backend: str = "auto",
        precision: str = "float32",
    ) -> None:
        """Check the arguments and choose what is trained."""
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: expected a torch.nn.Module, got {type(encoder).__name__}")
        if rows_at_once is not None and (
            isinstance(rows_at_once, bool) or not isinstance(rows_at_once, int) or rows_at_once < 1
        ):
            raise ValueError(
                f"rows_at_once: expected a whole number >= 1 or None, got {rows_at_once!r}"
            )
        choose(encoder, train)
        self.maml = MAML(
            head, loss=loss, lr=lr, steps=steps, adapt=adapt, optimizer=optimizer,
            first_order=first_order, anchor=anchor, anchor_rows=anchor_rows, backend=backend,
            precision=precision,
        )  # fmt: skip
        self.encoder = encoder
        if keep and not self.is_frozen:
            raise ValueError("keep: expected train=False, for features that training changes")
        self.features = Features(bool(keep), rows_at_once)
        self.train()

    @property
    def head(self) -> nn.Module:
        """What a task adapts; its parameters are the start."""
        return self.maml.model

    @property
    def is_frozen(self) -> bool:
        """Whether no parameter of the encoder is trained."""
        return not any(p.requires_grad for p in self.encoder.parameters())

    def train(self, mode: bool = True) -> EncodedMAML:
        """As of any module; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.is_frozen:
            self.encoder.eval()
        return self

    # ---- calls --------------------------------------------------------------------------------

    def forward(
        self,
        xs: Rows,
        ys: Rows,
        xq: Rows,
        yq: Rows | None = None,
        *,
        steps: int | None = None,
        support_sizes: Sizes = None,
        query_sizes: Sizes = None,
        support_weights: Rows | None = None,
        query_weights: Rows | None = None,
        support_offset: Rows | None = None,
        query_offset: Rows | None = None,
    ) -> Outcome:
        """Adapt the head to every task's support set and evaluate on its query set.

        Args:
            xs: support inputs [T, rows, ...] of any dtype, or a list of T tensors [rows_t, ...];
                numpy arrays and `pymeta.data.Ragged` as well.
            ys: support targets, as for `MAML`.
            xq: query inputs, like xs, with their own number of rows.
            yq: query targets, like ys; None for predictions alone.
            steps: the number of inner steps, instead of the one given at construction.
            support_sizes: [T], how many of its rows each task uses, where xs is padded.
            query_sizes: [T], likewise for xq.
            support_weights: as for `MAML`; the encoder does not see rows of weight 0.
            query_weights: likewise; their predictions have no graph.
            support_offset: as for `MAML`.
            query_offset: as for `MAML`.

        Returns:
            The `pymeta.Outcome`; its tensors carry the graph, through the encoder as well.

        Raises:
            TypeError, ValueError: as a call of `MAML`; the encoder's features are not [N, d].
        """
        support = self._set(SUPPORT, xs, ys, support_sizes, support_weights)
        names = QUERY if yq is not None else _WITHOUT_TARGETS
        query = self._set(names, xq, yq, query_sizes, query_weights if yq is not None else None)
        check_same_tasks(support, query)
        s, q = flat(support), flat(query)
        if s.x.shape[1:] != q.x.shape[1:]:
            raise ValueError(
                f"xq: expected rows of shape {list(s.x.shape[1:])} as xs has, got "
                f"{list(q.x.shape[1:])}"
            )
        if s.x.dtype != q.x.dtype:
            raise TypeError(f"xq: expected {s.x.dtype} as xs has, got {q.x.dtype}")
        fs, fq = self._features([s, q], [_counting(s), _counting(q)])
        out: Outcome = self.maml(
            _as_it_came(fs, s, support), ys, _as_it_came(fq, q, query), yq, steps=steps,
            support_sizes=support_sizes, query_sizes=query_sizes,
            support_weights=support_weights, query_weights=query_weights,
            support_offset=support_offset, query_offset=query_offset,
        )  # fmt: skip
        return out

    def adapt(
        self,
        xs: Rows,
        ys: Rows,
        *,
        steps: int | None = None,
        support_sizes: Sizes = None,
        support_weights: Rows | None = None,
        support_offset: Rows | None = None,
    ) -> EncodedTasks:
        """The T tasks' models, without any graph.

        Args:
            xs: support inputs, as in a call.
            ys: support targets, as in a call.
            steps: as in a call.
            support_sizes: as in a call.
            support_weights: as in a call.
            support_offset: as in a call.

        Raises:
            TypeError, ValueError: as a call.
        """
        with torch.no_grad():
            support = self._set(SUPPORT, xs, ys, support_sizes, support_weights)
            rows = flat(support)
            (features,) = self._features([rows], [_counting(rows)])
        heads: Adapted = self.maml.adapt(
            _as_it_came(features, rows, support), ys, steps=steps, support_sizes=support_sizes,
            support_weights=support_weights, support_offset=support_offset,
        )  # fmt: skip
        return EncodedTasks(self, heads)

    def explain(self) -> str:
        """Where a call runs."""
        how = "without a graph" if self.is_frozen else "trained"
        kept = (
            f", {counted(len(self.features), 'row is', 'rows are')} kept"
            if self.features.keep
            else ""
        )
        return f"{self.maml.explain()}; torch: the encoder, {how}, all tasks' rows at once{kept}"

    # ---- features -----------------------------------------------------------------------------

    def _set(self, names: Any, x: Any, y: Any, sizes: Any, weights: Any) -> TaskSet:
        like = next(self.maml.model.parameters())
        expected = Expected(self.maml.loss, like.dtype, like.device)
        return task_set(names, x, y, sizes, weights, expected)

    def _features(self, sides: list[Flat], counting: list[Tensor | None]) -> list[Tensor]:
        """The features [N, d] of the rows of sets, those that count in one batch.

        Those of rows that do not count have no graph.
        """
        chosen = [
            rows.x if counts is None else rows.x[counts]
            for rows, counts in zip(sides, counting, strict=True)
        ]
        both = self._encoded(torch.cat(chosen))
        parts = torch.split(both, [len(x) for x in chosen])
        return [
            features if counts is None else self._with_others(features, rows, counts)
            for features, rows, counts in zip(parts, sides, counting, strict=True)
        ]

    def _with_others(self, features: Tensor, rows: Flat, counts: Tensor) -> Tensor:
        with torch.no_grad():
            others = self._encoded(rows.x[~counts])
        return merged(counts, features, others)

    def _encoded(self, x: Tensor) -> Tensor:
        like = next(self.maml.model.parameters())
        return self.features(self.encoder, x).to(like.dtype)


class EncodedTasks:
    """T tasks' models: `models(xq)` predicts; `models[t]` is one, as a module.

    Attributes:
        heads: the tasks' heads, a `pymeta.Adapted` of features.
    """

    def __init__(self, learner: EncodedMAML, heads: Adapted) -> None:
        """Made by `adapt`."""
        self._learner, self.heads = learner, heads

    @property
    def parameters(self) -> Any:
        """Those of the heads, {name: [T, ...]}."""
        return self.heads.parameters

    @property
    def status(self) -> Any:
        """[T], 0 where a task's head is finite, 1 where it diverged."""
        return self.heads.status

    @property
    def history(self) -> History | None:
        """The heads'."""
        return self.heads.history

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, task: Any) -> Any:
        """One task's model, the shared encoder and a head of its own; or those of some tasks.

        Args:
            task: an integer for a module from rows to outputs; a slice, integers or a mask for
                an `EncodedTasks`.

        Raises:
            TypeError, IndexError: as for `pymeta.Adapted`.
        """
        found = self.heads[task]
        if isinstance(found, nn.Module):
            return nn.Sequential(self._learner.encoder, found)
        return EncodedTasks(self._learner, found)

    @torch.no_grad()
    def _inputs(self, xq: Rows, sizes: Sizes) -> Tensor | Ragged:
        query = self._learner._set(_ADAPTED, xq, None, sizes, None)
        rows = flat(query)
        (features,) = self._learner._features([rows], [None])
        return _as_it_came(features, rows, query)

    def __call__(self, xq: Rows, query_sizes: Sizes = None, *, offset: Rows | None = None) -> Any:
        """The raw outputs of every task's model on its own rows.

        Args:
            xq: [T, rows, ...], or a list of T tensors [rows_t, ...].
            query_sizes: [T], how many of its rows each task uses, where xq is padded.
            offset: as for `pymeta.Adapted`.

        Returns:
            [T, rows, out], or a list where xq is one.

        Raises:
            TypeError, ValueError: as for `pymeta.Adapted`.
        """
        return self.heads(self._inputs(xq, query_sizes), query_sizes, offset=offset)

    @property
    def loss(self) -> Loss:
        """What the tasks were adapted by."""
        return self.heads.loss

    @property
    def mixes_rows(self) -> bool:
        """Whether a prediction depends on the other rows of its call, as with batch norm."""
        return self.heads.mixes_rows or has_batch_norm(self._learner.encoder)

    def input_gradients(self, xq: Rows, cotangents: Rows) -> Any:
        """The gradient of every model's sum(cotangents * outputs) by its rows.

        The heads' is one native call, the encoder's is autograd's.

        Args:
            xq: as for a call, of floating-point numbers.
            cotangents: in the shape of a call's result.

        Returns:
            In the shape of xq; a list where that is one.

        Raises:
            TypeError: xq are no floating-point numbers; and as a call.
            ValueError: as a call.
        """
        query = self._learner._set(_ADAPTED, xq, None, None, None)
        rows = flat(query)
        if not rows.x.is_floating_point():
            raise TypeError(f"xq: expected numbers that have a gradient, got {rows.x.dtype}")
        with torch.enable_grad():
            x = rows.x.detach().requires_grad_()
            features = encoded(self._learner.encoder, x)
        back = self.heads.input_gradients(_as_it_came(features.detach(), rows, query), cotangents)
        flows = torch.cat(back) if isinstance(back, list) else rows.own(back)
        (found,) = torch.autograd.grad(features, x, flows)
        return shaped(found, rows, query)

    def predict_proba(
        self, xq: Rows, query_sizes: Sizes = None, *, offset: Rows | None = None
    ) -> Any:
        """The probabilities: the outputs' softmax, or their sigmoid for bce_with_logits.

        Args:
            xq: as for a call.
            query_sizes: as for a call.
            offset: as for a call.

        Raises:
            TypeError: the loss knows no probabilities.
        """
        return self.heads.predict_proba(self._inputs(xq, query_sizes), query_sizes, offset=offset)
