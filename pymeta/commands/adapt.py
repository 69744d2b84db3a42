"""`pymeta adapt` and `pymeta predict`: from a table to adapted models, and from those to results.

    pymeta adapt adapter.safetensors past.csv --entity shop --target sales --out models.safetensors
    pymeta predict models.safetensors new.csv --entity shop --out predictions.csv

The models' file is what a learner's models' `save(path, entities=names)` writes, too. Beside it,
`models.entities.json` says which entity each model is of, and from which columns.
"""

from __future__ import annotations

import csv
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from pymeta.commands import rows
from pymeta.models import file
from pymeta.models.adapter import Adapter
from pymeta.models.arrays import AdaptedArrays
from pymeta.models.entities import read_entities, write_entities
from pymeta.spec.show import counted
from pymeta.tasks.ragged import in_tasks

_ERRORS = (OSError, TypeError, ValueError)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _parser(name: str, description: str, first: str, what: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"pymeta {name}", description=description)
    parser.add_argument(first, help=what)
    parser.add_argument("rows", help="a table: .csv, .csv.gz, .parquet or .feather")
    add = parser.add_argument
    add("--entity", metavar="COLUMN", help="whose a row is; without it all rows are of one task")
    add("--features", metavar="A,B,...", type=_names, help="the model's inputs in their order; "
        "default: all columns that are nothing else")  # fmt: skip
    add("--preprocessor", metavar="FILE", help="what makes the inputs, in place of --features")
    return parser


def _refused(command: str, error: Exception) -> int:
    print(f"pymeta {command}: {error}", file=sys.stderr)
    return 1


# ---- adapt --------------------------------------------------------------------------------------


def adapt(words: Sequence[str]) -> int:
    """`pymeta adapt ADAPTER ROWS --target COLUMN --out FILE`: a model for each entity."""
    parser = _parser(
        "adapt",
        "Adapt a start to each entity's rows, in one native call.",
        "adapter",
        "what learner.adapter().save(...) wrote",
    )
    add = parser.add_argument
    add("--target", metavar="A,B,...", type=_names, required=True, help="what is predicted")
    add("--weight", metavar="COLUMN", help="weights of the rows")
    add("--steps", type=int, help="in place of the adapter's")
    add("--out", metavar="FILE", required=True, help="the models: a .safetensors file")
    options = parser.parse_args(list(words))
    try:
        print(_adapt(options))
    except _ERRORS as error:
        return _refused("adapt", error)
    return 0


def _adapt(options: Namespace) -> str:
    if Path(options.out).suffix != ".safetensors":
        raise ValueError(f"--out: expected a file that ends in .safetensors, got {options.out!r}")
    if options.steps is not None and options.steps < 0:
        raise ValueError(f"--steps: expected at least 0, got {options.steps}")
    adapter = Adapter.load(options.adapter)
    table = rows.read(options.rows)
    groups = rows.grouped(table, options.entity)
    used = {*options.target, options.entity, options.weight}
    y = rows.targets(table, options.target, adapter.loss, adapter.dtype)
    weights = None
    if options.weight is not None:
        weights = rows.numbers(table, [options.weight], "--weight", adapter.dtype)[:, 0]
    x = rows.features(table, options, used, adapter.dtype, adapter.in_features)

    def tasks(values: Any) -> Any:
        return None if values is None else in_tasks(values[groups.order], groups.sizes)

    began = time.perf_counter()
    x = x.reshape(-1, *(adapter.architecture.row_shape or x.shape[1:]))
    models = adapter.adapt(tasks(x), tasks(y), weights=tasks(weights), steps=options.steps)
    took = time.perf_counter() - began
    models.save(options.out)
    write_entities(
        options.out,
        groups.names,
        entity=options.entity,
        features=options.features,
        preprocessor=options.preprocessor,
        unused=sorted(n for n in used if n),
    )
    wrong = int((models.status == 1).sum())
    return (
        f"{options.out}: {counted(len(models), 'model', form=',')} adapted to "
        f"{counted(len(x), 'row', form=',')} in "
        f"{1e3 * took:.3g} ms; {wrong} diverged"
    )


# ---- predict ------------------------------------------------------------------------------------


