"""`pymeta serve`, `pymeta retrain` and `pymeta token`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

STORE = "sqlite:///pymeta.db"


def serve(words: Sequence[str]) -> int:
    """`pymeta serve adapter.safetensors`: until SIGTERM or Ctrl-C."""
    options = _serve_parser().parse_args(list(words))
    from pymeta.serve import need_extra

    try:
        from pymeta.serve import app, logs, server
        from pymeta.serve.problem import Problem
        from pymeta.serve.settings import Limits, Settings
    except ModuleNotFoundError as error:
        raise need_extra(error) from None
    beyond = not server.is_loopback(options.host)
    if beyond and options.token_file is None and not options.listen_without_tokens:
        return _refused(
            f"--host {options.host} can be reached by others: give --token-file (pymeta token "
            f"makes one), or say --listen-without-tokens"
        )
    logs.to_stderr(options.log_level)
    try:
        limits = Limits(
            body_bytes=options.max_body_mb * 2**20,
            body_seconds=options.patience,
            kept_rows=options.kept_rows,
        )
        settings = Settings(
            batch_wait_us=options.batch_wait_us,
            batch_tasks=options.batch_tasks,
            inline_us=options.inline_us,
            window_rows=options.window_rows,
            window_days=options.window_days,
            limits=limits,
        )
        names = options.feature_names and options.feature_names.read_text().split("\n")
        made = app.create_app(
            options.adapter,
            models=options.models,
            store=None if options.store == "none" else options.store,
            token_file=options.token_file,
            features=[n for n in names if n] if names else None,
            settings=settings,
            listen_without_tokens=options.listen_without_tokens,
            retrain=options.retrain,
            retrain_options=options.retrain_options.split(),
        )
        listener = server.bind(options.host, options.port, options.patience)
    except (OSError, ValueError, Problem) as error:
        return _refused(str(error))
    host, port = listener.getsockname()[:2]
    fields = {"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"}
    fields["model"] = made.state.service.model.version
    print(json.dumps(fields), flush=True)  # the log, whatever its level, goes to stderr
    server.serve(made, listener, options.patience)
    return 0


def _serve_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pymeta serve", description="Adapt and predict by HTTP.")
    add = parser.add_argument
    add("adapter", nargs="?", type=Path, help="what learner.adapter().save(...) wrote")
    add("--models", type=Path, help="folder of versions (default: beside the adapter's file)")
    add("--store", default=STORE, help=f"URL of the database, or none (default: {STORE})")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0 for a free one (default: 8000)")
    add("--token-file", type=Path, help="who may do what; pymeta token makes one")
    add("--listen-without-tokens", action="store_true", help="let anybody in from anywhere")
    add("--batch-wait-us", type=float, default=200.0, help="longest wait for others' requests")
    add(
        "--inline-us",
        type=float,
        default=2000.0,
        help="batches that take longer are one native call in a thread",
    )
    add("--batch-tasks", type=int, default=512, help="most tasks of a batch")
    add("--window-rows", type=int, default=200, help="newest rows that an entity is adapted to")
    add("--window-days", type=float, help="and at most so old, before the newest")
    add("--kept-rows", type=int, default=10_000, help="rows kept of an entity")
    add("--max-body-mb", type=int, default=32, help="of a request")
    add("--patience", type=float, default=30.0, help="seconds for a request to arrive, or a reader")
    add("--feature-names", type=Path, help="a file with a name on each line, for reasons")
    add("--retrain", metavar="CRON", help="when to retrain, in UTC, as in '0 3 * * *'")
    add("--retrain-options", default="", help="of pymeta retrain, as in '--episodes 500'")
    levels = ("debug", "info", "warning", "error")
    add("--log-level", default="info", choices=levels, help="info has a line for each request")
    return parser


def retrain(words: Sequence[str]) -> int:
    """`pymeta retrain`: 0 where a model was promoted, 3 where the old one stays."""
    parser = argparse.ArgumentParser(
        prog="pymeta retrain",
        description="Meta-train on a store's rows; promote what is not worse. Needs torch. "
        "Exit status: 0 promoted, 3 not promoted, 1 an error.",
    )
    add = parser.add_argument
    add("--models", type=Path, required=True, help="the service's folder of versions")
    add("--store", default=STORE, help=f"URL of the service's database (default: {STORE})")
    add("--store-from-stdin", action="store_true", help="read the URL there: it may be secret")
    add("--episodes", type=int, default=1000, help="meta-training steps (default: 1000)")
    add("--tasks", type=int, default=32, help="entities of a step (default: 32)")
    add("--lr", type=float, default=1e-3, help="of the outer optimiser, Adam (default: 1e-3)")
    add("--seed", type=int, default=0)
    add("--held-out", type=float, default=0.25, help="share of entities held out (default: 0.25)")
    add("--window-rows", type=int, default=200, help="rows that an entity is adapted to")
    add("--method", default="auto", choices=("auto", "maml", "reptile"), help="reptile: no torch")
    add("--later", type=float, default=0.25, help="share of rows that are later (default: 0.25)")
    options = parser.parse_args(list(words))
    url = sys.stdin.read().strip() if options.store_from_stdin else options.store
    from pymeta.serve import need_extra

    try:
        from pymeta.serve.problem import Problem
        from pymeta.serve.retrain import Recipe, retrain_once
    except ModuleNotFoundError as error:
        raise need_extra(error) from None
    try:
        recipe = Recipe(
            episodes=options.episodes,
            tasks=options.tasks,
            lr=options.lr,
            seed=options.seed,
            held_out=options.held_out,
            later=options.later,
            window=options.window_rows,
            method=options.method,
        )
        report = retrain_once(url, options.models, recipe)
    except (OSError, ValueError, ImportError, Problem) as error:
        return _refused(str(error), "retrain")
    print(json.dumps(report))
    return 0 if report["promoted"] else 3


def token(words: Sequence[str]) -> int:
    """`pymeta token FILE --name N --scopes read,write`: adds an entry, prints the token once."""
    parser = argparse.ArgumentParser(
        prog="pymeta token", description="Make a token; the file keeps its hash alone."
    )
    add = parser.add_argument
    add("file", type=Path, help="the service's token file; made where it is not there")
    add("--name", required=True, help="whose it is; logs show it")
    add("--scopes", default="read", help="some of read,write,admin (default: read)")
    add("--per-second", type=float, help="requests that it may make in a second")
    add("--expires", help="as in 2027-01-01T00:00:00Z")
    options = parser.parse_args(list(words))
    from pymeta.serve import need_extra

    try:
        from pymeta.serve.auth import new_token, read_tokens
    except ModuleNotFoundError as error:
        raise need_extra(error) from None
    try:
        made, entry = new_token(
            options.name, options.scopes.split(","), options.per_second, options.expires
        )
        entries = []
        if options.file.exists():
            read_tokens(options.file)
            entries = json.loads(options.file.read_bytes())["tokens"]
        _replace(options.file, json.dumps({"tokens": [*entries, entry]}, indent=1))
    except (OSError, ValueError) as error:
        return _refused(str(error), "token")
    print(made)
    return 0


def _replace(path: Path, text: str) -> None:
    """Write a file that its owner alone can read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(temporary, path)


def _refused(reason: str, command: str = "serve") -> int:
    print(f"pymeta {command}: {reason}", file=sys.stderr)
    return 1
