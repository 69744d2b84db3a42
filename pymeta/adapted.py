"""The adapted models of T tasks: stacked parameters that can be called all at once."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pymeta import fused, reference
from pymeta.plan import Plan
from pymeta.tasks import QUERY, Names, Rows, Sizes, TaskSet, check_values, task_set

_NAMES = Names("xq", "", QUERY.sizes, "")


def shaped(predictions: Tensor | list[Tensor], query: TaskSet) -> Tensor | list[Tensor]:
    """Predictions in the form xq came in: a list of [rows_t, ...], or [T, rows, ...].

    Args:
        predictions: [T, rows, ...]; [sum of rows, ...] of a packed set; or T tensors.
        query: the set they belong to.
    """
    if isinstance(predictions, list):
        predictions = [p.detach() for p in predictions]
        return predictions if query.lengths is not None else _padded(predictions, query.rows)
    predictions = predictions.detach()
    if query.lengths is None:
        return predictions
    if query.starts is not None:
        return list(predictions.split_with_sizes(query.lengths))
    return list(predictions.unbind(0))


def _padded(predictions: list[Tensor], rows: int) -> Tensor:
    out = predictions[0].new_zeros(len(predictions), rows, *predictions[0].shape[1:])
    for row, values in zip(out, predictions, strict=True):
        row[: values.shape[0]] = values
    return out


class Adapted:
    """T models of one structure, each with its own weights; made by `MAML.adapt`.

    Nothing here carries a graph. The structure (and buffers) are those of the meta-learned
    model, which is referred to, not copied; the parameters are this object's own.

    Attributes:
        parameters: {name: [T, ...]}, the layout of `torch.func.stack_module_state`; those that
            were not adapted are expanded views of one tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        stacked: dict[str, Tensor],
        shared: dict[str, Tensor],
        tasks: int,
        native: bool,
    ) -> None:
        """Called by `MAML.adapt`."""
        self._model = model
        self._made: Plan | None = plan
        self._loss = plan.expected.loss
        self._stacked = stacked
        self._shared = shared
        self._tasks = tasks
        self._native = native

    @property
    def _plan(self) -> Plan:
        """The plan of the model; made anew in a copy, which must not be of another shape."""
        if self._made is None:
            plan = Plan(self._model, self._loss, None, "network")
            own = {n: p.shape[1:] for n, p in self.parameters.items()}
            if own != {n: p.shape for n, p in self._model.named_parameters()} or any(
                p.dtype != plan.expected.dtype for p in self.parameters.values()
            ):
                raise ValueError("the model has changed since these were adapted from it")
            self._made = plan
        return self._made

    @property
    def parameters(self) -> dict[str, Tensor]:
        """{name: [T, ...]} in the model's order."""
        return {
            name: self._stacked[name]
            if name in self._stacked
            else self._shared[name].expand(self._tasks, *self._shared[name].shape)
            for name, _ in self._model.named_parameters()
        }

    def __len__(self) -> int:
        """The number of tasks."""
        return self._tasks

    def __repr__(self) -> str:
        """A line that says how many models of what."""
        return f"Adapted({self._tasks} x {type(self._model).__name__})"

    def __getitem__(self, task: int) -> nn.Module:
        """One task's model: a copy of the meta-learned one with its own weights.

        Raises:
            TypeError: `task` is no integer.
            IndexError: there is no such task.
        """
        try:
            task = operator.index(task)
        except TypeError:
            raise TypeError(f"task: expected an integer, got {type(task).__name__}") from None
        if not -self._tasks <= task < self._tasks:
            raise IndexError(f"task: {task} is not one of {self._tasks} tasks")
        model = copy.deepcopy(self._model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                own = self._stacked.get(name)
                parameter.copy_(self._shared[name] if own is None else own[task])
                parameter.grad = None
        return model

    def __iter__(self) -> Iterator[nn.Module]:
        """All tasks' models, one after another."""
        return (self[t] for t in range(self._tasks))

    @torch.no_grad()
    def __call__(self, xq: Rows, query_sizes: Sizes = None) -> Any:
        """Every model's raw outputs on its own rows.

        Args:
            xq: [T, rows, ...], or a list of T tensors [rows_t, ...].
            query_sizes: [T], how many of its rows each task uses, where xq is padded.

        Returns:
            [T, rows, out]; a list of [rows_t, out] where xq is a list.

        Raises:
            TypeError, ValueError: as `MAML.forward`.
        """
        plan = self._plan
        query = task_set(_NAMES, xq, None, query_sizes, None, plan.expected)
        if query.tasks != self._tasks:
            raise ValueError(
                f"xq: expected {self._tasks} tasks, one for each model, got {query.tasks}"
            )
        if self._native and plan.reason is None and query.reason is None:
            return shaped(fused.predict(plan, self._stacked, self._shared, query), query)
        check_values(query, plan.expected)
        if query.tasks == 0:
            out = () if plan.expected.out_features is None else (plan.expected.out_features,)
            return query.x.new_zeros(0, query.rows, *out)
        return shaped(reference.predict(self._model, self._stacked, self._shared, query), query)

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle; the model goes along."""
        return {**self.__dict__, "_made": None}
