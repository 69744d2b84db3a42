"""The Python import graph: it points one way and has no circle; files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import source_tree

ROOT = source_tree.need("CONTRIBUTING.md")
PACKAGE = ROOT / "pymeta"

# What each part may import, besides itself. Parts that are not named are not imported by any.
ALLOWED = {
    "namesake": set(),
    "specialise": set(),
    "native": {"namesake", "specialise"},
    "nn": set(),
    "spec": {"native", "nn"},
    "tasks": {"native", "spec"},
    "reference": {"nn", "spec", "tasks"},
    "backend": {"native", "nn", "spec", "tasks"},
    "functional": {"native", "spec", "tasks", "reference", "backend"},
    "models": {"native", "nn", "spec", "tasks", "reference", "backend"},
    "algorithms": {"native", "spec", "tasks", "reference", "backend", "functional", "models"},
    "data": {"spec", "tasks", "models"},
    "metrics": {"spec", "tasks", "data"},
    "learners": {"native", "spec", "tasks", "reference", "backend", "models", "algorithms"},
    "finance": {"spec", "tasks", "data", "metrics", "learners"},  # and MAML by its public name
    "sklearn": {"spec", "tasks", "models", "learners"},  # and MAML etc. by their public names
    "explain": {"spec", "tasks", "functional", "models"},
    "privacy": {"spec", "tasks", "algorithms", "learners"},
    "serve": {"spec", "tasks", "models", "explain"},  # and the learners by their public names
}
FREE = {
    "info",
    "bench",
    "cli",
    "commands",
    "__main__",
    "_native",
}  # commands, and the compiled module
LONGEST = 520  # lines


def modules() -> dict[str, Path]:
    files = (p for p in PACKAGE.rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}


def for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported(tree: ast.AST, lazily: bool) -> set[str]:
    """The modules of pymeta that a file imports when it runs; in functions too, where `lazily`."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if for_types_alone(node):
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pymeta"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "pymeta"}
        elif lazily or not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            found |= imported(node, lazily)
    return found


def resolved(names: set[str], known: set[str]) -> set[str]:
    """The modules among the names: `pymeta.spec.losses.Loss` is of `pymeta.spec.losses`."""
    out = set()
    for name in names:
        while name not in known and f"{name}.__init__" not in known and "." in name:
            name = name.rpartition(".")[0]
        out.add(name if name in known else f"{name}.__init__")
    return out & known


def graph(lazily: bool) -> dict[str, set[str]]:
    files = modules()
    known = set(files)
    return {
        name: resolved(imported(ast.parse(path.read_text()), lazily), known) - {name}
        for name, path in files.items()
    }


def part(module: str) -> str:
    return module.split(".")[1]


def wrong_edges(edges: dict[str, set[str]]) -> list[str]:
    out = []
    for module, targets in edges.items():
        here = part(module)
        for target in targets:
            there = part(target)
            if here in FREE or there in (here, "__init__") or here == "__init__":
                continue
            if there not in ALLOWED.get(here, set()):
                out.append(f"{module} -> {target}")
    return sorted(out)


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle in a graph, if there is one."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        for target in sorted(edges[node]):
            found = visit(target, [*path, node])
            if found:
                return found
        done.add(node)
        return []

    return next(filter(None, (visit(node, []) for node in sorted(edges))), [])


def test_dependencies_point_one_way():
    edges = graph(lazily=True)
    assert len(edges) > 40 and sum(map(len, edges.values())) > 100
    assert {part(m) for m in edges} <= ALLOWED.keys() | FREE | {"__init__"}
    assert wrong_edges(edges) == []


def test_the_native_module_is_used_behind_a_door():
    """Learners and all that is built on them call `backend`, whose twin is `reference`."""
    doors = {"native", "spec", "tasks", "backend", "models", "functional", "info", "bench"}
    users = {part(m) for m, p in modules().items() if "extension()" in p.read_text()}
    assert {"backend", "models", "functional"} <= users <= doors


def test_no_module_is_in_a_circle():
    assert circle(graph(lazily=False)) == []


def test_this_can_fail():
    assert wrong_edges({"pymeta.spec.losses": {"pymeta.tasks.task_set"}})
    assert wrong_edges({"pymeta.models.adapted": {"pymeta.tasks.task_set"}}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    tree = ast.parse("if TYPE_CHECKING:\n    import pymeta.a\ndef f():\n    from pymeta.b import C")
    assert imported(tree, lazily=True) == {"pymeta.b.C"} and imported(tree, lazily=False) == set()


def test_no_file_is_much_over_500_lines():
    long = {m: len(p.read_text().splitlines()) for m, p in modules().items()}
    assert {m: n for m, n in long.items() if n > LONGEST and "bench" not in m} == {}


def test_importing_pymeta_imports_nothing_else():
    code = (
        "import sys, pymeta; "
        "print([m for m in sys.modules if m.startswith('pymeta.') or m in ('torch', 'numpy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tests_are_short_and_named_once():
    """A folder for each package; pytest wants names that no other folder has."""
    files = [p for p in (ROOT / "tests").rglob("*.py") if p.name != "conftest.py"]
    assert {p.name: n for p in files if (n := len(p.read_text().splitlines())) > 650} == {}
    names = [p.name for p in files]
    assert sorted(names) == sorted(set(names))
