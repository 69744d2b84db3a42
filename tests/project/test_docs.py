"""README.md and docs/: the Python runs as it stands, links lead somewhere, the site builds.

The Python blocks of a page run one after the other in one namespace, in a folder of the page's
own. What is written around a block says how it is tested:

    ```python title="score.py"     a program: written to that file, run in a process of its own
    ```text  right after a block   what the block prints, words and numbers
    <!-- to 40 % -->               above such a text: figures of a training, which another processor
                                   rounds another way, and each step after it makes more of that
    <!-- not run: REASON -->       above a block that is only compiled; NOT_RUN repeats the reason
    <!-- needs: MODULE -->         above a block that is only compiled where the module is missing;
                                   with PYMETA_TEST_INTEGRATIONS=1 none may be

Blocks in other languages (console, diff, cpp, ...) are not run; those of diff are held against the
source, line by line.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import source_tree
from background import Program

import pymeta
import pymeta.data
import pymeta.explain
import pymeta.metrics
import pymeta.privacy

ROOT = source_tree.need("README.md", "mkdocs.yml", "docs")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = {"docs/gpu.md": ["needs a CUDA device", "needs a CUDA device"]}
NEEDS = {
    "docs/comparing.md": ("sklearn", "pandas", "lightgbm", "matplotlib"),
    "docs/data.md": ("sklearn", "pandas"),
    "docs/explain.md": ("sklearn", "pandas", "matplotlib"),
    "docs/privacy.md": ("dp_accounting",),
    "docs/finance/index.md": ("sklearn", "lightgbm", "scipy"),
    "docs/serving.md": ("fastapi", "sklearn"),
    "docs/sklearn.md": ("sklearn", "pandas"),
}
LANGUAGES = {"python", "text", "console", "cpp", "diff", "json", "bibtex"}
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")


class Block(NamedTuple):
    """One fenced block of a page."""

    line: int  # of its first line of code, counted from 1
    language: str
    title: str | None
    reason: str | None  # why it is not run
    text: str
    follows: bool  # directly the block before it
    tolerance: float = 0.0  # by which its numbers may differ, relative to them
    needs: str | None = None  # a module

    @property
    def is_run(self) -> bool:
        return self.language == "python" and self.reason is None

    @property
    def misses(self) -> str | None:
        """The module that keeps it from being run."""
        absent = self.needs is not None and importlib.util.find_spec(self.needs) is None
        return self.needs if absent else None


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page in their order."""
    found: list[Block] = []
    reason, needs, follows, tolerance = None, None, False, 0.0
    fence: re.Match | None = None
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if fence is not None:
            if line == "```":
                code = "".join(f"{each}\n" for each in lines)
                start = number - len(lines)
                about = (reason, code, follows, tolerance, needs)
                found.append(Block(start, fence[1], fence[2], *about))
                fence, reason, needs, follows, tolerance, lines = None, None, None, True, 0.0, []
            else:
                lines.append(line)
            continue
        assert "```" not in line or line.startswith("```"), f"line {number}: an indented fence"
        if line.startswith("```"):
            fence = re.fullmatch(r'```(\w*)(?: title="([\w.]+)")?', line)
            assert fence, f"line {number}: an opening fence with more than a language: {line}"
        elif marked := re.fullmatch(r"<!-- not run: (.+) -->", line):
            reason, follows = marked[1], False
        elif marked := re.fullmatch(r"<!-- needs: (\w+) -->", line):
            needs, follows = marked[1], False
        elif marked := re.fullmatch(r"<!-- to (\d+) % -->", line):
            tolerance = int(marked[1]) / 100
        elif line.strip():
            reason, needs, follows = None, None, False
    assert fence is None, "the last block has no end"
    return found


BLOCKS = {name_of(page): blocks_of(page.read_text()) for page in PAGES}
RUN = [name for name, blocks in BLOCKS.items() if any(b.is_run for b in blocks)]


