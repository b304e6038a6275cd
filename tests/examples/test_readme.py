"""The README is true: its Python gives what its comments say; its commands, links and tables are there.

Every block marked ```python runs, from top to bottom, all in one namespace.  A comment at the end of a
statement's last line says what the statement gives, and is checked:

    out.dtype          # -> float32                     str or repr of the value; … stands for anything
    round(x, 3)        # -> 0.125                       or a literal that equals it
    print(a, b)        # -> 1 2                         what was printed
    out, lse = f(q)    # (2, 8, 5, 64), (2, 8, 5) and   shapes, where the comment begins with tuples
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import re
import tokenize
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.examples.documents import pages, run_session

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SHAPES = re.compile(r"\((?:\d+,|\d+(?:, *\d+)+)?\)(?:, *\((?:\d+,|\d+(?:, *\d+)+)?\))*")


def run_blocks(readme: str, name: str = "README.md") -> int:
    """Run them; return how many comments were checked.  AssertionError where one does not hold."""
    blocks = [block for block in pages.blocks(readme) if block.language in ("python", "pycon")]
    assert blocks, f"{name} has no ```python block"
    namespace: dict[str, Any] = {"__name__": "__readme__"}
    checked = 0
    for block in blocks:
        if block.language == "pycon":
            run_session(block.text, namespace, name, block.line)
            continue
        # Line numbers of tracebacks and messages are those of the file.
        source = "\n" * (block.line - 1) + block.text
        comments = trailing_comments(source)
        for statement in ast.parse(source, name).body:
            value, printed = run_statement(statement, namespace, name)
            comment = comments.get(statement.end_lineno)
            if comment and (mismatch := compare(comment, value, printed)) is not None:
                assert not mismatch, f"{name}:{statement.end_lineno}: the comment says {comment!r}, {mismatch}"
                checked += 1
    return checked


def trailing_comments(source: str) -> dict[int, str]:
    """Comments that stand behind code, by line."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    return {
        token.start[0]: token.string.lstrip("#").strip()
        for token in tokens
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
    }


