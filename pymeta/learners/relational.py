"""`RelationalMAML`: each task starts from where tasks like it start.

In the line of HSML (Yao et al. 2019, "Hierarchically structured meta-learning") and ARML (Yao et
al. 2020, "Automated relational meta-learning"): there are several kinds of tasks, the network
learns them as a graph of prototypes, and a task's start is that of the prototypes it is near.

    e_t   = after(mean over support rows of row([x, y]))       the task's embedding, normalised
    r_tp  = softmax_p(-|e_t - v_p|^2 / (d temperature))        its relations to the P prototypes
    a_pq  = sigmoid(u |v_p - v_q| + b), rows to add up to 1    the prototypes' own
    c_t   = sum_p r_tp (v_p + tanh(sum_q a_pq v_q W))          what is known of tasks like it
    start = shared start * (1 + tanh(gates(c_t))) + shifts(c_t)

with a mean weighted as the rows are, and everything from the embedding to the shared start trained
by the query loss, through MAML's native gradient to each task's start. A task's own start depends
on its relations alone: with one prototype all tasks have the same, and this is MAML. So it is at
the beginning, where gates and shifts are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pymeta.algorithms.maml import MAML
from pymeta.algorithms.outcome import told_outcome
from pymeta.learners.rows import Flat, encoded, flat
from pymeta.learners.sets import row_set, targets_as_columns
from pymeta.learners.starts import adapted
from pymeta.models.adapted import Adapted
from pymeta.spec.optimizers import LearnableLR, Optimizer
from pymeta.spec.show import counted
from pymeta.tasks.checks import Expected
from pymeta.tasks.task_set import SUPPORT, Rows, Sizes


class RelationalOutcome(NamedTuple):
    """What a call returns.

    Attributes:
        loss: [], the mean over tasks of `task_losses`; None where no yq came.
        task_losses: [T], each task's mean query loss after adaptation; None likewise.
        predictions: [T, rows, out], as those of `pymeta.Outcome`.
        relations: [T, prototypes], how near each task is to each prototype; they add up to 1.
    """

    loss: Tensor
    task_losses: Tensor
    predictions: Tensor | list[Tensor]
    relations: Tensor

    def __repr__(self) -> str:
        """The losses in figures, the rest as shapes."""
        return told_outcome(self)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
    return value


class RelationalMAML(nn.Module):
    """MAML of `model` with a start for each task, by its relations to learned prototypes.

    Args:
        model: as for `MAML`; its parameters are the shared start.
        loss: as for `MAML`.
        features: how many numbers a row of xs has, or what `encoder` makes of one.
        targets: how many columns ys has; of class labels, how many classes there are.
        lr: as for `MAML`.
        steps: as for `MAML`.
        prototypes: how many.
        width: of the tasks' embeddings.
        per: what gates and shifts are of: "unit", where the rows of a weight have a gate each, and
            a bias's elements a gate and a shift (a FiLM layer's); or "element", where every
            element has both.
        encoder: a network from rows of xs [N, ...] to [N, features] for the embedding alone; None
            for the rows themselves, flattened.
        adapt: as for `MAML`; what is not adapted has no start of its own.
        optimizer: as for `MAML`.
        first_order: as for `MAML`.
        backend: as for `MAML`.
        precision: as for `MAML`.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import torch
        >>> from pymeta.learners import RelationalMAML
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> learner = RelationalMAML(
        ...     net, loss="mse", features=1, targets=1, lr=0.01, steps=3, prototypes=4
        ... )
        >>> x = torch.linspace(-1, 1, 20).reshape(2, 10, 1)
        >>> out = learner(x, x.square(), x, x.square())
        >>> out.loss.backward()
        >>> out.relations.shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Any,
        features: int,
        targets: int,
        lr: float | LearnableLR | None = None,
        steps: int,
        prototypes: int = 8,
        width: int = 32,
        per: str = "unit",
        encoder: nn.Module | None = None,
        adapt: Sequence[str] | None = None,
        optimizer: Optimizer | None = None,
        first_order: bool = False,
        backend: str = "auto",
        precision: str = "float32",
    ) -> None:
        """Check the arguments and make the networks."""
        super().__init__()
        self.features, self.targets = _count("features", features), _count("targets", targets)
        self.width = _count("width", width)
        if per not in ("unit", "element"):
            raise ValueError(f"per: expected 'unit' or 'element', got {per!r}")
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise TypeError(
                f"encoder: expected a torch.nn.Module or None, got {type(encoder).__name__}"
            )
        self.per = per
        self.maml = MAML(
            model, loss=loss, lr=lr, steps=steps, adapt=adapt, optimizer=optimizer,
            first_order=first_order, backend=backend,
            precision=precision,
        )  # fmt: skip
        like = adapted(self.maml)
        self.encoder = encoder
        self.row = nn.Sequential(
            nn.Linear(features + targets, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.after = nn.Sequential(
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.LayerNorm(width, elementwise_affine=False),
        )
        self.prototypes = nn.Parameter(torch.randn(_count("prototypes", prototypes), width))
        self.log_temperature = nn.Parameter(torch.tensor(0.0))
        self.edge = nn.Linear(width, 1)
        self.exchange = nn.Linear(width, width, bias=False)
        last = nn.Linear(width, sum(self._sizes(p) for p in like.values()))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.modulation = nn.Sequential(nn.Linear(width, width), nn.Tanh(), last)
        first = next(iter(like.values()))
        for part in (self.row, self.after, self.edge, self.exchange, self.modulation):
            part.to(first.device, first.dtype)
        for name in ("prototypes", "log_temperature"):
            getattr(self, name).data = getattr(self, name).data.to(first.device, first.dtype)

    @property
    def model(self) -> nn.Module:
        """The model whose parameters are the shared start."""
        return self.maml.model

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
    ) -> RelationalOutcome:
        """Adapt to every task's support set from its own start, and evaluate on its query set.

        Args:
            xs: support inputs [T, rows, ...], or a list of T tensors [rows_t, ...].
            ys: support targets, as for `MAML`.
            xq: query inputs, like xs, with their own number of rows.
            yq: query targets, like ys; None for predictions alone.
            steps: the number of inner steps, instead of the one given at construction.
            support_sizes: [T], how many of its rows each task uses, where xs is padded.
            query_sizes: [T], likewise for xq.
            support_weights: [T, rows] (or a list) weights of the rows, in the embedding too.
            query_weights: likewise for the query rows' losses.
            support_offset: added to the model's outputs before the loss, as for `MAML`.
            query_offset: likewise for the query rows, and part of the predictions.

        Returns:
            The `RelationalOutcome`; its tensors carry the graph.

        Raises:
            TypeError, ValueError: as a call of `MAML`; weights are of single targets.
        """
        relations = self.relations(
            xs, ys, support_sizes=support_sizes, support_weights=support_weights
        )
        out = self.maml(
            xs, ys, xq, yq, steps=steps, support_sizes=support_sizes, query_sizes=query_sizes,
            support_weights=support_weights, query_weights=query_weights,
            support_offset=support_offset, query_offset=query_offset,
            start=self.start(relations),
        )  # fmt: skip
        return RelationalOutcome(out.loss, out.task_losses, out.predictions, relations)

    def adapt(
        self,
        xs: Rows,
        ys: Rows,
        *,
        steps: int | None = None,
        support_sizes: Sizes = None,
        support_weights: Rows | None = None,
        support_offset: Rows | None = None,
    ) -> Adapted:
        """The T tasks' models, without any graph.

        Args:
            xs: support inputs, as in a call.
            ys: support targets, as in a call.
            steps: as in a call.
            support_sizes: as in a call.
            support_weights: as in a call.
            support_offset: as in a call.

        Returns:
            T models, to be used as `models(xq)`, `models[t]`, `models.parameters`.

        Raises:
            TypeError, ValueError: as a call.
        """
        with torch.no_grad():
            start = self.start(
                self.relations(xs, ys, support_sizes=support_sizes, support_weights=support_weights)
            )
        models: Adapted = self.maml.adapt(
            xs, ys, steps=steps, support_sizes=support_sizes, support_weights=support_weights,
            support_offset=support_offset, start=start,
        )  # fmt: skip
        return models

    def explain(self) -> str:
        """Where a call runs."""
        return f"{self.maml.explain()}; torch: the tasks' relations and starts, all at once"

    # ---- tasks, prototypes, starts ------------------------------------------------------------

    def relations(
        self,
        xs: Rows,
        ys: Rows,
        *,
        support_sizes: Sizes = None,
        support_weights: Rows | None = None,
    ) -> Tensor:
        """How near tasks are to the prototypes, [T, prototypes]; they add up to 1.

        Args:
            xs: support inputs, as in a call.
            ys: support targets, as in a call.
            support_sizes: as in a call.
            support_weights: as in a call.

        Raises:
            TypeError, ValueError: as a call.
        """
        like = self.prototypes
        loss = self.maml.loss
        outputs = self.targets if loss.takes_classes else self.targets * loss.outputs_per_target
        expected = Expected(loss, like.dtype, like.device, None, outputs)
        given = row_set(SUPPORT, xs, ys, support_sizes, support_weights, None, expected)
        embedding = self._embedding(flat(given).that_count())
        apart = (embedding.unsqueeze(1) - self.prototypes).square().mean(-1)
        return (-apart / self.log_temperature.exp()).softmax(-1)

    def graph(self) -> Tensor:
        """What the prototypes are to each other, [prototypes, prototypes]; rows add up to 1."""
        apart = (self.prototypes.unsqueeze(1) - self.prototypes).abs()
        edges = self.edge(apart).squeeze(-1).sigmoid()
        shares: Tensor = edges / edges.sum(-1, keepdim=True)
        return shares

    def start(self, relations: Tensor) -> dict[str, Tensor]:
        """The start {name: [T, ...]} of tasks with these relations [T, prototypes]."""
        prototypes = self.prototypes + self.exchange(self.graph() @ self.prototypes).tanh()
        like = adapted(self.maml)
        changes = self.modulation(relations @ prototypes)
        parts = torch.split(changes, [self._sizes(p) for p in like.values()], dim=1)
        return {
            name: self._changed(parameter, change)
            for (name, parameter), change in zip(like.items(), parts, strict=True)
        }

    def _sizes(self, parameter: Tensor) -> int:
        """How many gates and shifts a parameter has."""
        if self.per == "element" or parameter.ndim < 2:
            return 2 * parameter.numel()
        return parameter.shape[0]

    def _changed(self, parameter: Tensor, change: Tensor) -> Tensor:
        """[T, ...]: a parameter by the gates and shifts [T, ...] of tasks."""
        tasks = len(change)
        if self.per == "element" or parameter.ndim < 2:
            gates, shifts = change.chunk(2, dim=1)
            shape = (tasks, *parameter.shape)
            return parameter * (1 + gates.reshape(shape).tanh()) + shifts.reshape(shape)
        gates = change.view(tasks, len(parameter), *[1] * (parameter.ndim - 1))
        return parameter * (1 + gates.tanh())

    def _embedding(self, rows: Flat) -> Tensor:
        """Of the tasks, [T, width], by their rows; 0 before `after` where a task has none."""
        x = rows.x.flatten(1) if self.encoder is None else encoded(self.encoder, rows.x)
        if x.ndim != 2 or x.shape[1] != self.features:
            what = "xs" if self.encoder is None else "encoder"
            raise ValueError(
                f"{what}: expected rows of {counted(self.features, 'feature')}, got "
                f"{list(x.shape[1:])}"
            )
        classes = self.targets if self.maml.loss.takes_classes else None
        y = targets_as_columns(rows, classes, x)
        w = rows.row_weights(x)
        total = rows.sums(w)
        sums = rows.sums(self.row(torch.cat([x, y], dim=1)) * w.unsqueeze(-1))
        means = sums / torch.where(total > 0, total, 1.0).unsqueeze(-1)
        embedding: Tensor = self.after(means)
        return embedding
