"""Attributions of predictions to features: gradients, and gradients along a path.

Integrated gradients (Sundararajan, Taly, Yan 2017, arXiv:1703.01365): with f the output that is
explained and b a baseline,

    a_i = (x_i - b_i) * integral over s in 0..1 of  df/dx_i (b + s (x - b))  ds,

so that the attributions add up to f(x) - f(b) ("completeness"). The integral is taken by
Gauss-Legendre quadrature; `Attributions.gap` is what it leaves. Over a population of baselines this
is expected gradients (Erion et al. 2021, arXiv:1906.10670), here the mean over all of them rather
than a sample, so that it is complete too: the attributions add up to f(x) - mean of f(b).

Where the network embeds categories (`pymeta.nn.TabularInput`), the path goes straight from the
baseline's embeddings to the row's, and what the numbers of one category add is its column's.

The points on the paths of all rows of all tasks are rows of one native call, as many points at a
time as `_NUMBERS` allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pymeta.explain.baselines import Baselines, baselines_of
from pymeta.explain.embedded import Embedded
from pymeta.explain.outputs import chosen_outputs
from pymeta.explain.rows import Explained, Packed

_NUMBERS = 2**21  # of inputs in one native call


class Attributions(NamedTuple):
    """How much each feature of each row moved a prediction.

    Attributes:
        values: like xq, [T, rows, *row]; a `pymeta.data.Ragged` of them where that is a list.
        outputs: int64 [T, rows] (or ragged), which output is explained.
        predictions: [T, rows] (or ragged), that output.
        baselines: [T, rows] (or ragged), what it is at the baseline, or its mean over the
            population; None for plain gradients.
    """

    values: Any
    outputs: Any
    predictions: Any
    baselines: Any = None

    @property
    def gap(self) -> Any:
        """[T, rows]: by how much the attributions miss prediction - baseline.

        It is the error of the quadrature: more `steps` make it smaller.

        Raises:
            ValueError: plain gradients have no baseline.
        """
        if self.baselines is None:
            raise ValueError("gap: plain gradients add up to nothing in particular")
        values = Packed.of("values", self.values)
        total = values.values.reshape(len(values.values), -1).sum(1)
        after, before = (_flat(v) for v in (self.predictions, self.baselines))
        return values.shaped(after - before - total)


def _flat(values: Any) -> np.ndarray:
    found: np.ndarray = values.values if hasattr(values, "sizes") else values.reshape(-1)
    return found


def input_gradients(models: Any, xq: Any, *, output: Any = None) -> Attributions:
    """The gradient of each row's output by its features, for all models at once.

    Args:
        models: T models: a `pymeta.Adapted` or `pymeta.AdaptedArrays`, or those of a learner of
            `pymeta.learners`, which are differentiated by autograd.
        xq: [T, rows, ...], a list of T arrays [rows_t, ...], or a `pymeta.data.Ragged`; arrays or
            tensors, of the models' dtype.
        output: which output is explained: an integer, or integers [T, rows]; None for the one
            that `default_outputs` picks.

    Raises:
        TypeError: `models` are no adapted models, or an argument has the wrong type.
        ValueError: a wrong shape, an output out of range, or the models mix rows by batch
            normalisation.
    """
    models, rows = Explained(models), Packed.of("xq", xq)
    predicted = models.predict(rows.values, rows.sizes)
    chosen = chosen_outputs(output, models.loss, predicted, rows)
    found = models.gradients(rows.values, rows.sizes, _one_hot(chosen, predicted))
    return Attributions(
        rows.shaped(found), rows.shaped(chosen), rows.shaped(_picked(predicted, chosen))
    )


def integrated_gradients(
    models: Any,
    xq: Any,
    *,
    baseline: Any = None,
    population: Any = None,
    steps: int = 32,
    output: Any = None,
) -> Attributions:
    """What each feature of each row adds to its output, for all models at once.

    Args:
        models: T models: a `pymeta.Adapted` or `pymeta.AdaptedArrays`, or those of a learner of
            `pymeta.learners`, which are differentiated by autograd.
        xq: [T, rows, ...], a list of T arrays [rows_t, ...], or a `pymeta.data.Ragged`; arrays or
            tensors, of the models' dtype.
        baseline: the row that stands for "nothing known": one of xq's shape [*row], or one for
            each task [T, *row] (`support_means(xs)`); None for zeros, which is the mean of
            standardised features, and for a category that the network embeds the mean of its
            table.
        population: baselines [B, *row] in its place: the attributions are the mean over all of
            them. It costs B times as much.
        steps: points on each path. Networks of smooth activations need few, those of ReLU more.
        output: which output is explained: an integer, or integers [T, rows]; None for the one
            that `default_outputs` picks.

    Returns:
        The attributions; `gap` is what they miss of prediction - baseline.

    Raises:
        TypeError: `models` are no adapted models, or an argument has the wrong type.
        ValueError: a wrong shape, an output out of range, both a baseline and a population, or the
            models mix rows by batch normalisation.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise TypeError(f"steps: expected an integer >= 1, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps}")
    space, rows, starts = _space(models, Packed.of("xq", xq), baseline, population)
    models = Explained(models if space is None else space.rest)
    predicted = models.predict(rows.values, rows.sizes)
    chosen = chosen_outputs(output, models.loss, predicted, rows)
    flows = _one_hot(chosen, predicted)
    values = np.zeros(rows.values.shape, np.float64)
    places, weights = np.polynomial.legendre.leggauss(int(steps))
    count = starts.each
    points = np.tile((places + 1) / 2, count), np.tile(weights / 2 / count, count)
    which = np.repeat(np.arange(count), steps)
    for some in _chunks(len(which), rows.values.size):
        away = rows.values[:, None] - starts.at(which[some])
        at = starts.at(which[some]) + _wide(points[0][some], away) * away
        found = _along(models.gradients, at, rows, flows)
        _add_each(found * _wide(points[1][some], away) * away, values)
    base = _baseline_outputs(models, starts, rows, flows)
    values = values if space is None else space.by_column(values)
    kind = rows.values.dtype
    return Attributions(
        rows.shaped(values.astype(kind)),
        rows.shaped(chosen),
        rows.shaped(_picked(predicted, chosen)),
        rows.shaped(base.astype(kind)),
    )


