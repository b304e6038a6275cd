"""docs/errors.md: every message is what its call says today, and every `raise` is on it or excused."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("docs_errors", DOCS / "errors.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_errors"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["docs_errors"]


@pytest.mark.usefixtures("cxx")
def test_the_page_is_up_to_date(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script.main(["--check"]) == 0
    text = script.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", tmp_path / "errors.md")
    script.PAGE.write_text(text.replace("scale must be finite", "scale must be infinite"), encoding="utf-8")
    assert script.main(["--check"]) == 1


@pytest.mark.usefixtures("cxx")
def test_every_raise_is_on_the_page_or_excused(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script.sites_without_a_call() == []
    sites = script.all_sites()
    unused = [name for name in script.ELSEWHERE if not any(script.excuses(name, site) for site in sites)]
    assert unused == [], "an excuse of nothing"
    groups = [group for group in script.GROUPS if group.title != "Slopes and sinks"]
    monkeypatch.setattr(script, "GROUPS", groups)
    assert {(site.module, site.function) for site in script.sites_without_a_call()} == {
        ("problem.checks", "check_per_head"),
        ("problem.normalize", "_describe"),
    }


def test_raise_statements_are_found(script: ModuleType) -> None:
    sites = script.all_sites()
    assert len(sites) > 120
    places = {(site.module, site.function) for site in sites}
    assert {("problem.checks", "check_flag"), ("backends.pool", "num_threads"), ("tune", "tune")} <= places


@pytest.mark.usefixtures("cxx")
def test_messages_have_one_voice(script: ModuleType) -> None:
    """What was expected, then what it was."""
    for group in filter(script.is_runnable, script.GROUPS):
        for raised in script.run(group):
            text = str(raised.error)
            if isinstance(raised.error, (TypeError, ValueError)):
                assert " must " in text, raised
                assert any(words in text for words in (", but ", "must broadcast")), raised
            assert not text.endswith("."), raised
            assert "  " not in text.partition("\n")[0], raised
