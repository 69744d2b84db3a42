"""The README's Python runs as it stands, one block after the other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pymeta

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
DEPLOYED = "# ---- in the deployed process"


@pytest.fixture(scope="module")
def namespaces(tmp_path_factory) -> list[dict]:
    """The names after each block; all blocks share them, in order, and a folder to write to."""
    names: dict = {}
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        names["folder"] = Path.cwd()
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), names)
            found.append(dict(names))
    return found


def after(namespaces: list[dict], text: str) -> dict:
    (index,) = [i for i, block in enumerate(BLOCKS) if text in block]
    return namespaces[index]


def test_maml(namespaces):
    names = after(namespaces, "out = maml(")
    assert names["models"](names["xq"]).shape == (25, 10, 1)
    assert isinstance(names["models"][3], torch.nn.Sequential)
    assert all(p.grad is not None for p in names["net"].parameters())


def test_reptile(namespaces):
    names = after(namespaces, "pymeta.Reptile(")
    assert isinstance(names["out"], pymeta.ReptileOutcome) and names["out"].loss.isfinite()


def test_fine_tuning(namespaces):
    names = after(namespaces, "pymeta.FineTune(")
    probabilities = names["models"].predict_proba(names["x"])
    assert [p.shape for p in probabilities] == [(n, 1) for n in names["rows"]]
    assert names["models"].status.tolist() == [0, 0, 0, 0]


def test_deployment_with_torch(namespaces):
    names = after(namespaces, "pymeta.Adapted.load(")
    got, wanted = names["models"](names["x"]), names["finetune"](names["x"], names["y"])(names["x"])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_deployment_without_torch(namespaces):
    """The second half of the block alone, in a process of its own."""
    names = after(namespaces, DEPLOYED)
    (block,) = [b for b in BLOCKS if DEPLOYED in b]
    code = f"import pymeta\n{block.split(DEPLOYED)[1].split(chr(10), 1)[1]}"
    code += "import sys; assert 'torch' not in sys.modules; print(score.item())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=names["folder"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == names["score"].item()


def test_scikit_learn(namespaces):
    names = after(namespaces, "from sklearn.pipeline")
    pipe, X, y, region = (names[n] for n in ("pipe", "X", "y", "region"))
    start = (pipe.predict(X) == y).mean()
    assert (pipe.predict(X, groups=region) == y).mean() > 0.9 > 0.7 > start


def test_the_blocks_are_all_tested():
    assert len(BLOCKS) == 6
