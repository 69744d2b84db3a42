"""The command `pymeta`: its table, its messages, and what it does not import."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pymeta import cli, info


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pymeta", *words],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )


def test_help_names_every_command():
    done = run("--help")
    assert done.returncode == 0
    for name in ("info", "bench", "inspect", "adapt", "predict", "serve", "retrain", "token"):
        assert f"\n  {name}" in done.stdout
    assert run().returncode == 2


def test_an_unknown_command_is_refused(capsys):
    assert cli.main(["inform"]) == 2
    assert "pymeta: no command 'inform'" in capsys.readouterr().err


def test_the_documented_commands_exist():
    """Every line of a console block in README.md and docs/ that calls the command."""
    root = Path(__file__).resolve().parents[2]
    pages = [p for p in [root / "README.md", *(root / "docs").rglob("*.md")] if p.exists()]
    if not pages:
        pytest.skip("reads the documentation, which is not here")
    blocks = [b for p in pages for b in re.findall(r"```console\n(.*?)```", p.read_text(), re.S)]
    called = re.findall(r"^(?:\$ )?(?:\w+=\w+ )?pymeta (\w+)", "\n".join(blocks), re.M)
    assert {"inspect", "adapt", "predict"} <= set(called) <= cli.COMMANDS.keys()


def test_the_version(capsys):
    import pymeta

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == pymeta.__version__


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_without_torch(name):
    """`--help` of each is there in a process that has no torch."""
    code = (
        "import sys; sys.modules['torch'] = None; from pymeta.cli import main; "
        f"sys.exit(main([{name!r}, '--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: pymeta {name}")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PYMETA_BACKEND", "gpu", "expected one of auto, native, torch, got 'gpu'"),
        ("PYMETA_ISA", "avx9", "got 'avx9'"),
        ("PYMETA_EXECUTOR", "columns", "got 'columns'"),
        ("PYMETA_NUM_THREADS", "many", "expected an integer, got 'many'"),
        ("PYMETA_NUM_THREADS", "0", "expected an integer >= 1, got 0"),
        ("PYMETA_KEPT_BYTES", "1.5", "expected an integer, got '1.5'"),
        ("PYMETA_CHECK_VALUES", "yes", "expected 0 or 1, got 'yes'"),
    ],
)
def test_a_wrong_environment_variable_is_one_line(variable, value, said):
    done = run("info", **{variable: value})
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"pymeta info: {variable}: ") and said in line


def test_help_is_there_whatever_the_environment_says():
    assert run("info", "--help", PYMETA_BACKEND="gpu").returncode == 0


def test_info_as_json(monkeypatch, capsys):
    monkeypatch.setattr(info, "places", lambda: ["cpu", "there"])
    monkeypatch.setattr(info, "self_test", lambda place: (place, 1e-3 if place == "there" else 0.0))
    assert cli.main(["info", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {"pymeta", "python", "torch", "isa", "threads", "environment"} <= found.keys()
    assert [test["passed"] for test in found["self_tests"]] == [True, False]
    monkeypatch.setattr(info, "places", lambda: ["cpu"])
    assert cli.main(["info", "--json"]) == 0


@pytest.mark.skipif(os.name == "nt", reason="needs a shell with pipes")
def test_a_reader_that_has_seen_enough():
    shell = f"set -o pipefail; {sys.executable} -m pymeta --help | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 141) and "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_missing_extra_is_one_line(monkeypatch, capsys):
    def needs(words):
        raise ImportError("this needs pandas: pip install 'pymeta-kernels[data]'")

    monkeypatch.setattr(info, "command", needs)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == (
        "pymeta info: this needs pandas: pip install 'pymeta-kernels[data]'\n"
    )
