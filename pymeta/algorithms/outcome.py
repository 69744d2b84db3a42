"""What a call of MAML returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pymeta.spec.show import as_numpy, number, shape, spread


class Outcome(NamedTuple):
    """What a MAML call returns.

    All of it carries a graph where grad is enabled. `loss.backward()` alone costs nothing more on
    the native backend; whatever else is differentiated costs one more native call.

    Attributes:
        loss: [], the mean over tasks of `task_losses`; None without query targets.
        task_losses: [T], each task's mean query loss after adaptation, or with `step_weights` the
            weighed sum of those after each step; None without query targets.
        predictions: [T, rows, out], the network's raw outputs on the query set; a list of
            [rows_t, out] where xq came as a list; rows beyond a task's query size are 0. A row
            that does not count has them as constants.
        step_losses: [steps, T], the query losses after each step; None without `step_weights`.
    """

    loss: Tensor
    task_losses: Tensor
    predictions: Tensor | list[Tensor]
    step_losses: Tensor | None = None

    def __repr__(self) -> str:
        """The losses in figures, the rest as shapes."""
        return told_outcome(self)

    def detached(self) -> Outcome:
        """The same without graphs."""
        predictions = self.predictions
        if isinstance(predictions, list):
            predictions = [p.detach() for p in predictions]
        elif predictions is not None:
            predictions = predictions.detach()
        loss, losses, steps = (
            v if v is None else v.detach() for v in (self.loss, self.task_losses, self.step_losses)
        )
        return Outcome(loss, losses, predictions, steps)  # type: ignore[arg-type]


def told_outcome(outcome: NamedTuple) -> str:
    """What a call returned, in a line: `loss`, `task_losses` as figures, all else as shapes."""
    parts = []
    for name, value in outcome._asdict().items():
        if value is None:
            continue
        if name == "loss":
            parts.append(f"loss={_figure(value)}")
        elif name == "task_losses":
            parts.append(f"task_losses={spread(value)}")
        else:
            parts.append(f"{name}={shape(value)}")
    return f"{type(outcome).__name__}({'; '.join(parts)})"


def _figure(loss: Tensor) -> str:
    try:
        return number(float(as_numpy(loss)))
    except (RuntimeError, TypeError):  # under a transform of torch.func it has no value
        return shape(loss)
