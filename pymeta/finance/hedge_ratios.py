"""`HedgeRatios`: what the job `betas` leaves to be used, by numpy alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pymeta import Adapter
from pymeta.data import Panel
from pymeta.finance.hedge import in_units_of_noise


@dataclass
class HedgeRatios:
    """What is deployed: betas of stocks from their last days. numpy alone.

    Attributes:
        adapter: of rows in units of the stock's noise.
        days: that a beta is estimated from, at most.
        prior: degrees of freedom and variance of the noise's prior.
    """

    adapter: Adapter
    days: int
    prior: tuple[float, float]

    def betas(self, history: Panel) -> dict[Any, float]:
        """{stock: beta}, of the last days of a panel of `betas_panel`."""
        known = history.last(self.days)
        models = self.adapter.adapt(*in_units_of_noise(known, *self.prior))
        last = known["long beta"][known.offsets[1:] - 1]
        ask = np.stack([np.ones(len(last)), np.zeros(len(last)), last - 1], axis=1)
        ask = ask.astype(np.float32)[:, None]
        found = np.asarray(models(ask)).reshape(-1)
        labels: list[Any] = known.entities.tolist()
        return dict(zip(labels, found.tolist(), strict=True))

    def save(self, folder: Any) -> list[Path]:
        """Write adapter.safetensors and model.json; their paths."""
        paths = [Path(folder) / "adapter.safetensors", Path(folder) / "model.json"]
        self.adapter.save(paths[0])
        text = json.dumps({"days": self.days, "prior": self.prior})
        paths[1].write_text(text, encoding="utf-8")
        return paths

    @classmethod
    def load(cls, folder: Any) -> HedgeRatios:
        """What `save` wrote."""
        described = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))
        adapter = Adapter.load(Path(folder) / "adapter.safetensors")
        return cls(adapter, described["days"], tuple(described["prior"]))
