"""Every page of the documentation: what it shows works, its links lead somewhere, and the site has it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cupyflash.backends import registry
from tests.examples import documents
from tests.examples.documents import ROOT, pages, read
from tests.examples.test_readme import run_blocks

PAGES = pages.pages()
KINDS = {"python", "pycon", "sh", "", "text"}


def with_language(*languages: str, excerpts: bool = False) -> list[str]:
    """The pages that have such blocks."""
    return [
        page
        for page in PAGES
        if any(
            block.language in languages or (excerpts and block.language not in KINDS)
            for block in pages.blocks(read(page))
        )
    ]


@pytest.mark.parametrize(
    "page", [page for page in with_language("python", "pycon") if documents.runner_of(read(page)) is None]
)
def test_python_runs_and_comments_hold(
    page: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = read(page)
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))  # pages may register others
    for library in sorted(documents.imported(text)):
        pytest.importorskip(library, reason=f"{library} is not installed")
    if re.search(r'backend="emulator"|backends\.emulator|tools\.trace', text):
        request.getfixturevalue("cxx")
    if "import cupy\n" in text:
        request.getfixturevalue("math_on_cuda")  # on the stand-in
    run_blocks(text, page)


@pytest.mark.slow
@pytest.mark.parametrize("page", with_language("", "sh"))
def test_commands_work(page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    text = read(page)
    if "python -m cupyflash kernels" in text:
        request.getfixturevalue("nvrtc")
    if "python -m cupyflash trace" in text:
        request.getfixturevalue("cxx")
    sessions = [block for block in pages.blocks(text) if block.language == "sh" and "gdb " in block.text]
    if sessions:
        request.getfixturevalue("cxx")
    assert documents.check_commands(page, tmp_path) > 0
    if sessions and (reason := documents.why_no_gdb()):
        pytest.skip(f"{reason}: its sessions were not run, only their files looked for")


@pytest.mark.parametrize("page", with_language(excerpts=True))
def test_excerpts_are_those_of_their_files(page: str) -> None:
    for block in pages.blocks(read(page)):
        if block.language not in KINDS:
            documents.check_excerpt(block.text)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    lacking = []
    for link in pages.links(read(page)):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in pages.anchors(target.read_text(encoding="utf-8"))):
            lacking.append(link)
    assert not lacking, f"{page} links to what does not exist: {lacking}"


@pytest.mark.parametrize("page", PAGES)
def test_markdown_reads_the_same_everywhere(page: str) -> None:
    """Python-Markdown takes a list for a part of the paragraph that it follows."""
    before, fenced = "", False
    for number, line in enumerate(read(page).splitlines(), 1):
        fenced ^= line.startswith("```")
        follows = before.strip() and not re.match(r"[-*] |\d+\. |#| ", before)
        assert fenced or not (re.match(r"([-*]|\d+\.) ", line) and follows), f"{page}:{number}: no blank line before"
        before = line
    assert not fenced


def navigated() -> list[str]:
    """The pages of mkdocs.yml's nav; read by hand, since YAML is not of the standard library."""
    return re.findall(r"^ +- [^:]+: (\S+\.md)$", read("mkdocs.yml").partition("\nnav:\n")[2], re.MULTILINE)


def test_the_site_has_every_page_once() -> None:
    assert sorted(navigated()) == PAGES, "mkdocs.yml: nav"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_is_built(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        built = tmp_path / page.replace("README.md", "index.html").replace(".md", ".html")
        text = built.read_text(encoding="utf-8")
        assert all(f'id="{anchor}"' in text for anchor in pages.anchors(read(page))), page
        outside = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)", text)
        assert not outside, f"{page} loads {outside}"


# --- the checks themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("make no-such-target", "no target"),
        ("pip install '.[nothing]'", "expected extras"),
        ("python examples/none.py", "no such file"),
        ("python examples/denoise_photo.py --colour", "unknown options"),
        ("python -m cupyflash nonsense", "invalid choice"),
        ("pytest tests/none", "there is no"),
        ("rm -rf x", "nobody checks"),
        ("gdb -x docs/none.gdb", "there is no"),
    ],
)
def test_commands_that_do_not_work_are_found(command: str, message: str, tmp_path: Path) -> None:
    ((words),) = documents.commands(command)
    with pytest.raises(AssertionError, match=message):
        documents.check_command(words, tmp_path)


def test_commands_are_taken_apart() -> None:
    text = "A=1 make x && make y  # why\nmake \\\n  z\n"
    assert documents.commands(text) == [["A=1", "make", "x"], ["make", "y"], ["make", "z"]]


def test_output_is_compared() -> None:
    documents.check_output("a … c\n", "a b\nb c\n", "page")
    with pytest.raises(AssertionError, match="but it prints"):
        documents.check_output("a … c\n", "a b\n", "page")


def test_excerpts_are_compared() -> None:
    documents.check_excerpt("# tests/examples/test_pages.py\ndef test_excerpts_are_compared() -> None:\n")
    with pytest.raises(AssertionError, match="has no such lines"):
        documents.check_excerpt("# Makefile\nno such line\n")
    with pytest.raises(AssertionError, match="names its file"):
        documents.check_excerpt("int x;\n")


def test_who_runs_a_page_is_said_in_it() -> None:
    assert documents.runner_of("# A\n\n```python\n1\n```\n") is None
    assert documents.runner_of("# A\n\n<!-- run by docs/explain.py -->\n") == "docs/explain.py"
    with pytest.raises(AssertionError, match=r"there is no docs/none\.py"):
        documents.runner_of("<!-- run by docs/none.py -->\n")


def test_sessions_run(tmp_path: Path) -> None:
    assert (
        run_blocks("```python\nx = 1\n```\n\n```pycon\n>>> y = x + 1\n>>> y\n2\n```\n\n```python\ny  # -> 2\n```\n")
        == 1
    )
    with pytest.raises(AssertionError, match="Expected"):
        run_blocks("```pycon\n>>> 1 + 1\n3\n```\n")


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [("Where do I change …?", "where-do-i-change-"), ("`attn_mask`, twice", "attn_mask-twice"), ("A – b", "a--b")],
)
def test_anchors_are_those_of_repository_hosts(heading: str, anchor: str) -> None:
    assert pages.anchors(f"# {heading}\n```\n# none\n```\n") == [anchor]


def test_links_are_found() -> None:
    text = "# T\n[a](b.md#c) ![i](p/q.png) [w](https://x.y) [h](#t) <img src='z.svg'> `[n](o)`\n```\n[n](o)\n```\n"
    assert list(pages.links(text)) == ["b.md#c", "p/q.png", "#t", "z.svg"]
