"""The calmest months to learn from, the wildest to be tested on.

A year that is calm says little of how a model does in a crash that it has never seen. Here training
sees the calmest half of the months alone, and the wildest quarter is predicted, wherever it lies in
time; what is adapted to are the days before each block, as in use.
"""

from __future__ import annotations

import numpy as np

from pymeta.data import Panel
from pymeta.metrics import Split


def wild_split(panel: Panel, share: float, seed: int) -> Split:
    """All entities' calm months to train on, and some entities' wild ones to predict.

    Args:
        panel: with datetimes, of targets that are large in wild months.
        share: of the entities, which are tested.
        seed: which ones.

    Raises:
        ValueError: there are fewer than 8 months.
    """
    months = panel.need_times("wild").astype("datetime64[M]")
    known, code = np.unique(months, return_inverse=True)
    if len(known) < 8:
        raise ValueError(f"data: expected at least 8 months for calm and wild, got {len(known)}")
    order = np.argsort(np.bincount(code, panel.need_y()) / np.bincount(code), kind="stable")
    calm = np.isin(code, order[: len(known) // 2])
    wild = np.isin(code, order[-(len(known) // 4) :])
    tested = np.isin(panel.labels, panel.split_entities(share, seed=seed)[1].entities)
    train = panel.where(calm)
    return Split(train, panel.where(tested & ~wild), panel.where(tested & wild), train)
