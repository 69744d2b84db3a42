"""The examples of the field's other learners, on tiny data."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import source_tree

sys.path.insert(0, str(source_tree.need("examples") / "examples"))

import omniglot_metric


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as omniglot.py documents it: 24 characters that differ in a patch of their own."""
    rng = np.random.default_rng(0)
    images = np.repeat(rng.random((24, 1, 28, 28)) < 0.3, 20, axis=1)
    images ^= rng.random(images.shape) < 0.02
    path = tmp_path_factory.mktemp("characters") / "tiny.npz"
    np.savez(path, images=255 * images.astype(np.uint8))
    return path


@pytest.mark.parametrize("learner", ["protonet", "matching", "relation"])
def test_comparisons_learn_characters(drawings, learner, tmp_path, capsys):
    options = {
        "--data": drawings, "--learner": learner, "--channels": 4, "--train-classes": 12,
        "--validation-classes": 6, "--train-ways": 6, "--queries": 2, "--iterations": 16,
        "--validation-tasks": 2, "--validate-every": 8, "--test-tasks": 6, "--lr": 0.01,
        "--json": tmp_path / "result.json",
    }  # fmt: skip
    argv = [str(part) for pair in options.items() for part in pair]
    result = omniglot_metric.main([*argv, "--test", "5x1", "6x2"])
    assert [step for step, *_ in result["curve"]] == [8, 16]
    assert result["curve"][1][1] < result["curve"][0][1]  # the loss
    if learner != "relation":  # whose normalisation has not settled after so few steps
        assert result["accuracy"]["5x1"][0] > 0.3 and result["accuracy"]["6x2"][0] > 0.27
    assert "6-way 2-shot, 6 test tasks" in capsys.readouterr().out
    assert (tmp_path / "result.json").stat().st_size > 100


def test_training_ends_with_its_time(drawings):
    options = ["--data", str(drawings), "--channels", "2", "--train-classes", "12"]
    options += ["--validation-classes", "6", "--train-ways", "5", "--validation-tasks", "2"]
    result = omniglot_metric.main(
        [*options, "--test-tasks", "2", "--test", "5x1", "--seconds", "0.2"]
    )
    assert len(result["curve"]) == 1 and result["curve"][0][0] < 20_000
