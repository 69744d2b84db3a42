"""A credit model for every state and every 3-digit zip code: does it beat one model for all?

    python examples/lending_club.py --data lendingclub_2007_2011.csv.gz     # some minutes
    python examples/lending_club.py --data ... --quick                      # less of everything

The data are 42,535 LendingClub loans from 2007 to 2011, 15 % of which defaulted (`credit_data.py`
describes the file, and which columns a lender knows at the time of the decision). A *task* is a
state (50) or a 3-digit zip code (837): a model learns from, or is adapted to, the task's past and
is scored on its future.

**Time.** The past is everything issued before 2011, the future is 2011. Preprocessing is fitted on
the past. Settings (step sizes, regularisation ...) are chosen on the second half of 2010, with
models that have seen only loans issued before that. All methods are given the final outcome of
every past loan, although at the cut-off the outcome of recent loans is not known yet: the numbers
compare methods; they do not predict what a lender would have achieved.

**Tasks.** The groups are split into folds. A start (MAML, Reptile, the pooled network) is learnt
from the past of the groups in the other folds; it is then adapted to each held-out group's own
past, and the group's future is scored. So each group is scored once, from a start that has never
seen it. Settings are chosen in the same way within the other folds. The baselines that need no
start get more data, not less: they learn from the past of all groups at once, or of the one group.

Scores: area under the ROC curve (AUC), Kolmogorov-Smirnov distance (KS), Brier score, log-loss.
*Macro* is the mean over the groups with enough future loans of both outcomes; *micro* treats all
future loans as one set.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import credit_data
import numpy as np
import pandas as pd
from _common import mean_interval, one_torch_thread
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score, roc_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from threadpoolctl import threadpool_limits

import pymeta
from pymeta.sklearn import MetaClassifier

Array = NDArray[Any]
Scores = dict[str, float]

VALIDATION, CUT = "2010-07", "2011-01"  # the first months of the validation period and the future
LEAST_ROWS, LEAST_OF_A_KIND = 30, 3  # what a group's future must have to count in the macro average
METRICS = ("AUC", "KS", "Brier", "log-loss")
SEED = 0

MAML, REPTILE, TUNED = "MAML, adapted", "Reptile, adapted", "pooled network, fine-tuned"
UNADAPTED, NETWORK = "pooled network, not adapted", "pooled network, all groups' past"
LOGISTIC, WITH_GROUP = "logistic regression", "logistic regression, group as a feature"
BOOSTING, EACH = "gradient boosting, group as a feature", "logistic regression per group"


HEAD = f"""# LendingClub: a credit model for every state and every 3-digit zip code

