"""docs/explanation.md: its pictures and tables are those that the code gives, and what was measured keeps the rule."""

from __future__ import annotations

import importlib.util
import json
import xml.etree.ElementTree
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cupyflash import formulas
from cupyflash.problem.masks import Band, band

WRITER = Path(__file__).parents[2] / "docs" / "explanation.py"


@pytest.fixture
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_explanation", WRITER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_and_pictures_are_up_to_date(writer: ModuleType) -> None:
    assert writer.main(["--check"]) == 0, "run `python docs/explanation.py`"


def test_what_is_stale_is_named_and_mended(
    writer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = writer.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(writer, "PAGE", tmp_path / "explanation.md")
    monkeypatch.setattr(writer, "IMAGES", tmp_path)
    writer.PAGE.write_text(page.replace("| float16 | normal |", "| float17 | normal |"), encoding="utf-8")
    assert writer.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert all(name in said for name in ("explanation.md", *(f"explanation-{name}.svg" for name in writer.PICTURES)))
    assert writer.main([]) == 0
    assert writer.main(["--check"]) == 0
    assert writer.PAGE.read_text(encoding="utf-8") == page
    writer.PAGE.write_text(page.replace("generated: traffic", "generated: trafic"), encoding="utf-8")
    with pytest.raises(ValueError, match="marks"):
        writer.main(["--check"])


def test_pictures_are_whole_and_shown(writer: ModuleType) -> None:
    page = writer.PAGE.read_text(encoding="utf-8")
    for name, draw in writer.PICTURES.items():
        assert f"(images/explanation-{name}.svg)" in page
        root = xml.etree.ElementTree.fromstring(str(draw()))
        width, height = float(root.get("width")), float(root.get("height"))
        for text in root.iter("{http://www.w3.org/2000/svg}text"):
            assert 0 <= float(text.get("x")) <= width
            assert 10 <= float(text.get("y")) <= height


@pytest.mark.parametrize("seen", [Band(), Band(None, 0), Band(-20, 12), Band(3, 40), Band(70, 80)])
def test_visited_tiles_are_those_that_are_seen(writer: ModuleType, seen: Band) -> None:
    block_m, block_n, seqlen_k = 8, 16, 96
    matrix = np.broadcast_to(seen.materialize(np.arange(48)[:, None], np.arange(seqlen_k)), (48, seqlen_k))
    tiles = matrix.reshape(6, block_m, 6, block_n)
    for row in range(6):
        visited = dict(writer.visits(seen, row, block_m, block_n, seqlen_k))
        assert list(visited) == sorted(visited, reverse=True)
        for tile in range(6):
            assert (tile in visited) == tiles[row, :, tile].any()
            assert visited.get(tile, False) == tiles[row, :, tile].all()


def test_running_sums_are_those_of_the_formulas(writer: ModuleType) -> None:
    scores = np.random.default_rng(0).standard_normal(40)
    maxima, sums, factors = writer.running(scores, 8)
    one, keys = np.ones((1, 1)), scores[:, None]
    for tile in range(5):
        seen = keys[: 8 * tile + 8]
        lse = formulas.flash_attention_tiles(one, seen, seen, scale=1.0)[1][0]
        assert maxima[tile] + np.log(sums[tile]) == pytest.approx(lse)
        assert maxima[tile] == seen.max()
        if tile:
            assert factors[tile] == pytest.approx(np.exp(maxima[tile - 1] - maxima[tile]))


def test_recorded_errors_keep_the_rule(writer: ModuleType) -> None:
    rows = json.loads(writer.MEASURED.read_text(encoding="utf-8"))["rows"]
    cases = [(row["dtype"], row["data"], row["keys"]) for row in rows]
    assert cases == [(d, m, n) for d in writer.DTYPES for m in writer.MAGNITUDES for n in writer.LENGTHS]
    for row in rows:
        allowed = 3 if row["dtype"] in ("float16", "bfloat16") else 2 * row["formula"] + 1
        assert 0 < max(row[backend] for backend in writer.BACKENDS) <= allowed


@pytest.mark.usefixtures("cxx")
def test_errors_are_measured(writer: ModuleType) -> None:
    found = writer.measure("float16", 1.0, 128)
    recorded = json.loads(writer.MEASURED.read_text(encoding="utf-8"))["rows"][0]
    assert found["emulator"] == pytest.approx(recorded["emulator"], rel=0.5)  # one rounding, more or less
    assert found["largest score"] == pytest.approx(recorded["largest score"])


def test_the_drawn_walk_is_a_causal_call(writer: ModuleType) -> None:
    seen, _ = band(True, None, "bottom_right", 96, 128)
    walk = [list(writer.visits(seen, row, 16, 16, 128)) for row in range(6)]
    assert [len(tiles) for tiles in walk] == [3, 4, 5, 6, 7, 8]
    assert all([whole for _, whole in tiles] == [False] + [True] * (len(tiles) - 1) for tiles in walk)
