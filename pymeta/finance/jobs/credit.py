"""Credit: the chance that a loan defaults, for every segment (a state, a postcode, a channel).

The pooled model is a blend of a scorecard (logistic regression) and LightGBM; its logit is the
offset of each segment's remainder. What a segment may have of its own, a level and a slope of the
score or a coefficient for every feature or nothing, is chosen on training segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pymeta.finance.loans import loans_panel
from pymeta.finance.remainder import Remainder
from pymeta.finance.result import Result, Say, compared, deployed, result, silent

METRICS = ("log_loss", "auc", "brier", "calibration_error")


def credit(
    data: Any,
    *,
    columns: Mapping[str, str] | None = None,
    numeric: str | None = None,
    categorical: str | None = None,
    base: str = "blend",
    at: str | None = None,
    gap: int = 0,
    share: float = 0.25,
    seeds: int = 3,
    quick: bool = False,
    stress: bool = True,
    say: Say = silent,
) -> Result:
    """Compare on later loans of held-out segments, and train a model for deployment.

    Args:
        data: a table with a row for each loan, or its path. LendingClub's and the Taiwan cards'
            columns are known; for others give `columns`.
        columns: {"segment": ..., "target": ..., "time": ...}: the column of segments (or several,
            "a,b"), of defaults (0 and 1), and of times, or none.
        numeric: the features that are numbers, "a,b"; by default all columns with no other role.
        categorical: the features that are categories, "a,b"; likewise.
        base: the pooled model: "linear", "lightgbm" or "blend".
        at: the first time that is predicted; by default after seven tenths of the time. Without
            times, half of the held-out segments' rows are predicted from the other half.
        gap: days until an outcome is known; loans younger than that at `at` are not trained on.
        share: the share of segments that is held out; 0 trains on the past of all of them.
        seeds: how many runs, each with other held-out segments and other starts.
        quick: use one seed and fewer training steps, to see it run.
        stress: whether to run stress tests.
        say: is told of progress.

    Returns:
        The `Result`; among the rivals is the same pooled model, fitted again to all that is known
        and not adapted.

    Raises:
        ImportError: a package of the extra `finance` is missing.
        TypeError, ValueError: an argument is not as described.
    """
    panel = loans_panel(data, columns, numeric=numeric, categorical=categorical)
    panel.check_leakage()

    def ours(seed: int, forms: Sequence[str] = ("pooled", "score", "linear")) -> Remainder:
        return Remainder(
            base=base,
            forms=forms,
            support=(5, 400),
            query=(5, 100),
            split=None if panel.times is not None else "rows",
            steps=30 if quick else 100,
            tasks=32,
            refit=share > 0,
            seed=seed,
        )

    def models(seed: int) -> dict[str, Any]:
        found = {"adapted": ours(seed)}
        if share > 0:  # otherwise ours, unadapted, has seen all of the past
            found[f"{base}, fitted again"] = ours(seed, ("pooled",))
        return found

    late: dict[str, Any] = {}
    if panel.times is not None:
        late = {"at": at, "gap": np.timedelta64(gap, "D") if gap else None}
        late["block"] = max(round(len(np.unique(panel.times)) / 60), 1)
    found, last = compared(
        lambda seed: panel,
        models,
        seeds=1 if quick else seeds,
        say=say,
        metrics=METRICS,
        share=share,
        stress=stress and not quick,
        draws=200 if quick else 1000,
        **late,
    )
    chosen = last["adapted"]
    settings = {
        "segment": panel.entity,
        "features": panel.features,
        "base": base,
        "trees' weight": getattr(chosen.pooled.fitted, "weight_", None),
        "seeds": len(found),
        "form": chosen.form,
        "losses": chosen.losses,
    }
    return result("credit", found, lambda: deployed(ours(0), panel), say, settings)
