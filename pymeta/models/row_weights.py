"""What class weights make of the rows' own weights, in numpy."""

from __future__ import annotations

import numpy as np

from pymeta.spec.class_weights import class_table, classes_of, row_factors
from pymeta.spec.losses import Loss
from pymeta.tasks.arrays import Gathered


def class_factors(
    support: Gathered, loss: Loss, outputs: int, weights: str | tuple[float, ...]
) -> np.ndarray:
    """What the rows' weights are multiplied by: the weight of the row's class.

    A wrong label is left for the native core to find.
    """
    assert support.y is not None
    if support.distributions:
        raise ValueError("class_weights: expected None where ys are distributions over the classes")
    tasks = support.tasks
    sizes = np.full(tasks, support.rows) if support.sizes is None else support.sizes
    task = np.repeat(np.arange(tasks), sizes)
    number = np.arange(len(task)) - (np.cumsum(sizes) - sizes)[task]
    weighs = None if support.weights is None else support.weights.reshape(-1)
    found = classes_of("ys", support.y.reshape(-1), task, number, loss, outputs, weighs)
    table = class_table(found, task, tasks, weights, outputs if loss.takes_classes else 2)
    factors = row_factors(found, task, table).astype(support.x.dtype)
    return factors.reshape(support.x.shape[:-1])