def run_statement(statement: ast.stmt, namespace: dict[str, Any], name: str) -> tuple[Any, str]:
    """The value of an expression or of an assignment's targets, and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), name, "eval"), namespace)
        else:
            exec(compile(ast.Module([statement], []), name, "exec"), namespace)
            value = None
            if isinstance(statement, ast.Assign):
                target = ast.parse(ast.unparse(statement.targets[0]), mode="eval")
                value = eval(compile(target, name, "eval"), namespace)
    return value, printed.getvalue()


def compare(comment: str, value: Any, printed: str) -> str | None:
    """What is wrong with the comment: "" if nothing is, None if it says nothing that can be checked."""
    if comment.startswith("->"):
        said = comment.removeprefix("->").strip()
        got = [printed.strip()] if printed else [str(value), repr(value)]
        pattern = ".*".join(map(re.escape, re.split(r"…|\.\.\.", said)))
        if any(re.fullmatch(pattern, text, re.DOTALL) for text in got) or equals_literal(value, said):
            return ""
        return f"but got {got[-1]}"
    if found := SHAPES.match(comment):
        said_shapes = ast.literal_eval(found[0])
        got_shapes = shapes_of(value)
        return "" if said_shapes == got_shapes else f"but got {got_shapes}"
    return None


def equals_literal(value: Any, said: str) -> bool:
    """Whether what is said is a Python literal equal to the value, also where that is an array."""
    try:
        return bool(np.array_equal(value, ast.literal_eval(said)))
    except (ValueError, SyntaxError):
        return False


def shapes_of(value: Any) -> Any:
    """The shape of an array, the shapes of a tuple of arrays; a tuple of numbers is a shape itself."""
    if isinstance(value, tuple):
        return value if all(isinstance(n, int) for n in value) else tuple(shapes_of(x) for x in value)
    return getattr(value, "shape", value)


def command_under(heading: str, readme: str) -> list[str]:
    """The lines of the first fenced block under a heading."""
    found = re.search(rf"^#+ {re.escape(heading)}[ \t]*\n(?P<section>.*?)(?=^#+ |\Z)", readme, re.DOTALL | re.MULTILINE)
    assert found, f"README.md has no heading {heading!r}"
    blocks = pages.blocks(found["section"])
    assert blocks, f"README.md has no fenced block under {heading!r}"
    return [line for line in blocks[0].text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def readme() -> str:
    assert README.exists(), "there is no README.md"
    return README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the README ------------------------------------------------------------------------------------------


def test_python_blocks_run_and_their_comments_hold(readme: str) -> None:
    assert run_blocks(readme) > 0, "README.md: no result in a comment was checked; write `# -> …` or `# (2, 8, …)`"


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_command_is_one_line(readme: str, heading: str) -> None:
    lines = command_under(heading, readme)
    assert len(lines) == 1, f"README.md: the block under {heading!r} has {len(lines)} lines, expected one"


@pytest.mark.usefixtures("readme")
def test_generated_tables_are_up_to_date(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0


# --- the checks themselves -------------------------------------------------------------------------------


def fenced(code: str, language: str = "python") -> str:
    return f"text\n\n```{language}\n{code}\n```\n"


@pytest.mark.parametrize(
    "code",
    [
        "1 + 1  # -> 2",
        "print('a', 'b')  # -> a b",
        "'a long text'  # -> 'a … text'",
        "import numpy as np\nnp.eye(2)  # -> [[1, 0], [0, 1]]",
        "import numpy as np\nx = np.ones((2, 3))  # (2, 3) float64",
        "import numpy as np\nx, y = np.ones((2, 3)), np.ones(4)  # (2, 3), (4,)",
        "import numpy as np\nx = np.ones(\n    (2, 3)\n)  # (2, 3)",
        "import numpy as np\nnp.ones((2, 3)).shape  # (2, 3)",
    ],
)
def test_true_comment_is_counted(code: str) -> None:
    assert run_blocks(fenced(code)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "1 + 1  # -> 3",
        "print('a', 'b')  # -> a c",
        "'a long text'  # -> 'a … word'",
        "import numpy as np\nnp.eye(2)  # -> [[1, 0], [0, 2]]",
        "import numpy as np\nx = np.ones((2, 3))  # (2, 4)",
        "import numpy as np\nx, y = np.ones((2, 3)), np.ones(4)  # (2, 3), (5,)",
        "import numpy as np\nnp.ones((2, 3)).shape  # (3, 2)",
        "x = None  # (2, 3)",
    ],
)
def test_false_comment_fails(code: str) -> None:
    with pytest.raises(AssertionError, match=r"README\.md:\d+: the comment says"):
        run_blocks(fenced(code))


def test_namespace_is_shared_and_lines_are_the_files() -> None:
    assert run_blocks(fenced("x = 2") + fenced("x + 1  # -> 3")) == 1
    with pytest.raises(AssertionError, match=r"README\.md:9: "):
        run_blocks(fenced("x = 2") + fenced("x + 1  # -> 4"))


def test_other_comments_and_other_languages_are_no_claims() -> None:
    assert run_blocks(fenced("x = 2  # two (2, 3)\n# -> 5\n(1, 2)  # what (…) means") + fenced("1/0", "py")) == 0


def test_readme_without_python_fails_clearly() -> None:
    with pytest.raises(AssertionError, match=r"README\.md has no ```python block"):
        run_blocks(fenced("ls", "sh"))


def test_commands_are_found() -> None:
    text = "# T\n\n## Test it\n```\nmake\n\n```\n"
    assert command_under("Test it", text) == ["make"]
    with pytest.raises(AssertionError, match="no heading 'Run it'"):
        command_under("Run it", text)


ROW = {
    "name": "dense",
    "section": "speed",
    "note": "",
    "seconds": {"cupyflash": {"min": 0.0301}, "numpy": {"min": 0.1}},
    "ratios": {"numpy": 3.3223},
    "extra_bytes": {"cupyflash": 3 * 2**20, "numpy": 3 * 2**30},
}
REPORT = {
    "machine": {
        "cpu": "A CPU",
        "cores": 2,
        "os": "Linux",
        "python": "3",
        "numpy": "2",
        "blas": "B",
        "torch": None,
    },
    "date": "2025-01-02T03:04:05+00:00",
    "command": "python benchmarks/bench_cpu.py",
    "commit": "0123456789abcdef",
    "dirty": False,
    "results": [
        ROW,
        {
            **ROW,
            "name": "softcap",
            "section": "feature",
            "seconds": {"cupyflash": {"min": 0.03}, "plain": {"min": 0.02}},
            "ratios": {"plain": 2 / 3},
        },
    ],
}
MARKED = "".join(
    f"<!-- generated: {name} -->\nold\n<!-- end: {name} -->\n"
    for name in ("cpu-performance", "cpu-features", "gpu-performance")
)


def test_tables_are_made_from_results(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu-a.json").write_text(json.dumps(REPORT), encoding="utf-8")
    monkeypatch.setattr(tables.load_reports, "__defaults__", (tmp_path,))
    made = tables.rewrite("before\n" + MARKED + "after\n")
    assert made.startswith("before\n")
    assert made.endswith("after\n")
    assert "old" not in made
    assert "| dense | 30.1 ms | 3.3× | – | 3.0 MiB | 3.0 GiB |" in made
    assert "| softcap | 30.0 ms | 20.0 ms | 1.50× |" in made
    assert "A CPU, 2 cores" in made
    assert "commit 0123456789, 2025-01-02; `python benchmarks/bench_cpu.py`" in made
    assert made.count(tables.NOT_MEASURED) == 1  # no GPU file
    assert tables.rewrite(made) == made


@pytest.fixture
def pages_of_tables(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root whose pages have the marks of all tables between them, and no tables yet; these are short."""
    monkeypatch.setattr(tables, "TABLES", {name: lambda name=name: f"| {name} |\n" for name in tables.TABLES})
    (tmp_path / "docs").mkdir()
    names = list(tables.TABLES)
    for index, page in enumerate(tables.PAGES):
        marks = (f"<!-- generated: {name} -->\n<!-- end: {name} -->\n" for name in names[index :: len(tables.PAGES)])
        (tmp_path / page).write_text("".join(marks), encoding="utf-8")
    return tmp_path


