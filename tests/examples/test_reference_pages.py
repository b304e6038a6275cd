"""docs/reference: the docstrings as they are, of all that is public."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

import cupyflash
from cupyflash.tools import doctor
from tests.examples.documents import load_script


@pytest.fixture
def writer() -> ModuleType:
    return load_script("docs/reference.py")


def test_pages_are_up_to_date(writer: ModuleType) -> None:
    assert writer.main(["--check"]) == 0, "run `python docs/reference.py`"


def test_what_is_stale_is_named_and_mended(
    writer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writer, "FOLDER", tmp_path / "reference")
    assert writer.main(["--check"]) == 1
    assert writer.main([]) == 0
    assert writer.main(["--check"]) == 0
    changed = writer.FOLDER / "attention.md"
    changed.write_text(changed.read_text(encoding="utf-8").replace("`scale`", "`scales`"), encoding="utf-8")
    (writer.FOLDER / "other.md").write_text("old", encoding="utf-8")
    capsys.readouterr()
    assert writer.main(["--check"]) == 1
    assert {line.split()[0] for line in capsys.readouterr().err.splitlines()} == {"attention.md", "other.md"}
    assert writer.main([]) == 0
    assert writer.main(["--check"]) == 0
    assert not (writer.FOLDER / "other.md").exists()


def test_all_that_is_public_is_there(writer: ModuleType) -> None:
    names = {one.name for page in writer.PAGES for one in writer.things(page)}
    modules = {name for name in cupyflash.__all__ if isinstance(getattr(cupyflash, name), ModuleType)}
    for name in modules:
        assert names.issuperset(getattr(cupyflash, name).__all__), name
    assert names.issuperset(set(cupyflash.__all__) - modules - {"__version__"})
    assert set(writer.ENVIRONMENT) == set(doctor._OURS)


def test_every_name_has_one_place(writer: ModuleType) -> None:
    names = [one.name for page in writer.PAGES for one in writer.things(page)]
    assert len(names) == len(set(names))


DOCSTRING = """What `other` does with ``code``, 2**3 times.

More of it::

    a  b

    c

Parameters
----------
x, y : float  array
    Of *any* kind.
    Two lines.
**kwargs
    What else.

Returns
-------
A number.

>>> 1 + 1
2
"""


def test_a_docstring_becomes_markdown(writer: ModuleType) -> None:
    one = writer.Described("name", "name(x, y, **kwargs)", DOCSTRING)
    assert writer.body(one, {"other": "page.md#other", "name": "#name"}, 2).splitlines() == [
        *("## name", "", "```text", "name(x, y, **kwargs)", "```", ""),
        *("What [`other`](page.md#other) does with `code`, 2\\**3 times.", ""),
        *("More of it:", "", "```text", "a  b", "", "c", "```", ""),
        *("**Parameters**", ""),
        "- `x`, `y`: float array – Of *any* kind. Two lines",
        *("- `**kwargs`: What else", ""),
        *("**Returns**", "", "- A number", ""),
        *("```pycon", ">>> 1 + 1", "2", "```"),
    ]


def test_types_are_left_out_of_calls(writer: ModuleType) -> None:
    (found,) = writer.described("cupyflash/backends/registry.py", "register_backend")
    assert found.signature == "register_backend(name, backend, *, overwrite=False)"
    (found,) = writer.described("cupyflash/plan/device.py", "DeviceSpec")
    assert found.signature == "DeviceSpec"
    assert [method.name for method in found.methods][:1] == ["arch"]
    assert found.methods[0].signature == "arch"
