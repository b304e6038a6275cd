"""docs/tools.md shows what the tools print."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.main(["--check"]) == 0
    text = generate.PAGE.read_text(encoding="utf-8")
    for changed in (
        text.replace("missing  CuPy", "ok       CuPy"),
        text.replace("w8-causal ", "w8-casual "),
        text.replace("registers  stack", "registers  stock"),
    ):
        assert changed != text
        monkeypatch.setattr(generate, "PAGE", tmp_path / "tools.md")
        generate.PAGE.write_text(changed, encoding="utf-8")
        assert generate.main(["--check"]) == 1
