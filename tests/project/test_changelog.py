"""changelog.d/: each fragment is well formed, and folding loses nothing."""

import runpy
import shutil

import pytest
import source_tree

ROOT = source_tree.need("changelog.d", "CHANGELOG.md")
FOLD = runpy.run_path(str(ROOT / "changelog.d" / "fold.py"))
CHANGELOG = (
    "# Changelog\n\n## 0.2.0 (unreleased)\n\n### Added\n- a\n- b\n  more of b\n\n### Fixed\n- c\n\n"
    "## 0.1.0\n\n### Added\n- old\n"
)


def test_every_fragment_is_well_formed():
    assert FOLD["problems"](ROOT / "changelog.d") == []


def test_towncrier_has_the_same_kinds():
    import tomllib  # of Python 3.11; with 3.10 the source tree is not there

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["towncrier"]
    assert {t["directory"]: t["name"] for t in settings["type"]} == FOLD["KINDS"]
    assert settings["directory"] == "changelog.d"


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("new.added.md", "A thing.\n", "not +SLUG.KIND.md"),
        ("+new.feature.md", "A thing.\n", "not +SLUG.KIND.md"),
        ("+New.added.md", "A thing.\n", "not +SLUG.KIND.md"),
        ("+new.added.md", "\n", "empty"),
        ("+new.added.md", "- A thing.\n", "bullet"),
        ("+new.added.md", "a\nb\nc\nd\n", "more than 3 lines"),
        ("+new.added.md", "a\n\nb\n", "blank"),
    ],
)
def test_a_malformed_fragment_is_named(tmp_path, name, text, wrong):
    (tmp_path / "README.md").write_text("no fragment")
    (tmp_path / "+good-one.fixed.md").write_text("A defect.\n")
    (tmp_path / name).write_text(text)
    (said,) = FOLD["problems"](tmp_path)
    assert said.startswith(name) and wrong in said


def test_folding_appends_to_the_unreleased_version(tmp_path):
    (tmp_path / "+two-lines.added.md").write_text("First line\nand the second.\n")
    (tmp_path / "+a-change.changed.md").write_text("Changed.\n")
    (tmp_path / "+a-defect.fixed.md").write_text("Fixed.\n")
    assert FOLD["folded"](CHANGELOG, FOLD["entries"](tmp_path)) == (
        "# Changelog\n\n## 0.2.0 (unreleased)\n\n"
        "### Added\n- a\n- b\n  more of b\n- First line\n  and the second.\n\n"
        "### Changed\n- Changed.\n\n### Fixed\n- c\n- Fixed.\n\n"
        "## 0.1.0\n\n### Added\n- old\n"
    )


def test_folding_nothing_changes_nothing():
    nothing = {kind: [] for kind in FOLD["KINDS"]}
    assert FOLD["folded"](CHANGELOG, nothing) == CHANGELOG
    ours = (ROOT / "CHANGELOG.md").read_text()
    if FOLD["UNRELEASED"].search(ours):
        assert FOLD["folded"](ours, nothing) == ours
    with pytest.raises(ValueError, match="unreleased"):
        FOLD["folded"]("# Changelog\n\n## 0.1.0\n", nothing)


def test_the_command_folds_and_deletes(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "changelog.d"
    folder.mkdir()
    shutil.copy(ROOT / "changelog.d" / "fold.py", folder)
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (folder / "+new.added.md").write_text("New.\n")
    main = runpy.run_path(str(folder / "fold.py"))["main"]
    assert main() == 0 and capsys.readouterr().out == "CHANGELOG.md: 1 entry added\n"
    assert "- New.\n" in (tmp_path / "CHANGELOG.md").read_text()
    assert not list(folder.glob("+*"))
    (folder / "+bad.md").write_text("Bad.\n")
    assert main() == 1 and "+bad.md" in capsys.readouterr().err
