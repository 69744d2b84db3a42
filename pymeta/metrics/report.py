"""What `compare` found: a table, verdicts in words, figures, Markdown and HTML."""

from __future__ import annotations

import base64
import html
import io
import os
from dataclasses import dataclass
from typing import Any, TypeAlias

from pymeta.data.optional import need
from pymeta.metrics.bootstrap import Interval
from pymeta.metrics.tables import Score
from pymeta.spec.show import counted

Table: TypeAlias = tuple[list[str], list[list[str]]]  # the head, and the rows
_ROUNDING = 1e-6  # of figures, by which rounding in float32 may move them


@dataclass(frozen=True)
class Line:
    """A model: its scores, intervals of the pooled ones, and its seconds."""

    name: str
    is_ours: bool
    scores: list[Score]
    intervals: list[Interval | None]
    fit: float
    predict: float


def _same(a: float, b: float) -> bool:
    """Whether two figures differ by no more than rounding of float32 predictions does."""
    return abs(a - b) <= _ROUNDING * max(abs(a), abs(b))


@dataclass(frozen=True)
class Pair:
    """Ours against a rival in one metric.

    Attributes:
        ours: its name.
        theirs: the rival's.
        metric: the metric's name.
        larger_is_better: of the metric.
        values: of both.
        gaps: {"entities": ..., "blocks of time": ...}, ours less theirs.
        groups: how many entities and blocks the intervals are over.
    """

    ours: str
    theirs: str
    metric: str
    larger_is_better: bool
    values: tuple[float, float]
    gaps: dict[str, Interval]
    groups: dict[str, int]

    @property
    def verdict(self) -> str:
        """Win where every interval is on our side, lose where any is on theirs, or else tie.

        A tie, too, where the figures differ by rounding alone, however surely.
        """
        if _same(*self.values):
            return "tie"
        sign = 1 if self.larger_is_better else -1
        ends = [sorted((sign * g.low, sign * g.high)) for g in self.gaps.values()]
        if any(high < 0 for _, high in ends):
            return "lose"
        return "win" if ends and all(low > 0 for low, _ in ends) else "tie"

    @property
    def words(self) -> str:
        """The verdict as a sentence."""
        a, b = self.values
        verb = {"win": "beats", "lose": "loses to", "tie": "is not told apart from"}[self.verdict]
        over = "; ".join(
            f"{number(g.low)} to {number(g.high)} over {self.groups[what]} {what}"
            for what, g in self.gaps.items()
        )
        interval = f" ({over})" if over else " (too few groups for an interval)"
        return (
            f"{self.ours} {verb} {self.theirs} in {self.metric}: {number(a)} against {number(b)}, "
            f"difference {number(a - b)}{interval}"
        )


@dataclass(frozen=True)
class Part:
    """Some of the query rows: the decisive metric of each model, and ours less each rival's."""

    name: str
    rows: int
    values: dict[str, float]
    gaps: dict[str, Interval]