Made by `examples/lending_club.py`, which begins with a description of the method: the past is
everything issued before {CUT}, the future everything after it; the start of MAML, Reptile and the
fine-tuned network has never seen the group that it is adapted to. *Macro* is the mean over the
groups with at least {LEAST_ROWS} future loans, {LEAST_OF_A_KIND} of each outcome; *micro* treats
all future loans as one set. Higher is better for AUC and KS, lower for Brier score and log-loss.
The last column is the mean difference over groups and half the width of its 95 % interval. The
interval does not include the randomness of training: with other random starts, the pooled
network's AUC has a standard deviation of 0.0014 (states, macro) and 0.0021 (micro), so differences
of that size between networks mean nothing.
"""


class Learner(NamedTuple):
    """A way to learn a start, with the settings among which the validation period decides."""

    name: str
    fits: list[dict[str, Any]]
    adaptations: list[dict[str, Any]]


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    folds: int
    validations: int  # on how many thirds of a fold's other groups settings are compared
    learners: tuple[Learner, ...]
    penalties: tuple[float, ...]  # C of the logistic regressions
    trees: tuple[dict[str, int], ...]


# what `fit` would choose and look after by itself is what this comparison varies
PLAIN = {"method": "maml", "anchor_rows": None, "gate": False, "clip_inputs": False}
NET = {**PLAIN, "hidden": (32,), "weight_decay": 1.0, "random_state": SEED}
META = {**NET, "tasks_per_batch": 4, "task_rows": 64, "draw": "rows"}
NETS = [{**NET, "hidden": hidden, "epochs": e} for hidden in ((16,), (32,)) for e in (4, 8)]
METAS = [
    {**META, "hidden": hidden, "inner_lr": lr, "iterations": iterations}
    for hidden, lr, iterations in (
        ((32,), 0.05, 600),
        ((16,), 0.05, 1200),
        ((32,), 0.05, 1200),
        ((32,), 0.2, 1200),
    )
]
ADAPTATIONS = [
    {"adapt_lr": lr, "adapt_epochs": epochs}
    for lr, epochs in ((0.05, 1), (0.05, 5), (0.2, 5), (0.1, 20), (0.2, 20))
]
FULL = Size(
    folds=5,
    validations=3,
    learners=(
        Learner(MAML, METAS, ADAPTATIONS),
        Learner(REPTILE, [{**fit, "method": "reptile"} for fit in METAS], ADAPTATIONS),
        Learner(TUNED, [{**fit, "method": "pooled"} for fit in NETS], ADAPTATIONS),
    ),
    penalties=(0.001, 0.003, 0.01, 0.03, 0.1, 1.0),
    trees=tuple(
        {"max_iter": trees, "max_leaf_nodes": leaves}
        for trees in (50, 100, 200)
        for leaves in (7, 15)
    ),
)
QUICK = Size(
    folds=3,
    validations=1,
    learners=tuple(Learner(n, fits[:1], settings[1:4:2]) for n, fits, settings in FULL.learners),
    penalties=(0.001, 0.01, 0.1),
    trees=({"max_iter": 100, "max_leaf_nodes": 7},),
)


# ---- data ---------------------------------------------------------------------------------------


def columns() -> ColumnTransformer:
    """Numbers: missing ones filled in and marked, standardised, cut at five. Choices: one-hot."""
    numbers = make_pipeline(
        SimpleImputer(strategy="median", add_indicator=True),
        StandardScaler(),
        FunctionTransformer(np.clip, kw_args={"a_min": -5, "a_max": 5}),
    )
    choices = OneHotEncoder(handle_unknown="ignore", min_frequency=20, sparse_output=False)
    return ColumnTransformer(
        [("numbers", numbers, credit_data.NUMERIC), ("choices", choices, credit_data.CHOICES)]
    )


def dealt(groups: Array, parts: int, rng: np.random.Generator) -> Array:
    """A part 0 .. parts-1 for each row, the same for a group's rows; parts are of similar size."""
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    part = np.empty(len(names), dtype=int)
    largest_first = np.argsort(-sizes, kind="stable")
    for i in range(0, len(names), parts):
        together = largest_first[i : i + parts]
        part[together] = rng.permutation(parts)[: len(together)]
    return part[codes]


class Problem:
    """The loans of one grouping: which are past and future, and their features as seen then."""

    def __init__(self, loans: pd.DataFrame, group: str) -> None:
        self.loans = loans
        self.y = loans["default"].to_numpy()
        self.groups = loans[group].to_numpy(dtype=str)
        issued = loans["issued"].to_numpy(dtype=str)
        self.past, self.future = issued < CUT, issued >= CUT
        self.early = issued < VALIDATION
        self.late = self.past & ~self.early
        self.rows = dict(zip(*np.unique(self.groups[self.past], return_counts=True), strict=True))

    def features(self, known: Array) -> Array:
        """All loans' features, by preprocessing that was fitted on those `known` (a mask)."""
        table = self.loans[credit_data.FEATURES]
        return columns().fit(table[known]).transform(table).astype(np.float32)


# ---- learners with a start ----------------------------------------------------------------------


def fitted(problem: Problem, X: Array, rows: Array, settings: dict[str, Any]) -> MetaClassifier:
    """The start learnt from `rows` (a mask)."""
    return MetaClassifier(**settings).fit(X[rows], problem.y[rows], groups=problem.groups[rows])


