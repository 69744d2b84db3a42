"""What the suite promises of itself: the same draws everywhere, other roundings, arrangements."""

import subprocess
import sys
import textwrap
from pathlib import Path

import arrangements
import background
import draws
import pytest
import torch
from background import Program
from rounding import ALIKE, ROUNDED, OtherRounding

HERE = Path(__file__).resolve().parents[1]

DRAW = """
import sys
sys.path[:0] = sys.argv[1:]
import draws
{same}
import hypothesis
from hypothesis import given, settings, strategies as st
if len(sys.argv) > 2:
    import constants

def drawn(n):
    print(n)

@settings(max_examples=200, derandomize=True, database=None)
@given(st.integers(0, 2**31))
def check(n):
    drawn(n)

check()
"""


def drawn(folder: Path, *, same: bool, more: bool) -> str:
    """What a program draws; with `more` it has loaded a module of many numbers."""
    code = DRAW.format(same="draws.same_everywhere()" if same else "")
    (folder / "program.py").write_text(textwrap.dedent(code))
    others = folder / "others"
    others.mkdir(exist_ok=True)
    (others / "constants.py").write_text(f"numbers = {list(range(12345, 12845))}\n")
    command = [sys.executable, str(folder / "program.py"), str(HERE), *[str(others)] * more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_draws_do_not_depend_on_what_is_loaded(tmp_path):
    folder = tmp_path / "program"  # no part of the path says "test", which hypothesis looks at
    folder.mkdir()
    assert drawn(folder, same=True, more=False) == drawn(folder, same=True, more=True)
    if hasattr(draws.providers, "_get_local_constants"):  # without draws.py they do
        assert drawn(folder, same=False, more=False) != drawn(folder, same=False, more=True)


def test_torch_rounds_otherwise_and_by_no_more_than_an_epsilon():
    torch.manual_seed(0)
    a, b = torch.randn(20, 20, dtype=torch.float64), torch.randn(20, 20, dtype=torch.float64)
    alone = torch.mm(a, b)
    with OtherRounding():
        first, second = torch.mm(a, b), torch.mm(a, b)
        assert torch.equal(a + b, torch.add(a, b))  # rounded alike everywhere
        assert torch.equal(torch.ones(7).sum(), torch.tensor(7.0))
        assert torch.equal(a[:, :1].mean(1), a[:, 0])  # of one number each
    assert not torch.equal(first, second)
    assert (first - alone).abs().max() <= 2 * torch.finfo(a.dtype).eps * alone.abs().max()
    with OtherRounding(ROUNDED | ALIKE):
        assert not torch.equal(a + b, a + b)


def test_gradients_and_vmap_are_rounded_otherwise_too():
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, dtype=torch.float64)

    def gradient():
        each = torch.func.vmap(lambda row: torch.tanh(row @ w).sum())(x)
        return torch.autograd.grad(each.sum(), x)[0]

    alone = gradient()
    with OtherRounding():
        assert not torch.equal(gradient(), gradient())
        assert torch.allclose(gradient(), alone, rtol=1e-12)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("1 failed, 20 passed, 3 skipped, 1 xfailed in 12.34s", [20, 1, 0, 3, 1]),
        ("== 2 passed, 2 warnings, 2 errors in 612.00s (0:10:12) ==", [2, 0, 2, 0, 0]),
        ("INTERNALERROR", [0, 0, 0, 0, 0]),
    ],
)
def test_counts_are_read_from_pytests_last_line(line, wanted):
    found = arrangements.counts_of(f"a test in 3 seconds\n{line}\n")
    assert [found.get(name, 0) for name in arrangements.COUNTS] == wanted


def test_an_arrangement_runs_and_its_failure_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arrangements, "LOGS", tmp_path / "logs")
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_it(): assert os.environ['PYMETA_NUM_THREADS'] == '1'\n"
    )
    program = ["--", str(tmp_path / "test_it.py"), "--rootdir", str(tmp_path)]
    assert arrangements.main(["one thread", *program]) == 0
    assert "| one thread      |       1 |       0 |" in capsys.readouterr().out
    assert arrangements.main(["two threads", *program]) == 1
    assert "not green: two threads" in capsys.readouterr().out
    assert "1 failed" in (tmp_path / "logs" / "two_threads.txt").read_text()
    monkeypatch.setattr(arrangements, "lacking", lambda need: "it has none")
    assert arrangements.main(["one core", *program]) == 0
    assert "not on this machine: it has none" in capsys.readouterr().out


# ---- programs beside the tests ------------------------------------------------------------------


def test_a_program_runs_once_and_says_what_it_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import os, pathlib, sys; print(os.environ['WHO'], os.getcwd()); sys.stderr.write('e')"
    code += "; pathlib.Path(sys.argv[1], 'made').touch(exist_ok=False); sys.exit(3)"
    program = Program(sys.executable, "-c", code, "{folder}", cwd=tmp_path, WHO="it")
    program.start(nice=True)
    for _ in range(2):
        done = program.result()
        assert (done.returncode, done.stderr) == (3, "e")
        assert done.stdout.split() == ["it", str(tmp_path)]
    place = program.folder
    assert (place / "made").exists()
    program.end()
    assert not place.exists()
    assert program.result().returncode == 3  # begun anew, in another folder
    program.end()


def test_the_end_kills_what_still_runs():
    program = Program(sys.executable, "-c", "import time; time.sleep(600)", cwd=HERE)
    program.start()
    process = program._process
    assert process.poll() is None
    program.end()
    assert process.returncode == -9


def test_programs_of_the_chosen_tests_are_each_there_once():
    one, two = Program("one", cwd=HERE), Program("two", cwd=HERE)

    class Item:
        def __init__(self, *programs):
            self.programs = programs

        def iter_markers(self, name):
            assert name == "background"
            return [pytest.mark.background(*self.programs).mark] if self.programs else []

    assert background.programs_of([Item(two), Item(), Item(one, two)]) == [two, one]


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_as_many_run_as_there_are_cores_to_spare(spare):
    code = "import time; time.sleep(600)"
    programs = [Program(sys.executable, "-c", code, cwd=HERE) for _ in range(3)]
    try:
        for _ in range(2):
            background.advance(programs, spare)
            assert [program.runs for program in programs] == [i < spare for i in range(3)]
        if spare:
            programs[0]._process.kill()
            programs[0].result()  # it has come to its end
            background.advance(programs, spare)
            assert [program.begun for program in programs] == [i <= spare for i in range(3)]
    finally:
        for program in programs:
            program.end()


def test_no_core_is_to_spare_where_each_has_tests_of_its_own(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert background.spare() >= 0
    monkeypatch.setattr(background.os, "sched_getaffinity", lambda _: {0, 2, 3}, raising=False)
    assert background.spare() == 2
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert background.spare() == 0


# ---- without torch ------------------------------------------------------------------------------

COLLECT = f"""
import sys
for name in ("torch", "sklearn", "scipy", "pandas", "polars", "matplotlib"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", {str(HERE)!r}]))
"""
COLLECTED = Program(sys.executable, "-c", COLLECT, cwd=HERE.parent)


@pytest.mark.background(COLLECTED)
def test_where_there_is_no_torch_the_other_modules_are_collected():
    """They are what a wheel is tested by in an environment that has none."""
    done = COLLECTED.result()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "tests/models/test_without_torch.py::" in done.stdout
    assert "tests/finance/test_finance_prices.py::" not in done.stdout