def predict(words: Sequence[str]) -> int:
    """`pymeta predict MODELS ROWS`: a line for each row, in the table's order."""
    parser = _parser(
        "predict",
        "Predict each row by its entity's model; or, given an adapter, by its start.",
        "models",
        "what pymeta adapt wrote, or an adapter",
    )
    add = parser.add_argument
    add("--start", metavar="ADAPTER", help="predicts for entities without a model; by default "
        "they are an error")  # fmt: skip
    add("--out", metavar="FILE", help="a .csv file; default: standard output")
    options = parser.parse_args(list(words))
    try:
        _write(options.out, *_predict(options))
    except _ERRORS as error:
        return _refused("predict", error)
    return 0


def _predict(options: Namespace) -> tuple[list[str], Any]:
    """The names of the columns, and the rows."""
    table = rows.read(options.rows)
    used: set[str] = set()
    names: list[str] = []
    if file.kind_of(options.models) == "adapter":
        models = _start(options.models)
        used |= {options.entity} if options.entity else set()
    else:
        models = AdaptedArrays.load(options.models, verify=True)
        made = read_entities(options.models, len(models))
        names, used = made["entities"], set(made["unused"])
        options.entity = options.entity or made["entity"]
        if options.entity is None and len(names) > 1:
            raise ValueError(
                f"--entity: expected the column that says which of the {len(names)} models in "
                f"{options.models} is a row's"
            )
        used |= {options.entity} if options.entity else set()
        if options.features is None and options.preprocessor is None:
            options.features, options.preprocessor = made["features"], made["preprocessor"]
        if options.start is not None:
            models = AdaptedArrays.concatenate([models, _start(options.start)])
    groups = rows.grouped(table, options.entity)
    which = _which(groups.names, names, options.start is not None)
    width = models.architecture.in_features
    x = rows.features(table, options, used, models.dtype, width)
    x = x.reshape(-1, *(models.architecture.row_shape or x.shape[1:]))
    chosen = models[which]
    xq = in_tasks(x[groups.order], groups.sizes)
    classifies = models.loss.kind in ("cross_entropy", "bce_with_logits")
    out = chosen.predict_proba(xq) if classifies else chosen(xq)
    out = np.concatenate(list(out))
    values = np.empty_like(out)
    values[groups.order] = out
    entities = np.empty(len(values), object)
    entities[groups.order] = np.repeat(np.array(groups.names, object), groups.sizes)
    return _columns(models, options.entity, entities, values)


def _start(path: str) -> AdaptedArrays:
    """The start of an adapter as one model."""
    adapter = Adapter.load(path)
    return AdaptedArrays(adapter.architecture, adapter.loss, {}, adapter.parameters, 1)


def _which(wanted: list[str], names: list[str], has_start: bool) -> list[int]:
    """The model of each entity; the last one where it has none."""
    if not names:  # one start for all
        return [0] * len(wanted)
    place = {name: i for i, name in enumerate(names)}
    unknown = [name for name in wanted if name not in place]
    if unknown and not has_start:
        raise ValueError(
            f"--entity: {len(unknown)} of {len(wanted)} have no model ({', '.join(unknown[:5])}"
            f"{', ...' if len(unknown) > 5 else ''}); --start ADAPTER predicts for them"
        )
    return [place.get(name, len(names)) for name in wanted]


def _columns(
    models: AdaptedArrays, entity: str | None, entities: Any, values: Any
) -> tuple[list[str], Any]:
    """Headings and rows: the entity, the class where there are classes, the outputs."""
    kind, width = models.loss.kind, values.shape[1]
    classifies = kind in ("cross_entropy", "bce_with_logits")
    name = "probability" if classifies else "prediction"
    titles = [name] if width == 1 else [f"{name}_{i}" for i in range(width)]
    lines: list[list[Any]] = [[str(v) for v in row] for row in values]
    if kind == "cross_entropy":
        titles = ["class", *titles]
        lines = [[best, *row] for best, row in zip(values.argmax(1), lines, strict=True)]
    if entity is None:
        return titles, lines
    return [entity, *titles], [[e, *row] for e, row in zip(entities, lines, strict=True)]


def _write(path: str | None, titles: list[str], lines: Any) -> None:
    if path is not None and Path(path).suffix != ".csv":
        raise ValueError(f"--out: expected a file that ends in .csv, got {path!r}")
    with nullcontext(sys.stdout) if path is None else open(path, "w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([titles, *lines])
