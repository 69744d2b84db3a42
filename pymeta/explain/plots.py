"""Figures of attributions and influences (matplotlib, extra `explain`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymeta.explain.attributions import Attributions
from pymeta.explain.reasons import reason_codes
from pymeta.explain.rows import as_array


def _figure(what: str, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":  # it is there, but broken
            raise
        raise ImportError(
            f"{what} needs matplotlib, which is not installed: "
            f"pip install 'pymeta-kernels[explain]'"
        ) from None
    return Figure(figsize=(7, height), layout="constrained")


def plot_attributions(
    attributions: Attributions, task: int, row: int, names: Any = None, *, most: int = 10
) -> Any:
    """Bars of the columns that moved one prediction, the strongest on top.

    Args:
        attributions: as for `reason_codes`.
        task: which task's.
        row: which of its rows.
        names: as for `reason_codes`.
        most: how many columns.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: as `reason_codes`.
        IndexError: there is no such task or row.
    """
    found = reason_codes(attributions, names, most=most).of(task, row)
    figure = _figure("plot_attributions", 1.2 + 0.3 * max(len(found), 1))
    axes = figure.subplots()
    amounts = [amount for _, amount in found]
    axes.barh(
        [name for name, _ in found],
        amounts,
        color=["tab:red" if amount > 0 else "tab:blue" for amount in amounts],
    )
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    predicted = float(attributions.predictions[task][row])
    title = f"output {int(attributions.outputs[task][row])}: {predicted:.3g}"
    if attributions.baselines is not None:
        title += f", baseline {float(attributions.baselines[task][row]):.3g}"
    axes.set_title(title)
    axes.set_xlabel("attribution")
    return figure


def plot_influence(influences: Any, *, labels: Any = None, most: int = 20) -> Any:
    """Bars of the support rows that moved one prediction most.

    Args:
        influences: [support rows], of one prediction: `influence(...)[task][row]`.
        labels: what the support rows are called; None for their numbers.
        most: how many rows.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `influences` is not of one prediction, or `labels` are not as many.
    """
    values = as_array("influences", influences)
    if values.ndim != 1:
        raise ValueError(
            f"influences: expected those of one prediction [support rows], got shape "
            f"{list(values.shape)}"
        )
    names = [str(n) for n in (range(len(values)) if labels is None else labels)]
    if len(names) != len(values):
        raise ValueError(f"labels: expected {len(values)}, got {len(names)}")
    order = np.argsort(-np.abs(values), kind="stable")[:most]
    figure = _figure("plot_influence", 1.2 + 0.3 * max(len(order), 1))
    axes = figure.subplots()
    at = np.arange(len(order))
    colors = ["tab:red" if values[i] > 0 else "tab:blue" for i in order]
    axes.barh(at, values[order], color=colors)
    axes.set_yticks(at, [names[i] for i in order])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("influence on the prediction")
    return figure
