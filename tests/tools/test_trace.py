"""`trace`: what the kernel showed of known calls, and the page that is made of it."""

from __future__ import annotations

import base64
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupyflash
import cupyflash.__main__ as command_line
from cupyflash.backends.emulator import Counters, Module
from cupyflash.errors import Unsupported
from cupyflash.mods import document_mask
from cupyflash.testing import acceptance
from cupyflash.tools.sample import LARGEST, MASK_MODS, MASKS, sample_call
from cupyflash.tools.trace import REASONS, Trace, trace
from cupyflash.tools.trace_page import as_html, as_text

pytestmark = pytest.mark.usefixtures("cxx")

BLOCK = 64  # queries, and keys, of a tile in all these calls


def operands(heads: int, seqlen_q: int, seqlen_k: int, head_dim: int = 64, key_heads: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shapes = [(1, heads, seqlen_q)] + [(1, key_heads or heads, seqlen_k)] * 2
    arrays = [rng.standard_normal((*shape, head_dim)).astype(np.float16) for shape in shapes]
    return dict(zip(("query", "key", "value"), arrays, strict=True))


def fates(found: Trace, head: int = 0) -> list[list[tuple[str, tuple[str, ...]]]]:
    return [[(fate.kind, fate.why) for fate in walk.fates] for walk in found.walks if walk.head == head]


def visits(found: Trace, head: int = 0) -> list[list[int]]:
    return [[step.tile for step in walk.steps] for walk in found.walks if walk.head == head]


WHOLE = ("whole", ())
ABOVE, DIAGONAL = ("skipped", ("upper",)), ("cut", ("upper",))


@pytest.fixture(scope="module")
def causal(cxx: object) -> Trace:
    """Three tiles by three."""
    return trace(**operands(2, 192, 192), is_causal=True)


def test_a_causal_call(causal: Trace) -> None:
    for head in (0, 1):
        assert visits(causal, head) == [[0], [1, 0], [2, 1, 0]]
        assert fates(causal, head) == [
            [DIAGONAL, ABOVE, ABOVE],
            [WHOLE, DIAGONAL, ABOVE],
            [WHOLE, WHOLE, DIAGONAL],
        ]
    assert [walk.row_begin for walk in causal.walks] == [0, 64, 128, 0, 64, 128]
    # The longest walks start first.
    assert [len(walk.steps) for walk in sorted(causal.walks, key=lambda walk: walk.block)] == [3, 3, 2, 2, 1, 1]


def assert_walks_hold(found: Trace, arguments: dict[str, Any]) -> None:
    """Scores are those of the definition, and after every step maximum, sum and output are attention over the keys
    that have been visited so far: all by the rule of `cupyflash.testing`."""
    problem = found.problem
    shape = problem.batch_size, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k
    visited, scores = np.zeros(shape, bool), np.full(shape, -np.inf, np.float32)
    for number in range(max(len(walk.steps) for walk in found.walks)):
        out = np.zeros((*shape[:3], problem.head_dim_v), np.float32)
        lse = np.full(shape[:3], -np.inf, np.float32)
        for walk in (walk for walk in found.walks if walk.steps):
            rows = walk.row_begin + np.arange(walk.num_rows)
            place = walk.batch, walk.head + rows % found.pack, rows // found.pack
            step = walk.steps[min(number, len(walk.steps) - 1)]
            keys = slice(step.tile * BLOCK, (step.tile + 1) * BLOCK)
            visited[(*place, keys)], scores[(*place, keys)] = True, step.scores
            np.testing.assert_array_equal(step.row_max, scores[place].max(axis=1))
            if number < len(walk.steps):
                assert_corrects(walk.steps[number - 1].row_max if number else np.full(len(rows), -np.inf), step)
            has_keys = step.row_sum > 0
            out[place] = step.output / np.where(has_keys, step.row_sum, 1)[:, None]
            lse[place] = np.where(has_keys, step.row_max + np.log(np.where(has_keys, step.row_sum, 1)), -np.inf)
        seen = dict(arguments, attn_mask=visited & arguments.get("attn_mask", True))
        acceptance(seen | {"return_lse": True})((out.astype(found.out.dtype), lse), f"step {number + 1}")
    acceptance(arguments, stage="biased")(scores, "trace")
    acceptance(arguments | {"return_lse": True})((found.out, found.lse), "trace")


def assert_corrects(last_max: Any, step: Any) -> None:
    """The factor is exp(m before - m), to the roundings of m log2(e) and of ex2, which is off by 2 units."""
    offset = np.where(np.isneginf(step.row_max), 0, step.row_max).astype(np.float64)
    bound = 2.0**-24 * (4 + 4 * np.abs(offset) + 4 * np.abs(np.where(np.isneginf(last_max), 0, last_max)))
    assert (np.abs(step.correction - np.exp(last_max - offset)) <= bound).all()


def test_steps_are_those_of_the_algorithm(causal: Trace) -> None:
    assert_walks_hold(causal, operands(2, 192, 192) | {"is_causal": True})


def test_a_window_and_the_end_of_the_sequence() -> None:
    arguments = operands(1, 130, 200) | {"window": (40, 10), "align": "bottom_right"}
    found = trace(**arguments)
    assert visits(found) == [[2, 1, 0], [3, 2, 1], [3, 2]]
    before, cut_before = ("skipped", ("lower",)), ("cut", ("lower",))
    assert fates(found) == [
        [cut_before, ("cut", ("upper", "lower")), DIAGONAL, ABOVE],
        [before, cut_before, ("cut", ("upper", "lower")), ("cut", ("upper", "end"))],
        [before, before, cut_before, ("cut", ("end",))],
    ]
    assert_walks_hold(found, arguments)


def test_rows_without_keys() -> None:
    arguments = operands(1, 128, 100) | {"is_causal": True, "align": -64}
    found = trace(**arguments)
    assert visits(found) == [[], [0]]
    assert fates(found)[0] == [ABOVE, ABOVE]
    assert_walks_hold(found, arguments)
    assert "No key takes part" in as_html(found)


def test_a_bool_mask() -> None:
    mask = np.ones((150, 192), bool)
    mask[:64, 64:128] = False
    mask[64:128, 130] = False
    arguments = operands(2, 150, 192) | {"attn_mask": mask}
    found = trace(**arguments)
    assert visits(found, 1) == [[2, 0], [2, 1, 0], [2, 1, 0]]
    assert fates(found, 1) == [
        [WHOLE, ("skipped", ("mask",)), WHOLE],
        [WHOLE, WHOLE, ("cut", ("mask",))],
        [WHOLE] * 3,
    ]
    assert_walks_hold(found, arguments)
    assert [launch.name for launch in found.launches] == ["mask_summary", str(found.spec)]


def test_a_mask_of_each_batch_entry() -> None:
    call = sample_call((2, 1, 70, 150, 32))
    keys = np.arange(150)
    call["attn_mask"] = np.stack([keys < 128, keys >= 70])[:, None, None]
    found = trace(**call)
    assert [[step.tile for step in walk.steps] for walk in found.walks] == [[1, 0]] * 2 + [[2, 1]] * 2
    removed = ("skipped", ("mask",))
    assert [[(fate.kind, fate.why) for fate in walk.fates] for walk in found.walks] == [
        *[[WHOLE, WHOLE, removed]] * 2,
        *[[removed, ("cut", ("mask",)), ("cut", ("end",))]] * 2,
    ]
    assert_walks_hold(found, call)


def test_bounds_that_end_with_a_tile() -> None:
    # Key 63 is the last of query 0, and of the tile.
    found = trace(**operands(1, 128, 128), window=(10, 63))
    assert fates(found) == [[("cut", ("lower",)), DIAGONAL], [("cut", ("lower",)), ("cut", ("lower",))]]
    # Query 63 would see key 64, the first of the next tile, but for the mask.
    mask = np.ones((128, 128), bool)
    mask[:64, 64:] = False
    found = trace(**operands(1, 128, 128), window=(None, 1), attn_mask=mask)
    assert fates(found) == [[DIAGONAL, ("skipped", ("mask",))], [WHOLE, DIAGONAL]]


def test_a_mask_mod() -> None:
    document = np.repeat([0, 1], [64, 128])
    arguments = operands(2, 192, 192) | {"mask_mod": document_mask(document)}
    found = trace(**arguments)
    removed = ("skipped", ("mask_mod",))
    assert fates(found, 1) == [[WHOLE, removed, removed], [removed, WHOLE, WHOLE], [removed, WHOLE, WHOLE]]
    assert_walks_hold(found, arguments)
    assert [launch.name.partition("-")[0] for launch in found.launches] == ["mod_summary", "fwd_sm80"]


def test_heads_that_share_a_tile() -> None:
    arguments = operands(8, 20, 130, key_heads=2) | {"enable_gqa": True, "is_causal": True, "align": "bottom_right"}
    found = trace(**arguments)
    assert found.pack == 4
    assert [(walk.head, walk.row_begin, walk.num_rows) for walk in found.walks] == [
        (0, 0, 64),
        (0, 64, 16),
        (4, 0, 64),
        (4, 64, 16),
    ]
    assert_walks_hold(found, arguments)
    data = data_of(as_html(found))
    assert [group["name"] for group in data["groups"]] == ["heads 0–3, packed", "heads 4–7, packed"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_that_are_changed(dtype: str) -> None:
    call = sample_call((1, 1, 70, 100, 32), dtype=dtype, softcap=3.0, scale=0.5)
    assert_walks_hold(trace(**call), call)


def test_counters_are_the_emulators(causal: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    (launch,) = causal.launches
    assert launch.name == str(causal.spec)
    assert (launch.blocks, launch.threads) == (6, 128)
    counted = launch.counters
    # Every tile is 64 by 64 of 2 bytes: Q once for each of 6 blocks, K and V for each of 12 visits.
    tile = 64 * 64 * 2
    assert launch.bytes_read == 6 * tile + 2 * 12 * tile
    assert launch.bytes_written == 6 * tile + 2 * 192 * 4
    assert launch.bank_conflicts == 0
    assert causal.bytes_moved == launch.bytes_read + launch.bytes_written
    assert causal.matrix_bytes == 2 * 192 * 192 * 2
    assert causal.bytes_of_formula == 4 * 2 * 192 * 64 * 2 + 4 * causal.matrix_bytes
    # mma of 16 x 8 by 16: S and P V of a visit take 64 · 64 · 64 multiplications each.
    assert counted.mma == 12 * 2 * 64**3 // (16 * 8 * 16)

    seen = []
    call = Module.get_function

    def spied(self: Module, name: str) -> Any:
        function = call(self, name)

        def run(*args: Any, observed: Any, **kwargs: Any) -> Counters:
            seen.append(function(*args, **kwargs))
            return function(*args, observed=observed, **kwargs)

        return run

    monkeypatch.setattr(Module, "get_function", spied)
    again = trace(**operands(2, 192, 192), is_causal=True)
    assert [one.counters for one in again.launches] == seen  # looking on changes nothing
    assert again.launches == causal.launches
    np.testing.assert_array_equal(again.out, causal.out)


def test_errors_are_those_against_math(causal: Trace) -> None:
    arguments = operands(2, 192, 192)
    exact = {name: array.astype(np.float64) for name, array in arguments.items()}
    out, lse = cupyflash.attention(**exact, is_causal=True, return_lse=True, backend="math")
    assert causal.error == np.abs(causal.out - out).max() > 0
    assert causal.lse_error == np.abs(causal.lse - lse).max() > 0
    assert 0 < causal.error_units <= 3


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({}, "H200", "only the kernel fwd_sm80 shows its steps.* float16 on H200 is for fwd_sm90"),
        ({"dtype": np.float32}, "A100", "float32 on A100 is for fwd_simt"),
        ({}, "A1000", "device must be one of T4, A100.*, but was 'A1000'"),
        ({"length": 0}, "A100", "there are no tiles to visit: .* L=0"),
    ],
)
def test_refused_calls(changes: dict[str, Any], device: str, message: str) -> None:
    q = np.zeros((1, 1, changes.get("length", 128), 64), changes.get("dtype", np.float16))
    with pytest.raises(ValueError, match=message):
        trace(q, q, q, device=device)


def test_refused_head_dim() -> None:
    q = np.zeros((1, 1, 8, 300), np.float16)
    with pytest.raises(Unsupported, match=r"it has the head dims .* but E was 300"):
        trace(q, q, q)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 2, 0, 4, 4), {}, "shape must hold sizes of at least 1, but was 1,2,0,4,4"),
        ((1, 1, 1024, 1025, 64), {}, rf"shape must have B·H·L·S up to {LARGEST:,}, .* 1,049,600 scores"),
        ((1, 2, 4, 4, 4), {"gqa": 3}, "gqa must divide the 2 query heads, but was 3"),
        ((1, 2, 4, 4, 4), {"seed": -1}, "seed must be at least 0, but was -1"),
    ],
)
def test_refused_samples(shape: tuple[int, ...], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_call(shape, **options)


def test_samples() -> None:
    call = sample_call((2, 4, 70, 90, 32), gqa=2, mask="document", dtype="bfloat16", is_causal=True)
    assert [call[name].shape for name in ("query", "key", "value")] == [(2, 4, 70, 32), (2, 2, 90, 32), (2, 2, 90, 32)]
    assert call["query"].dtype.name == "bfloat16"
    assert call["attn_mask"].shape == (70, 90)
    np.testing.assert_array_equal(sample_call((1, 1, 9, 9, 4))["key"], sample_call((1, 1, 9, 9, 4))["key"])
    assert (sample_call((1, 1, 9, 9, 4), seed=1)["key"] != sample_call((1, 1, 9, 9, 4))["key"]).any()
    for mask in MASKS:
        kept = sample_call((1, 1, 400, 500, 8), mask=mask)["attn_mask"]
        assert kept.dtype == bool
        assert 0 < kept.mean() < 1


# --- the page ------------------------------------------------------------------------------------------------------

VOID = {"meta", "link", "br", "input", "img", "hr"}


class Page(html.parser.HTMLParser):
    """Refuses tags that do not close in order; gathers what else is judged."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.labelled: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        assert len(named) == len(attrs), f"an attribute of {tag} twice"
        self.ids += [named["id"] or ""] if "id" in named else []
        self.sources += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.labelled |= {value or "" for name, value in attrs if name in ("for", "aria-labelledby")}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_page_stands_alone(causal: Trace) -> None:
    text = as_html(causal, "python -m cupyflash trace --mask '<b>'")
    page = Page(text)
    assert page.sources == []
    assert len(page.ids) == len(set(page.ids))
    assert page.labelled <= set(page.ids)
    assert "{{" not in text
    assert "&lt;b&gt;" in text
    # The one address is the name of the language of pictures, which is not fetched.
    assert set(re.findall(r"\w+://[^\"'\s)]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert len(text.encode()) < 2**20
    used = set(re.findall(r'byId\("(\w+)"\)', text))
    assert used <= set(page.ids)


def test_the_page_has_the_numbers(causal: Trace) -> None:
    data = data_of(as_html(causal))
    assert (data["keys"], data["rows"], data["block_m"], data["block_n"], data["pack"]) == (192, 192, 64, 64, 1)
    walks = [walk for group in data["groups"] for walk in group["walks"]]
    assert [group["name"] for group in data["groups"]] == ["head 0", "head 1"]
    for walk, drawn in zip(causal.walks, walks, strict=True):
        assert [step["tile"] for step in drawn["steps"]] == [step.tile for step in walk.steps]
        assert drawn["fates"] == [[fate.kind, list(fate.why)] for fate in walk.fates]
        for step, shown in zip(walk.steps, drawn["steps"], strict=True):
            scores = np.frombuffer(base64.b64decode(shown["scores"]), "<f2").reshape(step.scores.shape)
            np.testing.assert_array_equal(scores, step.scores.astype(np.float16))
            for name, array in (("max", step.row_max), ("sum", step.row_sum), ("factor", step.correction)):
                np.testing.assert_array_equal(np.frombuffer(base64.b64decode(shown[name]), "<f4"), array)
    assert {why for walk in walks for _, whys in walk["fates"] for why in whys} <= set(REASONS)


def test_the_default_page_is_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "walk.html"
    assert command_line.main(["trace", "--causal", "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    Page(text)
    assert len(text.encode()) < 2**20
    assert f"python -m cupyflash trace --causal --out {page}" in text
    printed = capsys.readouterr().out
    assert "20 tiles not visited: all keys are beyond the causal or window bound" in printed
    assert "0 bank conflicts" in printed
    assert str(page) in printed


def test_the_page_has_a_name_without_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line.main(["trace", "--shape", "1,1,64,64,64"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["walk.html"]


def test_text(causal: Trace) -> None:
    lines = list(as_text(causal))
    assert lines[0] == "float16, 2 heads, 192 queries, 192 keys, head dim 64"
    assert lines[1] == f"{causal.spec}, the choice for device A100: 6 blocks"
    assert [line.split()[0] for line in lines[2:5]] == ["6", "6", "6"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--mask random --window 100,none",
        "--mask-mod dilated --softcap 20 --dtype bfloat16",
        "--shape 2,4,40,200,32 --gqa 2 --causal --align bottom_right --mask document",
        "--shape 1,1,100,100,64 --device T4 --seed 3 --align 5 --causal",
        *[f"--mask-mod {name} --shape 1,1,130,130,64" for name in MASK_MODS],
    ],
)
def test_options(options: str, tmp_path: Path) -> None:
    page = tmp_path / "walk.html"
    assert command_line.main(["trace", *options.split(), "--out", str(page)]) == 0
    data = data_of(page.read_text(encoding="utf-8"))
    walks = [walk for group in data["groups"] for walk in group["walks"]]
    for walk in walks:
        assert all(kind == "whole" or why for kind, why in walk["fates"])
        visited = {step["tile"] for step in walk["steps"]}
        assert visited == {tile for tile, (kind, _) in enumerate(walk["fates"]) if kind != "skipped"}


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("--shape 1,2,3", 2, "argument --shape: invalid B,H,L,S,E value: '1,2,3'"),
        ("--window 5", 2, "argument --window: invalid LEFT,RIGHT value: '5'"),
        ("--align middle", 2, "argument --align: invalid top_left, bottom_right or int value: 'middle'"),
        ("--mask banded", 2, "argument --mask: invalid choice: 'banded'"),
        ("--dtype float32", 2, "argument --dtype: invalid choice: 'float32'"),
        ("--gqa 0", 2, "argument --gqa: invalid int >= 1 value: '0'"),
        ("--gqa 3", 1, "gqa must divide the 2 query heads, but was 3"),
        ("--device H100", 1, "float16 on H100 is for fwd_sm90"),
        ("--softcap -1", 1, "softcap must be >= 0"),
    ],
)
def test_bad_options(options: str, status: int, message: str, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "walk.html"
    arguments = ["trace", *options.split(), "--out", str(page)]
    if status == 2:
        with pytest.raises(SystemExit) as stopped:
            command_line.main(arguments)
        assert stopped.value.code == 2
    else:
        assert command_line.main(arguments) == status
    assert message in capsys.readouterr().err
    assert not page.exists()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert command_line.main(["trace", "--out", str(tmp_path / "walk.html")]) == 1
    message = capsys.readouterr().err
    assert "none of c++, g++, clang++ is on the path" in message
    assert "type: sudo apt install g++" in message
