"""Type hints as a user's checker sees them: `tests/typing/as_a_user.py` is whole, and what is checked of it fails."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import cupyflash
from cupyflash import api, errors, mods

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "typing" / "as_a_user.py"


def test_every_public_name_is_used() -> None:
    tree = ast.parse(PROGRAM.read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    public = {*cupyflash.__all__, *mods.__all__, *errors.__all__, "testing", "assert_attention_close"}
    assert public - used == set()


def test_the_overloads_have_every_argument() -> None:
    """The options, written once for four overloads, are those of the signature."""
    arguments = {name: parameter.annotation for name, parameter in inspect.signature(api.attention).parameters.items()}
    shared = {"query", "key", "value", "return_lse", "return_weights"}
    options = {name: text for name, text in arguments.items() if name not in shared}
    assert {name: hint.__forward_arg__ for name, hint in api._Options.__annotations__.items()} == options
    if sys.version_info >= (3, 11):
        *by_type, by_place = typing.get_overloads(api.attention)
        assert inspect.signature(by_place).parameters.keys() == arguments.keys()
        for overload in by_type:
            assert inspect.signature(overload).parameters.keys() == shared | {"options"}


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "cupyflash" / "py.typed").exists()


@pytest.mark.slow
def test_mypy_finds_what_is_wrong(tmp_path: Path) -> None:
    """In a strict run from elsewhere, on the program without its comments: each line of `wrong`, and nothing else."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install 'cupyflash[dev]'")
    text = PROGRAM.read_text(encoding="utf-8")
    expected = [number for number, line in enumerate(text.splitlines(), 1) if "# type: ignore" in line]
    lines = [line.partition("  # type: ignore")[0] for line in text.splitlines()]
    (tmp_path / "program.py").write_text("\n".join(lines), encoding="utf-8")
    settings = tmp_path / "mypy.ini"
    # As for a package in site-packages: errors inside it are not the user's.
    settings.write_text(f"[mypy]\nstrict = True\nmypy_path = {ROOT}\n[mypy-cupyflash.*]\nfollow_imports = silent\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "program.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = sorted({int(line.split(":")[1]) for line in result.stdout.splitlines() if ": error:" in line})
    assert found == expected, result.stdout