def adapted_to(
    model: MetaClassifier, problem: Problem, X: Array, rows: Array, settings: dict[str, Any]
) -> MetaClassifier:
    """The model, its start adapted to the groups of `rows` (a mask), all in one call."""
    model.set_params(**settings)
    return model.adapt(X[rows], problem.y[rows], groups=problem.groups[rows])


class Trial(NamedTuple):
    """A rehearsal before the cut: features, and the rows to learn, to adapt to and to score."""

    X: Array
    learn: Array
    own: Array
    late: Array


def trials(problem: Problem, others: Array, number: int, rng: np.random.Generator) -> list[Trial]:
    """Each adapts to another third of the `others` (a mask), having learnt from the rest."""
    third = dealt(problem.groups, 3, rng)
    found = []
    for part in range(number):
        mine = others & (third == part)
        learn = problem.early & others & ~mine
        X = problem.features(learn)
        found.append(Trial(X, learn, problem.early & mine, problem.late & mine))
    return found


def chosen(
    problem: Problem, learner: Learner, trials: Sequence[Trial]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings with the least log-loss in the validation period, on held-out groups."""
    losses = np.zeros((len(learner.fits), len(learner.adaptations)))
    for X, learn, own, late in trials:
        for i, fit in enumerate(learner.fits):
            model = fitted(problem, X, learn, fit)
            for j, adaptation in enumerate(learner.adaptations):
                adapted_to(model, problem, X, own, adaptation)
                p = model.predict_proba(X[late], groups=problem.groups[late])[:, 1]
                losses[i, j] += log_loss(problem.y[late], p, normalize=False)
    i, j = np.unravel_index(losses.argmin(), losses.shape)
    return learner.fits[i], learner.adaptations[j]


def told(settings: dict[str, Any]) -> str:
    """Those settings that something is chosen by."""
    names = ("hidden", "epochs", "iterations", "inner_lr", "adapt_lr", "adapt_epochs")
    return ", ".join(f"{n}={settings[n]}" for n in names if n in settings)


def with_starts(problem: Problem, size: Size, say: Callable[[str], None]) -> dict[str, Array]:
    """Each learner's chances of default for all loans of the future, group by held-out group."""
    rng = np.random.default_rng(SEED)
    fold = dealt(problem.groups, size.folds, rng)
    found = {n: np.full(len(problem.y), np.nan) for n in (MAML, REPTILE, TUNED, UNADAPTED)}
    for k in range(size.folds):
        others = fold != k
        learn, own = problem.past & others, problem.past & ~others
        future = problem.future & ~others
        X, rehearsals = problem.features(learn), trials(problem, others, size.validations, rng)
        for learner in size.learners:
            fit, adaptation = chosen(problem, learner, rehearsals)
            model = fitted(problem, X, learn, fit)
            if learner.name == TUNED:
                found[UNADAPTED][future] = model.predict_proba(X[future])[:, 1]
            adapted_to(model, problem, X, own, adaptation)
            p = model.predict_proba(X[future], groups=problem.groups[future])[:, 1]
            found[learner.name][future] = p
            say(f"fold {k + 1} of {size.folds}: {learner.name}: {told({**fit, **adaptation})}")
    return found


# ---- rivals -------------------------------------------------------------------------------------

# A rival learns from some rows and scores others: features, two masks -> chances.
Predict = Callable[[Array, Array, Array], Array]


def by_fitting(problem: Problem, model: Any) -> Predict:
    """The features alone."""

    def predict(X: Array, learn: Array, score: Array) -> Array:
        return model.fit(X[learn], problem.y[learn]).predict_proba(X[score])[:, 1]

    return predict


def logistic(penalty: float) -> LogisticRegression:
    return LogisticRegression(C=penalty, solver="newton-cholesky")


def with_group(problem: Problem, penalty: float) -> Predict:
    """A logistic regression with an indicator of each group: its own level of risk."""

    def predict(X: Array, learn: Array, score: Array) -> Array:
        encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32)
        groups = problem.groups[:, None]
        own = encoder.fit(groups[learn]).transform(groups)
        X = np.concatenate([X, own], axis=1)
        return by_fitting(problem, logistic(penalty))(X, learn, score)

    return predict


