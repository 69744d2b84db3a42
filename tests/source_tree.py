"""Where the source tree is, for tests that read it: they skip where tests lie without one.

`make wheel` copies tests/ elsewhere and runs it on the installed package (tests/installed.py).
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def need(*names: str) -> Path:
    """The root of the source tree; the calling module is skipped where one of `names` is missing.

    Called while a module is imported, before anything of the source tree is:

        ROOT = source_tree.need("examples")
    """
    missing = [name for name in names if not (ROOT / name).exists()]
    if missing:
        where = ", ".join(missing)
        pytest.skip(f"reads the source tree ({where}): not here", allow_module_level=True)
    return ROOT
