"""README.md as a registry shows it: its links lead to the repository, once that has an address."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import source_tree

ROOT = source_tree.need("README.md", "cmake", "pyproject.toml")
PROVIDER = runpy.run_path(str(ROOT / "cmake" / "readme.py"))
TEXT = (ROOT / "README.md").read_text()
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def test_every_link_is_absolute_where_there_is_an_address():
    made = PROVIDER["absolute"](TEXT, "https://example.org/o/pymeta/", "1.2.3")
    before, after = LINK.findall(TEXT), LINK.findall(made)
    assert len(before) == len(after) > 30
    assert not [link for link in after if not link.startswith(("https://", "#"))]
    relative = [link for link in before if not link.startswith(("https://", "#"))]
    assert len(relative) > 20
    for link in relative:
        assert (ROOT / link.partition("#")[0]).exists()
        assert re.search(rf"https://example.org/o/pymeta/(raw|blob)/v1.2.3/{re.escape(link)}", made)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", made)
    assert pictures and all("/raw/v1.2.3/docs/" in link for link in pictures)


def test_without_an_address_it_stays_as_it_is():
    assert PROVIDER["absolute"](TEXT, "", "1.2.3") == TEXT


@pytest.mark.parametrize("link", ["https://a.b/c", "#part", "mailto:a@b.c"])
def test_other_links_stay_as_they_are(link):
    assert PROVIDER["absolute"](f"[a]({link})", "https://example.org", "1") == f"[a]({link})"


def test_it_is_what_a_build_takes(monkeypatch):
    pytest.importorskip("scikit_build_core")
    if sys.version_info < (3, 11):
        pytest.skip("reads TOML with the standard library")
    import tomllib
    from scikit_build_core.builder._load_provider import load_entry_provider

    monkeypatch.chdir(ROOT)
    told = tomllib.loads(Path("pyproject.toml").read_text())
    (entry,) = told["tool"]["dynamic-metadata"]
    assert told["project"]["dynamic"] == ["readme"]
    assert entry["repository"] == "" or entry["repository"].startswith("https://")
    provider = load_entry_provider(entry["provider"])
    found = provider.dynamic_metadata(entry, told["project"])["readme"]
    assert found["content-type"] == "text/markdown" and found["text"].startswith("# pymeta\n")