def test_check_tells_old_from_new(
    tables: ModuleType, pages_of_tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(pages_of_tables)]
    before = [(pages_of_tables / page).read_text(encoding="utf-8") for page in tables.PAGES]
    assert tables.main(["--check", *root]) == 1
    said = capsys.readouterr().err
    assert all(f"{page} is out of date" in said for page in tables.PAGES)
    assert [(pages_of_tables / page).read_text(encoding="utf-8") for page in tables.PAGES] == before
    assert tables.main(root) == 0
    assert tables.main(["--check", *root]) == 0


@pytest.mark.parametrize("text", ["nothing", "<!-- generated: kernels -->\n<!-- end: kernels -->\n" * 2])
def test_each_table_has_one_place(tables: ModuleType, pages_of_tables: Path, text: str) -> None:
    (pages_of_tables / tables.PAGES[1]).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="expected each of"):
        tables.main(["--root", str(pages_of_tables)])


def test_highlights_are_some_of_the_cases(tables: ModuleType) -> None:
    assert tables.performance_table([REPORT], ["dense"]).count("\n| ") == 2  # and the line under the heading
    with pytest.raises(ValueError, match=r"\['sparse'\]"):
        tables.performance_table([REPORT], ["sparse"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MARKED.replace("<!-- end: cpu-features -->", ""), "not pairs"),
        (MARKED.replace("cpu-features", "tpu"), r"\['tpu'\]"),
    ],
)
def test_markers_must_be_right(tables: ModuleType, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables.rewrite(text)
