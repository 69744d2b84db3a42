"""`MetaLSTM`: an LSTM, shared by all coordinates and tasks, takes the steps.

Ravi, Larochelle 2017, "Optimization as a model for few-shot learning" (ICLR). A task's parameters
are the cell state of an LSTM whose candidate is the negative gradient g of its support loss L:

    h_k, s_k = LSTM([p(g_k), p(L_k)], h_(k-1), s_(k-1))              h, s of `hidden` numbers
    f_k = sigmoid(W_f [h_k, theta_(k-1), f_(k-1)] + b_f)             how much of theta is kept
    i_k = sigmoid(W_i [h_k, theta_(k-1), i_(k-1)] + b_i)             the step size
    theta_k = f_k theta_(k-1) - i_k g_k,    theta_0 learned          f_0 = i_0 = h_0 = s_0 = 0

for each coordinate by itself, with p the logarithm and the sign of a number (section 3.3). With f
at 1 and i at a constant this is gradient descent, and near there it begins.

A step is two native calls: the gradients of all T tasks, each at its own parameters, which as in
the paper are constants for the meta-gradient; and the cell, on the coordinates of all tasks. The
meta-gradient goes back through the cell in one call, for which gradients and losses alone are kept,
T * (P + 1) numbers of each step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pymeta import native
from pymeta.algorithms.maml import MAML
from pymeta.algorithms.outcome import Outcome
from pymeta.algorithms.task_gradients import statistics, task_gradients, tracked
from pymeta.backend import cell as native_cell
from pymeta.learners.starts import adapted, joined, named, tasks_in
from pymeta.models.adapted import Adapted
from pymeta.reference import cell as reference
from pymeta.spec import running
from pymeta.spec.schedule import check_count
from pymeta.tasks.task_set import Rows, Sizes


def _between_0_and_1(name: str, value: Any) -> float:
    """The logit of a number; ValueError unless it lies between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}")
    return math.log(value / (1 - value))