def support_means(xs: Any) -> np.ndarray:
    """The mean of each task's support rows, a baseline of its own.

    Args:
        xs: [T, rows, ...], or a list of T arrays [rows_t, ...].

    Returns:
        [T, ...] of xs' dtype; 0 for a task without rows.
    """
    rows = Packed.of("xs", xs)
    sums = np.zeros((len(rows.sizes), *rows.row), np.float64)
    np.add.at(sums, np.repeat(np.arange(len(rows.sizes)), rows.sizes), rows.values)
    counts = np.maximum(rows.sizes, 1).reshape(-1, *[1] * len(rows.row))
    means: np.ndarray = (sums / counts).astype(rows.values.dtype)
    return means


def _space(
    models: Any, rows: Packed, baseline: Any, population: Any
) -> tuple[Embedded | None, Packed, Baselines]:
    """Where paths lie: among the rows, or behind the layers that embed their categories."""
    if not getattr(models, "has_categories", False):
        return None, rows, baselines_of(baseline, population, rows)
    space = Embedded(models)
    wide = space.rows(rows)
    return space, wide, space.baselines(baseline, population, rows)


# ---- points on paths --------------------------------------------------------------------------


def _baseline_outputs(
    models: Explained, starts: Baselines, rows: Packed, flows: np.ndarray
) -> np.ndarray:
    """[N] the output that is explained at the baseline, or its mean over them."""
    total = np.zeros(len(rows.values), np.float64)
    every = np.arange(starts.each)
    for some in _chunks(starts.each, rows.values.size):
        given = starts.at(every[some])
        at = np.broadcast_to(given, (len(rows.values), *given.shape[1:]))
        outputs = _along(lambda v, sizes, _: models.predict(v, sizes), at, rows, flows)
        _add_each((outputs * flows[:, None]).sum(2), total)
    return total / starts.each


def _along(ask: Any, at: np.ndarray, rows: Packed, flows: np.ndarray) -> np.ndarray:
    """What `ask` says of points [N, points, *row]: [N, points, ...]."""
    count, points = at.shape[:2]
    values = np.require(at, requirements=["C", "W"]).reshape(count * points, *rows.row)
    found: np.ndarray = ask(values, rows.sizes * points, np.repeat(flows, points, 0))
    return found.reshape(count, points, *found.shape[1:])


def _add_each(parts: np.ndarray, to: np.ndarray) -> None:
    """Add parts [N, points, ...] to [N, ...], point after point: in any chunks the same bits."""
    for point in range(parts.shape[1]):
        to += parts[:, point]


def _chunks(points: int, numbers: int) -> Iterator[slice]:
    each = max(1, _NUMBERS // max(numbers, 1))
    return (slice(first, first + each) for first in range(0, points, each))


def _wide(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """[points] to be multiplied with [N, points, *row], in its dtype."""
    return values.astype(like.dtype).reshape(1, -1, *[1] * (like.ndim - 2))


def _one_hot(chosen: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    flows = np.zeros_like(outputs)
    flows[np.arange(len(chosen)), chosen] = 1
    return flows


def _picked(outputs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    found: np.ndarray = outputs[np.arange(len(chosen)), chosen]
    return found
