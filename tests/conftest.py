"""Every test begins with the same random numbers, one torch thread and torch's default dtype.

Where torch is not installed, the modules that import it are left out; the report's head says so.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import secrets
import sys
from functools import cache
from pathlib import Path

import background
import draws
import numpy as np
import pytest

draws.same_everywhere()
HERE = Path(__file__).parent
HAS_TORCH = importlib.util.find_spec("torch") is not None
_IMPORTS = re.compile(r"^(?:from|import) ([\w.]+)", re.MULTILINE)


@cache
def _with_torch() -> tuple[str, ...]:
    """torch, and the packages of pymeta that cannot be imported without it."""
    places = getattr(importlib.util.find_spec("pymeta"), "submodule_search_locations", [])
    files = [path for place in places for path in sorted(Path(place).glob("*/__init__.py"))]
    need = [p.parent.name for p in files if 'need("torch"' in p.read_text()]
    return "torch", *(f"pymeta.{name}" for name in [*need, "sklearn"])


@cache
def _imports_torch(path: Path) -> bool:
    """Whether a module of tests/ does at its top level, itself or by another one of tests/."""
    names = _IMPORTS.findall(path.read_text())
    if any(f"{name}.".startswith(f"{package}.") for name in names for package in _with_torch()):
        return True
    places = [folder / f"{name}.py" for name in names for folder in {HERE, path.parent}]
    return any(_imports_torch(place) for place in places if place.exists())


collect_ignore = [
    str(path.relative_to(HERE))
    for path in sorted(HERE.rglob("test_*.py"))
    if not HAS_TORCH and _imports_torch(path)
]
# whole folders as well, whose own conftest.py would import it
collect_ignore += [
    str(path.parent.relative_to(HERE))
    for path in sorted(HERE.glob("*/conftest.py"))
    if not HAS_TORCH and _imports_torch(path)
]


def pytest_configure() -> None:
    """Draw the seed of a random order before other processes begin (pytest-xdist): all need it."""
    if os.environ.get("PYMETA_TEST_ORDER") == "random":
        os.environ["PYMETA_TEST_ORDER"] = seed = str(secrets.randbits(32))
        print(f"the order is that of PYMETA_TEST_ORDER={seed}")


def pytest_report_header() -> str | None:
    """Say what is left out for lack of torch."""
    if HAS_TORCH:
        return None
    return f"no torch: {len(collect_ignore)} modules left out ({', '.join(collect_ignore)})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With PYMETA_TEST_ORDER=random, or a seed: modules in any order, and the tests in each."""
    order = os.environ.get("PYMETA_TEST_ORDER")
    if not order:
        return
    chance = random.Random(int(order))
    place = {path: chance.random() for path in sorted({item.path for item in items})}
    chance.shuffle(items)
    items.sort(key=lambda item: place[item.path])  # a module's fixtures are made once


_programs: list[background.Program] = []  # that the chosen tests ask for


def pytest_collection_finish(session: pytest.Session) -> None:
    """Find the programs that tests will ask for."""
    if not session.config.option.collectonly:
        _programs[:] = background.programs_of(session.items)


def pytest_runtest_logstart() -> None:
    """Begin those for which there is a core."""
    background.advance(_programs, background.spare())


def pytest_sessionfinish() -> None:
    """End what a failure or an interrupt left running."""
    for program in _programs:
        program.end()


@pytest.fixture
def repeats(monkeypatch):
    """Of every call that could have been a repeat, whether it was."""
    from pymeta.backend.repeat import Repeat  # needs torch, which not all tests have

    seen, original = [], Repeat.holds

    def spy(self, *arguments):
        seen.append(original(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(Repeat, "holds", spy)
    return seen


@pytest.fixture(params=["native", "torch"])
def backend(request):
    """Both backends of the learners, one after the other."""
    return request.param


@pytest.fixture(autouse=True)
def _same_start():
    random.seed(0)
    np.random.seed(0)
    if not HAS_TORCH:
        yield
        return
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def _other_rounding(request):
    """With PYMETA_TEST_ROUNDING=1: torch's roundings are those of no machine (rounding.py)."""
    wanted = HAS_TORCH and os.environ.get("PYMETA_TEST_ROUNDING", "0") == "1"
    if not wanted or "compile" in request.node.name:  # a compiler has modes of its own
        yield
        return
    from rounding import OtherRounding

    with OtherRounding():
        yield


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """What torch.compile makes of a function depends on the shapes that it saw before.

    It gives up on one after eight compilations in one process.
    """
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