def boosting(problem: Problem, settings: dict[str, int]) -> Predict:
    """Gradient boosting with the group as a category: the 254 largest ones, and all others."""

    def predict(X: Array, learn: Array, score: Array) -> Array:
        names, sizes = np.unique(problem.groups[learn], return_counts=True)
        largest = names[np.argsort(-sizes, kind="stable")][:254]
        place = {name: float(i) for i, name in enumerate(largest)}
        group = [[place.get(name, np.nan)] for name in problem.groups]
        X = np.concatenate([X, np.array(group, np.float32)], axis=1)
        model = HistGradientBoostingClassifier(
            learning_rate=0.05,
            categorical_features=[X.shape[1] - 1],
            early_stopping=False,
            random_state=SEED,
            **settings,
        )
        return by_fitting(problem, model)(X, learn, score)

    return predict


def regressions(problem: Problem, X: Array, learn: Array, penalty: float) -> dict[str, Any]:
    """A logistic regression for each group that has both kinds of loans."""
    models = {}
    order = np.flatnonzero(learn)
    order = order[np.argsort(problem.groups[order], kind="stable")]
    names, starts = np.unique(problem.groups[order], return_index=True)
    for name, rows in zip(names, np.split(order, starts[1:]), strict=True):
        if len(np.unique(problem.y[rows])) == 2:
            models[name] = logistic(penalty).fit(X[rows], problem.y[rows])
    return models


def one_a_group(problem: Problem, penalty: float) -> Predict:
    """A group's own regression; the share of defaults in all of the past where it has none."""

    def predict(X: Array, learn: Array, score: Array) -> Array:
        models = regressions(problem, X, learn, penalty)
        p = np.full(len(X), problem.y[learn].mean())
        for name in np.unique(problem.groups[score]):
            rows = score & (problem.groups == name)
            if name in models:
                p[rows] = models[name].predict_proba(X[rows])[:, 1]
        return p[score]

    return predict


def rivals(problem: Problem, size: Size, say: Callable[[str], None]) -> tuple[dict, dict]:
    """The other methods' chances for all future loans, and the settings chosen for them."""
    entries: dict[str, tuple[Callable[[Any], Predict], Sequence[Any]]] = {
        NETWORK: (
            lambda settings: by_fitting(problem, MetaClassifier(**settings)),
            size.learners[-1].fits,
        ),
        LOGISTIC: (lambda c: by_fitting(problem, logistic(c)), size.penalties),
        WITH_GROUP: (lambda c: with_group(problem, c), size.penalties),
        BOOSTING: (lambda settings: boosting(problem, settings), size.trees),
        EACH: (lambda c: one_a_group(problem, c), size.penalties),
    }
    then, now = problem.features(problem.early), problem.features(problem.past)
    found, settings = {}, {}
    for name, (make, among) in entries.items():

        def loss(setting: Any, make: Callable[[Any], Predict] = make) -> float:
            p = make(setting)(then, problem.early, problem.late)
            return log_loss(problem.y[problem.late], p)

        settings[name] = min(among, key=loss)
        p = np.full(len(problem.y), np.nan)
        p[problem.future] = make(settings[name])(now, problem.past, problem.future)
        found[name] = p
        say(f"{name}: {told(settings[name]) if name == NETWORK else settings[name]}")
    return found, settings


# ---- scores -------------------------------------------------------------------------------------


def scores(y: Array, p: Array) -> Scores:
    """The four measures of chances `p` of the outcomes `y`."""
    false_alarms, hits, _ = roc_curve(y, p)
    return {
        "AUC": float(roc_auc_score(y, p)),
        "KS": float(np.max(hits - false_alarms)),
        "Brier": float(brier_score_loss(y, p)),
        "log-loss": float(log_loss(y, p)),
    }


