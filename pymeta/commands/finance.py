"""`pymeta finance JOB --data FILE ...`: a job's function, with its arguments as options.

The options are the function's own keyword arguments, and their help its docstring's, so that a job
has one description.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple


class Job(NamedTuple):
    """Where a job is, as "module:function", and what it does, in a line."""

    home: str
    help: str


JOBS = {
    "allocation": Job(
        "pymeta.finance.jobs.allocation:allocation", "choose portfolio weights for groups of assets"
    ),
    "betas": Job("pymeta.finance.jobs.betas:betas", "estimate stocks' betas from few days"),
    "credit": Job("pymeta.finance.jobs.credit:credit", "predict defaults by segment"),
    "fraud": Job("pymeta.finance.jobs.fraud:fraud", "detect new kinds of fraud from a few cases"),
    "text": Job("pymeta.finance.jobs.text:text", "classify messages from a few examples a class"),
    "trend": Job("pymeta.finance.jobs.trend:trend", "rank stocks by their next returns"),
    "volatility": Job(
        "pymeta.finance.jobs.volatility:volatility", "predict the next days' variances of stocks"
    ),
}
_TYPES = {"int": int, "float": float, "str": str}
_OWN = ("data", "columns", "say")


def usage() -> str:
    """What `pymeta finance --help` prints."""
    width = max(map(len, JOBS))
    lines = [f"  {name:<{width}}  {job.help}" for name, job in JOBS.items()]
    head = "usage: pymeta finance JOB --data FILE [--out FOLDER] ..."
    about = "Compare adapted models with their rivals on a table of yours, and train one to deploy."
    more = "pymeta finance JOB --help lists a job's options."
    return "\n".join([head, "", about, "", *lines, "", more])


def finance(words: Sequence[str]) -> int:
    """`pymeta finance JOB ...`; the exit status."""
    words = list(words)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] not in JOBS:
        print(f"pymeta finance: no job {words[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    name = words[0]
    module, _, function = JOBS[name].home.partition(":")
    run = getattr(import_module(module), function)
    options = vars(parser(name, run).parse_args(words[1:]))
    out, quiet = options.pop("out"), options.pop("quiet")
    pairs = [text.partition("=")[::2] for text in options.pop("column")]
    if any(not role or not column for role, column in pairs):
        print("pymeta finance: --column: expected ROLE=NAME", file=sys.stderr)
        return 2
    from pymeta.finance.result import silent, to_stderr

    try:
        found = run(**options, columns=dict(pairs), say=silent if quiet else to_stderr)
        print(found)
        for path in found.save(out) if out else ():
            print(path, file=sys.stderr)
    except (OSError, TypeError, ValueError) as error:
        print(f"pymeta finance {name}: {error}", file=sys.stderr)
        return 1
    return 0


def parser(name: str, run: Callable[..., Any]) -> argparse.ArgumentParser:
    """The parser of a job's options, of its function's signature and docstring."""
    doc = inspect.getdoc(run) or ""
    helps = arguments_of(doc)
    made = argparse.ArgumentParser(
        prog=f"pymeta finance {name}", description=doc.partition("\n")[0]
    )
    made.add_argument("--data", required=True, help=_of_command(helps.get("data", "")))
    made.add_argument("--out", help="the folder to write the report and the trained model to")
    made.add_argument("--quiet", action="store_true", help="show no progress")
    roles = dict.fromkeys(re.findall(r'"(\w+)":', helps.get("columns", "")))
    made.add_argument(
        "--column", action="append", default=[], metavar="ROLE=NAME",
        help=f"what a column of the table is called; roles: {', '.join(roles)}",
    )  # fmt: skip
    for option, parameter in inspect.signature(run).parameters.items():
        if option in _OWN:
            continue
        flag, help_ = "--" + option.replace("_", "-"), _of_command(helps.get(option, ""))
        if isinstance(parameter.default, bool):
            action: Any = argparse.BooleanOptionalAction if parameter.default else "store_true"
            made.add_argument(flag, action=action, default=parameter.default, help=help_)
            continue
        kind = _TYPES.get(str(parameter.annotation).partition(" ")[0], str)
        made.add_argument(flag, type=kind, default=parameter.default, help=help_)
    return made


def _of_command(text: str) -> str:
    """What a docstring says of an argument, as an option's help."""
    text = re.sub(r"\bgive `columns`", "give --column", text).replace("`at`", "--at")
    return text.removesuffix(".").replace("`", "").replace("%", "%%")


def arguments_of(doc: str) -> dict[str, str]:
    """{argument: what a docstring in Google's style says of it}."""
    found = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    if found is None:
        return {}
    entries = re.split(r"^(?=\w+: )", textwrap.dedent(found.group(1)), flags=re.MULTILINE)
    pairs = (entry.partition(": ")[::2] for entry in entries if entry.strip())
    return {name: " ".join(text.split()) for name, text in pairs}
