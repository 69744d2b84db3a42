"""What a job gives back, and how its models are compared with several seeds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymeta.data import Panel
from pymeta.finance.deployed import Deployed
from pymeta.metrics import Report, Split, compare, mean_report

Say = Callable[[str], None]


def to_stderr(text: str) -> None:
    """Progress, a line at a time."""
    print(text, file=sys.stderr, flush=True)


def silent(text: str) -> None:
    """No progress."""


@dataclass(frozen=True)
class Result:
    """A job's comparison and what is deployed of it.

    Attributes:
        job: its name.
        report: ours beside the rivals; the mean over seeds.
        reports: of each seed.
        deployed: the model trained on all rows, or None.
        settings: what was asked for, and what was chosen.
    """

    job: str
    report: Report
    reports: list[Report] = field(repr=False)
    deployed: Any = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter(self) -> Any:
        """The `pymeta.Adapter` of what is deployed."""
        return None if self.deployed is None else self.deployed.adapter

    def __str__(self) -> str:
        return f"# {self.job}\n\n{self.report.markdown()}"

    def save(self, folder: Any) -> list[Path]:
        """Write report.md, report.html, settings.json and what is deployed; their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "report.md", folder / "report.html", folder / "settings.json"]
        for path in paths[:2]:
            self.report.save(path)
        text = json.dumps(self.settings, indent=1, default=str)
        paths[2].write_text(text, encoding="utf-8")
        return paths + ([] if self.deployed is None else self.deployed.save(folder))


def compared(
    parts: Callable[[int], Panel | Split],
    models: Callable[[int], Mapping[str, Any]],
    *,
    seeds: int,
    say: Say,
    **options: Any,
) -> tuple[list[Report], Mapping[str, Any]]:
    """Compare with seeds 0, 1, ...: the reports, and the models of the last seed.

    Args:
        parts: makes the panel or the split of a seed.
        models: makes the models of a seed, ours first.
        seeds: how many.
        say: is told of progress.
        options: of `pymeta.metrics.compare`.

    Raises:
        ValueError: seeds is less than 1.
    """
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds: expected a whole number >= 1, got {seeds!r}")
    reports: list[Report] = []
    made: Mapping[str, Any] = {}
    for seed in range(seeds):
        made = models(seed)
        say(f"seed {seed + 1} of {seeds}: {', '.join(made)} and the rivals")
        reports.append(compare(parts(seed), made, seed=seed, **options))
    return reports, made


def result(
    job: str,
    reports: list[Report],
    deploy: Callable[[], Any],
    say: Say,
    settings: dict[str, Any],
) -> Result:
    """Put together a result; `deploy` fits what is deployed, to all rows."""
    say("training on all rows, for deployment")
    return Result(job, mean_report(reports), reports, deploy(), settings)


def deployed(model: Any, panel: Panel) -> Deployed:
    """A `Remainder`, fitted to all rows of a panel."""
    return Deployed.of(model.fit(panel), panel)
