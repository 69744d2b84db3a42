"""Whose fault it is where torch refuses what a model makes of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pymeta.reference.modules import Applied, Parameters
from pymeta.spec.misfit import is_refusal, told
from pymeta.tasks.task_set import TaskSet


@contextmanager
def rows_named(
    model: nn.Module, use: Applied, parameters: Callable[[int], Parameters], *sets: TaskSet
) -> Iterator[None]:
    """A block in which torch's refusal of a set's rows is a ValueError that names the argument.

    Where it fails, the model is called once more with the rows of one task after another; what
    they have no part in is raised as it is. `parameters` are those of a task.
    """
    try:
        yield
    except Exception as error:  # a stranger's forward may raise anything
        if is_refusal(error):
            for s in sets:
                _check_rows(model, use, parameters, s)
        raise


def _check_rows(
    model: nn.Module, use: Applied, parameters: Callable[[int], Parameters], s: TaskSet
) -> None:
    for t in range(s.tasks):
        x = s.of_task(t)[0]
        if not len(x):
            continue
        try:
            with torch.no_grad():
                called, own = use.of_a_task(parameters(t))
                called(own, x)
        except Exception as error:
            if not is_refusal(error):
                return
            raise ValueError(
                f"{s.names.x}: the model does not take the rows of task {t}, of shape "
                f"{list(x.shape[1:])}: {told(model, error)}"
            ) from error
