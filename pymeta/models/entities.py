"""Whose each model of a file is: a small JSON file beside it, which `pymeta predict` reads.

It holds a name for each model ("entities"), and where they are known the column that names were
taken from ("entity"), the columns of the features ("features") or the preprocessor's path
("preprocessor"), and the columns that are no features ("unused").
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pymeta.spec.show import counted

_NONE: dict[str, Any] = {"entity": None, "features": None, "preprocessor": None, "unused": []}


def entities_path(models: str | os.PathLike[str]) -> Path:
    """Where the names of a models' file are."""
    return Path(models).with_suffix(".entities.json")


def checked(entities: Iterable[Any], count: int) -> list[str]:
    """The names as text: one for each model, no two the same.

    Raises:
        TypeError: a text in place of a list.
        ValueError: too few, too many, or the same one twice.
    """
    if isinstance(entities, (str, bytes)) or not isinstance(entities, Iterable):
        raise TypeError(f"entities: expected a name for each model, got {entities!r}")
    names = [str(name) for name in entities]
    if len(names) != count:
        raise ValueError(f"entities: expected {counted(count, 'name')}, got {len(names)}")
    name, times = max(Counter(names).items(), key=lambda pair: pair[1], default=("", 0))
    if times > 1:
        raise ValueError(f"entities: {name!r} is there {times} times")
    return names


def write_entities(models: str | os.PathLike[str], names: list[str], **made: Any) -> None:
    """Write the names beside a models' file, and what else is known of how they were made."""
    text = json.dumps({**_NONE, "entities": names, **made}, indent=1)
    entities_path(models).write_text(text + "\n")


def read_entities(models: str | os.PathLike[str], count: int) -> dict[str, Any]:
    """What is written beside a models' file.

    Raises:
        ValueError: there is no such file, or it belongs to other models.
    """
    path = entities_path(models)
    if not path.exists():
        raise ValueError(
            f"{path}: no such file, which says whose each model in {models} is; pymeta adapt "
            "writes one, and so does models.save(path, entities=names)"
        )
    made = json.loads(path.read_text())
    keys = _NONE.keys() | {"entities"}
    if not isinstance(made, dict) or made.keys() != keys or len(made["entities"]) != count:
        raise ValueError(f"{path}: not the names of the {counted(count, 'model')} in {models}")
    return made