class MetaLSTM(nn.Module):
    """A learned optimiser with a learned start, of `model`.

    Args:
        model: maps [rows, ...] to [rows, out]; its parameters are the start.
        loss: as for `MAML`.
        steps: how many steps it takes on a task's support set, >= 1.
        lr: the step size (input gate) that it begins with, between 0 and 1.
        keep: how much of a parameter a step keeps (forget gate) in the beginning, likewise.
        hidden: the width of the LSTM.
        p: from where on the preprocessing sees a number as small, exp(-p).
        adapt: as for `MAML`.
        backend: as for `MAML`; of the gradients, the cell (native on the CPU) and the query losses.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import torch
        >>> from pymeta.learners import MetaLSTM
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> learner = MetaLSTM(net, loss="mse", steps=3)
        >>> x = torch.linspace(-1, 1, 20).reshape(2, 10, 1)
        >>> learner(x, x.square(), x, x.square()).loss.backward()
        >>> learner.adapt(x, x.square())(x).shape
        torch.Size([2, 10, 1])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Any,
        steps: int = 5,
        lr: float = 0.01,
        keep: float = 0.999,
        hidden: int = 20,
        p: float = 10.0,
        adapt: Sequence[str] | None = None,
        backend: str = "auto",
    ) -> None:
        """Check the arguments and make the cell."""
        super().__init__()
        self.steps = check_count("steps", steps)
        if self.steps < 1 or check_count("hidden", hidden) < 1:
            name, value = ("steps", steps) if self.steps < 1 else ("hidden", hidden)
            raise ValueError(f"{name}: expected at least 1, got {value}")
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 < p < 80:
            raise ValueError(f"p: expected a number between 0 and 80, got {p!r}")
        biases = _between_0_and_1("keep", keep), _between_0_and_1("lr", lr)
        self.p = float(p)
        self._is_native = native.backend(backend) != "torch"
        self.maml = MAML(model, loss=loss, lr=1.0, steps=0, adapt=adapt, backend=backend)
        if running.most_rows(list(model.modules())) > 1:
            raise ValueError(
                "model: a PerStepBatchNorm counts the steps of gradient descent, and those of an "
                "LSTM are none; use torch's batch normalisation"
            )
        like = next(iter(adapted(self.maml).values()))
        self.lstm = nn.LSTMCell(4, hidden)
        self.forget_gate = nn.Linear(hidden + 2, 1)
        self.input_gate = nn.Linear(hidden + 2, 1)
        with torch.no_grad():
            for parameter in (*self.lstm.parameters(), self.forget_gate.weight,
                              self.input_gate.weight):  # fmt: skip
                parameter.uniform_(-0.01, 0.01)  # as in the authors' code
            self.forget_gate.bias.fill_(biases[0])
            self.input_gate.bias.fill_(biases[1])
        for part in (self.lstm, self.forget_gate, self.input_gate):
            part.to(like.device, like.dtype)

    @property
    def model(self) -> nn.Module:
        """The model whose parameters are the start."""
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
    ) -> Outcome:
        """Take the steps on every task's support set and evaluate on its query set.

        The results are differentiable by the start and by the cell.

        Args:
            xs: support inputs [T, rows, ...], or a list of T tensors [rows_t, ...].
            ys: support targets, as for `MAML`.
            xq: query inputs, like xs, with their own number of rows.
            yq: query targets, like ys; None for predictions alone.
            steps: how many steps, instead of the number given at construction.
            support_sizes: [T], how many of its rows each task uses, where xs is padded.
            query_sizes: [T], likewise for xq.
            support_weights: weights of rows, as for `MAML`.
            query_weights: likewise for the query rows.
            support_offset: added to the model's outputs before the loss, as for `MAML`.
            query_offset: likewise for the query rows, and part of the predictions.

        Returns:
            The `pymeta.Outcome`.

        Raises:
            TypeError, ValueError: as a call of `MAML`.
        """
        side = (support_sizes, support_weights, support_offset)
        start = self._after_steps(xs, ys, side, steps)
        out: Outcome = self.maml(
            xs, ys, xq, yq, support_sizes=support_sizes, query_sizes=query_sizes,
            support_weights=support_weights, query_weights=query_weights,
            support_offset=support_offset, query_offset=query_offset, start=start,
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
            start = self._after_steps(
                xs, ys, (support_sizes, support_weights, support_offset), steps
            )
        models: Adapted = self.maml.adapt(
            xs, ys, support_sizes=support_sizes, support_weights=support_weights,
            support_offset=support_offset, start=start,
        )  # fmt: skip
        return models

    def explain(self) -> str:
        """Where a call runs."""
        like = next(iter(adapted(self.maml).values()))
        where = "native" if self._is_native and native_cell.runs(like) else "torch"
        return f"{self.maml.explain()}; {where}: the cell, for all coordinates of all tasks at once"

    # ---- steps --------------------------------------------------------------------------------

    def _after_steps(
        self, xs: Rows, ys: Rows, side: tuple[Any, Any, Any], steps: int | None
    ) -> dict[str, Tensor]:
        """Every task's parameters after the steps, {name: [T, ...]}."""
        steps = self.steps if steps is None else check_count("steps", steps)
        like = adapted(self.maml)
        theta = joined(like).expand(tasks_in(xs), -1)
        cell = self._cell()

        norms, measured = tracked(self.maml, xs), []

        def gradients_at(here: Tensor) -> tuple[Tensor, Tensor]:
            at = named(here.detach(), like)
            if norms:
                measured.append(statistics(self.maml, xs, ys, at, *side[:2]))
            found, losses = task_gradients(self.maml, xs, ys, at, *side)
            return torch.cat([g.flatten(1) for g in found.values()], 1), losses

        if self._is_native and native_cell.runs(theta):
            theta = native_cell.take_steps(*cell, gradients_at, theta, steps)
        else:
            theta = reference.take_steps(cell, gradients_at, theta, steps)
        if measured:
            running.update(norms, torch.stack(measured).mean(0))
        return named(theta, like)

    def _cell(self) -> reference.Cell:
        """The weights of the LSTM and the gates, as the cell takes them."""
        lstm, hidden = self.lstm, self.lstm.hidden_size
        biases = (lstm.bias_ih + lstm.bias_hh).unsqueeze(1)
        both = self.forget_gate, self.input_gate
        w = torch.cat([gate.weight for gate in both])
        parts = [
            w[:, hidden : hidden + 1],
            w[:, -1].diag(),  # each gate sees itself before
            torch.stack([gate.bias for gate in both]),
            w[:, :hidden],
        ]
        weights = torch.cat([biases, lstm.weight_ih, lstm.weight_hh], 1)
        return reference.Cell(weights, torch.cat(parts, 1), self.p)
