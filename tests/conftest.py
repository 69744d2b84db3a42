"""Every test begins with the same random numbers, one torch thread and torch's default dtype.

Where torch is not installed, the modules that import it are left out; the report's head says so.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

HAS_TORCH = importlib.util.find_spec("torch") is not None
# helpers and kernels import torch
_IMPORTS_TORCH = re.compile(
    r"^(from|import) (torch|helpers|kernels|pymeta\.sklearn)\b", re.MULTILINE
)

collect_ignore = [
    path.name
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
    if not HAS_TORCH and _IMPORTS_TORCH.search(path.read_text())
]


def pytest_report_header() -> str | None:
    """Say what is left out for lack of torch."""
    if HAS_TORCH:
        return None
    return f"no torch: {len(collect_ignore)} modules left out ({', '.join(collect_ignore)})"


@pytest.fixture(autouse=True)
def _same_start():
    if not HAS_TORCH:
        yield
        return
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
