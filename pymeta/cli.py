"""The command `pymeta`: a table of subcommands, each a function imported when it is asked for.

A subcommand is a line of `COMMANDS`. Its function takes the words after its name and returns the
exit status; it parses them itself, so that `pymeta --help` imports nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """Where a subcommand is, as "module:function", and what it does, in a line."""

    home: str
    help: str


COMMANDS = {
    "info": Command("pymeta.info:command", "show what runs here and why, and test it"),
    "bench": Command("pymeta.bench.__main__:command", "measure its speed here beside its rivals"),
    "inspect": Command("pymeta.commands.inspect:command", "show what is in a file of pymeta's"),
    "adapt": Command("pymeta.commands.adapt:adapt", "make a model for each entity of a table"),
    "predict": Command("pymeta.commands.adapt:predict", "predict a table's rows with those models"),
    "finance": Command(
        "pymeta.commands.finance:finance", "run a job of finance: volatility, credit, fraud, ..."
    ),
    "serve": Command("pymeta.serve.command:serve", "adapt and predict over HTTP"),
    "retrain": Command("pymeta.serve.command:retrain", "train on a service's rows, and promote"),
    "token": Command("pymeta.serve.command:token", "make a token for a service's token file"),
}


def usage() -> str:
    """What `pymeta --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: pymeta COMMAND ...", "", *lines, "", "pymeta COMMAND --help says more."]
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run a subcommand; its exit status, or 2 where there is no such command.

    Args:
        words: the command line after `pymeta`; None for this process's.
    """
    try:
        status = _run(sys.argv[1:] if words is None else list(words))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # its reader has seen enough, as in `pymeta info | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141


def _run(words: list[str]) -> int:
    from pymeta.namesake import require_ours

    try:
        require_ours()
    except ImportError as error:
        print(f"pymeta: {error}", file=sys.stderr)
        return 1
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        import pymeta

        print(pymeta.__version__)
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        print(f"pymeta: no command {words[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module, _, function = command.home.partition(":")
    try:
        if not {"-h", "--help"} & set(words):
            _check_environment()
        status: int = getattr(import_module(module), function)(words[1:])
        return status
    except (ImportError, _WrongEnvironment) as error:  # an ImportError names the extra
        print(f"pymeta {words[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


class _WrongEnvironment(Exception):
    pass


def _check_environment() -> None:
    """Raise unless every environment variable of ours has a value that it can have."""
    try:
        from pymeta import native

        native.backend("auto")
    except ValueError as error:
        raise _WrongEnvironment(error) from None
