"""What the repository's visitors and robots read: forms, citation, pinned actions."""

import re

import pytest
import source_tree

ROOT = source_tree.need(".github", "CITATION.cff")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*\b")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_actions_are_pinned_by_hash(path):
    used = re.findall(r"uses: (.*)", path.read_text())
    assert used
    assert [line for line in used if not PINNED.match(line)] == []


def test_each_action_has_one_version():
    lines = {u for p in WORKFLOWS for u in re.findall(r"uses: (\S+ # v[\d.]+)", p.read_text())}
    names = [line.partition("@")[0] for line in lines]
    assert len(names) == len(set(names)), lines


def test_the_citation_is_of_this_version():
    import tomllib  # of Python 3.11; with 3.10 the source tree is not there

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = dict(re.findall(r"^(\w+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert cited["version"] == project["version"] and cited["license"] == project["license"]


def test_forms_ask_for_the_facts():
    yaml = pytest.importorskip("yaml")
    forms = [f for f in FORMS if f.name != "config.yml"]
    assert {f.stem for f in forms} == {"bug", "feature", "question"}
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys()
        labels = [part["attributes"]["label"] for part in form["body"]]
        assert any("pymeta info" in label for label in labels), path.name
    for name in ("dependabot.yml", "ISSUE_TEMPLATE/config.yml"):
        assert yaml.safe_load((ROOT / ".github" / name).read_text())


def test_the_papers_are_there():
    for name in ("SECURITY.md", "CODE_OF_CONDUCT.md", ".github/PULL_REQUEST_TEMPLATE.md"):
        assert len((ROOT / name).read_text()) > 300, name
