"""deploy/: its command lines are ones that `pymeta serve` takes; the demonstration runs."""

import ast
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import source_tree

from pymeta.serve import command

DEPLOY = source_tree.need("deploy/demo.sh") / "deploy"


def parsed(words):
    return command._serve_parser().parse_args(words)


def test_the_unit_starts_what_there_is():
    (line,) = re.findall(r"^ExecStart=(.*)$", (DEPLOY / "pymeta.service").read_text(), re.MULTILINE)
    program, name, *words = line.split()
    assert program.endswith("/pymeta") and name == "serve"
    assert parsed(words).host == "127.0.0.1"


def test_the_image_starts_what_there_is():
    text = (DEPLOY / "Dockerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
    (words,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    assert ast.literal_eval(entry)[-1] == "serve"
    options = parsed(ast.literal_eval(words))
    assert options.token_file is not None  # it listens beyond loopback


def test_an_image_is_sent_what_it_is_built_from_and_no_more():
    root = DEPLOY.parent
    lines = (root / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    listed = re.search(
        r"^sdist.include = \[(.*?)\]", (root / "pyproject.toml").read_text(), re.M | re.S
    )
    of_source = set(re.findall(r'"/([^"]+)"', listed[1]))
    assert rules[0] == "*" and of_source - sent == {"CHANGELOG.md", "tests"}
    assert sent - of_source == {"dist"}  # of wheels that are there already


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_demonstration(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("fastapi")
    scripts = Path(sysconfig.get_path("scripts"))
    if not (scripts / "pymeta").exists():
        pytest.skip("the command is not installed beside this Python")
    done = subprocess.run(
        ["sh", DEPLOY / "demo.sh", scripts],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("$ curl") == 5
    right = int(re.search(r"trained: (\d+) %", done.stdout)[1])
    assert right > 75  # a start that knows nothing tells one half
    for part in ('"probabilities"', '"appended":4', '"code":"R2-"', '"serving":"v0001-'):
        assert part in done.stdout
