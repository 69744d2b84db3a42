"""tests/soak.py: it runs, it draws other examples each time, and it can fail."""

import pytest
import soak
from kernels import using


@pytest.fixture(autouse=True)
def _same_threads():
    with using():
        yield


@pytest.mark.parametrize("name", soak.ROUNDS)
def test_a_round_of_each_kind(name, monkeypatch):
    check, strategies, _ = soak.ROUNDS[name]
    monkeypatch.setattr(soak, "ROUNDS", {name: (check, strategies, 1)})
    found = soak.Soak(1)
    found.round(name, seed=3)
    assert found.examples[name] >= 1 and not found.failed


def test_a_failure_is_told_with_its_seed(monkeypatch, capsys):
    def planted(case):
        assert case.steps > 100, "planted"

    rounds = {"cases": (planted, soak.ROUNDS["cases"][1], 3)}
    monkeypatch.setattr(soak, "ROUNDS", rounds)
    assert soak.main(["--only", "cases", "--seed", "12"]) == 1
    assert "FAILED: python tests/soak.py --only 'cases' --seed 12" in capsys.readouterr().out


def test_seeds_decide_what_is_drawn(monkeypatch):
    drawn = []
    rounds = {"cases": (drawn.append, soak.ROUNDS["cases"][1], 3)}
    monkeypatch.setattr(soak, "ROUNDS", rounds)
    for seed in (1, 1, 2):
        soak.Soak(1).round("cases", seed)
    assert drawn[:3] == drawn[3:6] != drawn[6:]
