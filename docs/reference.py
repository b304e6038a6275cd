"""Write docs/reference/: the docstrings of what users call, as Markdown.

    python docs/reference.py            rewrites the pages
    python docs/reference.py --check    says whether they are up to date: exit status 0 or 1

Sources are read, not imported, so that the pages are the same whatever is installed.  Docstrings are in numpydoc's
form.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_suffix("")
WIDTH = 100


class Page(NamedTuple):
    """A page: what it says first, what its examples import, and what it describes, as "path:name"."""

    title: str
    introduction: str
    setup: str
    names: tuple[str, ...]


PAGES = {
    "attention": Page(
        "Attention",
        "What computes. Arrays are of NumPy, CuPy, PyTorch, JAX or another library with DLPack: see "
        "[arrays of other libraries](../howto/interop.md).",
        "import numpy as np\nfrom cupyflash import attention, attention_weights, dropout_mask, flops, merge_attention",
        (
            "cupyflash/api.py:attention",
            "cupyflash/api.py:attention_weights",
            "cupyflash/merge.py:merge_attention",
            "cupyflash/problem/philox.py:dropout_mask",
            "cupyflash/flops.py:flops",
            "cupyflash/progress.py:progress",
        ),
    ),
    "planning": Page(
        "What a call would do, and tuning",
        "[What a call would do](../explain.md) shows what `explain` prints, [tuning](../howto/tuning.md) what `tune` "
        "does.",
        "import numpy as np\nfrom cupyflash import explain, tune",
        (
            "cupyflash/explain.py:explain",
            "cupyflash/explain.py:Explanation",
            "cupyflash/tune.py:tune",
            "cupyflash/tune.py:Tuning",
            "cupyflash/plan/device.py:DeviceSpec",
        ),
    ),
    "mods": Page(
        "Score and mask functions",
        "The gallery `cupyflash.mods`, and what shows a function as a kernel has it. How to write one: "
        "[score and mask functions](../howto/score_mod.md).",
        "from cupyflash import trace_mod",
        ("cupyflash/mods.py:*", "cupyflash/build/functor.py:trace_mod"),
    ),
    "backends": Page(
        "Backends",
        "What runs a call. [A backend of your own](../howto/backend.md) goes through the protocol step by step.",
        "",
        (
            "cupyflash/backends/registry.py:backends",
            "cupyflash/backends/registry.py:register_backend",
            "cupyflash/backends/registry.py:Backend",
            "cupyflash/backends/registry.py:Merger",
            "cupyflash/problem/problem.py:Problem",
            "cupyflash/problem/problem.py:Buffers",
            "cupyflash/backends/emulator.py:Options",
        ),
    ),
    "formulas": Page(
        "The derivation, as functions",
        "`cupyflash.formulas` has one pure function for each step of [from softmax to tiles](../explanation.md).",
        "import numpy as np\nfrom cupyflash.formulas import *",
        ("cupyflash/formulas.py:*",),
    ),
    "errors": Page(
        "Errors",
        "",
        "",
        ("cupyflash/errors.py:*", "cupyflash/backends/emulator.py:EmulatorError"),
    ),
    "integrations": Page(
        "Integrations",
        "[Models of transformers](../howto/transformers.md) says what reaches the kernels, and what was tried.",
        "",
        ("cupyflash/integrations/transformers.py:register",),
    ),
    "testing": Page(
        "Testing",
        "What the tests of cupyflash compare with, for tests of your own: of a backend, a model, a GPU.",
        "import numpy as np\nfrom cupyflash.testing import *",
        (
            "cupyflash/testing.py:*",
            "cupyflash/testing.py:assert_attention_close",
            "cupyflash/testing.py:acceptance",
            "cupyflash/testing.py:oracle",
            "cupyflash/testing.py:Case",
            "cupyflash/testing.py:random_case",
        ),
    ),
}

#: Of cupyflash.testing, the page has a selection.
SELECTED = {"testing"}
#: What backends need to know of it is its fields.
WITHOUT_METHODS = {"Problem"}

ENVIRONMENT = {
    "CUPYFLASH_BACKEND": "the backend where a call names none: one of `cupyflash.backends()`. Obeyed or refused, like "
    "the argument",
    "CUPYFLASH_CACHE": "the folder of compiled kernels and of what `tune` found; by default "
    "`$XDG_CACHE_HOME/cupyflash`, else `~/.cache/cupyflash`. It may be deleted at any time",
    "CUPYFLASH_DEBUG": "1 to 4: what is printed of each launch or call, see [tools](../tools.md#cupyflash_debug)",
    "CUPYFLASH_EMULATOR": 'how the emulator runs kernels, `"schedule=random,seed=3"`: the fields of '
    "[`Options`](backends.md#options), and `device`, whose plan is run",
    "CUPYFLASH_EMULATOR_FIBERS": "`portable`: the emulator switches stacks by ucontext instead of by assembly, for "
    "tools that can follow only that",
    "CUPYFLASH_NUM_THREADS": "threads of a call of the backend `numpy`; by default all processors that the process may "
    "use",
    "CUPYFLASH_REQUIRE": "of the tests: what may not be missing, of `cxx,nvrtc,gpu`; tests that need it then fail "
    "instead of being skipped",
}
OTHERS = {
    "CXX": "the C++ compiler of the emulator, with its options; by default the first of c++, g++ and clang++",
    "CUDA_PATH, CUDA_HOME": "where NVRTC is looked for beside the installed packages, by `cuda-pathfinder`",
}


# --- docstrings ----------------------------------------------------------------------------------------------------


class Described(NamedTuple):
    """A function or class of a source file."""

    name: str
    signature: str
    text: str
    fields: str = ""  # as the source has them
    methods: tuple[Described, ...] = ()


@cache
def described(path: str, name: str) -> list[Described]:
    """What "path:name" means; for "*" the functions and classes of ``__all__``, in the order of the file."""
    source = (ROOT / path).read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = source.splitlines()
    nodes = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    if name != "*":
        return [describe(nodes[name], lines)]
    (public,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return [describe(node, lines) for node in nodes.values() if node.name in public]


def describe(node: ast.FunctionDef | ast.ClassDef, lines: Sequence[str]) -> Described:
    text = ast.get_docstring(node) or ""
    if isinstance(node, ast.FunctionDef):
        return Described(node.name, signature(node), text)
    functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    inits = [signature(part, node.name) for part in functions if part.name == "__init__"]
    methods = [describe(part, lines) for part in functions if not part.name.startswith("_") and ast.get_docstring(part)]
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    shown = ""
    if fields and "\n---" not in text:  # not told of in the docstring
        shown = textwrap.dedent("\n".join(lines[fields[0].lineno - 1 : fields[-1].end_lineno]))
    return Described(
        node.name,
        inits[0] if inits else node.name,
        text,
        shown,
        () if node.name in WITHOUT_METHODS else tuple(methods),
    )


def signature(node: ast.FunctionDef, name: str = "") -> str:
    """The call, without types: the docstring says them."""
    given = ast.parse(f"def f({ast.unparse(node.args)}): ...").body[0]
    assert isinstance(given, ast.FunctionDef)
    for argument in ast.walk(given.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    words = ast.unparse(given.args).removeprefix("self").removeprefix(", ")
    is_property = any(ast.unparse(mark).endswith("property") for mark in node.decorator_list)
    call = (name or node.name) + ("" if is_property else f"({words})")
    indent = " " * (len(name or node.name) + 1)
    return "\n".join(textwrap.wrap(call, WIDTH, subsequent_indent=indent, break_long_words=False))


def sections(text: str) -> Iterator[tuple[str, str]]:
    """The parts of a docstring, the first without a title."""
    parts = re.split(r"^([A-Z]\w+)\n-{3,}\n", text, flags=re.MULTILINE)
    yield "", parts[0]
    yield from zip(parts[1::2], parts[2::2], strict=True)


def entries(text: str) -> Iterator[tuple[str, str, str]]:
    """A section of definitions: names, what stands behind the colon, the indented text."""
    term, lines = "", []
    rest = []
    for line in [*text.splitlines(), "end"]:
        if line and not line.startswith(" "):
            if line.startswith(">>>"):
                rest.append(line)
                continue
            if term:
                names, _, kind = term.partition(" : ")
                yield names, kind, " ".join(map(str.strip, lines))
            term, lines = line, []
        else:
            lines.append(line)


def inline(text: str, links: dict[str, str] | None = None) -> str:
    """Text outside of blocks: code as Markdown has it, names as links, and nothing else that is markup."""
    parts = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
    for i, part in enumerate(parts):
        if part.startswith("``"):
            parts[i] = part[1:-1]
        elif part.startswith("`"):
            target = (links or {}).get(part[1:-1])
            parts[i] = f"[{part}]({target})" if target else part
        else:
            part = re.sub(r"(\S) {2,}", r"\1 ", part)  # behind a full stop
            parts[i] = re.sub(r"\*\*|(?<![\w*])\*(?!\w+\*)|<(?=[A-Za-z/])", lambda found: "\\" + found[0], part)
    return "".join(parts)


def paragraphs(text: str, links: dict[str, str]) -> str:
    """Prose, literal blocks, tables and examples."""
    found: list[str] = []
    literal = False
    for chunk in re.split(r"\n[ \t]*\n", text.strip("\n")):
        if not chunk.strip():
            continue
        lines = textwrap.dedent(chunk).splitlines()
        indented = chunk.startswith("    ")
        if lines[0].startswith(">>>"):
            found.append(fenced("pycon", "\n".join(lines)))
        elif lines[0].startswith("==="):
            found.append(table(lines, links))
        elif indented:
            before = found.pop() if literal else ""
            block = before.removeprefix("```text\n").removesuffix("\n```")
            keep = textwrap.dedent(chunk) if not before else f"{block}\n\n{textwrap.dedent(chunk)}"
            found.append(fenced("text", keep))
            literal = True
            continue
        else:
            prose, session = lines, []
            for number, line in enumerate(lines):
                if line.startswith(">>>"):
                    prose, session = lines[:number], lines[number:]
                    break
            found.append(re.sub(r"\s*::$", ":", inline("\n".join(prose), links)))
            if session:
                found.append(fenced("pycon", "\n".join(session)))
        literal = False
    return "\n\n".join(found)


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def table(lines: Sequence[str], links: dict[str, str]) -> str:
    """A table of two columns between rows of =."""
    at = lines[0].index(" ")
    rows = [
        (inline(line[:at].strip(), links), inline(re.sub(r" {2,}", " – ", line[at:].strip()), links))
        for line in lines[1:-1]
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {what} |" for name, what in rows)])


def definitions(text: str, links: dict[str, str]) -> str:
    lines = []
    for names, kind, what in entries(text):
        names = names if kind or what else names.removesuffix(".")
        shown = inline(names, links) if " " in names.replace(", ", "") or "`" in names else as_code(names)
        said = " – ".join(inline(part.strip(), links).removesuffix(".") for part in (kind, what) if part.strip())
        lines.append(f"- {shown}{': ' if said else ''}{said}")
    return "\n".join(lines)


def as_code(names: str) -> str:
    return ", ".join(name if name == "…" else f"`{name}`" for name in names.split(", "))


def body(one: Described, links: dict[str, str], level: int) -> str:
    """Heading, call and docstring of one thing, and of its methods."""
    own = {name: target for name, target in links.items() if name != one.name}
    parts = [f"{'#' * level} {one.name}"]
    if one.signature != one.name:
        parts.append(fenced("text", one.signature))
    for title, text in sections(one.text):
        if title in ("Parameters", "Attributes", "Returns", "Raises"):
            examples = text.find("\n>>>")
            parts += [f"**{title}**", definitions(text if examples < 0 else text[:examples], own)]
            if examples >= 0:
                parts.append(paragraphs(text[examples:], own))
        else:
            parts += [f"**{title}**"] * bool(title) + [paragraphs(text, own)]
    if one.fields:
        parts.append(fenced("text", one.fields))
    parts += [body(method, links, level + 1) for method in one.methods]
    return "\n\n".join(part for part in parts if part)


# --- pages ---------------------------------------------------------------------------------------------------------


def things(name: str) -> list[Described]:
    """What a page describes."""
    page = PAGES[name]
    found = []
    for text in page.names:
        path, _, what = text.partition(":")
        if not (what == "*" and name in SELECTED):
            found += described(path, what)
    return found


def module_text(name: str, links: dict[str, str]) -> str:
    """The docstring of a module of which a page has all."""
    modules = [text.partition(":")[0] for text in PAGES[name].names if text.endswith(":*")]
    texts = [ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or "" for path in modules]
    return "\n\n".join(paragraphs(text, links) for text in texts)


def all_links(page: str) -> dict[str, str]:
    """Where names lead to from a page."""
    return {
        one.name: f"{'' if name == page else f'{name}.md'}#{one.name.lower()}" for name in PAGES for one in things(name)
    }


def render(name: str) -> str:
    page, links = PAGES[name], all_links(name)
    parts = [f"# {page.title}", f"{page.introduction} This page is written by `python docs/reference.py`.".strip()]
    if page.setup:
        parts += ["The examples of this page begin with", fenced("python", page.setup)]
    parts.append(module_text(name, links))
    parts += [body(one, links, 2) for one in things(name)]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_environment() -> str:
    """The variables that are looked at."""
    lines = [
        "# Environment variables",
        "",
        "They are looked at when they are needed, in every call, so a program may set them in `os.environ` at any",
        "time. `python -m cupyflash doctor` shows what is set and finds fault with wrong names and values. This page",
        "is written by `python docs/reference.py`.",
        "",
        "| variable | what it does |",
        "|---|---|",
        *(f"| `{name}` | {what} |" for name, what in ENVIRONMENT.items()),
        "",
        "Of others:",
        "",
        "| variable | what it does |",
        "|---|---|",
        *(f"| {as_code(name)} | {what} |" for name, what in OTHERS.items()),
    ]
    return "\n".join(lines) + "\n"


def summary(one: Described) -> str:
    """The first sentence of a docstring, without markup of blocks."""
    first = one.text.split("\n\n")[0].replace("\n", " ")
    return inline(re.sub(r"\s*::$", "", first)).removesuffix(".")


def render_overview() -> str:
    """All names, a line for each."""
    lines = ["# Reference", "", "All that is meant to be called, from the docstrings. This page is written by"]
    lines += ["`python docs/reference.py`.", "", "| name | what it is |", "|---|---|"]
    for name in PAGES:
        for one in things(name):
            lines.append(f"| [`{one.name}`]({name}.md#{one.name.lower()}) | {summary(one)} |")
    lines.append(f"| [environment variables](environment.md) | {as_code(', '.join(ENVIRONMENT))} |")
    return "\n".join(lines) + "\n"


def all_pages() -> dict[Path, str]:
    made = {FOLDER / f"{name}.md": render(name) for name in PAGES}
    return made | {FOLDER / "environment.md": render_environment(), FOLDER / "README.md": render_overview()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/reference/.")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a page is not up to date")
    check = parser.parse_args(arguments).check
    new = all_pages()
    stale = [path for path, text in new.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    stale += [path for path in FOLDER.glob("*.md") if path not in new]
    for path in stale:
        if check:
            print(f"{path.name} is not up to date: run python docs/reference.py", file=sys.stderr)
        elif path in new:
            path.parent.mkdir(exist_ok=True)
            path.write_text(new[path], encoding="utf-8")
        else:
            path.unlink()
    return int(bool(stale) and check)


if __name__ == "__main__":
    sys.exit(main())
