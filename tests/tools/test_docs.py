"""docs/tools.md shows what the tools print, docs/howto/score_mod.md what is compiled."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from cupyflash import mods

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


@pytest.mark.usefixtures("nvrtc")
def test_the_costs_of_mods_are_up_to_date(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("docs_score_mod", DOCS / "howto" / "score_mod.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert sorted([*page.SCORE_MODS, *page.MASK_MODS]) == mods.__all__
    assert page.main(["--check"]) == 0
    text = page.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(page, "PAGE", tmp_path / "score_mod.md")
    for changed in (
        text.replace("| `alibi` | ", "| `alibi` | 1"),
        re.sub(r"by NVRTC [\d.]+", "by NVRTC 1.0.", text).replace("| `alibi` |", "| `bali` |"),
    ):
        assert changed != text
        page.PAGE.write_text(changed, encoding="utf-8")
        assert page.main(["--check"]) == 1
    # Another compiler may count otherwise.
    page.PAGE.write_text(re.sub(r"by NVRTC [\d.]+", "by NVRTC 1.0.", text).replace("7.2", "6.9"), encoding="utf-8")
    assert page.main(["--check"]) == 0
