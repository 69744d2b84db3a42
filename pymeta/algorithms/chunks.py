"""The parts that many tasks are fine-tuned in: single tasks as columns, parts of a result."""

from __future__ import annotations

from typing import Any

from pymeta.spec.history import History
from pymeta.spec.inner import Adaptation
from pymeta.spec.show import counted


def check_task(name: str, task: Any) -> None:
    """TypeError unless these are x and y, of one task or several, and what may go with them."""
    if not isinstance(task, (tuple, list)):
        got = type(task).__name__
    elif not 2 <= len(task) <= 4:
        got = counted(len(task), "entry")
    else:
        return
    raise TypeError(f"{name}: expected (x, y) or (x, y, weights, offset), got {got}")


def columns_of(group: list[Any]) -> tuple[Any, ...]:
    """The x, y, weights and offsets of single tasks: lists, or None where all are None."""
    for i, task in enumerate(group):
        check_task(f"tasks[{i}]", task)
        if len(task) != len(group[0]):
            raise ValueError(
                f"tasks[{i}]: expected weights in all tasks or in none, "
                f"got {counted(len(task), 'entry')} after {len(group[0])}"
            )
    columns = [list(column) for column in zip(*group, strict=True)]
    given = [None if all(v is None for v in column) else column for column in columns[2:]]
    return (*columns[:2], *given, None, None)[:4]


def part_of(whole: Adaptation, first: int, last: int) -> Adaptation:
    """Some of the tasks; views."""
    history = whole.history and History.of(
        {name: values[first:last] for name, values in whole.history.values().items()}
    )
    parameters = {name: values[first:last] for name, values in whole.parameters.items()}
    return Adaptation(parameters, whole.status[first:last], history)


def copy_into(done: Adaptation, out: Adaptation) -> None:
    """Put a result where it belongs."""
    for name, values in out.parameters.items():
        values.copy_(done.parameters[name])
    out.status.copy_(done.status)
    if out.history is not None and done.history is not None:
        found = done.history.values()
        for name, values in out.history.values().items():
            values.copy_(found[name])