def same_output(wanted: str, got: str, tolerance: float = 0.0) -> bool:
    """Whether two texts are the same but for numbers that differ by the tolerance at most."""
    if NUMBER.sub("#", wanted).split() != NUMBER.sub("#", got).split():
        return False
    pairs = zip(NUMBER.findall(wanted), NUMBER.findall(got), strict=True)
    numbers = [(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs]
    return all(abs(a - b) <= tolerance * abs(a) for a, b in numbers)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to run a page in; what a page sets for the whole process is put back."""
    monkeypatch.chdir(tmp_path)
    threads = pymeta.num_threads()
    yield tmp_path
    pymeta.set_num_threads(threads)


def run_block(page: str, block: Block, names: dict) -> str:
    """What a block prints; its errors name the page and the line."""
    if block.title is not None:
        Path(block.title).write_text(block.text)
        here = {**os.environ, "PYTHONPATH": str(Path(pymeta.__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, block.title], capture_output=True, text=True, env=here, timeout=600
        )
        assert done.returncode == 0, f"{page}, {block.title}: {done.stderr}"
        return done.stdout
    printed = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


@pytest.mark.parametrize("page", RUN)
@pytest.mark.filterwarnings("error::UserWarning")  # a fallback nobody speaks of
def test_the_python_of_a_page_runs(page: str, folder: Path):
    for module in ("torch", *NEEDS.get(page, ())):
        pytest.importorskip(module)
    names: dict = {"__name__": "page"}
    printed: str | None = ""  # by the last block; None where that was left out
    for block in BLOCKS[page]:
        if block.is_run and block.misses is not None:
            assert "PYMETA_TEST_INTEGRATIONS" not in os.environ, f"{block.misses} is missing"
            compile(block.text, page, "exec")
            printed = None
        elif block.is_run:
            printed = run_block(page, block, names)
        elif block.language == "python":
            compile(block.text, page, "exec")
        elif block.language == "text" and block.follows and printed is not None:
            message = f"{page}, line {block.line}: printed\n{printed}"
            assert same_output(block.text, printed, block.tolerance), message


def test_every_page_is_found():
    assert {"README.md", "docs/maml.md", "docs/reptile.md", "docs/finetuning.md"} <= set(RUN)
    assert sum(b.is_run for blocks in BLOCKS.values() for b in blocks) >= 30


@pytest.mark.parametrize("page", BLOCKS)
def test_blocks_are_of_known_kinds(page: str):
    assert {b.language for b in BLOCKS[page]} <= LANGUAGES
    unrun = [b.reason for b in BLOCKS[page] if b.reason is not None]
    assert unrun == NOT_RUN.get(page, [])


def test_blocks_are_found_as_they_are_marked():
    page = (
        "a\n```python\nx = 1\n```\n\n<!-- to 20 % -->\n```text\n3\n```\n"
        "<!-- not run: no GPU -->\n```python\n```\n"
    )
    first, output, unrun = blocks_of(page + '```python title="a.py"\n```\n')[:3]
    assert (first.line, first.text, first.is_run, first.follows) == (3, "x = 1\n", True, False)
    assert (output.language, output.follows, output.tolerance) == ("text", True, 0.2)
    assert unrun.reason == "no GPU" and not unrun.is_run
    (here,) = blocks_of("<!-- needs: json -->\n```python\n```\n")
    (absent,) = blocks_of("<!-- needs: no_such_module -->\n```python\n```\n")
    assert here.needs == "json" and here.misses is None and absent.misses == "no_such_module"
    with pytest.raises(AssertionError, match="line 1"):
        blocks_of("```python {.wide}\n```\n")


@pytest.mark.parametrize(
    ("wanted", "got", "same"),
    [
        ("AUC 0.866", "AUC 0.770", True),
        ("AUC 0.866", "AUC 0.736", False),
        ("AUC 0.866", "KS 0.866", False),
        ("1,000 rows", "1000 rows", True),
        ("[0, 1]", "[0, 0]", False),
        ("torch 2", "torch 2\n3", False),
    ],
)
def test_outputs_are_compared(wanted: str, got: str, same: bool):
    assert same_output(wanted, got, 0.12) == same
    assert same_output(wanted, got) == (wanted.replace(",", "") == got)


# ---- links --------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """A heading's anchor, as Python-Markdown and GitHub make it of plain words."""
    heading = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    text = without_blocks(page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    documented = re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE)
    return {slug(heading) for heading in headings} | set(documented)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"`[^`\n]*`", "", without_blocks(page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.is_file(), f"{target} leads nowhere"
        assert found.is_relative_to(ROOT)
        if page.is_relative_to(ROOT / "docs"):
            assert found.is_relative_to(ROOT / "docs"), f"{target} is not part of the site"
        assert not anchor or anchor in anchors_of(found), f"no heading is {target}"


# ---- the site -----------------------------------------------------------------------------------


def test_the_reference_has_every_public_name():
    text = "".join(p.read_text() for p in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE))
    wanted = {f"pymeta.{name}" for name in pymeta.__all__}
    wanted |= {"pymeta.sklearn.MetaClassifier", "pymeta.sklearn.MetaRegressor"}
    for part in (pymeta.data, pymeta.explain, pymeta.privacy):
        wanted |= {f"{part.__name__}.{name}" for name in part.__all__}
    from pymeta import learners

    wanted |= {f"pymeta.learners.{n}" for n in learners.__all__ if n != "EncodedLearner"}
    named = set(pymeta.metrics.__all__) - pymeta.metrics.METRICS.keys()  # those have a table
    wanted |= {f"pymeta.metrics.{name}" for name in named - {"METRICS"}}
    assert wanted <= shown, wanted - shown


def patched(page: str, into: Path) -> list[str]:
    """Applies a page's diffs to the copy of the source in `into`; returns the files touched."""
    touched = []
    for block in (b for b in BLOCKS[page] if b.language == "diff"):
        first, *hunks = re.split(r"^@@.*\n", block.text, flags=re.MULTILINE)
        named = re.match(r"--- (\S+)\n", first)
        assert named, f"{page}, line {block.line}: a diff begins with --- and its file"
        path = into / named[1]
        touched.append(named[1])
        if added := first[named.end() :]:  # a new file
            assert not path.exists() and not hunks, f"{page}: {named[1]} is there already"
            assert all(line.startswith("+") for line in added.splitlines())
            path.write_text("".join(f"{line[1:]}\n" for line in added.splitlines()))
            continue
        for hunk in hunks:
            lines = hunk.splitlines()
            old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
            new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
            text = path.read_text()
            assert old and text.count(old) == 1, f"{page}: not once in {named[1]}:\n{old}"
            path.write_text(text.replace(old, new))
    return touched


def test_the_patches_of_adding_a_layer_apply_and_compile(tmp_path: Path):
    for folder_ in ("csrc", "pymeta", "tests"):
        keep = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / folder_, tmp_path / folder_, ignore=keep)
    touched = patched("docs/adding-a-layer.md", tmp_path)
    # An activation touches at most three files and a layer with parameters four, tests included.
    activation, layer = touched[:3], touched[3:]
    assert len(set(activation)) == 3 and len(set(layer)) == 4
    for name in touched:
        if name.endswith(".py"):
            compile((tmp_path / name).read_text(), name, "exec")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    done = subprocess.run(
        [compiler, "-std=gnu++17", "-fsyntax-only", "-DPYMETA_ISA=baseline", "-DPYMETA_REAL=float",
         "-Wall", "-Wextra", "-Wno-psabi", "-Werror", str(tmp_path / "csrc/cpu/kernels.cpp")],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


SITE = Program(
    *(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", "{folder}"),
    cwd=ROOT,
    NO_MKDOCS_2_WARNING="1",
)


@pytest.mark.background(SITE)
def test_the_site_builds_without_a_warning():
    if any(map(_is_missing, ("mkdocs", "material", "mkdocstrings_handlers"))):
        pytest.skip("needs mkdocs-material and mkdocstrings: make .venv/stamp/docs")
    done, site = SITE.result(), SITE.folder
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert (site / "objects.inv").stat().st_size > 1000  # for other projects' links
    learners = re.sub(r"<[^>]+>", "", (site / "api" / "learners.html").read_text())
    assert re.search(r"MAML\(\s*model: Module,\s*\*,\s*loss: Any", learners)
    for page in pages:  # a reader's browser asks nobody else for anything
        fetched = re.findall(
            r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text()
        )
        assert not fetched, f"{page.name} fetches {fetched}"


def test_the_figure_of_times_shows_the_results(tmp_path: Path):
    pytest.importorskip("matplotlib")
    tasks = runpy.run_path(str(ROOT / "docs" / "figures" / "tasks.py"))
    found = tasks["lines"](json.loads(tasks["RESULTS"].read_text()))
    assert [t for t, _ in found["pymeta"]] == [1, 25, 256, 1024]
    assert {"jax", "torch vmap", "torch loop"} <= found.keys()
    tasks["main"](out=tmp_path / "tasks.png")
    assert (tmp_path / "tasks.png").read_bytes()[:4] == b"\x89PNG"


def _is_missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None
