"""Move the fragments in changelog.d/ into CHANGELOG.md: `make changelog`.

A fragment is a file `+SLUG.KIND.md`, as towncrier names those that belong to no issue; the kinds
stand in pyproject.toml ([tool.towncrier], which `towncrier create` and `towncrier check` read).
The folding is done here because towncrier only writes new sections, and ours collects entries in
the unreleased one until the day of the release.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"added": "Added", "changed": "Changed", "fixed": "Fixed"}  # in their order
NAME = re.compile(rf"\+[a-z0-9]+(-[a-z0-9]+)*\.({'|'.join(KINDS)})\.md")
OTHERS = {"README.md", "fold.py", "__pycache__"}
LONGEST = 3  # lines of a fragment
UNRELEASED = re.compile(r"^## .*\(unreleased\)$", flags=re.MULTILINE)


def problems(folder: Path) -> list[str]:
    """What is wrong with a folder's fragments, a line each."""
    found = []
    for path in sorted(p for p in folder.iterdir() if p.name not in OTHERS):
        if not NAME.fullmatch(path.name):
            kinds = ", ".join(KINDS)
            found.append(f"{path.name}: not +SLUG.KIND.md with a kind of {kinds}")
            continue
        text = path.read_text()
        lines = text.strip().splitlines()
        if not lines:
            found.append(f"{path.name}: empty")
        elif len(lines) > LONGEST or "" in lines:
            found.append(f"{path.name}: more than {LONGEST} lines, or a blank one")
        elif re.match(r"[-*#]\s", text):
            found.append(f"{path.name}: begins with a bullet or a heading")
    return found


def entries(folder: Path) -> dict[str, list[str]]:
    """The fragments as list items, by their kind, in the order of their names."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for path in sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name)):
        text = "\n  ".join(line.strip() for line in path.read_text().strip().splitlines())
        found[path.name.split(".")[-2]].append(f"- {text}")
    return found


def folded(changelog: str, found: dict[str, list[str]]) -> str:
    """A changelog whose unreleased version has the entries at the end of each kind's list.

    Raises:
        ValueError: it has no version marked "(unreleased)".
    """
    start = UNRELEASED.search(changelog)
    if start is None:
        raise ValueError("CHANGELOG.md: no heading of a version ends with (unreleased)")
    after = re.compile(r"^## ", flags=re.MULTILINE).search(changelog, start.end())
    end = after.start() if after else len(changelog)
    section = changelog[start.end() : end]
    intro, *parts = re.split(r"^### (\w+)\n", section, flags=re.MULTILINE)
    lists = {title: text.strip() for title, text in zip(parts[::2], parts[1::2], strict=True)}
    for kind, title in KINDS.items():
        if found[kind]:
            lists[title] = "\n".join(filter(None, [lists.get(title, ""), *found[kind]]))
    order = [*KINDS.values(), *(t for t in lists if t not in KINDS.values())]
    body = "\n\n".join(f"### {title}\n{lists[title]}" for title in order if title in lists)
    head = "\n\n".join(filter(None, [changelog[: start.end()] + intro.rstrip(), body]))
    tail = changelog[end:]
    return f"{head}\n\n{tail}" if tail else f"{head}\n"


def main() -> int:
    """Fold and delete the fragments; 1 where one of them is malformed."""
    folder, changelog = ROOT / "changelog.d", ROOT / "CHANGELOG.md"
    wrong = problems(folder)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    found = entries(folder)
    changelog.write_text(folded(changelog.read_text(), found))
    for path in folder.glob("+*.md"):
        path.unlink()
    count = sum(map(len, found.values()))
    print(f"CHANGELOG.md: {count} {'entry' if count == 1 else 'entries'} added")
    return 0


if __name__ == "__main__":
    sys.exit(main())
