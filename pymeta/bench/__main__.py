"""`python -m pymeta.bench`: how fast pymeta is here, and its rivals, as far as they are installed.

    python -m pymeta.bench --quick                     a few cases, under a minute on two cores
    python -m pymeta.bench                             all cases, all rivals: half an hour or more
    python -m pymeta.bench --cases W1 "W2 no BN"       cases whose names begin so
    python -m pymeta.bench --list                      cases and contestants
    python -m pymeta.bench --compare a.json b.json     two files of results, and the noise
    python -m pymeta.bench --plot times.png            time per task against tasks and width
    python -m pymeta.bench --device cuda               on a GPU

Every answer is checked against float64 before it is timed. Results go to the terminal as they
come, and into a JSON and a Markdown file after each case. Exit status: 0; 1 where a contestant's
answer was wrong or nothing could be measured; 2 for wrong options.

See also `python -m pymeta.bench.latency` (one small call, its median and its tail) and
`python -m pymeta.bench.many` (100,000 models).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pymeta import native
from pymeta.bench import compare, contestants, devices, plot, report, verify
from pymeta.bench.cases import (
    CASES,
    CUDA_CASES,
    QUICK_CASES,
    QUICK_CUDA_CASES,
    Case,
    sweep,
)
from pymeta.bench.session import Row, Settings, say, session

# On a CUDA device: seconds after which no compiler begins, and seconds that any
# contestant may take to prepare a case.
BUDGET = 240.0
PATIENCE = 120.0

# --quick: seconds after which no further case begins, so that a slow machine ends in a minute, too.
QUICK_START = 25.0


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected an integer above 0, got {text}")
    return value


def _block(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 256:
        raise argparse.ArgumentTypeError(f"expected threads of a block, 1 to 256, got {text}")
    return value


def parser(program: str = "python -m pymeta.bench") -> argparse.ArgumentParser:
    """The options."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--cases", nargs="+", metavar="NAME",
        help="cases whose names begin so, in this order; default all")  # fmt: skip
    add("--only", nargs="+", metavar="NAME", help="contestants whose names begin so; default all")
    add("--without", nargs="+", metavar="NAME", default=[], help="leave these out, likewise")
    add("--quick", action="store_true", help="a few cases in short rounds, without the slow rivals")
    add("--list", action="store_true", help="name cases and contestants, and measure nothing")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="default pymeta-bench.json, none with --quick; Markdown goes beside it",
    )
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two files of results")
    add("--plot", type=Path, metavar="FILE", help="measure the two sweeps and draw them")
    add("--rounds", type=_count, help="turns of each contestant; default 9 (--quick, --plot: 3)")
    add("--seconds", type=_positive, help="of each turn; default 0.15 (--quick, --plot: 0.05)")
    add("--device", choices=("cpu", "cuda", "rehearsal"), default="cpu",
        help="rehearsal: the CUDA code on the CPU; no figure means anything")  # fmt: skip
    add("--budget", type=_positive, metavar="SECONDS",
        help=f"CUDA: no rival begins to compile after that; default {BUDGET:.0f}")  # fmt: skip
    add("--patience", type=_positive, metavar="SECONDS", help="that one preparation may take")
    add("--block-threads", nargs="+", type=_block, metavar="N", default=[],
        help="CUDA: measure pymeta also with so many threads a block")  # fmt: skip
    return made


# ---- choices -------------------------------------------------------------------------------------


