"""How the blocks of a page are checked, by their language.

`python` runs, from top to bottom of a page, all in one namespace; `test_readme.py` says what comments claim.  `pycon`
is a session, and runs as a doctest in that namespace.  `sh`, or no language at all, is commands: `check_command` knows
what each kind must fulfil; those of `python -m cupyflash` and gdb run, and a `text` block right behind one of these is
what it prints, with … for anything.  `text` elsewhere is a picture, a formula or output.  Any other language is an
excerpt: its first line is a comment with the path of a file, and the rest stands in that file as it is here.

A page that is written by a script which runs its blocks itself says so: `<!-- run by docs/SCRIPT.py -->`.
"""

from __future__ import annotations

import ast
import configparser
import doctest
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
LIBRARIES = ("jax", "torch", "transformers")  # what a page may need and a machine may lack
#: Commands that change a machine, and are no one's business here.
FREE = {"git", "cd", ".", "export", "nvidia-smi", "pre-commit"}
SCRIPT = re.compile(r"(examples|benchmarks|docs)/[\w/]+\.py")


def load_script(path: str) -> ModuleType:
    """A script of the repository, which is no module of a package."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = load_script("docs/pages.py")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def runner_of(text: str) -> str | None:
    """The script that runs a page's Python, if it says that there is one; AssertionError if there is none."""
    found = re.search(r"^<!-- run by (\S+) -->$", text, re.MULTILINE)
    if found is None:
        return None
    script = ROOT / found[1]
    assert script.is_file(), f"there is no {found[1]}"
    assert "--check" in script.read_text(encoding="utf-8"), f"{found[1]} has no --check"
    return found[1]


def imported(text: str) -> set[str]:
    """The libraries of `LIBRARIES` that a page's Python imports."""
    found = set()
    for block in pages.blocks(text):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.Import):
                    found.update(alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    found.add((node.module or "").partition(".")[0])
    return found.intersection(LIBRARIES)


def run_session(text: str, namespace: dict[str, Any], name: str, line: int) -> None:
    """A block of `>>>`, with the namespace of its page."""
    test = doctest.DocTestParser().get_doctest(text, namespace, name, name, line - 1)
    assert test.examples, f"{name}:{line}: a pycon block without >>>"
    test.globs = namespace  # not a copy: later blocks go on with it
    told: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append, clear_globs=False)
    assert not told, "".join(told)


def check_excerpt(text: str) -> None:
    """The rest of the block stands in the file that its first line names."""
    first, _, rest = text.partition("\n")
    path = re.sub(r"^(//|#|/\*)\s*|\s*\*/$", "", first)
    assert (ROOT / path).is_file(), f"the first line of an excerpt names its file, but was {first!r}"
    assert rest.strip()
    assert rest in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no such lines any more:\n{rest}"


def commands(text: str) -> list[list[str]]:
    """The commands of a block; those behind one another and on continued lines too."""
    lines = text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for part in re.split(r"&&|;", line):
            if words := shlex.split(part, comments=True):
                found.append(words)
    return found


def check_command(words: list[str], folder: Path) -> str | None:
    """AssertionError where a command of a page is not one that works; what it prints, if it was run.

    Parameters
    ----------
    words : the command
    folder : where files that it makes may lie
    """
    environment = dict(os.environ)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    shown = shlex.join(words)
    first, rest = words[0], words[1:]
    if first in ("python", "python3") and rest[0] == "-m":
        return _check_module(rest[1], rest[2:], environment, folder, shown)
    if first in ("python", "python3"):
        script = ROOT / rest[0]
        assert script.is_file(), f"{shown}: there is no such file"
        if options := [word.partition("=")[0] for word in rest[1:] if word.startswith("-")]:
            assert SCRIPT.fullmatch(rest[0]), f"{shown}: nobody knows its options"
            said = _run([sys.executable, str(script), "--help"], environment, folder)
            assert all(re.search(rf"(?<!\S){option}\b", said) for option in options), f"{shown}: unknown options"
        return None
    if first == "make":
        targets = [word for word in rest if "=" not in word]
        lacking = [name for name in targets if not re.search(rf"^{name}:", read("Makefile"), re.MULTILINE)]
        assert targets, shown
        assert not lacking, f"{shown}: no target {lacking}"
        return None
    if first == "pip":
        _check_extras(shown)
        return None
    if first == "pytest":
        for word in rest:
            if "/" in word:
                assert (ROOT / word.partition("::")[0]).exists(), f"{shown}: there is no {word}"
        return None
    if first == "gdb":
        for word in rest:
            assert "/" not in word or word.startswith("/") or (ROOT / word).is_file(), f"{shown}: there is no {word}"
        if why_no_gdb():
            return None
        words = [sys.executable if word == "python" else word for word in words]
        return _run(words, environment, ROOT)
    assert first in FREE, f"{shown}: nobody checks this command"
    return None


@functools.cache
def why_no_gdb() -> str:
    """Why gdb can't run a program here; empty if it can."""
    if shutil.which("gdb") is None or shutil.which("g++") is None:
        return "gdb or g++ is not installed"
    words = ["gdb", "-q", "-batch", "-ex", "run", "--args", "true"]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=60, check=False)
    return "" if "exited normally" in done.stdout else "gdb may not trace a program here"


def _check_module(module: str, rest: list[str], environment: dict[str, str], folder: Path, shown: str) -> str | None:
    if module == "cupyflash" or "--dry-run" in rest:
        return _run([sys.executable, "-m", module, *rest], environment, folder)
    if module == "mkdocs":  # of the extra docs
        return None
    assert importlib.util.find_spec(module), f"{shown}: there is no module {module}"
    return None


def _check_extras(shown: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    known = set(setup["options.extras_require"])
    for found in re.findall(r"\.\[([\w,]+)\]", shown):
        assert known.issuperset(found.split(",")), f"{shown}: expected extras of {sorted(known)}"


def _run(words: list[str], environment: dict[str, str], folder: Path) -> str:
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300, check=False
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


def check_output(said: str, printed: str, name: str) -> None:
    """The text behind a command is what it printed; … is anything, also many lines."""
    pattern = ".*".join(map(re.escape, re.split(r"…", said.strip())))
    assert re.fullmatch(pattern, printed.strip(), re.DOTALL), f"{name}: the page says\n{said}\nbut it prints\n{printed}"


def check_commands(page: str, folder: Path) -> int:
    """Check all commands of a page, and what it says that they print; how many there are."""
    text = read(page)
    known = pages.blocks(text)
    count = 0
    for index, block in enumerate(known):
        if block.language not in ("", "sh"):
            continue
        printed = None
        for words in commands(block.text):
            printed = check_command(words, folder)
            count += 1
        if printed is not None and index + 1 < len(known) and known[index + 1].language == "text":
            following = known[index + 1]
            between = text.splitlines()[block.line + block.text.count("\n") : following.line - 2]
            if not any(map(str.strip, between)):
                check_output(following.text, printed, f"{page}:{following.line}")
    return count
