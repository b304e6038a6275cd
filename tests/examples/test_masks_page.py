"""docs/howto/masks.md shows what the code does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

WRITER = Path(__file__).parents[2] / "docs" / "howto" / "masks.py"


@pytest.fixture
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_masks", WRITER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(writer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert writer.main(["--check"]) == 0, "run `python docs/howto/masks.py`"
    changed = writer.PAGE.read_text(encoding="utf-8").replace("1 1 0", "1 0 0")
    monkeypatch.setattr(writer, "PAGE", tmp_path / "masks.md")
    writer.PAGE.write_text(changed, encoding="utf-8")
    assert writer.main(["--check"]) == 1
    assert writer.main([]) == 0
    assert writer.main(["--check"]) == 0


def test_a_matrix_is_that_of_its_call(writer: ModuleType) -> None:
    assert writer.matrix("is_causal=True", 2) == ["1 0 0 0 0 0", "1 1 0 0 0 0"]
    assert writer.drawing(["window=(0, 0)", "attn_mask=padding[1]"], 2).splitlines() == [
        "window=(0, 0)   attn_mask=padding[1]",
        "1 0 0 0 0 0     1 1 1 0 0 0",
        "0 1 0 0 0 0     1 1 1 0 0 0",
    ]