def starting(what: str, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that begin with one of the patterns; ValueError where a pattern has none."""
    for pattern in patterns:
        if not any(name.startswith(pattern) for name in names):
            raise ValueError(f"{what}: none begins with {pattern!r}; there are {', '.join(names)}")
    return [name for name in names if name.startswith(tuple(patterns))]


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """The cases asked for; ValueError where a name is wrong."""
    cuda = options.device != "cpu"
    known = CUDA_CASES if cuda else CASES
    if options.cases:  # in the order asked for: a run may be cut off
        each = [starting("--cases", list(known), [pattern]) for pattern in options.cases]
        return [known[name] for name in dict.fromkeys(name for names in each for name in names)]
    if options.quick:
        known = QUICK_CUDA_CASES if cuda else QUICK_CASES
    return list(known.values())


def choose_contestants(options: argparse.Namespace) -> list[str]:
    """The names of contestants asked for and installed; ValueError where a name is wrong."""
    cuda = options.device != "cpu"
    known = contestants.of(options.device)
    names = list(known)
    if options.only:
        names = starting("--only", names, options.only)
    elif options.plot:
        names = list(contestants.SWEEP_CUDA if cuda else contestants.SWEEP)
    elif options.quick:
        names = list(contestants.QUICK_CUDA if cuda else contestants.QUICK)
    if options.without:
        left_out = starting("--without", list(known), options.without)
        names = [name for name in names if name not in left_out]
    if not names:
        raise ValueError("--only, --without: no contestant is left")
    here = [name for name in names if not known[name].missing()]
    for name in names:
        if name not in here:
            say(f"without {name}: {', '.join(known[name].missing())} is not installed")
    return here


def listing(options: argparse.Namespace) -> str:
    """Cases and contestants, for `--list`."""
    cuda = options.device != "cpu"
    cases = (CUDA_CASES if cuda else CASES).values()
    lines = ["cases:"]
    lines += [f"  {case.name:<30} {case.describe()}" for case in cases]
    lines += ["", "contestants:"]
    for name, contestant in contestants.of(options.device).items():
        missing = contestant.missing()
        state = f"not installed: {', '.join(missing)}" if missing else "installed"
        lines.append(f"  {name:<30} {state}")
    return "\n".join(lines)


# ---- running -------------------------------------------------------------------------------------


def _without_torch(cases: list[Case]) -> list[Case]:
    """The cases that can be checked by numpy alone."""
    left = [case for case in cases if case.job != "maml"]
    if len(left) < len(cases):
        say(
            "There is no torch here, and meta-gradients are checked by torch in float64: left are "
            f"{', '.join(case.name for case in left) or 'no cases'}. pymeta runs them by its "
            "native call and by pymeta.Adapter."
        )
    return left


def _obstacle(options: argparse.Namespace) -> str | None:
    """Why nothing can be measured with these options; None where it can."""
    if native.missing() is not None:
        return f"pymeta cannot be measured: {native.missing()}"
    if options.device == "cuda":
        why = devices.why_no_cuda()
        return why and f"--device cuda: {why}"
    if options.device == "rehearsal" and not verify.has_torch():
        return "--device rehearsal: torch is not installed"
    return None


def _wrong(rows: list[Row]) -> bool:
    return any(e.get("wrong") for row in rows for e in row["contestants"].values())


class Output:
    """Prints rows as they come, and keeps the files up to date."""

    def __init__(self, options: argparse.Namespace, device: dict[str, Any]) -> None:
        """Nothing yet; `device` is what `Session.device` found."""
        self.options, self.device = options, device
        self.rows: dict[str, Row] = {}
        self.content: dict[str, Any] = {}

    def add(self, row: Row) -> None:
        """Print and write a row, which may replace an earlier one of the same case."""
        self.rows[row["case"]] = row
        print(report.text_of(row, self.device), flush=True)
        told = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self.options).items()
            if value not in (None, [], False)
        }
        rows = list(self.rows.values())
        self.content = report.content_of(self.options.device, told, self.device, rows)
        report.write(self.options.out, self.content)


def _run(options: argparse.Namespace, settings: Settings) -> Output:
    """Measure what the options ask for."""
    if options.plot:
        axes = sweep(options.device != "cpu")
        cases = [case for points in axes.values() for _, case in points]
    else:
        cases = choose_cases(options)
    if not verify.has_torch():
        cases = _without_torch(cases)
    else:
        import torch

        if options.device == "cpu":
            # The reference is no contestant; on one thread it waits for nobody's busy core.
            torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        open(options.out.with_suffix(".log"), "w") as log,
        session(settings, Path(folder), log) as run,
    ):
        device = run.device()
        if "error" in device:
            raise RuntimeError(f"the device: {device['error']}")
        output = Output(options, device)
        for row in run.rows(cases):
            output.add(row)
    if options.plot and output.rows:
        points = {
            axis: [(x, output.rows[case.name]) for x, case in some if case.name in output.rows]
            for axis, some in axes.items()
        }
        plot.draw(options.plot, output.content, points)
        say(f"{options.plot}: the figure")
    return output


def _settings(options: argparse.Namespace, names: list[str]) -> Settings:
    short = options.quick or options.plot or options.device != "cpu"
    budget = options.budget or (BUDGET if options.device == "cuda" else None)
    return Settings(
        kind=options.device,
        names=names,
        rounds=options.rounds or (3 if options.quick or options.plot else 5 if short else 9),
        seconds=options.seconds or (0.05 if short else 0.15),
        patience=options.patience or (PATIENCE if options.device == "cuda" else None),
        budget=budget,
        block_threads=options.block_threads,
        last_start=QUICK_START if options.quick and options.device == "cpu" else None,
    )


def _checked(options: argparse.Namespace) -> None:
    """ValueError where options do not fit together."""
    if options.plot:
        for name in ("cases", "block_threads"):
            if getattr(options, name):
                raise ValueError(
                    f"--plot measures its own cases: leave --{name.replace('_', '-')} out"
                )
        why = plot.missing()
        if why:
            raise ValueError(f"--plot: {why}")
        if not plot.known_suffix(options.plot):
            raise ValueError(f"--plot: no kind of figure ends in {options.plot.suffix!r}")
        if not verify.has_torch():
            raise ValueError("--plot: its cases are checked by torch, which is not installed")
    if options.device == "cpu":
        for name in ("block_threads", "budget"):
            if getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')}: needs --device cuda")
    if options.out is None and not options.quick:
        options.out = Path("pymeta-bench.json")
    if options.out is not None and options.out.suffix != ".json":
        raise ValueError(f"--out: expected a file that ends in .json, got {options.out}")


def command(words: Sequence[str]) -> int:
    """`pymeta bench`."""
    return main(words, "pymeta bench")


def main(arguments: Sequence[str] | None = None, program: str = "python -m pymeta.bench") -> int:
    """Do what the options say; the exit status."""
    made = parser(program)
    options = made.parse_args(arguments)
    try:
        if options.compare:
            print(compare.text(*options.compare))
            return 0
        if options.list:
            print(listing(options))
            return 0
        _checked(options)
        choose_cases(options)  # a wrong name is an error before anything is started
        names = choose_contestants(options)
    except (OSError, ValueError) as error:
        _refuse(made, error)
    why = _obstacle(options)
    if why is not None:
        say(why)
        return 1
    settings = _settings(options, names)
    if options.out is not None:
        return _measure(options, settings, f"{options.out}, {options.out.with_suffix('.md').name}")
    with tempfile.TemporaryDirectory() as folder:  # a quick look leaves nothing behind
        options.out = Path(folder) / "pymeta-bench.json"
        status = _measure(options, settings, "--out FILE.json keeps the results")
        if status:
            say(options.out.with_suffix(".log").read_text())
    return status


def _measure(options: argparse.Namespace, settings: Settings, where: str) -> int:
    """Run, say where the results are; the exit status."""
    began = time.monotonic()
    output = _run(options, settings)
    rows = list(output.rows.values())
    say(f"{where}: {time.monotonic() - began:.0f} s")
    if _wrong(rows):
        say("a contestant's answer was wrong, see above")
        return 1
    timed = any("median_s" in e for row in rows for e in row["contestants"].values())
    return 0 if timed else 1


def _refuse(made: argparse.ArgumentParser, error: Exception) -> NoReturn:
    made.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
