"""mypy --strict finds nothing in the package, and the native module is what its stub says."""

import ast
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import source_tree
from background import Program

import pymeta
from pymeta import native

ROOT = source_tree.need("pymeta", "csrc")


def mypy(
    *arguments: str, module: str = "mypy", folder=ROOT, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "MYPY_FORCE_COLOR": "0", "COLUMNS": "200", **environment},
    )


STRICT = Program(  # pyproject.toml says what and how
    sys.executable, "-m", "mypy", cwd=ROOT, MYPY_FORCE_COLOR="0", COLUMNS="200"
)


@pytest.mark.background(STRICT)
def test_mypy_strict():
    done = STRICT.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no issues found in" in done.stdout


MISTAKES = {
    "pymeta.SGD('fast')": "arg-type",
    "pymeta.Adapter.load('x').adapt_all()": "attr-defined",
    "n: str = pymeta.num_threads()": "assignment",
    "pymeta.set_num_threads(1, 2)": "call-arg",
}


@pytest.mark.background(STRICT)
def test_mypy_sees_a_users_mistakes(tmp_path):
    """The types reach the user, and are not Any."""
    STRICT.result()  # whose cache this uses
    (tmp_path / "user.py").write_text("\n".join(["import pymeta", *MISTAKES, ""]))
    config, cache = str(ROOT / "pyproject.toml"), str(ROOT / ".mypy_cache")
    done = mypy("--config-file", config, "--cache-dir", cache, str(tmp_path / "user.py"))
    said = re.findall(r"user.py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
    wanted = [(str(line), code) for line, code in enumerate(MISTAKES.values(), start=2)]
    assert said == wanted, done.stdout + done.stderr


STUB = Path(pymeta.__file__).with_name("_native.pyi").read_text()


def stubtest(folder: Path, stub: str) -> subprocess.CompletedProcess:
    """A stub against the module, in a package of its own: in ours mypy would read torch as well."""
    alone = folder / "pymeta"
    alone.mkdir()
    (alone / "__init__.pyi").touch()
    (alone / "_native.pyi").write_text(stub)
    arguments = "pymeta._native", "--concise"
    return mypy(*arguments, module="mypy.stubtest", folder=folder, MYPYPATH=str(folder))


@pytest.mark.skipif(native.missing() is not None, reason="no extension")
def test_the_stub_is_the_native_module(tmp_path):
    done = stubtest(tmp_path, STUB)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(native.missing() is not None, reason="no extension")
def test_a_stub_of_what_is_not_there_is_noticed(tmp_path):
    done = stubtest(tmp_path, f"{STUB}\ndef planted() -> None: ...\n")
    assert done.returncode == 1 and "planted" in done.stdout


# ---- signatures, which mypy's stubtest cannot see in a compiled function ------------------------

Signature = tuple[list[str], list[str], list[str], bool]


def signature(function: ast.FunctionDef) -> Signature:
    """Names of the arguments, of those by keyword alone, defaults, and whether it returns None."""
    a = function.args
    defaults = [ast.unparse(d).replace("[]", "()") for d in (*a.defaults, *a.kw_defaults) if d]
    nothing = function.returns is None or ast.unparse(function.returns) == "None"
    return [x.arg for x in a.args], [x.arg for x in a.kwonlyargs], defaults, nothing


def promised(stub: str) -> dict[str, Signature]:
    """{"Class.method" or "function": its signature} of a stub's text; no properties."""
    found = {}
    for node in ast.parse(stub).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for function in inside:
            if isinstance(function, ast.FunctionDef) and not function.decorator_list:
                found[prefix + function.name] = signature(function)
    return found


def compiled(name: str) -> Signature:
    """The signature that pybind11 wrote into a function's docstring."""
    text = operator.attrgetter(name)(native.extension()).__doc__.splitlines()[0]
    (function,) = ast.parse(f"def {text}: ...").body
    return signature(function)


@pytest.mark.skipif(native.missing() is not None, reason="no extension")
@pytest.mark.parametrize("name", promised(STUB))
def test_the_stubs_signatures_are_the_native_modules(name):
    assert compiled(name) == promised(STUB)[name]


@pytest.mark.skipif(native.missing() is not None, reason="no extension")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sizes: int = 0", "size: int = 0"),
        ("sizes: int = 0", "sizes: int = 1"),
        ("delta: float = 1.0", "delta: float"),
        ("weights: _Buffer | None = None", "*, weights: _Buffer | None = None"),
    ],
)
def test_a_wrong_stub_is_noticed(old, new):
    assert old in STUB
    wrong = promised(STUB.replace(old, new))
    assert [name for name in wrong if compiled(name) != wrong[name]]
