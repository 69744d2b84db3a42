"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_block(block: str) -> None:
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["models"](names["xq"]).shape == (25, 10, 1)
    assert isinstance(names["models"][3], torch.nn.Sequential)
    assert all(p.grad is not None for p in names["net"].parameters())


def test_there_is_a_block() -> None:
    assert len(BLOCKS) == 1
