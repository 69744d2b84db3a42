"""Why a model said what it said: attributions, reason codes, and the support rows that mattered.

    found = integrated_gradients(models, xq, population=reference_rows)
    codes = reason_codes(found, prep, most=4, sign="up")
    moved = influence(maml, xs, ys, xq)

`models` are what `adapt` returns, `pymeta.Adapted` or `pymeta.AdaptedArrays`: all tasks of a call
are explained at once, by native calls over all of them. Needs numpy alone; plots need matplotlib
(extra `explain`).
"""

from pymeta.explain.attributions import (
    Attributions,
    input_gradients,
    integrated_gradients,
    support_means,
)
from pymeta.explain.influence import influence
from pymeta.explain.outputs import default_outputs
from pymeta.explain.plots import plot_attributions, plot_influence
from pymeta.explain.reasons import ReasonCodes, reason_codes

__all__ = [
    "Attributions",
    "ReasonCodes",
    "default_outputs",
    "influence",
    "input_gradients",
    "integrated_gradients",
    "plot_attributions",
    "plot_influence",
    "reason_codes",
    "support_means",
]
