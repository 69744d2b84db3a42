"""One file of a header and all headers of the project that it includes, as a string in C++.

    python one_source.py HEADER STANDARD NAME OUT

OUT defines `const char* const NAME` in the namespace pymeta. Headers of the standard library are
included at its beginning; a compiler that has none (NVRTC) finds what stands in STANDARD there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

OWN = re.compile(r'#include "(.+)"')
STANDARD = re.compile(r"#include <(.+)>")
PIECE = 12_000  # characters of a literal: compilers have a limit


def collect(path: Path, seen: set[Path], standard: set[str]) -> list[str]:
    """The lines of a header, each header once, without comments that are lines of their own."""
    path = path.resolve()
    if path in seen:
        return []
    seen.add(path)
    lines: list[str] = []
    for line in path.read_text().splitlines():
        text = line.strip()
        if found := OWN.match(text):
            lines += collect(path.parent / found[1], seen, standard)
        elif found := STANDARD.match(text):
            standard.add(found[1])
        elif text and not text.startswith("//") and text != "#pragma once":
            lines.append(line.strip())
    return lines


def whole(header: Path, standard: Path) -> str:
    """The one file."""
    includes: set[str] = set()
    body = collect(header, set(), includes)
    head = ["#ifdef __CUDACC_RTC__", *collect(standard, set(), set()), "#else"]
    head += [*(f"#include <{each}>" for each in sorted(includes)), "#endif"]
    return "\n".join([*head, *body]) + "\n"


def main(header: str, standard: str, name: str, out: str) -> None:
    """Write OUT."""
    text = whole(Path(header), Path(standard))
    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    literals = "\n".join(f'R"PYMETA({piece})PYMETA"' for piece in pieces)
    Path(out).write_text(
        f"namespace pymeta {{\nextern const char* const {name};\n"
        f"const char* const {name} =\n{literals};\n}}  // namespace pymeta\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
