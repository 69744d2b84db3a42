"""What hypothesis draws is the same in every run, on every machine, in any order of tests.

`derandomize` alone does not see to that. A draw now and then is a constant that hypothesis found in
the project's modules, which are those that happen to be loaded by then; and a choice among what a
machine has is another one where it has more. Fresh examples are drawn by soak.py; what it finds
becomes a fixed case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

try:
    from hypothesis.internal.conjecture import providers
except ImportError:  # an older one, which looks for no constants
    providers = None


def same_everywhere() -> None:
    """Make it so for this process, and for every test that says nothing else."""
    if hasattr(providers, "_get_local_constants"):
        none = providers.Constants()
        providers._get_local_constants = lambda: none
    # no deadline: how long an example takes says something about the machine
    settings.register_profile("same", derandomize=True, database=None, deadline=None)
    settings.load_profile("same")


def one_of(values: Sequence[Any]) -> st.SearchStrategy:
    """One of some values; how many there are changes no other draw."""
    assert 0 < len(values) <= 12
    return st.integers(0, 27719).map(lambda n: values[n % len(values)])  # 27720: of 1 to 12
