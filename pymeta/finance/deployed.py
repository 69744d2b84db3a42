"""`Deployed`: what a job leaves to be used: a folder that numpy alone can predict from.

    model = Deployed.load("out")
    p = model.predict(history, query)      # tables with the columns that it was trained on

The folder has `adapter.safetensors` (`pymeta.Adapter.load` reads it), `preprocessor.safetensors`,
`model.json` with the pooled model, and where it has trees, these in `trees.txt`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pymeta import Adapter
from pymeta.data import Panel, Preprocessor, Ragged
from pymeta.data.optional import need
from pymeta.finance.blend import Blend
from pymeta.finance.common import Common
from pymeta.finance.echo import Echo
from pymeta.finance.fading import faded
from pymeta.tasks.groups import Array

FORMAT = 1


@dataclass
class Deployed:
    """A pooled model and the adapter of its remainder.

    Attributes:
        prep: the preprocessor.
        adapter: adapts the remainder to an entity's rows.
        described: what `model.json` holds.
        trees: LightGBM's text, or None.
    """

    prep: Preprocessor
    adapter: Adapter
    described: dict[str, Any]
    trees: str | None = None
    _booster: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, model: Any, train: Panel) -> Deployed:
        """What is left of a fitted `Remainder`.

        Args:
            model: the `Remainder`.
            train: the panel it was fitted on.

        Raises:
            ValueError: the pooled model is neither linear nor LightGBM's.
        """
        from pymeta.finance.deploy import adapter_of

        pooled = model.pooled
        panel, offset = model._seen(train)
        head, echo = model.head, None
        form = shown_form = "score" if head is None else model.form
        if isinstance(head, Echo):
            echo, shown_form = head.described(), "score"
        if head is None or echo is not None:  # the adapter is one that predict leaves alone
            head = model._trained(panel, model._both(panel, offset), shown_form)
        shown = model._shown(panel, offset, shown_form)
        described, trees = _described(pooled.fitted)
        centre, scale = model._scale
        target = pooled.target
        described |= {
            "format": FORMAT,
            "form": form,
            "adapts": model.head is not None,
            "echo": echo,
            "score": {"centre": centre, "scale": scale},
            "history": model.history,
            "common": None if model._common is None else model._common.worth,
            "far": None if echo else model._far,
            "columns": {"entity": train.entity, "time": train.time, "target": train.target},
            "features": {"numeric": train.numeric, "categorical": train.categorical},
            "target": None
            if target is None
            else {
                "link": target.link,
                "mean": target.mean,
                "scale": target.scale,
                "smear": target.smear,
                "adapted_smear": model.smear,
            },
        }
        return cls(pooled.prep, adapter_of(head, shown), described, trees)

    # ---- files --------------------------------------------------------------------------------

    def save(self, folder: Any) -> list[Path]:
        """Write the files into a folder, which is made if need be; their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.adapter.save(folder / "adapter.safetensors")
        self.prep.save(folder / "preprocessor.safetensors")
        text = json.dumps(self.described, indent=1)
        (folder / "model.json").write_text(text, encoding="utf-8")
        names = ["adapter.safetensors", "preprocessor.safetensors", "model.json"]
        if self.trees is not None:
            (folder / "trees.txt").write_text(self.trees, encoding="utf-8")
            names.append("trees.txt")
        return [folder / name for name in names]

    @classmethod
    def load(cls, folder: Any) -> Deployed:
        """What `save` wrote.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: it is of another format.
        """
        folder = Path(folder)
        described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        if described.get("format") != FORMAT:
            raise ValueError(
                f"folder: expected model.json of format {FORMAT}, got {described.get('format')!r}"
            )
        trees = None
        if described["trees"] > 0:
            trees = (folder / "trees.txt").read_text(encoding="utf-8")
        prep = Preprocessor.load(folder / "preprocessor.safetensors")
        return cls(prep, Adapter.load(folder / "adapter.safetensors"), described, trees)

    # ---- use ----------------------------------------------------------------------------------

    def predict(self, history: Any, query: Any) -> Array:
        """Adapt to each entity's history, and predict the rows of query.

        Args:
            history: a table, or a panel, of earlier rows with targets; None for predictions of the
                pooled model alone.
            query: a table of the rows to predict, or a panel.

        Returns:
            [rows of query] in its order: probabilities, or numbers in the target's units.
        """
        asked = self._panel(query, target=False)
        x, offset = self._shown(asked)
        out = offset
        adapted = history is not None and self.described["adapts"]
        if adapted:
            known = self._panel(history, target=True)
            if self.described["history"] is not None:
                known = known.last(self.described["history"])
            out = self._adapted(known, asked, x, offset)
        found = self._back(out[:, 0].astype(np.float64), adapted)
        in_order = np.empty(len(found))
        in_order[np.arange(len(found)) if isinstance(query, Panel) else asked.rows] = found
        return in_order

    def _panel(self, data: Any, target: bool) -> Panel:
        if isinstance(data, Panel):
            return data
        names, features = self.described["columns"], self.described["features"]
        return Panel(
            data,
            entity=names["entity"],
            time=names["time"],
            target=names["target"] if target else None,
            numeric=features["numeric"],
            categorical=features["categorical"],
        )

    def _shown(self, panel: Panel) -> tuple[Array, Array]:
        """The features that the adapter takes, and the pooled model's output [rows, 1]."""
        x = self.prep(panel).x
        offset = self._pooled(x).astype(np.float32)[:, None]
        if self._echo is not None:
            return self._echo.clock(panel.need_times("history and query")), offset
        if self.described["form"] == "level":
            return np.ones((len(panel), 1), np.float32), offset
        if self.described["form"] != "score":
            return x, offset
        scale = self.described["score"]
        seen = (offset - np.float32(scale["centre"])) / np.float32(scale["scale"])
        return np.clip(seen, -5, 5), offset

    @property
    def _echo(self) -> Echo | None:
        """What comes back, where that is the form."""
        described = self.described.get("echo")
        return None if described is None else Echo.of(described)

    def _pooled(self, x: Array) -> Array:
        weight, out = self.described["trees"], np.zeros(len(x))
        if weight < 1:
            coef = np.asarray(self.described["coef"])
            out += (1 - weight) * (x @ coef + self.described["intercept"])
        return out + weight * self._of_trees(x) if weight > 0 else out

    def _of_trees(self, x: Array) -> Array:
        if self._booster is None:
            lightgbm = need("lightgbm", "a base of LightGBM", "finance")
            self._booster = lightgbm.Booster(model_str=self.trees)
        return np.asarray(self._booster.predict(x, raw_score=True))

    def _adapted(self, known: Panel, asked: Panel, x: Array, offset: Array) -> Array:
        """The outputs of adapted models: [rows, 1]; of entities without rows, the pooled ones."""
        out = offset.copy()
        both = np.intersect1d(asked.entities, known.entities)
        if not len(both):
            return out
        rows, mine = np.isin(asked.labels, both), np.isin(known.labels, both)
        xs, own = self._shown(known)
        y = self._seen(known.need_y())
        worth = self.described.get("common")
        if worth is not None:  # of all entities there are, whether they are asked about or not
            residual = y - own[:, 0]
            times = known.need_times("history")
            common = Common(times, residual, worth).of(times, residual)
            own = own + common.astype(np.float32)[:, None]
        sizes = known.where(mine).sizes
        parts = (Ragged(values[mine], sizes) for values in (xs, y))
        given, adapts = Ragged(own[mine], sizes), self._echo
        models: Any
        if adapts is not None:
            models = adapts.adapt(*parts, support_offset=given)
        else:
            models = self.adapter.adapt(*parts, offset=given)
        sizes = asked.where(rows).sizes
        found = models(Ragged(x[rows], sizes), offset=Ragged(offset[rows], sizes))
        far, raw = self.described.get("far"), np.concatenate([np.asarray(f) for f in found])
        moved = raw.reshape(-1, 1) - offset[rows]
        if far is not None:
            moved *= faded(known, asked.where(rows), far)[:, None]
        out[rows] += moved
        return out

    def _seen(self, y: Array) -> Array:
        target: Mapping[str, Any] | None = self.described["target"]
        if target is None:
            return np.asarray(y, dtype=np.float32)
        y = np.log(y) if target["link"] == "log" else y
        seen = (y.astype(np.float64) - target["mean"]) / target["scale"]
        return np.asarray(seen, dtype=np.float32)

    def _back(self, raw: Array, adapted: bool) -> Array:
        target = self.described["target"]
        if target is None:
            return np.asarray(1 / (1 + np.exp(-raw)))
        found = raw * target["scale"] + target["mean"]
        if target["link"] != "log":
            return np.asarray(found)
        return np.asarray(np.exp(found) * target["adapted_smear" if adapted else "smear"])


def _described(fitted: Any) -> tuple[dict[str, Any], str | None]:
    """The pooled model for JSON, and LightGBM's text."""
    if isinstance(fitted, Blend):
        scorecard, boosted = fitted.parts_
        found: dict[str, Any] = {} if scorecard is None else _described(scorecard)[0]
        text = None if boosted is None else _described(boosted)[1]
        return {**found, "trees": fitted.weight_}, text
    if hasattr(fitted, "coef_"):
        coef = np.asarray(fitted.coef_, dtype=np.float64).reshape(-1)
        intercept = float(np.asarray(fitted.intercept_).reshape(-1)[0])
        return {"coef": coef.tolist(), "intercept": intercept, "trees": 0.0}, None
    if hasattr(fitted, "booster_"):
        return {"trees": 1.0}, str(fitted.booster_.model_to_string())
    raise ValueError(
        f"base: expected a linear model or one of LightGBM to deploy, got {type(fitted).__name__}"
    )
