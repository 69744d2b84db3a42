"""Fuzz one target, guided by coverage: python tests/fuzz/run.py file|binding [SECONDS] [ARG...]

Needs atheris (pip install atheris). Further arguments go to libFuzzer. Inputs that were new go to
`build/fuzz/TARGET` (in PYMETA_FUZZ_FOUND, where that is set); an input that broke something is
written to `build/fuzz/TARGET-crash-...`.
Once what it broke is repaired, it belongs into `tests/fuzz/corpus/TARGET`, which the ordinary
tests replay (test_corpus.py).

The Python code is instrumented when it is imported. The native code tells its coverage too if it
was built for that, by clang with PYMETA_SANITIZE=fuzzer, and libFuzzer with AddressSanitizer is
preloaded; `make fuzz` does both.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import atheris

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

ODD = (None, True, False, 0, 1, 2, -1, 2**24, 2**30, 2**31, 2**63, 10**400, 0.5, -0.0, 1e300, "",
       "relu", "linear", "layer_norm", "mse", "adam", "sgd", "rmsprop", "parameter", "0.weight",
       ".lr", ".status", "\ud800", "F16", "I8", [], {}, [[]], [0, 0])  # fmt: skip


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside some JSON."""
    found = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in pairs:
        found.append((value, key))
        if isinstance(part, (dict, list)):
            found += nodes(part)
    return found


def mutated_json(value: Any, chance: random.Random) -> None:
    """Change one or a few places: by an odd value, another place's, nothing, or one more."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = nodes(value)
        if not places:
            return
        container, key = chance.choice(places)
        kind = chance.randrange(6)
        if kind < 2:
            container[key] = chance.choice(ODD)
        elif kind == 2:
            other, its = chance.choice(places)
            container[key] = json.loads(json.dumps(other[its]))
        elif kind == 3:
            del container[key]
        elif kind == 4 and isinstance(container, list):
            container.insert(chance.randrange(len(container) + 1), container[key])
        elif isinstance(container[key], (int, float)) and not isinstance(container[key], bool):
            container[key] += chance.choice((-1, 1, 8, 1000))
        elif isinstance(container, dict):
            container[chance.choice(("more", ".lr", ".status", "0.bias"))] = container.pop(key)


def mutate_file(data: bytes, most: int, seed: int) -> bytes:
    """Half of the time the JSON as JSON, where it is some; else any bytes."""
    chance = random.Random(seed)
    line, newline, tensors = data[1:].partition(b"\n")
    if data[:1] and data[0] % 2 and chance.randrange(2):
        try:
            header = json.loads(line)
            mutated_json(header, chance)
            changed = data[:1] + json.dumps(header).encode() + newline + tensors
        except (ValueError, RecursionError, TypeError, OverflowError):
            changed = b""
        if 0 < len(changed) <= most:
            return changed
    return atheris.Mutate(data, most)


def main() -> None:
    name, *rest = sys.argv[1:]
    seconds = rest[0] if rest else "600"
    with atheris.instrument_imports(include=["pymeta", f"target_{name}", "source"]):
        sys.path[:0] = [str(ROOT), str(HERE)]
        target = __import__(f"target_{name}")
    found = Path(os.environ.get("PYMETA_FUZZ_FOUND", ROOT / "build" / "fuzz")) / name
    found.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"custom_mutator": mutate_file} if name == "file" else {}
    arguments = [
        sys.argv[0], str(found), str(HERE / "corpus" / name), f"-max_total_time={seconds}",
        f"-artifact_prefix={found}-", "-max_len=8192" if name == "file" else "-max_len=600",
        "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1", *rest[1:],
    ]  # fmt: skip
    atheris.Setup(arguments, target.one_input, **options)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("PYMETA_NUM_THREADS", "2")
    os.fsync = lambda descriptor: None  # nobody needs these files after a crash
    main()