def scored(problem: Problem, found: dict[str, Array]) -> tuple[pd.DataFrame, dict[str, Scores]]:
    """Each group's scores (a row for each group and method), and those of all future loans."""
    rows = []
    for name in np.unique(problem.groups[problem.future]):
        mask = problem.future & (problem.groups == name)
        y = problem.y[mask]
        if len(y) < LEAST_ROWS or min(y.sum(), len(y) - y.sum()) < LEAST_OF_A_KIND:
            continue
        counts = {"past": int(problem.rows.get(name, 0)), "future": len(y), "defaults": y.sum()}
        for method, p in found.items():
            rows.append({"group": name, **counts, "method": method, **scores(y, p[mask])})
    future = problem.future
    return pd.DataFrame(rows), {m: scores(problem.y[future], p[future]) for m, p in found.items()}


def seconds(call: Callable[[], Any], times: int = 3) -> float:
    """The shortest of some runs."""
    best = np.inf
    for _ in range(times):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def timed(problem: Problem, penalty: float) -> dict[str, Any]:
    """What it takes to adapt to the past of all groups at once, and to fit them one by one."""
    X, past = problem.features(problem.past), problem.past
    model = fitted(problem, X, past, {**META, "iterations": 1})
    times = {}
    for settings in ({"adapt_lr": 0.05, "adapt_epochs": 5}, {"adapt_lr": 0.2, "adapt_epochs": 20}):
        name = f"pymeta, {settings['adapt_epochs']} steps"
        times[name] = seconds(lambda s=settings: adapted_to(model, problem, X, past, s))
    times[EACH] = seconds(lambda: regressions(problem, X, past, penalty), 1)
    groups = len(np.unique(problem.groups[past]))
    return {"groups": groups, "threads": pymeta.num_threads(), "seconds": times}


@dataclass(frozen=True)
class Result:
    """What came out for one grouping."""

    grouping: str
    tasks: pd.DataFrame
    micro: dict[str, Scores]
    timing: dict[str, Any]

    @property
    def groups(self) -> int:
        """How many groups are in the macro average."""
        return self.tasks["group"].nunique()

    def macro(self, method: str) -> Scores:
        """The mean over groups."""
        mine = self.tasks[self.tasks["method"] == method]
        return {m: float(mine[m].mean()) for m in METRICS}

    def gain(self, method: str, metric: str = "AUC") -> tuple[float, float]:
        """Mean and half 95 % interval over groups of the difference to the logistic regression."""
        wide = self.tasks.pivot(index="group", columns="method", values=metric)
        return mean_interval((wide[method] - wide[LOGISTIC]).to_numpy())


def run(loans: pd.DataFrame, grouping: str, size: Size, say: Callable[[str], None]) -> Result:
    """All methods on one grouping."""
    problem = Problem(loans, credit_data.GROUPS[grouping])

    def tell(line: str) -> None:
        say(f"[{grouping}] {line}")

    found = with_starts(problem, size, tell)
    others, settings = rivals(problem, size, tell)
    tasks, micro = scored(problem, {**found, **others})
    return Result(grouping, tasks, micro, timed(problem, settings[EACH]))


# ---- output -------------------------------------------------------------------------------------


def verdict(result: Result) -> str:
    """What the numbers say, whoever has won."""
    macro = {m: result.macro(m)["AUC"] for m in result.micro}
    micro = {m: s["AUC"] for m, s in result.micro.items()}
    best, best_micro = max(macro, key=macro.__getitem__), max(micro, key=micro.__getitem__)
    lines = [
        f"Highest AUC, macro: {best} ({macro[best]:.4f}); micro: {best_micro} "
        f"({micro[best_micro]:.4f})."
    ]
    for method in (MAML, REPTILE, TUNED):
        mean, half = result.gain(method)
        word = "indistinguishable from" if abs(mean) <= half else "above" if mean > 0 else "below"
        lines.append(f"{method}: {word} {LOGISTIC} (macro AUC {mean:+.4f} ± {half:.4f}).")
    return "\n".join(f"- {line}" for line in lines)


