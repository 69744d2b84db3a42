"""docs/promises.md names a test for each promise; here is that each name is one."""

import ast
import re
from functools import cache
from pathlib import Path

import source_tree

TESTS = Path(__file__).resolve().parents[1]
PAGE = source_tree.need("docs/promises.md") / "docs" / "promises.md"
NAME = re.compile(r"`([\w/]+\.py)::(\w+)`")


@cache
def found_in(file: str) -> set[str]:
    """The tests that pytest would collect from the one file of a name, by its syntax tree."""
    places = list(TESTS.rglob(file))
    if len(places) != 1:
        return set()
    body = ast.parse(places[0].read_text()).body
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {n.name for n in body if isinstance(n, kinds) and n.name.startswith("test_")}


def missing(page: str) -> list[str]:
    """The names on a page that are no tests."""
    return [f"{file}::{name}" for file, name in NAME.findall(page) if name not in found_in(file)]


def rows(page: str) -> list[list[str]]:
    """The rows of the page's tables that promise something: those of three columns."""
    found = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in row] for row in found if len(row) == 3]
    return [row for row in rows if row[0] != "promise" and set(row[0]) != {"-"}]


def test_every_test_named_exists():
    page = PAGE.read_text()
    assert len(NAME.findall(page)) > 40
    assert not missing(page)


def test_every_promise_names_a_test():
    found = rows(PAGE.read_text())
    assert len(found) > 25
    assert [row[0] for row in found if not NAME.search(row[2])] == []


def test_nothing_else_looks_like_the_name_of_a_test():
    """A name that is spelled another way would not be looked up."""
    page = PAGE.read_text()
    assert page.count("::") == len(NAME.findall(page))


def test_this_can_fail():
    named = "`test_promises.py::test_this_can_fail` `test_promises.py::test_no` `no.py::test_x`"
    assert missing(named) == ["test_promises.py::test_no", "no.py::test_x"]
    assert rows("| promise | limits | proved by |\n|---|---|---|\n| a | | b |\n| c | d |") == [
        ["a", "", "b"]
    ]
