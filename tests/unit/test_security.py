"""What SECURITY.md says of the package, where a test can hold it to it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cupyflash"

NETWORK = {"asyncio", "ftplib", "http", "requests", "smtplib", "socket", "socketserver", "ssl", "urllib", "xmlrpc"}
UNPICKLING = {"dill", "joblib", "marshal", "pickle", "shelve"}
# Who may start other programs: the C++ compiler, and the questions of `doctor`.
PROGRAMS = {"build/host.py", "tools/probe.py"}


def imports(text: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def calls(text: str) -> set[str]:
    """Names of the functions that are called by a plain name, and of os by an attribute."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            found.add(f"os.{node.attr}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_network_no_pickles_no_evaluated_text(path: Path) -> None:
    text, name = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()
    assert imports(text) & (NETWORK | UNPICKLING) == set()
    assert calls(text) & {"eval", "exec", "compile", "os.system", "os.popen", "os.execv"} == set()
    assert ("subprocess" in imports(text)) == (name in PROGRAMS)


def test_what_is_looked_for_would_be_found() -> None:
    text = "import urllib.request\nfrom pickle import loads\nimport os\nos.system('ls')\neval('1')"
    assert imports(text) == {"urllib", "pickle", "os"}
    assert {"eval", "os.system"} <= calls(text)