@dataclass(frozen=True, repr=False)
class Report:
    """What `compare` found.

    Attributes:
        lines: one for each model.
        pairs: the first of the models given against every other, in each metric.
        periods: calm and stressed periods.
        stress: stress tests.
        metrics: names of the metrics.
        facts: what the split is.
    """

    lines: list[Line]
    pairs: list[Pair]
    periods: list[Part]
    stress: list[Part]
    metrics: list[str]
    facts: dict[str, str]

    @property
    def words(self) -> list[str]:
        """Where we win, lose and tie: a sentence for each rival and metric, in that order."""
        order = {"lose": 0, "tie": 1, "win": 2}
        return [p.words for p in sorted(self.pairs, key=lambda p: order[p.verdict])]

    @property
    def verdicts(self) -> dict[tuple[str, str], str]:
        """{(rival, metric): "win", "tie" or "lose"}."""
        return {(p.theirs, p.metric): p.verdict for p in self.pairs}

    def predictions_table(self) -> Table:
        """All models, with 95 % intervals, and times."""
        head = ["model", *self.metrics, *(f"{m}, by entity" for m in self.metrics)]
        body = []
        for line in self.lines:
            cells = [
                with_interval(s.pooled, i) for s, i in zip(line.scores, line.intervals, strict=True)
            ]
            cells += [number(s.macro) for s in line.scores]
            body.append([line.name, *cells, seconds(line.fit), seconds(line.predict)])
        return [*head, "fit", "adapt and predict"], body

    def sizes_table(self) -> Table:
        """The first metric by the size of the entity's history."""
        names = list(self.lines[0].scores[0].by_size)
        counts = self.lines[0].scores[0].counts
        head = [f"{self.metrics[0]}, rows of history", *(f"{n} ({counts[n]})" for n in names)]
        body = [[li.name, *(number(li.scores[0].by_size[n]) for n in names)] for li in self.lines]
        return head, body

    def _parts_table(self, parts: list[Part]) -> Table:
        head = [self.metrics[0], *(f"{p.name} ({counted(p.rows, 'row')})" for p in parts)]
        body = []
        for line in self.lines:
            cells = []
            for part in parts:
                gap = part.gaps.get(line.name)
                mark = ""
                sure = gap is not None and gap.is_significant
                if sure and not _same(part.values[self.pairs[0].ours], part.values[line.name]):
                    assert gap is not None
                    better = (gap.value > 0) == self.pairs[0].larger_is_better
                    mark = " (worse than ours)" if better else " (better than ours)"
                cells.append(number(part.values[line.name]) + mark)
            body.append([line.name, *cells])
        return head, body

    def _sections(self) -> list[tuple[str, Any]]:
        """Titles, and under each a table, or sentences."""
        found: list[tuple[str, Any]] = [
            ("Who wins", self.words),
            ("All models", self.predictions_table()),
        ]
        if self.lines[0].scores[0].by_size:
            found.append(("By size", self.sizes_table()))
        if self.periods:
            found.append(("Calm and stressed periods", self._parts_table(self.periods)))
        if self.stress:
            found.append(("Stress tests", self._parts_table(self.stress)))
        found.append(("What was compared", [f"{k}: {v}" for k, v in self.facts.items()]))
        return found

    def frame(self) -> Any:
        """The scores as a pandas DataFrame: a row for each model, a column for each metric."""
        pandas = need("pandas", "Report.frame")
        rows = [
            {m: s.pooled for m, s in zip(self.metrics, li.scores, strict=True)} for li in self.lines
        ]
        times = [{"fit_s": li.fit, "predict_s": li.predict} for li in self.lines]
        both = [{**r, **t} for r, t in zip(rows, times, strict=True)]
        return pandas.DataFrame(both, index=[li.name for li in self.lines])

    def markdown(self) -> str:
        """The report as Markdown."""
        out = []
        for title, content in self._sections():
            out.append(f"## {title}\n")
            if isinstance(content, tuple):
                head, body = content
                lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
                out += ["| " + " | ".join(row) + " |" for row in lines]
            else:
                out += [f"- {sentence}" for sentence in content]
            out.append("")
        return "\n".join(out)

    def figures(self) -> Any:
        """A matplotlib Figure: every model's first metric, and ours less each rival's."""
        matplotlib = need("matplotlib.figure", "Report.figures", "examples")
        figure = matplotlib.Figure(figsize=(10, 1 + 0.4 * len(self.lines)), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = [line.name for line in self.lines][::-1]
        for y, line in enumerate(reversed(self.lines)):
            colour = "C1" if line.is_ours else "C0"
            _bar(left, y, line.scores[0].pooled, line.intervals[0], colour)
        left.set_yticks(range(len(names)), names)
        left.set_title(self.metrics[0])
        pairs = [p for p in self.pairs if p.metric == self.metrics[0]][::-1]
        for y, pair in enumerate(pairs):
            for i, gap in enumerate(pair.gaps.values()):
                _bar(right, y + 0.15 * i, gap.value, gap, f"C{i}")
        right.axvline(0, color="grey", linewidth=1)
        right.set_yticks(range(len(pairs)), [p.theirs for p in pairs])
        right.set_title(f"{self.lines[0].name} less rival")
        return figure

    def html(self) -> str:
        """The report as one HTML page that fetches nothing; with figures, given matplotlib."""
        return f"{_HEAD}\n{self._body()}\n</body></html>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f"<div>{self._body()}</div>"

    def _body(self) -> str:
        out = []
        for title, content in self._sections():
            out.append(f"<h2>{html.escape(title)}</h2>")
            if isinstance(content, tuple):
                out.append(_html_table(*content))
            else:
                out.append(
                    "<ul>" + "".join(f"<li>{html.escape(s)}</li>" for s in content) + "</ul>"
                )
        try:
            figure = self.figures()
        except ImportError:
            return "\n".join(out)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        data = base64.b64encode(picture.getvalue()).decode()
        out.append(f'<img alt="intervals" src="data:image/png;base64,{data}">')
        return "\n".join(out)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to a file, as HTML or Markdown by its ending.

        Raises:
            ValueError: the path ends in neither .html nor .md.
        """
        text = {".html": self.html, ".md": self.markdown}.get(os.path.splitext(path)[1])
        if text is None:
            raise ValueError(
                f"path: expected one that ends in .html or .md, got {os.fspath(path)!r}"
            )
        with open(path, "w", encoding="utf-8") as file:
            file.write(text())

    def __str__(self) -> str:
        return self.markdown()

    def __repr__(self) -> str:
        """The models, the metrics and the verdicts' counts; `str` has the tables."""
        found = [pair.verdict for pair in self.pairs]
        counts = ", ".join(f"{found.count(v)} {v}" for v in ("lose", "tie", "win"))
        models = ", ".join(line.name for line in self.lines)
        return f"Report({models}; {', '.join(self.metrics)}; {counts})"


_HEAD = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>Comparison</title><style>
body{font-family:sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse}
td,th{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:right}
td:first-child,th:first-child{text-align:left}</style></head><body>"""


def _html_table(head: list[str], body: list[list[str]]) -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + row(head, "th") + "".join(row(cells, "td") for cells in body) + "</table>"


def _bar(axes: Any, y: float, value: float, interval: Interval | None, colour: str) -> None:
    axes.plot([value], [y], "o", color=colour)
    if interval is not None:
        axes.plot([interval.low, interval.high], [y, y], color=colour)


def number(value: float) -> str:
    """Four digits that mean something."""
    return f"{value:.4g}"


def with_interval(value: float, interval: Interval | None) -> str:
    """A number, and behind it the interval."""
    if interval is None:
        return number(value)
    return f"{number(value)} ({number(interval.low)} to {number(interval.high)})"


def seconds(value: float) -> str:
    """A time that is read at a glance."""
    return f"{value:.2f} s" if value >= 0.1 else f"{1e3 * value:.1f} ms"