def table(result: Result) -> str:
    """Markdown: a line for each method; then the times and the verdict."""
    heads = [f"{m} {kind}" for kind in ("macro", "micro") for m in METRICS]
    lines = [
        f"## {result.grouping}: {result.groups} groups in the macro average",
        "",
        f"| method | {' | '.join(heads)} | macro AUC against {LOGISTIC} |",
        f"|---|{'---:|' * (len(heads) + 1)}",
    ]
    for method, micro in result.micro.items():
        cells = [f"{s[m]:.4f}" for s in (result.macro(method), micro) for m in METRICS]
        mean, half = result.gain(method)
        difference = "" if method == LOGISTIC else f"{mean:+.4f} ± {half:.4f}"
        lines.append(f"| {method} | {' | '.join(cells)} | {difference} |")
    timing = result.timing
    times = "; ".join(f"{name}: {1e3 * s:,.0f} ms" for name, s in timing["seconds"].items())
    lines += ["", f"To adapt to the past of all {timing['groups']} groups "]
    lines[-1] += f"({timing['threads']} threads): {times}."
    return "\n".join([*lines, "", verdict(result)])


def figure(results: Sequence[Result], path: Path) -> None:
    """Each method's macro AUC against the pooled logistic regression's, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = [m for m in results[0].micro if m != LOGISTIC][::-1]
    fig, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 3.8), sharey=True)
    for ax, result in zip(np.atleast_1d(axes), results, strict=True):
        for place, method in enumerate(methods):
            mean, half = result.gain(method)
            ours = method in (MAML, REPTILE, TUNED)
            ax.errorbar(mean, place, xerr=half, fmt="o", capsize=3, color=f"C{int(not ours)}")
        ax.axvline(0, color="grey", linewidth=1)
        ax.set_title(f"{result.grouping}: {result.groups} groups")
        ax.set_xlabel("macro AUC, difference to one logistic regression")
        ax.grid(axis="x", alpha=0.3)
    np.atleast_1d(axes)[0].set_yticks(range(len(methods)), methods)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def as_json(results: Sequence[Result], size: Size) -> str:
    """Everything but the groups' own scores."""
    found = {
        r.grouping: {
            "groups": r.groups,
            "macro": {m: r.macro(m) for m in r.micro},
            "micro": r.micro,
            "gain": {m: r.gain(m) for m in r.micro},
            "timing": r.timing,
        }
        for r in results
    }
    return json.dumps({"size": asdict(size), "results": found}, indent=1, default=str)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the loans, CSV or CSV.gz")
    parser.add_argument("--quick", action="store_true", help="fewer folds and settings")
    parser.add_argument("--grouping", choices=credit_data.GROUPS, action="append", default=None)
    parser.add_argument("--out", type=Path, help="write the tables: .md, or .json")
    parser.add_argument("--tasks", type=Path, help="write every group's scores, CSV")
    parser.add_argument("--figure", type=Path, help="write the figure, PNG")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, size: Size | None = None, quiet: bool = False):
    """Run what the arguments say; returns the results, one for each grouping."""
    args = arguments(argv)
    one_torch_thread()
    size = size or (QUICK if args.quick else FULL)
    loans = credit_data.load(args.data)
    begin = time.perf_counter()

    def say(line: str) -> None:
        if not quiet:
            print(f"{time.perf_counter() - begin:5.0f} s  {line}", flush=True)

    groupings = args.grouping or list(credit_data.GROUPS)
    with threadpool_limits(1, user_api="blas"):  # as for torch: the products here are small
        results = [run(loans, grouping, size, say) for grouping in groupings]
    text = "\n\n".join(map(table, results)) + "\n"
    if not quiet:
        print(f"\n{text}")
    if args.out:
        markdown = f"{HEAD}\n{text}"
        args.out.write_text(as_json(results, size) if args.out.suffix == ".json" else markdown)
    if args.tasks:
        parts = {r.grouping: r.tasks for r in results}
        pd.concat(parts, names=["grouping"]).reset_index("grouping").to_csv(args.tasks, index=False)
    if args.figure:
        figure(results, args.figure)
    return results


if __name__ == "__main__":
    main()
