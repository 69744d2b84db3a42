"""The long description of the distribution: README.md with links that work on a registry's page.

pyproject.toml names this module and, once there is one, the repository's public address. Links
and pictures that are relative in README.md then lead there; without an address they stay as they
are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?![a-z]+:|#|/)([^)\s]+)(?=\))")


def absolute(text: str, repository: str, version: str) -> str:
    """A page whose relative links lead to a repository, at the tag of a version.

    Args:
        text: Markdown.
        repository: its address, as in https://github.com/OWNER/NAME; "" leaves the text alone.
        version: of the project.
    """
    if not repository:
        return text
    place = repository.rstrip("/")

    def link(found: re.Match[str]) -> str:
        kind = "raw" if found[1] else "blob"
        return f"{found[1]}{found[2]}{place}/{kind}/v{version}/{found[3]}"

    return _LINK.sub(link, text)


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, Any]:
    """What scikit-build-core asks a provider of metadata for."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = absolute(text, settings["repository"], project["version"])
    return {"readme": {"content-type": "text/markdown", "text": text}}
